"""Corpora of SMILES, what run_mlm.py learns from them, and its metrics.

    python -c "from utils_mlm import *; print(read_corpus('molecules.smi.gz'))"

A corpus is read once into memory-mapped, cached data sets, in worker processes: token ids, descriptors of molecules,
and numbers of atoms; a table with labels, which is small, at every run. The collator masks tokens and places the
numbers of atoms at their tokens.
"""

import glob
import hashlib
import logging
import math
import zlib

import datasets
import numpy as np
import pandas as pd
import pyarrow.compute as pc
import torch
from transformers import EvalPrediction

from arguments import InputError
from trainer_regression import NO_ROOM, augment, cached_map
from utils_molecules import (
    ATOM_DESCRIPTORS,
    LINE,
    OTHER_COLUMN,
    REASONS,
    SMILES_COLUMNS,
    atom_environments,
    canonicalize,
    check_file,
    compute_atom_descriptors,
    compute_descriptors,
    default_descriptors,
    describe,
    describe_unusable,
    encode_smiles,
    find_column,
    find_labels,
    find_smiles,
    has_lines,
    load_hub_dataset,
    load_molecules,
    parse_smiles,
    read_header,
    refuse_joined,
    refuse_or_warn,
    refuse_repeated,
    refuse_shifted,
    scale_of,
    to_text,
)
from utils_runs import is_out_of_space


MOST_HELD_OUT = 10_000  # molecules of a corpus; more would cost time and tell nothing new
EXCLUDED = "are molecules of --exclude_file"  # a reason to leave a molecule out that is no fault of its SMILES
ENVIRONMENT_BUCKETS = (1024, 4096)  # classes of an atom's surroundings within one and two bonds

logger = logging.getLogger("molformer.mlm")


def read_corpus(path, smiles_column=None, cache_dir=None, renew=False):
    """Returns a text, CSV or TSV file as a memory-mapped `datasets.Dataset`; the column of text is `smiles`.

    Args:
        renew (`bool`): whether to read the file again although it is cached.
    Raises:
        InputError: if the file is absent, empty or not UTF-8, or has no SMILES column.
    """
    text = has_lines(path, smiles_column)
    if text:
        check_file(path)
        options, column = {}, "text"
    else:
        columns, separator = read_header(path)
        column = find_smiles(columns, smiles_column, path)
        refuse_repeated([column], columns, path)
        refuse_shifted(path, columns, separator)
        # all columns, or a row with more fields than the others would pass; their names may repeat
        names = [name if name == column else f"#{number}" for number, name in enumerate(columns)]
        options = {"sep": separator, "names": names, "header": 0, "keep_default_na": False}
        # numbers too are read as text, and named as what is no SMILES
        options["features"] = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
    try:
        corpus = datasets.load_dataset(
            "text" if text else "csv",
            data_files=glob.escape(str(path)),
            split="train",
            encoding="utf-8-sig",
            cache_dir=cache_dir,
            download_mode="force_redownload" if renew else None,
            verification_mode="no_checks",  # by what was read of the file before it was replaced
            **options,
        )
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        reason = error.__cause__ or error
        if is_out_of_space(reason):
            raise InputError(NO_ROOM.format(reason)) from error
        if any(text in str(reason) for text in ("at least one example", "corresponds to no data")):
            raise InputError(f"{path} holds no molecule. Give another file.") from error
        raise InputError(f"{path} cannot be read as UTF-8 {'text' if text else 'CSV'}: {reason}") from error
    if not text:
        refuse_joined_rows(corpus, columns, separator, path)
    return take_smiles(corpus, column, path)


def refuse_joined_rows(corpus, columns, separator, path):
    """Raises `InputError` as `refuse_joined` does, of a table that does not fit into memory."""
    several = [pc.match_substring_regex(column, "[\r\n]") for column in corpus.data.columns]
    rows = np.unique(np.concatenate([np.flatnonzero(pc.fill_null(found, False)) for found in several]))
    for row in rows:
        table = corpus.select([row]).to_pandas().fillna("")
        refuse_joined(table, columns, separator, path, int(row))


