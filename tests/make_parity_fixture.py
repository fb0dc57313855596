"""Makes a tiny random MoLFormer checkpoint and the numbers it must answer with, for test_modeling_molformer_reg.py.

    python tests/make_parity_fixture.py

Writes `tests/fixtures/molformer_parity.safetensors` (weights, inputs, answers) and `molformer_parity.json` (the
configuration). The answers come from the loops below, in float64 and one token at a time: the attention is the
explicit quadratic one, every rotation a 2 x 2 matrix. They use NumPy alone and nothing of the model under test.
Gradients are central differences. Run it again only when the architecture changes, never to make a test pass.

Ross et al. 2022, https://arxiv.org/abs/2106.09553; Su et al. 2021 (rotary), https://arxiv.org/abs/2104.09864.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


FIXTURES = Path(__file__).resolve().parent / "fixtures"
SEED = 20
STEP = 1e-6  # of the central differences, along a direction of norm one
CONFIG = {
    "model_type": "molformer",
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_random_features": 12,
    "hidden_act": "gelu",
    "feature_map_kernel": "relu",
    "layer_norm_eps": 1e-12,
    "linear_attention_eps": 1e-6,
    "pad_token_id": 2,
    "num_labels": 2,
    "label_mean": [2.0, -0.5],
    "label_std": [1.2, 0.7],
}
LENGTHS = (9, 6, 4)  # real tokens of each sequence; the rest is padding
HEADS = ("linear", "molformer")
POOLINGS = ("cls", "mean")


def draw_weights(config, random):
    """Returns the float32 arrays of a checkpoint by key, none of them trivial: no zero bias, no LayerNorm of ones.

    The keys of the regression heads start with `linear/` or `molformer/`, those of encoder and LM head with `both/`.
    """
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_size = hidden // config["num_attention_heads"]
    weights = {}

    def dense(key, outputs, inputs, bias=True):
        weights[f"{key}.weight"] = random.normal(0, 1.5 / math.sqrt(inputs), (outputs, inputs))
        if bias:
            weights[f"{key}.bias"] = random.normal(0, 0.1, outputs)

    def norm(key):
        weights[f"{key}.weight"] = random.normal(1, 0.2, hidden)
        weights[f"{key}.bias"] = random.normal(0, 0.1, hidden)

    embeddings = random.normal(0, 0.5, (vocab, hidden))
    embeddings[config["pad_token_id"]] = 0
    weights["both/molformer.embeddings.word_embeddings.weight"] = embeddings
    for index in range(config["num_hidden_layers"]):
        layer = f"both/molformer.encoder.layer.{index}"
        for name in ("query", "key", "value"):
            dense(f"{layer}.attention.self.{name}", hidden, hidden)
        feature_map = random.normal(0, 1, (head_size, config["num_random_features"]))
        weights[f"{layer}.attention.self.feature_map.weight"] = feature_map
        dense(f"{layer}.attention.output.dense", hidden, hidden)
        norm(f"{layer}.attention.output.LayerNorm")
        dense(f"{layer}.intermediate.dense", inner, hidden)
        dense(f"{layer}.output.dense", hidden, inner)
        norm(f"{layer}.output.LayerNorm")
    norm("both/molformer.LayerNorm")
    dense("both/lm_head.transform.dense", hidden, hidden)
    norm("both/lm_head.transform.LayerNorm")
    dense("both/lm_head.decoder", vocab, hidden, bias=False)
    dense("linear/classifier.out_proj", config["num_labels"], hidden)
    for name, outputs in (("dense", hidden), ("dense2", hidden), ("out_proj", config["num_labels"])):
        dense(f"molformer/classifier.{name}", outputs, hidden)
    return {key: value.astype(np.float32) for key, value in weights.items()}


def draw_batch(config, random):
    """Returns token ids with padding on the right, mask, arbitrary positions, and the labels of both tasks."""
    batch, length = len(LENGTHS), max(LENGTHS)
    input_ids = np.full((batch, length), config["pad_token_id"], dtype=np.int64)
    attention_mask = np.zeros((batch, length), dtype=np.int64)
    mlm_labels = np.full((batch, length), -100, dtype=np.int64)
    for row, tokens in enumerate(LENGTHS):
        input_ids[row, :tokens] = random.randint(4, config["vocab_size"], tokens)
        input_ids[row, 0], input_ids[row, tokens - 1] = 0, 1  # <bos>, <eos>
        attention_mask[row, :tokens] = 1
        mlm_labels[row, 1 : tokens - 1 : 2] = random.randint(4, config["vocab_size"], len(range(1, tokens - 1, 2)))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": random.randint(0, 300, (batch, length)).astype(np.int64),
        "mlm_labels": mlm_labels,
        "labels": random.normal(0, 2, (batch, config["num_labels"])),
    }


def gelu(vector):
    return np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in vector])


def dense(weights, key, vector):
    return weights[f"{key}.weight"] @ vector + weights.get(f"{key}.bias", 0.0)


def layer_norm(weights, key, vector, eps):
    centered = vector - sum(vector) / len(vector)
    variance = sum(x * x for x in centered) / len(vector)
    return centered / math.sqrt(variance + eps) * weights[f"{key}.weight"] + weights[f"{key}.bias"]


def rotate(vector, position):
    """Returns `vector` (D,) with each pair (i, i + D/2) turned by the angle position * 10000^(-2i/D)."""
    size, turned = len(vector), np.empty(len(vector))
    for i in range(size // 2):
        angle = position * 10000 ** (-2 * i / size)
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        turned[[i, i + size // 2]] = rotation @ vector[[i, i + size // 2]]
    return turned


def attend(weights, key, states, mask, positions, config):
    """Returns the attention's output for one sequence, T vectors (C,), and its weights (H, T, T)."""
    heads, length = config["num_attention_heads"], len(states)
    size = config["hidden_size"] // heads
    feature_map = weights[f"{key}.feature_map.weight"]
    contexts, rows = np.zeros((length, config["hidden_size"])), np.zeros((heads, length, length))
    query, keys, value = ([dense(weights, f"{key}.{n}", x) for x in states] for n in ("query", "key", "value"))
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        mapped_query = [np.maximum(rotate(query[t][part], positions[t]) @ feature_map, 0) for t in range(length)]
        mapped_key = [np.maximum(rotate(keys[t][part], positions[t]) @ feature_map, 0) for t in range(length)]
        for t in range(length):
            scores = [mask[s] * (mapped_query[t] @ mapped_key[s]) for s in range(length)]
            divisor = max(sum(scores), config["linear_attention_eps"])
            rows[head, t] = [score / divisor for score in scores]
            contexts[t, part] = sum(rows[head, t, s] * value[s][part] for s in range(length))
    return contexts, rows


