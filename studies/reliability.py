"""What happens to a run that is killed, a disk that is full, a file that is broken, a checkpoint that is hostile.

    python studies/reliability.py            # an hour on two cores
    python studies/reliability.py --parts fuzz hostile --inputs 1000

Writes results/reliability.json, every trial with what was expected and what came: the four scripts killed at random
moments and resumed, against the metrics of the uninterrupted run; a limit on the size of files while saving;
generated tables and SMILES; checkpoints that would run code or hold no numbers; two runs on one folder. Exits with 1
if one fails.
"""

import argparse
import json
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
from pathlib import Path

import pandas as pd
from common import ROOT, write_report


sys.path.insert(0, str(ROOT))

SCRIPTS = {
    "run_regression.py": [],
    "run_mlm.py": [],
    "run_peft.py": [],
    "run_influence.py": ["--influence_params", "head", "--pool_size", "40", "--recursion_depth", "50",
                         "--controls", "none", "random"],
}  # fmt: skip
SMALL = ["--max_train_samples", "128", "--max_eval_samples", "64", "--max_predict_samples", "64"]
SMALL += ["--num_train_epochs", "3", "--disable_tqdm", "true"]
NOT_COMPARED = ("runtime", "per_second", "seconds", "train_loss", "memory", "preparation_time")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(script, folder, *flags, **options):
    """Starts a script on a small part of the embedded data (`subprocess.Popen`)."""
    command = [sys.executable, str(ROOT / script), *SMALL, *SCRIPTS[script], "--output_dir", str(folder), *flags]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT} | options
    return subprocess.Popen(command, **options)


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
    """Kills every script at random moments and resumes it until it ends; returns one row for each kill."""
    rows, generator = [], random.Random(seed)
    for script in SCRIPTS:
        whole = folder / f"{script}-whole"
        begun = time.monotonic()
        process = start(script, whole)
        errors = process.communicate()[1]
        assert process.returncode == 0, errors
        seconds, expected = time.monotonic() - begun, metrics(whole)
        for number in range(kills // len(SCRIPTS)):
            target, moment = folder / f"{script}-{number}", generator.uniform(0.1, 1.0) * seconds
            process = start(script, target)
            try:
                process.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            process.communicate()
            process = start(script, target, "--resume_from_checkpoint", "true")
            errors = process.communicate()[1]
            if process.returncode == 2 and "Leave --resume_from_checkpoint out" in errors:  # nothing was saved yet
                process = start(script, target, "--overwrite_output_dir")
                errors = process.communicate()[1]
            found = metrics(target) if process.returncode == 0 else {}
            differing = [name for name, value in expected.items() if not same(found.get(name), value)]
            rows.append({"script": script, "killed_after": moment, "of": seconds, "differing": differing[:5]})
            rows[-1] |= {
                "passed": process.returncode == 0 and not differing,
                "error": errors[-300:] if differing else "",
            }
            print(rows[-1], flush=True)
            shutil.rmtree(target, ignore_errors=True)
    return rows


def full_disk(folder):
    """Lets files grow to a limit only, and writes where nothing may be written; returns one row a script."""
    rows = []
    for script in ("run_regression.py", "run_mlm.py", "run_peft.py"):
        target = folder / f"{script}-full"
        process = start(script, target, "--save_strategy", "epoch")
        while process.poll() is None and not list(target.glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.05)
        if process.poll() is None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
        errors = process.communicate()[1]
        clear = "No space is left" in errors and "Traceback" not in errors
        process = start(script, target, "--resume_from_checkpoint", "true")
        process.communicate()
        rows.append({"script": script, "clear": clear, "resumed": process.returncode == 0, "last": errors[-300:]})
        rows[-1]["passed"] = clear and process.returncode == 0
    process = start("run_regression.py", "/proc/self/run")
    errors = process.communicate()[1]
    rows.append({"script": "run_regression.py", "folder": "not writable", "last": errors[-300:]})
    rows[-1]["passed"] = process.returncode != 0 and "Traceback" not in errors
    return rows


def fuzz(inputs, seed):
    """Feeds generated tables to the readers and generated SMILES to the checks; returns counts and what failed.

    What is wrong must end in an `InputError`; what is read must have as many rows as were written, in their order.
    """
    from arguments import DataTrainingArguments, InputError
    from trainer_regression import build_tokenizer
    from utils_molecules import check_smiles, prepare_molecules, read_table

    generator, tokenizer = random.Random(seed), build_tokenizer()
    good = pd.read_csv(ROOT / "data" / "lipophilicity.csv")["SMILES"].tolist()
    odd = [
        "",
        " ",
        "C1CC",
        "[Xe]",
        "C" * 500,
        "c1ccccc",
        "[2H]C",
        "CC.O",
        "é",
        "\u202eCC",
        '"',
        "C,C",
        "\x00",
        "N#N",
        "*",
        "[*]C",
    ]
    odd += ["(((((", "[]", "%10", "[nH]", "C%99CC%99", "[C@@H]", "F/C=C/F", "#", "=", "-1", "NaN", "None", "1e400"]

    def smiles():
        text = generator.choice(good if generator.random() < 0.6 else odd)
        if generator.random() < 0.3 and text:  # a change somewhere
            place = generator.randrange(len(text))
            text = text[:place] + chr(generator.choice([*range(32, 127), 0, 233, 0x4E2D, 0x1F600])) + text[place + 1 :]
        return text

    counts, failures, hangs = {"read": 0, "refused": 0}, [], 0
    data_args = DataTrainingArguments(invalid_smiles="drop")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        for _ in range(inputs):
            rows = [(smiles(), generator.choice(["1.5", "-2", "", "x", "inf", "1e3", "0"][: generator.choice([2, 7])]))
                    for _ in range(generator.randrange(0, 6))]  # fmt: skip
            frame = pd.DataFrame(rows, columns=["SMILES", "label"])
            content = frame.to_csv(index=False, sep=generator.choice([",", "\t", ";"])).encode()
            for _ in range(generator.choice([0, 0, 0, 1, 3])):  # bytes changed, taken out, cut
                if content:
                    place = generator.randrange(len(content))
                    content = generator.choice([
                        content[:place], content[:place] + bytes([generator.randrange(256)]) + content[place + 1 :],
                        content[:place] + content[place + 1 :],
                    ])  # fmt: skip
                    frame = None
            path.write_bytes(content)
            begun = time.monotonic()
            try:
                table = read_table(path)
                if frame is not None and table["smiles"].tolist() != [text.strip() for text in frame["SMILES"]]:
                    failures.append({"input": content.decode(errors="replace")[:200], "what": "rows changed"})
                prepared, dropped = prepare_molecules(table, tokenizer, data_args, str(path))
                together = sorted([*prepared["row"], *dropped["row"]])
                if together != list(range(len(table))) or list(prepared["row"]) != sorted(prepared["row"]):
                    failures.append({"input": content.decode(errors="replace")[:200], "what": "order of the rows"})
                counts["read"] += 1
            except InputError as error:
                counts["refused"] += 1
                if len(str(error)) < 20:
                    failures.append({"input": content.decode(errors="replace")[:200], "what": str(error)})
            except Exception as error:  # what no user should see
                failures.append({"input": repr(content[:200]), "what": f"{type(error).__name__}: {error}"[:200]})
            hangs += time.monotonic() - begun > 5
            texts = [smiles() for _ in range(3)]
            try:
                found = check_smiles(texts, tokenizer, generator.choice(["canonical", "isomeric", "raw"]), 256)
                if any(len(column) != 3 for column in found):
                    failures.append({"input": repr(texts), "what": "number of answers"})
            except Exception as error:
                failures.append({"input": repr(texts)[:200], "what": f"{type(error).__name__}: {error}"[:200]})
    return {
        "inputs": inputs * 2,
        **counts,
        "hangs": hangs,
        "failures": failures[:20],
        "passed": not failures and not hangs,
    }


class RunsCode:
    """A pickle of this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def hostile(folder):
    """Gives checkpoints to run_regression.py that must be refused; returns one row for each."""
    import torch
    from safetensors.torch import load_file, save_file

    source = ROOT / "models" / "molformer-mini"
    rows, trace = [], folder / "code_ran"

    def offer(name, change, named):
        target = folder / name
        shutil.copytree(source, target)
        change(target)
        flags = ["--model_name_or_path", str(target), "--max_steps", "1"]
        process = start("run_regression.py", folder / f"{name}-run", *flags)
        errors = process.communicate()[1]
        row = {"checkpoint": name, "last": errors[-300:], "ran_code": trace.exists()}
        row["passed"] = (
            not trace.exists() and process.returncode == 2 and named in errors and "Traceback" not in errors
        )
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
        (target / "modeling_molformer_reg.py").write_text(f"open({str(trace)!r}, 'w')\n")
        config = json.loads((target / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "../evil.C", "AutoModelForSequenceClassification": "evil--../evil.M"}
        (target / "config.json").write_text(json.dumps(config))

    offer("pickle", pickled, "cannot be loaded")
    offer("pickle-of-torch", pickled_by_torch, "cannot be loaded")
    offer("truncated", truncated, "cannot be loaded")
    offer("not-a-number", lambda target: changed_weights(target, not_a_number), "no finite numbers")
    offer("other-weights", renamed, "weights")
    offer("no-json", lambda target: (target / "config.json").write_text("{"), "cannot be loaded")
    # an auto_map is left aside, whatever it names: the run succeeds and no code of the checkpoint runs
    offer("auto-map", auto_map, "")
    rows[-1]["passed"] = not rows[-1]["ran_code"] and "Traceback" not in rows[-1]["last"]
    return rows


def second_run(folder):
    """Starts a run on a folder that another one is writing; returns what the second one says."""
    first = start("run_regression.py", folder / "shared")
    while first.poll() is None and not (folder / "shared" / "unfinished").exists():
        time.sleep(0.05)
    second = start("run_regression.py", folder / "shared", "--overwrite_output_dir")
    errors = second.communicate()[1]
    first.communicate()
    refused = second.returncode == 2 and "Another run is writing" in errors
    return [{"last": errors[-300:], "passed": refused and first.returncode == 0}]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("kills", "full_disk", "fuzz", "hostile", "second_run")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--kills", type=int, default=20, help="over all four scripts")
    parser.add_argument("--inputs", type=int, default=10_000, help="generated tables; as many lists of SMILES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "reliability.json")
    args = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        works = {
            "kills": lambda: kill_and_resume(folder, args.kills, args.seed),
            "full_disk": lambda: full_disk(folder),
            "fuzz": lambda: [fuzz(args.inputs, args.seed)],
            "hostile": lambda: hostile(folder),
            "second_run": lambda: second_run(folder),
        }
        for part in args.parts:
            report[part] = works[part]()
            passed = sum(row["passed"] for row in report[part])
            print(f"{part}: {passed} of {len(report[part])} passed", flush=True)
    write_report(args.output, report)
    sys.exit(0 if all(row["passed"] for rows in report.values() for row in rows) else 1)


if __name__ == "__main__":
    main()
