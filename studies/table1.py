"""Table 1 of the paper with this project's rows, from the runs of reproduce_table1.sh.

    ./reproduce_table1.sh                                # trains, then calls this
    python studies/table1.py --folder outputs/table1     # the table of the cells that are finished

Writes results/table1.json (test MSE, MAE and R² of every seed, in logD units, with the command), results/table1.md
(mean and standard deviation beside the paper's numbers, paired differences with 95 % intervals that allow for what the
seeds' splits have in common; and how much of the molecules each row learned: 72 % where a tenth of the training side
only chooses, 80 % where it is learned too) and results/table1.png (predictions against true values of the first split
and seed of which all models have them).
"""

import argparse
import json
import re
import statistics
from collections import Counter
from functools import cache
from pathlib import Path

import pandas as pd
from common import ROOT, interval, place_of, write_report
from run_once import checksums, is_finished


# where a row's cells are, and what its metrics are called there
ROWS = {
    "regression": ("regression-{}-{}", "test_{}"),
    "mlm_regression": ("mlm_regression-{}-{}", "test_{}"),
    "best_recipe": ("ensemble-{}-{}/member-0", "test_{}"),
    "ensemble": ("ensemble-{}-{}", "test_{}"),
    "from_scratch": ("from_scratch-{}-{}", "test_{}"),
    "fingerprint_ridge": ("regression-{}-{}", "test_{}_fingerprint_ridge"),
    "descriptor_boosting": ("descriptor_boosting-{}-{}", "test_{}"),
    "chemprop": ("chemprop-{}-{}", "test_{}"),
}
PAPER = {"regression": (0.4827, 0.5359, 0.6733), "mlm_regression": (0.4500, 0.5055, 0.6954)}  # MSE, MAE, R²
PAIRS = [
    ("regression", "from_scratch"),
    ("regression", "fingerprint_ridge"),
    ("regression", "descriptor_boosting"),
    ("regression", "chemprop"),
    ("mlm_regression", "regression"),
    ("best_recipe", "regression"),
    ("best_recipe", "descriptor_boosting"),
    ("best_recipe", "chemprop"),
    ("ensemble", "best_recipe"),
    ("ensemble", "descriptor_boosting"),
    ("ensemble", "chemprop"),
]
METRICS = ("mse", "mae", "r2")
OTHER_PARTS = "--protocol --test_fraction --split_file --validation_file --test_file --max_train_samples".split()


def collect(folder, splits=("random", "scaffold")):
    """Returns the rows of the table, each with the metrics of its finished cells, in the order of the seeds."""
    rows = []
    for split in splits:
        for name, (pattern, key) in ROWS.items():
            row = {"name": name, "split": split, "seeds": []} | {f"test_{metric}": [] for metric in METRICS}
            run_name = pattern.split("/")[0]
            found = (re.fullmatch(run_name.format(split, r"(\d+)"), path.name) for path in folder.glob("*"))
            seeds = sorted(int(match[1]) for match in found if match)
            cells = {seed: folder / pattern.format(split, seed) for seed in seeds}
            finished = [seed for seed, cell in cells.items() if is_finished(cell)]
            if name != "fingerprint_ridge":  # which reads none
                finished = [seed for seed in finished if is_of_these_weights(folder, run_name.format(split, seed))]
            for seed in of_one_command(folder, {seed: run_name.format(split, seed) for seed in finished}):
                cell = cells[seed]
                values = json.loads((cell / "all_results.json").read_text())
                row["seeds"].append(seed)
                for metric in METRICS:
                    row[f"test_{metric}"].append(values[key.format(metric)])
                made = commands(folder, run_name.format(split, seed))
                if "/" in pattern:  # the ensemble's first member, which is what this gives
                    alone = re.sub(r" --num_seeds \d+", "", made)
                    made = alone.replace(f"/{run_name.format(split, seed)}", f"/{name}-{split}-{seed}")
                row.setdefault("command", made)
                row["learned"] = learned_share(made)
            if row["seeds"]:
                rows.append(row)
    return rows


