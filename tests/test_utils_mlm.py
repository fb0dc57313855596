"""utils_mlm.py: corpora in every form, the split they respect, masking, targets of other heads, metrics, bad input."""

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import run_mlm
import utils_mlm
from arguments import EMBEDDED_DATA, InputError, parse_arguments
from modeling_molformer_reg import MolformerAtomHead, MolformerConfig, MolformerForMaskedLM
from run_mlm import MlmArguments
from utils_checkpoints import build_tokenizer
from utils_mlm import PretrainingCollator, describe_atoms, describe_molecules, mlm_metrics, score_tokens
from utils_molecules import parent_of


def parse(*flags):
    classes = run_mlm.ARGUMENTS
    return parse_arguments(*classes, defaults=run_mlm.DEFAULTS, args=[str(flag) for flag in flags])


def load_data(*parsed):
    """Data with the targets that the objective has for a model without a checkpoint."""
    heads = utils_mlm.choose_heads(MolformerConfig(), parsed[2].parts)
    return utils_mlm.load_data(build_tokenizer(), *parsed, heads)


def load(path, checkpoint, tmp_path, *flags):
    names = ["--model_name_or_path", checkpoint, "--output_dir", tmp_path / "x", "--cache_dir", tmp_path / "cache"]
    return load_data(*parse("--train_file", path, *names, *flags))


@pytest.fixture(scope="module")
def corpus(small_table, tmp_path_factory):
    """The SMILES of the small table as text, one a line."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(pd.read_csv(small_table)["SMILES"]) + "\n")
    return path


def test_labeled_table_gives_the_training_molecules_of_the_regression_split_alone(
    tiny_checkpoint, small_table, tmp_path
):
    """Reference: the split of run_regression.py from the same seed."""
    from utils_molecules import load_molecules

    parsed = parse(
        "--model_name_or_path", tiny_checkpoint, "--train_file", small_table, "--output_dir", tmp_path / "x"
    )
    tokenizer = build_tokenizer()
    train, held_out, digest, *_ = load_data(*parsed)
    molecules, expected_digest, _ = load_molecules(tokenizer, parsed[0], parsed[1], parsed[3])
    by_split = {name: sorted(map(tuple, rows["input_ids"])) for name, rows in molecules.groupby("split")}
    assert digest == expected_digest
    assert sorted(tuple(row["input_ids"]) for row in train) == by_split["train"]
    assert sorted(tuple(row["input_ids"]) for row in held_out) == by_split["validation"]
    assert not set(by_split["test"]) & {tuple(row["input_ids"]) for row in train}


@pytest.mark.parametrize("form", ["txt", "crlf", "bom", "gz", "xz", "bz2", "csv", "named.smi", "table.txt"])
def test_corpus_is_read_alike_in_every_form(form, corpus, tiny_checkpoint, tmp_path):
    """Reference: the plain text file."""
    text = corpus.read_text()
    packed = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
    path = tmp_path / ({"csv": "c.csv", "named.smi": "c.SMI"} | {n: f"c.txt.{n}" for n in packed}).get(form, "c.txt")
    if form in packed:
        path.write_bytes(packed[form](text.encode()))
    elif form in ("csv", "table.txt"):
        path.write_text("id,smiles\n" + "".join(f"{i},{line}\n" for i, line in enumerate(text.splitlines())))
    elif form == "named.smi":
        path.write_text("".join(f"{line} molecule {i}\n" for i, line in enumerate(text.splitlines())))
    else:
        path.write_bytes({"txt": b"", "bom": b"\xef\xbb\xbf", "crlf": b""}[form]
            + (text.replace("\n", "\r\n") if form == "crlf" else text).encode())  # fmt: skip

    def load(file):
        cache = tmp_path / f"cache-{file.name}"
        parsed = parse("--train_file", file, "--model_name_or_path", tiny_checkpoint, "--cache_dir", cache,
            "--output_dir", tmp_path / "x", "--preprocessing_num_workers", 1)  # fmt: skip
        train, held_out, digest, *_ = load_data(*parsed)
        assert digest is None and train.cache_files  # memory-mapped, not in memory
        return [row["input_ids"] for row in train], [row["input_ids"] for row in held_out]

    assert load(path) == load(corpus)


def test_masking_follows_the_stated_shares_and_spares_special_tokens():
    """80 % <mask>, 10 % another token, 10 % unchanged, of 15 % of the tokens (Devlin et al. 2019)."""
    tokenizer = build_tokenizer()
    examples = [{"input_ids": ids} for ids in tokenizer(["CC(=O)Nc1ccc(O)cc1"] * 3000)["input_ids"]]
    batch = PretrainingCollator(tokenizer, 0.15, seed=0)(examples)
    original = torch.tensor([example["input_ids"] for example in examples])
    chosen = batch["labels"] != -100
    assert not chosen[:, [0, -1]].any()
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert chosen[:, 1:-1].float().mean() == pytest.approx(0.15, abs=0.005)
    inputs = batch["input_ids"][chosen]
    assert (inputs == tokenizer.mask_token_id).float().mean() == pytest.approx(0.8, abs=0.02)
    assert (inputs == original[chosen]).float().mean() == pytest.approx(0.1, abs=0.015)


def test_masks_are_a_function_of_batch_and_seed():
    tokenizer = build_tokenizer()
    examples = [{"input_ids": ids} for ids in tokenizer(["CCO", "c1ccccc1", "CC(=O)O"] * 5)["input_ids"]]
    one = PretrainingCollator(tokenizer, 0.15, seed=0)
    first = one(examples)["input_ids"]
    torch.manual_seed(99)
    assert torch.equal(one(examples)["input_ids"], first)
    assert not torch.equal(one(examples[::-1])["input_ids"].flip(0), first)
    assert not torch.equal(PretrainingCollator(tokenizer, 0.15, seed=1)(examples)["input_ids"], first)


def test_perplexity_and_accuracy_are_over_tokens_not_batches():
    """Reference: the mean over all labeled tokens, computed at once."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, 20, generator=generator)
    labels = torch.randint(0, 20, (6, 9), generator=generator)
    labels[torch.rand(6, 9, generator=generator) < 0.5] = -100
    scores = torch.cat([score_tokens(logits[:2], labels[:2]), score_tokens(logits[2:], labels[2:])]).numpy()

    known = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[known], labels[known])
    metrics = mlm_metrics(scores)
    assert metrics["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert metrics["masked_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels)[known].float().mean()))
    assert metrics["masked_tokens"] == int(known.sum())