def take_smiles(corpus, smiles_column, source):
    """Returns the column of the SMILES alone, called `smiles`; an `InputError` if there is none, or no row."""
    column = find_smiles(corpus.column_names, smiles_column, source)
    if not len(corpus):
        raise InputError(f"{source} holds no molecule.")
    corpus = corpus.select_columns([column])
    if corpus.features[column] != datasets.Value("string"):
        corpus = corpus.cast_column(column, datasets.Value("string"))  # and named as what is no SMILES
    return corpus if column == "smiles" else corpus.rename_column(column, "smiles")


def load_data(tokenizer, model_args, data_args, mlm_args, training_args, heads):
    """Returns training data, held-out data, the hash of the split, its parts and the dropped rows.

    The hash is `None` for a corpus, which has no parts (`dict[str, pandas.DataFrame]`).
    Molecules with labels are split as run_regression.py splits them, and its test molecules are not learned. A part of
    a corpus is held out, and of labeled molecules where `--protocol paper` gives no validation part. Both parts have
    the targets of `heads`; the training part has its random SMILES, with descriptors that are those of the molecule
    and atoms in the order of each SMILES.
    """
    options = (tokenizer, mlm_args, heads)

    def encode(corpus, source, least=2, **form):
        encoded, dropped = encode_corpus(corpus, tokenizer, data_args, mlm_args, source, least, **form)
        # all of it, so that another split or seed finds it in the cache; but not of a corpus that is then cut
        return encoded if data_args.max_train_samples else add_descriptors(encoded, *options), dropped

    if data_args.dataset_name is not None:
        source = data_args.dataset_name
        corpus = load_hub_dataset(source, data_args.dataset_config_name, model_args.cache_dir)
        columns = corpus.column_names
    else:
        source, corpus = data_args.train_file, None
        columns = [] if has_lines(source, data_args.smiles_column) else read_header(source)[0]
    if find_labels(columns, data_args.label_column, "--label_column", source):
        if mlm_args.exclude_file:
            raise InputError(
                f"{source} has labels: the test molecules of its split are not learned anyway. Leave --exclude_file "
                "out, which goes with a corpus."
            )
        molecules, digest, dropped = load_molecules(tokenizer, model_args, data_args, training_args)
        split = dict(list(molecules.groupby("split", sort=False)))
        train, held_out = encode_split(split, source, encode)
        logger.info("%s has labels: learning the training molecules of its split alone", source)
    else:
        check_corpus(source, columns, data_args, mlm_args, training_args)
        digest, split = None, {}
        train, held_out, dropped = load_corpus(source, corpus, model_args, data_args, mlm_args, encode)
    if held_out is None:
        train, held_out = hold_out_share(train, source, data_args, training_args)
    whole = held_out  # which a warning is about
    if data_args.max_eval_samples is not None:
        held_out = held_out.select(range(min(len(held_out), data_args.max_eval_samples)))
    if data_args.max_train_samples is not None:
        train = train.select(range(min(len(train), data_args.max_train_samples)))
        train, held_out = (add_descriptors(part, *options) for part in (train, held_out))
    if data_args.validation_file is not None and digest is None:
        known = int(np.isin(keys_of(whole), keys_of(train)).sum())
        if known:
            logger.warning(
                "%d of the %d molecules in %s are in %s too and are learned: the held-out numbers are optimistic",
                known, len(whole), data_args.validation_file, source,
            )  # fmt: skip
    if data_args.augment_smiles and training_args.do_train:
        cache = {"load_from_cache_file": not mlm_args.overwrite_cache, "num_proc": mlm_args.workers(train)}
        train = augment(train, tokenizer, data_args.augment_smiles, training_args.seed, data_args.max_length, **cache)
    train, held_out = (add_atoms(part, *options) for part in (train, held_out))
    return train, held_out.sort("length", reverse=True), digest, split, dropped


