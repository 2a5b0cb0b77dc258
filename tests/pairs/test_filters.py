"""Which answers are learned from: policies, what is counted, what leaves nothing."""

from collections import Counter

import pytest

from spin.core.errors import ConfigError, StoreError
from spin.data import Pair, Response
from spin.pairs.filters import filter_pairs

STOP = 9


def example_pairs():
    return [
        Pair("fine", 0, [1], [2, STOP], [Response([3, STOP], "stop")]),
        Pair("cut", 0, [1], [2, STOP], [Response([3, 3], "length"), Response([4, STOP], "stop")]),
        Pair("equal", 0, [1], [2, STOP], [Response([2, STOP], "stop")]),
        Pair("empty", 0, [1], [2, STOP], [Response([STOP], "stop")]),
        Pair("nothing", 0, [1], [2, STOP], [Response([], "stop")]),
    ]


@pytest.mark.parametrize(
    ("policies", "kept"),
    [
        ({"empty": "keep"}, {"fine": 1, "cut": 2, "equal": 1, "empty": 1}),
        ({}, {"fine": 1, "cut": 2, "equal": 1}),
        ({"truncated": "drop"}, {"fine": 1, "cut": 1, "equal": 1}),
        ({"truncated": "mask", "equal_to_real": "drop"}, {"fine": 1, "cut": 2}),
    ],
)
def test_policies(policies, kept):
    counts = Counter()
    pairs = list(filter_pairs(example_pairs(), counts, **policies))
    assert {pair.sample_id: len(pair.generated) for pair in pairs} == kept
    expected = {"responses": 6, "truncated": 1, "equal_to_real": 1, "empty": 2}
    assert {name: counts[name] for name in expected} == expected
    assert counts["dropped"] == 6 - sum(kept.values())
    assert counts["dropped_pairs"] == 5 - len(kept)


def test_all_pairs_dropped_is_an_error():
    with pytest.raises(StoreError, match="No pair is left of 1"):
        list(filter_pairs(example_pairs()[3:4], Counter()))


def test_unknown_policy():
    with pytest.raises(ConfigError, match="truncated"):
        list(filter_pairs([], Counter(), truncated="cut"))
