"""What each parameter-efficient method reaches, with how many parameters, memory and time.

    python studies/peft_comparison.py --tune            # first: learning rates of every method, by validation
    python studies/peft_comparison.py --tune_more       # then rsLoRA with other flags, beside the equal budgets
    python studies/peft_comparison.py --jobs 2          # hours; finished cells are not trained again
    python studies/peft_comparison.py --finished        # the table of the cells that are there; trains nothing

With --tune: four or five rates a method with one seed, three first, then the one beyond the least or the largest
while that is best, else one between the best and the better of its neighbors; then the two best of each with another
seed, since a method that bears a rate with one split may diverge with the next; 20 % of the training side held out,
which judges the model of the last epoch; the test set is not read (of each seed's own split: a fourth of its test
molecules are validation molecules of another seed). Writes results/peft_tuning.json (.md), of which the best rates are
the defaults of run_peft.py.

With --tune_more: rsLoRA, the best of that tuning's adapters, at larger --peft_alpha and lower rates and with dropout:
each with one seed and the two best with another, judged as above. Writes results/peft_more.json (.md).

Then run_peft.py: every method with its best rate on the same five splits and seeds (split and seed vary together);
the winner, of those that train few parameters the one of lowest mean validation error, and full fine-tuning on the
scaffold split too; and with three seeds one learning rate for all, as the paper has it, with this project's protocol
otherwise. With --methods or --seeds the others are what is finished of them; runs at rates that an earlier tuning had
chosen stay in the table. Writes results/peft_comparison.json (.csv, .md, .png).
"""

import csv
import json
import shlex
import sys

import numpy as np
from common import (
    FAILED,
    ROOT,
    as_text,
    interval,
    place_of,
    run_all,
    run_script,
    study_parser,
    with_interval,
    write_report,
)
from kept_runs import RUNS, read_records
from run_once import is_done

from run_peft import METHODS


PAPER = {  # test MSE and final training loss of its appendix, of full fine-tuning the test MSE of its Table 1
    "full": (0.4827, None),
    "bitfit": (0.8617, 0.884),
    "ia3": (0.9203, 0.956),
    "lora": (0.7456, 0.778),
}
PAPER_RATE = 1e-4
SEEDS = (0, 1, 2, 3, 4)
START = "models/molformer-mini"
RATES = {  # that are tried first with --tune
    "full": (3e-4, 6e-4, 1.2e-3),
    "head": (1e-3, 3e-3, 9e-3),
    "bitfit": (1e-3, 3e-3, 9e-3),
    "ia3": (3e-3, 1e-2, 3e-2),
    "ln_tuning": (1e-3, 3e-3, 9e-3),
    "lora": (7e-4, 2e-3, 6e-3),
    "rslora": (4e-4, 1e-3, 3e-3),
    "dora": (7e-4, 2e-3, 6e-3),
    "pissa": (4e-4, 1e-3, 3e-3),
    "vera": (3e-3, 1e-2, 3e-2),
    "oft": (4e-4, 1e-3, 3e-3),
    "miss": (4e-4, 1e-3, 3e-3),
    "hira": (7e-4, 2e-3, 6e-3),
    "shira": (4e-4, 1e-3, 3e-3),
}
LEAST_RATES, MOST_RATES = 4, 5  # of a method
MORE = {  # flags and rate of rsLoRA, tried with --tune_more
    "alpha-16": ("--peft_alpha 16", 2e-3),
    "alpha-16-dropout": ("--peft_alpha 16 --peft_dropout 0.1", 2e-3),
    "alpha-32-lower": ("--peft_alpha 32", 1e-3),
    "alpha-32": ("--peft_alpha 32", 1.5e-3),
    "alpha-64": ("--peft_alpha 64", 6e-4),
}
MOST_OF_MORE = 2  # that have the other seeds too
TUNING = ["--do_train", "--do_eval", "--validation_fraction", "0.2", "--load_best_model_at_end", "false"]
EQUAL = 0.01  # difference of validation errors up to which two rates are as good
TUNING_SEEDS = (0, 1)  # of split and training; all rates with the first, the two best with the others
MOST_PERCENT = 2.0  # of the base model's parameters, head apart, that the winner may train
LEAST_R2 = 0.2  # on the test molecules; a run below it has learned hardly more than the mean, and is called failed
NUMBERS = (
    "learning_rate",
    "base_parameters",
    "trainable_parameters",
    "trainable_parameters_without_head",
    "trainable_percent",
    "peak_memory_bytes",
)
NUMBERS += ("checkpoint_bytes", "train_runtime", "final_train_mse", "eval_mse", "test_mse", "test_mae", "test_r2")


