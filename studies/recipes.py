"""Which fine-tuning of the embedded checkpoint is best, on validation: rates, epochs, random SMILES, adaptation.

    python studies/recipes.py --jobs 2                    # hours; finished runs are not repeated
    python studies/recipes.py --recipes reference "15 epochs" --seeds 0 1
    python studies/recipes.py --finished                  # the table of the runs that are there; trains nothing

Every recipe trains run_regression.py on the same splits and seeds, with 20 % of the training side held out, which
judges the model of the last epoch; the test set is not read (of each seed's own split: half of it are validation
molecules of other seeds). Of an adaptation by run_mlm.py the same molecules, not their labels, choose the epoch. With
--recipes or --seeds the others are what is finished of them. Writes results/recipes.json (.md): flags, validation MSE
of every seed, and the paired difference to the reference with its 95 % interval. A run whose predictions are means
over random SMILES is two rows: the other one is of the same model's predictions from the molecules' own SMILES.
"""

import shlex
import statistics
import sys

from common import FAILED, as_text, interval, place_of, run_all, run_script, study_parser, with_interval, write_report
from run_once import is_done


START = "models/molformer-mini"
SCRATCH = ["--config_name", "configs/molformer-mini.json", "--pooling", "mean"]
SEEDS = (0, 1, 2)
RATE = ["--learning_rate", "6e-4"]  # of all recipes that name no other one
MEAN = ", mean of 11"  # in the name of a recipe: predictions are means over a molecule's own SMILES and 10 random ones
DESCRIPTORS = ["--head_descriptors", "all"]
RECIPES = {
    "reference": [],
    # each differs from the reference in one thing
    "float32": ["--bf16", "false"],
    "rate 1.5e-4": ["--learning_rate", "1.5e-4"],
    "rate 3e-4": ["--learning_rate", "3e-4"],
    "rate 1.2e-3": ["--learning_rate", "1.2e-3"],
    "head rate 3e-3": ["--head_learning_rate", "3e-3"],
    "15 epochs": ["--num_train_epochs", "15"],
    "layer rates 0.8": ["--layer_rate_decay", "0.8"],
    "15 epochs, layer rates 0.8": ["--num_train_epochs", "15", "--layer_rate_decay", "0.8"],
    "descriptors": DESCRIPTORS,
    "15 epochs, layer rates 0.8, descriptors": [
        *"--num_train_epochs 15 --layer_rate_decay 0.8".split(),
        *DESCRIPTORS,
    ],
    "state of <bos>": ["--pooling", "cls"],
    "published head": ["--regression_head", "molformer"],
    "redrawn features": ["--redraw_features", "true"],
    "dropout 0.1": ["--hidden_dropout_prob", "0.1", "--embedding_dropout_prob", "0.1"],
    "batch 32": ["--per_device_train_batch_size", "32"],
    "weight decay 0.01": ["--weight_decay", "0.01"],
    "1 random SMILES, mean of 11": ["--augment_smiles", "1", "--predict_augment", "10"],
    "3 random SMILES, mean of 11": ["--augment_smiles", "3", "--predict_augment", "10"],
    "3 random SMILES, mean of 11, layer rates 0.8": (
        "--augment_smiles 3 --predict_augment 10 --layer_rate_decay 0.8".split()
    ),
    "3 random SMILES, mean of 11, layer rates 0.8, descriptors": [
        *"--augment_smiles 3 --predict_augment 10 --layer_rate_decay 0.8".split(),
        *DESCRIPTORS,
    ],
    "4 epochs, 3 random SMILES, mean of 11, layer rates 0.8, descriptors": [
        *"--num_train_epochs 4 --augment_smiles 3 --predict_augment 10 --layer_rate_decay 0.8".split(),
        *DESCRIPTORS,
    ],
    "4 epochs, 7 random SMILES, mean of 11, layer rates 0.8, descriptors": [
        *"--num_train_epochs 4 --augment_smiles 7 --predict_augment 10 --layer_rate_decay 0.8".split(),
        *DESCRIPTORS,
    ],
    "15 epochs, 1 random SMILES, mean of 11": "--num_train_epochs 15 --augment_smiles 1 --predict_augment 10".split(),
    "from scratch": SCRATCH,
    "from scratch, rate 3e-4": [*SCRATCH, "--learning_rate", "3e-4"],
    "from scratch, rate 1e-3": [*SCRATCH, "--learning_rate", "1e-3"],
    "adapted by mlm": ["--start", "mlm"],
    "adapted by mtr": ["--start", "mtr"],
    "adapted by mtr+atoms": ["--start", "mtr+atoms"],
    "adapted by mlm+mtr+atoms": ["--start", "mlm+mtr+atoms"],
}


def without_mean(flags):
    """Returns flags without --predict_augment and its value."""
    place = flags.index("--predict_augment")
    return flags[:place] + flags[place + 2 :]


