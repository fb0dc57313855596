"""How far influence scores can be trusted: do they find wrong labels, and does learning what they choose help?

    python studies/influence.py                                      # hours; finished runs are not repeated
    python studies/influence.py --external_file external.csv --jobs 2
    python studies/influence.py --external_file external.csv --finished     # the tables of the runs that are there

Runs run_influence.py for pools with wrong labels (of 300 molecules; and of 1,400, on the random split: there the
training molecules are few enough for what is added to matter) and, if given, an external file, on random and scaffold
splits and several seeds (split, pool and training vary together), with controls of the same size; and the paper's
variant, in which molecules are chosen by the loss of the test molecules (a leak). Writes results/influence_study.json
(.md, .png): areas under the ROC curve of finding wrong labels, test errors after the selection, paired differences
with 95 % intervals that allow for what the seeds' splits have in common, and how like the scores are to those by
conjugate gradients.
"""

import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from common import (
    FAILED,
    as_text,
    held_out_share,
    interval,
    place_of,
    run_all,
    run_script,
    study_parser,
    with_interval,
    write_report,
)
from run_once import checksums, is_done

from run_influence import ONLY_LISSA


START = "models/molformer-mini"
CONTROLS = ("none", "all", "random", "bottom", "group_influence")
MORE_CONTROLS = ("smallest_loss", "gradient_dot")
ON_RANDOM_SPLITS = ("1400",)  # alone, and without the variant that leaks
MEANS = ("added", "added_wrong", "validation_mse")  # of a row of the table, over its seeds
EXACT = ["--ihvp", "cg", "--tolerance", "1e-2", "--recursion_depth", "100"]
SEEDS_OF_MORE = (0, 1, 2)  # that have these too, and the variant that leaks
NAMES = {
    "selected": "top-k by influence",
    "none": "none",
    "all": "all",
    "random": "random-k",
    "bottom": "bottom-k",
    "smallest_loss": "smallest-loss-k",
    "gradient_dot": "gradient-dot-k",
    "group_influence": "group influence",
    "right_label": "random-k of right labels",
    "leakage": "positive on the test set (leaks)",
}
SCORES = {
    "influence": "influence, low",
    "influence_size": "influence, far from zero",
    "gradient_dot": "gradient-dot, low",
    "group_influence": "group influence, late",
    "loss": "loss, high",
    "random": "random",
}


def data_of(cell, args):
    """Returns the flags of split and pool of a cell (pool, split, seed, variant); a pool is external, or its size."""
    pool, split, seed, _ = cell
    external = ["--external_file", str(Path(args.external_file).resolve())] if pool == "external" else []
    return ["--split", split, "--seed", str(seed), *(external or ["--pool_size", pool])]


def command_of(cell, args):
    """Returns the folder and the command of a cell."""
    pool, split, seed, leaks = cell
    folder = args.folder / "-".join((pool, split, str(seed), *(["leakage"] if leaks else [])))
    controls = [*CONTROLS, *(MORE_CONTROLS if seed in SEEDS_OF_MORE else ())]
    controls += [] if pool == "external" else ["right_label"]
    controls = ["none"] if leaks else controls
    command = ["run_influence.py", "--model_name_or_path", START, *data_of(cell, args)]
    command += ["--controls", *controls, *shlex.split(args.extra)]
    command += ["--score_split", "test", "--select", "positive"] if leaks else []
    return folder, command


def run(cell, args, threads):
    """Runs one cell, unless it is finished, and returns its results."""
    pool, split, seed, leaks = cell
    folder, command = command_of(cell, args)
    values = run_script(command, folder, threads)
    return {"pool": pool, "split": split, "seed": seed, "leakage": leaks, "command": as_text(command), **values}


def scoring_command(cell, args, exact=False):
    """Returns the command that scores the pool of a cell again, and nothing else; `exact` by conjugate gradients."""
    folder, _ = command_of(cell, args)
    model = ["--model_name_or_path", str(folder / "finetune-none"), "--pretrained_model", START, "--do_predict"]
    extra = shlex.split(args.extra)
    if exact:
        unread = [place for place, word in enumerate(extra) if word.removeprefix("--").split("=")[0] in ONLY_LISSA]
        values = [place + 1 for place in unread if "=" not in extra[place]]
        extra = [word for place, word in enumerate(extra) if place not in unread + values] + EXACT
    return ["run_influence.py", *model, *data_of(cell, args), "--controls", "none", *extra]


def exact_key(cell, args):
    """Returns what the comparison with conjugate gradients depends on: its command, and the weights of the start."""
    return [as_text(scoring_command(cell, args, exact=True)), *checksums([START])]


