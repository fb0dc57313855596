"""run_peft.py: what each method trains and leaves alone, its checkpoints, and the script on tiny models.

References: the base model, the trained model itself after reloading, names written out by hand.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import peft
import pytest
import torch
from conftest import ROOT, TWO_PROCESSES
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

import run_influence
import run_peft
import run_regression
from arguments import InputError, ModelArguments, parse_arguments
from modeling_molformer_reg import MolformerConfig, MolformerForMaskedLM, MolformerForRegression
from run_peft import METHODS, PeftArguments, adapt
from utils_checkpoints import build_tokenizer, find_base, load_model, weights_digest


TUNERS = [name for name in METHODS if name not in ("full", "head", "bitfit")]
RANK = {"oft": 8, "vera": 16}  # the tiny model's layers have 32 inputs
OTHERS = [pytest.param(method, marks=pytest.mark.slow) for method in TUNERS if method != "lora"]
QUICK = ("--num_train_epochs", "2", "--learning_rate", "5e-3", "--disable_tqdm", "true")


def arguments_of(method, **values):
    rank = RANK.get(method, 4) if METHODS[method].rank is not None else None
    return PeftArguments(peft_method=method, **{"peft_rank": rank, **values})


@pytest.fixture
def base(tiny_checkpoint):
    torch.manual_seed(0)
    model = MolformerForRegression.from_pretrained(tiny_checkpoint, redraw_features=False).eval()
    model.config.label_mean, model.config.label_std = [2.0], [1.2]
    return model


@pytest.fixture
def batch():
    return build_tokenizer()(["CCO", "c1ccccc1C(=O)NCC", "CN1CCC[C@H]1c1cccnc1"], padding=True, return_tensors="pt")


def train_steps(model, batch, steps=3):
    """Trains everything that requires gradients for a few steps."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(**batch, labels=torch.tensor([0.5, 2.5, 4.0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


EXPECTED = {  # of the encoder; every method trains the head beside it
    "full": r".*",
    "head": r"(?!)",
    "bitfit": r"molformer\..*\.bias",
    "ia3": r".*(self\.(key|value)|layer\.\d\.output\.dense)\.ia3_l\.default",
    "ln_tuning": r".*LayerNorm\.ln_tuning_layers\.default\.(weight|bias)",
    "lora": r".*(query|key|value|dense)\.lora_[AB]\.default\.weight",
    "rslora": r".*(query|key|value|dense)\.lora_[AB]\.default\.weight",
    "dora": r".*(query|key|value|dense)\.lora_([AB]|magnitude_vector)\.default\.weight",
    "pissa": r".*(query|key|value|dense)\.lora_[AB]\.default\.weight",
    "vera": r".*(query|key|value|dense)\.vera_lambda_[bd]\.default",
    "oft": r".*(query|key|value|dense)\.oft_R\.default\.weight",
    "miss": r".*(query|key|value|dense)\.miss_block\.default",
    "hira": r".*(query|key|value|dense)\.hira_[AB]\.default",
    "shira": r".*(query|key|value|dense)\.shira_weight\.default",
}


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_intended_parameters_are_trained(method, base, batch):
    """By name; everything else is bit-unchanged after three steps (pissa rewrites its base once, at the start)."""
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = adapt(base, arguments_of(method))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    encoder = [name for name in trainable if "classifier." not in name]
    every = [name for name, _ in model.named_parameters() if "classifier." not in name]
    assert encoder == [name for name in every if re.fullmatch(EXPECTED[method], name)]
    assert bool(encoder) == (method != "head")
    heads = [name for name in trainable if "classifier." in name]
    assert {name.split(".")[-1] for name in heads} == {"weight", "bias"} and len(heads) == 2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_steps(model, batch)
    for name, tensor in model.state_dict().items():
        if name not in trainable:
            assert torch.equal(tensor, before[name]), name
    still = [name for name in trainable if torch.equal(model.state_dict()[name], before[name])]
    # the loss does not depend on the biases of keys, or so little that rounding hides it
    assert all(name.endswith("attention.self.key.bias") for name in still), still
    if method != "pissa":  # which rewrites its base
        for name, tensor in start.items():
            kept = [model.state_dict()[other] for other in model.state_dict() if plain_name(other) == name]
            assert any(torch.equal(tensor, other) for other in kept) or name in trainable or "classifier" in name, name


