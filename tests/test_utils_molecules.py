"""Molecules: reading and checking them, splits that do not leak, metrics, baselines, files and plots.

    python -m pytest tests/test_utils_molecules.py

References: RDKit called here on its own, closed forms in NumPy, the embedded data set and, where it lies beside the
repository, ../shared/data.
"""

import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rdkit import Chem
from rdkit.Chem.Scaffolds import MurckoScaffold
from transformers import PreTrainedTokenizerFast

from arguments import (
    EMBEDDED_DATA,
    EMBEDDED_VOCABULARY,
    DataTrainingArguments,
    InputError,
    ModelArguments,
    TrainingArguments,
)
from utils_checkpoints import build_tokenizer
from utils_molecules import (
    ATOM_DESCRIPTORS,
    SPLITS,
    assign_splits,
    atom_environments,
    baseline_predictions,
    canonicalize,
    choose_descriptors,
    compute_atom_descriptors,
    compute_descriptors,
    default_descriptors,
    describe_unusable,
    encode_smiles,
    label_columns,
    label_metrics,
    label_names,
    labels_of,
    load_molecules,
    morgan_counts,
    parent_of,
    parse_smiles,
    prepare_molecules,
    random_smiles,
    read_header,
    read_header_lines,
    read_hub_dataset,
    read_table,
    regression_metrics,
    scaffold_of,
    split_groups,
    split_hash,
    to_text,
    warn_of_few,
    write_csv,
)
from utils_predict import open_table
from utils_report import draw_worst_molecules, plot_residuals
from utils_runs import write_json, write_text


ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
RING_123 = "C%(123)CC%(123)"  # with a number that RDKit takes and MoLFormer's pattern of tokens does not
TABLE = "SMILES,label\nCCO,1.5\nc1ccccc1,-2\n"
seeded = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def embedded():
    """The embedded data set as it is read."""
    return read_table(EMBEDDED_DATA)


@pytest.fixture(scope="module")
def prepared(embedded, tokenizer):
    """The embedded data set, checked and encoded with the default arguments."""
    return prepare_molecules(embedded, tokenizer, DataTrainingArguments(), EMBEDDED_DATA)[0]


def write(folder, content, name="molecules.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table_of(smiles, labels=None):
    """The form that `read_table` returns."""
    labels = np.arange(len(smiles), dtype=float) if labels is None else labels
    return pd.DataFrame({"row": np.arange(len(smiles)), "smiles": smiles, "label": labels})


def alcohols(count):
    """Molecules that are all different and have no ring."""
    return ["C" * carbons + "O" for carbons in range(1, count + 1)]


# ----------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "content",
    [
        TABLE,
        TABLE.replace(",", "\t"),
        TABLE.replace(",", ";"),
        TABLE.replace("\n", "\r\n"),
        b"\xef\xbb\xbf" + TABLE.encode(),
        b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode(),
        '"SMILES","label"\n"CCO","1.5"\n" c1ccccc1 "," -2 "\n',
        "id,sMiLeS,EXP,note\na,CCO,1.5,x\nb,c1ccccc1,-2,\n",
        TABLE.rstrip("\n"),
    ],
    ids=["comma", "tab", "semicolon", "crlf", "bom", "bom and crlf", "quoted", "more columns", "no last line end"],
)
def test_every_form_of_a_table_reads_the_same(tmp_path, content):
    molecules = read_table(write(tmp_path, content))
    assert molecules.to_dict("list") == {"row": [0, 1], "smiles": ["CCO", "c1ccccc1"], "label": [1.5, -2.0]}


@pytest.mark.parametrize("suffix, compress", [(".gz", gzip.compress), (".xz", lzma.compress)])
@pytest.mark.parametrize("separator", [",", "\t"])
def test_compressed_tables_read_like_plain_ones(tmp_path, suffix, compress, separator):
    content = TABLE.replace(",", separator).encode()
    expected = read_table(write(tmp_path, content))
    pd.testing.assert_frame_equal(read_table(write(tmp_path, compress(content), f"t.csv{suffix}")), expected)


@seeded
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=64), min_size=1, max_size=20))
def test_labels_are_read_as_the_floats_that_were_written(tmp_path_factory, labels):
    path = tmp_path_factory.mktemp("labels") / "t.csv"
    path.write_text("SMILES,label\n" + "".join(f"C,{label!r}\n" for label in labels))
    np.testing.assert_allclose(read_table(path)["label"], labels, rtol=1e-15)


@pytest.mark.parametrize("name", ["smiles", "SMILES", "Smiles", "canonical_smiles", "Mol", " smiles "])
def test_a_smiles_column_is_found_in_any_case(tmp_path, name):
    assert read_table(write(tmp_path, f"{name},label\nCCO,1\n"))["smiles"].tolist() == ["CCO"]


@pytest.mark.parametrize("name", ["label", "Label", "exp", "EXP", "y", "Y", "target", "logD"])
def test_a_label_column_is_found_in_any_case(tmp_path, name):
    assert read_table(write(tmp_path, f"smiles,{name}\nCCO,1\n"))["label"].tolist() == [1.0]


def test_named_columns_are_taken_before_the_usual_ones(tmp_path):
    path = write(tmp_path, "smiles,label,drawn,measured\nCCO,1,CCN,2\n")
    molecules = read_table(path, smiles_column="drawn", label_column=["measured"])
    assert (molecules["smiles"][0], molecules["label"][0]) == ("CCN", 2.0)


def test_several_labels_may_lack_some(tmp_path):
    path = write(tmp_path, "smiles,logD,logS\nCCO,1,-2\nCCN,,n/a\nCCC,3,\n")
    molecules = read_table(path, label_column=["logS", "logD"])
    assert label_columns(molecules) == ["label:logS", "label:logD"] and label_names(molecules) == ["logS", "logD"]
    np.testing.assert_array_equal(labels_of(molecules), [[-2, 1], [np.nan, np.nan], [np.nan, 3]])
    with pytest.raises(InputError, match="row 1: ''"):  # one label alone may lack none
        read_table(path, label_column=["logD"])
    with pytest.raises(InputError, match="'logD' twice"):
        read_table(path, label_column=["logD", "logD"])
    path = write(tmp_path, "smiles,logD,logS\nCCO,1,insoluble\n")
    with pytest.raises(InputError, match="'logS'.*row 0: 'insoluble'"):
        read_table(path, label_column=["logD", "logS"])


def test_metrics_of_several_labels_leave_missing_ones_out():
    """Reference: `regression_metrics` of each label's known values."""
    rng = np.random.default_rng(0)
    labels, predictions = rng.normal(size=(2, 20, 2))
    labels[::3, 1] = np.nan
    values = label_metrics(predictions, labels, ["a", "b"])
    known = np.isfinite(labels[:, 1])
    for name, expected in (
        ("a", regression_metrics(predictions[:, 0], labels[:, 0])),
        ("b", regression_metrics(predictions[known, 1], labels[known, 1])),
    ):
        assert {f"{key}_{name}": value for key, value in expected.items()}.items() <= values.items()
    assert values["r2"] == pytest.approx((values["r2_a"] + values["r2_b"]) / 2)
    assert label_metrics(predictions[:, :1], labels[:, :1], []) == regression_metrics(predictions[:, 0], labels[:, 0])


@pytest.mark.parametrize("argument, flag", [("smiles_column", "--smiles_column"), ("label_column", "--label_column")])
def test_a_named_column_that_is_missing_is_refused_with_those_that_are_there(tmp_path, argument, flag):
    path = write(tmp_path, TABLE)
    with pytest.raises(InputError) as error:
        read_table(path, **{argument: "logP" if argument == "smiles_column" else ["logP"]})
    for part in ("'logP'", str(path), "SMILES, label", flag):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "header, flag", [("name,label", "--smiles_column"), ("smiles,name", "--label_column")], ids=["SMILES", "label"]
)
def test_a_table_without_a_needed_column_is_refused_with_those_that_are_there(tmp_path, header, flag):
    with pytest.raises(InputError) as error:
        read_table(write(tmp_path, f"{header}\nC,1\n"))
    assert header.replace(",", ", ") in str(error.value) and flag in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path, content):
    with pytest.raises(InputError, match="is empty.*header and at least one row"):
        read_table(write(tmp_path, content))


