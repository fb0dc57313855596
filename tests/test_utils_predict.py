"""utils_predict.py: every row of a file gets its answer, in its place, however the file is cut and shared.

python -m pytest tests/test_utils_predict.py
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TWO_PROCESSES
from safetensors.numpy import load_file

import run_regression
import utils_predict
from arguments import InputError, parse_arguments
from modeling_molformer_reg import MolformerForRegression
from utils_checkpoints import build_tokenizer
from utils_molecules import canonicalize


SMILES = ["OCC", "c1ccccc1O", "C1CC", "", "CC(=O)Oc1ccccc1C(=O)O", "[Xe]", "C" * 300, "N[C@@H](C)C(=O)O", "OCC"]
STATUS = ["ok", "ok", "invalid SMILES", "invalid SMILES", "ok", "ok", "too long", "ok", "ok"]


@pytest.fixture(scope="module")
def fine_tuned(tiny_checkpoint, tmp_path_factory):
    """Two regression models with heads that know a scale: an ensemble's folder."""
    folder = tmp_path_factory.mktemp("models") / "ensemble"
    for number in range(2):
        torch.manual_seed(number)
        model = MolformerForRegression.from_pretrained(tiny_checkpoint, num_labels=1)
        model.config.label_mean, model.config.label_std, model.config.smiles_form = [2.0], [1.5], "canonical"
        for parameter in model.classifier.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(folder / f"member-{number}")
        build_tokenizer().save_pretrained(folder / f"member-{number}")
        (folder / f"member-{number}" / "all_results.json").write_text("{}")
    return folder


def expected(folder, smiles):
    """Reference: the model on one molecule at a time."""
    model, tokenizer = MolformerForRegression.from_pretrained(folder).eval(), build_tokenizer()
    with torch.no_grad():
        return [
            float(model(**tokenizer(canonicalize(text, "canonical"), return_tensors="pt")).logits) for text in smiles
        ]


def predict(tmp_path, *flags, output="out"):
    flags = ["--do_predict", "--output_dir", tmp_path / output, "--disable_tqdm", "true", *flags]
    flags = [str(flag) for flag in flags]
    run_regression.main(*parse_arguments(*run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=flags))
    return pd.read_csv(
        tmp_path / output / "predictions.csv", dtype={"note": str}, keep_default_na=False, na_values=[""]
    )


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "new.csv"
    frame = pd.DataFrame({"id": range(100, 100 + len(SMILES)), "note": ["x,y"] * len(SMILES), "smiles": SMILES})
    frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("piece, inline", [(20_000, 2_000), (4, 2_000), (3, 1)], ids=["whole", "pieces", "workers"])
def test_every_row_is_answered_in_its_place(tmp_path, table, fine_tuned, monkeypatch, piece, inline):
    monkeypatch.setattr(utils_predict, "PIECE", piece)
    monkeypatch.setattr(utils_predict, "INLINE", inline)
    model = fine_tuned / "member-0"
    result = predict(tmp_path, "--model_name_or_path", model, "--test_file", table, "--per_device_eval_batch_size", 2)
    assert list(result) == ["id", "note", "smiles", "prediction", "status"]
    assert result["id"].tolist() == list(range(100, 109)) and set(result["note"]) == {"x,y"}
    assert result["status"].tolist() == STATUS
    ok = result["status"] == "ok"
    assert result["prediction"][~ok].isna().all()
    wanted = expected(model, [text for text, status in zip(SMILES, STATUS, strict=True) if status == "ok"])
    np.testing.assert_allclose(result["prediction"][ok], wanted, atol=1e-5)
    report = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert (report["predict_samples"], report["predict_ok"], report["predict_invalid_SMILES"]) == (9, 6, 2)
    assert "predict_mse" not in report


def test_a_header_may_have_a_line_break_in_a_name_and_lines_may_begin_with_an_empty_one(tmp_path, fine_tuned):
    model = ("--model_name_or_path", fine_tuned / "member-0")
    (tmp_path / "new.csv").write_text('SMILES,"logD\n(7.4)",z\nCCO,1,2\n')
    result = predict(tmp_path, *model, "--test_file", tmp_path / "new.csv")
    assert list(result)[:3] == ["SMILES", "logD\n(7.4)", "z"] and result["status"].tolist() == ["ok"]
    (tmp_path / "new.smi").write_text("\nCCO ethanol\n")
    result = predict(tmp_path, *model, "--test_file", tmp_path / "new.smi", output="lines")
    assert result["status"].tolist() == ["invalid SMILES", "ok"]


