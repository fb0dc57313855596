"""Do influence scores foretell what training on a part of the molecules does? A linear datamodeling score.

    python studies/influence_lds.py                    # about an hour a seed

Trains the last layer and the head of the embedded checkpoint (the states below are fixed, so they are computed once)
on random halves of the training molecules, and correlates their validation and test losses with the sums of the scores
of the molecules that each half has (Park et al., TRAK, 2023, https://arxiv.org/abs/2303.14186; theirs is the mean of
one correlation for each molecule that is tested, this one is that of the mean loss, which is what run_influence.py
foretells, and the two cannot be compared). The scores are of run_influence.py for the model that was trained on all:
by LiSSA, by conjugate gradients and without the inverse curvature; once with all of these parameters, and once with
those of the head alone. Beside them stands the loss of the model that is linear in its parameters, as group influence
has it, after a refit to the half. Every half is trained twice: how well the trainings agree gives the most that any
score could reach with losses of so much noise. Writes results/influence_lds.json and .md: rank correlations, means
over the seeds, with bootstrap intervals over the halves (of these seeds: other seeds are not in them), and the largest
residual of the solutions. Seeds that stand there are not repeated, nor halves of a seed that was interrupted; two
processes may compute different seeds.
"""

import argparse
import copy
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from common import ROOT, write_report
from filelock import FileLock
from run_once import checksums
from scipy import stats

from arguments import EMBEDDED_DATA, DataTrainingArguments, ModelArguments, TrainingArguments
from modeling_molformer_reg import MolformerForRegression
from run_influence import InfluenceArguments
from trainer_regression import select_parts
from utils_checkpoints import load_tokenizer
from utils_influence import (
    GROUP_DAMPING,
    PROJECTION_SIZE,
    MoleculeProblem,
    choose_parameters,
    inverse_curvature,
    linearize,
    molecule_losses,
    scores_by_jvp,
)
from utils_molecules import load_molecules
from utils_runs import read_json, write_text


BATCH, EPOCHS, RATE = 32, 7, 6e-4
TARGETS = ("validation", "test")
CEILING = "the most that a score could reach"
SOLVERS = {
    "lissa": {"ihvp": "lissa"},
    "cg": {"ihvp": "cg", "recursion_depth": 60, "tolerance": 1e-2},
    "identity": {"ihvp": "identity"},
}
REFIT = "refit of the linear model"


def pad_states(molecules):
    """Returns a batch of the column `states`, (T, C) each, as the model takes it."""
    states = [torch.as_tensor(rows) for rows in molecules["states"]]
    masks = [torch.ones(len(rows), dtype=torch.long) for rows in states]
    padded = (torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True) for tensors in (states, masks))
    return dict(zip(("inputs_embeds", "attention_mask"), padded, strict=True))


class UpperProblem(MoleculeProblem):
    """The last layer and the head on states that were computed before."""

    def batch(self, molecules):
        return pad_states(molecules)


def upper_part(model):
    """Returns a model of one layer, the last one of `model`, with its head."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.embedding_dropout_prob = 1, 0.0
    upper = MolformerForRegression(config)
    last = f".layer.{model.config.num_hidden_layers - 1}."
    weights = {name.replace(last, ".layer.0."): tensor for name, tensor in model.state_dict().items()}
    upper.load_state_dict({name: tensor for name, tensor in weights.items() if name in upper.state_dict()})
    return upper.requires_grad_(True)


@torch.no_grad()
def add_states(model, tokenizer, molecules):
    """Adds the states below the last layer as a column."""
    problem = MoleculeProblem(model, tokenizer, ["classifier.out_proj.bias"], 64, "ggn")
    states = [None] * len(molecules)
    for positions, rows in problem.chunks(molecules):
        output = model.molformer(**problem.batch(rows), output_hidden_states=True).hidden_states[-2]
        for position, length, tokens in zip(positions, rows["length"], output, strict=True):
            states[position] = tokens[:length].numpy()
    return molecules.assign(states=states)


def train(start, molecules, seed):
    """Returns the model trained on molecules, from `start`, with Adam and a linear schedule."""
    model = copy.deepcopy(start).train()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    steps = EPOCHS * -(-len(molecules) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        order = generator.permutation(len(molecules))
        for rows in np.array_split(order, -(-len(molecules) // BATCH)):
            part = molecules.iloc[rows]
            labels = torch.tensor(part["label"].to_numpy(), dtype=torch.float32)
            model(**pad_states(part), labels=labels).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def rank_correlation(foretold, measured):
    """Returns Spearman's rank correlation along the last axis."""
    first, second = (stats.rankdata(values, axis=-1) for values in (foretold, measured))
    first, second = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (first, second))
    norms = np.sqrt((first**2).sum(axis=-1) * (second**2).sum(axis=-1))
    return (first * second).sum(axis=-1) / norms


