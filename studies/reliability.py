"""What happens to a run that is killed, a disk that is full, a file that is broken, a checkpoint that is hostile.

    python studies/reliability.py            # an hour on two cores
    python studies/reliability.py --parts fuzz hostile --inputs 1000

Writes results/reliability.json, every trial with what was expected and what came (parts that are not asked for stay as
they were): the four scripts killed at random moments and resumed, against the metrics of the uninterrupted run; a
limit on the size of files while saving; generated tables and SMILES; checkpoints that would run code or hold no
numbers; two runs on one folder. Exits with 1 if one fails.
"""

import argparse
import contextlib
import json
import logging
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hypothesis
import pandas as pd
from common import ROOT, as_text, write_report
from hypothesis import HealthCheck
from hypothesis import strategies as st


SCRIPTS = {
    "run_regression.py": [],
    "run_mlm.py": [],
    "run_peft.py": [],
    "run_influence.py": ["--influence_params", "head", "--pool_size", "40", "--recursion_depth", "50",
                         "--controls", "none", "random"],
}  # fmt: skip
SMALL = ["--max_train_samples", "128", "--max_eval_samples", "64", "--max_predict_samples", "64"]
EPOCHS = 3
SMALL += ["--num_train_epochs", str(EPOCHS), "--disable_tqdm", "true"]
AIMS = ("saving", "evaluating", None, None, None)  # what a run is doing when it is killed; None for any moment
NOT_COMPARED = ("runtime", "per_second", "seconds", "train_loss", "memory", "preparation_time")
MOST_SECONDS = 10  # for one generated input
# of the superuser, to whom a folder's mode means nothing (util-linux)
WITHOUT_POWER = ("setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def start(script, folder, *flags, launcher=(), **options):
    """Starts a script on a small part of the embedded data (`subprocess.Popen`)."""
    command = [
        *launcher,
        sys.executable,
        str(ROOT / script),
        *SMALL,
        *SCRIPTS[script],
        "--output_dir",
        str(folder),
        *flags,
    ]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT} | options
    return subprocess.Popen(command, **options)


def run(script, folder, *flags):
    """Runs a script to its end, and returns its exit status and what it wrote to standard error."""
    process = start(script, folder, *flags)
    errors = process.communicate()[1]
    return process.returncode, errors


def wait_for(process, folder, pattern):
    """Returns when a file of this pattern is in the folder, or the process has ended."""
    while process.poll() is None and not any(folder.glob(pattern)):
        time.sleep(0.02)


def saving(folder):
    """Returns the checkpoints that are being written."""
    return [path for path in folder.glob("**/checkpoint-*") if not (path / "trainer_state.json").exists()]


def wait_for_aim(process, folder, aim, epoch):
    """Returns when a run is evaluating or saving, at the end of an epoch, or has ended."""
    if aim == "evaluating":  # what follows the line with the training loss of an epoch
        losses = 0
        for line in process.stdout:
            losses += "'loss':" in line
            if losses == epoch:
                return
    known = set()
    while process.poll() is None and len(known) < epoch:
        known |= set(saving(folder))
        time.sleep(0.001)


def phase_of(folder):
    """Returns where a run stood when it was killed, by its files."""
    if saving(folder):
        return "saving"
    if not any(folder.glob("**/checkpoint-*/trainer_state.json")):
        return "before a checkpoint"
    trained = ("model.safetensors", "adapter_model.safetensors", "influence_scores.csv")
    return "after the training" if any((folder / name).exists() for name in trained) else "in the training"


def half_written(folder):
    """Returns the files that cannot be read although they have their final name, checkpoints in the making aside."""
    from PIL import Image
    from safetensors import safe_open

    def read(path):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                list(file.keys())
        elif path.suffix == ".csv":
            pd.read_csv(path)
        elif path.suffix == ".png":
            Image.open(path).verify()

    broken = []
    for path in folder.rglob("*"):
        in_the_making = (
            path.parent.name.startswith("checkpoint-") and not (path.parent / "trainer_state.json").exists()
        )
        if path.is_file() and not in_the_making:
            try:
                read(path)
            except Exception as error:  # whatever the format's own reader says
                broken.append(f"{path.name}: {type(error).__name__}")
    return broken


def metrics(folder):
    """Returns all numbers of a run that must not depend on time, flat, by their paths."""

    def flatten(value, path):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from flatten(item, f"{path}.{key}")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                yield from flatten(item, f"{path}.{number}")
        elif isinstance(value, (int, float)) and not any(part in path for part in NOT_COMPARED):
            yield path, value

    return dict(flatten(json.loads((folder / "all_results.json").read_text()), ""))


