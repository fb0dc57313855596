"""Runs a script into a folder, unless the same command has finished there; how studies and chains are continued.

    python studies/run_once.py outputs/cell run_regression.py --seed 1     # runs, continues, replaces or does nothing

The same command means the same flags, with the same bytes in every file and model that they name (the code aside). An
interrupted run continues, one of another command is replaced, and it says so. The command and the log stand beside the
folder.
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arguments import InputError  # noqa: E402
from utils_runs import (  # noqa: E402
    LOCK_FILE,
    UNFINISHED,
    is_finished,
    last_complete_checkpoint,
    lock,
    run_pieces,
    write_text,
)


def as_text(command):
    """Returns a command line as a table names it: files of this folder as seen from it, others by their names."""

    def shown(part):
        if not part.startswith("/"):
            return part
        path = Path(part).resolve()
        return str(path.relative_to(ROOT)) if ROOT in path.parents else path.name

    return "python " + shlex.join(map(shown, command))


def checksums(command):
    """Returns a line for each file that a command names, and for the weights of each model, adapter or ensemble."""
    named = []
    for path in (Path(ROOT, part) for part in command):
        named += [path, *sorted(path.glob("*.safetensors")), *sorted(path.glob("member-*/*.safetensors"))]
    return [f"# {path.name}: {zlib.crc32(path.read_bytes()):08x}" for path in named if path.is_file()]


def note_of(folder, command):
    """Returns the file that says how a folder was made, and what it says if this command made it."""
    folder = Path(folder).resolve()
    command = [*command, "--output_dir", str(folder)]
    text = "\n".join([as_text(command), *checksums(command[1:-1])]) + "\n"
    return folder.with_name(f"{folder.name}.command"), text


def is_made_by(note, text):
    """Returns whether a folder's note has the command and the checksums of `text`.

    It may have more of them: of a model that the run started from and that is no longer there.
    """
    if not note.exists():
        return False
    kept, (command, *files) = note.read_text().splitlines(), text.splitlines()
    return kept[:1] == [command] and set(files) <= set(kept)


def is_done(folder, command):
    """Returns whether this very command has finished in a folder (see `run_once`)."""
    note, text = note_of(folder, command)
    return is_made_by(note, text) and is_finished(folder)


def run_once(folder, command, threads=None):
    """Runs a script with `--output_dir folder`, as far as that is not done.

    Args:
        command (`list[str]`): script and flags, without --output_dir.
        threads (`int`, *optional*): of the process; by default the environment's.
    Raises:
        subprocess.CalledProcessError: if the script fails.
    """
    note, text = note_of(folder, command)
    folder = Path(folder).resolve()
    command = [*command, "--output_dir", str(folder)]
    if not note.exists() and folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds something that no run of a study made. Remove it, or give another folder.")
    if not is_made_by(note, text):
        if folder.exists():
            try:
                lock(folder).release()
            except InputError as error:
                raise SystemExit(str(error)) from error
            if any(path.name != LOCK_FILE for path in folder.iterdir()):
                print(f"{folder} is of another command, or of other files, and is replaced.")
            shutil.rmtree(folder)  # nothing may take it for one of this command
        folder.mkdir(parents=True)
        write_text(text, note)
    elif is_finished(folder):
        return
    for part in command:
        start = Path(ROOT, part)
        if is_finished(start) and not any(start.glob("**/*.safetensors")):
            raise SystemExit(f"The results of {start} were restored without its weights. Remove it to train it again.")
    begun = last_complete_checkpoint(folder) is not None or run_pieces(folder)
    resume = begun and (folder / UNFINISHED).exists()
    mode = ["--resume_from_checkpoint", "true"] if resume else ["--overwrite_output_dir"]
    print(f"{time.strftime('%H:%M:%S')} {folder.name}\n", end="", flush=True)  # in one piece, beside other processes
    with folder.with_name(f"{folder.name}.log").open("a") as log:
        subprocess.run(
            [sys.executable, *command, *mode, "--disable_tqdm", "true"],
            cwd=ROOT,
            env=os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
            stdout=log,
            stderr=log,
            check=True,
        )


def main():
    folder, *command = sys.argv[1:]
    try:
        run_once(folder, command)
    except subprocess.CalledProcessError as error:
        log = Path(folder).with_name(f"{Path(folder).name}.log")
        print(*log.read_text().splitlines()[-5:], sep="\n")
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
