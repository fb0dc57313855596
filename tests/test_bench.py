"""bench.py: its batches, its ratios, and that every case runs.

python -m pytest tests/test_bench.py -m "slow or not slow"
"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import bench
import run_peft
from modeling_molformer_reg import MolformerConfig, MolformerForRegression
from trainer_regression import peak_memory


@pytest.fixture(scope="module")
def lengths():
    return bench.real_lengths()


@pytest.mark.parametrize("count", bench.BATCHES.values())
@pytest.mark.parametrize("kind", ["grouped", "shuffled", "sorted"])
def test_batches_have_the_lengths_and_the_padding_of_the_data(lengths, kind, count):
    """Reference: the whole epoch."""
    batches, epoch = (bench.choose_batches(lengths, number, 16, kind) for number in (count, len(lengths) // 16))
    assert [len(rows) for rows in batches] == [16] * count
    assert bench.real_share(batches) == pytest.approx(bench.real_share(epoch), abs=0.01)
    assert sum(map(sum, batches)) / (16 * count) == pytest.approx(sum(lengths) / len(lengths), rel=0.02)
    # a third of random batches is padding, 3 % of those of like length: the README says so
    expected = {"shuffled": 0.656, "grouped": 0.968, "sorted": 0.995}[kind]
    assert bench.real_share(epoch) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("training", [False, True])
def test_the_bound_does_the_products_of_the_model_on_real_tokens(monkeypatch, training, pooling):
    """Reference: PyTorch's count for a model on molecules without padding."""
    small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
    monkeypatch.setitem(bench.SIZES, "small", small | {"redraw_features": False, "pooling": pooling})
    model = MolformerForRegression(MolformerConfig(**bench.SIZES["small"])).requires_grad_(True)
    batch = bench.make_batch([30] * 16)

    def count(step):
        with FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops()

    step = (lambda: model(**batch).loss.backward()) if training else (lambda: model(**batch))
    if not training:
        model.requires_grad_(False)
    bound = count(bench.products("small", [[30] * 16], False, training))
    assert bound == pytest.approx(count(step), rel=0.03)
    assert count(bench.products("small", [[30] * 15 + [60]], False, training)) > bound  # real tokens count
    assert bound == count(bench.products("small", [[20] * 8 + [40] * 8], False, training))  # padding does not


def test_a_corpus_can_be_read():
    found = bench.read_corpus(500)
    assert found["molecules"] == 500 and 0 < found["seconds"] < 300 and found["peak_memory_bytes"] > 1e8


def test_prediction_is_not_timed_in_training_mode(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "small", {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1})
    model = bench.build(MolformerForRegression, "small")
    step = bench.predict_step(model, [[10, 12]], False)
    bench.train_step(model, [bench.make_batch([10, 12])])()
    assert model.training
    step()
    assert not model.training


def test_the_published_way_takes_one_qr_a_layer(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "small", {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3})
    model = bench.build(MolformerForRegression, "small", redraw_features=False)
    qr, calls = torch.linalg.qr, []
    monkeypatch.setattr(torch.linalg, "qr", lambda *args: calls.append(1) or qr(*args))
    bench.eval_step(model, [bench.make_batch([10, 12])] * 2, before=bench.redraw_as_published)()
    assert len(calls) == 2 * 3
    bench.published_predict_step(model, [[10, 12], [5, 6]])()
    assert len(calls) == 4 * 3


def test_peak_memory_is_that_of_the_process_itself():
    """Not what the parent held when it started the child, as getrusage has it on Linux."""
    block = torch.ones(300_000_000)  # 1.2 GB
    code = "from trainer_regression import peak_memory; print(peak_memory())"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1e8 < int(child.stdout) < 1e9 < peak_memory()
    del block


def test_peak_memory_is_known_where_the_system_does_not_list_it(monkeypatch):
    """As in some sandboxes."""
    monkeypatch.setattr("trainer_regression.Path.read_text", lambda path: "VmSize:  1 kB")
    assert peak_memory() > 1e7


def test_shares_and_ratios_are_of_real_tokens():
    """Reference: worked by hand."""
    cases = {
        "products alone, training, fp32": bench.Case(None, [[10, 10]]),
        "training, fp32": bench.Case(None, [[10, 10]], "products alone, training, fp32"),
        "training, the published way": bench.Case(None, [[20, 20]]),
    }
    seconds = {"products alone, training, fp32": [1.0, 1.0, 9.0], "training, fp32": [2.0] * 3}
    rows = bench.rows_of("mini", cases, seconds | {"training, the published way": [8.0] * 3})
    assert rows[1]["share_of_bound"] == 0.5 and rows[1]["tokens_per_second"] == 10
    assert rows[1]["molecules_per_second"] == 1
    (found,) = bench.ratios(rows)
    assert (found["against"], found["ratio"]) == ("training, the published way", 2.0)


