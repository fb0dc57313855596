"""The paper's three tables with this project's rows beside them, from the runs of reproduce_paper.sh.

    ./reproduce_paper.sh                                    # trains, then calls this
    python studies/paper_tables.py --folder outputs/paper   # the tables of the runs that are finished

Writes results/paper_tables.json, and results/paper_tables.md: regression, masked language modeling first, and what
influence chose with its controls (Table 1), evaluation loss by epoch after the selection (Table 2),
parameter-efficient fine-tuning (appendix); means over seeds with 95 % intervals that allow for what the splits share,
in logD units, and the command of every row.
"""

import argparse
import json
import re
from pathlib import Path

import peft_comparison
import table1
from common import PARTS, ROOT, held_out_share, interval, place_of, with_interval, write_report
from run_once import is_finished

from run_influence import PAPER_LOSSES


TABLE_1 = {  # test MSE, MAE, R² of the paper
    "regression": ("regression", table1.PAPER["regression"]),
    "mlm_regression": ("masked language modeling, then regression", table1.PAPER["mlm_regression"]),
    "selected": ("regression with the molecules that influence chose", None),
}
CONTROLS = {  # of the runs that select, with the same seeds: less to learn than the regression has
    "none": "regression without the external molecules",
    "random": "regression with as many of them, chosen at random",
}
STARTS = {"mlm_regression": "mlm", "selected": "influence"}  # rows that start from another row's run of the seed
METRICS = ("test_mse", "test_mae", "test_r2")


def collect(folder):
    """Returns the finished runs by name: results by seed, and a command (`dict`).

    Of a name those count that were made like the newest one: by its command but for the seed, from its weights.
    """
    folders = {}
    for path in sorted(folder.glob("*-*")):
        match = re.fullmatch(r"(.+)-(\d+)", path.name)
        if match and is_finished(path):
            folders.setdefault(match[1], {})[int(match[2])] = path
    runs = {}
    for name, cells in folders.items():
        notes = {seed: note_lines(path) for seed, path in cells.items()}
        before = STARTS.get(name)  # the run that it starts from
        starts = {seed: note_lines(folder / f"{before}-{seed}") if before else [] for seed in cells}
        recipes = {seed: recipe_of(lines, seed, folders, starts[seed]) for seed, lines in notes.items()}
        newest = recipes[max(cells, key=lambda seed: age_of(cells[seed]))]
        same = [seed for seed in sorted(cells) if recipes[seed] == newest]
        if len(same) < len(cells):
            others = ", ".join(cells[seed].name for seed in sorted(cells) if seed not in same)
            print(f"Left out, since made by another command or from other weights than the newest: {others}")
        seeds = {seed: json.loads((cells[seed] / "all_results.json").read_text()) for seed in same}
        runs[name] = {"seeds": seeds, "command": " && ".join([*starts[same[0]][:1], *notes[same[0]][:1]])}
    return runs


def age_of(folder):
    note = folder.with_name(f"{folder.name}.command")
    return note.stat().st_mtime if note.exists() else 0.0


def note_lines(folder):
    """Returns a run's command and, a line each, the checksums of what it names (see run_once.py)."""
    note = folder.with_name(f"{folder.name}.command")
    return note.read_text().splitlines() if note.exists() else [""]


def recipe_of(lines, seed, names, start):
    """Returns what runs of one row have in common, whatever their seed.

    Args:
        start (`list[str]`): the lines of the run that this one starts from, which count in place of its own
            checksums: that run's files differ from seed to seed. Empty where there is none.
    """
    runs = "|".join(map(re.escape, names))
    commands = [re.sub(rf"(--seed |\b(?:{runs})-){seed}\b", r"\1", line) for line in (lines[0], *start[:1])]
    return [*commands, *(start or lines)[1:]]