def test_unusable_lines_are_dropped_on_request(tiny_checkpoint, tmp_path, caplog):
    (tmp_path / "c.txt").write_text("CCO\nC1CC\nCCC\nCCCC\n" * 3)
    parsed = parse("--train_file", tmp_path / "c.txt", "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache", "--invalid_smiles", "drop")  # fmt: skip
    train, held_out, *_, dropped = load_data(*parsed)
    assert len(train) + len(held_out) == 9
    assert "3 of 12 SMILES" in caplog.text
    assert dropped["row"].tolist() == [1, 5, 9] and set(dropped["reason"]) == {"do not parse as SMILES"}


def test_a_corpus_may_begin_with_an_empty_line(tiny_checkpoint, tmp_path):
    """It is an unusable line as any other."""
    path = tmp_path / "c.txt"
    path.write_text("\nCCO\nCCN\nCCC\n")
    assert len(load(path, tiny_checkpoint, tmp_path, "--invalid_smiles", "drop")[-1]) == 1


def test_what_repeats_in_a_corpus_is_not_held_out_from_itself(tiny_checkpoint, tmp_path, caplog):
    path = tmp_path / "c.txt"
    path.write_text("".join(f"{'C' * n}O\nO{'C' * n}\n" for n in range(1, 41)))  # each molecule in two ways
    with caplog.at_level("INFO"):
        train, held_out, *_ = load(path, tiny_checkpoint, tmp_path)
    learned, kept = ({tuple(ids) for ids in part["input_ids"]} for part in (train, held_out))
    assert len(held_out) == 8 and len(train) == 72 and not learned & kept
    assert "40 of 80 rows" in caplog.text
    again = load(path, tiny_checkpoint, tmp_path, "--split_seed", "5")[1]
    assert {tuple(ids) for ids in again["input_ids"]} != kept


def test_a_smiles_of_a_table_is_not_cut_at_white_space(tiny_checkpoint, tmp_path):
    """Only in a file of lines a name may follow; in a table the rest would be lost without a word."""
    (tmp_path / "c.csv").write_text("smiles,mass\nCCO,1\nCCN CCC,2\nCCC,3\n")
    with pytest.raises(InputError, match="1 of 3 SMILES .* do not parse as SMILES, first at row 1: 'CCN CCC'"):
        load(tmp_path / "c.csv", tiny_checkpoint, tmp_path)
    (tmp_path / "c.smi").write_text("CCO ethanol\nCCN ethylamine\nCCC\n")
    train, held_out, *_ = load(tmp_path / "c.smi", tiny_checkpoint, tmp_path)
    assert len(train) + len(held_out) == 3


def test_a_molecule_that_repeats_a_thousand_times_is_learned(tiny_checkpoint, tmp_path):
    """Held out, it would leave nearly nothing to learn."""
    (tmp_path / "c.txt").write_text("CCO\n" * 1000 + "CCC\nCCN\nCCF\nCCCl\n")
    for seed in range(4):
        train, held_out, *_ = load(tmp_path / "c.txt", tiny_checkpoint, tmp_path, "--split_seed", seed)
        assert len(train) >= 1000 and 1 <= len(held_out) <= 100


