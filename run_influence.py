"""Scores external molecules by influence functions, adds the helpful ones to the training set and fine-tunes again.

    python run_influence.py                                              # a pool of 300 molecules, 30 % mislabeled
    python run_influence.py --external_file my.csv --output_dir outputs/mine
    python run_influence.py --do_predict --model_name_or_path outputs/influence/finetune-none --ihvp cg \\
      --output_dir outputs/exact                                         # scores alone, of a fine-tuned model
    accelerate launch run_influence.py

The score of a molecule is positive if learning it lowers the loss of the validation molecules. Writes to --output_dir
influence_scores.csv (one line a molecule), influence.json (how they were computed, and how far they can be trusted),
merged_train.csv with the selected molecules and the files that go with it, the models that were fine-tuned with them
and with the controls, all_results.json and plots.

The mathematics, with its sources, is in utils_influence.py.
"""

import contextlib
import ctypes
import gc
import hashlib
import json
import logging
import math
import shlex
import time
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from arguments import (
    EMBEDDED_CHECKPOINT,
    EMBEDDED_DATA,
    DataTrainingArguments,
    InputError,
    ModelArguments,
    TrainingArguments,
    as_flags,
    check_positive,
)
from utils_influence import (
    MOST_IN_GROUP,
    MoleculeProblem,
    choose_parameters,
    full_float32,
    gradients_of_halves,
    inverse_curvature,
    order_by_group_influence,
    score_molecules,
    settings_key,
)
from utils_molecules import (
    LABEL_COLUMNS,
    SMILES_COLUMNS,
    default_descriptors,
    find_column,
    load_molecules,
    prepare_molecules,
    read_header,
    read_table,
    split_groups,
    split_hash,
    write_csv,
)
from utils_report import finish_run, name_in_plot, save_figure, shown_path
from utils_runs import (
    MERGED_FILES,
    TRAINING_SETTINGS,
    belongs_to_run,
    paths_of_run,
    read_json,
    run_script,
    setup_run,
    write_json,
)


# chunks of 16 molecules of like length: in larger ones a batch of 32 is a third padding
DEFAULTS = {"output_dir": "outputs/influence", "per_device_eval_batch_size": 16}
CONTROLS = ("none", "all", "random", "bottom", "smallest_loss", "gradient_dot", "score", "group_influence")
CONTROLS += ("right_label",)
STATE_FILE = "influence_state.safetensors"
MODEL_FILES = ("model.safetensors", "adapter_model.safetensors")
KIND = ("pooling", "regression_head", "head_descriptors", "redraw_features")
SIZES = ("hidden_size", "num_hidden_layers")
ONLY_LISSA = ("scale", "num_repeats", "tail_fraction", "hessian_batch_size")  # arguments
ONLY_SOLVERS = ("curvature", "damping", "relative_damping", "recursion_depth", "tolerance")  # of lissa and cg
NO_FORWARD_MODE = ("shira",)  # adapters whose sparse tensors have none; merged, the model has
PAPER_LOSSES = (0.581, 0.318, 0.198, 0.105, 0.071, 0.048, 0.046)  # evaluation loss by epoch, the paper's Table 2
SIGN = "positive = learning the molecule lowers the loss"
CHANGE = "; predicted change of the loss: -score / training molecules"  # where the curvature is in it

logger = logging.getLogger("molformer.influence")


