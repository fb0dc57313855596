"""studies/ and reproduce_table1.sh: the statistics of the tables, and the chain from runs to a table."""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import ROOT
from matplotlib.axes import Axes
from PIL import Image
from safetensors.torch import save_file

import run_influence
import utils_molecules
from arguments import InputError, parse_arguments
from modeling_molformer_reg import MolformerForRegression
from trainer_regression import LEARNING_RATES
from utils_checkpoints import build_tokenizer
from utils_runs import write_json


sys.path.insert(0, str(ROOT / "studies"))

import common  # noqa: E402
import influence  # noqa: E402
import influence_lds  # noqa: E402
import kept_runs  # noqa: E402
import paper_tables  # noqa: E402
import peers  # noqa: E402
import peft_comparison  # noqa: E402
import pretraining_trials  # noqa: E402
import recipes  # noqa: E402
import reliability  # noqa: E402
import run_once  # noqa: E402
import ship_checkpoint  # noqa: E402
import table1  # noqa: E402


def row(name, mse, seeds=(0, 1, 2), split="random"):
    values = {"test_mse": mse, "test_mae": [0.5] * len(mse), "test_r2": [0.6] * len(mse)}
    return {"name": name, "split": split, "seeds": list(seeds)} | values


def test_paired_interval_is_that_of_the_t_test_made_wider_for_what_the_splits_share():
    """References: SciPy's paired t test, for values that are independent; Nadeau and Bengio's factor by hand."""
    from scipy import stats

    first, second = [0.41, 0.44, 0.39], [0.48, 0.47, 0.45]
    pairs = np.array(first) - np.array(second)
    plain = stats.ttest_rel(first, second).confidence_interval(0.95)
    mean, half = common.interval(pairs, test_share=0)
    assert (mean - half, mean + half) == pytest.approx((plain.low, plain.high))
    difference = table1.paired_difference(row("a", first), row("b", second))
    assert difference["mean"] == pytest.approx(np.mean(first) - np.mean(second))
    wider = math.sqrt((1 / 3 + 0.2 / 0.8) / (1 / 3))
    assert difference["high"] - difference["low"] == pytest.approx(wider * (plain.high - plain.low))
    # only seeds that both have are pairs
    difference = table1.paired_difference(row("a", first), row("b", second, seeds=(1, 2, 9)))
    assert difference["seeds"] == 2 and difference["mean"] == pytest.approx((0.44 - 0.48 + 0.39 - 0.47) / 2)
    assert table1.paired_difference(row("a", first), row("b", second, seeds=(2, 8, 9))) is None


def test_table_stands_beside_the_papers_numbers():
    rows = [
        row("regression", [0.4, 0.5, 0.6]),
        row("mlm_regression", [0.3, 0.5, 0.5]),
        row("regression", [0.7], (0,), "scaffold"),
    ]
    text = table1.markdown(rows, table1.differences(rows))
    numbers = "0.500 ± 0.100 | 0.500 ± 0.000 | 0.600 ± 0.000 | 0.4827, 0.5359, 0.6733"
    assert f"| regression | random |  | 3 | {numbers} |" in text
    assert "| regression | scaffold |  | 1 | 0.700 | 0.500 | 0.600 |  |" in text
    assert "| mlm regression − regression | random |  | -0.067 |" in text


def test_unfinished_cells_are_left_out(tmp_path):
    for seed, names in ((0, ["all_results.json"]), (1, ["all_results.json", "unfinished"]), (2, [])):
        folder = tmp_path / f"from_scratch-random-{seed}"
        folder.mkdir()
        for name in names:
            (folder / name).write_text(json.dumps({"test_mse": 0.9, "test_mae": 0.7, "test_r2": 0.3}))
    (tmp_path / "from_scratch-random-0.command").write_text("python run_regression.py\n# weights\n")
    rows = table1.collect(tmp_path)
    assert [(r["name"], r["seeds"], r["test_mse"], r["command"]) for r in rows] == [
        ("from_scratch", [0], [0.9], "python run_regression.py")
    ]


def test_cells_of_another_command_or_other_weights_do_not_stand_in_one_row(tmp_path, capsys):
    """Seed 4 is in the rate, the folder and the flag; the weights that MLM made of each seed may differ."""
    flags = "--learning_rate {1} --split random --seed {0} --output_dir out/mlm_regression-random-{0}"
    cells = [(2, "3e-4", "b"), (3, "1e-4", "a"), (4, "3e-4", "a"), (5, "3e-4", "a")]
    for number, (seed, rate, weights) in enumerate(cells):
        name = f"mlm_regression-random-{seed}"
        finished(tmp_path, name, {"test_mse": seed / 10, "test_mae": 0.7, "test_r2": 0.3})
        first = f"python run_mlm.py {flags}-mlm\n# weights: {weights}\n"
        start = "--model_name_or_path out/mlm_regression-random-{0}-mlm"
        second = f"python run_regression.py {start} {flags}\n# weights: {seed}\n"
        for suffix, command in (("-mlm", first), ("", second)):
            path = tmp_path / f"{name}{suffix}.command"
            path.write_text(command.format(seed, rate))
            os.utime(path, (number, number))
    rows = table1.collect(tmp_path)
    assert [(row["name"], row["seeds"]) for row in rows] == [("mlm_regression", [4, 5])]
    assert "mlm_regression-random-2, mlm_regression-random-3" in capsys.readouterr().out
    assert rows[0]["command"].count("--seed 4") == 2


def test_boosting_beats_the_mean_on_the_split_of_the_regression(tiny_checkpoint, small_table, tmp_path):
    """References: run_regression.py's split of the same seed, and the mean of its training labels."""
    import run_regression

    flags = ["--train_file", small_table, "--seed", "0", "--output_dir"]
    peers.main(*parse_arguments(*peers.ARGUMENTS, defaults=peers.DEFAULTS, args=[*flags, str(tmp_path / "x")]))
    both = [*flags, str(tmp_path / "both"), "--refit", "true"]
    peers.main(*parse_arguments(*peers.ARGUMENTS, defaults=peers.DEFAULTS, args=both))
    flags += [str(tmp_path / "y"), "--model_name_or_path", tiny_checkpoint, "--max_steps", "1"]
    run_regression.main(*parse_arguments(*run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=flags))
    values, other = (json.loads((tmp_path / run / "all_results.json").read_text()) for run in "xy")
    table, expected = (pd.read_csv(tmp_path / run / "predictions.csv") for run in "xy")
    assert table["split"].tolist() == expected["split"].tolist()
    test = table[table["split"] == "test"]
    assert values["test_mse"] == pytest.approx(np.mean((test["prediction"] - test["label"]) ** 2))
    assert values["test_mse"] < other["test_mse_mean"]
    # what chose the number of trees is learned too
    again = json.loads((tmp_path / "both" / "all_results.json").read_text())
    assert again["train_samples"] == values["train_samples"] + values["validation_samples"]
    assert "validation_mse" not in again and again["test_mse"] != values["test_mse"]


@pytest.mark.parametrize("more", [("--protocol", "paper"), ("--validation_fraction", "0")])
def test_boosting_needs_a_validation_part(more, small_table, tmp_path):
    flags = ["--train_file", small_table, "--output_dir", str(tmp_path / "x"), *more]
    with pytest.raises(InputError, match="choose on validation molecules"):
        peers.main(*parse_arguments(*peers.ARGUMENTS, defaults=peers.DEFAULTS, args=flags))


def test_chemprop_that_is_not_there_is_named(small_table, tmp_path, monkeypatch):
    flags = ["--train_file", small_table, "--output_dir", str(tmp_path / "x"), "--peer", "chemprop"]
    monkeypatch.setenv("CHEMPROP", "/no/such/chemprop")
    with pytest.raises(InputError, match="/no/such/chemprop cannot be run"):
        peers.main(*parse_arguments(*peers.ARGUMENTS, defaults=peers.DEFAULTS, args=flags))


def test_chemprop_gets_the_split_and_its_answers_are_taken(small_table, tmp_path):
    """A program that stands in for chemprop's looks at what it is given, and answers with the sizes of molecules."""
    program = tmp_path / "chemprop"
    program.write_text(f"""#!{sys.executable}
import sys
import pandas as pd
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
if sys.argv[1] == "train":
    table = pd.read_csv(flags["--data-path"])
    assert set(table[flags["--splits-column"]]) == {{"train", "val", "test"}} and flags["--pytorch-seed"] == "3"
    assert table[flags["--target-columns"]].notna().all()
else:
    table = pd.read_csv(flags["--test-path"])
    table.assign(label=table[flags["--smiles-columns"]].str.len()).to_csv(flags["--preds-path"], index=False)
""")
    program.chmod(0o755)
    flags = ["--train_file", small_table, "--seed", "3", "--peer", "chemprop", "--chemprop", str(program)]
    flags += ["--output_dir", str(tmp_path / "out")]
    peers.main(*parse_arguments(*peers.ARGUMENTS, defaults=peers.DEFAULTS, args=flags))
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert (table["prediction"] == table["SMILES"].str.len()).all()
    test = table[table["split"] == "test"]
    expected = ((test["prediction"] - test["label"]) ** 2).mean()
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["test_mse"] == pytest.approx(expected) and metrics["test_samples"] == len(test) == 32


def test_rows_of_other_weights_are_left_out_of_table_1(tmp_path, capsys):
    """The checkpoint was trained further between two of the rows."""
    model = tmp_path / "model"
    model.mkdir()
    for row, weights in (("regression", b"old"), ("ensemble", b"new")):
        (model / "model.safetensors").write_bytes(weights)
        command = ["run_regression.py", "--model_name_or_path", str(model), "--num_seeds", "5", "--seed", "0"]
        folder = tmp_path / "out" / f"{row}-random-0"
        note, text = run_once.note_of(folder, command)
        folder.mkdir(parents=True)
        note.write_text(text.replace(f"--model_name_or_path {model.name} ", f"--model_name_or_path {model} "))
        keys = [f"test_{key}{end}" for key in ("mse", "mae", "r2") for end in ("", "_fingerprint_ridge")]
        (folder / "all_results.json").write_text(json.dumps(dict.fromkeys(keys, 0.5)))
        member = folder / "member-0"
        member.mkdir()
        (member / "all_results.json").write_text((folder / "all_results.json").read_text())
    rows = table1.collect(tmp_path / "out", ["random"])
    assert [row["name"] for row in rows] == ["best_recipe", "ensemble", "fingerprint_ridge"]
    own = rows[1]["command"].replace(" --num_seeds 5", "")  # see test_run_regression.py: its first member is the same
    assert own != rows[1]["command"] and rows[0]["command"] == own.replace("/ensemble-random-", "/best_recipe-random-")
    assert "Left out, since made from other weights" in capsys.readouterr().out


