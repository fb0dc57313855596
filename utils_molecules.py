"""Molecules: reading and checking SMILES, splits that do not leak, metrics, baselines.

    python -c "from utils_molecules import *; print(canonicalize('OCC', 'canonical'))"

Rows are counted from 0, the header aside, in messages, `splits.json` and `predictions.csv` alike.
"""

import csv
import difflib
import hashlib
import json
import logging
import lzma
import math
import re
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from pandas.io.common import get_handle
from rdkit import Chem, rdBase
from rdkit.Chem import EState, rdFingerprintGenerator, rdMolDescriptors, rdPartialCharges
from rdkit.Chem.MolStandardize import rdMolStandardize
from rdkit.Chem.Scaffolds import MurckoScaffold
from tqdm.auto import tqdm

from arguments import InputError
from utils_runs import read_json, write_text


OTHER_COLUMN = " If another column has the SMILES, name it ({})."
OTHER_FILES = {
    (".xlsx", ".xlsm", ".xls", ".ods"): "a workbook. Save the sheet as CSV (UTF-8)",
    (".parquet", ".feather"): "no text. Write it as CSV, with pandas for example",
    (".sdf", ".sd", ".mol", ".mol2"): "no table. Write SMILES, and labels where there are some, to a CSV",
}
PACKED = (".gz", ".xz", ".bz2", ".zst")
SMILES_COLUMNS = ("smiles", "canonical_smiles", "mol", "molecule", "structure")
LABEL_COLUMNS = ("label", "labels", "exp", "target", "y", "logd", "value")
LABEL_PREFIX = "label:"
FEW_MOLECULES = 50  # of a test set: a fifth of its mean squared error is chance
MISSING = ("", "nan", "na", "n/a", "none", "null")  # what stands in a table for no label
SPLITS = ("train", "validation", "test")
SECONDS_OF_WORK = 20_000  # molecules
REASONS = {
    "invalid": "do not parse as SMILES",
    "lost": "have characters that the tokenizer would drop",
    "unknown": "have atoms or bonds that the tokenizer does not know",
    "too_long": "have more tokens than --max_length",
}

logger = logging.getLogger("molformer.molecules")


# ---------------------------------------------------------------------------------------------------------- reading


UNREADABLE = (pd.errors.ParserError, EOFError, OSError, ValueError, csv.Error, lzma.LZMAError, zlib.error)
UNREADABLE += (zipfile.BadZipFile, tarfile.TarError, ImportError)  # of archives, which pandas knows by their names


def read_table(path, smiles_column=None, label_column=None, prefix=""):
    """Reads a CSV or TSV of SMILES and labels; .gz, .xz, CRLF line ends and a byte-order mark are fine.

    Args:
        prefix (`str`): stands before smiles_column and label_column in the flags that messages name.
    Returns:
        `pandas.DataFrame` with columns `row` (int), `smiles` (str, as given) and `label` (float); of several labels
        each has a column `label:` and its name, NaN where it is missing.
    Raises:
        InputError: for a file that is absent, empty, not UTF-8 or no table, a column that it lacks, and labels that
            are missing, infinite or text; the message names the value and its row.
    """
    columns, separator = read_header(path)
    if has_lines(path, smiles_column):
        raise InputError(
            f"{path} is taken for a list of SMILES without a header, since its first line is {shorten(columns[0])!r}. "
            f"Labels are needed here: give a table with a header, such as SMILES,label; if it is one, pass "
            f"--{prefix}smiles_column."
        )
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(not_utf8(path)) from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path} is empty. It needs a header and at least one row.") from error
    except UNREADABLE as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error
    refuse_shifted(path, columns, separator)
    refuse_joined(table, columns, separator, path)
    molecules = _to_molecules(table, path, smiles_column, label_column, prefix)
    refuse_repeated([molecules.attrs["smiles_column"], *molecules.attrs["label_columns"]], columns, path)
    return molecules


def refuse_repeated(used, columns, path):
    """Raises `InputError` if a column that is read stands twice in the header: which one is meant?"""
    twice = next((name for name in used if columns.count(name) > 1), None)
    if twice is not None:
        advice = "Rename all but one" if twice else "Name those that are needed, and remove the others"
        raise InputError(f"{path} has more than one column {twice!r}. {advice}.")


def refuse_shifted(path, columns, separator):
    """Raises `InputError` if the rows have more fields than the header: pandas takes the first one for their names."""
    try:
        table = pd.read_csv(path, sep=separator, dtype=str, nrows=1, encoding="utf-8-sig", encoding_errors="replace")
    except UNREADABLE:
        return  # which the reading of all rows tells
    if not isinstance(table.index, pd.RangeIndex):
        raise InputError(
            f"{path} has {len(columns)} columns in its header and more fields in its rows. Give each a name, or "
            "remove what ends each row."
        )


def refuse_joined(table, columns, separator, source, first=0):
    """Raises `InputError` for rows that quotes have joined which were not meant: `"name` in one, `"name` in a later.

    Such a cell goes on to the end of its row, and ends within the same column of another row; one that is meant to
    have several lines does so by chance alone.

    Args:
        table (`pandas.DataFrame`): of text, all columns of the file.
        first (`int`): number of its first row.
    """
    for place, name in enumerate(columns):
        texts = table.iloc[:, place].astype(str)
        several = texts.str.contains("\n", regex=False) | texts.str.contains("\r", regex=False)
        for row in np.flatnonzero(several):
            lines = re.split(r"[\r\n]+", texts.iloc[row])
            if [line.count(separator) for line in (lines[0], lines[-1])] == [len(columns) - 1 - place, place]:
                raise InputError(
                    f"Column {name!r} of {source} holds several rows in row {first + row}: "
                    f"{shorten(texts.iloc[row])!r}. Remove the quotes that no other one closes."
                )