@pytest.mark.parametrize("given", [True, False])
def test_predictions_go_where_the_user_says_even_to_the_folder_of_the_default(
    tmp_path, table, fine_tuned, monkeypatch, given
):
    """The default of a training is where the model is, so without the flag predictions have another one."""
    monkeypatch.chdir(tmp_path)
    flags = ["--do_predict", "--model_name_or_path", str(fine_tuned / "member-0"), "--test_file", str(table)]
    flags += ["--output_dir", "outputs/regression"] if given else []
    run_regression.main(*parse_arguments(*run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=flags))
    where = "regression" if given else "predictions"
    assert [path.parent.name for path in tmp_path.glob("outputs/*/predictions.csv")] == [where]


@pytest.mark.parametrize("column", ["SMILES", "Drug"])
def test_a_text_file_with_a_header_is_a_table(tmp_path, fine_tuned, column):
    """As spreadsheets write it, with tabs. Without a header it has one SMILES a line."""
    flags = ["--model_name_or_path", fine_tuned / "member-0", "--test_file", tmp_path / "new.txt"]
    flags += ["--smiles_column", column] if column != "SMILES" else []
    (tmp_path / "new.txt").write_text(f"id\t{column}\n7\tOCC\n8\tCC\n")
    result = predict(tmp_path, *flags)
    assert list(result) == ["id", column, "prediction", "status"] and result["status"].tolist() == ["ok", "ok"]


def test_the_last_piece_may_have_no_row_for_a_process(tiny_checkpoint, monkeypatch):
    """Of 21 rows in pieces of 20, one of two processes has none of the second piece."""
    monkeypatch.setattr(utils_predict, "INLINE", 1)
    pieces = [pd.DataFrame({"s": ["CC"] * count}) for count in (20, 1)]
    arguments = (build_tokenizer(), "canonical", 256, 0, 0, None)
    prepared = utils_predict.prepared_pieces(iter(pieces), "s", arguments, 2, slice(1, None, 2))
    assert [len(reasons) for _, _, reasons in prepared] == [10, 0]


def test_an_ensemble_and_random_smiles_give_their_spreads(tmp_path, table, fine_tuned):
    flags = ["--model_name_or_path", fine_tuned, "--test_file", table]
    result = predict(tmp_path, *flags, "--predict_augment", 3)
    members = [expected(fine_tuned / f"member-{number}", ["OCC"])[0] for number in range(2)]
    plain = predict(tmp_path, *flags, output="plain")
    assert plain["prediction"][0] == pytest.approx(np.mean(members), abs=1e-5)
    assert plain["prediction_sd"][0] == pytest.approx(np.std(members, ddof=1), abs=1e-5)
    assert {"prediction", "prediction_sd", "augment_sd", "status"} <= set(result)
    assert (result["augment_sd"][result["status"] == "ok"] >= 0).all()
    assert result.loc[4, "augment_sd"] > 0


def test_labels_give_metrics_of_the_rows_that_have_them(tmp_path, fine_tuned, caplog):
    path = tmp_path / "labeled.tsv"
    labels = ["1.5", "", "n/a", "2", "7", ">3", "1,5"]
    smiles = ["OCC", "CC", "CN", "CCC", "C1CC", "CO", "CCN"]
    pd.DataFrame({"label": labels, "SMILES": smiles}).to_csv(path, sep="\t", index=False)
    result = predict(tmp_path, "--model_name_or_path", fine_tuned / "member-0", "--test_file", path)
    report = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert report["predict_labeled"] == 2
    errors = result["prediction"][[0, 3]].to_numpy() - [1.5, 2]
    assert report["predict_mse"] == pytest.approx(np.mean(errors**2), abs=1e-9)
    assert result["label"].fillna("").tolist() == labels  # as they were written
    assert "2 labels are no numbers, such as '>3', and are not compared with" in caplog.text


@pytest.mark.parametrize("suffix", [".smi", ".txt", ".smi.gz"])
def test_a_file_of_lines_needs_no_header(tmp_path, fine_tuned, suffix):
    content = "OCC ethanol\nC1CC\n\nc1ccccc1\tbenzene\n"
    path = tmp_path / f"molecules{suffix}"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    result = predict(tmp_path, "--model_name_or_path", fine_tuned / "member-0", "--test_file", path)
    assert result["status"].tolist() == ["ok", "invalid SMILES", "invalid SMILES", "ok"]
    assert result["name"].fillna("").tolist() == ["ethanol", "", "", "benzene"]