def same(found, expected):
    """Whether two numbers are equal but for the last digits of float32."""
    return found is not None and math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6)


def kill_and_resume(folder, kills, seed):
    """Kills every script and resumes it until it ends; returns one row for each kill.

    Of every five kills one is while saving and one while evaluating, in a random epoch, the others at random moments.
    """
    rows, generator = [], random.Random(seed)
    for script in SCRIPTS:
        whole = folder / f"{script}-whole"
        process = start(script, whole)
        wait_for(process, whole, "unfinished")
        begun = time.monotonic()
        errors = process.communicate()[1]
        if process.returncode:
            raise SystemExit(f"{script} fails uninterrupted: {errors[-1000:]}")
        seconds, expected = time.monotonic() - begun, metrics(whole)
        for number in range(kills // len(SCRIPTS)):
            target, aim, killed = folder / f"{script}-{number}", AIMS[number % len(AIMS)], False
            while not killed:
                moment, epoch = generator.uniform(0, 1) * seconds, generator.randint(1, EPOCHS)
                process = start(script, target, stdout=subprocess.PIPE if aim == "evaluating" else subprocess.DEVNULL)
                wait_for(process, target, "unfinished")  # imports and checks are over
                began = time.monotonic()
                if aim is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=moment)
                else:
                    wait_for_aim(process, target, aim, epoch)
                moment, killed = time.monotonic() - began, process.poll() is None
                process.send_signal(signal.SIGKILL)
                process.communicate()
                if not killed:  # it was faster this time
                    shutil.rmtree(target)
            row = {"script": script, "after_seconds": moment, "of": seconds, "aim": aim or "any moment"}
            row["phase"] = phase_of(target)
            row["half_written"] = half_written(target)
            code, errors = run(script, target, "--resume_from_checkpoint", "true")
            if code == 2 and "Leave --resume_from_checkpoint out" in errors:  # nothing was saved yet
                code, errors = run(script, target, "--overwrite_output_dir")
            found = metrics(target) if code == 0 else {}
            differing = [name for name, value in expected.items() if not same(found.get(name), value)]
            row |= {"differing": differing[:5], "error": errors[-300:] if differing else ""}
            rows.append(row | {"passed": code == 0 and not differing and not row["half_written"]})
            print(rows[-1], flush=True)
            shutil.rmtree(target, ignore_errors=True)
    return rows


def full_disk(folder):
    """Lets files grow to a limit only, and writes where nothing may be written; returns one row a script."""
    rows = []
    for script in SCRIPTS:
        target = folder / f"{script}-full"
        process = start(script, target)
        wait_for(process, target, "**/checkpoint-*/trainer_state.json")
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
        errors = process.communicate()[1]
        clear = "No space is left" in errors and "Traceback" not in errors
        code, _ = run(script, target, "--resume_from_checkpoint", "true")
        rows.append({"script": script, "clear": clear, "resumed": code == 0, "last": errors[-300:]})
        rows[-1]["passed"] = clear and code == 0
    code, errors = run("run_regression.py", "/proc/self/run")
    rows.append({"script": "run_regression.py", "folder": "cannot be made", "last": errors[-300:]})
    rows[-1]["passed"] = code == 2 and "cannot be made" in errors and "Traceback" not in errors
    return [*rows, read_only(folder)]


def read_only(folder):
    """Takes the right to write away while a run is saving, and gives it back; returns the row of that."""
    target = folder / "read-only"
    process = start("run_regression.py", target, launcher=WITHOUT_POWER if os.geteuid() == 0 else ())
    wait_for(process, target, "checkpoint-*/trainer_state.json")
    folders = [target, *target.glob("checkpoint-*")]
    for path in folders:
        path.chmod(0o555)
    errors = process.communicate()[1]
    for path in folders:
        path.chmod(0o755)
    clear = process.returncode == 1 and "must not be written" in errors and "Traceback" not in errors
    code, _ = run("run_regression.py", target, "--resume_from_checkpoint", "true")
    row = {"script": "run_regression.py", "folder": "read-only while saving", "clear": clear, "resumed": code == 0}
    return row | {"last": errors[-300:], "passed": clear and code == 0}


ODD_SMILES = (
    """C1CC [Xe] c1ccccc [2H]C CC.O é \u202eCC " C,C \x00 N#N * [*]C ((((( [] %10 [nH] C%99CC%99 [C@@H] F/C=C/F
    # = -1 NaN None 1e400""".split()
    + ["", " ", "C" * 500]
)
LABELS = ("1.5", "-2", "", "x", "inf", "1e3", "0")


