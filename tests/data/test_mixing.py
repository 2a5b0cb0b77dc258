"""The SPIN authors' data mix, against a recording of their function, and the window of iterations."""

import json
from pathlib import Path

import pytest

from spin.data.mixing import history_window, mix_datasets
from spin.errors import ConfigError

ORACLES = json.loads((Path(__file__).parents[1] / "oracles" / "spin_oracles.json").read_text())
ORACLE = ORACLES["uclaml_mix_datasets"]


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: "+".join(case["mixer"]))
def test_recorded_mixes(case):
    train = {name: ORACLE["store"][f"{name}/train"] for name in case["mixer"]}
    test = {name: ORACLE["store"][f"{name}/test"] for name in case["mixer"]}
    assert mix_datasets(train, case["mixer"]) == case["train_unshuffled"]
    assert mix_datasets(train, case["mixer"], seed=42) == case["train_seed42"]
    assert mix_datasets(test, dict.fromkeys(case["mixer"], 1.0)) == case["test_unshuffled"]


def test_fractions_out_of_range_and_unknown_names():
    with pytest.raises(ConfigError) as caught:
        mix_datasets({"a": [1]}, {"a": -0.1})
    assert str(caught.value) == ORACLE["negative_fraction_error"]
    with pytest.raises(ConfigError, match="No data set is named 'b'; found a"):
        mix_datasets({"a": [1]}, {"b": 1.0})
    assert mix_datasets({"a": [1, 2]}, {"a": 3.0}) == [1, 2]
    assert mix_datasets({"a": [1, 2]}, {"a": 0.4}) == []


def test_history_window():
    assert [history_window(iteration, 1) for iteration in range(3)] == [[0], [0, 1], [1, 2]]
    assert history_window(3, 0) == [3]
    assert history_window(3, 9) == [0, 1, 2, 3]
    for numbers in ((-1, 0), (0, -1)):
        with pytest.raises(ConfigError, match="expected 0 or more"):
            history_window(*numbers)