@pytest.mark.parametrize(
    "content",
    ["SMILES\n", "SMILES\nC1CC\n", "SMILES\nCC\nC1CC\nC1CC\n"],
    ids=["header alone", "one bad row", "bad end"],
)
def test_pieces_without_a_usable_row_are_answered(tmp_path, fine_tuned, monkeypatch, content):
    monkeypatch.setattr(utils_predict, "PIECE", 1)
    path = tmp_path / "few.csv"
    path.write_text(content)
    result = predict(tmp_path, "--model_name_or_path", fine_tuned / "member-0", "--test_file", path)
    assert len(result) == content.count("\n") - 1 and list(result) == ["SMILES", "prediction", "status"]


def test_a_column_without_any_smiles_is_told(tmp_path, fine_tuned, caplog):
    (tmp_path / "new.csv").write_text("molecule,code\nCPD-0,CCO\nCPD-1,CCN\n")
    model = ("--model_name_or_path", fine_tuned / "member-0", "--test_file", tmp_path / "new.csv")
    assert set(predict(tmp_path, *model)["status"]) == {"invalid SMILES"}
    assert (
        "has a SMILES in column 'molecule'. If another column has the SMILES, name it (--smiles_column)" in caplog.text
    )
    caplog.clear()
    predict(tmp_path, *model, "--smiles_column", "code", output="right")
    assert "has a SMILES" not in caplog.text


def test_columns_keep_their_names(tmp_path, fine_tuned):
    path = tmp_path / "odd.csv"
    path.write_text(",smiles,a b\n0,CC,\n1,,x\n")
    predict(tmp_path, "--model_name_or_path", fine_tuned / "member-0", "--test_file", path)
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()
    assert lines[0] == ",smiles,a b,prediction,status"
    assert lines[1].startswith("0,CC,,") and lines[2] == "1,,x,,invalid SMILES"


@pytest.mark.parametrize(
    "content, statuses",
    [
        ("SMILES\nCC\n\nC1CC\n", ["ok", "invalid SMILES", "invalid SMILES"]),
        ("id\tsmiles\n1\tCC\n\n2\n", ["ok", "invalid SMILES", "invalid SMILES"]),
        ("smiles;id\nCC;1\n", ["ok"]),
    ],
    ids=["one column and a blank line", "tabs, a blank and a short line", "semicolons"],
)
def test_standard_input_takes_what_a_file_may_be(tmp_path, fine_tuned, monkeypatch, capsys, content, statuses):
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    flags = ["--do_predict", "--model_name_or_path", str(fine_tuned / "member-0"), "--test_file", "-"]
    run_regression.main(*parse_arguments(*run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=flags))
    read = pd.read_csv(io.StringIO(capsys.readouterr().out), sep=",")
    assert read["status"].tolist() == statuses


def test_standard_input_is_called_so(tmp_path, fine_tuned, monkeypatch):
    flags = ["--do_predict", "--model_name_or_path", str(fine_tuned / "member-0"), "--test_file", "-"]
    arguments = parse_arguments(*run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=flags)
    for content, message in (("smi,y\nCC,1\n", "has no SMILES column"), ("smiles,a\nCC,1,2\n", "cannot be read from")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(content))
        with pytest.raises(InputError, match=f"Standard input {message}"):
            run_regression.main(*arguments)


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_a_prediction_that_is_broken_off_leaves_no_parts_of_files(tmp_path, fine_tuned, monkeypatch, suffix):
    monkeypatch.setattr(utils_predict, "PIECE", 2)
    (tmp_path / "bad.csv").write_text("smiles,a\nCC,1\nCN,1\nCO,1\nCF,1,2,3\n")
    flags = ["--model_name_or_path", fine_tuned / "member-0", "--test_file", tmp_path / "bad.csv"]
    with pytest.raises(InputError, match="cannot be read after row 1"):
        predict(tmp_path, *flags, "--export_embeddings", tmp_path / f"states.{suffix}")
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / f"states.{suffix}").exists()


