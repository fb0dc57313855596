"""What pre-training is worth: the embedded checkpoint against the same model from scratch and two baselines.

    python studies/foundation.py     # 3 seeds, split and seed vary together; about 20 minutes on two cores

Runs run_regression.py with its defaults (random split) for each seed, once from models/molformer-mini and once from
random weights, and writes results/foundation.json: test MSE, MAE and R² in logD units of every run, of ridge
regression on Morgan fingerprints and of the mean predictor on the same splits, mean and standard deviation over
seeds, the commands, versions and hardware. Runs that are finished are not run again.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "embedded": [],
    "from_scratch": ["--config_name", "configs/molformer-mini.json", "--learning_rate", "1e-3"],
}
BASELINES = {"fingerprint_ridge": "_fingerprint_ridge", "mean_predictor": "_mean"}
METRICS = ("mse", "mae", "r2")


def run(name, seed, folder):
    """Runs one cell, unless it is finished, and returns its results and its command."""
    output_dir = folder / f"{name}-{seed}"
    flags = [*MODELS[name], "--seed", str(seed), "--output_dir", os.path.relpath(output_dir, ROOT)]
    command = ["run_regression.py", *flags]
    if not (output_dir / "predict_results.json").exists():
        arguments = [*command, "--overwrite_output_dir", "--disable_tqdm", "true"]
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    return json.loads((output_dir / "all_results.json").read_text()), shlex.join(["python", *command])


def summarize(values):
    """Returns mean, sample standard deviation and the values themselves."""
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def machine():
    """Returns versions and hardware, as a table needs them beside it."""
    packages = ("torch", "transformers", "accelerate", "datasets", "rdkit", "scikit-learn", "numpy")
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "processor": cpu or platform.processor(),
        "cores": os.cpu_count(),
    }


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of split and training")
    parser.add_argument("--folder", type=Path, default=ROOT / "work" / "foundation", help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "foundation.json", help="the results file")
    args = parser.parse_args()

    runs = {name: [run(name, seed, args.folder) for seed in args.seeds] for name in MODELS}
    rows = []
    for name, cells in runs.items():
        row = {"name": name, "split": "random", "command": cells[0][1]}
        row |= {f"test_{m}": summarize([values[f"test_{m}"] for values, _ in cells]) for m in METRICS}
        row["train_seconds"] = summarize([values["train_runtime"] for values, _ in cells])
        rows.append(row)
    for name, suffix in BASELINES.items():  # every run computes them; the split is the same for both models
        cells = runs["embedded"]
        row = {"name": name, "split": "random", "command": cells[0][1]}
        row |= {f"test_{m}": summarize([values[f"test_{m}{suffix}"] for values, _ in cells]) for m in METRICS}
        rows.append(row)
    report = {"command": "python studies/foundation.py", "seeds": args.seeds, "unit": "logD7.4", "machine": machine()}
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps({**report, "rows": rows}, indent=2) + "\n")
    print(f"{'model':<18} {'test MSE':>16} {'MAE':>16} {'R²':>16}")
    for row in rows:
        cells = [f"{row[f'test_{m}']['mean']:.3f} ± {row[f'test_{m}']['sd'] or 0:.3f}" for m in METRICS]
        print(f"{row['name']:<18} " + " ".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
