"""Masked language modeling on SMILES with MoLFormer, from a checkpoint or from scratch.

    python run_mlm.py                                      # adapts models/molformer-mini to the training molecules
    python run_mlm.py --train_file corpus.txt.xz --config_name configs/molformer-mini.json --max_steps 10000

With a table that has a label column (by default data/lipophilicity.csv) the split is the one that run_regression.py
makes from the same seed, and only its training molecules are learned; any other file (text with one SMILES a line,
CSV, TSV, .gz, .xz, Hub data set) is a corpus of which a part is held out. Writes to --output_dir the checkpoint,
which `run_regression.py --model_name_or_path` takes, all_results.json with perplexity and masked accuracy of the
held-out part, and loss curves.

Devlin et al., BERT, 2019, https://arxiv.org/abs/1810.04805 (the masking).
"""

import logging
import math
import os
import warnings
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from arguments import (
    DataTrainingArguments,
    InputError,
    ModelArguments,
    TrainingArguments,
    begin_writing,
    end_writing,
    run_script,
    setup_run,
)


DEFAULTS = {"output_dir": "outputs/mlm", "learning_rate": 6e-4, "per_device_eval_batch_size": 128}
TEXT_SUFFIXES = (".txt", ".smi", ".smiles")
LOSSES = {
    "mlm": "cross-entropy of a masked token",
    "mtr": "mean squared error of standardized descriptors",
    "mlm+mtr": "cross-entropy of a masked token + descriptor error",
}
MOST_HELD_OUT = 10_000  # molecules of a corpus; more would cost time and tell nothing new

logger = logging.getLogger("molformer.mlm")


@dataclass
class MlmArguments:
    """What is masked, and how a corpus is read."""

    objective: str = field(
        default="mlm",
        metadata={
            "choices": ["mlm", "mtr", "mlm+mtr"],
            "help": "Masked language modeling; multi-task regression of RDKit descriptors; or both at once.",
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are to be predicted."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that read a corpus. Default: one a core."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Read the corpus again although it is cached."})

    def __post_init__(self):
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"--mlm_probability is {self.mlm_probability}; give a number between 0 and 1.")
        self.masks, self.describes = "mlm" in self.objective, "mtr" in self.objective
        self.preprocessing_num_workers = self.preprocessing_num_workers or os.cpu_count()


ARGUMENTS = (ModelArguments, DataTrainingArguments, MlmArguments, TrainingArguments)


def is_corpus(path):
    """Whether a file is text with one SMILES a line, by its name without .gz, .xz, .bz2 or .zst."""
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in (".gz", ".xz", ".bz2", ".zst")]
    return bool(suffixes) and suffixes[-1] in TEXT_SUFFIXES


def read_corpus(path, data_args, cache_dir=None):
    """Returns a text, CSV or TSV file as a memory-mapped `datasets.Dataset`; the column of text is `smiles`.

    Raises:
        InputError: if the file is absent, empty or not UTF-8, or has no SMILES column.
    """
    import datasets

    from utils_molecules import read_header

    columns, separator = read_header(path)
    text = is_corpus(path)
    if text:
        options = {}
    else:
        options = {"sep": separator, "usecols": [find_smiles(columns, data_args, path)], "keep_default_na": False}
    try:
        corpus = datasets.load_dataset(
            "text" if text else "csv",
            data_files=str(path),
            split="train",
            encoding="utf-8-sig",
            cache_dir=cache_dir,
            **options,
        )
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        reason = error.__cause__ or error
        raise InputError(f"{path} cannot be read as UTF-8 {'text' if text else 'CSV'}: {reason}") from error
    return corpus.rename_column(corpus.column_names[0], "smiles") if text else corpus


def find_smiles(columns, data_args, source):
    """Returns the name of the SMILES column; an `InputError` if there is none."""
    from utils_molecules import SMILES_COLUMNS, find_column

    column = find_column(columns, data_args.smiles_column, SMILES_COLUMNS, "--smiles_column", source)
    if column is None:
        raise InputError(f"{source} has no SMILES column; it has: {', '.join(columns)}. Pass --smiles_column.")
    return column


def take_smiles(corpus, data_args, source):
    """Returns the column of the SMILES alone, called `smiles`; an `InputError` if there is none, or no row."""
    column = find_smiles(corpus.column_names, data_args, source)
    if not len(corpus):
        raise InputError(f"{source} holds no molecule.")
    corpus = corpus.select_columns([column])
    return corpus if column == "smiles" else corpus.rename_column(column, "smiles")


