"""utils_report.py: tables, plots and cards as a reader sees them, and pushes to a Hub that answers on this machine.

python -m pytest tests/test_utils_report.py
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import transformers.utils.hub
from conftest import ROOT
from hub_double import HubDouble
from huggingface_hub import ModelCard, constants
from PIL import Image

import run_influence
import run_mlm
import run_peft
import run_regression
import trainer_regression
import utils_report
from arguments import EMBEDDED_DATA, DataTrainingArguments, InputError, parse_arguments
from modeling_molformer_reg import MolformerForMaskedLM, MolformerForRegression
from utils_checkpoints import build_tokenizer
from utils_report import (
    Run,
    draw_worst_molecules,
    files_to_push,
    metrics_table,
    model_card,
    name_in_plot,
    plot_losses,
    plot_parity,
    plot_residuals,
    summarize_predictions,
)
from utils_runs import is_card


@pytest.fixture
def molecules(small_table):
    """48 molecules with their labels; without RDKit's canonical form, which nothing here needs."""
    table = pd.read_csv(small_table, nrows=48).rename(columns={"SMILES": "smiles"})
    return table.assign(row=range(48), group=table["smiles"], text=table["smiles"])


def test_predictions_are_summarized_over_members_and_forms():
    """Reference: worked by hand. Two members, one molecule, two forms."""
    members = [np.array([[[1.0], [3.0]]]), np.array([[[2.0], [6.0]]])]
    mean, spreads = summarize_predictions(members)
    assert mean.tolist() == [[3.0]]
    assert spreads["prediction_sd"] == pytest.approx(np.array([[2**0.5]]))  # of 2 and 4
    assert spreads["augment_sd"] == pytest.approx(np.array([[3 / 2**0.5]]))  # of 1.5 and 4.5
    mean, spreads = summarize_predictions([np.array([[[1.0, 5.0]], [[2.0, 6.0]]])])
    assert mean.tolist() == [[1.0, 5.0], [2.0, 6.0]] and spreads == {}


def test_many_molecules_have_no_ridge_regression_beside_them(molecules, monkeypatch):
    """It takes 60 kB a molecule, at the end of a long training."""
    rows = molecules.assign(split=["train"] * 30 + ["test"] * 18)
    predictions = rows[["label"]].to_numpy() + 0.5
    metrics, lines, tests = utils_report.measure_predictions(rows, predictions, "MoLFormer")
    assert [line[0] for line in lines] == ["MoLFormer", "MoLFormer", "mean", "fingerprint_ridge"]
    assert metrics["test_mse"] == pytest.approx(0.25) and len(tests[""]) == metrics["test_samples"] == 18
    monkeypatch.setattr(utils_report, "MOST_FOR_RIDGE", 47)
    fewer, lines, _ = utils_report.measure_predictions(rows, predictions, "MoLFormer")
    assert [line[0] for line in lines] == ["MoLFormer", "MoLFormer", "mean"]
    assert fewer == {name: value for name, value in metrics.items() if "fingerprint_ridge" not in name}


def test_predictions_are_written_before_the_baselines_are_computed(molecules, tmp_path, monkeypatch):
    def fail(texts):
        raise MemoryError

    monkeypatch.setattr(utils_report, "morgan_counts", fail)
    rows = molecules.assign(split=["train"] * 30 + ["test"] * 18)
    parts = dict(iter(rows.groupby("split")))
    members = {name: [np.zeros((len(part), 1, 1))] for name, part in parts.items()}
    with pytest.raises(MemoryError):
        utils_report.write_reports(tmp_path, parts, members, "hash", DataTrainingArguments())
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == 48 and (tmp_path / "splits.json").exists()


@pytest.mark.parametrize(("trained", "told"), [
    (True, "Protocol of the paper: the epoch was chosen by the test loss"),
    (False, "of a model that was trained by it, the epoch was chosen by the test loss"),
])  # fmt: skip
def test_an_evaluation_by_the_papers_protocol_claims_no_choice_of_its_own(molecules, tmp_path, trained, told):
    parts = {"train": molecules[:30].assign(split="train"), "test": molecules[30:].assign(split="test")}
    members = {name: [part["label"].to_numpy()[:, None, None]] for name, part in parts.items()}
    arguments = DataTrainingArguments(protocol="paper")
    assert told in utils_report.write_reports(tmp_path, parts, members, "hash", arguments, trained)[1]


@pytest.mark.parametrize(("error", "told"), [(0.0, False), (9.0, True)])
def test_a_model_that_is_worse_than_the_baseline_is_told(molecules, tmp_path, error, told):
    parts = {"train": molecules[:30].assign(split="train"), "test": molecules[30:].assign(split="test")}
    members = {name: [part["label"].to_numpy()[:, None, None] + error] for name, part in parts.items()}
    _, text = utils_report.write_reports(tmp_path, parts, members, "hash", DataTrainingArguments())
    assert ("Ridge regression on fingerprints has the lower error" in text) == told
    assert ("The mean of the training labels has the lower error: the model has learned nothing" in text) == told


@pytest.mark.parametrize("scale", [1, 10_000], ids=["logD", "labels in the hundreds"])
def test_the_columns_of_the_metrics_table_align(scale):
    values = {"mse": 1.2345678 * scale, "rmse": 1.1111111 * scale**0.5, "mae": 0.5 * scale**0.5, "r2": -0.25}
    rows = [
        ("MoLFormer", "validation", 336, values),
        ("fingerprint_ridge", "test", 4200, values),
        ("mean", "test", 1, {name: values[name] for name in ("mse", "rmse", "mae")}),
    ]
    header, *lines = metrics_table(rows).split("\n")
    assert header.split() == ["model", "split", "n", "MSE", "RMSE", "MAE", "R²"]
    assert {len(line) for line in lines} == {len(header)}
    assert lines[0].split() == [
        "MoLFormer", "validation", "336", *(f"{values[name]:.4f}" for name in ("mse", "rmse", "mae", "r2"))
    ]  # fmt: skip
    for title in ("n", "MSE", "RMSE", "MAE"):
        end = header.index(f" {title} ") + len(title) + 1
        assert all(line[end - 1] != " " and line[end] == " " for line in lines), title


