"""Which answers are learned from: policies, margins, what is counted, what leaves nothing."""

from collections import Counter

import pytest

from spin.core.errors import ConfigError, StoreError
from spin.data import Pair, Response
from spin.pairs.filters import filter_margins, filter_pairs

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


def test_a_triplet_that_loses_an_answer_is_dropped_whole():
    counts = Counter()
    pairs = [example_pairs()[1], Pair("whole", 0, [1], [2, STOP], [Response([3, STOP], "stop")] * 2)]
    (kept,) = filter_pairs(pairs, counts, truncated="drop", whole=True)
    assert (kept.sample_id, len(kept.generated)) == ("whole", 2)
    assert (counts["dropped"], counts["dropped_pairs"]) == (2, 1)


def scored_pairs():
    """Margins by hand, per token: a 0.5 (-1 + 1.5) and -0.5 (-1 + 0.5); b -2 (-4 + 2)."""
    return [
        Pair("a", 0, [1], [2, STOP], [Response([3, STOP], "stop", -3.0), Response([4] * 4, "length", -2.0)], -2.0),
        Pair("b", 0, [1], [2, STOP], [Response([3, STOP], "stop", -4.0)], -8.0),
    ]


@pytest.mark.parametrize(
    ("limits", "whole", "kept"),
    [
        ((None, None), False, {"a": [-3.0, -2.0], "b": [-4.0]}),
        ((None, 0.0), False, {"a": [-2.0], "b": [-4.0]}),
        ((None, 0.5), False, {"a": [-3.0, -2.0], "b": [-4.0]}),  # a limit is what may just be
        ((-1.0, None), False, {"a": [-3.0, -2.0]}),
        ((-1.0, 0.0), False, {"a": [-2.0]}),
        ((None, 0.0), True, {"b": [-4.0]}),  # the first answer speaks for a's triplet
        ((0.0, None), True, {"a": [-3.0, -2.0]}),
    ],
)
def test_margins_per_token_leave_answers_out(limits, whole, kept):
    counts = Counter()
    pairs = list(filter_margins(scored_pairs(), counts, *limits, whole))
    assert {pair.sample_id: [each.reference_logp for each in pair.generated] for pair in pairs} == kept
    assert counts["margin_dropped"] == 3 - sum(map(len, kept.values()))
    assert counts["margin_dropped_pairs"] == 2 - len(kept)


def test_margins_that_leave_nothing_are_an_error_that_says_what_there_is():
    with pytest.raises(StoreError, match=r"No pair is left of 2: .* -2 to 0\.5 nats per token, pairs\.min_margin is 1"):
        list(filter_margins(scored_pairs(), Counter(), 1, None))


def test_unknown_policy():
    with pytest.raises(ConfigError, match="truncated"):
        list(filter_pairs([], Counter(), truncated="cut"))