def command_of(cell, args):
    """Returns the folder and the command of a cell (method, split, seed, name, rate, flags)."""
    method, split, seed, name, rate, flags = cell
    # what run_peft.py would take by itself is named, so that a cell of other defaults is not taken for this one
    command = ["run_peft.py", "--peft_method", method, "--model_name_or_path", START, "--learning_rate", f"{rate:g}"]
    if METHODS[method].rank:
        command += ["--peft_rank", str(METHODS[method].rank)]
    command += ["--split", split, "--seed", str(seed), *flags, *shlex.split(args.extra)]
    return args.folder / f"{name}-{rate:g}-{split}-{seed}", command


def run(cell, args, threads):
    """Runs one cell, unless it is finished, and returns its numbers."""
    method, split, seed, name, rate, _ = cell
    folder, command = command_of(cell, args)
    values = run_script(command, folder, threads)
    print(name, split, seed, {key: values.get(key) for key in ("eval_mse", "test_mse")}, flush=True)
    row = {"method": method, "name": name, "split": split, "seed": seed, "command": as_text(command)}
    row |= {"bf16": is_in_bfloat16(folder)}
    return row | {key: values[key] for key in NUMBERS if key in values} | {"learning_rate": rate}


def is_in_bfloat16(folder):
    """Returns whether a run was trained in bfloat16, as where the processor gains by it; `None` if unknown."""
    if (folder / "arguments.json").exists():
        return json.loads((folder / "arguments.json").read_text())["bf16"]
    name = folder.resolve().relative_to(ROOT).as_posix() if folder.resolve().is_relative_to(ROOT) else None
    return read_records(RUNS).get(name, {}).get("machine", {}).get("bfloat16")


def is_wanted(cell, args):
    """Returns whether a cell is in the comparison: it is asked for, or finished."""
    asked = cell[0] in args.methods and cell[2] in args.seeds and not args.finished
    return asked or is_done(*command_of(cell, args))


def run_cells(cells, args):
    """Returns the numbers of the cells: those that are asked for, and of the others those that are finished."""

    cells = [cell for cell in cells if is_wanted(cell, args)]
    return run_all(lambda cell, threads: run(cell, args, threads), cells, args.jobs)


