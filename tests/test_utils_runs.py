"""What the start and the end of a run do, and what they leave in its folder.

python -m pytest tests/test_utils_runs.py
"""

import importlib.util
import json
import logging
import re
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import DATACLASSES, DEFAULTS, ROOT, parse
from safetensors.torch import save_file

import run_regression
from arguments import (
    EMBEDDED_CHECKPOINT,
    DataTrainingArguments,
    InputError,
    TrainingArguments,
    parse_arguments,
)
from utils_report import write_card
from utils_runs import (
    ARGUMENTS_FILE,
    CARD_MARK,
    TRACKERS,
    UNFINISHED,
    begin_writing,
    clear_run,
    end_writing,
    find_checkpoint,
    is_finished,
    is_out_of_space,
    last_complete_checkpoint,
    member_arguments,
    run_script,
    setup_run,
)


def test_a_run_writes_the_arguments_that_repeat_it(tmp_path):
    """Also a rate that is the library's default: ours is another."""
    flags = ["--train_file", "my.csv", "--learning_rate", "5e-5", "--hub_token", "hf_secret", "--bf16", "--do_train"]
    flags += ["--lr_scheduler_type", "cosine", "--optim", "adafactor", "--output_dir", tmp_path / "run"]
    first = parse(*flags)
    begin_writing(first[2], None)
    text = (tmp_path / "run" / ARGUMENTS_FILE).read_text()
    assert "hf_secret" not in text and json.loads(text)["learning_rate"] == 5e-5
    second = parse(tmp_path / "run" / ARGUMENTS_FILE)
    assert second[:2] == first[:2]
    assert second[2].to_dict() | {"hub_token": None} == first[2].to_dict() | {"hub_token": None}
    end_writing(first[2])


def test_arguments_of_a_member_and_of_an_evaluation_replace_none(tmp_path):
    training_args, _ = arguments_for(tmp_path / "run", do_train=True)
    begin_writing(training_args, None)
    end_writing(training_args)
    text = (tmp_path / "run" / ARGUMENTS_FILE).read_text()
    member_args = member_arguments(training_args, 0)
    begin_writing(member_args, None)
    assert not (tmp_path / "run" / "member-0" / ARGUMENTS_FILE).exists()
    evaluation, _ = arguments_for(tmp_path / "run", do_eval=True, seed=5)
    begin_writing(evaluation, None)
    assert (tmp_path / "run" / ARGUMENTS_FILE).read_text() == text


# ---------------------------------------------------------------------------------------------------- start of a run


def arguments_for(folder, **flags):
    flags = {"output_dir": folder, "use_cpu": True, **flags}
    _, data_args, training_args = parse(*(f"--{name}={value}" for name, value in flags.items()))
    return training_args, data_args


