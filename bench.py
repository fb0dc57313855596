"""Times and memory of what the scripts do, side by side in one run, on the lengths of the real molecules.

    python bench.py --corpus               # everything; tables on the screen, results/bench.json, .md and .png
    # a quick look, to work/bench
    python bench.py --sizes mini --rounds 3 --no-memory --no-compile --no-processes

All cases of a size are built first and then timed in turn, round after round in a new order; a number is the median of
the rounds. A step is timed alone, its batches ready on the device (predictions are padded in it); learning rates are 0
and weights random. Beside our steps: the published way to run the model (molecules in random order, padded, float32,
one QR a layer at each forward, every state computed), BERT and ModernBERT of the same width and depth from
transformers (ModernBERT's feed-forward layer is gated: a sixth more arithmetic at XL size, three tenths more
in the small model), and the matrix products of the same real tokens alone, which nothing can beat. Peak memory is that
of a process of its own, with about half a gigabyte of libraries (the case "nothing"), that gives freed blocks back to
the system at once; --only_memory measures it anew and leaves the times of the report as they are.

What the README says of many GPUs is arithmetic, for pre-training MoLFormer-XL (45 million parameters) with DDP: each
GPU sends and receives 2 (N - 1) / N times the 180 MB of gradients a step, 315 MB at 8 GPUs and 354 MB at 64, while the
backward pass goes on. A step of 128 molecules a GPU (6,000 tokens, 1.6 TFLOP) takes 8 ms at an assumed 200 TFLOP/s.
Within a machine (several hundred GB/s) the exchange takes 1 ms and is hidden. Between machines with 50 GB/s a GPU it
takes 7 ms, and about two thirds of the step can hide it. FSDP moves half as much again (weights are gathered twice,
gradients scattered once).
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parent / "studies"))

from common import ROOT, as_text, machine, write_report  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from arguments import TrainingArguments, gains_by_bfloat16, has_bfloat16  # noqa: E402
from modeling_molformer_reg import (  # noqa: E402
    MolformerConfig,
    MolformerForMaskedLM,
    MolformerForRegression,
    draw_random_features,
)
from run_peft import METHODS, PeftArguments, adapt  # noqa: E402
from trainer_regression import LengthGroupedBatchSampler, peak_memory  # noqa: E402
from utils_checkpoints import build_tokenizer  # noqa: E402
from utils_influence import (  # noqa: E402
    ggn_vector_product,
    hessian_vector_product,
    scores_by_gradients,
    scores_by_jvp,
)
from utils_molecules import canonicalize, read_table  # noqa: E402
from utils_predict import Predictor  # noqa: E402


SIZES = {
    "mini": json.loads((ROOT / "models" / "molformer-mini" / "config.json").read_text()),
    "xl": {},  # the defaults of MolformerConfig
}
BATCHES = {"mini": 8, "xl": 4}  # that are timed together
LENGTHS = (32, 64, 128, 256, 512, 1024)
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------- batches


def real_lengths():
    """Returns the numbers of tokens of the embedded molecules."""
    smiles = read_table(ROOT / "data" / "lipophilicity.csv")["smiles"]
    ids = build_tokenizer()([canonicalize(text, "canonical") for text in smiles])["input_ids"]
    return [len(row) for row in ids]


def make_batch(lengths):
    """Returns a padded batch of random tokens with the given lengths, and labels."""
    ids = torch.full((len(lengths), max(lengths)), 2)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 2000, (length,))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.randn(len(lengths), 1)}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def choose_batches(lengths, count, size, kind):
    """Returns `count` lists of `size` lengths: batches of the data set that have its mean length and share of padding.

    Of a thousand random choices it is the one that comes nearest to the whole epoch.

    Args:
        kind (`str`): `"grouped"` as the trainer does, `"shuffled"` (random order), or `"sorted"` as predictions are.
    """
    if kind == "grouped":
        order = [lengths[row] for row in LengthGroupedBatchSampler(size, lengths, seed=0)]
    elif kind == "shuffled":
        order = random.Random(0).sample(lengths, len(lengths))
    else:
        order = sorted(lengths, reverse=True)
    epoch = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    share, mean = real_share(epoch), statistics.fmean(map(sum, epoch))

    def distance(batches):
        return abs(real_share(batches) - share) + abs(statistics.fmean(map(sum, batches)) / mean - 1)

    return min((random.Random(seed).sample(epoch, count) for seed in range(1000)), key=distance)


def real_share(batches):
    """Returns which share of the tokens of padded batches is no padding."""
    return sum(map(sum, batches)) / sum(max(rows) * len(rows) for rows in batches)


# --------------------------------------------------------------------------------------------------------------- cases


@cache
def build(model_class, size, **changes):
    """Returns a model with random weights; cases share it, since their learning rates are 0."""
    torch.manual_seed(0)
    config = MolformerConfig(**{**SIZES[size], **changes})
    return model_class(config).to(DEVICE)


def shape_of(size):
    """Returns width, depth and heads of our model as BERT and ModernBERT call them, and its configuration."""
    config = MolformerConfig(**SIZES[size])
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    shape = {name: getattr(config, name) for name in names}
    return {**shape, "num_labels": 1, "problem_type": "regression", "max_position_embeddings": 2048}, config


@cache
def bert(size):
    """BERT with the dropout of our layers and, as ours, none in the attention."""
    shape, ours = shape_of(size)
    dropout = {"hidden_dropout_prob": ours.hidden_dropout_prob, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**shape, **dropout, pad_token_id=2, attn_implementation="sdpa")
    return BertForSequenceClassification(config).to(DEVICE)


@cache
def modern_bert(size):
    """ModernBERT, likewise; its feed-forward layer is gated, so it has one product more."""
    shape, ours = shape_of(size)
    tokens = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1}
    dropout = {"mlp_dropout": ours.hidden_dropout_prob, "embedding_dropout": ours.embedding_dropout_prob}
    config = ModernBertConfig(**shape, **tokens, **dropout, attn_implementation="sdpa")
    return ModernBertForSequenceClassification(config).to(DEVICE)


PEERS = {"BERT (SDPA)": bert, "ModernBERT": modern_bert}


def redraw_as_published(model):
    """Draws the random features of every layer with a QR of its own, as the published code does at every forward."""
    for feature_map in model.molformer.feature_maps():
        size = feature_map.weight.shape
        feature_map.weight.copy_(draw_random_features(1, *size, device=feature_map.weight.device)[0])


def train_step(model, batches, bf16=False, before=None, **flags):
    """Returns a function that trains on all batches once, with a learning rate of 0; `flags` are the forward's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)

    def step():
        model.train()
        for batch in batches:
            if before is not None:
                before(model)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                loss = model(**batch, **flags).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def eval_step(model, batches, bf16=False, before=None, **flags):
    """Returns a function that evaluates all batches once; `flags` are the forward's."""

    @torch.inference_mode()
    def step():
        model.eval()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):  # one block, as in our trainer
            for batch in batches:
                if before is not None:
                    before(model)
                model(**{name: tensor for name, tensor in batch.items() if name != "labels"}, **flags)

    return step