def test_a_small_labeled_table_may_have_one_molecule_to_validate(tiny_checkpoint, small_table, tmp_path):
    pd.read_csv(small_table, nrows=12).to_csv(tmp_path / "few.csv", index=False)
    train, held_out, *_ = load(tmp_path / "few.csv", tiny_checkpoint, tmp_path)
    assert len(held_out) == 1 and len(train) == 9
    (tmp_path / "one.txt").write_text("CCCO\n")
    (tmp_path / "c.txt").write_text("CCO\nCCN\n")
    held_out = load(tmp_path / "c.txt", tiny_checkpoint, tmp_path, "--validation_file", tmp_path / "one.txt")[1]
    assert len(held_out) == 1


def test_a_corpus_of_one_molecule_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "c.txt").write_text("CCO\nOCC\n")
    with pytest.raises(InputError, match="the same molecule"):
        load(tmp_path / "c.txt", tiny_checkpoint, tmp_path)


def test_a_corpus_whose_smiles_are_numbers_is_refused(tiny_checkpoint, tmp_path):
    (tmp_path / "c.csv").write_text("molecule,name\n" + "".join(f"{n},CCO\n" for n in range(5)))
    with pytest.raises(InputError, match="do not parse as SMILES, first at row 0: '0'"):
        load(tmp_path / "c.csv", tiny_checkpoint, tmp_path)


def test_a_split_file_without_validation_rows_holds_out_a_part_of_the_training_rows(tiny_checkpoint, tmp_path):
    (tmp_path / "t.csv").write_text("SMILES,label\n" + "".join(f"{'C' * n}O,{n}\n" for n in range(1, 31)))
    (tmp_path / "s.json").write_text(json.dumps({"train": list(range(20)), "test": list(range(20, 30))}))
    flags = (tmp_path / "t.csv", tiny_checkpoint, tmp_path, "--split_file", tmp_path / "s.json")
    train, held_out, *_ = load(*flags, "--validation_fraction", "0.2")
    assert (len(train), len(held_out)) == (16, 4)
    with pytest.raises(InputError, match="no validation rows, and --validation_fraction 0 holds nothing out"):
        load(*flags, "--validation_fraction", 0)


UNREADABLE_AGAIN = "Cb1=C(OCc2ccc(F)cc2)C(=O)C=CO1"  # RDKit reads it, and not what it writes of it


@pytest.mark.parametrize("name", ["t.csv", "t.txt"])
def test_every_training_molecule_of_a_labeled_table_is_learned(name, tiny_checkpoint, tmp_path):
    """One whose canonical SMILES cannot be read again too; and a table's name does not make it a corpus."""
    rows = ["SMILES\tlabel", f"{UNREADABLE_AGAIN}\t1.5", *(f"{'C' * n}O\t{n}" for n in range(1, 30))]
    (tmp_path / name).write_text("\n".join(rows) + "\n")
    flags = ("--objective", "mtr", "--validation_fraction", "0.1", "--train_file", tmp_path / name)
    parsed = parse("--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x", "--seed", "3",
        "--cache_dir", tmp_path / "cache", *flags)  # fmt: skip
    train, held_out, digest, split, _ = load_data(*parsed)
    assert digest is not None and set(split) == {"train", "validation", "test"}
    assert (len(train), len(held_out)) == (len(split["train"]), len(split["validation"]))
    assert UNREADABLE_AGAIN in set(split["train"]["smiles"])


def test_a_molecule_that_cannot_be_read_back_counts_as_the_mean_and_has_no_atoms():
    tokenizer = build_tokenizer()
    batch = {"input_ids": tokenizer(["C1CC", "CCO"])["input_ids"]}
    values = describe_molecules(batch, tokenizer, ["MolWt"])["descriptors"]
    assert np.isnan(values[0]).all() and values[1] == pytest.approx([46.069], abs=1e-3)
    atoms = describe_atoms(batch, tokenizer, ["hydrogens"], (16,))
    assert [len(numbers) for numbers in atoms["environments"]] == [0, 3]


def test_encoding_tells_what_is_wrong_with_each_line():
    tokenizer = build_tokenizer()
    lines = ["OCC ethanol", "C1CC", "", None, "C" * 30, "c1ccccc1"]
    encoded = utils_mlm.encode_batch({"smiles": lines}, tokenizer, "canonical", 20, named=True)
    assert encoded["reason"] == ["", "invalid", "invalid", "invalid", "too_long", ""]
    named = ["C |^1:0| methyl", "CC name |x|", "CC", ""]
    assert utils_mlm.strip(named, True) == ["C |^1:0|", "CC", "CC", ""]
    assert encoded["input_ids"][0] == tokenizer("CCO")["input_ids"] and encoded["length"][0] == 5
    raw = utils_mlm.encode_batch({"smiles": ["C1CC", "CCO", "C" * 30]}, tokenizer, "raw", 20)
    assert raw["reason"] == ["invalid", "", "too_long"]
    assert raw["input_ids"][1] == tokenizer("CCO")["input_ids"]