def encode(weights, config, input_ids, mask, positions):
    """Returns for one sequence the states after the embeddings and each layer, the last normalized, and attentions."""
    eps = config["layer_norm_eps"]
    states = [weights["molformer.embeddings.word_embeddings.weight"][token] for token in input_ids]
    all_states, all_rows = [np.array(states)], []
    for index in range(config["num_hidden_layers"]):
        layer = f"molformer.encoder.layer.{index}"
        contexts, rows = attend(weights, f"{layer}.attention.self", states, mask, positions, config)
        following = []
        for state, context in zip(states, contexts, strict=True):
            attended = dense(weights, f"{layer}.attention.output.dense", context) + state
            attended = layer_norm(weights, f"{layer}.attention.output.LayerNorm", attended, eps)
            inner = gelu(dense(weights, f"{layer}.intermediate.dense", attended))
            state = dense(weights, f"{layer}.output.dense", inner) + attended
            following.append(layer_norm(weights, f"{layer}.output.LayerNorm", state, eps))
        states = following
        all_states.append(np.array(states))
        all_rows.append(rows)
    last = np.array([layer_norm(weights, "molformer.LayerNorm", state, eps) for state in states])
    return all_states, last, all_rows


def masked_mean(states, mask):
    return sum(keep * state for state, keep in zip(states, mask, strict=True)) / sum(mask)


def mlm_answers(weights, config, states, labels):
    """Returns the logits (B, T, V) and the mean cross-entropy over the labels that are not -100."""
    logits = np.zeros((*labels.shape, config["vocab_size"]))
    losses = []
    for row, column in np.ndindex(labels.shape):
        hidden = gelu(dense(weights, "lm_head.transform.dense", states[row][column]))
        hidden = layer_norm(weights, "lm_head.transform.LayerNorm", hidden, config["layer_norm_eps"])
        logits[row, column] = dense(weights, "lm_head.decoder", hidden)
        if labels[row, column] != -100:
            total = math.log(sum(math.exp(x) for x in logits[row, column]))
            losses.append(total - logits[row, column, labels[row, column]])
    return logits, sum(losses) / len(losses)


def regression_answers(weights, config, pooled, labels, head):
    """Returns the predictions in label units (B, K) and the mean squared error of the standardized labels."""
    predictions, squares = np.zeros(labels.shape), []
    for row, vector in enumerate(pooled):
        if head == "molformer":
            vector = gelu(dense(weights, "classifier.dense", vector)) + vector
            vector = gelu(dense(weights, "classifier.dense2", vector)) + vector
        standardized = dense(weights, "classifier.out_proj", vector)
        for k, (mean, std) in enumerate(zip(config["label_mean"], config["label_std"], strict=True)):
            predictions[row, k] = standardized[k] * std + mean
            squares.append((standardized[k] - (labels[row, k] - mean) / std) ** 2)
    return predictions, sum(squares) / len(squares)