def products(size, batches, bf16, training):
    """Returns a function that does the matrix products of the real tokens of all batches, and nothing else.

    Nothing is allocated, and products of one shape take the same inputs and weights in all layers and batches, which
    thus stay in the caches as far as they fit: it is a little faster than any model can be. The products of keys with
    values and of queries with these are done as one tall product in place of one for each molecule and head. Where the
    head reads the state of `<bos>` alone, the last layer takes no other queries.
    """
    config, dtype = MolformerConfig(**SIZES[size]), torch.bfloat16 if bf16 else torch.float32
    width, inner, features = config.hidden_size, config.intermediate_size, config.num_random_features
    heads = config.num_attention_heads
    layers, kept = [], {}

    def tensor(shape):
        kept.setdefault(shape, torch.randn(shape, device=DEVICE, dtype=dtype))
        return kept[shape]

    reads_all = config.pooling == "mean"
    for lengths, last in ((lengths, last) for last in (False, True) for lengths in batches):
        tokens = sum(lengths)
        asked = len(lengths) if last and not reads_all else tokens  # queries, and all that follows the attention
        linear = 2 * [(tokens, width, width)] + 2 * [(asked, width, width)]
        linear += [(asked, width, inner), (asked, inner, width)]
        attention = 2 * [(rows * heads, width // heads, features) for rows in (tokens, asked)]
        # the first two are the feature maps, whose weights are not trained
        for number, (rows, inputs, outputs) in enumerate([*attention, *linear]):
            shapes = {"x": (rows, inputs), "w": (inputs, outputs), "y": (rows, outputs)}
            tensors = {name: tensor(shape) for name, shape in shapes.items()}
            outs = {
                name: kept.setdefault(("out", *shape), torch.empty_like(tensors[name]))
                for name, shape in shapes.items()
            }
            times = 1 if last else config.num_hidden_layers - 1
            layers.append((times, tensors, outs, number >= 2))

    @torch.no_grad()
    def step():
        for times, tensors, outs, trained in layers:
            for _ in range(times):
                torch.mm(tensors["x"], tensors["w"], out=outs["y"])
                if training:
                    torch.mm(tensors["y"], tensors["w"].T, out=outs["x"])
                if training and trained:
                    torch.mm(tensors["x"].T, tensors["y"], out=outs["w"])

    return step


def masked_batch(batch):
    """Returns a batch for masked language modeling, 15 % of its tokens labeled."""
    chosen = (torch.rand(batch["input_ids"].shape, device=DEVICE) < 0.15) & batch["attention_mask"].bool()
    labels = torch.where(chosen, batch["input_ids"], -100)
    places = {"labels": labels, "masked_rows": chosen.flatten().nonzero()[:, 0]}  # as the collator gives them
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], **places}