def checkpoint(folder, step, state="{}"):
    """A checkpoint folder as the trainer leaves it; without a state it was interrupted."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"weight": torch.ones(3)}, path / "model.safetensors")
    torch.save({"last_epoch": 1}, path / "scheduler.pt")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_a_new_folder_starts_a_new_run(tmp_path):
    assert find_checkpoint(*arguments_for(tmp_path / "new")) is None
    assert not (tmp_path / "new").exists()
    assert find_checkpoint(*arguments_for(tmp_path)) is None  # an empty one


def test_a_finished_run_is_refused_with_the_flag_that_replaces_it(tmp_path):
    checkpoint(tmp_path, 10)
    (tmp_path / "all_results.json").write_text("{}")
    with pytest.raises(InputError, match="--overwrite_output_dir") as error:
        find_checkpoint(*arguments_for(tmp_path))
    assert str(tmp_path) in str(error.value) and "--output_dir" in str(error.value)
    assert "--resume_from_checkpoint" not in str(error.value)


def test_an_interrupted_run_is_refused_with_the_flags_that_continue_and_replace_it(tmp_path):
    """Killed while it evaluates, a run has results of its training already."""
    training_args, _ = arguments_for(tmp_path)
    begin_writing(training_args, None)
    checkpoint(tmp_path, 10)
    (tmp_path / "all_results.json").write_text("{}")
    with pytest.raises(InputError, match="interrupted") as error:
        find_checkpoint(*arguments_for(tmp_path))
    for flag in ("--resume_from_checkpoint true", "--overwrite_output_dir", "--output_dir"):
        assert flag in str(error.value)


@pytest.mark.parametrize("state", [None, '{"global_step": 1'])
def test_a_run_interrupted_before_its_first_whole_checkpoint_cannot_be_continued(tmp_path, state):
    checkpoint(tmp_path, 10, state)
    with pytest.raises(InputError, match="not empty") as error:
        find_checkpoint(*arguments_for(tmp_path))
    assert "--resume_from_checkpoint" not in str(error.value)


@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_starts_a_new_run_and_touches_nothing_yet(tmp_path, finished):
    kept = checkpoint(tmp_path, 10)
    if finished:
        (tmp_path / "all_results.json").write_text("{}")
    assert find_checkpoint(*arguments_for(tmp_path, overwrite_output_dir=True)) is None
    assert (kept / "trainer_state.json").exists()


@pytest.mark.parametrize("word", ["true", "True", "yes", "1"])
def test_resume_takes_the_newest_complete_checkpoint(tmp_path, word):
    """10 is newer than 9; 11 has no state, the state of 12 was cut, and the others are no checkpoints of a trainer."""
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, state=None)
    checkpoint(tmp_path, 12, state='{"global_step": 12, "log_history": [')
    checkpoint(tmp_path, 13, state="")
    checkpoint(tmp_path, "99-old")
    checkpoint(tmp_path, "best")
    assert last_complete_checkpoint(tmp_path) == newest
    assert find_checkpoint(*arguments_for(tmp_path, resume_from_checkpoint=word)) == str(newest)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "config.json"])
def test_a_checkpoint_with_a_file_that_was_cut_counts_as_incomplete(tmp_path, name):
    older, newest = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    torch.save({"state": torch.ones(9)}, newest / "optimizer.pt")
    torch.save({"cpu": torch.ones(9)}, newest / "rng_state.pth")
    (newest / "config.json").write_text('{"hidden_size": 16}')
    assert last_complete_checkpoint(tmp_path) == newest
    whole = (newest / name).read_bytes()
    (newest / name).write_bytes(whole[: len(whole) // 2])
    assert last_complete_checkpoint(tmp_path) == older


def test_the_folder_of_a_run_is_no_checkpoint_and_the_one_in_it_is_named(tmp_path):
    """It holds weights and a state, but neither optimizer nor schedule: both would start anew without a word."""
    newest = checkpoint(tmp_path, 10)
    for name in ("model.safetensors", "trainer_state.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"no complete checkpoint in {tmp_path}. Pass {newest}, or true"):
        find_checkpoint(*arguments_for(tmp_path / "new", resume_from_checkpoint=tmp_path))


def test_a_checkpoint_of_another_run_is_not_gone_on_with_in_this_folder(tmp_path):
    """Its settings would not be compared, and what lies in the folder would be replaced."""
    other = checkpoint(tmp_path / "other", 10)
    with pytest.raises(InputError, match=f"{other} is of a run in {tmp_path / 'other'}. Pass that as --output_dir"):
        find_checkpoint(*arguments_for(tmp_path / "run", resume_from_checkpoint=other))


def test_resume_in_an_argument_file_may_be_a_truth_value(tmp_path):
    newest = checkpoint(tmp_path / "run", 3)
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": True}))
    _, data_args, training_args = parse(file)
    assert find_checkpoint(training_args, data_args) == str(newest)


def test_a_reporter_that_is_not_installed_is_named(tmp_path):
    missing = [name for name in TRACKERS if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all reporters are installed here")
    training_args, data_args = arguments_for(tmp_path / "run", report_to=missing[0])
    with pytest.raises(InputError, match=f"--report_to {missing[0]} needs a package: pip install {missing[0]}"):
        setup_run(training_args, data_args)


def test_resume_takes_the_checkpoint_that_is_named(tmp_path):
    older = checkpoint(tmp_path / "run", 9)
    checkpoint(tmp_path / "run", 10)
    training_args, data_args = arguments_for(tmp_path / "run", resume_from_checkpoint=older)
    assert find_checkpoint(training_args, data_args) == str(older)


@pytest.mark.parametrize("word", ["false", "False", "no", "0"])
def test_resume_may_be_turned_off(tmp_path, word):
    assert find_checkpoint(*arguments_for(tmp_path / "new", resume_from_checkpoint=word)) is None


@pytest.mark.parametrize("state", [None, '{"global_step": 1'])
def test_resume_without_a_complete_checkpoint_is_refused(tmp_path, state):
    folder = checkpoint(tmp_path, 10, state)
    for value, named in (("true", tmp_path), (folder, folder), (tmp_path / "absent", tmp_path / "absent")):
        with pytest.raises(InputError, match="no complete checkpoint in .*--resume_from_checkpoint") as error:
            find_checkpoint(*arguments_for(tmp_path, resume_from_checkpoint=value))
        assert str(named) in str(error.value)


@pytest.mark.parametrize("in_pieces", [True, False])
def test_a_run_of_one_model_is_not_resumed_as_one_of_several_nor_the_other_way(tmp_path, in_pieces):
    """The advice leads on: to leave the flag out would end at the advice to give it."""
    checkpoint(tmp_path if in_pieces else tmp_path / "member-0", 5)
    (tmp_path / ("." if in_pieces else "member-0") / UNFINISHED).touch()
    with pytest.raises(InputError, match=r"begun with other flags, such as --num_seeds \(arguments.json has them\)"):
        find_checkpoint(*arguments_for(tmp_path, resume_from_checkpoint="true"), in_pieces=in_pieces)


def test_a_run_of_several_models_is_resumed_with_all(tmp_path):
    inside = checkpoint(tmp_path / "member-0", 5)
    (tmp_path / "member-0" / UNFINISHED).touch()
    with pytest.raises(InputError, match=f"pass --resume_from_checkpoint true, not {inside}"):
        find_checkpoint(*arguments_for(tmp_path, resume_from_checkpoint=inside), in_pieces=True)
    arguments = arguments_for(tmp_path, resume_from_checkpoint="true")
    assert find_checkpoint(*arguments, in_pieces=True) == str(tmp_path)
    with pytest.raises(InputError, match="no run to resume"):
        find_checkpoint(*arguments_for(tmp_path / "new", resume_from_checkpoint="true"), in_pieces=True)


def test_resume_into_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(InputError, match="no complete checkpoint"):
        find_checkpoint(*arguments_for(tmp_path / "new", resume_from_checkpoint="true"))


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_folder_that_is_a_file_is_refused(tmp_path, overwrite):
    file = tmp_path / "results"
    file.write_text("mine")
    with pytest.raises(InputError, match="is a file.*--output_dir"):
        find_checkpoint(*arguments_for(file, overwrite_output_dir=overwrite))
    assert file.read_text() == "mine"


@pytest.fixture
def log_level():
    """Sets the project's log level back to what it was before a run."""
    logger = logging.getLogger("molformer")
    level = logger.level
    yield logger
    logger.setLevel(level)


