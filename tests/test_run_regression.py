"""run_regression.py, through `main` and as a process: files, numbers, resumption, two processes, bad input."""

import argparse
import json
import os
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
from safetensors.torch import load_file
from transformers import DataCollatorWithPadding, pipeline

import run_regression
import trainer_regression
import utils_predict
from arguments import DataTrainingArguments, InputError, ModelArguments, TrainingArguments, parse_arguments
from modeling_molformer_reg import MolformerForRegression
from trainer_regression import training_set
from utils_checkpoints import build_tokenizer
from utils_molecules import regression_metrics
from utils_runs import last_complete_checkpoint


FILES = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "modeling_molformer_reg.py",
    "all_results.json",
    "predictions.csv",
    "splits.json",
    "parity.png",
    "loss_curves.png",
)
QUICK = ("--num_train_epochs", "2", "--learning_rate", "1e-3", "--disable_tqdm", "true")
TIMES = ("runtime", "per_second", "preparation_time")


def call_main(*flags):
    """Parses `flags` as the script does and calls its `main`."""
    run_regression.main(
        *parse_arguments(
            *run_regression.ARGUMENTS,
            defaults=run_regression.DEFAULTS,
            args=[str(flag) for flag in flags],
        )
    )


def results(folder):
    """The metrics of a run, without those that tell time."""
    values = json.loads((folder / "all_results.json").read_text())
    return {name: value for name, value in values.items() if not any(time in name for time in TIMES)}


@pytest.fixture(scope="module")
def run_with_descriptors(tiny_checkpoint, small_table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "descriptors"
    call_main("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", folder, *QUICK,
              "--head_descriptors", "MolLogP", "TPSA")  # fmt: skip
    return folder


def test_descriptors_beside_the_state_come_back_in_predictions(run_with_descriptors, small_table, tmp_path):
    """References: the run's own table; RDKit's values of the training molecules; the model on another's values."""
    from rdkit import Chem
    from rdkit.Chem import Descriptors

    table = pd.read_csv(run_with_descriptors / "predictions.csv")
    model = MolformerForRegression.from_pretrained(run_with_descriptors).eval()
    assert model.config.head_descriptors == ["MolLogP", "TPSA"]
    molecules = [Chem.MolFromSmiles(text) for text in table.loc[table["split"] == "train", "SMILES"]]
    logp = [Descriptors.MolLogP(molecule) for molecule in molecules]
    assert model.classifier.scale.mean[0].item() == pytest.approx(np.mean(logp), abs=1e-3)
    assert model.classifier.scale.std[0].item() == pytest.approx(np.std(logp), abs=1e-3)
    call_main("--model_name_or_path", run_with_descriptors, "--do_predict", "--test_file", small_table, "--output_dir",
              tmp_path / "new", "--export_embeddings", tmp_path / "states.parquet")  # fmt: skip
    new = pd.read_csv(tmp_path / "new" / "predictions.csv")
    np.testing.assert_allclose(new["prediction"][table["row"]], table["prediction"], atol=1e-5)
    states = pd.read_parquet(tmp_path / "states.parquet")["embedding"]
    assert {len(state) for state in states} == {model.config.hidden_size}
    ids = torch.randint(4, 40, (1, 8))
    first, second = (model(ids, descriptors=torch.tensor([[value, 60.0]])).logits for value in (0.0, 4.0))
    assert not torch.allclose(first, second)


def test_further_training_keeps_the_scale_of_the_descriptors(run_with_descriptors, small_table, tmp_path):
    """The other split would give another one, and the head has learned with this."""
    call_main("--model_name_or_path", run_with_descriptors, "--train_file", small_table, "--seed", "7",
              *QUICK, "--max_steps", "1", "--ignore_split_mismatch", "--output_dir", tmp_path / "x")  # fmt: skip
    scales = [
        MolformerForRegression.from_pretrained(folder).classifier.scale.mean
        for folder in (run_with_descriptors, tmp_path / "x")
    ]
    assert torch.equal(*scales)


def test_descriptors_of_a_batch_are_those_of_its_molecules(tiny_checkpoint, small_table, tmp_path):
    """Reference: RDKit, name by name. Random SMILES have the descriptors of their molecule, computed once."""
    from rdkit.Chem import Descriptors

    import utils_molecules

    names = ["TPSA", "MolLogP", "NumHDonors"]
    table = pd.DataFrame({"text": ["CCO", "c1ccccc1C(=O)NCC", "CN1CCCC1c1cccnc1"], "label": [1.0, 2.0, 3.0]})
    tokenizer = build_tokenizer()
    table["input_ids"] = tokenizer(table["text"].tolist())["input_ids"]
    table["length"] = table["input_ids"].map(len)
    options = argparse.Namespace(augment_smiles=2, max_length=64, do_train=True, seed=0)
    dataset = training_set(table, tokenizer, options, options, names)
    assert dataset["length"][0] == 5 and len(dataset) == 9
    batch = DataCollatorWithPadding(tokenizer)(dataset.remove_columns(["length", "labels"]).to_list())
    expected = [
        [getattr(Descriptors, name)(utils_molecules.parse_smiles(text)) for name in names]
        for text in table["text"] for _ in range(3)
    ]  # fmt: skip
    assert batch["descriptors"].dtype == torch.float32
    np.testing.assert_allclose(batch["descriptors"], expected, rtol=1e-5)
    forms, reasons = utils_predict.prepare([*table["text"], "C1CC"], tokenizer, "canonical", 64, 2, 0, names)
    assert reasons[:3] == [None] * 3 and forms[3] == []
    given = [form["descriptors"] for own in forms for form in own]
    np.testing.assert_allclose(given, expected, rtol=1e-5)


def interrupt_and_resume(monkeypatch, *flags):
    """Runs the script, stops it in the twelfth step (an epoch has 8), and runs it to its end."""
    step, taken = trainer_regression.RegressionTrainer.training_step, []

    def broken(self, *args):
        taken.append(1)
        if len(taken) > 12:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_regression.RegressionTrainer, "training_step", broken)
        call_main(*flags)
    call_main(*flags, "--resume_from_checkpoint", "true")


def test_a_run_with_descriptors_resumes_to_the_same_metrics(
    run_with_descriptors, tiny_checkpoint, small_table, tmp_path, monkeypatch
):
    """Reference: the run without interruption."""
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, *QUICK)
    more = ("--head_descriptors", "MolLogP", "TPSA", "--output_dir", tmp_path / "x")
    interrupt_and_resume(monkeypatch, *flags, *more)
    assert results(tmp_path / "x") == pytest.approx(results(run_with_descriptors), rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["MolLogP", "Weight"], "names Weight, which RDKit .* does not know"),
        (["TPSA", "TPSA"], "has TPSA twice"),
    ],
)
def test_descriptors_that_rdkit_does_not_know_are_named(flags, message, tiny_checkpoint, small_table, tmp_path):
    with pytest.raises(InputError, match=message):
        call_main("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", tmp_path / "x",
                  *QUICK, "--head_descriptors", *flags)  # fmt: skip
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("names", [["TPSA", "MolLogP"], ["TPSA"], ["all"]])
def test_a_trained_head_is_given_no_other_descriptors(
    names, run_with_descriptors, finished_run, small_table, tmp_path
):
    same = ("--train_file", small_table, "--output_dir", tmp_path / "x", *QUICK, "--head_descriptors", *names)
    with pytest.raises(InputError, match="reads 2 descriptors: MolLogP, TPSA, --head_descriptors names"):
        call_main("--model_name_or_path", run_with_descriptors, *same)
    with pytest.raises(InputError, match="reads 0 descriptors, --head_descriptors names"):
        call_main("--model_name_or_path", finished_run, *same)


