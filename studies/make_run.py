"""How long `make run` takes on a fresh clone, apart from downloads.

    python studies/make_run.py

Clones this repository into a temporary folder, lets make install the environment there (timed apart, because downloads
depend on the network), times `make run`, and writes results/make_run.json. Run it on a quiet machine.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

from common import ROOT, machine


def timed(command, folder):
    """Runs a command in a folder and returns its seconds."""
    start = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return round(time.perf_counter() - start, 1)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        report = {
            "command": "python studies/make_run.py",
            "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=clone, text=True).strip(),
            "machine": machine(),
            "install_seconds": timed(["make", ".venv/.ready"], clone),
            "run_seconds": timed(["make", "run"], clone),
        }
        report["results"] = json.loads((clone / "outputs" / "regression" / "all_results.json").read_text())
    (ROOT / "results" / "make_run.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"install {report['install_seconds']} s, run {report['run_seconds']} s")


if __name__ == "__main__":
    main()