def not_utf8(path):
    """Returns what to say of a file that is not UTF-8, with its first such byte; `None` for one that is."""
    with get_handle(path, "rb", compression="infer", is_text=False) as handles:
        position = 0
        for line in handles.handle:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (  # pandas knows the position within its buffer alone
                    f"{path} is not UTF-8: byte {line[error.start]:#04x} at position {position + error.start}. "
                    "Save it as UTF-8, or convert it with: iconv -f ITS_ENCODING -t utf-8"
                )
            position += len(line)


def check_file(path):
    """Raises `InputError` if there is no such file, or nothing in it."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is no regular file, and is to be read more than once. Write its content to one.")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise InputError(f"The file {path} {what}. Correct its path.")
    suffix = next((suffix for suffix in reversed(path.suffixes) if suffix.lower() not in PACKED), "").lower()
    other = next((text for suffixes, text in OTHER_FILES.items() if suffix in suffixes), None)
    if suffix == ".xls":  # instruments call tables so too
        with path.open("rb") as file:
            other = other if file.read(2) in (b"PK", b"\xd0\xcf") else None
    if other is not None:
        raise InputError(f"{path} is {other}.")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty. It needs molecules; a table needs a header and at least one row.")


def read_header(path):
    """Returns the column names of a CSV or TSV and its separator, as `split_header` does.

    Raises:
        InputError: if there is no such file, no header, or one that is not UTF-8.
    """
    columns, separator = read_first_line(path)
    if not columns:
        raise InputError(f"{path} is empty, or its first line is. It needs a header and at least one row.")
    return columns, separator


def read_first_line(path):
    """Returns the fields of a file's first line, the header, and their separator; an `InputError` if not UTF-8."""
    check_file(path)
    try:
        with get_handle(path, "rt", encoding="utf-8-sig", compression="infer", errors="replace") as handles:
            lines = read_header_lines(handles.handle)
        message = not_utf8(path) if "\ufffd" in lines else None
        if message is None:
            return split_header(lines)
    except UNREADABLE as error:
        raise InputError(
            f"{path} cannot be read: {error}. It must be what its name says, plain or packed as .gz or .xz."
        ) from error
    raise InputError(message)


def has_lines(path, smiles_column=None):
    """Returns whether a file has one SMILES a line and no header: .smi, and .txt unless it begins with a header."""
    suffixes = [suffix for suffix in Path(str(path).lower()).suffixes if suffix not in PACKED]
    if suffixes[-1:] != [".txt"]:
        return suffixes[-1:] in ([".smi"], [".smiles"])
    columns = {column.strip().lower() for column in read_first_line(path)[0]}
    wanted = SMILES_COLUMNS if smiles_column is None else (*SMILES_COLUMNS, smiles_column)
    return columns.isdisjoint(name.lower() for name in wanted)


def read_header_lines(file, most=20):
    """Returns the header of a table: its first line, and those that follow while a quoted name goes on."""
    text = file.readline()
    for _ in range(most):  # a quote within a name opens nothing
        rest = re.sub(r'(^|[,;\t])"(?:[^"]|"")*"', "", text)
        if not re.search(r'(^|[,;\t])"', rest) or not (line := file.readline()):
            break
        text += line
    return text.rstrip("\r\n")


def split_header(header):
    """Returns the column names of a table's header, and its separator, comma, tab or semicolon.

    That with which one column is called like SMILES and the most names come out; a tab sooner than what names contain.
    """
    options = [(next(csv.reader(header.splitlines(keepends=True), delimiter=mark), []), mark) for mark in ",\t;"]
    known = [option for option in options if any(name.strip().lower() in SMILES_COLUMNS for name in option[0])]
    return max(known or options, key=lambda option: (len(option[0]), len(option[0]) > 1 and option[1] == "\t"))


