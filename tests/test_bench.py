"""bench.py: its batches, its ratios, and that every case runs.

python -m pytest tests/test_bench.py -m "slow or not slow"
"""

import json

import pytest

import bench


def test_batches_have_the_lengths_of_the_data():
    """Both kinds have about the mean length of the data; the grouped ones have less padding."""
    lengths = bench.real_lengths()
    mean = sum(lengths) / len(lengths)
    padding = []
    for grouped in (True, False):
        batches = bench.choose_batches(lengths, 8, grouped)
        assert [len(rows) for rows in batches] == [bench.BATCH] * 8
        assert sum(map(sum, batches)) / (8 * bench.BATCH) == pytest.approx(mean, rel=0.1)
        padding.append(1 - sum(map(sum, batches)) / sum(max(rows) * len(rows) for rows in batches))
    assert padding[0] < 0.1 < padding[1]


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


@pytest.mark.slow
def test_every_case_runs(run_script, tmp_path):
    flags = ["--sizes", "mini", "--rounds", "1", "--methods", "head", "--output", tmp_path / "bench.json"]
    ran = run_script("bench.py", *flags, timeout=900)
    assert ran.returncode == 0, ran.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert all(row["tokens_per_second"] > 0 for row in report["rows"] + report["lengths"])
    assert all("peak_memory_bytes" in row for row in report["rows"] if not row["case"].startswith("products"))
    assert {"training, fp32", "GGN product of a batch"} <= {ratio["case"] for ratio in report["ratios"]}
    assert (tmp_path / "bench.md").exists() and (tmp_path / "bench.png").exists()