def correlation(pairs, draws=2000):
    """Returns the mean over seeds of the rank correlation, and those of bootstrap samples of the halves of each.

    The samples are the same for everything that is foretold of the same losses, so that differences are paired.

    Args:
        pairs (`list[tuple]`): of each seed what was foretold and what was measured of its halves.
    Returns:
        `float`, and `np.ndarray` of shape (draws,).
    """
    generator, means, samples = np.random.default_rng(0), [], []
    for foretold, measured in pairs:
        rows = generator.integers(len(measured), size=(draws, len(measured)))
        means.append(rank_correlation(np.asarray(foretold), np.asarray(measured)))
        samples.append(rank_correlation(np.asarray(foretold)[rows], np.asarray(measured)[rows]))
    return float(np.mean(means)), np.mean(samples, axis=0)


def ceiling(agreement, trainings):
    """Returns the correlation of a mean of trainings with what they have in common, from that of two of them.

    Spearman 1910 and Brown 1910: the square root of n r / (1 + (n - 1) r); 0 where they do not agree.
    """
    agreement = np.maximum(agreement, 0.0)
    return np.sqrt(trainings * agreement / (1 + (trainings - 1) * agreement))


def within(values):
    """Returns the 95 % interval of bootstrap samples as low and high."""
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return {"low": float(low), "high": float(high)}


def foretell(scores, halves):
    """Returns a number for each half of the molecules that orders the losses after learning it alone: the lower the
    more helpful molecules it has, whose scores are positive."""
    return [-float(scores[half].sum()) for half in halves]


class Kept:
    """What is known of a seed that is being studied, in a file that a line is added to whenever more is.

    Its name has a hash of the settings; a line that was cut is left out.
    """

    def __init__(self, folder, seed, settings):
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        self.path, self.values = Path(folder) / f"seed-{seed}-{key}.jsonl", {}
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for line in lines:
            try:
                self.values |= json.loads(line)
            except ValueError:
                break
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(f"{json.dumps(self.values)}\n", self.path)

    def get(self, name, compute):
        """Returns what is known by a name, or computes and keeps it."""
        if name not in self.values:
            self.values[name] = compute()
            with self.path.open("a") as file:
                file.write(f"{json.dumps({name: self.values[name]})}\n")
        return self.values[name]


def refit(gradients, residuals, damping, target, halves):
    """Returns the target's mean loss after the linear model was fitted to each half alone.

    Without the molecules S the residual of x is r_x + b_xS (I - b_SS)^-1 r_S, b being as in `group_influence`.
    """
    train = gradients["train"]
    matrix = 2 * train.T @ train
    matrix.diagonal().add_(len(train) * damping)
    inverse = torch.cholesky_solve(train.T, torch.linalg.cholesky(matrix))
    own, pull = 2 * train @ inverse, 2 * gradients[target] @ inverse  # (N, N), (n, N)
    losses = []
    for half in halves:
        left = np.setdiff1d(np.arange(len(train)), half)
        system = torch.eye(len(left), dtype=torch.float64) - own[left][:, left]
        pushed = torch.linalg.solve(system, residuals["train"][left])
        losses.append(float((residuals[target] + pull[:, left] @ pushed).square().mean()))
    return losses