@cache
def use_cache_alone_without_network(endpoint):
    """Switches the Hub off for this process if it does not answer: its client would try for minutes, file by file."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(endpoint, timeout=10)
    except Exception:  # the client's, and those of the library it speaks HTTP with, which changes
        logger.warning("%s does not answer: what was downloaded before is used, and nothing else", endpoint)
        constants.HF_HUB_OFFLINE = True


def load_hub_dataset(name, config_name=None, cache_dir=None):
    """Returns the `train` split of a Hub data set (`datasets.Dataset`).

    Raises:
        InputError: if the Hub or the data set is not reachable; the message says how to go on without it.
    """
    import datasets

    if not Path(name).exists():
        use_cache_alone_without_network(constants.ENDPOINT)
        datasets.config.HF_HUB_OFFLINE |= constants.HF_HUB_OFFLINE
    try:
        return datasets.load_dataset(name, config_name, cache_dir=cache_dir, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise InputError(
            f"The data set {name} cannot be loaded from the Hub ({type(error).__name__}: {error}). Without a network "
            "pass --train_file FILE with a local CSV."
        ) from error


def read_hub_dataset(name, config_name=None, cache_dir=None, smiles_column=None, label_column=None):
    """Reads the `train` split of a Hub data set in the form of `read_table`."""
    dataset = load_hub_dataset(name, config_name, cache_dir)
    others = [split for split in dataset.info.splits or () if split != "train"]
    if others:
        logger.warning("Of %s the split train alone is read, and split here; not read: %s.", name, ", ".join(others))
    table = dataset.to_pandas()
    table = table.map(lambda value: "" if value is None else str(value))
    return _to_molecules(table, name, smiles_column, label_column)


def find_column(columns, wanted, candidates, flag, source):
    """Returns the column called `wanted`, or the first of `candidates` that is there in any case; else `None`."""
    if wanted is not None:
        if wanted in columns:
            return wanted
        alike = [column for column in columns if column.strip() == wanted.strip()]
        if len(alike) != 1:
            has = f"has: {', '.join(columns)}" if columns else "has no header"
            raise InputError(f"Column {wanted!r} is not in {source}, which {has}. Correct {flag}.")
        return alike[0]
    lowered = {str(column).strip().lower(): column for column in reversed(columns)}
    return next((lowered[name] for name in candidates if name in lowered), None)


def find_smiles(columns, wanted, source, prefix=""):
    """Returns the name of the SMILES column; an `InputError` if there is none."""
    flag = f"--{prefix}smiles_column"
    column = find_column(columns, wanted, SMILES_COLUMNS, flag, source)
    if column is None:
        raise InputError(f"{source} has no SMILES column; it has: {', '.join(columns)}. Pass {flag}.")
    return column


def find_labels(columns, wanted, flag, source):
    """Returns the names of the label columns: those `wanted`, or the one that is called like a label, or none."""
    names = [find_column(columns, name, LABEL_COLUMNS, flag, source) for name in wanted or [None]]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"{flag} names {repeated!r} twice. Name it once.")
    for baseline in BASELINES:
        alike = next((name for name in names if f"{baseline}_{name}" in names), None)
        if alike is not None:  # in the names of metrics
            raise InputError(
                f"The label {f'{baseline}_{alike}'!r} of {source} would be taken for the baseline {baseline} of "
                f"{alike!r}. Rename one of them."
            )
    spread = next((name for name in names if f"sd_{name}" in names), None)
    if spread is not None:  # in the columns of predictions
        raise InputError(
            f"The label {f'sd_{spread}'!r} of {source} would be taken for the standard deviation of predictions of "
            f"{spread!r}. Rename one of them."
        )
    return [name for name in names if name is not None]


def _to_molecules(table, source, smiles_column, label_column, prefix=""):
    columns = [str(column) for column in table.columns]
    table.columns = columns
    smiles = find_smiles(columns, smiles_column, source, prefix)
    labels = find_labels(columns, label_column, f"--{prefix}label_column", source)
    if not labels:
        predict = "" if prefix else " To predict molecules, pass --do_predict --test_file, without --train_file."
        raise InputError(
            f"{source} has no label column; it has: {', '.join(columns)}. Pass --{prefix}label_column.{predict}"
        )
    if not len(table):
        raise InputError(f"{source} has a header and no rows.")
    molecules = pd.DataFrame(
        {"row": np.arange(len(table)), "smiles": table[smiles].fillna("").astype(str).str.strip()}
    )
    for label in labels:
        name = "label" if len(labels) == 1 else f"{LABEL_PREFIX}{label}"
        molecules[name] = _to_numbers(table[label], label, source, f"--{prefix}label_column", len(labels) > 1)
    molecules.attrs |= {"smiles_column": smiles, "smiles_flag": f"--{prefix}smiles_column", "label_columns": labels}
    return molecules


def _to_numbers(texts, column, source, flag, may_lack=False):
    """Labels as floats. Infinite and text values are an error, and missing ones.

    Args:
        flag (`str`): that names the column.
        may_lack (`bool`): whether a label may be missing; it is NaN then.
    """
    numbers = pd.to_numeric(texts, errors="coerce").astype(float)
    wrong = ~np.isfinite(numbers)
    if may_lack:
        wrong &= ~texts.fillna("").astype(str).str.strip().str.lower().isin(MISSING)
    bad = np.flatnonzero(wrong)
    if len(bad):
        given = next((text for text in texts.iloc[bad].astype(str) if text.strip()), "")
        comma = re.fullmatch(r"\s*[-+]?\d+,\d+\s*", given)
        advice = "Decimals are to be written with a point." if comma else "Correct or remove these rows."
        if not comma and len(bad) == len(texts):
            advice = f"If another column has the labels, name it ({flag})."
        raise InputError(
            f"{len(bad)} of {len(texts)} labels in column {column!r} of {source} are missing, infinite or no numbers, "
            f"first at row {bad[0]}: {texts.iloc[bad[0]]!r}. {advice}"
        )
    return numbers.where(np.isfinite(numbers))


def label_columns(molecules):
    """Returns the names of the columns of labels: `label`, or `label:` and the name of each of several."""
    return [name for name in molecules if name == "label" or name.startswith(LABEL_PREFIX)]


def label_names(molecules):
    """Returns the names of several labels; an empty list for one."""
    return [name.removeprefix(LABEL_PREFIX) for name in label_columns(molecules) if name != "label"]


def labels_of(molecules):
    """Returns the labels, shape (N, K), NaN where one of several is missing."""
    return molecules[label_columns(molecules)].to_numpy(dtype=float)


# --------------------------------------------------------------------------------------------------------- checking


LINE = re.compile(r"^(\S*(?:\s+\|[^|]*\|)?)\s*(.*)$", re.DOTALL)  # SMILES, also with extensions, and name
QUERY = re.compile(r"\[\d*#[1-9]|\|(.*,)?(m|LN):")  # of a SMILES, and of the extensions of CXSMILES


def parse_smiles(smiles):
    """Returns RDKit's molecule, or `None` if it cannot parse the SMILES or there is no atom.

    White space ends a SMILES: RDKit takes the rest for a name, so half of a broken text would pass for a molecule.
    The extensions of CXSMILES, between bars, may follow. What stands for many molecules is none: atoms by number,
    which RDKit takes for bare ones, places of attachment (m:) and repeats (LN:).
    """
    if any(not rest.startswith("|") for rest in smiles.split(maxsplit=1)[1:]) or QUERY.search(smiles):
        return None
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles)
    return molecule if molecule is not None and molecule.GetNumAtoms() else None


def canonicalize(smiles, form):
    """Returns the SMILES in the wanted form, or `None` if RDKit cannot parse it or it has no atom.

    Args:
        form (`str`): `"canonical"` (RDKit-canonical without stereo and isotopes, as MoLFormer was pre-trained),
            `"isomeric"` (RDKit-canonical with them) or `"raw"` (as given).
    """
    molecule = parse_smiles(smiles)
    if molecule is None:
        return None
    text = smiles if form == "raw" else Chem.MolToSmiles(molecule, isomericSmiles=form == "isomeric")
    if form == "canonical" and "[H]" in text:
        # deuterium is [H] without its isotope, as is the hydrogen that gave a double bond its stereo: read again, both
        # are hydrogens like all others
        molecule = parse_smiles(text)
        text = text if molecule is None else Chem.MolToSmiles(molecule, isomericSmiles=False)
    return text


def random_smiles(smiles, count, seed):
    """Returns `count` SMILES of the same molecule that start and branch at random; a function of SMILES and seed.

    A small molecule may give the same one twice. Stereo is kept as given. Empty where RDKit cannot read the SMILES,
    which can be one that it wrote.
    """
    molecule = parse_smiles(smiles)
    if molecule is None or not count:
        return []
    seed = zlib.crc32(smiles.encode(), seed % 2**32) % (2**31 - 1) + 1  # RDKit takes 0 for no seed
    return list(Chem.MolToRandomSmilesVect(molecule, count, randomSeed=seed))


def scaffold_of(smiles):
    """Returns the Bemis-Murcko scaffold as SMILES without stereo; empty for a molecule without a ring.

    What RDKit cannot read, which can be a SMILES that it wrote, is a scaffold of its own.
    """
    molecule = parse_smiles(smiles)
    if molecule is None:
        return smiles
    return MurckoScaffold.MurckoScaffoldSmiles(mol=molecule, includeChirality=False)


def encode_smiles(texts, tokenizer):
    """Returns token ids of each text, and for each what the tokenizer would do wrong: `None`, "lost" or "unknown".

    MoLFormer's pre-tokenizer silently drops what its pattern does not match, so the characters that the tokens cover
    are counted.
    """
    encoded = tokenizer(list(texts), return_offsets_mapping=True, return_attention_mask=False)
    problems = []
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        covered = sum(end - start for start, end in offsets)
        unknown = tokenizer.unk_token_id in ids
        problems.append("lost" if covered != len(text) else "unknown" if unknown else None)
    return encoded["input_ids"], problems


def with_progress(values, description, many=SECONDS_OF_WORK):
    """Returns the values with a progress bar on a terminal, if they are so `many` that it takes seconds."""
    return tqdm(values, desc=description, disable=None if len(values) >= many else True)


def check_smiles(smiles, tokenizer, form, max_length):
    """Returns of each SMILES what the model reads, its token ids, and why it cannot be used, a key of `REASONS`.

    The text is `None` for what RDKit cannot parse; the reason is `None` for what can be used.
    """
    texts = [canonicalize(text, form) for text in with_progress(smiles, "Checking SMILES")]
    encoded, problems = [], []
    for start in range(0, len(texts), 10_000):  # of all at once the tokenizer takes 12 kB a molecule
        ids, found = encode_smiles([text or "" for text in texts[start : start + 10_000]], tokenizer)
        encoded += ids
        problems += found
    reasons = [
        "invalid" if text is None else "too_long" if len(ids) > max_length else problem
        for text, ids, problem in zip(texts, encoded, problems, strict=True)
    ]
    return texts, encoded, reasons


def encode_random_smiles(text, ids, tokenizer, count, seed, max_length):
    """Returns token ids of `count` random SMILES of a molecule.

    Its own `ids` stand in for one that the tokenizer does not know in full, or that has more than `max_length` tokens,
    and for all of a molecule that RDKit cannot read.
    """
    texts = random_smiles(text, count, seed)
    if not texts:
        return [ids] * count
    encoded, problems = encode_smiles(texts, tokenizer)
    return [
        new if problem is None and len(new) <= max_length else ids
        for new, problem in zip(encoded, problems, strict=True)
    ]


def to_text(ids, tokenizer):
    """Returns the SMILES of token ids that have `<bos>` and `<eos>` around them."""
    return "".join(tokenizer.convert_ids_to_tokens(ids[1:-1]))


def prepare_molecules(molecules, tokenizer, data_args, source):
    """Checks every molecule, and adds its text for the model, token ids, length and twin group.

    Args:
        molecules (`pandas.DataFrame`): from `read_table`.
        source (`str`): file or data set, for messages.
    Returns:
        `pandas.DataFrame` with the further columns `text`, `group` (canonical SMILES without stereo: stereo twins
        have one group), `input_ids` and `length` (tokens); and a `pandas.DataFrame` of the dropped rows with the
        columns `source`, `row`, `smiles` and `reason`.
    Raises:
        InputError: if a molecule cannot be used and `--invalid_smiles` is `error`, or if none is left.
    """
    checked = check_smiles(molecules["smiles"], tokenizer, data_args.smiles_form, data_args.max_length)
    molecules = molecules.assign(**dict(zip(("text", "input_ids", "reason"), checked, strict=True)))
    molecules["length"] = molecules["input_ids"].map(len)

    bad = molecules[molecules["reason"].notna()]
    if len(bad):
        column = molecules.attrs.get("smiles_column")  # of a table
        where = source if column is None else f"column {column!r} of {source}"
        message = describe_unusable(bad["reason"], bad["row"], bad["smiles"], len(molecules), where)
        if column is not None and (bad["reason"] == "invalid").sum() == len(molecules):
            message += OTHER_COLUMN.format(molecules.attrs["smiles_flag"])
        refuse_or_warn(message, data_args, "Dropped; a file in the output folder lists them.")
        molecules = molecules[molecules["reason"].isna()]
    if not len(molecules):
        raise InputError(f"No molecule of {source} can be used.")
    molecules = molecules.drop(columns="reason").reset_index(drop=True)
    smiles = molecules["text"]
    if data_args.smiles_form != "canonical":
        smiles = with_progress(molecules["smiles"], "Finding stereo twins")
        smiles = [canonicalize(text, "canonical") for text in smiles]
    molecules["group"] = smiles
    for column in label_columns(molecules):
        warn_of_conflicting_labels(molecules, source, column)
    dropped = bad[["row", "smiles"]].assign(reason=bad["reason"].map(REASONS))
    dropped.insert(0, "source", str(source))
    return molecules, dropped


def refuse_or_warn(message, data_args, consequence):
    """Raises `InputError` for SMILES that cannot be used, or warns where `--invalid_smiles` is `drop`."""
    if data_args.invalid_smiles == "error":
        raise InputError(f"{message} Correct them, or pass --invalid_smiles drop to go on without them.")
    logger.warning("%s %s", message, consequence)


def shorten(text, most=60):
    """Returns a text that fits into a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def describe_unusable(reasons, rows, smiles, total, source, examples=3):
    """Returns one sentence a reason: how many molecules, and the first rows with their SMILES."""
    sentences = []
    for reason, text in REASONS.items():
        found = [(row, s) for why, row, s in zip(reasons, rows, smiles, strict=True) if why == reason]
        if found:
            first = ", ".join(f"row {row}: {shorten(s)!r}" for row, s in found[:examples])
            sentences.append(f"{len(found)} of {total} SMILES in {source} {text}, first at {first}.")
            if reason == "too_long":
                sentences.append("A higher --max_length may take them.")
    return " ".join(sentences)