def compare_with_exact(cell, args):
    """Scores the pool of a cell again, by conjugate gradients, and returns how like the stochastic scores are.

    Returns:
        `dict` with the rank correlation and the correlation of the scores, the residuals of both, and the time and
        memory of the stochastic ones with all cores and nothing beside them.
    """
    folder, _ = command_of(cell, args)
    exact = run_script(scoring_command(cell, args, exact=True), args.folder / "exact", os.cpu_count())
    again = run_script(scoring_command(cell, args), args.folder / "again", os.cpu_count())["influence"]
    tables = [pd.read_csv(path / "influence_scores.csv").set_index("row") for path in (folder, args.folder / "exact")]
    scores = [tables[0]["score"], tables[1]["score"].loc[tables[0].index]]
    before = json.loads((folder / "influence.json").read_text())
    row = {"rank_correlation": float(scores[0].corr(scores[1], "spearman")), "correlation": scores[0].corr(scores[1])}
    return row | {
        "residual": before.get("residual"), "residual_of_exact": exact["influence"]["residual"],
        "seconds_of_lissa": again["seconds"], "peak_memory_bytes_of_lissa": again["peak_memory_bytes"],
        "command": exact_key(cell, args),
    }  # fmt: skip


def cells_of(report):
    """Returns the cells of a report's runs (`set[tuple]`)."""
    return {(run["pool"], run["split"], run["seed"], run["leakage"]) for run in report["runs"]}


def groups(rows):
    """Returns the pools and splits of runs or rows, the smaller pools first."""
    found = {(row["pool"], row["split"]) for row in rows}
    return sorted(found, key=lambda group: (group[0] == "external", group[0].zfill(6), group[1]))


def summarize(runs):
    """Returns rows of the table: pool, split, name, values by seed, mean, interval, mean validation error, paired
    differences to top-k by influence and by group influence."""
    rows = []
    for pool, split in groups(runs):
        here = [r for r in runs if (r["pool"], r["split"]) == (pool, split)]
        errors, added = {name: {} for name in NAMES}, {name: [] for name in NAMES}
        shares = {name: [] for name in NAMES}
        for result in here:
            for name, values in result["results"].items():
                if result["leakage"]:
                    if name != "selected":
                        continue
                    name = "leakage"
                errors[name][result["seed"]] = values["test_mse"]
                added[name].append({key: values[key] for key in MEANS if key in values})
                shares[name].append(held_out_share(values))
        shares = {name: max(found) for name, found in shares.items() if found}
        for name, by_seed in errors.items():
            if not by_seed:
                continue
            mean, half = interval(list(by_seed.values()), shares[name])
            row = {"pool": pool, "split": split, "name": name, "test_mse": by_seed, "mean": mean, "half_width": half}
            for key in MEANS:
                found = [values[key] for values in added[name] if key in values]
                row |= {key: float(np.mean(found))} if found else {}
            for first in ("selected", "group_influence"):
                common = sorted(by_seed.keys() & errors[first].keys())
                if name != first and common:
                    pairs = [errors[first][s] - by_seed[s] for s in common]
                    row[f"{first}_minus_this"] = interval(pairs, max(shares[first], shares[name]))
            rows.append(row)
    return rows


def detection_rows(runs):
    """Returns areas under the ROC curve of finding wrong labels, by pool, split and score."""
    rows = []
    for pool, split in groups(runs):
        here = [r for r in runs if (r["pool"], r["split"]) == (pool, split) and not r["leakage"]]
        for score in SCORES:
            key = f"auc_{score}"  # there is none where no label is wrong
            found = [r for r in here if key in r["influence"]]
            values = {r["seed"]: r["influence"][key] for r in found}
            if values:  # what is tested is the pool here
                sizes = [(r["influence"]["molecules"], r["influence"]["training_molecules"]) for r in found]
                mean, half = interval(list(values.values()), max(size / (size + learned) for size, learned in sizes))
                row = {"pool": pool, "split": split, "score": score, "auc": values, "mean": mean, "half_width": half}
                rows.append(row)
    return rows


def to_markdown(rows, detected, runs, exact=None):
    """Returns both tables as Markdown, and a line on how near the scores are to converged and to exact ones."""
    lines = [
        "| pool | split | added | molecules (wrong) | n | validation MSE | test MSE | top-k minus this "
        "| group influence minus this |"
    ]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        keys = ("selected_minus_this", "group_influence_minus_this")
        paired = [with_interval(row[key], signed=True) if key in row else "" for key in keys]
        error = with_interval((row["mean"], row["half_width"]))
        count = f"{row['added']:.0f}" + (f" ({row['added_wrong']:.0f})" if row.get("added_wrong") else "")
        chosen = f"{row['validation_mse']:.3f}" if "validation_mse" in row else ""
        names = (row["pool"], row["split"], NAMES[row["name"]])
        cells = (*names, count, str(len(row["test_mse"])), chosen, error, *paired)
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| pool | split | score | n | area under the ROC curve |", "| --- | --- | --- | ---: | ---: |"]
    for row in detected:
        name, area = SCORES[row["score"]], with_interval((row["mean"], row["half_width"]))
        lines.append("| " + " | ".join((row["pool"], row["split"], name, str(len(row["auc"])), area)) + " |")
    solved = [run["influence"] for run in runs if run["influence"].get("residual") is not None]
    if solved:  # not where the curvature was left out
        residuals = [report["residual"] for report in solved]
        converged = sum(report["converged"] for report in solved)
        lines += ["", f"{converged} of {len(solved)} scorings converged; residuals {min(residuals):.2f} to "
                  f"{max(residuals):.2f}."]  # fmt: skip
    if exact is not None:
        lines += [
            "",
            "Rank correlation of the scores with those by conjugate gradients (residual "
            f"{exact['residual_of_exact']:.1e}): {exact['rank_correlation']:.3f}.",
        ]
    return "\n".join(lines) + "\n"


