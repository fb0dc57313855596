"""run_influence.py: what is selected and compared, the files that say so, and the script on tiny models."""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TWO_PROCESSES
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import run_influence
import run_regression
import trainer_regression
import utils_runs
from arguments import DataTrainingArguments, InputError, ModelArguments, parse_arguments
from modeling_molformer_reg import MolformerForRegression
from run_influence import (
    PAPER_LOSSES,
    InfluenceArguments,
    detection,
    losses_table,
    results_table,
    select_control,
    select_molecules,
    take_pool,
    write_scores,
)
from utils_checkpoints import build_tokenizer
from utils_influence import MoleculeProblem, choose_parameters, loss_gradient, molecule_losses, unflatten
from utils_molecules import load_molecules, prepare_molecules, read_table
from utils_report import Run, model_card


# --------------------------------------------------------------------------------------------- molecules and selection


@pytest.fixture
def table():
    """Six scored molecules; of the two of equal score the earlier one goes first."""
    return pd.DataFrame(
        {
            "row": [10, 11, 12, 13, 14, 15],
            "smiles": list("CNOSFP"),
            "label": 0.0,
            "prediction": 0.0,
            "score": [0.5, -2.0, 3.0, 0.5, 0.0, -0.1],
            "loss": [1.0, 9.0, 4.0, 0.1, 2.0, 0.2],
            "gradient_dot": [-1.0, 5.0, 1.0, 2.0, 3.0, 0.0],
            "group_influence": [-0.1, 1.0, -3.0, -2.0, 0.5, 0.2],
            "group_rank": [4, 1, 6, 5, 2, 3],
            "rank": [2, 6, 1, 3, 4, 5],
        }
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"select": "top_k", "num_selected": 2}, [0, 2]),
        ({"select": "top_k"}, [0, 2, 3]),
        ({"select": "positive"}, [0, 2, 3]),
        ({"select": "threshold", "threshold": 0.5}, [2]),
        ({"select": "threshold", "threshold": -0.5}, [0, 2, 3, 4, 5]),
        ({"select": "fraction", "fraction": 0.34}, [0, 2]),
        ({"select": "fraction", "fraction": 0.01}, [2]),
        ({"select": "positive", "rank_by": "group_influence"}, [1, 4, 5]),
        ({"select": "threshold", "threshold": 0.3, "rank_by": "group_influence"}, [1, 4]),
        ({"select": "threshold", "threshold": -9, "rank_by": "group_influence"}, [0, 1, 2, 3, 4, 5]),
        ({"num_selected": 2, "rank_by": "group_influence"}, [1, 4]),
    ],
)
def test_molecules_are_selected_by_score(table, values, expected):
    assert np.flatnonzero(select_molecules(table, InfluenceArguments(**values))).tolist() == expected