def warn_of_conflicting_labels(molecules, source, column="label"):
    """Warns of molecules that stand in the file more than once, as the model reads them, with different labels."""
    spread = molecules.groupby("text")[column].agg(["size", "min", "max"])
    conflicting = spread[spread["max"] > spread["min"]]
    if len(conflicting):
        logger.warning(
            "%s: molecules that stand in several rows with different labels: %d, in %d rows (largest "
            "difference %.2f). They are repeated or differ in stereo alone; the model gives each one prediction.",
            source,
            len(conflicting),
            conflicting["size"].sum(),
            (conflicting["max"] - conflicting["min"]).max(),
        )


# ----------------------------------------------------------------------------------------------------------- splits


def split_groups(groups, num_held_out, seed):
    """Returns a boolean array: which rows are held out, such that no group has rows on both sides.

    Groups are taken in random order while they fit into `num_held_out` rows. Groups larger than half of it stay on the
    training side (as chemprop's balanced scaffold split has it): one large scaffold would otherwise be the test set.
    """
    groups = pd.Series(groups).reset_index(drop=True)
    members = [np.asarray(rows) for rows in groups.groupby(groups, sort=True).indices.values()]
    held_out, taken = np.zeros(len(groups), dtype=bool), 0
    for index in np.random.default_rng(seed).permutation(len(members)):
        rows = members[index]
        if len(rows) <= max(1, num_held_out / 2) and taken + len(rows) <= num_held_out:
            held_out[rows] = True
            taken += len(rows)
    return held_out