def study_seed(seed, args, settings):
    """Returns what each solver foretells of the halves of a seed, and their losses by target, (halves, trainings)."""
    model_args, data_args = ModelArguments(model_name_or_path=args.model), DataTrainingArguments(split="random")
    training_args = TrainingArguments(output_dir=str(ROOT / "work" / "lds"), seed=seed)
    tokenizer = load_tokenizer(model_args)
    molecules, _, _ = load_molecules(tokenizer, model_args, data_args, training_args)
    parts = select_parts(molecules, data_args)
    torch.manual_seed(seed)
    model = MolformerForRegression.from_pretrained(args.model).eval()
    labels = parts["train"]["label"].to_numpy()
    model.config.label_mean, model.config.label_std = [float(labels.mean())], [float(labels.std())]
    parts = {
        name: add_states(model, tokenizer, part.sample(min(args.molecules, len(part)), random_state=seed))
        for name, part in parts.items()
    }
    start, pool = upper_part(model), parts["train"]
    generator = np.random.default_rng(seed)
    halves = [np.sort(generator.permutation(len(pool))[: len(pool) // 2]) for _ in range(args.subsets)]

    def foretold():
        """Returns a row for each part of the model, target and solver, with what it foretells of the halves."""
        whole, rows = train(start, pool, seed), []
        for params, title in (("all", "last layer and head"), ("head", "head")):
            names = [name for name in choose_parameters(whole, params) if "word_embeddings" not in name]
            problem = UpperProblem(whole, tokenizer, names, 64, "ggn")
            linear = linearize(problem, {"train": pool, **{target: parts[target] for target in TARGETS}}, seed)
            for target in TARGETS:
                gradient, place = problem.gradient(parts[target]), {"seed": seed, "params": title, "target": target}
                for solver, options in SOLVERS.items():
                    solutions, report = inverse_curvature(problem, pool, gradient, InfluenceArguments(**options), seed)
                    scores = problem.each(scores_by_jvp, pool, solutions.mean(dim=0)).numpy()
                    row = {**place, "solver": solver, "residual": report.get("residual")}
                    print(row, flush=True)
                    rows.append(row | {"foretold": foretell(scores, halves)})
                rows.append({**place, "solver": REFIT, "foretold": refit(*linear, target, halves)})
        return rows

    def measured(number):
        """Returns the losses of a half, (trainings, targets)."""
        losses = []
        for repeat in range(args.trainings):
            trained = train(start, pool.iloc[halves[number]], 1000 * (number + 1) + repeat)
            problem = UpperProblem(trained, tokenizer, ["classifier.out_proj.bias"], 128, "ggn")
            losses.append([float(problem.each(molecule_losses, parts[target]).mean()) for target in TARGETS])
        print(seed, number, np.round(losses, 4).tolist(), flush=True)
        return losses

    kept = Kept(args.folder, seed, settings)
    rows = kept.get("rows", foretold)  # before the trainings, which take long
    numbers = range(args.subsets)
    losses = np.array([kept.get(str(number), lambda number=number: measured(number)) for number in numbers])
    return rows, dict(zip(TARGETS, losses.transpose(2, 0, 1).tolist(), strict=True))


def summarize(report):
    """Returns for each part of the model, target and solver the score, and how far it is above that without curvature.

    And for each target the most that a score could reach, from how well two trainings of the halves agree.
    """
    names, losses = ("params", "target", "solver"), report["losses"]
    keys = dict.fromkeys(tuple(row[name] for name in names) for row in report["seeds"])
    found = {}
    for key in keys:
        rows = [row for row in report["seeds"] if tuple(row[name] for name in names) == key]
        # the mean of several trainings has less noise of its own
        found[key] = correlation(
            [(row["foretold"], np.mean(losses[str(row["seed"])][key[1]], axis=1)) for row in rows]
        )
    for target in dict.fromkeys(key[1] for key in keys):
        both = [np.transpose(values[target]) for values in losses.values()]
        if all(len(trainings) > 1 for trainings in both):
            agreement, samples = correlation([trainings[:2] for trainings in both])
            found["", target, CEILING] = ceiling(agreement, len(both[0])), ceiling(samples, len(both[0]))
    summary = []
    for (params, target, solver), (lds, samples) in found.items():
        row = {"params": params, "target": target, "solver": solver, "seeds": len(losses)}
        row |= {"lds": float(lds), **within(samples)}
        of_key = [r for r in report["seeds"] if tuple(r[name] for name in names) == (params, target, solver)]
        residuals = [r["residual"] for r in of_key if r.get("residual") is not None]
        row |= {"residual": max(residuals)} if residuals else {}
        if solver not in ("identity", CEILING) and (params, target, "identity") in found:
            plain, plain_samples = found[params, target, "identity"]
            row["minus_identity"] = {"mean": lds - plain, **within(samples - plain_samples)}
        summary.append(row)
    return summary


def to_markdown(summary):
    """Returns the table of the README."""
    lines = ["| parameters | loss of | foretold by | residual | seeds | linear datamodeling score | minus identity |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | ---: |"]
    for row in summary:
        cells = [f"{row['lds']:.3f}, {row['low']:.3f} to {row['high']:.3f}", ""]
        if (minus := row.get("minus_identity")) is not None:
            cells[1] = f"{minus['mean']:+.3f}, {minus['low']:+.3f} to {minus['high']:+.3f}"
        residual = f"{row['residual']:.2g}" if "residual" in row else ""
        names = [row["params"], row["target"], row["solver"], residual, str(row["seeds"])]
        lines.append(f"| {' | '.join([*names, *cells])} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models" / "molformer-mini"), help="pre-trained checkpoint")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--subsets", type=int, default=60, help="halves of the training molecules a seed")
    parser.add_argument("--trainings", type=int, default=2, help="trainings of each half, of which the mean is taken")
    parser.add_argument("--molecules", type=int, default=1500, help="most molecules of each part")
    parser.add_argument("--folder", type=Path, default=ROOT / "work" / "lds", help="where unfinished seeds are kept")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "influence_lds.json")
    args = parser.parse_args()
    weights = checksums([str(Path(args.model).resolve())])
    settings = {"weights": weights, "batch": BATCH, "epochs": EPOCHS, "rate": RATE}
    settings |= {name: getattr(args, name) for name in ("subsets", "trainings", "molecules")}
    settings["solvers"] = {name: asdict(InfluenceArguments(**options)) for name, options in SOLVERS.items()}
    settings |= {"projection": PROJECTION_SIZE, "group_damping": GROUP_DAMPING, "data": checksums([EMBEDDED_DATA])}
    settings["format"] = 3  # with what was foretold, a linear refit among it, and the losses of every training
    if not weights:
        raise SystemExit(f"There are no weights in a folder {args.model}, and a report is known by them. Fetch them.")

    def known():
        before = read_json(args.output)
        if before and before.get("settings") != settings:  # of other weights at the same path, too
            raise SystemExit(f"{args.output} is of other settings or weights. Give another --output, or remove it.")
        return before

    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        if str(seed) in known().get("losses", {}):
            continue
        rows, losses = study_seed(seed, args, settings)
        with FileLock(args.folder / "lock"):  # another process may add a seed meanwhile, even this one
            before = known()
            if str(seed) in before.get("losses", {}):
                continue
            report = {"settings": settings, "seeds": [*before.get("seeds", []), *rows]}
            report["losses"] = {**before.get("losses", {}), str(seed): losses}
            before = {"summary": summarize(report), **report}
            write_report(args.output, before, unit="rank correlation")
            args.output.with_suffix(".md").write_text(to_markdown(before["summary"]))
    print(to_markdown(known()["summary"]))


if __name__ == "__main__":
    main()
