"""Prediction for files of any length: rows in, rows out, in their order and in bounded memory.

    python run_regression.py --do_predict --model_name_or_path outputs/regression --test_file new.csv

The file is read in pieces; worker processes write the SMILES of the next piece as the model reads them while the model
predicts this one. Every row of the file gives one row: its own columns, `prediction` and its spreads, and `status`.
"""

import csv
import logging
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from arguments import InputError
from utils_molecules import (
    LINE,
    MISSING,
    OTHER_COLUMN,
    UNREADABLE,
    check_file,
    check_smiles,
    describe,
    encode_random_smiles,
    find_labels,
    find_smiles,
    has_lines,
    label_metrics,
    not_utf8,
    read_header,
    read_header_lines,
    refuse_joined,
    refuse_repeated,
    split_header,
    unix_lines,
)
from utils_report import summarize_predictions
from utils_runs import begin_writing


REPORTED = ("rmse", "mae", "r2")
STATUS = {"invalid": "invalid SMILES", "lost": "unknown token", "unknown": "unknown token", "too_long": "too long"}
PIECE = 20_000  # rows that are read at a time
INLINE = 40_000  # rows that this process prepares itself: worker processes take as long to start
ADDED = ("prediction", "prediction_sd", "augment_sd")

logger = logging.getLogger("molformer.predict")


# ----------------------------------------------------------------------------------------------- reading and writing


def open_table(source, data_args):
    """Returns the file in pieces of text columns (iterator of `pandas.DataFrame`), its SMILES column and all columns.

    Args:
        source (`str`): CSV or TSV with a header, also .gz and .xz; text with one SMILES a line (.smi, and .txt unless
            its first line is a table's header), of which the rest of a line names its molecule; `-` for standard
            input, a CSV or TSV.
    Raises:
        InputError: if there is no such file, nothing in it, or no SMILES column.
    """
    options = {
        "dtype": str,
        "keep_default_na": False,
        "skip_blank_lines": False,
        "chunksize": PIECE,
        "index_col": False,
    }
    file, name = source, source
    if source == "-":
        name = "Standard input"
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(encoding="utf-8-sig")  # as files are, whatever the locale
        try:
            header = read_header_lines(sys.stdin)
        except UNREADABLE as error:
            raise InputError(f"Standard input cannot be read: {error}") from error
        if not header:
            raise InputError("Standard input is empty, or its first line is. It needs a header and rows.")
        columns, separator = split_header(header.removeprefix("\ufeff"))
        file = sys.stdin
        options |= {"header": None, "names": columns}
    else:
        check_file(source)
        if has_lines(source, data_args.smiles_column):
            columns, separator = ["SMILES", "name"], None
            options |= {"header": None, "quoting": csv.QUOTE_NONE, "names": ["line"], "encoding": "utf-8-sig"}
        else:
            columns, separator = read_header(source)
            options |= {"header": 0, "encoding": "utf-8-sig"}
    smiles = find_smiles(columns, data_args.smiles_column, name)
    refuse_repeated(columns, columns, name)
    return read_pieces(file, name, columns, separator, options), smiles, columns


def read_pieces(file, source, columns, separator, options):
    """Yields the pieces; what is wrong anywhere in a file ends in an `InputError` that names it and the row.

    Args:
        source (`str`): how messages name the `file` (a path, or what is open).
    """
    done, reader = 0, None
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # of fields that would be lost
                reader = reader or pd.read_csv(file, sep=separator or "\x00", **options)
                piece = next(reader, None)
            if piece is None:
                return
            if separator is None:  # a line of SMILES and name
                parts = piece["line"].str.strip().str.extract(LINE)
                piece = pd.DataFrame({"SMILES": parts[0].fillna(""), "name": parts[1].fillna("")})
            elif not isinstance(piece.index, pd.RangeIndex) or piece.shape[1] != len(columns):
                raise ValueError("its rows have more fields than its header")
        except pd.errors.EmptyDataError:  # a header alone
            return
        except (*UNREADABLE, pd.errors.ParserWarning) as error:
            where = f"after row {done - 1}" if done else "from its first row"
            message = None
            if isinstance(error, UnicodeDecodeError):
                message = f"{source} is no UTF-8 ({error}). Save it as UTF-8." if file is sys.stdin else not_utf8(file)
            raise InputError(message or f"{source} cannot be read {where}: {error}") from error
        if not len(piece):
            return
        piece.columns = columns
        if separator is not None:
            refuse_joined(piece.fillna(""), columns, separator, source, done)
        done += len(piece)
        yield piece.fillna("").reset_index(drop=True)