def plain_name(name):
    """The name of a weight in the base model, for one in a PEFT model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def test_all_targets_are_the_linear_layers_of_every_encoder_layer(base):
    targets = run_peft.find_targets(base, arguments_of("lora"))
    assert len(targets) == 2 * 6 and not any("classifier" in name for name in targets)
    assert len(run_peft.find_targets(base, arguments_of("ln_tuning"))) == 2 * 2 + 1
    assert len(run_peft.find_targets(base, arguments_of("ia3"))) == 2 * 3


@pytest.mark.parametrize("method", [method for method in TUNERS if METHODS[method].rank is not None])
def test_settings_of_a_method_reach_its_tuner(method):
    """By the names that PEFT has for them."""
    dropout = {"peft_dropout": 0.1} if METHODS[method].dropout else {}
    config = run_peft.peft_config(PeftArguments(peft_method=method, **dropout), ["x"], 7).to_dict()
    expected = {
        **dict.fromkeys(("lora", "rslora", "dora"), {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1}),
        "pissa": {"r": 4, "lora_alpha": 4, "lora_dropout": 0.1},
        "vera": {"r": 256, "vera_dropout": 0.1, "projection_prng_key": 7, "save_projection": False},
        "oft": {"oft_block_size": 16, "use_cayley_neumann": False},
        "miss": {"r": 8, "miss_dropout": 0.1},
        "hira": {"r": 4, "hira_dropout": 0.1},
        "shira": {"r": 4, "random_seed": 7},
    }[method]
    if "lora_alpha" in expected:
        expected |= {"use_rslora": method == "rslora", "use_dora": method == "dora"}
        expected |= {"init_lora_weights": "pissa" if method == "pissa" else True}
    assert {name: config[name] for name in expected} == expected
    if METHODS[method].alpha:
        config = run_peft.peft_config(PeftArguments(peft_method=method, peft_alpha=3, peft_rank=2), ["x"], 7)
        assert (config.r, config.lora_alpha) == (2, 3)


@pytest.mark.parametrize("method", METHODS)
def test_training_starts_from_the_base_model(method, base, batch):
    """Reference: the base model's own predictions."""
    expected = base(**batch).logits.clone()
    model = adapt(base, arguments_of(method)).eval()
    tolerance = 1e-4 if method == "pissa" else 1e-6
    assert torch.allclose(model(**batch).logits, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_a_head_that_reads_descriptors_goes_with_its_adapter(method, tiny_checkpoint, small_table, tmp_path):
    """Reference: the predictions of the run, from the adapter and from the merged checkpoint."""
    rank = ("--peft_rank", 4) if method == "lora" else ()
    call_main("--peft_method", method, *given(tiny_checkpoint, small_table), *rank, *QUICK, "--merge_adapter",
              "--head_descriptors", "MolLogP", "TPSA", "--output_dir", tmp_path / "out")  # fmt: skip
    expected = pd.read_csv(tmp_path / "out" / "predictions.csv")
    for name, tolerance in (("out", 0), ("out/merged", 1e-5)):
        call_regression("--model_name_or_path", tmp_path / name, "--train_file", small_table, "--do_predict",
                        "--disable_tqdm", "true", "--output_dir", tmp_path / "again",
                        "--overwrite_output_dir")  # fmt: skip
        again = pd.read_csv(tmp_path / "again" / "predictions.csv")
        np.testing.assert_allclose(again["prediction"], expected["prediction"], rtol=0, atol=tolerance)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["head_descriptors"] == ["MolLogP", "TPSA"]


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_a_checkpoint_holds_what_was_trained_and_reloads_to_equal_bits(method, tiny_checkpoint, small_table, tmp_path):
    """Through the script; then loaded as every script loads it, merged, and by PEFT in a user's own code."""
    folder = tmp_path / "out"
    extra = ("--peft_rank", RANK.get(method, 4)) if METHODS[method].rank else ()
    call_main("--peft_method", method, *given(tiny_checkpoint, small_table), *extra, *QUICK, "--merge_adapter",
              "--num_train_epochs", "1", "--output_dir", folder)  # fmt: skip
    table = pd.read_csv(folder / "predictions.csv")
    held = load_file(next(folder.glob("*.safetensors")))
    trained = json.loads((folder / "all_results.json").read_text())["trainable_parameters"]
    indices = sum(tensor.numel() for name, tensor in held.items() if "shira_indices" in name)
    assert sum(tensor.numel() for tensor in held.values()) == trained + indices
    tokenizer = build_tokenizer()
    model_args = ModelArguments(model_name_or_path=str(folder))
    assert find_base(str(folder), model_args)["base"] == tiny_checkpoint
    first, second, merged = (
        load_model(MolformerForRegression, args, tokenizer).eval()
        for args in (model_args, model_args, ModelArguments(model_name_or_path=str(folder / "merged")))
    )
    assert not first.head_is_new
    batch = tokenizer(["CCO", "c1ccccc1C(=O)NCC"], padding=True, return_tensors="pt")
    predictions = first(**batch).logits
    assert torch.equal(predictions, second(**batch).logits)
    assert torch.allclose(predictions, merged(**batch).logits, rtol=0, atol=1e-5)
    call_regression("--model_name_or_path", folder, "--train_file", small_table, "--do_predict",
                    "--disable_tqdm", "true", "--output_dir", tmp_path / "again")  # fmt: skip
    again = pd.read_csv(tmp_path / "again" / "predictions.csv")
    assert again["prediction"].tolist() == table["prediction"].tolist()
    call_regression("--model_name_or_path", folder, "--test_file", small_table, "--do_predict",
                    "--disable_tqdm", "true", "--output_dir", tmp_path / "file")  # fmt: skip
    of_file = pd.read_csv(tmp_path / "file" / "predictions.csv")
    np.testing.assert_allclose(of_file["prediction"][table["row"]], table["prediction"], rtol=0, atol=1e-5)
    if method in TUNERS:
        from peft import PeftModel
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(folder)
        own = AutoModelForSequenceClassification.from_pretrained(tiny_checkpoint, config=config)
        own = PeftModel.from_pretrained(own, folder).eval()
        assert torch.equal(own(**batch).logits, predictions)


def with_method(method):
    """Returns the flags of a method, with a rank that the tiny model allows."""
    return "--peft_method", method, *(("--peft_rank", str(RANK.get(method, 4))) if METHODS[method].rank else ())


def call_main(*flags):
    flags = [str(flag) for flag in flags]
    run_peft.main(*parse_arguments(*run_peft.ARGUMENTS, defaults=run_peft.DEFAULTS, args=flags))


def call_regression(*flags):
    flags = [str(flag) for flag in flags]
    run_regression.main(*parse_arguments(*run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=flags))


def given(checkpoint, table):
    return ("--model_name_or_path", checkpoint, "--train_file", table)


@pytest.fixture(scope="module")
def finished_run(tiny_checkpoint, small_table, tmp_path_factory):
    """LoRA on the small table with the default stages."""
    folder = tmp_path_factory.mktemp("peft") / "out"
    call_main(*given(tiny_checkpoint, small_table), *QUICK, "--output_dir", folder)
    return folder


def results(folder):
    """The metrics of a run, without those that tell time or memory."""
    values = json.loads((folder / "all_results.json").read_text())
    left_out = ("runtime", "per_second", "preparation_time", "memory", "train_loss")
    return {name: value for name, value in values.items() if not any(part in name for part in left_out)}


def history(folder):
    """Losses and gradient norms by step."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return np.array([[entry["loss"], entry["grad_norm"]] for entry in log if "loss" in entry])


def test_a_run_reports_what_it_took(finished_run, tiny_checkpoint):
    """References: numbers of parameters counted by hand, and the files."""
    values = json.loads((finished_run / "all_results.json").read_text())
    lora = 2 * 4 * (4 * (32 + 32) + 2 * (32 + 48))  # layers, rank, inputs and outputs of the linear layers
    assert values["trainable_parameters_without_head"] == lora
    assert values["trainable_parameters"] == lora + 33
    base = MolformerForRegression.from_pretrained(tiny_checkpoint).num_parameters()
    assert values["base_parameters"] == base
    assert values["trainable_percent"] == pytest.approx(100 * (lora + 33) / base)
    assert values["checkpoint_bytes"] == (finished_run / "adapter_model.safetensors").stat().st_size
    std = json.loads((finished_run / "config.json").read_text())["label_std"][0]
    assert values["final_train_mse"] == pytest.approx(history(finished_run)[-1, 0] * std**2)
    assert values["peak_memory_bytes"] > 1e8 and values["train_runtime"] > 0 and values["train_loss"] > 0
    assert values["peft_method"] == "lora" and values["test_mse"] > 0 and values["eval_mse"] > 0
    for name in ("predictions.csv", "splits.json", "parity.png", "loss_curves.png", "config.json", "tokenizer.json"):
        assert (finished_run / name).stat().st_size > 0, name


def test_bitfit_of_xl_size_is_below_a_megabyte():
    """All biases and the linear head of 12 layers of 768, in float32."""
    with torch.device("meta"):
        model = MolformerForRegression(MolformerConfig())
    names = set(run_peft.trained_names(model, "bitfit"))
    assert sum(4 * p.numel() for name, p in model.named_parameters() if name in names) < 2**20


def test_full_fine_tuning_is_that_of_run_regression(tiny_checkpoint, small_table, tmp_path):
    """Reference: run_regression.py with the same flags, to the last digit."""
    flags = (*given(tiny_checkpoint, small_table), *QUICK)
    call_main("--peft_method", "full", *flags, "--output_dir", tmp_path / "peft")
    call_regression(*flags, "--output_dir", tmp_path / "regression")
    first, second = (results(tmp_path / name) for name in ("peft", "regression"))
    assert {name: first[name] for name in second} == second


@pytest.fixture(scope="module")
def step_by_step(tiny_checkpoint, small_table):
    """Flags of runs without dropout that log every step: Adam forgives a gradient of wrong size, its norm does not."""
    flags = (
        "--num_train_epochs",
        "1",
        "--disable_tqdm",
        "true",
        "--logging_strategy",
        "steps",
        "--logging_steps",
        "1",
    )
    flags += ("--hidden_dropout_prob", "0", "--embedding_dropout_prob", "0", "--max_grad_norm", "1000")
    flags += ("--bf16", "false")  # whose rounding differs with the number of processes and threads
    flags += ("--max_train_samples", "96")  # whole batches: of the rest, two processes would take some twice
    return (*given(tiny_checkpoint, small_table), *flags)


@pytest.fixture(scope="module")
def plain_runs(step_by_step, tmp_path_factory):
    """Runs of a method, once each: one process, batches of 16."""
    folder = tmp_path_factory.mktemp("plain")

    def run(method):
        if not (folder / method).exists():
            call_main(*step_by_step, *with_method(method), "--output_dir", folder / method)
        return folder / method

    return run


def test_an_adapter_of_all_molecules_holds_nothing_out(tiny_checkpoint, small_table, tmp_path):
    flags = ("--validation_fraction", 0, "--test_fraction", 0, "--num_train_epochs", 1, "--disable_tqdm", "true")
    call_main(*given(tiny_checkpoint, small_table), *flags, "--output_dir", tmp_path / "out")
    values = results(tmp_path / "out")
    assert values["train_samples"] == 160 and not [name for name in values if name.startswith(("eval_", "test_"))]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("method", ["lora", "bitfit", *OTHERS])
def test_accumulated_batches_give_the_gradients_of_one(method, step_by_step, plain_runs, tmp_path):
    """Reference: the same batches in one piece; losses and gradient norms of every step."""
    pieces = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4")
    call_main(*step_by_step, *pieces, *with_method(method), "--output_dir", tmp_path / "pieces")
    assert np.allclose(history(tmp_path / "pieces"), history(plain_runs(method)), rtol=1e-3)
    one, pieces = (results(folder) for folder in (plain_runs(method), tmp_path / "pieces"))
    assert pieces["eval_mse"] == pytest.approx(one["eval_mse"], rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "bitfit", *OTHERS])
def test_two_processes_train_as_one(method, step_by_step, plain_runs, tmp_path, run_script):
    """Reference: one process with the same molecules a step; losses and gradient norms of every step."""
    done = run_script(
        "run_peft.py", *step_by_step, *with_method(method), "--per_device_train_batch_size", 8, "--use_cpu",
        "--output_dir", tmp_path / "two", launcher=TWO_PROCESSES,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.allclose(history(tmp_path / "two"), history(plain_runs(method)), rtol=1e-3)
    one, two = (results(folder) for folder in (plain_runs(method), tmp_path / "two"))
    assert two["test_mse"] == pytest.approx(one["test_mse"], rel=1e-3)


@pytest.mark.parametrize("method", ["lora", pytest.param("bitfit", marks=pytest.mark.slow), *OTHERS])
def test_a_killed_run_resumes_to_the_same_metrics(method, tiny_checkpoint, small_table, tmp_path):
    """Reference: the run without interruption. SIGKILL when the first checkpoint is there."""
    command = [sys.executable, str(ROOT / "run_peft.py"), *with_method(method)]
    command += [*map(str, given(tiny_checkpoint, small_table)), *QUICK, "--output_dir"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*command, str(tmp_path / "whole")], env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, str(folder)], env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not list(folder.glob("checkpoint-*/trainer_state.json")) and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "unfinished").exists()
    resumed = subprocess.run(
        [*command, str(folder), "--resume_from_checkpoint", "true"], env=environment, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    values, expected = results(folder), results(tmp_path / "whole")
    one, other = (json.loads((path / "all_results.json").read_text()) for path in (folder, tmp_path / "whole"))
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)  # of the whole training
    assert one["peak_memory_bytes"] > 0.9 * other["peak_memory_bytes"]
    assert values.pop("peft_method") == expected.pop("peft_method") == method
    for name in expected:
        assert values[name] == pytest.approx(expected[name], rel=1e-6), name


def test_time_and_loss_of_a_finished_run_stay_when_it_is_merged_later(tiny_checkpoint, small_table, tmp_path):
    flags = (*given(tiny_checkpoint, small_table), *QUICK, "--output_dir", tmp_path / "out")
    call_main(*flags)
    before = json.loads((tmp_path / "out" / "all_results.json").read_text())
    call_main(*flags, "--resume_from_checkpoint", "true", "--merge_adapter")
    after = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-6)
    assert after["final_train_loss"] == before["final_train_loss"]
    assert 0.5 * before["train_runtime"] < after["train_runtime"] < 1.5 * before["train_runtime"]
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()


def test_influence_accepts_an_adapter(finished_run, tiny_checkpoint, small_table, tmp_path, run_script):
    """Its head and its LoRA matrices are parameters like others."""
    external = tmp_path / "external.csv"
    external.write_text("SMILES,Label\nCCOC(=O)c1ccccc1Br,1.5\nCCCCCCN,2\n")
    done = run_script(
        "run_influence.py", "--model_name_or_path", finished_run, "--pretrained_model", tiny_checkpoint,
        "--train_file", small_table, "--external_file", external, "--recursion_depth", 5, "--num_repeats", 1,
        "--influence_params", "lora_|classifier", "--do_predict", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(tmp_path / "out" / "influence_scores.csv")["score"].notna().all()
    report = json.loads((tmp_path / "out" / "influence.json").read_text())
    assert report["parameters"] == 2 * 4 * (4 * (32 + 32) + 2 * (32 + 48)) + 33  # of the adapter, and of the head


@pytest.mark.parametrize("name", ["adapter_config.json", "trained_parameters.json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_adapter_ends_in_one_line(name, content, small_table, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / name).write_text(content)
    with pytest.raises(InputError, match="The adapter in .* cannot be loaded"):
        call_main(*given(tmp_path / "adapter", small_table), "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_what_is_scored_by_an_adapter_is_learned_from_its_base(method, tiny_checkpoint, small_table, tmp_path):
    """Reference: the folder that the adapter names; no flag says what is fine-tuned again."""
    call_main(*given(tiny_checkpoint, small_table), *QUICK, "--peft_method", method, "--output_dir", tmp_path / "a")
    external = tmp_path / "external.csv"
    external.write_text("SMILES,Label\nCCOC(=O)c1ccccc1Br,1.5\nCCCCCCN,2\n")
    flags = [*given(tmp_path / "a", small_table), "--external_file", external, "--ihvp", "identity", "--controls",
             "none", "--influence_params", "head", *QUICK, "--output_dir", tmp_path / "out"]  # fmt: skip
    flags = [str(flag) for flag in flags]
    run_influence.main(*parse_arguments(*run_influence.ARGUMENTS, defaults=run_influence.DEFAULTS, args=flags))
    report = json.loads((tmp_path / "out" / "influence.json").read_text())
    assert report["fine_tuned_from"] == tiny_checkpoint


@pytest.mark.parametrize("method", TUNERS)
def test_every_adapter_has_scores_for_all_of_its_parameters(method, tiny_checkpoint, small_table, tmp_path):
    """As run_influence.py loads it; SHiRA's sparse tensors have no forward mode, so it is merged first."""
    extra = ("--peft_rank", RANK.get(method, 4)) if METHODS[method].rank else ()
    call_main(*given(tiny_checkpoint, small_table), *QUICK, "--peft_method", method, *extra, "--max_steps", "1",
              "--max_train_samples", "16", "--do_train", "--output_dir", tmp_path / "adapter")  # fmt: skip
    external = tmp_path / "external.csv"
    external.write_text("SMILES,Label\nCCOC(=O)c1ccccc1Br,1.5\nCCCCCCN,2\n")
    flags = [*given(tmp_path / "adapter", small_table), "--pretrained_model", tiny_checkpoint, "--do_predict"]
    flags += ["--external_file", external, "--recursion_depth", 2, "--num_repeats", 1, "--max_train_samples", 16]
    flags += ["--hessian_batch_size", 4, "--max_eval_samples", 8, "--ignore_split_mismatch"]
    flags = [str(flag) for flag in (*flags, "--output_dir", tmp_path / "out")]
    run_influence.main(*parse_arguments(*run_influence.ARGUMENTS, defaults=run_influence.DEFAULTS, args=flags))
    scores = pd.read_csv(tmp_path / "out" / "influence_scores.csv")["score"]
    assert scores.notna().all() and (scores != 0).all()
    report = json.loads((tmp_path / "out" / "influence.json").read_text())
    merged = MolformerForRegression.from_pretrained(tiny_checkpoint).num_parameters()
    assert (report["parameters"] > merged) == (method not in run_influence.NO_FORWARD_MODE)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--target_modules", "query", "nowhere"), "'nowhere' matches no module. There are: attention.output.dense"),
        (("--target_modules", "nowhere"), "'nowhere' matches no module. There are: attention.output.dense"),
        (("--peft_method", "shira", "--peft_rank", "17"), r"too large for molformer.*\(32, 32\). Give at most 16"),
        (("--target_modules", "("), "is no regular expression"),
        (("--peft_rank", "64"), r"--peft_rank 64 is too large for molformer.*\(32, 32\). Give at most 32"),
        (("--peft_method", "vera", "--peft_rank", "2000"), r"too large for molformer.*\(32, 32\). Give at most 1024"),
        (
            ("--peft_method", "oft", "--peft_rank", "5"),
            r"blocks of --peft_rank 5, which does not divide.*one of 2, 4, 8, 16, or",
        ),
        (("--redraw_features", "true"), "--redraw_features true changes the attention"),
    ],
)
def test_bad_input_is_named(tiny_checkpoint, small_table, tmp_path, extra, message):
    with pytest.raises(InputError, match=message):
        call_main(*given(tiny_checkpoint, small_table), *QUICK, *extra, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_new_molecules_are_left_to_run_regression(finished_run, tmp_path):
    with pytest.raises(InputError, match="are predicted by run_regression.py --do_predict"):
        call_main("--model_name_or_path", finished_run, "--test_file", "new.csv", "--do_predict")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_method": "magic"}, "--peft_method magic is unknown. Choose one of full, head, bitfit"),
        ({"peft_method": "bitfit", "peft_rank": 4}, "has neither rank nor target modules"),
        ({"peft_method": "ia3", "peft_rank": 4}, "has no rank"),
        ({"peft_rank": 0}, "--peft_rank is 0"),
        ({"peft_dropout": 1.0}, "--peft_dropout is 1.0"),
        ({"peft_method": "ia3", "peft_dropout": 0.1}, "has no dropout"),
        ({"peft_method": "oft", "peft_dropout": 0.1}, "has no dropout"),  # PEFT takes a value and does nothing with it
        ({"peft_alpha": 0.0}, "--peft_alpha is 0.0; give a positive number"),
        ({"peft_method": "vera", "peft_alpha": 8.0}, "has no alpha"),
        ({"base_hub_name": "no name"}, "no name"),
        ({"base_hub_name": "a/b", "merge_adapter": True}, "none is sent"),
        ({"base_hub_name": "a/b", "peft_method": "full"}, "none is sent"),
    ],
)
def test_arguments_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        PeftArguments(**values)