def encode_split(split, source, encode):
    """Returns training and validation molecules of a split, encoded; `None` for a part that it lacks."""
    parts = {}
    for name, least in (("train", 2), ("validation", 1)):
        if name in split:
            part = datasets.Dataset.from_dict({"smiles": split[name]["text"].tolist()})
            parts[name], _ = encode(part, source, least, checked=True)
    return parts["train"], parts.get("validation")


def check_corpus(source, columns, data_args, mlm_args, training_args):
    """Raises `InputError` for flags of a split, which no corpus has; warns of a table that may have labels."""
    flags = [f"--{name}" for name in ("split_file", "test_file") if getattr(data_args, name) is not None]
    flags += ["--split scaffold"] if data_args.split == "scaffold" else []
    if flags:
        raise InputError(
            f"{source} has no column that is called like a label, so all its molecules would be learned whatever "
            f"{' and '.join(flags)} says. Name its labels with --label_column, or leave {' and '.join(flags)} out."
        )
    if len(columns) > 1 and training_args.do_train and not mlm_args.exclude_file:  # one column can be no label
        logger.warning(
            "%s has no column that is called like a label, and is read as a corpus: later test molecules of it "
            "are learned too. If it has labels, name them (--label_column), or such molecules (--exclude_file)",
            source,
        )  # fmt: skip


def load_corpus(source, corpus, model_args, data_args, mlm_args, encode):
    """Returns a corpus, encoded, the molecules of `--validation_file`, and the dropped rows of both.

    Args:
        corpus (`datasets.Dataset`, *optional*): from the Hub; else the file `source` is read.
    """

    def read(path):
        return read_corpus(path, data_args.smiles_column, model_args.cache_dir, mlm_args.overwrite_cache)

    corpus = read(source) if corpus is None else take_smiles(corpus, data_args.smiles_column, source)
    excluded = read_excluded(data_args, mlm_args, model_args.cache_dir)  # first: it may be at fault, and is short
    train, dropped = encode(corpus, source, excluded=excluded)
    if data_args.validation_file is None:
        return train, None, dropped
    held_out, more = encode(read(data_args.validation_file), data_args.validation_file, least=1)
    return train, held_out, pd.concat([dropped, more], ignore_index=True)


def hold_out_share(train, source, data_args, training_args):
    """Returns training data without the share that is held out, and that.

    Raises:
        InputError: if the share is 0, or leaves nothing to learn.
    """
    if not data_args.validation_fraction:
        raise InputError(
            f"{data_args.split_file} has no validation rows, and --validation_fraction 0 holds nothing out. Leave "
            "--validation_fraction 0 out, or name such rows."
        )
    size = max(1, min(MOST_HELD_OUT, round(len(train) * data_args.validation_fraction)))
    seed = training_args.seed if data_args.split_seed is None else data_args.split_seed
    train, held_out = hold_out(train, size, seed, source)
    if not len(train):
        raise InputError(
            f"--validation_fraction {data_args.validation_fraction} of the {len(held_out)} molecules in {source} "
            "leaves none to learn. Give a smaller one, or more molecules."
        )
    return train, held_out


def keys_of(corpus):
    """Returns a number for each row of a corpus, equal for rows of the same tokens alone (but for one in 10^19)."""
    ids = corpus.select_columns("input_ids").with_format("numpy")
    rows = (np.asarray(row, dtype=np.uint16) for batch in ids.iter(batch_size=10_000) for row in batch["input_ids"])
    digests = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64, len(corpus))