def test_the_start_of_a_run_seeds_and_logs(tmp_path, log_level, caplog):
    assert setup_run(*arguments_for(tmp_path / "new", seed=3)) is None
    drawn = torch.rand(3)
    transformers.set_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    assert f"output folder {tmp_path / 'new'}" in caplog.text
    assert log_level.level == logging.INFO


def test_the_log_level_is_the_users(tmp_path, log_level):
    setup_run(*arguments_for(tmp_path / "new", log_level="error"))
    assert log_level.level == logging.ERROR


def test_the_start_of_a_run_returns_the_checkpoint_to_resume(tmp_path, log_level):
    newest = checkpoint(tmp_path, 3)
    assert setup_run(*arguments_for(tmp_path, resume_from_checkpoint="true")) == str(newest)


def test_a_launcher_whose_processes_would_train_separately_is_refused(tmp_path, log_level, monkeypatch):
    """As torchrun starts them on a CPU without --use_cpu."""
    training_args, data_args = arguments_for(tmp_path / "new")
    assert training_args.world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE is 2.*--use_cpu"):
        setup_run(training_args, data_args)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert setup_run(training_args, data_args) is None


# --------------------------------------------------------------------------------------------------- end of an old run


RUN_FILES = [
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "predict_results.json",
    "trainer_state.json",
    "splits.json",
    "predictions.csv",
    "parity.png",
    "loss_curves.png",
]


