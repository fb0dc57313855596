"""A run of a script: its start and end, its output folder, and what another run may do with that.

`run_script` calls `main` and ends what the user can correct in one line; `setup_run` does logging, the seed and the
output folder.
"""

import copy
import errno
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from transformers import set_seed

from arguments import EMBEDDED_CHECKPOINT, ROOT, InputError, TrainingArguments, parse_arguments


UNFINISHED = "unfinished"  # an empty file that is there while a run is
# what a run writes into its folder, beside checkpoints and the folders of RUN_PIECES
RUN_FILES = """
    all_results.json train_results.json eval_results.json predict_results.json trainer_state.json
    arguments.json predict_arguments.json README.md MODEL_CARD.md splits.json predictions.csv dropped_molecules.csv
    residuals.png worst_molecules.png parity.png loss_curves.png
    config.json model.safetensors adapter_config.json adapter_model.safetensors trained_parameters.json
    influence_scores.csv influence.json merged_train.csv validation.csv test.csv
    influence_scores.png influence_convergence.png influence_selection.png
""".split()
MERGED_FILES = {"train": "merged_train.csv", "validation": "validation.csv", "test": "test.csv"}  # of run_influence.py
CARD_FILE, OWN_CARD_FILE = "README.md", "MODEL_CARD.md"  # the second beside a README.md of the user's
CARD_MARK = "- Command: `python run_"  # a line of every card
STAGED = "to_push"  # a folder with what a push that failed was to send
EVALUATION_FILES = """
    predictions.csv splits.json eval_results.json predict_results.json dropped_molecules.csv
    residuals.png worst_molecules.png parity.png
""".split()  # of these an evaluation writes
CHECKPOINT_FILES = """
    config.json adapter_config.json model.safetensors adapter_model.safetensors trained_parameters.json
    tokenizer.json tokenizer_config.json training_args.bin optimizer.pt scheduler.pt rng_state.pth trainer_state.json
""".split()  # one of which the trainer writes first into checkpoint-N
INPUT_FILES = ("train_file", "validation_file", "test_file", "external_file", "split_file", "exclude_file")
RUN_PIECES = r"member-\d+|finetune-\w+|influence_state\.safetensors(\.part)?"  # of runs that train several models
SETTINGS_KEY = "settings_key"  # a file in every folder finetune-…
ARGUMENTS_FILE = "arguments.json"
LOCK_FILE = ".lock"
LOCKS = {}  # of the folders that this process writes
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow", "swanlab", "clearml", "dvclive")  # called as their packages
# what the result of a training depends on
TRAINING_SETTINGS = """seed data_seed learning_rate head_learning_rate layer_rate_decay num_train_epochs
    max_steps weight_decay optim per_device_train_batch_size gradient_accumulation_steps train_sampling_strategy
    lr_scheduler_type lr_scheduler_kwargs warmup_steps max_grad_norm adam_beta1 adam_beta2 adam_epsilon optim_args
    neftune_noise_alpha label_smoothing_factor dataloader_drop_last bf16 fp16 tf32 eval_strategy eval_steps
    eval_delay save_strategy save_steps metric_for_best_model greater_is_better load_best_model_at_end""".split()
# what it does not depend on, beside the library's other arguments
FREE_SETTINGS = """output_dir cache_dir preprocessing_num_workers overwrite_cache ignore_split_mismatch label_name
    predict_augment merge_adapter base_hub_name controls""".split()

logger = logging.getLogger("molformer.runs")