def hold_out(corpus, size, seed, source):
    """Returns a corpus in two parts, the second of at most `size` rows; rows of the same tokens are on one side.

    Where every molecule repeats more often, the second part has one that repeats least.

    Raises:
        InputError: if all rows are the same.
    """
    _, molecule, counts = np.unique(keys_of(corpus), return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise InputError(f"All rows of {source} are the same molecule. Give others, or a --validation_file.")
    if len(counts) < len(corpus):
        logger.info("%d of %d rows of %s repeat others", len(corpus) - len(counts), len(corpus), source)
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[counts[order] <= max(size, counts.min())]  # what repeats more often is learned
    fit = np.cumsum(counts[order]) <= max(size, counts[order[0]])
    held_out = np.isin(molecule, order[fit])
    return corpus.select(np.flatnonzero(~held_out)), corpus.select(np.flatnonzero(held_out))


def strip(lines, named):
    """Returns SMILES without the space around them, nor the molecule's name after them if lines are `named`."""
    texts = [(line or "").strip() for line in lines]
    return [LINE.match(text)[1] or "" for text in texts] if named else texts


def encode_batch(batch, tokenizer, smiles_form, max_length, checked=False, named=False, excluded=()):
    """Returns token ids, lengths and what is wrong with each SMILES ("" if nothing), for `datasets.Dataset.map`.

    Args:
        checked (`bool`): whether the SMILES are in their form already.
        named (`bool`): whether a molecule's name may follow its SMILES, as in a line of a .smi file.
        excluded (`tuple[str]`): canonical SMILES of the molecules that are left out.
    """
    texts = strip(batch["smiles"], named)
    if not checked:
        texts = [canonicalize(text, smiles_form) for text in texts]
    ids, problems = encode_smiles([text or "" for text in texts], tokenizer)
    reasons = [
        "invalid" if not text else problem or ("too_long" if len(row) > max_length else "")
        for text, row, problem in zip(texts, ids, problems, strict=True)
    ]
    if excluded:
        known = frozenset(excluded)
        mixtures = [frozenset(key.split(".")) for key in excluded if "." in key]
        known |= {next(iter(parts)) for parts in mixtures if len(parts) == 1}  # of equal molecules
        keys = texts if smiles_form == "canonical" else [text and canonicalize(text, "canonical") for text in texts]
        parts = [frozenset(key.split(".")) if key else frozenset() for key in keys]
        reasons = [
            EXCLUDED
            if not known.isdisjoint(found) or (len(found) > 1 and any(mixture <= found for mixture in mixtures))
            else reason
            for found, reason in zip(parts, reasons, strict=True)
        ]
    return {"input_ids": ids, "length": [len(row) for row in ids], "reason": reasons}


def read_excluded(data_args, mlm_args, cache_dir=None):
    """Returns the canonical SMILES, without stereo, of the molecules in `--exclude_file` (`tuple[str]`).

    Raises:
        InputError: if a file cannot be read; if RDKit cannot read a SMILES and `--invalid_smiles` is `error`.
    """
    excluded = set()
    for path in mlm_args.exclude_file or []:
        named = has_lines(path, data_args.smiles_column)
        columns = [] if named else read_header(path)[0]
        column = data_args.smiles_column if data_args.smiles_column in columns else None
        if columns and find_column(columns, column, SMILES_COLUMNS, "--smiles_column", path) is None:
            raise InputError(
                f"{path} has no SMILES column; it has: {', '.join(columns)}. Call the one with the SMILES smiles."
            )
        texts = strip(read_corpus(path, column, cache_dir, mlm_args.overwrite_cache)["smiles"], named)
        keys = [canonicalize(text, "canonical") for text in texts]
        bad = [row for row, key in enumerate(keys) if key is None]
        if bad:
            message = describe_unusable(["invalid"] * len(bad), bad, [texts[row] for row in bad], len(texts), path)
            refuse_or_warn(message, data_args, "They exclude nothing.")
        excluded.update(key for key in keys if key is not None)
    return tuple(sorted(excluded))  # in one order, by which the cache is found


def encode_corpus(corpus, tokenizer, data_args, mlm_args, source, least=2, checked=False, excluded=()):
    """Returns the corpus as token ids with lengths, and a table of the dropped rows.

    Of a corpus that lies on disk the token ids are memory-mapped, and cached there.

    Args:
        checked (`bool`): whether the molecules are in their form already, and all of them to be used.
        excluded (`tuple[str]`): canonical SMILES of the molecules that are left out.
    Raises:
        InputError: if a molecule cannot be used and `--invalid_smiles` is `error`, or if fewer than `least` are left.
    """
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("uint16")),
            "length": datasets.Value("int32"),
            "reason": datasets.Value("string"),
        }
    )
    options = {
        "smiles_form": data_args.smiles_form,
        "max_length": data_args.max_length,
        "checked": checked,
        "named": corpus.info.builder_name == "text",
        "excluded": excluded,
    }
    encoded = cached_map(
        corpus,
        encode_batch,
        tokenizer,
        fn_kwargs=options,
        num_proc=mlm_args.workers(corpus),
        remove_columns=corpus.column_names,
        features=features,
        load_from_cache_file=not mlm_args.overwrite_cache,
        desc="Canonicalizing and encoding SMILES",
    )
    reasons = encoded.with_format("arrow")["reason"]
    reasons = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in reasons[:].chunks])
    bad = np.flatnonzero(~np.isin(reasons, ("", EXCLUDED)))
    if len(bad):
        smiles = [text or "" for text in corpus[bad[:1000]]["smiles"]]
        message = describe_unusable(reasons[bad[:1000]], bad[:1000], smiles, len(corpus), source)
        if len(bad) > 1000:
            message = f"{len(bad)} of {len(corpus)} molecules cannot be used; of the first 1000: {message}"
        if not options["named"] and (reasons == "invalid").all():
            message += OTHER_COLUMN.format("--smiles_column")
        refuse_or_warn(message, data_args, "Dropped.")
    if excluded:
        count = int((reasons == EXCLUDED).sum())
        logger.info("%d of %d molecules in %s are left out for --exclude_file", count, len(corpus), source)
    dropped, left_out = pd.DataFrame(), np.flatnonzero(reasons != "")
    if len(left_out):
        dropped = pd.DataFrame({"row": left_out, "smiles": corpus[left_out]["smiles"], "reason": reasons[left_out]})
        dropped = dropped.replace({"reason": REASONS}).assign(source=str(source))
        encoded = encoded.select(np.flatnonzero(reasons == ""))
    if len(encoded) < least:
        raise InputError(f"{source} has {len(encoded)} usable molecules; this needs at least {least}.")
    return encoded.remove_columns("reason"), dropped