class Writer:
    """Writes pieces of a table to a CSV, whole or not at all, or to standard output if `path` is `None`."""

    def __init__(self, path):
        self.path = None if path is None else Path(path)
        self.part = None if path is None else self.path.with_name(f"{self.path.name}.part")
        self.file = sys.stdout if path is None else self.part.open("w", encoding="utf-8", newline="")
        self.begun = False

    def write(self, table):
        unix_lines(table).to_csv(self.file, index=False, header=not self.begun, lineterminator="\n")
        self.begun = True

    def close(self, columns):
        """Gives the file its name; a file without rows gets the header of these columns."""
        if not self.begun:
            self.write(pd.DataFrame(columns=columns))
        if self.path is not None:
            self.file.close()
            self.part.replace(self.path)
        else:
            self.file.flush()

    def discard(self):
        """Removes a file that was not written to its end."""
        if self.path is not None:
            self.file.close()
            self.part.unlink(missing_ok=True)


class EmbeddingWriter:
    """Writes the pooled states of all rows, whole or not at all.

    Parquet is written piece by piece, and a row without a prediction has no embedding. A safetensors file has no
    pieces: all states stay in memory until the end, and `rows` says whose the `embeddings` are.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.parquet, self.total, self.rows, self.states = None, 0, [], []
        try:
            self.part.touch()
        except OSError as error:
            raise InputError(f"--export_embeddings {path} cannot be written: {error.strerror}.") from error

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
            self.parquet = self.parquet or ParquetWriter(self.part, table.schema)
            self.parquet.write_table(table)
        self.total += count

    def close(self, size):
        """Gives the file its name; without rows it is an empty table of states of this `size`."""
        if not self.total:
            self.write([], np.empty((0, size), dtype=np.float32), 0)
        if self.parquet is not None:
            self.parquet.close()
        else:
            from safetensors.numpy import save_file

            save_file({"embeddings": np.concatenate(self.states), "rows": np.concatenate(self.rows)}, self.part)
        self.part.replace(self.path)

    def discard(self):
        """Removes a file that was not written to its end."""
        if self.parquet is not None:
            self.parquet.close()
        self.part.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- prediction


def prepare(smiles, tokenizer, form, max_length, num_forms, seed, descriptors):
    """Returns what the model takes for every molecule and its random SMILES, and what is wrong with each.

    Args:
        smiles (`list[str]`): as given.
        descriptors (`list[str]` or `None`): names of those that the head reads, computed once a molecule.
    Returns:
        `list[list[dict]]`: token ids and descriptors of each form, none where a molecule cannot be used; and
        `list[str | None]`, `None` if nothing is wrong.
    """
    texts, ids, reasons = check_smiles(smiles, tokenizer, form, max_length)
    forms = []
    for text, own, reason in zip(texts, ids, reasons, strict=True):
        if reason is not None:
            forms.append([])
        else:
            shared = {"descriptors": describe(text, descriptors)} if descriptors else {}
            written = [own, *encode_random_smiles(text, own, tokenizer, num_forms, seed, max_length)]
            forms.append([{"input_ids": ids} | shared for ids in written])
    return forms, reasons


def end_with_parent():
    """Has a worker end when the process that began it does, also if that is killed: no one would stop it then."""

    def wait():
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def prepared_pieces(pieces, smiles_column, arguments, workers, share=slice(None)):
    """Yields every piece with what `prepare` makes of a `share` of it; workers prepare the next one meanwhile."""
    pool, seen = None, 0
    *_, descriptors = arguments
    inline = INLINE // 10 if descriptors else INLINE  # descriptors take ten times as long as all else

    def start(piece):
        nonlocal pool, seen
        smiles = [text.strip() for text in piece[smiles_column][share]]
        seen += len(smiles)
        if seen <= inline or workers < 2:
            return [prepare(smiles, *arguments)]
        if pool is None:  # spawned: a fork of a process whose threads compute may hang
            pool = ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent)
        size = max(1, -(-len(smiles) // (4 * workers)))  # the last piece can have none for this process
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
    """One or several models that predict labels from token ids, on the device of this process.

    Args:
        models (`list[MolformerForRegression]`): members of an ensemble; of embeddings the first one's count.
    """

    def __init__(self, models, tokenizer, training_args):
        if len({tuple(model.config.head_descriptors or ()) for model in models}) > 1:
            raise InputError("The models of this ensemble read different descriptors. Predict with one of them each.")
        self.state = PartialState(cpu=training_args.use_cpu)
        self.device = self.state.device
        self.dtype = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
        self.models = [model.to(self.device).eval() for model in models]
        self.tokenizer = tokenizer
        self.batch_size = training_args.per_device_eval_batch_size

    def predict(self, encoded, with_states=False, bar=None):
        """Returns predictions, shape (N, members, K), in label units, and pooled states (N, C) or `None`.

        Args:
            encoded (`list[dict]`): what `prepare` gives of N forms; batches are of like length, the order of the
                answer is theirs.
        """
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]["input_ids"]))
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        mine = []
        # one block for all batches: weights that are trained are then cast once
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            for rows in batches:
                batch = self.tokenizer.pad([encoded[row] for row in rows], return_tensors="pt")
                mine.append((rows, *self.predict_batch(batch.to(self.device, non_blocking=True), with_states)))
                if bar is not None:
                    bar.update(len(rows) * self.state.num_processes)
        # a GPU is waited for here, not after each batch
        count, outputs = len(encoded), self.models[0].num_labels
        predictions = np.empty((count, len(self.models), outputs))  # every row is filled below
        states = np.empty((count, self.models[0].config.hidden_size), dtype=np.float32) if with_states else None
        for rows, values, pooled in mine:
            predictions[rows] = values.double().cpu().numpy()
            if with_states:
                states[rows] = pooled.float().cpu().numpy()
        return predictions, states

    def predict_forms(self, forms, reasons, num_forms, with_states=False, bar=None):
        """Returns the answers to a piece of N rows, of which every process gives the part that it has prepared.

        Args:
            forms (`list[list[dict]]`): what `prepare` gives of the rows of this process, see `share`, `num_forms` a
                row.
            reasons (`list[str | None]`): what is wrong with each of them.
        Returns:
            what is wrong with each row of the piece; predictions (N, forms, members, K), NaN where something is; and
            pooled states (N, C) or `None`, likewise.
        """
        usable = [row for row, reason in enumerate(reasons) if reason is None]
        predictions, states = self.predict([form for row in usable for form in forms[row]], with_states, bar)
        values = np.full((len(reasons), num_forms, *predictions.shape[1:]), np.nan)
        values[usable] = predictions.reshape(len(usable), *values.shape[1:])
        arrays = [values]
        if with_states:
            pooled = np.full((len(reasons), self.models[0].config.hidden_size), np.nan, dtype=np.float32)
            pooled[usable] = states[::num_forms]
            arrays.append(pooled)
        parts, total = [(reasons, *arrays)], self.state.num_processes
        if total > 1:
            parts = gather_object(parts)
        count = sum(len(part[0]) for part in parts)
        whole = [np.empty((count, *array.shape[1:]), array.dtype) for array in arrays]
        all_reasons = [None] * count
        for rank, (reasons, *arrays) in enumerate(parts):
            all_reasons[rank::total] = reasons
            for array, part in zip(whole, arrays, strict=True):
                array[rank::total] = part
        return all_reasons, *whole, *([] if with_states else [None])

    @property
    def share(self):
        """Which rows of a piece this process prepares and predicts (`slice`)."""
        return slice(self.state.process_index, None, self.state.num_processes)

    def predict_batch(self, batch, with_states):
        """Returns predictions of all models, shape (B, members, K), and the first one's pooled states, or `None`."""
        answers = [model.predict_with_states(**batch) for model in self.models]
        size = self.models[0].config.hidden_size  # descriptors beside the state are no embedding
        states = answers[0][1][:, :size].clone() if with_states else None
        return torch.stack([values for values, _ in answers], dim=1), states