def rows_of(runs):
    """Returns the rows of all tables, each with its values by seed, mean, half width and the paper's numbers."""
    rows = []
    for name, (title, paper) in TABLE_1.items():
        if name in runs:
            rows.append(row(runs[name], "1", title, METRICS, paper))
    if "influence" in runs:
        for name, title in CONTROLS.items():
            seeds = {seed: values["results"][name] for seed, values in runs["influence"]["seeds"].items()
                     if "test_mse" in values["results"].get(name, {})}  # fmt: skip
            if seeds:
                found = {"seeds": seeds, "command": runs["influence"]["command"]}
                rows.append(row(found, "1", title, METRICS, None))
        chosen = {
            seed: values["results"]["selected"]
            for seed, values in runs["influence"]["seeds"].items()
            if "selected" in values["results"]
        }
        for epoch in range(min((len(values["eval_losses"]) for values in chosen.values()), default=0)):
            numbers = {seed: values | {"loss": values["eval_losses"][epoch]} for seed, values in chosen.items()}
            paper = PAPER_LOSSES[epoch : epoch + 1]
            found = {"seeds": numbers, "command": runs["influence"]["command"]}
            rows.append(row(found, "2", f"epoch {epoch + 1}", ("loss",), paper, parts=("train", "validation")))
    for name, paper in peft_comparison.PAPER.items():
        if name in runs:
            rows.append(row(runs[name], "appendix", name, ("test_mse", "final_train_mse"), paper))
    return rows


def row(run, table, title, metrics, paper, parts=PARTS):
    """Returns one row: for each metric mean and half width, the values by seed, and the paper's numbers.

    Args:
        parts (`tuple[str]`): of the molecules that the runs share; the metrics are of the last part.
    """
    share = max(held_out_share(found, parts) for found in run["seeds"].values())
    values = {metric: {seed: found[metric] for seed, found in run["seeds"].items()} for metric in metrics}
    return {
        "table": table,
        "name": title,
        "values": values,
        "intervals": {metric: interval(list(numbers.values()), share) for metric, numbers in values.items()},
        "paper": [number for number in paper or () if number is not None],
        "command": run["command"],
    }


def cells_of(report):
    """Returns what the numbers of a report are of: table, row, metric and seed (`set[tuple]`)."""
    return {
        (row["table"], row["name"], metric, str(seed))
        for row in report["rows"]
        for metric, numbers in row["values"].items()
        for seed in numbers
    }


def to_markdown(rows):
    """Returns the three tables, and the commands of their rows."""
    titles = {
        "1": ("Table 1: regression (test MSE, MAE, R²)", ("MSE", "MAE", "R²")),
        "2": (
            "Table 2: evaluation loss by epoch after the selection (standardized labels; the paper's are of molecules "
            "seen in training)",
            ("loss",),
        ),
        "appendix": ("Appendix: parameter-efficient fine-tuning", ("test MSE", "training loss")),
    }
    lines = []
    for table, (title, names) in titles.items():
        here = [row for row in rows if row["table"] == table]
        if not here:
            continue
        header = ["", "seeds", *names, *(f"paper's {name}" for name in names)]
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
        for found in here:
            ours = [with_interval(pair) for pair in found["intervals"].values()]
            paper = [f"{number:g}" for number in found["paper"]] + [""] * (len(names) - len(found["paper"]))
            count = len(next(iter(found["values"].values())))
            lines.append(f"| {' | '.join([found['name'], str(count), *ours, *paper])} |")
        lines.append("")
    named = {}  # all epochs of a run, and all its controls, have one command
    for row in rows:
        named.setdefault((row["table"], row["command"]), row["name"])
    lines += ["## Commands", "", "Of the first seed of each row:", ""]
    lines += [f"- table {table}, {name}: `{command}`" for (table, command), name in named.items()]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "paper", help="where the runs are")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "paper_tables.json", help="the results file")
    args = parser.parse_args()
    rows = rows_of(collect(args.folder))
    if not rows:
        raise SystemExit(f"There is no finished run in {args.folder}. Run ./reproduce_paper.sh first.")
    output = place_of(args.output, {"rows": rows}, cells_of, args.folder)
    write_report(output, {"rows": rows})
    output.with_suffix(".md").write_text(to_markdown(rows))
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