def describe_molecules(batch, tokenizer, names):
    """Returns the named descriptors of each molecule, for `datasets.Dataset.map`."""
    texts = (to_text(ids, tokenizer) for ids in batch["input_ids"])
    # what RDKit cannot read counts as the mean
    return {"descriptors": [describe(text, names) for text in texts]}


def describe_atoms(batch, tokenizer, names, buckets):
    """Returns descriptors and environments of each molecule's atoms, flat, for `datasets.Dataset.map`.

    Atoms come in the order of their tokens. A molecule that RDKit cannot read, or of which it removed atoms that have
    a token, such as [H], has none; nor has one with a wildcard (*), whose token is no atom's.
    """
    is_atom = atom_tokens(tokenizer)
    columns = {"atom_descriptors": [], "environments": []}
    for ids in batch["input_ids"]:
        molecule = parse_smiles(to_text(ids, tokenizer))
        if molecule is None or is_atom[ids].sum() != molecule.GetNumAtoms():
            columns["atom_descriptors"].append(np.zeros(0, dtype=np.float32))
            columns["environments"].append(np.zeros(0, dtype=np.int64))
        else:
            columns["atom_descriptors"].append(compute_atom_descriptors(molecule, names).ravel())
            columns["environments"].append(atom_environments(molecule, buckets).ravel())
    return columns