def test_an_adapter_whose_base_is_gone_or_other_is_refused(finished_run, tmp_path, small_table):
    folder = tmp_path / "adapter"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    flags = (
        "--model_name_or_path",
        folder,
        "--train_file",
        small_table,
        "--do_predict",
        "--output_dir",
        tmp_path / "out",
    )
    path.write_text(json.dumps({**values, "base_model_name_or_path": "gone/base"}))
    with pytest.raises(InputError, match="The base of .*adapter cannot be loaded.*gone/base"):
        call_regression(*flags)
    path.write_text(json.dumps({**values, "base_model_name_or_path": str(ROOT / "models" / "molformer-mini")}))
    with pytest.raises(InputError, match="does not fit its base .*: hidden_size is 32 there and 320 in the base"):
        call_regression(*flags)
    path.write_text(json.dumps({**values, "base_model_name_or_path": None}))
    with pytest.raises(InputError, match="names no base"):
        call_regression(*flags)
    path.write_text(json.dumps(values))
    (folder / "config.json").unlink()  # as PEFT's own save_pretrained leaves it: the scale of the labels is lost
    with pytest.raises(InputError, match="has no config.json, which holds the scale of its labels"):
        call_regression(*flags)


def test_a_base_is_the_same_in_another_precision(tiny_checkpoint, tmp_path):
    """The embedded one is in float16; saved again, or pushed, it is in float32."""
    model = MolformerForMaskedLM.from_pretrained(tiny_checkpoint).half()
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "float")
    assert weights_digest(tmp_path / "half") == weights_digest(tmp_path / "float") is not None
    model.molformer.embeddings.word_embeddings.weight.data[0, 0] += 1
    model.save_pretrained(tmp_path / "changed")
    assert weights_digest(tmp_path / "changed") != weights_digest(tmp_path / "half")
    assert weights_digest(tmp_path) is None


