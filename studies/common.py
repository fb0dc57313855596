"""What the studies share: runs of a script that are not repeated once they are finished, intervals, the machine.

python -c "from common import *; print(machine())"     # in this folder
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from run_once import ROOT, as_text, run_once
from scipy import stats

from arguments import gains_by_bfloat16
from utils_runs import write_text


def machine():
    """Returns versions and hardware, as a table needs them beside it."""
    packages = ("torch", "transformers", "accelerate", "datasets", "peft", "rdkit", "scikit-learn", "numpy")
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "processor": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "bfloat16": gains_by_bfloat16(use_cpu=not torch.accelerator.is_available()),  # then trainings are in it
    }


def _lines(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def run_script(command, folder, threads):
    """Runs a script of this project into a folder, unless that is done, and returns its all_results.json (`dict`)."""
    run_once(folder, command, threads)
    return json.loads((Path(folder) / "all_results.json").read_text())


class StudyParser(argparse.ArgumentParser):
    """Refuses further flags for runs that would take the place of kept ones, and of the table of these."""

    def parse_args(self, *args, **kwargs):
        values = super().parse_args(*args, **kwargs)
        usual = [name for name in ("folder", "output") if getattr(values, name) == self.get_default(name)]
        if getattr(values, "extra", "") and usual:
            self.error("--extra makes other runs: give them a --folder and an --output of their own.")
        values.folder = values.folder.resolve()  # the scripts run in another folder than this may
        return values


def study_parser(description, folder, output, script=None):
    """Returns a parser with the arguments of a study that runs scripts: folder, results file, runs at a time.

    Args:
        script (`str`, *optional*): whose further flags --extra takes; without it there is no --extra.
    """
    parser = StudyParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "work" / folder, help="where the runs are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / output, help="the results file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time; they share the cores")
    if script is not None:
        parser.add_argument("--extra", default="", help=f"further flags of {script} for all runs, as one text")
    return parser


PARTS = ("train", "validation", "test")  # learned, the epoch chosen on, tested on
FAILED = []  # commands of the cells that did, for the report


def run_all(run, cells, jobs):
    """Returns `run(cell, threads)` of all cells, `jobs` at a time, which share the cores; without those that fail."""
    threads = max(1, os.cpu_count() // jobs)

    def attempt(cell):
        try:
            return run(cell, threads)
        except subprocess.CalledProcessError as error:
            FAILED.append(as_text(error.cmd[1:]))
            print(f"Failed, and left out of the table: {FAILED[-1]}. Its log stands beside its folder.")
        except SystemExit as error:  # a folder that another process writes, or that no study made
            FAILED.append(str(error))
            print(f"Left out of the table: {error}")

    with ThreadPoolExecutor(jobs) as executor:
        return [result for result in executor.map(attempt, cells) if result is not None]


def write_report(path, values, jobs=None, unit="logD7.4"):
    """Writes a study's results as JSON, with the command, the unit, versions and hardware."""
    threads = {"threads_a_run": max(1, os.cpu_count() // jobs)} if jobs else {}
    report = {"command": as_text(sys.argv), "unit": unit, "machine": machine() | threads}
    report |= {"failed": FAILED} if FAILED else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(report | values, indent=2) + "\n", path)


def place_of(path, values, cells_of, folder):
    """Returns where a report goes: to `path`, or into `folder` if the one at `path` holds runs that this one lacks.

    So a part of a study never replaces the table of all of it, nor of another part.

    Args:
        cells_of (`Callable`): what the runs of a report (`dict`) are of, as a `set`.
    """
    if path.exists() and not cells_of(json.loads(path.read_text())) <= cells_of(values):
        print(f"{path} holds runs that are not among these, and stays; these are in {folder / path.name}.")
        return folder / path.name
    return path


def interval(values, test_share=0.2):
    """Returns mean and half width of its 95 % interval over seeds; the width is `None` for one value.

    Every seed splits the same molecules, so the values depend on one another and the plain t interval is too narrow:
    the variance is corrected by test_share / (1 - test_share) (Nadeau and Bengio 2003,
    https://doi.org/10.1023/A:1024068626366; what is held out to choose an epoch counts as learned), and Student's t
    has n - 1 degrees of freedom.

    Args:
        test_share (`float`): share of the molecules that every split holds out; 0 for values that are independent.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), None
    variance = values.var(ddof=1) * (1 / len(values) + test_share / (1 - test_share))
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * np.sqrt(variance))


def held_out_share(values, parts=PARTS):
    """Returns the share that the last of `parts` has of the molecules of all of them, in a run's results."""
    sizes = [values[f"{part}_samples"] for part in parts]
    return sizes[-1] / sum(sizes)


def with_interval(pair, signed=False):
    """Returns what `interval` returns as text."""
    mean, half = pair
    return f"{mean:{'+' if signed else ''}.3f}" + ("" if half is None else f" ± {half:.3f}")