def trainings_of(cell, args):
    """Returns the trainings of a recipe with one seed, in their order: command and folder of each."""
    name, seed = cell
    flags = [*RECIPES[name], *shlex.split(args.extra)]
    start, split = START, ["--validation_fraction", "0.2", "--seed", str(seed)]
    trainings = []
    if flags[:1] == ["--start"]:  # masked language modeling of the training molecules first
        objective, flags = flags[1], flags[2:]
        start = args.folder / f"adapted-{objective.replace('+', '-')}-{seed}"
        trainings.append((["run_mlm.py", "--model_name_or_path", START, "--objective", objective, *split], start))
    model = [] if flags[:1] == SCRATCH[:1] else ["--model_name_or_path", str(start)]
    # the last epoch counts: the best one would be chosen by the molecules that are to judge
    last = ["--load_best_model_at_end", "false"]
    rate = [] if "--learning_rate" in flags else RATE
    command = ["run_regression.py", *model, "--do_train", "--do_eval", *split, *last, *rate, *flags]
    folder = args.folder / f"{''.join(c if c.isalnum() else '-' for c in name)}-{seed}"
    return [*trainings, (command, folder)]


def run(cell, args, threads):
    """Trains one recipe with one seed, unless it is finished, and returns its row."""
    name, seed = cell
    *first, last = trainings_of(cell, args)
    for command, folder in first:
        run_script(command, folder, threads)
    values = run_script(*last, threads)
    error = values["validation_mse" if "validation_mse" in values else "eval_mse"]  # the first: over random SMILES
    print(name, seed, round(error, 4), flush=True)
    commands = [as_text([*command, "--output_dir", str(folder)]) for command, folder in first]
    row = {"name": name, "seed": seed, "validation_mse": error, "minutes": values["train_runtime"] / 60,
           "command": " && ".join([*commands, as_text(last[0])])}  # fmt: skip
    return row | ({"own_smiles_mse": values["eval_mse"]} if {"validation_mse", "eval_mse"} <= values.keys() else {})


def summarize(runs):
    """Returns a row for each recipe: errors by seed, mean, paired difference to the reference; the best first."""
    plain = [
        row | {
            "name": row["name"].replace(MEAN, ""),
            "validation_mse": row["own_smiles_mse"],
            "command": shlex.join(without_mean(shlex.split(row["command"]))),
        }
        for row in runs if "own_smiles_mse" in row
    ]  # fmt: skip
    errors, runs = {}, [*runs, *plain]
    for row in runs:
        errors.setdefault(row["name"], {})[row["seed"]] = row["validation_mse"]
    rows = []
    for name, values in errors.items():
        row = {"name": name, "validation_mse": values, "mean": statistics.mean(values.values())}
        pairs = [
            value - errors["reference"][seed] for seed, value in values.items() if seed in errors.get("reference", {})
        ]
        if name != "reference" and pairs:
            row["minus_reference"] = interval(pairs)
        row["minutes"] = statistics.mean(r["minutes"] for r in runs if r["name"] == name)
        row["command"] = next(r["command"] for r in runs if r["name"] == name)
        rows.append(row)
    # by the pairs: seeds of their own make means higher or lower
    return sorted(rows, key=lambda row: row.get("minus_reference", [0.0])[0])


def cells_of(report):
    """Returns what the runs of a report are of: row and seed (`set[tuple]`)."""
    return {(row["name"], str(seed)) for row in report["rows"] for seed in row["validation_mse"]}


def to_markdown(rows):
    """Returns the table of the README: one line a recipe."""
    lines = ["| recipe | seeds | validation MSE | minus reference | minutes |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        paired = with_interval(row["minus_reference"], signed=True) if "minus_reference" in row else ""
        cells = (row["name"], str(len(row["validation_mse"])), f"{row['mean']:.3f}", paired, f"{row['minutes']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = study_parser(__doc__, "recipes", "recipes.json", "run_regression.py")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--finished", action="store_true", help="train nothing; the table of what is finished")
    args = parser.parse_args()
    asked = [] if args.finished else [(name, seed) for seed in args.seeds for name in {"reference", *args.recipes}]

    def is_wanted(cell):
        return cell in asked or all(is_done(folder, command) for command, folder in trainings_of(cell, args))

    ends = {path.stem.rsplit("-", 1)[-1] for path in args.folder.glob("*.command")}
    kept = {int(end) for end in ends if end.isdigit()}
    cells = [(name, seed) for seed in sorted({*SEEDS, *args.seeds, *kept}) for name in RECIPES]
    rows = summarize(run_all(lambda cell, threads: run(cell, args, threads), filter(is_wanted, cells), args.jobs))
    if not rows:
        raise SystemExit(f"There is no finished run in {args.folder}.")
    output = place_of(args.output, {"rows": rows}, cells_of, args.folder)
    write_report(output, {"rows": rows}, args.jobs)
    output.with_suffix(".md").write_text(to_markdown(rows))
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
    sys.exit(bool(FAILED))