@cache
def known_smiles():
    return pd.read_csv(ROOT / "data" / "lipophilicity.csv")["SMILES"].tolist()


def smiles_texts():
    """Returns the strategy of molecules of the data and odd texts, some with another character somewhere."""
    texts = st.one_of(st.sampled_from(known_smiles()), st.sampled_from(ODD_SMILES))

    def replace(text, place, other):
        place %= len(text) + 1
        return text[:place] + other + text[place + 1 :]

    return st.one_of(texts, texts, st.builds(replace, texts, PLACES, st.characters(codec="utf-8")))


PLACES = st.integers(0, 2000)
DAMAGES = st.tuples(PLACES, st.sampled_from(["cut", "taken out", "changed"]), st.binary(min_size=1, max_size=1))


@dataclass
class Input:
    """A table of a few rows as a file has it, and what else a trial is to take.

    Args:
        frame (`pd.DataFrame`, *optional*): what the table was made of; `None` if its bytes were then damaged.
    """

    content: bytes
    frame: pd.DataFrame | None
    texts: list[str]
    smiles_form: str
    predict_augment: int


@st.composite
def inputs_of_all_kinds(draw):
    """The strategy of an `Input`: half of the tables are damaged, some have labels that are none."""
    labels = draw(st.sampled_from([LABELS[:2], LABELS]))
    rows = draw(st.lists(st.tuples(smiles_texts(), st.sampled_from(labels)), max_size=5))
    frame = pd.DataFrame(rows, columns=["SMILES", "label"])
    content = frame.to_csv(index=False, sep=draw(st.sampled_from([",", "\t", ";"]))).encode()
    for place, damage, other in draw(st.one_of(st.just([]), st.lists(DAMAGES, min_size=1, max_size=3))):
        place %= len(content) + 1
        rest = {"cut": b"", "taken out": content[place + 1 :], "changed": other + content[place + 1 :]}[damage]
        content, frame = content[:place] + rest, None
    texts = draw(st.lists(smiles_texts(), min_size=3, max_size=3))
    form, augment = draw(st.sampled_from(["canonical", "isomeric", "raw"])), draw(st.sampled_from([0, 2]))
    return Input(content, frame, texts, form, augment)


class NoAnswer(BaseException):
    """The alarm of an input that takes too long, which no reader takes for an error of its own."""


def fuzz(inputs, seed, trials=None):
    """Feeds generated tables to training's readers and to the prediction, and generated SMILES to the checks.

    What is wrong must end in an `InputError`; what is read must have as many rows as were written, in their order.
    Hypothesis generates the inputs, and looks for the smallest one of those that fail.

    Args:
        inputs (`int`): how many each trial gets.
        trials (`list[Callable]`, *optional*): of an `Input` and the file that holds its table; by default all three.
    Returns:
        one row for each trial: counts, and what failed.
    """
    from arguments import InputError

    trials = trials or [read_as_training, predict_as_new, check_texts]

    def too_long(*_):
        raise NoAnswer(f"within {MOST_SECONDS} seconds")

    def answer(trial, given_input, path):
        """Returns what a trial said: `read`, `refused`, or what is wrong."""
        path.write_bytes(given_input.content)
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        try:
            return trial(given_input, path) or "read"
        except InputError as error:
            return "refused" if len(str(error)) >= 20 else f"a message that says little: {error}"
        except (Exception, NoAnswer) as error:  # what no user should see
            return f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def feed(trial, path):
        """Returns the row of a trial: how many inputs it got, and what failed."""
        counts, failures = {"read": 0, "refused": 0}, []

        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=inputs, deadline=None, database=None, suppress_health_check=HealthCheck)
        @hypothesis.given(inputs_of_all_kinds())
        def attempt(given_input):
            found = answer(trial, given_input, path)
            if found in counts:
                counts[found] += not failures  # not those that shrink a failure
            else:
                failures.append({"input": repr(given_input)[:1000], "what": found[:300]})
                raise AssertionError(found)

        with contextlib.suppress(AssertionError, hypothesis.errors.Flaky):  # Flaky: a hang that does not come again
            attempt()
        row = {"trial": trial.__name__, "inputs": sum(counts.values()) + bool(failures), **counts}
        if failures:  # the search has stopped there
            row |= {"first_failure": failures[0], "smallest_failure": failures[-1]}
        return row | {"passed": not failures}

    before = signal.signal(signal.SIGALRM, too_long)
    logger = logging.getLogger("molformer")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each input would be warned of
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.csv"
            return [feed(trial, path) for trial in trials]
    finally:
        signal.signal(signal.SIGALRM, before)
        logger.setLevel(level)


