"""run_mlm.py, through `main` and as a process: files, objectives, resumption, bad input."""

import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TWO_PROCESSES

import run_mlm
import trainer_regression
import utils_mlm
from arguments import DataTrainingArguments, InputError, ModelArguments, TrainingArguments, parse_arguments
from modeling_molformer_reg import MolformerForMaskedLM, MolformerForRegression
from utils_checkpoints import build_tokenizer
from utils_molecules import compute_descriptors, default_descriptors, parse_smiles
from utils_runs import is_finished, last_complete_checkpoint


QUICK = ("--num_train_epochs", "2", "--disable_tqdm", "true")
TIMES = ("runtime", "per_second", "preparation_time")


def parse(*flags):
    classes = run_mlm.ARGUMENTS
    return parse_arguments(*classes, defaults=run_mlm.DEFAULTS, args=[str(flag) for flag in flags])


def test_a_regression_head_is_forgotten_with_all_that_belongs_to_it(tiny_checkpoint, small_table, tmp_path):
    """Its descriptors cannot be chosen here; another head, of other descriptors, can then be trained.

    The form of the SMILES that were learned stays, and the regression takes them so.
    """
    with pytest.raises(InputError, match="is for a regression head"):
        run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--head_descriptors", "all", "--output_dir",
                            tmp_path / "x"))  # fmt: skip
    (tmp_path / "c.txt").write_text("CCO\nCCN\n" * 8)
    torch.manual_seed(0)
    head = {"head_descriptors": ["TPSA"], "num_labels": 2, "label_mean": [1.0, 2.0], "label_std": [3.0, 4.0]}
    model = MolformerForRegression.from_pretrained(tiny_checkpoint, **head, label_names=["logD", "pKa"])
    model.save_pretrained(tmp_path / "ft")
    build_tokenizer().save_pretrained(tmp_path / "ft")
    flags = ("--train_file", tmp_path / "c.txt", "--cache_dir", tmp_path / "cache", "--max_steps", "1")
    flags += ("--disable_tqdm", "true", "--output_dir", tmp_path / "out")
    form = ("--smiles_form", "isomeric", "--max_length", 300)
    run_mlm.main(*parse("--model_name_or_path", tmp_path / "ft", *flags, *form))

    import run_regression

    flags = ["--model_name_or_path", tmp_path / "out", "--train_file", small_table, "--output_dir", tmp_path / "reg"]
    flags += ["--max_steps", 1, "--disable_tqdm", "true", "--head_descriptors", "MolLogP", "--pooling", "mean"]
    classes = run_regression.ARGUMENTS
    run_regression.main(*parse_arguments(*classes, defaults=run_regression.DEFAULTS, args=[str(f) for f in flags]))
    config = json.loads((tmp_path / "reg" / "config.json").read_text())
    assert config["head_descriptors"] == ["MolLogP"] and len(config["label_mean"]) == 1
    assert (config["smiles_form"], config["smiles_max_length"]) == ("isomeric", 300)


@pytest.mark.parametrize("objective", ["mlm", "mtr+atoms"])
def test_unknown_metric_for_the_best_model_is_refused_before_an_older_run_is_replaced(
    objective, tiny_checkpoint, small_table, tmp_path
):
    """Reference: the metrics of an evaluation, which the message names."""
    flags = ("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--objective", objective)
    flags += ("--max_steps", 1, "--disable_tqdm", "true", "--output_dir", tmp_path / "x")
    run_mlm.main(*parse(*flags))
    pooling = json.loads((tmp_path / "x" / "config.json").read_text())["pooling"]
    assert pooling == (None if objective == "mlm" else "mean")
    measured = {name.removeprefix("eval_") for name in results(tmp_path / "x") if name.startswith("eval_")}
    with pytest.raises(InputError, match="gives --metric_for_best_model accuracy. Choose one of loss, ") as error:
        run_mlm.main(*parse(*flags, "--metric_for_best_model", "accuracy", "--overwrite_output_dir"))
    assert {*re.search("one of (.*)[.]", str(error.value))[1].split(", ")} == measured - {"samples"}
    assert (tmp_path / "x" / "model.safetensors").exists()


def test_main_takes_arguments_that_no_parser_made(tiny_checkpoint, small_table, tmp_path):
    """As in a notebook: the rate is the script's own."""
    training_args = TrainingArguments(output_dir=str(tmp_path / "x"), max_steps=1, disable_tqdm=True, use_cpu=True)
    run_mlm.main(
        ModelArguments(tiny_checkpoint),
        DataTrainingArguments(train_file=small_table),
        run_mlm.MlmArguments(),
        training_args,
    )
    assert training_args.learning_rate == run_mlm.DEFAULTS["learning_rate"]
    assert results(tmp_path / "x")["train_steps"] == 1


