"""Turns the runs of a pre-training, one after the other, into a checkpoint that ships.

    python studies/ship_checkpoint.py outputs/stage1 outputs/stage2 --until 5000 --output models/molformer-mini

Takes the weights of the last run without the head of the atoms (it is larger than the rest allows, and fine-tuning
does not need it), and writes beside them all_results.json of the last run (its evaluation), training_log.json with the
losses and held-out metrics of all runs by the molecules seen, and loss_curves.png. In README.md of the output folder
the table between the two marks is replaced. `--until` gives for each run but the last the step at which the next one
took over. With `--after FOLDER` the runs continue the checkpoint in that folder, whose log comes first.
"""

import argparse
import json
import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils_runs import read_json  # noqa: E402


COLUMNS = {
    "eval_masked_accuracy": "masked accuracy",
    "eval_perplexity": "perplexity",
    "eval_descriptor_mse": "descriptor MSE",
    "eval_atom_mse": "atom MSE",
    "eval_environment_1_accuracy": "one bond",
    "eval_environment_2_accuracy": "two bonds",
}
KEPT = ("loss", "learning_rate", "eval_loss", *COLUMNS)


def read_log(runs, until, before=None, processes=()):
    """Returns the logged entries of all runs in turn, with the molecules seen so far.

    Args:
        before (`Path`, *optional*): a checkpoint of this script that the first run continued.
        processes (`list[int]`, *optional*): how many each run had; one where nothing is said.
    """
    entries, seen = [], 0
    if before is not None:
        entries = json.loads((before / "training_log.json").read_text())
        seen = json.loads((before / "all_results.json").read_text())["molecules"]
    earlier = max((entry["run"] for entry in entries), default=0)
    for number, run in enumerate(runs):
        states = [*run.glob("checkpoint-*/trainer_state.json"), *run.glob("trainer_state.json")]
        states = [json.loads(path.read_text()) for path in states]
        state = max(states, key=lambda state: state["global_step"])
        last = until[number] if number < len(until) else state["global_step"]
        if last > state["global_step"]:
            raise SystemExit(f"The log of {run} ends at step {state['global_step']}, before {last}.")
        batch = state["train_batch_size"] * read_json(run / "arguments.json").get("gradient_accumulation_steps", 1)
        batch *= processes[number] if number < len(processes) else 1
        logged = [{key: entry[key] for key in KEPT if key in entry} for entry in state["log_history"]]
        first = next((values for values in logged if values), None)
        if any(first.items() <= entry.items() for entry in entries if first):
            raise SystemExit(f"{before or runs} have the log of {run} already.")
        for entry, values in zip(state["log_history"], logged, strict=True):
            if values and entry["step"] <= last:
                entries.append({"run": earlier + number + 1, "molecules": seen + entry["step"] * batch, **values})
        seen += last * batch
    return entries, seen


def table(entries):
    """Returns the held-out metrics as Markdown, one line an evaluation."""
    lines = [f"| molecules | {' | '.join(COLUMNS.values())} |", "| ---: " * (1 + len(COLUMNS)) + "|"]
    for entry in entries:
        if "eval_loss" in entry:
            cells = [f"{entry[key]:.3f}" if key in entry else "" for key in COLUMNS]
            line = f"| {entry['molecules']:,} | {' | '.join(cells)} |"
            if line != lines[-1]:  # the last step is evaluated twice
                lines.append(line)
    return "\n".join(lines)


def plot(entries, path):
    """Draws training and held-out loss by the molecules seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, name in (("loss", "training"), ("eval_loss", "held-out")):
        points = [(entry["molecules"] / 1e3, entry[key]) for entry in entries if key in entry]
        axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 50 else None, markersize=4, label=name)
    axes.set(xlabel="thousand molecules seen", ylabel="sum of the objectives' losses", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def store_half(path):
    """Rounds the weights of a safetensors file to float16, half of its size.

    Raises:
        ValueError: if a weight is too large for it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.half() for name, tensor in load_file(path).items()}
    large = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if large:
        raise ValueError(f"{large[0]} does not fit into float16.")
    save_file(weights, path, metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of run_mlm.py, the last one finished")
    parser.add_argument("--until", nargs="*", type=int, default=[], help="last step of each run but the last")
    parser.add_argument("--after", type=Path, help="checkpoint that the first run continued; may be the output folder")
    parser.add_argument("--processes", nargs="*", type=int, default=[], help="of each run; default: one")
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "molformer-mini")
    parser.add_argument("--half", action="store_true", help="store float16; config.json has them loaded as float32")
    args = parser.parse_args()

    from modeling_molformer_reg import MolformerForMaskedLM
    from utils_checkpoints import build_tokenizer

    entries, seen = read_log(args.runs, args.until, args.after, args.processes)
    model = MolformerForMaskedLM.from_pretrained(args.runs[-1], atom_descriptor_names=None, environment_buckets=None)
    model.save_pretrained(args.output)
    if args.half:
        store_half(args.output / "model.safetensors")
    (args.output / "modeling_molformer_reg.py").unlink(missing_ok=True)  # the repository's own serves
    config = json.loads((args.output / "config.json").read_text())
    # the last two are how the corpus was read; it was canonical, and so are the SMILES of a fine-tuning by default
    for name in ("auto_map", "smiles_form", "smiles_max_length"):
        config.pop(name, None)
    (args.output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    build_tokenizer().save_pretrained(args.output)

    (args.output / "training_log.json").write_text(json.dumps(entries, indent=1) + "\n")
    results = json.loads((args.runs[-1] / "all_results.json").read_text())
    results = {key: value for key, value in results.items() if not key.startswith(("train_", "epoch"))}  # of one run
    (args.output / "all_results.json").write_text(json.dumps(results | {"molecules": seen}, indent=2) + "\n")
    plot(entries, args.output / "loss_curves.png")
    card = args.output / "README.md"
    if card.exists():
        marks = re.compile(r"(<!-- table -->\n).*?(<!-- end -->)", re.DOTALL)
        card.write_text(marks.sub(lambda m: f"{m[1]}{table(entries)}\n{m[2]}", card.read_text()))
    print(table(entries))


if __name__ == "__main__":
    main()