def test_a_header_without_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match="header and no rows"):
        read_table(write(tmp_path, "SMILES,label\n"))


@pytest.mark.parametrize("where", [lambda folder: folder / "absent.csv", lambda folder: folder])
def test_an_absent_file_is_refused(tmp_path, where):
    with pytest.raises(InputError, match="The file .* (is not there|is a folder). Correct its path"):
        read_table(where(tmp_path))


@pytest.mark.parametrize("rows_before", [0, 100_000], ids=["near the start", "after the first buffer"])
def test_a_file_that_is_not_utf_8_is_refused_with_byte_position_and_advice(tmp_path, rows_before):
    content = b"SMILES,label,note\n" + b"CC,1,a\n" * rows_before + "CC,1,café\n".encode("latin1")
    with pytest.raises(InputError, match="not UTF-8.*iconv") as error:
        read_table(write(tmp_path, content))
    assert f"byte 0xe9 at position {content.index(0xE9)}." in str(error.value)


@pytest.mark.parametrize("value", ["abc", "nan", "NaN", "inf", "-inf", "1e400", "", "1,5", "None", "True"])
def test_labels_that_are_no_finite_numbers_are_refused_with_count_row_and_value(tmp_path, value):
    content = f"smiles;label\nCCO;1\nCC;2\nCCC;{value}\nCCN;3\nCCF;{value}\n"
    with pytest.raises(InputError) as error:
        read_table(write(tmp_path, content))
    assert "2 of 5 labels in column 'label'" in str(error.value)
    assert f"first at row 2: {value!r}" in str(error.value)


@pytest.mark.parametrize(
    "rows",
    ["CCO,1,2\nCCC,2,3\n", "CCO,CCC,2.0\nCCC,CCN,3\n", "CCO,1\nCCC,2,3\n", "CCO,1\nCCC\n", "CCO\nCCC\n"],
    ids=["one field more in all", "one more, would shift", "one more in one", "one less in one", "one less in all"],
)
def test_ragged_rows_are_refused(tmp_path, rows):
    """A field too much in every row is pandas' sign of an index: columns would shift, without a word."""
    with pytest.raises(InputError):
        read_table(write(tmp_path, f"SMILES,label\n{rows}"))


def zipped(count):
    """An archive of as many tables."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            for number in range(count):
                archive.writestr(f"{number}.csv", TABLE)
        return file.getvalue()


def test_an_open_quote_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read as a table"):
        read_table(write(tmp_path, 'SMILES,label\n"CCO,1\nCC,2\n'))


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.csv.gz", TABLE.encode()),
        ("t.csv.xz", TABLE.encode()),
        ("t.csv.gz", gzip.compress(TABLE.encode())[:-12]),
        ("t.csv.xz", lzma.compress(TABLE.encode() * 1000)[:90]),
        ("t.csv.gz", gzip.compress(TABLE.encode())[:12]),
        ("t.csv.zip", zipped(2)),
        ("t.csv.zip", TABLE.encode()),
        ("t.tar.gz", gzip.compress(TABLE.encode())),
        ("t.csv", b"SMILES," + b"x" * 200_000 + b"\nCC,1\n"),
    ],
    ids=[
        "gz in name only", "xz in name only", "cut gz", "cut xz", "gz cut in its header", "zip of two files",
        "zip in name only", "no tar", "a name too long",
    ],
)  # fmt: skip
def test_a_broken_archive_is_refused(tmp_path, name, content):
    path = write(tmp_path, content, name)
    for read in (read_table, lambda path: open_table(str(path), DataTrainingArguments())):
        with pytest.raises(InputError) as error:
            list(read(path)[0])
        assert str(path) in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin1"])
def test_a_table_of_another_encoding_is_refused_with_advice(tmp_path, encoding):
    path = write(tmp_path, "SMILES,label,note\nCC,1,café\n".encode(encoding))
    for read in (read_table, lambda path: open_table(str(path), DataTrainingArguments())):
        with pytest.raises(InputError, match="is not UTF-8: byte 0x.. at position .*iconv"):
            list(read(path)[0])


def test_the_header_gives_columns_and_separator(tmp_path):
    assert read_header(write(tmp_path, "a;b,c;d\n1;2;3\n")) == (["a", "b,c", "d"], ";")
    named = ["SMILES", "logD (octanol, water)"]
    for mark in "\t;":
        assert read_header(write(tmp_path, mark.join(named) + f"\nCCO{mark}1\n")) == (named, mark)
    assert read_header(write(tmp_path, "my text\tlogD (octanol, water)\nCCO\t1\n"))[1] == "\t"
    broken = read_table(write(tmp_path, 'SMILES,"logD\n(7.4)",z\nCCO,1.5,2\n'), label_column=["logD\n(7.4)"])
    assert broken["label"].tolist() == [1.5]


def test_a_column_that_is_read_and_stands_twice_is_refused(tmp_path):
    with pytest.raises(InputError, match="more than one column 'label'. Rename all but one"):
        read_table(write(tmp_path, "smiles,label,label\nCCO,1,2\n"))
    assert read_table(write(tmp_path, "smiles,label,x,x\nCCO,1,2,3\n"))["label"].tolist() == [1.0]


def test_other_splits_of_a_hub_data_set_are_named_as_not_read(tmp_path, caplog):
    (tmp_path / "set").mkdir()
    for name, label in (("train", 1.5), ("test", 2.5)):
        (tmp_path / "set" / f"{name}.csv").write_text(f"smiles,label\nCCO,{label}\n")
    with caplog.at_level("WARNING", "molformer.molecules"):
        molecules = read_hub_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert molecules["label"].tolist() == [1.5]
    assert "the split train alone is read, and split here; not read: test." in caplog.text


OFFLINE = """
import json, sys, time

touched = []
sys.addaudithook(lambda event, args: touched.append(str(args)) if event.startswith("socket.connect") else None)

from arguments import InputError
from utils_molecules import read_hub_dataset, regression_metrics
import datasets, evaluate

start = time.perf_counter()
try:
    read_hub_dataset("scikit-fingerprints/MoleculeNet_Lipophilicity")
except InputError as error:
    message = str(error)