def run_script(main, dataclasses, defaults, description):
    """Parses the command line and runs `main`; what the user can correct ends as one line, not as a traceback."""
    arguments = parse_arguments(*dataclasses, defaults=defaults, description=description)
    if hasattr(sys.stdout, "reconfigure"):  # a locale without ² is not to end a run
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        main(*arguments)
        if torch.distributed.is_initialized():  # left to the interpreter's end its threads may abort the process
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except InputError as error:
        logger.error("%s", error)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, RuntimeError, SafetensorError) as error:
        folder = arguments[-1].output_dir
        if not (is_forbidden(error) or is_out_of_space(error)):
            raise
        begun = last_complete_checkpoint(folder) is not None or run_pieces(folder)
        advice = "go on with --resume_from_checkpoint true" if begun else "start again"
        if is_forbidden(error) and is_elsewhere(error, folder):
            logger.error("%s must not be read or written (%s). Allow it, or name another, and %s.", error.filename,
                         error.strerror, advice)  # fmt: skip
        elif is_forbidden(error):
            logger.error("%s must not be written (%s). Give another --output_dir, or allow it and %s.", folder, error,
                         advice)  # fmt: skip
        else:
            logger.error("No space is left to write to %s (%s). Make room; %s.", folder, error, advice)
        sys.exit(1)


def is_forbidden(error):
    """Whether an error says that a file or folder must not be written."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return True
    return any(f"os error {code})" in str(error) for code in (errno.EACCES, errno.EPERM, errno.EROFS))


def is_elsewhere(error, folder):
    """Whether an error names a file that is neither in a folder nor one of those that the folder is to lie in."""
    if not isinstance(getattr(error, "filename", None), str):
        return False
    path, folder = Path(os.path.abspath(error.filename)), Path(os.path.abspath(folder))
    return path not in (folder, *folder.parents) and folder not in path.parents


def is_out_of_space(error):
    """Whether an error of writing says that disk, quota or file-size limit is exhausted."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    # what safetensors (Rust) and torch.save (C++) make of it; reading a broken file also fails in inline_container.cc
    text = str(error)
    if "inline_container.cc" in text or "file write failed" in text:
        return "PytorchStreamReader" not in text
    return any(f"os error {code})" in text for code in codes)


def setup_run(training_args, data_args=None, in_pieces=False):
    """Starts a run: logging, seed, output folder. Returns the checkpoint to resume from, or `None`.

    Args:
        data_args (`DataTrainingArguments`, *optional*): without it the output folder is not looked into.
        in_pieces (`bool`): whether the run trains several models, in folders of their own; the output folder is then
            itself what is returned.

    Raises:
        InputError: if the output folder holds a run and no flag says what to do with it; if a checkpoint to resume
            from is not there; if several processes were launched that would train separately.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    level = training_args.get_process_log_level()
    if training_args.log_level == "passive":
        level = logging.INFO if training_args.should_log else logging.WARNING
    logging.getLogger("molformer").setLevel(level)  # the parent of this project's loggers
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and training_args.world_size == 1:
        raise InputError(
            f"WORLD_SIZE is {launched}, but this process trains alone: {launched} separate trainings would write one "
            "folder. On CPU add --use_cpu to the script's flags; otherwise start the script without a launcher."
        )
    if training_args.use_cpu and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise InputError("FSDP needs GPUs. On CPUs launch with configs/accelerate/ddp.yaml.")
    for name in training_args.report_to:
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise InputError(f"--report_to {name} needs a package: pip install {name}, or leave the flag out.")
    if training_args.n_gpu > 1:  # the library would copy the model to each and cut every tensor of a batch
        logger.info("One of %d GPUs is used; accelerate launch uses all of them", training_args.n_gpu)
        training_args._n_gpu = 1
    logger.info(
        "Device %s, processes %d, bf16 %s, output folder %s",
        training_args.device,
        training_args.world_size,
        training_args.bf16,
        training_args.output_dir,
    )
    if training_args.push_when_done:
        from utils_report import check_push

        check_push(training_args)
    set_seed(training_args.seed)
    return None if data_args is None else find_checkpoint(training_args, data_args, in_pieces)


def project_path(path):
    """Returns a path as seen from this project's folder; `None` if it lies elsewhere."""
    path = Path(path).resolve()
    return path.relative_to(ROOT).as_posix() if ROOT in path.parents else None


def says_true(value):
    """Whether --resume_from_checkpoint means the newest checkpoint, and not a folder of that name."""
    return str(value).lower() in ("true", "yes", "1")