@pytest.mark.parametrize("form", ["canonical", "isomeric", "raw"])
def test_molecules_to_exclude_are_left_out_of_a_corpus_in_any_spelling(form, tiny_checkpoint, tmp_path, caplog):
    """Reference: which lines are, stereo aside, or have in a mixture, a molecule of the files."""
    lines = ["OCC", "C[C@H](N)C(=O)O", "CC(=O)O.OCC", "CCN", "CCOC", "c1ccccc1", "CC(N)C(=O)O.[Na]", "CCC", "CCCCO",
             "[2H]OCC", "CCCN.CC.CCCO", "CCCN.CO"]  # fmt: skip
    left_out = [0, 1, 2, 5, 6, 9, 10]  # of a mixture that is excluded all parts must be there
    (tmp_path / "corpus.csv").write_text("structure\n" + "\n".join(lines) + "\n")
    (tmp_path / "test.csv").write_text("SMILES,label\nCCO,1.5\nC[C@@H](N)C(O)=O,2.5\n")
    (tmp_path / "more.smi").write_text("C1=CC=CC=C1 benzene\nCCCO.CCCN mixture\n")
    flags = ("--smiles_form", form, "--smiles_column", "structure", "--exclude_file", tmp_path / "test.csv",
             tmp_path / "more.smi", "--preprocessing_num_workers", 1)  # fmt: skip
    with caplog.at_level("INFO"):
        train, held_out, _, _, dropped = load(tmp_path / "corpus.csv", tiny_checkpoint, tmp_path, *flags)
    tokenizer = build_tokenizer()
    kept = [row["input_ids"] for part in (train, held_out) for row in part]
    expected = [line for row, line in enumerate(lines) if row not in left_out]
    forms = [line if form == "raw" else utils_mlm.canonicalize(line, form) for line in expected]
    assert sorted(kept) == sorted(tokenizer(forms)["input_ids"])
    assert dropped["row"].tolist() == left_out and set(dropped["reason"]) == {"are molecules of --exclude_file"}
    assert "7 of 12 molecules" in caplog.text


def test_rows_with_more_fields_than_the_header_are_refused_wherever_they_stand(tiny_checkpoint, tmp_path):
    lines = ["id,smiles,,", *(f"{row},{'C' * row},," for row in range(1, 12)), "30"]
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")  # names that repeat, and a row that is short
    with pytest.raises(InputError, match="row 11: ''"):
        load(tmp_path / "table.csv", tiny_checkpoint, tmp_path)
    train, held_out, *_ = load(tmp_path / "table.csv", tiny_checkpoint, tmp_path, "--invalid_smiles", "drop")
    assert len(train) + len(held_out) == 11
    (tmp_path / "table.csv").write_text("\n".join([*lines[:-1], "30,C,CCCCO,,"]) + "\n")
    with pytest.raises(InputError, match="Expected 4 fields in line 13, saw 5"):
        load(tmp_path / "table.csv", tiny_checkpoint, tmp_path)
    (tmp_path / "table.csv").write_text("smiles,smiles\n" + "C,CC\nCCC,CCCC\n" * 9)
    with pytest.raises(InputError, match="more than one column 'smiles'"):
        load(tmp_path / "table.csv", tiny_checkpoint, tmp_path)


@pytest.mark.parametrize("cells", ["null", '""', "17"])
def test_cells_of_a_data_set_that_are_no_smiles_are_told_with_their_rows(cells, tiny_checkpoint, tmp_path):
    (tmp_path / "set").mkdir()
    rows = [f'{{"smiles": "{"C" * n}"}}' for n in range(1, 12)] if cells != "17" else []
    rows += [f'{{"smiles": {cells}}}', f'{{"smiles": {cells}}}']
    (tmp_path / "set" / "data.jsonl").write_text("\n".join(rows) + "\n")
    names = [
        "--model_name_or_path",
        tiny_checkpoint,
        "--output_dir",
        tmp_path / "x",
        "--cache_dir",
        tmp_path / "cache",
    ]
    with pytest.raises(InputError, match=f"2 of {len(rows)} SMILES in .* do not parse"):
        load_data(*parse("--dataset_name", tmp_path / "set", *names))


def test_a_corpus_of_which_nothing_would_be_learned_is_refused(corpus, tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match="--validation_fraction 0.999 of the .* molecules .* leaves none to learn"):
        load(corpus, tiny_checkpoint, tmp_path, "--validation_fraction", 0.999)