def encode_batch(batch, tokenizer, smiles_form, max_length, descriptor_names=None):
    """Returns token ids, lengths, what is wrong with each SMILES ("" if nothing) and, if any are named, descriptors.

    For `datasets.Dataset.map`.
    """
    from utils_molecules import canonicalize, compute_descriptors, encode_smiles, parse_smiles

    # a .smi line may name its molecule after the SMILES
    texts = [((line or "").split() or [""])[0] for line in batch["smiles"]]
    if smiles_form != "raw":
        texts = [canonicalize(text, smiles_form) for text in texts]
    ids, problems = encode_smiles([text or "" for text in texts], tokenizer)
    reasons = [
        "invalid" if not text else problem or ("too_long" if len(row) > max_length else "")
        for text, row, problem in zip(texts, ids, problems, strict=True)
    ]
    columns = {"input_ids": ids, "length": [len(row) for row in ids], "reason": reasons}
    if descriptor_names:
        molecules = [None if reason else parse_smiles(text) for text, reason in zip(texts, reasons, strict=True)]
        columns["reason"] = [
            reason or ("" if molecule else "invalid") for reason, molecule in zip(reasons, molecules, strict=True)
        ]
        columns["descriptors"] = [
            compute_descriptors(molecule, descriptor_names) if molecule else [] for molecule in molecules
        ]
    return columns


def encode_corpus(corpus, tokenizer, data_args, mlm_args, source, descriptor_names=None):
    """Returns the corpus as memory-mapped token ids with lengths, cached on disk, and a table of the dropped rows.

    Args:
        descriptor_names (`list[str]`, *optional*): RDKit descriptors that are computed and kept with the ids.

    Raises:
        InputError: if a molecule cannot be used and `--invalid_smiles` is `error`, or if none is left.
    """
    import datasets
    import numpy as np
    import pandas as pd

    from utils_molecules import REASONS, describe_unusable

    columns = {
        "input_ids": datasets.List(datasets.Value("uint16")),
        "length": datasets.Value("int32"),
        "reason": datasets.Value("string"),
    }
    if descriptor_names:
        columns["descriptors"] = datasets.List(datasets.Value("float32"))
    encoded = corpus.map(
        encode_batch,
        batched=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "smiles_form": data_args.smiles_form,
            "max_length": data_args.max_length,
            "descriptor_names": descriptor_names,
        },
        num_proc=min(mlm_args.preprocessing_num_workers, max(1, len(corpus) // 1000)),
        remove_columns=corpus.column_names,
        features=datasets.Features(columns),
        load_from_cache_file=not mlm_args.overwrite_cache,
        desc="Reading SMILES" + (f" and computing {len(descriptor_names)} descriptors" if descriptor_names else ""),
    )
    reasons = encoded.with_format("arrow")["reason"]
    reasons = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in reasons[:].chunks])
    bad = np.flatnonzero(reasons != "")
    if len(bad):
        smiles = corpus[bad[:1000]]["smiles"]
        message = describe_unusable(reasons[bad[:1000]], bad[:1000], smiles, len(corpus), source)
        if len(bad) > 1000:
            message = f"{len(bad)} of {len(corpus)} molecules cannot be used; of the first 1000: {message}"
        if data_args.invalid_smiles == "error":
            raise InputError(f"{message} Correct them, or pass --invalid_smiles drop to go on without them.")
        logger.warning("%s Dropped.", message)
        dropped = pd.DataFrame({"row": bad, "smiles": corpus[bad]["smiles"], "reason": reasons[bad]})
        dropped = dropped.replace({"reason": REASONS}).assign(source=str(source))
        encoded = encoded.select(np.flatnonzero(reasons == ""))
    else:
        dropped = pd.DataFrame()
    if len(encoded) < 2:
        raise InputError(f"{source} has {len(encoded)} usable molecules; masked language modeling needs at least 2.")
    return encoded.remove_columns("reason"), dropped


class PretrainingCollator:
    """Pads a batch, masks its tokens if `mlm_probability` is given, and stacks descriptors where there are any.

    Of the chosen tokens 80 % become `<mask>`, 10 % another token, 10 % stay. What is masked is a function of the batch
    and the seed, not of a random state: a resumed run masks as the uninterrupted one, whatever was prefetched.
    """

    def __init__(self, tokenizer, mlm_probability, seed):
        self.tokenizer = tokenizer
        self.mlm_probability = mlm_probability
        self.seed = seed

    def __call__(self, examples):
        import torch

        batch = self.tokenizer.pad([{"input_ids": e["input_ids"]} for e in examples], return_tensors="pt")
        if "descriptors" in examples[0]:
            batch["descriptors"] = torch.tensor([e["descriptors"] for e in examples])  # (B, M)
        return batch if self.mlm_probability is None else self.mask(batch)

    def mask(self, batch):
        """Returns the batch with masked `input_ids` (B, T), and `labels` (B, T) that are -100 elsewhere."""
        import torch

        ids = batch["input_ids"]
        generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), self.seed % 2**32))
        specials = torch.tensor(
            [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id]
        )
        draws, fates = torch.rand((2, *ids.shape), generator=generator)
        chosen = (draws < self.mlm_probability) & ~torch.isin(ids, specials)
        batch["labels"] = torch.where(chosen, ids, -100)
        batch["input_ids"] = torch.where(chosen & (fates < 0.8), self.tokenizer.mask_token_id, ids)
        others = torch.randint(len(self.tokenizer), ids.shape, generator=generator)
        batch["input_ids"] = torch.where(chosen & (fates >= 0.9), others, batch["input_ids"])
        return batch


