"""What run_influence.py reads and writes: external molecules, the selection and its controls, tables and plots.

    python -c "from utils_influence import *; print(losses_table([0.5, 0.4]))"

The mathematics is in run_influence.py.
"""

import logging

import numpy as np
import pandas as pd

from arguments import InputError
from utils_molecules import prepare_molecules, read_table, split_groups, split_hash, write_csv, write_json
from utils_report import save_figure


PAPER_LOSSES = (0.581, 0.318, 0.198, 0.105, 0.071, 0.048, 0.046)  # evaluation loss by epoch, the paper's Table 2

logger = logging.getLogger("molformer.influence")


# --------------------------------------------------------------------------------------------- molecules and selection


def take_pool(molecules, size, noise, seed):
    """Takes training molecules out as a pool in which some labels are wrong, so that the truth is known.

    Args:
        molecules (`pandas.DataFrame`): of `load_molecules`.
        noise (`float`): share of the pool whose labels change places.
    Returns:
        the other molecules; and the pool with the further column `corrupted` (both `pandas.DataFrame`).
    Raises:
        InputError: if less than half of the training molecules would be left.
    """
    train = np.flatnonzero(molecules["split"] == "train")
    if size > len(train) / 2:
        raise InputError(
            f"--pool_size {size} would take more than half of the {len(train)} training molecules. Lower it."
        )
    taken = train[split_groups(molecules["group"].to_numpy()[train], size, seed)]
    pool = molecules.iloc[taken].reset_index(drop=True)
    wrong = np.random.default_rng(seed).permutation(len(pool))[: round(noise * len(pool))]
    labels = pool["label"].to_numpy().copy()
    labels[wrong] = labels[np.roll(wrong, 1)]
    pool["corrupted"] = labels != pool["label"]
    pool["label"] = labels
    return molecules.drop(index=molecules.index[taken]).reset_index(drop=True), pool


def load_external(tokenizer, data_args, influence_args, molecules):
    """Reads external molecules, and leaves out those that validation and test molecules are, stereo aside.

    Returns:
        those that can be scored; and all that were left out, with the columns `row`, `smiles` and `reason`.
    Raises:
        InputError: if file, columns, labels or molecules cannot be used, or none is left.
    """
    path = influence_args.external_file
    label = influence_args.external_label_column
    columns = (influence_args.external_smiles_column, None if label is None else [label])
    table = read_table(path, *columns, prefix="external_")
    external, dropped = prepare_molecules(table, tokenizer, data_args, path)
    excluded = [dropped[["row", "smiles", "reason"]]]
    for part in ("validation", "test"):
        known = external["group"].isin(set(molecules.loc[molecules["split"] == part, "group"]))
        excluded.append(external.loc[known, ["row", "smiles"]].assign(reason=f"is a {part} molecule"))
        external = external[~known]
    excluded = pd.concat(excluded, ignore_index=True).sort_values("row", kind="stable")
    if len(excluded) > len(dropped):
        logger.warning(
            "%d of %d molecules in %s are, stereo aside, validation or test molecules, and are left out: "
            "influence_scores.csv lists them", len(excluded) - len(dropped), len(table), path,
        )  # fmt: skip
    if not len(external):
        raise InputError(f"No molecule of {path} is left: all are validation or test molecules. Give others.")
    return external.reset_index(drop=True), excluded


def select_molecules(table, influence_args):
    """Returns a boolean array: which molecules are selected, from their `score`."""
    scores = table["score"].to_numpy()
    if influence_args.select in ("positive", "threshold"):
        return scores > (influence_args.threshold if influence_args.select == "threshold" else 0.0)
    count = influence_args.num_selected or max(1, len(table) // 2)
    if influence_args.select == "fraction":
        count = round(influence_args.fraction * len(table))
    return best(scores, count)


def best(values, count):
    """Returns a boolean array: which are the `count` largest values, the earlier one of two equal ones."""
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-np.asarray(values), kind="stable")[:count]] = True
    return chosen


def select_control(name, table, seed):
    """Returns a boolean array: which molecules a control takes, as many as are `selected`."""
    if name == "selected":
        return table["selected"].to_numpy()
    count = int(table["selected"].sum())
    if name in ("none", "all"):
        return np.full(len(table), name == "all")
    values = {
        "random": lambda: np.random.default_rng(seed).permutation(len(table)),
        "bottom": lambda: -table["score"],
        "smallest_loss": lambda: -table["loss"],
        "gradient_dot": lambda: table["gradient_dot"],
    }
    return best(np.asarray(values[name]()), count)


def detection(table):
    """Returns how well each score finds the molecules with wrong labels: areas under the ROC curve, 0.5 for chance."""
    from sklearn.metrics import roc_auc_score

    if "corrupted" not in table or table["corrupted"].nunique() < 2:
        return {}
    suspicion = {"influence": -table["score"], "gradient_dot": -table["gradient_dot"], "loss": table["loss"]}
    return {f"auc_{name}": float(roc_auc_score(table["corrupted"], values)) for name, values in suspicion.items()}


# ------------------------------------------------------------------------------------------------------------- reports


def write_influence(output_dir, parts, table, excluded, report):
    """Writes scores, report, merged training file and plots of a scoring into its output folder."""
    write_scores(output_dir, table, excluded)
    write_json(report, output_dir / "influence.json")
    write_merged(output_dir, parts, table[table["selected"]])
    plot_scores(table, output_dir / "influence_scores.png")
    if report.get("trace"):
        plot_convergence(report, output_dir / "influence_convergence.png")
    shown = {name: value for name, value in report.items() if name.startswith(("auc", "agreement")) and value}
    text = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
    logger.info("%d of %d molecules selected. %s", report["selected"], len(table), text)


