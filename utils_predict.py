"""Prediction for files of any length: rows in, rows out, in their order and in bounded memory.

    python run_regression.py --do_predict --model_name_or_path outputs/regression --test_file new.csv

The file is read in pieces; worker processes write the SMILES of the next piece as the model reads them while the model
predicts this one. Every row of the file gives one row: its own columns, `prediction` and its spreads, and `status`.
"""

import logging
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from arguments import InputError
from trainer_regression import summarize_predictions
from utils_molecules import (
    SMILES_COLUMNS,
    check_smiles,
    encode_random_smiles,
    find_column,
    find_labels,
    label_metrics,
    read_header,
)


REPORTED = ("rmse", "mae", "r2")
STATUS = {"invalid": "invalid SMILES", "lost": "unknown token", "unknown": "unknown token", "too_long": "too long"}
PIECE = 20_000  # rows that are read at a time
INLINE = 2_000  # rows below which worker processes do not pay
ADDED = ("prediction", "prediction_sd", "augment_sd", "status")

logger = logging.getLogger("molformer.predict")


# ----------------------------------------------------------------------------------------------- reading and writing


def open_table(source, data_args):
    """Returns the file in pieces of text columns (iterator of `pandas.DataFrame`), its SMILES column and all columns.

    Args:
        source (`str`): CSV or TSV with a header, also .gz and .xz; text with one SMILES a line (.smi, .txt); `-` for
            standard input, a CSV.
    Raises:
        InputError: if there is no such file or no SMILES column, or if it has a column that is to be written.
    """
    options = {"dtype": str, "keep_default_na": False, "skip_blank_lines": False, "chunksize": PIECE}
    if source == "-":
        pieces = pd.read_csv(sys.stdin, sep=None, engine="python", **options)
        first = next(pieces)
        pieces, columns = chain([first], pieces), list(first.columns)
    elif Path(source.removesuffix(".gz").removesuffix(".xz")).suffix in (".smi", ".txt", ".smiles"):
        read_header(source)  # refuses a file that is not there, or empty
        columns = ["SMILES"]
        # a .smi line may name its molecule after the SMILES
        pieces = pd.read_csv(
            source, sep="\x00", header=None, names=columns, quoting=3, encoding="utf-8-sig", **options
        )
        pieces = (piece.assign(SMILES=piece["SMILES"].str.split().str[0].fillna("")) for piece in pieces)
    else:
        columns, separator = read_header(source)
        pieces = pd.read_csv(source, sep=separator, encoding="utf-8-sig", **options)
    smiles = find_column(columns, data_args.smiles_column, SMILES_COLUMNS, "--smiles_column", source)
    if smiles is None:
        raise InputError(f"{source} has no SMILES column; it has: {', '.join(columns)}. Pass --smiles_column.")
    taken = [name for name in columns if name in ADDED]
    if taken:
        raise InputError(f"{source} has a column {taken[0]!r}, which the predictions would replace. Rename it.")
    return pieces, smiles, columns


def read_pieces(pieces, source):
    """Yields the pieces; what is wrong in the middle of a file ends in an `InputError` that names the file."""
    done = 0
    try:
        for piece in pieces:
            if not isinstance(piece.index, pd.RangeIndex):
                raise InputError(f"{source} has more fields in its rows than columns in its header.")
            yield piece.reset_index(drop=True)
            done += len(piece)
    except (pd.errors.ParserError, UnicodeDecodeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source} cannot be read on after row {done - 1}: {error}") from error


class Writer:
    """Writes pieces of a table to a CSV, whole or not at all, or to standard output if `path` is `None`."""

    def __init__(self, path):
        self.path = None if path is None else Path(path)
        self.part = None if path is None else self.path.with_name(f"{self.path.name}.part")
        self.file = sys.stdout if path is None else self.part.open("w", encoding="utf-8", newline="")
        self.begun = False

    def write(self, table):
        table.to_csv(self.file, index=False, header=not self.begun, lineterminator="\n")
        self.begun = True

    def close(self):
        """Gives the file its name; not called if something failed before."""
        if self.path is not None:
            self.file.close()
            self.part.replace(self.path)
        else:
            self.file.flush()