def test_the_chain_of_the_paper_hands_an_external_file_on(tmp_path):
    """`echo` stands in for Python: what would be run, in its order; the file is named from where the user is."""
    (tmp_path / "more.csv").write_text("SMILES,Label\nCCO,1\n")
    environment = {
        **os.environ,
        "PYTHON": "echo",
        "OUT": "out",
        "RESULTS": "out",
        "SEEDS": "3",
        "EXTERNAL_FILE": "more.csv",
    }
    done = subprocess.run(
        [str(ROOT / "reproduce_paper.sh"), "--quick"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    scripts = [re.search(r"run_(?!once)\w+", line)[0] for line in lines[:-1]]
    assert scripts == [
        "run_regression",
        "run_mlm",
        "run_regression",
        "run_influence",
        "run_regression",
        *["run_peft"] * 3,
    ]
    assert f"--external_file {tmp_path / 'more.csv'}" in lines[3] and "--pool_size" not in lines[3]
    assert "--train_file out/influence-3/merged_train.csv" in lines[4] and "paper_tables.py" in lines[-1]
    # a folder of the caller's; neither the runs nor the tables of the pool are replaced
    (tmp_path / "mine").mkdir()
    environment = {name: value for name, value in environment.items() if name not in ("OUT", "RESULTS")}
    done = subprocess.run(
        [str(ROOT / "reproduce_paper.sh"), "mine"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    first, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert f"outputs/paper-external-mine/regression-3 run_regression.py --model_name_or_path {tmp_path}/mine " in first
    assert last.endswith("--output outputs/paper-external-mine/paper_tables.json")
    environment["EXTERNAL_FILE"] = "mor.csv"
    done = subprocess.run(
        [str(ROOT / "reproduce_paper.sh")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and not done.stdout and "There is no file mor.csv" in done.stderr


@pytest.mark.slow
def test_chain_of_table_1_trains_every_row_once_and_writes_the_table(tiny_checkpoint, small_table, tmp_path):
    extra = f"--train_file {small_table} --max_steps 2"
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "RESULTS": str(tmp_path), "EXTRA": extra}
    environment |= {"SEEDS": "0", "SPLITS": "random", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment |= {"ROWS": "regression mlm_regression ensemble from_scratch descriptor_boosting"}
    command = ["sh", str(ROOT / "reproduce_table1.sh"), tiny_checkpoint]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "table1.json").read_text())
    names = [r["name"] for r in report["rows"]]
    assert names == [
        "regression",
        "mlm_regression",
        "best_recipe",
        "ensemble",
        "from_scratch",
        "fingerprint_ridge",
        "descriptor_boosting",
    ]
    assert all(len(r["test_mse"]) == 1 and r["command"].startswith("python ") for r in report["rows"])
    assert (tmp_path / "table1.png").stat().st_size > 10_000 and "| ensemble | random | 80 % | 1 |" in done.stdout
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.startswith("| row |")  # nothing was trained again
    # another recipe or other weights are another cell
    environment["EXTRA"] += " --weight_decay 0.01"
    other = subprocess.run(command, cwd=ROOT, env=environment | {"ROWS": "regression"}, capture_output=True, text=True)
    assert other.returncode == 0 and "regression-random-0" in other.stdout.splitlines()[0]


@pytest.mark.parametrize("script", ["reproduce_table1.sh", "reproduce_paper.sh"])
def test_other_flags_replace_no_runs_and_no_tables_of_the_project(script, tmp_path):
    """`echo` stands in for Python."""
    environment = {**os.environ, "PYTHON": "echo", "SEEDS": "3", "EXTRA": "--num_train_epochs 1"}
    environment = {name: value for name, value in environment.items() if name not in ("OUT", "RESULTS")}
    refused = subprocess.run(["sh", str(ROOT / script)], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and not refused.stdout and "give them an OUT of their own" in refused.stderr
    environment["OUT"] = str(tmp_path)
    ran = subprocess.run(["sh", str(ROOT / script)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and f"--output {tmp_path}/" in ran.stdout.splitlines()[-1]


@pytest.mark.parametrize("script", ["reproduce_table1.sh", "reproduce_paper.sh"])
def test_a_flag_that_a_chain_does_not_have_is_refused(script):
    done = subprocess.run(["sh", str(ROOT / script), "--fast"], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and "unknown: --fast" in done.stderr


def chain_of_table_1(folder, *arguments, **environment):
    """What the chain would run: `echo` stands in for Python."""
    environment = {**os.environ, "PYTHON": "echo", "SEEDS": "3", "RESULTS": str(folder), **environment}
    command = ["sh", str(ROOT / "reproduce_table1.sh"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("studies/run_once.py ") for line in done.stdout.splitlines()[:-1]]


def test_the_chain_of_table_1_takes_other_models_and_starts(tmp_path):
    """The published model with its own rate and shape; a folder as the caller sees it; an adapted start."""
    lines = chain_of_table_1(
        tmp_path, "ibm/MoLFormer-XL-both-10pct", ROWS="regression from_scratch", SPLITS="scaffold"
    )
    out, model = "outputs/table1-MoLFormer-XL-both-10pct", "ibm/MoLFormer-XL-both-10pct"
    where = "--split scaffold --seed 3"
    assert lines == [
        f"{out}/regression-scaffold-3 run_regression.py --model_name_or_path {model} --learning_rate 3e-5 {where}",
        f"{out}/from_scratch-scaffold-3 run_regression.py --config_name {model} --learning_rate 3e-4 {where}",
    ]
    (tmp_path / "my model").mkdir()
    stand_in = tmp_path / "stand_in.sh"
    stand_in.write_text('#!/bin/sh\nprintf "<%s>" "$@"; echo\n')
    stand_in.chmod(0o755)
    (line,) = chain_of_table_1(tmp_path, "my model", PYTHON=str(stand_in), ROWS="from_scratch", SPLITS="random")
    assert f"<--config_name><{tmp_path / 'my model'}><--learning_rate>" in line
    (tmp_path / "mine").mkdir()
    first, second = chain_of_table_1(tmp_path, "mine", ROWS="ensemble", SPLITS="random", ADAPT="mtr")
    start = f"--model_name_or_path {tmp_path / 'mine'} --objective mtr"
    assert first.startswith(f"outputs/table1-mine/ensemble-random-3-mlm run_mlm.py {start}")
    assert "--model_name_or_path outputs/table1-mine/ensemble-random-3-mlm" in second and "--num_seeds 5" in second
    (line,) = chain_of_table_1(tmp_path, ROWS="chemprop", SPLITS="random", CHEMPROP="some/where/chemprop")
    assert line == "outputs/table1/chemprop-random-3 studies/peers.py --peer chemprop --split random --seed 3"
    (line,) = chain_of_table_1(tmp_path, ROWS="ensemble", SPLITS="random", RECIPE="--num_train_epochs 3", OUT="x")
    assert "--num_train_epochs 3 --num_seeds 5" in line  # an ensemble it is, whatever the recipe


@pytest.mark.parametrize("known", [False, True])
def test_where_no_time_is_known_most_cells_decide_which_command_stands_in_table_1(known, tmp_path):
    """As of runs that were kept long ago; of later ones the time is known."""
    for seed, epochs in ((0, 7), (1, 15), (2, 15)):
        values = {"test_mse": 0.4, "test_mae": 0.5, "test_r2": 0.7}
        finished(tmp_path, f"from_scratch-random-{seed}", values, f"python x.py --epochs {epochs} --seed {seed}")
        time = 10 * known if seed == 0 else 0
        os.utime(tmp_path / f"from_scratch-random-{seed}.command", (time, time))
    (row,) = table1.collect(tmp_path, ["random"])
    assert row["seeds"] == ([0] if known else [1, 2]) and row["learned"] == "72 %"


def test_rows_that_learn_the_validation_molecules_too_are_marked(tmp_path):
    values = {"test_mse": 0.4, "test_mae": 0.5, "test_r2": 0.7}
    finished(tmp_path, "descriptor_boosting-random-0", values, "python studies/peers.py --refit true --seed 0")
    finished(tmp_path, "chemprop-random-0", values, "python studies/peers.py --seed 0")
    finished(tmp_path, "from_scratch-random-0", values, "python run_regression.py --validation_fraction 0")
    rows = {row["name"]: row for row in table1.collect(tmp_path, ["random"])}
    assert {name: row["learned"] for name, row in rows.items()} == {
        "from_scratch": "80 %", "descriptor_boosting": "80 %", "chemprop": "72 %"
    }  # fmt: skip
    assert table1.learned_share("python x.py --validation_fraction 0 --validation_fraction 0.05") == "76 %"
    assert table1.learned_share("python x.py --protocol paper") == ""
    pair = {"first": "best_recipe", "second": "chemprop", "split": "random", "mean": -0.1, "low": -0.2, "high": 0.0}
    text = table1.markdown([*rows.values()], [pair | {"learned": ["80 %", "72 %"], "seeds": 5}])
    assert "| chemprop | random | 72 % | 1 | 0.400 |" in text
    assert "| best recipe − chemprop | random | 80 %, 72 % | -0.100 |" in text


def test_predictions_against_true_values_are_drawn_where_all_models_have_them(tmp_path, capsys, monkeypatch):
    values = {"test_mse": 0.4, "test_mae": 0.5, "test_r2": 0.7}
    table = "row,SMILES,label,prediction,split\n0,C,1.0,1.5,test\n1,N,2.0,1.5,test\n2,O,3.0,3.0,train\n"
    for name in ("regression", "mlm_regression"):
        for cell in ("random-0", "scaffold-0", "scaffold-1"):
            finished(tmp_path, f"{name}-{cell}", values | {f"{key}_fingerprint_ridge": 0.5 for key in values})
    files = [tmp_path / cell / "predictions.csv"
             for cell in ("regression-scaffold-1", "mlm_regression-scaffold-1", "regression-random-0")]  # fmt: skip
    for path in files:
        path.write_text(table)
    rows = table1.collect(tmp_path)
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, title, **_: titles.append(title))
    table1.plot(rows, tmp_path, tmp_path / "table1.png")
    told = [f"{name}, scaffold split, seed 1: MSE 0.400" for name in ("regression", "mlm, then regression")]
    assert titles == told
    with Image.open(tmp_path / "table1.png") as image:
        assert image.width > 1.5 * image.height and len(image.convert("RGB").getcolors(maxcolors=2**24)) > 10
    files[0].unlink()
    table1.plot(rows, tmp_path, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists() and "other.png stays as it is" in capsys.readouterr().out


def test_chain_of_table_1_reports_what_failed_and_still_writes_the_table(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "RESULTS": str(tmp_path), "SEEDS": "0",
        "SPLITS": "random", "ROWS": "no_such_row", "PYTHON": sys.executable}  # fmt: skip
    folder = tmp_path / "out" / "from_scratch-random-3"
    folder.mkdir(parents=True)
    (folder / "all_results.json").write_text(json.dumps({"test_mse": 0.9, "test_mae": 0.7, "test_r2": 0.3}))
    command = ["sh", str(ROOT / "reproduce_table1.sh")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "There is no row no_such_row" in done.stdout
    assert json.loads((tmp_path / "table1.json").read_text())["rows"][0]["test_mse"] == [0.9]


def test_how_a_corpus_was_read_does_not_ship(tiny_checkpoint, tmp_path, monkeypatch):
    """A canonical corpus is read as it is; who fine-tunes the checkpoint has SMILES of any form."""
    run, shipped = tmp_path / "run", tmp_path / "shipped"
    shutil.copytree(tiny_checkpoint, run)
    config = json.loads((run / "config.json").read_text()) | {"smiles_form": "raw", "smiles_max_length": 256}
    (run / "config.json").write_text(json.dumps(config))
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 1.5, "eval_perplexity": 4.5}]
    state = {"global_step": 2, "train_batch_size": 8, "log_history": log}
    (run / "trainer_state.json").write_text(json.dumps(state))
    (run / "all_results.json").write_text(json.dumps({"train_loss": 2.0, "eval_loss": 1.5}))
    shipped.mkdir()
    (shipped / "README.md").write_text("<!-- table -->\n<!-- end -->\n")
    monkeypatch.setattr(sys, "argv", ["ship_checkpoint.py", str(run), "--output", str(shipped), "--half"])
    ship_checkpoint.main()
    config = json.loads((shipped / "config.json").read_text())
    assert not {"auto_map", "smiles_form", "smiles_max_length"} & set(config)
    assert json.loads((shipped / "all_results.json").read_text()) == {"eval_loss": 1.5, "molecules": 16}
    assert "| 16 |  | 4.500 |" in (shipped / "README.md").read_text()


def test_a_checkpoint_ships_into_a_new_folder(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Its card is then still to be written."""
    run, shipped = tmp_path / "run", tmp_path / "shipped"
    shutil.copytree(tiny_checkpoint, run)
    state = {"global_step": 1, "train_batch_size": 8, "log_history": [{"step": 1, "eval_loss": 1.5}]}
    (run / "trainer_state.json").write_text(json.dumps(state))
    (run / "all_results.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["ship_checkpoint.py", str(run), "--output", str(shipped)])
    ship_checkpoint.main()
    assert not (shipped / "README.md").exists() and "| 8 |" in capsys.readouterr().out


def test_half_the_digits_are_stored_and_loaded_as_float32(tiny_checkpoint, tmp_path):
    """Reference: the same weights rounded to float16."""
    import torch
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    ship_checkpoint.store_half(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * size
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    for name, tensor in loaded.named_parameters():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, model.get_parameter(name).half().float(), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- the whole paper


def finished(folder, name, values, command="python x.py"):
    (folder / name).mkdir(parents=True)
    (folder / name / "all_results.json").write_text(json.dumps(values))
    (folder / f"{name}.command").write_text(f"{command} --output_dir {name}\n")


def test_the_papers_tables_stand_beside_ours(tmp_path):
    """Reference: intervals worked by hand (Student's t of two values: 12.706; variance 0.005 times 1/2 + 1/4)."""
    usual = {"train_samples": 70, "validation_samples": 10, "test_samples": 20}
    for seed, mse in enumerate((0.4, 0.5)):
        finished(tmp_path, f"regression-{seed}", {"test_mse": mse, "test_mae": 0.5, "test_r2": 0.7, **usual})
        finished(tmp_path, f"lora-{seed}", {"test_mse": mse, "final_train_mse": 0.1, **usual})
        sizes = {"train_samples": 40, "validation_samples": 10, "test_samples": 50}
        selected = {"eval_losses": [0.9, mse], **sizes}
        controls = {"none": {}, "random": {"test_mse": 2 * mse, "test_mae": 0.5, "test_r2": 0.7, **sizes}}
        finished(tmp_path, f"influence-{seed}", {"results": {**controls, "selected": selected}})
    finished(tmp_path, "bitfit-0", {"test_mse": 9.0})
    (tmp_path / "bitfit-0" / "unfinished").touch()
    rows = paper_tables.rows_of(paper_tables.collect(tmp_path))
    chance = "regression with as many of them, chosen at random"
    assert [row["name"] for row in rows] == ["regression", chance, "epoch 1", "epoch 2", "lora"]
    assert rows[1]["values"]["test_mse"] == {0: 0.8, 1: 1.0}
    mean, half = rows[1]["intervals"]["test_mse"]  # half of the molecules are tested on: times 1/2 + 1
    assert mean == pytest.approx(0.9) and half == pytest.approx(12.706 * math.sqrt(0.02 * 1.5), rel=1e-3)
    mean, half = rows[0]["intervals"]["test_mse"]
    assert mean == pytest.approx(0.45) and half == pytest.approx(12.706 * math.sqrt(0.005 * 0.75), rel=1e-3)
    mean, half = rows[3]["intervals"]["loss"]  # of validation, a fifth of it and what is learned: times 1/2 + 1/4
    assert mean == pytest.approx(0.45) and half == pytest.approx(12.706 * math.sqrt(0.005 * 0.75), rel=1e-3)
    text = paper_tables.to_markdown(rows)
    assert "| regression | 2 | 0.450 ± 0.778 | 0.500 ± 0.000 | 0.700 ± 0.000 | 0.4827 | 0.5359 | 0.6733 |" in text
    assert "| epoch 2 | 2 | 0.450 ± 0.778 | 0.318 |" in text
    assert "- table 1, regression: `python x.py --output_dir regression-0`" in text


def test_a_row_of_the_papers_tables_is_of_one_command(tmp_path, capsys):
    """Seeds differ; epochs do not. A run that starts from another one names that one's command."""
    values = {"test_mse": 0.5, "test_mae": 0.5, "test_r2": 0.7}
    for seed, more in ((0, ""), (1, ""), (2, " --num_train_epochs 1")):
        finished(tmp_path, f"regression-{seed}", values, f"python x.py --rate 6e-4 --seed {seed}{more}")
        finished(tmp_path, f"mlm-{seed}", {}, f"python mlm.py --seed {seed}")
        start = f"python x.py --model_name_or_path out/mlm-{seed} --seed {seed}"
        finished(tmp_path, f"mlm_regression-{seed}", values, start)
        finished(tmp_path, f"influence-{seed}", {"results": {}}, f"python influence.py --seed {seed}")
        # in a folder outside the project, of which the note has names alone
        finished(tmp_path, f"selected-{seed}", values, f"python x.py --train_file merged_train.csv --seed {seed}")
        for name in (f"mlm_regression-{seed}", f"selected-{seed}"):
            with (tmp_path / f"{name}.command").open("a") as file:
                file.write(f"# model.safetensors or merged_train.csv: {seed}\n")
        os.utime(tmp_path / f"regression-{seed}.command", (100 - seed, 100 - seed))  # the newest is that of seed 0
    found = paper_tables.collect(tmp_path)
    assert list(found["regression"]["seeds"]) == [0, 1] and "regression-2" in capsys.readouterr().out
    assert list(found["mlm_regression"]["seeds"]) == list(found["selected"]["seeds"]) == [0, 1, 2]
    assert found["mlm_regression"]["command"].startswith("python mlm.py --seed 0 --output_dir mlm-0 && python x.py")
    with (tmp_path / "mlm-1.command").open("a") as file:
        file.write("# model.safetensors: of other weights\n")
    os.utime(tmp_path / "mlm_regression-1.command", (99, 99))
    found = paper_tables.collect(tmp_path)  # whose second step is of other weights in any case
    assert list(found["mlm_regression"]["seeds"]) == [0, 2] and "mlm_regression-1" in capsys.readouterr().out


COUNTING = """
import sys
from pathlib import Path

folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
with (Path(__file__).parent / "calls").open("a") as file:
    print(sys.argv[-3:-2], file=file)
if "fail" in Path(__file__).with_name("data.csv").read_text():
    print("a reason")
    raise SystemExit(3)
(folder / "all_results.json").write_text("{}")
"""


def test_a_finished_run_is_repeated_only_if_its_command_or_a_file_of_it_changed(tmp_path):
    """A script that counts its calls stands in for one that trains."""
    script, data = tmp_path / "count.py", tmp_path / "data.csv"
    script.write_text(COUNTING)
    data.write_text("one")

    def calls(*flags):
        code = 0
        try:
            common.run_once(tmp_path / "a-0", [str(script), "--train_file", str(data), *flags])
        except subprocess.CalledProcessError as error:
            code = error.returncode
        return code, (tmp_path / "calls").read_text().count("\n")

    shell = [sys.executable, str(ROOT / "studies" / "run_once.py"), str(tmp_path / "a-0"), str(script)]
    subprocess.run([*shell, "--train_file", str(data)], check=True)  # as the shell chains call it
    assert calls() == (0, 1)
    data.write_text("two")
    assert [calls(), calls(), calls("--seed", "1")] == [(0, 2), (0, 2), (0, 3)]
    data.rename(tmp_path / "away.csv")  # what a finished run started from may be gone
    assert calls("--seed", "1") == (0, 3)
    data.write_text("fail")  # what the folder held is not taken for what this command makes
    assert calls() == (3, 4)
    failed = subprocess.run([*shell, "--train_file", str(data)], capture_output=True, text=True)
    assert failed.returncode == 3 and "a reason" in failed.stdout
    assert calls() == (3, 6)
    assert not (tmp_path / "a-0" / "all_results.json").exists()
    (tmp_path / "a-0" / "unfinished").touch()
    (tmp_path / "a-0" / "checkpoint-3").mkdir()
    (tmp_path / "a-0" / "checkpoint-3" / "trainer_state.json").write_text('{"cut')
    calls()
    assert "--overwrite_output_dir" in (tmp_path / "calls").read_text().splitlines()[-1]
    (tmp_path / "a-0" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    torch.save({}, tmp_path / "a-0" / "checkpoint-3" / "scheduler.pt")
    calls()
    assert "true" in (tmp_path / "calls").read_text().splitlines()[-1]


def test_a_run_that_is_replaced_is_named_though_interrupted(tmp_path, capsys):
    """And a note that was cut, as a full disk leaves it, is no end of a study."""
    (tmp_path / "count.py").write_text(COUNTING)
    (tmp_path / "data.csv").write_text("one")
    (tmp_path / "a-0" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "a-0.command").touch()
    assert not run_once.is_done(tmp_path / "a-0", [str(tmp_path / "count.py")])
    common.run_once(tmp_path / "a-0", [str(tmp_path / "count.py")])
    assert f"{tmp_path / 'a-0'} is of another command" in capsys.readouterr().out
    assert not (tmp_path / "a-0" / "checkpoint-9").exists()


def test_a_run_that_another_process_writes_is_not_replaced(tmp_path):
    (tmp_path / "a-0").mkdir()
    (tmp_path / "a-0.command").write_text("python other.py\n")
    hold = (
        f"from utils_runs import *; held = lock(Path({str(tmp_path / 'a-0')!r})); print('ready', flush=True); input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, **pipes)
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(SystemExit, match="Another run is writing to"):
        common.run_once(tmp_path / "a-0", ["x.py"])
    assert (tmp_path / "a-0" / ".lock").exists()
    other.communicate("\n")


@pytest.mark.parametrize("names", [["model"], ["adapter_model"], ["member-0/model", "member-1/model"]])
def test_the_weights_of_whatever_a_run_starts_from_are_told_apart(tmp_path, names):
    found = []
    for content in (b"one", b"two"):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / f"{name}.safetensors").write_bytes(content)
        found.append(run_once.checksums(["--model_name_or_path", str(tmp_path)]))
    assert len(found[0]) == len(names) and not set(found[0]) & set(found[1])


def test_a_study_goes_on_elsewhere_with_the_runs_that_were_kept(tmp_path):
    """Finished runs alone are kept, members included; what is already in the other place is left as it is."""
    here, there, path = tmp_path / "here", tmp_path / "there", tmp_path / "runs.jsonl"
    for name, files in {"a-0": ["", "member-0", "member-1"], "b-0": [""], "c-0": [""], "trial/d-0": [""]}.items():
        for place in files:
            (here / "work" / "study" / name / place).mkdir(parents=True)
            (here / "work" / "study" / name / place / "all_results.json").write_text(
                f'{{"test_mse": "{name}{place}"}}'
            )
        note, text = run_once.note_of(here / "work" / "study" / name, ["x.py", "--seed", "0"])
        note.write_text(text)
    (here / "work" / "study" / "c-0" / "unfinished").touch()
    assert kept_runs.keep(here, path) == kept_runs.keep(here, path) == 3
    (there / "work" / "study" / "b-0").mkdir(parents=True)
    assert kept_runs.restore(there, path) == ["work/study/a-0", "work/study/trial/d-0"]
    assert kept_runs.restore(there, path) == []
    times = [int((root / "work" / "study" / "a-0.command").stat().st_mtime) for root in (here, there)]
    assert times[0] == times[1]  # older than any run that is made there
    assert run_once.is_finished(there / "work" / "study" / "a-0" / "member-1")
    assert kept_runs.keep(there, path) == 3
    restored = json.loads((there / "work" / "study" / "a-0" / "all_results.json").read_text())
    assert restored == {"test_mse": "a-0"}


def test_of_an_unfinished_ensemble_its_finished_members_are_kept(tmp_path):
    finished(tmp_path / "work" / "study", "a-0", {"test_mse": 0.4})
    member = tmp_path / "work" / "study" / "a-0" / "member-0"
    member.mkdir()
    (member / "all_results.json").write_text('{"test_mse": 0.5}')
    (tmp_path / "work" / "study" / "a-0" / "all_results.json").unlink()
    assert kept_runs.keep(tmp_path, tmp_path / "runs.jsonl") == 1
    assert kept_runs.restore(tmp_path / "elsewhere", tmp_path / "runs.jsonl") == ["work/study/a-0"]
    restored = tmp_path / "elsewhere" / "work" / "study" / "a-0"
    assert run_once.is_finished(restored / "member-0") and not run_once.is_finished(restored)


def test_a_run_from_a_restored_one_without_weights_says_so(tmp_path):
    finished(tmp_path, "start-0", {})
    with pytest.raises(SystemExit, match="start-0 were restored without its weights"):
        common.run_once(tmp_path / "next", ["run_regression.py", "--model_name_or_path", str(tmp_path / "start-0")])


def test_a_part_of_a_study_replaces_no_whole_table(tmp_path):
    whole = tmp_path / "results" / "recipes.json"
    whole.parent.mkdir()
    rows = [{"name": "one", "validation_mse": {0: 0.4, 1: 0.5}}, {"name": "other", "validation_mse": {0: 0.3}}]
    assert common.place_of(whole, {"rows": rows}, recipes.cells_of, tmp_path) == whole  # there is none yet
    whole.write_text(json.dumps({"rows": rows}))
    assert common.place_of(whole, {"rows": rows}, recipes.cells_of, tmp_path) == whole
    assert common.place_of(whole, {"rows": rows[:1]}, recipes.cells_of, tmp_path) == tmp_path / "recipes.json"
    more = [rows[0], {"name": "a third", "validation_mse": {0: 0.3, 1: 0.3}}]  # more runs, but not these
    assert common.place_of(whole, {"rows": more}, recipes.cells_of, tmp_path) == tmp_path / "recipes.json"


def test_a_folder_that_no_study_made_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="no run of a study made"):
        common.run_once(tmp_path, ["run_mlm.py"])
    assert (tmp_path / "thesis.txt").exists()


def test_a_command_in_a_table_can_be_typed():
    command = ["run_mlm.py", "--train_file", "/data/a b.csv", "--output_dir", str(ROOT / "work" / "x")]
    assert common.as_text(command) == "python run_mlm.py --train_file 'a b.csv' --output_dir work/x"


@pytest.mark.slow
def test_the_quick_form_of_the_paper_ends_in_its_tables(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(ROOT / "reproduce_paper.sh"), "--quick"], env=environment, check=True, timeout=600)
    text = (tmp_path / "out" / "paper_tables.md").read_text()
    for title in ("Table 1", "Table 2", "Appendix"):
        assert title in text
    before = {path: path.stat().st_mtime for path in (tmp_path / "out").glob("*/all_results.json")}
    subprocess.run([str(ROOT / "reproduce_paper.sh"), "--quick"], env=environment, check=True, timeout=120)
    assert before == {path: path.stat().st_mtime for path in (tmp_path / "out").glob("*/all_results.json")}


def influence_run(seed, errors, split="random", pool="300", leakage=False):
    aucs = {"auc_influence": 0.8, "auc_gradient_dot": 0.6, "auc_loss": 0.9, "auc_random": 0.45}
    wrong = {} if pool == "external" else {"added_wrong": 40 + seed}
    sizes = {"train_samples": 3024, "validation_samples": 336, "test_samples": 840}
    results = {
        name: {"test_mse": error, "validation_mse": error / 2, "added": 150, **sizes, **wrong}
        for name, error in errors.items()
    }
    report = {"residual": 0.1 + seed / 100, "converged": seed < 3, "molecules": 300, "training_molecules": 2724}
    return {
        "pool": pool, "split": split, "seed": seed, "leakage": leakage,
        "results": results, "influence": report | ({} if pool == "external" else aucs),
    }  # fmt: skip


def test_the_influence_study_pairs_by_seed_and_keeps_the_leak_apart(tmp_path):
    runs = [influence_run(seed, {"selected": 0.4 + seed / 100, "random": 0.5 + seed / 50}) for seed in (0, 1, 2)]
    runs += [influence_run(0, {"selected": 0.1, "none": 0.5}, leakage=True)]
    runs += [influence_run(0, {"selected": 0.6}, pool="external", split="scaffold")]
    runs += [influence_run(3, {"none": 0.5}, pool="external")]  # whose selection failed
    rows = {(row["pool"], row["name"]): row for row in influence.summarize(runs)}
    assert rows["300", "selected"]["test_mse"] == pytest.approx({0: 0.4, 1: 0.41, 2: 0.42})
    assert rows["300", "leakage"]["test_mse"] == {0: 0.1}
    assert ("300", "none") not in rows  # that of the leaking run is not mixed in
    mean, half = rows["300", "random"]["selected_minus_this"]
    assert mean == pytest.approx(-0.11) and half == pytest.approx(4.3027 * 0.01 * math.sqrt(1 / 3 + 1 / 4), rel=1e-3)
    nothing_wrong = influence_run(0, {"selected": 0.4}, split="scaffold") | {"influence": {}}  # --pool_noise 0
    detected = influence.detection_rows([*runs, nothing_wrong])
    means = {row["score"]: row["mean"] for row in detected}
    assert means == pytest.approx({"influence": 0.8, "gradient_dot": 0.6, "loss": 0.9, "random": 0.45})
    text = influence.to_markdown(list(rows.values()), detected, runs)
    assert "| 300 | random | random-k | 150 (41) | 3 | 0.260 | 0.520 ± 0.066 | -0.110 ± 0.033 |  |" in text
    assert "| external | scaffold | top-k by influence | 150 | 1 |" in text
    assert "5 of 6 scorings converged; residuals 0.10 to 0.13." in text
    older, other = influence_run(1, {"selected": 0.4}), influence_run(0, {"selected": 0.4})
    older["results"]["selected"].pop("added_wrong")
    older["results"]["selected"].pop("validation_mse")
    older["influence"].pop("residual")  # as of --ihvp identity
    mixed = influence.summarize([other, older])
    assert mixed[0]["added_wrong"] == 40 and "1 of 1 scorings" in influence.to_markdown(mixed, [], [other, older])
    large = [influence_run(0, {"selected": 0.4, "group_influence": 0.3, "random": 0.35}, pool="1400")]
    assert influence.groups([*large, *runs]) == [
        ("300", "random"), ("1400", "random"), ("external", "random"), ("external", "scaffold")
    ]  # fmt: skip
    values = {row["name"]: row.get("group_influence_minus_this") for row in influence.summarize(large)}
    assert values == {
        "selected": pytest.approx((-0.1, None)),
        "random": pytest.approx((-0.05, None)),
        "group_influence": None,
    }
    influence.plot(list(rows.values()), tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_intervals_of_the_influence_study_allow_for_what_its_splits_share():
    """Reference: intervals worked by hand (Student's t of two values: 12.706; half the squared difference)."""
    runs = [influence_run(seed, {"selected": 0.4, "none": 0.5 + seed / 50}, pool="1400") for seed in (0, 1)]
    for run in runs:  # a model that learned fewer molecules than are tested: 504, and 336 to choose the epoch
        run["results"]["none"]["train_samples"] = 504
        run["influence"]["auc_loss"] += run["seed"] / 50
        run["influence"] |= {"molecules": 1400, "training_molecules": 700}
    rows = {row["name"]: row for row in influence.summarize(runs)}
    expected = 12.706 * math.sqrt(0.0002 * (1 / 2 + 840 / 840))
    assert rows["none"]["half_width"] == pytest.approx(expected, rel=1e-3)
    assert rows["none"]["selected_minus_this"] == pytest.approx((-0.11, expected), rel=1e-3)
    areas = {row["score"]: row for row in influence.detection_rows(runs)}
    expected = 12.706 * math.sqrt(0.0002 * (1 / 2 + 1400 / 700))
    assert areas["loss"]["half_width"] == pytest.approx(expected, rel=1e-3)


def test_the_upper_part_answers_as_the_whole_model(tiny_checkpoint):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = MolformerForRegression.from_pretrained(tiny_checkpoint).eval()
    molecules = pd.DataFrame({"input_ids": tokenizer(["CCO", "c1ccccc1N", "C"])["input_ids"]})
    molecules["length"] = molecules["input_ids"].map(len)
    states = influence_lds.add_states(model, tokenizer, molecules)
    answers = influence_lds.upper_part(model).eval()(**influence_lds.pad_states(states)).logits
    batch = tokenizer.pad({"input_ids": molecules["input_ids"].tolist()}, return_tensors="pt")
    assert torch.allclose(answers, model(**batch).logits, atol=1e-5)


def test_the_commands_of_the_influence_study_are_taken_by_the_script(tmp_path):
    args = argparse.Namespace(folder=tmp_path, extra="--num_train_epochs 1", seeds=[0, 1, 2, 3], external_file="x.csv")
    folders = set()
    for cell in (
        ("300", "random", 0, False),
        ("1400", "random", 3, False),
        ("external", "scaffold", 3, False),
        ("external", "random", 0, True),
    ):
        folder, command = influence.command_of(cell, args)
        folders.add(folder)
        assert command[:3] == ["run_influence.py", "--model_name_or_path", "models/molformer-mini"]
        parsed = parse_arguments(*run_influence.ARGUMENTS, defaults=run_influence.DEFAULTS, args=command[1:])
        _, data_args, influence_args, training_args = parsed
        assert (data_args.split, training_args.seed, training_args.num_train_epochs) == (*cell[1:3], 1)
        assert (influence_args.external_file is None) == (cell[0] != "external")
        assert cell[0] == "external" or influence_args.pool_size == int(cell[0])
        assert influence_args.score_split == ("test" if cell[3] else "validation")
        expected = {"300": 8, "1400": 6, "external": 5}  # more of the first three seeds, and right labels of a pool
        assert len(influence_args.controls) == (1 if cell[3] else expected[cell[0]])
        args.extra += " --num_repeats 4"  # which conjugate gradients do not read
        for solver in ("lissa", "cg"):
            again = influence.scoring_command(cell, args, exact=solver == "cg")
            parsed = parse_arguments(*run_influence.ARGUMENTS, defaults=run_influence.DEFAULTS, args=again[1:])
            _, data_args, influence_args, training_args = parsed
            assert influence_args.ihvp == solver and influence_args.controls == ["none"]
            assert training_args.do_predict and not training_args.do_train and data_args.split == cell[1]
            assert training_args.num_train_epochs == 1
        args.extra = "--num_train_epochs 1"
    assert len(folders) == 4


def test_the_datamodeling_score_is_a_rank_correlation_with_its_interval():
    """References: scipy, and how much the score of 60 halves differs from one draw of them to the next."""
    generator = np.random.default_rng(0)

    def draw():
        measured = generator.normal(size=60)
        return measured + generator.normal(size=60), measured

    foretold, measured = draw()
    assert influence_lds.correlation([(measured**3, measured)])[0] == pytest.approx(1.0)
    lds, samples = influence_lds.correlation([(foretold, measured)])
    assert lds == pytest.approx(scipy.stats.spearmanr(foretold, measured).statistic)
    rows = np.random.default_rng(0).integers(60, size=(2000, 60))[7]
    assert samples[7] == pytest.approx(scipy.stats.spearmanr(foretold[rows], measured[rows]).statistic)
    others = [influence_lds.correlation([draw()], draws=1)[0] for _ in range(300)]
    assert np.std(samples) == pytest.approx(np.std(others), rel=0.4)
    two, more = influence_lds.correlation([(foretold, measured), draw()])
    assert 0 < two < 1 and np.std(more) < np.std(samples)  # of two seeds


def test_the_ceiling_is_what_a_perfect_score_reaches():
    """Reference: scores that are what trainings have in common, with as much noise in each training."""
    generator = np.random.default_rng(0)
    common = generator.normal(size=20_000)
    losses = common + generator.normal(size=(2, 20_000))
    agreement = influence_lds.rank_correlation(*losses)
    reached = influence_lds.rank_correlation(common, losses.mean(axis=0))
    assert influence_lds.ceiling(agreement, 2) == pytest.approx(reached, abs=0.01)
    assert influence_lds.ceiling(-0.1, 2) == 0


def test_a_half_with_helpful_molecules_is_foretold_the_lower_loss():
    scores = np.array([2.0, 1.0, -1.0, -3.0])
    good, bad = influence_lds.foretell(scores, [np.array([0, 1]), np.array([2, 3])])
    assert (good, bad) == (-3.0, 4.0)


def test_the_datamodeling_study_goes_on_with_the_seeds_that_it_has(tmp_path, monkeypatch):
    """A study of a seed that answers at once stands in for one that trains; another process adds a seed meanwhile."""
    asked, output = [], tmp_path / "lds.json"
    measured = np.random.default_rng(0).normal(size=(9, 2)).tolist()
    mean = np.mean(measured, axis=1)

    places = ["influence_lds.py", "--output", str(output), "--folder", str(tmp_path / "kept"), "--seeds"]

    def study_seed(seed, args, settings):
        asked.append(seed)
        if seed == 0:
            monkeypatch.setattr(sys, "argv", [*places, "2"])
            influence_lds.main()
        row = {"seed": seed, "params": "head", "target": "test", "residual": seed / 100}
        rows = [row | {"solver": "cg", "foretold": mean.tolist()}]
        return [*rows, row | {"solver": "identity", "foretold": (-mean).tolist()}], {"test": measured}

    monkeypatch.setattr(influence_lds, "study_seed", study_seed)
    for flags in (["1"], ["0", "1"], ["0"]):
        monkeypatch.setattr(sys, "argv", [*places, *flags])
        influence_lds.main()
    assert asked == [1, 0, 2]  # once each
    monkeypatch.setattr(sys, "argv", [*places, "0", "--subsets", "5"])
    with pytest.raises(SystemExit, match="is of other settings or weights. Give another --output"):  # a trial
        influence_lds.main()
    report = json.loads(output.read_text())
    assert [row["seed"] for row in report["seeds"]] == [1, 1, 2, 2, 0, 0] and set(report["losses"]) == {"0", "1", "2"}
    foretold, plain, again = report["summary"]
    assert (foretold["lds"], plain["lds"]) == (pytest.approx(1), pytest.approx(-1))
    assert foretold["minus_identity"] == pytest.approx({"mean": 2, "low": 2, "high": 2})
    agreement = scipy.stats.spearmanr(*np.transpose(measured)).statistic
    assert again["lds"] == pytest.approx(influence_lds.ceiling(agreement, 2))
    assert (
        "| head | test | cg | 0.02 | 3 | 1.000, 1.000 to 1.000 | +2.000, +2" in output.with_suffix(".md").read_text()
    )


@pytest.mark.parametrize("meanwhile", [["0"], ["1", "--subsets", "5"]], ids=["same seed", "other settings"])
def test_two_datamodeling_studies_write_one_seed_once_and_no_mixture(meanwhile, tmp_path, monkeypatch):
    """The second process writes its seed while the first computes."""
    output, asked = tmp_path / "lds.json", []
    places = ["influence_lds.py", "--output", str(output), "--folder", str(tmp_path / "kept"), "--seeds"]

    def study_seed(seed, args, settings):
        asked.append(seed)
        if len(asked) == 1:
            monkeypatch.setattr(sys, "argv", [*places, *meanwhile])
            influence_lds.main()
        losses = np.arange(18.0).reshape(9, 2).tolist()
        row = {"seed": seed, "params": "head", "target": "test", "solver": "cg", "residual": 0.1}
        return [row | {"foretold": list(range(9))}], {"test": losses}

    monkeypatch.setattr(influence_lds, "study_seed", study_seed)
    monkeypatch.setattr(sys, "argv", [*places, "0"])
    if len(meanwhile) == 1:
        influence_lds.main()
    else:
        with pytest.raises(SystemExit, match="is of other settings or weights"):
            influence_lds.main()
    assert [row["seed"] for row in json.loads(output.read_text())["seeds"]] == [int(meanwhile[0])]
    monkeypatch.setattr(sys, "argv", [*places, "0", "--model", "someone/model"])
    with pytest.raises(SystemExit, match="There are no weights in a folder someone/model"):
        influence_lds.main()


def test_the_linear_model_is_refitted_to_each_half():
    """Reference: ridge regression on the half alone."""
    generator = torch.Generator().manual_seed(0)
    features = {k: torch.randn(n, 20, generator=generator).double() for k, n in (("train", 60), ("test", 30))}
    labels = {k: torch.randn(len(g), generator=generator).double() for k, g in features.items()}

    def ridge(rows):
        known = features["train"][rows]
        matrix = known.T @ known + 2.0 * torch.eye(20)
        return torch.linalg.solve(matrix, known.T @ labels["train"][rows])

    weights = ridge(np.arange(60))
    residuals = {k: g @ weights - labels[k] for k, g in features.items()}
    halves = [np.arange(30), np.arange(0, 60, 2)]
    expected = [float((features["test"] @ ridge(rows) - labels["test"]).square().mean()) for rows in halves]
    assert influence_lds.refit(features, residuals, 2 * 2.0 / 60, "test", halves) == pytest.approx(expected)


def test_an_interrupted_seed_of_the_datamodeling_study_goes_on(tiny_checkpoint, small_table, tmp_path, monkeypatch):
    """Reference: the study without interruption."""
    monkeypatch.setattr(influence_lds, "EPOCHS", 1)
    monkeypatch.setattr(influence_lds, "SOLVERS", {"identity": {"ihvp": "identity"}})
    data = {"train_file": str(small_table), "smiles_column": "SMILES", "label_column": ["label"]}
    plain = influence_lds.DataTrainingArguments
    monkeypatch.setattr(influence_lds, "DataTrainingArguments", lambda **values: plain(**data, **values))
    settings = {"model": str(tiny_checkpoint), "subsets": 3, "trainings": 2, "molecules": 40}

    def study(folder):
        return influence_lds.study_seed(1, argparse.Namespace(folder=tmp_path / folder, **settings), settings)

    rows, losses = study("whole")
    assert [(row["params"], row["target"], row["solver"]) for row in rows] == [
        (params, target, solver)
        for params in ("last layer and head", "head")
        for target in ("validation", "test")
        for solver in ("identity", influence_lds.REFIT)
    ]
    assert all(len(set(row["foretold"])) == 3 for row in rows)
    assert np.shape(losses["validation"]) == np.shape(losses["test"]) == (3, 2)
    assert len({value for name in losses for pair in losses[name] for value in pair}) == 12
    (kept,) = (tmp_path / "whole").glob("seed-1-*.jsonl")
    lines = kept.read_text().splitlines()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / kept.name).write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    trained, train = [], influence_lds.train
    monkeypatch.setattr(influence_lds, "train", lambda *args: trained.append(args) or train(*args))
    assert study("cut") == (rows, losses) and len(trained) == 4  # the second and the third half, twice each


def test_states_below_the_head_alone_are_computed_once(tiny_checkpoint):
    """Reference: the losses by the whole last layer."""
    tokenizer = build_tokenizer()
    model = MolformerForRegression.from_pretrained(tiny_checkpoint).eval()
    molecules = pd.DataFrame(
        {"input_ids": tokenizer(["CCO", "c1ccccc1N", "C"])["input_ids"], "label": [1.0, 2.0, 3.0]}
    )
    molecules["length"] = molecules["input_ids"].map(len)
    molecules = influence_lds.add_states(model, tokenizer, molecules)
    upper = influence_lds.upper_part(model)
    losses = []
    for names in (["classifier.out_proj.bias"], [name for name, _ in upper.named_parameters()]):
        problem = influence_lds.UpperProblem(upper, tokenizer, names, 2, "ggn")
        losses.append(problem.each(influence_lds.molecule_losses, molecules))
        assert (problem.states is not None) == (len(names) == 1)
    assert torch.allclose(*losses, rtol=1e-5)


def test_a_cell_that_fails_is_left_out_of_a_study(capsys, monkeypatch, tmp_path):
    def run(cell, threads):
        subprocess.run([sys.executable, "-c", f"raise SystemExit({cell})"], check=True)
        return cell

    monkeypatch.setattr(common, "FAILED", [])
    assert common.run_all(run, [0, 3, 0], jobs=2) == [0, 0]
    assert "Failed, and left out" in capsys.readouterr().out
    common.write_report(tmp_path / "report.json", {"rows": []})
    (failed,) = json.loads((tmp_path / "report.json").read_text())["failed"]
    assert "raise SystemExit(3)" in failed


def peft_run(method, seed, test_mse, name=None, split="random", trained=100, **values):
    numbers = dict.fromkeys(peft_comparison.NUMBERS, 1.0) | {"base_parameters": 10_000, "test_mse": test_mse}
    numbers |= {"bf16": False, "trainable_parameters_without_head": trained, "eval_mse": test_mse, **values}
    return {"method": method, "name": name or method, "split": split, "seed": seed, **numbers}


def test_the_winner_trains_few_parameters_and_is_chosen_on_validation():
    runs = [peft_run("full", 0, 0.1, trained=9000), peft_run("head", 0, 0.1, trained=0)]
    runs += [peft_run("lora", 0, 0.2, trained=300), peft_run("ia3", 0, 0.5, eval_mse=0.3)]
    runs += [peft_run("bitfit", 0, 0.4), peft_run("bitfit", 0, 0.01, name="paper-bitfit")]
    runs += [peft_run("vera", 0, 0.01, split="scaffold"), peft_run("vera", 9, 0.01)]
    assert peft_comparison.winner_of(runs, [0]) == "ia3"
    assert peft_comparison.winner_of(runs[:3], [0]) is None
    assert peft_comparison.winner_of(runs, [0, 1]) is None  # each failed with one seed


def test_methods_are_compared_with_full_fine_tuning_of_the_same_seed():
    runs = [peft_run("full", 0, 0.4), peft_run("full", 1, 0.5), peft_run("lora", 0, 0.42), peft_run("lora", 1, 0.55)]
    at_paper = {"learning_rate": 1e-4}
    runs += [peft_run("lora", 0, 0.8, name="paper-lora", **at_paper), peft_run("lora", 0, 0.6, split="scaffold")]
    runs += [peft_run("full", 0, 0.5, name="paper-full", **at_paper)]
    runs += [peft_run("lora", 0, 1.4, name="before-lora-0.006", learning_rate=6e-3)]
    rows = {(row["name"], row["split"]): row for row in peft_comparison.summarize(runs)}
    lora = rows["lora", "random"]
    assert lora["of_full"] == pytest.approx((0.42 / 0.4 + 0.55 / 0.5) / 2)
    assert lora["minus_full"] == pytest.approx(0.035) and lora["paper_test_mse"] == 0.7456
    assert "of_full" not in rows["full", "random"] and rows["lora", "scaffold"]["paper_test_mse"] is None
    assert rows["paper-lora", "random"]["of_full"] == pytest.approx(0.8 / 0.5)
    assert "of_full" not in rows["paper-full", "random"]
    assert rows["before-lora-0.006", "random"]["of_full"] == pytest.approx(1.4 / 0.4)
    tuned, other = peft_comparison.to_markdown(list(rows.values())).split("\n\n")
    assert "| lora, the paper's rate 0.0001 | random | 1 | 0.800 | 1.600 |" in other and "0.7456, 0.778" in tuned
    assert "| lora, rate 0.006 | random | 1 | 1.400 | 3.500 |" in other and "| 0.4827 |" in tuned


def test_a_seed_that_failed_is_told_and_does_not_move_the_mean():
    runs = [peft_run("full", seed, 0.4) for seed in range(3)]
    runs += [
        peft_run("pissa", seed, mse, test_r2=r2) for seed, mse, r2 in ((0, 0.42, 0.7), (1, 1.2, 0.1), (2, 0.44, 0.7))
    ]
    runs += [peft_run("lora", 0, float("nan"), test_r2=float("nan")), peft_run("dora", 0, 0.5, bf16=True)]
    rows = {row["name"]: row for row in peft_comparison.summarize(runs, winner="dora")}
    pissa = rows["pissa"]
    assert (pissa["failed"], pissa["test_mse"], pissa["half_width"]) == (1, 0.44, None)
    assert pissa["of_full"] == pytest.approx(1.1) and rows["lora"]["failed"] == 1 and not rows["full"]["failed"]
    text = peft_comparison.to_markdown(list(rows.values()))
    assert "| pissa | random | 3, 1 failed | 0.440 | 1.100 |" in text
    assert "| **dora** | random | 1 | 0.500 |" in text and "| 1 of 1 |" in text and "| 0 of 3 |" in text
    (unknown,) = peft_comparison.summarize([peft_run("lora", 0, 0.4, bf16=None)])
    assert "| not known |" in peft_comparison.to_line(unknown)
    assert sum(row["winner"] for row in rows.values()) == 1


def test_a_run_of_the_comparison_says_its_precision(monkeypatch, tmp_path):
    """By its arguments, else by the machine on which it was kept."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "arguments.json").write_text('{"bf16": true}')
    records = [{"folder": "kept", "machine": {"bfloat16": False}}, {"folder": "old"}]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(peft_comparison, "ROOT", tmp_path)
    monkeypatch.setattr(peft_comparison, "RUNS", tmp_path / "runs.jsonl")
    found = [peft_comparison.is_in_bfloat16(tmp_path / name) for name in ("here", "kept", "old", "none")]
    assert found == [True, False, None, None]


def test_a_part_of_the_comparison_keeps_the_rest_of_it(monkeypatch, tmp_path):
    """Finished cells of other methods and seeds stay, those at a rate that was chosen before are told apart."""
    trained = []

    def run_script(command, folder, threads):
        trained.append(folder.name)
        return dict.fromkeys(peft_comparison.NUMBERS, 1.0) | {"base_parameters": 1000.0}

    monkeypatch.setattr(peft_comparison, "run_script", run_script)
    output, folder = tmp_path / "peft_comparison.json", tmp_path / "runs"
    args = argparse.Namespace(folder=folder, extra="")
    for method, seed, rate in (("full", 0, 6e-4), ("lora", 4, 2e-3), ("lora", 0, 6e-3)):
        note, text = run_once.note_of(*peft_comparison.command_of((method, "random", seed, method, rate, []), args))
        (note.parent / note.stem).mkdir(parents=True)
        note.write_text(text)
        (folder / note.stem / "all_results.json").write_text("{}")
    tuned = {name: {"learning_rate": rate} for name, rate in (("full", 6e-4), ("lora", 2e-3), ("ia3", 1e-2))}
    (tmp_path / "peft_tuning.json").write_text(json.dumps({"tuned": tuned}))
    flags = ["--methods", "ia3", "--seeds", "0", "1", "--folder", str(folder), "--output", str(output), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["peft_comparison.py", *flags])
    peft_comparison.main()
    report = json.loads(output.read_text())
    found = {(row["name"], row["seed"]) for row in report["runs"]}
    paper = {(f"paper-{method}", seed) for method in ("ia3",) for seed in (0, 1)}
    assert found == {("ia3", 0), ("ia3", 1), ("full", 0), ("lora", 4), ("before-lora-0.006", 0)} | paper
    assert report["winner"] is None and "lora-0.006-random-0" in trained

    # all methods with one seed: none has won, and nothing is trained on scaffolds
    output.unlink()  # what stands in for the script leaves no finished runs, which would be in this one too
    flags = ["--seeds", "0", "--folder", str(folder), "--output", str(output), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["peft_comparison.py", *flags])
    peft_comparison.main()
    report = json.loads(output.read_text())
    assert {row["method"] for row in report["runs"]} == set(peft_comparison.METHODS)
    assert report["winner"] is None and {row["split"] for row in report["runs"]} == {"random"}

    # all of them: the winner and full fine-tuning on scaffolds too
    monkeypatch.setattr(sys, "argv", ["peft_comparison.py", *flags[2:]])
    plain = peft_comparison.run_script

    def run_better(command, folder, threads):
        note, text = run_once.note_of(folder, command)
        note.write_text(text)
        return plain(command, folder, threads) | {"eval_mse": 0.5 if "dora" in folder.name else 1.0}

    monkeypatch.setattr(peft_comparison, "run_script", run_better)
    peft_comparison.main()
    report = json.loads(output.read_text())
    assert report["winner"] == "dora"
    scaffold = [row for row in report["runs"] if row["split"] == "scaffold"]
    assert [row["name"] for row in scaffold] == ["full"] * 5 + ["dora"] * 5
    assert all("--split scaffold" in row["command"] for row in scaffold)


def test_the_best_rate_is_that_of_the_lowest_mean_validation_error():
    errors = {3e-4: (0.5, 0.5), 6e-4: (0.3, 0.5), 1.2e-3: (0.45, 0.4)}
    # what failed or diverged with one seed is no rate to take, however easy the other seed is
    errors |= {2.4e-3: (0.1,), 1e-5: (float("nan"), 0.1)}
    runs = [
        peft_run("full", seed, 0.0, learning_rate=rate, eval_mse=value)
        for rate, values in errors.items()
        for seed, value in enumerate(values)
    ]
    tuned = peft_comparison.best_rate("full", list(errors), runs, [0, 1])
    assert tuned["learning_rate"] == 6e-4 and tuned["validation_mse"] == pytest.approx(0.4)
    assert tuned["tried"] == {rate: list(errors[rate]) for rate in sorted(errors)} | {1e-5: [None, 0.1]}
    assert peft_comparison.finalists(tuned) == [2.4e-3, 6e-4]
    assert peft_comparison.best_rate("full", list(errors), runs, [0])["learning_rate"] == 2.4e-3
    assert peft_comparison.best_rate("full", [2.4e-3], runs, [0, 1]) is None
    close = [
        peft_run("full", 0, 0.0, learning_rate=rate, eval_mse=value) for rate, value in ((1e-3, 0.405), (3e-3, 0.4))
    ]
    assert peft_comparison.best_rate("full", [1e-3, 3e-3], close, [0])["learning_rate"] == 1e-3
    assert peft_comparison.next_rate("full", None) is None


@pytest.mark.parametrize(
    ("tried", "best", "expected"),
    [
        ((7e-4, 2e-3, 6e-3), 2e-3, 3.5e-3),  # between it and the better of its neighbors
        ((7e-4, 2e-3, 3.5e-3, 6e-3), 3.5e-3, None),
        ((7e-4, 2e-3, 6e-3), 6e-3, 2e-2),
        ((7e-4, 2e-3, 6e-3), 7e-4, 2e-4),
        ((7e-4, 2e-3, 6e-3, 2e-2), 2e-2, 6e-2),
        ((7e-4, 2e-3, 6e-3, 2e-2), 6e-3, None),  # what lies beyond has been tried, whatever came of it
        ((7e-4, 2e-3, 6e-3, 2e-2, 6e-2), 6e-2, None),  # five are enough
    ],
)
def test_the_grid_grows_where_its_edge_is_best(tried, best, expected):
    found = {"learning_rate": best, "tried": {rate: [0.5 - rate] for rate in tried}}
    assert peft_comparison.next_rate("lora", found) == expected


def test_tuning_ends_where_a_rate_diverges_and_keeps_what_was_tuned_before(monkeypatch, tmp_path):
    """The largest rate of lora is best with one seed, the one beyond it diverges, and the best one itself with another
    seed, so the next best is taken; all of bitfit fails."""

    def run_cells(cells, args):
        rows = [
            peft_run(method, seed, 0.0, learning_rate=rate, eval_mse=1 / rate) for method, _, seed, _, rate, _ in cells
        ]
        most = {0: 1e-2, 1: 3e-3}
        rows = [row | {"eval_mse": 2e3} if row["learning_rate"] > most[row["seed"]] else row for row in rows]
        return [row for row in rows if row["method"] != "bitfit"]

    monkeypatch.setattr(peft_comparison, "run_cells", run_cells)
    report = tmp_path / "peft_tuning.json"
    tuned_before = {"learning_rate": 1.0, "validation_mse": 0.1, "seeds": [0], "tried": {"1.0": [0.1]}}
    ran_before = {"method": "ia3", "name": "tune-ia3", "learning_rate": 1.0, "seed": 0}
    report.write_text(json.dumps({"tuned": {"ia3": tuned_before, "lora": {}}, "runs": [ran_before]}))
    args = argparse.Namespace(
        methods=["lora", "bitfit"], output=tmp_path / "peft_comparison.json", jobs=1, folder=tmp_path
    )
    args.finished = False
    peft_comparison.tune(args)
    values = json.loads(report.read_text())
    assert values["tuned"]["lora"]["learning_rate"] == 2e-3 and list(values["tuned"]["lora"]["tried"])[-1] == "0.02"
    assert values["tuned"].keys() == {"ia3", "lora"} and values["runs"][0] == ran_before
    lines = report.with_suffix(".md").read_text().splitlines()
    assert lines[2].startswith("| ia3 |") and "0.02: 2000.000" in lines[3]


def test_a_whole_tuning_counts_with_fewer_runs_than_the_one_before(monkeypatch, tmp_path):
    """The grids grow with what is found, so the numbers of runs differ; `rates_of` reads this report alone."""

    def run_cells(cells, args):
        return [peft_run(cell[0], cell[2], 0.0, learning_rate=cell[4], eval_mse=cell[4]) for cell in cells]

    monkeypatch.setattr(peft_comparison, "run_cells", run_cells)
    report, folder = tmp_path / "peft_tuning.json", tmp_path / "runs"
    runs = [{"method": "bitfit", "name": "tune-bitfit", "learning_rate": rate, "seed": 0} for rate in range(99)]
    report.write_text(json.dumps({"tuned": {"lora": {"learning_rate": 1.0}}, "runs": runs}))
    args = argparse.Namespace(
        methods=["lora", "bitfit"], output=tmp_path / "peft_comparison.json", jobs=1, folder=folder, finished=False
    )
    folder.mkdir()
    peft_comparison.tune(args)
    rates = peft_comparison.rates_of(args)
    assert rates["lora"] == json.loads(report.read_text())["tuned"]["lora"]["learning_rate"] < 1


def test_more_settings_are_tried_with_one_seed_and_the_best_with_another(monkeypatch, tmp_path):
    cells, errors = [], dict(zip(peft_comparison.MORE, (0.5, 0.4, 0.3, 0.2, 0.6), strict=True))

    def run_cells(given, args):
        cells.extend(given)
        return [
            peft_run("rslora", seed, 0.0, name=name, learning_rate=rate, eval_mse=errors[name[5:]] + seed)
            for _, _, seed, name, rate, _ in given
        ]

    monkeypatch.setattr(peft_comparison, "run_cells", run_cells)
    output = tmp_path / "peft_comparison.json"
    monkeypatch.setattr(sys, "argv", ["peft_comparison.py", "--tune_more", "--output", str(output)])
    peft_comparison.main()
    report = json.loads((tmp_path / "peft_more.json").read_text())
    assert len(cells) == len(report["runs"]) == 7
    assert [len(row["validation_mse"]) for row in report["rows"]] == [2, 2, 1, 1, 1]
    assert [row["name"] for row in report["rows"]] == sorted(errors, key=errors.get)
    assert all(" ".join(cell[5]).endswith(peft_comparison.MORE[cell[3][5:]][0]) for cell in cells)
    assert "| `--peft_alpha 32` | 0.0015 | 0.200, 1.200 |" in (tmp_path / "peft_more.md").read_text()


def test_the_table_of_a_tuning_that_goes_on_has_what_is_finished(monkeypatch, tmp_path):
    """Of lora three rates, so that one between them would follow; of vera none."""

    def run_cells(cells, args):
        errors = {7e-4: 0.5, 2e-3: 0.4, 6e-3: 1.4}
        done = [cell for cell in cells if cell[0] == "lora" and cell[2] == 0 and cell[4] in errors]
        return [peft_run(cell[0], 0, 0.0, learning_rate=cell[4], eval_mse=errors[cell[4]]) for cell in done]

    monkeypatch.setattr(peft_comparison, "run_cells", run_cells)
    args = argparse.Namespace(
        methods=["lora", "vera"], output=tmp_path / "peft_comparison.json", jobs=1, folder=tmp_path
    )
    args.finished = True
    peft_comparison.tune(args)
    tuned = json.loads((tmp_path / "peft_tuning.json").read_text())["tuned"]
    assert tuned.keys() == {"lora"} and tuned["lora"]["learning_rate"] == 2e-3 and tuned["lora"]["seeds"] == [0]
    assert list(tuned["lora"]["tried"]) == ["0.0007", "0.002", "0.006"]


def test_one_finalist_alone_does_not_win_a_tuning_that_goes_on(monkeypatch, tmp_path):
    """Of lora the better rate has no second seed yet; then it has one, and diverges with it."""
    errors = {(7e-4, 0): 0.5, (1.2e-3, 0): 0.45, (2e-3, 0): 0.40, (6e-3, 0): 1.4, (1.2e-3, 1): 0.5}

    def run_cells(cells, args):
        done = [cell for cell in cells if (cell[4], cell[2]) in errors]
        return [
            peft_run(cell[0], cell[2], 0.0, learning_rate=cell[4], eval_mse=errors[cell[4], cell[2]]) for cell in done
        ]

    monkeypatch.setattr(peft_comparison, "run_cells", run_cells)
    monkeypatch.setitem(peft_comparison.RATES, "lora", (7e-4, 1.2e-3, 2e-3, 6e-3))
    args = argparse.Namespace(methods=["lora"], output=tmp_path / "peft_comparison.json", jobs=1, folder=tmp_path)

    def tuned(finished):
        args.finished = finished
        peft_comparison.tune(args)
        return json.loads((tmp_path / "peft_tuning.json").read_text())["tuned"]["lora"]

    assert tuned(finished=True)["learning_rate"] == 2e-3
    found = tuned(finished=False)  # what is not there now has failed
    assert found["learning_rate"] == 1.2e-3 and found["seeds"] == [0, 1]


def test_the_tuning_is_ordered_by_the_seed_that_all_have():
    tuned = {
        "a": {"learning_rate": 1e-3, "validation_mse": 0.40, "seeds": [0], "tried": {"0.001": [0.40]}},
        "b": {"learning_rate": 2e-3, "validation_mse": 0.45, "seeds": [0, 1], "tried": {"0.002": [0.39, 0.51]}},
    }
    lines = peft_comparison.tuning_to_markdown(tuned).splitlines()
    assert lines[2:] == ["| b | 0.002 | 0.390, 0.510 |  |", "| a | 0.001 | 0.400 |  |"]


def test_a_method_without_full_fine_tuning_beside_it_is_not_drawn_as_equal(tmp_path):
    rows = peft_comparison.summarize([peft_run("lora", 3, 0.5), peft_run("full", 0, 0.4), peft_run("ia3", 0, 0.6)])
    assert [row["name"] for row in rows] == ["full", "ia3", "lora"] and "of_full" not in rows[2]
    peft_comparison.plot(rows, tmp_path / "plot.png")


def test_a_cell_of_the_comparison_names_its_defaults(monkeypatch, tmp_path):
    """So that one of another rate, rank or checkpoint is not taken for it; the rates are those of the tuning."""
    found = []
    monkeypatch.setattr(peft_comparison, "run_script", lambda command, *args: found.append(command) or {})
    (tmp_path / "peft_tuning.json").write_text(json.dumps({"tuned": {"lora": {"learning_rate": 5e-3}}}))
    args = argparse.Namespace(folder=tmp_path, extra="", output=tmp_path / "peft_comparison.json")
    rates = peft_comparison.rates_of(args)
    assert rates["lora"] == 5e-3 and rates["ia3"] == peft_comparison.METHODS["ia3"].learning_rate
    peft_comparison.run(("lora", "random", 1, "lora", rates["lora"], []), args, threads=1)
    assert found[0][1:9] == ["--peft_method", "lora", "--model_name_or_path", "models/molformer-mini",
                             "--learning_rate", "0.005", "--peft_rank", "4"]  # fmt: skip


def test_every_method_is_tuned_with_as_many_rates():
    assert peft_comparison.RATES.keys() == peft_comparison.METHODS.keys()
    assert {len(rates) for rates in peft_comparison.RATES.values()} == {3}
    assert peft_comparison.METHODS["full"].learning_rate == LEARNING_RATES["default"]
    report = ROOT / "results" / "peft_tuning.json"
    if report.exists():  # then the defaults are what was found
        for method, found in json.loads(report.read_text())["tuned"].items():
            assert peft_comparison.METHODS[method].learning_rate == found["learning_rate"], method


def test_recipes_are_compared_with_the_reference_of_the_same_seed():
    errors = {"reference": (0.40, 0.50), "bf16": (0.41, 0.51), "15 epochs": (0.35, 0.47)}
    runs = [
        {"name": name, "seed": seed, "validation_mse": value, "minutes": 2.0, "command": "python x.py"}
        for name, values in errors.items()
        for seed, value in enumerate(values)
    ]
    rows = recipes.summarize(runs)
    assert [row["name"] for row in rows] == ["15 epochs", "reference", "bf16"]
    assert rows[0]["minus_reference"][0] == pytest.approx(-0.04) and "minus_reference" not in rows[1]
    assert "| bf16 | 2 | 0.460 | +0.010 ± 0.000 | 2.0 |" in recipes.to_markdown(rows)


def test_the_table_of_finished_recipes_has_every_seed_that_is_finished(tmp_path, monkeypatch):
    for name in ("reference-0", "reference-4", "rate-3e-4-12"):
        (tmp_path / f"{name}.command").touch()
    monkeypatch.setattr(
        recipes, "is_done", lambda folder, command: folder.with_name(f"{folder.name}.command").exists()
    )
    values = {"validation_mse": 0.4, "minutes": 2.0, "command": "python x.py"}
    monkeypatch.setattr(recipes, "run", lambda cell, *args: {"name": cell[0], "seed": cell[1], **values})
    output = tmp_path / "recipes.json"
    arguments = ["recipes.py", "--finished", "--folder", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    recipes.main()
    seeds = {row["name"]: list(row["validation_mse"]) for row in json.loads(output.read_text())["rows"]}
    assert seeds == {"reference": ["0", "4"], "rate 3e-4": ["12"]}


@pytest.mark.parametrize("study", [recipes, influence, peft_comparison])
def test_further_flags_never_take_the_place_of_kept_runs(study, tmp_path, monkeypatch, capsys):
    arguments = [study.__name__, "--extra", "--max_steps 2", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        study.main()
    assert "--extra makes other runs" in capsys.readouterr().err


def test_a_recipe_is_trained_as_it_says(tiny_checkpoint, small_table, tmp_path, monkeypatch):
    """The model is adapted first; the mean over random SMILES counts where there are some, else the last epoch."""
    monkeypatch.setattr(recipes, "START", tiny_checkpoint)
    extra = ["--train_file", small_table, "--max_steps", "2"]
    monkeypatch.setattr(recipes, "run_script", lambda command, *args: common.run_script([*command, *extra], *args))
    args = argparse.Namespace(folder=tmp_path, extra="")
    row = recipes.run(("adapted by mtr", 3), args, threads=1)
    first, second = row["command"].split(" && ")
    assert "run_mlm.py" in first and "--objective mtr" in first and first.count("--seed 3") == 1
    assert "--model_name_or_path adapted-mtr-3" in second and "--output_dir adapted-mtr-3" in first
    state = json.loads((tmp_path / "adapted-by-mtr-3" / "trainer_state.json").read_text())
    assert row["validation_mse"] == pytest.approx(state["log_history"][-2]["eval_mse"])
    row = recipes.run(("1 random SMILES, mean of 11", 3), args, threads=1)
    values = json.loads((tmp_path / "1-random-SMILES--mean-of-11-3" / "all_results.json").read_text())
    assert row["validation_mse"] == values["validation_mse"] != values["eval_mse"]
    mean, own = recipes.summarize([row])
    assert [r["name"] for r in (mean, own)] == ["1 random SMILES, mean of 11", "1 random SMILES"]
    assert own["validation_mse"] == {3: values["eval_mse"]}
    assert recipes.without_mean(recipes.RECIPES[mean["name"]]) == ["--augment_smiles", "1"]
    assert own["command"] == mean["command"].replace(" --predict_augment 10", "") != mean["command"]


def test_the_commands_of_the_trials_are_taken_by_the_scripts(tmp_path):
    """Equal molecules whatever the batch, but for the two that ask what the length does."""
    import run_mlm
    import run_regression

    args = argparse.Namespace(
        folder=tmp_path,
        mixed="mixed.txt",
        chembl="chembl.txt",
        validation_file="held.txt",
        molecules=6400,
        seeds=[0, 1],
    )
    for name in pretraining_trials.TRIALS:
        folder, pretrain, tunings = pretraining_trials.commands(name, args)
        (folder / "model").mkdir(parents=True)
        flags = [*pretrain[1:], "--output_dir", "x"]
        *_, training_args = parse_arguments(*run_mlm.ARGUMENTS, defaults=run_mlm.DEFAULTS, args=flags)
        seen = training_args.max_steps * training_args.per_device_train_batch_size
        assert seen == 6400 * {"half as long": 0.5, "twice as long": 2}.get(name, 1)
        assert sorted(tunings) == [0, 1]
        for seed, tune in tunings.items():
            _, data_args, *_, training_args = parse_arguments(
                *run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=[*tune[1:], "--output_dir", "x"]
            )
            assert (training_args.seed, training_args.do_predict) == (seed, False)
            # not the form of the corpus, which is canonical and was read as it is
            assert data_args.smiles_form == "canonical"


def test_trials_are_compared_with_the_reference_of_the_same_seed():
    """Reference: by hand; Student's t of two values 12.706, variance 0.005 times 1/2 + 0.3 / 0.7."""
    rows = [
        {"name": "reference", "seconds": 600, "validation_mse": {0: 0.5, 1: 0.7}},
        {"name": "mtr", "seconds": 540, "validation_mse": {0: 0.6, 1: 0.9}},
    ]
    text = pretraining_trials.to_markdown(rows)
    assert "| mtr | 9.0 | 0.750 | +0.150 ± 0.866 |" in text and "| reference | 10.0 | 0.600 |  |" in text


def test_what_several_runs_logged_is_told_by_the_molecules_seen(tmp_path):
    for name, step, batch in (("a", 100, 8), ("b", 50, 4), ("c", 20, 4)):
        log = [{"step": step // 2, "loss": 2.0 / batch + step}, {"step": step, "eval_loss": 1.0, "eval_runtime": 3.0}]
        state = {"global_step": step, "train_batch_size": batch, "log_history": log}
        (tmp_path / name / "checkpoint-1").mkdir(parents=True)
        (tmp_path / name / "checkpoint-1" / "trainer_state.json").write_text(json.dumps(state))
    entries, seen = ship_checkpoint.read_log([tmp_path / "a", tmp_path / "b"], [60])
    assert seen == 60 * 8 + 50 * 4
    assert [(entry["run"], entry["molecules"]) for entry in entries] == [(1, 400), (2, 580), (2, 680)]
    assert "eval_runtime" not in entries[-1]
    (tmp_path / "training_log.json").write_text(json.dumps(entries))
    (tmp_path / "all_results.json").write_text(json.dumps({"molecules": seen}))
    again, total = ship_checkpoint.read_log([tmp_path / "c"], [], tmp_path)
    assert again[:3] == entries and total == seen + 20 * 4
    assert [(entry["run"], entry["molecules"]) for entry in again[3:]] == [(3, seen + 40), (3, seen + 80)]
    assert ship_checkpoint.read_log([tmp_path / "c"], [], processes=[2])[1] == 2 * 20 * 4
    (tmp_path / "c" / "arguments.json").write_text('{"gradient_accumulation_steps": 3}')
    assert ship_checkpoint.read_log([tmp_path / "c"], [])[1] == 3 * 20 * 4
    (tmp_path / "training_log.json").write_text(json.dumps(again))
    with pytest.raises(SystemExit, match="have the log of .*c already"):
        ship_checkpoint.read_log([tmp_path / "c"], [], tmp_path)


# --------------------------------------------------------------------------------------------------------- reliability


def test_generated_inputs_are_read_or_refused_with_a_reason():
    rows = reliability.fuzz(inputs=40, seed=0)
    assert [row["trial"] for row in rows] == ["read_as_training", "predict_as_new", "check_texts"]
    assert all(row["passed"] and row["inputs"] == 40 for row in rows)
    assert all(row["read"] and row["refused"] for row in rows[:2])  # both kinds of input are there


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        pytest.param(lambda table: table.assign(smiles=table["smiles"].to_numpy()[::-1]), "rows changed", id="turned"),
        pytest.param(lambda table: table["no such column"], "KeyError", id="traceback"),
        pytest.param(lambda table: time.sleep(5), "NoAnswer", id="hang", marks=pytest.mark.slow),
    ],
)
def test_generated_inputs_find_a_reader_that_is_wrong(monkeypatch, wrong, named):
    right = utils_molecules.read_table
    monkeypatch.setattr(utils_molecules, "read_table", lambda path: wrong(right(path)))
    if named == "NoAnswer":
        monkeypatch.setattr(reliability, "MOST_SECONDS", 0.5)
    [reader] = reliability.fuzz(40, 0, [reliability.read_as_training])
    assert not reader["passed"] and all(named in reader[f"{which}_failure"]["what"] for which in ("first", "smallest"))


def test_half_written_files_are_found(tmp_path):
    write_json({"a": 1}, tmp_path / "whole.json")
    (tmp_path / "half.json").write_text('{"a": ')
    save_file({"a": torch.zeros(100)}, tmp_path / "half.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "half.safetensors").read_bytes()[:150])
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "half.json").write_text("{")  # of a checkpoint that nothing takes for a whole one
    assert [line.split(":")[0] for line in sorted(reliability.half_written(tmp_path))] == [
        "half.json", "half.safetensors"
    ]  # fmt: skip