def find_checkpoint(training_args, data_args, in_pieces=False):
    """Returns the checkpoint folder that --resume_from_checkpoint means, or `None` for a new run."""
    output_dir = Path(training_args.output_dir)
    if training_args.should_save and (output_dir / UNFINISHED).exists():
        lock_folder(output_dir)  # refuses if the run is not interrupted, but going on
    resume = training_args.resume_from_checkpoint
    if resume is not None and str(resume).lower() not in ("false", "no", "0"):
        last = last_complete_checkpoint(output_dir)
        if last is not None if in_pieces else last is None and run_pieces(output_dir):
            raise InputError(
                f"The run in {output_dir} was begun with other flags, such as --num_seeds ({ARGUMENTS_FILE} has "
                "them). Give these to go on with it, replace it with --overwrite_output_dir in place of "
                "--resume_from_checkpoint, or give another --output_dir."
            )
        if in_pieces:
            if not run_pieces(output_dir):
                raise InputError(f"There is no run to resume in {output_dir}. Leave --resume_from_checkpoint out.")
            if not says_true(resume):
                raise InputError(
                    f"The run in {output_dir} trains several models, and goes on with all: pass "
                    f"--resume_from_checkpoint true, not {resume}."
                )
            return str(output_dir)
        path = last if says_true(resume) else Path(resume)
        if path is None or not _is_complete(path):
            inside = None if path is None else last_complete_checkpoint(path)
            advice = "Leave --resume_from_checkpoint out" if inside is None else f"Pass {inside}, or true"
            raise InputError(f"There is no complete checkpoint in {path or output_dir}. {advice}.")
        place = path.resolve().parent
        if place != output_dir.resolve():  # the settings would not be compared, and the folder's files would go
            raise InputError(
                f"The checkpoint {path} is of a run in {place}. Pass that as --output_dir to go on with it, or leave "
                "--resume_from_checkpoint out."
            )
        logger.info("Resuming from %s", path)
        return str(path)
    for path in (output_dir, *output_dir.parents):
        if path.is_file():
            raise InputError(f"The output folder {output_dir} cannot be: {path} is a file. Give another --output_dir.")
    if not output_dir.is_dir() or all(path.name == LOCK_FILE for path in output_dir.iterdir()):
        training_args.expects_no_run = True
        return None
    if output_dir.resolve() == Path(EMBEDDED_CHECKPOINT):
        raise InputError(f"--output_dir {output_dir} is the embedded checkpoint. Give another --output_dir.")
    own = holds_run(output_dir)
    found = [] if own else users_files(output_dir, training_args.do_train or in_pieces, in_pieces)
    if found:
        raise InputError(
            f"The output folder {output_dir} holds no run of these scripts, but {', '.join(found)}, which one would "
            "replace. Give another --output_dir."
        )
    if data_args.overwrite_output_dir:
        return None
    begun = last_complete_checkpoint(output_dir) is not None or run_pieces(output_dir)
    if begun and (output_dir / UNFINISHED).exists():
        raise InputError(
            f"The output folder {output_dir} holds an interrupted run. Continue it with --resume_from_checkpoint "
            "true, replace it with --overwrite_output_dir, or give another --output_dir."
        )
    replaced = [name for name in EVALUATION_FILES if (output_dir / name).exists()]
    what = f"Replace {', '.join(replaced)} in it" if replaced else "Write beside what is in it"
    what = "Replace the run in it" if (training_args.do_train or in_pieces) and own else what
    raise InputError(
        f"The output folder {output_dir} is not empty. {what} with --overwrite_output_dir, or give another "
        "--output_dir."
    )


def holds_run(output_dir):
    """Returns whether a folder has what only a run of these scripts leaves in it."""
    marks = (ARGUMENTS_FILE, f"predict_{ARGUMENTS_FILE}", "all_results.json", UNFINISHED, SETTINGS_KEY)
    pieces = [path for path in output_dir.glob("*") if is_checkpoint(path) or is_piece(path)]
    return bool(pieces) or any((output_dir / name).exists() for name in marks)