def published_predict_step(model, batches):
    """Returns a function that predicts molecules whose tokens are there, in the published way."""
    tokenizer = build_tokenizer()
    encoded = [[{"input_ids": [3] * length} for length in rows] for rows in batches]

    @torch.inference_mode()
    def step():
        model.eval()
        for rows in encoded:
            redraw_as_published(model)
            batch = tokenizer.pad(rows, return_tensors="pt").to(DEVICE)
            model(**batch, output_hidden_states=True).logits.cpu()

    return step


def predict_step(model, batches, bf16):
    """Returns a function that predicts molecules whose tokens are there, as run_regression.py does in a file."""
    arguments = TrainingArguments(output_dir=tempfile.gettempdir(), bf16=bf16)
    arguments.per_device_eval_batch_size = len(batches[0])
    predictor = Predictor([model], build_tokenizer(), arguments)
    encoded = [{"input_ids": [3] * length} for rows in batches for length in rows]

    def step():
        model.eval()  # another case may have trained it since
        predictor.predict(encoded)

    return step


def influence_step(size, lengths, name):
    """Returns a function that computes what `name` says for one batch, all parameters, float32."""
    model = build(MolformerForRegression, size, redraw_features=False, pooling="mean").eval().requires_grad_(False)
    params = {key: tensor.detach() for key, tensor in model.named_parameters()}
    vector = torch.randn(sum(tensor.numel() for tensor in params.values()), device=DEVICE)

    def residuals_of(lengths):
        batch = make_batch(lengths)
        labels = batch.pop("labels")
        return lambda params: torch.func.functional_call(model, params, kwargs=batch).logits - labels

    whole, singles = residuals_of(lengths), [residuals_of([length]) for length in lengths]
    steps = {
        "influence scores, jvp": lambda: scores_by_jvp(whole, params, vector),
        "influence scores, gradient of each": lambda: [scores_by_gradients(one, params, vector) for one in singles],
        "GGN product of a batch": lambda: ggn_vector_product(whole, params, vector),
        "Hessian product of a batch": lambda: hessian_vector_product(whole, params, vector),
        "double backward of each": lambda: [hessian_vector_product(one, params, vector) for one in singles],
    }

    def step():
        model.eval()
        steps[name]()

    return step


INFLUENCE = ("influence scores, jvp", "influence scores, gradient of each", "GGN product of a batch",
             "Hessian product of a batch", "double backward of each")  # fmt: skip


def peft_model(size, method):
    model = build.__wrapped__(MolformerForRegression, size, redraw_features=False)  # one of its own: it is changed
    return adapt(model, PeftArguments(peft_method=method)).to(DEVICE)