def test_scores_that_are_almost_equal_are_drawn(table, tmp_path):
    """As of replicates of one molecule: float32 has no forty steps between them."""
    scores = np.array([0.15883401, 0.15883406, 0.15883401, 0.15883401, 0.15883403, 0.15883401], dtype=np.float32)
    run_influence.plot_scores(table.assign(score=scores, selected=scores > 0), tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 5000


def test_controls_take_as_many_and_those_of_their_name(table):
    table["selected"] = [True, False, True, False, False, False]
    expected = {
        "selected": [0, 2],
        "none": [],
        "all": [0, 1, 2, 3, 4, 5],
        "bottom": [1, 5],
        "smallest_loss": [3, 5],
        "gradient_dot": [1, 4],
        "group_influence": [1, 4],
        "score": [0, 2],
    }
    for name, rows in expected.items():
        assert np.flatnonzero(select_control(name, table, 0)).tolist() == rows, name
    drawn = {tuple(np.flatnonzero(select_control("random", table, seed))) for seed in range(30)}
    assert all(len(rows) == 2 for rows in drawn) and len(drawn) > 5
    assert (select_control("random", table, 7) == select_control("random", table, 7)).all()
    table["corrupted"] = [True, False, True, False, False, True]
    drawn = {tuple(np.flatnonzero(select_control("right_label", table, seed))) for seed in range(30)}
    assert drawn == {(1, 3), (1, 4), (3, 4)}


def test_wrong_labels_are_found_by_low_scores_and_high_losses(table):
    assert detection(table, 0) == {}
    table["corrupted"] = table["score"] < 0
    assert detection(table, 0)["auc_influence"] == 1.0
    table["corrupted"] = table["score"].abs() > 1
    assert detection(table, 0)["auc_influence_size"] == 1.0
    table["corrupted"] = table["loss"] > 3
    assert detection(table, 0)["auc_loss"] == 1.0
    table["corrupted"] = table["gradient_dot"] > 2.5
    assert detection(table, 0)["auc_gradient_dot"] == 0.0
    table["corrupted"] = table["group_rank"] > 4
    assert detection(table, 0)["auc_group_influence"] == 1.0
    many = pd.concat([table] * 500, ignore_index=True)
    assert detection(many, 1)["auc_random"] == pytest.approx(0.5, abs=0.03)
    table["corrupted"] = True
    assert detection(table, 0) == {}


def test_the_pool_has_the_labels_of_others_where_it_says_so():
    """Reference: the labels before."""
    generator = np.random.default_rng(0)
    molecules = pd.DataFrame({"group": [f"m{i // 2}" for i in range(200)], "label": generator.normal(size=200)})
    molecules["split"] = ["train"] * 160 + ["test"] * 40
    rest, pool = take_pool(molecules, 60, 0.3, seed=1)
    assert len(rest) + len(pool) == 200 and abs(len(pool) - 60) <= 1
    assert not set(rest["group"]) & set(pool["group"])  # stereo twins stay together
    assert (rest["split"] == "test").sum() == 40
    before = molecules.reset_index().merge(pool[["group"]].drop_duplicates(), on="group")["label"].to_numpy()
    assert sorted(pool["label"]) == sorted(before)  # permuted, not invented
    assert (pool["corrupted"].to_numpy() == (pool["label"].to_numpy() != before)).all()
    assert pool["corrupted"].sum() == round(0.3 * len(pool))
    with pytest.raises(InputError, match="--pool_size 1 takes no molecule, since stereo twins stay together"):
        take_pool(molecules, 1, 0.0, seed=1)


def test_left_out_molecules_keep_their_reason_and_ranks_are_whole_numbers(table, tmp_path):
    table["selected"] = table["rank"] <= 2
    excluded = pd.DataFrame({"row": [3], "smiles": ["CC"], "reason": ["is a test molecule"]})
    write_scores(tmp_path, table, excluded)
    lines = (tmp_path / "influence_scores.csv").read_text().splitlines()
    assert lines[0] == "row,SMILES,label,prediction,loss,score,rank,gradient_dot," + (
        "group_influence,group_rank,selected,excluded"
    )
    assert lines[1] == "10,C,0.0,0.0,1.0,0.5,2,-1.0,-0.1,4,True,"
    assert lines[-1] == "3,CC,,,,,,,,,False,is a test molecule"
    write_scores(tmp_path, table, table.iloc[:0].assign(text="", reason=""))  # nothing left out: no further columns
    assert (tmp_path / "influence_scores.csv").read_text().splitlines()[0] == lines[0]


def test_tables_show_the_papers_losses_and_say_where_the_test_set_has_chosen():
    lines = losses_table({"selected": [0.5, 0.25], "paper": PAPER_LOSSES}).splitlines()
    assert lines[2].split() == ["ours", "0.500", "0.250"]
    assert [float(text) for text in lines[3].split()[1:]] == list(PAPER_LOSSES)
    alone = losses_table({"selected": [0.5, 0.25]})  # of another property
    assert "paper" not in alone and len(alone.splitlines()) == 3
    results = {"none": {"added": 0, "validation_mse": 0.5, "test_mse": 0.25}}
    assert results_table(results).splitlines()[1].split() == ["none", "0", "0.5000", "0.2500"]
    assert "optimistic" in results_table(results, leakage=True).splitlines()[0]
    results = {"all": {"added": 9, "validation_mse": 0.1, "test_mse": 0.2, "test_mae": 0.3, "test_r2": 0.4}}
    header, line = results_table(results).splitlines()
    assert header.split() == ["added", "molecules", "validation", "MSE", "test", "MSE", "MAE", "R²"]
    assert line.split() == ["all", "9", "0.1000", "0.2000", "0.3000", "0.4000"]


@pytest.mark.parametrize("embedded", [True, False])
def test_the_papers_losses_stand_beside_those_of_its_property_alone(embedded, small_table, tmp_path, capsys):
    chosen = {"added": 3, "validation_mse": 0.1, "test_mse": 0.2, "test_mae": 0.3, "eval_losses": [0.5, 0.25]}
    results = {"selected": chosen, "random": chosen | {"test_mse": 0.6}}
    data_args = DataTrainingArguments(**({} if embedded else {"train_file": small_table}), label_name="logD")
    report = {"leakage": False, "converged": False, "verdict": "cut short"}
    run_influence.write_comparison(tmp_path, report, results, data_args)
    shown = capsys.readouterr().out
    assert "with the selected molecules 0.2000, with as many at random 0.6000" in shown
    assert "selected                3          0.1000     0.2000" in shown and "The scores are cut short" in shown
    losses = json.loads((tmp_path / "all_results.json").read_text())["evaluation_losses"]
    assert losses == {"selected": [0.5, 0.25]} | ({"paper": list(PAPER_LOSSES)} if embedded else {})
    assert ("\npaper " in shown) == embedded and (tmp_path / "influence_selection.png").exists()


def test_scores_are_known_by_all_that_they_depend_on():
    model = torch.nn.Linear(2, 1)
    problem = argparse.Namespace(model=model, params=dict(model.named_parameters()))

    def rows(*labels):
        return pd.DataFrame({"text": list("CNO")[: len(labels)], "label": labels})

    def key(train=(1.0, 2.0), target=(3.0,), external=(4.0,), seed=0, **values):
        parts = {"train": rows(*train), "validation": rows(*target), "test": rows(9.0)}
        return run_influence.scores_key(problem, parts, rows(*external), InfluenceArguments(**values), seed)

    changes = [{}, {"train": (1.0, 2.5)}, {"target": (3.5,)}, {"external": (4.5,)}, {"seed": 1}]
    changes += [{"score_mode": "per_sample_gradient"}, {"rank_by": "group_influence"}, {"score_split": "test"}]
    changes += [{"ihvp": "identity"}, {"damping": 0.1}, {"recursion_depth": 10}]
    keys = [key(**change) for change in changes]
    assert key() == keys[0]
    with torch.no_grad():
        model.bias += 1
    assert len({*keys, key()}) == len(changes) + 1


# ------------------------------------------------------------------------------------------------------ the script


QUICK = ("--pool_size", "31", "--num_train_epochs", "2", "--learning_rate", "1e-3", "--recursion_depth", "20")
QUICK += ("--num_repeats", "2", "--hessian_batch_size", "7", "--per_device_eval_batch_size", "8")
QUICK += ("--disable_tqdm", "true")
FILES = ("influence_scores.csv", "influence.json", "merged_train.csv", "validation.csv", "test.csv", "splits.json")
FILES += ("all_results.json", "influence_scores.png", "influence_convergence.png", "influence_selection.png")


def call_main(*flags):
    """Parses `flags` as the script does and calls its `main`."""
    flags = [str(flag) for flag in flags]
    unread = ["--pool_size"] if "--external_file" in flags else []  # of QUICK
    if "--ihvp" in flags:
        unread += ["--num_repeats", "--hessian_batch_size", "--tail_fraction"]
        unread += ["--recursion_depth"] if "identity" in flags else []
    for place in [place for place, flag in enumerate(flags) if flag in unread][::-1]:
        flags[place : place + 2] = []
    run_influence.main(*parse_arguments(*run_influence.ARGUMENTS, defaults=run_influence.DEFAULTS, args=flags))


@pytest.fixture(scope="module")
def flags(tiny_checkpoint, small_table):
    return ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, *QUICK)


