"""Tests of `modeling_molformer_reg.py`.

Against references: the numbers of the public Hugging Face code (`../shared/data/golden`, where that folder exists),
the plain loops of `make_parity_fixture.py` (always), finite differences, and PyTorch's own losses. The rest states
what the model must do whatever its weights are: ignore padding, repeat itself in evaluation, come back from disk
unchanged, and refuse a checkpoint that would leave weights at random.
"""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.activations import ACT2FN

from modeling_molformer_reg import (
    MolformerConfig,
    MolformerForMaskedLM,
    MolformerForRegression,
    MolformerModel,
    draw_random_features,
    masked_mean,
    rotary_tables,
)


ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
GOLDEN = ROOT.parent / "shared" / "data" / "golden"

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.2}  # absolute; hidden states are of size 1
LOGITS_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # absolute
RELATIVE_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # losses and gradients
DIFFERENCES_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # relative; gradients by central differences
SUM_TOLERANCE = 1e-6  # relative; the same float32 terms added in another order

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_random_features": 12,
}
NO_NOISE = {"hidden_dropout_prob": 0.0, "embedding_dropout_prob": 0.0, "redraw_features": False}
HEAD_SIZE = TINY["hidden_size"] // TINY["num_attention_heads"]
CLASSES = (MolformerModel, MolformerForMaskedLM, MolformerForRegression)
AUTO_CLASSES = {
    MolformerModel: AutoModel,
    MolformerForMaskedLM: AutoModelForMaskedLM,
    MolformerForRegression: AutoModelForSequenceClassification,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products wait longer for a second thread than they take, many times longer where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def closed_stdin(monkeypatch):
    with open(os.devnull) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
    return stdin  # closed: whoever asks a question gets an exception


def tiny_model(cls, **config):
    """Returns a tiny model in evaluation mode with no trivial weights: no zero bias, no flat attention."""
    model = cls(MolformerConfig(**{**TINY, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.normal_(1, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "word_embeddings" in name:
                parameter.normal_(0, 0.5)
                parameter[model.config.pad_token_id] = 0
            else:
                parameter.normal_(0, 1.5 / math.sqrt(parameter.shape[-1]))
    return model.eval()


def tiny_batch(lengths=(9, 6, 4, 9)):
    """Returns token ids (B, T) padded on the right, and their mask."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(4, TINY["vocab_size"], mask.shape).where(mask == 1, 2), mask


def masked_labels(input_ids, mask):
    """Returns MLM labels: every third real token, -100 elsewhere."""
    chosen = (torch.arange(input_ids.shape[1]) % 3 == 1) & (mask == 1)
    return input_ids.where(chosen, -100)


def answer(model, *args, **kwargs):
    """Returns the last hidden state, or the logits, of a model with or without a head."""
    output = model(*args, **kwargs)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def task_loss(model, input_ids, mask):
    """Returns the loss of a masked language model or a regression model, on labels that depend on the input alone."""
    if isinstance(model, MolformerForMaskedLM):
        return model(input_ids, mask, labels=masked_labels(input_ids, mask)).loss
    return model(input_ids, mask, labels=input_ids[:, : model.num_labels].float() / 10).loss


def train_steps(model, batch, steps):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        task_loss(model, *batch).backward()
        optimizer.step()
    return model.eval()


def assert_near(got, expected, tolerance):
    """Fails unless all entries agree within `tolerance`, absolute; the reference keeps its own dtype."""
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=0, atol=tolerance)


def assert_relative(got, expected, tolerance):
    """Fails unless the norm of the difference is at most `tolerance` times the norm of the reference."""
    got = got.to(expected.dtype)
    assert (got - expected).norm() <= tolerance * expected.norm(), f"{got} is not {expected}"


# ---- 1. the numbers of the public code ----


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Returns the checkpoint folder and the named tensors of the public Hugging Face code (see its README)."""
    if not GOLDEN.is_dir():
        pytest.skip(f"{GOLDEN} is not there; the reference numbers of the public code are not part of the project.")
    folder = tmp_path_factory.mktemp("golden")
    weights = load_file(GOLDEN / "molformer_tiny.safetensors")
    write_checkpoint(folder, weights, json.loads((GOLDEN / "molformer_tiny_config.json").read_text()))
    return folder, load_file(GOLDEN / "molformer_tiny_io.safetensors")


def write_checkpoint(folder, weights, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.clone() for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_encoder_equals_public_code(golden):
    """Reference: golden hidden states of every layer, last hidden state and pooler output, with padding."""
    folder, tensors = golden
    model = AutoModel.from_pretrained(folder)
    output = model(tensors["input_ids"], tensors["attention_mask"], output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for index, states in enumerate(output.hidden_states):
        assert_near(states, tensors[f"hidden_states.{index}"], TOLERANCE[torch.float32])
    assert_near(output.last_hidden_state, tensors["last_hidden_state"], TOLERANCE[torch.float32])
    assert_near(output.pooler_output, tensors["pooler_output"], TOLERANCE[torch.float32])


def test_attentions_equal_public_code(golden):
    """Reference: golden probabilities of the first layer, and the states that the public code computes from them."""
    folder, tensors = golden
    model = AutoModel.from_pretrained(folder)
    output = model(tensors["input_ids"], tensors["attention_mask"], output_attentions=True)
    assert len(output.attentions) == 3
    assert_near(output.attentions[0], tensors["attentions.0"], TOLERANCE[torch.float32])
    expected = tensors["last_hidden_state_with_output_attentions"]
    assert_near(output.last_hidden_state, expected, TOLERANCE[torch.float32])


def test_encoder_without_mask_equals_public_code(golden):
    """Reference: golden states of the same tokens when no attention mask is given."""
    folder, tensors = golden
    output = AutoModel.from_pretrained(folder)(tensors["input_ids"])
    assert_near(output.last_hidden_state, tensors["last_hidden_state_no_mask"], TOLERANCE[torch.float32])
    assert_near(output.pooler_output, tensors["pooler_output_no_mask"], TOLERANCE[torch.float32])


def test_masked_language_model_equals_public_code(golden):
    """Reference: golden MLM logits and loss."""
    folder, tensors = golden
    model = AutoModelForMaskedLM.from_pretrained(folder)
    output = model(tensors["mlm_input_ids"], tensors["attention_mask"], labels=tensors["mlm_labels"])
    assert_near(output.logits, tensors["mlm_logits"], LOGITS_TOLERANCE[torch.float32])
    assert_relative(output.loss, tensors["mlm_loss"].squeeze(), RELATIVE_TOLERANCE[torch.float32])


def test_published_head_equals_public_code(golden):
    """Reference: golden logits, loss and gradients of the public sequence classification, whose keys tell its head."""
    folder, tensors = golden
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    output = model(tensors["input_ids"], tensors["attention_mask"], labels=tensors["seq_labels"])
    assert_near(output.logits, tensors["seq_logits"], LOGITS_TOLERANCE[torch.float32])
    assert_relative(output.loss, tensors["seq_loss"].squeeze(), RELATIVE_TOLERANCE[torch.float32])
    output.loss.backward()
    gradients = {name.removeprefix("seq_grad/"): t for name, t in tensors.items() if name.startswith("seq_grad/")}
    assert gradients
    for name, gradient in gradients.items():
        assert_relative(model.get_parameter(name).grad, gradient, RELATIVE_TOLERANCE[torch.float32])


# ---- 2. the numbers of plain loops ----


class Parity:
    """The frozen tensors of `make_parity_fixture.py`, by part."""

    def __init__(self):
        self.config = json.loads((FIXTURES / "molformer_parity.json").read_text())
        tensors = load_file(FIXTURES / "molformer_parity.safetensors")
        for part in ("weights", "batch", "answers", "derivatives"):
            prefix = f"{part}/"
            setattr(self, part, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def model(self, cls, dtype, **config):
        model = cls(MolformerConfig(**{**self.config, **config}))
        parts = ("both", config.get("regression_head"))
        keys = {key.split("/")[1]: value for key, value in self.weights.items() if key.split("/")[0] in parts}
        if cls is MolformerForRegression:
            keys = {key: value for key, value in keys.items() if not key.startswith("lm_head.")}
        model.load_state_dict(keys)
        return model.to(dtype).eval()

    def inputs(self):
        return {name: self.batch[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def parity():
    return Parity()


def test_frozen_answers_are_those_of_the_loops(parity):
    """Reference: the loops of make_parity_fixture.py, run again on the frozen weights and inputs."""
    spec = importlib.util.spec_from_file_location("make_parity_fixture", ROOT / "tests" / "make_parity_fixture.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert parity.config == script.CONFIG
    arrays = ({key: value.numpy() for key, value in part.items()} for part in (parity.weights, parity.batch))
    weights, batch = arrays
    answers = script.reference_answers(weights, script.CONFIG, batch)
    assert answers.keys() == parity.answers.keys()
    for name, value in answers.items():
        assert_near(torch.from_numpy(value), parity.answers[name], TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_encoder_equals_plain_loops(parity, dtype):
    """Reference: loops in float64 with quadratic attention and 2 x 2 rotations, one token at a time."""
    model = parity.model(MolformerForMaskedLM, dtype).molformer
    output = model(**parity.inputs(), output_hidden_states=True, output_attentions=True)
    for index, states in enumerate(output.hidden_states):
        assert_near(states, parity.answers[f"hidden_states.{index}"], TOLERANCE[dtype])
    for index, attentions in enumerate(output.attentions):
        assert_near(attentions, parity.answers[f"attentions.{index}"], TOLERANCE[dtype])
    assert_near(output.last_hidden_state, parity.answers["last_hidden_state"], TOLERANCE[dtype])
    assert_near(output.pooler_output, parity.answers["pooler_output"], TOLERANCE[dtype])
    unmasked = model(parity.batch["input_ids"]).last_hidden_state
    assert_near(unmasked, parity.answers["last_hidden_state_no_mask"], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_arbitrary_positions_equal_plain_loops(parity, dtype):
    """Reference: the same loops at positions from 0 to 299, in no order; bfloat16 itself cannot count so far."""
    model = parity.model(MolformerForMaskedLM, dtype).molformer
    output = model(**parity.inputs(), position_ids=parity.batch["position_ids"])
    expected = parity.answers["last_hidden_state_of_positions"]
    assert_near(output.last_hidden_state, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_language_model_equals_plain_loops(parity, dtype):
    """Reference: logits and mean cross-entropy of the loops; gradients by their central differences along cos(k)."""
    model = parity.model(MolformerForMaskedLM, dtype)
    output = model(**parity.inputs(), labels=parity.batch["mlm_labels"])
    assert_near(output.logits, parity.answers["mlm_logits"], LOGITS_TOLERANCE[dtype])
    check_derivatives(model, output.loss, parity, "mlm_loss")
    assert_relative(output.loss, parity.answers["mlm_loss"], RELATIVE_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("head", ["linear", "molformer"])
def test_regression_equals_plain_loops(parity, head, pooling, dtype):
    """Reference: predictions in label units and MSE of standardized labels, two labels, each head and each pooling."""
    model = parity.model(MolformerForRegression, dtype, regression_head=head, pooling=pooling)
    output = model(**parity.inputs(), labels=parity.batch["labels"])
    assert_near(output.logits, parity.answers[f"logits.{head}.{pooling}"], LOGITS_TOLERANCE[dtype])
    assert_relative(output.loss, parity.answers[f"loss.{head}.{pooling}"], RELATIVE_TOLERANCE[dtype])
    if (head, pooling) == ("molformer", "mean"):
        check_derivatives(model, output.loss, parity, "loss.molformer.mean")


def check_derivatives(model, loss, parity, name):
    loss.backward()
    for key, parameter in model.named_parameters():
        direction = torch.cos(torch.arange(parameter.numel(), dtype=torch.float64)).view_as(parameter)
        derivative = (parameter.grad * direction / direction.norm()).sum()
        assert_relative(derivative, parity.derivatives[f"{name}/{key}"], DIFFERENCES_TOLERANCE[parameter.dtype])


# ---- 3. inputs, positions, padding ----


@pytest.mark.parametrize("cls", CLASSES)
def test_inputs_embeds_equal_input_ids(cls):
    """Reference: the same model on token ids."""
    model, (input_ids, mask) = tiny_model(cls), tiny_batch()
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(answer(model, inputs_embeds=embeds, attention_mask=mask), answer(model, input_ids, mask))


def test_one_kind_of_input_is_required():
    model, (input_ids, mask) = tiny_model(MolformerModel), tiny_batch()
    for inputs in ({}, {"input_ids": input_ids, "inputs_embeds": model.get_input_embeddings()(input_ids)}):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(attention_mask=mask, **inputs)


@pytest.mark.parametrize("cls", CLASSES)
def test_explicit_positions_equal_default_positions(cls):
    """Reference: the same model without position_ids."""
    model, (input_ids, mask) = tiny_model(cls), tiny_batch()
    expected = answer(model, input_ids, mask)
    positions = torch.arange(input_ids.shape[1])[None]
    for position_ids in (positions, positions.expand_as(input_ids)):
        assert torch.equal(answer(model, input_ids, mask, position_ids=position_ids), expected)


def test_shuffled_tokens_with_their_positions_give_shuffled_states():
    """Reference: the states of the same tokens in order; the attention is a sum over tokens, whatever their order."""
    model, (input_ids, mask) = tiny_model(MolformerModel).double(), tiny_batch()
    output = model(input_ids, mask)
    order = torch.stack([torch.randperm(input_ids.shape[1]) for _ in input_ids])
    shuffled = model(input_ids.gather(1, order), mask.gather(1, order), position_ids=order)
    expected = output.last_hidden_state.gather(1, order[:, :, None].expand_as(output.last_hidden_state))
    assert_near(shuffled.last_hidden_state, expected, TOLERANCE[torch.float64])
    assert_near(shuffled.pooler_output, output.pooler_output, TOLERANCE[torch.float64])


def test_positions_matter():
    """Without their positions the same shuffled tokens must not give the same states."""
    model, (input_ids, _) = tiny_model(MolformerModel), tiny_batch((9,))
    output, reverse = model(input_ids).pooler_output, model(input_ids.flip(1)).pooler_output
    assert (output - reverse).abs().max() > 0.01


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 2**-8)], ids=str
)
def test_rotary_tables_count_beyond_the_digits_of_the_dtype(dtype, tolerance):
    """Reference: math.cos and math.sin of p * 10000^(-2i/D), the first sine of a pair negated; bfloat16 holds no odd
    number above 256."""
    positions = [0, 1, 201, 257, 1001, 4095]
    cos, sin = rotary_tables(torch.tensor([positions]), HEAD_SIZE, dtype)
    angles = [[p * 10000 ** (-2 * (j % (HEAD_SIZE // 2)) / HEAD_SIZE) for j in range(HEAD_SIZE)] for p in positions]
    sin = torch.cat((-sin[..., : HEAD_SIZE // 2], sin[..., HEAD_SIZE // 2 :]), dim=-1)
    for table, function in ((cos, math.cos), (sin, math.sin)):
        assert table.dtype == dtype and table.shape == (1, len(positions), 1, HEAD_SIZE)
        expected = torch.tensor([[function(a) for a in row] for row in angles], dtype=torch.float64)
        assert_near(table[0, :, 0], expected, tolerance)


@pytest.mark.parametrize("cls", CLASSES)
def test_padding_changes_nothing(cls):
    """Reference: each sequence alone and unpadded."""
    model, lengths = tiny_model(cls).double(), (9, 6, 4, 1)
    input_ids, mask = tiny_batch(lengths)
    padded = answer(model, pad_right(input_ids, 2), pad_right(mask, 0))
    for row, length in enumerate(lengths):
        alone = answer(model, input_ids[row : row + 1, :length])
        together = padded[row : row + 1] if cls is MolformerForRegression else padded[row : row + 1, :length]
        assert_near(together, alone, TOLERANCE[torch.float64])


def pad_right(tensor, value):
    return torch.nn.functional.pad(tensor, (0, 5), value=value)


def test_padding_changes_no_pooled_state():
    """Reference: the mean over the tokens of each sequence alone."""
    model, lengths = tiny_model(MolformerModel).double(), (9, 6, 4)
    input_ids, mask = tiny_batch(lengths)
    pooled = model(input_ids, mask).pooler_output
    for row, length in enumerate(lengths):
        alone = model(input_ids[row : row + 1, :length]).last_hidden_state[0].mean(dim=0)
        assert_near(pooled[row], alone, TOLERANCE[torch.float64])


def test_content_of_masked_positions_does_not_matter():
    """Reference: the same sequences with other tokens where the mask is 0, in the middle too."""
    model, (input_ids, mask) = tiny_model(MolformerModel), tiny_batch()
    mask[:, 2] = 0
    other = torch.randint_like(input_ids, 4, TINY["vocab_size"]).where(mask == 0, input_ids)
    assert not torch.equal(other, input_ids)
    output, changed = model(input_ids, mask), model(other, mask)
    assert torch.equal(output.last_hidden_state[mask == 1], changed.last_hidden_state[mask == 1])
    assert_near(changed.pooler_output, output.pooler_output, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_mask_may_be_of_any_dtype(dtype):
    """Reference: the same mask as int64."""
    model, (input_ids, mask) = tiny_model(MolformerModel), tiny_batch()
    output, expected = model(input_ids, mask.to(dtype)), model(input_ids, mask)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_sequence_without_tokens_stays_finite(pooling):
    model, (input_ids, mask) = tiny_model(MolformerForRegression, pooling=pooling), tiny_batch()
    mask[1] = 0
    assert model(input_ids, mask).logits.isfinite().all()


def test_attentions_are_rows_of_probabilities():
    """Reference: with a feature map that is never negative, rows sum to one and masked tokens get nothing."""
    model, (input_ids, mask) = tiny_model(MolformerModel), tiny_batch()
    for attentions in model(input_ids, mask, output_attentions=True).attentions:
        assert attentions.shape == (4, 4, 9, 9)
        assert (attentions >= 0).all()
        assert_near(attentions.sum(dim=-1), torch.ones(4, 4, 9), TOLERANCE[torch.float32])
        assert (attentions * (1 - mask)[:, None, None]).abs().max() == 0


def test_attentions_in_float16_are_those_of_float32():
    """Of the embedded checkpoint, whose features are large: their products are beyond float16."""
    model = MolformerForRegression.from_pretrained(ROOT / "models" / "molformer-mini").eval()
    input_ids = torch.randint(5, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids, output_attentions=True).attentions
    for attentions, wanted in zip(model.half()(input_ids, output_attentions=True).attentions, expected, strict=True):
        assert attentions.dtype == torch.float16 and attentions.isfinite().all()
        assert_near(attentions.float().sum(dim=-1), wanted.sum(dim=-1), 0.01)


def test_the_mean_of_a_long_molecule_is_within_float16():
    states = torch.full((1, 6000, 2), 12.0, dtype=torch.float16)
    mean = masked_mean(states, torch.ones(1, 6000))
    assert mean.dtype == torch.float16 and (mean == 12).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_tuple_output_holds_the_same_tensors(cls):
    """Reference: the output with names."""
    model, (input_ids, mask) = tiny_model(cls), tiny_batch()
    kwargs = {"output_hidden_states": True, "output_attentions": True}
    named = model(input_ids, mask, **kwargs).to_tuple()
    plain = model(input_ids, mask, **kwargs, return_dict=False)
    assert isinstance(plain, tuple) and len(plain) == len(named)
    assert torch.equal(plain[0], named[0])


# ---- 4. activations, feature counts, dtypes ----


@pytest.mark.parametrize("name", list(ACT2FN))
@pytest.mark.parametrize("field", ["hidden_act", "feature_map_kernel"])
def test_every_activation_gives_finite_loss_and_gradients(field, name):
    """A signed feature map gives no probabilities, its normalizer may be clamped; the LayerNorm keeps it finite."""
    model, (input_ids, mask) = MolformerForMaskedLM(MolformerConfig(**{**TINY, field: name})), tiny_batch()
    loss = task_loss(model, input_ids, mask)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.eval()(input_ids, mask).logits.isfinite().all()


@pytest.mark.parametrize("name", ["prelu", "xielu"])
def test_activation_with_weights_is_initialized_in_a_fresh_head(name, tmp_path):
    """Reference: the activation as the library makes it; a checkpoint of the encoder has no such weights."""
    tiny_config = MolformerConfig(**{**TINY, "hidden_act": name})
    MolformerModel(tiny_config).save_pretrained(tmp_path)
    expected = ACT2FN[name].state_dict()
    assert expected
    masked_lm = MolformerForMaskedLM.from_pretrained(tmp_path)
    regression = MolformerForRegression.from_pretrained(tmp_path, regression_head="molformer")
    for activation in (masked_lm.lm_head.transform.activation, regression.classifier.activation):
        for key, value in activation.state_dict().items():
            assert torch.equal(value.to(expected[key].dtype), expected[key]), key


@pytest.mark.parametrize("features", [1, HEAD_SIZE - 1, HEAD_SIZE, HEAD_SIZE * 5 // 2])
def test_any_number_of_random_features_trains_and_reloads(features, tmp_path):
    """Reference: the model before it was saved."""
    model, batch = MolformerForRegression(MolformerConfig(**TINY | {"num_random_features": features})), tiny_batch()
    model = train_steps(model, batch, steps=1)
    assert all(feature_map.weight.shape == (HEAD_SIZE, features) for feature_map in model.molformer.feature_maps())
    output = answer(model, *batch)
    assert output.isfinite().all()
    model.save_pretrained(tmp_path)
    assert_near(answer(MolformerForRegression.from_pretrained(tmp_path), *batch), output, TOLERANCE[torch.float32])


@pytest.mark.parametrize("cls", CLASSES)
def test_float64_agrees_with_float32(cls):
    """Reference: the same weights in float64."""
    model, batch = tiny_model(cls), tiny_batch()
    output = answer(copy.deepcopy(model).double(), *batch)
    assert output.dtype == torch.float64
    assert_near(answer(model, *batch).double(), output, TOLERANCE[torch.float32])


@pytest.mark.parametrize("cls", CLASSES)
def test_bfloat16_agrees_with_float32(cls):
    """Reference: the same weights in float32."""
    model, batch = tiny_model(cls), tiny_batch()
    output = answer(copy.deepcopy(model).bfloat16(), *batch)
    expected = torch.float32 if cls is MolformerForRegression else torch.bfloat16  # predictions keep their digits
    assert output.dtype == expected
    assert_near(output, answer(model, *batch), TOLERANCE[torch.bfloat16])
    with torch.autocast("cpu", torch.bfloat16):  # as --bf16 has it, the weights in float32
        output = answer(model, *batch)
    assert_near(output.float(), answer(model, *batch), TOLERANCE[torch.bfloat16] / 2)


@pytest.mark.parametrize("cls", [MolformerForMaskedLM, MolformerForRegression])
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_trains(cls, autocast):
    """Reference: the loss of the same weights in float32; features are redrawn too, though QR needs float32."""
    model, batch = tiny_model(cls, **NO_NOISE), tiny_batch()
    expected = task_loss(model, *batch)
    model = model.train() if autocast else model.train().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = task_loss(model, *batch)
        assert loss.dtype == torch.float32
        assert_near(loss, expected, TOLERANCE[torch.bfloat16])
        model.config.redraw_features = True
        loss = task_loss(model, *batch)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- 5. random features, determinism, gradients ----


@pytest.mark.parametrize("deterministic_eval", [True, False])
@pytest.mark.parametrize("cls", [MolformerForMaskedLM, MolformerForRegression])
def test_evaluation_repeats_bit_for_bit(cls, deterministic_eval):
    """Reference: the first call; before training and after it, and no call touches the random state or the maps."""
    model, batch = tiny_model(cls, deterministic_eval=deterministic_eval), tiny_batch()
    for steps in (0, 3):
        train_steps(model, batch, steps)
        state, maps = torch.get_rng_state(), feature_weights(model)
        first, second = answer(model, *batch), answer(model, *batch)
        assert torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(feature_weights(model), maps)


@pytest.mark.parametrize("training", [False, True])
def test_a_head_that_reads_the_first_token_costs_no_more_than_that(training):
    """Reference: the model when all of its hidden states are asked for; answers, gradients, and what is computed."""
    torch.manual_seed(0)
    model = MolformerForRegression(MolformerConfig(**{**TINY, **NO_NOISE, "pooling": "cls"})).train(training)
    batch = {"input_ids": torch.randint(3, 20, (3, 7)), "labels": torch.randn(3)}
    batch["attention_mask"] = (torch.arange(7) < torch.tensor([7, 5, 4])[:, None]).long()
    lengths = []
    for layer in model.molformer.encoder.layer:
        layer.output.register_forward_hook(lambda *hooked: lengths.append(hooked[-1].shape[1]))
    found = []
    for whole in (False, True):
        model.zero_grad()
        answer = model(**batch, output_hidden_states=whole)
        answer.loss.backward()
        found.append((answer.logits, {name: p.grad for name, p in model.named_parameters()}))
    half = len(lengths) // 2
    assert lengths == [*[7] * (half - 1), 1, *[7] * half]
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[1][1].items():
        assert torch.allclose(found[0][1][name], gradient, atol=1e-6), name
    assert model.molformer(batch["input_ids"], first=2).last_hidden_state.shape[1] == 2


def feature_weights(model):
    return torch.stack([feature_map.weight.clone() for feature_map in model.base_model.feature_maps()])


def test_training_redraws_every_feature_map_at_every_forward():
    model, batch = tiny_model(MolformerForRegression).train(), tiny_batch()
    seen = [feature_weights(model)]
    for _ in range(3):
        task_loss(model, *batch)
        seen.append(feature_weights(model))
    for before, after in pairwise(seen):
        assert ((before - after).flatten(1).norm(dim=1) > 0.1).all()  # each layer
    assert not torch.equal(seen[-1][0], seen[-1][1])  # layers draw for themselves


def test_training_keeps_feature_maps_without_redraw():
    model, batch = tiny_model(MolformerForRegression, redraw_features=False), tiny_batch()
    before = feature_weights(model)
    train_steps(model, batch, steps=2)
    assert torch.equal(feature_weights(model), before)


def test_evaluation_uses_the_last_draw_of_training():
    """Reference: the loss of that training step, without dropout."""
    model, batch = tiny_model(MolformerForRegression, **NO_NOISE | {"redraw_features": True}), tiny_batch()
    loss = task_loss(model.train(), *batch)
    assert_relative(task_loss(model.eval(), *batch), loss, SUM_TOLERANCE)


def test_redraw_takes_one_qr_for_all_layers(monkeypatch):
    """The wrapper counts and calls through."""
    model, batch = tiny_model(MolformerForRegression, num_hidden_layers=3).train(), tiny_batch()
    calls, qr = [], torch.linalg.qr

    def counted(matrix, *args, **kwargs):
        calls.append(tuple(matrix.shape))
        return qr(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    task_loss(model, *batch)
    assert calls == [(3, 2, HEAD_SIZE, HEAD_SIZE)]  # layers, blocks
    task_loss(model.eval(), *batch)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("features", [HEAD_SIZE, HEAD_SIZE * 5 // 2])
def test_blocks_of_random_features_are_orthogonal(features, dtype):
    """Reference: Choromanski et al. 2021; columns of a block are orthogonal, with the norms of Gaussian vectors."""
    weights = draw_random_features(500, HEAD_SIZE, features, dtype=dtype)
    for block in weights.split(HEAD_SIZE, dim=-1):
        gram = block.transpose(1, 2) @ block
        assert_near(gram, torch.diag_embed(gram.diagonal(dim1=1, dim2=2)), TOLERANCE[dtype])
        # the square norm of a Gaussian vector has mean D and variance 2D
        squares = gram.diagonal(dim1=1, dim2=2)
        assert abs(squares.mean() - HEAD_SIZE) < 5 * math.sqrt(2 * HEAD_SIZE / squares.numel())
        assert abs(squares.var() / (2 * HEAD_SIZE) - 1) < 0.5
    if features > HEAD_SIZE:  # blocks know nothing of each other
        cross = weights[..., :HEAD_SIZE].transpose(1, 2) @ weights[..., HEAD_SIZE : 2 * HEAD_SIZE]
        assert cross.abs().mean() > 0.5


def test_fresh_model_has_orthogonal_feature_maps():
    model = MolformerModel(MolformerConfig(**TINY))
    first, second = feature_weights(model)
    assert not torch.equal(first, second)
    for weight in (first, second):
        gram = weight[:, :HEAD_SIZE].T @ weight[:, :HEAD_SIZE]
        assert_near(gram, torch.diag(gram.diagonal()), TOLERANCE[torch.float32])


@pytest.mark.parametrize("cls", CLASSES)
def test_feature_maps_come_back_from_disk(cls, tmp_path):
    """Reference: the maps in memory."""
    model = tiny_model(cls)
    model.base_model.redraw_random_features()
    model.save_pretrained(tmp_path)
    assert torch.equal(feature_weights(cls.from_pretrained(tmp_path)), feature_weights(model))


def test_two_forwards_before_one_backward():
    """Reference: the gradients of two backwards with the same draws; a redraw leaves the first graph alone."""
    config = NO_NOISE | {"redraw_features": True}
    model = tiny_model(MolformerForRegression, **config).train()
    batches, twin = (tiny_batch(), tiny_batch()), copy.deepcopy(model)
    torch.manual_seed(1)
    sum(task_loss(model, *batch) for batch in batches).backward()
    torch.manual_seed(1)
    for batch in batches:
        task_loss(twin, *batch).backward()
    assert_same_gradients(model, twin)


def assert_same_gradients(model, reference):
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, other.grad, rtol=RELATIVE_TOLERANCE[torch.float32], atol=1e-6, msg=name
        )


@pytest.mark.parametrize("redraw", [True, False])
@pytest.mark.parametrize("cls", [MolformerForMaskedLM, MolformerForRegression])
def test_gradient_checkpointing_changes_nothing(cls, redraw):
    """Reference: loss and gradients without it, the same random features being drawn."""
    model, batch = tiny_model(cls, **NO_NOISE | {"redraw_features": redraw}).train(), tiny_batch()
    twin = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.molformer.encoder.layer)
    losses = []
    for each in (model, twin):
        torch.manual_seed(1)
        losses.append(task_loss(each, *batch))
        losses[-1].backward()
    assert_relative(losses[0], losses[1], SUM_TOLERANCE)
    assert_same_gradients(model, twin)


# ---- 6. saving and loading ----


def assert_same_weights(model, reference):
    expected = reference.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("num_labels", [1, 2, 3])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("head", ["linear", "molformer"])
def test_regression_model_comes_back_from_disk(head, pooling, num_labels, tmp_path):
    """Reference: weights, configuration and predictions before it was saved."""
    labels = {
        "label_mean": [1.5, -2.0, 0.25][:num_labels],
        "label_std": [2.0, 0.5, 3.0][:num_labels],
        "label_names": ["logD", "logP", "pKa"][:num_labels],
    }
    config = {"regression_head": head, "pooling": pooling, "num_labels": num_labels, **labels}
    model, batch = tiny_model(MolformerForRegression, **config), tiny_batch()
    model.save_pretrained(tmp_path)
    for auto_class in (MolformerForRegression, AutoModelForSequenceClassification):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is MolformerForRegression and not loaded.training
        assert {field: getattr(loaded.config, field) for field in config} == config
        assert_same_weights(loaded, model)
        assert_near(answer(loaded, *batch), answer(model, *batch), TOLERANCE[torch.float32])


@pytest.mark.parametrize("tied", [True, False])
def test_masked_language_model_comes_back_from_disk(tied, tmp_path):
    """Reference: the model before it was saved; a tied decoder is the embedding itself, an untied one is not."""
    model, batch = tiny_model(MolformerForMaskedLM, tie_word_embeddings=tied), tiny_batch()
    model.save_pretrained(tmp_path)
    for loaded in (model, AutoModelForMaskedLM.from_pretrained(tmp_path)):
        assert (loaded.lm_head.decoder.weight is loaded.get_input_embeddings().weight) is tied
        assert_same_weights(loaded, model)
        assert_near(answer(loaded, *batch), answer(model, *batch), TOLERANCE[torch.float32])


def test_tied_decoder_saves_its_weights_once():
    """Reference: the untied model, which has V * C parameters more."""
    tied, untied = (tiny_model(MolformerForMaskedLM, tie_word_embeddings=tied) for tied in (True, False))
    assert untied.num_parameters() - tied.num_parameters() == TINY["vocab_size"] * TINY["hidden_size"]


def test_encoder_comes_back_from_disk(tmp_path):
    """Reference: the encoder before it was saved."""
    model, batch = tiny_model(MolformerModel), tiny_batch()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is MolformerModel
    assert_same_weights(loaded, model)
    assert_near(answer(loaded, *batch), answer(model, *batch), TOLERANCE[torch.float32])


@pytest.mark.parametrize("cls", CLASSES)
def test_pickled_weights_load(cls, tmp_path):
    """Reference: the model whose state dict was written with torch.save, as older checkpoints were."""
    model, batch = tiny_model(cls), tiny_batch()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = AUTO_CLASSES[cls].from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert_near(answer(loaded, *batch), answer(model, *batch), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("published", [True, False])
def test_dtype_is_honored(published, dtype, hub_checkpoint, tmp_path):
    folder = hub_checkpoint(tmp_path / "hub", heads=("classifier.",) if published else ())
    model = MolformerForRegression.from_pretrained(folder, dtype=dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}


@pytest.fixture
def hub_models():
    """Returns a masked language model and a published regression model over the same encoder."""
    regression = tiny_model(MolformerForRegression, regression_head="molformer", pooling="mean")
    masked_lm = tiny_model(MolformerForMaskedLM)
    masked_lm.molformer.load_state_dict(regression.molformer.state_dict())
    return masked_lm, regression


@pytest.fixture
def hub_checkpoint(hub_models):
    """Returns a function that writes a checkpoint as the Hub has it: remote code named, rotary tables saved."""

    def write(folder, heads=("lm_head.", "classifier."), change=None, **config):
        masked_lm, regression = hub_models
        weights = masked_lm.state_dict() | regression.state_dict()
        weights = {key: value for key, value in weights.items() if key.startswith(("molformer.", *heads))}
        rotary = "molformer.encoder.layer.0.attention.self.rotary_embeddings"
        weights |= {f"{rotary}.inv_freq": torch.ones(4), f"{rotary}.cos_cached": torch.ones(9, 8)}
        for key, value in (change or {}).items():
            if value is None:
                del weights[key]
            else:
                weights[key] = value
        modeling = "modeling_molformer.Molformer"
        auto_map = {
            "AutoConfig": "configuration_molformer.MolformerConfig",
            "AutoModel": f"{modeling}Model",
            "AutoModelForMaskedLM": f"{modeling}ForMaskedLM",
            "AutoModelForSequenceClassification": f"{modeling}ForSequenceClassification",
        }
        hub = {"model_type": "molformer", "architectures": ["MolformerForMaskedLM"], "auto_map": auto_map}
        return write_checkpoint(folder, weights, {**TINY, "torch_dtype": "float32", **hub, **config})

    return write


def test_hub_checkpoint_loads_without_its_remote_code(hub_checkpoint, hub_models, closed_stdin, tmp_path):
    """Reference: the models whose weights it holds. Its code is not in the folder, and nobody can answer a prompt."""
    assert closed_stdin.closed
    masked_lm, regression = hub_models
    folder, batch = hub_checkpoint(tmp_path / "hub"), tiny_batch()
    assert type(AutoConfig.from_pretrained(folder)) is MolformerConfig
    for auto_class, expected in (
        (AutoModel, masked_lm.molformer),
        (AutoModelForMaskedLM, masked_lm),
        (AutoModelForSequenceClassification, regression),
    ):
        loaded = auto_class.from_pretrained(folder)
        assert type(loaded) is type(expected)
        assert_same_weights(loaded, expected)
        assert_near(answer(loaded, *batch), answer(expected, *batch), TOLERANCE[torch.float32])


def test_published_head_is_recognized_by_its_keys(hub_checkpoint, tmp_path):
    """The configuration names neither head nor pooling; arguments of the call survive the second look."""
    folder = hub_checkpoint(tmp_path / "hub")
    kwargs = {"label_mean": [2.0], "label_std": [0.5], "output_hidden_states": True}
    model, info = MolformerForRegression.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert (model.config.regression_head, model.config.pooling) == ("molformer", "mean")
    assert {field: getattr(model.config, field) for field in kwargs} == kwargs
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_pooling_can_be_named_for_a_published_head(hub_checkpoint, tmp_path):
    model = MolformerForRegression.from_pretrained(hub_checkpoint(tmp_path / "hub"), pooling="cls")
    assert (model.config.regression_head, model.config.pooling) == ("molformer", "cls")


@pytest.mark.parametrize("cls", CLASSES)
def test_saved_checkpoint_names_its_own_code(cls, hub_checkpoint, tmp_path):
    """The source's remote code must not leak into what is saved, and the file that is named is there."""
    model = AUTO_CLASSES[cls].from_pretrained(hub_checkpoint(tmp_path / "hub"))
    assert not getattr(model.config, "auto_map", None)
    model.save_pretrained(tmp_path / "saved")
    module = "modeling_molformer_reg"
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": f"{module}.MolformerConfig",
        AUTO_CLASSES[cls].__name__: f"{module}.{cls.__name__}",
    }
    assert (tmp_path / "saved" / f"{module}.py").read_text() == (ROOT / f"{module}.py").read_text()


@pytest.mark.parametrize("cls", CLASSES)
def test_config_of_a_loaded_model_builds_another(cls, hub_checkpoint, tmp_path):
    """Auto classes look into `config.auto_map` if there is one; a reset one must not stop them."""
    folder = hub_checkpoint(tmp_path / "hub")
    config = cls.from_pretrained(folder).config
    assert type(AUTO_CLASSES[cls].from_config(config)) is cls
    assert type(AUTO_CLASSES[cls].from_pretrained(folder, config=config)) is cls


def test_saved_checkpoint_loads_where_the_project_is_not(tmp_path):
    """Reference: the predictions in this process. A fresh Python elsewhere loads the copied file as remote code."""
    config = {"regression_head": "molformer", "pooling": "mean", "label_mean": [2.0], "label_std": [1.2]}
    model, (input_ids, mask) = tiny_model(MolformerForRegression, **config), tiny_batch()
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    program = (
        "import importlib.util, json, sys, torch\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "assert importlib.util.find_spec('modeling_molformer_reg') is None\n"
        "model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "inputs = [torch.tensor(x) for x in json.loads(sys.argv[2])]\n"
        "print(json.dumps([type(model).__name__, model(*inputs).logits.tolist()]))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    inputs = json.dumps([input_ids.tolist(), mask.tolist()])
    command = [sys.executable, "-c", program, str(tmp_path / "saved"), inputs]
    run = subprocess.run(
        command,
        cwd=tmp_path / "elsewhere",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    name, logits = json.loads(run.stdout.splitlines()[-1])
    assert name == "MolformerForRegression"
    assert_near(torch.tensor(logits), model(input_ids, mask).logits.detach(), TOLERANCE[torch.float32])


LAYER = "molformer.encoder.layer.1"
CLASSIFIER = {f"classifier.{name}": None for name in ("dense.weight", "dense.bias", "dense2.weight", "dense2.bias")}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{LAYER}.output.dense.weight", None),
        (f"{LAYER}.attention.self.feature_map.weight", None),
        ("molformer.embeddings.word_embeddings.weight", None),
        (f"{LAYER}.attention.self.extra.weight", torch.ones(3)),
        ("molformer.encoder.layer.2.output.dense.bias", torch.ones(32)),  # one layer more than the configuration has
        ("score.weight", torch.ones(1, 32)),
    ],
)
def test_encoder_that_does_not_fit_is_refused(cls, key, value, hub_checkpoint, tmp_path):
    """Missing weights would stay at random, surplus ones would be dropped in silence; the message names the key."""
    folder = hub_checkpoint(tmp_path / "hub", change={key: value})
    name = key.removeprefix("molformer.") if cls is MolformerModel else key
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        AUTO_CLASSES[cls].from_pretrained(folder)


@pytest.mark.parametrize("cls", CLASSES)
def test_weights_of_another_model_are_refused(cls, tmp_path):
    weights, config = {"bert.pooler.weight": torch.ones(2)}, {**TINY, "model_type": "molformer"}
    folder = write_checkpoint(tmp_path / "other", weights, config)
    with pytest.raises(ValueError, match="no MoLFormer checkpoint"):
        AUTO_CLASSES[cls].from_pretrained(folder)


@pytest.mark.parametrize(
    ("cls", "change", "config", "match"),
    [
        (MolformerForMaskedLM, {"lm_head.decoder.weight": None}, {}, r"in part.*lm_head\.decoder\.weight"),
        (MolformerForMaskedLM, {"lm_head.transform.dense.bias": None}, {}, r"in part.*transform\.dense\.bias"),
        (MolformerForRegression, {"classifier.dense2.bias": None}, {}, r"in part.*classifier\.dense2\.bias"),
        (MolformerForRegression, {"classifier.dense.weight": None}, {}, r"fit nothing.*classifier\.dense"),
        (MolformerForRegression, {"classifier.out_proj.weight": None}, {}, r"in part.*out_proj\.weight"),
        (MolformerForRegression, CLASSIFIER | {"classifier.out_proj.bias": None}, {}, r"in part.*out_proj\.bias"),
        (MolformerForRegression, CLASSIFIER, {"regression_head": "molformer"}, r"in part.*classifier\.dense"),
        (MolformerForRegression, {"classifier.foo.weight": torch.ones(1, 32)}, {}, r"classifier\.foo\.weight"),
        (MolformerForRegression, {}, {"regression_head": "linear"}, r"fit nothing.*classifier\.dense"),
    ],
)
def test_head_that_does_not_fit_is_refused(cls, change, config, match, hub_checkpoint, tmp_path):
    folder = hub_checkpoint(tmp_path / "hub", change=change)
    with pytest.raises(ValueError, match=match):
        cls.from_pretrained(folder, **config)
    folder = hub_checkpoint(tmp_path / "hub", change=change, **config)
    with pytest.raises(ValueError, match=match):
        AUTO_CLASSES[cls].from_pretrained(folder)


@pytest.mark.parametrize("head", ["linear", "molformer"])
def test_a_head_for_other_labels_replaces_the_old_one_where_that_is_asked_for(head, tmp_path):
    """As the library's other classes do; the scale of the old labels goes with their head."""
    model = tiny_model(MolformerForRegression, regression_head=head, label_mean=[2.0], label_std=[1.2])
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"mismatch .*classifier.out_proj.bias \(1,\), not \(2,\)"):
        MolformerForRegression.from_pretrained(tmp_path, num_labels=2)
    again = MolformerForRegression.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True)
    assert again.head_is_new and again(*tiny_batch()).logits.shape == (4, 2)
    assert again.config.label_mean is again.config.label_std is None
    same = MolformerForRegression.from_pretrained(tmp_path, num_labels=1)
    assert not same.head_is_new and same.config.label_mean == [2.0]


@pytest.mark.parametrize("cls", CLASSES)
def test_an_empty_batch_has_empty_outputs(cls):
    model = tiny_model(cls).eval()
    input_ids, mask = tiny_batch()
    output = model(input_ids[:0], mask[:0])
    assert len(output.last_hidden_state if cls is MolformerModel else output.logits) == 0


@pytest.mark.parametrize("key", ["classifier.foo.weight", "score.weight", "head.out_proj.weight"])
def test_head_of_wrong_names_is_refused(key, hub_checkpoint, tmp_path):
    """Otherwise a head under another name would be dropped and a random one trained."""
    folder = hub_checkpoint(tmp_path / "hub", heads=(), change={key: torch.ones(1, 32)})
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        MolformerForRegression.from_pretrained(folder)


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("cls", [MolformerForMaskedLM, MolformerForRegression])
def test_encoder_without_head_gets_a_fresh_one(cls, prefixed, hub_checkpoint, hub_models, tmp_path):
    """Reference: the encoder, with and without the prefix in its keys; the head is linear on the first token."""
    encoder = hub_models[0].molformer
    if prefixed:
        folder = hub_checkpoint(tmp_path / "hub", heads=())
    else:
        folder = tmp_path / "encoder"
        encoder.save_pretrained(folder)
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert_same_weights(model.molformer, encoder)
    assert info["missing_keys"] == {key for key in model.state_dict() if not key.startswith("molformer.")}
    assert all(value.isfinite().all() for value in model.state_dict().values())
    if cls is MolformerForRegression:
        assert (model.config.regression_head, model.config.pooling) == ("linear", "cls")
        assert model.classifier.out_proj.bias.abs().max() == 0
        assert 0.01 < model.classifier.out_proj.weight.std() < 0.03  # initializer_range


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_fresh_head_has_the_labels_of_the_call(num_labels, hub_checkpoint, tmp_path):
    folder = hub_checkpoint(tmp_path / "hub", heads=())
    labels = {"label_mean": [1.0] * num_labels, "label_std": [2.0] * num_labels}
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=num_labels, **labels)
    assert answer(model, *tiny_batch()).shape == (4, num_labels)


# ---- 7. losses and units ----


@pytest.mark.parametrize("num_labels", [1, 3])
def test_predictions_are_in_label_units(num_labels):
    """Reference: the same weights without standardization: y = standardized * std + mean, the loss is the MSE of z."""
    mean, std = torch.tensor([2.0, -1.0, 0.5])[:num_labels], torch.tensor([1.2, 0.3, 4.0])[:num_labels]
    model, batch = tiny_model(MolformerForRegression, num_labels=num_labels), tiny_batch()
    standardized = answer(model, *batch)
    labels = torch.randn(4, num_labels) * std + mean
    model.config.label_mean, model.config.label_std = mean.tolist(), std.tolist()
    output = model(*batch, labels=labels)
    assert output.logits.shape == (4, num_labels)
    assert_near(output.logits, standardized * std + mean, TOLERANCE[torch.float32])
    expected = torch.nn.functional.mse_loss(standardized, (labels - mean) / std)
    assert_relative(output.loss, expected, SUM_TOLERANCE)
    in_units = (((output.logits - labels) / std) ** 2).mean()
    assert_relative(output.loss, in_units, RELATIVE_TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_labels_of_one_dimension_equal_those_of_two(dtype):
    """Reference: labels (B, 1) in float32."""
    model, batch = tiny_model(MolformerForRegression), tiny_batch()
    labels = torch.tensor([1, 3, -2, 0])
    expected = model(*batch, labels=labels[:, None].float()).loss
    assert torch.equal(model(*batch, labels=labels.to(dtype)).loss, expected)


def test_missing_labels_count_for_nothing():
    """Reference: the squared errors of the known labels, summed by hand; no gradient where a label is missing."""
    model, batch = tiny_model(MolformerForRegression, num_labels=2), tiny_batch()
    labels = torch.randn(4, 2)
    labels[0, 1] = labels[2, 0] = labels[2, 1] = torch.nan
    output = model(*batch, labels=labels)
    known = labels.isfinite()
    errors = (output.logits - labels)[known]
    torch.testing.assert_close(output.loss, (errors**2).mean())
    torch.testing.assert_close(model(*batch, labels=labels, num_items_in_batch=10).loss, (errors**2).sum() / 10)
    gradient = torch.autograd.grad(output.loss, output.logits, allow_unused=True)[0]
    assert gradient is None or gradient[~known].abs().max() == 0
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    none = torch.full((4, 2), torch.nan)
    assert model(*batch, labels=none).loss == 0
    loss = model(*batch, labels=none, num_items_in_batch=torch.tensor(0)).loss  # as the trainer calls it
    loss.backward()
    assert loss == 0 and all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_missing_label_has_no_curvature_and_an_empty_batch_no_loss():
    """Reference: the second derivative of a mean square by the head's bias, twice the share of the known labels."""
    model, batch = tiny_model(MolformerForRegression, num_labels=2).eval(), tiny_batch()
    labels = torch.randn(4, 2)
    labels[:, 1] = labels[0, 0] = torch.nan
    bias = model.classifier.out_proj.bias
    gradient = torch.autograd.grad(model(*batch, labels=labels).loss, bias, create_graph=True)[0]
    rows = [torch.autograd.grad(entry, bias, retain_graph=True)[0] for entry in gradient]
    torch.testing.assert_close(torch.stack(rows), torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
    for count in (1, 2):
        model = tiny_model(MolformerForRegression, num_labels=count)
        assert model(*(part[:0] for part in batch), labels=torch.empty(0, count)).loss == 0


@pytest.mark.parametrize(
    ("num_labels", "shape"), [(1, (3,)), (1, (4, 2)), (3, (4,)), (3, (4, 2)), (3, (3, 4)), (3, (12,)), (3, (4, 3, 1))]
)
def test_labels_of_wrong_shape_are_refused(num_labels, shape):
    """Also where the number of entries happens to fit: (K, B) would pair labels with the wrong molecules."""
    model, batch = tiny_model(MolformerForRegression, num_labels=num_labels), tiny_batch()
    with pytest.raises(ValueError, match="labels have shape"):
        model(*batch, labels=torch.zeros(shape))


def test_masked_language_loss_is_the_mean_cross_entropy():
    """Reference: torch.nn.functional.cross_entropy with its ignore_index."""
    model, (input_ids, mask) = tiny_model(MolformerForMaskedLM), tiny_batch()
    labels = masked_labels(input_ids, mask)
    output = model(input_ids, mask, labels=labels)
    assert output.logits.shape == (4, 9, TINY["vocab_size"])
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    assert_relative(output.loss, expected, SUM_TOLERANCE)


def test_training_computes_logits_of_labeled_tokens_only():
    """Reference: evaluation, where all tokens get logits: same loss and gradients without dropout and redraw."""
    model, (input_ids, mask) = tiny_model(MolformerForMaskedLM, **NO_NOISE), tiny_batch()
    labels, twin = masked_labels(input_ids, mask), copy.deepcopy(model)
    expected = twin(input_ids, mask, labels=labels)
    output = model.train()(input_ids, mask, labels=labels)
    assert_near(output.logits, expected.logits[labels != -100], TOLERANCE[torch.float32])
    assert_relative(output.loss, expected.loss, SUM_TOLERANCE)
    output.loss.backward()
    expected.loss.backward()
    assert_same_gradients(model, twin)
    assert model(input_ids, mask).logits.shape == expected.logits.shape  # without labels nothing is left out


@pytest.mark.parametrize("training", [True, False])
def test_batch_without_labeled_tokens_has_no_loss(training):
    """15 % of the tokens of a short molecule can be none; the mean over nothing must not be NaN."""
    model, (input_ids, mask) = tiny_model(MolformerForMaskedLM).train(training), tiny_batch()
    loss = model(input_ids, mask, labels=torch.full_like(input_ids, -100)).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [MolformerForMaskedLM, MolformerForRegression])
def test_micro_batches_add_up_to_the_full_batch(cls, training, as_tensor):
    """Reference: the loss of the full batch; micro-batches differ in size and in labeled tokens."""
    config = NO_NOISE | {"num_labels": 2, "label_mean": [1.0, 2.0], "label_std": [0.5, 3.0]}
    model, (input_ids, mask) = tiny_model(cls, **config).train(training), tiny_batch((9, 4, 8, 2, 5))
    labels = masked_labels(input_ids, mask) if cls is MolformerForMaskedLM else torch.randn(5, 2)
    expected = model(input_ids, mask, labels=labels).loss
    count = (labels != -100).sum()
    parts = [
        model(*part, num_items_in_batch=count if as_tensor else count.item())
        for part in ((input_ids[rows], mask[rows], None, None, labels[rows]) for rows in (slice(0, 1), slice(1, 5)))
    ]
    assert_relative(sum(part.loss for part in parts), expected, SUM_TOLERANCE)


@pytest.mark.parametrize("cls", [MolformerForMaskedLM, MolformerForRegression])
def test_trainer_is_told_that_the_loss_scales(cls):
    """The Trainer passes num_items_in_batch only to a model that says it takes it, and scales the loss itself else."""
    assert cls.accepts_loss_kwargs


# ---- 8. configuration ----


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ({"hidden_size": 12}, "head size 3 is odd"),
        ({"num_random_features": 0}, "num_random_features=0"),
        ({"hidden_act": "tangent"}, "hidden_act='tangent'.*gelu"),
        ({"feature_map_kernel": "tangent"}, "feature_map_kernel='tangent'.*relu"),
        ({"pooling": "max"}, "pooling='max'.*cls, mean"),
        ({"regression_head": "mlp"}, "regression_head='mlp'.*linear, molformer"),
        ({"label_mean": [1.0, 2.0]}, "label_mean has 2 entries.* 1 labels"),
        ({"num_labels": 3, "label_std": [1.0]}, "label_std has 1 entries.* 3 labels"),
        ({"num_labels": 2, "label_names": ["logD"]}, "label_names has 1 entries.* 2 labels"),
    ],
)
def test_config_that_describes_no_model_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        MolformerConfig(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pooling": "max"}, "pooling='max'"),
        ({"regression_head": "mlp"}, "regression_head='mlp'"),
        ({"num_labels": 3, "label_mean": [1.0]}, "label_mean has 1 entries.* 3 labels"),
    ],
)
def test_arguments_of_from_pretrained_are_checked_too(changes, match, hub_checkpoint, tmp_path):
    """The library sets them on a finished configuration; an unknown pooling must not become the mean in silence."""
    folder = hub_checkpoint(tmp_path / "hub", heads=())
    with pytest.raises(ValueError, match=match):
        MolformerForRegression.from_pretrained(folder, **changes)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_config_comes_back_from_disk(num_labels, tmp_path):
    """Reference: the configuration in memory; two labels, which the library takes for a default, included."""
    config = MolformerConfig(**TINY, num_labels=num_labels, redraw_features=False, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    for loaded in (MolformerConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert loaded.num_labels == num_labels
        fields = {*TINY, "redraw_features", "tie_word_embeddings", "pooling", "regression_head", "label_mean"}
        assert {f: getattr(loaded, f) for f in fields} == {f: getattr(config, f) for f in fields}


@pytest.mark.parametrize(("given", "expected"), [(None, 0.3), (0.0, 0.0), (0.1, 0.1)])
@pytest.mark.parametrize("head", ["linear", "molformer"])
def test_every_dropout_has_its_own_setting(head, given, expected):
    """The head's dropout falls back to that of the layers, and 0 is a value."""
    config = {"hidden_dropout_prob": 0.3, "embedding_dropout_prob": 0.4, "classifier_dropout_prob": given}
    model = tiny_model(MolformerForRegression, regression_head=head, **config)
    rates = {n: module.p for n, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates.pop("molformer.embeddings.dropout") == 0.4
    assert rates.pop("classifier.dropout") == expected
    assert len(rates) == 2 * TINY["num_hidden_layers"] and set(rates.values()) == {0.3}


def test_published_head_without_skip_connections():
    """Reference: the formula out_proj(gelu(dense2(gelu(dense(mean)))))."""
    config = {"regression_head": "molformer", "pooling": "mean", "classifier_skip_connection": False}
    model, batch = tiny_model(MolformerForRegression, **config), tiny_batch()
    pooled, head, gelu = model.molformer(*batch).pooler_output, model.classifier, torch.nn.functional.gelu
    expected = head.out_proj(gelu(head.dense2(gelu(head.dense(pooled)))))
    assert_near(answer(model, *batch), expected, TOLERANCE[torch.float32])


def test_default_config_is_molformer_xl():
    """Reference: parameter counts of ibm/MoLFormer-XL-both-10pct, without and with the published head."""
    with torch.device("meta"):
        encoder = MolformerModel(MolformerConfig())
        published = MolformerForRegression(MolformerConfig(regression_head="molformer"))
    assert encoder.num_parameters() == 44_375_040
    assert published.num_parameters() == 45_556_993


def test_defaults_are_those_of_molformer_xl():
    """Reference: config.json of ibm/MoLFormer-XL-both-10pct."""
    expected = {
        "hidden_act": "gelu",
        "feature_map_kernel": "relu",
        "num_attention_heads": 12,
        "num_random_features": 32,
        "layer_norm_eps": 1e-12,
        "linear_attention_eps": 1e-6,
        "initializer_range": 0.02,
        "hidden_dropout_prob": 0.1,
        "embedding_dropout_prob": 0.2,
        "classifier_dropout_prob": None,
        "classifier_skip_connection": True,
        "max_position_embeddings": 202,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        "deterministic_eval": False,
        "num_labels": 1,
    }
    config = MolformerConfig()
    assert {field: getattr(config, field) for field in expected} == expected


# ---- 9. it learns ----


def test_twelve_sequences_are_learned_by_heart():
    """The labels are random, so that only memory helps; no dropout, fixed features."""
    config = {"num_labels": 1, "label_mean": [2.0], "label_std": [1.2], **NO_NOISE}
    model = MolformerForRegression(MolformerConfig(**{**TINY, **config})).train()
    (input_ids, mask), labels = tiny_batch((10, 8, 6, 9, 10, 7, 5, 8, 9, 10, 6, 7)), 2 + 1.2 * torch.randn(12)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(input_ids, mask, labels=labels).loss
        if loss < 1e-3:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    assert_near(model.eval()(input_ids, mask).logits.squeeze(1), labels, 0.2)


# ------------------------------------------------------------------------------------- descriptors beside the state


NAMES = ["MolLogP", "TPSA", "HeavyAtomCount"]


@pytest.mark.parametrize("head", ["linear", "molformer"])
def test_descriptors_beside_the_state_are_read_as_written_down(head, tmp_path):
    """Reference: the layers by hand, and the head alone; a value that is not finite counts as the mean."""
    model = tiny_model(MolformerForRegression, head_descriptors=NAMES, regression_head=head).eval()
    mean, std = torch.tensor([1.0, 50.0, 7.0]), torch.tensor([2.0, 10.0, 0.0])
    model.classifier.scale.set_scale(mean, std)
    (input_ids, mask), descriptors = tiny_batch(), torch.tensor([[2.0, 70.0, 7.0], [math.nan, 1e9, 9.0]])
    input_ids, mask = input_ids[:2], mask[:2]
    state = model.molformer(input_ids, attention_mask=mask)
    state = state.last_hidden_state[:, 0] if model.config.pooling == "cls" else state.pooler_output
    seen = torch.tensor([[0.5, 2.0, 0.0], [0.0, 10.0, 2.0]])  # the third never varied: it is only centered
    part = model.classifier
    mixed = torch.cat([state, seen], dim=1) @ part.mix.weight.T + part.mix.bias
    expected = part.head(state) + torch.nn.functional.gelu(mixed) @ part.out_mix.weight.T + part.out_mix.bias
    assert_near(model(input_ids, mask, descriptors=descriptors).logits, expected, 1e-6)
    values, joined = model.predict_with_states(input_ids, mask, descriptors)
    assert_near(values, expected, 1e-6)
    assert torch.equal(joined[:, model.config.hidden_size :], seen)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not again.head_is_new and again.config.head_descriptors == NAMES
    assert_same_weights(again, model)  # the scale among them


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_scale_of_descriptors_stays_float32_in_a_model_of_half_precision(dtype, tmp_path):
    """Ipc goes beyond what float16 holds."""
    model = tiny_model(MolformerForRegression, head_descriptors=["Ipc", "MolWt"])
    model.classifier.scale.set_scale(torch.tensor([1e6, 300.0]), torch.tensor([5e6, 100.0]))
    model.save_pretrained(tmp_path)
    half = MolformerForRegression.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    descriptors = torch.tensor([[2e7, 300.0], [0.0, 400.0]])
    assert_near(half.classifier.scale.standardize(descriptors), torch.tensor([[3.8, 0.0], [-0.2, 1.0]]), 1e-6)
    input_ids, mask = tiny_batch((9, 6))
    assert half(input_ids, mask, descriptors=descriptors).logits.isfinite().all()


@pytest.mark.parametrize("names", ["all", ["TPSA", "TPSA"]])
def test_descriptor_names_of_a_configuration_are_a_list_of_different_names(names):
    with pytest.raises(ValueError, match="must be a list of names, each of them once"):
        MolformerConfig(head_descriptors=names)


def test_the_dropout_of_the_head_is_that_of_its_layers_on_descriptors():
    for given, expected in ({"hidden_dropout_prob": 0.3}, 0.3), ({"classifier_dropout_prob": 0.0}, 0.0):
        model = tiny_model(MolformerForRegression, head_descriptors=NAMES, **given)
        assert model.classifier.dropout.p == model.classifier.head.dropout.p == expected


@pytest.mark.parametrize(("names", "given"), [(NAMES, None), (NAMES, (2, 4)), (None, (2, 3))])
def test_descriptors_that_the_head_does_not_read_are_refused(names, given):
    model = tiny_model(MolformerForRegression, head_descriptors=names)
    descriptors = None if given is None else torch.randn(given)
    with pytest.raises(ValueError, match=r"descriptors have shape (None|\(2, [34]\)); the head of this model reads"):
        model(torch.randint(4, 40, (2, 6)), descriptors=descriptors)


# ------------------------------------------------------------------------------------------------- descriptor head


def descriptor_model(**changes):
    return MolformerForMaskedLM(MolformerConfig(**TINY, **NO_NOISE, descriptor_names=NAMES, **changes))


def test_descriptors_are_standardized_imputed_and_limited():
    """Reference: the stated rule, number by number."""
    head = descriptor_model().descriptor_head
    head.set_scale([1.0, 2.0, 3.0], [2.0, 0.0, 0.5])
    values = torch.tensor([[5.0, 2.0, 3.0], [math.nan, math.inf, -math.inf], [1e9, 3.0, -1e9]])
    expected = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [10.0, 1.0, -10.0]])
    assert torch.equal(head.standardize(values), expected)


@pytest.mark.parametrize("training", [True, False])
def test_loss_of_both_objectives_is_the_sum_of_each(training):
    """References: each objective alone, and PyTorch's mean squared error of the linear map of the masked mean."""
    model = descriptor_model().train(training)
    model.descriptor_head.set_scale([1.0, 2.0, 3.0], [2.0, 1.0, 0.5])
    ids, labels, descriptors = torch.randint(4, 40, (3, 7)), torch.full((3, 7), -100), torch.randn(3, 3)
    labels[:, 2:4] = ids[:, 2:4]
    both = model(ids, labels=labels, descriptors=descriptors)
    tokens, alone = model(ids, labels=labels), model(ids, descriptors=descriptors)
    assert both.loss.item() == pytest.approx((tokens.loss + alone.loss).item(), rel=1e-6)
    assert alone.logits is None and tokens.descriptor_logits.shape == (3, 3)
    expected = torch.nn.functional.linear(model.molformer(ids).pooler_output, *model.descriptor_head.parameters())
    target = (descriptors - torch.tensor([1.0, 2.0, 3.0])) / torch.tensor([2.0, 1.0, 0.5])
    assert alone.loss.item() == pytest.approx(torch.nn.functional.mse_loss(expected, target).item(), rel=1e-5)


def test_batch_without_labeled_tokens_keeps_its_other_losses():
    """Reference: the descriptors alone."""
    model = descriptor_model()
    ids, descriptors = torch.randint(4, 40, (2, 6)), torch.randn(2, 3)
    nothing = torch.full((2, 6), -100)
    alone = model(ids, descriptors=descriptors).loss.item()
    for count in (None, 0, 5):
        assert model(ids, labels=nothing, descriptors=descriptors, num_items_in_batch=count).loss.item() == alone


@pytest.mark.parametrize("names", [NAMES, None])
def test_descriptors_that_fit_no_head_are_refused(names):
    model = MolformerForMaskedLM(MolformerConfig(**TINY, descriptor_names=names))
    with pytest.raises(ValueError, match=r"descriptors have shape \(2, 5\)"):
        model(torch.randint(4, 40, (2, 6)), descriptors=torch.randn(2, 5))


def test_descriptor_head_comes_back_from_disk_and_may_be_left_aside(tmp_path):
    model = descriptor_model()
    model.descriptor_head.set_scale([1.0, 2.0, 3.0], [2.0, 1.0, 0.5])
    model.save_pretrained(tmp_path)
    again = MolformerForMaskedLM.from_pretrained(tmp_path)
    assert again.config.descriptor_names == NAMES and again.new_heads == () and not again.head_is_new
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert MolformerForRegression.from_pretrained(tmp_path).new_heads == ("classifier.",)
    assert not hasattr(MolformerForMaskedLM.from_pretrained(tmp_path, descriptor_names=None), "descriptor_head")


def test_masked_language_model_gets_a_fresh_descriptor_head_beside_its_own(tmp_path):
    MolformerForMaskedLM(MolformerConfig(**TINY)).save_pretrained(tmp_path)
    model = MolformerForMaskedLM.from_pretrained(tmp_path, descriptor_names=NAMES)
    assert model.new_heads == ("descriptor_head.",)
    assert model.descriptor_head.mean.tolist() == [0, 0, 0] and model.descriptor_head.std.tolist() == [1, 1, 1]


ATOM_HEAD = {"atom_descriptor_names": ["a", "b", "c"], "environment_buckets": [5, 7]}


@pytest.mark.parametrize("training", [True, False])
def test_loss_of_atoms_is_that_of_plain_loops(training):
    """Reference: the mean squared error and the cross-entropies, atom by atom."""
    model = MolformerForMaskedLM(MolformerConfig(**TINY, **NO_NOISE, **ATOM_HEAD)).train(training)
    head = model.atom_head
    head.set_scale([1.0, 0.0, -1.0], [2.0, 1.0, 0.5])
    ids, numbers = torch.randint(4, 40, (2, 6)), torch.randn(2, 6, 3)
    environments = torch.full((2, 6, 2), -100)
    atoms = [(0, 1), (0, 4), (1, 2)]
    for row, token in atoms:
        environments[row, token] = torch.tensor([token, row + token])
    output = model(ids, atom_descriptors=numbers, environments=environments)
    states = model.molformer(ids).last_hidden_state
    squares, entropies = 0.0, 0.0
    for row, token in atoms:
        target = (numbers[row, token] - torch.tensor([1.0, 0.0, -1.0])) / torch.tensor([2.0, 1.0, 0.5])
        squares += ((head.out_proj(states[row, token]) - target) ** 2).mean() / 3
        logits = head.environments(states[row, token])
        for part, label in ((logits[:5], token), (logits[5:], row + token)):
            entropies += torch.nn.functional.cross_entropy(part, torch.tensor(label)) / 3 / 2
    assert output.loss.item() == pytest.approx((squares + entropies).item(), rel=1e-5)
    assert output.atom_descriptor_logits.shape == (3, 3) and output.environment_logits.shape == (3, 12)
    assert output.logits is None


def test_batch_without_atoms_has_no_atom_loss():
    model = MolformerForMaskedLM(MolformerConfig(**TINY, **ATOM_HEAD))
    output = model(torch.randint(4, 40, (2, 6)), atom_descriptors=torch.full((2, 6, 3), -100.0),
        environments=torch.full((2, 6, 2), -100))  # fmt: skip
    assert output.loss.item() == 0
    output.loss.backward()


@pytest.mark.parametrize(("numbers", "radii"), [(2, 2), (3, 1), (None, 2)])
def test_atom_targets_that_fit_no_head_are_refused(numbers, radii):
    model = MolformerForMaskedLM(MolformerConfig(**TINY, **ATOM_HEAD))
    targets = {"environments": torch.zeros(2, 6, radii, dtype=torch.long)}
    targets["atom_descriptors"] = None if numbers is None else torch.zeros(2, 6, numbers)
    with pytest.raises(ValueError, match=r"(environments|atom_descriptors) have shape"):
        model(torch.randint(4, 40, (2, 6)), **targets)


def test_half_an_atom_head_is_refused():
    with pytest.raises(ValueError, match="go together"):
        MolformerForMaskedLM(MolformerConfig(**TINY, atom_descriptor_names=["a"]))


@pytest.mark.parametrize("training", [False, True])
def test_places_that_are_given_are_those_that_would_be_found(training):
    """Where tokens have labels and where the atoms are; the dropout is the same."""
    model = MolformerForMaskedLM(MolformerConfig(**TINY, **ATOM_HEAD)).train(training)
    ids = torch.randint(4, 40, (2, 9))
    labels, environments = torch.where(torch.rand(2, 9) < 0.3, ids, -100), torch.randint(0, 5, (2, 9, 2))
    environments[:, ::2] = -100
    targets = {"labels": labels, "environments": environments, "atom_descriptors": torch.randn(2, 9, 3)}
    rows = {"masked_rows": (labels.flatten() != -100).nonzero()[:, 0]}
    rows["atom_rows"] = (environments[..., 0].flatten() != -100).nonzero()[:, 0]
    losses = []
    for given in ({}, rows):
        torch.manual_seed(1)
        losses.append(model(ids, **targets, **given).loss)
    assert torch.equal(*losses)


def test_the_librarys_trainer_finds_the_labels():
    """It takes every argument whose name has "label" in it for one, and evaluates only where all are given."""
    from transformers.utils.generic import find_labels

    assert find_labels(MolformerForMaskedLM) == find_labels(MolformerForRegression) == ["labels"]


@pytest.mark.parametrize("training", [False, True])
def test_no_forward_waits_for_the_device(training):
    """Tensors without values refuse whatever must read one: an `item`, a `nonzero`, a branch on a number."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        ids = torch.full((2, 9), 5)
        regression = MolformerForRegression(MolformerConfig(**TINY)).train(training)
        assert regression(ids, torch.ones_like(ids), labels=torch.zeros(2, 1)).loss.shape == ()
        model = MolformerForMaskedLM(MolformerConfig(**TINY, **ATOM_HEAD)).train(training)
        batch = {"labels": ids, "environments": torch.zeros(2, 9, 2, dtype=torch.long)}
        batch |= {
            "atom_descriptors": torch.zeros(2, 9, 3),
            "masked_rows": torch.arange(4),
            "atom_rows": torch.arange(3),
        }
        assert model(ids, **batch).loss.shape == ()
