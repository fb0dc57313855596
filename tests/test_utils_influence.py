"""utils_influence.py: what is selected, what the controls take, what is found, and the files that say so."""

import numpy as np
import pandas as pd
import pytest

from run_influence import InfluenceArguments
from utils_influence import (
    PAPER_LOSSES,
    detection,
    losses_table,
    results_table,
    select_control,
    select_molecules,
    take_pool,
    write_scores,
)


@pytest.fixture
def table():
    """Six scored molecules; of the two of equal score the earlier one goes first."""
    return pd.DataFrame(
        {
            "row": [10, 11, 12, 13, 14, 15],
            "smiles": list("CNOSFP"),
            "label": 0.0,
            "prediction": 0.0,
            "score": [0.5, -2.0, 3.0, 0.5, 0.0, -0.1],
            "loss": [1.0, 9.0, 4.0, 0.1, 2.0, 0.2],
            "gradient_dot": [-1.0, 5.0, 1.0, 2.0, 3.0, 0.0],
            "rank": [2, 6, 1, 3, 4, 5],
        }
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"select": "top_k", "num_selected": 2}, [0, 2]),
        ({"select": "top_k"}, [0, 2, 3]),
        ({"select": "positive"}, [0, 2, 3]),
        ({"select": "threshold", "threshold": 0.5}, [2]),
        ({"select": "threshold", "threshold": -0.5}, [0, 2, 3, 4, 5]),
        ({"select": "fraction", "fraction": 0.34}, [0, 2]),
        ({"select": "fraction", "fraction": 0.0}, []),
    ],
)
def test_molecules_are_selected_by_score(table, values, expected):
    assert np.flatnonzero(select_molecules(table, InfluenceArguments(**values))).tolist() == expected


def test_controls_take_as_many_and_those_of_their_name(table):
    table["selected"] = [True, False, True, False, False, False]
    expected = {
        "selected": [0, 2],
        "none": [],
        "all": [0, 1, 2, 3, 4, 5],
        "bottom": [1, 5],
        "smallest_loss": [3, 5],
        "gradient_dot": [1, 4],
    }
    for name, rows in expected.items():
        assert np.flatnonzero(select_control(name, table, 0)).tolist() == rows, name
    drawn = {tuple(np.flatnonzero(select_control("random", table, seed))) for seed in range(30)}
    assert all(len(rows) == 2 for rows in drawn) and len(drawn) > 5
    assert (select_control("random", table, 7) == select_control("random", table, 7)).all()


def test_wrong_labels_are_found_by_low_scores_and_high_losses(table):
    assert detection(table) == {}
    table["corrupted"] = table["score"] < 0
    assert detection(table)["auc_influence"] == 1.0
    table["corrupted"] = table["loss"] > 3
    assert detection(table)["auc_loss"] == 1.0
    table["corrupted"] = table["gradient_dot"] > 2.5
    assert detection(table)["auc_gradient_dot"] == 0.0
    table["corrupted"] = True
    assert detection(table) == {}


def test_the_pool_has_the_labels_of_others_where_it_says_so():
    """Reference: the labels before."""
    generator = np.random.default_rng(0)
    molecules = pd.DataFrame({"group": [f"m{i // 2}" for i in range(200)], "label": generator.normal(size=200)})
    molecules["split"] = ["train"] * 160 + ["test"] * 40
    rest, pool = take_pool(molecules, 60, 0.3, seed=1)
    assert len(rest) + len(pool) == 200 and abs(len(pool) - 60) <= 1
    assert not set(rest["group"]) & set(pool["group"])  # stereo twins stay together
    assert (rest["split"] == "test").sum() == 40
    before = molecules.reset_index().merge(pool[["group"]].drop_duplicates(), on="group")["label"].to_numpy()
    assert sorted(pool["label"]) == sorted(before)  # permuted, not invented
    assert (pool["corrupted"].to_numpy() == (pool["label"].to_numpy() != before)).all()
    assert pool["corrupted"].sum() == round(0.3 * len(pool))


def test_left_out_molecules_keep_their_reason_and_ranks_are_whole_numbers(table, tmp_path):
    table["selected"] = table["rank"] <= 2
    excluded = pd.DataFrame({"row": [3], "smiles": ["CC"], "reason": ["is a test molecule"]})
    write_scores(tmp_path, table, excluded)
    lines = (tmp_path / "influence_scores.csv").read_text().splitlines()
    assert lines[0] == "row,SMILES,label,prediction,loss,score,rank,gradient_dot,selected,excluded"
    assert lines[1] == "10,C,0.0,0.0,1.0,0.5,2,-1.0,True,"
    assert lines[-1] == "3,CC,,,,,,,False,is a test molecule"


def test_tables_show_the_papers_losses_and_say_where_the_test_set_has_chosen():
    lines = losses_table([0.5, 0.25]).splitlines()
    assert lines[2].split()[1:] == ["0.500", "0.250"]
    assert [float(text) for text in lines[3].split()[1:]] == list(PAPER_LOSSES)
    results = {"none": {"added": 0, "validation_mse": 0.5, "test_mse": 0.25}}
    assert results_table(results).splitlines()[1].split() == ["none", "0", "0.5000", "0.2500"]
    assert "optimistic" in results_table(results, leakage=True).splitlines()[0]