def write_scores(output_dir, table, excluded):
    """Writes influence_scores.csv: every external molecule, those that were left out at the end with their reason."""
    names = ("row", "smiles", "label", "prediction", "loss", "score", "score_sd", "rank", "gradient_dot", "selected")
    names += ("corrupted",)
    scores = table[[name for name in names if name in table]].assign(excluded="")
    left_out = excluded.rename(columns={"reason": "excluded"}).assign(selected=False)
    scores = pd.concat([scores, left_out], ignore_index=True)
    scores["rank"] = scores["rank"].astype("Int64")  # those that were left out have none
    write_csv(scores.rename(columns={"smiles": "SMILES"}), output_dir / "influence_scores.csv")


def add_molecules(parts, added):
    """Returns the parts with molecules added to the training part."""
    return {**parts, "train": pd.concat([parts["train"], added.assign(split="train")], ignore_index=True)}


def merge(parts, added):
    """Returns the parts with molecules added to the training part, and the hash of the split that this makes."""
    merged = add_molecules(parts, added)
    everything = pd.concat(merged.values(), ignore_index=True)
    return merged, split_hash(everything, everything["split"])


def write_merged(output_dir, parts, selected):
    """Writes the training molecules with the selected ones, and the other parts, as files for run_regression.py."""
    files = {"train": "merged_train.csv", "validation": "validation.csv", "test": "test.csv"}
    for name, rows in add_molecules(parts, selected).items():
        write_csv(rows.rename(columns={"smiles": "SMILES"})[["SMILES", "label"]], output_dir / files[name])


def plot_scores(table, path):
    """Draws how the scores are distributed, and against the loss; molecules with wrong labels in another color."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    corrupted = table.get("corrupted", pd.Series(False, index=table.index)).to_numpy()
    groups = {"wrong label": corrupted, "right label": ~corrupted} if corrupted.any() else {"external": ~corrupted}
    bins = np.histogram_bin_edges(table["score"], bins=40)
    for color, (name, rows) in zip(("tab:red", "tab:blue"), groups.items(), strict=False):
        color = "tab:blue" if len(groups) == 1 else color
        left.hist(table["score"][rows], bins=bins, alpha=0.6, color=color, label=f"{name} ({rows.sum()})")
        right.scatter(table["loss"][rows], table["score"][rows], s=12, alpha=0.6, color=color, linewidths=0)
    lowest = table["score"][table["selected"]].min() if table["selected"].any() else None
    if lowest is not None:
        left.axvline(lowest, color="0.3", linewidth=1, linestyle="--", label="lowest selected")
        right.axhline(lowest, color="0.3", linewidth=1, linestyle="--")
    left.set(xlabel="influence score (positive: helpful)", ylabel="molecules")
    right.set(xlabel="loss of the molecule (standardized)", ylabel="influence score")
    right.set_xscale("symlog", linthresh=0.1)
    right.set_xlim(left=0)
    left.legend(frameon=False)
    save_figure(figure, path)


def plot_convergence(report, path):
    """Draws norm and residual of the inverse-Hessian-vector product by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    trace = pd.DataFrame(report["trace"])
    if "repeat" not in trace:
        trace["repeat"] = 0
    for number, rows in trace.groupby("repeat"):
        axes.plot(rows["step"], rows["residual"], marker="o", markersize=3, color="tab:blue", alpha=0.7,
                  label="relative residual" if number == 0 else None)  # fmt: skip
        if "norm" in rows:
            axes.plot(rows["step"], rows["norm"] / trace["norm"].max(), color="tab:orange", alpha=0.7,
                      label="norm, relative to the largest" if number == 0 else None)  # fmt: skip
    axes.set(xlabel="step", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_selection(results, path, label_name):
    """Draws the test error of the models that were fine-tuned with the selected molecules, and with the controls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.2 + 0.4 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    names = list(results)[::-1]
    values = [results[name]["test_mse"] for name in names]
    axes.scatter(values, range(len(names)), color=["tab:red" if n == "selected" else "tab:blue" for n in names])
    axes.set_yticks(range(len(names)), [f"{name} (+{results[name]['added']})" for name in names])
    axes.set(xlabel=f"test mean squared error of {label_name}", ylim=(-0.5, len(names) - 0.5))
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def results_table(results, leakage=False):
    """Returns a text table of the fine-tuned models, one line each; `leakage` says that the test set has chosen."""
    lines = ["Chosen by the loss of the test molecules: their numbers are optimistic."] if leakage else []
    lines += [f"{'added':<14} {'molecules':>9} {'validation MSE':>15} {'test MSE':>10} {'MAE':>8} {'R²':>8}"]
    for name, values in results.items():
        numbers = [values.get(key) for key in ("validation_mse", "test_mse", "test_mae", "test_r2")]
        texts = [f"{number:.4f}" if number is not None else "" for number in numbers]
        lines.append(f"{name:<14} {values['added']:>9} {texts[0]:>15} {texts[1]:>10} {texts[2]:>8} {texts[3]:>8}")
    return "\n".join(lines)


def losses_table(losses):
    """Returns a text table of evaluation losses by epoch after the selection, beside the paper's Table 2."""
    lines = [
        "Evaluation loss after the selection (standardized labels; the paper's is of molecules seen in training):"
    ]
    lines.append(f"{'epoch':<10}" + " ".join(f"{epoch:>6}" for epoch in range(1, max(len(losses), 7) + 1)))
    lines.append(f"{'ours':<10}" + " ".join(f"{loss:6.3f}" for loss in losses))
    lines.append(f"{'paper':<10}" + " ".join(f"{loss:6.3f}" for loss in PAPER_LOSSES))
    return "\n".join(lines)
