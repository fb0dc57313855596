"""What a run shows: predictions, tables, plots, the model card; and its way to the Hub.

    python -c "from utils_report import *; print(model_card(Run('outputs/regression', 'regression')))"

A card is made from the files of a finished run alone, so it says what the folder holds. A push sends model or adapter,
tokenizer, modeling file, metrics, plots and card in one commit; checkpoints, logs of the optimizer and tokens stay.
"""

import io
import json
import logging
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    get_token,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from rdkit import rdBase

from arguments import EMBEDDED_CHECKPOINT, EMBEDDED_DATA, ROOT, InputError, as_flags
from utils_checkpoints import PARTIAL_FILE, find_file
from utils_molecules import (
    LABEL_PREFIX,
    MOST_FOR_RIDGE,
    baseline_predictions,
    label_columns,
    morgan_counts,
    parse_smiles,
    regression_metrics,
    shorten,
    write_csv,
)
from utils_runs import (
    ARGUMENTS_FILE,
    CARD_FILE,
    CARD_MARK,
    OWN_CARD_FILE,
    STAGED,
    end_writing,
    is_card,
    member_folders,
    project_path,
    read_json,
    write_bytes,
    write_json,
    write_text,
)


MODELING_FILE = "modeling_molformer_reg.py"
METRICS = {"mse": "MSE", "rmse": "RMSE", "mae": "MAE", "r2": "R²"}
FIGURES = {
    "parity.png": "Predicted against measured values of the test set: the closer to the line, the better.",
    "residuals.png": "Errors against size and against the label: a slope says that extremes are drawn to the mean; "
    "the line is the mean error of ten groups of like size.",
    "worst_molecules.png": "The test molecules with the largest errors: look for a common group, or for a label that "
    "may be wrong.",
    "loss_curves.png": "Losses by epoch: the dashed line is the lowest held-out one; if that rises afterwards, fewer "
    "epochs suffice.",
    "influence_scores.png": "Influence scores of the external molecules, and against their loss.",
    "influence_convergence.png": "Norm and residual of the inverse-Hessian-vector product by step: the norm is to "
    "flatten. Single iterates are noisy; what counts is the residual of the answer, their mean, below the tolerance.",
    "influence_selection.png": "Test error with the selected molecules, and with the controls.",
}
PUSHED = re.compile(
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors|(adapter_)?model\.safetensors\.index\.json|config\.json|adapter_config\.json|"
    r"trained_parameters\.json|(tokenizer|tokenizer_config|special_tokens_map|splits|arguments|influence|trainer_state)\.json|"
    r"(all|train|eval|predict)_results\.json|modeling_molformer_reg\.py|" + "|".join(map(re.escape, FIGURES))
)
BASELINE_ADVICE = {  # where a baseline has the lower test error
    "mean": "The mean of the training labels has the lower error{}: the model has learned nothing of use. Train "
    "longer, or with more molecules.",
    "fingerprint_ridge": "Ridge regression on fingerprints has the lower error{}: use that, or train longer.",
}
OURS = re.compile(rf"(member-\d+/)?({PUSHED.pattern})")  # in a repository
OTHER_MODELS = ("member-*/*", "model*.safetensors*", "adapter_*", "trained_parameters.json")
NOT_REWRITTEN = re.compile(
    r"(adapter_)?config\.json|tok.*\.json|special.*\.json|.*\.index\.json|trained_parameters\.json"
)
PAPERS = {
    "MoLFormer": "Ross et al., Large-scale chemical language representations capture molecular structure and "
    "properties, Nature Machine Intelligence 4 (2022), https://arxiv.org/abs/2106.09553",
    "MoleculeNet": "Wu et al., MoleculeNet, Chemical Science 9 (2018), https://arxiv.org/abs/1703.00564",
    "influence": "Koh and Liang, Understanding black-box predictions via influence functions, ICML 2017, "
    "https://arxiv.org/abs/1703.04730",
}
TASKS = ("text-classification", "fill-mask")
LICENSES = {"ibm/MoLFormer-XL-both-10pct": "apache-2.0"}

logger = logging.getLogger("molformer.hub")


# --------------------------------------------------------------------------------------------------------- predictions


def summarize_predictions(members):
    """Returns the mean prediction of each molecule and how far its parts lie apart, from those of all members.

    Args:
        members (`list[numpy.ndarray]`): predictions of each member, shape (N, forms, K).
    Returns:
        predictions (N, K); and sample standard deviations (N, K) by name: `prediction_sd` over two members or more,
        `augment_sd` over two SMILES forms or more.
    """
    predictions = np.stack(members)  # (members, N, forms, K)
    spreads = {}
    if predictions.shape[0] > 1:
        spreads["prediction_sd"] = predictions.mean(axis=2).std(axis=0, ddof=1)
    if predictions.shape[2] > 1:
        spreads["augment_sd"] = predictions.mean(axis=0).std(axis=1, ddof=1)
    return predictions.mean(axis=(0, 2)), spreads


def write_splits(output_dir, parts, digest, data_args):
    """Writes splits.json: the rows of each part (`dict[str, pandas.DataFrame]`) and the hash of the split."""
    rows = {name: [int(row) for row in part["row"]] for name, part in parts.items()}
    write_json({"split": data_args.split, "hash": digest, **rows}, Path(output_dir) / "splits.json")


def label_ends(molecules):
    """Returns of each label its column, its name, and what stands after the names of its numbers.

    A single label has neither name nor end.
    """
    names = {
        column: "" if column == "label" else column.removeprefix(LABEL_PREFIX) for column in label_columns(molecules)
    }
    return [(column, name, f"_{name}" if name else "") for column, name in names.items()]


