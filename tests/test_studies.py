"""studies/ and reproduce_table1.sh: the statistics of the tables, and the chain from runs to a table."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from arguments import InputError, parse_arguments
from modeling_molformer_reg import MolformerForRegression
from trainer_regression import LEARNING_RATES, build_tokenizer


sys.path.insert(0, str(ROOT / "studies"))

import common  # noqa: E402
import influence  # noqa: E402
import influence_lds  # noqa: E402
import paper_tables  # noqa: E402
import peers  # noqa: E402
import peft_comparison  # noqa: E402
import recipes  # noqa: E402
import ship_checkpoint  # noqa: E402
import table1  # noqa: E402


def row(name, mse, seeds=(0, 1, 2), split="random"):
    values = {"test_mse": mse, "test_mae": [0.5] * len(mse), "test_r2": [0.6] * len(mse)}
    return {"name": name, "split": split, "seeds": list(seeds)} | values


def test_paired_interval_is_that_of_the_t_test():
    """Reference: SciPy's paired t test."""
    from scipy import stats

    first, second = [0.41, 0.44, 0.39], [0.48, 0.47, 0.45]
    difference = table1.paired_difference(row("a", first), row("b", second))
    interval = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert difference["mean"] == pytest.approx(np.mean(first) - np.mean(second))
    assert (difference["low"], difference["high"]) == pytest.approx((interval.low, interval.high))
    # only seeds that both have are pairs
    difference = table1.paired_difference(row("a", first), row("b", second, seeds=(1, 2, 9)))
    assert difference["seeds"] == 2 and difference["mean"] == pytest.approx((0.44 - 0.48 + 0.39 - 0.47) / 2)
    assert table1.paired_difference(row("a", first), row("b", second, seeds=(2, 8, 9))) is None


def test_table_stands_beside_the_papers_numbers():
    rows = [
        row("regression", [0.4, 0.5, 0.6]),
        row("mlm_regression", [0.3, 0.5, 0.5]),
        row("regression", [0.7], (0,), "scaffold"),
    ]
    text = table1.markdown(rows, table1.differences(rows))
    assert (
        "| regression | random | 3 | 0.500 ± 0.100 | 0.500 ± 0.000 | 0.600 ± 0.000 | 0.4827, 0.5359, 0.6733 |" in text
    )
    assert "| regression | scaffold | 1 | 0.700 | 0.500 | 0.600 |  |" in text
    assert "| mlm regression − regression | random | -0.067 |" in text


def test_unfinished_cells_are_left_out(tmp_path):
    for seed, names in ((0, ["all_results.json"]), (1, ["all_results.json", "unfinished"]), (2, [])):
        folder = tmp_path / f"from_scratch-random-{seed}"
        folder.mkdir()
        for name in names:
            (folder / name).write_text(json.dumps({"test_mse": 0.9, "test_mae": 0.7, "test_r2": 0.3}))
    (tmp_path / "from_scratch-random-0.command").write_text("python run_regression.py\n# weights\n")
    rows = table1.collect(tmp_path)
    assert [(r["name"], r["seeds"], r["test_mse"], r["command"]) for r in rows] == [
        ("from_scratch", [0], [0.9], "python run_regression.py")
    ]


def test_boosting_beats_the_mean_on_the_split_of_the_regression(tiny_checkpoint, small_table, tmp_path):
    """References: run_regression.py's split of the same seed, and the mean of its training labels."""
    import run_regression

    flags = ["--train_file", small_table, "--seed", "0", "--output_dir"]
    peers.main(*parse_arguments(*peers.ARGUMENTS, defaults=peers.DEFAULTS, args=[*flags, str(tmp_path / "x")]))
    flags += [str(tmp_path / "y"), "--model_name_or_path", tiny_checkpoint, "--max_steps", "1"]
    run_regression.main(*parse_arguments(*run_regression.ARGUMENTS, defaults=run_regression.DEFAULTS, args=flags))
    values, other = (json.loads((tmp_path / run / "all_results.json").read_text()) for run in "xy")
    table, expected = (pd.read_csv(tmp_path / run / "predictions.csv") for run in "xy")
    assert table["split"].tolist() == expected["split"].tolist()
    test = table[table["split"] == "test"]
    assert values["test_mse"] == pytest.approx(np.mean((test["prediction"] - test["label"]) ** 2))
    assert values["test_mse"] < other["test_mse_mean"]


def test_boosting_needs_a_validation_part(small_table, tmp_path):
    flags = ["--train_file", small_table, "--output_dir", str(tmp_path / "x"), "--protocol", "paper"]
    with pytest.raises(InputError, match="no validation part"):
        peers.main(*parse_arguments(*peers.ARGUMENTS, defaults=peers.DEFAULTS, args=flags))