def tune(args):
    """Trains every method at its rates and writes validation errors; the test set is not read."""
    path = args.output.with_name("peft_tuning.json")
    before = json.loads(path.read_text()) if path.exists() else {"tuned": {}, "runs": []}
    before["tuned"] = {name: found for name, found in before["tuned"].items() if name not in args.methods}
    before["runs"] = [row for row in before["runs"] if row["method"] not in args.methods]
    runs, tuned = [], {}
    tried = {method: [] for method in args.methods}

    def train(rates, seeds):
        cells = [
            (method, "random", seed, f"tune-{method}", rate, TUNING)
            for method in rates
            for rate in rates[method]
            for seed in seeds
        ]
        runs.extend(run_cells(cells, args))

    def write(is_whole=False):
        values = {"tuned": before["tuned"] | tuned, "runs": before["runs"] + runs}
        # a whole one is what the comparison is to read, with however few runs: the grids grow as the errors fall
        place = path if is_whole else place_of(path, values, tried_in, args.folder)
        write_report(place, values, args.jobs)
        place.with_suffix(".md").write_text(tuning_to_markdown(values["tuned"]))
        return values

    first, *others = TUNING_SEEDS
    rates = {method: RATES[method] for method in args.methods}
    while rates:
        train(rates, [first])
        known = {(row["method"], row["learning_rate"]) for row in runs}
        for method in rates:  # what failed has been tried too, what --finished leaves out has not
            tried[method] += [rate for rate in rates[method] if not args.finished or (method, rate) in known]
        tuned = {m: found for m in args.methods if (found := best_rate(m, tried[m], runs, [first]))}
        write()
        following = {method: next_rate(method, tuned.get(method)) for method in rates}
        rates = {method: [rate] for method, rate in following.items() if rate not in (None, *rates[method])}
    last = {method: finalists(found) for method, found in tuned.items()}
    train(last, others)
    known = {(row["method"], row["learning_rate"], row["seed"]) for row in runs}
    for method, rates in last.items():
        if args.finished and any((method, rate, seed) not in known for rate in rates for seed in others):
            continue  # one finalist alone would win by being the only one
        tuned.pop(method)
        if found := best_rate(method, tried[method], runs, TUNING_SEEDS):
            tuned[method] = found
    judged = [method for method, found in tuned.items() if found["seeds"] == list(TUNING_SEEDS)]
    values = write(is_whole=set(judged) == set(args.methods))
    print(json.dumps(values["tuned"], indent=2))
    for method in args.methods:
        if method not in tuned:
            print(f"{method} has no rate at which all seeds have a validation error, and keeps its default.")


def tune_more(args):
    """Trains rsLoRA with other flags and writes validation errors; the test set is not read."""

    def train(names, seeds):
        chosen = {name: MORE[name] for name in names}
        cells = [
            ("rslora", "random", seed, f"more-{name}", rate, [*TUNING, *flags.split()])
            for name, (flags, rate) in chosen.items()
            for seed in seeds
        ]
        return run_cells(cells, args)

    def write(runs):
        rows = {}
        for run in runs:
            name = run["name"].removeprefix("more-")
            row = {"name": name, "flags": MORE[name][0], "learning_rate": run["learning_rate"], "validation_mse": []}
            rows.setdefault(name, row)["validation_mse"].append(run["eval_mse"])
        rows = sorted(rows.values(), key=lambda row: row["validation_mse"][0])
        values = {"seeds": TUNING_SEEDS, "rows": rows, "runs": runs}
        place = place_of(args.output.with_name("peft_more.json"), values, tried_in, args.folder)
        write_report(place, values, args.jobs)
        place.with_suffix(".md").write_text(more_to_markdown(rows))
        return rows

    first, *others = TUNING_SEEDS
    runs = train(MORE, [first])
    best = [row["name"] for row in write(runs)[:MOST_OF_MORE]]
    print(more_to_markdown(write(runs + train(best, others))))


def more_to_markdown(rows):
    """Returns the table of the README: one line a setting of rsLoRA, errors by seed, the best with the first first."""
    lines = ["| `rslora` with | rate | validation MSE |", "| --- | ---: | ---: |"]
    for row in rows:
        errors = ", ".join(f"{error:.3f}" for error in row["validation_mse"])
        lines.append(f"| `{row['flags']}` | {row['learning_rate']:g} | {errors} |")
    return "\n".join(lines) + "\n"


def best_rate(method, tried, runs, seeds):
    """Returns the rate of lowest mean validation error, and the errors; `None` if there is none.

    Of rates that are as good within `EQUAL` it is the lowest one, which is farther from diverging. A rate counts if it
    has a finite error for every one of the seeds.
    """
    errors = {rate: [] for rate in sorted(tried)}
    for row in sorted(runs, key=lambda row: row["seed"]):
        if row["method"] == method and row["learning_rate"] in errors:
            finite = np.isfinite(row["eval_mse"])
            errors[row["learning_rate"]].append((row["seed"], float(row["eval_mse"]) if finite else None))
    known = {}
    for rate, found in errors.items():
        of_seeds = [error for seed, error in found if seed in seeds and error is not None]
        if len(of_seeds) == len(seeds):
            known[rate] = float(np.mean(of_seeds))
    if not known:
        return None
    best = min(rate for rate in known if known[rate] <= min(known.values()) + EQUAL)
    tried = {rate: [error for _, error in found] for rate, found in errors.items()}
    return {"learning_rate": best, "validation_mse": known[best], "seeds": list(seeds), "tried": tried}