def learned_share(command):
    """Returns the share of the molecules that a command learns, as text; nothing where flags make other parts."""
    words = command.split()
    flags = dict(zip(words, words[1:], strict=False))  # the last one counts
    if any(name in flags for name in OTHER_PARTS):
        return ""
    held_out = 0.0 if flags.get("--refit") == "true" else float(flags.get("--validation_fraction", 0.1))
    return f"{80 * (1 - held_out):.0f} %"


def cells_of(report):
    """Returns the cells of a report's rows (`set[tuple]`)."""
    return {(row["name"], row["split"], seed) for row in report["rows"] for seed in row["seeds"]}


def predictions_file(folder, row, seed):
    return folder / ROWS[row["name"]][0].format(row["split"], seed) / "predictions.csv"


def test_predictions(folder, row, seed):
    """Returns labels and predictions of a cell's test molecules by their row in the data (`pandas.DataFrame`)."""
    table = pd.read_csv(predictions_file(folder, row, seed))
    return table[table["split"] == "test"].set_index("row").sort_index()[["label", "prediction"]]


def notes(folder, run_name):
    """Returns the files that tell how a cell was made (see run_once.py): its own, and before it that of its start."""
    own, before = folder / f"{run_name}.command", folder / f"{run_name}-mlm.command"
    chained = before.exists() and own.exists() and f"{run_name}-mlm " in own.read_text().splitlines()[0]
    return [file for file in ([before] if chained else []) + [own] if file.exists()]


@cache  # says so once
def is_of_these_weights(folder, run_name):
    """Returns whether a cell started from the weights that its checkpoint holds now; others are not compared."""
    lines = notes(folder, run_name)[0].read_text().splitlines() if notes(folder, run_name) else [""]
    start = re.search(r"--model_name_or_path (\S+)", lines[0])
    kept = {line for line in lines[1:] if line.startswith("# model.safetensors")}
    now = set(checksums([start[1]])) if start else set()
    if not kept or not now or kept <= now:
        return True
    print(f"Left out, since made from other weights than {start[1]} holds now: {run_name}")
    return False


def commands(folder, run_name):
    """Returns the commands that made a cell, joined as a shell would run them."""
    return " && ".join(file.read_text().splitlines()[0] for file in notes(folder, run_name))


def of_one_command(folder, run_names):
    """Returns the seeds whose cells were made like the newest one: same flags but for the seed, same first weights.

    Args:
        run_names (`dict[int, str]`): name of the cell of each seed.
    """

    def recipe(seed):
        lines = [note.read_text().splitlines() for note in notes(folder, run_names[seed])]
        # of a chain of two the first one's weights count: the second starts from what the first made of this seed
        kept = [*(lines[0] if lines else []), *(more[0] for more in lines[1:])]
        return [re.sub(rf"(--seed |random-|scaffold-){seed}\b", r"\1", line) for line in kept]

    def age(seed):
        return max((note.stat().st_mtime for note in notes(folder, run_names[seed])), default=0.0)

    count = Counter(map(str, map(recipe, run_names)))  # which decides where no time is known
    newest = recipe(max(run_names, key=lambda seed: (age(seed), count[str(recipe(seed))]))) if run_names else None
    same = [seed for seed in run_names if recipe(seed) == newest]
    others = [run_names[seed] for seed in run_names if seed not in same]
    if others:
        print(f"Left out, since made by another command or from other weights than the newest: {', '.join(others)}")
    return same


def paired_difference(first, second):
    """Returns mean, lower and upper end of the 95 % interval of first minus second, and n; `None` below two pairs.

    Of the seeds that both rows have, as `interval` computes it.
    """
    values = dict(zip(second["seeds"], second["test_mse"], strict=True))
    pairs = [mse - values[seed] for seed, mse in zip(first["seeds"], first["test_mse"], strict=True) if seed in values]
    if len(pairs) < 2:
        return None
    mean, half = interval(pairs)
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": len(pairs)}