def find_measured(columns, data_args, config, source):
    """Returns the columns of measured labels, in the order of the model's; `None` for one that the file lacks.

    Raises:
        InputError: if `--label_column` names a column that is not there, or other labels than the model's.
    """
    names = config.label_names or []
    known = names or ([config.label_column] if config.label_column else [])
    if not known:  # a column that was found by itself has given the label its name
        known = [name for name in config.id2label.values() if name in columns]
    if data_args.label_column or not known:
        wanted = find_labels(columns, data_args.label_column, "--label_column", source)
    else:
        wanted = [name for name in known if name in columns]
        if not wanted:
            logger.info("%s has no column %s: nothing is measured. --label_column names another one", source,
                        " or ".join(known))  # fmt: skip
    if wanted:
        logger.info("Measured labels for comparison: %s", ", ".join(wanted))
    if not names:
        if len(wanted) > 1:
            raise InputError(f"--label_column names {len(wanted)} columns, but the model predicts one label.")
        return wanted or [None]
    if not set(wanted) <= set(names):
        raise InputError(f"--label_column names {', '.join(wanted)}, but the model predicts {', '.join(names)}.")
    return [name if name in wanted else None for name in names]


def measured_labels(piece, labels):
    """Returns the labels of a piece as numbers, shape (N, K), NaN where there is none, and those that are none."""
    missing, texts = pd.Series(np.nan, index=piece.index), []
    numbers = [missing if name is None else pd.to_numeric(piece[name], errors="coerce") for name in labels]
    for name, values in zip(labels, numbers, strict=True):
        if name is not None:
            cells = piece[name][values.isna()].fillna("").astype(str).str.strip()
            texts += cells[~cells.str.lower().isin(MISSING)].tolist()
    return np.stack(numbers, axis=1).astype(float), texts


