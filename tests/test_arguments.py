"""Arguments and argument files: defaults, help, refusals.

python -m pytest tests/test_arguments.py
"""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import DATACLASSES, DEFAULTS, ROOT, parse

import arguments
import run_regression
from arguments import (
    EMBEDDED_CHECKPOINT,
    EMBEDDED_DATA,
    parse_arguments,
)


def refusal(capsys, *args):
    """The message of arguments that are refused, after the checks that every refusal has to pass."""
    with pytest.raises(SystemExit) as error:
        parse(*args)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def own_fields(dataclass):
    """The fields that this project defines, without those of the library."""
    return [field for field in dataclasses.fields(dataclass) if field.name in dataclass.__annotations__]


# ---------------------------------------------------------------------------------------------------------- defaults


def test_the_defaults_are_the_embedded_model_and_data():
    model_args, data_args, training_args = parse()
    assert model_args.model_name_or_path == EMBEDDED_CHECKPOINT == str(ROOT / "models" / "molformer-mini")
    assert model_args.config_name is None and model_args.model_revision == "main"
    assert model_args.config_overrides() == {}
    assert data_args.train_file == EMBEDDED_DATA == str(ROOT / "data" / "lipophilicity.csv")
    assert (data_args.split, data_args.protocol, data_args.smiles_form) == ("random", "default", None)
    assert (data_args.test_fraction, data_args.validation_fraction) == (0.2, 0.1)
    assert (data_args.max_length, data_args.invalid_smiles) == (256, "error")
    assert not data_args.overwrite_output_dir and not data_args.ignore_split_mismatch
    assert data_args.split_seed is data_args.max_train_samples is None


def test_the_defaults_of_training_are_the_papers():
    """Reference: batch 16, 7 epochs, Adam (AdamW without decay), the best model kept (shared/DESIGN.md, section 1)."""
    training_args = parse(defaults=None)[2]
    assert training_args.num_train_epochs == 7
    assert training_args.per_device_train_batch_size == 16
    assert (training_args.optim, training_args.weight_decay) == ("adamw_torch_fused", 0)
    assert training_args.load_best_model_at_end
    assert training_args.eval_strategy == training_args.save_strategy == training_args.logging_strategy == "epoch"
    assert training_args.train_sampling_strategy == "group_by_length"
    assert training_args.learning_rate is training_args.head_learning_rate is None  # the script's, by its protocol
    assert training_args.report_to in ("none", [])
    assert training_args.use_cpu == (not torch.accelerator.is_available())