def colored(path):
    """Share of the pixels of a PNG that are neither white, black nor gray."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 250
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return (np.ptp(pixels, axis=2) > 40).mean()


def some_molecules(count):
    """Test molecules with labels, and predictions that are off by noise."""
    table = pd.read_csv(EMBEDDED_DATA, nrows=count).rename(columns={"SMILES": "text"})
    noise = np.random.default_rng(0).normal(size=count)
    return table.assign(row=np.arange(count), prediction=table["label"] + noise)


@pytest.mark.parametrize("count", [1, 200])
def test_the_parity_plot_shows_its_points(tmp_path, count):
    plot_parity({"logD7.4": some_molecules(count)}, tmp_path / "parity.png")
    assert colored(tmp_path / "parity.png") > 1e-5 * count
    assert [file.name for file in tmp_path.iterdir()] == ["parity.png"]


@pytest.mark.parametrize("name", ["price ($/g_$)", r"$\log D_{7.4}$", "a $ sign"])
@pytest.mark.parametrize("draw", [plot_parity, plot_residuals, draw_worst_molecules])
def test_a_label_may_have_dollar_signs(tmp_path, draw, name):
    """Two of them, for matplotlib, are around a formula, which the first of these is not."""
    draw({name: some_molecules(5)}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert name_in_plot(name) == (name if "log" in name else name.replace("$", r"\$"))


@pytest.mark.parametrize("draw", [plot_residuals, draw_worst_molecules])
@pytest.mark.parametrize("count", [1, 5, 200])
def test_residuals_and_worst_molecules_are_drawn_for_each_label(tmp_path, draw, count):
    panels, shown = {}, []
    for name in ("first", "second"):
        panels[name] = some_molecules(count)
        draw(panels, tmp_path / f"{name}.png")
        shown.append(Image.open(tmp_path / f"{name}.png").size[1])
        assert colored(tmp_path / f"{name}.png") > 1e-4
    assert shown[1] > shown[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["first.png", "second.png"]


def test_the_loss_plot_shows_both_curves(tmp_path):
    training = [{"epoch": float(epoch), "loss": 1 / epoch} for epoch in range(1, 8)]
    held_out = [{"epoch": float(epoch), "eval_loss": 1.5 / epoch} for epoch in range(1, 8)]
    shown = []
    for log, name in ((training, "one.png"), (training + held_out, "both.png")):
        plot_losses([*log, {"epoch": 7.0, "train_runtime": 1.0}], tmp_path / name, "validation", "loss")
        shown.append(colored(tmp_path / name))
    assert 1e-4 < shown[0] < shown[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["both.png", "one.png"]


# ---------------------------------------------------------------------------------------------------------- Hub double


SECRET = "hf_write"


@pytest.fixture
def hub():
    with HubDouble() as double:
        yield double


@pytest.fixture
def online(run_script, hub):
    """Runs a script that may reach the Hub double, and nothing else."""

    def run(script, *flags, token=SECRET, **environment):
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
        return run_script(script, *flags, **environment, **({"HF_TOKEN": token} if token else {}))

    return run


@pytest.fixture
def training(small_table, tiny_checkpoint, tmp_path):
    return [
        "--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", tmp_path / "run",
        "--num_train_epochs", "1", "--disable_tqdm", "true",
    ]  # fmt: skip


@pytest.fixture
def connected(hub, monkeypatch):
    """The same for scripts that run in this process; returns a function that calls their `main`."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    files = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made once, with the endpoint of that time
    monkeypatch.setenv("HF_TOKEN", SECRET)

    def run(script, *flags):
        arguments = parse_arguments(*script.ARGUMENTS, defaults=script.DEFAULTS, args=[str(flag) for flag in flags])
        script.main(*arguments)

    return run