def test_standard_input_that_is_no_utf8_is_refused(fine_tuned):
    flags = ["--do_predict", "--model_name_or_path", fine_tuned / "member-0", "--test_file", "-"]
    command = [sys.executable, str(ROOT / "run_regression.py"), *map(str, flags)]
    ran = subprocess.run(command, input=b"SMILES,name\nCC,caf\xe9\n", capture_output=True, check=False)
    assert ran.returncode == 2 and b"Standard input cannot be read" in ran.stderr and b"Traceback" not in ran.stderr


def test_standard_output_is_utf8_in_any_locale(run_script, fine_tuned):
    flags = ["--do_predict", "--model_name_or_path", fine_tuned / "member-0", "--test_file", "-"]
    ran = run_script("run_regression.py", *flags, text="smiles,name\nCC,\u03b2-x\n", PYTHONIOENCODING="latin-1:strict",
                     PYTHONUTF8="0")  # fmt: skip
    assert ran.returncode == 0 and "Traceback" not in ran.stderr, ran.stderr
    assert "\u03b2-x" in ran.stdout


def test_standard_input_is_answered_on_standard_output(run_script, table, fine_tuned, tmp_path):
    flags = ["--do_predict", "--model_name_or_path", fine_tuned / "member-0", "--test_file"]
    ran = run_script("run_regression.py", *flags, table, "--output_dir", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    piped = run_script("run_regression.py", *flags, "-", text=table.read_text())
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == (tmp_path / "out" / "predictions.csv").read_text()
    assert not (tmp_path / "outputs").exists()


def test_two_processes_answer_as_one(run_script, table, fine_tuned, tmp_path):
    flags = ["--do_predict", "--model_name_or_path", fine_tuned / "member-0", "--test_file", table]
    flags += ["--per_device_eval_batch_size", 1, "--use_cpu"]
    ran = run_script("run_regression.py", *flags, "--output_dir", tmp_path / "two", launcher=TWO_PROCESSES)
    assert ran.returncode == 0, ran.stderr
    one = predict(tmp_path, *flags)
    two = pd.read_csv(tmp_path / "two" / "predictions.csv")
    np.testing.assert_allclose(two["prediction"], one["prediction"], atol=1e-5)
    assert two["status"].tolist() == STATUS


def test_members_that_read_different_descriptors_are_refused(tiny_checkpoint):
    models = [
        MolformerForRegression.from_pretrained(tiny_checkpoint, head_descriptors=names)
        for names in (["TPSA", "MolLogP"], ["MolLogP", "TPSA"])
    ]
    training_args = argparse.Namespace(use_cpu=True, bf16=False, fp16=False, per_device_eval_batch_size=2)
    with pytest.raises(InputError, match="read different descriptors"):
        utils_predict.Predictor(models, build_tokenizer(), training_args)


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("processes", [2, 4])
def test_answers_of_several_processes_come_in_the_order_of_the_rows(monkeypatch, fine_tuned, count, processes):
    """Also where a process has no row. Reference: one process. Two forms a row; every third cannot be used."""
    model = MolformerForRegression.from_pretrained(fine_tuned / "member-0")
    training_args = argparse.Namespace(use_cpu=True, bf16=False, fp16=False, per_device_eval_batch_size=2)
    predictor = utils_predict.Predictor([model], build_tokenizer(), training_args)
    reasons = ["invalid" if row % 3 == 1 else None for row in range(count)]
    written = [[] if reason else [[0, 5 + row, 1], [0, 9 + row, 7, 1]] for row, reason in enumerate(reasons)]
    forms = [[{"input_ids": ids} for ids in own] for own in written]
    expected = predictor.predict_forms(forms, reasons, 2, with_states=True)
    parts = {}

    def gather(mine):
        parts[predictor.state.process_index] = mine[0]
        if len(parts) < processes:
            raise InterruptedError  # the others have yet to bring theirs
        return list(parts.values())

    monkeypatch.setattr(utils_predict, "gather_object", gather)
    for rank in range(processes):
        predictor.state = argparse.Namespace(process_index=rank, num_processes=processes)
        share = predictor.share
        with contextlib.suppress(InterruptedError):
            answer = predictor.predict_forms(forms[share], reasons[share], 2, with_states=True)
    assert answer[0] == expected[0] == reasons
    np.testing.assert_allclose(answer[1], expected[1], atol=1e-5)
    np.testing.assert_allclose(answer[2], expected[2], atol=1e-5)
    assert np.isnan(expected[1]).all(axis=(1, 2, 3)).tolist() == [reason is not None for reason in reasons]


WORKERS = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from utils_predict import end_with_parent

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), end_with_parent)
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="asks Linux for the worker")
def test_a_killed_prediction_leaves_no_workers(tmp_path):
    """They would hold its standard output open, and whoever reads that would wait for ever."""
    (tmp_path / "script.py").write_text(WORKERS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"], env=environment, stdout=subprocess.PIPE)
    worker = Path("/proc") / process.stdout.readline().decode().strip() / "cmdline"
    assert worker.read_bytes()
    process.kill()
    process.communicate(timeout=60)  # to the end of its output
    assert not (worker.exists() and worker.read_bytes())  # a process that ended has none


def test_an_ensemble_whose_training_was_interrupted_predicts_nothing(tmp_path, table, fine_tuned):
    shutil.copytree(fine_tuned, tmp_path / "ensemble")
    (tmp_path / "ensemble" / "unfinished").touch()
    with pytest.raises(InputError, match="holds an ensemble whose training was interrupted. Resume it first"):
        predict(tmp_path, "--model_name_or_path", tmp_path / "ensemble", "--test_file", table)


def test_one_label_is_compared_with_one_column(tmp_path, fine_tuned):
    (tmp_path / "two.csv").write_text("smiles,a,b\nCC,1,2\n")
    flags = ("--model_name_or_path", fine_tuned / "member-0", "--test_file", tmp_path / "two.csv")
    with pytest.raises(InputError, match="--label_column names 2 columns, but the model predicts one label"):
        predict(tmp_path, *flags, "--label_column", "a", "b")


def test_embeddings_of_an_ensemble_are_those_of_its_first_member(tmp_path, table, fine_tuned):
    states, folder = [], tmp_path / "ensemble"
    shutil.copytree(fine_tuned, folder)
    model = MolformerForRegression.from_pretrained(folder / "member-1")
    torch.nn.init.normal_(model.molformer.LayerNorm.weight)
    model.save_pretrained(folder / "member-1")
    for name in (".", "member-0", "member-1"):
        path = tmp_path / f"of {name}.parquet"
        predict(
            tmp_path / name, "--model_name_or_path", folder / name, "--test_file", table, "--export_embeddings", path
        )
        states.append(np.stack(pd.read_parquet(path)["embedding"].dropna()))
    np.testing.assert_allclose(states[0], states[1], atol=1e-6)
    assert np.abs(states[1] - states[2]).max() > 1e-3


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_embeddings_are_what_the_head_reads(tmp_path, table, fine_tuned, monkeypatch, suffix):
    """Reference: the head on the embeddings gives the predictions."""
    monkeypatch.setattr(utils_predict, "PIECE", 4)
    model = fine_tuned / "member-0"
    path = tmp_path / f"embeddings.{suffix}"
    result = predict(tmp_path, "--model_name_or_path", model, "--test_file", table, "--export_embeddings", path)
    if suffix == "parquet":
        read = pd.read_parquet(path)
        assert read["row"].tolist() == list(range(9))
        assert (read["embedding"].isna() == (result["status"] != "ok")).all()
        rows, states = read["row"][read["embedding"].notna()], np.stack(read["embedding"].dropna())
    else:
        read = load_file(path)
        rows, states = read["rows"], read["embeddings"]
    loaded = MolformerForRegression.from_pretrained(model).eval()
    with torch.no_grad():
        standardized = loaded.standardized_predictions(torch.tensor(states)).squeeze(1).numpy()
    np.testing.assert_allclose(standardized * 1.5 + 2.0, result["prediction"][rows], atol=1e-5)


def test_a_model_that_learned_another_form_of_smiles_is_given_it(tmp_path, fine_tuned, table):
    folder = tmp_path / "isomeric"
    model = MolformerForRegression.from_pretrained(fine_tuned / "member-0")
    model.config.smiles_form = "isomeric"
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    table.write_text("smiles\nN[C@@H](C)C(=O)O\nN[C@H](C)C(=O)O\n")
    result = predict(tmp_path, "--model_name_or_path", folder, "--test_file", table)
    assert result["prediction"][0] != result["prediction"][1]


@pytest.mark.parametrize(
    "content, flags, named",
    [
        ("smiles,prediction\nCC,1\n", [], "Rename it"),
        ("name,label\nCC,1\n", [], "--smiles_column"),
        ("smiles\nCC\n", ["--smiles_column", "mol"], "'mol' is not in"),
        ("smiles\nCC\n", ["--label_column", "y"], "'y' is not in"),
        ("", [], "is empty"),
        ("smiles,a\nCC,1\nCN,1,2,3\n", [], "cannot be read"),
        ("smiles,a\nCC,1,2\nCN,1,2\n", [], "cannot be read from its first row"),
        ("smiles,smiles\nCC,CN\n", [], "more than one column 'smiles'"),
        ('smiles\tname\nCC\t"a\nCN\tb\nCO\t"c\n', [], "Column 'name' of .* several rows in row 0"),
        ("smiles,y,,\nCC,1,,\n", [], "more than one column ''. Name those that are needed, and remove the others"),
        (b"smiles,name\nCC,caf\xe9\n", [], "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_predicted_is_refused(tmp_path, fine_tuned, content, flags, named):
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=named):
        predict(tmp_path, "--model_name_or_path", fine_tuned / "member-0", "--test_file", path, *flags)
    assert not (tmp_path / "out" / "predictions.csv").exists()
    # what can be seen before the first row is: then the corrected command needs no other folder
    later = ("cannot be read", "several rows")
    assert any(text in named for text in later) or isinstance(content, bytes) or not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_a_header_alone_gives_an_empty_file_of_embeddings(tmp_path, fine_tuned, suffix):
    (tmp_path / "none.csv").write_text("smiles\n")
    path = tmp_path / f"states.{suffix}"
    flags = ["--test_file", tmp_path / "none.csv", "--export_embeddings", path]
    assert not len(predict(tmp_path, "--model_name_or_path", fine_tuned / "member-0", *flags))
    if suffix == "parquet":
        assert list(pd.read_parquet(path)) == ["row", "embedding"]
    else:
        assert load_file(path)["embeddings"].shape == (0, 32)


@pytest.mark.parametrize(
    ("known", "flags", "found"),
    [("logS", [], 1.0), ("logD", [], None), (None, [], 2.0), ("logS", ["--label_column", "value"], 2.0)],
)
def test_the_label_that_was_learned_is_the_one_that_is_compared(tmp_path, fine_tuned, known, flags, found):
    """A model that learned a named column takes no other one for it; one that learned a usual name looks for those."""
    model = MolformerForRegression.from_pretrained(fine_tuned / "member-0")
    model.config.label_column = known
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "new.csv").write_text("smiles,logS,value\nCCO,1,2\nCCN,1,2\n")
    flags = ["--model_name_or_path", tmp_path / "model", "--test_file", tmp_path / "new.csv", *flags]
    predicted = predict(tmp_path, *flags)["prediction"]
    report = json.loads((tmp_path / "out" / "all_results.json").read_text())
    if found is None:
        assert "predict_mse" not in report
    else:
        assert report["predict_mse"] == pytest.approx(((predicted - found) ** 2).mean(), rel=1e-5)


def test_embeddings_that_cannot_be_written_are_refused_at_the_start(tmp_path, fine_tuned, table):
    flags = ["--model_name_or_path", fine_tuned / "member-0", "--test_file", table]
    with pytest.raises(InputError, match="states.parquet cannot be written: there is no folder"):
        predict(tmp_path, *flags, "--export_embeddings", tmp_path / "absent" / "states.parquet")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--max_predict_samples shortens the parts of a split"):
        predict(tmp_path, *flags, "--max_predict_samples", "3")
    predict(tmp_path, *flags, "--export_embeddings", tmp_path / "out" / "states.parquet")  # in the folder that is made
    states = (tmp_path / "out" / "states.parquet").read_bytes()
    again = [*flags, "--export_embeddings", tmp_path / "out" / "states.parquet"]
    with pytest.raises(InputError, match="states.parquet is there already"):
        predict(tmp_path, *again, output="other")
    assert (tmp_path / "out" / "states.parquet").read_bytes() == states and not (tmp_path / "other").exists()
    predict(tmp_path, *again, "--overwrite_output_dir")


def test_a_file_is_compared_by_the_column_that_the_label_has_its_name_from(tmp_path, tiny_checkpoint):
    """In training it was found by itself; another column would be the first choice of the new file."""
    model = MolformerForRegression.from_pretrained(tiny_checkpoint, id2label={0: "logD"}, label2id={"logD": 0})
    model.config.label_mean, model.config.label_std = [0.0], [1.0]
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "new.csv").write_text("smiles,exp,logD\nCCO,100,2\nCCN,100,2\n")
    predicted = predict(tmp_path, "--model_name_or_path", tmp_path / "model", "--test_file", tmp_path / "new.csv")
    report = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert report["predict_mse"] == pytest.approx(((predicted["prediction"] - 2) ** 2).mean(), rel=1e-5)


def test_the_arguments_in_the_folder_are_those_of_its_last_prediction(tmp_path, fine_tuned, table):
    for member in ("member-0", "member-1"):
        flags = ["--model_name_or_path", fine_tuned / member, "--test_file", table, "--overwrite_output_dir"]
        predict(tmp_path, *flags)
        values = json.loads((tmp_path / "out" / "arguments.json").read_text())
        assert values["model_name_or_path"] == str(fine_tuned / member)


def test_a_model_that_learned_longer_molecules_is_asked_for_them_too(tmp_path, fine_tuned, table):
    """One molecule has 302 tokens."""
    model = tmp_path / "model"
    shutil.copytree(fine_tuned / "member-0", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"smiles_max_length": 400}))
    result = predict(tmp_path, "--model_name_or_path", model, "--test_file", table)
    assert result["status"].tolist()[6] == "ok" and result["prediction"].notna()[6]
    flags = ["--max_length", "300", "--overwrite_output_dir"]
    result = predict(tmp_path, "--model_name_or_path", model, "--test_file", table, *flags)
    assert result["status"].tolist()[6] == "too long"