@dataclass
class InfluenceArguments:
    """Which molecules are scored, how, which of them are learned, and what that is compared with."""

    _argument_group_name = "influence"

    external_file: str | None = field(
        default=None,
        metadata={
            "help": "CSV or TSV of external molecules with SMILES and labels. Default: a pool of training molecules, "
            "some of them with wrong labels, so that the truth is known."
        },
    )
    external_smiles_column: str | None = field(
        default=None, metadata={"help": "Its column of SMILES. Default: as in the training file, or found."}
    )
    external_label_column: str | None = field(
        default=None, metadata={"help": "Its column of labels. Default: as in the training file, or found."}
    )
    pool_size: int | None = field(
        default=None,
        metadata={"help": "Training molecules taken out as a pool, without --external_file. Default: 300."},
    )
    pool_noise: float | None = field(
        default=None, metadata={"help": "Share of the pool whose labels are permuted. Default: 0.3."}
    )
    pretrained_model: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint from which models are fine-tuned, if --model_name_or_path is fine-tuned already. "
            "Default: the base of an adapter, else models/molformer-mini, if it is of the same size."
        },
    )
    ihvp: str = field(
        default="lissa",
        metadata={
            "choices": ["lissa", "cg", "identity"],
            "help": "How the inverse curvature is applied: stochastic, by conjugate gradients on all training "
            "molecules (slower, exact), or not at all (the dot product of gradients).",
        },
    )
    curvature: str = field(
        default="ggn",
        metadata={"choices": ["ggn", "hessian"], "help": "Generalized Gauss-Newton matrix, or Hessian."},
    )
    damping: float | None = field(
        default=None, metadata={"help": "What is added to the curvature. Default: by --relative_damping."}
    )
    relative_damping: float | None = field(
        default=None,
        metadata={"help": "Damping as a share of the largest eigenvalue of the curvature. Default: 0.03."},
    )
    scale: str = field(
        default="auto",
        metadata={
            "help": "What LiSSA divides the curvature by; auto: 1.5 times the largest eigenvalue of a batch, and the "
            "damping."
        },
    )
    recursion_depth: int = field(default=200, metadata={"help": "Steps of one LiSSA run, or most steps of cg."})
    num_repeats: int = field(default=2, metadata={"help": "LiSSA runs with other batches; scores are their mean."})
    tail_fraction: float = field(
        default=0.5, metadata={"help": "Share of the last LiSSA iterates that are averaged; 0 takes the last one."}
    )
    hessian_batch_size: int = field(default=32, metadata={"help": "Training molecules of a LiSSA step, all devices."})
    tolerance: float | None = field(
        default=None,
        metadata={"help": "Relative residual up to which it counts as solved. Default: 1e-4 for cg, 0.3 for lissa."},
    )
    score_mode: str = field(
        default="jvp",
        metadata={
            "choices": ["jvp", "per_sample_gradient"],
            "help": "Scores of a batch by one forward-mode product, or molecule by molecule (the reference).",
        },
    )
    influence_params: str = field(
        default="all",
        metadata={"help": "Parameters that the loss depends on: all, head, last_N (layers and head), or a pattern."},
    )
    score_split: str = field(
        default="validation",
        metadata={
            "choices": ["validation", "test"],
            "help": "Whose loss is to fall. test is the paper's way, and leaks: its test numbers are optimistic.",
        },
    )
    select: str = field(
        default="top_k",
        metadata={
            "choices": ["top_k", "positive", "threshold", "fraction"],
            "help": "Select --num_selected, all of positive score, all above --threshold, or the best --fraction.",
        },
    )
    rank_by: str = field(
        default="score",
        metadata={
            "choices": ["score", "group_influence"],
            "help": "What selects: the influence score of each molecule, or what it adds to those that were selected "
            "before it, with what its own error costs (--ihvp identity spares the inverse curvature of the scores).",
        },
    )
    num_selected: int | None = field(default=None, metadata={"help": "For top_k. Default: half of the molecules."})
    threshold: float | None = field(
        default=None, metadata={"help": "For threshold: the score that is needed. Default: 0."}
    )
    fraction: float | None = field(
        default=None, metadata={"help": "For fraction: the share that is selected. Default: 0.5."}
    )
    controls: list[str] = field(
        default_factory=lambda: ["none", "all", "random"],
        metadata={
            "help": "What the selection is compared with: none, all, and as many molecules: random, bottom (of lowest "
            "score), smallest_loss, gradient_dot, score or group_influence (the one that --rank_by is not), "
            "right_label (of a pool, random ones whose labels are right, as far as they last)."
        },
    )

    @property
    def with_group_influence(self):
        """Whether it is needed."""
        return "group_influence" in (self.rank_by, *self.controls)

    def check_selection(self, external):
        """Raises `InputError` if molecules are fewer than are to be selected, or too many for group influence."""
        if self.select == "top_k" and (self.num_selected or 0) > len(external):
            raise InputError(
                f"--num_selected {self.num_selected} is more than the {len(external)} molecules to choose from."
            )
        if self.with_group_influence and len(external) > MOST_IN_GROUP:
            raise InputError(
                f"group_influence is for up to {MOST_IN_GROUP} molecules, and these are {len(external)}. Give a part "
                "of them, such as those of the best scores of a run without it."
            )

    def __post_init__(self):
        pool, external = ("pool_size", "pool_noise"), ("external_smiles_column", "external_label_column")
        for name in external if self.external_file is None else pool:
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} goes {'without' if name in pool else 'with'} --external_file.")
        modes = {"num_selected": "top_k", "threshold": "threshold", "fraction": "fraction"}
        for name, mode in modes.items():
            if getattr(self, name) is not None and self.select != mode:
                raise ValueError(f"--{name} goes with --select {mode}, not with --select {self.select}.")
        if self.damping is not None and self.relative_damping is not None:
            raise ValueError("--damping and --relative_damping: give one of them.")
        if "right_label" in self.controls and self.external_file is not None:
            raise ValueError(
                "--controls right_label goes without --external_file: of those no label is known to be right."
            )
        if self.ihvp == "identity" and "gradient_dot" in self.controls:
            raise ValueError("--controls gradient_dot is the score of --ihvp identity. Leave it out.")
        if self.rank_by in self.controls:
            raise ValueError(f"--controls {self.rank_by} is what --rank_by selects. Leave it out.")
        unread = {"lissa": (), "cg": ONLY_LISSA, "identity": (*ONLY_LISSA, *ONLY_SOLVERS)}[self.ihvp]
        for name, default in ((f.name, f.default) for f in fields(self) if f.name in unread):
            if getattr(self, name) != default:
                raise ValueError(f"--{name} does nothing with --ihvp {self.ihvp}. Leave it out.")
        defaults = {"pool_size": 300, "pool_noise": 0.3, "relative_damping": 0.03, "threshold": 0.0, "fraction": 0.5}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not math.isfinite(self.threshold):
            raise ValueError(f"--threshold is {self.threshold}; give a number.")
        if self.fraction == 0:
            raise ValueError("--fraction is 0: nothing would be selected. Give more.")
        check_positive(self, "pool_size", "num_repeats", "hessian_batch_size", "num_selected")
        check_positive(self, "damping", "relative_damping", "tolerance")
        if self.tolerance is not None and self.tolerance >= 1:
            raise ValueError(f"--tolerance is {self.tolerance}; give a number below 1, the residual of no solution.")
        for name in ("pool_noise", "tail_fraction", "fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; give a number from 0 to 1.")
        if self.recursion_depth < 0 or (self.ihvp == "cg" and self.recursion_depth < 1):
            raise ValueError(f"--recursion_depth is {self.recursion_depth}; give a positive number.")
        if self.scale != "auto":
            try:
                number = float(self.scale)
            except ValueError:
                number = math.nan
            if not (number > 0 and math.isfinite(number)):
                raise ValueError(f"--scale is {self.scale}; give auto or a positive number.")
        unknown = [name for name in self.controls if name not in CONTROLS]
        if unknown:
            raise ValueError(f"--controls {', '.join(unknown)} is unknown. Choose from {', '.join(CONTROLS)}.")
        self.tolerance = self.tolerance or {"cg": 1e-4, "lissa": 0.3, "identity": 0.3}[self.ihvp]


