"""Playing and filtering: shards, seeds, what is rejected, what is dropped."""

from collections import Counter

import numpy as np
import pytest

from spin.data import Pair, PairStore, Prompt, PromptDataset, Response
from spin.errors import ConfigError, GeneratorError, StoreError
from spin.generators import Completion, SamplingParams
from spin.selfplay import filter_pairs, play, score_fingerprint, split_evenly

STOP = 9
SAMPLING = SamplingParams(max_new_tokens=4, stop_token_ids=(STOP,))
PROMPTS = PromptDataset([Prompt(f"s{i}", [1, i + 1], [2, STOP]) for i in range(10)])


class SeedEcho:
    """Answers with digits of its seed, so that the seed can be read off the answer."""

    shares_policy_weights = True

    def __init__(self):
        self.calls = []

    def generate(self, prompts, sampling, seeds):
        self.calls.append(prompts)
        return [Completion([seed % 7 + 1, seed // 7 % 7 + 1, STOP], "stop") for seed in seeds]


def played(path, shards, generator=None, **kwargs):
    store = PairStore.open_or_create(path, {"opponent": "w"}, 3)
    arguments = {"seed": 5, "iteration": 1, "responses_per_prompt": 2, **kwargs}
    play(store, shards, PROMPTS, range(10), generator or SeedEcho(), SAMPLING, **arguments)
    return store


def answers(store):
    return [(p.sample_id, [np.asarray(r.token_ids).tolist() for r in p.generated]) for p in store.pairs()]


def test_a_store_does_not_depend_on_who_makes_which_shard(tmp_path):
    whole = played(tmp_path / "a", [0, 1, 2])
    played(tmp_path / "b", [2])
    parts = played(tmp_path / "b", [1, 0])
    assert answers(whole) == answers(parts)
    assert [sample for sample, _ in answers(whole)] == PROMPTS.sample_ids
    assert answers(whole) != answers(played(tmp_path / "c", [0, 1, 2], iteration=2))
    assert answers(whole) != answers(played(tmp_path / "d", [0, 1, 2], seed=6))
    assert any(first != second for _, (first, second) in answers(whole))


def test_stops_between_shards_and_keeps_what_is_done(tmp_path):
    done = []
    store = played(tmp_path / "a", [0, 1, 2], should_stop=lambda: len(done) == 1, on_shard=done.append)
    assert store.missing_shards() == [1, 2]
    generator = SeedEcho()
    played(tmp_path / "a", store.missing_shards(), generator)
    assert store.missing_shards() == []
    assert len(generator.calls) == 2


def test_too_few_answers_are_refused(tmp_path):
    generator = SeedEcho()
    generator.generate = lambda prompts, sampling, seeds: [Completion([1, STOP], "stop")]
    with pytest.raises(GeneratorError, match="1 answers to 6 prompts"):
        played(tmp_path / "a", [0], generator)


def test_a_truncated_answer_with_an_end_is_refused(tmp_path):
    generator = SeedEcho()
    generator.generate = lambda prompts, sampling, seeds: [Completion([1, STOP], "length") for _ in prompts]
    with pytest.raises(GeneratorError, match="did not write"):
        played(tmp_path / "a", [0], generator)
    assert PairStore.open(tmp_path / "a").missing_shards() == [0, 1, 2]


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


def test_split_evenly():
    assert [list(part) for part in split_evenly(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [len(part) for part in split_evenly(2, 4)] == [0, 1, 0, 1]


def test_score_fingerprint_sees_every_token_and_the_order():
    pairs = example_pairs()[:3]
    base = {"opponent": "w", "packing": {"row_tokens": 8}, "compute_dtype": "fp32"}
    prints = {
        score_fingerprint(batches=batches, **base)["pairs"]
        for batches in (
            [pairs],
            [pairs[:1], pairs[1:]],
            [pairs[::-1]],
            [[*pairs[:2], Pair("equal", 0, [1], [2, STOP], [Response([2, 8], "stop")])]],
            [[*pairs[:2], Pair("equal", 0, [1, 2], [STOP], [Response([2, STOP], "stop")])]],
        )
    }
    assert len(prints) == 5
