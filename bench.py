"""Times and memory of what the scripts do, side by side in one run, on the lengths of the real molecules.

    python bench.py                        # tables on the screen, results/bench.json and .md; ten minutes on two cores
    python bench.py --sizes mini --rounds 3
    python bench.py --corpus               # also reads a corpus of a million SMILES

All cases are built first and then timed in turn, round after round in a new order; a number is the median of the
rounds. Beside our steps: the published way to run the model (molecules in random order, padded, float32, one QR a
layer at each forward), BERT and ModernBERT of the same width and depth from transformers, and the matrix products of
the same real tokens alone, which nothing can beat. Weights are random, learning rates 0. Peak memory is that of a
process of its own.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parent / "studies"))

from common import ROOT, write_report  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from modeling_molformer_reg import (  # noqa: E402
    MolformerConfig,
    MolformerForMaskedLM,
    MolformerForRegression,
    draw_random_features,
)
from trainer_regression import LengthGroupedBatchSampler  # noqa: E402


SIZES = {
    "mini": json.loads((ROOT / "models" / "molformer-mini" / "config.json").read_text()),
    "xl": {},  # the defaults of MolformerConfig
}
BATCH, BATCHES = 16, {"mini": 8, "xl": 4}
LENGTHS = (32, 64, 128, 256, 512, 1024)
METHODS = ("full", "head", "bitfit", "ia3", "lora", "dora", "vera", "oft", "miss", "hira", "shira")
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------- batches


def real_lengths():
    """Returns the numbers of tokens of the embedded molecules."""
    from trainer_regression import build_tokenizer
    from utils_molecules import canonicalize, read_table

    smiles = read_table(ROOT / "data" / "lipophilicity.csv")["smiles"]
    ids = build_tokenizer()([canonicalize(text, "canonical") for text in smiles])["input_ids"]
    return [len(row) for row in ids]


def make_batch(lengths, labels=True):
    """Returns a padded batch of random tokens with the given lengths."""
    ids = torch.full((len(lengths), max(lengths)), 2)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 2000, (length,))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    if labels:
        batch["labels"] = torch.randn(len(lengths), 1)
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def choose_batches(lengths, count, grouped):
    """Returns `count` lists of `BATCH` lengths of the data set: as the trainer groups them, or in random order.

    The grouped ones are taken at equal distances from those of an epoch, sorted by length; speeds are compared in real
    tokens, of which both kinds have about as many.
    """
    if grouped:
        rows = list(LengthGroupedBatchSampler(BATCH, lengths, seed=0))
        epoch = [[lengths[row] for row in rows[start : start + BATCH]] for start in range(0, len(rows), BATCH)][:-1]
        epoch.sort(key=sum)
        return [epoch[(2 * number + 1) * len(epoch) // (2 * count)] for number in range(count)]
    order = random.Random(0).sample(lengths, count * BATCH)
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


# --------------------------------------------------------------------------------------------------------------- cases


@cache
def build(model_class, size, **changes):
    """Returns a model with random weights; cases share it, since their learning rates are 0."""
    torch.manual_seed(0)
    config = MolformerConfig(**{**SIZES[size], **changes})
    return model_class(config).to(DEVICE)


def shape_of(size):
    """Returns width, depth and heads of our model as BERT and ModernBERT call them, for one number a molecule."""
    config = MolformerConfig(**SIZES[size])
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    shape = {name: getattr(config, name) for name in names}
    return {**shape, "num_labels": 1, "problem_type": "regression", "max_position_embeddings": 2048}


@cache
def bert(size):
    config = BertConfig(**shape_of(size), pad_token_id=2, attn_implementation="sdpa")
    return BertForSequenceClassification(config).to(DEVICE)


@cache
def modern_bert(size):
    tokens = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
    config = ModernBertConfig(**shape_of(size), **tokens, attn_implementation="sdpa")
    return ModernBertForSequenceClassification(config).to(DEVICE)


PEERS = {"BERT (SDPA)": bert, "ModernBERT": modern_bert}


def redraw_as_published(model):
    """Draws the random features of every layer with a QR of its own, as the published code does at every forward."""
    for feature_map in model.molformer.feature_maps():
        size = feature_map.weight.shape
        feature_map.weight.copy_(draw_random_features(1, *size, device=feature_map.weight.device)[0])


def train_step(model, batches, bf16=False, before=None):
    """Returns a function that trains on all batches once, with a learning rate of 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def step():
        model.train()
        for batch in batches:
            if before is not None:
                before(model)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def eval_step(model, batches, bf16=False, before=None):
    """Returns a function that evaluates all batches once."""

    @torch.inference_mode()
    def step():
        model.eval()
        for batch in batches:
            if before is not None:
                before(model)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                model(**{name: tensor for name, tensor in batch.items() if name != "labels"})

    return step


