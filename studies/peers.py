"""Other methods on the same splits: gradient boosting on descriptors, and chemprop with its defaults.

    python studies/peers.py --peer descriptor_boosting --seed 0 --output_dir outputs/boosting
    python studies/peers.py --peer chemprop --chemprop chemprop_env/bin/chemprop --output_dir outputs/chemprop

Takes the data and splits of run_regression.py (the same seed gives the same split), chooses on the validation part,
reads the test part once, and writes all_results.json and predictions.csv of the same form. With --refit the validation
part is learned too, once it has chosen. chemprop is no requirement of this project: install it in an environment of
its own, `python -m venv chemprop_env && chemprop_env/bin/pip install chemprop==2.3.1`.

Friedman, Greedy function approximation: a gradient boosting machine, 2001. Heid et al., Chemprop, 2024,
https://doi.org/10.1021/acs.jcim.3c01250.
"""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import DataTrainingArguments, InputError, ModelArguments, TrainingArguments  # noqa: E402
from utils_runs import begin_writing, end_writing, run_script, setup_run  # noqa: E402


DEFAULTS = {"output_dir": "outputs/peers"}
PEERS = ("descriptor_boosting", "chemprop")


@dataclass
class PeerArguments:
    """Which method, and where it is."""

    peer: str = field(default="descriptor_boosting", metadata={"choices": PEERS, "help": "Method."})
    chemprop: str = field(  # not in the command that a chain keeps: where it stands says nothing of what it is
        default_factory=lambda: os.environ.get("CHEMPROP") or "chemprop",
        metadata={"help": "The program of chemprop 2. Default: that of the environment variable CHEMPROP, if any."},
    )
    refit: bool = field(
        default=False,
        metadata={"help": "Fit boosting again to the training and validation parts, with the number of trees found."},
    )

    def __post_init__(self):
        if self.refit and self.peer != "descriptor_boosting":
            raise ValueError(f"--refit is not for --peer {self.peer}. Leave it out.")


ARGUMENTS = (ModelArguments, DataTrainingArguments, PeerArguments, TrainingArguments)


def descriptor_boosting(molecules, seed, refit=False):
    """Returns predictions of gradient boosting on Morgan counts and RDKit descriptors, shape (N,).

    The number of trees is the one of the lowest squared error on the validation part, at most 1,000.

    Args:
        refit (`bool`): whether as many trees are then fitted to the training and validation parts together.
    """
    from rdkit.Chem import Descriptors
    from sklearn.ensemble import HistGradientBoostingRegressor

    from utils_molecules import morgan_counts, parse_smiles

    parsed = map(parse_smiles, molecules["group"])  # none of a canonical SMILES that cannot be read again
    descriptors = pd.DataFrame([{} if one is None else Descriptors.CalcMolDescriptors(one) for one in parsed])
    descriptors = descriptors.to_numpy(dtype=float)
    descriptors[~np.isfinite(descriptors)] = np.nan  # the trees take missing values
    features = np.hstack((morgan_counts(molecules["group"]), descriptors))
    labels, split = molecules["label"].to_numpy(), molecules["split"].to_numpy()
    train, validation = split == "train", split == "validation"

    def fit(rows, trees):
        options = {"learning_rate": 0.05, "max_leaf_nodes": 31, "early_stopping": False, "random_state": seed}
        return HistGradientBoostingRegressor(max_iter=trees, **options).fit(features[rows], labels[rows])

    stages = fit(train, 1000).staged_predict(features[validation])
    errors = [np.mean((predicted - labels[validation]) ** 2) for predicted in stages]
    return fit(train | (validation & refit), int(np.argmin(errors)) + 1).predict(features)


def chemprop(molecules, seed, program, epochs=50):
    """Returns predictions of `chemprop train` with its defaults, shape (N,); the epoch is chosen on validation."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        table = pd.DataFrame({"smiles": molecules["smiles"], "label": molecules["label"]})
        table["split"] = molecules["split"].map({"train": "train", "validation": "val", "test": "test"})
        table.to_csv(folder / "data.csv", index=False)
        table[["smiles"]].to_csv(folder / "smiles.csv", index=False)
        train = ["train", "--data-path", "data.csv", "--smiles-columns", "smiles", "--target-columns", "label"]
        train += ["--splits-column", "split", "--task-type", "regression", "--epochs", str(epochs)]
        train += ["--pytorch-seed", str(seed), "--output-dir", "run", "--accelerator", "cpu", "--num-workers", "0"]
        predict = ["predict", "--test-path", "smiles.csv", "--smiles-columns", "smiles", "--accelerator", "cpu"]
        predict += ["--model-paths", "run/model_0/best.pt", "--preds-path", "predictions.csv", "--num-workers", "0"]
        for command in (train, predict):
            try:
                done = subprocess.run([program, *command], cwd=folder, capture_output=True, text=True)
            except OSError as error:
                raise InputError(f"{program} cannot be run: {error}. Pass --chemprop.") from error
            if done.returncode:
                raise InputError(f"chemprop {command[0]} failed: {done.stderr[-1500:]}")
        return pd.read_csv(folder / "predictions.csv")["label"].to_numpy()


def main(model_args, data_args, peer_args, training_args):
    setup_run(training_args, data_args)

    from utils_checkpoints import load_tokenizer
    from utils_molecules import load_molecules, regression_metrics, write_csv
    from utils_report import metrics_table
    from utils_runs import write_json

    training_args.do_train = True
    molecules, digest, _ = load_molecules(load_tokenizer(model_args), model_args, data_args, training_args)
    if "label" not in molecules:
        raise InputError("These methods learn one label. Pass one --label_column.")
    if not {"validation", "test"} <= set(molecules["split"]):
        raise InputError(
            "These methods choose on validation molecules, and are judged by test molecules. Leave --protocol paper "
            "and fractions of 0 out."
        )
    begin_writing(training_args, None)
    start = time.perf_counter()
    if peer_args.peer == "chemprop":
        program = peer_args.chemprop
        program = str(Path(program).resolve()) if "/" in program else program
        predictions = chemprop(molecules, training_args.seed, program)
    else:
        predictions = descriptor_boosting(molecules, training_args.seed, peer_args.refit)
    if peer_args.refit:
        molecules["split"] = molecules["split"].replace("validation", "train")  # that is what it was in the end
    metrics = {"seconds": time.perf_counter() - start, "split_hash": digest}
    lines = []
    for name in molecules["split"].unique():
        part = (molecules["split"] == name).to_numpy()
        values = regression_metrics(predictions[part], molecules["label"][part])
        metrics |= {f"{name}_{key}": value for key, value in values.items()} | {f"{name}_samples": int(part.sum())}
        lines.append((peer_args.peer, name, int(part.sum()), values))
    output_dir = Path(training_args.output_dir)
    table = molecules[["row", "smiles", "label", "split"]].rename(columns={"smiles": "SMILES"})
    write_csv(table.assign(prediction=predictions), output_dir / "predictions.csv")
    write_json(metrics, output_dir / "all_results.json")
    end_writing(training_args)
    print(metrics_table(lines))


if __name__ == "__main__":
    run_script(main, ARGUMENTS, DEFAULTS, __doc__)