def weights_of(weights, head):
    """Returns the float64 checkpoint, by its own keys, of the encoder, the LM head and one regression head."""
    parts = (key.split("/", 1) for key in weights)
    return {key: weights[f"{part}/{key}"].astype(np.float64) for part, key in parts if part in ("both", head)}


def reference_answers(weights, config, batch):
    """Returns everything the model must answer with on `batch`, by name, float64."""
    ids, mask, length = batch["input_ids"], batch["attention_mask"], batch["input_ids"].shape[1]
    checkpoint = weights_of(weights, "linear")
    ordered = np.tile(np.arange(length), (len(ids), 1))

    def encode_all(mask, positions):
        return zip(*(encode(checkpoint, config, *row) for row in zip(ids, mask, positions, strict=True)), strict=True)

    answers = {}
    states, last, rows = encode_all(mask, ordered)
    for index in range(config["num_hidden_layers"] + 1):
        answers[f"hidden_states.{index}"] = np.array([sequence[index] for sequence in states])
    for index in range(config["num_hidden_layers"]):
        answers[f"attentions.{index}"] = np.array([sequence[index] for sequence in rows])
    answers["last_hidden_state"] = np.array(last)
    answers["pooler_output"] = np.array([masked_mean(*pair) for pair in zip(last, mask, strict=True)])
    answers["mlm_logits"], answers["mlm_loss"] = mlm_answers(checkpoint, config, last, batch["mlm_labels"])
    for head in HEADS:
        for pooling in POOLINGS:
            pooled = answers["pooler_output"] if pooling == "mean" else [sequence[0] for sequence in last]
            predictions, loss = regression_answers(weights_of(weights, head), config, pooled, batch["labels"], head)
            answers[f"logits.{head}.{pooling}"], answers[f"loss.{head}.{pooling}"] = predictions, loss
    answers["last_hidden_state_of_positions"] = np.array(list(encode_all(mask, batch["position_ids"]))[1])
    answers["last_hidden_state_no_mask"] = np.array(list(encode_all(np.ones_like(mask), ordered))[1])
    return {name: np.asarray(value, dtype=np.float64) for name, value in answers.items()}


def direction(shape):
    """Returns the direction of norm one along which a tensor is differentiated: entry k is proportional to cos(k)."""
    values = np.cos(np.arange(math.prod(shape), dtype=np.float64)).reshape(shape)
    return values / np.linalg.norm(values)


def directional_derivatives(weights, config, batch, losses):
    """Returns the derivative of each loss along `direction`, by `<loss>/<weight>`, from central differences."""
    derivatives = {}
    for name, part in losses.items():
        for key in weights:
            if key.split("/")[0] not in ("both", part) or "feature_map" in key or (part and "lm_head" in key):
                continue
            values = []
            for sign in (1, -1):
                moved = {k: v.astype(np.float64) for k, v in weights.items()}
                moved[key] = moved[key] + sign * STEP * direction(moved[key].shape)
                values.append(_loss(moved, config, batch, name, part))
            derivatives[f"{name}/{key.split('/')[1]}"] = np.asarray((values[0] - values[1]) / (2 * STEP))
    return derivatives


def _loss(weights, config, batch, name, head):
    checkpoint, mask = weights_of(weights, head), batch["attention_mask"]
    length = mask.shape[1]
    last = [encode(checkpoint, config, i, m, range(length))[1] for i, m in zip(batch["input_ids"], mask, strict=True)]
    if name == "mlm_loss":
        return mlm_answers(checkpoint, config, last, batch["mlm_labels"])[1]
    pooled = [masked_mean(*pair) for pair in zip(last, mask, strict=True)]
    return regression_answers(checkpoint, config, pooled, batch["labels"], head)[1]


def main(folder=FIXTURES):
    random = np.random.RandomState(SEED)  # NumPy promises never to change this stream
    weights, batch = draw_weights(CONFIG, random), draw_batch(CONFIG, random)
    losses = {"mlm_loss": "", "loss.molformer.mean": "molformer"}
    tensors = {f"weights/{key}": value for key, value in weights.items()}
    tensors |= {f"batch/{key}": value for key, value in batch.items()}
    tensors |= {f"answers/{key}": value for key, value in reference_answers(weights, CONFIG, batch).items()}
    derivatives = directional_derivatives(weights, CONFIG, batch, losses)
    tensors |= {f"derivatives/{key}": value for key, value in derivatives.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "molformer_parity.safetensors")
    (folder / "molformer_parity.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FIXTURES, help="folder of the two files")
    main(parser.parse_args().output_dir)