seconds = time.perf_counter() - start
metrics = regression_metrics([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
print(json.dumps({"message": message, "seconds": seconds, "metrics": metrics, "touched": touched}))
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """What a process without a network and with an empty cache gets; an audit hook records every connection."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    finished = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_a_hub_data_set_without_a_network_is_refused_at_once_with_the_way_out(offline):
    assert "scikit-fingerprints/MoleculeNet_Lipophilicity" in offline["message"]
    assert "--train_file" in offline["message"]
    assert offline["seconds"] < 10


def test_metrics_need_no_folder_that_can_be_written(tmp_path, monkeypatch):
    """As on a machine whose home is read-only; here a file stands where the library would make its folder."""
    import evaluate

    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "file" / "metrics")
    assert regression_metrics(np.array([1.0, 2.0]), np.array([1.0, 3.0]))["mse"] == 0.5


def test_metrics_need_no_network(offline):
    assert offline["metrics"]["mse"] == pytest.approx(1 / 3)
    assert offline["touched"] == []


# ---------------------------------------------------------------------------------------------------------- checking


@pytest.mark.parametrize(
    "smiles, canonical, isomeric",
    [
        ("OCC", "CCO", "CCO"),
        ("N[C@@H](C)C(=O)O", "CC(N)C(=O)O", "C[C@H](N)C(=O)O"),
        ("[13CH4]", "C", "[13CH4]"),
        ("C1=CC=CC=C1", "c1ccccc1", "c1ccccc1"),
    ],
)
def test_each_form_of_a_smiles_is_as_rdkit_writes_it(smiles, canonical, isomeric):
    assert canonicalize(smiles, "canonical") == canonical
    assert canonicalize(smiles, "isomeric") == isomeric
    assert canonicalize(smiles, "raw") == smiles


@pytest.mark.parametrize("form", ["canonical", "isomeric", "raw"])
@pytest.mark.parametrize(
    "smiles", ["", "C1CC", "CXC", "[Zz]", "c1cccc1", "C(C)(C)(C)(C)C", "no molecule", "CC O", "CCCC\nCCO", "CC\tx"]
)
def test_what_is_no_molecule_has_no_form_and_prints_nothing(capfd, smiles, form):
    assert canonicalize(smiles, form) is None
    assert capfd.readouterr() == ("", "")


def test_extensions_of_cxsmiles_may_follow():
    assert canonicalize("OCC |$a;;b$|", "canonical") == "CCO"


@pytest.mark.parametrize("form", ["canonical", "isomeric"])
@seeded
@given(row=st.integers(0, 4199))
def test_canonicalize_is_idempotent(embedded, form, row):
    once = canonicalize(embedded["smiles"][row], form)
    assert canonicalize(once, form) == once


@seeded
@given(row=st.integers(0, 4199), seed=st.integers(0, 2**31 - 1))
def test_canonicalize_does_not_depend_on_the_order_of_atoms(embedded, row, seed):
    """Reference: RDKit's random SMILES of the same molecule, stereo aside."""
    molecule = Chem.MolFromSmiles(canonicalize(embedded["smiles"][row], "canonical"))
    order = np.random.default_rng(seed).permutation(molecule.GetNumAtoms()).tolist()
    shuffled = Chem.MolToSmiles(Chem.RenumberAtoms(molecule, order), canonical=False)
    assert canonicalize(shuffled, "canonical") == canonicalize(embedded["smiles"][row], "canonical")


@pytest.mark.parametrize("form, texts", [("canonical", 1), ("isomeric", 2), ("raw", 2)])
def test_stereo_twins_have_one_group_in_every_form(tokenizer, form, texts):
    twins = table_of(["C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O"])
    molecules, _ = prepare_molecules(twins, tokenizer, DataTrainingArguments(smiles_form=form), "twins")
    assert molecules["group"].nunique() == 1
    assert molecules["text"].nunique() == texts


@pytest.mark.parametrize("form", ["canonical", "isomeric", "raw"])
def test_a_deuterated_molecule_is_a_twin_of_the_plain_one(tokenizer, form):
    """Without isotopes RDKit writes deuterium as [H]: canonical, it is a hydrogen like others."""
    twins = table_of(["[2H]C([2H])([2H])Oc1ccccc1", "COc1ccccc1"])
    molecules, _ = prepare_molecules(twins, tokenizer, DataTrainingArguments(smiles_form=form), "twins")
    assert molecules["group"].tolist() == ["COc1ccccc1"] * 2
    assert molecules["text"].nunique() == (1 if form == "canonical" else 2)


@pytest.mark.parametrize(
    ("smiles", "text"),
    [
        ("[2H]C([2H])([2H])OC", "COC"),
        ("[H]/N=C(/N)C", "CC(=N)N"),
        ("[H][H]", "[H][H]"),
        ("[2H]C*", "*C"),
        ("[H+]", "[H+]"),
    ],
)
def test_hydrogens_are_written_alike_whatever_isotope_or_bond_they_had(smiles, text):
    assert canonicalize(smiles, "canonical") == text


@pytest.mark.parametrize("smiles", ["[#6]-[#8]-[#7]", "[13#6]C", "CC |m:0:1|", "CCO |^1:0,LN:1:1.3|"])
def test_what_stands_for_many_molecules_is_none(smiles):
    assert canonicalize(smiles, "canonical") is None


def test_a_quote_within_a_column_name_opens_nothing():
    for lines in ('SMILES,size (")\nCC,1\n', 'SMILES,"a ""b"""\nCC,1\n'):
        assert read_header_lines(io.StringIO(lines)) == lines.splitlines()[0]
    assert read_header_lines(io.StringIO('SMILES,"a\nb"\nCC,1\n')) == 'SMILES,"a\nb"'


@pytest.mark.parametrize("mark", ["\t", ",", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("order", [("SMILES", "name", "y"), ("name", "y", "SMILES"), ("SMILES", "y", "name")])
def test_quotes_that_join_rows_are_told(tmp_path, mark, end, order):
    """One label would be that of another molecule."""
    rows = [("CC", "a", "0"), ("CCO", '"alpha', "1"), ("CCC", "b", "2"), ("CCN", '"beta', "3"), ("CCF", "d", "4")]
    places = [("SMILES", "name", "y").index(name) for name in order]
    lines = [mark.join(order), *(mark.join(row[place] for place in places) for row in rows)]
    (tmp_path / "t.csv").write_text(end.join(lines) + end, newline="")
    with pytest.raises(InputError, match="Column 'name' of .* holds several rows in row 1: .*Remove the quotes"):
        read_table(tmp_path / "t.csv", label_column=["y"])


def test_a_cell_may_have_several_lines(tmp_path):
    text = 'SMILES,name,y\nCCO,"two\nlines, yes",1\nCCC,"one, and\nmore, or\r\nless",2\n'
    (tmp_path / "t.csv").write_text(text, newline="")
    assert read_table(tmp_path / "t.csv", label_column=["y"])["label"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        (
            "a.smi",
            "CCO 1.2\nCCC 1\n",
            "taken for a list of SMILES without a header, since its first line is 'CCO 1.2'",
        ),
        ("a.txt", "CCO 1.2\nCCC 1\n", "Labels are needed here: give a table with a header, such as SMILES,label"),
        ("a.csv", "smiles,target,logD\nCCO,CHEMBL1,1\nCCC,CHEMBL2,2\n", "another column has the labels, name it .--l"),
        ("a.csv", "smiles,y,,\nCCO,1,,\n", None),
    ],
)
def test_labels_that_are_elsewhere_are_asked_for(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    if told is None:
        assert len(read_table(tmp_path / name)) == 1
        return
    with pytest.raises(InputError, match=told):
        read_table(tmp_path / name)


def test_spaces_around_a_columns_name_do_not_count(tmp_path):
    (tmp_path / "a.csv").write_text("smiles, my label ,label\nCC,1,2\n")
    assert read_table(tmp_path / "a.csv", label_column=["my label"])["label"].tolist() == [1]
    assert read_table(tmp_path / "a.csv", label_column=[" my label "])["label"].tolist() == [1]


def test_carriage_returns_do_not_end_rows(tmp_path):
    write_csv(pd.DataFrame({"a": ["x\ry", "z"], "b": [1, 2]}), tmp_path / "a.csv")
    assert pd.read_csv(tmp_path / "a.csv")["a"].tolist() == ["x\ny", "z"]


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file"):
        read_header(tmp_path / "pipe")


UNREADABLE_AGAIN = "Cb1=C(OCc2ccc(F)cc2)C(=O)C=CO1"  # RDKit reads it, and not what it writes of it


def test_a_molecule_that_rdkit_cannot_read_back_stops_nothing(tokenizer, tmp_path):
    texts = [UNREADABLE_AGAIN, *alcohols(19)]
    molecules, _ = prepare_molecules(table_of(texts), tokenizer, DataTrainingArguments(), "t")
    group = molecules["group"][0]
    if parse_smiles(group) is not None:
        pytest.skip("this RDKit reads what it writes of this molecule")
    assert scaffold_of(group) == group
    assert not morgan_counts([group]).any() and morgan_counts(["CCO"]).any()
    plots = {"y": molecules.assign(prediction=molecules["label"] + 1)}
    plot_residuals(plots, tmp_path / "residuals.png")
    draw_worst_molecules(plots, tmp_path / "worst_molecules.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "text, problem",
    [
        ("CXC", "lost"),
        ("CC ethane", "lost"),
        (RING_123, "lost"),
        ("[Zz]", "unknown"),
        ("C[U+6]C", "unknown"),
        ("CX[Zz]", "lost"),
        ("CC", None),
        ("C[C@@H](N)C(=O)O", None),
        ("F/C=C\\Br.[Na+].[2H]*", None),
        ("", None),
    ],
)
def test_encoding_tells_lost_characters_and_unknown_tokens(tokenizer, text, problem):
    """`CXC` gets the ids of `CC`, and `[Zz]` that of `<unk>`: nothing else would tell."""
    ids, problems = encode_smiles(["CCO", text], tokenizer)
    assert problems == [None, problem]
    assert ids[1] == tokenizer(text)["input_ids"]


def test_raw_smiles_that_the_tokenizer_would_lose_are_refused(tokenizer):
    """RDKit takes numbers of rings and elements that the vocabulary lacks: raw text passes both on."""
    arguments = DataTrainingArguments(smiles_form="raw")
    with pytest.raises(InputError, match=r"1 of 2 SMILES in t .*would drop, first at row 1: 'C%\(123\)CC%\(123\)'"):
        prepare_molecules(table_of(["CCO", RING_123]), tokenizer, arguments, "t")
    with pytest.raises(InputError, match=r"1 of 2 SMILES in t .*does not know, first at row 0: '\[U\+6\]'"):
        prepare_molecules(table_of(["[U+6]", "CCO"]), tokenizer, arguments, "t")


UNUSABLE = ["CCO", "C1CC", RING_123, "[U+6]", "C" * 20, "", "CXC", "[Zz]", "CCN"]
RAW_SHORT = {"smiles_form": "raw", "max_length": 20}


def test_unusable_molecules_stop_the_run_with_count_and_first_rows_of_each_reason(tokenizer):
    with pytest.raises(InputError) as error:
        prepare_molecules(table_of(UNUSABLE), tokenizer, DataTrainingArguments(**RAW_SHORT), "t.csv")
    assert str(error.value) == (
        "4 of 9 SMILES in t.csv do not parse as SMILES, first at row 1: 'C1CC', row 5: '', row 6: 'CXC'. "
        "1 of 9 SMILES in t.csv have characters that the tokenizer would drop, first at row 2: 'C%(123)CC%(123)'. "
        "1 of 9 SMILES in t.csv have atoms or bonds that the tokenizer does not know, first at row 3: '[U+6]'. "
        f"1 of 9 SMILES in t.csv have more tokens than --max_length, first at row 4: '{'C' * 20}'. "
        "A higher --max_length may take them. Correct them, or pass --invalid_smiles drop to go on without them."
    )


def test_drop_goes_on_and_lists_row_smiles_and_reason(tokenizer, caplog):
    arguments = DataTrainingArguments(**RAW_SHORT, invalid_smiles="drop")
    molecules, dropped = prepare_molecules(table_of(UNUSABLE), tokenizer, arguments, "t.csv")
    assert molecules["row"].tolist() == [0, 8]
    assert molecules.index.tolist() == [0, 1]
    assert "reason" not in molecules
    assert list(dropped) == ["source", "row", "smiles", "reason"]
    assert set(dropped["source"]) == {"t.csv"}
    assert dropped["row"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert dropped["smiles"].tolist() == UNUSABLE[1:8]
    assert dropped["reason"].iloc[0] == "do not parse as SMILES"
    assert "4 of 9 SMILES in t.csv do not parse" in caplog.text
    assert "in the output folder lists them" in caplog.text


def test_dropping_everything_is_an_error(tokenizer):
    with pytest.raises(InputError, match="No molecule of t can be used"):
        prepare_molecules(table_of(["C1CC"]), tokenizer, DataTrainingArguments(invalid_smiles="drop"), "t")


@pytest.mark.parametrize("mode", ["error", "drop"])
def test_max_length_refuses_and_never_cuts(tokenizer, mode):
    molecules = table_of(["C" * 10, "C" * 11])
    fits = DataTrainingArguments(max_length=13, invalid_smiles=mode)
    assert prepare_molecules(molecules, tokenizer, fits, "t")[0]["length"].tolist() == [12, 13]
    short = DataTrainingArguments(max_length=12, invalid_smiles=mode)
    if mode == "error":
        with pytest.raises(InputError, match="1 of 2 SMILES in t have more tokens than --max_length"):
            prepare_molecules(molecules, tokenizer, short, "t")
    else:
        kept, _ = prepare_molecules(molecules, tokenizer, short, "t")
        assert kept["input_ids"].tolist() == [tokenizer("C" * 10)["input_ids"]]


def test_all_embedded_molecules_pass_whole(prepared, tokenizer):
    """Reference: the tokens put together again are the text, so that nothing was lost or cut."""
    assert len(prepared) == 4200
    assert prepared["row"].tolist() == list(range(4200))
    assert prepared["length"].max() <= 256
    for text, ids in zip(prepared["text"], prepared["input_ids"], strict=True):
        assert "".join(tokenizer.convert_ids_to_tokens(ids)[1:-1]) == text


def test_all_embedded_molecules_pass_as_given(embedded, tokenizer):
    arguments = DataTrainingArguments(smiles_form="raw")
    molecules, _ = prepare_molecules(embedded, tokenizer, arguments, EMBEDDED_DATA)
    assert molecules["text"].tolist() == embedded["smiles"].tolist()
    assert molecules["length"].max() == 207  # shared/DESIGN.md, section 2


def test_preparing_leaves_its_input_alone(tokenizer):
    molecules = table_of(["OCC", "CCN"])
    before = molecules.copy()
    prepare_molecules(molecules, tokenizer, DataTrainingArguments(), "t")
    pd.testing.assert_frame_equal(molecules, before)


def test_conflicting_labels_are_told_with_counts(tokenizer, caplog):
    molecules = table_of(["CCO", "OCC", "C(C)O", "CCN", "NCC", "C", "CC"], [1, 2.5, 1, 0, 0.25, 7, 7])
    prepare_molecules(molecules, tokenizer, DataTrainingArguments(), "t.csv")
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "t.csv: molecules that stand in several rows with different labels: 2, in 5 rows" in record.getMessage()
    assert "1.50" in record.getMessage()


def test_repeated_molecules_with_one_label_are_no_conflict(tokenizer, caplog):
    prepare_molecules(table_of(["CCO", "OCC", "C"], [1, 1, 2]), tokenizer, DataTrainingArguments(), "t")
    assert not caplog.records


def test_stereo_twins_conflict_only_where_the_model_cannot_tell_them_apart(tokenizer, caplog):
    twins = table_of(["C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O"], [1, 2])
    prepare_molecules(twins, tokenizer, DataTrainingArguments(smiles_form="isomeric"), "t")
    assert not caplog.records
    prepare_molecules(twins, tokenizer, DataTrainingArguments(), "t")
    assert "different labels: 1, in 2 rows" in caplog.text


def test_the_description_of_unusable_molecules_is_empty_where_there_are_none():
    assert describe_unusable([None], [0], ["C"], 1, "t") == ""


# ------------------------------------------------------------------------------------------------------------ splits


def test_held_out_rows_are_as_many_as_wanted():
    for wanted in (0, 1, 20, 100):
        assert split_groups(np.arange(100), wanted, seed=0).sum() == wanted


@seeded
@given(
    groups=st.lists(st.integers(0, 12), min_size=1, max_size=60),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_group_is_on_two_sides_and_no_more_is_held_out_than_wanted(groups, fraction, seed):
    wanted = round(len(groups) * fraction)
    held_out = split_groups(groups, wanted, seed)
    assert held_out.sum() <= wanted
    groups = np.array(groups)
    assert not set(groups[held_out]) & set(groups[~held_out])


@seeded
@given(groups=st.lists(st.integers(0, 12), min_size=1, max_size=60), order=st.randoms(use_true_random=False))
def test_the_split_of_a_group_does_not_depend_on_the_order_of_rows(groups, order):
    shuffled = list(groups)
    order.shuffle(shuffled)
    wanted = round(len(groups) * 0.3)
    sides = [set(np.array(rows)[split_groups(rows, wanted, 0)]) for rows in (groups, shuffled)]
    assert sides[0] == sides[1]


def test_the_seed_alone_decides_the_split():
    groups = np.repeat(np.arange(50), 2)
    splits = [split_groups(groups, 20, seed) for seed in (0, 0, 1)]
    assert (splits[0] == splits[1]).all()
    assert (splits[0] != splits[2]).any()


def test_the_split_leaves_the_global_random_state_alone():
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    split_groups(np.arange(10), 3, seed=5)
    assert np.random.random() == expected


def test_large_groups_stay_in_training():
    """As in chemprop's balanced scaffold split: more than half of the held-out rows is too large."""
    groups = np.array([0] * 11 + [1] * 10 + list(range(2, 81)))
    held_out = [split_groups(groups, 20, seed) for seed in range(20)]
    assert not any(split[groups == 0].any() for split in held_out)
    assert any(split[groups == 1].any() for split in held_out)


@pytest.mark.parametrize("seed", range(3))
def test_the_random_split_of_the_real_data_has_the_sizes_of_the_readme_and_no_leak(prepared, seed):
    split = assign_splits(prepared, DataTrainingArguments(), seed)
    assert {name: int((split == name).sum()) for name in SPLITS} == {"train": 3024, "validation": 336, "test": 840}
    assert prepared.groupby("group")["row"].size().max() > 1  # there are twins to separate
    assert (pd.Series(split).groupby(prepared["group"].to_numpy()).nunique() == 1).all()


def test_every_seed_gives_another_split_and_the_same_seed_the_same(prepared):
    first, again, other = (assign_splits(prepared, DataTrainingArguments(), seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_no_scaffold_is_on_two_sides_of_a_scaffold_split(prepared):
    """Reference: RDKit's Bemis-Murcko scaffold of the molecule as given, stereo removed from the scaffold."""
    split = assign_splits(prepared, DataTrainingArguments(split="scaffold"), 0)
    assert {name: int((split == name).sum()) for name in SPLITS} == {"train": 3024, "validation": 336, "test": 840}
    scaffolds = []
    for smiles in prepared["smiles"]:
        scaffold = MurckoScaffold.GetScaffoldForMol(Chem.MolFromSmiles(smiles))
        Chem.RemoveStereochemistry(scaffold)
        scaffolds.append(Chem.MolToSmiles(scaffold))
    sides = pd.Series(split).groupby(np.array(scaffolds)).nunique()
    assert len(sides) > 1000
    assert (sides == 1).all()


def test_a_scaffold_has_no_side_chains_and_no_stereo():
    assert scaffold_of("CC[C@H](N)c1ccccc1") == "c1ccccc1"
    assert scaffold_of("CCO") == ""


@pytest.mark.parametrize("count, told", [(49, True), (50, False), (0, False)])
def test_a_test_set_that_tells_little_is_named(count, told, caplog):
    """Reference: mean squares of that many normal errors, whose standard deviation is the share in the text."""
    warn_of_few(pd.DataFrame({"split": ["train"] * 9 + ["test"] * count, "label": 1.0}))
    assert bool(caplog.text) == told
    if told:
        errors = np.random.default_rng(0).normal(size=(20000, count))
        assert f"off by some {100 * (errors**2).mean(axis=1).std():.0f} %" in caplog.text


def test_a_label_that_few_test_molecules_have_is_named(caplog):
    table = pd.DataFrame({"split": ["test"] * 60, "label:logD": 1.0, "label:pKa": [1.0] * 12 + [np.nan] * 48})
    warn_of_few(table.assign(**{"label:unmeasured": np.nan}))
    assert "There are 12 test molecules with the label pKa: by chance" in caplog.text and "41 %" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.xlsx", "is a workbook. Save the sheet as CSV"),
        ("a.SDF", "is no table. Write SMILES"),
        ("a.sdf.gz", "is no table"),
        ("a.xls", "is a workbook"),
        ("a.parquet", "is no text"),
    ],
)
def test_files_of_other_programs_are_told_from_tables(name, message, tmp_path):
    (tmp_path / name).write_bytes(b"PK\x03\x04\xff")
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / name)


def test_a_decimal_comma_is_told_from_other_text(tmp_path):
    (tmp_path / "a.csv").write_text("smiles;y\nCCO;3,11\n")
    with pytest.raises(InputError, match=r"first at row 0: '3,11'. Decimals are to be written with a point\.$"):
        read_table(tmp_path / "a.csv")


def test_a_column_without_smiles_is_named_with_the_flag_for_another(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("molecule,code,y\nCPD-0,CCO,1\nCPD-1,CCN,2\n")
    with pytest.raises(InputError, match=r"column 'molecule' of .*another column has the SMILES.*--smiles_column"):
        prepare_molecules(read_table(tmp_path / "a.csv"), tokenizer, DataTrainingArguments(), "a.csv")


def test_a_test_file_without_the_label_is_told_how_to_predict(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("smiles,pIC50\nCCO,1\nCCN,2\n")
    (tmp_path / "b.csv").write_text("smiles,name\nCCO,x\n")
    arguments = DataTrainingArguments(
        train_file=str(tmp_path / "a.csv"), test_file=str(tmp_path / "b.csv"), label_column=["pIC50"]
    )
    with pytest.raises(
        InputError, match="b.csv has no column pIC50; .* Test molecules need labels.* called so.*--do_predict"
    ):
        load_molecules(tokenizer, ModelArguments(), arguments, TrainingArguments(output_dir="x"))


def test_a_descriptor_that_rdkit_does_not_know_is_told_with_names_near_it():
    with pytest.raises(InputError, match=r"--head_descriptors names logP, .* Near it: .*MolLogP"):
        choose_descriptors(["logP"])


@pytest.mark.parametrize("split, leaks", [("random", True), ("scaffold", False)])
def test_the_protocol_of_the_paper_has_no_validation_part(prepared, split, leaks):
    arguments = DataTrainingArguments(protocol="paper", split=split)
    parts = assign_splits(prepared, arguments, 0)
    assert {name: int((parts == name).sum()) for name in SPLITS} == {"train": 3360, "validation": 0, "test": 840}
    sides = pd.Series(parts).groupby(prepared["group"].to_numpy()).nunique()
    assert (sides > 1).any() == leaks  # rows are split without regard to twins


def test_fractions_decide_the_sizes(prepared):
    arguments = DataTrainingArguments(test_fraction=0.5, validation_fraction=0.25)
    split = assign_splits(prepared, arguments, 0)
    assert [int((split == name).sum()) for name in SPLITS] == [1575, 525, 2100]


@pytest.mark.parametrize("split", ["random", "scaffold"])
@pytest.mark.parametrize(
    ("test", "validation", "sizes"), [(0, 0, [4200, 0, 0]), (0, 0.1, [3780, 420, 0]), (0.2, 0, [3360, 0, 840])]
)
def test_a_fraction_of_zero_holds_nothing_out(prepared, split, test, validation, sizes):
    arguments = DataTrainingArguments(test_fraction=test, validation_fraction=validation, split=split)
    parts = assign_splits(prepared, arguments, 0)
    assert [int((parts == name).sum()) for name in SPLITS] == sizes


def test_no_validation_part_leaves_the_test_part_as_it_is(prepared):
    with_part, without = (
        assign_splits(prepared, DataTrainingArguments(validation_fraction=fraction), 0) for fraction in (0.1, 0)
    )
    assert ((with_part == "test") == (without == "test")).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", ["random", "scaffold"])
def test_too_few_molecules_are_refused_with_their_counts(tokenizer, count, kind):
    molecules, _ = prepare_molecules(table_of(alcohols(count)), tokenizer, DataTrainingArguments(), "t")
    with pytest.raises(InputError, match=f"{count} molecules cannot be split: .*train.*Give more molecules"):
        assign_splits(molecules, DataTrainingArguments(split=kind), 0)


def given_split(tokenizer, folder, content, count=10, **arguments):
    """The split that a split file gives to `count` molecules; row 2 was dropped from the ten, as an example."""
    file = write(folder, content if isinstance(content, str) else json.dumps(content), "splits.json")
    molecules, _ = prepare_molecules(table_of(alcohols(count)), tokenizer, DataTrainingArguments(), "t")
    molecules = molecules[molecules["row"] != 2].reset_index(drop=True)
    return assign_splits(molecules, DataTrainingArguments(split_file=str(file), **arguments), 0)


def test_a_split_file_is_followed_row_by_row(tokenizer, tmp_path):
    split = given_split(tokenizer, tmp_path, {"train": [9, 0, 4], "validation": [1, 3], "test": [5], "hash": "ab"})
    # rows 0 1 3 4 5 6 7 8 9: row numbers are those of the file, dropped rows counted
    assert split.tolist() == ["train", "validation", "validation", "train", "test", "", "", "", "train"]


def test_without_a_validation_part_in_the_file_one_is_taken_from_training(tokenizer, tmp_path):
    given_rows = {"train": [0, 1, 3, 4, 5, 6], "test": [7, 8]}
    split = given_split(tokenizer, tmp_path, given_rows, validation_fraction=0.5)
    assert (split == "validation").sum() == 3
    assert split.tolist()[6:] == ["test", "test", ""]
    paper = given_split(tokenizer, tmp_path, given_rows, protocol="paper")
    assert paper.tolist() == ["train"] * 6 + ["test"] * 2 + [""]


def test_the_protocol_of_the_paper_refuses_validation_molecules(tokenizer, tmp_path):
    """Or the epoch would be chosen by these, and the report would say that it was chosen by the test loss."""
    with pytest.raises(InputError, match="--protocol paper .* has no validation molecules, but there are some"):
        given_split(tokenizer, tmp_path, {"train": [0, 1], "validation": [3], "test": [4]}, protocol="paper")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"train": [0, 1], "validation": [3], "test": [1]}, r"Row 1 is in train and in test"),
        ({"train": [0, 1], "validation": [1], "test": [3]}, r"Row 1 is in train and in validation"),
        ({"train": [0, 1], "validation": [3], "test": [99]}, r"Row 99 of test .* not among the usable"),
        ({"train": [0, 2], "validation": [3], "test": [1]}, r"Row 2 of train .* not among the usable"),
        ({"train": [0, -1], "validation": [3], "test": [1]}, r"Row -1 of train .* not among the usable"),
        ('{"train": [0, 1', r"cannot be read as JSON"),
        ("", r"cannot be read as JSON"),
        (
            {"train": [0, 1], "valid": [3], "test": [4]},
            r"has the key 'valid', which is none of train, validation, test",
        ),
        ({"train": [0, 1]}, r'needs the keys "train" and "test"'),
        ({"test": [0, 1]}, r'needs the keys "train" and "test"'),
        ({"train": [], "test": [1]}, r'needs the keys "train" and "test"'),
        ([0, 1], r'needs the keys "train" and "test"'),
        ({"train": 5, "test": [1]}, r'needs the keys "train" and "test"'),
        ({"train": [[0]], "test": [1]}, r"Row \[0\] of train|lists of row numbers"),
        ({"train": ["0"], "test": [1]}, r"Row '0' of train|lists of row numbers"),
    ],
)
def test_a_split_file_that_is_no_partition_is_refused(tokenizer, tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        given_split(tokenizer, tmp_path, content)
    assert "splits.json" in str(error.value)


def test_a_split_file_may_name_no_validation_part_as_null(tokenizer, tmp_path):
    content = {"train": [0, 1, 3, 4], "validation": None, "test": [5]}
    split = given_split(tokenizer, tmp_path, content, validation_fraction=0.5)
    assert (split == "validation").sum() == 2


def test_an_absent_split_file_is_refused(tokenizer, tmp_path):
    molecules, _ = prepare_molecules(table_of(alcohols(10)), tokenizer, DataTrainingArguments(), "t")
    with pytest.raises(InputError, match="absent.json"):
        assign_splits(molecules, DataTrainingArguments(split_file=str(tmp_path / "absent.json")), 0)


def load(tokenizer, folder, seed=0, **arguments):
    training_args = TrainingArguments(output_dir=str(folder), seed=seed)
    return load_molecules(tokenizer, ModelArguments(), DataTrainingArguments(**arguments), training_args)


def write_molecules(folder, name, smiles):
    return str(write(folder, "SMILES,label\n" + "".join(f"{s},{i}\n" for i, s in enumerate(smiles)), name))


def test_separate_files_are_the_parts(tokenizer, tmp_path):
    files = {
        "train_file": write_molecules(tmp_path, "a.csv", ["C", "CC", "CCC"]),
        "validation_file": write_molecules(tmp_path, "b.csv", ["CN"]),
        "test_file": write_molecules(tmp_path, "c.csv", ["CO", "CCO"]),
    }
    molecules, _, _ = load(tokenizer, tmp_path, **files)
    parts = molecules.groupby("split")["smiles"].agg(list).to_dict()
    assert parts == {"train": ["C", "CC", "CCC"], "validation": ["CN"], "test": ["CO", "CCO"]}
    assert molecules.groupby("split")["row"].agg(list)["test"] == [0, 1]


def test_test_molecules_whose_salts_are_learned_are_told(tokenizer, tmp_path, caplog):
    files = {
        "train_file": write_molecules(tmp_path, "a.csv", ["CCN.Cl", "CC(=O)[O-].[Na+]", "CCC"]),
        "validation_file": write_molecules(tmp_path, "b.csv", ["CN"]),
        "test_file": write_molecules(tmp_path, "c.csv", ["CCN", "CC(=O)O", "C[N+](C)(C)C", "C[N+](=O)[O-]"]),
    }
    load(tokenizer, tmp_path, **files)
    assert "2 of 4 test molecules are, stereo and salts aside, also among" in caplog.text


@pytest.mark.parametrize(
    ("smiles", "parent"),
    [
        ("CCN.Cl", "CCN"),
        ("CC[NH2+]CC.[Cl-]", "CCNCC"),
        ("CC(=O)[O-].[Na+]", "CC(=O)O"),
        ("C[N+](C)(C)C", "C[N+](C)(C)C"),  # which no proton neutralizes
        ("C[N+](=O)[O-]", "C[N+](=O)[O-]"),
        ("CCO.CCN", "CCO"),  # of two of one size always the same
        ("CCN.CCO", "CCO"),
        ("CC", "CC"),
    ],
)
def test_parents_of_salts_are_known_molecules(smiles, parent):
    assert parent_of(smiles) == parent


def test_validation_molecules_that_are_learned_are_told(tokenizer, tmp_path, caplog):
    files = {
        "train_file": write_molecules(tmp_path, "a.csv", ["C", "CC", "CCC"]),
        "validation_file": write_molecules(tmp_path, "b.csv", ["CN", "CC"]),
        "test_file": write_molecules(tmp_path, "c.csv", ["CO", "CCO"]),
    }
    load(tokenizer, tmp_path, **files)
    assert "1 of 2 validation molecules are, stereo and salts aside, training molecules too" in caplog.text
    assert "test numbers are optimistic" not in caplog.text
    files["test_file"] = write_molecules(tmp_path, "d.csv", ["CO", "OCC", "NC", "CCC"])
    load(tokenizer, tmp_path, **files)
    assert (
        "2 of 4 test molecules are, stereo and salts aside, also among the molecules of training and val"
        in caplog.text
    )


def test_a_split_file_of_another_table_is_told(tokenizer, tmp_path, caplog):
    smiles = alcohols(10)
    table, rows = (
        write_molecules(tmp_path, "a.csv", smiles),
        {"train": [*range(6)], "validation": [6, 7], "test": [8, 9]},
    )
    split = {"train_file": table, "split_file": str(tmp_path / "splits.json")}
    (tmp_path / "splits.json").write_text(json.dumps(rows))
    _, digest, _ = load(tokenizer, tmp_path, **split)
    (tmp_path / "splits.json").write_text(json.dumps(rows | {"hash": digest}))
    load(tokenizer, tmp_path, **split)
    assert "was written for other molecules" not in caplog.text
    write_molecules(tmp_path, "a.csv", smiles[::-1])
    load(tokenizer, tmp_path, **split)
    assert "was written for other molecules" in caplog.text


def test_separate_files_are_read_by_the_label_of_the_training_file(tokenizer, tmp_path, caplog):
    """A column `exp` would be the first choice of a file by itself."""
    train = str(write(tmp_path, "smiles,logD\n" + "".join(f"{s},{i}\n" for i, s in enumerate(alcohols(10))), "a.csv"))
    test = str(write(tmp_path, "smiles,exp,logD\nCN,100,1\nCCN,200,2\n", "b.csv"))
    molecules, _, _ = load(tokenizer, tmp_path, train_file=train, test_file=test)
    assert molecules.loc[molecules["split"] == "test", "label"].tolist() == [1.0, 2.0]
    other = str(write(tmp_path, "smiles,exp\nCN,1\nCCN,2\n", "c.csv"))
    with caplog.at_level("INFO"):
        load(tokenizer, tmp_path, train_file=train, test_file=other)
    assert f"Labels of {train}: column logD" in caplog.text and f"Labels of {other}: column exp" in caplog.text


def test_a_bad_molecule_of_a_separate_file_is_reported_with_that_file(tokenizer, tmp_path):
    train = write_molecules(tmp_path, "a.csv", ["C", "CC", "CCC"])
    test = write_molecules(tmp_path, "c.csv", ["CO", "C1CC"])
    with pytest.raises(InputError, match="row 1: 'C1CC'") as error:
        load(tokenizer, tmp_path, train_file=train, test_file=test)
    assert test in str(error.value)


def test_a_validation_file_without_a_test_part_is_refused(tokenizer, tmp_path):
    train = write_molecules(tmp_path, "a.csv", alcohols(10))
    validation = write_molecules(tmp_path, "b.csv", ["CN"])
    with pytest.raises(InputError, match="--test_file"):
        load(tokenizer, tmp_path, train_file=train, validation_file=validation)


def test_rows_of_no_part_are_left_out(tokenizer, tmp_path, caplog):
    """As those of the pool are, which stand in splits.json of run_influence.py."""
    train = write_molecules(tmp_path, "a.csv", alcohols(5))
    parts = {"split": "random", "hash": None, "train": [0, 1], "validation": [4], "test": [2], "pool": [3]}
    split = write(tmp_path, json.dumps(parts), "s.json")
    molecules, _, _ = load(tokenizer, tmp_path, train_file=train, split_file=str(split))
    assert molecules["row"].tolist() == [0, 1, 2, 4] and "1 of 5 molecules are in no part of" in caplog.text


def test_the_split_seed_holds_over_the_seed(tokenizer, tmp_path):
    train = write_molecules(tmp_path, "a.csv", alcohols(30))
    hashes = [
        load(tokenizer, tmp_path, train_file=train, seed=seed, split_seed=split_seed)[1]
        for seed, split_seed in ((0, None), (1, None), (1, 0))
    ]
    assert hashes[0] == hashes[2] != hashes[1]


def test_the_dropped_molecules_are_told_and_nothing_is_written(tokenizer, tmp_path):
    train = write_molecules(tmp_path, "a.csv", [*alcohols(20), "C1CC"])
    molecules, _, dropped = load(tokenizer, tmp_path / "new", train_file=train, invalid_smiles="drop")
    assert len(molecules) == 20
    assert dropped["row"].tolist() == [20]
    assert not (tmp_path / "new").exists()  # nothing is written while input is being read


def test_the_hash_of_a_split_tells_splits_apart_and_not_orders(prepared):
    split = assign_splits(prepared, DataTrainingArguments(), 0)
    digest = split_hash(prepared, split)
    order = np.random.default_rng(0).permutation(len(prepared))
    assert split_hash(prepared.iloc[order], split[order]) == digest
    assert split_hash(prepared, assign_splits(prepared, DataTrainingArguments(), 1)) != digest
    moved = split.copy()
    moved[np.flatnonzero(split == "test")[0]] = "train"
    assert split_hash(prepared, moved) != digest


def test_rows_of_no_part_do_not_enter_the_hash(prepared):
    molecules = prepared.head(3)
    assert split_hash(molecules, ["train", "", "test"]) == split_hash(molecules.iloc[[0, 2]], ["train", "test"])


# ----------------------------------------------------------------------------------------------- metrics and baselines


@seeded
@given(st.integers(0, 2**32 - 1), st.integers(3, 50))
def test_metrics_equal_their_closed_forms(seed, count):
    """Reference: the formulas in NumPy; Spearman is Pearson of the ranks (no ties here)."""
    labels, noise = np.random.default_rng(seed).normal(size=(2, count))
    predictions = labels + noise
    errors = predictions - labels
    ranks = [np.argsort(np.argsort(values)) for values in (predictions, labels)]
    expected = {
        "mse": np.mean(errors**2),
        "rmse": np.sqrt(np.mean(errors**2)),
        "mae": np.mean(np.abs(errors)),
        "r2": 1 - np.sum(errors**2) / np.sum((labels - labels.mean()) ** 2),
        "pearson": np.corrcoef(predictions, labels)[0, 1],
        "spearman": np.corrcoef(*ranks)[0, 1],
    }
    metrics = regression_metrics(predictions[:, None], labels)  # a head's predictions have shape (N, 1)
    assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize(
    "predictions, labels, names",
    [
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], {"mse", "rmse", "mae", "r2"}),
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], {"mse", "rmse", "mae"}),
        ([1.0], [2.0], {"mse", "rmse", "mae"}),
    ],
    ids=["constant predictions", "constant labels", "one molecule"],
)
def test_metrics_that_are_not_defined_are_left_out(predictions, labels, names):
    """R² divides by the variance of the labels, a correlation by both."""
    metrics = regression_metrics(predictions, labels)
    assert set(metrics) == names
    assert np.isfinite(list(metrics.values())).all()