def test_descriptors_that_are_gone_or_of_another_rdkit_are_told(run_with_descriptors, small_table, tmp_path, caplog):
    copy, gone = tmp_path / "copy", tmp_path / "gone"
    for folder, key, value in ((copy, "rdkit_version", "2001.1"), (gone, "head_descriptors", ["MolLogP", "Gone"])):
        shutil.copytree(run_with_descriptors, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
    flags = ("--do_predict", "--test_file", small_table, "--output_dir", tmp_path / "x", "--model_name_or_path")
    call_main(*flags, copy)
    assert "trained on descriptors of RDKit 2001.1" in caplog.text
    with pytest.raises(InputError, match="does not know the descriptors Gone"):
        call_main(*flags, gone, "--overwrite_output_dir")
    assert (tmp_path / "x" / "predictions.csv").exists()  # what was there is still there


@pytest.fixture(scope="module")
def finished_run(tiny_checkpoint, small_table, tmp_path_factory):
    """A run on the small table with the default stages."""
    folder = tmp_path_factory.mktemp("run") / "out"
    call_main("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", folder, *QUICK)
    return folder


def test_the_arguments_that_a_run_wrote_repeat_it(finished_run, tmp_path):
    call_main(finished_run / "arguments.json", "--output_dir", tmp_path / "again")
    assert results(tmp_path / "again") == results(finished_run)


def test_losses_and_metrics_are_logged_where_report_to_says(tiny_checkpoint, small_table, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", tmp_path / "run")
    call_main(*flags, *QUICK, "--report_to", "tensorboard")
    found = EventAccumulator(str(tmp_path / "log")).Reload().Tags()["scalars"]
    assert {"train/loss", "eval/loss", "eval/mse"} <= set(found)


def test_main_writes_its_result_files(finished_run):
    for name in FILES:
        assert (finished_run / name).stat().st_size > 0, name
    for name in ("parity.png", "loss_curves.png"):
        colors = Image.open(finished_run / name).convert("RGB").getcolors(maxcolors=2**24)
        assert len(colors) > 10, f"{name} is blank"


def test_a_label_that_is_found_by_itself_keeps_its_name(tiny_checkpoint, small_table, tmp_path):
    """In card, configuration and so in plots; a column called label is called the label (the test below)."""
    path, run = tmp_path / "table.csv", tmp_path / "run"
    pd.read_csv(small_table).rename(columns={"label": "logD"}).to_csv(path, index=False)
    call_main("--model_name_or_path", tiny_checkpoint, "--train_file", path, "--output_dir", run, *QUICK)
    assert MolformerForRegression.from_pretrained(run).config.id2label == {0: "logD"}
    assert "predicts logD from SMILES" in (run / "README.md").read_text()


def test_a_pipeline_answers_in_label_units(finished_run):
    """Without a problem type it would answer the sigmoid of the label."""
    model, tokenizer = MolformerForRegression.from_pretrained(finished_run).eval(), build_tokenizer()
    answers = pipeline("text-classification", str(finished_run))(["CCO", "c1ccccc1"])
    expected = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in ("CCO", "c1ccccc1")]
    assert [answer["score"] for answer in answers] == pytest.approx(expected, abs=1e-5)
    assert {answer["label"] for answer in answers} == {"the label"}


def test_a_model_trained_in_bfloat16_reports_what_it_predicts_in_float32(tiny_checkpoint, small_table, tmp_path):
    """Reference: the saved model in float32; in bfloat16 its predictions are another 0.001 away and more."""
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", tmp_path, *QUICK]
    call_main(*flags, "--bf16")
    table = pd.read_csv(tmp_path / "predictions.csv")
    call_main(
        "--do_predict", "--model_name_or_path", tmp_path, "--test_file", small_table, "--output_dir", tmp_path / "p"
    )
    predicted = pd.read_csv(tmp_path / "p" / "predictions.csv")
    np.testing.assert_allclose(predicted["prediction"], table["prediction"], atol=1e-5)
    args = ["--do_predict", "--bf16", "--model_name_or_path", tmp_path, "--test_file", small_table]
    call_main(*args, "--output_dir", tmp_path / "half")
    rounded = pd.read_csv(tmp_path / "half" / "predictions.csv")["prediction"]
    assert 1e-4 < np.abs(rounded - table["prediction"]).max() < 0.1


def test_predictions_and_metrics_agree_with_the_saved_model(finished_run, small_table):
    """Reference: metrics recomputed from predictions.csv, and the saved model run molecule by molecule."""
    table = pd.read_csv(finished_run / "predictions.csv")
    given = pd.read_csv(small_table)
    assert table["SMILES"].tolist() == given["SMILES"].tolist()
    assert np.allclose(table["label"], given["label"])
    assert np.allclose(table["error"], table["prediction"] - table["label"])
    values = results(finished_run)
    for part in ("train", "validation", "test"):
        rows = table[table["split"] == part]
        expected = regression_metrics(rows["prediction"], rows["label"])
        for name, value in expected.items():
            assert values[f"{part}_{name}"] == pytest.approx(value, rel=1e-9)
    model = MolformerForRegression.from_pretrained(finished_run).eval()
    from transformers import AutoTokenizer

    from utils_molecules import canonicalize

    tokenizer = AutoTokenizer.from_pretrained(finished_run)
    for row in (0, 7, 159):
        encoded = tokenizer(canonicalize(table["SMILES"][row], "canonical"), return_tensors="pt")
        assert float(model(**encoded).logits) == pytest.approx(table["prediction"][row], abs=1e-4)


def test_main_predicts_into_the_folder_of_arguments_that_no_parser_made(finished_run, small_table, tmp_path):
    """As in a notebook: which flags were given is not known there."""
    run_regression.main(
        ModelArguments(str(finished_run)), DataTrainingArguments(test_file=small_table),
        run_regression.RegressionArguments(),
        TrainingArguments(output_dir=str(tmp_path / "mine"), do_predict=True, use_cpu=True),
    )  # fmt: skip
    assert len(pd.read_csv(tmp_path / "mine" / "predictions.csv")) == 160


def test_splits_file_repeats_the_split(finished_run, tiny_checkpoint, small_table, tmp_path):
    splits = json.loads((finished_run / "splits.json").read_text())
    assert {name: len(splits[name]) for name in ("train", "validation", "test")} == {
        "train": 115,
        "validation": 13,
        "test": 32,
    }
    flags = ("--split_file", finished_run / "splits.json", "--output_dir", tmp_path / "again", *QUICK)
    call_main("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, *flags)
    assert results(tmp_path / "again") == results(finished_run)


def test_same_seed_gives_identical_metrics_and_another_seed_others(
    finished_run, tiny_checkpoint, small_table, tmp_path
):
    common = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, *QUICK)
    call_main(*common, "--output_dir", tmp_path / "same")
    assert results(tmp_path / "same") == results(finished_run)
    call_main(*common, "--output_dir", tmp_path / "other", "--seed", 7, "--split_seed", 42)
    other = results(tmp_path / "other")
    assert other["test_mse"] != results(finished_run)["test_mse"]
    splits = [json.loads((folder / "splits.json").read_text()) for folder in (tmp_path / "other", finished_run)]
    assert splits[0] == splits[1]  # --split_seed holds the split while --seed changes


def test_evaluation_alone_repeats_the_trained_models_metrics(finished_run, small_table, tmp_path):
    folder = tmp_path / "evaluated"
    flags = ("--do_eval", "--do_predict", "--output_dir", folder, "--disable_tqdm", "true")
    call_main("--model_name_or_path", finished_run, "--train_file", small_table, *flags)
    values, trained = results(folder), results(finished_run)
    assert not (folder / "model.safetensors").exists()
    for name in ("eval_mse", "test_mse", "test_mae", "test_r2"):
        assert values[name] == pytest.approx(trained[name], rel=1e-6)


def test_checkpoint_of_another_split_is_refused(finished_run, small_table, tmp_path):
    flags = ("--model_name_or_path", finished_run, "--train_file", small_table, "--output_dir", tmp_path / "x", *QUICK)
    with pytest.raises(InputError, match="another split"):
        call_main(*flags, "--split_seed", 3)
    assert not (tmp_path / "x").exists()
    call_main(*flags, "--split_seed", 3, "--ignore_split_mismatch")
    assert (tmp_path / "x" / "all_results.json").exists()
    with pytest.raises(InputError, match="No file was named, so the data are .* predict with --do_predict --test_f"):
        call_main("--model_name_or_path", finished_run, "--do_predict", "--output_dir", tmp_path / "y")


def test_other_molecules_are_not_evaluated_in_the_folder_of_a_training(finished_run, small_table, tmp_path):
    """Its split and predictions would be gone, and its card untrue."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    flags = ("--model_name_or_path", folder, "--train_file", small_table, "--do_predict", "--output_dir", folder)
    flags += ("--overwrite_output_dir", "--disable_tqdm", "true")
    with pytest.raises(InputError, match="holds a training of another split"):
        call_main(*flags, "--split_seed", 3, "--ignore_split_mismatch")
    for name in ("splits.json", "predictions.csv", "README.md"):
        assert (folder / name).read_text() == (finished_run / name).read_text()
    call_main(*flags)


def test_paper_protocol_has_no_validation_part_and_says_so(tiny_checkpoint, small_table, tmp_path, capsys):
    flags = (
        "--protocol",
        "paper",
        "--output_dir",
        tmp_path / "paper",
        "--num_train_epochs",
        1,
        "--disable_tqdm",
        "true",
    )
    call_main("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, *flags)
    assert "optimistic" in capsys.readouterr().out
    values = results(tmp_path / "paper")
    assert values["test_samples"] == 32 and values["train_samples"] == 128
    assert json.loads((tmp_path / "paper" / "arguments.json").read_text())["learning_rate"] == 1e-4
    assert "validation_mse" not in values
    assert values["eval_mse"] == pytest.approx(values["test_mse"], rel=1e-6)


def test_without_a_validation_part_all_is_learned_and_the_last_epoch_kept(tiny_checkpoint, small_table, tmp_path):
    """References: the last checkpoint's weights, and the test molecules of a run with a validation part."""
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, *QUICK)
    call_main(*flags, "--validation_fraction", 0, "--output_dir", tmp_path / "out")
    values = results(tmp_path / "out")
    assert (values["train_samples"], values["test_samples"]) == (128, 32)
    assert not [name for name in values if name.startswith(("eval_", "validation_"))]
    last = last_complete_checkpoint(tmp_path / "out")
    assert last.name == "checkpoint-16"  # two epochs of eight batches
    kept, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", last))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "128 train, 32 test" in card and "No molecules were held out to choose the epoch" in card
    assert (tmp_path / "out" / "loss_curves.png").exists()

    alone = ("--model_name_or_path", tmp_path / "out", "--train_file", small_table, "--do_eval")
    with pytest.raises(InputError, match="--validation_fraction 0 leaves none"):
        call_main(*alone, "--validation_fraction", 0, "--output_dir", tmp_path / "evaluated")
    with pytest.raises(InputError, match="another split"):  # its validation molecules were learned
        call_main(*alone, "--output_dir", tmp_path / "evaluated")