@cache
def tools():
    """Returns the tokenizer, and a small model that predicts."""
    from modeling_molformer_reg import MolformerConfig, MolformerForRegression
    from utils_checkpoints import build_tokenizer

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = MolformerForRegression(MolformerConfig(**shape, label_mean=[2.0], label_std=[1.0])).eval()
    return build_tokenizer(), model


def read_as_training(given_input, path):
    """Reads and checks a table as the training does; returns what is wrong with the answer, or `None`."""
    from arguments import DataTrainingArguments
    from utils_molecules import prepare_molecules, read_table

    table, frame = read_table(path), given_input.frame
    if frame is not None and table["smiles"].tolist() != [text.strip() for text in frame["SMILES"]]:
        return "rows changed"
    data_args = DataTrainingArguments(invalid_smiles="drop")
    prepared, dropped = prepare_molecules(table, tools()[0], data_args, str(path))
    together = sorted([*prepared["row"], *dropped["row"]])
    in_order = together == list(range(len(table))) and list(prepared["row"]) == sorted(prepared["row"])
    return None if in_order else "order of the rows"


def predict_as_new(given_input, path):
    """Predicts a table as new molecules; returns what is wrong with the answer, or `None`."""
    from arguments import DataTrainingArguments, TrainingArguments
    from run_regression import RegressionArguments
    from utils_predict import STATUS, predict_file

    (tokenizer, model), frame = tools(), given_input.frame
    data_args = DataTrainingArguments(test_file=str(path), smiles_form=given_input.smiles_form)
    regression_args = RegressionArguments(predict_augment=given_input.predict_augment)
    training_args = TrainingArguments(output_dir=str(path.parent), disable_tqdm=True)
    output = path.with_name("predictions.csv")

    def predict():
        report = predict_file([model], tokenizer, data_args, regression_args, training_args, output)
        return report, pd.read_csv(output, dtype={"SMILES": str}, keep_default_na=False)

    report, answers = predict()
    if len(answers) != report["predict_samples"]:
        return "number of the rows"
    if frame is not None and answers["SMILES"].tolist() != frame["SMILES"].tolist():
        return "rows changed"
    if not set(answers["status"]) <= {"ok", *STATUS.values()}:
        return "unknown status"
    answered = answers["prediction"].astype(str) != ""
    if not (answered == (answers["status"] == "ok")).all():
        return "a prediction without its status"
    if frame is not None and len(frame) and not regression_args.predict_augment:
        frame[::-1].to_csv(path, index=False)
        turned = predict()[1]["prediction"][::-1]  # each row's own prediction moves with it
        pairs = zip(pd.to_numeric(turned), pd.to_numeric(answers["prediction"]), strict=True)
        if not all(math.isclose(one, other, abs_tol=1e-4) or one != one and other != other for one, other in pairs):
            return "order of the predictions"
    return None


def check_texts(given_input, path):
    """Checks three SMILES; returns what is wrong with the answer, or `None`."""
    from utils_molecules import check_smiles

    found = check_smiles(given_input.texts, tools()[0], given_input.smiles_form, 256)
    return None if all(len(column) == 3 for column in found) else f"number of answers to {given_input.texts}"