def test_an_evaluation_leaves_the_curves_of_the_training(tiny_checkpoint, small_table, tmp_path):
    flags = ("--train_file", small_table, "--disable_tqdm", "true", "--output_dir", tmp_path / "x")
    run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, *flags, "--max_steps", 1))
    curves = (tmp_path / "x" / "loss_curves.png").read_bytes()
    more = ("--do_eval", "--overwrite_output_dir", "--max_eval_samples", 4)
    run_mlm.main(*parse("--model_name_or_path", tmp_path / "x", *flags, *more))
    assert results(tmp_path / "x")["eval_samples"] == 4
    assert (tmp_path / "x" / "loss_curves.png").read_bytes() == curves


def results(folder):
    """The metrics of a run, without those that tell time."""
    values = json.loads((folder / "all_results.json").read_text())
    return {name: value for name, value in values.items() if not any(time in name for time in TIMES)}


@pytest.fixture(scope="module")
def corpus(small_table, tmp_path_factory):
    """The SMILES of the small table as text, one a line."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(pd.read_csv(small_table)["SMILES"]) + "\n")
    return path


def test_main_writes_its_result_files_and_regression_takes_the_checkpoint(tiny_checkpoint, small_table, tmp_path):
    out = tmp_path / "mlm"
    run_mlm.main(
        *parse("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", out, *QUICK)
    )
    for name in ("model.safetensors", "config.json", "tokenizer.json", "all_results.json", "loss_curves.png"):
        assert (out / name).stat().st_size > 0
    values = results(out)
    assert values["eval_perplexity"] == pytest.approx(np.exp(values["eval_loss"]), rel=0.05)
    assert 0 <= values["eval_masked_accuracy"] <= 1 and values["train_samples"] == 115

    import run_regression

    flags = ["--model_name_or_path", str(out), "--train_file", small_table, "--output_dir", str(tmp_path / "reg"),
        "--max_steps", "1", "--disable_tqdm", "true"]  # fmt: skip
    classes = run_regression.ARGUMENTS
    run_regression.main(*parse_arguments(*classes, defaults=run_regression.DEFAULTS, args=flags))
    with pytest.raises(InputError, match="another split"):  # its test molecules were learned
        flags[flags.index(str(tmp_path / "reg"))] = str(tmp_path / "reg2")
        run_regression.main(*parse_arguments(*classes, defaults=run_regression.DEFAULTS, args=[*flags, "--seed", "1"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", "", "is empty"),
        ("c.txt", "CCO\nC1CC\nCCC\n", "1 of 3 SMILES .* row 1: 'C1CC'"),
        ("c.txt", "CCO\n" + "C" * 300 + "\n", "more tokens than --max_length"),
        ("c.csv", "name,mass\nCCO,1\n", "no SMILES column"),
        ("c.csv", "smiles,mass\n", "holds no molecule"),
        ("c.csv", "smiles,parent,id\nCC.Cl,CO,0,\nCN.Cl,CCO,1,\n", "3 columns in its header and more fields"),
        ("c.txt.gz", "", "holds no molecule"),
    ],
)
def test_bad_corpora_are_refused_before_training(name, content, message, tiny_checkpoint, tmp_path):
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    parsed = parse("--train_file", tmp_path / name, "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1)  # fmt: skip
    with pytest.raises(InputError, match=message):
        run_mlm.main(*parsed)
    assert not (tmp_path / "x").exists()


def test_held_out_molecules_that_are_learned_are_told(tiny_checkpoint, tmp_path, caplog):
    (tmp_path / "train.txt").write_text("CCO\nCCN\nCCC\nCCCC\n")
    (tmp_path / "held_out.txt").write_text("OCC\nCCF\n")  # the first one is in the other file, written differently
    flags = ("--train_file", tmp_path / "train.txt", "--validation_file", tmp_path / "held_out.txt", "--max_steps", 1)
    flags += ("--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1, "--disable_tqdm", "true")
    with caplog.at_level("WARNING"):
        run_mlm.main(*parse(*flags, "--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x"))
    assert re.search(r"1 of the 2 molecules in \S+held_out.txt are in \S+train.txt too", caplog.text)


@pytest.mark.parametrize(
    "flags", [("--test_file", "held_out.csv"), ("--split_file", "splits.json"), ("--split", "scaffold")]
)
def test_a_split_of_a_table_without_known_labels_is_refused(tiny_checkpoint, tmp_path, flags):
    """All its molecules would be learned, those among them that the regression is to be tested on."""
    (tmp_path / "t.csv").write_text("SMILES,pIC50\n" + "".join(f"{'C' * n}O,{n}\n" for n in range(1, 31)))
    start = ("--train_file", tmp_path / "t.csv", "--model_name_or_path", tiny_checkpoint)
    start += ("--output_dir", tmp_path / "x", "--cache_dir", tmp_path / "cache")
    with pytest.raises(InputError, match=f"no column that is called like a label.*{flags[0]}.*Name its labels with"):
        run_mlm.main(*parse(*start, *flags))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--head_learning_rate", "1e-3"), "--head_learning_rate is for a regression head"),
        (("--do_predict",), "--do_predict alone has nothing to predict here"),
        (("--per_device_train_batch_size", 1), "In batches of one .* the same masks in every epoch"),
    ],
)
def test_what_is_for_a_regression_or_makes_no_sense_here_is_refused(tiny_checkpoint, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x", *flags))


def test_nothing_held_out_is_refused(tiny_checkpoint, tmp_path):
    flags = ("--model_name_or_path", tiny_checkpoint, "--validation_fraction", 0, "--output_dir", tmp_path / "out")
    with pytest.raises(InputError, match="Leave --validation_fraction 0 out, or give a --validation_file"):
        run_mlm.main(*parse(*flags))


def test_corpus_that_is_not_utf8_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "c.txt").write_bytes("CCO\ncaf\xe9\n".encode("latin-1"))
    parsed = parse("--train_file", tmp_path / "c.txt", "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache")  # fmt: skip
    with pytest.raises(InputError, match="UTF-8"):
        run_mlm.main(*parsed)


def test_help_exits_zero(run_script):
    done = run_script("run_mlm.py", "--help")
    assert done.returncode == 0 and "--mlm_probability" in done.stdout


class Interruptible:
    """A run that saves inside its epochs, as a process; order, masks and targets must repeat when it is resumed."""

    def __init__(self, checkpoint, corpus, tmp_path, *flags):
        self.command = [sys.executable, str(ROOT / "run_mlm.py"), "--model_name_or_path", checkpoint, "--train_file",
            str(corpus), "--cache_dir", str(tmp_path / "c"), "--preprocessing_num_workers", "1", "--num_train_epochs",
            "3", "--per_device_train_batch_size", "4", "--eval_strategy", "steps", "--eval_steps", "25",
            "--save_strategy", "steps", "--save_steps", "25", "--disable_tqdm", "true", *flags]  # fmt: skip
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def start(self, folder):
        """Starts the run and returns its process when there is a whole checkpoint."""
        process = subprocess.Popen([*self.command, "--output_dir", str(folder)], env=self.environment,
            stderr=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
        deadline = time.time() + 120
        while not list(folder.glob("checkpoint-*/trainer_state.json")) and time.time() < deadline:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        return process

    def finish(self, folder, *flags):
        """Runs to the end and returns the metrics."""
        command = [*self.command, "--output_dir", str(folder), *flags]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return results(folder)


def test_two_processes_resume_in_the_middle_of_a_later_epoch(tiny_checkpoint, corpus, tmp_path, run_script):
    """Reference: the uninterrupted run of two processes, whose losses of every step must repeat."""
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", corpus, "--cache_dir", tmp_path / "c",
        "--preprocessing_num_workers", 1, "--max_steps", 30, "--per_device_train_batch_size", 4, "--eval_strategy",
        "no", "--save_strategy", "steps", "--save_steps", 5, "--save_total_limit", 10, "--load_best_model_at_end",
        "false", "--logging_strategy", "steps", "--logging_steps", 1, "--disable_tqdm", "true", "--use_cpu",
        "--do_train"]  # fmt: skip

    def losses(folder, *more):
        done = run_script("run_mlm.py", *flags, "--output_dir", folder, *more, launcher=TWO_PROCESSES)
        assert done.returncode == 0, done.stderr
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}

    expected = losses(tmp_path / "out")
    checkpoint = tmp_path / "out" / "checkpoint-25"  # an epoch has 18 steps
    again = losses(tmp_path / "out", "--resume_from_checkpoint", checkpoint)
    steps = range(26, 31)
    assert [again[step] for step in steps] == pytest.approx([expected[step] for step in steps], rel=1e-5)


def test_a_run_is_not_resumed_with_other_settings_or_molecules(tiny_checkpoint, corpus, tmp_path):
    lines, corpus = corpus.read_text().splitlines(), tmp_path / "corpus.txt"
    corpus.write_text("\n".join(lines))
    flags = ["--model_name_or_path", tiny_checkpoint, "--train_file", corpus, "--cache_dir", tmp_path / "c",
        "--preprocessing_num_workers", 1, "--max_steps", 4, "--output_dir", tmp_path / "out"]  # fmt: skip
    run_mlm.main(*parse(*flags, "--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no",
        "--load_best_model_at_end", "false"))  # fmt: skip
    before = (tmp_path / "out" / "arguments.json").read_text()
    resumed = [*flags, "--save_strategy", "steps", "--save_steps", 2, "--eval_strategy", "no",
        "--load_best_model_at_end", "false", "--resume_from_checkpoint", "true"]  # fmt: skip
    for more, named in (
        (["--learning_rate", "1e-3"], "--learning_rate 0.0006, not 0.001"),
        (["--seed", "7"], "--seed"),
        (["--masked_share", "0.5"], "--masked_share 1.0, not 0.5"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor .*, not 0.1"),
    ):
        with pytest.raises(InputError, match=named):
            run_mlm.main(*parse(*resumed, *more))
    assert (tmp_path / "out" / "arguments.json").read_text() == before
    run_mlm.main(*parse(*resumed, "--logging_steps", "3"))  # what changes no result may change
    corpus.write_text("\n".join(lines[1:] + lines[:1]))  # another of that name
    with pytest.raises(InputError, match="began with other molecules"):
        run_mlm.main(*parse(*resumed))
    assert is_finished(tmp_path / "out")  # as it was before


@pytest.mark.parametrize("objective", [pytest.param("mlm", marks=pytest.mark.slow), "mlm+mtr+atoms"])
def test_run_killed_in_mid_epoch_resumes_to_the_same_metrics(objective, tiny_checkpoint, corpus, tmp_path):
    """Reference: the uninterrupted run."""
    run = Interruptible(tiny_checkpoint, corpus, tmp_path, "--redraw_features", "true", "--objective", objective)
    expected = run.finish(tmp_path / "whole")
    folder = tmp_path / "killed"
    process = run.start(folder)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "all_results.json").exists()
    values = run.finish(folder, "--resume_from_checkpoint", "true")
    for name in expected:
        assert values[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux to limit the files of another process")
# of the weights' size: they, or the larger state of the optimizer, fail
@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.slow), 1.5])
def test_full_disk_while_saving_leaves_the_previous_checkpoint(share, tiny_checkpoint, corpus, tmp_path):
    """A limit on the size of files stands in for the full disk. Reference: the uninterrupted run."""
    limit = int(share * os.path.getsize(os.path.join(tiny_checkpoint, "model.safetensors")))
    run = Interruptible(tiny_checkpoint, corpus, tmp_path)
    expected = run.finish(tmp_path / "whole")
    folder = tmp_path / "full"
    process = run.start(folder)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in stderr.decode()
    assert "No space is left" in stderr.decode() and "--resume_from_checkpoint true" in stderr.decode()
    assert last_complete_checkpoint(folder) is not None
    values = run.finish(folder, "--resume_from_checkpoint", "true")
    for name in expected:
        assert values[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("share", ["0", "1", "-0.1"])
def test_impossible_masking_share_is_refused(share, capsys):
    with pytest.raises(SystemExit):
        parse("--mlm_probability", share)
    assert "--mlm_probability" in capsys.readouterr().err


@pytest.mark.parametrize(("objective", "by_tokens"), [("mlm", True), ("mlm+mtr", False), ("atoms", False)])
def test_batches_of_a_step_count_by_their_masked_tokens_alone_or_alike(
    objective, by_tokens, tiny_checkpoint, small_table, tmp_path, monkeypatch
):
    """The library divides by the number of labels of the step, which are masked tokens, if the model's loss does."""
    seen = []

    def train(trainer, **options):
        seen.append(trainer.model_accepts_loss_kwargs)
        raise InputError("seen")

    monkeypatch.setattr(trainer_regression.MolformerTrainer, "train", train)
    with pytest.raises(InputError, match="seen"):
        run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--objective",
            objective, "--output_dir", tmp_path / "x"))  # fmt: skip
    assert seen == [by_tokens]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--objective", "mtr", "--label_smoothing_factor", "0.1"), "--label_smoothing_factor"),
        (("--train_sampling_strategy", "sequential"), "--train_sampling_strategy"),
        (("--objective", "mtr", "--masked_share", "0.5"), "--masked_share goes with mlm"),
        (("--objective", "mtr+atoms", "--mlm_probability", "0.3"), "--mlm_probability goes with mlm"),
    ],
)
def test_what_the_script_does_not_do_is_refused(flags, message, tiny_checkpoint, small_table, tmp_path):
    with pytest.raises(InputError, match=message):
        run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--train_file", small_table, *flags,
            "--output_dir", tmp_path / "x"))  # fmt: skip