def check_for_secrets(token, folder, *texts):
    assert not [text for text in texts if token in text]
    assert not [path for path in folder.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


def run_card(card, online, tmp_path, **environment):
    """Runs the Python block of a card in a fresh process, and returns the number that it prints, if any."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    (tmp_path / "fresh.py").write_text(code)
    fresh = online(tmp_path / "fresh.py", token=None, **environment)
    assert fresh.returncode == 0, fresh.stderr
    printed = re.search(r"tensor\(\[\[(.*?)\]\]", fresh.stdout)
    return float(printed[1]) if printed else None


def predict_ethanol(connected, model, tmp_path):
    """Returns what run_regression.py predicts for the molecule of the cards."""
    (tmp_path / "one.csv").write_text("SMILES\nCCO\n")
    flags = ["--do_predict", "--model_name_or_path", model, "--test_file", tmp_path / "one.csv"]
    connected(run_regression, *flags, "--output_dir", tmp_path / "one")
    return pd.read_csv(tmp_path / "one" / "predictions.csv")["prediction"][0]


def test_a_regression_goes_to_the_hub_and_comes_back(online, hub, training, small_table, tmp_path):
    """A fresh process loads it by its name without remote code, another one through the Auto class with it."""
    flags = ["--push_to_hub", "--hub_model_id", "someone/tiny-logd", "--hub_token", SECRET]
    ran = online("run_regression.py", *training, *flags, token=None)
    assert ran.returncode == 0, ran.stderr
    files = hub.repositories["someone/tiny-logd"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "modeling_molformer_reg.py", "README.md"} <= set(
        files
    )
    assert {"README.md", "all_results.json", "splits.json", "parity.png", "worst_molecules.png"} <= set(files)
    assert not [name for name in files if name.endswith((".csv", ".bin", ".pt"))]
    check_for_secrets(SECRET, tmp_path / "run", ran.stdout, ran.stderr)

    flags = ["--do_predict", "--model_name_or_path", "someone/tiny-logd", "--train_file", small_table]
    again = online("run_regression.py", *flags, "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    first, second = (pd.read_csv(tmp_path / name / "predictions.csv")["prediction"] for name in ("run", "again"))
    np.testing.assert_allclose(second, first, atol=1e-5)

    fresh = run_card(files["README.md"].decode(), online, tmp_path)
    model = MolformerForRegression.from_pretrained(tmp_path / "run").eval()
    expected = model(**build_tokenizer()("CCO", return_tensors="pt")).logits
    assert fresh == pytest.approx(expected.item(), abs=1e-3)  # of the printed digits

    card = ModelCard(files["README.md"].decode())
    results = {result.metric_name: result for result in card.data.eval_results}
    written = json.loads(files["all_results.json"])
    assert results["MSE, test"].metric_value == pytest.approx(written["test_mse"], abs=1e-6)
    assert str(written["test_samples"]) in results["MSE, test"].dataset_split
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


def check_what_is_left(message, token, folder):
    """A run whose push failed is whole, and what is to be typed is there and is a model."""
    assert "The push to a/b failed" in message
    staged = Path(re.search(r"hf upload a/b (\S+) \.", message)[1])
    MolformerForRegression.from_pretrained(staged)
    assert {"README.md", "splits.json", "parity.png"} <= {path.name for path in staged.iterdir()}
    assert not [path for path in staged.iterdir() if str(folder).encode() in path.read_bytes()]
    check_for_secrets(token, folder, message)
    assert not (folder / "unfinished").exists()
    assert "test_mse" in json.loads((folder / "all_results.json").read_text())
    MolformerForRegression.from_pretrained(folder)


@pytest.mark.parametrize("fault", ["no right", "out of order"])
def test_a_push_that_fails_leaves_the_run_whole_and_says_how_to_push_again(
    connected, hub, training, tmp_path, fault, monkeypatch
):
    token = SECRET
    if fault == "no right":
        token = "hf_read_only"
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        hub.failing = "/commit/"
    with pytest.raises(InputError) as error:
        connected(run_regression, *training, "--push_to_hub", "--hub_model_id", "a/b")
    check_what_is_left(str(error.value), token, tmp_path / "run")
    hub.failing = None
    monkeypatch.setenv("HF_TOKEN", SECRET)
    again = [*training, "--push_to_hub", "--hub_model_id", "a/b", "--resume_from_checkpoint", "true"]
    connected(run_regression, *again)
    assert not (tmp_path / "run" / "to_push").exists() and "model.safetensors" in hub.repositories["a/b"]


def test_a_network_that_is_gone_ends_in_one_line(online, training, tmp_path):
    gone = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    ran = online("run_regression.py", *training, "--push_to_hub", "--hub_model_id", "a/b", **gone)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    check_what_is_left(ran.stderr, SECRET, tmp_path / "run")


@pytest.mark.parametrize(
    "flags, change, named",
    [
        ([], lambda patch: patch.setattr(utils_report, "get_token", lambda: None), "needs a token"),
        ([], lambda patch: patch.setattr(constants, "HF_HUB_OFFLINE", True), "HF_HUB_OFFLINE is set"),
        (["--hub_model_id", "a/b/c"], None, "no name of a repository"),
        (["--do_predict"], None, "Add it to the flags of the training"),
        (["--hub_token", "hf_a\nb"], None, "--hub_token holds characters that no token has"),
    ],
    ids=["no token", "offline", "name", "nothing trained", "no token's characters"],
)
def test_a_push_that_cannot_succeed_is_refused_before_any_work(
    connected, training, tmp_path, flags, change, named, monkeypatch
):
    if change is not None:
        change(monkeypatch)
    with pytest.raises(InputError, match=named):
        connected(run_regression, *training, "--push_to_hub", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("target", "folder"), [("someone/Base", "run"), ("base", "run"), (None, "base")], ids=["whole", "short", "folder"]
)
def test_an_adapter_is_not_pushed_over_its_base(connected, hub, training, tiny_checkpoint, tmp_path, target, folder):
    base = {path.name: path.read_bytes() for path in Path(tiny_checkpoint).iterdir()}
    hub.repositories["someone/base"] = dict(base)
    flags = [*training, "--push_to_hub", "--base_hub_name", "someone/base", "--output_dir", tmp_path / folder]
    flags += ["--cache_dir", tmp_path / "cache", *(["--hub_model_id", target] if target else [])]
    with pytest.raises(InputError, match="pushed to someone/[Bb]ase, where its base is"):
        connected(run_peft, *flags)
    assert not (tmp_path / folder).exists() and hub.repositories["someone/base"] == base


def test_files_of_others_in_the_folder_stay_there(tmp_path):
    names = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "parity.png", "all_results.json"]
    others = [
        "my_results.json",
        "figure.png",
        "states.safetensors",
        "predictions.csv",
        "optimizer.pt",
        "training_args.bin",
    ]
    for name in [*names, *others]:
        (tmp_path / name).write_text("{}")
    assert sorted(files_to_push(tmp_path)) == sorted(names)


@pytest.mark.parametrize(
    ("method", "file", "key"),
    [("lora", "adapter_config.json", "base_model_name_or_path"), ("bitfit", "trained_parameters.json", "base")],
)
def test_an_adapter_that_is_pushed_names_its_base_on_the_hub(
    connected, online, hub, training, tiny_checkpoint, small_table, tmp_path, method, file, key, monkeypatch
):
    """It comes back by name, base and all, through the scripts, and LoRA through the code of its card."""
    flags = [*training, "--push_to_hub", "--hub_model_id", "someone/adapter", "--peft_method", method]
    flags += ["--cache_dir", tmp_path / "cache"]
    with pytest.raises(InputError, match="--base_hub_name"):
        connected(run_peft, *flags)
    with pytest.raises(InputError, match="--base_hub_name someone/base is not on the Hub"):
        connected(run_peft, *flags, "--base_hub_name", "someone/base")
    with monkeypatch.context() as away:  # a Hub that does not answer says nothing of the base
        away.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(InputError, match="Whether someone/base is on the Hub could not be found out"):
            connected(run_peft, *flags, "--base_hub_name", "someone/base")
    base = {path.name: path.read_bytes() for path in Path(tiny_checkpoint).iterdir()}
    base["README.md"] = b"---\nlicense: cc-by-4.0\n---\n"
    other = MolformerForMaskedLM.from_pretrained(tiny_checkpoint)  # a base of the same shapes
    other.molformer.embeddings.word_embeddings.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    changed = {"model.safetensors": (tmp_path / "other" / "model.safetensors").read_bytes()}
    hub.repositories["someone/changed"] = base | changed
    with pytest.raises(InputError, match="someone/changed is not on the Hub, or has other weights than"):
        connected(run_peft, *flags, "--base_hub_name", "someone/changed")
    assert not (tmp_path / "run").exists()
    hub.repositories["someone/base"] = dict(base)
    connected(run_peft, *flags, "--base_hub_name", "someone/base")
    files = hub.repositories["someone/adapter"]
    card = ModelCard(files["README.md"].decode())
    assert json.loads(files[file])[key] == card.data.base_model == "someone/base"
    assert f"fine-tuned from `someone/base` with {method}" in card.text and "local folder" not in card.text
    assert ("adapter_model.safetensors" in files) == (method == "lora")
    assert card.data.license == "cc-by-4.0"  # that of the base
    # what the Hub would offer for the others, transformers cannot load
    assert (card.data.library_name, card.data.pipeline_tag) == (
        ("peft", "text-classification") if method == "lora" else (None, None)
    )

    again_flags = ["--do_predict", "--model_name_or_path", "someone/adapter", "--train_file", small_table]
    again = online("run_regression.py", *again_flags, "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    first, second = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("run", "again"))
    np.testing.assert_allclose(second["prediction"], first["prediction"], atol=1e-5)
    if method == "lora":
        (tmp_path / "one.csv").write_text("SMILES\nCCO\n")
        flags = ["--do_predict", "--model_name_or_path", tmp_path / "run", "--test_file", tmp_path / "one.csv"]
        connected(run_regression, *flags, "--output_dir", tmp_path / "one")
        shown = run_card(card.text, online, tmp_path, PYTHONPATH=str(ROOT))
        assert shown == pytest.approx(pd.read_csv(tmp_path / "one" / "predictions.csv")["prediction"][0], abs=1e-3)

    assert "LOAD REPORT" not in again.stderr  # the head is the adapter's, and not new
    hub.repositories["someone/base"] |= changed
    refused = online(
        "run_regression.py", *again_flags, "--output_dir", tmp_path / "refused", HF_HOME=str(tmp_path / "fresh")
    )
    assert refused.returncode == 2 and "trained on other weights than those that someone/base" in refused.stderr


def test_an_adapter_is_refused_on_a_hub_base_that_was_trained_on_since(
    connected, hub, training, tiny_checkpoint, small_table, tmp_path
):
    base = {path.name: path.read_bytes() for path in Path(tiny_checkpoint).iterdir()}
    other = MolformerForMaskedLM.from_pretrained(tiny_checkpoint)  # of the same shapes
    other.molformer.embeddings.word_embeddings.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    hub.repositories["someone/base"] = base
    flags = ["--model_name_or_path", "someone/base", *training[2:], "--peft_method", "bitfit", "--max_steps", "1"]
    connected(run_peft, *flags, "--cache_dir", tmp_path / "cache")
    hub.repositories["someone/base"] = base | {
        "model.safetensors": (tmp_path / "other" / "model.safetensors").read_bytes()
    }
    flags = ["--do_predict", "--model_name_or_path", tmp_path / "run", "--train_file", small_table]
    with pytest.raises(InputError, match="was trained on other weights than those that someone/base holds now"):
        connected(run_regression, *flags, "--output_dir", tmp_path / "x", "--cache_dir", tmp_path / "new cache")


@pytest.mark.parametrize("own", [None, "# my project\n", "---\ntags:\n- molformer\n---\n# my project\n"])
def test_the_card_of_an_adapter_of_a_local_base_says_so(connected, training, tiny_checkpoint, tmp_path, own):
    """PEFT's own template is not there, and a README of the user's stays as it is."""
    if own is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "README.md").write_text(own)
    connected(run_peft, *training, "--peft_method", "ia3", "--overwrite_output_dir")
    assert not list((tmp_path / "run").glob("checkpoint-*/README.md"))
    assert own is None or (tmp_path / "run" / "README.md").read_text() == own
    assert (tmp_path / "run" / "MODEL_CARD.md").exists() == (own is not None)
    card = (tmp_path / "run" / ("README.md" if own is None else "MODEL_CARD.md")).read_text()
    name = Path(tiny_checkpoint).name
    assert f"fine-tuned from `{name}` with ia3" in card and f"Its base, `{name}`, is a local folder." in card


def test_a_merged_adapter_is_pushed_as_a_plain_model(connected, online, hub, training, tmp_path):
    """The code of its card, in a fresh process, gives the number of the adapter."""
    connected(run_peft, *training, "--push_to_hub", "--hub_model_id", "someone/merged", "--merge_adapter")
    files = hub.repositories["someone/merged"]
    assert "model.safetensors" in files and "adapter_config.json" not in files
    assert {"README.md", "all_results.json", "parity.png"} <= set(files)
    (tmp_path / "one.csv").write_text("SMILES\nCCO\n")
    flags = ["--do_predict", "--model_name_or_path", tmp_path / "run", "--test_file", tmp_path / "one.csv"]
    connected(run_regression, *flags, "--output_dir", tmp_path / "one")
    expected = pd.read_csv(tmp_path / "one" / "predictions.csv")["prediction"][0]
    assert run_card(files["README.md"].decode(), online, tmp_path) == pytest.approx(expected, abs=1e-3)


def test_pretraining_and_influence_go_to_the_hub_and_come_back(connected, online, hub, training, tmp_path):
    connected(run_mlm, *training, "--push_to_hub", "--hub_model_id", "someone/mlm")
    card = hub.repositories["someone/mlm"]["README.md"].decode()
    assert "perplexity" in card and "held-out molecules" in card and "per second" not in card
    run_card(card, online, tmp_path)
    cache = tmp_path / "cache"
    start = ["--model_name_or_path", "someone/mlm", *training[2:4], "--max_steps", "1", "--cache_dir", cache]
    connected(run_regression, *start, "--output_dir", tmp_path / "tuned", "--disable_tqdm", "true")
    assert "fine-tuned from `someone/mlm`" in (tmp_path / "tuned" / "README.md").read_text()
    assert list(cache.rglob("model.safetensors"))  # not from an earlier one in the user's cache
    flags = ["--influence_params", "head", "--pool_size", "20", "--num_selected", "5", "--recursion_depth", "10"]
    flags += ["--controls", "none", "--push_to_hub", "--hub_model_id", "someone/influence", "--overwrite_output_dir"]
    connected(run_influence, *training, *flags)
    files = hub.repositories["someone/influence"]
    assert {"model.safetensors", "influence.json", "influence_scores.png", "README.md"} <= set(files)
    assert "influence_scores.csv" not in files and "| selected | 5 |" in files["README.md"].decode()
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    card = ModelCard(files["README.md"].decode())
    selected = json.loads(files["all_results.json"])["results"]["selected"]
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["MSE, test"] == pytest.approx(selected["test_mse"], abs=1e-6)
    assert "## Training" in card.text and "(loss_curves.png)" in card.text and "Koh and Liang" in card.text
    expected = predict_ethanol(connected, tmp_path / "run" / "finetune-selected", tmp_path)
    assert run_card(card.text, online, tmp_path) == pytest.approx(expected, abs=1e-3)
    own = (tmp_path / "run" / "README.md").read_text()  # beside the model's folder
    assert "run/finetune-selected" in own and "(finetune-selected/loss_curves.png)" in own


def test_a_second_push_leaves_nothing_of_the_first_model(connected, hub, training):
    """Members of an earlier ensemble would be taken for the model; what others put there stays."""
    flags = ["--push_to_hub", "--hub_model_id", "someone/again", "--overwrite_output_dir"]
    connected(run_regression, *training, *flags, "--num_seeds", "2")
    files = hub.repositories["someone/again"]
    assert "member-1/model.safetensors" in files
    files["onnx/model.onnx"] = b"theirs"
    connected(run_regression, *training, *flags)
    assert not [name for name in files if name.startswith("member-")]
    assert {"model.safetensors", "config.json", "onnx/model.onnx"} <= set(files)


def test_a_training_without_predictions_has_its_card(connected, hub, training, tmp_path):
    flags = ["--do_train", "--do_eval", "--push_to_hub", "--hub_model_id", "someone/unread"]
    connected(run_regression, *training, *flags)
    card = ModelCard(hub.repositories["someone/unread"]["README.md"].decode())
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    evaluated = json.loads((tmp_path / "run" / "all_results.json").read_text())["eval_mse"]
    assert results.keys() == {"MSE, validation", "RMSE, validation", "MAE, validation", "R², validation"}
    assert results["MSE, validation"] == pytest.approx(evaluated, abs=1e-6)
    assert "| this model | validation |" in card.text and "splits.json" in hub.repositories["someone/unread"]


def test_the_numbers_of_several_labels_stand_under_their_names(connected, hub, training, tmp_path):
    table = pd.read_csv(training[3])
    table.assign(other=-table.iloc[:, -1]).to_csv(tmp_path / "two.csv", index=False)
    training[3] = tmp_path / "two.csv"
    labels = [table.columns[-1], "other"]
    flags = ["--label_column", *labels, "--push_to_hub", "--hub_model_id", "someone/two"]
    connected(run_regression, *training, *flags)
    files = hub.repositories["someone/two"]
    written = json.loads(files["all_results.json"])
    found = {(result.task_name, result.metric_name): result.metric_value
             for result in ModelCard(files["README.md"].decode()).data.eval_results}  # fmt: skip
    for label in labels:
        value = found[f"prediction of {label}", f"MSE, test, {label}"]
        assert value == pytest.approx(written[f"test_mse_{label}"], abs=1e-6)


def test_an_ensemble_goes_to_the_hub_and_comes_back(connected, online, hub, training, small_table, tmp_path):
    """Its head reads descriptors, which the code of the card computes."""
    flags = ["--num_seeds", "2", "--push_to_hub", "--hub_model_id", "someone/ensemble"]
    flags += ["--head_descriptors", "MolLogP", "TPSA"]
    connected(run_regression, *training, *flags)
    files = hub.repositories["someone/ensemble"]
    assert {"README.md", "member-0/model.safetensors", "member-1/config.json"} <= set(files)
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    card, own = files["README.md"].decode(), (tmp_path / "run" / "README.md").read_text()  # of the folder here
    assert "an ensemble of 2 models whose mean is the prediction" in card
    printed = run_card(card, online, tmp_path)
    expected = predict_ethanol(connected, tmp_path / "run" / "member-0", tmp_path)  # "the first of the models"
    assert printed == pytest.approx(expected, abs=1e-3) and run_card(own, online, tmp_path) == printed
    flags = ["--do_predict", "--model_name_or_path", "someone/ensemble", "--test_file", small_table]
    again = online("run_regression.py", *flags, "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    first, second = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("run", "again"))
    for column in ("prediction", "prediction_sd"):
        np.testing.assert_allclose(second[column], first[column], atol=1e-5)


@pytest.mark.parametrize("extra", [("--num_seeds", "2"), ("--label_column", "label", "double")])
def test_the_card_counts_molecules_or_says_nothing(training, connected, tmp_path, extra):
    """Where nothing was predicted, only the evaluation has counts."""
    table = pd.read_csv(training[3])
    table.assign(double=2 * table["label"]).to_csv(tmp_path / "two.csv", index=False)
    flags = [*training, "--train_file", tmp_path / "two.csv", *extra, "--do_train", "--do_eval"]
    connected(run_regression, *flags, "--max_train_samples", "32")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "None" not in card and "validation" in card and ("(n = 13)" in card) == (extra[0] == "--num_seeds")


def test_the_embedded_data_are_known_by_any_path(connected, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", "data/lipophilicity.csv", "--max_steps", "1"]
    connected(run_regression, *flags, "--max_train_samples", "16", "--do_train", "--output_dir", tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "predicts logD7.4" in card and "MoleculeNet Lipophilicity" in card


def test_a_finished_run_is_pushed_without_training_again(connected, hub, training, tmp_path):
    connected(run_regression, *training)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    flags = ["--resume_from_checkpoint", "true", "--push_to_hub", "--hub_model_id", "someone/later"]
    connected(run_regression, *training, *flags)
    assert hub.repositories["someone/later"]["model.safetensors"] == before


def test_what_is_to_be_typed_after_a_failed_push_keeps_the_repository_private(connected, hub, training):
    hub.failing = "/commit/"
    flags = ["--push_to_hub", "--hub_model_id", "a/b", "--hub_private_repo", "true", "--hub_revision", "next"]
    with pytest.raises(InputError, match=r"hf upload a/b \S+ \. --delete 'member-.* --private --revision next"):
        connected(run_regression, *training, *flags)
    # not yet known to be private: that command would send the files to a public repository that is there
    hub.failing = "/repos/create"
    flags += ["--resume_from_checkpoint", "true"]
    with pytest.raises(InputError, match="Push it again with: the same command and --resume_from_checkpoint true"):
        connected(run_regression, *training, *flags)


def test_what_is_to_be_typed_after_a_second_failed_push_holds_the_second_model_alone(
    connected, hub, training, tmp_path
):
    hub.failing = "/commit/"
    flags = ["--push_to_hub", "--hub_model_id", "a/b", "--overwrite_output_dir"]
    for more in (["--num_seeds", "2"], ["--resume_from_checkpoint", "true"], []):
        if "--resume_from_checkpoint" in more:  # pushed again, after something else was left there
            (tmp_path / "run" / "to_push" / "model.safetensors").write_text("old")
            more = ["--num_seeds", "2", *more]
        with pytest.raises(InputError, match=r"The run in .* is whole"):
            connected(run_regression, *training, *flags, *more)
        found = {path.relative_to(tmp_path / "run" / "to_push").as_posix()
                 for path in (tmp_path / "run" / "to_push").rglob("*.safetensors")}  # fmt: skip
        members = {"member-0/model.safetensors", "member-1/model.safetensors"}
        assert found == (members if more else {"model.safetensors"})


def test_a_repository_that_is_public_already_gets_nothing_that_is_to_be_private(connected, hub, training):
    """The Hub leaves a repository as public as it is."""
    push = ["--push_to_hub", "--hub_model_id", "someone/public"]
    connected(run_regression, *training, *push)
    before = dict(hub.repositories["someone/public"])
    private = ["--hub_private_repo", "true", "--resume_from_checkpoint", "true"]
    with pytest.raises(InputError, match="someone/public is there already and public"):
        connected(run_regression, *training, *push, *private)
    assert hub.repositories["someone/public"] == before
    connected(run_regression, *training, *push[:2], "someone/hidden", *private)
    assert "model.safetensors" in hub.repositories["someone/hidden"] and "someone/hidden" in hub.private


def test_a_best_evaluation_that_was_not_saved_does_not_stop_a_run(connected, training, tmp_path):
    """Saved at every other evaluation; the state names the best checkpoint that there is, or none."""
    steps = ("--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "steps", "--save_steps", "4")
    flags = [*training, *steps, "--max_train_samples", "64", "--do_train", "--do_eval"]
    connected(run_regression, *flags, "--max_steps", "4")
    path = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"best_global_step": 2, "best_model_checkpoint": None}))
    assert trainer_regression.best_checkpoint(tmp_path / "run", path.parent) is None
    path.write_text(json.dumps(state | {"best_model_checkpoint": "/elsewhere/checkpoint-4"}))
    assert trainer_regression.best_checkpoint(tmp_path / "run", path.parent) == str(path.parent)
    path.write_text(json.dumps(state | {"best_model_checkpoint": "/elsewhere/checkpoint-2"}))
    with pytest.raises(InputError, match="checkpoint-2, the best checkpoint of the run"):
        trainer_regression.best_checkpoint(tmp_path / "run", path.parent)


def test_a_push_goes_to_the_branch_that_is_named(connected, online, hub, training, tmp_path):
    """Which the Hub does not know yet; the card loads the model from there."""
    connected(
        run_regression, *training, "--push_to_hub", "--hub_model_id", "someone/branched", "--hub_revision", "next"
    )
    assert "next" in hub.branches and "model.safetensors" in hub.repositories["someone/branched"]
    card = hub.repositories["someone/branched"]["README.md"].decode()
    assert card.count('from_pretrained("someone/branched", revision="next"') == 2
    assert "--model_name_or_path someone/branched --model_revision next " in card
    expected = predict_ethanol(connected, tmp_path / "run", tmp_path)
    assert run_card(card, online, tmp_path) == pytest.approx(expected, abs=1e-3)
    hub.branches.add("refs/pr/5")  # which is there, and cannot be made as a branch
    again = ("--resume_from_checkpoint", "true", "--hub_revision", "refs/pr/5")
    connected(run_regression, *training, "--push_to_hub", "--hub_model_id", "someone/branched", *again)


def test_a_run_that_was_moved_keeps_its_best_model(connected, hub, training, tmp_path):
    """Also where it lies when it is pushed later; the epochs after the best one are worse."""
    worse = ("--num_train_epochs", "3", "--learning_rate", "0.05", "--seed", "1")
    connected(run_regression, *training, *worse)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert state["best_global_step"] < state["global_step"]
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    again = ("--output_dir", moved, "--resume_from_checkpoint", "true")
    connected(run_regression, *training, *worse, *again)
    assert (moved / "model.safetensors").read_bytes() == before
    shutil.rmtree(moved / f"checkpoint-{state['best_global_step']}")
    with pytest.raises(InputError, match="the best checkpoint of the run that is to be resumed, is not there"):
        connected(run_regression, *training, *worse, *again)


# ------------------------------------------------------------------------------------------ cards of runs made by hand


def card_of(folder, kind, arguments=None, results=None, config=None, log=(), split=None, model_folder=None):
    """Returns the text of a card that these files give."""
    folder.mkdir(exist_ok=True)
    files = {"arguments.json": arguments or {}, "all_results.json": results or {}, "splits.json": split or {}}
    files |= {"trainer_state.json": {"log_history": list(log)}} | ({"config.json": config} if config else {})
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return str(model_card(Run(folder, kind, model_folder=model_folder)))


SCORES = {"molecules": 40, "selected": 20, "score_split": "validation", "model": "outputs/x/finetune-none"}


def test_the_card_of_scores_alone_tells_of_no_model(tmp_path):
    arguments = {"model_name_or_path": "outputs/x/finetune-none", "external_file": "/my/more.csv"}
    split = {"split": "random", "hash": "0", "train": [0] * 85, "validation": [1] * 9, "test": [2] * 20}
    card = card_of(tmp_path, "influence", arguments, {"influence": SCORES}, split=split)
    assert "Influence scores of 40 molecules" in card and "foretold for `finetune-none`" in card
    assert "Scored: 40 molecules of more.csv; 20 of them are selected\n" in card
    doubtful = {"influence": SCORES | {"leakage": True, "converged": False, "verdict": "not converged"}}
    told = card_of(tmp_path, "influence", arguments, doubtful, split=split)
    assert "chosen by the loss of the test set" in told and "The scores are not converged" in told
    for absent in ("fine-tuned from", "| molecules added", "## Intended use", "pipeline_tag", "```python"):
        assert absent not in card


def test_the_card_of_a_selection_says_what_was_learned(tmp_path):
    split = {"split": "random", "hash": "0", "train": [0] * 85, "pool": [3] * 40, "corrupted": [4] * 12}
    (tmp_path / "finetune-selected").mkdir()
    (tmp_path / "finetune-selected" / "config.json").write_text("{}")
    results = {"influence": SCORES, "results": {"selected": {"added": 20, "test_mse": 0.5}}}
    results["evaluation_losses"] = {"selected": [0.5], "paper": [0.4]}
    card = card_of(tmp_path, "influence", {}, results, split=split, model_folder=tmp_path / "finetune-selected")
    assert "a pool of 40 molecules, taken out of the training part, the labels of 12 permuted; 20 of them" in card
    assert "are selected, and learned by the model here beside the training part" in card
    assert "random, 85 train; hash" in card and "one an epoch and of molecules that it had learned" in card


@pytest.mark.parametrize(
    ("form", "told", "limit"),
    [
        ("canonical", "canonical as RDKit writes them, without stereo", True),
        ("isomeric", "canonical as RDKit writes them, with stereo", False),
        ("raw", "SMILES are read as they are", False),
    ],
)
def test_a_card_says_how_smiles_are_to_be_written(tmp_path, form, told, limit):
    card = card_of(tmp_path, "regression", results={"test_mse": 1.0}, config={"smiles_form": form})
    assert told in card and ("molecules that differ in stereo alone get one prediction" in card) == limit


def test_the_card_of_an_adapter_on_a_branch_names_the_branch(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    card_of(tmp_path, "peft", {"base_hub_name": "a/base"}, {"test_mse": 1.0}, {"num_labels": 1})
    code = re.search(r"```python\n(.*?)```", str(model_card(Run(tmp_path, "peft", "a/b", None, "next"))), re.DOTALL)[1]
    assert code.count('"a/b", revision="next")') == code.count('"a/b"') == 4


def test_a_card_names_a_folder_of_data_without_its_path(tmp_path):
    """The Hub would refuse a path as the type of a data set; a name on the Hub stays whole."""
    folder = tmp_path / "my data"
    folder.mkdir()
    card = card_of(tmp_path / "run", "regression", {"dataset_name": str(folder)}, {"test_mse": 1.0}, {"num_labels": 1})
    data = ModelCard(card).data
    assert "- Data: my data\n" in card and str(tmp_path) not in card.replace(str(tmp_path / "run"), "")
    assert data.datasets is None and data.eval_results[0].dataset_type == "my-data"
    card = card_of(
        tmp_path / "run", "regression", {"dataset_name": "someone/data"}, {"test_mse": 1.0}, {"num_labels": 1}
    )
    data = ModelCard(card).data
    assert data.datasets == ["someone/data"] and data.eval_results[0].dataset_type == "someone/data"


def test_numbers_stand_under_their_names_on_a_card(tmp_path):
    numbers = {"test_mse": 0.1, "test_rmse": 0.2, "test_mae": 0.3, "test_r2": 0.4, "test_samples": 9}
    card = card_of(tmp_path, "regression", results=numbers)
    assert "| model | split | n | MSE | RMSE | MAE | R² |" in card
    assert "| this model | test | 9 | 0.1000 | 0.2000 | 0.3000 | 0.4000 |" in card
    results = {"influence": SCORES, "results": {"all": {"added": 20, "validation_mse": 0.5, **numbers}}}
    card = card_of(tmp_path, "influence", results=results)
    assert "| molecules added | how many | validation MSE | test MSE | RMSE | MAE | R² |" in card
    assert "| all | 20 | 0.5000 | 0.1000 | 0.2000 | 0.3000 | 0.4000 |" in card


@pytest.mark.parametrize("name", ["data (1).csv", "données.csv", "logD+pKa.csv", "x,y.csv", "a&b.tsv", "(1)"])
def test_metadata_name_any_data_file_as_the_hub_takes_it(name):
    """Its rule for the type of a data set, by which it refuses a card after the training."""
    assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", utils_report.hub_type(name), re.ASCII)


@pytest.mark.parametrize(("values", "told"), [({}, True), ({"load_best_model_at_end": False}, False)])
def test_a_card_says_that_the_epoch_was_chosen_by_the_test_loss_where_it_was(tmp_path, values, told):
    arguments = {"protocol": "paper", **values}
    options = {"results": {"test_mse": 1.0}, "config": {"smiles_form": "canonical"}}
    card = card_of(tmp_path / "run", "regression", arguments, model_folder=tmp_path / "run", **options)
    assert ("The epoch was chosen by the test loss" in card) == told
    assert "The epoch was" not in card_of(tmp_path / "evaluation", "regression", arguments, results={"test_mse": 1.0})


def test_numbers_of_a_test_file_are_those_of_its_molecules(tmp_path):
    arguments, split = {"test_file": "elsewhere/other.csv"}, {"split": "file", "train": [0], "test": [0]}
    card = card_of(tmp_path, "regression", arguments, {"test_mse": 1.0, "train_samples": 1}, split=split)
    assert "- Data: MoleculeNet Lipophilicity, other.csv (test)" in card
    assert "name: other.csv, file split" in card and "name: MoleculeNet Lipophilicity" not in card


def test_a_label_with_a_bar_in_its_name_stays_in_its_cell(tmp_path):
    results = {f"test_{key}_{name}": 1.0 for key in ("mse", "rmse", "mae", "r2") for name in ("a|b", "c")}
    card = card_of(tmp_path, "regression", results=results, config={"label_names": ["a|b", "c"]})
    assert r"| this model: a\|b | test |" in card


def test_a_card_of_several_labels_names_their_columns(tmp_path):
    """`label_name` is the first one's, as the arguments of such a run have it."""
    arguments = {"train_file": "a.csv", "label_column": ["logD", "pKa"], "label_name": "logD"}
    results = {f"test_{key}_{name}": 1.0 for key in ("mse", "rmse", "mae", "r2") for name in ("logD", "pKa")}
    card = card_of(tmp_path, "regression", arguments, results, {"label_names": ["logD", "pKa"]})
    assert "predicts logD and pKa" in card


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_nothing_of_the_parity_plot_is_cut_off(count, tmp_path):
    """The outermost pixels are white."""
    panels = {
        f"label {number}": pd.DataFrame({"label": [0.0, 1, 2], "prediction": [0.1, 1, 2]}) for number in range(count)
    }
    plot_parity(panels, tmp_path / "parity.png")
    pixels = np.asarray(Image.open(tmp_path / "parity.png").convert("L"))
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_a_card_of_less_than_an_epoch_counts_what_was_seen(tmp_path):
    """Evaluations that are less than a hundredth of an epoch apart have a line each, by their step."""
    history = [{"step": step, "epoch": step * 64 / 5e6, "eval_loss": 1 / step} for step in (250, 500, 750)]
    history.insert(1, {"step": 400, "epoch": 400 * 64 / 5e6, "loss": 0.5})
    results = {"train_samples": 5_000_000, "epoch": 750 * 64 / 5e6}
    card = card_of(tmp_path, "mlm", {"objective": "mtr"}, results, {"a": 1}, history)
    assert "- Learned from about 48000 of 5000000 molecules" in card
    assert "| step | training loss | held-out loss |" in card
    assert all(line in card for line in ("| 250 |  | 0.0040 |", "| 500 |  | 0.0020 |", "| 750 |  | 0.0013 |"))
    assert "fill-mask" not in card and "AutoModelForMaskedLM" not in card  # its head for tokens was not trained


def test_only_so_many_labels_as_a_picture_holds_are_drawn(tmp_path, caplog):
    """RDKit gives no picture of more than 32,767 pixels."""
    with caplog.at_level("INFO", "molformer.hub"):
        draw_worst_molecules({f"label {number}": some_molecules(1) for number in range(140)}, tmp_path / "worst.png")
    assert "worst.png shows the first 100 of 140 labels" in caplog.text
    assert Image.open(tmp_path / "worst.png").size[1] == 250 * 100


def test_a_card_of_pretraining_says_which_smiles_were_learned(tmp_path):
    arguments, split = {"smiles_form": "isomeric"}, {"split": "random", "hash": "0", "train": [0], "test": [1]}
    card = card_of(tmp_path, "mlm", arguments, {"train_samples": 1, "train_loss": 0.5}, {"a": 1}, split=split)
    assert "with stereo (the scripts" in card and "Learned from 1 molecules" in card
    assert "Nothing of the other parts was learned" in card and "No molecules were held out" not in card


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("---\nbase_model: a\nlibrary_name: peft\n---\n# Model Card for Model ID\n", True),  # of PEFT
        ("---\ntags:\n- molformer\n---\n- Command: `python run_mlm.py FOLDER/arguments.json`", True),
        ("---\ntags:\n- molformer\n---\n# mine", False),
        ("# - Command: `python run_mlm.py`", False),
    ],
)
def test_a_card_is_told_from_a_text_of_the_users(tmp_path, text, ours):
    (tmp_path / "README.md").write_text(text)
    utils_report.write_card(tmp_path, "regression")
    assert ((tmp_path / "README.md").read_text() == text) == (not ours)
    assert is_card(tmp_path / ("README.md" if ours else "MODEL_CARD.md"))


