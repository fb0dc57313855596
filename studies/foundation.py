"""What pre-training is worth: the embedded checkpoint against the same model from scratch and two baselines.

    python studies/foundation.py     # 6 runs to find learning rates, then 3 seeds of each model; half an hour

Runs run_regression.py with its defaults (random split), once from models/molformer-mini and once from random weights:
first at several learning rates with the default seed, of which the one with the lowest validation MSE is taken, then
for each seed (split and seed vary together). Writes results/foundation.json: test MSE, RMSE, MAE and R² of every run
(logD units), of ridge regression on Morgan fingerprints and of the mean predictor on the same splits, mean and
standard deviation over seeds, validation MSE of every learning rate, the commands, versions and hardware. Runs that
are finished are not run again.
"""

import statistics

from common import as_text, run_all, run_script, study_parser, write_report


MODELS = {"embedded": [], "from_scratch": ["--config_name", "configs/molformer-mini.json"]}
RATES = {"embedded": ("1.5e-4", "3e-4", "6e-4"), "from_scratch": ("1e-4", "3e-4", "1e-3")}
TUNING_SEED = 42
BASELINES = {"fingerprint_ridge": "_fingerprint_ridge", "mean_predictor": "_mean"}
METRICS = ("mse", "rmse", "mae", "r2")


def run(name, rate, seed, folder, threads):
    """Runs one cell, unless it is finished, and returns its results and its command."""
    command = ["run_regression.py", *MODELS[name], "--learning_rate", rate, "--seed", str(seed)]
    return run_script(command, folder / f"{name}-{rate}-{seed}", threads), as_text(command)


def summarize(values):
    """Returns mean, sample standard deviation and the values themselves."""
    return {
        "mean": statistics.mean(values),
        "sd": statistics.stdev(values),
        "values": values,
    }


def markdown(rows):
    """Returns the table of the README: mean ± sample standard deviation over seeds, in logD units."""
    lines = ["| model | test MSE | RMSE | MAE | R² | trained parameters |", "| --- " + "| ---: " * 5 + "|"]
    for row in rows:
        cells = [f"{row[f'test_{m}']['mean']:.3f} ± {row[f'test_{m}']['sd']:.3f}" for m in METRICS]
        parameters = f"{row['trainable_parameters']:,}" if "trainable_parameters" in row else ""
        lines.append(f"| {' | '.join([row['name'].replace('_', ' '), *cells, parameters])} |")
    return "\n".join(lines)


def main():
    parser = study_parser(__doc__, "foundation", "foundation.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of split and training")
    args = parser.parse_args()

    def run_cells(cells):
        return run_all(lambda cell, threads: run(*cell, args.folder, threads), cells, args.jobs)

    tuning_cells = [(name, rate, TUNING_SEED) for name in MODELS for rate in RATES[name]]
    tuning = [
        {"name": name, "learning_rate": rate, "validation_mse": values["validation_mse"], "command": command}
        for (name, rate, _), (values, command) in zip(tuning_cells, run_cells(tuning_cells), strict=True)
    ]
    best = {
        name: min((row for row in tuning if row["name"] == name), key=lambda row: row["validation_mse"])
        for name in MODELS
    }
    cells = [(name, best[name]["learning_rate"], seed) for name in MODELS for seed in args.seeds]
    results = dict(zip(cells, run_cells(cells), strict=True))

    rows = []
    for name in MODELS:
        runs = [result for cell, result in results.items() if cell[0] == name]
        row = {"name": name, "split": "random", "learning_rate": best[name]["learning_rate"], "command": runs[0][1]}
        row |= {f"test_{m}": summarize([values[f"test_{m}"] for values, _ in runs]) for m in METRICS}
        row["trainable_parameters"] = runs[0][0]["trainable_parameters"]
        rows.append(row)
    runs = [result for cell, result in results.items() if cell[0] == "embedded"]
    for name, suffix in BASELINES.items():  # every run computes them; both models have the same splits
        row = {"name": name, "split": "random", "command": runs[0][1]}
        rows.append(
            row | {f"test_{m}": summarize([values[f"test_{m}{suffix}"] for values, _ in runs]) for m in METRICS}
        )
    write_report(args.output, {"seeds": args.seeds, "rows": rows, "tuning": tuning}, args.jobs)
    print(markdown(rows))


if __name__ == "__main__":
    main()