def atom_tokens(tokenizer):
    """Returns which tokens of the vocabulary stand for an atom, a boolean array (V,)."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return np.array([token[0] == "[" or token[0].isalpha() for token in tokens])


def add_columns(dataset, function, columns, tokenizer, mlm_args, **options):
    """Returns the data set with what `function` computes of its rows in worker processes, cached where that is.

    Args:
        columns (`dict[str, str]`): type of the numbers in each new column of lists.
    """
    features = datasets.Features(dataset.features)
    features |= {name: datasets.List(datasets.Value(dtype)) for name, dtype in columns.items()}
    return cached_map(
        dataset,
        function,
        tokenizer,
        fn_kwargs=options,
        num_proc=mlm_args.workers(dataset),
        features=features,
        load_from_cache_file=not mlm_args.overwrite_cache,
        desc=f"Computing {' and '.join(columns).replace('_', ' ')}",
    )


def add_descriptors(dataset, tokenizer, mlm_args, heads):
    """Returns the data set with the descriptors that the model is to predict, if it is to."""
    names = heads["descriptor_names"]
    if not names:
        return dataset
    return add_columns(dataset, describe_molecules, {"descriptors": "float32"}, tokenizer, mlm_args, names=names)


def add_atoms(dataset, tokenizer, mlm_args, heads):
    """Returns the data set with what is to be predicted of its atoms, if it is to."""
    names, buckets = heads["atom_descriptor_names"], heads["environment_buckets"]
    if not names:
        return dataset
    columns = {"atom_descriptors": "float32", "environments": "int32"}
    return add_columns(dataset, describe_atoms, columns, tokenizer, mlm_args, names=names, buckets=buckets)


class PretrainingCollator:
    """Pads a batch, masks its tokens if `mlm_probability` is given, and adds what other heads are to predict.

    Of the chosen tokens 80 % become `<mask>`, 10 % any token of the vocabulary, 10 % stay. What is masked is a
    function of the batch and the seed, not of a random state: a resumed run masks as the uninterrupted one, whatever
    was prefetched.
    """

    def __init__(self, tokenizer, mlm_probability, seed, masked_share=1.0, atom_names=(), buckets=()):
        self.tokenizer = tokenizer
        self.mlm_probability = mlm_probability
        self.masked_share = masked_share
        self.seed = seed
        self.is_atom = atom_tokens(tokenizer)
        self.widths = {"atom_descriptors": len(atom_names or ()), "environments": len(buckets or ())}

    def __call__(self, examples):
        batch = self.tokenizer.pad([{"input_ids": e["input_ids"]} for e in examples], return_tensors="pt")
        if "descriptors" in examples[0]:
            batch["descriptors"] = torch.tensor([e["descriptors"] for e in examples])  # (B, M)
        if "environments" in examples[0]:
            batch |= self.place_atoms(examples, batch["input_ids"])
        return batch if self.mlm_probability is None else self.mask(batch)

    def place_atoms(self, examples, ids):
        """Returns the numbers of atoms at the places of their tokens, (B, T, A) and (B, T, R); -100 elsewhere.

        And where the atoms are among the B * T tokens, (N,).
        """
        atoms = self.is_atom[ids.numpy()]  # (B, T)
        atoms[[not len(e["environments"]) for e in examples]] = False
        placed = {}
        for name, dtype in (("atom_descriptors", np.float32), ("environments", np.int64)):
            flat = np.concatenate([np.asarray(e[name], dtype=dtype) for e in examples])
            values = np.full((*atoms.shape, self.widths[name]), -100, dtype=dtype)
            values[atoms] = flat.reshape(-1, self.widths[name])
            placed[name] = torch.from_numpy(values)
        # found here: where they are looked for on a GPU, it is waited for
        placed["atom_rows"] = torch.from_numpy(atoms.ravel().nonzero()[0])
        return placed

    def mask(self, batch):
        """Returns the batch with masked `input_ids` (B, T), `labels` (B, T), -100 elsewhere, and their places (N,)."""
        ids = batch["input_ids"]
        generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), self.seed % 2**32))
        specials = torch.tensor(
            [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.tokenizer.pad_token_id]
        )
        draws, fates = torch.rand((2, *ids.shape), generator=generator)
        chosen = (draws < self.mlm_probability) & ~torch.isin(ids, specials)
        whole = torch.randperm(len(ids), generator=generator)[max(1, round(self.masked_share * len(ids))) :]
        chosen[whole] = False
        batch["labels"] = torch.where(chosen, ids, -100)
        batch["masked_rows"] = chosen.flatten().nonzero()[:, 0]
        batch["input_ids"] = torch.where(chosen & (fates < 0.8), self.tokenizer.mask_token_id, ids)
        others = torch.randint(len(self.tokenizer), ids.shape, generator=generator)
        batch["input_ids"] = torch.where(chosen & (fates >= 0.9), others, batch["input_ids"])
        return batch


class PretrainingMetrics:
    """What an evaluation keeps of each batch, and the metrics over all of them."""

    def __init__(self, model, label_names):
        self.model = model
        self.label_names = label_names

    def score(self, logits, labels):
        """Returns scores of the targets, with a row a molecule; for `preprocess_logits_for_metrics`."""
        logits = iter(logits if isinstance(logits, tuple) else (logits,))
        labels = dict(zip(self.label_names, labels if isinstance(labels, tuple) else (labels,), strict=True))
        scores = []
        if "labels" in labels:
            scores.append(score_tokens(next(logits), labels["labels"]))
        if self.model.config.descriptor_names:  # these are there in any case
            predicted = next(logits)
        if "descriptors" in labels:
            scores += [predicted.float(), self.model.descriptor_head.standardize(labels["descriptors"])]  # (B, M) each
        if "environments" in labels:
            targets = labels["atom_descriptors"], labels["environments"]
            scores.append(score_atoms(self.model.atom_head, next(logits), next(logits), *targets))
        return tuple(scores)

    def compute(self, output):
        """Returns the metrics of all scores; for `compute_metrics`."""
        scores = list(output.predictions if isinstance(output.predictions, tuple) else (output.predictions,))
        metrics = mlm_metrics(scores.pop(0)) if "labels" in self.label_names else {}
        if "descriptors" in self.label_names:
            metrics |= descriptor_metrics(scores.pop(0), scores.pop(0))
        return metrics | (atom_metrics(scores.pop(0)) if scores else {})

    def names(self):
        """Returns the names of the metrics that an evaluation gives."""
        widths = [3] * ("labels" in self.label_names) + [1, 1] * ("descriptors" in self.label_names)
        widths += [2 + len(self.model.atom_head.buckets)] if "environments" in self.label_names else []
        scores = tuple(np.indices((2, width))[0] for width in widths)  # of two molecules that differ
        return list(self.compute(EvalPrediction(scores, None)))


def score_atoms(head, descriptor_logits, environment_logits, atom_descriptors, environments):
    """Returns sums over the atoms of each molecule, (B, 2 + R): atoms, squared error, right environments by radius.

    Args:
        descriptor_logits, environment_logits (`torch.Tensor`): for the N atoms of all molecules, (N, A), (N, buckets).
        atom_descriptors, environments (`torch.Tensor`): shape (B, T, A) and (B, T, R), -100 where there is no atom.
    """
    atoms = environments[..., 0] != -100  # (B, T)
    target = head.standardize(atom_descriptors[atoms])
    columns = [torch.ones(len(target)), (descriptor_logits.float() - target).square().mean(dim=1)]
    for index, logits in enumerate(environment_logits.split(head.buckets, dim=-1)):
        columns.append((logits.argmax(dim=-1) == environments[atoms][:, index]).float())
    columns = torch.stack([column.to(target.device) for column in columns], dim=1)  # (N, 2 + R)
    sums = columns.new_zeros(len(atoms), columns.shape[1])
    return sums.index_add(0, atoms.nonzero()[:, 0], columns)


def atom_metrics(scores):
    """Returns mean squared error of standardized atom descriptors and accuracy of environments, from `score_atoms`."""
    count, squares, *right = scores.astype("float64").sum(axis=0)
    if not count:
        return {}
    accuracies = {f"environment_{radius}_accuracy": value / count for radius, value in enumerate(right, start=1)}
    return {"atom_mse": squares / count} | accuracies


def score_tokens(logits, labels):
    """Returns for each molecule how many labeled tokens were predicted right, their summed loss and number, (B, 3).

    In this form an evaluation set takes three numbers a molecule, not T times V logits.
    """
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
        metrics |= {"masked_accuracy": right / count, "perplexity": math.exp(min(loss / count, 700.0))}
    return metrics


def descriptor_metrics(predictions, targets):
    """Returns mean squared error of standardized descriptors (N, M), and the median R² of those that vary.

    Not the mean: a group that one molecule in thousands has can have an R² far below zero.
    """
    squares = ((predictions - targets).astype("float64") ** 2).mean(axis=0)  # (M,)
    variances = targets.astype("float64").var(axis=0)
    varying = variances > 1e-6
    metrics = {"descriptor_mse": float(squares.mean())}
    if varying.any():
        metrics["descriptor_r2"] = float(np.median(1 - squares[varying] / variances[varying]))
    return metrics


def measure_scale(dataset, column, width, sample=20_000):
    """Returns mean and standard deviation of each of `width` numbers in a column of lists, by a sample of the rows.

    Values that are not finite do not count.
    """
    sampled = dataset.select(range(0, len(dataset), max(1, len(dataset) // sample)))
    values = sampled.with_format("arrow")[column][:].combine_chunks().flatten()
    return scale_of(values.to_numpy(zero_copy_only=False).reshape(-1, width), column)


def choose_heads(config, objective_parts):
    """Returns which heads beside that for tokens the model is to have: the checkpoint's, or the objective's defaults.

    Returns:
        values of `descriptor_names`, `atom_descriptor_names` and `environment_buckets`; `None` where there is none.
    Raises:
        InputError: if the checkpoint names descriptors that cannot be computed here.
    """
    heads = {"descriptor_names": None, "atom_descriptor_names": None, "environment_buckets": None}
    if "mtr" in objective_parts:
        heads["descriptor_names"] = config.descriptor_names or default_descriptors()
        compute_descriptors(parse_smiles("C"), heads["descriptor_names"])  # unknown names, before any corpus is read
    if "atoms" in objective_parts:
        heads["atom_descriptor_names"] = config.atom_descriptor_names or list(ATOM_DESCRIPTORS)
        heads["environment_buckets"] = config.environment_buckets or list(ENVIRONMENT_BUCKETS)
        compute_atom_descriptors(parse_smiles("C"), heads["atom_descriptor_names"])
    return heads


def check_heads(model, objective_parts, will_train):
    """Removes heads that are still random and will not be trained, and refuses to evaluate a random one.

    A configuration may name heads that its checkpoint lacks, as that of a regression model does. Saved untrained, they
    would later pass for trained ones; that of the tokens stays in the model and is not saved.

    Raises:
        InputError: if the objective needs a head that is random, and there is no training.
    """
    heads = {"mlm": "lm_head.", "mtr": "descriptor_head.", "atoms": "atom_head."}
    random = [part for part, prefix in heads.items() if prefix in model.new_heads]
    missing = [part for part in random if part in objective_parts]
    if missing and not will_train:
        raise InputError(
            f"{model.name_or_path or 'The model'} has no trained head for {' and '.join(missing)}. Add --do_train, or "
            "pass a --model_name_or_path that was trained for it."
        )
    if "mtr" in random and "mtr" not in objective_parts and model.config.descriptor_names:
        del model.descriptor_head
        model.config.descriptor_names = None
    if "atoms" in random and "atoms" not in objective_parts and model.config.atom_descriptor_names:
        del model.atom_head
        model.config.atom_descriptor_names = model.config.environment_buckets = None
    if "mlm" in random and "mlm" not in objective_parts:
        model._keys_to_ignore_on_save = {name for name in model.state_dict() if name.startswith("lm_head.")}