def assign_splits(molecules, data_args, seed):
    """Returns the split of every molecule, an array of "train", "validation" and "test".

    Random: groups of stereo twins in random order. Scaffold: groups of one Bemis-Murcko scaffold. File: row numbers in
    `--split_file`, or the `split` column that separate files gave. With `--protocol paper` rows are split at random
    without regard to twins, and there is no validation part. Of a fraction of 0 nothing is taken.

    Raises:
        InputError: if a split would be empty, or if a given split is no partition of rows of the file.
    """
    paper = data_args.protocol == "paper"
    if data_args.split == "scaffold":
        groups = np.array([scaffold_of(text) for text in with_progress(molecules["group"], "Finding scaffolds")])
    else:
        groups = np.arange(len(molecules)) if paper else molecules["group"].to_numpy()
    if data_args.split == "file":
        split = _given_split(molecules, data_args)
    else:
        split = np.full(len(molecules), "train", dtype=object)
        split[split_groups(groups, round(len(molecules) * data_args.test_fraction), seed)] = "test"
    if paper and (split == "validation").any():
        raise InputError(
            "--protocol paper chooses the epoch by the test loss and has no validation molecules, but there are some. "
            "Leave --validation_file out, or those rows of the --split_file, or --protocol."
        )
    held_out = data_args.validation_fraction > 0 and not paper
    if held_out and not (split == "validation").any():
        rest = np.flatnonzero(split == "train")
        split[rest[split_groups(groups[rest], round(len(rest) * data_args.validation_fraction), seed)]] = "validation"
    wanted = {"train": True, "validation": held_out, "test": data_args.test_fraction > 0}
    counts = {name: int((split == name).sum()) for name in SPLITS if wanted[name]}
    if min(counts.values()) == 0:
        raise InputError(
            f"{len(molecules)} molecules cannot be split: {counts}. Give more molecules, or change --test_fraction "
            "and --validation_fraction."
        )
    return split