class EmbeddingWriter:
    """Writes the pooled states of all rows: parquet piece by piece; safetensors, which has no pieces, at the end.

    In parquet a row without a prediction has no embedding; in safetensors `rows` says whose the `embeddings` are.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.parquet, self.total, self.rows, self.states = None, 0, [], []

    def write(self, rows, states, count):
        """Takes states (N, C) of the given rows of a piece of `count` rows."""
        if self.path.suffix == ".safetensors":
            self.rows.append(np.asarray(rows, dtype=np.int64) + self.total)
            self.states.append(states)
        else:
            import pyarrow
            from pyarrow.parquet import ParquetWriter

            embeddings = pd.Series(list(states), index=rows, dtype=object).reindex(range(count))
            values = [None if isinstance(value, float) else value for value in embeddings]
            column = pyarrow.array(values, pyarrow.list_(pyarrow.float32()))
            table = pyarrow.table({"row": np.arange(self.total, self.total + count), "embedding": column})
            self.parquet = self.parquet or ParquetWriter(self.path, table.schema)
            self.parquet.write_table(table)
        self.total += count

    def close(self):
        if self.parquet is not None:
            self.parquet.close()
        elif self.rows:
            from safetensors.numpy import save_file

            save_file({"embeddings": np.concatenate(self.states), "rows": np.concatenate(self.rows)}, self.path)


# -------------------------------------------------------------------------------------------------------- prediction


def prepare(smiles, tokenizer, form, max_length, num_forms, seed):
    """Returns token ids of every molecule and its random SMILES, and what is wrong with each (`None` if nothing).

    Args:
        smiles (`list[str]`): as given.
    Returns:
        `list[list[list[int]]]`, empty where a molecule cannot be used; and `list[str | None]`.
    """
    texts, ids, reasons = check_smiles(smiles, tokenizer, form, max_length)
    forms = []
    for text, own, reason in zip(texts, ids, reasons, strict=True):
        if reason is not None:
            forms.append([])
        else:
            forms.append([own, *encode_random_smiles(text, own, tokenizer, num_forms, seed, max_length)])
    return forms, reasons


def prepared_pieces(pieces, smiles_column, arguments, workers):
    """Yields every piece with what `prepare` makes of it; worker processes prepare the next one meanwhile."""
    pool = None

    def start(piece):
        nonlocal pool
        smiles = [text.strip() for text in piece[smiles_column]]
        if len(smiles) < INLINE or workers < 2:
            return [prepare(smiles, *arguments)]
        if pool is None:  # spawned: a fork of a process whose threads compute may hang
            pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
        size = -(-len(smiles) // (4 * workers))
        parts = [smiles[first : first + size] for first in range(0, len(smiles), size)]
        return [pool.submit(prepare, part, *arguments) for part in parts]

    def finish(parts):
        parts = [part if isinstance(part, tuple) else part.result() for part in parts]
        return list(chain(*(forms for forms, _ in parts))), list(chain(*(reasons for _, reasons in parts)))

    try:
        waiting = None
        for piece in pieces:
            begun = (piece, start(piece))
            if waiting is not None:
                yield waiting[0], *finish(waiting[1])
            waiting = begun
        if waiting is not None:
            yield waiting[0], *finish(waiting[1])
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


class Predictor:
    """One or several models that predict token ids, on all processes.

    Args:
        models (`list[MolformerForRegression]`): members of an ensemble; of embeddings the first one's count.
    """

    def __init__(self, models, tokenizer, training_args):
        precision = "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "no"
        self.accelerator = Accelerator(cpu=training_args.use_cpu, mixed_precision=precision)
        self.models = [model.to(self.accelerator.device).eval() for model in models]
        self.tokenizer = tokenizer
        self.batch_size = training_args.per_device_eval_batch_size

    def predict(self, encoded, with_states=False, bar=None):
        """Returns predictions, shape (N, members, K), in label units, and pooled states (N, C) or `None`.

        Args:
            encoded (`list[list[int]]`): token ids; batches are of like length, the order of the answer is theirs.
        """
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        mine = []
        # every process takes each N-th batch, so that all have long and short ones
        for rows in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
            batch = self.tokenizer.pad({"input_ids": [encoded[row] for row in rows]}, return_tensors="pt")
            mine.append((rows, *self.predict_batch(batch.to(self.accelerator.device), with_states)))
            if bar is not None:
                bar.update(len(rows) * self.accelerator.num_processes)
        done = gather_object(mine) if self.accelerator.num_processes > 1 else mine
        count, outputs = len(encoded), self.models[0].num_labels
        predictions = np.empty((count, len(self.models), outputs))
        states = np.empty((count, self.models[0].config.hidden_size), dtype=np.float32) if with_states else None
        for rows, values, pooled in done:
            predictions[rows] = values
            if with_states:
                states[rows] = pooled
        return predictions, states

    @torch.inference_mode()
    def predict_batch(self, batch, with_states):
        values, state = [], None
        with self.accelerator.autocast() if self.accelerator.mixed_precision != "no" else nullcontext():
            for number, model in enumerate(self.models):
                predictions, pooled = model.predict_with_states(**batch)
                values.append(predictions.double().cpu())
                if number == 0 and with_states:
                    state = pooled.float().cpu().numpy()
        return torch.stack(values, dim=1).numpy(), state


def find_measured(columns, data_args, names, source):
    """Returns the columns of measured labels, in the order of the model's; none if the file lacks one of them."""
    if names and data_args.label_column is None:
        return list(names) if set(names) <= set(columns) else []
    found = find_labels(columns, data_args.label_column, "--label_column", source)
    if data_args.label_column and len(found) != max(1, len(names)):
        raise InputError(f"--label_column names {len(found)} columns, but the model predicts {max(1, len(names))}.")
    return found