class PretrainingMetrics:
    """What an evaluation keeps of each batch, and the metrics over all of them, by the objective's labels."""

    def __init__(self, model, label_names):
        self.model = model
        self.label_names = label_names

    def score(self, logits, labels):
        """Returns scores of the labels, in their order; for `preprocess_logits_for_metrics`."""
        logits = dict(zip(self.label_names, logits if isinstance(logits, tuple) else (logits,), strict=False))
        labels = dict(zip(self.label_names, labels if isinstance(labels, tuple) else (labels,), strict=True))
        scores = []
        if "labels" in labels:
            scores.append(score_tokens(logits["labels"], labels["labels"]))
        if "descriptors" in labels:
            target = self.model.descriptor_head.standardize(labels["descriptors"])
            scores += [logits["descriptors"].float(), target]  # (B, M) each
        return tuple(scores)

    def compute(self, output):
        """Returns the metrics of all scores; for `compute_metrics`."""
        scores = list(output.predictions if isinstance(output.predictions, tuple) else (output.predictions,))
        metrics = mlm_metrics(scores.pop(0)) if "labels" in self.label_names else {}
        return metrics | (descriptor_metrics(*scores) if scores else {})


def score_tokens(logits, labels):
    """Returns for each molecule how many labeled tokens were predicted right, their summed loss and number, (B, 3).

    In this form an evaluation set takes three numbers a molecule, not T times V logits.
    """
    import torch

    labeled = labels != -100
    losses = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )  # (B, T)
    right = (logits.argmax(dim=-1) == labels) & labeled
    return torch.stack((right.sum(dim=1), losses.sum(dim=1), labeled.sum(dim=1)), dim=1).float()


def mlm_metrics(scores):
    """Returns perplexity and accuracy over all labeled tokens, from the sums of `score_tokens`, shape (N, 3)."""
    right, loss, count = scores.astype("float64").sum(axis=0)
    metrics = {"masked_tokens": int(count)}
    if count:  # a held-out part of a few small molecules may have none
        metrics |= {"masked_accuracy": right / count, "perplexity": math.exp(loss / count)}
    return metrics


def descriptor_metrics(predictions, targets):
    """Returns mean squared error of standardized descriptors (N, M), and R² averaged over those that vary."""
    squares = ((predictions - targets).astype("float64") ** 2).mean(axis=0)  # (M,)
    variances = targets.astype("float64").var(axis=0)
    varying = variances > 1e-6
    metrics = {"descriptor_mse": float(squares.mean())}
    if varying.any():
        metrics["descriptor_r2"] = float((1 - squares[varying] / variances[varying]).mean())
    return metrics