def test_an_ensemble_is_no_base(tiny_checkpoint, small_table, tmp_path):
    for number in range(2):
        shutil.copytree(tiny_checkpoint, tmp_path / "both" / f"member-{number}")
        (tmp_path / "both" / f"member-{number}" / "all_results.json").write_text("{}")
    with pytest.raises(InputError, match="holds an ensemble of 2 models. Pass one of them, such as .*member-0"):
        call_main(*given(tmp_path / "both", small_table), *QUICK, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_an_adapter_whose_base_was_trained_on_since_is_refused(method, tiny_checkpoint, small_table, tmp_path):
    """Its shapes fit, so the predictions would be wrong and nothing would say so."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_checkpoint, base)
    call_main(*given(base, small_table), *QUICK, "--peft_method", method, "--max_steps", "1", "--do_train",
              "--output_dir", folder)  # fmt: skip
    model_args, tokenizer = ModelArguments(model_name_or_path=str(folder)), build_tokenizer()
    model = load_model(MolformerForRegression, model_args, tokenizer, merge=True)
    model.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["base_weights"] is None
    changed = MolformerForRegression.from_pretrained(base)
    changed.molformer.embeddings.word_embeddings.weight.data += 1
    changed.save_pretrained(base)
    with pytest.raises(InputError, match="adapter was trained on other weights than those that .*base holds now"):
        load_model(MolformerForRegression, model_args, tokenizer)
    with pytest.raises(InputError, match="was trained on other weights than those that its base holds now"):
        call_main(*given(base, small_table), *QUICK, "--peft_method", method, "--max_steps", "1", "--do_train",
                  "--output_dir", folder, "--resume_from_checkpoint", "true")  # fmt: skip


def test_the_log_does_not_miss_what_a_checkpoint_is_not_to_hold(tiny_checkpoint, small_table, tmp_path, run_script):
    flags = [*given(tiny_checkpoint, small_table), *QUICK, "--peft_method", "bitfit", "--log_level", "info"]
    done = run_script("run_peft.py", *flags, "--output_dir", tmp_path / "out")
    assert "Loading best model" in done.stderr and "missing keys" not in done.stderr
    assert re.search(r"bitfit: \d+ trainable parameters, [\d.]+ % of the base model.s \d+ .*peak memory", done.stderr)


@pytest.mark.parametrize("name", ["outputs/mlm/checkpont-100", "no-such-folder"])
def test_a_mistyped_checkpoint_is_named(name, tmp_path):
    with pytest.raises(InputError, match=name):
        call_main("--model_name_or_path", name, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_bfloat16(method, base, batch):
    """As it does by default where the hardware has it; a module of the adapter could lack it."""
    model = adapt(base, arguments_of(method))
    before = model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        train_steps(model, batch)
    after = model(**batch).logits
    assert after.isfinite().all() and not torch.allclose(before, after)


@pytest.mark.parametrize("method", ["lora", "bitfit", "full"])
def test_the_rate_of_a_method_is_its_own(method, tiny_checkpoint, small_table, tmp_path):
    call_main(*given(tiny_checkpoint, small_table), "--peft_method", method, "--max_steps", "1", "--do_train",
              "--max_train_samples", "16", "--disable_tqdm", "true", "--output_dir", tmp_path / "out")  # fmt: skip
    values = json.loads((tmp_path / "out" / "arguments.json").read_text())
    assert values["learning_rate"] == METHODS[method].learning_rate
    assert values.get("peft_rank") == METHODS[method].rank  # so the run is repeated though a default may change


@pytest.mark.parametrize("other", [("--peft_method", "rslora"), ("--peft_method", "bitfit"), ("--peft_rank", "8")])
def test_a_run_of_another_method_is_not_resumed(finished_run, tiny_checkpoint, small_table, other):
    """Shapes may fit, so nothing else would notice."""
    flags = (*given(tiny_checkpoint, small_table), *QUICK, *other, "--output_dir", finished_run)
    with pytest.raises(InputError, match=f"began with .*{other[0]} .*not {other[1]}.*Go on with the flags"):
        call_main(*flags, "--resume_from_checkpoint", "true")


def test_a_default_that_is_named_is_no_other_setting(finished_run, tiny_checkpoint, small_table):
    before = (finished_run / "adapter_model.safetensors").read_bytes()
    flags = (*given(tiny_checkpoint, small_table), *QUICK, "--peft_rank", "4", "--output_dir", finished_run)
    call_main(*flags, "--resume_from_checkpoint", "true")
    assert (finished_run / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_masked_language_modeling_takes_the_adapted_encoder(method, tiny_checkpoint, small_table, tmp_path):
    """Reference: the merged regression model; the head for tokens is the base's."""
    folder = tmp_path / "out"
    call_main(*given(tiny_checkpoint, small_table), *QUICK, "--peft_method", method, "--output_dir", folder)
    model_args, tokenizer = ModelArguments(model_name_or_path=str(folder)), build_tokenizer()
    model = load_model(MolformerForMaskedLM, model_args, tokenizer)
    merged = load_model(MolformerForRegression, model_args, tokenizer, merge=True)
    base = MolformerForMaskedLM.from_pretrained(tiny_checkpoint)
    for name, tensor in model.state_dict().items():
        expected = merged.state_dict() if name.startswith("molformer.") else base.state_dict()
        assert torch.equal(tensor, expected[name]), name
    changed = "molformer.encoder.layer.0.output.dense." + ("weight" if method == "lora" else "bias")
    assert not torch.equal(model.state_dict()[changed], base.state_dict()[changed])
    for name in ("split_hash", "smiles_form"):
        assert getattr(model.config, name) == getattr(merged.config, name) is not None
    assert not model.head_is_new


def test_an_adapter_of_the_embedded_checkpoint_is_loaded_from_any_folder(small_table, tmp_path, monkeypatch):
    """Its base is named relative to this project; a folder of that name elsewhere is another one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "molformer-mini").mkdir(parents=True)
    flags = ("--train_file", small_table, "--max_steps", "1", "--do_train", "--disable_tqdm", "true")
    for method in ("lora", "bitfit"):
        call_main(*flags, "--peft_method", method, "--output_dir", method)
        model_args = ModelArguments(model_name_or_path=str(tmp_path / method))
        assert find_base(method, model_args)["base"] == "models/molformer-mini"
        assert not load_model(MolformerForRegression, model_args, build_tokenizer()).head_is_new


def test_an_adapter_without_the_scale_of_its_labels_is_refused(finished_run, tiny_checkpoint, tmp_path):
    """As the Auto classes load one from the Hub: the configuration is that of the base."""
    shutil.copytree(finished_run, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    path = tmp_path / "bare" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tiny_checkpoint)}))
    with pytest.raises(ValueError, match="bare is an adapter, and loaded like this its scale of the labels"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    for auto in (AutoModelForSequenceClassification, AutoModelForMaskedLM, AutoModel):  # with the configuration too
        with pytest.raises(ValueError, match="is an adapter, and loaded like this its scale of the labels"):
            auto.from_pretrained(finished_run)


def test_an_interrupted_run_is_no_model_yet(tiny_checkpoint, small_table, tmp_path):
    flags = ("--train_file", small_table, "--disable_tqdm", "true")
    folder = tmp_path / "run"
    call_main("--model_name_or_path", tiny_checkpoint, *flags, "--num_train_epochs", "1", "--output_dir", folder)
    for path in folder.glob("*.*"):
        if path.name != "arguments.json":
            path.unlink()
    (folder / "unfinished").touch()

    def predict(model):
        args = ["--do_predict", *flags, "--model_name_or_path", model, "--output_dir", tmp_path / "predicted"]
        args = [str(flag) for flag in args]
        run_regression.main(*parse_arguments(*run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=args))

    (last,) = folder.glob("checkpoint-*")
    told = f"holds a run that was interrupted. .*--resume_from_checkpoint true, or pass {re.escape(str(last))}"
    with pytest.raises(InputError, match=told):
        predict(folder)
    predict(last)


def test_an_adapter_without_a_head_of_its_own_has_that_of_its_base(tiny_checkpoint, small_table, tmp_path):
    """As peft.get_peft_model makes one without task_type and modules_to_save."""
    call_main("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--num_train_epochs", "1",
              "--peft_method", "full", "--output_dir", tmp_path / "full")  # fmt: skip
    for name, start in (("own", tmp_path / "full"), ("none", tiny_checkpoint)):
        model = AutoModelForSequenceClassification.from_pretrained(start)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query", "value"]))
        for parameter in model.parameters():
            parameter.data += 0.01 * parameter.requires_grad
        model.save_pretrained(tmp_path / name)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tmp_path / "full" / file, tmp_path / name)
        if name == "own":
            batch = build_tokenizer()(["CCO", "c1ccccc1"], return_tensors="pt", padding=True)
            expected = model.eval()(**batch).logits
    model_args = ModelArguments(model_name_or_path=str(tmp_path / "own"))
    for merge in (True, False):
        model = load_model(MolformerForRegression, model_args, build_tokenizer(), merge=merge).eval()
        assert not model.head_is_new
        torch.testing.assert_close(model(**batch).logits, expected)
    start = ("--model_name_or_path", tmp_path / "none", "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="Neither the adapter .*none nor its base has a regression head to go into"):
        call_main(*start, "--merge_adapter")
    with pytest.raises(InputError, match="has no trained regression head to evaluate"):
        call_main(*start, "--train_file", small_table, "--do_eval")


def test_the_revision_of_a_base_on_the_hub_is_kept(base, tmp_path):
    base.name_or_path = "someone/base"
    model = adapt(base, arguments_of("lora"), revision="v2")
    model.peft_config["default"].save_pretrained(tmp_path)
    base.config.save_pretrained(tmp_path)
    found = find_base(str(tmp_path), ModelArguments(model_name_or_path=str(tmp_path)))
    assert (found["base"], found["revision"]) == ("someone/base", "v2")


def test_low_rank_methods_train_few_parameters_of_the_embedded_checkpoint():
    """The winner of the comparison trains 2 % at most; so that all can be it, their defaults do."""
    config = MolformerConfig.from_pretrained(ROOT / "configs" / "molformer-mini.json")
    for method in TUNERS:
        model = MolformerForRegression(config)
        total = model.num_parameters()
        adapted = adapt(model, PeftArguments(peft_method=method))
        names = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
        trained = sum(count for name, count in names.items() if "classifier." not in name)
        assert 0 < trained <= 0.02 * total, (method, trained / total)


def test_a_run_leaves_nothing_of_the_run_that_it_replaces(tiny_checkpoint, small_table, tmp_path):
    """BitFit, then LoRA, then all parameters in one folder: each time the folder is the last model."""
    flags = (*given(tiny_checkpoint, small_table), *QUICK, "--num_train_epochs", "1", "--output_dir", tmp_path / "out")
    for method in ("bitfit", "lora", "full"):
        call_main("--peft_method", method, *flags, "--merge_adapter", "--overwrite_output_dir")
        found = find_base(str(tmp_path / "out"), ModelArguments(model_name_or_path=str(tmp_path / "out")))
        assert (found or {"method": "full"})["method"].lower() == method
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_an_adapter_is_merged_without_data(finished_run, small_table, tmp_path):
    """References: the merged model and the metrics of an evaluation; what the output folder held before is gone."""
    call_main(*given(finished_run, small_table), "--do_eval", "--merge_adapter", "--output_dir", tmp_path / "later")
    assert results(tmp_path / "later")["eval_mse"] == pytest.approx(results(finished_run)["eval_mse"], rel=1e-6)
    call_main(*given(finished_run, small_table), "--do_predict", "--output_dir", tmp_path / "plain")
    merge = ("--model_name_or_path", finished_run, "--merge_adapter")
    call_main(*merge, "--output_dir", tmp_path / "plain", "--overwrite_output_dir")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("later/merged", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "plain" / "predictions.csv").exists()
    assert results(tmp_path / "plain") == results(finished_run)
    card = (tmp_path / "plain" / "README.md").read_text()
    assert f"{results(finished_run)['test_mse']:.4f}" in card and "adapter_config" not in card
    assert f'from_pretrained("{tmp_path / "plain"}", trust_remote_code=True)' in card and "with lora" in card
    again = json.loads((tmp_path / "plain" / "arguments.json").read_text())  # makes the adapter anew, and merges it
    assert (again["output_dir"], again["merge_adapter"]) == (str(tmp_path / "plain"), True)
    assert again["model_name_or_path"] == find_base(str(finished_run), ModelArguments())["base"]
    call_main(*merge, "--output_dir", tmp_path / "plain", "--resume_from_checkpoint", "true")  # as to push it later
    assert f'("{tmp_path / "later" / "merged"}", trust' in (tmp_path / "later" / "README.md").read_text()
    card = (tmp_path / "later" / "merged" / "README.md").read_text()  # of the plain model, for who takes it alone
    assert f'("{tmp_path / "later" / "merged"}", trust' in card and "adapter_config" not in card
    call_main(*given(finished_run, small_table), "--do_predict", "--output_dir", tmp_path / "only")
    assert "An evaluation of `" in (tmp_path / "only" / "README.md").read_text()
    shutil.copytree(finished_run, tmp_path / "pushed")
    values = json.loads((tmp_path / "pushed" / "arguments.json").read_text())
    (tmp_path / "pushed" / "arguments.json").write_text(
        json.dumps(values | {"hub_model_id": "a/b", "hub_revision": "c"})
    )
    call_main("--model_name_or_path", tmp_path / "pushed", "--merge_adapter", "--output_dir", tmp_path / "of-pushed")
    values = json.loads((tmp_path / "of-pushed" / "arguments.json").read_text())
    assert not {"hub_model_id", "hub_revision"} & values.keys()
    shutil.copytree(finished_run, tmp_path / "bare")  # as somebody else's adapter
    for name in ("arguments.json", "all_results.json", "splits.json", "README.md"):
        (tmp_path / "bare" / name).unlink()
    call_main("--model_name_or_path", tmp_path / "bare", "--merge_adapter", "--output_dir", tmp_path / "unknown")
    card = (tmp_path / "unknown" / "README.md").read_text()
    assert "Data: not known" in card and "MoleculeNet" not in card and "logD7.4" not in card
    # the arguments are those of the merging: how the adapter was made is not known
    values = json.loads((tmp_path / "unknown" / "arguments.json").read_text())
    assert values["model_name_or_path"] == str(tmp_path / "bare") and values["merge_adapter"]
    with pytest.raises(InputError, match="is the adapter itself. Give another folder"):
        call_main(*merge, "--output_dir", finished_run)
    with pytest.raises(InputError, match="cannot be the base of another one. Merge it first"):
        call_main(*merge, "--do_train", "--output_dir", tmp_path / "trained")


def test_merging_replaces_nothing_but_what_was_merged_before(finished_run, tiny_checkpoint, small_table, tmp_path):
    """No other run where a merged model is to be pushed later, no folder of the user's, and not the base."""
    other, base, merge = tmp_path / "other", tmp_path / "base", ("--merge_adapter", "--model_name_or_path")
    shutil.copytree(finished_run, other)
    resume = ("--output_dir", other, "--resume_from_checkpoint")
    for value in ("true", finished_run / "checkpoint-1"):
        with pytest.raises(InputError, match="holds no merged adapter, and there is no training to resume"):
            call_main(*merge, finished_run, *resume, value)
    assert load_file(other / "adapter_model.safetensors").keys()
    (tmp_path / "out" / "merged").mkdir(parents=True)
    (tmp_path / "out" / "merged" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="merged is not of these scripts and would be replaced"):
        call_main(*given(finished_run, small_table), "--do_eval", "--merge_adapter", "--output_dir", tmp_path / "out",
                  "--overwrite_output_dir")  # fmt: skip
    shutil.copytree(tiny_checkpoint, base)
    (base / "arguments.json").write_text("{}")  # as of a run, which could be replaced
    flags = (*given(base, small_table), *QUICK, "--max_steps", 1, "--peft_method", "bitfit")
    call_main(*flags, "--output_dir", tmp_path / "adapter")
    with pytest.raises(InputError, match="would replace .*base, the base of .*adapter"):
        call_main(*merge, tmp_path / "adapter", "--output_dir", base, "--overwrite_output_dir")
    assert (base / "model.safetensors").exists()


def test_a_merge_that_was_interrupted_is_made_again(tiny_checkpoint, small_table, tmp_path, monkeypatch):
    flags = (*given(tiny_checkpoint, small_table), *QUICK, "--max_steps", 1, "--peft_method", "bitfit")
    flags += ("--merge_adapter", "--output_dir", tmp_path / "out")
    save = MolformerForRegression.save_pretrained

    def interrupted(model, folder, *args, **kwargs):
        save(model, folder, *args, **kwargs)
        if Path(folder).name == "merged":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MolformerForRegression, "save_pretrained", interrupted)
        call_main(*flags)
    assert not (tmp_path / "out" / "merged" / "all_results.json").exists()
    call_main(*flags, "--resume_from_checkpoint", "true")
    assert (tmp_path / "out" / "merged" / "all_results.json").exists()