ARGUMENTS = (ModelArguments, DataTrainingArguments, InfluenceArguments, TrainingArguments)


# --------------------------------------------------------------------------------------------- molecules and selection


def take_pool(molecules, size, noise, seed):
    """Takes training molecules out as a pool in which some labels are wrong, so that the truth is known.

    Args:
        molecules (`pandas.DataFrame`): of `load_molecules`.
        noise (`float`): share of the pool whose labels change places.
    Returns:
        the other molecules; and the pool with the further column `corrupted` (both `pandas.DataFrame`).
    Raises:
        InputError: if less than half of the training molecules would be left, or no two labels change places.
    """
    train = np.flatnonzero(molecules["split"] == "train")
    if size > len(train) / 2:
        raise InputError(
            f"--pool_size {size} would take more than half of the {len(train)} training molecules. Lower it."
        )
    taken = train[split_groups(molecules["group"].to_numpy()[train], size, seed)]
    pool = molecules.iloc[taken].reset_index(drop=True)
    if not len(pool):
        raise InputError(f"--pool_size {size} takes no molecule, since stereo twins stay together. Raise it.")
    if noise and round(noise * len(pool)) < 2:
        raise InputError(
            f"--pool_size {size} takes {len(pool)} molecules, too few for {noise:.0%} of their labels to change "
            "places. Raise it, or pass --pool_noise 0."
        )
    wrong = np.random.default_rng(seed).permutation(len(pool))[: round(noise * len(pool))]
    labels = pool["label"].to_numpy().copy()
    labels[wrong] = labels[np.roll(wrong, 1)]
    pool["corrupted"] = labels != pool["label"]
    pool["label"] = labels
    return molecules.drop(index=molecules.index[taken]).reset_index(drop=True), pool


def load_external(tokenizer, data_args, influence_args, molecules):
    """Reads external molecules, and leaves out those that validation and test molecules are, stereo aside.

    Returns:
        those that can be scored; and all that were left out, with the columns `row`, `smiles` and `reason`, and the
        label of those that are known molecules.
    Raises:
        InputError: if file, columns, labels or molecules cannot be used, or none is left.
    """
    path, (header, _) = influence_args.external_file, read_header(influence_args.external_file)
    smiles, (label,) = data_args.smiles_column, data_args.label_column or [None]
    if data_args.dataset_name is None:  # those that were found in the training file, where none is named
        known, _ = read_header(data_args.train_file)
        smiles = smiles or find_column(known, None, SMILES_COLUMNS, "--smiles_column", data_args.train_file)
        label = label or find_column(known, None, LABEL_COLUMNS, "--label_column", data_args.train_file)
    # columns of one name hold one quantity
    smiles = influence_args.external_smiles_column or (smiles if smiles in header else None)
    label = influence_args.external_label_column or (label if label in header else None)
    table = read_table(path, smiles, None if label is None else [label], prefix="external_")
    (found,) = table.attrs["label_columns"]
    logger.info("Labels of %s: column %s", path, found)
    if found not in (data_args.label_column or [found]) and influence_args.external_label_column is None:
        logger.warning(
            "%s has no column %s: column %s is taken for the same quantity. Name another one with "
            "--external_label_column", path, data_args.label_column[0], found,
        )  # fmt: skip
    external, dropped = prepare_molecules(table, tokenizer, data_args, path)
    excluded = [dropped[["row", "smiles", "reason"]]]
    for part in ("validation", "test"):
        known = external["group"].isin(set(molecules.loc[molecules["split"] == part, "group"]))
        excluded.append(external.loc[known, ["row", "smiles", "label"]].assign(reason=f"is a {part} molecule"))
        external = external[~known]
    excluded = pd.concat(excluded, ignore_index=True).sort_values("row", kind="stable")
    if len(excluded) > len(dropped):
        logger.warning(
            "%d of %d molecules in %s are, stereo aside, validation or test molecules, and are left out: "
            "influence_scores.csv lists them", len(excluded) - len(dropped), len(table), path,
        )  # fmt: skip
    if not len(external):
        raise InputError(
            f"No molecule of {path} is left: {len(excluded) - len(dropped)} are validation or test molecules, "
            f"{len(dropped)} cannot be used. Give others."
        )
    known = external["group"].isin(set(molecules.loc[molecules["split"] == "train", "group"]))
    if known.any():
        logger.info("%d of the external molecules are, stereo aside, training molecules too", known.sum())
    return external.assign(in_training=known).reset_index(drop=True), excluded