def test_a_run_without_a_validation_part_resumes_to_the_same_metrics(
    tiny_checkpoint, small_table, tmp_path, monkeypatch
):
    """Reference: the run without interruption."""
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, *QUICK, "--validation_fraction", 0)
    call_main(*flags, "--output_dir", tmp_path / "whole")
    interrupt_and_resume(monkeypatch, *flags, "--output_dir", tmp_path / "pieces")
    assert results(tmp_path / "pieces") == pytest.approx(results(tmp_path / "whole"), rel=1e-6)


def test_an_ensemble_of_all_molecules_is_for_use_and_says_that_nothing_was_held_out(
    tiny_checkpoint, small_table, tmp_path, capsys
):
    flags = ("--train_file", small_table, "--test_fraction", 0, "--validation_fraction", 0, "--num_seeds", 2)
    call_main("--model_name_or_path", tiny_checkpoint, *flags, *QUICK, "--output_dir", tmp_path / "out")
    assert "No molecules were held out as a test set" in capsys.readouterr().out
    assert "No molecules were held out as a test set" in (tmp_path / "out" / "README.md").read_text()
    values = results(tmp_path / "out")
    assert values["train_samples"] == 160 and values["members"] == 2 and "test_mse" not in values
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(table) == 160 and set(table["split"]) == {"train"} and table["prediction_sd"].notna().all()
    new = ("--do_predict", "--test_file", small_table, "--output_dir", tmp_path / "new")
    call_main("--model_name_or_path", tmp_path / "out", *new)
    predicted = pd.read_csv(tmp_path / "new" / "predictions.csv")["prediction"]
    np.testing.assert_allclose(predicted, table["prediction"], atol=1e-5)