def write_predictions(output_dir, molecules, numbers, data_args):
    """Writes predictions.csv: of every label the measured and the predicted value, spreads and error.

    Args:
        molecules (`pandas.DataFrame`): of all parts.
        numbers (`dict[str, numpy.ndarray]`): predictions and spreads by their names, (N, K) each.
    """
    table = molecules[["row", "smiles"]].rename(columns={"smiles": "SMILES"})
    for number, (column, _, end) in enumerate(label_ends(molecules)):
        table[f"label{end}"] = molecules[column]
        for name, values in numbers.items():
            table[f"{name}{end}"] = values[:, number]
        table[f"error{end}"] = table[f"prediction{end}"] - table[f"label{end}"]
    table["split"] = molecules["split"]
    # as one file, in its order; separate files follow one another
    in_one_file = data_args.validation_file is None and data_args.test_file is None
    write_csv(table.sort_values("row", kind="stable") if in_one_file else table, Path(output_dir) / "predictions.csv")


def measure_predictions(molecules, predictions, model_name):
    """Returns what the predictions (N, K) of all molecules come to.

    Returns:
        metrics of every split and of the baselines on the test set (`dict[str, float]`), of several labels each with
        the label's name at its end; the same as lines of `metrics_table`; and by label the test molecules with
        `label` and `prediction`, where there are training molecules beside them.
    """
    metrics = {f"{name}_samples": int(count) for name, count in molecules["split"].value_counts(sort=False).items()}
    lines, tests, features = [], {}, None
    if len(molecules) > MOST_FOR_RIDGE:
        logger.info("No ridge regression beside the model: that is for up to %d molecules", MOST_FOR_RIDGE)
    elif {"train", "test"} <= set(molecules["split"]):
        logger.info(
            "For comparison: ridge regression on fingerprints, %d training molecules", metrics["train_samples"]
        )
        features = morgan_counts(molecules["group"])
    for number, (column, label, end) in enumerate(label_ends(molecules)):
        one = molecules.assign(label=molecules[column], prediction=predictions[:, number])
        one = one[one["label"].notna()]
        for name, part in one.groupby("split", sort=False):
            values = regression_metrics(part["prediction"], part["label"])
            lines.append((f"{model_name} {label}".strip(), name, len(part), values))
            metrics |= {f"{name}_{key}{end}": value for key, value in values.items()}
            metrics[f"{name}_samples{end}"] = len(part)
        is_test = (one["split"] == "test").to_numpy()
        if not is_test.any() or not (one["split"] == "train").any():
            continue
        tests[label] = one[is_test]
        known = None if features is None else features[one.index]
        baselines = baseline_predictions(known, one["label"].to_numpy(), one["split"].to_numpy())
        for baseline, predicted in baselines.items():
            values = regression_metrics(predicted[is_test], tests[label]["label"])
            lines.append((f"{baseline} {label}".strip(), "test", len(tests[label]), values))
            metrics |= {f"test_{key}_{baseline}{end}": value for key, value in values.items()}
    return metrics, lines, tests


def write_reports(output_dir, parts, members, digest, data_args, trained=True):
    """Writes predictions.csv, splits.json and the plots of a run into its output folder.

    Args:
        parts (`dict[str, pandas.DataFrame]`): molecules of each split.
        members (`dict[str, list[numpy.ndarray]]`): for each of them the predictions of every model, (N, forms, K)
            each, in label units.
        trained (`bool`): whether this run trained the models, and did not find them.
    Returns:
        the metrics of `measure_predictions`, and the same as a text table.
    """
    output_dir = Path(output_dir)
    molecules = pd.concat(parts.values(), ignore_index=True)
    summaries = [summarize_predictions(members[name]) for name in parts]
    numbers = {"prediction": np.concatenate([mean for mean, _ in summaries])}
    numbers |= {name: np.concatenate([spreads[name] for _, spreads in summaries]) for name in summaries[0][1]}
    write_predictions(output_dir, molecules, numbers, data_args)  # before anything that takes time or memory
    write_splits(output_dir, parts, digest, data_args)
    count = len(next(iter(members.values())))
    model_name = "MoLFormer" if count == 1 else f"{count} MoLFormers"
    metrics, lines, tests = measure_predictions(molecules, numbers["prediction"], model_name)
    if tests:
        panels = {label or data_args.label_name: test for label, test in tests.items()}
        plot_parity(panels, output_dir / "parity.png")
        plot_residuals(panels, output_dir / "residuals.png")
        draw_worst_molecules(panels, output_dir / "worst_molecules.png")
    text = metrics_table(lines) + ("" if "test" in parts else f"\n{no_test(parts)}")
    for label in tests:
        end = f"_{label}" if label else ""
        of_which = f" of {label}" if label else ""
        for baseline, advice in BASELINE_ADVICE.items():
            if metrics.get(f"test_mse_{baseline}{end}", math.inf) < metrics.get(f"test_mse{end}", -math.inf):
                text += "\n" + advice.format(of_which)
    if data_args.protocol == "paper":
        chosen = "the epoch was" if trained else "of a model that was trained by it, the epoch was"
        text += f"\nProtocol of the paper: {chosen} chosen by the test loss, so the test numbers are optimistic."
    return metrics, text


# ---------------------------------------------------------------------------------------------------- tables and plots


def metrics_table(rows):
    """Returns a text table of (model, split, n, metrics) rows, one line a row, in label units."""
    width = max(20, *(len(model) for model, *_ in rows)) if rows else 20
    lines = [f"{'model':<{width}} {'split':<11} {'n':>6} {'MSE':>10} {'RMSE':>10} {'MAE':>10} {'R²':>10}"]
    for model, split, count, values in rows:
        numbers = " ".join(
            f"{values[name]:10.4f}" if name in values else f"{'':10}" for name in ("mse", "rmse", "mae", "r2")
        )
        lines.append(f"{model:<{width}} {split:<11} {count:>6} {numbers}")
    return "\n".join(lines)


def name_in_plot(name):
    """Returns a label's name for a plot, where what stands between two $ is read as a formula, if it is one."""
    from matplotlib.mathtext import MathTextParser

    try:
        MathTextParser("agg").parse(name)
    except ValueError:
        return name.replace("$", r"\$")
    return name