@pytest.fixture(scope="module")
def finished_run(flags, tmp_path_factory):
    """A run on the small table with all controls."""
    folder = tmp_path_factory.mktemp("influence") / "out"
    controls = [name for name in run_influence.CONTROLS if name != "score"]
    call_main(*flags, "--controls", *controls, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def scoring(finished_run, tiny_checkpoint, small_table):
    """Flags that score the model of `finished_run` again, and, by the last of them, fine-tune nothing."""
    model = ("--model_name_or_path", finished_run / "finetune-none", "--pretrained_model", tiny_checkpoint)
    return (*model, "--train_file", small_table, *QUICK, "--do_predict")


def test_a_run_leaves_what_the_readme_lists(finished_run):
    for name in FILES:
        assert (finished_run / name).stat().st_size > 0, name
        if name.endswith(".png"):
            colors = Image.open(finished_run / name).convert("RGB").getcolors(maxcolors=2**24)
            assert len(colors) > 10, f"{name} is blank"
    assert not (finished_run / "influence_state.safetensors").exists()
    results = json.loads((finished_run / "all_results.json").read_text())["results"]
    added = {name: values["added"] for name, values in results.items()}
    assert added == {
        "none": 0,
        "selected": 15,
        "all": 31,
        **dict.fromkeys(added.keys() - {"none", "selected", "all"}, 15),
    }
    assert len(added) == 9 and results["right_label"]["added_wrong"] == 0
    assert all(len(values["eval_losses"]) == 2 and values["test_mse"] > 0 for values in results.values())


def test_the_table_is_consistent(finished_run, small_table):
    """Reference: the given file, and ranks and losses computed again."""
    table = pd.read_csv(finished_run / "influence_scores.csv")
    given = pd.read_csv(small_table)
    splits = json.loads((finished_run / "splits.json").read_text())
    assert table["row"].tolist() == splits["pool"]
    assert table["SMILES"].tolist() == given["SMILES"][table["row"]].tolist()
    wrong = table["label"].to_numpy() != given["label"][table["row"]].to_numpy()
    assert 8 <= wrong.sum() <= round(0.3 * 31) and (table["corrupted"] == wrong).all()
    assert table["row"][wrong].tolist() == splits["corrupted"]
    assert not set(splits["pool"]) & {row for part in ("train", "validation", "test") for row in splits[part]}
    assert table["rank"].tolist() == table["score"].rank(ascending=False).astype(int).tolist()
    assert (table["selected"] == (table["rank"] <= 15)).all()
    std = json.loads((finished_run / "finetune-none" / "config.json").read_text())["label_std"][0]
    assert np.allclose(table["loss"], ((table["prediction"] - table["label"]) / std) ** 2, rtol=1e-3, atol=1e-6)
    assert (table["score_sd"] >= 0).all()
    assert table.columns.tolist() == [
        "row", "SMILES", "label", "prediction", "loss", "score", "score_sd", "rank", "gradient_dot",
        "group_influence", "group_rank", "selected", "corrupted", "excluded",
    ]  # fmt: skip


def test_the_report_says_how_the_scores_were_computed(finished_run, tmp_path):
    report = json.loads((finished_run / "influence.json").read_text())
    assert "positive" in report["sign"] and report["score_split"] == "validation" and not report["leakage"]
    assert report["damping"] == pytest.approx(0.03 * report["largest_eigenvalue"])
    assert report["scale"] == pytest.approx(1.5 * max(report["largest_eigenvalue_of_batches"]) + report["damping"])
    assert report["implicit_damping"] == pytest.approx(report["scale"] / (20 + 1 - 4.5))
    assert len(report["trace"]) == 10 and all(entry["residual"] > 0 for entry in report["trace"])
    assert -1 <= report["agreement_of_ranks"] <= 1 and 0 <= report["auc_influence"] <= 1
    assert -1 <= report["agreement_of_halves"] <= 1
    config = json.loads((finished_run / "finetune-none" / "config.json").read_text())
    assert report["split_hash"] == config["split_hash"] and report["label_std"] == config["label_std"]
    splits = json.loads((finished_run / "splits.json").read_text())
    assert report["training_molecules"] == len(splits["train"])
    assert report["model"].endswith("finetune-none") and report["fine_tuned_from"].endswith("checkpoint")
    values = json.loads((finished_run / "all_results.json").read_text())
    assert values["evaluation_losses"]["selected"] == values["results"]["selected"]["eval_losses"]
    assert "paper" not in values["evaluation_losses"]  # which are of the embedded molecules' property
    card = (finished_run / "README.md").read_text()
    assert "| ours | " in card and "| paper |" not in card
    values["evaluation_losses"]["paper"] = PAPER_LOSSES  # as a run on these has it
    (tmp_path / "all_results.json").write_text(json.dumps(values))
    assert "| paper | 0.581 |" in str(model_card(Run(tmp_path, "influence")))


def test_scores_foretell_the_loss_after_a_step(finished_run, small_table, tmp_path, scoring):
    """Sign, for the real script: the validation loss falls as a helpful molecule is learned."""
    call_main(*scoring, "--ihvp", "identity", "--influence_params", "head", "--output_dir", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "influence_scores.csv")
    splits = json.loads((finished_run / "splits.json").read_text())
    data = pd.read_csv(small_table)
    tokenizer = build_tokenizer()
    model = MolformerForRegression.from_pretrained(finished_run / "finetune-none").eval()
    options = argparse.Namespace(smiles_form="canonical", max_length=256, invalid_smiles="error")
    molecules, _ = prepare_molecules(read_table(small_table), tokenizer, options, "data")
    molecules["label"] = data["label"]
    problem = MoleculeProblem(model, tokenizer, choose_parameters(model, "head"), 32, "ggn")
    target = molecules.iloc[splits["validation"]]
    before = problem.each(molecule_losses, target).mean()
    params, rate = dict(problem.params), 1e-4
    for index in (table["score"].idxmax(), table["score"].idxmin()):
        row = table.loc[[index]].rename(columns={"SMILES": "smiles"})
        molecule, _ = prepare_molecules(row[["row", "smiles", "label"]], tokenizer, options, "data")
        step = loss_gradient(problem.residuals(molecule), params)
        problem.params = {name: params[name] - rate * part for name, part in unflatten(step, params).items()}
        change = problem.each(molecule_losses, target).mean() - before
        problem.params = params
        assert float(change) == pytest.approx(-rate * table["score"][index], rel=0.05)


def test_the_merged_files_go_into_run_regression(finished_run, tiny_checkpoint, tmp_path, run_script):
    """The split that they make is the one that the fine-tuned model carries, so it can be evaluated on it."""
    table = pd.read_csv(finished_run / "influence_scores.csv")
    merged = pd.read_csv(finished_run / "merged_train.csv")
    chosen = table[table["selected"]]
    assert merged.tail(15).to_numpy().tolist() == chosen[["SMILES", "label"]].to_numpy().tolist()
    files = [f"--{name}_file={finished_run / file}.csv" for name, file in
             (("train", "merged_train"), ("validation", "validation"), ("test", "test"))]  # fmt: skip
    model = finished_run / "finetune-selected"
    result = run_script(
        "run_regression.py", "--model_name_or_path", model, *files, "--do_predict", "--output_dir", tmp_path / "out"
    )
    assert result.returncode == 0, result.stderr
    values = json.loads((tmp_path / "out" / "all_results.json").read_text())
    expected = json.loads((finished_run / "all_results.json").read_text())["results"]["selected"]
    assert values["test_mse"] == pytest.approx(expected["test_mse"], rel=1e-5)


def test_two_runs_with_one_seed_give_equal_bits(scoring, tmp_path):
    for name in ("a", "b"):
        call_main(*scoring, "--output_dir", tmp_path / name)
    first, second = ((tmp_path / name / "influence_scores.csv").read_bytes() for name in ("a", "b"))
    assert first == second


def test_a_run_with_the_same_seed_fine_tunes_scores_and_selects_the_same(flags, finished_run, tmp_path):
    """To the last bit, whatever the controls."""
    call_main(*flags, "--controls", "none", "--output_dir", tmp_path / "again")
    for model in ("finetune-none", "finetune-selected"):
        one, two = (load_file(folder / model / "model.safetensors") for folder in (finished_run, tmp_path / "again"))
        assert all(torch.equal(value, two[name]) for name, value in one.items()), model
    one, two = (pd.read_csv(folder / "influence_scores.csv") for folder in (finished_run, tmp_path / "again"))
    pd.testing.assert_frame_equal(one[two.columns], two, check_exact=True)


def test_two_processes_give_the_scores_of_one(scoring, tmp_path, run_script):
    """By README's command. Tolerance: 1e-5 of the largest score. 31 molecules, chunks of 8: the shares are uneven."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(ROOT / "configs" / "accelerate" / "ddp.yaml"), "--num_processes", "2"]
    second = ("--controls", "group_influence")
    call_main(*scoring, *second, "--output_dir", tmp_path / "one")
    both = ("--use_cpu", *second, "--output_dir", tmp_path / "two")
    result = run_script("run_influence.py", *scoring, *both, launcher=launcher)
    assert result.returncode == 0, result.stderr
    one, two = (pd.read_csv(tmp_path / name / "influence_scores.csv") for name in ("one", "two"))
    for column in ("score", "gradient_dot", "group_influence", "loss", "prediction"):
        assert np.abs(one[column] - two[column]).max() <= 1e-5 * one[column].abs().max(), column
    assert (one["rank"] == two["rank"]).all()


@pytest.mark.slow
def test_two_processes_fine_tune_score_and_fine_tune_again(flags, finished_run, tmp_path, run_script):
    """Reference: one process with the same molecules a step; trainings differ by the order of sums and by dropout."""
    both = ("--use_cpu", "--per_device_train_batch_size", "8", "--output_dir", tmp_path / "two")
    result = run_script("run_influence.py", *flags, *both, launcher=TWO_PROCESSES)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((path / "all_results.json").read_text()) for path in (finished_run, tmp_path / "two"))
    assert two["results"].keys() == {"none", "selected", "all", "random"}
    for name, values in two["results"].items():
        assert values["added"] == one["results"][name]["added"]
        assert values["test_mse"] == pytest.approx(one["results"][name]["test_mse"], rel=0.1)
    assert len(pd.read_csv(tmp_path / "two" / "influence_scores.csv")) == 31


@pytest.mark.parametrize("train", [True, False])
def test_where_no_molecule_is_good_enough_nothing_is_learned_again(flags, scoring, train, tmp_path, caplog):
    choice = ("--select", "threshold", "--threshold", "1e9", "--ihvp", "identity", "--output_dir", tmp_path / "out")
    call_main(*(flags if train else scoring), *choice)
    assert "No molecule is selected" in caplog.text
    assert not pd.read_csv(tmp_path / "out" / "influence_scores.csv")["selected"].any()
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())["results"] if train else {}
    assert set(results) == ({"none"} if train else set()) and not (tmp_path / "out" / "finetune-selected").exists()
    merged, splits = pd.read_csv(tmp_path / "out" / "merged_train.csv"), tmp_path / "out" / "splits.json"
    assert len(merged) == len(json.loads(splits.read_text())["train"])


def test_group_influence_selects_where_it_is_asked_to(scoring, finished_run, tmp_path):
    """Reference: that of the run that had it as a control."""
    call_main(*scoring, "--rank_by", "group_influence", "--ihvp", "identity", "--output_dir", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "influence_scores.csv")
    before = pd.read_csv(finished_run / "influence_scores.csv")
    assert np.allclose(table["group_influence"], before["group_influence"], rtol=1e-4, atol=1e-7)
    assert (table["rank"] == table["group_rank"]).all() and sorted(table["rank"]) == list(range(1, 32))
    assert (table["selected"] == (table["rank"] <= 15)).all()
    report = json.loads((tmp_path / "out" / "influence.json").read_text())
    assert report["rank_by"] == "group_influence" and 0 <= report["group_weight"] <= 1
    assert 0 <= report["auc_group_influence"] <= 1 and report["group_damping"] > 0
    merged = pd.read_csv(tmp_path / "out" / "merged_train.csv")
    assert set(table["SMILES"][table["selected"]]) <= set(merged["SMILES"])
    largest = before["gradient_dot"].abs().max()  # without inverse curvature the scores are these products
    assert np.abs(table["score"] - before["gradient_dot"]).max() <= 1e-5 * largest


def test_the_pool_is_that_of_the_split(scoring, finished_run, tmp_path):
    """Whatever the seed of the rest."""
    seeds = ("--seed", "7", "--split_seed", "42", "--ihvp", "identity", "--influence_params", "head")
    call_main(*scoring, *seeds, "--output_dir", tmp_path / "out")
    splits = [json.loads((folder / "splits.json").read_text()) for folder in (finished_run, tmp_path / "out")]
    assert all(splits[0][name] == splits[1][name] for name in ("pool", "corrupted", "test"))


def test_a_failed_scoring_names_the_model_that_was_fine_tuned(flags, tiny_checkpoint, tmp_path, monkeypatch):
    def compute(*args):
        raise InputError("no score")

    monkeypatch.setattr(run_influence, "compute_scores", compute)
    with pytest.raises(InputError, match=f"no score .*finetune-none: .* and --pretrained_model {tiny_checkpoint}"):
        call_main(*flags, "--num_train_epochs", "1", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "finetune-none" / "model.safetensors").exists()


def test_modes_and_solvers_agree(scoring, tmp_path):
    """jvp and single gradients; conjugate gradients and a long LiSSA run on the whole training set."""
    whole = ("--hessian_batch_size", "1000", "--num_repeats", "1", "--influence_params", "head")
    whole += ("--relative_damping", "0.05", "--tail_fraction", "0")
    variants = {
        "lissa": (*whole, "--recursion_depth", "300"),
        "cg": (*whole, "--ihvp", "cg", "--tolerance", "1e-6"),
        "slow": (*whole, "--recursion_depth", "300", "--score_mode", "per_sample_gradient"),
    }
    scores = {}
    for name, extra in variants.items():
        call_main(*scoring, *extra, "--output_dir", tmp_path / name)
        scores[name] = pd.read_csv(tmp_path / name / "influence_scores.csv")["score"]
        assert json.loads((tmp_path / name / "influence.json").read_text())["converged"]
    largest = scores["cg"].abs().max()
    assert np.abs(scores["slow"] - scores["lissa"]).max() <= 1e-5 * largest
    assert np.abs(scores["cg"] - scores["lissa"]).max() <= 1e-2 * largest


def test_a_killed_run_goes_on_to_the_same_result(flags, finished_run, tmp_path):
    """Reference: the uninterrupted run. SIGKILL in the second fine-tuning."""
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "run_influence.py"), *map(str, flags), "--output_dir", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not list(folder.glob("finetune-selected/checkpoint-*")) and time.time() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume_from_checkpoint" in refused.stderr
    finished = (folder / "finetune-none" / "all_results.json").stat().st_mtime_ns
    resumed = subprocess.run(
        [*command, "--resume_from_checkpoint", "true"], env=environment, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert (folder / "finetune-none" / "all_results.json").stat().st_mtime_ns == finished
    results = json.loads((folder / "all_results.json").read_text())["results"]
    expected = json.loads((finished_run / "all_results.json").read_text())["results"]
    assert results.keys() == {"none", "selected", "all", "random"}
    for name, values in results.items():
        assert values["test_mse"] == pytest.approx(expected[name]["test_mse"], rel=1e-5), name
    scores = [pd.read_csv(path / "influence_scores.csv")["score"] for path in (folder, finished_run)]
    assert np.allclose(*scores, rtol=1e-4, atol=1e-6)


def test_external_molecules_of_validation_and_test_are_left_out_and_listed(
    scoring, finished_run, small_table, tmp_path
):
    """One row is a test molecule without its stereo, one a validation molecule, one a training molecule."""
    splits = json.loads((finished_run / "splits.json").read_text())
    given = pd.read_csv(small_table)["SMILES"]
    rows = [given[splits["test"][0]].replace("@", ""), given[splits["validation"][0]], given[splits["train"][0]]]
    external = tmp_path / "external.csv"
    lines = [f"{text},1.5" for text in [*rows, "CCOC(=O)c1ccccc1Br", "CCCCCCN"]]
    external.write_bytes(("\ufeffSMILES,Label\r\n" + "\r\n".join(lines) + "\r\n").encode())
    split = ("--split_file", finished_run / "splits.json", "--external_file", external, "--influence_params", "head")
    call_main(*scoring, *split, "--output_dir", tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "influence_scores.csv").sort_values("row")
    assert table["excluded"].fillna("").tolist() == ["is a test molecule", "is a validation molecule", "", "", ""]
    assert table["score"].notna().tolist() == [False, False, True, True, True]
    assert table["label"].tolist() == [1.5] * 5  # a conflict with the known label is worth seeing
    assert table["in_training"].fillna("").tolist() == ["", "", True, False, False]
    report = json.loads((tmp_path / "out" / "influence.json").read_text())
    left_out = [{"row": 0, "reason": "is a test molecule"}, {"row": 1, "reason": "is a validation molecule"}]
    assert report["excluded"] == left_out
    external.write_text("SMILES,Label\nCCO,1\n")
    call_main(*scoring, *split, "--output_dir", tmp_path / "single")
    assert json.loads((tmp_path / "single" / "influence.json").read_text())["agreement_of_ranks"] is None
    external.write_text(
        "SMILES,value,label\nCCO,7,1\nCCN,8,2\n"
    )  # label is the training file's own, value comes first
    call_main(*scoring, *split, "--output_dir", tmp_path / "two")
    assert sorted(pd.read_csv(tmp_path / "two" / "influence_scores.csv")["label"]) == [1, 2]
    external.write_text("SMILES,activity\nCCO,1\n")
    with pytest.raises(InputError, match="no label column.*--external_label_column"):
        call_main(*scoring, *split, "--output_dir", tmp_path / "none")
    external.write_text(f"SMILES,Label\n{rows[1]},1\n")
    with pytest.raises(InputError, match="No molecule of .* is left"):
        call_main(*scoring, *split, "--output_dir", tmp_path / "none")
    external.write_text("SMILES,Label\nCCO,1\nCCN,\n")
    with pytest.raises(InputError, match="1 of 2 labels in column 'Label' .* first at row 1"):
        call_main(*scoring, *split, "--output_dir", tmp_path / "none")
    external.write_text("SMILES,Label\nCCO,1\nC1CC,2\n")
    with pytest.raises(InputError, match="row 1: 'C1CC'"):
        call_main(*scoring, *split, "--output_dir", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    call_main(*scoring, *split, "--invalid_smiles", "drop", "--output_dir", tmp_path / "dropped")
    table = pd.read_csv(tmp_path / "dropped" / "influence_scores.csv")
    assert table["SMILES"].tolist() == ["CCO", "C1CC"] and table["excluded"][1] == "do not parse as SMILES"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--num_selected", "40"), "--num_selected 40 is more than the 31 molecules"),
        (("--pool_size", "90"), "--pool_size 90 would take more than half of the"),
        (("--pool_size", "4"), "--pool_size 4 takes 4 molecules, too few for 30% of their labels to change places"),
        (("--influence_params", "nowhere"), "matches no parameter"),
        (("--scale", "1e-3"), r"LiSSA diverged: norm .* at step \d+ of 20 with scale=0.001.*Raise --scale"),
        (("--split_seed", "7"), "The checkpoint was trained with another split"),
        (("--protocol", "paper"), "--protocol paper has no validation molecules"),
        (("--validation_fraction", "0"), "need validation molecules. Leave --validation_fraction 0 out"),
        (("--test_fraction", "0"), "need test molecules. Leave --test_fraction 0 out"),
        (("--external_file", "nowhere.csv"), "The file nowhere.csv is not there"),
        (("--controls", "group_influence", "--ihvp", "identity"), "up to 30 molecules, and these are 31"),
        (("--ihvp", "cg", "--curvature", "hessian", "--damping", "1e-9"), "is not positive. Raise --damping"),
    ],
)
def test_bad_input_is_named(scoring, tmp_path, extra, message, monkeypatch):
    monkeypatch.setattr(run_influence, "MOST_IN_GROUP", 30)
    with pytest.raises(InputError, match=message):
        call_main(*scoring, *extra, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "influence_scores.csv").exists()


def test_several_labels_are_refused(flags, small_table, tmp_path):
    table = pd.read_csv(small_table)
    table.assign(other=table["label"]).to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(InputError, match="An influence score is of one label"):
        call_main(*flags, "--train_file", tmp_path / "two.csv", "--label_column", "label", "other",
                  "--output_dir", tmp_path / "out")  # fmt: skip


def test_a_checkpoint_that_knows_the_pool_is_refused(tiny_checkpoint, small_table, tmp_path, run_script):
    result = run_script(
        "run_regression.py", "--model_name_or_path", tiny_checkpoint, "--train_file", small_table,
        "--num_train_epochs", 1, "--output_dir", tmp_path / "model",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    given = ("--model_name_or_path", tmp_path / "model", "--train_file", small_table, *QUICK)
    with pytest.raises(InputError, match="trained on all training molecules of this split, those of the pool among"):
        call_main(*given, "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="another split"):
        call_main(*given, "--split_seed", "3", "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="is fine-tuned, and not from models/molformer-mini.*--pretrained_model"):
        call_main(*given, "--ignore_split_mismatch", "--output_dir", tmp_path / "out")


def test_a_checkpoint_that_says_nothing_of_its_molecules_is_warned_of(finished_run, scoring, tmp_path, caplog):
    folder = tmp_path / "model"
    shutil.copytree(finished_run / "finetune-none", folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("split_hash")
    (folder / "config.json").write_text(json.dumps(config))
    flags = ("--model_name_or_path", folder, "--ihvp", "identity", "--output_dir", tmp_path / "out")
    with caplog.at_level("WARNING"):
        call_main(*scoring, *flags)
    assert "does not say which molecules it learned" in caplog.text


def test_the_models_of_the_comparison_are_of_the_kind_that_is_scored(flags, tiny_checkpoint, small_table, tmp_path):
    """The published head and pooling, which the pre-trained checkpoint does not ask for by itself."""
    kind = ("--regression_head", "molformer", "--pooling", "cls")
    call_main(*flags, *kind, "--controls", "none", "--select", "fraction", "--fraction", "0.1", "--num_train_epochs",
              "1", "--influence_params", "head", "--output_dir", tmp_path / "first")  # fmt: skip
    again = ("--model_name_or_path", tmp_path / "first" / "finetune-none", "--train_file", small_table, *QUICK)
    call_main(*again, "--pretrained_model", tiny_checkpoint, "--controls", "none", "--influence_params", "head",
              "--num_train_epochs", "1", "--output_dir", tmp_path / "second")  # fmt: skip
    for folder in ("first", "second"):
        config = json.loads((tmp_path / folder / "finetune-selected" / "config.json").read_text())
        assert (config["regression_head"], config["pooling"]) == ("molformer", "cls")
    with pytest.raises(InputError, match="has no regression head: it is fine-tuned itself"):
        call_main(*flags, "--pretrained_model", tiny_checkpoint, "--output_dir", tmp_path / "third")


def test_the_command_that_is_printed_learns_the_selected_molecules(finished_run, scoring, tmp_path, capsys):
    """From the pre-trained checkpoint, also where a fine-tuned one was scored and nothing was trained."""
    import run_regression

    flags = ("--ihvp", "identity", "--output_dir", tmp_path / "out")
    call_main(*scoring, *flags)
    command = shlex.split(capsys.readouterr().out.split("elsewhere: ")[1].strip())
    assert command[:2] == ["python", "run_regression.py"]
    more = ["--num_train_epochs", "1", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "merged")]
    run_regression.main(
        *parse_arguments(*run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=[*command[2:-2], *more])
    )
    values = json.loads((tmp_path / "merged" / "all_results.json").read_text())
    assert values["train_samples"] == len(pd.read_csv(tmp_path / "out" / "merged_train.csv"))


def test_the_external_molecules_of_the_paper_are_read():
    """Needs the paper's file, which is not shipped; the test above has one of that form."""
    path = ROOT.parent / "shared" / "data" / "external_dataset.csv"
    if not path.exists():
        pytest.skip("external_dataset.csv is not here")
    flags = ["--external_file", str(path), "--output_dir", "none", "--smiles_form", "canonical"]
    model_args, data_args, influence_args, training_args = parse_arguments(
        *run_influence.ARGUMENTS, defaults=run_influence.DEFAULTS, args=flags
    )
    tokenizer = build_tokenizer()
    molecules, _, _ = load_molecules(tokenizer, model_args, data_args, training_args)
    external, excluded = run_influence.load_external(tokenizer, data_args, influence_args, molecules)
    assert len(external) + len(excluded) == len(pd.read_csv(path)) == 300
    assert len(excluded) + external["in_training"].sum() == 27  # Lipophilicity molecules, stereo aside
    assert set(excluded["reason"]) == {"is a validation molecule", "is a test molecule"}
    assert np.isfinite(external["label"]).all()


def merged_command(*flags, leakage=False):
    """Returns what a run with these flags would print, of a split that has training molecules alone."""
    args = ["--smiles_form", "canonical", *map(str, flags)]
    parsed = parse_arguments(*run_influence.ARGUMENTS, defaults=run_influence.DEFAULTS, args=args)
    return run_influence.merged_command({"train": None}, parsed[0], parsed[1], parsed[3], leakage)


def test_the_command_that_is_printed_has_the_whole_start(finished_run, tiny_checkpoint, tmp_path):
    """Another configuration and tokenizer; and a start that learned the SMILES of a split, which is another now."""
    start = tmp_path / "start"
    shutil.copytree(tiny_checkpoint, start)
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"split_hash": "0123456789abcdef"}))
    flags = ("--model_name_or_path", start, "--tokenizer_name", tiny_checkpoint, "--model_revision", "v2")
    command = merged_command(*flags)
    for flag in (f"--model_name_or_path {start} ", f"--tokenizer_name {tiny_checkpoint} ", "--model_revision v2 "):
        assert flag in command
    assert "--ignore_split_mismatch" in command and "--config_name" not in command
    command = merged_command("--model_name_or_path", start, "--config_name", tiny_checkpoint)
    assert f"--model_name_or_path {start} --config_name {tiny_checkpoint} " in command
    assert "--ignore_split_mismatch" in command and "--smiles_form" not in command
    (start / "config.json").write_text(json.dumps(config | {"smiles_form": "isomeric"}))
    assert "--smiles_form canonical" in merged_command(*flags)  # or the start's would be taken


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_comparison_is_not_replaced_by_scores_alone(finished_run, scoring, tmp_path, resume):
    shutil.copytree(finished_run, tmp_path / "run")
    before = (tmp_path / "run" / "all_results.json").read_text()
    with pytest.raises(InputError, match="holds what a training made .*which scores alone do not replace"):
        call_main(*scoring, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", resume)
    assert (tmp_path / "run" / "all_results.json").read_text() == before


def test_a_start_in_the_output_folder_is_not_replaced(finished_run, scoring, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    start = folder / "finetune-none"
    with pytest.raises(InputError, match="would replace .*finetune-none. Give another --output_dir"):
        call_main(*scoring[:-1], "--pretrained_model", start, "--output_dir", folder, "--overwrite_output_dir")
    assert (start / "model.safetensors").exists()


def test_scores_alone_replace_no_models(finished_run, scoring, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    before = {path.name for path in folder.iterdir()}
    for further in ([], ["--overwrite_output_dir"]):  # which the first message does not advise
        with pytest.raises(InputError, match="holds what a training made .*finetune-none.* Give another --output_dir"):
            call_main(*scoring, "--output_dir", folder, *further)
    assert {path.name for path in folder.iterdir()} - before <= {".lock"}
    assert before <= {path.name for path in folder.iterdir()}


def test_a_finished_run_is_scored_again_only_if_something_changed(flags, finished_run, tmp_path, monkeypatch):
    """To compare with another control, or to push."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)

    def compute(*args):
        raise InputError("scored again")

    monkeypatch.setattr(run_influence, "compute_scores", compute)
    resumed = (*flags, "--output_dir", folder, "--resume_from_checkpoint", "true", "--controls")
    call_main(*resumed, "none", "all")
    results = json.loads((folder / "all_results.json").read_text())["results"]
    before = json.loads((finished_run / "all_results.json").read_text())["results"]
    assert results == {name: before[name] for name in ("none", "selected", "all")}
    for name in ("influence_scores.csv", "merged_train.csv"):
        assert (folder / name).read_text() == (finished_run / name).read_text(), name
    # a control that takes more than the scores: that alone is computed
    report = json.loads((folder / "influence.json").read_text())
    fewer = {name: value for name, value in report.items() if "group_" not in name}
    (folder / "influence.json").write_text(json.dumps(fewer))
    scores = pd.read_csv(folder / "influence_scores.csv")
    scores.drop(columns=["group_influence", "group_rank"]).to_csv(folder / "influence_scores.csv", index=False)
    call_main(*resumed, "group_influence")
    again = json.loads((folder / "all_results.json").read_text())["results"]
    assert again == {name: before[name] for name in ("none", "selected", "group_influence")}
    again = pd.read_csv(folder / "influence_scores.csv")
    assert again["group_rank"].equals(scores["group_rank"])
    written = json.loads((folder / "influence.json").read_text())
    assert all(written[name] == report[name] for name in ("group_weight", "auc_group_influence", "auc_influence"))

    (folder / "influence.json").write_text(json.dumps(report | {"scores_key": "of other molecules"}))
    with pytest.raises(InputError, match="scored again"):
        call_main(*resumed, "none")


def test_a_start_is_the_same_by_its_weights_wherever_it_lies(
    flags, finished_run, tiny_checkpoint, tmp_path, monkeypatch
):
    """Models of several starts would not be compared fairly; those of one that moved are not trained again."""
    folder, start = tmp_path / "run", tmp_path / Path(tiny_checkpoint).name
    shutil.copytree(finished_run, folder)
    shutil.copytree(tiny_checkpoint, start)

    def train(*args):
        raise InputError("trained again")

    monkeypatch.setattr(trainer_regression, "train_regression", train)
    resumed = ("--model_name_or_path", start, *flags[2:], "--controls", "all", "--output_dir", folder)
    resumed += ("--resume_from_checkpoint", "true")
    call_main(*resumed)
    weights = load_file(start / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="trained again"):
        call_main(*resumed)


def test_a_run_is_not_resumed_by_another_number_of_processes(flags, finished_run, tmp_path):
    """Each step would have other batches, and the models could not be compared."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    key_file = folder / "finetune-none" / "settings_key"
    key, processes = key_file.read_text().split()
    assert processes == "1"
    key_file.write_text(f"{key} 2\n")
    controls = [name for name in run_influence.CONTROLS if name != "score"]
    with pytest.raises(InputError, match="was 2 and is 1 now.*Go on with as many"):
        call_main(*flags, "--controls", *controls, "--output_dir", folder, "--resume_from_checkpoint", "true")


def test_a_diverging_run_ends_with_a_message_and_no_table(scoring, tmp_path, run_script):
    done = run_script("run_influence.py", *scoring, "--scale", "1e-3", "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"LiSSA diverged: norm .* at step \d+ of 20 with scale=0.001.*Raise --scale", done.stderr)
    assert re.search(r"--scale 0.001 is too small for LiSSA to converge. Give more than \d", done.stderr)
    assert not list((tmp_path / "out").glob("*.csv"))


def test_a_run_killed_in_its_recursion_goes_on_to_the_same_scores(scoring, tmp_path, run_script):
    """Reference: the uninterrupted run. SIGKILL as soon as an iterate is kept, long before the last step."""
    depth = ("--recursion_depth", "60")
    call_main(*scoring, *depth, "--output_dir", tmp_path / "whole")
    folder = tmp_path / "killed"
    command = [sys.executable, str(ROOT / "run_influence.py"), *map(str, (*scoring, *depth, "--output_dir", folder))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    state = folder / "influence_state.safetensors"

    def holds_iterate():
        if not state.exists():
            return False
        with safe_open(state, "pt") as file:
            return "iterate" in file.keys()

    while not holds_iterate() and time.time() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert holds_iterate() and not (folder / "influence_scores.csv").exists()
    done = run_script("run_influence.py", *scoring, *depth, "--output_dir", folder, "--resume_from_checkpoint", "true")
    assert done.returncode == 0 and "Going on from" in done.stderr, done.stderr
    scores = [pd.read_csv(path / "influence_scores.csv")["score"] for path in (folder, tmp_path / "whole")]
    assert np.allclose(*scores, rtol=1e-5, atol=1e-8)


def test_a_model_without_head_is_refused_where_nothing_is_trained(flags, tmp_path):
    with pytest.raises(InputError, match="no trained regression head"):
        call_main(*flags, "--do_predict", "--output_dir", tmp_path / "out")


def test_new_molecules_alone_are_sent_to_the_script_that_predicts(small_table, tmp_path):
    with pytest.raises(InputError, match="are predicted by run_regression.py --do_predict"):
        call_main("--do_predict", "--test_file", small_table, "--output_dir", tmp_path / "out")


def test_the_test_set_as_target_is_called_leakage(scoring, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        call_main(*scoring, "--score_split", "test", "--ihvp", "identity", "--output_dir", tmp_path / "out")
    assert "leak" in caplog.text
    report = json.loads((tmp_path / "out" / "influence.json").read_text())
    assert report["leakage"] and "predicted change" not in report["sign"]  # which takes the inverse curvature


@pytest.mark.parametrize(("named", "printed"), [(["all"], "all"), (["TPSA", "MolLogP"], "TPSA MolLogP")])
def test_the_command_for_elsewhere_names_the_descriptors(named, printed):
    command = merged_command("--head_descriptors", *named)
    assert f"--head_descriptors {printed} --train_file" in command and "--protocol" not in command


def test_the_command_for_elsewhere_trains_as_this_run_did():
    flags = ("--protocol", "paper", "--max_length", "300", "--num_train_epochs", "3", "--lr_scheduler_type", "cosine")
    flags += ("--eval_strategy", "steps", "--eval_steps", "4", "--save_strategy", "steps", "--save_steps", "8")
    command = merged_command(*flags, "--augment_smiles", "2", "--logging_steps", "7", "--label_name", "pKa, half",
                             leakage=True)  # fmt: skip
    assert "chosen by the test molecules" in command
    words = shlex.split(command.split(": ", 1)[1])
    _, data, _, training = parse_arguments(*run_regression.ARGUMENTS, args=words[2:])
    assert (data.protocol, data.max_length, data.augment_smiles, data.label_name) == ("paper", 300, 2, "pKa, half")
    assert (training.num_train_epochs, training.lr_scheduler_type) == (3, "cosine")
    assert (training.eval_steps, training.save_strategy, training.save_steps) == (4, "steps", 8)
    assert training.given.isdisjoint({"logging_steps", "learning_rate", "seed"})
    assert "--learning_rate=0.001" in merged_command("--learning-rate", "1e-3")
    assert "--load_best_model_at_end=False" in merged_command("--no_load_best_model_at_end")


def test_external_columns_are_those_of_the_training_file_where_they_are_there(tmp_path, caplog):
    """logD is a name that is found by itself, pKa is the one that was asked for."""
    path = tmp_path / "external.csv"
    path.write_text("smiles,logD,pKa\nCCO,1,7\n")
    molecules = pd.DataFrame({"group": [], "split": []})
    influence_args = InfluenceArguments(external_file=str(path))

    def label(**values):
        data_args = DataTrainingArguments(smiles_form="canonical", **values)
        external, _ = run_influence.load_external(build_tokenizer(), data_args, influence_args, molecules)
        return external["label"].tolist()

    assert label(label_column=["pKa"]) == [7.0] and label() == [1.0]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert label(label_column=["y"]) == [1.0]  # which this file does not have
    assert "has no column y: column logD is taken for the same quantity" in caplog.text
    influence_args.external_label_column = "pKa"
    assert label(label_column=["logD"]) == [7.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"damping": 0.0}, "--damping is 0.0"),
        ({"relative_damping": -1.0}, "--relative_damping is -1.0"),
        ({"scale": "-2"}, "--scale is -2; give auto or a positive number"),
        ({"scale": "wide"}, "--scale is wide"),
        ({"pool_noise": 1.5}, "--pool_noise is 1.5"),
        ({"num_repeats": 0}, "--num_repeats is 0"),
        ({"recursion_depth": -1}, "--recursion_depth is -1"),
        ({"controls": ["none", "luck"]}, "--controls luck is unknown. Choose from none, all"),
        ({"tolerance": math.nan}, "--tolerance is nan"),
        ({"tolerance": 1.0, "ihvp": "cg"}, "--tolerance is 1.0; give a number below 1"),
        ({"pool_size": 10, "external_file": "a.csv"}, "--pool_size goes without --external_file"),
        ({"controls": ["none", "score"]}, "--controls score is what --rank_by selects. Leave it out"),
        ({"external_label_column": "y"}, "--external_label_column goes with --external_file"),
        ({"threshold": 0.5}, "--threshold goes with --select threshold, not with --select top_k"),
        ({"num_selected": 5, "select": "fraction"}, "--num_selected goes with --select top_k"),
        ({"threshold": math.nan, "select": "threshold"}, "--threshold is nan"),
        ({"fraction": 0.0, "select": "fraction"}, "--fraction is 0: nothing would be selected"),
        ({"damping": 0.1, "relative_damping": 0.1}, "--damping and --relative_damping: give one of them"),
        ({"scale": "5", "ihvp": "cg"}, "--scale does nothing with --ihvp cg. Leave it out"),
        ({"damping": 0.1, "ihvp": "identity"}, "--damping does nothing with --ihvp identity. Leave it out"),
        (
            {"controls": ["gradient_dot"], "ihvp": "identity"},
            "--controls gradient_dot is the score of --ihvp identity",
        ),
        (
            {"controls": ["right_label"], "external_file": "a.csv"},
            "--controls right_label goes without --external_file",
        ),
    ],
)
def test_arguments_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        InfluenceArguments(**values)


def test_the_defaults_are_those_that_the_readme_names():
    lissa, cg = InfluenceArguments(), InfluenceArguments(ihvp="cg")
    assert (lissa.ihvp, lissa.curvature, lissa.num_repeats, lissa.recursion_depth) == ("lissa", "ggn", 2, 200)
    assert (lissa.relative_damping, lissa.tail_fraction, lissa.scale, lissa.damping) == (0.03, 0.5, "auto", None)
    assert (lissa.pool_size, lissa.pool_noise, lissa.tolerance, cg.tolerance) == (300, 0.3, 0.3, 1e-4)
    assert (lissa.select, lissa.score_split, lissa.influence_params) == ("top_k", "validation", "all")
    assert lissa.controls == ["none", "all", "random"] and lissa.rank_by == "score"


def test_a_run_that_began_before_there_was_a_flag_goes_on(tmp_path):
    """It had the value that is the default now; another value is another run."""

    def parsed(*more):
        flags = ["--output_dir", str(tmp_path), "--seed", "3", *more]
        return parse_arguments(*run_influence.ARGUMENTS, defaults=run_influence.DEFAULTS, args=flags)[-1]

    utils_runs.write_arguments(parsed())
    values = json.loads((tmp_path / "arguments.json").read_text())
    assert values.pop("rank_by") == "score"
    (tmp_path / "arguments.json").write_text(json.dumps(values))
    utils_runs.check_resumed(parsed())
    for more in (("--rank_by", "group_influence"), ("--pool_size", "200")):
        with pytest.raises(InputError, match=f"began with {more[0]} .*, not {more[1]}"):
            utils_runs.check_resumed(parsed(*more))


def test_a_named_start_is_looked_for_where_the_user_is(finished_run, tiny_checkpoint, tmp_path, monkeypatch):
    """Not in this project, which has a folder of the same name."""
    shutil.copytree(tiny_checkpoint, tmp_path / "models" / "molformer-mini")
    monkeypatch.chdir(tmp_path)
    model_args = ModelArguments(model_name_or_path=str(finished_run / "finetune-none"))
    influence_args = run_influence.InfluenceArguments(pretrained_model="models/molformer-mini")
    model = MolformerForRegression.from_pretrained(model_args.model_name_or_path)
    start = run_influence.pretrained_arguments(model_args, influence_args, model)
    assert start.model_name_or_path == "models/molformer-mini"