def users_files(output_dir, replaces, in_pieces):
    """Returns the names of the files in a folder without a run that one which `replaces` an earlier run would."""
    names = RUN_FILES if replaces else EVALUATION_FILES
    spared = {CARD_FILE, OWN_CARD_FILE} | (set() if in_pieces else set(MERGED_FILES.values()))
    return [name for name in names if name not in spared and (output_dir / name).exists()]


def run_pieces(output_dir):
    """Returns the folders of the models that a run trains one after the other, as far as they are there."""
    return [path for path in Path(output_dir).glob("*") if is_piece(path)]


def is_piece(path):
    """Returns whether a path is one that a run of several models has made, and not the user's of a like name."""
    if not re.fullmatch(RUN_PIECES, path.name):
        return False
    marks = {"finetune": (SETTINGS_KEY,), "member": (UNFINISHED, LOCK_FILE, "config.json", "all_results.json")}
    return any((path / name).exists() for name in marks.get(path.name.split("-")[0], (".",)))


def is_checkpoint(path):
    """Returns whether a folder `checkpoint-N` is the trainer's, whole or not."""
    if not re.fullmatch(r"checkpoint-\d+", path.name) or not path.is_dir():
        return False
    names = {file.name for file in path.iterdir()}
    return not names or bool(names & set(CHECKPOINT_FILES))


def member_folders(output_dir):
    """Returns the folders of an ensemble's members, first member first; an empty list for any other folder."""
    folders = [f for f in Path(output_dir).glob("member-*") if re.fullmatch(r"member-\d+", f.name)]
    return sorted(folders, key=lambda f: int(f.name.split("-")[1]))


def member_arguments(training_args, number):
    """Returns the arguments of one member of an ensemble, which has a seed and a folder of its own."""
    member_args = copy.copy(training_args)
    member_args.seed, member_args.run_values = training_args.seed + number, None
    member_args.output_dir = str(Path(training_args.output_dir) / f"member-{number}")
    return member_args


def is_finished(folder):
    """Whether a run wrote all its files into the folder."""
    folder = Path(folder)
    return (folder / "all_results.json").exists() and not (folder / UNFINISHED).exists()


def last_complete_checkpoint(output_dir):
    """Returns the newest `checkpoint-N` folder of `output_dir` that was saved to its end, or `None`."""
    folders = [f for f in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", f.name)]
    complete = [f for f in folders if _is_complete(f)]
    return max(complete, key=lambda f: int(f.name.split("-")[1]), default=None)


def _is_complete(folder):
    """Whether the trainer wrote the checkpoint to its end, its state last, and no file of it was cut since.

    The folder of a finished run has a state too, but no schedule to go on with.
    """
    folder = Path(folder)
    if not (folder / "trainer_state.json").exists() or not (folder / "scheduler.pt").exists():
        return False
    try:
        for path in folder.glob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt"):  # reads the header, and compares the file's size with it
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(path) for pattern in ("*.pt", "*.pth", "*.bin") for path in folder.glob(pattern))


def paths_of_run(output_dir):
    """Returns what a run has left in its output folder: no files of the user's that are called like them."""
    output_dir = Path(output_dir)
    found = [path for path in output_dir.glob("*") if is_piece(path) or is_checkpoint(path)]
    found += [output_dir / "merged"] if is_merged(output_dir / "merged") else []
    found += [output_dir / STAGED] if is_card(output_dir / STAGED / CARD_FILE) else []
    scored = (output_dir / "influence.json").exists()
    names = RUN_FILES if scored else set(RUN_FILES) - set(MERGED_FILES.values())
    files = [output_dir / name for name in names if (output_dir / name).exists()]
    return found + [path for path in files if path.name not in (CARD_FILE, OWN_CARD_FILE) or is_card(path)]