@pytest.mark.parametrize("protocol", ["default", "paper"], ids=["validation chooses", "no validation"])
def test_the_fingerprint_baseline_beats_the_mean(prepared, protocol):
    molecules = prepared.head(1000)
    split = assign_splits(molecules, DataTrainingArguments(protocol=protocol), 0)
    labels, train, test = molecules["label"].to_numpy(), split == "train", split == "test"
    predictions = baseline_predictions(morgan_counts(molecules["group"]), labels, split)
    assert list(predictions) == ["mean", "fingerprint_ridge"]
    assert list(baseline_predictions(None, labels, split)) == ["mean"]
    np.testing.assert_allclose(predictions["mean"], np.full(len(labels), labels[train].mean()))
    mse = {name: np.mean((values[test] - labels[test]) ** 2) for name, values in predictions.items()}
    assert mse["fingerprint_ridge"] < 0.8 * mse["mean"]


def test_the_penalty_of_ridge_regression_is_chosen_on_validation():
    """Features that tell nothing: there the largest penalty is best, and of an exact relation the smallest."""
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    features, split = rng.normal(size=(120, 30)), np.array(["train"] * 60 + ["validation"] * 60)
    for labels, alpha in ((rng.normal(size=120), 300), (features @ rng.normal(size=30), 1)):
        expected = Ridge(alpha=alpha).fit(features[:60], labels[:60]).predict(features)
        predictions = baseline_predictions(features, labels, split)["fingerprint_ridge"]
        np.testing.assert_allclose(predictions, expected)