def test_a_corpus_may_have_a_name_that_looks_like_a_pattern(corpus, tiny_checkpoint, tmp_path):
    (tmp_path / "[2024] *").mkdir()
    (tmp_path / "[2024] *" / "corpus[1].smi").write_bytes(corpus.read_bytes())
    train, held_out, *_ = load(tmp_path / "[2024] *" / "corpus[1].smi", tiny_checkpoint, tmp_path)
    assert len(train) + len(held_out) == len(corpus.read_text().splitlines())


def test_a_corpus_is_read_again_where_that_is_asked_for(tiny_checkpoint, tmp_path):
    """A file whose time tells nothing, as in an unpacked archive."""
    path, sizes = tmp_path / "corpus.smi", []
    for count, flags in ((30, []), (20, ["--overwrite_cache"])):
        path.write_text("".join("C" * n + "\n" for n in range(1, count + 1)))
        os.utime(path, (1e9, 1e9))
        train, held_out, *_ = load(path, tiny_checkpoint, tmp_path, *flags)
        sizes.append(len(train) + len(held_out))
    assert sizes == [30, 20]


def test_molecules_to_exclude_that_cannot_be_read_are_told(corpus, small_table, tiny_checkpoint, tmp_path, caplog):
    (tmp_path / "test.txt").write_text("CCO\nC1CC\n")
    exclude = ("--exclude_file", tmp_path / "test.txt")
    with pytest.raises(InputError, match=r"1 of 2 SMILES in .*test.txt do not parse .* row 1: 'C1CC'"):
        load(corpus, tiny_checkpoint, tmp_path, *exclude)
    load(corpus, tiny_checkpoint, tmp_path, *exclude, "--invalid_smiles", "drop")
    assert "They exclude nothing" in caplog.text
    with pytest.raises(InputError, match="has 0 usable molecules"):
        load(corpus, tiny_checkpoint, tmp_path, "--exclude_file", corpus)
    with pytest.raises(InputError, match="absent.csv"):
        load(corpus, tiny_checkpoint, tmp_path, "--exclude_file", tmp_path / "absent.csv")
    with pytest.raises(InputError, match="has labels: .* Leave --exclude_file out"):
        load(small_table, tiny_checkpoint, tmp_path, *exclude)
    (tmp_path / "test.csv").write_text("drug,name\nCCO,ethanol\n")
    with pytest.raises(InputError, match=r"test.csv has no SMILES column; .* Call the one with the SMILES smiles\."):
        load(corpus, tiny_checkpoint, tmp_path, "--exclude_file", tmp_path / "test.csv")


@pytest.mark.parametrize(
    ("header", "flags", "told"),
    [("smiles,pIC50", (), True), ("smiles", (), False), ("smiles,pIC50", ("--label_column", "pIC50"), False)],
)
def test_a_table_that_is_read_as_a_corpus_is_told(header, flags, told, tiny_checkpoint, tmp_path, caplog):
    """Its label may be called as no label is, and its test molecules would be learned."""
    rows = [",".join(("C" * number, str(number))[: 1 + header.count(",")]) for number in range(1, 31)]
    (tmp_path / "corpus.csv").write_text("\n".join([header, *rows]) + "\n")
    load(tmp_path / "corpus.csv", tiny_checkpoint, tmp_path, *flags)
    assert ("is read as a corpus: later test molecules of it are learned too" in caplog.text) == told


def test_the_corpus_of_the_embedded_checkpoint_has_no_molecule_of_the_task():
    """Reference: molecules of data/lipophilicity.csv and the external ones, without stereo, alone or in a mixture."""
    folder = ROOT.parent / "shared" / "data"
    path = folder / "pretrain_smiles.txt.xz"
    if not path.exists():
        pytest.skip("the corpus does not come with the repository")
    smiles = pd.concat([pd.read_csv(file)["SMILES"] for file in (EMBEDDED_DATA, folder / "external_dataset.csv")])
    known = {utils_mlm.canonicalize(text, "canonical") for text in smiles}
    with lzma.open(path, "rt") as lines:
        found = [line for line in map(str.strip, lines) if not known.isdisjoint((line, *line.split(".")))]
    assert not found


@pytest.mark.slow
def test_the_card_says_how_many_molecules_of_the_task_the_corpus_has_with_another_charge():
    """Reference: RDKit's Uncharger on the largest part (`parent_of`) of all lines that have charges or parts."""
    path = ROOT.parent / "shared" / "data" / "pretrain_smiles.txt.xz"
    if not path.exists():
        pytest.skip("the corpus does not come with the repository")
    known = {utils_mlm.canonicalize(text, "canonical") for text in pd.read_csv(EMBEDDED_DATA)["SMILES"]}
    assert {parent_of(text) for text in known} == known
    with lzma.open(path, "rt") as lines:
        parents = {parent_of(line.strip()) for line in lines}
    card = " ".join((ROOT / "models" / "molformer-mini" / "README.md").read_text().split())
    assert f"{len(parents & known)} of the 4,200 Lipophilicity molecules are in the 2,000,000 lines" in card