def test_chemprop_that_is_not_there_is_named(small_table, tmp_path):
    flags = ["--train_file", small_table, "--output_dir", str(tmp_path / "x"), "--peer", "chemprop"]
    flags += ["--chemprop", "/no/such/chemprop"]
    with pytest.raises(InputError, match="/no/such/chemprop cannot be run"):
        peers.main(*parse_arguments(*peers.ARGUMENTS, defaults=peers.DEFAULTS, args=flags))


@pytest.mark.slow
def test_chain_of_table_1_trains_every_row_once_and_writes_the_table(tiny_checkpoint, small_table, tmp_path):
    extra = f"--train_file {small_table} --max_steps 2"
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "RESULTS": str(tmp_path), "EXTRA": extra}
    environment |= {"SEEDS": "0", "SPLITS": "random", "ROWS": "regression mlm_regression ensemble descriptor_boosting",
        "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = ["sh", str(ROOT / "reproduce_table1.sh"), tiny_checkpoint]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "table1.json").read_text())
    names = [r["name"] for r in report["rows"]]
    assert names == [
        "regression",
        "mlm_regression",
        "best_recipe",
        "ensemble",
        "fingerprint_ridge",
        "descriptor_boosting",
    ]
    assert all(len(r["test_mse"]) == 1 and r["command"].startswith("python ") for r in report["rows"])
    assert (tmp_path / "table1.png").stat().st_size > 10_000 and "| ensemble | random | 1 |" in done.stdout
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.startswith("| row |")  # nothing was trained again
    # another recipe or other weights are another cell
    environment["EXTRA"] += " --weight_decay 0.01"
    other = subprocess.run(command, cwd=ROOT, env=environment | {"ROWS": "regression"}, capture_output=True, text=True)
    assert other.returncode == 0 and "regression-random-0" in other.stdout.splitlines()[0]


def test_chain_of_table_1_reports_what_failed_and_still_writes_the_table(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "RESULTS": str(tmp_path), "SEEDS": "0",
        "SPLITS": "random", "ROWS": "no_such_row", "PYTHON": sys.executable}  # fmt: skip
    folder = tmp_path / "out" / "from_scratch-random-3"
    folder.mkdir(parents=True)
    (folder / "all_results.json").write_text(json.dumps({"test_mse": 0.9, "test_mae": 0.7, "test_r2": 0.3}))
    command = ["sh", str(ROOT / "reproduce_table1.sh")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "There is no row no_such_row" in done.stdout
    assert json.loads((tmp_path / "table1.json").read_text())["rows"][0]["test_mse"] == [0.9]


def test_half_the_digits_are_stored_and_loaded_as_float32(tiny_checkpoint, tmp_path):
    """Reference: the same weights rounded to float16."""
    import torch
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(tiny_checkpoint)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    ship_checkpoint.store_half(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * size
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    for name, tensor in loaded.named_parameters():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, model.get_parameter(name).half().float(), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------------- the whole paper


def finished(folder, name, values, command="python x.py"):
    (folder / name).mkdir(parents=True)
    (folder / name / "all_results.json").write_text(json.dumps(values))
    (folder / f"{name}.command").write_text(f"{command} --output_dir {name}\n")


def test_the_papers_tables_stand_beside_ours(tmp_path):
    """Reference: intervals worked by hand (Student's t of two values: 12.706 times the standard error)."""
    for seed, mse in enumerate((0.4, 0.5)):
        finished(tmp_path, f"regression-{seed}", {"test_mse": mse, "test_mae": 0.5, "test_r2": 0.7})
        finished(tmp_path, f"lora-{seed}", {"test_mse": mse, "final_train_mse": 0.1})
        selected = {"eval_losses": [0.9, mse]}
        finished(tmp_path, f"influence-{seed}", {"results": {"none": {}, "selected": selected}})
    finished(tmp_path, "bitfit-0", {"test_mse": 9.0})
    (tmp_path / "bitfit-0" / "unfinished").touch()
    rows = paper_tables.rows_of(paper_tables.collect(tmp_path))
    assert [row["name"] for row in rows] == ["regression", "epoch 1", "epoch 2", "lora"]
    mean, half = rows[0]["intervals"]["test_mse"]
    assert mean == pytest.approx(0.45) and half == pytest.approx(12.706 * 0.05, rel=1e-3)
    text = paper_tables.to_markdown(rows)
    assert "| regression | 2 | 0.450 ± 0.635 | 0.500 ± 0.000 | 0.700 ± 0.000 | 0.4827 | 0.5359 | 0.6733 |" in text
    assert "| epoch 2 | 2 | 0.450 ± 0.635 | 0.318 |" in text
    assert "- table 1: `python x.py --output_dir regression-0`" in text


RUN_ONCE = """
PYTHON=sh OUT=out; . {root}/studies/run_once.sh
run out/a-0 {script} --train_file data.csv
"""


def test_a_finished_run_is_repeated_only_if_a_file_of_it_changed(tmp_path):
    """A script that counts its calls stands in for one that trains."""
    script = tmp_path / "count.sh"
    script.write_text('echo call >> calls; mkdir -p out/a-0; echo "{}" > out/a-0/all_results.json\n')
    (tmp_path / "data.csv").write_text("one")

    def calls():
        subprocess.run(["sh", "-c", RUN_ONCE.format(root=ROOT, script=script)], cwd=tmp_path, check=True)
        return (tmp_path / "calls").read_text().count("call")

    assert [calls(), calls()] == [1, 1]
    (tmp_path / "data.csv").write_text("two")
    assert [calls(), calls()] == [2, 2]


@pytest.mark.slow
def test_the_quick_form_of_the_paper_ends_in_its_tables(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(ROOT / "reproduce_paper.sh"), "--quick"], env=environment, check=True, timeout=1200)
    text = (tmp_path / "out" / "paper_tables.md").read_text()
    for title in ("Table 1", "Table 2", "Appendix"):
        assert title in text
    before = {path: path.stat().st_mtime for path in (tmp_path / "out").glob("*/all_results.json")}
    subprocess.run([str(ROOT / "reproduce_paper.sh"), "--quick"], env=environment, check=True, timeout=120)
    assert before == {path: path.stat().st_mtime for path in (tmp_path / "out").glob("*/all_results.json")}


def influence_run(seed, errors, split="random", pool="corrupted", leakage=False):
    aucs = {"auc_influence": 0.8, "auc_gradient_dot": 0.6, "auc_loss": 0.9}
    results = {name: {"test_mse": error} for name, error in errors.items()}
    return {
        "pool": pool, "split": split, "seed": seed, "leakage": leakage,
        "results": results, "influence": aucs if pool == "corrupted" else {},
    }  # fmt: skip


def test_the_influence_study_pairs_by_seed_and_keeps_the_leak_apart(tmp_path):
    runs = [influence_run(seed, {"selected": 0.4 + seed / 100, "random": 0.5 + seed / 50}) for seed in (0, 1, 2)]
    runs += [influence_run(0, {"selected": 0.1, "none": 0.5}, leakage=True)]
    runs += [influence_run(0, {"selected": 0.6}, pool="external", split="scaffold")]
    rows = {(row["pool"], row["name"]): row for row in influence.summarize(runs)}
    assert rows["corrupted", "selected"]["test_mse"] == pytest.approx({0: 0.4, 1: 0.41, 2: 0.42})
    assert rows["corrupted", "leakage"]["test_mse"] == {0: 0.1}
    assert ("corrupted", "none") not in rows  # that of the leaking run is not mixed in
    mean, half = rows["corrupted", "random"]["selected_minus_this"]
    assert mean == pytest.approx(-0.11) and half == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-3)
    detected = influence.detection_rows(runs)
    means = {row["score"]: row["mean"] for row in detected[:3]}
    assert means == pytest.approx({"influence": 0.8, "gradient_dot": 0.6, "loss": 0.9})
    text = influence.to_markdown(list(rows.values()), detected)
    assert "| corrupted | random | random-k | 3 | 0.520 ± 0.050 | -0.110 ± 0.025 |" in text
    influence.plot(list(rows.values()), tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_the_upper_part_answers_as_the_whole_model(tiny_checkpoint):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = MolformerForRegression.from_pretrained(tiny_checkpoint).eval()
    molecules = pd.DataFrame({"input_ids": tokenizer(["CCO", "c1ccccc1N", "C"])["input_ids"]})
    molecules["length"] = molecules["input_ids"].map(len)
    states = influence_lds.add_states(model, tokenizer, molecules)
    answers = influence_lds.upper_part(model).eval()(**influence_lds.pad_states(states)).logits
    batch = tokenizer.pad({"input_ids": molecules["input_ids"].tolist()}, return_tensors="pt")
    assert torch.allclose(answers, model(**batch).logits, atol=1e-5)


def test_the_datamodeling_score_is_a_rank_correlation_with_its_interval():
    measured = np.random.default_rng(0).normal(size=60)
    assert influence_lds.correlation(measured**3, measured)["lds"] == pytest.approx(1.0)
    noisy = influence_lds.correlation(measured + np.random.default_rng(1).normal(size=60), measured)
    assert noisy["low"] < noisy["lds"] < noisy["high"] < 1


def test_a_cell_that_fails_is_left_out_of_a_study(capsys):
    def run(cell, threads):
        subprocess.run([sys.executable, "-c", f"raise SystemExit({cell})"], check=True)
        return cell

    assert common.run_all(run, [0, 3, 0], jobs=2) == [0, 0]
    assert "Failed, and left out" in capsys.readouterr().out


def peft_run(method, seed, test_mse, name=None, split="random", trained=100, **values):
    numbers = dict.fromkeys(peft_comparison.NUMBERS, 1.0) | {"base_parameters": 10_000, "test_mse": test_mse}
    numbers |= {"trainable_parameters_without_head": trained, "eval_mse": test_mse, **values}
    return {"method": method, "name": name or method, "split": split, "seed": seed, **numbers}


def test_the_winner_trains_few_parameters_and_is_chosen_on_validation():
    runs = [peft_run("full", 0, 0.1, trained=9000), peft_run("head", 0, 0.1, trained=0)]
    runs += [peft_run("lora", 0, 0.2, trained=300), peft_run("ia3", 0, 0.5, eval_mse=0.3)]
    runs += [peft_run("bitfit", 0, 0.4), peft_run("bitfit", 0, 0.01, name="paper-bitfit")]
    runs += [peft_run("vera", 0, 0.01, split="scaffold"), peft_run("vera", 9, 0.01)]
    assert peft_comparison.winner_of(runs, [0]) == "ia3"
    with pytest.raises(SystemExit, match="None of the methods"):
        peft_comparison.winner_of(runs[:3], [0])


def test_methods_are_compared_with_full_fine_tuning_of_the_same_seed():
    runs = [peft_run("full", 0, 0.4), peft_run("full", 1, 0.5), peft_run("lora", 0, 0.42), peft_run("lora", 1, 0.55)]
    runs += [peft_run("lora", 0, 0.8, name="paper-lora"), peft_run("lora", 0, 0.6, split="scaffold")]
    rows = {(row["name"], row["split"]): row for row in peft_comparison.summarize(runs)}
    lora = rows["lora", "random"]
    assert lora["of_full"] == pytest.approx((0.42 / 0.4 + 0.55 / 0.5) / 2)
    assert lora["minus_full"] == pytest.approx(0.035) and lora["paper_test_mse"] == 0.7456
    assert "of_full" not in rows["full", "random"] and rows["lora", "scaffold"]["paper_test_mse"] is None
    text = peft_comparison.to_markdown(list(rows.values()))
    assert "| lora, rate 1e-4 | random | 1 | 0.800 |" in text and "0.7456, 0.778" in text


def test_the_best_rate_is_that_of_the_lowest_mean_validation_error():
    errors = {1e-4: (0.5, 0.5), 3e-4: (0.3, 0.5), 9e-4: (0.45, 0.4)}
    runs = [
        peft_run("full", seed, 0.0, name=f"tune-full-{rate:g}", eval_mse=values[seed])
        for rate, values in errors.items()
        for seed in (0, 1)
    ]
    tuned = peft_comparison.best_rates(runs)
    assert tuned == {"full": {"learning_rate": 3e-4, "validation_mse": pytest.approx(0.4), "at_edge": False}}


def test_every_method_is_tuned_with_as_many_rates():
    assert peft_comparison.RATES.keys() == peft_comparison.METHODS.keys()
    assert {len(rates) for rates in peft_comparison.RATES.values()} == {3}
    assert peft_comparison.METHODS["full"].learning_rate == LEARNING_RATES["default"]
    report = ROOT / "results" / "peft_tuning.json"
    if report.exists():  # then the defaults are what was found
        for method, found in json.loads(report.read_text())["tuned"].items():
            assert peft_comparison.METHODS[method].learning_rate == found["learning_rate"], method


def test_recipes_are_compared_with_the_reference_of_the_same_seed():
    errors = {"reference": (0.40, 0.50), "bf16": (0.41, 0.51), "15 epochs": (0.35, 0.47)}
    runs = [
        {"name": name, "seed": seed, "validation_mse": value, "minutes": 2.0, "command": "python x.py"}
        for name, values in errors.items()
        for seed, value in enumerate(values)
    ]
    rows = recipes.summarize(runs)
    assert [row["name"] for row in rows] == ["15 epochs", "reference", "bf16"]
    assert rows[0]["minus_reference"][0] == pytest.approx(-0.04) and "minus_reference" not in rows[1]
    assert "| bf16 | 2 | 0.460 | +0.010 ± 0.000 | 2.0 |" in recipes.to_markdown(rows)