def cells_of(report):
    """Returns what the runs of a comparison are of, whatever their rates (`set[tuple]`)."""
    return {(run["name"], run["split"], run["seed"]) for run in report["runs"]}


def tried_in(report):
    """Returns what the runs of a tuning are of (`set[tuple]`)."""
    return {(run["name"], run["learning_rate"], run["seed"]) for run in report["runs"]}


def finalists(found):
    """Returns the two rates of lowest error with the first seed, which the other seeds try too."""
    errors = {rate: values[0] for rate, values in found["tried"].items() if values and values[0] is not None}
    return sorted(errors, key=errors.get)[:2]


def tuning_to_markdown(tuned):
    """Returns the table of the README: one line a method, errors by seed; the best one with the first seed first."""
    lines = ["| method | best rate | validation MSE | at the other rates |", "| --- | ---: | ---: | --- |"]

    def shown(errors):
        return ", ".join("none" if error is None else f"{error:.3f}" for error in errors) or "none"

    rows = []
    for method, found in tuned.items():
        errors = {float(rate): values for rate, values in found["tried"].items()}
        best = errors.pop(found["learning_rate"])
        others = "; ".join(f"{rate:g}: {shown(values)}" for rate, values in errors.items())
        rows.append((best[0], f"| {method} | {found['learning_rate']:g} | {shown(best)} | {others} |"))
    lines += [line for _, line in sorted(rows)]  # seeds have easier and harder splits
    return "\n".join(lines) + "\n"


def next_rate(method, found):
    """Returns the rate that is to be tried next, beyond the best one or beside it; `None` if there are enough."""
    if found is None:
        return None
    tried, best = list(found["tried"]), found["learning_rate"]
    step = RATES[method][1] / RATES[method][0]
    if best in (tried[0], tried[-1]):
        beyond = best * step if best == tried[-1] else best / step
        return float(f"{beyond:.1g}") if len(tried) < MOST_RATES else None
    if len(tried) >= LEAST_RATES:
        return None
    place, errors = tried.index(best), {rate: (values or [None])[0] for rate, values in found["tried"].items()}
    beside = [rate for rate in (tried[place - 1], tried[place + 1]) if errors[rate] is not None]
    return float(f"{(best * min(beside, key=errors.get)) ** 0.5:.2g}") if beside else None


def rates_of(args):
    """Returns the rate of every method: that of the tuning, where there was one, else the default of run_peft.py."""
    report = args.output.with_name("peft_tuning.json")
    tuned = json.loads(report.read_text())["tuned"] if report.exists() else {}
    return {name: tuned.get(name, {}).get("learning_rate", METHODS[name].learning_rate) for name in METHODS}


def winner_of(runs, seeds):
    """Returns the method of lowest mean validation error among those that train few parameters; `None` for none."""
    errors = {}
    for row in runs:
        share = 100 * row["trainable_parameters_without_head"] / row["base_parameters"]
        few = share <= MOST_PERCENT and row["method"] not in ("full", "head")
        if few and row["name"] in METHODS and row["split"] == "random" and row["seed"] in seeds:
            errors.setdefault(row["name"], []).append(row["eval_mse"])
    errors = {method: values for method, values in errors.items() if len(values) == len(seeds)}  # none that failed
    return min(errors, key=lambda method: np.mean(errors[method]), default=None)