def test_validation_molecules_alone_choose_the_epoch_of_a_model_for_use(tiny_checkpoint, small_table, tmp_path):
    """Its splits.json gives the same split again; separate files follow one another in predictions.csv."""
    flags = ("--model_name_or_path", tiny_checkpoint, "--test_fraction", 0, *QUICK)
    call_main(*flags, "--train_file", small_table, "--output_dir", tmp_path / "out")
    values = results(tmp_path / "out")
    assert (values["train_samples"], values["validation_samples"]) == (144, 16) and "test_mse" not in values
    assert values["eval_mse"] == pytest.approx(values["validation_mse"], rel=1e-6)
    assert "the validation error, which is optimistic" in (tmp_path / "out" / "README.md").read_text()

    split = ("--split_file", tmp_path / "out" / "splits.json")
    call_main(*flags, "--train_file", small_table, *split, "--output_dir", tmp_path / "again")
    assert results(tmp_path / "again") == values
    with pytest.raises(InputError, match='"test" can be left out with --test_fraction 0'):
        call_main(*flags[:2], *QUICK, "--train_file", small_table, *split, "--output_dir", tmp_path / "no")

    whole = pd.read_csv(small_table)
    files = tmp_path / "train.csv", tmp_path / "validation.csv"
    for path, part in zip(files, (whole[:120], whole[120:]), strict=True):
        part.to_csv(path, index=False)
    given = ("--train_file", files[0], "--validation_file", files[1])
    call_main(*flags, *given, "--output_dir", tmp_path / "files")
    table = pd.read_csv(tmp_path / "files" / "predictions.csv")
    assert table["row"].tolist() == [*range(120), *range(40)] and table["SMILES"].tolist() == whole["SMILES"].tolist()
    with pytest.raises(InputError, match="Pass --test_file too, or --test_fraction 0"):
        call_main(*flags[:2], *QUICK, *given, "--output_dir", tmp_path / "no")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lr_scheduler_type", "reduce_lr_on_plateau"), "--lr_scheduler_type reduce_lr_on_plateau needs validation"),
        (("--save_strategy", "best"), "--save_strategy best needs validation molecules"),
    ],
)
def test_settings_that_need_an_evaluation_are_refused_without_a_validation_part(
    more, message, tiny_checkpoint, small_table, tmp_path
):
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--validation_fraction", 0)
    with pytest.raises(InputError, match=message):
        call_main(*flags, *QUICK, *more, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_evaluations_that_cannot_be_are_left_out_and_that_is_said(tiny_checkpoint, small_table, tmp_path, caplog):
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--validation_fraction", 0)
    more = ("--eval_on_start", "true", "--load_best_model_at_end", "true", "--predict_augment", 1, "--do_eval")
    call_main(*flags, *QUICK, *more, "--do_train", "--output_dir", tmp_path / "out")
    assert "the model of the last epoch is kept" in caplog.text
    assert not [name for name in results(tmp_path / "out") if name.startswith(("eval_", "validation_", "test_"))]


def test_evaluating_a_checkpoint_without_head_is_refused(tiny_checkpoint, small_table, tmp_path):
    flags = ("--do_predict", "--output_dir", tmp_path / "x")
    with pytest.raises(InputError, match="no trained regression head"):
        call_main("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, *flags)


def test_from_scratch_by_config_alone_is_said_in_the_log(small_table, tmp_path, caplog):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "molformer",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_random_features": 8,
                "intermediate_size": 32,
            }
        )
    )
    flags = ("--config_name", tmp_path / "config.json", "--output_dir", tmp_path / "scratch", "--max_steps", 2)
    call_main("--train_file", small_table, *flags, "--max_train_samples", 32, "--disable_tqdm", "true")
    assert "from scratch" in caplog.text
    assert results(tmp_path / "scratch")["train_samples"] == 32


def test_full_output_folder_is_refused_and_left_alone(finished_run, tiny_checkpoint, small_table):
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    with pytest.raises(InputError, match="--overwrite_output_dir"):
        call_main("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", finished_run)
    assert {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")} == before


def test_bad_input_leaves_the_old_run_whole_even_with_overwrite(finished_run, tiny_checkpoint, tmp_path):
    (tmp_path / "bad.csv").write_text("SMILES,label\nCCO,1.0\nC1CC,2.0\n")
    before = results(finished_run)
    flags = ("--output_dir", finished_run, "--overwrite_output_dir", *QUICK)
    with pytest.raises(InputError, match="row 1: 'C1CC'"):
        call_main("--model_name_or_path", tiny_checkpoint, "--train_file", tmp_path / "bad.csv", *flags)
    assert results(finished_run) == before
    assert (finished_run / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SMILES,label\n" + "".join(f"{'C' * n},1.0\n" for n in range(1, 41)), "labels that differ"),
        ("SMILES,label\n" + "".join(f"{'C' * n},{1e6 + n / 100}\n" for n in range(1, 41)), "Subtract a constant"),
        ("SMILES,label\nCCO,1.0\n", "cannot be split"),
        ("SMILES,label\nCCO,nan\nCCC,1\n", "missing, infinite or no numbers"),
        ("name,label\nCCO,1.0\n", "has no SMILES column"),
        ("SMILES,label\nCC[Zz],1.0\nCCC,2\n", "do not parse"),
        ("", "is empty"),
    ],
)
def test_bad_files_are_refused_before_training(text, message, tiny_checkpoint, tmp_path):
    (tmp_path / "bad.csv").write_text(text)
    flags = ("--train_file", tmp_path / "bad.csv", "--output_dir", tmp_path / "x")
    with pytest.raises(InputError, match=message):
        call_main("--model_name_or_path", tiny_checkpoint, *flags)
    assert not (tmp_path / "x").exists()


def test_dropped_molecules_are_listed_and_the_rest_is_trained(tiny_checkpoint, small_table, tmp_path):
    table = pd.read_csv(small_table)
    table.loc[5, "SMILES"] = "C1CC"
    table.to_csv(tmp_path / "bad.csv", index=False)
    flags = ("--train_file", tmp_path / "bad.csv", "--output_dir", tmp_path / "x", "--invalid_smiles", "drop", *QUICK)
    call_main("--model_name_or_path", tiny_checkpoint, *flags)
    assert pd.read_csv(tmp_path / "x" / "dropped_molecules.csv")["row"].tolist() == [5]
    assert 5 not in pd.read_csv(tmp_path / "x" / "predictions.csv")["row"].tolist()


def test_unknown_hub_model_without_network_is_explained(small_table, tmp_path):
    flags = ("--model_name_or_path", "ibm/MoLFormer-XL-both-10pct", "--output_dir", tmp_path / "x")
    with pytest.raises(InputError, match="local folder"):
        call_main("--train_file", small_table, *flags, "--cache_dir", tmp_path / "cache")


def test_help_exits_zero_and_shows_the_commands(run_script):
    done = run_script("run_regression.py", "--help")
    assert done.returncode == 0
    assert "python run_regression.py --protocol paper" in done.stdout and "--learning_rate" in done.stdout


