"""What the studies share: runs of a script that are not repeated once they are finished, intervals, the machine.

python -c "from common import *; print(machine())"     # in this folder
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import stats


ROOT = Path(__file__).resolve().parent.parent


def machine():
    """Returns versions and hardware, as a table needs them beside it."""
    packages = ("torch", "transformers", "accelerate", "datasets", "peft", "rdkit", "scikit-learn", "numpy")
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "processor": cpu or platform.processor(),
        "cores": os.cpu_count(),
    }


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def run_script(command, folder, threads):
    """Runs a script of this project into a folder and returns its all_results.json (`dict`).

    A finished run of the same command is not repeated, an interrupted one continues, one of another command is
    replaced. Log and command stand beside the folder.

    Args:
        command (`list[str]`): script and flags, without --output_dir.
    """
    folder = Path(folder)
    results, note = folder / "all_results.json", folder.with_name(f"{folder.name}.command")
    same = note.exists() and note.read_text() == as_text(command)
    if not same or not results.exists() or (folder / "unfinished").exists():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(as_text(command))
        begun = [*folder.glob("checkpoint-*/trainer_state.json"), *folder.glob("finetune-*"), *folder.glob("member-*")]
        resume = same and begun and (folder / "unfinished").exists()
        mode = ["--resume_from_checkpoint", "true"] if resume else ["--overwrite_output_dir"]
        with folder.with_name(f"{folder.name}.log").open("a") as log:
            subprocess.run(
                [sys.executable, *command, "--output_dir", str(folder), *mode, "--disable_tqdm", "true"],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                stdout=log,
                stderr=log,
                check=True,
            )
    return json.loads(results.read_text())


def as_text(command):
    """Returns a command line as a table names it: files outside this folder by their names alone."""
    return "python " + shlex.join(Path(part).name if part.startswith("/") else part for part in command)


def study_parser(description, folder, output):
    """Returns a parser with the arguments of a study that runs scripts: folder, results file, runs at a time."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "work" / folder, help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / output, help="the results file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; they share the cores")
    return parser


def run_all(run, cells, jobs):
    """Returns `run(cell, threads)` of all cells, `jobs` at a time, which share the cores; without those that fail."""
    threads = max(1, os.cpu_count() // jobs)

    def attempt(cell):
        try:
            return run(cell, threads)
        except subprocess.CalledProcessError as error:
            print(f"Failed, and left out of the table: {as_text(error.cmd[1:])}. Its log stands beside its folder.")

    with ThreadPoolExecutor(jobs) as executor:
        return [result for result in executor.map(attempt, cells) if result is not None]


def write_report(path, values, jobs=None, unit="logD7.4"):
    """Writes a study's results as JSON, with the command, the unit, versions and hardware."""
    threads = {"threads_a_run": max(1, os.cpu_count() // jobs)} if jobs else {}
    report = {"command": as_text(sys.argv), "unit": unit, "machine": machine() | threads}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report | values, indent=2) + "\n")


def interval(values):
    """Returns mean and half width of its 95 % interval (Student's t); the width is `None` for one value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def with_interval(pair, signed=False):
    """Returns what `interval` returns as text."""
    mean, half = pair
    return f"{mean:{'+' if signed else ''}.3f}" + ("" if half is None else f" ± {half:.3f}")