def load_data(tokenizer, model_args, data_args, mlm_args, training_args, descriptor_names=None):
    """Returns training data, held-out data, the hash of the split (`None` for a corpus) and the dropped rows.

    Molecules with labels are split as run_regression.py splits them, and its test molecules are not learned. A part of
    a corpus is held out, and of labeled molecules where `--protocol paper` gives no validation part.
    """
    import datasets

    from trainer_regression import augment
    from utils_molecules import LABEL_COLUMNS, find_column, load_hub_dataset, load_molecules, read_header

    held_out = digest = None
    if data_args.dataset_name is not None:
        source = data_args.dataset_name
        corpus = load_hub_dataset(source, data_args.dataset_config_name, model_args.cache_dir)
        columns = corpus.column_names
    else:
        source = data_args.train_file
        columns = [] if is_corpus(source) else read_header(source)[0]
    if find_column(columns, data_args.label_column, LABEL_COLUMNS, "--label_column", source) is not None:
        molecules, digest, dropped = load_molecules(tokenizer, model_args, data_args, training_args)
        as_text = replace(data_args, smiles_form="raw")  # canonical already
        parts = {
            name: encode_corpus(
                datasets.Dataset.from_dict({"smiles": molecules.loc[molecules["split"] == name, "text"].tolist()}),
                tokenizer, as_text, mlm_args, source, descriptor_names,
            )[0]
            for name in ("train", "validation")
            if (molecules["split"] == name).any()
        }  # fmt: skip
        train, held_out = parts["train"], parts.get("validation")
        logger.info("%s has labels: learning the training molecules of its split alone", source)
    else:
        if data_args.dataset_name is None:
            corpus = read_corpus(source, data_args, model_args.cache_dir)
        corpus = take_smiles(corpus, data_args, source)
        train, dropped = encode_corpus(corpus, tokenizer, data_args, mlm_args, source, descriptor_names)
        if data_args.validation_file is not None:
            corpus = take_smiles(
                read_corpus(data_args.validation_file, data_args, model_args.cache_dir), data_args, source
            )
            held_out, _ = encode_corpus(
                corpus, tokenizer, data_args, mlm_args, data_args.validation_file, descriptor_names
            )
    if held_out is None:
        size = max(1, min(MOST_HELD_OUT, round(len(train) * data_args.validation_fraction)))
        seed = training_args.seed if data_args.split_seed is None else data_args.split_seed
        train, held_out = train.train_test_split(test_size=size, seed=seed).values()
    if data_args.max_train_samples is not None:
        train = train.select(range(min(len(train), data_args.max_train_samples)))
    if data_args.augment_smiles and training_args.do_train:
        workers = min(mlm_args.preprocessing_num_workers, max(1, len(train) // 1000))
        train = augment(
            train, tokenizer, data_args.augment_smiles, training_args.seed, data_args.max_length, num_proc=workers
        )
    if data_args.max_eval_samples is not None:
        held_out = held_out.select(range(min(len(held_out), data_args.max_eval_samples)))
    return train, held_out.sort("length", reverse=True), digest, dropped


def describe_scale(train, sample=100_000):
    """Returns mean and standard deviation of the descriptors of the training molecules, each (M,), by a sample.

    Values that are not finite do not count.
    """
    import numpy as np

    sampled = train.select(range(0, len(train), max(1, len(train) // sample)))
    column = sampled.with_format("arrow")["descriptors"][:]
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    values = values.reshape(len(sampled), -1).astype(np.float64)
    broken = ~np.isfinite(values)
    if broken.any():
        logger.warning(
            "%d of %d descriptor values are missing or infinite; the mean stands in for them",
            broken.sum(),
            values.size,
        )
    values[broken] = np.nan
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a descriptor that is never finite
        return np.nan_to_num(np.nanmean(values, axis=0)), np.nan_to_num(np.nanstd(values, axis=0))


def main(model_args, data_args, mlm_args, training_args):
    checkpoint = setup_run(training_args, data_args)

    from modeling_molformer_reg import MolformerForMaskedLM
    from trainer_regression import MolformerTrainer, check_split, load_config, load_model, load_tokenizer
    from utils_molecules import default_descriptors, plot_losses, write_csv

    # Data, tokenizer and model
    tokenizer = load_tokenizer(model_args)
    names = None
    if mlm_args.describes:
        names = load_config(model_args).descriptor_names or default_descriptors()
    train, held_out, digest, dropped = load_data(tokenizer, model_args, data_args, mlm_args, training_args, names)
    model = load_model(MolformerForMaskedLM, model_args, tokenizer, **({"descriptor_names": names} if names else {}))
    check_split(model.config, digest, data_args, checkpoint)
    if digest is not None:
        model.config.split_hash = digest
    if names and "descriptor_head." in model.new_heads:
        model.descriptor_head.set_scale(*describe_scale(train))
    logger.info("%d training molecules, %d held out, %d parameters", len(train), len(held_out), model.num_parameters())

    # Trainer
    training_args.remove_unused_columns = False  # the collator takes what it needs
    training_args.label_names = ["labels"] * mlm_args.masks + ["descriptors"] * mlm_args.describes
    metrics = PretrainingMetrics(model, training_args.label_names)
    mlm_probability = mlm_args.mlm_probability if mlm_args.masks else None
    trainer = MolformerTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=PretrainingCollator(tokenizer, mlm_probability, training_args.seed),
        compute_metrics=metrics.compute,
        preprocess_logits_for_metrics=metrics.score,
    )
    begin_writing(training_args, checkpoint, model_args.model_name_or_path)
    if len(dropped) and trainer.is_world_process_zero():
        write_csv(dropped, Path(training_args.output_dir) / "dropped_molecules.csv")

    # Train
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        metrics = {**result.metrics, "train_samples": len(train), "train_steps": trainer.state.global_step}
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    # Evaluate
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(held_out)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if trainer.is_world_process_zero():
            path = Path(training_args.output_dir) / "loss_curves.png"
            plot_losses(trainer.state.log_history, path, "held-out", LOSSES[mlm_args.objective])
    end_writing(training_args)


if __name__ == "__main__":
    run_script(main, ARGUMENTS, DEFAULTS, __doc__)