def predict_file(models, tokenizer, data_args, regression_args, training_args, path):
    """Predicts every row of `--test_file`, writes the table, and returns what was done (`dict`).

    Args:
        path (`Path` or `None`): the CSV that is written, in `--output_dir`, which is prepared as soon as all input is
            checked; `None` for standard output.
    Returns:
        rows, rows of each status, seconds, molecules a second, and the metrics if the file has labels.
    Raises:
        InputError: if the file cannot be read, has a column that is to be written, or a prediction is not finite.
    """
    started, source = time.monotonic(), data_args.test_file
    pieces, smiles_column, columns = open_table(source, data_args)
    config = models[0].config
    names, ends = config.label_names or [], [f"_{name}" for name in config.label_names or []] or [""]
    taken = {"status"} | {f"{name}{end}" for name in ADDED for end in ends}
    if taken & set(columns):
        clash = sorted(taken & set(columns))[0]
        raise InputError(f"{source} has a column {clash!r}, which the predictions would replace. Rename it.")
    labels = find_measured(columns, data_args, config, source)
    num_forms = regression_args.predict_augment
    arguments = (tokenizer, data_args.smiles_form, data_args.max_length, num_forms, training_args.seed)
    arguments += (config.head_descriptors,)
    main, exported = training_args.should_save, regression_args.export_embeddings
    if exported:
        place = Path(exported).absolute().parent
        if not place.is_dir() and place != Path(training_args.output_dir).absolute():  # which is made below
            raise InputError(f"--export_embeddings {exported} cannot be written: there is no folder {place}.")
        if Path(exported).exists() and not data_args.overwrite_output_dir:
            raise InputError(
                f"--export_embeddings {exported} is there already. Give another name, or replace it with "
                "--overwrite_output_dir."
            )
    if path is not None:
        begin_writing(training_args, None)
    predictor = Predictor(models, tokenizer, training_args)
    embeddings = EmbeddingWriter(exported) if main and exported else None
    writer = Writer(path) if main else None
    statuses, measured, total, no_numbers, example = {}, [], 0, 0, None
    bar = tqdm(desc="Predicting", unit=" SMILES", disable=training_args.disable_tqdm or not training_args.should_log)
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this machine
    workers = max(1, regression_args.preprocessing_num_workers // beside)
    try:
        for piece, forms, reasons in prepared_pieces(pieces, smiles_column, arguments, workers, predictor.share):
            reasons, values, states = predictor.predict_forms(forms, reasons, num_forms + 1, exported is not None, bar)
            usable = [row for row, reason in enumerate(reasons) if reason is None]
            values = values[usable]
            broken = int((~np.isfinite(values)).sum())
            if broken:
                raise InputError(f"{broken} predictions are not finite: the checkpoint is broken. Use another one.")
            members = values.transpose(2, 0, 1, 3)
            prediction, spreads = summarize_predictions(list(members))
            if any(labels):
                known, texts = measured_labels(piece, labels)
                measured.append(np.stack([prediction, known[usable]]))
                no_numbers, example = no_numbers + len(texts), example or next(iter(texts), None)
            for number, end in enumerate(ends):
                for name, numbers in {"prediction": prediction, **spreads}.items():
                    column = pd.Series(numbers[:, number], index=usable, dtype=float)
                    piece[f"{name}{end}"] = column.reindex(range(len(piece)))
            piece["status"] = [STATUS.get(reason, "ok") for reason in reasons]
            for status, count in piece["status"].value_counts().items():
                statuses[status] = statuses.get(status, 0) + int(count)
            if main:
                writer.write(piece)
                if embeddings is not None:
                    embeddings.write(usable, states[usable], len(piece))
            total += len(piece)
        bar.close()
        if main and total == statuses.get(STATUS["invalid"]):
            logger.warning(
                "No row of %s has a SMILES in column %r.%s",
                source,
                smiles_column,
                OTHER_COLUMN.format("--smiles_column"),
            )
        if main:
            writer.close(columns + sorted(f"prediction{end}" for end in ends) + ["status"])
            if embeddings is not None:
                embeddings.close(config.hidden_size)
    finally:  # what is not whole is of no use
        for output in filter(None, (writer, embeddings)):
            output.discard()
    seconds = time.monotonic() - started
    report = {"predict_samples": total, "predict_seconds": seconds, "predict_samples_per_second": total / seconds}
    report |= {f"predict_{status.replace(' ', '_')}": count for status, count in statuses.items()}
    predictions, known = np.concatenate(measured, axis=1) if measured else np.empty((2, 0, len(ends)))
    if no_numbers:
        logger.warning("%d labels are no numbers, such as %r, and are not compared with", no_numbers, example)
    labeled = np.isfinite(known).any(axis=1)
    if labeled.any():
        found = label_metrics(predictions[labeled], known[labeled], names)
        report |= {f"predict_{key}": value for key, value in found.items()}
        report["predict_labeled"] = int(labeled.sum())
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