def test_two_texts_of_the_users_stay_without_a_card(tmp_path, caplog):
    for name in ("README.md", "MODEL_CARD.md"):
        (tmp_path / name).write_text("mine")
    utils_report.write_card(tmp_path, "regression")
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"} and "No card is written" in caplog.text


def test_the_card_of_an_evaluation_of_a_pretraining_tells_of_no_model(tmp_path):
    results = {"eval_loss": 1.5, "eval_samples": 16, "eval_runtime": 2.0, "eval_model_preparation_time": 0.1}
    split = {"split": "random", "hash": "0", "train": [0], "validation": [1]}
    card = card_of(tmp_path, "mlm", {"model_name_or_path": "start"}, results, split=split)
    assert "An evaluation of `start`, a MoLFormer that learned SMILES, on MoleculeNet Lipophilicity." in card
    assert "| 16 held-out molecules | |\n| --- | ---: |\n| loss | 1.5 |\n\n" in card
    for absent in ("fine-tuned", "was learned", "## Use", "starting point"):
        assert absent not in card


def test_a_path_with_a_space_can_be_typed_and_one_with_a_slash_at_its_end_has_a_name(tmp_path):
    card = card_of(tmp_path / "my run", "regression", results={"test_mse": 1.0}, config={"a": 1})
    assert f"--do_predict --model_name_or_path '{tmp_path}/my run' --test_file" in card
    assert Run(f"{tmp_path}/my run/", "regression").name == f"{tmp_path}/my run"