def test_memory_is_measured_anew_and_times_stay(tmp_path, monkeypatch):
    cases = {name: bench.Case(None, [[10]]) for name in ("nothing", "lora, training, fp32", "full, training, fp32")}
    rows = bench.rows_of("xl", cases, {name: [2.0] for name in cases}, dict.fromkeys(cases, 5e9))
    rows += bench.rows_of("xl", {"products": bench.Case(None, [[10]])}, {"products": [1.0]})
    report = {"rows": rows, "ratios": [], "lengths": [], "compilation": {}, "command": "bench.py", "machine": {}}
    report |= {"batch_size": 8, "predict_batch_size": 32}  # of the report, not the defaults
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    found = {"nothing": 1e9, "lora, training, fp32": 2e9, "full, training, fp32": 3e9}
    monkeypatch.setattr(bench, "peak_of", lambda size, name, args, _: found[name] * args.batch_size / 8)
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only_memory", "--output", str(path)])
    bench.main()
    after = json.loads(path.read_text())
    assert [row.get("peak_memory_bytes") for row in after["rows"]] == [1e9, 2e9, 3e9, None]
    assert [row["seconds"] for row in after["rows"]] == [2.0, 2.0, 2.0, 1.0] and after["command"] == "bench.py"
    assert after["ratios"][-1]["memory"] == 0.5 and "--only_memory" in after["memory"]["command"]
    assert "2.00 GB" in path.with_suffix(".md").read_text()


def test_memory_is_compared_without_that_of_the_libraries():
    """Reference: worked by hand, 5 GB of the libraries in both."""
    cases = {name: bench.Case(None, [[10]]) for name in ("nothing", "lora, training, fp32", "full, training, fp32")}
    memory = {"nothing": 5e9, "lora, training, fp32": 6e9, "full, training, fp32": 7e9}
    rows = bench.rows_of("xl", cases, {name: [1.0] for name in cases}, memory)
    assert [ratio["memory"] for ratio in bench.ratios(rows)] == [0.5]


def test_the_tables_have_the_sizes_side_by_side():
    """Reference: worked by hand; times the published way are of real tokens, memory that beyond the libraries."""
    names = {"nothing": [], "training, fp32": [[10, 10]], "training, the published way": [[10, 20]]}
    cases = {name: bench.Case(None, lengths) for name, lengths in names.items()}
    cases |= {f"{method}, training, fp32": bench.Case(None, [[10] * 4]) for method in ("full", "lora")}
    rows, lengths = [], []
    for size, scale in (("mini", 1), ("xl", 10)):
        seconds = dict(zip(cases, ([scale], [scale], [3 * scale], [4 * scale], [2 * scale]), strict=True))
        memory = dict(zip(cases, (1e9, 2e9, 2e9, 3e9, 2e9), strict=True))
        rows += bench.rows_of(size, cases, seconds, memory)
        of_length = {f"MoLFormer, {length} tokens": bench.Case(None, [[length]]) for length in bench.LENGTHS}
        lengths += bench.rows_of(size, of_length, {name: [scale] for name in of_length})
    report = {"rows": rows, "ratios": bench.ratios(rows), "lengths": lengths, "compilation": {}}
    lines = bench.to_markdown(report).splitlines()
    assert "| training, fp32 | 2.0 |  | 2.00 | 2.00 GB | 0.2 |  | 2.00 | 2.00 GB |" in lines
    assert "| lora | 250 ms | 2.00 | 2.00 GB | 0.50 | 5,000 ms | 2.00 | 2.00 GB | 0.50 |" in lines
    assert "| MoLFormer, xl | 3 | 6 | 13 | 26 | 51 | 102 |" in lines


@pytest.mark.parametrize("method", run_peft.METHODS)
def test_a_step_of_every_method_can_be_timed(monkeypatch, method):
    monkeypatch.setitem(bench.SIZES, "small", {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1})
    model = bench.peft_model("small", method)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = []
    trained[-1].register_hook(lambda gradient: gradients.append(gradient.shape))
    bench.train_step(model, [bench.make_batch([10, 12])])()
    assert len(trained) > 0 and gradients == [trained[-1].shape]


def test_what_a_child_says_of_its_error_is_not_lost():
    with pytest.raises(SystemExit, match="no such thing"):
        bench.child(["-c", "raise SystemExit('no such thing')"])


@pytest.mark.parametrize(
    ("flags", "whole"),
    [("--corpus", True), ("", False), ("--corpus --methods head", False), ("--corpus --rounds 3", False),
     ("--corpus --batch_size 8", False), ("--corpus --no-memory", False), ("--corpus --sizes mini", False)],
)  # fmt: skip
def test_a_part_does_not_overwrite_the_results(flags, whole):
    parser = bench.make_parser()
    assert bool(bench.is_whole(parser.parse_args(flags.split()), parser)) is whole


@pytest.mark.slow
def test_every_case_runs(run_script, tmp_path):
    flags = ["--sizes", "mini", "--rounds", "1", "--methods", "head", "--output", tmp_path / "bench.json"]
    ran = run_script("bench.py", *flags, timeout=1800)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert all(row["tokens_per_second"] > 0 for row in report["rows"] + report["lengths"])
    assert all("peak_memory_bytes" in row for row in report["rows"] if not row["case"].startswith("products"))
    assert all(speed > 0 for speed in (report["processes"] | report["predicted_files"] | report["start_up"]).values())
    assert {"training, fp32", "GGN product of a batch"} <= {ratio["case"] for ratio in report["ratios"]}
    assert (tmp_path / "bench.md").exists() and (tmp_path / "bench.png").exists()