class RunsCode:
    """A pickle of this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def hostile(folder):
    """Gives checkpoints to run_regression.py that must be refused; returns one row for each."""
    import peft
    import torch
    from safetensors.torch import load_file, save_file

    from modeling_molformer_reg import MolformerForRegression

    source = ROOT / "models" / "molformer-mini"
    rows, trace = [], folder / "code_ran"

    def offer(name, change, named):
        target = folder / name
        shutil.copytree(source, target)
        change(target)
        flags = ["--model_name_or_path", str(target), "--max_steps", "1"]
        code, errors = run("run_regression.py", folder / f"{name}-run", *flags)
        row = {"checkpoint": name, "last": errors[-300:], "code": code, "ran_code": trace.exists()}
        row["passed"] = not trace.exists() and code == 2 and named in errors and "Traceback" not in errors
        rows.append(row)

    def pickled(target):
        (target / "model.safetensors").unlink()
        with (target / "pytorch_model.bin").open("wb") as file:
            pickle.dump({"molformer.embeddings.word_embeddings.weight": RunsCode(trace)}, file)

    def pickled_by_torch(target):
        (target / "model.safetensors").unlink()
        torch.save({"a": RunsCode(trace)}, target / "pytorch_model.bin")

    def truncated(target):
        path = target / "model.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def changed_weights(target, change):
        weights = load_file(target / "model.safetensors")
        save_file(change(weights), target / "model.safetensors", metadata={"format": "pt"})

    def not_a_number(weights):
        name = next(name for name in weights if name.endswith("query.weight"))
        weights[name][0, 0] = float("nan")
        return weights

    def renamed(target):
        changed_weights(target, lambda weights: {f"other.{name}": tensor for name, tensor in weights.items()})

    def auto_map(target):
        (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
        (target / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
        config = json.loads((target / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "../evil.C", "AutoModelForSequenceClassification": "evil--../evil.M"}
        (target / "config.json").write_text(json.dumps(config))

    def other_code(target):
        (target / "modeling_molformer_reg.py").write_text(f"open({str(trace)!r}, 'w')\n")
        config = json.loads((target / "config.json").read_text())
        config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_molformer_reg.MolformerForRegression"}
        (target / "config.json").write_text(json.dumps(config))

    def index_outside(target):
        (target / "model.safetensors").rename(folder / "outside.safetensors")
        names = load_file(folder / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))

    def other_types(target):
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | {"hidden_size": "320"}))

    def pickled_adapter(target):
        base = MolformerForRegression.from_pretrained(source)
        peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"])).save_pretrained(target)
        for name in ("model.safetensors", "adapter_model.safetensors"):
            (target / name).unlink()
        torch.save({"a": RunsCode(trace)}, target / "adapter_model.bin")

    def base_outside(target):
        (target / "model.safetensors").rename(target / "weights.safetensors")
        values = {"method": "bitfit", "base": "../../nowhere", "parameters": ["classifier.out_proj.bias"]}
        (target / "trained_parameters.json").write_text(json.dumps(values))

    offer("pickle", pickled, "could run code")
    offer("pickle-of-torch", pickled_by_torch, "could run code")
    offer("pickle-of-an-adapter", pickled_adapter, "could run code")
    offer("adapter-of-no-base", base_outside, "cannot be loaded")
    offer("truncated", truncated, "cannot be loaded")
    offer("not-a-number", lambda target: changed_weights(target, not_a_number), "no finite numbers")
    offer("other-weights", renamed, "weights")
    offer("no-json", lambda target: (target / "config.json").write_text("{"), "cannot be loaded")
    offer("index-outside", index_outside, "not in the folder")
    offer("other-types", other_types, "must be a whole number")
    offer("auto-map", auto_map, "in auto_map")
    offer("code-beside-it", other_code, "")  # is left aside: the run succeeds, and none of it runs
    rows[-1]["passed"] = not rows[-1]["ran_code"] and rows[-1]["code"] == 0
    return rows


def second_run(folder):
    """Starts a run on a folder that another one is writing; returns what the second one says."""
    first = start("run_regression.py", folder / "shared")
    wait_for(first, folder / "shared", "unfinished")
    code, errors = run("run_regression.py", folder / "shared", "--overwrite_output_dir")
    first.communicate()
    refused = code == 2 and "Another run is writing" in errors
    return [{"last": errors[-300:], "passed": refused and first.returncode == 0}]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("kills", "full_disk", "fuzz", "hostile", "second_run")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--kills", type=int, default=20, help="over all four scripts")
    parser.add_argument("--inputs", type=int, default=10_000, help="generated inputs of each of three kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "reliability.json")
    args = parser.parse_args()
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    report = {part: known[part] for part in parts if part in known}
    commands = known.get("commands", {})  # of each part the one that ran it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        works = {
            "kills": lambda: kill_and_resume(folder, args.kills, args.seed),
            "full_disk": lambda: full_disk(folder),
            "fuzz": lambda: fuzz(args.inputs, args.seed),
            "hostile": lambda: hostile(folder),
            "second_run": lambda: second_run(folder),
        }
        for part in args.parts:
            found = json.dumps(works[part]())  # without this machine's folders
            report[part] = json.loads(found.replace(f"{ROOT}/", "").replace(name, "FOLDER"))
            passed = sum(row["passed"] for row in report[part])
            print(f"{part}: {passed} of {len(report[part])} passed", flush=True)
            commands[part] = as_text(sys.argv)
            write_report(args.output, {"commands": commands, **report})
    sys.exit(0 if all(row["passed"] for rows in report.values() for row in rows) else 1)


if __name__ == "__main__":
    main()