def test_a_folder_that_is_called_like_a_member_is_no_ensemble(tmp_path):
    card = card_of(tmp_path / "member-test", "regression", results={"test_mse": 1.0}, config={"a": 1})
    assert "ensemble" not in card and f'from_pretrained("{tmp_path / "member-test"}"' in card


def test_a_card_has_the_license_of_the_card_beside_its_base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: cc-by-sa-3.0\n---\n\n# base\n")
    arguments = {"model_name_or_path": str(tmp_path / "base")}
    assert "license: cc-by-sa-3.0" in card_of(tmp_path / "run", "regression", arguments, config={"a": 1})
    for text in ("my notes", "---\njust text\n---\n", "---\nmy: notes: all\n---\n", "---\nlicense: [mit\n---\n"):
        (tmp_path / "base" / "README.md").write_text(text)
        assert "license" not in card_of(tmp_path / "run", "regression", arguments, config={"a": 1}).split("---")[1]


def test_a_long_training_shows_its_best_and_its_last_epoch(tmp_path):
    log = [{"step": 9 * epoch, "epoch": float(epoch), "eval_loss": abs(epoch - 32) + 1.0} for epoch in range(1, 46)]
    text = card_of(tmp_path, "regression", log=log, config={"a": 1})
    shown = [int(line.split()[1]) for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert {1, 32, 45} <= set(shown) and len(shown) < 22 and shown == sorted(shown)


@pytest.mark.parametrize(("log", "told"), [("eval_loss", "the dashed line is"), ("loss", "Training losses by epoch.")])
def test_the_loss_curves_are_told_as_they_are(tmp_path, log, told):
    (tmp_path / "loss_curves.png").touch()
    assert told in card_of(tmp_path, "regression", log=[{"step": 9, "epoch": 1.0, log: 0.5}], config={"a": 1})


def test_an_evaluation_of_several_labels_has_their_results(tmp_path):
    arguments = {"model_name_or_path": "outputs/many", "label_column": ["logD", "pKa"], "train_file": "many.csv"}
    results = {f"test_{key}_{label}": 0.5 for key in ("mse", "rmse", "mae", "r2") for label in ("logD", "pKa")}
    card = card_of(tmp_path, "regression", arguments, results)
    assert "| this model: pKa | test |" in card and "prediction of logD" in card


@pytest.mark.parametrize("inside", [True, False])
def test_a_card_names_its_folder_as_a_command_takes_it(tmp_path, inside):
    """In this project's folder from there, elsewhere whole."""
    folder = ROOT / "outputs" / "some" / "run" if inside else tmp_path
    assert Run(folder, "regression").name == ("outputs/some/run" if inside else str(tmp_path))
    assert Run("outputs/my", "regression").name == "outputs/my"