USER_FILES = [
    "notes.txt",
    "my_molecules.csv",
    "figure.png",
    "figures/parity.png",
    "my_results.json",
    "splits-old.json",
    "member-list/of-a-club.csv",
    "finetune-esol/model.safetensors",
    "merged/tables.csv",
]


def test_clearing_a_run_removes_its_own_files_and_no_other(tmp_path):
    for step in (5, 10):
        checkpoint(tmp_path, step)
    for name in ("best", "10-copy", "x1"):
        checkpoint(tmp_path, name)
    pieces = ["member-0/config.json", "finetune-none/settings_key", "influence_state.safetensors"]
    card = f"---\ntags:\n- molformer\n---\n{CARD_MARK}"
    for name in [*RUN_FILES, *USER_FILES, *pieces, "to_push/README.md"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(card if name.endswith(".md") and name not in USER_FILES else "{}")
    clear_run(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    kept = {
        f"checkpoint-{name}/{file}"
        for name in ("best", "10-copy", "x1")
        for file in ("model.safetensors", "scheduler.pt", "trainer_state.json")
    }
    assert left == {*USER_FILES, *kept}
    assert not (tmp_path / "checkpoint-5").exists()


def test_files_of_the_users_that_are_called_like_those_of_a_run_stay(tmp_path):
    """Molecules beside no influence scores, a README that is no card, beside which the card then lies, and folders."""
    mine = {"test.csv": "mine", "validation.csv": "mine", "README.md": "---\ntitle: notes\n---\n# my notes"}
    mine |= {"member-1/thesis.txt": "", "checkpoint-3/mine": "", "to_push/draft.txt": "", "merged/config.json": "{}"}
    mine |= {"merged/arguments.json": "{}"}  # a run that was called so
    for name, text in {
        **mine,
        "arguments.json": "{}",
        "all_results.json": "{}",
        "checkpoint-4/config.json": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    clear_run(tmp_path)
    write_card(tmp_path, "regression")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {*mine, "MODEL_CARD.md"} and not (tmp_path / "checkpoint-4").exists()
    assert {name: (tmp_path / name).read_text() for name in mine} == mine
    write_card(tmp_path, "regression")
    clear_run(tmp_path)
    assert not (tmp_path / "MODEL_CARD.md").exists()


OVERWRITE, PREDICT = "--overwrite_output_dir", "--do_predict"


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        (["predictions.csv", "config.json"], [OVERWRITE], "no run of these scripts, but predictions.csv, config.json"),
        (["predictions.csv"], [PREDICT], "no run of these scripts, but predictions.csv, which one would replace"),
        (["member-1/thesis.txt", "parity.png"], [OVERWRITE], "no run of these scripts, but parity.png"),
        (["arguments.json"], [], f"Replace the run in it with {OVERWRITE}"),
        (["notes.txt"], [], f"Write beside what is in it with {OVERWRITE}"),
        (["config.json"], [PREDICT], f"Write beside what is in it with {OVERWRITE}"),
        (["arguments.json", "predictions.csv"], [PREDICT], f"Replace predictions.csv in it with {OVERWRITE}"),
        (["notes.txt", "README.md", "test.csv"], [OVERWRITE], None),
        (["test.csv", "model.safetensors"], [PREDICT, OVERWRITE], None),
        (["arguments.json"], [OVERWRITE], None),
        (["checkpoint-7/config.json", "parity.png"], [OVERWRITE], None),
        (["unfinished", ".lock"], [OVERWRITE], None),
        (["config.json"], [PREDICT, OVERWRITE], None),
        ([".lock"], [], None),
    ],
)
def test_only_a_folder_that_holds_a_run_is_replaced(files, flags, message, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    args = [*flags, "--output_dir", str(tmp_path)]
    data_args, training_args = parse_arguments(DataTrainingArguments, TrainingArguments, args=args)
    if message is None:
        assert find_checkpoint(training_args, data_args) is None
    else:
        with pytest.raises(InputError, match=message):
            find_checkpoint(training_args, data_args)


@pytest.mark.parametrize("flags", [(), ("--do_predict",)])
@pytest.mark.parametrize("name", ["test.csv", "model.safetensors"])
def test_a_users_files_are_not_replaced_by_those_of_a_selection(name, flags, tmp_path):
    (tmp_path / name).touch()
    args = [OVERWRITE, *flags, "--output_dir", str(tmp_path)]
    data_args, training_args = parse_arguments(DataTrainingArguments, TrainingArguments, args=args)
    with pytest.raises(InputError, match=f"no run of these scripts, but {name}"):
        find_checkpoint(training_args, data_args, in_pieces=True)


def test_the_embedded_checkpoint_is_not_replaced():
    args = [OVERWRITE, "--output_dir", EMBEDDED_CHECKPOINT]
    data_args, training_args = parse_arguments(DataTrainingArguments, TrainingArguments, args=args)
    with pytest.raises(InputError, match="is the embedded checkpoint"):
        find_checkpoint(training_args, data_args)


def test_clearing_a_folder_that_does_not_exist_does_nothing(tmp_path):
    clear_run(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stale", [True, False], ids=["over an older run", "in an empty folder"])
def test_a_run_keeps_the_list_of_the_molecules_that_it_dropped(tmp_path, log_level, stale):
    config = {"model_type": "molformer", "vocab_size": 2362, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 16, "num_random_features": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = [f"{'C' * carbons}O,{carbons}" for carbons in range(1, 21)]
    (tmp_path / "t.csv").write_text("\n".join(["SMILES,label", *rows, "C1CC,3"]))
    folder = tmp_path / "run"
    folder.mkdir()
    if stale:
        (folder / "dropped_molecules.csv").write_text("row,smiles,reason\n99,X,of an older run\n")
        (folder / "arguments.json").write_text("{}")
    flags = {"config_name": tmp_path / "config.json", "train_file": tmp_path / "t.csv", "output_dir": folder}
    flags |= {
        "invalid_smiles": "drop",
        "overwrite_output_dir": True,
        "do_train": True,
        "max_steps": 1,
        "use_cpu": True,
    }
    flags |= {"disable_tqdm": True}
    flags = [f"--{name}={value}" for name, value in flags.items()]
    run_regression.main(*parse_arguments(*run_regression.ARGUMENTS, defaults=DEFAULTS, args=flags))
    assert (folder / "train_results.json").exists()
    lines = (folder / "dropped_molecules.csv").read_text().splitlines()
    assert lines == ["source,row,smiles,reason", f"{tmp_path / 't.csv'},20,C1CC,do not parse as SMILES"]


def test_a_run_is_marked_unfinished_until_it_ends(tmp_path):
    training_args, _ = arguments_for(tmp_path / "run")
    begin_writing(training_args, None)
    assert (tmp_path / "run" / UNFINISHED).exists()
    (tmp_path / "run" / "predictions.csv").write_text("kept by a resumed run")
    begin_writing(training_args, "checkpoint-5")
    assert (tmp_path / "run" / "predictions.csv").exists()
    end_writing(training_args)
    assert not (tmp_path / "run" / UNFINISHED).exists()
    begin_writing(training_args, None)
    assert not (tmp_path / "run" / "predictions.csv").exists()


def test_a_run_that_was_written_meanwhile_is_not_replaced(tmp_path):
    """Two runs that found the folder empty: the second to begin writing is refused, also when the first has ended."""
    first, second = (arguments_for(tmp_path / "run", do_train=True) for _ in range(2))
    assert find_checkpoint(*first) is None and find_checkpoint(*second) is None
    begin_writing(first[0], None)
    (tmp_path / "run" / "all_results.json").write_text("{}")
    end_writing(first[0])
    with pytest.raises(InputError, match="Another run has written to .*run since this one began"):
        begin_writing(second[0], None)
    assert is_finished(tmp_path / "run") and not (tmp_path / "run" / UNFINISHED).exists()


BY_STEPS = ["--eval_strategy", "steps", "--save_strategy", "steps"]


@pytest.mark.parametrize(("flags", "other", "same"), [
    ([*BY_STEPS, "--logging_steps", "5"], ["--logging_steps", "7"], ["--logging_steps", "5"]),
    (["--logging_steps", "5"], None, ["--logging_steps", "7"]),
])  # fmt: skip
def test_a_resumed_run_evaluates_and_saves_at_the_same_steps(tmp_path, flags, other, same):
    """They follow the log by default, whose steps are free where it is the log alone."""
    flags = [*flags, "--output_dir", tmp_path, "--do_train"]
    begin_writing(parse(*flags)[2], None)
    begin_writing(parse(*flags, *same)[2], "checkpoint-5")
    if other is not None:
        with pytest.raises(InputError, match="--eval_steps 5, not 7; --save_steps 5, not 7"):
            begin_writing(parse(*flags, *other)[2], "checkpoint-5")


HOLDER = "import sys; from utils_runs import lock_folder; lock_folder(sys.argv[1]); print('held', flush=True); input()"


def test_a_second_run_on_a_folder_refuses_until_the_first_one_is_dead(tmp_path):
    training_args, data_args = arguments_for(tmp_path, overwrite_output_dir=True, do_train=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    for refused in (lambda: setup_run(training_args, data_args), lambda: begin_writing(training_args, None)):
        with pytest.raises(InputError, match="Another run is writing"):
            refused()
    holder.kill()
    holder.wait()
    assert setup_run(training_args, data_args) is None
    begin_writing(training_args, None)
    end_writing(training_args)
    assert not (tmp_path / UNFINISHED).exists()


def test_a_run_does_not_replace_the_checkpoint_that_it_starts_from(tmp_path):
    training_args, _ = arguments_for(tmp_path)
    source = checkpoint(tmp_path, 10)
    with pytest.raises(InputError, match="would replace"):
        begin_writing(training_args, None, str(source))
    assert source.exists()


@pytest.mark.parametrize(("name", "kept"), [("test.csv", True), ("member-0/a.csv", True), ("mine.csv", False)])
def test_a_run_does_not_replace_the_data_that_it_reads(tmp_path, name, kept):
    path = tmp_path / name
    (tmp_path / "member-0").mkdir()
    (tmp_path / "member-0" / "config.json").touch()
    path.parent.mkdir(exist_ok=True)
    path.write_text("SMILES,label\n")
    training_args, _ = arguments_for(tmp_path)
    for flag, value in (("test_file", str(path)), ("exclude_file", [str(tmp_path / "no.csv"), str(path)])):
        training_args.run_values = {flag: value, "split_file": str(tmp_path / "splits.json")}
        if kept:
            with pytest.raises(InputError, match=f"--{flag} .*{path} .* would be replaced"):
                begin_writing(training_args, None)
        else:
            begin_writing(training_args, None)
        assert path.exists()
    (tmp_path / "splits.json").write_text("{}")
    training_args.run_values = {"split_file": str(tmp_path / "splits.json")}
    with pytest.raises(InputError, match="--split_file .*splits.json .* would be replaced"):
        begin_writing(training_args, None)


def test_evaluation_alone_removes_no_training_results(tmp_path):
    training_args, _ = arguments_for(tmp_path)
    training_args.do_train = False
    (tmp_path / "train_results.json").write_text("{}")
    begin_writing(training_args, None, str(tmp_path))
    assert (tmp_path / "train_results.json").exists()


# --------------------------------------------------------------------------------------------------- running a script


def run(monkeypatch, folder, main):
    monkeypatch.setattr(sys, "argv", ["run_x.py", "--seed", "5"])
    run_script(main, DATACLASSES, {"output_dir": str(folder)}, "What it does.")


def test_a_script_gets_its_parsed_arguments(monkeypatch, tmp_path):
    seen = []
    run(monkeypatch, tmp_path, lambda *arguments: seen.extend(arguments))
    assert [type(arguments) for arguments in seen] == list(DATACLASSES)
    assert (seen[2].output_dir, seen[2].seed) == (str(tmp_path), 5)


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), KeyboardInterrupt()])
def test_errors_that_the_user_cannot_correct_keep_their_traceback(monkeypatch, tmp_path, error):
    def main(*arguments):
        raise error

    with pytest.raises(type(error)) as caught:
        run(monkeypatch, tmp_path, main)
    assert caught.value is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "must not be written .*Give another --output_dir, or allow it and"),
        (OSError(30, "Read-only file system"), "must not be written"),
        (OSError(28, "No space left on device"), "No space is left to write to .*Make room;"),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "No space is left",
        ),
    ],
)
@pytest.mark.parametrize(("begun", "advice"), [(False, "start again"), (True, "--resume_from_checkpoint true")])
def test_a_folder_that_cannot_be_written_is_told(monkeypatch, tmp_path, caplog, error, message, begun, advice):
    def main(*arguments):
        raise error

    if begun:
        checkpoint(tmp_path, 10)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path, main)
    assert ended.value.code == 1 and re.search(message, caplog.text) and advice in caplog.text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/else/where/my.csv", "/else/where/my.csv must not be read or written .Permission denied.. Allow it"),
        ("{}/splits.json", "{} must not be written"),
        ("{}/..", "{} must not be written"),  # where it was to be made
    ],
)
def test_a_file_elsewhere_that_must_not_be_read_is_no_fault_of_the_output_folder(
    monkeypatch, tmp_path, caplog, path, message
):
    def main(*arguments):
        raise PermissionError(13, "Permission denied", path.format(tmp_path))

    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path, main)
    assert re.search(message.format(tmp_path), caplog.text)


