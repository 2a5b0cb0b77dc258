"""Which responses are learned from: policies, what is counted, what leaves nothing."""

import pytest

from spin.core.errors import StoreError
from spin.data import Pair, Response
from spin.pairs.filters import FilteredPairs

STOP = 9
PAIRS = [
    Pair(name, 0, [1], [2, STOP], [Response(ids, "stop" if STOP in ids or not ids else "length") for ids in generated])
    for name, generated in {
        "fine": [[3, STOP]],
        "truncated": [[3, 3], [4, STOP]],
        "equal": [[2, STOP]],
        "empty": [[STOP]],
        "nothing": [[]],
    }.items()
]


@pytest.mark.parametrize(
    ("policies", "kept"),
    [
        ({"empty": "keep"}, {"fine": 1, "truncated": 2, "equal": 1, "empty": 1}),
        ({}, {"fine": 1, "truncated": 2, "equal": 1}),
        ({"truncated": "drop"}, {"fine": 1, "truncated": 1, "equal": 1}),
        ({"truncated": "mask", "equal_to_real": "drop"}, {"fine": 1, "truncated": 2}),
    ],
)
def test_policies(policies, kept):
    pairs = FilteredPairs(PAIRS, **policies)
    for _ in range(2):  # counted afresh when visited again
        assert {pair.sample_id: len(pair.generated) for pair in pairs} == kept
        dropped = {"dropped": 6 - sum(kept.values()), "dropped_pairs": 5 - len(kept)}
        assert pairs.counts == {"responses": 6, "truncated": 1, "equal_to_real": 1, "empty": 2} | dropped


def test_verdicts_drop_what_has_no_weight():
    """Of two right, one wrong and one unknown response; a pair with nothing else goes."""
    pairs = [
        Pair(name, 0, [1], [2, STOP], [Response([3, STOP], "stop", verdict=verdict) for verdict in verdicts])
        for name, verdicts in {"a": ["right", "wrong"], "b": ["unknown"], "c": ["right"]}.items()
    ]
    kept = FilteredPairs(pairs, verdicts={"right": "drop", "wrong": "keep", "unknown": "keep"})
    assert {pair.sample_id: [each.verdict for each in pair.generated] for pair in kept} == {
        "a": ["wrong"], "b": ["unknown"]
    }  # fmt: skip
    found = {"right": 2, "wrong": 1, "unknown": 1, "dropped": 2, "dropped_pairs": 1}
    assert kept.counts == {"responses": 4, "truncated": 0, "equal_to_real": 0, "empty": 0} | found
    with pytest.raises(StoreError, match="^All 1 responses are right by pairs.checker, so the model has learned"):
        list(FilteredPairs(pairs[2:], verdicts={"right": "drop"}))


def test_all_pairs_dropped_is_an_error():
    with pytest.raises(StoreError, match="No pair is left of 1: responses 1, truncated 0, equal to real 0, empty 1, "):
        list(FilteredPairs(PAIRS[3:4]))
    with pytest.raises(StoreError, match="All 1 responses equal the real ones, so the model has learned what"):
        list(FilteredPairs(PAIRS[2:3], equal_to_real="drop"))