def is_merged(folder):
    """Returns whether a folder holds the plain model of an adapter that these scripts have merged into its base."""
    try:
        values = read_json(folder / ARGUMENTS_FILE)
        others = ("adapter_config.json", "trained_parameters.json", UNFINISHED)  # of a run that merges beside them
        return bool(values.get("merge_adapter")) and not any((folder / name).exists() for name in others)
    except (OSError, ValueError, AttributeError):
        return False


def clear_run(output_dir):
    """Removes what an earlier run left in `output_dir`, and nothing else. Called when all input was checked."""
    for path in paths_of_run(output_dir):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def is_card(path):
    """Returns whether a file is a card that these scripts, or PEFT, have written, and no README of the user's."""
    text = path.read_bytes() if path.is_file() else b""
    of_peft = b"library_name: peft" in text and b"# Model Card for Model ID" in text
    return text.startswith(b"---\n") and (of_peft or CARD_MARK.encode() in text)


def belongs_to_run(output_dir, path):
    """Returns whether a path lies where a run writes, or where `clear_run` removes."""
    folder, inside = Path(output_dir).resolve(), Path(path).resolve()
    if folder not in inside.parents:
        return False
    first = folder / inside.relative_to(folder).parts[0]
    return first.name in RUN_FILES or first in paths_of_run(folder)


def remove_checkpoints(output_dir):
    """Removes the folders `checkpoint-N` of a run."""
    for folder in filter(is_checkpoint, Path(output_dir).glob("*")):
        shutil.rmtree(folder)


def begin_writing(training_args, checkpoint, source=None, replace=None, check=None):
    """Prepares the output folder when all input was checked: an old run goes, and the new one is marked unfinished.

    Args:
        replace (`bool`, *optional*): whether an old run goes; by default if the new one trains and does not resume.
        check (`Callable`, *optional*): refuses what else cannot be resumed, when the settings are known to be right.
    Raises:
        InputError: if the old run's checkpoints would go, and the model comes from one of them (`source`); if an input
            file would; if an interrupted run began with other settings; if another process writes the folder, or has
            written it since this one found it empty.
    """
    if replace is None:
        replace = checkpoint is None and training_args.do_train
    folder = Path(training_args.output_dir).resolve()
    if replace and source is not None and folder in (Path(source).resolve(), *Path(source).resolve().parents):
        raise InputError(f"--output_dir {training_args.output_dir} would replace {source}. Give another --output_dir.")
    named = [
        (name, path)
        for name, value in (training_args.run_values or {}).items() if name in INPUT_FILES
        for path in (value if isinstance(value, list) else [value])
    ]  # fmt: skip
    for name, value in named:
        if replace and Path(value).is_file() and belongs_to_run(folder, value):
            raise InputError(
                f"--{name} {value} has the name of a file that a run in {training_args.output_dir} writes, and would "
                "be replaced. Give another --output_dir."
            )
    if checkpoint is not None:
        check_resumed(training_args)
    if check is not None:
        check()
    if training_args.world_size > 1:
        torch.distributed.barrier()  # no process may find the folder that another one has begun to write
    if training_args.should_save:
        make_folder(training_args.output_dir)
        if replace and training_args.expects_no_run and holds_run(folder):
            raise InputError(
                f"Another run has written to {training_args.output_dir} since this one began. Give another "
                "--output_dir."
            )
        lock_folder(training_args.output_dir)
        training_args.expects_no_run = False
        if replace:
            clear_run(training_args.output_dir)
        write_arguments(training_args)
    if training_args.world_size > 1:
        torch.distributed.barrier()  # none may look into the folder before it is cleared