def test_an_unknown_token_is_a_status_of_its_own(tmp_path, fine_tuned):
    path = tmp_path / "rare.csv"
    path.write_text("smiles\n[Og]\nCC\n")
    result = predict(tmp_path, "--model_name_or_path", fine_tuned / "member-0", "--test_file", path)
    assert result["status"].tolist() == ["unknown token", "ok"]


def test_several_labels_are_found_by_their_names(tmp_path, tiny_checkpoint):
    """Reference: the metrics of each column alone."""
    names = ["logD", "logS"]
    model = MolformerForRegression.from_pretrained(tiny_checkpoint, num_labels=2)
    model.config.label_mean, model.config.label_std, model.config.label_names = [2.0, -3.0], [1.0, 2.0], names
    torch.nn.init.normal_(model.classifier.out_proj.weight)
    model.save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "new.csv"
    path.write_text("logS,smiles,logD\n-2,CCO,1\n,CCN,2\n-4,CCC,\n")
    for flags in ([], ["--label_column", "logS", "logD"]):
        result = predict(tmp_path, "--model_name_or_path", tmp_path / "model", "--test_file", path,
                         "--overwrite_output_dir", *flags)  # fmt: skip
        report = json.loads((tmp_path / "out" / "all_results.json").read_text())
        for name in names:
            errors = (result[f"prediction_{name}"] - result[name]).dropna()
            assert report[f"predict_mse_{name}"] == pytest.approx(np.mean(errors**2), abs=1e-9)
    predict(tmp_path, "--model_name_or_path", tmp_path / "model", "--test_file", path, "--overwrite_output_dir",
            "--label_column", "logS")  # fmt: skip
    report = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert "predict_mse_logS" in report and "predict_mse_logD" not in report
    path.write_text("smiles,prediction_logS\nCC,1\n")
    with pytest.raises(InputError, match="'prediction_logS'"):
        predict(tmp_path, "--model_name_or_path", tmp_path / "model", "--test_file", path, "--overwrite_output_dir")


def test_a_checkpoint_without_a_head_is_refused(tmp_path, tiny_checkpoint, table):
    with pytest.raises(InputError, match="no trained regression head"):
        predict(tmp_path, "--model_name_or_path", tiny_checkpoint, "--test_file", table)


def test_the_embeddings_file_needs_a_known_ending(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(*run_regression.ARGUMENTS, args=["--export_embeddings", "states.csv"])
    assert ".parquet or .safetensors" in capsys.readouterr().err


def test_training_takes_no_embeddings_file(tmp_path, tiny_checkpoint):
    flags = [
        "--model_name_or_path",
        tiny_checkpoint,
        "--export_embeddings",
        "a.parquet",
        "--output_dir",
        str(tmp_path),
    ]
    with pytest.raises(InputError, match="--do_predict alone"):
        run_regression.main(*parse_arguments(*run_regression.ARGUMENTS, args=flags))