def differences(rows):
    """Returns the paired differences of test MSE that the table reports."""
    by_name = {(row["name"], row["split"]): row for row in rows}
    found = []
    for split in sorted({row["split"] for row in rows}):
        for first, second in PAIRS:
            if (first, split) in by_name and (second, split) in by_name:
                values = paired_difference(by_name[first, split], by_name[second, split])
                if values is not None:
                    learned = [by_name[name, split].get("learned") for name in (first, second)]
                    found.append({"first": first, "second": second, "split": split, "learned": learned} | values)
    return found


def markdown(rows, pairs):
    """Returns the table and the paired differences as Markdown."""
    lines = [
        "| row | split | learned | seeds | test MSE | MAE | R² | paper's MSE, MAE, R² |",
        "| --- | --- " + "| ---: " * 6 + "|",
    ]
    for row in rows:
        cells = []
        for metric in METRICS:
            values = row[f"test_{metric}"]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        paper = ", ".join(f"{value:.4f}" for value in PAPER.get(row["name"], ())) if row["split"] == "random" else ""
        name = row["name"].replace("_", " ")
        counts = [row.get("learned", ""), str(len(row["seeds"]))]
        lines.append(f"| {' | '.join([name, row['split'], *counts, *cells, paper])} |")
    if pairs:
        lines += ["", "| difference of test MSE | split | learned | mean | 95 % interval | seeds |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for pair in pairs:
        name = f"{pair['first']} − {pair['second']}".replace("_", " ")
        span = f"{pair['low']:+.3f} to {pair['high']:+.3f}"
        learned = ", ".join(dict.fromkeys(filter(None, pair.get("learned", ()))))  # both, where they differ
        lines.append(f"| {name} | {pair['split']} | {learned} | {pair['mean']:+.3f} | {span} | {pair['seeds']} |")
    return "\n".join(lines) + "\n"


def plot(rows, folder, path):
    """Draws predictions of the test set against true values, a panel for each model.

    They are of the first split and seed of which all models have them. Runs that were restored by kept_runs.py have
    none; if there is no such split and seed, the plot stays as it is.
    """
    from matplotlib.figure import Figure

    drawn = [row for row in rows if row["name"] in ("regression", "mlm_regression", "ensemble")]
    for split, seed in sorted({(row["split"], seed) for row in drawn for seed in row["seeds"]}):
        shown = [row for row in drawn if row["split"] == split]
        if all(seed in row["seeds"] and predictions_file(folder, row, seed).exists() for row in shown):
            break
    else:
        print(f"{path.name} stays as it is: not all of its models have predictions in {folder}.")
        return
    figure = Figure(figsize=(4.2 * len(shown), 4.6), layout="constrained")
    for number, row in enumerate(shown):
        table = test_predictions(folder, row, seed)
        axes = figure.add_subplot(1, len(shown), number + 1)
        limits = [
            min(table["label"].min(), table["prediction"].min()) - 0.2,
            max(table["label"].max(), table["prediction"].max()) + 0.2,
        ]
        axes.plot(limits, limits, color="0.6", linewidth=1)
        axes.scatter(table["label"], table["prediction"], s=8, alpha=0.5, linewidths=0)
        axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="measured logD7.4", ylabel="predicted logD7.4")
        error = row["test_mse"][row["seeds"].index(seed)]
        name = row["name"].replace("_", ", then ")
        axes.set_title(f"{name}, {split} split, seed {seed}: MSE {error:.3f}", fontsize=10)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "table1", help="where the cells are")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "table1.json", help="the results file")
    args = parser.parse_args()
    rows = collect(args.folder)
    if not rows:
        raise SystemExit(f"There is no finished cell in {args.folder}. Run ./reproduce_table1.sh first.")
    pairs = differences(rows)
    paper = {name: dict(zip(METRICS, values, strict=True)) for name, values in PAPER.items()}
    values = {"paper": paper, "rows": rows, "paired_differences": pairs}
    output = place_of(args.output, values, cells_of, args.folder)
    write_report(output, values)
    text = markdown(rows, pairs)
    output.with_suffix(".md").write_text(text)
    print(text)
    plot(rows, args.folder, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
