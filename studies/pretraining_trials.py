"""Which pre-training teaches a small MoLFormer most: short runs of equal budget, judged by fine-tuning.

    python studies/pretraining_trials.py --mixed mixed.txt --chembl chembl.txt --validation_file held_out.txt

Every trial pre-trains a model from random weights with run_mlm.py on as many molecules as all others, and fine-tunes
it with run_regression.py (7 epochs, seed 0, 30 % of the training side held out, the test set not read). `--mixed` is a
corpus with all sources in random order, `--chembl` one without those of MOSES. Writes results/pretraining_trials.json:
flags, seconds, held-out metrics of the pre-training, validation MSE of the fine-tuning. Finished trials are not run
again.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import ROOT, machine


# name: corpus, batch, flags of run_mlm.py
ALL = ["--objective", "mlm+mtr+atoms", "--masked_share", "0.125"]
TRIALS = {
    "reference": ("chembl", 64, ALL),
    # each differs from the reference in one thing
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
    # objectives
    "mlm": ("chembl", 64, []),
    "mtr": ("chembl", 64, ["--objective", "mtr"]),
    "mlm+mtr": ("chembl", 64, ["--objective", "mlm+mtr"]),
    "mlm+mtr, with MOSES": ("mixed", 64, ["--objective", "mlm+mtr"]),
    "mlm+mtr+atoms": ("chembl", 64, ["--objective", "mlm+mtr+atoms"]),
    "mtr+atoms": ("chembl", 64, ["--objective", "mtr+atoms"]),
    "atoms": ("chembl", 64, ["--objective", "atoms"]),
}
# hidden size, layers, heads, intermediate size: about the time of the embedded checkpoint's 256, 6, 8, 768
SHAPES = {"deeper, narrower": (192, 10, 6, 576), "shallower, wider": (320, 4, 10, 960)}
SHAPE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def run(name, args, threads):
    """Runs one trial, unless it is finished, and returns its row."""
    corpus, batch, flags = TRIALS[name]
    folder = args.folder / f"{name}-{args.molecules}".replace(" ", "-").replace(",", "").replace("+", "-")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    shape = dict(zip(SHAPE_FIELDS, SHAPES.get(name, ()), strict=False))
    config.write_text(json.dumps(json.loads((ROOT / "configs" / "molformer-mini.json").read_text()) | shape))
    pretrain = ["run_mlm.py", "--train_file", str(Path(getattr(args, corpus)).resolve())]
    pretrain += ["--validation_file", str(Path(args.validation_file).resolve())]
    pretrain += ["--config_name", str(config), "--smiles_form", "raw", "--learning_rate", "1.2e-3", "--bf16", *flags]
    pretrain += ["--max_steps", str(args.molecules // batch), "--per_device_train_batch_size", str(batch)]
    pretrain += ["--lr_scheduler_type", "cosine", "--weight_decay", "0.01", "--eval_strategy", "no"]
    pretrain += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--output_dir", str(folder / "model")]
    tune = ["run_regression.py", "--model_name_or_path", str(folder / "model"), "--pooling", args.pooling]
    tune += ["--seed", "0", "--validation_fraction", "0.3", "--do_train", "--do_eval"]
    tune += ["--output_dir", str(folder / f"regression-{args.pooling}")]
    for command in (pretrain, tune):
        if not (Path(command[-1]) / "eval_results.json").exists():
            subprocess.run(
                [sys.executable, *command, "--overwrite_output_dir", "--disable_tqdm", "true"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=subprocess.DEVNULL,
                stderr=(folder / "log.txt").open("a"),
                check=True,
            )
    first, second = (json.loads((Path(command[-1]) / "all_results.json").read_text()) for command in (pretrain, tune))
    row = {"name": name, "corpus": corpus, "flags": shlex.join(flags), **shape}
    row |= {"molecules": args.molecules, "seconds": first["train_runtime"]}
    row |= {key: first.get(f"eval_{key}") for key in ("masked_accuracy", "descriptor_r2")}
    row["validation_mse"] = second["eval_mse"]
    print(json.dumps(row), flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixed", required=True, help="corpus with all sources in random order")
    parser.add_argument("--chembl", required=True, help="corpus without the molecules of MOSES")
    parser.add_argument("--validation_file", required=True, help="held-out molecules for the pre-training")
    parser.add_argument("--molecules", type=int, default=64_000, help="molecules that each trial sees")
    parser.add_argument("--pooling", default="mean", choices=["cls", "mean"], help="what the regression head reads")
    parser.add_argument("--trials", nargs="+", default=list(TRIALS), help="names of the trials")
    parser.add_argument("--folder", type=Path, default=ROOT / "work" / "trials", help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "pretraining_trials.json")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; they share the cores")
    args = parser.parse_args()
    threads = max(1, os.cpu_count() // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda name: run(name, args, threads), args.trials))
    report = {"command": "python " + shlex.join(sys.argv), "machine": machine() | {"threads_a_run": threads}}
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(report | {"unit": "logD7.4", "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