def products(size, batches, bf16, training):
    """Returns a function that does the matrix products of the real tokens of all batches, and nothing else."""
    config, dtype = MolformerConfig(**SIZES[size]), torch.bfloat16 if bf16 else torch.float32
    width, inner, features = config.hidden_size, config.intermediate_size, config.num_random_features
    heads = config.num_attention_heads
    work = []
    for lengths in batches:
        tokens = sum(lengths)
        shapes = 4 * [(tokens, width, width)] + [(tokens, width, inner), (tokens, inner, width)]
        shapes += 4 * [(tokens * heads, width // heads, features)]  # two maps, keys with values, queries with those
        for rows, inputs, outputs in shapes:
            x, w, y = (
                torch.randn(shape, device=DEVICE, dtype=dtype)
                for shape in ((rows, inputs), (inputs, outputs), (rows, outputs))
            )
            work.append((x, w, y))

    def step():
        with torch.no_grad():
            for _ in range(config.num_hidden_layers):
                for x, w, y in work:
                    x @ w
                    if training:
                        y @ w.T
                        x.T @ y

    return step


def masked_batch(batch):
    labels = torch.where(torch.rand(batch["input_ids"].shape) < 0.15, batch["input_ids"].cpu(), -100).to(DEVICE)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


def predict_step(model, encoded, bf16):
    """Returns a function that predicts molecules from their tokens, as run_regression.py predicts a file."""
    from arguments import TrainingArguments
    from trainer_regression import build_tokenizer
    from utils_predict import Predictor

    arguments = TrainingArguments(output_dir=tempfile.gettempdir(), bf16=bf16)
    predictor = Predictor([model], build_tokenizer(), arguments)
    return lambda: predictor.predict(encoded)


def influence_step(size, rows, name):
    """Returns a function that computes what `name` says for one batch, all parameters, float32."""
    from run_influence import ggn_vector_product, hessian_vector_product, scores_by_gradients, scores_by_jvp

    model = build(MolformerForRegression, size, redraw_features=False, pooling="mean").eval().requires_grad_(False)
    params = {key: tensor.detach() for key, tensor in model.named_parameters()}
    vector = torch.randn(sum(tensor.numel() for tensor in params.values()), device=DEVICE)

    def residuals_of(lengths):
        batch = make_batch(lengths)
        labels = batch.pop("labels")
        return lambda params: torch.func.functional_call(model, params, kwargs=batch).logits - labels

    whole, singles = residuals_of(rows), [residuals_of([length]) for length in rows]
    return {
        "influence scores, jvp": lambda: scores_by_jvp(whole, params, vector),
        "influence scores, gradient of each": lambda: [scores_by_gradients(one, params, vector) for one in singles],
        "GGN product of a batch": lambda: ggn_vector_product(whole, params, vector),
        "Hessian product of a batch": lambda: hessian_vector_product(whole, params, vector),
        "double backward of each": lambda: [hessian_vector_product(one, params, vector) for one in singles],
    }[name]


INFLUENCE = ("influence scores, jvp", "influence scores, gradient of each", "GGN product of a batch",
             "Hessian product of a batch", "double backward of each")  # fmt: skip


def peft_model(size, method):
    from run_peft import PeftArguments, adapt

    model = build.__wrapped__(MolformerForRegression, size, redraw_features=False)  # one of its own: it is changed
    return adapt(model, PeftArguments(peft_method=method)).to(DEVICE)


class Case:
    """Something that is timed: `build` makes the function; molecules and real tokens of one call; what bounds it."""

    def __init__(self, build, batches, bound=None):
        self.build, self.bound = build, bound
        self.molecules, self.tokens = sum(map(len, batches)), sum(map(sum, batches))


def cases_of(size, lengths, methods):
    """Returns every `Case` by its name."""
    grouped, shuffled = (choose_batches(lengths, BATCHES[size], kind) for kind in (True, False))
    regression = partial(build, MolformerForRegression, size)
    flat = [[3] * length for rows in shuffled for length in rows]
    cases = {}

    def add(name, make, batches, bound=None):
        cases[name] = Case(make, batches, bound)

    def tensors(batches):
        return [make_batch(rows) for rows in batches]

    for kind, bf16 in (("fp32", False), ("bf16", True)):
        for what, training in (("training", True), ("evaluation", False)):
            bound = f"products alone, {what}, {kind}"
            add(bound, partial(products, size, grouped, bf16, training), grouped)
            step = train_step if training else eval_step
            add(
                f"{what}, {kind}",
                lambda step=step, bf16=bf16: step(regression(), tensors(grouped), bf16),
                grouped,
                bound,
            )
            for name, peer in PEERS.items():
                make = partial(lambda step, bf16, peer: step(peer(size), tensors(grouped), bf16), step, bf16, peer)
                add(f"{what}, {kind}, {name}", make, grouped)
        add(f"prediction, {kind}", partial(lambda bf16: predict_step(regression(), flat, bf16), bf16), shuffled)
    frozen = partial(regression, redraw_features=False)
    for what, step in (("training", train_step), ("evaluation", eval_step)):
        make = partial(lambda step: step(frozen(), tensors(shuffled), before=redraw_as_published), step)
        add(f"{what}, the published way", make, shuffled)
    add("masked language modeling, bf16",
        lambda: train_step(build(MolformerForMaskedLM, size), [masked_batch(b) for b in tensors(grouped)], True),
        grouped)  # fmt: skip
    for method in methods:
        make = partial(lambda method: train_step(peft_model(size, method), tensors(grouped)), method)
        add(f"{method}, training, fp32", make, grouped)
    middle = grouped[len(grouped) // 2]
    for name in INFLUENCE:
        add(name, partial(influence_step, size, middle, name), [middle])
    return cases


def length_cases(size):
    """Returns the evaluation of 2,048 tokens in molecules of one length, for our model and its peers."""
    models = {"MoLFormer": partial(build, MolformerForRegression), **PEERS}
    return {
        f"{name}, {length} tokens": Case(
            lambda model=model, length=length: eval_step(model(size), [make_batch([length] * (2048 // length))]),
            [[length] * (2048 // length)],
        )
        for name, model in models.items()
        for length in LENGTHS
    }


# -------------------------------------------------------------------------------------------------------------- timing


def synchronize():
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()


def time_cases(cases, rounds):
    """Returns the seconds of every round by case; one round before them warms up."""
    steps = {name: case.build() for name, case in cases.items()}
    seconds = {name: [] for name in cases}
    names = list(cases)
    for number in range(rounds + 1):
        random.Random(number).shuffle(names)
        for name in names:
            synchronize()
            start = time.perf_counter()
            steps[name]()
            synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows_of(size, cases, seconds, memory=None):
    """Returns a row for each case: median seconds, molecules and tokens a second, share of the products' bound."""
    speed = {name: case.tokens / statistics.median(seconds[name]) for name, case in cases.items()}
    rows = []
    for name, case in cases.items():
        row = {"size": size, "case": name, "seconds": statistics.median(seconds[name]), "all_seconds": seconds[name]}
        row |= {"tokens_per_second": speed[name], "molecules_per_second": case.molecules / row["seconds"]}
        if case.bound is not None:
            row["share_of_bound"] = speed[name] / speed[case.bound]
        if memory and name in memory:
            row["peak_memory_bytes"] = memory[name]
        rows.append(row)
    return rows


def ratios(rows):
    """Returns how many times faster a case is than what it is measured by, by name."""
    speed = {(row["size"], row["case"]): row["tokens_per_second"] for row in rows}
    pairs = []
    for step in ("training", "evaluation"):
        for kind in ("fp32", "bf16"):
            pairs.append((f"{step}, {kind}", f"{step}, the published way"))
            pairs += [(f"{step}, {kind}", f"{step}, {kind}, {peer}") for peer in ("BERT (SDPA)", "ModernBERT")]
    pairs.append(("influence scores, jvp", "influence scores, gradient of each"))
    pairs += [
        ("prediction, fp32", "evaluation, the published way"),
        ("prediction, bf16", "evaluation, the published way"),
    ]
    pairs += [(f"{kind} product of a batch", "double backward of each") for kind in ("GGN", "Hessian")]
    return [
        {"size": size, "case": first, "against": second, "ratio": speed[size, first] / speed[size, second]}
        for size in dict.fromkeys(row["size"] for row in rows)
        for first, second in pairs
        if (size, first) in speed and (size, second) in speed
    ]


def peak_of(size, name):
    """Returns the peak memory of a case in a process of its own, in bytes."""
    command = [sys.executable, __file__, "--sizes", size, "--one", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def run_one(size, name):
    """Runs one case alone, twice, and prints the peak memory of this process."""
    from trainer_regression import peak_memory

    step = cases_of(size, real_lengths(), METHODS)[name].build()
    for _ in range(2):
        step()
    print(peak_memory())


def start_up(rounds=5):
    """Returns median seconds of `run_regression.py --help`, and of importing what the arguments come from."""
    commands = {
        "run_regression.py --help": [str(ROOT / "run_regression.py"), "--help"],
        "import of TrainingArguments": ["-c", "from transformers import HfArgumentParser, TrainingArguments"],
    }
    seconds = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def read_corpus(count=1_000_000):
    """Returns seconds and peak memory of canonicalizing and encoding a corpus of `count` SMILES in processes."""
    lines = (ROOT / "data" / "lipophilicity.csv").read_text().splitlines()[1:]
    smiles = [line.split(",")[0] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.txt"
        path.write_text("\n".join(smiles[i % len(smiles)] for i in range(count)) + "\n")
        code = (
            "import resource, time\n"
            "from utils_mlm import *; from arguments import *; from run_mlm import MlmArguments\n"
            "from trainer_regression import build_tokenizer\n"
            f"data = DataTrainingArguments(train_file={str(path)!r})\n"
            f"start = time.time(); corpus = read_corpus(data.train_file, data, {folder!r})\n"
            "encode_corpus(corpus, build_tokenizer(), data, MlmArguments(), data.train_file)\n"
            "who = [resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
            "print(time.time() - start, max(who) * 1024)"
        )
        environment = {**os.environ, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        )
    seconds, peak = ran.stdout.split()[-2:]
    return {"molecules": count, "seconds": float(seconds), "peak_memory_bytes": int(peak)}


# -------------------------------------------------------------------------------------------------------------- report


def to_markdown(report):
    """Returns the tables of the README."""
    lines = []
    for size in dict.fromkeys(row["size"] for row in report["rows"]):
        lines += [f"### {size}", "", "| case | molecules/s | tokens/s | share of the products | peak memory |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        for row in (row for row in report["rows"] if row["size"] == size):
            share = f"{100 * row['share_of_bound']:.0f} %" if "share_of_bound" in row else ""
            memory = f"{row['peak_memory_bytes'] / 1e9:.2f} GB" if "peak_memory_bytes" in row else ""
            numbers = f"{row['molecules_per_second']:,.1f} | {row['tokens_per_second']:,.0f}"
            lines.append(f"| {row['case']} | {numbers} | {share} | {memory} |")
        lines += ["", "| case | against | times faster |", "| --- | --- | ---: |"]
        lines += [
            f"| {r['case']} | {r['against']} | {r['ratio']:.2f} |" for r in report["ratios"] if r["size"] == size
        ]
        lines.append("")
    for name, seconds in report.get("start_up", {}).items():
        lines.append(f"- {name}: {seconds:.2f} s")
    if "corpus" in report:
        corpus = report["corpus"]
        lines.append(
            f"- corpus of {corpus['molecules']:,} SMILES, canonicalized and encoded: {corpus['seconds']:.0f} s"
        )
    return "\n".join(lines) + "\n"


def plot_lengths(rows, path):
    """Draws tokens a second against the length of the molecules, a panel for each size."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure = Figure(figsize=(5.5 * len(sizes), 4), layout="constrained")
    for number, size in enumerate(sizes, start=1):
        axes, here = figure.add_subplot(1, len(sizes), number), [row for row in rows if row["size"] == size]
        for name in dict.fromkeys(row["case"].split(",")[0] for row in here):
            values = [row["tokens_per_second"] for row in here if row["case"].startswith(f"{name},")]
            axes.plot(LENGTHS, values, marker="o", markersize=4, label=name)
        axes.set(xscale="log", xlabel="tokens of a molecule", ylabel="tokens a second", ylim=(0, None))
        axes.set_xticks(LENGTHS, LENGTHS)
        axes.minorticks_off()
        axes.set_title(f"{size}: evaluation, fp32, 2,048 tokens a batch", fontsize=10)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="of run_peft.py")
    parser.add_argument("--corpus", action="store_true", help="also read a corpus of a million SMILES")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "bench.json")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run_one(args.sizes[0], args.one)
    report = {
        "load": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "device": str(DEVICE),
        "rounds": args.rounds,
    }
    lengths, report["rows"], report["lengths"] = real_lengths(), [], []
    for size in args.sizes:
        cases = cases_of(size, lengths, args.methods)
        memory = {name: peak_of(size, name) for name in cases if args.memory and not name.startswith("products")}
        report["rows"] += rows_of(size, cases, time_cases(cases, args.rounds), memory)
        cases = length_cases(size)
        report["lengths"] += rows_of(size, cases, time_cases(cases, args.rounds))
    report["ratios"], report["start_up"] = ratios(report["rows"]), start_up()
    if args.corpus:
        report["corpus"] = read_corpus()
    write_report(args.output, report, unit="seconds, bytes")
    args.output.with_suffix(".md").write_text(to_markdown(report))
    plot_lengths(report["lengths"], args.output.with_suffix(".png"))
    print(to_markdown(report))


if __name__ == "__main__":
    main()