@pytest.mark.parametrize(
    ("launched", "flags", "hardware", "expected"),
    [
        (None, ["--do_train"], True, True),
        (None, ["--do_train"], False, False),
        (None, ["--do_train", "--bf16", "false"], True, False),
        (None, ["--do_predict"], True, False),
        (None, ["--do_predict", "--bf16"], True, True),
        ("no", ["--do_train"], True, False),
        ("bf16", ["--do_train"], True, True),
        ("bf16", ["--do_train", "--use_cpu"], False, False),  # it would be emulated
        ("bf16", ["--do_train", "--bf16", "false"], True, False),
        ("bf16", ["--do_train", "--fp16"], True, False),
        ("bf16", ["--do_predict"], True, False),
        ("fp16", ["--do_train"], True, False),
        ("fp16", ["--do_predict"], True, False),
    ],
)
def test_training_is_in_bfloat16_where_it_is_fast_and_nobody_says_otherwise(
    monkeypatch, launched, flags, hardware, expected
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    for name in ("has_bfloat16", "gains_by_bfloat16"):
        monkeypatch.setattr(arguments, name, lambda use_cpu: hardware)
    training_args = parse(*flags)[2]
    assert training_args.bf16 is expected
    half = "--fp16" in flags or (launched == "fp16" and "--do_train" in flags)
    assert training_args.fp16 is half
    assert training_args.mixed_precision == ("bf16" if expected else "fp16" if half else "no")
    assert os.environ.get("ACCELERATE_MIXED_PRECISION") == launched  # the next arguments of this process are free


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("AMD EPYC", ["avx512_bf16"], True),
        ("Intel Xeon", ["avx512_bf16"], False),  # slower than float32 there
        ("Intel Xeon", ["avx512_bf16", "amx_bf16"], True),
        ("AMD EPYC", [], False),
    ],
)
def test_bfloat16_is_for_processors_that_gain_by_it(monkeypatch, name, flags, expected):
    capabilities = {"cpu_name": name} | dict.fromkeys(flags, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert arguments.gains_by_bfloat16(use_cpu=True) is expected
    assert parse("--do_train", "--use_cpu")[2].bf16 is expected
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # who asks for it gets it where it is not emulated
    assert parse("--do_train", "--use_cpu")[2].bf16 is bool(flags)


def test_the_processor_says_what_it_is():
    """Reference: vendor and flags that the Linux kernel lists."""
    listed = Path("/proc/cpuinfo")
    if not listed.exists() or "vendor_id" not in listed.read_text():
        pytest.skip("not Linux on x86")
    words = set(listed.read_text().split())
    assert arguments.has_bfloat16(use_cpu=True) == bool(words & {"avx512_bf16", "amx_bf16"})
    slow = "GenuineIntel" in words and "amx_bf16" not in words
    assert arguments.gains_by_bfloat16(use_cpu=True) == (not slow and bool(words & {"avx512_bf16", "amx_bf16"}))


def test_the_dataclasses_work_without_a_parser():
    """As a notebook or a test makes them."""
    model_args, data_args, training_args = (dataclass() for dataclass in DATACLASSES)
    assert model_args == parse()[0]
    assert data_args == parse()[1]
    assert training_args.num_train_epochs == 7


def test_a_configuration_alone_names_no_checkpoint():
    assert parse("--config_name", "c.json")[0].model_name_or_path is None
    assert parse("--config_name", "c.json", "--model_name_or_path", "m")[0].model_name_or_path == "m"


def test_only_what_the_user_named_overrides_the_configuration():
    flags = ("--pooling", "mean", "--redraw_features", "false", "--hidden_dropout_prob", "0")
    expected = {"pooling": "mean", "redraw_features": False, "hidden_dropout_prob": 0.0}
    assert parse(*flags)[0].config_overrides() == expected


def test_a_scripts_defaults_hold_under_the_users_flags():
    training_args = parse("--learning_rate", "1e-5")[2]
    assert training_args.output_dir == "outputs/script"
    assert training_args.per_device_eval_batch_size == 128
    assert training_args.learning_rate == 1e-5


@pytest.mark.parametrize(
    "flags, train, evaluate, predict",
    [
        ((), True, True, True),
        (("--do_train",), True, False, False),
        (("--do_eval",), False, True, False),
        (("--do_predict",), False, False, True),
        (("--do_train", "--do_predict"), True, False, True),
        (("--do_train", "--do_eval", "--do_predict"), True, True, True),
        (("--do_train", "--eval_strategy", "steps", "--save_strategy", "steps"), True, False, False),
    ],
)
def test_without_a_stage_all_are_done_else_those_given(flags, train, evaluate, predict):
    """The library turns do_eval on wherever training evaluates; here it means the stage of its own."""
    training_args = parse(*flags)[2]
    assert training_args.eval_strategy != "no"
    assert (training_args.do_train, training_args.do_eval, training_args.do_predict) == (train, evaluate, predict)


@pytest.mark.parametrize(
    "flags, split",
    [
        ((), "random"),
        (("--split", "scaffold"), "scaffold"),
        (("--split_file", "s.json"), "file"),
        (("--split", "file", "--split_file", "s.json"), "file"),
        (("--test_file", "t.csv"), "file"),
        (("--test_file", "t.csv", "--validation_file", "v.csv"), "file"),
    ],
)
def test_the_split_is_by_file_where_files_are_given(flags, split):
    assert parse(*flags)[1].split == split


def test_a_hub_data_set_takes_the_place_of_the_embedded_file():
    data_args = parse("--dataset_name", "someone/molecules")[1]
    assert (data_args.dataset_name, data_args.train_file) == ("someone/molecules", None)


# -------------------------------------------------------------------------------------------------------------- help


SCRIPTS = [importlib.import_module(name) for name in ("run_regression", "run_mlm", "run_influence", "run_peft")]


@pytest.mark.parametrize("dataclass", dict.fromkeys(kind for script in SCRIPTS for kind in script.ARGUMENTS))
def test_every_argument_of_ours_has_a_help_text(dataclass):
    fields = own_fields(dataclass)
    assert fields
    for field in fields:
        text = field.metadata.get("help", "")
        assert len(text) > 5 and text.endswith("."), field.name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_shows_every_argument_its_text_and_the_description(capsys, script):
    description = "First line.\n\n    a command"
    with pytest.raises(SystemExit) as error:
        parse_arguments(*script.ARGUMENTS, defaults=DEFAULTS, description=description, args=["--help"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert "First line.\n\n    a command" in shown
    words = "".join(shown.split())  # whatever the width of the terminal
    for dataclass in script.ARGUMENTS:
        for field in own_fields(dataclass):
            assert f"--{field.name}" in words
            assert "".join(field.metadata["help"].split()) in words, field.name
    assert "(default:outputs/script)" in words


# ---------------------------------------------------------------------------------------------------- argument files


FLAGS = {
    "--train_file": "my.csv",
    "--pooling": "mean",
    "--redraw_features": "false",
    "--hidden_dropout_prob": "0.05",
    "--max_length": "128",
    "--split": "scaffold",
    "--overwrite_output_dir": "true",
    "--learning_rate": "2e-4",
    "--num_train_epochs": "3",
    "--bf16": "false",
    "--do_train": "true",
    "--seed": "7",
}


JSON_FILE = """{"train_file": "my.csv", "pooling": "mean", "redraw_features": false, "hidden_dropout_prob": 0.05,
"max_length": 128, "split": "scaffold", "overwrite_output_dir": true, "learning_rate": 2e-4, "num_train_epochs": 3,
"bf16": false, "do_train": true, "seed": 7}"""


YAML_FILE = """
train_file: my.csv
pooling: mean
redraw_features: false
hidden_dropout_prob: 0.05
max_length: 128  # a comment
split: scaffold
overwrite_output_dir: true
learning_rate: 2.0e-4
num_train_epochs: 3
bf16: false
do_train: true
seed: 7
"""


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.json", JSON_FILE),
        ("run.yaml", YAML_FILE),
        ("run.yml", YAML_FILE),
        ("run.yaml", YAML_FILE.replace("2.0e-4", "2e-4")),
        ("run.json", JSON_FILE.replace("128", '"128"').replace("0.05", '"0.05"')),
    ],
    ids=["json", "yaml", "yml", "yaml: 2e-4 is text by its rules", "json with numbers as text"],
)
def test_an_argument_file_gives_the_same_as_flags(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content)
    from_file = parse(file)
    from_flags = parse(*(part for flag in FLAGS.items() for part in flag))
    assert from_file[:2] == from_flags[:2]
    assert from_file[2].to_dict() == from_flags[2].to_dict()
    assert from_file[2].learning_rate == 2e-4


def test_flags_after_an_argument_file_replace_its_lists_and_stages(tmp_path):
    """Nothing is left to do only where neither says what; the arguments of a run without a stage name none."""
    file = tmp_path / "run.json"
    file.write_text('{"label_column": ["a"], "do_predict": true, "do_train": true}')
    _, data_args, training_args = parse(file, "--label_column", "b", "c", "--do_train", "false")
    assert data_args.label_column == ["b", "c"] and not training_args.do_train and training_args.do_predict
    file.write_text('{"do_train": false, "do_eval": false, "do_predict": false}')
    assert parse(file)[2].do_train


@pytest.mark.parametrize("name, content", [("run.json", '{"seed": 1}'), ("run.yaml", "seed: 1\n")])
def test_a_scripts_defaults_hold_under_an_argument_file(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content)
    training_args = parse(file)[2]
    assert (training_args.output_dir, training_args.learning_rate) == ("outputs/script", 6e-4)
    assert training_args.seed == 1


def test_an_argument_file_holds_over_a_scripts_defaults(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"output_dir": "elsewhere", "learning_rate": 1e-5}')
    training_args = parse(file)[2]
    assert (training_args.output_dir, training_args.learning_rate) == ("elsewhere", 1e-5)


@pytest.mark.parametrize(
    "content",
    [
        "hub_token: hf_SecretSecretSecret1: x\n",
        'hub_token: "hf_SecretSecretSecret1\n',
        "seed: 1\n\thub_token: hf_SecretSecretSecret1\n",
        "hub_token: !hf_SecretSecretSecret1 x\n",
    ],
)
def test_a_token_in_a_broken_argument_file_is_not_repeated(tmp_path, capsys, content):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    message = refusal(capsys, file)
    assert "cannot be read" in message and "Secret" not in message and "line " in message


def test_a_token_in_the_wrong_place_is_not_repeated(capsys):
    assert "Secret" not in refusal(capsys, "--push_to_hub", "hf_SecretSecretSecret1")
    assert "Secret" not in refusal(capsys, "--seed", "hf_SecretSecretSecret1")


def test_a_strategy_of_no_may_stand_bare_in_a_yaml_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("save_strategy: no\neval_strategy: no\nload_best_model_at_end: false\n")
    training_args = parse(file)[2]
    assert (training_args.save_strategy.value, training_args.eval_strategy.value) == ("no", "no")


def test_a_key_without_a_value_is_refused_where_that_is_no_default(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("split_seed:\n")
    assert parse(file)[1].split_seed is None
    file.write_text("save_total_limit:\n")
    assert "save_total_limit has no value" in refusal(capsys, file)


@pytest.mark.parametrize("name, content", [("run.json", '{"learningrate": 1}'), ("run.yaml", "learningrate: 1\n")])
def test_an_unknown_key_of_an_argument_file_is_named(tmp_path, capsys, name, content):
    file = tmp_path / name
    file.write_text(content)
    assert "learningrate" in refusal(capsys, file)


@pytest.mark.parametrize(
    "values, named",
    [
        ({"split": "radnom"}, "radnom"),
        ({"protocol": "papr"}, "papr"),
        ({"smiles_form": "Raw"}, "Raw"),
        ({"pooling": "max"}, "max"),
        ({"test_fraction": 2}, "--test_fraction is 2"),
        ({"max_length": "many"}, "many"),
    ],
)
def test_values_of_an_argument_file_are_checked_like_flags(tmp_path, capsys, values, named):
    """`"split": "radnom"` would else be a random split that nobody asked for."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps(values))
    assert named in refusal(capsys, file)


@pytest.mark.parametrize(
    "name, content",
    [
        ("run.json", '{"seed": 1'),
        ("run.json", "[1]"),
        ("run.json", ""),
        ("run.json", b'{"train_file": "caf\xe9.csv"}'),
        ("run.yaml", "seed: [1\nb: {"),
        ("run.yaml", "just text"),
        ("run.yaml", ""),
    ],
)
def test_an_argument_file_that_cannot_be_read_is_refused_with_its_name(tmp_path, capsys, name, content):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(file) in refusal(capsys, file)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_argument_files_of_this_repository_are_read(path):
    """Each says in its first line how it is run."""
    command = path.read_text().splitlines()[0]
    assert command.startswith("#") and f"configs/{path.name}" in command
    arguments = parse_arguments(*run_regression.ARGUMENTS, defaults=DEFAULTS, args=[str(path)])
    assert arguments[-1].output_dir.startswith("outputs/")


def test_flags_after_an_argument_file_hold_over_it(tmp_path):
    file = tmp_path / "run.json"
    file.write_text('{"output_dir": "one", "seed": 3}')
    training_args = parse(file, "--output_dir", "two")[2]
    assert (training_args.output_dir, training_args.seed) == ("two", 3)


def test_an_absent_argument_file_is_refused_with_its_name(tmp_path, capsys):
    assert str(tmp_path / "absent.json") in refusal(capsys, tmp_path / "absent.json")


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "args, named",
    [
        (["--learning_rat", "1e-4"], "--learning_rat"),
        (["--overwrite_cache"], "--overwrite_cache"),
        (["--evaluation_strategy", "epoch"], "--evaluation_strategy"),
        (["data.csv"], "data.csv"),
    ],
    ids=["abbreviation", "another script's", "an older library's", "positional"],
)
def test_an_unknown_flag_is_named(capsys, args, named):
    assert named in refusal(capsys, *args)


@pytest.mark.parametrize("args", [["--token", "hf_secret"], ["--push_to_hub_token=hf_secret"]])
def test_the_value_of_an_unknown_flag_is_not_shown(capsys, args):
    message = refusal(capsys, *args)
    assert args[0].split("=")[0] in message and "hf_secret" not in message


@pytest.mark.parametrize(
    "args, message",
    [
        *(
            ([f"--{name}", value], f"--{name} is {shown}; give a number from 0 up to, not including, 1.")
            for name in ("hidden_dropout_prob", "embedding_dropout_prob", "classifier_dropout_prob")
            for value, shown in (("1", "1.0"), ("-0.1", "-0.1"), ("nan", "nan"))
        ),
        *(
            ([f"--{name}", value], f"--{name} is {shown}; give a number from 0 up to, not including, 1.")
            for name in ("test_fraction", "validation_fraction")
            for value, shown in (("-0.1", "-0.1"), ("1", "1.0"), ("1.5", "1.5"), ("nan", "nan"))
        ),
        *(
            ([f"--{name}", value], f"--{name} is {value}; give a positive number.")
            for name in ("max_length", "max_train_samples", "max_eval_samples", "max_predict_samples")
            for value in ("0", "-5")
        ),
        *(
            ([f"--{name}", value], f"--{name} is {shown}; give a positive number.")
            for name in ("learning_rate", "head_learning_rate")
            for value, shown in (("0", "0.0"), ("-0.1", "-0.1"), ("nan", "nan"), ("inf", "inf"))
        ),
        *(
            (["--layer_rate_decay", value], f"--layer_rate_decay is {shown}; give a number above 0, at most 1.")
            for value, shown in (("0", "0.0"), ("1.1", "1.1"), ("nan", "nan"))
        ),
        (["--protocol", "paper", "--test_fraction", "0"], "chooses the epoch by the test set, and --test_fraction 0"),
        *(
            (["--num_train_epochs", value], f"--num_train_epochs is {shown}; give a positive number.")
            for value, shown in (("0", "0.0"), ("nan", "nan"), ("inf", "inf"))
        ),
        (["--warmup_steps", "inf"], "--warmup_steps is inf; give a number."),
        (
            ["--label_column", "a", "--label_column", "b"],
            "--label_column is given more than once. Name all its values",
        ),
        (
            ["--label_column", "a", "b", "--label_name", "pKa, no unit"],
            "--label_name pKa, no unit is for one label; several are called as their columns.",
        ),
        (["--do_train", "false"], "--do_train false leaves nothing to do."),
        (
            ["--dataset_name", "someone/molecules", "--train_file", "my.csv"],
            "--dataset_name someone/molecules and --train_file my.csv: give one of them.",
        ),
        (["--split", "file"], "--split file needs --split_file, or --test_file (and --validation_file)."),
        (
            ["--split", "random", "--split_file", "s.json"],
            "--split_file go with --split file, not with --split random",
        ),
        (
            ["--split", "scaffold", "--validation_file", "v.csv", "--test_file", "t.csv"],
            "--validation_file and --test_file go with --split file, not with --split scaffold.",
        ),
        (["--split_file", "s.json", "--test_file", "t.csv"], "--test_file"),
        (["--split_seed", "-1"], "--split_seed is -1"),
        (["--split", "radnom"], "invalid choice: 'radnom'"),
        (["--max_length", "many"], "invalid int value: 'many'"),
        (["--eval_strategy", "no"], "--load_best_model_at_end"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_argument_that_cannot_be_used_is_refused_with_its_value_and_what_to_do(capsys, args, message):
    assert message in refusal(capsys, *args)


@pytest.mark.parametrize(
    ("name", "value"), [("hidden_dropout_prob", 0), ("test_fraction", 0.999), ("test_fraction", 0), ("max_length", 1)]
)
def test_values_at_the_edge_are_taken(name, value):
    taken = [getattr(part, name) for part in parse(f"--{name}", value) if hasattr(part, name)]
    assert taken == [value]


def test_max_steps_takes_the_place_of_epochs():
    assert parse("--num_train_epochs", "0", "--max_steps", "3")[2].max_steps == 3


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), 500),
        (("--eval_strategy", "steps", "--eval_steps", "100"), 100),
        (("--eval_strategy", "steps", "--logging_steps", "50"), 50),
        (("--eval_strategy", "steps", "--eval_steps", "100", "--save_steps", "200"), 200),
        (("--eval_strategy", "steps", "--eval_steps", "0.1"), 0.1),
    ],
)
def test_what_is_evaluated_is_saved_by_default(flags, expected):
    assert parse(*flags, "--save_strategy", "steps", "--load_best_model_at_end", "false")[2].save_steps == expected


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "per_device_eval_batch_size", "max_steps",
                                  "gradient_accumulation_steps"])  # fmt: skip
def test_no_batch_and_no_step_are_refused(capsys, name):
    assert f"--{name} is 0; give a positive number" in refusal(capsys, f"--{name}", "0")


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_waits_for_better_metrics_knows_which_are_better(scheduler):
    flags = ("--lr_scheduler_type", scheduler, "--metric_for_best_model")
    assert parse(*flags, "r2")[2].lr_scheduler_kwargs == {"mode": "max"}
    assert not parse(*flags, "mse")[2].lr_scheduler_kwargs
    kept = parse(*flags, "r2", "--lr_scheduler_kwargs", '{"mode": "min", "patience": 3}')[2].lr_scheduler_kwargs
    assert kept == {"mode": "min", "patience": 3}


def test_a_negative_seed_is_refused(capsys):
    assert "--seed is -1" in refusal(capsys, "--seed", "-1")