def select_molecules(table, influence_args):
    """Returns a boolean array: which molecules are selected, from what `--rank_by` names."""
    scores, by_group = table[influence_args.rank_by].to_numpy(), influence_args.rank_by == "group_influence"
    if influence_args.select in ("positive", "threshold"):
        enough = scores > (influence_args.threshold if influence_args.select == "threshold" else 0.0)
        if by_group:  # as long as the next one adds enough to those before it
            rank = table["group_rank"].to_numpy()
            enough = rank < min(rank[~enough], default=len(table) + 1)
        return enough
    scores = -table["group_rank"] if by_group else scores
    count = influence_args.num_selected or max(1, len(table) // 2)
    if influence_args.select == "fraction":
        count = max(1, round(influence_args.fraction * len(table)))
    return best(scores, count)


def best(values, count):
    """Returns a boolean array: which are the `count` largest values, the earlier one of two equal ones."""
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-np.asarray(values), kind="stable")[:count]] = True
    return chosen


def select_control(name, table, seed):
    """Returns a boolean array: which molecules a control takes, as many as are `selected` (of right labels, if there
    are so many)."""
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
        "score": lambda: table["score"],
        "group_influence": lambda: -table["group_rank"],
        "right_label": lambda: np.where(table["corrupted"], -1.0, np.random.default_rng([seed, 1]).random(len(table))),
    }
    if name == "right_label":
        count = min(count, int((~table["corrupted"]).sum()))
    return best(np.asarray(values[name]()), count)


def detection(table, seed):
    """Returns how well each score finds the molecules with wrong labels: areas under the ROC curve, 0.5 for chance."""
    from sklearn.metrics import roc_auc_score

    if "corrupted" not in table or table["corrupted"].nunique() < 2:
        return {}
    suspicion = {"influence": -table["score"], "gradient_dot": -table["gradient_dot"], "loss": table["loss"]}
    if "group_rank" in table:
        suspicion["group_influence"] = table["group_rank"]
    suspicion["influence_size"] = table["score"].abs()  # a wrong label pulls harder, to either side
    suspicion["random"] = np.random.default_rng(seed).random(len(table))  # what chance alone gives
    return {f"auc_{name}": float(roc_auc_score(table["corrupted"], values)) for name, values in suspicion.items()}


# ------------------------------------------------------------------------------------------------------------- reports


def write_influence(output_dir, parts, table, excluded, report):
    """Writes scores, report, merged training file and plots of a scoring into its output folder."""
    write_scores(output_dir, table, excluded)
    write_json(report, output_dir / "influence.json")
    write_merged(output_dir, parts, table[table["selected"]])
    plot_scores(table, output_dir / "influence_scores.png", report["rank_by"])
    if report.get("trace"):
        plot_convergence(report, output_dir / "influence_convergence.png")
    shown = {k: value for k, value in report.items() if k.startswith(("auc", "agreement", "group_weight")) and value}
    text = ", ".join(f"{name} {value:.3f}" for name, value in shown.items())
    logger.info("%d of %d molecules selected. %s", report["selected"], len(table), text)


def write_scores(output_dir, table, excluded):
    """Writes influence_scores.csv: every external molecule, those that were left out at the end with their reason."""
    names = ("row", "smiles", "label", "prediction", "loss", "score", "score_sd", "rank", "gradient_dot")
    names += ("group_influence", "group_rank", "selected", "corrupted", "in_training")
    scores = table[[name for name in names if name in table]].assign(excluded="")
    left_out = excluded.reindex(columns=["row", "smiles", "label", "reason"])
    left_out = left_out.rename(columns={"reason": "excluded"}).assign(selected=False)
    scores = pd.concat([scores, left_out], ignore_index=True)
    ranks = [name for name in ("rank", "group_rank") if name in scores]
    scores[ranks] = scores[ranks].astype("Int64")  # those that were left out have none
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
    for name, rows in add_molecules(parts, selected).items():
        write_csv(rows.rename(columns={"smiles": "SMILES"})[["SMILES", "label"]], output_dir / MERGED_FILES[name])