@pytest.mark.parametrize("mark", [",", "\t", ";"])
def test_rows_of_a_corpus_that_quotes_join_are_told(mark, tiny_checkpoint, tmp_path):
    """They would be left out without a word."""
    rows = [mark.join(("C" * number, f"name {number}", "text")) for number in range(1, 31)]
    rows[3], rows[20] = (rows[number].replace("name", '"name') for number in (3, 20))
    file = tmp_path / f"corpus.{'tsv' if mark == chr(9) else 'csv'}"
    file.write_text("\n".join([mark.join(("SMILES", "id", "note")), *rows]) + "\n")
    with pytest.raises(InputError, match="Column 'id' of .* holds several rows in row 3: 'name 4.*Remove the quotes"):
        load(file, tiny_checkpoint, tmp_path)


def test_no_more_than_so_many_of_a_corpus_are_held_out(corpus, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(utils_mlm, "MOST_HELD_OUT", 5)
    parsed = parse("--train_file", corpus, "--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x",
        "--cache_dir", tmp_path / "cache")  # fmt: skip
    assert len(load_data(*parsed)[1]) == 5


def test_descriptors_do_not_depend_on_the_number_of_workers(tiny_checkpoint, small_table, tmp_path, monkeypatch):
    """Reference: one process. A corpus of a few thousand lines is shared by several."""
    found = []
    for count in (1, 2):
        monkeypatch.setattr(MlmArguments, "workers", lambda self, dataset, count=count: count)
        parsed = parse("--train_file", small_table, "--model_name_or_path", tiny_checkpoint, "--objective",
            "mtr+atoms", "--output_dir", tmp_path / "x", "--cache_dir", tmp_path / f"cache-{count}")  # fmt: skip
        found.append([part.to_dict() for part in load_data(*parsed)[:2]])
    assert found[0] == found[1] and len(found[0][0]["descriptors"]) > 100


def test_validation_file_of_a_corpus_is_held_out_whole(corpus, tiny_checkpoint, tmp_path):
    (tmp_path / "v.txt").write_text("CCO\nCCC\nCCCC\n")
    parsed = parse("--train_file", corpus, "--validation_file", tmp_path / "v.txt", "--model_name_or_path",
        tiny_checkpoint, "--output_dir", tmp_path / "x", "--cache_dir", tmp_path / "cache", "--max_train_samples", 7,
        "--max_eval_samples", 2)  # fmt: skip
    train, held_out, digest, *_ = load_data(*parsed)
    assert len(train) == 7 and digest is None
    assert [row["input_ids"] for row in held_out] == [build_tokenizer()(s)["input_ids"] for s in ("CCO", "CCC")]


def test_paper_protocol_holds_out_training_molecules_and_never_learns_test_molecules(
    tiny_checkpoint, small_table, tmp_path
):
    parsed = parse("--train_file", small_table, "--protocol", "paper", "--model_name_or_path", tiny_checkpoint,
        "--output_dir", tmp_path / "x")  # fmt: skip
    train, held_out, *_ = load_data(*parsed)
    assert (len(train), len(held_out)) == (115, 13)  # of the 128 on the training side; 32 are the test set


def test_hub_data_set_without_network_is_explained(tiny_checkpoint, tmp_path):
    parsed = parse("--dataset_name", "nobody/nothing", "--model_name_or_path", tiny_checkpoint, "--output_dir",
        tmp_path / "x", "--cache_dir", tmp_path / "cache")  # fmt: skip
    with pytest.raises(InputError, match="--train_file"):
        load_data(*parsed)


def test_values_that_are_not_finite_do_not_count_in_the_scale(caplog):
    import datasets

    rows = [[1.0, np.nan, np.inf], [3.0, np.nan, 2.0], [5.0, np.nan, 4.0]]
    mean, std = utils_mlm.measure_scale(datasets.Dataset.from_dict({"descriptors": rows}), "descriptors", 3)
    assert mean == pytest.approx([3, 0, 3]) and std == pytest.approx([np.std([1, 3, 5]), 0, 1])
    assert "4 of 9 values in descriptors are missing or infinite" in caplog.text


@pytest.mark.parametrize("form", ["canonical", "isomeric", "raw"])
def test_an_unparsable_line_is_found_in_every_form(form, tiny_checkpoint, tmp_path):
    """The tokenizer would take it."""
    (tmp_path / "c.txt").write_text("CCO\nC1CC\nCCC\n")
    parsed = parse("--train_file", tmp_path / "c.txt", "--model_name_or_path", tiny_checkpoint, "--smiles_form", form,
        "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "x")  # fmt: skip
    with pytest.raises(InputError, match="row 1: 'C1CC'"):
        load_data(*parsed)


def test_descriptor_scores_are_over_molecules_not_batches():
    """Reference: scikit-learn's R² of the columns that vary."""
    from sklearn.metrics import r2_score

    rng = np.random.default_rng(0)
    targets = rng.normal(size=(50, 4))
    targets[:, 3] = 1.0
    predictions = targets + rng.normal(size=(50, 4)) * 0.3
    metrics = utils_mlm.descriptor_metrics(predictions, targets)
    assert metrics["descriptor_mse"] == pytest.approx(((predictions - targets) ** 2).mean())
    values = r2_score(targets[:, :3], predictions[:, :3], multioutput="raw_values")
    assert metrics["descriptor_r2"] == pytest.approx(np.median(values))
    assert "descriptor_r2" not in utils_mlm.descriptor_metrics(targets[:, 3:], targets[:, 3:])


def test_random_smiles_are_learned_and_the_held_out_part_is_left_as_it_is(tiny_checkpoint, corpus, tmp_path):
    common = ("--train_file", corpus, "--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x",
        "--cache_dir", tmp_path / "cache", "--preprocessing_num_workers", 1)  # fmt: skip
    parsed = parse(*common, "--augment_smiles", 2, "--objective", "mtr+atoms")
    train, held_out, *_ = load_data(*parse(*common))
    augmented, same, *_ = load_data(*parsed)
    assert augmented["descriptors"][0] == augmented["descriptors"][2] != augmented["descriptors"][3]
    own, other = (sorted(augmented["environments"][row][1::2]) for row in (0, 1))
    assert own == other and augmented["environments"][0] != augmented["environments"][1]  # another order of the same
    assert len(augmented) == 3 * len(train) and augmented["input_ids"][::3] == train["input_ids"][:]
    assert same["input_ids"][:] == held_out["input_ids"][:]


def test_numbers_of_atoms_stand_at_the_tokens_of_their_atoms():
    """Reference: the atoms of the SMILES, one by one. [H] atoms that RDKit removes leave their molecule out."""
    tokenizer = build_tokenizer()
    texts = ["CC(=O)N", "[H]OC", "[NH4+].Cl"]
    rows = [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]]
    import datasets

    options = {"names": ["hydrogens", "crippen_log_p"], "buckets": [64, 64]}
    columns = {"atom_descriptors": "float32", "environments": "int32"}
    mlm_args = parse("--preprocessing_num_workers", 1)[2]
    examples = utils_mlm.add_columns(
        datasets.Dataset.from_list(rows), utils_mlm.describe_atoms, columns, tokenizer, mlm_args, **options
    ).to_list()
    collator = PretrainingCollator(tokenizer, None, 0, 1.0, ["hydrogens", "crippen_log_p"], [64, 64])
    placed = collator(examples)
    hydrogens = placed["atom_descriptors"][:, :, 0].tolist()
    # <bos> C C ( = O ) N <eos>
    assert hydrogens[0] == [-100, 3, 0, -100, -100, 0, -100, 2, -100]
    assert set(hydrogens[1]) == {-100} and hydrogens[2][:5] == [-100, 4, -100, 1, -100]
    assert ((placed["environments"] == -100) == (placed["atom_descriptors"] == -100)).all()
    assert placed["environments"].max() < 64


def test_atom_scores_are_sums_over_the_atoms_of_each_molecule():
    """Reference: plain loops."""
    config = MolformerConfig(hidden_size=8, num_attention_heads=2, atom_descriptor_names=["a", "b"],
        environment_buckets=[3, 4])  # fmt: skip
    head = MolformerAtomHead(config)
    generator = torch.Generator().manual_seed(0)
    environments = torch.full((3, 5, 2), -100)
    atoms = [(0, 1), (0, 3), (2, 0), (2, 1), (2, 4)]
    for row, token in atoms:
        environments[row, token] = torch.randint(0, 3, (2,), generator=generator)
    numbers = torch.randn(3, 5, 2, generator=generator)
    predicted, logits = torch.randn(5, 2, generator=generator), torch.randn(5, 7, generator=generator)
    expected = np.zeros((3, 4))
    for index, (row, token) in enumerate(atoms):
        right = [logits[index, :3].argmax() == environments[row, token, 0]]
        right += [logits[index, 3:].argmax() == environments[row, token, 1]]
        expected[row] += [1, float(((predicted[index] - numbers[row, token]) ** 2).mean()), *map(float, right)]
    scores = utils_mlm.score_atoms(head, predicted, logits, numbers, environments).numpy()
    assert scores == pytest.approx(expected, abs=1e-5)
    metrics = utils_mlm.atom_metrics(scores)
    assert metrics["environment_2_accuracy"] == pytest.approx(expected[:, 3].sum() / 5)
    assert metrics["atom_mse"] == pytest.approx(expected[:, 1].sum() / 5, rel=1e-5)
    assert utils_mlm.atom_metrics(np.zeros((2, 4))) == {}


def test_only_a_share_of_the_molecules_is_masked():
    tokenizer = build_tokenizer()
    examples = [{"input_ids": ids} for ids in tokenizer(["CC(=O)Nc1ccc(O)cc1" * 3] * 40)["input_ids"]]
    batch = PretrainingCollator(tokenizer, 0.15, 0, masked_share=0.25)(examples)
    assert ((batch["labels"] != -100).any(dim=1)).sum() == 10
    alone = PretrainingCollator(tokenizer, 0.15, 0, masked_share=0.25)(examples[:1])
    assert (alone["labels"] != -100).any()  # a batch is never without a masked molecule


def test_the_same_corpus_is_read_once_whoever_made_the_tokenizer(corpus, tiny_checkpoint, tmp_path):
    """The second run takes the files that the first one wrote, also with the tokenizer that a checkpoint carries."""
    from transformers import AutoTokenizer

    parsed = parse("--train_file", corpus, "--model_name_or_path", tiny_checkpoint, "--output_dir", tmp_path / "x",
        "--cache_dir", tmp_path / "cache", "--objective", "mtr+atoms")  # fmt: skip
    heads = utils_mlm.choose_heads(MolformerConfig(), parsed[2].parts)
    files = []
    for tokenizer in (build_tokenizer(), AutoTokenizer.from_pretrained(tiny_checkpoint)):
        train, *_ = utils_mlm.load_data(tokenizer, *parsed, heads)
        files.append(sorted((tmp_path / "cache").rglob("*.arrow")))
    assert files[0] == files[1] and train["descriptors"][0]


def test_dropped_rows_of_the_validation_file_are_listed_too(tiny_checkpoint, tmp_path):
    (tmp_path / "c.txt").write_text("CCO\nC1CC\nCCC\n")
    (tmp_path / "v.txt").write_text("CCN\nCCCC\nc1cc\n")
    parsed = parse("--train_file", tmp_path / "c.txt", "--validation_file", tmp_path / "v.txt", "--invalid_smiles",
        "drop", "--model_name_or_path", tiny_checkpoint, "--cache_dir", tmp_path / "cache", "--output_dir",
        tmp_path / "x")  # fmt: skip
    *_, dropped = load_data(*parsed)
    assert dropped["smiles"].tolist() == ["C1CC", "c1cc"] and dropped["source"].nunique() == 2


def test_random_heads_are_removed_where_nobody_trains_them_and_not_evaluated():
    config = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    heads = {"descriptor_names": ["MolLogP"], "atom_descriptor_names": ["hydrogens"], "environment_buckets": [4, 4]}
    model = MolformerForMaskedLM(MolformerConfig(**config, **heads))
    utils_mlm.check_heads(model, ["mlm"], will_train=True)
    assert not hasattr(model, "descriptor_head") and not hasattr(model, "atom_head")
    assert model.config.descriptor_names is None and model.config.environment_buckets is None
    model(torch.tensor([[0, 5, 1]]))
    with pytest.raises(InputError, match="no trained head for mlm and mtr"):
        utils_mlm.check_heads(MolformerForMaskedLM(MolformerConfig(**config, **heads)), ["mlm", "mtr"], False)


def test_a_head_for_tokens_that_is_random_does_not_ship(tmp_path):
    """A model that has learned descriptors alone is not evaluated as one of tokens later."""
    config = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    for tied in (True, False):
        model = MolformerForMaskedLM(MolformerConfig(**config, descriptor_names=["MolLogP"], tie_word_embeddings=tied))
        utils_mlm.check_heads(model, ["mtr"], will_train=True)
        model.save_pretrained(tmp_path)
        again, info = MolformerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
        assert again.new_heads == ("lm_head.",) and not info["unexpected_keys"]
        pairs = zip(model.molformer.parameters(), again.molformer.parameters(), strict=True)
        assert all(torch.equal(before, after) for before, after in pairs)
        with pytest.raises(InputError, match="no trained head for mlm"):
            utils_mlm.check_heads(again, ["mlm"], will_train=False)
        utils_mlm.check_heads(again, ["mlm"], will_train=True)  # it is trained then, and saved
        again.save_pretrained(tmp_path)
        assert MolformerForMaskedLM.from_pretrained(tmp_path).new_heads == ()


@pytest.mark.parametrize(("field", "part"), [("descriptor_names", "mtr"), ("atom_descriptor_names", "atoms")])
def test_descriptors_that_cannot_be_computed_are_named_before_any_corpus_is_read(field, part):
    names = {"atom_descriptor_names": ["hydrogens"], "environment_buckets": [4, 4]} | {field: ["no_such_number"]}
    with pytest.raises(InputError, match="no_such_number"):
        utils_mlm.choose_heads(MolformerConfig(**names), [part])