def plot_parity(panels, path):
    """Draws predicted against measured values of the test set, with the line of perfect prediction.

    Args:
        panels (`dict[str, pandas.DataFrame]`): for each label test molecules with `label` and `prediction`.
    """
    from matplotlib.figure import Figure

    # compressed: of more than two square panels, the other one cuts titles off
    figure = Figure(figsize=(5 * len(panels), 5), layout="compressed")
    for axes, (name, molecules) in zip(np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True):
        predictions, labels = molecules["prediction"], molecules["label"]
        low, high = min(np.min(labels), np.min(predictions)), max(np.max(labels), np.max(predictions))
        margin = 0.05 * (high - low or 1)
        axes.plot([low - margin, high + margin], [low - margin, high + margin], color="0.6", linewidth=1, zorder=1)
        axes.scatter(labels, predictions, s=10, alpha=0.5, linewidths=0, zorder=2)
        axes.set(xlabel=f"measured {name_in_plot(name)}", ylabel=f"predicted {name_in_plot(name)}", aspect="equal")
        metrics = regression_metrics(predictions, labels)
        r2 = f", R² {metrics['r2']:.3f}" if "r2" in metrics else ""
        axes.set_title(
            f"Test set, n = {len(labels)}\nRMSE {metrics['rmse']:.3f}, MAE {metrics['mae']:.3f}{r2}", fontsize=10
        )
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(low - margin, high + margin)
    save_figure(figure, path)