def test_baselines_do_not_see_test_labels(prepared):
    molecules = prepared.head(200)
    split = assign_splits(molecules, DataTrainingArguments(), 0)
    features, labels = morgan_counts(molecules["group"]), molecules["label"].to_numpy()
    hidden = baseline_predictions(features, np.where(split == "test", 1e6, labels), split)
    for name, expected in baseline_predictions(features, labels, split).items():
        np.testing.assert_array_equal(hidden[name], expected)


# ------------------------------------------------------------------------------------------------------------- files


def test_files_are_written_whole_and_replace_older_ones(tmp_path):
    for path, save, expected in (
        (tmp_path / "a.txt", lambda path: write_text("R² of 1\n", path), "R² of 1\n"),
        (
            tmp_path / "a.json",
            lambda path: write_json({"rows": [0, 1]}, path),
            '{\n  "rows": [\n    0,\n    1\n  ]\n}\n',
        ),
        (tmp_path / "a.csv", lambda path: write_csv(pd.DataFrame({"a": [1], "b": ["x,y"]}), path), 'a,b\n1,"x,y"\n'),
    ):
        path.write_text("something older and much longer than what follows\n" * 10)
        save(path)
        assert path.read_bytes() == expected.encode()
        save(str(path))
        assert path.read_bytes() == expected.encode()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.csv", "a.json", "a.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_json_is_refused_and_the_file_stays(tmp_path, value):
    path = tmp_path / "a.json"
    write_json({"mse": 1}, path)
    with pytest.raises(ValueError):
        write_json({"mse": 1, "deeper": [{"r2": value}]}, path)
    assert json.loads(path.read_text()) == {"mse": 1}
    assert list(tmp_path.iterdir()) == [path]


