"""Which pre-training teaches a small MoLFormer most: short runs of equal budget, judged by fine-tuning.

    python studies/pretraining_trials.py --mixed mixed.txt --chembl chembl.txt --validation_file held_out.txt

Every trial pre-trains a model from random weights with run_mlm.py on as many molecules as all others (but for those
that ask what the length does; their seconds differ, and are in the report), and fine-tunes it with run_regression.py
for every seed: 7 epochs at 3e-4, with 30 % of the training side held out, which judges the model of the last epoch.
The test set is not read. `--mixed` is a corpus with all sources in random order, `--chembl` one without those of
MOSES; descriptors of all their lines are computed first, so give little more than the longest trial reads. Writes
results/pretraining_trials.json (.md): flags, seconds, held-out metrics of the pre-training, validation MSE of the
fine-tunings, and the paired difference to the reference with its 95 % interval over fine-tunings (every trial
pre-trains once: what another pre-training seed would give is not in it). Finished runs are not repeated.
"""

import json
import re
import shlex
import statistics
import sys
from operator import itemgetter
from pathlib import Path

from common import FAILED, ROOT, interval, place_of, run_all, run_script, study_parser, with_interval, write_report
from recipes import cells_of


HELD_OUT = 0.3  # of the training side, in fine-tuning
RATE = "3e-4"  # of it: the default is for a better start; at that rate some of these stay at the labels' mean
ALL = ["--objective", "mlm+mtr+atoms", "--masked_share", "0.125"]
ALL_MASKED = ["--objective", "mlm+mtr+atoms"]
# name: corpus, batch, flags of run_mlm.py
TRIALS = {
    "reference": ("chembl", 64, ALL),
    # each differs from the reference in one thing; features and dropout are also those of its fine-tunings
    "random SMILES": ("chembl", 64, [*ALL, "--augment_smiles", "1"]),
    "with MOSES": ("mixed", 64, ALL),
    "redrawn features": ("chembl", 64, [*ALL, "--redraw_features", "true"]),
    "dropout 0.1": ("chembl", 64, [*ALL, "--hidden_dropout_prob", "0.1"]),
    "rate 6e-4": ("chembl", 64, [*ALL, "--learning_rate", "6e-4"]),
    "rate 2.4e-3": ("chembl", 64, [*ALL, "--learning_rate", "2.4e-3"]),
    "batch 32": ("chembl", 32, ALL),
    "batch 128": ("chembl", 128, ALL),
    "deeper, narrower": ("chembl", 64, ALL),
    "shallower, wider": ("chembl", 64, ALL),
    "half as long": ("chembl", 64, ALL),
    "twice as long": ("chembl", 64, ALL),
    # objectives
    "mlm": ("chembl", 64, []),
    "mtr": ("chembl", 64, ["--objective", "mtr"]),
    "mlm+mtr": ("chembl", 64, ["--objective", "mlm+mtr"]),
    "mlm+mtr, with MOSES": ("mixed", 64, ["--objective", "mlm+mtr"]),
    "mlm+mtr+atoms": ("chembl", 64, ALL_MASKED),
    "mtr+atoms": ("chembl", 64, ["--objective", "mtr+atoms"]),
    "atoms": ("chembl", 64, ["--objective", "atoms"]),
    "mlm+mtr+atoms, wider": ("chembl", 64, ALL_MASKED),
}
# hidden size, layers, heads, intermediate size; the first is that of all trials but those named, in about equal time
REFERENCE_SHAPE = (256, 6, 8, 768)
SHAPES = {"deeper, narrower": (192, 10, 6, 576), "shallower, wider": (320, 4, 10, 960)}
SHAPES["mlm+mtr+atoms, wider"] = SHAPES["shallower, wider"]
LENGTHS = {"half as long": 0.5, "twice as long": 2.0}  # times the molecules of the others
SHAPE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def commands(name, args):
    """Returns the folder of a trial, its pre-training and, by seed, its fine-tunings as `run_script` takes them."""
    corpus, batch, flags = TRIALS[name]
    folder = args.folder / re.sub(r"[^\w.-]+", "-", f"{name}-{args.molecules}")
    molecules = round(args.molecules * LENGTHS.get(name, 1))
    pretrain = ["run_mlm.py", "--train_file", str(Path(getattr(args, corpus)).resolve())]
    pretrain += ["--validation_file", str(Path(args.validation_file).resolve()), "--config_name"]
    pretrain += [str(folder / "config.json"), "--smiles_form", "raw", "--learning_rate", "1.2e-3", "--bf16", *flags]
    pretrain += ["--max_steps", str(molecules // batch), "--per_device_train_batch_size", str(batch)]
    pretrain += ["--lr_scheduler_type", "cosine", "--weight_decay", "0.01", "--eval_strategy", "no"]
    pretrain += ["--save_strategy", "no", "--load_best_model_at_end", "false"]
    tune = ["run_regression.py", "--model_name_or_path", str(folder / "model"), "--pooling", "mean"]
    # the corpora are canonical; without the flag the molecules would be read as given, as these were
    tune += ["--smiles_form", "canonical"]
    # the last epoch counts: the best one would be chosen by the molecules that are to judge
    tune += ["--do_train", "--do_eval", "--validation_fraction", str(HELD_OUT), "--load_best_model_at_end", "false"]
    tune += ["--learning_rate", RATE, "--seed"]
    return folder, pretrain, {seed: [*tune, str(seed)] for seed in args.seeds}


def run(name, args, threads):
    """Runs one trial, unless it is finished, and returns its row."""
    corpus, batch, flags = TRIALS[name]
    folder, pretrain, tunings = commands(name, args)
    shape = dict(zip(SHAPE_FIELDS, SHAPES.get(name, REFERENCE_SHAPE), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((ROOT / "configs" / "molformer-mini.json").read_text()) | shape
    (folder / "config.json").write_text(json.dumps(config))
    learned = run_script(pretrain, folder / "model", threads)
    errors = {
        seed: run_script(tune, folder / f"regression-{seed}", threads)["eval_mse"] for seed, tune in tunings.items()
    }
    row = {"name": name, "corpus": corpus, "batch": batch, "flags": shlex.join(flags), **shape}
    row |= {"molecules": round(args.molecules * LENGTHS.get(name, 1)), "seconds": learned["train_runtime"]}
    row |= {key: learned.get(f"eval_{key}") for key in ("masked_accuracy", "descriptor_r2")}
    row |= {"validation_mse": errors}
    print(json.dumps(row), flush=True)
    return row


def minus(rows, other):
    """Returns for each trial but the `other` the mean difference to it of the same seeds, and its half width."""
    errors = {row["name"]: row["validation_mse"] for row in rows}
    compared, found = errors.pop(other, {}), {}
    for name, by_seed in errors.items():
        if pairs := [error - compared[seed] for seed, error in by_seed.items() if seed in compared]:
            found[name] = interval(pairs, HELD_OUT)
    return found


def to_markdown(rows):
    """Returns the table of the README: one line a trial, that of the lowest error first."""
    lines = ["| trial | minutes | validation MSE | minus reference |", "| --- | ---: | ---: | ---: |"]
    pairs = minus(rows, "reference")
    for mean, row in sorted(
        ((statistics.mean(row["validation_mse"].values()), row) for row in rows), key=itemgetter(0)
    ):
        paired = with_interval(pairs[row["name"]], signed=True) if row["name"] in pairs else ""
        lines.append(f"| {row['name']} | {row['seconds'] / 60:.1f} | {mean:.3f} | {paired} |")
    return "\n".join(lines) + "\n"


def main():
    parser = study_parser(__doc__, "trials", "pretraining_trials.json")
    parser.add_argument("--mixed", required=True, help="corpus with all sources in random order")
    parser.add_argument("--chembl", required=True, help="corpus without the molecules of MOSES")
    parser.add_argument("--validation_file", required=True, help="held-out molecules for the pre-training")
    parser.add_argument("--molecules", type=int, default=64_000, help="molecules that each trial sees")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the fine-tunings")
    parser.add_argument(
        "--trials", nargs="+", default=list(TRIALS), choices=list(TRIALS), metavar="TRIAL", help="names of the trials"
    )
    args = parser.parse_args()
    rows = run_all(lambda name, threads: run(name, args, threads), args.trials, args.jobs)
    if not rows:
        raise SystemExit("No trial finished. The logs stand beside the folders.")
    output = place_of(args.output, {"rows": rows}, cells_of, args.folder)
    # the second masks every molecule, as `mlm` and `mlm+mtr` do (those without `mlm` mask none)
    differences = {f"minus_{name}": minus(rows, name) for name in ("reference", "mlm+mtr+atoms")}
    write_report(output, {"rows": rows, **differences}, args.jobs)
    output.with_suffix(".md").write_text(to_markdown(rows))
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
    sys.exit(bool(FAILED))
