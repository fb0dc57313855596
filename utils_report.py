"""What a run shows: tables, plots, the model card; and its way to the Hub.

    python -c "from utils_report import *; print(model_card('outputs/regression', 'regression'))"

A card is made from the files of a finished run alone, so it says what the folder holds. A push sends model or adapter,
tokenizer, modeling file, metrics, plots and card in one commit; checkpoints, logs of the optimizer and tokens stay.
"""

import json
import logging
import os
import shlex
from importlib.metadata import version
from pathlib import Path

import numpy as np
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from arguments import ARGUMENTS_FILE, EMBEDDED_DATA, ROOT, InputError, end_writing
from utils_molecules import parse_smiles, regression_metrics, write_text


CARD_FILE = "README.md"
PUSHED = ("*.safetensors", "*.json", "*.png", "modeling_molformer_reg.py", CARD_FILE)  # no molecules, no optimizer
METRICS = {"mse": "MSE", "rmse": "RMSE", "mae": "MAE", "r2": "R²"}
FIGURES = {
    "parity.png": "Predicted against measured values of the test set: the closer to the line, the better.",
    "residuals.png": "Errors against size and against the label: a slope says that extremes are drawn to the mean; "
    "the line is the mean error of ten groups of like size.",
    "worst_molecules.png": "The test molecules with the largest errors: look for a common group, or for a label that "
    "may be wrong.",
    "loss_curves.png": "Losses by epoch: the model is that of the dashed line; a held-out loss that rises there says "
    "that fewer epochs suffice.",
    "influence_scores.png": "Influence scores of the external molecules, and against their loss.",
    "influence_convergence.png": "Norm and residual of the inverse-Hessian-vector product; flat is converged.",
    "influence_selection.png": "Test error with the selected molecules, and with the controls.",
}
PAPERS = {
    "MoLFormer": "Ross et al., Large-scale chemical language representations capture molecular structure and "
    "properties, Nature Machine Intelligence 4 (2022), https://arxiv.org/abs/2106.09553",
    "MoleculeNet": "Wu et al., MoleculeNet, Chemical Science 9 (2018), https://arxiv.org/abs/1703.00564",
}
LICENSES = {"ibm/MoLFormer-XL-both-10pct": "apache-2.0"}

logger = logging.getLogger("molformer.hub")


# ---------------------------------------------------------------------------------------------------- tables and plots


def metrics_table(rows):
    """Returns a text table of (model, split, n, metrics) rows, one line a row, in label units."""
    lines = [f"{'model':<20} {'split':<11} {'n':>6} {'MSE':>10} {'RMSE':>10} {'MAE':>10} {'R²':>10}"]
    for model, split, count, values in rows:
        numbers = " ".join(
            f"{values[name]:10.4f}" if name in values else f"{'':10}" for name in ("mse", "rmse", "mae", "r2")
        )
        lines.append(f"{model:<20} {split:<11} {count:>6} {numbers}")
    return "\n".join(lines)


def plot_parity(panels, path):
    """Draws predicted against measured values of the test set, with the line of perfect prediction.

    Args:
        panels (`list`): for each label its name, predictions (N,) and measured values (N,).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 5), layout="constrained")
    for axes, (name, predictions, labels) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        low, high = min(np.min(labels), np.min(predictions)), max(np.max(labels), np.max(predictions))
        margin = 0.05 * (high - low or 1)
        axes.plot([low - margin, high + margin], [low - margin, high + margin], color="0.6", linewidth=1, zorder=1)
        axes.scatter(labels, predictions, s=10, alpha=0.5, linewidths=0, zorder=2)
        axes.set(xlabel=f"measured {name}", ylabel=f"predicted {name}", aspect="equal")
        metrics = regression_metrics(predictions, labels)
        r2 = f", R² {metrics['r2']:.3f}" if "r2" in metrics else ""
        axes.set_title(
            f"Test set, n = {len(labels)}: RMSE {metrics['rmse']:.3f}, MAE {metrics['mae']:.3f}{r2}", fontsize=10
        )
        axes.set_xlim(low - margin, high + margin)
        axes.set_ylim(low - margin, high + margin)
    save_figure(figure, path)


def plot_residuals(molecules, path, label_name):
    """Draws the errors of the test set against size and measured label, with the mean error of ten like groups.

    Args:
        molecules (`pandas.DataFrame`): with `text`, `label` and `prediction`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    errors = (molecules["prediction"] - molecules["label"]).to_numpy()
    sizes = [parse_smiles(text).GetNumHeavyAtoms() for text in molecules["text"]]
    values = {"heavy atoms": np.asarray(sizes, dtype=float), f"measured {label_name}": molecules["label"].to_numpy()}
    for axes, (name, numbers) in zip(figure.subplots(1, 2, sharey=True), values.items(), strict=True):
        axes.axhline(0, color="0.6", linewidth=1)
        axes.scatter(numbers, errors, s=8, alpha=0.4, linewidths=0)
        groups = [rows for rows in np.array_split(np.argsort(numbers, kind="stable"), 10) if len(rows)]
        means = [(numbers[rows].mean(), errors[rows].mean()) for rows in groups]
        axes.plot(*zip(*means, strict=True), color="tab:red", marker="o", markersize=4, label="mean of a tenth")
        axes.set_xlabel(name)
    figure.axes[0].set_ylabel("predicted minus measured")
    figure.axes[0].legend(frameon=False)
    save_figure(figure, path)