def plot(rows, path):
    """Draws for each pool (a column) and split (a row) the paired differences with their intervals."""
    from matplotlib.figure import Figure

    found = groups(rows)
    names = [name for name in NAMES if any(r["name"] == name and "selected_minus_this" in r for r in rows)][::-1]
    pools, splits = (list(dict.fromkeys(group[place] for group in found)) for place in (0, 1))
    size = (1.5 + 3.5 * len(pools), 0.6 + 2.9 * len(splits))
    figure, handles = Figure(figsize=size, layout="constrained"), {}
    panels = figure.subplots(len(splits), len(pools), sharey=True, squeeze=False)
    for axes, group in zip(panels.flat, ((pool, split) for split in splits for pool in pools), strict=True):
        if group not in found:
            axes.set_axis_off()
            continue
        here = [row for row in rows if (row["pool"], row["split"]) == group and row["name"] in names]
        for first, color, shift in (("selected", "tab:blue", 0.12), ("group_influence", "tab:orange", -0.12)):
            key = f"{first}_minus_this"
            points = [(names.index(row["name"]) + shift, *row[key]) for row in here if key in row]
            if points:
                places, means, halves = zip(*points, strict=True)
                halves = np.array(halves, dtype=float)  # no bar for a single seed, which has no interval
                handles[NAMES[first]] = axes.errorbar(means, places, xerr=halves, fmt="o", color=color, capsize=3)
        axes.axvline(0, color="0.5", linewidth=1)
        axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
        what = "external molecules" if group[0] == "external" else f"pool of {group[0]}"
        axes.set_title(f"{what}, {group[1]} split", fontsize=10)
        axes.set_xlabel("test MSE minus that of this")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def main():
    parser = study_parser(__doc__, "influence", "influence_study.json", "run_influence.py")
    parser.add_argument("--external_file", help="CSV of external molecules, a second pool")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--splits", nargs="+", default=["random", "scaffold"])
    parser.add_argument("--pools", nargs="+", default=["300", "1400"], help="sizes of the pools with wrong labels")
    parser.add_argument("--finished", action="store_true", help="train nothing; the tables of what is finished")
    args = parser.parse_args()
    pools = [*args.pools, *(["external"] if args.external_file else [])]
    cells = [
        (pool, split, seed, False)
        for seed in args.seeds for pool in pools for split in args.splits
        if split == "random" or pool not in ON_RANDOM_SPLITS
    ]  # fmt: skip
    cells += [
        (pool, "random", seed, True)
        for seed in args.seeds for pool in pools
        if "random" in args.splits and seed in SEEDS_OF_MORE and pool not in ON_RANDOM_SPLITS
    ]  # fmt: skip
    if not cells:
        raise SystemExit(f"--pools {' '.join(args.pools)} is studied on the random split alone.")
    if args.finished:
        cells = [cell for cell in cells if is_done(*command_of(cell, args))]
    before = json.loads(args.output.read_text()) if args.output.exists() else {}
    runs = run_all(lambda cell, threads: run(cell, args, threads), cells, args.jobs)
    if not runs:
        raise SystemExit(f"There is no finished run in {args.folder}.")
    rows, detected = summarize(runs), detection_rows(runs)
    first = next((cell for cell in cells if cell[0] == "300" and not cell[3]), cells[0])
    known = before.get("exact") or {}
    exact = known if known.get("command") == exact_key(first, args) else None  # not of other weights or flags
    values = {"selection": rows, "detection": detected, "runs": runs, "exact": exact}

    def write():
        output = place_of(args.output, values, cells_of, args.folder)
        write_report(output, values, args.jobs)
        output.with_suffix(".md").write_text(to_markdown(rows, detected, runs, values["exact"]))
        plot(rows, output.with_suffix(".png"))

    write()
    folders = command_of(first, args)[0], args.folder / "exact"
    scored = all((folder / "influence_scores.csv").exists() or not folder.exists() for folder in folders)  # kept ones
    if scored and is_done(*command_of(first, args)) and not args.finished:
        found = run_all(lambda cell, threads: compare_with_exact(cell, args), [first], 1)
        values["exact"] = found[0] if found else values["exact"]
        write()
    print(to_markdown(rows, detected, runs, values["exact"]))


if __name__ == "__main__":
    main()
    sys.exit(bool(FAILED))