def test_dropped_lines_are_listed_in_the_output_folder(tiny_checkpoint, tmp_path):
    (tmp_path / "c.txt").write_text("C1CC\n" * 5 + "CCO\nCCN\n" * 3)
    parsed = parse("--train_file", tmp_path / "c.txt", "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache", "--invalid_smiles", "drop", "--num_train_epochs", 1,
        "--disable_tqdm", "true")  # fmt: skip
    run_mlm.main(*parsed)
    listed = pd.read_csv(tmp_path / "x" / "dropped_molecules.csv")
    assert listed["row"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("objective", ["mtr", "mlm+mtr+atoms"])
def test_descriptors_are_learned_and_their_scale_stays_with_the_checkpoint(
    objective, tiny_checkpoint, small_table, tmp_path
):
    """References: RDKit's values of the training molecules, and the scale that the first run saved."""
    flags = ("--train_file", small_table, "--objective", objective, "--learning_rate", "3e-3", *QUICK)
    out = tmp_path / "first"
    run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--output_dir", out, *flags, "--augment_smiles", 1))
    values = results(out)
    assert (values["train_samples"], values["train_smiles"]) == (115, 230)
    assert "Learned from 115 molecules" in (out / "README.md").read_text()
    assert ("eval_masked_accuracy" in values) == (objective == "mlm+mtr+atoms")
    assert ("eval_environment_2_accuracy" in values) == (objective == "mlm+mtr+atoms")
    assert 0 < values["eval_descriptor_mse"] < 5 and values["eval_descriptor_r2"] < 1
    assert json.loads((out / "config.json").read_text())["pooling"] == "mean"  # the state that it has trained
    model = MolformerForMaskedLM.from_pretrained(out)
    names = model.config.descriptor_names
    assert names == default_descriptors() and not model.head_is_new

    parsed = parse("--model_name_or_path", out, "--output_dir", tmp_path / "second", *flags)
    heads = utils_mlm.choose_heads(model.config, parsed[2].parts)
    train, *_ = utils_mlm.load_data(build_tokenizer(), *parsed, heads)
    table = np.array(train["descriptors"][:])
    tokens = ["".join(build_tokenizer().convert_ids_to_tokens(ids[1:-1])) for ids in train["input_ids"]]
    assert table[5] == pytest.approx(compute_descriptors(parse_smiles(tokens[5]), names), rel=1e-6)
    index = names.index("MolLogP")
    assert model.descriptor_head.mean[index].item() == pytest.approx(table[:, index].mean(), rel=1e-4)
    assert model.descriptor_head.std[index].item() == pytest.approx(table[:, index].std(), rel=1e-4)
    # of other molecules: the scale that the weights were trained for stays
    run_mlm.main(*parse("--model_name_or_path", out, "--output_dir", tmp_path / "second", *flags, "--split_seed", 1,
        "--ignore_split_mismatch"))  # fmt: skip
    again = MolformerForMaskedLM.from_pretrained(tmp_path / "second")
    assert torch.equal(again.descriptor_head.mean, model.descriptor_head.mean)


def test_descriptor_learning_beats_the_mean(tiny_checkpoint, small_table, tmp_path):
    """The mean has an R² of 0."""
    flags = ("--train_file", small_table, "--objective", "mtr", "--learning_rate", "1e-2", "--num_train_epochs", 90)
    flags += ("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false")
    run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x", *flags,
        "--disable_tqdm", "true"))  # fmt: skip
    assert results(tmp_path / "x")["eval_descriptor_r2"] > 0.3


def test_checkpoint_keeps_its_heads_whatever_the_objective(tiny_checkpoint, small_table, tmp_path):
    common = ("--train_file", small_table, "--max_steps", 2, "--disable_tqdm", "true")
    run_mlm.main(*parse("--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "all", *common,
        "--objective", "mlm+mtr+atoms"))  # fmt: skip
    run_mlm.main(*parse("--model_name_or_path", tmp_path / "all", "--output_dir", tmp_path / "mlm", *common))
    model = MolformerForMaskedLM.from_pretrained(tmp_path / "mlm")
    assert model.new_heads == () and model.config.environment_buckets == [1024, 4096]


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_impossible_share_of_masked_molecules_is_refused(share, capsys):
    with pytest.raises(SystemExit):
        parse("--masked_share", share)
    assert "--masked_share" in capsys.readouterr().err