def summarize(runs, winner=None):
    """Returns one row for each name and split: means, intervals, and how it compares with full fine-tuning, by pairs.

    `of_full` is the mean ratio of test errors to full fine-tuning of the same seed, of the rows at the paper's rate to
    full fine-tuning at that rate. Where a seed failed (`LEAST_R2`), errors and ratios are medians without an interval,
    since the mean would be that of two kinds of runs.
    """

    def full_of(name):
        return "paper-full" if name.startswith("paper-") else "full"

    rows = []
    every_full = {(r["name"], r["split"], r["seed"]): r["test_mse"] for r in runs if r["method"] == "full"}
    for name, split in dict.fromkeys((r["name"], r["split"]) for r in runs):
        here = [r for r in runs if (r["name"], r["split"]) == (name, split)]
        full = {key[1:]: error for key, error in every_full.items() if key[0] == full_of(name)}
        failed = sum(not r["test_r2"] >= LEAST_R2 for r in here)

        def middle(values, failed=failed):
            return (float(np.median(values)), None) if failed else interval(values)

        row = {"name": name, "method": here[0]["method"], "split": split, "n": len(here), "failed": failed}
        row |= {"winner": name == winner, "in_bfloat16": sum(r["bf16"] is True for r in here)}
        row["of_unknown_precision"] = sum(r["bf16"] is None for r in here)
        row["test_mse"], row["half_width"] = middle([r["test_mse"] for r in here])
        row |= {key: middle([r[key] for r in here])[0] for key in NUMBERS if key != "test_mse"}
        pairs = [(r["test_mse"], full[split, r["seed"]]) for r in here if (split, r["seed"]) in full]
        if pairs and name != full_of(name):
            row["minus_full"], row["minus_full_half_width"] = middle([ours - whole for ours, whole in pairs])
            row["of_full"], row["of_full_half_width"] = middle([ours / whole for ours, whole in pairs])
        paper = PAPER.get(row["method"]) if split == "random" else None
        row["paper_test_mse"], row["paper_train_mse"] = paper or (None, None)
        rows.append(row)

    def place(row):
        ratio = 1.0 if row["name"] == full_of(row["name"]) else row.get("of_full", float("inf"))
        return row["split"], row["name"].startswith("paper"), ratio

    return sorted(rows, key=place)


def to_markdown(rows):
    """Returns the tables of the README, one line a method and split: at the tuned rates, and at other ones."""
    header = ("method", "split", "seeds", "test MSE", "of full's", "validation MSE", "training MSE")
    header += ("trained parameters", "of the base", "weights on disk", "in bfloat16", "paper's test, training MSE")
    tables = []
    for tuned in (True, False):
        lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
        lines += [to_line(row) for row in rows if (row["name"] in METHODS) == tuned]
        tables += ["\n".join(lines) + "\n"] if len(lines) > 2 else []
    return "\n".join(tables)


def to_line(row):
    """Returns a row as a line of the table."""
    error = with_interval((row["test_mse"], row["half_width"]))
    ratio = with_interval((row["of_full"], row["of_full_half_width"])) if "of_full" in row else ""
    which = "the paper's rate" if row["name"].startswith("paper-") else "rate"
    title = row["name"] if row["name"] in METHODS else f"{row['method']}, {which} {row['learning_rate']:g}"
    cells = (f"**{title}**" if row["winner"] else title, row["split"])
    cells += (f"{row['n']}, {row['failed']} failed" if row["failed"] else row["n"], error, ratio)
    cells += (f"{row['eval_mse']:.3f}", f"{row['final_train_mse']:.3f}", f"{row['trainable_parameters']:,.0f}")
    cells += (f"{row['trainable_percent']:.2f} %", f"{row['checkpoint_bytes'] / 1e3:,.0f} kB")
    paper = ", ".join(str(number) for number in (row["paper_test_mse"], row["paper_train_mse"]) if number)
    cells += ("not known" if row["of_unknown_precision"] else f"{row['in_bfloat16']} of {row['n']}", paper)
    return "| " + " | ".join(map(str, cells)) + " |"


HIGHEST_RATIO = 1.8  # of the plot; what one seed does that diverged would hide all others