SCRIPT = """
from arguments import DataTrainingArguments, InputError, ModelArguments, TrainingArguments
from utils_runs import run_script, setup_run

def main(model_args, data_args, training_args):
    if data_args.overwrite_output_dir:
        setup_run(training_args, data_args)  # with logging set up, and without
    raise InputError("Column 'exp' is not in t.csv. Pass --label_column.")

run_script(main, (ModelArguments, DataTrainingArguments, TrainingArguments), {"output_dir": "x"}, None)
"""


@pytest.mark.parametrize("flags", [[], ["--overwrite_output_dir"]], ids=["before logging is set up", "after"])
def test_bad_input_ends_a_script_as_one_line_and_exit_status_2(tmp_path, flags):
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, *flags, "--output_dir", tmp_path / "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].endswith("Column 'exp' is not in t.csv. Pass --label_column.")
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
    assert not (tmp_path / "x").exists()


def test_an_output_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        find_checkpoint(*arguments_for(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662"), True),
        (RuntimeError("I/O error: File too large (os error 27)"), True),
        (OSError(13, "Permission denied"), False),
        (RuntimeError("[enforce fail at inline_container.cc:145] . PytorchStreamReader failed reading"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_of_a_full_disk_are_told_from_others(error, expected):
    assert is_out_of_space(error) is expected