def draw_worst_molecules(molecules, path, count=12):
    """Draws the molecules with the largest errors, worst first, each with row, measured and predicted label."""
    from rdkit.Chem.Draw import rdMolDraw2D

    worst = (molecules["prediction"] - molecules["label"]).abs().nlargest(count).index
    shown = molecules.loc[worst]
    columns = min(4, len(shown))
    drawer = rdMolDraw2D.MolDraw2DCairo(300 * columns, 250 * -(-len(shown) // columns), 300, 250)
    drawer.drawOptions().legendFontSize = 18
    legends = [
        f"row {row}: measured {label:.2f}, predicted {prediction:.2f}"
        for row, label, prediction in zip(shown["row"], shown["label"], shown["prediction"], strict=True)
    ]
    drawer.DrawMolecules([parse_smiles(text) for text in shown["text"]], legends=legends)
    drawer.FinishDrawing()
    temporary = Path(path).with_suffix(".part.png")
    temporary.write_bytes(drawer.GetDrawingText())
    os.replace(temporary, path)


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
    axes.set(xlabel="epoch", ylabel=loss_name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    save_figure(figure, path)


def save_figure(figure, path):
    temporary = Path(path).with_suffix(".part.png")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------- card


def model_card(folder, kind, name=None):
    """Returns the card of a finished run (`huggingface_hub.ModelCard`), with its results as `model-index`.

    Args:
        folder (`str` or `Path`): output folder of the run.
        kind (`str`): regression, mlm, peft or influence: the script.
        name (`str`, *optional*): name of the repository, if it is pushed; else the card names the folder.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    values, results = read_json(folder / ARGUMENTS_FILE), read_json(folder / "all_results.json")
    data = card_data(folder, kind, name, values, results)
    parts = [
        f"# {name.split('/')[-1]}",
        introduction(kind, values),
        results_section(folder, kind, values, results),
        *(f"{text}\n\n![{name}]({name})" for name, text in FIGURES.items() if (folder / name).exists()),
        usage_section(folder, kind, name),
        protocol_section(folder, kind, values),
        training_section(folder),
        LIMITS if kind != "mlm" else LIMITS_OF_PRETRAINING,
        "## Citation\n\n" + "\n".join(f"- {paper}" for paper in PAPERS.values()),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n")


def read_json(path):
    """Returns what a JSON file holds; nothing, if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def base_of(folder, values):
    """Returns what a run started from, as a card may give it: a Hub name, a path in this project, or a folder's name.

    `None` for a model from scratch.
    """
    source = values.get("model_name_or_path")
    if source is None:
        return None if values.get("config_name") else "models/molformer-mini"
    path = Path(source)
    if not path.exists():
        return source
    inside = ROOT in path.resolve().parents
    return path.resolve().relative_to(ROOT).as_posix() if inside else path.name


def label_ends(folder):
    """Returns what stands after a metric's name for each label: the name of one of several, or nothing."""
    configs = [folder / "config.json", folder / "member-0" / "config.json"]
    names = next((read_json(path).get("label_names") for path in configs if path.exists()), None)
    return [f"_{name}" for name in names] if names else [""]


def data_name(values):
    """Returns the name of the data set as a card may give it."""
    if values.get("dataset_name"):
        return values["dataset_name"]
    file = values.get("train_file")
    return "MoleculeNet Lipophilicity" if file in (None, EMBEDDED_DATA) else Path(file).name


def card_data(folder, kind, name, values, results):
    """Returns the metadata of a card: licence, base, tags, and results as `model-index`."""
    base = base_of(folder, values)
    card = ROOT / base / CARD_FILE if base else None
    known = ModelCard.load(card).data.license if card is not None and card.exists() else LICENSES.get(base)
    adapter = (folder / "adapter_config.json").exists()
    evaluations = [
        EvalResult(
            task_type="regression",
            task_name=f"prediction of {end.removeprefix('_') or values.get('label_name', 'the label')}",
            dataset_type=values.get("dataset_name") or data_name(values).lower().replace(" ", "-"),
            dataset_name=f"{data_name(values)}, {values.get('split') or 'random'} split",
            dataset_split=f"{part} (n = {results.get(f'{part}_samples')})",
            metric_type=key,
            metric_name=f"{METRICS[key]}, {part}",
            metric_value=round(results[f"{part}_{key}{end}"], 6),
        )
        for end in label_ends(folder)
        for part in ("validation", "test")
        for key in METRICS
        if f"{part}_{key}{end}" in results
    ]
    return ModelCardData(
        license=known,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="fill-mask" if kind == "mlm" else "text-classification",
        base_model=base if base and not (ROOT / base).exists() and "/" in base else None,
        datasets=[values["dataset_name"]] if values.get("dataset_name") else None,
        metrics=None if kind == "mlm" else ["mse", "mae", "r_squared"],
        tags=["chemistry", "molformer", "smiles", *([] if kind == "mlm" else ["regression"])],
        model_name=name.split("/")[-1] if evaluations else None,
        eval_results=evaluations or None,
    )


def introduction(kind, values):
    """Returns what the model is, in a few lines."""
    base = base_of(None, values)
    start = f"fine-tuned from `{base}`" if base else "trained from random weights"
    if kind == "mlm":
        return f"A MoLFormer that learned SMILES ({values.get('objective', 'mlm')}), {start}, on {data_name(values)}."
    method = f" with {values['peft_method']}" if kind == "peft" else ""
    text = f"MoLFormer, {start}{method}, predicts {values.get('label_name', 'the label')} from SMILES. "
    return text + "Predictions are in the unit of the label."


def results_section(folder, kind, values, results):
    """Returns the table of results."""
    lines = ["## Results", ""]
    if kind == "mlm":
        keys = [key for key in results if key.startswith("eval_") and isinstance(results[key], float)]
        lines += ["| held-out | |", "| --- | ---: |"]
        lines += [f"| {key.removeprefix('eval_').replace('_', ' ')} | {results[key]:.4g} |" for key in keys]
        return "\n".join(lines) if keys else ""
    if kind == "influence":
        lines += ["| molecules added | n | test MSE | MAE | R² |", "| --- | ---: | ---: | ---: | ---: |"]
        for name, row in results.get("results", {}).items():
            texts = [f"{row[f'test_{key}']:.4f}" if f"test_{key}" in row else "" for key in ("mse", "mae", "r2")]
            lines.append(f"| {name} | {row['added']} | {' | '.join(texts)} |")
        return "\n".join(lines)
    lines += ["| model | split | n | MSE | RMSE | MAE | R² |", "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    rows = []
    for end in label_ends(folder):
        name = end.replace("_", ": ", 1)
        rows += [(f"this model{name}", part, f"{part}_{{}}{end}") for part in ("train", "validation", "test")]
        rows += [(f"ridge regression on Morgan fingerprints{name}", "test", f"test_{{}}_fingerprint_ridge{end}")]
        rows += [(f"mean of the training labels{name}", "test", f"test_{{}}_mean{end}")]
    found = False
    for model, split, pattern in rows:
        numbers = [results.get(pattern.format(key)) for key in METRICS]
        if numbers[0] is not None:
            found = True
            texts = [f"{number:.4f}" if number is not None else "" for number in numbers]
            lines.append(f"| {model} | {split} | {results.get(f'{split}_samples', '')} | {' | '.join(texts)} |")
    if values.get("protocol") == "paper":
        lines += ["", "The epoch was chosen by the test loss, as in the paper, so the test numbers are optimistic."]
    return "\n".join(lines) if found else ""


def usage_section(folder, kind, name):
    """Returns how the model is loaded, with and without this project's scripts."""
    if kind == "mlm":
        code = "from transformers import AutoModelForMaskedLM, AutoTokenizer\n\n"
        code += f'model = AutoModelForMaskedLM.from_pretrained("{name}", trust_remote_code=True)\n'
        code += f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        command = f"python run_regression.py --model_name_or_path {name}"
    else:
        command = f"python run_regression.py --do_predict --model_name_or_path {name} --test_file molecules.csv"
        if (folder / "adapter_config.json").exists() or (folder / "trained_parameters.json").exists():
            return (
                "## Use\n\nThe folder holds what was trained, and the name of its base. With the MoLFormer fine-tuning"
                f" scripts, which find the base:\n\n```bash\n{command} --output_dir predicted\n```"
            )
        code = "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        code += (
            f'model = AutoModelForSequenceClassification.from_pretrained("{name}", trust_remote_code=True).eval()\n'
        )
        code += f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        code += 'print(model(**tokenizer("CCO", return_tensors="pt")).logits)  # in the unit of the label\n'
    return (
        f"## Use\n\n```python\n{code}```\n\n`trust_remote_code` runs the `modeling_molformer_reg.py` that lies beside "
        f"the weights; read it first. Without remote code, with the MoLFormer fine-tuning scripts:\n\n"
        f"```bash\n{command} --output_dir predicted\n```\n\nSMILES are to be canonical as RDKit writes them, without "
        "stereo (the scripts do so), unless the model was trained on another form."
    )


def protocol_section(folder, kind, values):
    """Returns data, split and command."""
    split = read_json(folder / "splits.json")
    sizes = {name: len(rows) for name, rows in split.items() if isinstance(rows, list)}
    lines = ["## Data and protocol", "", f"- Data: {data_name(values)}"]
    if sizes:
        text = ", ".join(f"{count} {name}" for name, count in sizes.items())
        lines.append(f"- Split: {split.get('split')}, {text}; hash `{split.get('hash')}` (`splits.json` has the rows)")
    flags = [f"--{flag}={value}" for flag, value in without_folders(values).items() if flag != "output_dir"]
    script = f"run_{kind}.py"
    lines.append(f"- Command: `python {script} {ARGUMENTS_FILE}`, which stands for: `{shlex.join(flags)}`")
    packages = ("torch", "transformers", "peft", "rdkit") if kind == "peft" else ("torch", "transformers", "rdkit")
    lines.append("- Versions: " + ", ".join(f"{package} {version(package)}" for package in packages))
    return "\n".join(lines)


def training_section(folder):
    """Returns the table of losses by epoch, at most twenty lines."""
    history = read_json(folder / "trainer_state.json").get("log_history", [])
    losses = {round(entry["epoch"], 2): entry["loss"] for entry in history if "loss" in entry}
    held_out = {round(entry["epoch"], 2): entry for entry in history if "eval_loss" in entry}
    if not held_out:
        return ""
    lines = ["## Training", "", "| epoch | training loss | held-out loss |", "| ---: | ---: | ---: |"]
    epochs = sorted(held_out)
    for epoch in epochs[:: max(1, len(epochs) // 20)]:
        loss = f"{losses[epoch]:.4f}" if epoch in losses else ""
        lines.append(f"| {epoch:g} | {loss} | {held_out[epoch]['eval_loss']:.4f} |")
    return "\n".join(lines)


LIMITS = """## Intended use and limits

For ranking and prioritizing molecules like those it was trained on, by people who can judge the answer. The error of a
molecule unlike the training molecules can be far larger than that of the test set; stereo twins get one prediction
unless the model was trained with stereo. Not for decisions on health or safety."""
LIMITS_OF_PRETRAINING = """## Intended use and limits

A starting point for fine-tuning on molecules like those it has seen; it predicts no property by itself."""


def write_card(folder, kind, training_args):
    """Writes the card of a finished run into its folder."""
    name = repository_name(training_args) if training_args.push_when_done else None
    write_text(str(model_card(folder, kind, name)), Path(folder) / CARD_FILE)


# ---------------------------------------------------------------------------------------------------------------- push


def check_push(training_args):
    """Checks, before any work, that a push can be tried.

    Raises:
        InputError: if there is no token, or if the name is no name of a Hub repository, or if the Hub is switched off.
    """
    if not training_args.push_when_done:
        return
    if not training_args.do_train:
        raise InputError(
            "--push_to_hub sends what a training made. Add --do_train, or send a finished run with: hf upload"
        )
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push_to_hub needs a network, but HF_HUB_OFFLINE is set. Unset it, or leave the flag out.")
    if not (training_args.hub_token or get_token()):
        raise InputError(
            "--push_to_hub needs a token that may write. Log in with `hf auth login`, or set HF_TOKEN in the "
            "environment."
        )
    try:
        validate_repo_id(repository_name(training_args))
    except HFValidationError as error:
        name = repository_name(training_args)
        raise InputError(f"--hub_model_id {name} is no name of a repository: {error}") from error


def repository_name(training_args):
    """Returns the name of the repository: that of `--hub_model_id`, else the output folder's."""
    return training_args.hub_model_id or Path(training_args.output_dir).resolve().name


def files_to_push(folder):
    """Returns the files of a run that go to the Hub, by their names."""
    found = {path.name: path for pattern in PUSHED for path in Path(folder).glob(pattern) if path.is_file()}
    return {name: found[name] for name in sorted(found) if name != "influence_state.safetensors"}


def without_folders(value):
    """Returns values as JSON has them, absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def push_run(training_args, folders, replaced=None):
    """Sends what a run made to the Hub, in one commit, and returns its address.

    Args:
        folders (`list[tuple[str, Path]]`): folder in the repository ("" for its root) and local folder of each part;
            of two files of one name the later one counts.
        replaced (`dict[str, str]`, *optional*): other content for files, by their names in the repository.
    Raises:
        InputError: if the push fails; the local files stay as they are.
    """
    name = repository_name(training_args)
    files = {target + file: path for target, folder in folders for file, path in files_to_push(folder).items()}
    contents = {**files, **{file: text.encode() for file, text in (replaced or {}).items()}}
    for file in contents.keys() & {ARGUMENTS_FILE, "trainer_state.json"}:
        contents[file] = json.dumps(without_folders(read_json(files[file])), indent=2).encode()
    api = HfApi(token=training_args.hub_token)
    try:
        repository = api.create_repo(name, private=training_args.hub_private_repo, exist_ok=True)
        commit = api.create_commit(
            repository.repo_id,
            [CommitOperationAdd(file, content) for file, content in contents.items()],
            commit_message="Model, metrics and card",
            revision=training_args.hub_revision,
        )
    except Exception as error:  # the client's own, and those of the library it speaks HTTP with, which changes
        token = training_args.hub_token or get_token()
        lines = str(error).replace(token, "…").strip().splitlines() if token else str(error).splitlines()
        patterns = " ".join(f"'{pattern}'" for pattern in PUSHED)
        again = f"hf upload {shlex.quote(name)} {shlex.quote(str(folders[-1][1]))} . --include {patterns}"
        raise InputError(
            f"The push to {name} failed: {type(error).__name__}: {lines[0] if lines else ''} The run in "
            f"{training_args.output_dir} is whole. Push it again with: {again}"
        ) from error
    logger.info("Pushed %d files to %s", len(contents), commit.repo_url)
    return str(commit.repo_url)


def finish_run(training_args, kind, folders=None, replaced=None):
    """Writes the card of a run, marks the run as finished, and pushes it if `--push_to_hub` says so.

    Args:
        kind (`str`): regression, mlm, peft or influence.
        folders, replaced: for `push_run`; by default the output folder.
    """
    if training_args.should_save:
        write_card(training_args.output_dir, kind, training_args)
    end_writing(training_args)
    if training_args.push_when_done and training_args.should_save:
        push_run(training_args, folders or [("", Path(training_args.output_dir))], replaced)