def plot(rows, path):
    """Draws test errors, divided by those of full fine-tuning on the same splits, against trained parameters.

    Methods that train as many stand beside one another; the best is first in the legend. The second axis has the
    errors themselves, for splits as hard as those of full fine-tuning are on average.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    shown = [row for row in rows if row["split"] == "random" and row["name"] in METHODS and "of_full" in row]
    places, last = {}, 0.0
    for row in sorted(shown, key=lambda row: row["trainable_parameters"]):
        last = places[row["name"]] = max(row["trainable_parameters"], 1.13 * last)
    for number, row in enumerate(shown):
        ratio, half = row["of_full"], row.get("of_full_half_width")
        text = f"{row['name']}, {row['trainable_parameters']:,.0f}"
        text += f", {row['failed']} of {row['n']} failed" if row["failed"] else ""
        beyond = ratio > HIGHEST_RATIO
        axes.errorbar(places[row["name"]], min(ratio, HIGHEST_RATIO), yerr=None if beyond else half, capsize=3,
                      fmt="^" if beyond else "osDvP*X"[number % 7], color=f"C{number % 10}",
                      label=f"{text} ({ratio:.2f})" if beyond else text)  # fmt: skip
    axes.axhline(1.0, color="0.5", linewidth=1, linestyle="--", label="full fine-tuning")
    axes.set(xscale="log", ylim=(0.8, HIGHEST_RATIO + 0.05))
    axes.set_xlabel("trained parameters, head included (equal numbers side by side)")
    axes.set_ylabel("test mean squared error, times that of full fine-tuning")
    if whole := [row["test_mse"] for row in rows if (row["name"], row["split"]) == ("full", "random")]:
        errors = axes.secondary_yaxis("right", functions=(lambda x: x * whole[0], lambda x: x / whole[0]))
        errors.set_ylabel(f"the same in squared logD units, full: {whole[0]:.3f}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main():
    parser = study_parser(__doc__, "peft", "peft_comparison.json", "run_peft.py")
    parser.add_argument("--tune", action="store_true", help="find learning rates on validation, and compare nothing")
    parser.add_argument("--tune_more", action="store_true", help="try rsLoRA with other flags, and compare nothing")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--finished", action="store_true", help="train nothing; the table of what is finished")
    args = parser.parse_args()
    if args.tune:
        return tune(args)
    if args.tune_more:
        return tune_more(args)
    rates = rates_of(args)

    def cells_of(methods, split):
        return [(method, split, seed, method, rates[method], []) for method in methods for seed in SEEDS]

    cells = cells_of(METHODS, "random")
    cells += [(method, "random", seed, f"paper-{method}", PAPER_RATE, []) for method in PAPER for seed in SEEDS[:3]]
    is_whole = all(is_wanted(cell, args) for cell in cells if cell[3] in METHODS)  # the winner is chosen by these
    runs = run_cells(cells, args) + replaced_runs(rates, args)
    winner = winner_of(runs, SEEDS) if is_whole else None
    if winner is None or not args.finished:
        report(winner, runs, args)  # whatever becomes of the rest
    if winner is None:
        return print("No winner yet: that takes a comparison of all methods.")
    report(winner, runs + run_cells(cells_of(("full", winner), "scaffold"), args), args)


def replaced_runs(rates, args):
    """Returns the finished runs at rates that are no longer those of the methods: a tuning had chosen them before."""
    runs = []
    for method in METHODS:
        notes = args.folder.glob(f"{method}-[0-9]*-random-*.command")
        tried = {float(path.name.removeprefix(f"{method}-").split("-random-")[0]) for path in notes}
        for rate in sorted(tried - {rates[method]}):
            cells = [(method, "random", seed, method, rate, []) for seed in SEEDS]
            done = [run(cell, args, threads=None) for cell in cells if is_done(*command_of(cell, args))]
            runs += [row | {"name": f"before-{method}-{rate:g}"} for row in done]
    return runs


def report(winner, runs, args):
    """Writes the results as JSON, CSV, Markdown and a plot."""
    rows = summarize(runs, winner)
    values = {"winner": winner, "paper": PAPER, "rows": rows, "runs": runs}
    output = place_of(args.output, values, cells_of, args.folder)
    write_report(output, values, args.jobs)
    output.with_suffix(".md").write_text(to_markdown(rows))
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, output.with_suffix(".png"))
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
    sys.exit(bool(FAILED))