def predict_file(models, tokenizer, data_args, regression_args, training_args, path):
    """Predicts every row of `--test_file`, writes the table, and returns what was done (`dict`).

    Args:
        path (`Path` or `None`): the CSV that is written; `None` for standard output.
    Returns:
        rows, rows of each status, seconds, molecules a second, and the metrics if the file has labels.
    Raises:
        InputError: if the file cannot be read, or a prediction is not finite.
    """
    started, source = time.monotonic(), data_args.test_file
    pieces, smiles_column, columns = open_table(source, data_args)
    config = models[0].config
    names = config.label_names or []
    labels = find_measured(columns, data_args, names, source)
    form, num_forms = config.smiles_form or data_args.smiles_form, regression_args.predict_augment
    arguments = (tokenizer, form, data_args.max_length, num_forms, training_args.seed)
    predictor = Predictor(models, tokenizer, training_args)
    main, exported = training_args.should_save, regression_args.export_embeddings
    writer = Writer(path) if main else None
    embeddings = EmbeddingWriter(exported) if main and exported else None
    statuses, measured, total = {}, [], 0
    bar = tqdm(desc="Predicting", unit=" SMILES", disable=training_args.disable_tqdm or not training_args.should_log)
    workers = max(1, regression_args.preprocessing_num_workers)
    for piece, forms, reasons in prepared_pieces(read_pieces(pieces, source), smiles_column, arguments, workers):
        usable = [row for row, reason in enumerate(reasons) if reason is None]
        flat = [ids for row in usable for ids in forms[row]]
        values, states = predictor.predict(flat, exported is not None, bar)
        broken = int((~np.isfinite(values)).sum())
        if broken:
            raise InputError(f"{broken} predictions are not finite: the checkpoint is broken. Use another one.")
        members = values.reshape(len(usable), num_forms + 1, len(models), -1).transpose(2, 0, 1, 3)
        prediction, spreads = summarize_predictions(list(members))
        for number, end in enumerate([f"_{name}" for name in names] or [""]):
            for name, numbers in {"prediction": prediction, **spreads}.items():
                column = pd.Series(numbers[:, number], index=usable, dtype=float)
                piece[f"{name}{end}"] = column.reindex(range(len(piece)))
        piece["status"] = [STATUS.get(reason, "ok") for reason in reasons]
        for status, count in piece["status"].value_counts().items():
            statuses[status] = statuses.get(status, 0) + int(count)
        if labels:
            numbers = piece[labels].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)[usable]
            known = np.isfinite(numbers).any(axis=1)
            measured.append(np.stack([prediction[known], numbers[known]]))
        if main:
            writer.write(piece)
            if embeddings is not None:
                own = states[:: num_forms + 1]
                embeddings.write(usable, own, len(piece))
        total += len(piece)
    bar.close()
    if main:
        writer.close()
        if embeddings is not None:
            embeddings.close()
    seconds = time.monotonic() - started
    report = {"predict_samples": total, "predict_seconds": seconds, "predict_samples_per_second": total / seconds}
    report |= {f"predict_{status.replace(' ', '_')}": count for status, count in statuses.items()}
    if measured:
        predictions, labels = np.concatenate(measured, axis=1)
        if len(labels):
            report |= {f"predict_{key}": value for key, value in label_metrics(predictions, labels, names).items()}
            report["predict_labeled"] = len(labels)
    return report


def summary_line(report):
    """Returns what `predict_file` did as one line."""
    statuses = ["ok", *dict.fromkeys(STATUS.values())]
    counts = [(report.get(f"predict_{status.replace(' ', '_')}", 0), status) for status in statuses]
    line = f"{report['predict_samples']} rows in {report['predict_seconds']:.1f} s "
    line += f"({report['predict_samples_per_second']:.0f} a second): "
    line += ", ".join(f"{count} {status}" for count, status in counts if count)
    if "predict_labeled" in report:
        numbers = [f"{name} {report[f'predict_{name}']:.4f}" for name in REPORTED if f"predict_{name}" in report]
        line += f"; {report['predict_labeled']} with labels: {', '.join(numbers)}"
    return line