def test_an_adapter_can_be_merged_and_trained_on(finished_run, small_table, tmp_path):
    """Merged later, it predicts as it did; as a start it is merged into its base first, and all is trained."""
    call_main(*given(finished_run, small_table), "--do_eval", "--merge_adapter", "--output_dir", tmp_path / "later")
    assert results(tmp_path / "later")["eval_mse"] == pytest.approx(results(finished_run)["eval_mse"], rel=1e-6)
    tokenizer = build_tokenizer()
    batch = tokenizer(["CCO", "c1ccccc1C(=O)NCC"], padding=True, return_tensors="pt")
    merged, adapter = (
        load_model(MolformerForRegression, ModelArguments(model_name_or_path=str(folder)), tokenizer).eval()
        for folder in (tmp_path / "later" / "merged", finished_run)
    )
    assert torch.allclose(merged(**batch).logits, adapter(**batch).logits, rtol=0, atol=1e-5)
    flags = given(finished_run, small_table)
    call_regression(*flags, *QUICK, "--num_train_epochs", "1", "--output_dir", tmp_path / "full")
    trained = json.loads((tmp_path / "full" / "all_results.json").read_text())["trainable_parameters"]
    assert trained == sum(p.numel() for p in merged.parameters())
    with pytest.raises(InputError, match="holds an adapter, which cannot be the base of another"):
        call_main(*flags, *QUICK, "--peft_method", "bitfit", "--output_dir", tmp_path / "bitfit")


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_an_adapter_with_another_head_is_refused(method, tiny_checkpoint, small_table, tmp_path):
    flags = (*QUICK, "--num_train_epochs", "1", "--peft_method", method, "--output_dir", tmp_path / "out")
    call_main(*given(tiny_checkpoint, small_table), *flags)
    with pytest.raises(InputError, match="does not fit its base"):
        call_regression(*given(tmp_path / "out", small_table), "--regression_head", "molformer", "--do_predict",
                        "--output_dir", tmp_path / "again")  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_an_adapter_that_lacks_weights_is_refused(method, tiny_checkpoint, small_table, tmp_path):
    """The library loads half an adapter, and predicts with it."""
    call_main(*given(tiny_checkpoint, small_table), *QUICK, "--max_steps", "1", "--do_train", "--peft_method", method,
              "--output_dir", tmp_path / "out")  # fmt: skip
    (path,) = (tmp_path / "out").glob("*.safetensors")
    weights = load_file(path)
    lost = sorted(name for name in weights if "layer.1." in name)
    model_args = ModelArguments(model_name_or_path=str(tmp_path / "out"))
    for change, message in (
        (dict.fromkeys(lost[:1]), f"lacks {lost[0]}"),
        ({"more.weight": torch.ones(1)}, "has more"),
    ):
        changed = {name: tensor for name, tensor in (weights | change).items() if tensor is not None}
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message) as caught:
            load_model(MolformerForRegression, model_args, build_tokenizer())
        assert "\n" not in str(caught.value)


def test_an_adapter_of_other_settings_is_refused_in_one_line(finished_run, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(finished_run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    values = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"r": 3}, "does not fit its base .*size mismatch|does not fit its base .*Error"),
        ({"peft_type": "FOO"}, "is of the type FOO, which peft .* does not know"),
        ({"target_modules": ["nowhere"]}, "does not fit its base"),
        ({"lora_alpha": "x"}, "does not fit its base"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(values | change))
        with pytest.raises(InputError, match=message) as caught:
            load_model(MolformerForRegression, ModelArguments(model_name_or_path=str(folder)), build_tokenizer())
        assert "\n" not in str(caught.value), change