def plot_residuals(panels, path):
    """Draws the errors of the test set against size and measured label, with the mean error of ten like groups.

    Args:
        panels (`dict[str, pandas.DataFrame]`): for each label test molecules with `text`, `label` and `prediction`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
    for row, (label, molecules) in zip(grid, panels.items(), strict=True):
        label = name_in_plot(label)
        errors = (molecules["prediction"] - molecules["label"]).to_numpy()
        read = [parse_smiles(text) for text in molecules["text"]]  # RDKit cannot read every SMILES that it wrote
        sizes = np.array([np.nan if molecule is None else molecule.GetNumHeavyAtoms() for molecule in read])
        for axes, name, numbers in (
            (row[0], "heavy atoms", sizes),
            (row[1], f"measured {label}", molecules["label"].to_numpy()),
        ):
            axes.axhline(0, color="0.6", linewidth=1)
            axes.scatter(numbers, errors, s=8, alpha=0.4, linewidths=0)
            in_order = np.argsort(numbers, kind="stable")[: np.isfinite(numbers).sum()]  # NaN comes last
            groups = [rows for rows in np.array_split(in_order, 10) if len(rows)]
            means = [(numbers[rows].mean(), errors[rows].mean()) for rows in groups]
            axes.plot(*zip(*means, strict=True), color="tab:red", marker="o", markersize=4, label="mean of a tenth")
            axes.set_xlabel(name)
        row[0].set_ylabel(f"predicted minus measured {label}")
    figure.axes[0].legend(frameon=False)
    save_figure(figure, path)


MOST_PANELS = 100  # labels of one picture; RDKit draws none of 32,768 pixels


def draw_worst_molecules(panels, path, count=12):
    """Draws the molecules with the largest errors, worst first, each with row, measured and predicted label.

    Args:
        panels (`dict[str, pandas.DataFrame]`): for each label test molecules with `row`, `text`, `label` and
            `prediction`; several labels share the `count`, each in lines of its own.
    """
    from rdkit.Chem.Draw import rdMolDraw2D

    columns = 4
    if len(panels) > MOST_PANELS:
        logger.info("%s shows the first %d of %d labels", Path(path).name, MOST_PANELS, len(panels))
    drawn, legends = [], []
    for name, molecules in list(panels.items())[:MOST_PANELS]:
        most = columns * -(-count // (columns * len(panels)))
        shown = molecules.loc[(molecules["prediction"] - molecules["label"]).abs().nlargest(most).index]
        which = f"{shorten(name, 12)}, " if len(panels) > 1 else ""
        for row, text, label, prediction in shown[["row", "text", "label", "prediction"]].itertuples(index=False):
            drawn.append(parse_smiles(text))
            legends.append(f"{which}row {row}: measured {label:.2f}, predicted {prediction:.2f}")
        while len(drawn) % columns:  # the next label begins a line
            drawn.append(None)
            legends.append("")
    drawer = rdMolDraw2D.MolDraw2DCairo(300 * columns, 250 * (len(drawn) // columns), 300, 250)
    drawer.drawOptions().legendFontSize = 18 if len(panels) == 1 else 14
    drawer.DrawMolecules(drawn, legends=legends)
    drawer.FinishDrawing()
    write_bytes(drawer.GetDrawingText(), path)


def plot_losses(log_history, path, held_out, loss_name):
    """Draws training and held-out loss by epoch, from a trainer's log; `loss_name` says which loss it is."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, name in (("loss", "training"), ("eval_loss", held_out)):
        points = [(entry["epoch"], entry[key]) for entry in log_history if key in entry and "epoch" in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 50 else None, markersize=4, label=name)
    held = [(entry["eval_loss"], entry["epoch"]) for entry in log_history if "eval_loss" in entry]
    if held:
        axes.axvline(min(held)[1], color="0.6", linewidth=1, linestyle="--", label=f"lowest {held_out} loss")
    axes.set(xlabel="epoch", ylabel=loss_name.replace(" + ", " +\n"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    save_figure(figure, path)


def save_figure(figure, path):
    """Writes a figure as PNG, whole or not at all."""
    with io.BytesIO() as file:
        figure.savefig(file, dpi=150)
        write_bytes(file.getvalue(), path)


# ---------------------------------------------------------------------------------------------------------------- card


def shown_path(folder):
    """Returns a folder as a command in this project's folder takes it: relative if inside it, else as it was given."""
    return (Path(folder).is_absolute() and project_path(folder)) or str(Path(folder))


class Run:
    """A finished run as its files tell it.

    Attributes:
        values (`dict`): its arguments. results (`dict`): its metrics. split (`dict`): rows of each part.
        model_folder (`Path` or `None`): where its weights are. label_names (`list[str]`): of several labels.
    """

    def __init__(self, folder, kind, name=None, model_folder=None, revision=None):
        self.folder, self.kind, self.pushed = Path(folder), kind, name is not None
        self.revision = revision  # branch on the Hub, where it is not the main one
        self.name = name or shown_path(folder)
        self.values, self.results = (read_json(self.folder / file) for file in (ARGUMENTS_FILE, "all_results.json"))
        self.split = read_json(self.folder / "splits.json")
        found = [self.folder, Path(model_folder or self.folder), *member_folders(self.folder)]
        self.model_folder = next((path for path in found if (path / "config.json").exists()), None)
        config = read_json(self.model_folder / "config.json") if self.model_folder is not None else {}
        columns = self.values.get("label_column") or []
        self.label_names = config.get("label_names") or (columns if len(columns) > 1 else [])
        self.head_descriptors = config.get("head_descriptors") or []
        self.smiles_form = config.get("smiles_form") or self.values.get("smiles_form")
        self.shown_labels = list((config.get("id2label") or {}).values())
        source = self.values.get("dataset_name")  # of the Hub, or a folder here, which only has a name for others
        self.hub_data = None if source is None or Path(source).is_dir() else source

    @property
    def learned_tokens(self):
        """Whether masked tokens were among what a pre-training has learned; true of all other runs."""
        return "mlm" in self.values.get("objective", "mlm").split("+")

    @property
    def member(self):
        """The folder's name of the ensemble's member that stands for it; `None` if there is no ensemble."""
        inside = self.model_folder is not None and self.model_folder.parent == self.folder
        return self.model_folder.name if inside and self.model_folder.name.startswith("member-") else None

    @property
    def history(self):
        """What the trainer has logged, of an ensemble that of its first member."""
        for folder in filter(None, (self.folder, self.model_folder)):
            state = read_json(folder / "trainer_state.json")
            if state:
                return state["log_history"]
        return []

    def exists(self, name):
        return self.model_folder is not None and (self.model_folder / name).exists()

    @property
    def metrics(self):
        """The metrics of the model, by name; what a run without predictions evaluated, by the name of that part."""
        if self.kind == "influence":
            return self.results.get("results", {}).get("selected", {})
        if self.kind == "mlm" or any(key.startswith("test_") for key in self.results):
            return self.results
        part = "test" if self.values.get("protocol") == "paper" else "validation"
        evaluated = {key: value for key, value in self.results.items() if key.startswith("eval_")}
        return {f"{part}_{key.removeprefix('eval_')}": value for key, value in evaluated.items()} | self.results

    @property
    def address(self):
        """What `from_pretrained` takes; of an ensemble, with the folder of a member as well."""
        beside = self.model_folder not in (None, self.folder) and self.kind in ("influence", "peft")
        return f"{self.name}/{self.model_folder.name}" if beside and not self.pushed else self.name

    def link(self, name):
        """Returns a figure's path in a card; `None` if there is none."""
        if (self.folder / name).exists():
            return name
        if not self.exists(name):
            return None
        at_root = self.pushed and self.kind == "influence"
        return name if at_root else f"{self.model_folder.name}/{name}"

    @property
    def holds_adapter(self):
        """Whether the base's weights lie elsewhere."""
        return self.exists("adapter_config.json") or self.exists("trained_parameters.json")

    @property
    def embedded_data(self):
        path = self.values.get("train_file")
        known = bool(self.results)  # not of an adapter that was merged and does not say what it has learned
        is_embedded = path is None or Path(path).resolve() == Path(EMBEDDED_DATA)
        return known and not self.values.get("dataset_name") and is_embedded

    @property
    def data(self):
        """Name of the data set as a card may give it."""
        if self.embedded_data:
            return "MoleculeNet Lipophilicity"
        if not self.results:
            return "not known"
        return self.hub_data or Path(self.values.get("dataset_name") or self.values["train_file"]).resolve().name

    def data_of(self, part):
        """Name of the data set that a part of the molecules is of: the part's own file, if it has one."""
        file = self.values.get(f"{part}_file")
        return Path(file).name if file else self.data

    @property
    def label(self):
        """What the label is called."""
        columns = self.values.get("label_column") or self.shown_labels or ["the label"]
        if len(columns) > 1:
            return " and ".join(columns)
        return self.values.get("label_name") or ("logD7.4" if self.embedded_data else " and ".join(columns))

    @property
    def read_from(self):
        """Where the run read what it started from; `None` if from scratch."""
        source = self.values.get("model_name_or_path")
        if self.kind == "influence":  # what its models were fine-tuned from
            source = self.results.get("influence", {}).get("fine_tuned_from") or source
        if source is None:
            return None if self.values.get("config_name") else EMBEDDED_CHECKPOINT
        return source if Path(source).exists() or not (ROOT / source).exists() else str(ROOT / source)

    @property
    def start(self):
        """What the run started from, as others are to find it; `None` if from scratch."""
        return (self.values.get("base_hub_name") if self.holds_adapter else None) or self.read_from

    @property
    def base(self):
        """The same as a card may name it: a Hub name, a path in this project, a folder's name."""
        if self.start is None or not Path(self.start).exists():
            return self.start
        return project_path(self.start) or Path(self.start).resolve().name

    @property
    def base_is_on_hub(self):
        return bool(self.base) and "/" in self.base and not (ROOT / self.base).exists()

    def counted(self, part, end):
        """Returns a part's name with the number of its molecules that have a label, if the run has told it."""
        count = self.metrics.get(f"{part}_samples{end}")
        return part if count is None else f"{part} (n = {count})"

    @property
    def ends(self):
        """What stands after a metric's name for each label: the name of one of several, or nothing."""
        return [f"_{name}" for name in self.label_names] or [""]


def model_card(run):
    """Returns the card of a finished `Run` (`huggingface_hub.ModelCard`), with its results as `model-index`."""
    cited = {"MoLFormer": True, "MoleculeNet": run.embedded_data, "influence": run.kind == "influence"}
    papers = [PAPERS[name] for name, wanted in cited.items() if wanted]
    parts = [
        f"# {run.name.rstrip('/').split('/')[-1]}",
        introduction(run),
        results_section(run),
        *(f"{caption(run, name)}\n\n![{name}]({run.link(name)})" for name in FIGURES if run.link(name)),
        usage_section(run),
        protocol_section(run),
        training_section(run),
        limits_section(run),
        "## Citation\n\n" + "\n".join(f"- {paper}" for paper in papers),
    ]
    text = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{card_data(run).to_yaml()}\n---\n\n{text}\n")


def caption(run, name):
    """Returns what is to be seen in a figure."""
    if name == "loss_curves.png" and not any("eval_loss" in entry for entry in run.history):
        return "Training losses by epoch."
    return FIGURES[name]


def license_of_base(run):
    """Returns the license that the card of the checkpoint names from which a run started; `None` if none is known."""
    hub = {"cache_dir": run.values.get("cache_dir"), "revision": run.values.get("model_revision", "main")}
    for source in dict.fromkeys(filter(None, (run.read_from, run.start))):
        if source in LICENSES:
            return LICENSES[source]
        try:
            card = find_file(source, CARD_FILE, hub)
            if card is not None and (found := ModelCard.load(card).data.license):
                return found
        except (ValueError, TypeError, AttributeError, OSError, yaml.YAMLError):  # no access, or somebody's text
            continue
    return None


def hub_type(name):
    """Returns the name of a data file as the Hub takes it in metadata, which are refused otherwise."""
    return re.sub(r"[^\w.-]+", "-", name.lower(), flags=re.ASCII).strip("-") or "data"


def card_data(run):
    """Returns the metadata of a card: license, base, tags, and results as `model-index`."""
    evaluations = [
        EvalResult(
            task_type="regression",
            task_name=f"prediction of {end.removeprefix('_') or run.label}",
            dataset_type=run.hub_data or hub_type(run.data_of(part)),
            dataset_name=f"{run.data_of(part)}, {run.split.get('split', 'unknown')} split",
            dataset_config=end.removeprefix("_") or None,  # without it, all labels would be taken for one task
            dataset_split=run.counted(part, end),
            metric_type=key,
            metric_name=", ".join(filter(None, (METRICS[key], part, end.removeprefix("_")))),
            metric_value=round(run.metrics[f"{part}_{key}{end}"], 6),
        )
        for end in run.ends
        for part in ("validation", "test")
        for key in METRICS
        if f"{part}_{key}{end}" in run.metrics
    ]
    partial = run.exists(PARTIAL_FILE)  # which no library but these scripts makes whole
    whole = run.model_folder is not None and not partial
    return ModelCardData(
        license=license_of_base(run),
        library_name=None if partial else "peft" if run.exists("adapter_config.json") else "transformers",
        pipeline_tag=TASKS[run.kind == "mlm"] if whole and run.learned_tokens else None,
        base_model=run.base if run.base_is_on_hub else None,
        datasets=[run.hub_data] if run.hub_data else None,
        metrics=None if run.kind == "mlm" else ["mse", "mae", "r_squared"],
        tags=["chemistry", "molformer", "smiles", *([] if run.kind == "mlm" else ["regression"])],
        model_name=run.name.split("/")[-1] if evaluations else None,
        eval_results=evaluations or None,
    )


def introduction(run):
    """Returns what the model is, in a few lines."""
    start = f"fine-tuned from `{run.base}`" if run.base else "trained from random weights"
    if run.kind == "mlm" and run.model_folder is None:
        return f"An evaluation of `{run.base}`, a MoLFormer that learned SMILES, on {run.data}."
    if run.kind == "mlm":
        return f"A MoLFormer that learned SMILES ({run.values.get('objective', 'mlm')}), {start}, on {run.data}."
    if run.model_folder is None and run.kind in ("regression", "peft"):
        return f"An evaluation of `{run.base}`, which predicts {run.label} from SMILES, in the unit of the label."
    scores = run.results.get("influence", {})
    if run.model_folder is None:
        return (
            f"Influence scores of {scores.get('molecules')} molecules, in `influence_scores.csv`: what learning each "
            f"of them would do to the loss of the {scores.get('score_split')} molecules, as foretold for "
            f"`{Path(scores.get('model', '')).name}`, which predicts {run.label}. There is no model here."
        )
    method = f" with {run.results['peft_method']}" if "peft_method" in run.results else ""
    if run.member is not None:
        start = f"an ensemble of {run.results.get('members')} models whose mean is the prediction, {start}"
    text = f"MoLFormer, {start}{method}, predicts {run.label} from SMILES, in the unit of the label."
    if run.holds_adapter and run.base and not run.base_is_on_hub:
        text += f" Its base, `{run.base}`, is a local folder."
    return text


def results_section(run):
    """Returns the table of results."""
    results, lines = run.results, ["## Results", ""]
    if run.kind == "mlm":
        times = ("runtime", "per_second", "preparation_time", "samples")
        keys = [key for key in results if key.startswith("eval_") and not key.endswith(times)]
        count = results.get("eval_samples", 0)
        lines += [f"| {count} held-out molecules | |", "| --- | ---: |"]
        lines += [f"| {key.removeprefix('eval_').replace('_', ' ')} | {results[key]:.4g} |" for key in keys]
        return "\n".join(lines) if keys else ""
    if run.kind == "influence":
        keys = ["validation_mse", *(f"test_{key}" for key in METRICS)]
        if results.get("results"):
            lines += ["| molecules added | how many | validation MSE | test MSE | RMSE | MAE | R² |"]
            lines += ["| --- " + "| ---: " * 6 + "|"]
        for name, row in results.get("results", {}).items():
            texts = [f"{row[key]:.4f}" if key in row else "" for key in keys]
            lines.append(f"| {name} | {row['added']} | {' | '.join(texts)} |")
        if results.get("influence", {}).get("leakage"):
            lines += ["", "Molecules were chosen by the loss of the test set, so its numbers are optimistic."]
        if not results.get("influence", {}).get("converged", True):
            lines += ["", f"The scores are {results['influence']['verdict']} (see `influence.json`)."]
        losses = results.get("evaluation_losses", {})
        if "selected" in losses:
            beside = (
                ", and the source paper's, one an epoch and of molecules that it had learned"
                if "paper" in losses
                else ""
            )
            lines += ["", f"Evaluation losses after the selection (standardized labels){beside}:"]
            epochs = range(1, max(map(len, losses.values())) + 1)
            lines += ["", f"| evaluation | {' | '.join(map(str, epochs))} |", "| --- |" + " ---: |" * len(epochs)]
            for name, values in (("ours", losses["selected"]), ("paper", losses.get("paper", []))):
                if not values:
                    continue
                texts = [f"{value:.3f}" for value in values] + [""] * (len(epochs) - len(values))
                lines.append(f"| {name} | {' | '.join(texts)} |")
        return "\n".join(lines) if len(lines) > 2 else ""
    rows = [("this model", part, "") for part in ("train", "validation", "test")]
    rows += [("ridge regression on Morgan fingerprints", "test", "_fingerprint_ridge")]
    rows += [("mean of the training labels", "test", "_mean")]
    table = []
    for end in run.ends:
        for model, part, which in rows:
            numbers = [run.metrics.get(f"{part}_{key}{which}{end}") for key in METRICS]
            if numbers[0] is not None:
                texts = [f"{number:.4f}" if number is not None else "" for number in numbers]
                label = end.replace("_", ": ", 1).replace("|", r"\|")
                cells = (f"{model}{label}", part, str(run.metrics.get(f"{part}_samples{end}", "")))
                table.append(f"| {' | '.join([*cells, *texts])} |")
    if not table:
        return ""
    lines += ["| model | split | n | MSE | RMSE | MAE | R² |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    chosen = run.model_folder is not None and run.values.get("load_best_model_at_end", True)
    if run.values.get("protocol") == "paper" and chosen:
        table += ["", "The epoch was chosen by the test loss, as in the paper, so the test numbers are optimistic."]
    return "\n".join(lines + table)


def usage_section(run):
    """Returns how the model is loaded, with and without this project's scripts; nothing if there is no model."""
    if run.model_folder is None:
        return ""
    model, revision = f"--model_name_or_path {shlex.quote(run.address)}", ""
    if run.revision is not None:
        model, revision = f"{model} --model_revision {run.revision}", f', revision="{run.revision}"'
    command = f"python run_regression.py --do_predict {model} --test_file molecules.csv"
    if run.kind == "mlm":
        command = f"python run_regression.py {model} --train_file my.csv --output_dir outputs/my"
    scripts = f"```bash\n{command}\n```"
    imports, answer = (DESCRIPTOR_IMPORTS, DESCRIPTOR_ANSWER) if run.head_descriptors else ("", ANSWER)
    if len(run.label_names) > 1:
        answer = answer.replace("in the unit of the label", ", ".join(run.label_names))
    if run.holds_adapter:
        text = (
            "## Use\n\nHere is what was trained, and the name of its base. With the MoLFormer fine-tuning scripts, "
            f"which find the base:\n\n{scripts}"
        )
        if run.exists("adapter_config.json"):
            text += USE_OF_ADAPTER.format(name=f'"{run.name}"{revision}', imports=imports, answer=answer)
        return f"{text}\n\n{smiles_to_give(run)}"
    auto = "AutoModelForMaskedLM" if run.kind == "mlm" else "AutoModelForSequenceClassification"
    where = f'"{run.address}"'
    if run.member is not None:  # a subfolder's code is looked for at the root, where a pushed ensemble has it
        where = f'"{run.address}", subfolder="{run.member}"' if run.pushed else f'"{run.address}/{run.member}"'
    where += revision
    code = [f"{imports}from transformers import {auto}, AutoTokenizer", ""]
    code += [f"model = {auto}.from_pretrained({where}, trust_remote_code=True).eval()"]
    code += [f"tokenizer = AutoTokenizer.from_pretrained({where})"]
    if run.kind != "mlm":
        code.append(answer)
    lines = "\n".join(code)
    if not run.learned_tokens:  # so that the head for them is random
        return f"## Use\n\nWith the MoLFormer fine-tuning scripts:\n\n{scripts}\n\n{smiles_to_give(run)}"
    first = " This is the first of the models whose mean the scripts predict." if run.member is not None else ""
    return (
        f"## Use\n\n```python\n{lines}\n```\n\n`trust_remote_code` runs the `modeling_molformer_reg.py` that lies "
        f"beside the weights; read it first.{first} Without remote code, with the MoLFormer fine-tuning scripts:\n\n"
        f"{scripts}\n\n{smiles_to_give(run)}"
    )


def smiles_to_give(run):
    """Returns which SMILES the model is to be given."""
    if run.smiles_form == "raw":
        return "SMILES are read as they are: give them written as those that it was trained on."
    stereo = "with" if run.smiles_form == "isomeric" else "without"
    return f"SMILES are to be canonical as RDKit writes them, {stereo} stereo (the scripts bring them into this form)."


def limits_section(run):
    """Returns what the model is for, and what not; nothing if there is no model."""
    if run.model_folder is None:
        return ""
    if run.kind == "mlm":
        return LIMITS_OF_PRETRAINING
    stereo = "; molecules that differ in stereo alone get one prediction" if run.smiles_form == "canonical" else ""
    return LIMITS.format(stereo=stereo)


def protocol_section(run):
    """Returns data, split and command."""
    sizes = {name: len(rows) for name, rows in run.split.items() if isinstance(rows, list)}
    pool, wrong = sizes.pop("pool", 0), sizes.pop("corrupted", 0)  # taken out of the training part
    files = [f"{run.data_of(part)} ({part})" for part in ("validation", "test") if run.values.get(f"{part}_file")]
    lines = ["## Data and protocol", "", f"- Data: {', '.join([run.data, *files])}"]
    if run.kind == "mlm" and "train_samples" in run.results:
        count, epochs = run.results["train_samples"], run.results.get("epoch", 1)
        seen = f"about {round(epochs * count)} of {count}" if epochs < 1 else count
        lines.append(f"- Learned from {seen} molecules")
    if run.kind == "influence":
        lines.append(f"- {scored_molecules(run, pool, wrong)}")
    if sizes:
        text = ", ".join(f"{count} {name}" for name, count in sizes.items())
        hashed = f"hash `{run.split.get('hash')}` (`splits.json` has the rows)"
        lines.append(f"- Split: {run.split.get('split')}, {text}; {hashed}")
        trained = "train_loss" in run.results or run.results.get("members")
        chosen = run.kind == "mlm" or run.values.get("protocol") == "paper"
        if trained and "validation" not in sizes and not chosen:
            lines.append("- No molecules were held out to choose the epoch: the model is that of the last one.")
        if run.kind == "mlm" and run.model_folder is not None:
            lines.append("- Nothing of the other parts was learned.")
        elif run.kind != "mlm" and "test" not in sizes:
            lines.append(f"- {no_test(sizes)}")
    flags = as_flags({name: value for name, value in without_folders(run.values).items() if name != "output_dir"})
    lines.append(
        f"{CARD_MARK}{run.kind}.py FOLDER/{ARGUMENTS_FILE} --output_dir outputs/again`, with the path of "
        f"this folder, where the files that it names lie; it stands for: `{shlex.join(flags)}`"
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "rdkit": rdBase.rdkitVersion}
    lines.append("- Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    return "\n".join(lines)


def scored_molecules(run, pool, wrong):
    """Returns which molecules were scored, and how many of them the model learned."""
    scores, source = run.results.get("influence", {}), run.values.get("external_file")
    text = f"Scored: {scores.get('molecules')} molecules of {Path(source).name}" if source else (
        f"Scored: a pool of {pool} molecules, taken out of the training part, the labels of {wrong} permuted"
    )  # fmt: skip
    learned = ", and learned by the model here beside the training part" if run.model_folder is not None else ""
    return f"{text}; {scores.get('selected')} of them are selected{learned}"


def no_test(parts):
    """Returns what a run without a test set tells, and what it does not."""
    text = "No molecules were held out as a test set: "
    if "validation" in parts:
        return f"{text}the only estimate is the validation error, which is optimistic if it chose the epoch."
    return f"{text}this run does not tell how well the model predicts others."


def training_section(run):
    """Returns the table of losses, about twenty lines at most, with the best and the last one.

    By epoch, and by step where there was less than one.
    """
    losses = {entry["step"]: entry["loss"] for entry in run.history if "loss" in entry}
    held_out = {entry["step"]: entry["eval_loss"] for entry in run.history if "eval_loss" in entry}
    epochs = {entry["step"]: entry["epoch"] for entry in run.history if "epoch" in entry}
    steps = sorted(held_out or losses)
    if not steps:
        return ""
    unit = "epoch" if epochs[steps[-1]] >= 1 else "step"
    lines = ["## Training", ""]
    if run.member is not None:
        lines += ["Of the first of the models, as are the loss curves.", ""]
    lines += [f"| {unit} | training loss | held-out loss |", "| ---: | ---: | ---: |"]
    shown = {*steps[:: -(-len(steps) // 20)], steps[-1], *([min(held_out, key=held_out.get)] if held_out else [])}
    for step in sorted(shown):
        cells = (f"{values[step]:.4f}" if step in values else "" for values in (losses, held_out))
        place = f"{round(epochs[step], 2):g}" if unit == "epoch" else step
        lines.append(f"| {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


USE_OF_ADAPTER = """

In your own code, beside `modeling_molformer_reg.py` of these scripts (each adapter needs a base object of its own: a
second one in the same object would answer on the first one's scale of the labels):

```python
{imports}import modeling_molformer_reg
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

config, adapter = AutoConfig.from_pretrained({name}), PeftConfig.from_pretrained({name})
base, revision = adapter.base_model_name_or_path, adapter.revision or "main"
model = AutoModelForSequenceClassification.from_pretrained(base, revision=revision, config=config)
model = PeftModel.from_pretrained(model, {name}).eval()
tokenizer = AutoTokenizer.from_pretrained({name})
{answer}
```"""
ANSWER = 'print(model(**tokenizer("CCO", return_tensors="pt")).logits)  # in the unit of the label'
DESCRIPTOR_IMPORTS = """import torch
from rdkit.Chem import Descriptors, MolFromSmiles
"""
DESCRIPTOR_ANSWER = """
functions, molecule = dict(Descriptors.descList), MolFromSmiles("CCO")
descriptors = torch.tensor([[functions[name](molecule) for name in model.config.head_descriptors]])
print(model(**tokenizer("CCO", return_tensors="pt"), descriptors=descriptors).logits)  # in the unit of the label"""
LIMITS = """## Intended use and limits

For ranking and prioritizing molecules like those it was trained on, by people who can judge the answer. The error of a
molecule unlike the training molecules can be far larger than that of the test set{stereo}. Not for decisions on health
or safety."""
LIMITS_OF_PRETRAINING = """## Intended use and limits

A starting point for fine-tuning on molecules like those it has seen; it predicts no property by itself."""


# ---------------------------------------------------------------------------------------------------------------- push


def check_push(training_args):
    """Checks, before any work, that a push can be tried.

    Raises:
        InputError: if there is no token, or if the name is no name of a Hub repository, or if the Hub is switched off.
    """
    if not training_args.do_train:
        raise InputError(
            "--push_to_hub sends what a training made. Add it to the flags of the training, with "
            "--resume_from_checkpoint true if that is finished: then nothing is trained again."
        )
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push_to_hub needs a network, but HF_HUB_OFFLINE is set. Unset it, or leave the flag out.")
    if not (training_args.hub_token or get_token()):
        raise InputError(
            "--push_to_hub needs a token that may write. Log in with `hf auth login`, or set HF_TOKEN in the "
            "environment."
        )
    if training_args.hub_token:
        training_args.hub_token = training_args.hub_token.strip()
        if not re.fullmatch(r"[!-~]+", training_args.hub_token):  # or an error of the client would show it, escaped
            raise InputError("--hub_token holds characters that no token has, such as a space or a line break.")
    name = repository_name(training_args)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {name} is no name of a repository: {error}") from error


def repository_name(training_args):
    """Returns the name of the repository: that of `--hub_model_id`, else the output folder's."""
    return training_args.hub_model_id or Path(training_args.output_dir).resolve().name


def files_to_push(folder):
    """Returns the files of a run that go to the Hub, by their names: no molecules, no optimizer, nothing of others."""
    return {path.name: path for path in sorted(Path(folder).glob("*")) if PUSHED.fullmatch(path.name)}


def without_folders(value, key=""):
    """Returns values as JSON has them, local files and folders by their last part."""
    if isinstance(value, dict):
        return {name: without_folders(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item, key) for item in value]
    if not isinstance(value, str):
        return value
    inside = project_path(value)
    if Path(value).is_absolute() and inside is not None:  # such as the embedded checkpoint
        return inside
    named = Path(value).is_absolute() or key.endswith(("_file", "_dir", "_checkpoint"))
    outside = "/" in value and Path(value).exists() and inside is None
    return Path(value).name if named or outside else value


def contents_to_push(run, folders, replaced):
    """Returns what goes to the Hub: a path or bytes for each name in the repository."""
    files = {target + name: path for target, folder in folders for name, path in files_to_push(folder).items()}
    contents = {**files, **{name: text.encode() for name, text in (replaced or {}).items()}}
    for name, path in files.items():
        if path.suffix == ".json" and not NOT_REWRITTEN.fullmatch(path.name):
            contents[name] = json.dumps(without_folders(read_json(path)), indent=2).encode()
    # transformers looks for the code of a subfolder's model at the root
    code = [path for path in files.values() if path.name == MODELING_FILE]
    contents |= {MODELING_FILE: code[0]} if code else {}
    contents[CARD_FILE] = str(model_card(run)).encode()
    return contents


def push_run(training_args, kind, folders, replaced=None):
    """Sends what a run made to the Hub, in one commit, and returns its address.

    Args:
        folders (`list[tuple[str, Path]]`): folder in the repository ("" for its root) and local folder of each part;
            of two files of one name the later one counts.
        replaced (`dict[str, str]`, *optional*): other content for files, by their names in the repository.
    Raises:
        InputError: if the push fails; the local files stay as they are, and what was to be sent lies ready.
    """
    name, root = repository_name(training_args), folders[-1][1]
    revision = training_args.hub_revision
    contents = contents_to_push(Run(root, kind, name, folders[0][1], revision), folders, replaced)
    api = HfApi(token=training_args.hub_token)
    as_wanted = not training_args.hub_private_repo  # whether nobody else can read it, if nobody else is to
    try:
        repository = api.create_repo(name, private=training_args.hub_private_repo, exist_ok=True)
        # of a repository that is there already, the Hub leaves it as it is
        if training_args.hub_private_repo and not api.model_info(repository.repo_id).private:
            raise InputError(
                f"{repository.repo_id} is there already and public, so that --hub_private_repo true would not hold. "
                "Nothing was sent. Make it private on the Hub, or give another --hub_model_id; then run the same "
                "command with --resume_from_checkpoint true, which trains nothing again."
            )
        as_wanted = True
        run = Run(root, kind, repository.repo_id, folders[0][1], revision)  # now with its full name
        contents[CARD_FILE] = str(model_card(run)).encode()
        if revision is not None and not api.revision_exists(repository.repo_id, revision):
            api.create_branch(repository.repo_id, branch=revision)
        before = api.list_repo_files(repository.repo_id, revision=revision)
        operations = [CommitOperationAdd(file, content) for file, content in contents.items()]
        # what an earlier push left would be taken for a part of this model
        operations += [CommitOperationDelete(file) for file in before if OURS.fullmatch(file) and file not in contents]
        commit = api.create_commit(
            repository.repo_id,
            operations,
            commit_message="Model, metrics and card",
            revision=revision,
        )
    except InputError:
        raise
    except Exception as error:  # the client's own, and those of the library it speaks HTTP with, which changes
        token = training_args.hub_token or get_token()
        lines = str(error).replace(token, "…").strip().splitlines() if token else str(error).splitlines()
        reason = lines[0].rstrip(".") + ". " if lines else ""
        staged = stage(contents, Path(training_args.output_dir) / STAGED)
        command = ["hf", "upload", name, str(staged), "."]
        for pattern in OTHER_MODELS:  # what an earlier push left would be taken for a part of this model
            command += ["--delete", pattern]
        command += ["--private"] if training_args.hub_private_repo else []
        command += ["--revision", revision] if revision else []
        again = shlex.join(command)
        if not as_wanted:  # that one ignores --private where there is a public repository
            again = "the same command and --resume_from_checkpoint true, which trains nothing again"
        login = "" if get_token() else " (log in with `hf auth login` first)"
        raise InputError(
            f"The push to {name} failed: {type(error).__name__}: {reason}The run in "
            f"{training_args.output_dir} is whole. Push it again with: {again}{login}"
        ) from error
    logger.info("Pushed %d files to %s", len(contents), commit.repo_url)
    if is_card((staged := Path(training_args.output_dir) / STAGED) / CARD_FILE):  # of a push that failed before
        shutil.rmtree(staged)
    return str(commit.repo_url)


def stage(contents, folder):
    """Writes what is to be pushed into a folder of its own, in place of an earlier one's, and returns the folder."""
    if is_card(folder / CARD_FILE):
        shutil.rmtree(folder)
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            shutil.copyfile(content, path)
    return folder


def write_card(folder, kind, model_folder=None):
    """Writes the card of a run into its folder, beside a README.md of the user's."""
    for path in (Path(folder) / CARD_FILE, Path(folder) / OWN_CARD_FILE):
        if not path.exists() or is_card(path):
            return write_text(str(model_card(Run(folder, kind, model_folder=model_folder))), path)
    logger.warning("No card is written: %s and %s in %s are of another's, and stay", CARD_FILE, OWN_CARD_FILE, folder)


def finish_run(training_args, kind, folders=None, replaced=None):
    """Writes the card of a run, marks the run as finished, and pushes it if `--push_to_hub` says so.

    Args:
        kind (`str`): regression, mlm, peft or influence: the script.
        folders, replaced: for `push_run`; by default the output folder. The first one has the model, the last one
            what the card tells.
    """
    folders = folders or [("", Path(training_args.output_dir))]
    if training_args.should_save:
        write_card(training_args.output_dir, kind, folders[0][1])
    end_writing(training_args)
    logger.info("Everything is in %s", training_args.output_dir)
    if training_args.push_when_done and training_args.should_save:
        push_run(training_args, kind, folders, replaced)