def plot_scores(table, path, by="score"):
    """Draws how the scores are distributed, and against the loss; molecules with wrong labels in another color.

    Args:
        by (`str`): column of the scores that have selected.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    corrupted = table.get("corrupted", pd.Series(False, index=table.index)).to_numpy()
    groups = {"wrong label": corrupted, "right label": ~corrupted} if corrupted.any() else {"external": ~corrupted}
    bins = np.histogram_bin_edges(table[by].astype(float), bins=40)  # float32 has no 40 between like scores
    for color, (name, rows) in zip(("tab:red", "tab:blue"), groups.items(), strict=False):
        color = "tab:blue" if len(groups) == 1 else color
        left.hist(table[by][rows], bins=bins, alpha=0.6, color=color, label=f"{name} ({rows.sum()})")
        right.scatter(table["loss"][rows], table[by][rows], s=12, alpha=0.6, color=color, linewidths=0)
    lowest = table[by][table["selected"]].min() if table["selected"].any() else None
    if lowest is not None:
        left.axvline(lowest, color="0.3", linewidth=1, linestyle="--", label="lowest selected")
        right.axhline(lowest, color="0.3", linewidth=1, linestyle="--")
    title = {"score": "influence score", "group_influence": "group influence"}[by]
    left.set(xlabel=f"{title} (positive: helpful)", ylabel="molecules")
    left.locator_params(axis="x", nbins=6)  # or the labels touch
    right.set(xlabel="loss of the molecule (standardized)", ylabel=title)
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
        axes.plot(rows["step"], rows["norm"] / trace["norm"].max(), color="tab:orange", alpha=0.7,
                  label="norm, relative to the largest" if number == 0 else None)  # fmt: skip
    axes.axhline(report["tolerance"], color="0.5", linewidth=1, linestyle="--", label="tolerance of the residual")
    axes.plot(trace["step"].max(), report["residual"], marker="*", markersize=11, color="tab:blue", linestyle="none",
              label="residual of the answer, on all molecules")  # fmt: skip
    axes.set(xlabel="step", yscale="log", ylabel=f"of the last iterate, on {report['trace_molecules']} molecules")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=8)
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
    axes.set(xlabel=f"test mean squared error of {name_in_plot(label_name)}", ylim=(-0.5, len(names) - 0.5))
    axes.locator_params(axis="x", nbins=6)  # or the labels of like errors touch
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def results_table(results, leakage=False):
    """Returns a text table of the fine-tuned models, one line each; `leakage` says that the test set has chosen."""
    lines = ["Chosen by the loss of the test molecules: their numbers are optimistic."] if leakage else []
    lines += [f"{'added':<15} {'molecules':>9} {'validation MSE':>15} {'test MSE':>10} {'MAE':>8} {'R²':>8}"]
    for name, values in results.items():
        numbers = [values.get(key) for key in ("validation_mse", "test_mse", "test_mae", "test_r2")]
        texts = [f"{number:.4f}" if number is not None else "" for number in numbers]
        lines.append(f"{name:<15} {values['added']:>9} {texts[0]:>15} {texts[1]:>10} {texts[2]:>8} {texts[3]:>8}")
    return "\n".join(lines)


def losses_table(losses):
    """Returns a text table of evaluation losses by epoch after the selection (`dict[str, list[float]]` by whose)."""
    what = "standardized labels; the paper's, one an epoch, are of molecules seen in training"
    lines = [f"Evaluation losses after the selection ({what if 'paper' in losses else 'standardized labels'}):"]
    epochs = range(1, max(map(len, losses.values())) + 1)
    lines.append(f"{'evaluation':<10}" + " ".join(f"{epoch:>6}" for epoch in epochs))
    for name, values in losses.items():
        shown = "ours" if name == "selected" else name
        lines.append(f"{shown:<10}" + " ".join(f"{loss:6.3f}" for loss in values))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ the script


def compute_scores(problem, parts, external, influence_args, training_args):
    """Returns the scored molecules, with the column `selected`, and how they were scored (`DataFrame`, `dict`).

    Raises:
        InputError: if the target's gradient is zero or not finite, or as `inverse_curvature` and `score_molecules` do.
    """
    from trainer_regression import peak_memory

    started, seed = time.monotonic(), training_args.seed
    halves, gradient = gradients_of_halves(problem, parts[influence_args.score_split])
    if not 0 < float(gradient.norm()) < math.inf:
        raise InputError("The gradient of the target loss is zero or not finite: no score can be computed.")
    state_file = Path(training_args.output_dir) / STATE_FILE
    solutions, solved = inverse_curvature(problem, parts["train"], gradient, influence_args, seed, state_file)
    earlier = solved.pop("earlier_seconds", 0.0)  # of a solution that was continued
    table, agreement = score_molecules(problem, external, solutions, gradient, influence_args, halves)
    group = {}
    if influence_args.with_group_influence:
        target = parts[influence_args.score_split]
        columns, group = order_by_group_influence(problem, parts["train"], target, external, seed)
        table = table.assign(**columns)
    rank = table["score"].rank(ascending=False, method="first").astype(int)
    table["rank"] = rank if influence_args.rank_by == "score" else table["group_rank"]
    table["selected"] = select_molecules(table, influence_args)
    report = {
        "sign": SIGN + CHANGE * (influence_args.ihvp != "identity"),
        "training_molecules": len(parts["train"]),
        "label_std": problem.model.config.label_std,
        "score_split": influence_args.score_split,
        "leakage": influence_args.score_split == "test",
        "influence_params": influence_args.influence_params,
        "score_mode": influence_args.score_mode,
        "seed": seed,
        **solved,
        **agreement,
        **group,
        "rank_by": influence_args.rank_by,
        **detection(table, seed),
        "molecules": len(table),
        "selected": int(table["selected"].sum()),
        "seconds": time.monotonic() - started + earlier,
        "peak_memory_bytes": peak_memory(),  # of the process so far, with a fine-tuning that it did
        "versions": {package: version(package) for package in ("torch", "transformers", "accelerate", "rdkit")},
    }
    if report["leakage"]:
        logger.warning("Molecules were chosen by the loss of the test molecules: the test numbers below leak.")
    return table, report


def scores_key(problem, parts, external, influence_args, seed):
    """Returns a hash of what the scores depend on: how they are computed, molecules, labels and the weights."""
    digest = hashlib.sha256(settings_key(problem, parts["train"], influence_args, seed).encode())
    for tensor in problem.model.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    settings = [influence_args.score_mode, influence_args.rank_by]
    molecules = [rows[["text", "label"]].to_numpy().tolist() for rows in (parts[influence_args.score_split], external)]
    digest.update(json.dumps([settings, molecules]).encode())
    return digest.hexdigest()


def kept_scores(output_dir, key, external):
    """Returns what `compute_scores` did in an earlier piece of this run; `None` if those scores are not there.

    Args:
        key (`str`): of the scores that are wanted; see `scores_key`.
    """
    report = read_json(output_dir / "influence.json")
    if report.get("scores_key") != key:
        return None
    scores = pd.read_csv(output_dir / "influence_scores.csv")
    scores = scores[scores["excluded"].isna()]
    names = [name for name in scores if name not in (*external, "SMILES", "excluded")]
    logger.info("The scores of this run are there already: nothing is scored again")
    return external.assign(**{name: scores[name].to_numpy() for name in names}), report


def find_scores(problem, parts, external, influence_args, training_args, checkpoint):
    """Returns what `compute_scores` does, which is computed again only where a run that is resumed has it not."""
    problem.show_progress = training_args.should_log and not training_args.disable_tqdm
    with full_float32():
        key, kept = scores_key(problem, parts, external, influence_args, training_args.seed), None
        if checkpoint is not None:
            output_dir = Path(training_args.output_dir)
            kept = kept_scores(output_dir, key, external)
        table, report = kept or compute_scores(problem, parts, external, influence_args, training_args)
        if influence_args.with_group_influence and "group_weight" not in report:  # a control that has been added
            from trainer_regression import peak_memory

            target, started = parts[influence_args.score_split], time.monotonic()
            columns, group = order_by_group_influence(problem, parts["train"], target, external, training_args.seed)
            table = table.assign(**columns)
            report |= {**group, **detection(table, training_args.seed)}
            report["seconds"] += time.monotonic() - started
            report["peak_memory_bytes"] = max(report["peak_memory_bytes"], peak_memory())
    return table, report | {"scores_key": key}


def release_memory():
    """Gives what a training has freed back to the system, which C's allocator keeps otherwise; glibc only."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass
class Comparison:
    """Fine-tunes with external molecules added to the training part, each choice in a folder of its own.

    Attributes:
        results (`dict[str, dict]`): by name the molecules added, how many of them have wrong labels where that is
            known, and the metrics of validation and test.
    """

    model_args: ModelArguments
    data_args: DataTrainingArguments
    training_args: TrainingArguments
    tokenizer: object
    parts: dict
    digest: str
    results: dict = field(default_factory=dict)

    def fine_tune(self, name, added):
        """Fine-tunes with the molecules of a table added, unless it is done, and returns the folder of the model."""
        from trainer_regression import fine_tune

        folder = Path(self.training_args.output_dir) / f"finetune-{name}"
        if name not in self.results:
            parts, digest = merge(self.parts, added) if len(added) else (self.parts, self.digest)
            logger.info("Fine-tuning with %d of the external molecules: %s", len(added), name)
            arguments = (self.model_args, self.data_args, self.training_args, self.tokenizer, parts, digest)
            wrong = {"added_wrong": int(added["corrupted"].sum())} if "corrupted" in added else {}
            self.results[name] = {"added": len(added), **wrong, **fine_tune(folder, *arguments)}
            release_memory()
        return folder

    def fine_tune_with_controls(self, table, controls, seed):
        """Fine-tunes with the molecules that are `selected` and with those of each control."""
        first = ["none"] if "none" in controls else []
        for name in [*first, "selected", *(name for name in controls if name != "none")]:
            self.fine_tune(name, table[select_control(name, table, seed)])


def check_parts(parts, data_args, influence_args):
    """Raises `InputError` if there are no molecules to score for, or to compare the models on."""
    if data_args.protocol == "paper" and influence_args.score_split not in parts:
        raise InputError(
            "--protocol paper has no validation molecules to score for. Pass --score_split test (the paper's way, "
            "which leaks), or leave --protocol paper out."
        )
    for name in ("validation", "test"):  # the paper's protocol chooses epochs by the test molecules
        if name not in parts and not (name == "validation" and data_args.protocol == "paper"):
            raise InputError(f"Scores and their comparison need {name} molecules. Leave --{name}_fraction 0 out.")


def check_replaced(output_dir):
    """Raises `InputError` if the scores of a run that trains nothing would replace models in their folder."""
    models = [path.name for path in paths_of_run(output_dir) if path.is_dir() or path.name in MODEL_FILES]
    if models:
        raise InputError(
            f"The output folder {output_dir} holds what a training made ({', '.join(sorted(models))}), which scores "
            "alone do not replace. Give another --output_dir."
        )