def make_folder(output_dir):
    """Makes the output folder; an `InputError` if its file system takes no folders."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise InputError(f"The output folder {output_dir} cannot be made. Give another --output_dir.") from error


def write_arguments(training_args):
    """Writes the arguments of a run into its folder; those of an evaluation beside those of the training."""
    folder = Path(training_args.output_dir)
    if training_args.run_values is None:  # of a member of an ensemble, or of a call without a command line
        return
    path = folder / ARGUMENTS_FILE
    if not training_args.do_train and path.exists() and of_training(path):
        path = folder / f"predict_{ARGUMENTS_FILE}"
    write_text(json.dumps(settled_values(training_args), indent=2) + "\n", path)


def of_training(path):
    """Returns whether a file of arguments had its run train: they say so, or name no part of the work."""
    try:
        values = read_json(path)
    except ValueError:  # damaged: nothing is known of the run, and the file stays
        return True
    return bool(values.get("do_train")) or not (values.get("do_eval") or values.get("do_predict"))


def settled_values(training_args):
    """Returns the values to repeat a run, with those that were found here and may be found otherwise elsewhere.

    The steps of evaluations and checkpoints follow the log by default, whose own are free in a run that is resumed.
    """
    values = {**training_args.run_values, "output_dir": training_args.output_dir}
    if training_args.do_train:
        values |= {"bf16": training_args.bf16, "learning_rate": training_args.learning_rate}
        for kind in ("eval", "save"):
            if getattr(training_args, f"{kind}_strategy") == "steps":
                values[f"{kind}_steps"] = getattr(training_args, f"{kind}_steps")
    return values


def check_resumed(training_args):
    """Raises `InputError` if an interrupted run of the output folder began with other values than it is to go on with.

    Files and models are compared by name.
    """
    path = Path(training_args.output_dir) / ARGUMENTS_FILE
    if training_args.run_values is None or not path.exists():
        return
    begun = read_json(path)
    values = json.loads(json.dumps(settled_values(training_args)))
    library = {field.name for field in fields(TrainingArguments)} - set(TRAINING_SETTINGS)

    def compared(value):
        return Path(value).name if isinstance(value, str) else value

    # what the run did not know of then had the value that is now the default
    known = {**begun, **{name: None for name in training_args.given}}
    names = [name for name in known if name not in library and name not in FREE_SETTINGS]
    other = [name for name in names if compared(begun.get(name)) != compared(values.get(name))]
    if other:
        texts = [f"--{name} {begun.get(name)}, not {values.get(name)}" for name in other]
        raise InputError(
            f"The run in {training_args.output_dir} began with {'; '.join(texts)}. Go on with the flags that it began "
            "with (arguments.json has them), or start anew with --overwrite_output_dir."
        )


def lock_folder(output_dir):
    """Marks a folder as one that this process writes until `end_writing`, or until it dies.

    Raises:
        InputError: if another process is writing it.
    """
    folder = Path(output_dir).resolve()
    if folder not in LOCKS:
        LOCKS[folder] = lock(folder)
    (folder / UNFINISHED).touch()


def lock(folder):
    """Returns the lock of a folder, taken; raises `InputError` if another process has it."""
    taken = FileLock(folder / LOCK_FILE)
    try:
        taken.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"Another run is writing to {folder}. Wait for it, or give another --output_dir.") from error
    return taken


def end_writing(training_args):
    """Marks the run in the output folder as finished."""
    if training_args.should_save:
        folder = Path(training_args.output_dir).resolve()
        (folder / UNFINISHED).unlink(missing_ok=True)
        if folder in LOCKS:
            LOCKS.pop(folder).release()  # the file stays: another run may have it in its hands by now


# --------------------------------------------------------------------------------------------------------------- files


def write_bytes(content, path):
    """Writes a file whole or not at all."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_text(text, path):
    """Writes a text as UTF-8, whole or not at all."""
    write_bytes(text.encode("utf-8"), path)


def write_json(values, path):
    """Writes JSON whole or not at all; NaN is refused, because it is no JSON."""
    write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", path)


def read_json(path):
    """Returns what a JSON file holds; nothing, if it is not there."""
    path = Path(path)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def update_results(folder, split, metrics):
    """Writes metrics to `{split}_results.json`, and to all_results.json in place of older ones of this split."""
    folder = Path(folder)
    kept = {k: v for k, v in read_json(folder / "all_results.json").items() if not k.startswith(f"{split}_")}
    write_json(metrics, folder / f"{split}_results.json")
    write_json(kept | metrics, folder / "all_results.json")