# ----------------------------------------------------------------------------------------------------- embedded files


def test_the_embedded_data_set_is_the_one_that_was_measured(embedded):
    """Frozen values; mean and sd as in ../shared/data/README.md."""
    digest = hashlib.sha256(Path(EMBEDDED_DATA).read_bytes()).hexdigest()
    assert digest == "42e44ed85528de0c14127db5f9c341949b92128cb446622adb94162b8913f93d"
    labels = embedded["label"]
    assert len(embedded) == embedded["smiles"].nunique() == 4200
    assert (round(labels.mean(), 3), round(labels.std(), 3)) == (2.186, 1.203)
    assert (labels.min(), labels.max()) == (-1.5, 4.5)


def test_the_embedded_data_set_equals_the_shared_one(embedded):
    """Reference: ../shared/data/lipophilicity.csv, of another source; the digits of labels are written differently."""
    path = SHARED_DATA / "lipophilicity.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    shared = pd.read_csv(path)
    pairs = list(zip(shared["SMILES"], shared["label"].astype(float), strict=True))
    assert list(zip(embedded["smiles"], embedded["label"], strict=True)) == pairs


@pytest.mark.parametrize(
    "smiles, ids",
    [
        (
            "Cn1c(CN2CCN(CC2)c3ccc(Cl)cc3)nc4ccccc14",
            [0, 4, 13, 8, 5, 6, 4, 10, 11, 4, 4, 10, 6, 4, 4, 11, 7, 5, 14, 5, 5, 5, 6, 20, 7, 5, 5, 14, 7, 13, 5, 19]
            + [5, 5, 5, 5, 5, 8, 19, 1],
        ),
        ("C[C@@H](N)C(=O)O", [0, 4, 16, 6, 10, 7, 4, 6, 12, 9, 7, 9, 1]),
        ("F/C=C\\Br.[Na+]", [0, 17, 26, 4, 12, 4, 33, 27, 34, 50, 1]),
    ],
)
def test_the_tokenizer_gives_the_ids_of_molformer(tokenizer, smiles, ids):
    """Frozen ids, from the tokenizer of ../shared/data/molformer_tokenizer."""
    assert tokenizer(smiles)["input_ids"] == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == smiles