@dataclass
class Case:
    """Something that is timed.

    Args:
        build (`Callable`): makes the function that is timed.
        batches (`list[list[int]]`): lengths of the molecules that one call of it takes.
        bound (`str`, *optional*): name of the case that no implementation can beat.
    """

    build: Callable
    batches: list
    bound: str | None = None

    @property
    def molecules(self):
        return sum(map(len, self.batches))

    @property
    def tokens(self):
        return sum(map(sum, self.batches))


def cases_of(size, lengths, methods, batch_size, predict_batch_size=64):
    """Returns every `Case` by its name; those in bfloat16 where the hardware has it."""
    count = BATCHES[size]
    grouped, shuffled = (choose_batches(lengths, count, batch_size, kind) for kind in ("grouped", "shuffled"))
    predicted = choose_batches(lengths, count // 2, predict_batch_size, "sorted")
    regression = partial(build, MolformerForRegression, size)
    cases = {"nothing": Case(lambda: lambda: None, [])}

    def add(name, step, model, batches=grouped, bound=None, prepare=lambda batch: batch, **options):
        def make():
            return step(model(), [prepare(make_batch(lengths)) for lengths in batches], **options)

        cases[name] = Case(make, batches, bound)

    for kind, bf16 in (("fp32", False), ("bf16", True))[: 2 if has_bfloat16(DEVICE.type == "cpu") else 1]:
        for what, step in (("training", train_step), ("evaluation", eval_step)):
            bound = f"products alone, {what}, {kind}"
            cases[bound] = Case(partial(products, size, grouped, bf16, what == "training"), grouped)
            add(f"{what}, {kind}", step, regression, bound=bound, bf16=bf16)
            for name, peer in PEERS.items():
                add(f"{what}, {kind}, {name}", step, partial(peer, size), bf16=bf16)
        add(f"masked language modeling, {kind}", train_step, partial(build, MolformerForMaskedLM, size),
            prepare=masked_batch, bf16=bf16)  # fmt: skip
        bound = f"products alone, prediction, {kind}"
        cases[bound] = Case(partial(products, size, predicted, bf16, False), predicted)
        make = partial(lambda bf16: predict_step(regression(), predicted, bf16), bf16)
        cases[f"prediction, {kind}"] = Case(make, predicted, bound)
    frozen = partial(regression, redraw_features=False)
    for what, step in (("training", train_step), ("evaluation", eval_step)):
        bound = f"products alone, {what}, fp32"  # of real tokens, of which both have as many a second
        add(f"{what}, the published way", step, frozen, batches=shuffled, bound=bound, before=redraw_as_published,
            output_hidden_states=True)  # fmt: skip
    mixed = choose_batches(lengths, count // 2, predict_batch_size, "shuffled")
    cases["prediction, the published way"] = Case(
        lambda: published_predict_step(frozen(), mixed), mixed, "products alone, prediction, fp32"
    )
    for method in methods:
        add(f"{method}, training, fp32", train_step, partial(peft_model, size, method))
    middle = grouped[len(grouped) // 2]
    for name in INFLUENCE:
        cases[name] = Case(partial(influence_step, size, middle, name), [middle])
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


def device_name():
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else str(DEVICE)


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
    """Returns a row for each case: median seconds, molecules and real tokens a second, share of its bound."""
    speed = {name: case.tokens / statistics.median(seconds[name]) for name, case in cases.items()}
    rows = []
    for name, case in cases.items():
        row = {"size": size, "case": name, "seconds": statistics.median(seconds[name]), "all_seconds": seconds[name]}
        row |= {"tokens_per_second": speed[name], "molecules_per_second": case.molecules / row["seconds"]}
        if case.batches:
            row["share_of_real_tokens"] = real_share(case.batches)
        if case.bound is not None:
            row["share_of_bound"] = speed[name] / speed[case.bound]
        if memory and name in memory:
            row["peak_memory_bytes"] = memory[name]
        rows.append(row)
    return rows


def ratios(rows):
    """Returns how many times faster a case is than what it is measured by, and how its memory compares.

    The memory is that beyond what the libraries take.
    """
    found = {(row["size"], row["case"]): row for row in rows}
    pairs = []
    for step in ("training", "evaluation"):
        for kind in ("fp32", "bf16"):
            pairs.append((f"{step}, {kind}", f"{step}, the published way"))
            pairs += [(f"{step}, {kind}", f"{step}, {kind}, {peer}") for peer in PEERS]
    pairs += [(f"prediction, {kind}", "prediction, the published way") for kind in ("fp32", "bf16")]
    pairs.append(("influence scores, jvp", "influence scores, gradient of each"))
    pairs += [(f"{kind} product of a batch", "double backward of each") for kind in ("GGN", "Hessian")]
    pairs.append(("GGN product of a batch", "Hessian product of a batch"))
    pairs += [(f"{method}, training, fp32", "full, training, fp32") for method in METHODS if method != "full"]
    rows = []
    for size in dict.fromkeys(size for size, _ in found):
        for first, second in pairs:
            if (size, first) in found and (size, second) in found:
                one, other = found[size, first], found[size, second]
                row = {"size": size, "case": first, "against": second}
                row["ratio"] = one["tokens_per_second"] / other["tokens_per_second"]
                if "peak_memory_bytes" in one and "peak_memory_bytes" in other:
                    # a GPU holds none of them
                    libraries = found[size, "nothing"]["peak_memory_bytes"] if DEVICE.type == "cpu" else 0
                    ours, theirs = (case["peak_memory_bytes"] - libraries for case in (one, other))
                    row["memory"] = ours / theirs if theirs > 0 else None
                rows.append(row)
    return rows


def child(command, **environment):
    """Returns what a command prints; what it says of an error is not lost."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def peak_of(size, name, args, lengths_file):
    """Returns the peak memory of a case in a process of its own, in bytes."""
    command = [__file__, "--sizes", size, "--batch_size", args.batch_size]
    command += ["--predict_batch_size", args.predict_batch_size, "--one", name, "--lengths_file", lengths_file]
    # or the C library keeps freed blocks for itself, up to half of a large model's peak, which no step needs
    return int(child(command, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536").split()[-1])


def measure_memory_again(output, args):
    """Measures the peak memory of the cases of a report anew, and leaves what they took in time as it is."""
    report = json.loads(output.read_text())
    args.batch_size, args.predict_batch_size = report["batch_size"], report["predict_batch_size"]
    for row in report["rows"]:
        if "peak_memory_bytes" in row:
            row["peak_memory_bytes"] = peak_of(row["size"], row["case"], args, args.lengths_file)
            print(row["size"], row["case"], f"{row['peak_memory_bytes'] / 1e9:.2f} GB", flush=True)
    report["ratios"] = ratios(report["rows"])
    report["memory"] = {"command": as_text(sys.argv), "machine": machine()}
    write_report(output, report, unit="seconds, bytes")
    output.with_suffix(".md").write_text(to_markdown(report))


def run_one(size, name, args):
    """Runs one case alone, twice, and prints the peak memory of this process."""
    lengths = json.loads(Path(args.lengths_file).read_text())
    step = cases_of(size, lengths, METHODS, args.batch_size, args.predict_batch_size)[name].build()
    for _ in range(2):
        step()
    print(peak_memory())


def start_up(rounds=5):
    """Returns median seconds of `--help` of each script, and of importing what the arguments come from."""
    scripts = ("run_regression.py", "run_mlm.py", "run_influence.py", "run_peft.py")
    commands = {f"{script} --help": [str(ROOT / script), "--help"] for script in scripts}
    commands["import of TrainingArguments"] = ["-c", "from transformers import HfArgumentParser, TrainingArguments"]
    seconds = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compilation(size, lengths, batch_size, rounds):
    """Returns what `--torch_compile` takes and gives: seconds until all is compiled, and those of a training step.

    As the scripts train: in bfloat16 where the hardware gains by it, batches of several lengths, then an evaluation.
    """
    batches = [make_batch(rows) for rows in choose_batches(lengths, BATCHES[size], batch_size, "grouped")]
    model, bf16 = build.__wrapped__(MolformerForRegression, size), gains_by_bfloat16(DEVICE.type == "cpu")
    models = {"plain": model, "compiled": torch.compile(model)}
    steps = {name: train_step(model, batches, bf16) for name, model in models.items()}
    evaluations = {name: eval_step(model, batches, bf16) for name, model in models.items()}
    first, seconds = {}, {name: [] for name in steps}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # what was compiled on this machine before is left aside
        for number in range(rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if not number:
                    evaluations[name]()
                synchronize()
                taken = time.perf_counter() - start
                if number:
                    seconds[name].append(taken / len(batches))
                else:
                    first[name] = taken
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    values = {f"{name}_step_seconds": statistics.median(found) for name, found in seconds.items()}
    values["compile_seconds"] = first["compiled"] - first["plain"]
    gain = values["plain_step_seconds"] - values["compiled_step_seconds"]
    return values | {"pays_after_steps": values["compile_seconds"] / gain if gain > 0 else None}


def processes(rounds=5):
    """Returns molecules a second of run_regression.py in one process and in several, medians of interleaved runs.

    On CPUs one process of one core, one of two, and two of one each; with several GPUs one, and one on each. The batch
    of a step is the same. 60 steps, the first ones among them.
    """
    count = torch.accelerator.device_count() if DEVICE.type != "cpu" else 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    forms = {"1 process, 1 thread": ([], 1, 16, ["--use_cpu"]), "1 process, 2 threads": ([], 2, 16, ["--use_cpu"]),
             "2 processes, 1 thread each": ([*launcher, 2], 1, 8, ["--use_cpu"])}  # fmt: skip
    if count > 1:
        forms = {"1 GPU": ([*launcher, 1], 4, 16 * count, []), f"{count} GPUs": ([*launcher, count], 4, 16, [])}
    speeds = {name: [] for name in forms}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name, (launch, threads, batch, more) in forms.items():
                out = Path(folder) / f"{name}-{number}"
                flags = ["--do_train", "--max_steps", "60", "--eval_strategy", "no", "--save_strategy", "no", *more]
                flags += ["--load_best_model_at_end", "false", "--per_device_train_batch_size", batch]
                command = [*launch, ROOT / "run_regression.py", *flags, "--output_dir", out]
                child(command, OMP_NUM_THREADS=str(threads))
                found = json.loads((out / "train_results.json").read_text())
                speeds[name].append(found["train_samples_per_second"])
    return {name: statistics.median(values) for name, values in speeds.items()}


def predicted_files(counts=(4_200, 50_000), rounds=3):
    """Returns rows a second of run_regression.py --do_predict on files of so many rows, from file to file."""
    smiles = read_table(ROOT / "data" / "lipophilicity.csv")["smiles"].tolist()
    speeds = {}
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "molecules.csv", Path(folder)
        scale = {"label_mean": [2.0], "label_std": [1.0], "smiles_form": "canonical"}
        model = build.__wrapped__(MolformerForRegression, "mini", **scale)
        model.save_pretrained(out / "model")
        build_tokenizer().save_pretrained(out / "model")
        for count in counts:
            path.write_text("\n".join(["SMILES", *(smiles[row % len(smiles)] for row in range(count))]) + "\n")
            values = []
            for _ in range(rounds):
                flags = ["--model_name_or_path", out / "model", "--test_file", path, "--output_dir", out / "predicted"]
                child([ROOT / "run_regression.py", "--do_predict", *flags, "--overwrite_output_dir"])
                found = json.loads((out / "predicted" / "all_results.json").read_text())
                values.append(found["predict_samples_per_second"])
            speeds[f"{count:,} rows"] = statistics.median(values)
    return speeds


def read_corpus(count):
    """Returns seconds and peak memory of canonicalizing and encoding a corpus of `count` SMILES in processes.

    The memory is that of the largest process.
    """
    smiles = read_table(ROOT / "data" / "lipophilicity.csv")["smiles"].tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.txt"
        path.write_text("\n".join(smiles[i % len(smiles)] for i in range(count)) + "\n")
        code = (
            "import time\n"
            "from utils_mlm import *; from arguments import DataTrainingArguments; from run_mlm import MlmArguments\n"
            "from trainer_regression import peak_memory; from utils_checkpoints import build_tokenizer\n"
            f"data = DataTrainingArguments(train_file={str(path)!r}, smiles_form='canonical')\n"
            f"start = time.time(); corpus = read_corpus(data.train_file, cache_dir={folder!r})\n"
            "encode_corpus(corpus, build_tokenizer(), data, MlmArguments(), data.train_file)\n"
            "print(time.time() - start, max(peak_memory(), peak_memory(of_children=True)))"
        )
        seconds, peak = child(["-c", code], HF_HOME=folder, HF_HUB_OFFLINE="1").split()[-2:]
    return {"molecules": count, "seconds": float(seconds), "peak_memory_bytes": int(peak)}


# ------------------------------------------------------------------------------------------------------------- reports


def to_markdown(report):
    """Returns the tables of the README, sizes side by side."""
    sizes = list(dict.fromkeys(row["size"] for row in report["rows"]))
    found = {(row["size"], row["case"]): row for row in report["rows"]}
    parts = [speed_table(found, sizes), peft_table(report, found, sizes), length_table(report, sizes), facts(report)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def markdown_table(header, rows):
    """Returns the lines of a table, all of its columns but the first one aligned to the right."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]


def speed_table(found, sizes):
    """Returns the lines of the table of all steps."""
    header, rows = ["step"], []
    for size in sizes:
        header += [f"{size}: molecules/s", "of the products", "times the published way", "memory"]
    methods = {f"{method}, training, fp32" for method in METHODS}
    names = dict.fromkeys(case for _, case in found if case != "nothing" and not case.startswith("products"))
    for name in (name for name in names if name not in methods):
        cells = [name]
        for size in sizes:
            row = found[size, name]
            share = f"{100 * row['share_of_bound']:.0f} %" if "share_of_bound" in row else ""
            published, times = found.get((size, f"{name.split(',')[0]}, the published way")), ""
            if published is not None and row is not published:
                times = f"{row['tokens_per_second'] / published['tokens_per_second']:.2f}"
            cells += [f"{row['molecules_per_second']:,.1f}", share, times, memory_of(row)]
        rows.append(cells)
    return markdown_table(header, rows)


def memory_of(row):
    return f"{row['peak_memory_bytes'] / 1e9:.2f} GB" if "peak_memory_bytes" in row else ""


def peft_table(report, found, sizes):
    """Returns the lines of the table of a training step of each method of run_peft.py, beside full fine-tuning."""
    header, rows = ["method"], []
    for size in sizes:
        header += [f"{size}: step", "times as fast as full", "memory", "of full's, libraries apart"]
    against = {(ratio["size"], ratio["case"]): ratio for ratio in report["ratios"]}
    for method in METHODS:
        name, cells = f"{method}, training, fp32", [method]
        if any((size, name) not in found for size in sizes):
            continue
        for size in sizes:
            row, ratio = found[size, name], against.get((size, name), {})
            cells += [f"{1e3 * row['seconds'] / BATCHES[size]:,.0f} ms", _number(ratio.get("ratio")), memory_of(row)]
            cells += [_number(ratio.get("memory"))]
        rows.append(cells)
    return markdown_table(header, rows) if rows else []


def _number(value):
    return "" if value is None else f"{value:.2f}"


def length_table(report, sizes):
    """Returns the lines of the table of tokens a second by length."""
    header = ["tokens/s, evaluation in fp32, of molecules of", *(f"{length} tokens" for length in LENGTHS)]
    rows = []
    for size in sizes:
        speeds = {row["case"]: row["tokens_per_second"] for row in report["lengths"] if row["size"] == size}
        for name in dict.fromkeys(case.rsplit(", ", 1)[0] for case in speeds):
            numbers = (f"{speeds[f'{name}, {length} tokens']:,.0f}" for length in LENGTHS)
            rows.append([f"{name}, {size}", *numbers])
    return markdown_table(header, rows)


def facts(report):
    """Returns a line for each number that stands in no table."""
    lines = []
    for size, found in report["compilation"].items():
        steps = f"{found['pays_after_steps']:,.0f} steps" if found["pays_after_steps"] else "no number of steps"
        times = f"{found['compiled_step_seconds']:.3f} s in place of {found['plain_step_seconds']:.3f} s"
        lines.append(f"- torch.compile, {size}: {found['compile_seconds']:.0f} s once, a script's "
                     f"training step {times}; pays after {steps}")  # fmt: skip
    for ratio in report["ratios"]:
        if ratio["case"] in INFLUENCE:
            lines.append(f"- {ratio['case']}, {ratio['size']}: {ratio['ratio']:.1f} times as fast as "
                         f"{ratio['against']}")  # fmt: skip
    for name, speed in report.get("processes", {}).items():
        lines.append(f"- run_regression.py, {name}: {speed:.0f} molecules/s")
    lines += [f"- {name}: {seconds:.2f} s" for name, seconds in report.get("start_up", {}).items()]
    for name, speed in report.get("predicted_files", {}).items():
        lines.append(f"- run_regression.py --do_predict, a file of {name}: {speed:,.0f} rows/s, start-up left out")
    for corpus in report.get("corpus", []):
        seconds = f"{corpus['seconds']:.0f} s"
        memory = f"{corpus['peak_memory_bytes'] / 1e9:.2f} GB in the largest process"
        lines.append(f"- corpus of {corpus['molecules']:,} SMILES, canonicalized and encoded: {seconds}, {memory}")
    return lines


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


def is_whole(args, parser):
    """Returns whether the arguments ask for all that results/bench.json is to hold."""
    chosen = ("sizes", "methods", "batch_size", "predict_batch_size", "memory", "compile", "processes")
    return args.rounds >= 5 and args.corpus and all(getattr(args, name) == parser.get_default(name) for name in chosen)


def make_parser():
    """Returns the parser of the command line, apart from `main` so that its defaults can be asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16, help="molecules of a training or evaluation batch")
    parser.add_argument("--predict_batch_size", type=int, default=64, help="molecules of a prediction batch")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="of run_peft.py")
    parser.add_argument("--corpus", action="store_true", help="also read a corpus of a million SMILES")
    parser.add_argument("--output", type=Path, help="default: results/bench.json, of a part work/bench/bench.json")
    for name, what in (("memory", "measure peak memory"), ("compile", "measure torch.compile"),
                       ("processes", "measure start-up, several processes and the prediction of files")):  # fmt: skip
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=f"{what} too")
    parser.add_argument("--only_memory", action="store_true", help="measure the memory of a report's cases anew")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--lengths_file", help=argparse.SUPPRESS)
    return parser


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.one:
        return run_one(args.sizes[0], args.one, args)
    whole = args.only_memory or is_whole(args, parser)
    output = args.output or ROOT / ("results" if whole else "work/bench") / "bench.json"
    if args.only_memory and (not output.exists() or args.sizes != list(SIZES)):
        parser.error(f"--only_memory measures all sizes of a report anew, which is to be in {output}.")
    lengths, started = real_lengths(), time.monotonic()
    report = {"load_before": os.getloadavg(), "threads": torch.get_num_threads(), "device": device_name()}
    report |= {"rounds": args.rounds, "batch_size": args.batch_size, "predict_batch_size": args.predict_batch_size}
    report |= {"rows": [], "ratios": [], "lengths": [], "compilation": {}}
    if report["load_before"][0] > 0.5:
        print(f"The load is {report['load_before'][0]:.1f}: other work on this machine will be measured too.")

    def save():  # after every part: an hour's work is not lost with the next one
        report["bench_seconds"] = time.monotonic() - started
        write_report(output, report, unit="seconds, bytes")
        output.with_suffix(".md").write_text(to_markdown(report))
        plot_lengths(report["lengths"], output.with_suffix(".png"))

    with tempfile.TemporaryDirectory() as folder:
        args.lengths_file = Path(folder) / "lengths.json"
        args.lengths_file.write_text(json.dumps(lengths))
        if args.only_memory:
            return measure_memory_again(output, args)
        for size in args.sizes:
            cases = cases_of(size, lengths, args.methods, args.batch_size, args.predict_batch_size)
            measured = [name for name in cases if args.memory and not name.startswith("products")]
            memory = {name: peak_of(size, name, args, args.lengths_file) for name in measured}
            report["rows"] += rows_of(size, cases, time_cases(cases, args.rounds), memory)
            report["ratios"] = ratios(report["rows"])
            cases = length_cases(size)
            report["lengths"] += rows_of(size, cases, time_cases(cases, args.rounds))
            if args.compile:
                report["compilation"][size] = compilation(size, lengths, args.batch_size, args.rounds)
            save()
    if args.processes:
        report["start_up"] = start_up()
        save()
        report["processes"] = processes()
        save()
        report["predicted_files"] = predicted_files()
        save()
    if args.corpus:
        report["corpus"] = [read_corpus(count) for count in (100_000, 1_000_000)]
    report["load_after"] = os.getloadavg()
    save()
    print(to_markdown(report))


if __name__ == "__main__":
    main()