def test_unknown_flag_ends_in_one_line_without_traceback(run_script):
    done = run_script("run_regression.py", "--learning_rat", "1")
    assert done.returncode == 2 and "--learning_rat" in done.stderr and "Traceback" not in done.stderr


def test_bad_input_as_a_process_ends_in_one_line_without_traceback(run_script, tmp_path):
    done = run_script("run_regression.py", "--train_file", tmp_path / "none.csv")
    assert done.returncode == 2 and "is not there. Correct its path" in done.stderr and "Traceback" not in done.stderr


def test_run_killed_in_mid_training_resumes_to_the_same_metrics(finished_run, tiny_checkpoint, small_table, tmp_path):
    """Reference: the uninterrupted run. The process gets SIGKILL as soon as its first checkpoint is there.

    The checkpoint goes on as one of an earlier version, which kept no time.
    """
    folder = tmp_path / "killed"
    command = [
        sys.executable,
        str(ROOT / "run_regression.py"),
        "--model_name_or_path",
        tiny_checkpoint,
        "--train_file",
        small_table,
        "--output_dir",
        str(folder),
        *QUICK,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not list(folder.glob("checkpoint-*/trainer_state.json")) and time.time() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "all_results.json").exists()
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume_from_checkpoint" in refused.stderr
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        kept = json.loads(state.read_text())
        assert kept["stateful_callbacks"].pop("Stopwatch")["attributes"]["seconds_before"] > 0
        state.write_text(json.dumps(kept))
    resumed = subprocess.run(
        [*command, "--resume_from_checkpoint", "true"], env=environment, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    values, expected = results(folder), results(finished_run)
    expected.pop("train_loss"), values.pop("train_loss")  # which that version did not keep either
    for name in expected:
        assert values[name] == pytest.approx(expected[name], rel=1e-6), name


def test_a_diverged_training_says_so(tiny_checkpoint, small_table, tmp_path, monkeypatch):
    import trainer_regression

    step = trainer_regression.RegressionTrainer.training_step
    monkeypatch.setattr(
        trainer_regression.RegressionTrainer, "training_step", lambda self, *args: step(self, *args) * float("nan")
    )
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--do_train", "--max_steps", "2")
    with pytest.raises(
        InputError, match="The training diverged: its loss is nan after 2 steps. Lower --learning_rate"
    ):
        call_main(*flags, "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false",
                  "--disable_tqdm", "true", "--output_dir", tmp_path / "out")  # fmt: skip


def test_a_training_that_diverges_leaves_the_last_good_checkpoint(tiny_checkpoint, small_table, tmp_path, monkeypatch):
    import trainer_regression

    step = trainer_regression.RegressionTrainer.training_step

    def diverging_step(self, *args):
        return step(self, *args) * (float("nan") if self.state.global_step >= 2 else 1.0)

    monkeypatch.setattr(trainer_regression.RegressionTrainer, "training_step", diverging_step)
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--do_train", "--max_steps", "100")
    with pytest.raises(InputError, match="its loss is nan after 4 steps"):
        call_main(*flags, "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "2",
                  "--load_best_model_at_end", "false", "--disable_tqdm", "true",
                  "--output_dir", tmp_path / "out")  # fmt: skip
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("stage", ["--do_train", "--do_predict"])
@pytest.mark.parametrize(
    "flags, message",
    [
        (("--config_name", "configs/molformer-mini.json"), "--config_name .* would replace what .* knows"),
        (("--pooling", "mean"), "reads cls pooling, --pooling names mean. Leave the flag out"),
    ],
)
def test_what_a_fine_tuned_model_knows_is_not_replaced(finished_run, small_table, tmp_path, stage, flags, message):
    """The scale of its labels and its split: predictions would be standardized, and test molecules learned."""
    start = ("--model_name_or_path", finished_run, "--output_dir", tmp_path / "out")
    data = ("--test_file", small_table) if stage == "--do_predict" else ("--train_file", small_table)
    with pytest.raises(InputError, match=message):
        call_main(*start, *data, stage, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no folders")
def test_an_output_folder_that_cannot_be_made_is_named(tiny_checkpoint, small_table):
    with pytest.raises(InputError, match="The output folder /proc/self/run cannot be made"):
        call_main(
            "--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", "/proc/self/run"
        )


def test_two_processes_evaluate_the_whole_test_set_and_come_close_to_one(
    finished_run, tiny_checkpoint, small_table, tmp_path, run_script
):
    """By the command that configs/accelerate/ddp.yaml gives."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(ROOT / "configs" / "accelerate" / "ddp.yaml"), "--num_processes", "2"]
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", tmp_path / "two")
    done = run_script(
        "run_regression.py", *flags, *QUICK, "--per_device_train_batch_size", 8, "--use_cpu", launcher=launcher
    )
    assert done.returncode == 0, done.stderr
    values, one = results(tmp_path / "two"), results(finished_run)
    table = pd.read_csv(tmp_path / "two" / "predictions.csv")
    assert len(table) == 160 and values["test_samples"] == 32
    assert values["test_mse"] == pytest.approx(one["test_mse"], rel=0.1)
    # by which the epoch is chosen: the molecules that fill up the last batch count once
    std = json.loads((tmp_path / "two" / "config.json").read_text())["label_std"][0]
    assert values["eval_loss"] == pytest.approx(values["eval_mse"] / std**2, rel=1e-5)
    model = MolformerForRegression.from_pretrained(tmp_path / "two").eval()
    from transformers import AutoTokenizer

    from utils_molecules import canonicalize

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "two")
    for row in range(0, 160, 9):  # rows that either process predicted: both hold the weights that were saved
        encoded = tokenizer(canonicalize(table["SMILES"][row], "canonical"), return_tensors="pt")
        assert float(model(**encoded).logits) == pytest.approx(table["prediction"][row], abs=1e-4)


@pytest.mark.slow
def test_two_processes_log_the_same_losses_where_they_go_on(tiny_checkpoint, small_table, tmp_path, run_script):
    """Reference: the log of the run that is not interrupted; checkpoints come between two logs."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launcher += ["--config_file", str(ROOT / "configs" / "accelerate" / "ddp.yaml"), "--num_processes", "2"]
    flags = [
        "--model_name_or_path",
        tiny_checkpoint,
        "--train_file",
        small_table,
        "--use_cpu",
        "--num_train_epochs",
        2,
    ]
    flags += [
        "--per_device_train_batch_size",
        8,
        "--save_strategy",
        "steps",
        "--save_steps",
        4,
        "--eval_strategy",
        "no",
    ]
    flags += ["--load_best_model_at_end", "false", "--save_total_limit", 9, "--output_dir", tmp_path / "run"]

    def logged():
        history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
        return [*(entry["loss"] for entry in history if "loss" in entry), results(tmp_path / "run")["train_loss"]]

    assert (done := run_script("run_regression.py", *flags, launcher=launcher)).returncode == 0, done.stderr
    whole = logged()
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        if folder.name != "checkpoint-4":
            shutil.rmtree(folder)
    flags += ["--resume_from_checkpoint", "true"]
    assert (done := run_script("run_regression.py", *flags, launcher=launcher)).returncode == 0, done.stderr
    assert logged() == pytest.approx(whole, rel=1e-5) and len(whole) == 3


SHARDED = """
import sys
import torch
from torch.distributed import barrier, destroy_process_group, get_rank, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from modeling_molformer_reg import MolformerForRegression
from trainer_regression import restore_class

init_process_group("gloo")
mesh, rank = init_device_mesh("cpu", (2,)), get_rank()
load = lambda: MolformerForRegression.from_pretrained(sys.argv[1], redraw_features=False).eval()
torch.manual_seed(0)
plain = load()
torch.manual_seed(0)  # the head is new
sharded = load()
for layer in sharded.molformer.encoder.layer:  # what fsdp.yaml wraps
    fully_shard(layer, mesh=mesh)
fully_shard(sharded, mesh=mesh)
ids, labels = torch.randint(3, 100, (4, 12)), torch.randn(4)
mine = slice(2 * rank, 2 * rank + 2)
for model, rows in ((plain, slice(None)), (sharded, mine)):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids[rows], labels=labels[rows]).loss.backward()
    optimizer.step()
whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in sharded.state_dict().items()}
assert all(torch.allclose(whole[name], tensor, atol=1e-5) for name, tensor in plain.state_dict().items())
restore_class(sharded)
if rank == 0:
    sharded.save_pretrained(sys.argv[2], state_dict=whole)
barrier()
destroy_process_group()
"""


def test_a_sharded_model_trains_as_a_whole_one_and_carries_our_file(tiny_checkpoint, tmp_path, run_script):
    """FSDP as configs/accelerate/fsdp.yaml has it, by torch's own call: Accelerate offers it for GPUs alone."""
    (tmp_path / "step.py").write_text(SHARDED)
    done = run_script(
        tmp_path / "step.py", tiny_checkpoint, tmp_path / "saved", launcher=TWO_PROCESSES, PYTHONPATH=str(ROOT)
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    name = "modeling_molformer_reg.MolformerForRegression"
    assert config["auto_map"]["AutoModelForSequenceClassification"] == name
    assert (tmp_path / "saved" / "modeling_molformer_reg.py").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_the_configurations(path):
    """As `accelerate launch` reads them; the layer that FSDP is to wrap is one of ours."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 8 and config.distributed_type.value in ("MULTI_GPU", "FSDP")
    wrapped = (config.fsdp_config or {}).get("fsdp_transformer_layer_cls_to_wrap")
    assert wrapped is None or [wrapped] == MolformerForRegression._no_split_modules


@pytest.mark.slow
def test_a_compiled_training_ends_as_a_plain_one(tiny_checkpoint, small_table, tmp_path):
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--disable_tqdm", "true", *QUICK)
    for name, more in (("plain", ()), ("compiled", ("--torch_compile",))):
        call_main(*flags, *more, "--hidden_dropout_prob", "0", "--embedding_dropout_prob", "0", "--output_dir",
                  tmp_path / name)  # fmt: skip
    plain, compiled = (results(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled["test_mse"] == pytest.approx(plain["test_mse"], rel=1e-2)
    MolformerForRegression.from_pretrained(tmp_path / "compiled")


def test_fsdp_without_gpus_is_refused(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="FSDP needs GPUs"):
        call_main("--model_name_or_path", tiny_checkpoint, "--use_cpu", "--output_dir", tmp_path / "x")


def test_ensemble_reports_mean_and_spread_of_its_members_and_serves_as_a_model(
    finished_run, tiny_checkpoint, small_table, tmp_path
):
    """References: the run of the first seed alone, and the members' predictions, one by one."""
    flags = ("--train_file", small_table, "--disable_tqdm", "true")
    folder = tmp_path / "ensemble"
    call_main("--model_name_or_path", tiny_checkpoint, *flags, *QUICK, "--num_seeds", 2, "--output_dir", folder)
    table = pd.read_csv(folder / "predictions.csv")
    assert results(folder)["members"] == 2
    assert results(folder / "member-0")["test_mse"] == pytest.approx(results(finished_run)["test_mse"], rel=1e-9)
    members = []
    for number in (0, 1):
        out = tmp_path / f"alone-{number}"
        call_main("--model_name_or_path", folder / f"member-{number}", *flags, "--do_predict", "--output_dir", out)
        members.append(pd.read_csv(out / "predictions.csv")["prediction"])
        assert (folder / f"member-{number}" / "loss_curves.png").exists()
    assert table["prediction"].to_numpy() == pytest.approx(np.mean(members, axis=0), abs=1e-5)
    assert table["prediction_sd"].to_numpy() == pytest.approx(np.std(members, axis=0, ddof=1), abs=1e-5)
    assert (table["prediction_sd"] > 0).mean() > 0.9
    test = table[table["split"] == "test"]
    assert results(folder)["test_mse"] == pytest.approx(np.mean(test["error"] ** 2), rel=1e-6)

    call_main("--model_name_or_path", folder, *flags, "--do_predict", "--do_eval", "--output_dir", tmp_path / "again")
    held_out = table[table["split"] == "validation"]
    for out in (folder, tmp_path / "again"):
        assert results(out)["eval_mse"] == pytest.approx(np.mean(held_out["error"] ** 2), rel=1e-5)
    again = pd.read_csv(tmp_path / "again" / "predictions.csv")
    for column in ("prediction", "prediction_sd"):
        assert again[column].to_numpy() == pytest.approx(table[column].to_numpy(), abs=1e-5)
    with pytest.raises(InputError, match="holds an ensemble of 2 models"):
        call_main("--model_name_or_path", folder, *flags, "--output_dir", tmp_path / "no", *QUICK)
    before, model = results(folder), ("--model_name_or_path", folder)
    call_main(*model, *flags, "--do_eval", "--output_dir", folder, "--overwrite_output_dir")
    assert results(folder).keys() == before.keys() and results(folder)["test_mse"] == before["test_mse"]


def test_interrupted_ensemble_keeps_its_finished_members(tiny_checkpoint, small_table, tmp_path, monkeypatch):
    """Reference: the uninterrupted ensemble."""
    config = tmp_path / "config.json"  # named on resuming too, and must not replace those of finished members
    config.write_text((Path(tiny_checkpoint) / "config.json").read_text())
    common = ("--config_name", config, "--train_file", small_table, "--num_seeds", 2, "--predict_augment", 1, *QUICK)
    call_main(*common, "--output_dir", tmp_path / "whole")

    import trainer_regression

    train, calls = trainer_regression.RegressionTrainer.train, []

    def stop_at_the_second(self, **kwargs):
        calls.append(self.args.seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(self, **kwargs)

    monkeypatch.setattr(trainer_regression.RegressionTrainer, "train", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        call_main(*common, "--output_dir", tmp_path / "cut")
    with pytest.raises(InputError, match="interrupted run"):
        call_main(*common, "--output_dir", tmp_path / "cut")
    call_main(*common, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint", "true")
    assert calls == [42, 43, 43]  # the first member was not trained again
    for name, value in results(tmp_path / "whole").items():
        assert results(tmp_path / "cut")[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    call_main(*common, "--output_dir", tmp_path / "cut", "--overwrite_output_dir")
    assert calls[3:] == [42, 43]
    # all members predict the same random SMILES, there and in a file
    flags = ("--model_name_or_path", tmp_path / "whole", "--test_file", small_table, "--predict_augment", 1)
    call_main("--do_predict", *flags, "--output_dir", tmp_path / "again")
    own, again = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("whole", "again"))
    for name in ("prediction", "prediction_sd", "augment_sd"):
        assert again[name][own["row"]].to_numpy() == pytest.approx(own[name].to_numpy(), abs=1e-5), name
    assert own["augment_sd"].max() > 1e-3


def test_an_ensemble_without_held_out_molecules_is_resumed(tiny_checkpoint, small_table, tmp_path):
    """Finished members then have nothing to train, to evaluate or to predict."""
    flags = (
        "--model_name_or_path",
        tiny_checkpoint,
        "--train_file",
        small_table,
        "--num_seeds",
        2,
        *QUICK,
        "--do_train",
    )
    flags += ("--validation_fraction", 0, "--output_dir", tmp_path / "x")
    call_main(*flags)
    weights = (tmp_path / "x" / "member-0" / "model.safetensors").read_bytes()
    call_main(*flags, "--resume_from_checkpoint", "true")
    assert (tmp_path / "x" / "member-0" / "model.safetensors").read_bytes() == weights
    assert results(tmp_path / "x") == {"members": 2}


def test_an_ensemble_that_was_trained_in_bfloat16_is_reported_in_float32(
    tiny_checkpoint, small_table, tmp_path, run_script
):
    """Reference: the metrics of the members right after their training. When it is resumed, nothing is trained."""
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--num_seeds", 2, "--bf16", *QUICK,
             "--output_dir", tmp_path / "x")  # fmt: skip
    environment = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert run_script("run_regression.py", *flags, **environment).returncode == 0
    before = [results(folder) for folder in (tmp_path / "x", tmp_path / "x" / "member-0")]
    done = run_script("run_regression.py", *flags, "--resume_from_checkpoint", "true", **environment)
    assert done.returncode == 0, done.stderr
    for old, folder in zip(before, (tmp_path / "x", tmp_path / "x" / "member-0"), strict=True):
        new = results(folder)
        assert {n: new[n] for n in old if "mse" in n} == pytest.approx(
            {n: old[n] for n in old if "mse" in n}, rel=1e-6
        )
    flags = ("--do_predict", "--model_name_or_path", tmp_path / "x", "--test_file", small_table)
    call_main(*flags, "--output_dir", tmp_path / "p")
    table, new = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("x", "p"))
    np.testing.assert_allclose(new["prediction"][table["row"]], table["prediction"], atol=1e-5)


def test_ensemble_that_is_not_there_cannot_be_resumed(tiny_checkpoint, tmp_path):
    flags = ("--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x", "--num_seeds", 2)
    with pytest.raises(InputError, match="no run to resume"):
        call_main(*flags, "--resume_from_checkpoint", "true")


def test_random_smiles_in_training_and_prediction(tiny_checkpoint, small_table, tmp_path):
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", tmp_path / "x")
    call_main(*flags, "--augment_smiles", 2, "--predict_augment", 3, *QUICK)
    table = pd.read_csv(tmp_path / "x" / "predictions.csv")
    assert results(tmp_path / "x")["train_smiles"] == 345  # three times 115
    assert (table["augment_sd"] > 0).mean() > 0.9 and "prediction_sd" not in table


def test_members_learn_random_smiles_of_their_own(tiny_checkpoint, small_table, tmp_path):
    """Reference: the second member's seed alone, on the same split."""
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--augment_smiles", 1, *QUICK)
    flags += ("--split_seed", 0)
    call_main(*flags, "--seed", 5, "--num_seeds", 2, "--output_dir", tmp_path / "both")
    call_main(*flags, "--seed", 6, "--output_dir", tmp_path / "second")
    member = results(tmp_path / "both" / "member-1")
    assert member["test_mse"] == pytest.approx(results(tmp_path / "second")["test_mse"], rel=1e-6)


@pytest.mark.parametrize(("flag", "value"), [("--num_seeds", 0), ("--predict_augment", -1), ("--augment_smiles", -2)])
def test_impossible_numbers_of_models_and_forms_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        call_main(flag, value)
    assert f"{flag} is {value}" in capsys.readouterr().err


def test_seeds_of_models_that_are_not_trained_are_told(finished_run, small_table, tmp_path, caplog):
    flags = ("--model_name_or_path", finished_run, "--train_file", small_table, "--do_eval", "--num_seeds", 2)
    call_main(*flags, "--disable_tqdm", "true", "--output_dir", tmp_path / "x")
    assert "--num_seeds 2 trains several models" in caplog.text and not list((tmp_path / "x").glob("member-*"))


def test_seeds_beyond_the_last_are_refused(tiny_checkpoint, small_table, tmp_path):
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", tmp_path / "x")
    with pytest.raises(InputError, match="no room for 2 seeds"):
        call_main(*flags, "--seed", 2**32 - 1, "--num_seeds", 2)


def test_evaluation_of_an_ensemble_alone_is_of_its_mean(finished_run, small_table, tmp_path):
    import shutil

    folder = tmp_path / "ensemble"
    for number in (0, 1):
        shutil.copytree(finished_run, folder / f"member-{number}", ignore=shutil.ignore_patterns("checkpoint-*"))
    flags = ("--train_file", small_table, "--do_eval", "--disable_tqdm", "true", "--output_dir", tmp_path / "x")
    other = MolformerForRegression.from_pretrained(folder / "member-1")
    other.classifier.out_proj.bias.data += 1  # a standard deviation of the labels more
    other.save_pretrained(folder / "member-1")
    call_main("--model_name_or_path", folder, *flags)
    table = pd.read_csv(finished_run / "predictions.csv")
    errors = table["error"][table["split"] == "validation"] + other.config.label_std[0] / 2
    assert results(tmp_path / "x")["eval_mse"] == pytest.approx(np.mean(errors**2), rel=1e-4)
    assert not (tmp_path / "x" / "predictions.csv").exists()


# ------------------------------------------------------------------------------------------------------ several labels


def test_several_labels_are_learned_together_and_missing_ones_count_for_nothing(tiny_checkpoint, tmp_path):
    table = pd.read_csv(ROOT / "data" / "lipophilicity.csv", nrows=120)
    table["double"] = 2 * table["label"] + 100
    table.loc[::3, "double"] = np.nan
    table.to_csv(tmp_path / "two.csv", index=False)
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", tmp_path / "two.csv", *QUICK]
    flags += ["--label_column", "label", "double", "--output_dir", tmp_path / "out", "--num_seeds", "2"]
    call_main(*flags)
    read = pd.read_csv(tmp_path / "out" / "predictions.csv")
    values = results(tmp_path / "out")
    for name in ("label", "double"):
        test = read[(read["split"] == "test") & read[f"label_{name}"].notna()]
        assert values[f"test_mse_{name}"] == pytest.approx(np.mean(test[f"error_{name}"] ** 2), abs=1e-6)
        assert f"prediction_sd_{name}" in read and f"test_mse_mean_{name}" in values
        assert read[f"prediction_{name}"].notna().all()
    assert read["label_double"].isna().sum() == 40
    assert 90 < read["prediction_double"].mean() < 120  # in its own unit
    model = MolformerForRegression.from_pretrained(tmp_path / "out" / "member-0")
    assert model.config.label_names == ["label", "double"] and model.config.num_labels == 2

    new = tmp_path / "new.csv"
    table.drop(columns="label").rename(columns={"double": "other"}).to_csv(new, index=False)
    call_main(
        "--do_predict", "--model_name_or_path", tmp_path / "out", "--test_file", new, "--output_dir", tmp_path / "p"
    )
    predicted = pd.read_csv(tmp_path / "p" / "predictions.csv")
    np.testing.assert_allclose(predicted["prediction_double"], read["prediction_double"], atol=1e-4)
    np.testing.assert_allclose(predicted["prediction_sd_label"], read["prediction_sd_label"], atol=1e-4)


def test_several_labels_are_learned_where_nothing_is_held_out(tiny_checkpoint, tmp_path):
    table = pd.read_csv(ROOT / "data" / "lipophilicity.csv", nrows=60)
    table.assign(other=-table["label"]).to_csv(tmp_path / "two.csv", index=False)
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", tmp_path / "two.csv", *QUICK]
    flags += ["--label_column", "label", "other", "--validation_fraction", "0", "--output_dir", tmp_path / "out"]
    call_main(*flags)
    assert results(tmp_path / "out").keys() >= {"train_samples", "test_mse_label", "test_mse_other"}


def test_a_head_without_a_label_scale_is_evaluated_in_its_own_numbers(tiny_checkpoint, small_table, tmp_path):
    """As checkpoints of the published form are. Reference: the errors in predictions.csv."""
    model = MolformerForRegression.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path / "plain")
    build_tokenizer().save_pretrained(tmp_path / "plain")
    flags = ["--model_name_or_path", tmp_path / "plain", "--train_file", small_table, "--do_eval", "--do_predict"]
    call_main(*flags, "--output_dir", tmp_path / "out")
    read = pd.read_csv(tmp_path / "out" / "predictions.csv")
    errors = read.loc[read["split"] == "validation", "error"]
    assert results(tmp_path / "out")["eval_loss"] == pytest.approx(np.mean(errors**2), rel=1e-5)


def test_a_start_that_returns_its_states_is_trained_all_the_same(tiny_checkpoint, small_table, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "start")
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    config |= {"output_hidden_states": True, "output_attentions": True}
    (tmp_path / "start" / "config.json").write_text(json.dumps(config))
    flags = ["--model_name_or_path", tmp_path / "start", "--train_file", small_table, *QUICK]
    call_main(*flags, "--output_dir", tmp_path / "out")
    assert np.isfinite(results(tmp_path / "out")["test_mse"])


def test_an_evaluation_finds_several_labels_by_their_names(tiny_checkpoint, tmp_path):
    table = pd.read_csv(ROOT / "data" / "lipophilicity.csv", nrows=60)
    table["other"] = -10 * table["label"]
    table.to_csv(tmp_path / "two.csv", index=False)
    flags = ["--train_file", tmp_path / "two.csv", *QUICK]
    trained = ["--model_name_or_path", tiny_checkpoint, "--label_column", "label", "other"]
    call_main(*trained, *flags, "--output_dir", tmp_path / "out")
    again = ["--model_name_or_path", tmp_path / "out", "--do_eval", "--do_predict", *flags]
    call_main(*again, "--label_column", "other", "label", "--output_dir", tmp_path / "again")
    first, second = results(tmp_path / "out"), results(tmp_path / "again")
    for name in ("test_mse_label", "test_mse_other", "eval_loss", "eval_mse_other"):
        assert second[name] == pytest.approx(first[name], rel=1e-6), name
    with pytest.raises(InputError, match="predicts label, other"):
        call_main(*again, "--label_column", "other", "--output_dir", tmp_path / "one")
    one = ["--model_name_or_path", tmp_path / "out", *flags, "--label_column", "other"]
    with pytest.raises(InputError, match=r"predicts 2 labels: label, other\. This run has 1\."):
        call_main(*one, "--output_dir", tmp_path / "one")


def test_molecules_without_any_label_are_left_out(tiny_checkpoint, tmp_path, caplog):
    table = pd.read_csv(ROOT / "data" / "lipophilicity.csv", nrows=60).assign(other=1.0)
    table["other"] = table.index % 7
    table.loc[table.index % 2 == 0, ["label", "other"]] = np.nan
    table.to_csv(tmp_path / "two.csv", index=False)
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", tmp_path / "two.csv", *QUICK]
    call_main(*flags, "--label_column", "label", "other", "--output_dir", tmp_path / "out")
    assert "30 of 60 molecules have none of the labels" in caplog.text
    assert len(pd.read_csv(tmp_path / "out" / "predictions.csv")) == 30


@pytest.mark.parametrize(
    ("name", "taken_for"), [("mean_label", "baseline mean of"), ("sd_label", "standard deviation of predictions of")]
)
def test_a_label_that_is_called_like_something_of_another_is_refused(tiny_checkpoint, tmp_path, name, taken_for):
    """Their metrics, or columns of their predictions, would have one name."""
    table = pd.read_csv(ROOT / "data" / "lipophilicity.csv", nrows=60)
    table.assign(**{name: table["label"] + 1}).to_csv(tmp_path / "two.csv", index=False)
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", tmp_path / "two.csv", *QUICK]
    with pytest.raises(InputError, match=f"{name!r} .* would be taken for the {taken_for} 'label'. Rename"):
        call_main(*flags, "--label_column", name, "label", "--output_dir", tmp_path / "out")


def test_a_label_that_no_training_molecule_has_is_refused(tiny_checkpoint, tmp_path):
    table = pd.read_csv(ROOT / "data" / "lipophilicity.csv", nrows=60).assign(other=np.nan)
    table.to_csv(tmp_path / "two.csv", index=False)
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", tmp_path / "two.csv", *QUICK]
    with pytest.raises(InputError, match="no training labels of 'other'"):
        call_main(*flags, "--label_column", "label", "other", "--output_dir", tmp_path / "out")