def test_the_special_tokens_have_the_ids_of_molformer(tokenizer):
    assert len(tokenizer) == len(Path(EMBEDDED_VOCABULARY).read_text().splitlines()) == 2362
    assert [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id] == [0, 1, 2]
    assert [tokenizer.mask_token_id, tokenizer.unk_token_id] == [3, 2361]


def test_the_tokenizer_equals_the_shared_one_on_all_molecules(embedded, tokenizer):
    """Reference: ../shared/data/molformer_tokenizer, on SMILES as given (with stereo) and on text that it loses."""
    folder = SHARED_DATA / "molformer_tokenizer"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    shared = PreTrainedTokenizerFast.from_pretrained(folder)
    texts = [*embedded["smiles"], "CXC", "[Zz]", "CC ethane", ""]
    assert tokenizer(texts)["input_ids"] == shared(texts)["input_ids"]


def test_a_saved_tokenizer_reloads_equal(embedded, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = embedded["smiles"].head(100).tolist()
    assert reloaded(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert reloaded.model_input_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_that_are_not_finite_are_told_as_divergence(value):
    with pytest.raises(InputError, match="1 of 2 predictions are not finite.*--learning_rate"):
        regression_metrics([1.0, value], [1.0, 2.0])


# ------------------------------------------------------------------------------------- descriptors and random SMILES


def test_descriptors_are_those_of_rdkit_by_name():
    """Reference: RDKit's functions, called one by one."""
    from rdkit import Chem
    from rdkit.Chem import Crippen, rdMolDescriptors

    molecule = Chem.MolFromSmiles("CC(=O)Nc1ccc(O)cc1")
    values = compute_descriptors(molecule, ["MolLogP", "TPSA", "NumHDonors"])
    expected = [Crippen.MolLogP(molecule), rdMolDescriptors.CalcTPSA(molecule), 2]
    assert values.dtype == np.float32 and values == pytest.approx(expected, rel=1e-6)


def test_default_descriptors_are_many_without_the_slow_ones():
    names = default_descriptors()
    assert len(names) > 150 and len(set(names)) == len(names)
    assert {"MolLogP", "TPSA", "fr_benzene", "SlogP_VSA1"} <= set(names)
    assert not {"qed", "Ipc", "BCUT2D_MWHI"} & set(names)
    values = compute_descriptors(parse_smiles("c1ccccc1C(=O)O"), names)
    assert values.shape == (len(names),) and np.isfinite(values).all()


def test_descriptor_that_rdkit_does_not_know_is_named():
    with pytest.raises(InputError, match="does not know the descriptors NoSuchThing"):
        compute_descriptors(parse_smiles("CCO"), ["MolLogP", "NoSuchThing"])


def test_descriptor_that_cannot_be_computed_is_missing_and_too_large_a_one_infinite(monkeypatch):
    from rdkit.Chem import Descriptors

    def broken(molecule):
        raise ValueError("no such value")

    functions = [("MolLogP", broken), ("TPSA", lambda molecule: 1e300), ("MolWt", lambda molecule: 46.0)]
    monkeypatch.setattr(Descriptors, "descList", functions)
    values = compute_descriptors(parse_smiles("CCO"), ["MolLogP", "TPSA", "MolWt"])
    assert np.isnan(values[0]) and np.isposinf(values[1]) and values[2] == 46


def test_random_smiles_are_the_same_molecule_written_in_other_ways():
    """Reference: RDKit's canonical form."""
    text = canonicalize("CC(=O)Nc1ccc(O)cc1C[C@H](N)F", "isomeric")
    forms = random_smiles(text, 20, seed=3)
    assert len(forms) == 20 and len(set(forms)) > 10
    assert {canonicalize(form, "isomeric") for form in forms} == {text}
    assert random_smiles(text, 20, seed=3) == forms and random_smiles(text, 20, seed=4) != forms
    assert random_smiles(text, 0, seed=3) == []


def test_atom_descriptors_add_up_to_those_of_the_molecule():
    """References: RDKit's Crippen logP and refractivity, polar surface, and charges that sum to the molecule's."""
    from rdkit.Chem import Crippen, rdMolDescriptors

    molecule = parse_smiles("CC(=O)Nc1ccc(O)cc1")
    values = compute_atom_descriptors(molecule, list(ATOM_DESCRIPTORS))
    assert values.shape == (11, len(ATOM_DESCRIPTORS)) and values.dtype == np.float32
    columns = dict(zip(ATOM_DESCRIPTORS, values.T, strict=True))
    heavy = Chem.RemoveHs(molecule)
    assert columns["polar_surface"].sum() == pytest.approx(rdMolDescriptors.CalcTPSA(heavy), rel=1e-5)
    with_hydrogens = Chem.AddHs(molecule)
    whole = compute_atom_descriptors(with_hydrogens, ["crippen_log_p", "crippen_refractivity", "gasteiger_charge"])
    assert whole[:, 0].sum() == pytest.approx(Crippen.MolLogP(molecule), rel=1e-4)
    assert whole[:, 1].sum() == pytest.approx(Crippen.MolMR(molecule), rel=1e-4)
    assert whole[:, 2].sum() == pytest.approx(0, abs=1e-4)
    assert columns["hydrogens"].sum() == 9 and set(columns["smallest_ring"]) == {0, 6}


def test_atom_descriptor_of_another_name_is_refused():
    with pytest.raises(InputError, match="atom descriptors no_such, which are unknown"):
        compute_atom_descriptors(parse_smiles("CCO"), ["hydrogens", "no_such"])


def test_environments_are_equal_where_the_surroundings_are():
    """Benzene: one class for all. Octane: an atom knows its neighbors' kind, so one class more for each bond."""
    assert len(set(map(tuple, atom_environments(parse_smiles("c1ccccc1"), [1024, 4096])))) == 1
    first, second = atom_environments(parse_smiles("CCCCCCCC"), [1024, 4096]).T
    assert first.tolist() == first[::-1].tolist() and len(set(first)) == 3
    assert second.tolist() == second[::-1].tolist() and len(set(second)) == 4
    assert atom_environments(parse_smiles("C"), [1024, 4096]).shape == (1, 2)
    assert atom_environments(parse_smiles("CCO"), [2]).max() < 2


def test_text_comes_back_from_token_ids():
    tokenizer = build_tokenizer()
    for text in ("CC(=O)Nc1ccc(O)cc1", "C[N+](C)(C)CCBr", "C%12CCC%12"):
        assert to_text(tokenizer(text)["input_ids"], tokenizer) == text