def main(model_args, data_args, influence_args, training_args):
    output_dir, seed = Path(training_args.output_dir), training_args.seed
    if data_args.only_test_file and not training_args.do_train:
        raise InputError(
            "Scores are of the molecules of --external_file. New molecules are predicted by run_regression.py "
            "--do_predict."
        )
    if not training_args.do_train:
        check_replaced(output_dir)
    checkpoint = setup_run(training_args, data_args, in_pieces=True)

    from modeling_molformer_reg import MolformerForRegression
    from trainer_regression import begin_run, prepare_head, select_parts, set_learning_rate
    from utils_checkpoints import check_split, load_config, load_model, load_tokenizer, settle_smiles_form
    from utils_report import write_splits

    # Data
    tokenizer = load_tokenizer(model_args)
    settle_smiles_form(load_config(model_args), data_args)
    molecules, digest, dropped = load_molecules(tokenizer, model_args, data_args, training_args)
    if "label" not in molecules:
        raise InputError("An influence score is of one label. Pass one --label_column.")
    if influence_args.external_file is None:
        pool_seed = seed if data_args.split_seed is None else data_args.split_seed
        molecules, external = take_pool(molecules, influence_args.pool_size, influence_args.pool_noise, pool_seed)
        whole, excluded, digest = digest, external.iloc[:0], split_hash(molecules, molecules["split"])
    else:
        whole = None
        external, excluded = load_external(tokenizer, data_args, influence_args, molecules)
    parts = select_parts(molecules, data_args)
    check_parts(parts, data_args, influence_args)
    influence_args.check_selection(external)
    set_learning_rate(training_args, data_args)

    # Model: a fine-tuned one, or the pre-trained one from which it is made
    model = load_model(MolformerForRegression, model_args, tokenizer, merge=NO_FORWARD_MODE, num_labels=1)
    check_pool(model, whole, model_args, data_args)
    check_split(model.config, digest, data_args)
    if model.head_is_new and not training_args.do_train:
        prepare_head(model, parts["train"], digest, data_args, training_args)  # says that there is no head
    names = choose_parameters(model, influence_args.influence_params)
    start_args = model_args
    if model.head_is_new and influence_args.pretrained_model is not None:
        raise InputError(
            f"{model_args.model_name_or_path} has no regression head: it is fine-tuned itself, and --pretrained_model "
            "would not be used. Leave it out."
        )
    if not model.head_is_new:
        start_args = pretrained_arguments(model_args, influence_args, model, training_args.do_train)
        check_split(load_config(start_args), digest, data_args)
    start = start_args.model_name_or_path
    if checkpoint is None and start is not None and belongs_to_run(output_dir, start):
        raise InputError(f"--output_dir {output_dir} would replace {start}. Give another --output_dir.")
    begin_run(training_args, checkpoint, model_args.model_name_or_path, dropped, replace=checkpoint is None)
    if training_args.should_save:
        known = {"pool": external, "corrupted": external[external["corrupted"]]} if "corrupted" in external else {}
        write_splits(output_dir, {**parts, **known}, digest, data_args)
    comparison = Comparison(start_args, data_args, training_args, tokenizer, parts, digest)
    scored_args = model_args
    if model.head_is_new:
        folder = comparison.fine_tune("none", external.iloc[:0])
        scored_args = replace(model_args, model_name_or_path=str(folder), config_name=None)
        model = load_model(MolformerForRegression, scored_args, tokenizer, num_labels=1)

    # Score
    model.to(training_args.device)
    chunk_size = training_args.per_device_eval_batch_size
    problem = MoleculeProblem(model, tokenizer, names, chunk_size, influence_args.curvature)
    try:
        table, report = find_scores(problem, parts, external, influence_args, training_args, checkpoint)
    except InputError as error:
        if "none" not in comparison.results:
            raise
        same = "" if start == EMBEDDED_CHECKPOINT or start is None else f" and --pretrained_model {start}"
        raise InputError(
            f"{error} The model that was fine-tuned is in {folder}: give it as --model_name_or_path, with another "
            f"--output_dir{same}."
        ) from error
    report |= {"split_hash": digest, "model": shown_path(scored_args.model_name_or_path)}
    report |= {"excluded": excluded.reindex(columns=["row", "reason"]).to_dict("records")}
    report |= {"fine_tuned_from": str(start or start_args.config_name)} if training_args.do_train else {}
    if training_args.should_save:
        write_influence(output_dir, parts, table, excluded, report)
    del model, problem

    # Fine-tune with the selected molecules and with the controls
    if not table["selected"].any():
        logger.warning("No molecule is selected: nothing is fine-tuned again. See influence_scores.csv.")
    elif training_args.do_train:
        comparison.fine_tune_with_controls(table, influence_args.controls, seed)
    results = comparison.results

    # Report
    if training_args.should_save:
        write_comparison(output_dir, report, results, data_args)
        if table["selected"].any() and (
            training_args.do_train or is_same_size(load_config(start_args), load_config(scored_args))
        ):
            print(merged_command(parts, start_args, data_args, training_args, report["leakage"]))
        (output_dir / STATE_FILE).unlink(missing_ok=True)
    models = [("", output_dir / "finetune-selected")] if "selected" in results else []
    finish_run(training_args, "influence", [*models, ("", output_dir)])


