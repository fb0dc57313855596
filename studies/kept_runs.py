"""Keeps what the finished runs of a study came to, so that it can go on with them elsewhere.

    python studies/kept_runs.py              # after a study: adds the runs in outputs/ and work/ to results/runs.jsonl
    python studies/kept_runs.py --restore    # before one: lays them where the studies look for finished runs

A line is a run: its folder, its command with the checksums of the files and weights that it names (see run_once.py),
its all_results.json, those of an ensemble's members as far as they are known (alone where the ensemble itself did not
finish), the machine on which it was kept first and the time of its command (none in the oldest lines). Weights and
predictions are not kept, so a run that starts from another run's model has to be trained with it. A folder that is
there is left as it is.
"""

import argparse
import json
import os
from pathlib import Path

from common import machine
from run_once import ROOT, is_finished

from utils_runs import write_text


RUNS = ROOT / "results" / "runs.jsonl"
FOLDERS = ("outputs", "work")
RESULTS = "all_results.json"


def finished_runs(root):
    """Yields a record of every run that a study has finished below `root`."""
    for note in sorted(path for name in FOLDERS for path in (root / name).rglob("*.command")):
        folder = note.with_suffix("")
        members = sorted(folder.glob("member-*"))
        record = {"folder": str(folder.relative_to(root)), "command": note.read_text().splitlines()}
        if is_finished(folder) and all(map(is_finished, members)):
            record["results"] = json.loads((folder / RESULTS).read_text())
        if finished := [path for path in members if is_finished(path)]:  # of an unfinished ensemble too
            record["members"] = {path.name: json.loads((path / RESULTS).read_text()) for path in finished}
        if {"results", "members"} & set(record):
            yield record


def read_records(path):
    """Returns the kept records by their folders (`dict[str, dict]`)."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["folder"]: record for record in map(json.loads, lines)}


def keep(root=ROOT, path=RUNS):
    """Adds the finished runs to the kept ones, in place of those of the same folders, and returns their number."""
    records = read_records(path)
    for record in finished_runs(root):
        before = records.get(record["folder"], {})
        if {**before, **record} != before:  # a new one, not one that was restored
            time = int((root / f"{record['folder']}.command").stat().st_mtime)
            records[record["folder"]] = record | {"machine": machine(), "time": time}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text("".join(json.dumps(records[folder]) + "\n" for folder in sorted(records)), path)
    return len(records)


def restore(root=ROOT, path=RUNS):
    """Lays kept results where the studies look for finished runs, and returns the folders that it made."""
    made = []
    for name, record in read_records(path).items():
        folder = root / name
        note = folder.with_name(f"{folder.name}.command")
        if folder.exists() or note.exists():
            continue
        whole = {".": record["results"]} if "results" in record else {}
        for place, results in (whole | record.get("members", {})).items():
            (folder / place).mkdir(parents=True, exist_ok=True)
            (folder / place / RESULTS).write_text(json.dumps(results, indent=4) + "\n")
        note.write_text("\n".join(record["command"]) + "\n")
        time = record.get("time", 0)
        os.utime(note, (time, time))  # where two cells disagree, the newest counts
        made.append(name)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restore", action="store_true", help="lay the kept results where the studies look for them")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder that has the runs in outputs/ and work/")
    args = parser.parse_args()
    if args.restore:
        print(f"{len(restore(args.root))} runs restored.")
    else:
        print(f"{keep(args.root)} runs are kept in {RUNS.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