def _given_split(molecules, data_args):
    if data_args.split_file is None:
        if data_args.test_file is None and data_args.test_fraction:
            raise InputError("--validation_file alone gives no test set. Pass --test_file too, or --test_fraction 0.")
        return molecules["split"].to_numpy(dtype=object)
    try:
        given = json.loads(Path(data_args.split_file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--split_file {data_args.split_file} cannot be read as JSON: {error}") from error
    lists = [given.get(name) or [] for name in SPLITS] if isinstance(given, dict) else []
    # beside them what splits.json of a run has, that of run_influence.py its pool
    others = [name for name in given if name not in (*SPLITS, "split", "hash", "pool", "corrupted")] if lists else []
    if others:
        raise InputError(
            f"{data_args.split_file} has the key {others[0]!r}, which is none of {', '.join(SPLITS)}. Correct or "
            "remove it."
        )
    right = all(isinstance(rows, list) and all(type(row) is int for row in rows) for rows in lists)
    if not right or not lists or not lists[0] or (data_args.test_fraction and not lists[2]):
        raise InputError(
            f'{data_args.split_file} needs the keys "train" and "test" with lists of row numbers; "test" can be left '
            "out with --test_fraction 0."
        )
    position = {row: index for index, row in enumerate(molecules["row"])}
    split = np.full(len(molecules), "", dtype=object)
    for name, rows in zip(SPLITS, lists, strict=True):
        for row in rows:
            if row not in position:
                raise InputError(f"Row {row} of {name} in {data_args.split_file} is not among the usable molecules.")
            if split[position[row]]:
                raise InputError(f"Row {row} is in {split[position[row]]} and in {name} of {data_args.split_file}.")
            split[position[row]] = name
    return split


def load_molecules(tokenizer, model_args, data_args, training_args):
    """Reads, checks and splits the molecules that the arguments name; a label without a name gets its column's.

    Returns:
        `pandas.DataFrame` of `prepare_molecules` with the column `split`, rows of no split left out; the hash of the
        split (`str`); and the dropped rows (`pandas.DataFrame`).
    Raises:
        InputError: if file, molecules, labels or splits cannot be used.
    """
    columns = {"smiles_column": data_args.smiles_column, "label_column": data_args.label_column}
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    if data_args.dataset_name is not None:
        source = files["train"] = data_args.dataset_name
        tables = {"train": read_hub_dataset(source, data_args.dataset_config_name, model_args.cache_dir, **columns)}
    else:
        tables = {"train": read_table(files["train"], **columns)}
    found = tables["train"].attrs["label_columns"]
    if data_args.label_name is None:
        data_args.label_name = "the label" if found[0].lower() in ("label", "labels") else found[0]
    predict = " To predict others, pass run_regression.py --do_predict, --test_file and --model_name_or_path alone."
    for name in ("validation", "test"):
        if files[name] is not None:  # by the same label, where a file has more columns that are called like one
            header, _ = read_header(files[name])
            if data_args.label_column and set(found).isdisjoint(header):
                raise InputError(
                    f"{files[name]} has no column {' or '.join(found)}; it has: {', '.join(header)}. {name.title()} "
                    f"molecules need labels, in a column called so.{predict if name == 'test' else ''}"
                )
            same = {"label_column": found} if set(found) <= set(header) else {}
            tables[name] = read_table(files[name], **(columns | same))
    for name, table in tables.items():
        if name == "train" or table.attrs["label_columns"] != found:
            logger.info("Labels of %s: column %s", files[name], ", ".join(table.attrs["label_columns"]))
    prepared = [prepare_molecules(table, tokenizer, data_args, files[name]) for name, table in tables.items()]
    molecules = pd.concat(
        [part.assign(split=name) for name, (part, _) in zip(tables, prepared, strict=True)], ignore_index=True
    )
    seed = training_args.seed if data_args.split_seed is None else data_args.split_seed
    molecules["split"] = assign_splits(molecules, data_args, seed)
    if (molecules["split"] == "").any():
        count = int((molecules["split"] == "").sum())
        logger.warning("%d of %d molecules are in no part of %s, and are left out", count, len(molecules),
                       data_args.split_file)  # fmt: skip
    molecules = molecules[molecules["split"] != ""].reset_index(drop=True)
    molecules = leave_out_unlabeled(molecules)
    warn_of_leaks(molecules)
    warn_of_few(molecules)
    dropped = pd.concat([rows for _, rows in prepared], ignore_index=True)
    digest = split_hash(molecules, molecules["split"])
    warn_of_other_split(data_args.split_file, digest)
    return molecules, digest, dropped


def warn_of_other_split(split_file, digest):
    """Warns of a split file of a run whose split had another hash: its rows may be of another table."""
    before = None if split_file is None else read_json(split_file).get("hash")
    if before not in (None, digest):
        logger.warning(
            "%s was written for other molecules, or for other rows of these: its row numbers are taken all the same "
            "(its hash is %s, that of the split here %s)",
            split_file, before, digest,
        )  # fmt: skip


def leave_out_unlabeled(molecules):
    """Returns the molecules without those that have none of several labels.

    Raises:
        InputError: if a part of the split has no label left.
    """
    known = np.isfinite(labels_of(molecules)).any(axis=1)
    if not known.all():
        logger.warning("%d of %d molecules have none of the labels, and are left out", (~known).sum(), len(molecules))
    for name in molecules["split"].unique():
        if not known[molecules["split"] == name].any():
            raise InputError(f"No molecule of the {name} part has a label. Give labels, or another split.")
    return molecules[known].reset_index(drop=True)


def parent_of(smiles):
    """Returns the largest part of a molecule, without the charges that protons give or take (canonical SMILES)."""
    if not re.search(r"\.|[+-]\d?\]", smiles):
        return smiles
    parts = Chem.GetMolFrags(parse_smiles(smiles), asMols=True)
    largest = max(parts, key=lambda part: (part.GetNumHeavyAtoms(), Chem.MolToSmiles(part)))
    return Chem.MolToSmiles(rdMolStandardize.Uncharger(canonicalOrder=True).uncharge(largest), isomericSmiles=False)


def warn_of_leaks(molecules):
    """Warns of test molecules that are also, as stereo twins or salts at least, in training or validation."""
    test = molecules["split"] == "test"
    parents = molecules["group"].map(parent_of)
    seen = set(parents[~test])
    leaked = int(parents[test].isin(seen).sum())
    validation, learned = (parents[molecules["split"] == name] for name in ("validation", "train"))
    known = int(validation.isin(set(learned)).sum())
    if known:
        logger.warning(
            "%d of %d validation molecules are, stereo and salts aside, training molecules too: the validation "
            "numbers, and the choice of the epoch by them, are optimistic",
            known,
            len(validation),
        )
    if leaked:
        logger.warning(
            "%d of %d test molecules are, stereo and salts aside, also among the molecules of training and "
            "validation: the test numbers are optimistic",
            leaked,
            test.sum(),
        )


def warn_of_few(molecules):
    """Warns of a test set whose error says little: of n normal errors, the mean square varies by sqrt(2 / n)."""
    labels = molecules.loc[molecules["split"] == "test", label_columns(molecules)]
    counts = labels.notna().sum()
    counts = counts[counts > 0]  # of another label no error is reported
    count = int(min(counts, default=0))
    if 0 < count < FEW_MOLECULES:
        name = counts.idxmin().removeprefix(LABEL_PREFIX)
        logger.warning(
            "There are %d test molecules%s: by chance alone their mean squared error is off by some %.0f %%, more if "
            "a few of them are far off. Repeat with other seeds (--seed 1, 2 …) before you compare models.",
            count, f" with the label {name}" if name != "label" else "", 100 * math.sqrt(2 / count),
        )  # fmt: skip


def split_hash(molecules, split):
    """Returns a short hash of which molecule is in which split; equal whatever the order of the rows."""
    lines = sorted(f"{part}\t{group}" for part, group in zip(split, molecules["group"], strict=True) if part)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------- metrics and baselines


def regression_metrics(predictions, labels):
    """Returns MSE, RMSE, MAE, R², Pearson and Spearman correlation, computed by a local `evaluate.Metric`.

    A value that is not defined (a correlation with a constant, R² of one molecule) is left out.

    Raises:
        InputError: if a prediction is not finite.
    """
    predictions = np.ravel(predictions)
    broken = int((~np.isfinite(predictions)).sum())
    if broken:
        raise InputError(
            f"{broken} of {len(predictions)} predictions are not finite: the training diverged, or the checkpoint is "
            "broken. Lower --learning_rate, or use another checkpoint."
        )
    with tempfile.TemporaryDirectory() as folder:  # the library makes one, though all is kept in memory
        metric = _metric_class()(keep_in_memory=True, cache_dir=folder)
        return metric.compute(predictions=predictions, references=np.ravel(labels))


def label_metrics(predictions, labels, names):
    """Returns `regression_metrics`; of several labels each one's, with its name, and their mean R² as `r2`.

    Args:
        predictions, labels (`numpy.ndarray`): shape (N, K); a missing label (NaN) counts for nothing.
        names (`list[str]`): names of several labels; empty for one.
    """
    if not names:
        return regression_metrics(predictions, labels)
    values = {}
    for name, predicted, measured in zip(names, predictions.T, labels.T, strict=True):
        known = np.isfinite(measured)
        if known.any():
            found = regression_metrics(predicted[known], measured[known])
            values |= {f"{key}_{name}": value for key, value in found.items()}
    coefficients = [values[f"r2_{name}"] for name in names if f"r2_{name}" in values]
    return values | ({"r2": float(np.mean(coefficients))} if coefficients else {})


def _metric_class():
    # built on demand: `evaluate` takes a second to import, and `--help` does not need it
    import datasets
    import evaluate
    from scipy import stats
    from sklearn import metrics

    class RegressionMetrics(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description="MSE, RMSE, MAE, R², Pearson and Spearman correlation.",
                citation="",
                inputs_description="predictions and references in label units",
                features=datasets.Features(
                    {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
                ),
            )

        def _compute(self, predictions, references):
            predictions, references = np.asarray(predictions), np.asarray(references)
            mse = metrics.mean_squared_error(references, predictions)
            values = {"mse": mse, "rmse": mse**0.5, "mae": metrics.mean_absolute_error(references, predictions)}
            if len(references) > 1:
                if np.ptp(references) > 0:
                    values["r2"] = metrics.r2_score(references, predictions)
                if np.ptp(references) > 0 and np.ptp(predictions) > 0:
                    values["pearson"] = stats.pearsonr(references, predictions).statistic
                    values["spearman"] = stats.spearmanr(references, predictions).statistic
            return {name: float(value) for name, value in values.items()}

    return RegressionMetrics


def morgan_counts(texts, radius=2, size=2048):
    """Returns Morgan count fingerprints, shape (N, size); zeros for what RDKit cannot read."""
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=size)
    counts = np.zeros((len(texts), size))
    for index, text in enumerate(with_progress(texts, "Fingerprints of the baseline")):
        if (molecule := parse_smiles(text)) is not None:
            counts[index] = generator.GetCountFingerprintAsNumPy(molecule)
    return counts


# Left out by default: slow, or functions of others. What is left takes 2 ms a molecule, half of the full list's time.
SLOW_DESCRIPTORS = ("qed", "BertzCT", "SPS", "Ipc", "AvgIpc", "MaxAbsEStateIndex", "MinAbsEStateIndex", "BCUT2D_")


def default_descriptors():
    """Returns the names of RDKit's descriptors of the installed version, the slow ones left out."""
    from rdkit.Chem import Descriptors

    return [name for name, _ in Descriptors.descList if not name.startswith(SLOW_DESCRIPTORS)]


def choose_descriptors(named):
    """Returns the names of descriptors that a user named, `all` for `default_descriptors`.

    Raises:
        InputError: if the installed RDKit does not know a name, or one is there twice.
    """
    from rdkit.Chem import Descriptors

    known = [name for name, _ in Descriptors.descList]
    names = default_descriptors() if list(named) == ["all"] else list(named)
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        lowered = {name.lower(): name for name in known}
        near = [lowered[name] for name in difflib.get_close_matches(unknown.lower(), lowered, n=3)]
        hint = f" Near it: {', '.join(near)}." if near else ""
        raise InputError(
            f"--head_descriptors names {unknown}, which RDKit {rdBase.rdkitVersion} does not know.{hint} Take those "
            "of rdkit.Chem.Descriptors.descList."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--head_descriptors has {', '.join(twice)} twice. Name each once.")
    return names


def compute_descriptors(molecule, names):
    """Returns the named RDKit descriptors of a molecule, shape (M,) in float32; one that RDKit cannot compute is NaN.

    Raises:
        InputError: if the installed RDKit does not know a name.
    """
    from rdkit.Chem import Descriptors

    functions = dict(Descriptors.descList)
    unknown = [name for name in names if name not in functions]
    if unknown:
        raise InputError(
            f"RDKit {rdBase.rdkitVersion} does not know the descriptors {', '.join(unknown[:5])}. Take those of "
            "rdkit.Chem.Descriptors.descList; or, if a checkpoint was trained with these, install a version that has "
            "them, or use --objective mlm in run_mlm.py."
        )
    values = np.full(len(names), np.nan)
    for index, name in enumerate(names):
        try:
            values[index] = functions[name](molecule)
        except (ValueError, RuntimeError, ZeroDivisionError):  # of single descriptors, for odd molecules
            continue
    with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite, and is imputed as NaN is
        return values.astype(np.float32)


def describe(text, names):
    """Returns the named RDKit descriptors of a SMILES, shape (M,) in float32; NaN if RDKit cannot read it."""
    molecule = parse_smiles(text)
    if molecule is None:  # RDKit cannot read every SMILES that it wrote
        return np.full(len(names), np.nan, dtype=np.float32)
    return compute_descriptors(molecule, names)


@lru_cache(maxsize=50_000)  # some 60 MB; scale, training, evaluation and prediction ask for the same molecules
def _described(text, names):
    values = describe(text, names)
    values.flags.writeable = False  # it is handed out again
    return values


def descriptors_of(texts, names):
    """Returns the named RDKit descriptors of many SMILES as `describe` does, a list; those that were seen are kept."""
    shown, names = with_progress(texts, "Computing descriptors", SECONDS_OF_WORK // 10), tuple(names)
    return [_described(text, names) for text in shown]


def scale_of(values, what):
    """Returns mean and standard deviation of the columns of `values` (N, M); what is not finite does not count.

    Args:
        what (`str`): name of the values, for a message.
    """
    values = np.asarray(values, dtype=np.float64)
    broken = ~np.isfinite(values)
    if broken.any():
        logger.warning(
            "%d of %d values in %s are missing or infinite; the mean stands in for them",
            broken.sum(), values.size, what,
        )  # fmt: skip
    values = np.where(broken, np.nan, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a descriptor that is never finite
        return np.nan_to_num(np.nanmean(values, axis=0)), np.nan_to_num(np.nanstd(values, axis=0))


# For each a function of the molecule that gives one number an atom; atoms in the order of the SMILES it was read from.
ATOM_DESCRIPTORS = {
    "crippen_log_p": lambda molecule: [pair[0] for pair in rdMolDescriptors._CalcCrippenContribs(molecule)],
    "crippen_refractivity": lambda molecule: [pair[1] for pair in rdMolDescriptors._CalcCrippenContribs(molecule)],
    "labute_surface": lambda molecule: list(rdMolDescriptors._CalcLabuteASAContribs(molecule)[0]),
    "polar_surface": lambda molecule: list(rdMolDescriptors._CalcTPSAContribs(molecule)),
    "gasteiger_charge": lambda molecule: _gasteiger_charges(molecule),
    "electrotopological_state": lambda molecule: list(EState.EStateIndices(molecule)),
    "hydrogens": lambda molecule: [atom.GetTotalNumHs() for atom in molecule.GetAtoms()],
    "smallest_ring": lambda molecule: [
        molecule.GetRingInfo().MinAtomRingSize(index) for index in range(molecule.GetNumAtoms())
    ],
}


def _gasteiger_charges(molecule):
    rdPartialCharges.ComputeGasteigerCharges(molecule)
    return [atom.GetDoubleProp("_GasteigerCharge") for atom in molecule.GetAtoms()]


def compute_atom_descriptors(molecule, names):
    """Returns the named numbers of every atom, shape (atoms, A) in float32; one that is not defined is NaN.

    Raises:
        InputError: if a name is unknown.
    """
    unknown = [name for name in names if name not in ATOM_DESCRIPTORS]
    if unknown:
        raise InputError(f"The checkpoint names the atom descriptors {', '.join(unknown)}, which are unknown here.")
    return np.array([ATOM_DESCRIPTORS[name](molecule) for name in names], dtype=np.float32).T


def atom_environments(molecule, buckets):
    """Returns for every atom the classes of its surroundings within 1 to R bonds, shape (atoms, R) in int64.

    A class is the hash of the Morgan algorithm modulo the radius' number of buckets, so no list of environments is
    needed; what falls into one class by chance has to be learned by heart.
    """
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=len(buckets), includeRedundantEnvironments=True)
    output = rdFingerprintGenerator.AdditionalOutput()
    output.AllocateAtomToBits()
    generator.GetSparseCountFingerprint(molecule, additionalOutput=output)
    classes = np.zeros((molecule.GetNumAtoms(), len(buckets)), dtype=np.int64)
    for atom, bits in enumerate(output.GetAtomToBits()):  # radius 0 first; a lone atom has that one only
        for radius, bucket in enumerate(buckets, start=1):
            classes[atom, radius - 1] = bits[min(radius, len(bits) - 1)] % bucket
    return classes


MOST_FOR_RIDGE = 30_000  # molecules; takes 60 kB each
BASELINES = ("mean", "fingerprint_ridge")


def baseline_predictions(features, labels, split):
    """Returns predictions for all molecules of two models that a reader can judge numbers by.

    `mean` predicts the mean label of the training part; `fingerprint_ridge` is ridge regression on Morgan counts
    (radius 2, 2,048 bits), its penalty chosen on the validation part (in the training part by leave-one-out, if there
    is no validation part).

    Args:
        features (`numpy.ndarray` or `None`): from `morgan_counts`; without them there is no ridge regression.
        labels (`numpy.ndarray`): shape (N,), none missing.
        split (`numpy.ndarray`): the part of each molecule, shape (N,).
    """
    from sklearn.linear_model import Ridge, RidgeCV

    train, validation = split == "train", split == "validation"
    predictions = {"mean": np.full(len(labels), labels[train].mean())}
    if features is None:
        return predictions
    alphas = (1, 3, 10, 30, 100, 300)
    if validation.any():
        shown = with_progress(alphas, "Ridge regression", 0 if train.sum() > SECONDS_OF_WORK // 10 else math.inf)
        models = [Ridge(alpha=alpha).fit(features[train], labels[train]) for alpha in shown]
        errors = [np.mean((m.predict(features[validation]) - labels[validation]) ** 2) for m in models]
        ridge = models[int(np.argmin(errors))]
    else:
        ridge = RidgeCV(alphas=alphas).fit(features[train], labels[train])
    return predictions | {"fingerprint_ridge": ridge.predict(features)}


# ---------------------------------------------------------------------------------------------------- files


def write_csv(frame, path):
    """Writes a CSV whole or not at all."""
    write_text(unix_lines(frame).to_csv(index=False, lineterminator="\n"), path)


def unix_lines(frame):
    """Returns a table whose texts have no carriage returns, which CSV readers take for ends of rows."""
    return frame.replace("\r\n?", "\n", regex=True)