def write_comparison(output_dir, report, results, data_args):
    """Writes all_results.json and the plot of the fine-tuned models, and prints their tables."""
    losses = {}
    if "selected" in results:
        losses["selected"] = results["selected"]["eval_losses"]
        if data_args.train_file is not None and Path(data_args.train_file).resolve() == Path(EMBEDDED_DATA):
            losses["paper"] = PAPER_LOSSES  # of this property alone
        plot_selection(results, output_dir / "influence_selection.png", data_args.label_name)
        print(results_table(results, report["leakage"]))
        print(losses_table(losses))
        if "random" in results:
            chosen, chance = results["selected"]["test_mse"], results["random"]["test_mse"]
            print(f"Test MSE with the selected molecules {chosen:.4f}, with as many at random {chance:.4f}: of one "
                  "training each, where a few hundredths are chance.")  # fmt: skip
    if not report.get("converged", True):
        print(f"The scores are {report['verdict']}; see influence.json.")
    values = {"influence": report, "results": results, "evaluation_losses": losses}
    write_json(values, output_dir / "all_results.json")


def merged_command(parts, start_args, data_args, training_args, leakage):
    """Returns the command that learns the selected molecules elsewhere, from the same start and in the same way."""
    from utils_checkpoints import load_config

    output_dir = Path(training_args.output_dir)
    command = ["python", "run_regression.py"]
    for name in ("model_name_or_path", "config_name", "tokenizer_name", "model_revision"):
        value = getattr(start_args, name)
        command += [f"--{name}", shown_path(value)] if value not in (None, getattr(ModelArguments, name, None)) else []
    start_config = load_config(start_args)
    if start_config.split_hash is not None:  # of the molecules without the selected ones
        command += ["--ignore_split_mismatch"]
    for name, value in start_args.config_overrides().items():
        if name == "head_descriptors":
            value = ["all"] if value == default_descriptors() else value
        command += [f"--{name}", *(value if isinstance(value, list) else [str(value).lower()])]
    for part, name in MERGED_FILES.items():
        command += [f"--{part}_file", str(output_dir / name)] if part in parts else []
    usual = start_config.smiles_form or "canonical"
    command += [] if data_args.smiles_form == usual else ["--smiles_form", data_args.smiles_form]
    command += ["--protocol", "paper"] if data_args.protocol == "paper" else []
    longer = data_args.max_length != DataTrainingArguments.max_length
    command += ["--max_length", str(data_args.max_length)] if longer else []
    if data_args.label_name not in (None, "the label"):  # the merged file calls its column label
        command += ["--label_name", data_args.label_name]
    values = training_args.run_values or {}
    settings = (*TRAINING_SETTINGS, "augment_smiles")
    names = [name for name in settings if name in training_args.given]
    command += as_flags({name: values.get(name) for name in names})
    leak = " (chosen by the test molecules, whose error there will be optimistic too)" if leakage else ""
    command += ["--output_dir", f"outputs/{output_dir.name}-merged"]
    return f"To learn the selected molecules elsewhere{leak}: {shlex.join(command)}"


def check_pool(model, whole, model_args, data_args):
    """Says of a fine-tuned checkpoint what is known of the molecules that it learned.

    Args:
        whole (`str`, *optional*): hash of the split before a pool was taken out; `None` without a pool.
    Raises:
        InputError: if it has learned the pool, unless `--ignore_split_mismatch`.
    """
    known = model.config.split_hash
    if known is None and not model.head_is_new:
        logger.warning(
            "%s does not say which molecules it learned. If those to score are among them, or validation or test "
            "molecules, the scores and errors mislead.", model_args.model_name_or_path,
        )  # fmt: skip
    if known is not None and known == whole and not data_args.ignore_split_mismatch:
        learned = "learned the SMILES of" if model.head_is_new else "was trained on"
        raise InputError(
            f"{model_args.model_name_or_path} {learned} all training molecules of this split, those of the pool "
            "among them. Start from a pre-trained checkpoint, which is fine-tuned without them, give an "
            "--external_file, or pass --ignore_split_mismatch."
        )


def is_same_size(config, other):
    return all(getattr(config, name) == getattr(other, name) for name in SIZES)


def pretrained_arguments(model_args, influence_args, model, needed=True):
    """Returns the arguments of the model that is fine-tuned again, when the one that is scored is fine-tuned already.

    Args:
        needed (`bool`): whether it will be; if not, another size does not matter.
    Raises:
        InputError: if none was named, and the embedded checkpoint is of another size.
    """
    from utils_checkpoints import find_base, load_config, path_of_base

    source, revision = influence_args.pretrained_model or EMBEDDED_CHECKPOINT, "main"
    found = find_base(model_args.model_name_or_path, model_args)
    if influence_args.pretrained_model is None and found is not None:
        source, revision = path_of_base(found["base"]), found["revision"]
    # of the same kind as the model that is scored
    kind = {name: getattr(model.config, name) for name in KIND if getattr(model_args, name) is None}
    kind |= {"model_name_or_path": source, "config_name": None, "model_revision": revision}
    pretrained_args = replace(model_args, **kind)
    config = load_config(pretrained_args)
    if needed and influence_args.pretrained_model is None and not is_same_size(config, model.config):
        raise InputError(
            f"{model_args.model_name_or_path} is fine-tuned, and not from models/molformer-mini: their sizes "
            "differ. Pass --pretrained_model with the checkpoint that the selection is to be fine-tuned from."
        )
    if needed:
        logger.info("The selection is learned by models that start from %s; --pretrained_model names another", source)
    return pretrained_args


if __name__ == "__main__":
    run_script(main, ARGUMENTS, DEFAULTS, __doc__)
