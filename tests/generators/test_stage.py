"""Playing: shards, seeds, what is rejected."""

import numpy as np
import pytest
import torch

from spin.core.errors import GeneratorError
from spin.core.ranks import World
from spin.data import PairStore, Prompt, PromptDataset
from spin.generators import Response, SamplingParams
from spin.generators.engines import EngineGroup, engine_group
from spin.generators.stage import PlayTask, balance_shards, num_shards, play, shards_for_rank

STOP = 9
ALONE = World(0, 1, 0, torch.device("cpu"), None)  # one rank, without a mesh
SAMPLING = SamplingParams(max_new_tokens=4, stop_token_ids=(STOP,))
PROMPTS = PromptDataset([Prompt(f"s{i}", [1, i + 1], [2, STOP]) for i in range(10)])


class SeedEcho:
    """Answers with digits of its seed, so that the seed can be read off the answer."""

    shares_policy_weights = True

    def __init__(self):
        self.calls = []

    def generate(self, prompts, sampling, seeds):
        self.calls.append(prompts)
        return [Response([seed % 7 + 1, seed // 7 % 7 + 1, STOP], "stop") for seed in seeds]


def played(path, shards, generator=None, **kwargs):
    store = PairStore.open_or_create(path, {"opponent": "w"}, 3)
    asked = {name: kwargs.pop(name) for name in ("seed", "iteration") if name in kwargs}
    game = PlayTask(PROMPTS, range(10), SAMPLING, **{"seed": 5, "iteration": 1, "responses_per_prompt": 2, **asked})
    play(store, shards, game, generator or SeedEcho(), **kwargs)
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


class Streaming(SeedEcho):
    """Answers everything at once, the last request first."""

    def __init__(self, change=list):
        super().__init__()
        self.change = change
        self.ended = False

    def update_weights(self, named_tensors):
        raise AssertionError

    sleep = wake = close = update_weights

    def stream(self, requests, sampling):
        try:
            requests = list(requests)
            answers = self.generate([ids for ids, _ in requests], sampling, [seed for _, seed in requests])
            yield from self.change(list(enumerate(answers))[::-1])
        finally:
            self.ended = True


def test_a_stream_of_responses_makes_the_same_store(tmp_path):
    generator = Streaming()
    whole = played(tmp_path / "a", [0, 1, 2])
    assert answers(played(tmp_path / "b", [2, 0, 1], generator)) == answers(whole)
    assert len(generator.calls) == 1, "an engine gets all shards at once"


def test_a_stream_that_is_stopped_keeps_whole_shards(tmp_path):
    generator, done = Streaming(), []
    store = played(tmp_path / "a", [0, 1, 2], generator, should_stop=lambda: len(done) == 1, on_shard=done.append)
    assert store.missing_shards() == [0, 1], "its last request comes first"
    assert generator.ended


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda answers: answers[:-1], "left 1 of 20 prompts without a response"),
        (lambda answers: [answers[0], *answers], "responded to request 19 twice"),
        (lambda answers: [(20, answers[0][1])], "request 20"),
        (lambda answers: [(-1, answers[0][1])], "request -1"),
    ],
)
def test_a_stream_of_wrong_responses_is_refused(tmp_path, change, message):
    with pytest.raises(GeneratorError, match=message):
        played(tmp_path / "a", [0, 1, 2], Streaming(change))


def test_one_rank_of_a_team_writes(tmp_path):
    store = played(tmp_path / "a", [0, 1], Streaming(), group=EngineGroup(0, 1, writes=False))
    assert store.missing_shards() == [0, 1, 2]
    agreed = []
    group = EngineGroup(
        0, 1, agree=lambda flag: agreed.append(flag) or len(agreed) > 1
    )  # another rank was asked to stop
    assert played(tmp_path / "b", [0, 1, 2], Streaming(), group=group).missing_shards() == [0, 1]


def test_engines_get_equal_shares():
    """256 prompts a shard: 1000 prompts make 4 shards for one, two or four engines, 6 for three, 8 for eight."""
    assert [num_shards(1000, 256, groups) for groups in (1, 2, 3, 4, 8)] == [4, 4, 6, 4, 8]
    assert num_shards(3, 256, 8) == 3 and num_shards(0, 256, 2) == 1
    # dearest first, to whoever has least: 9 | 7, then 9 | 7 + 6, then 9 + 5 | 13, then 14 | 13 + 2
    assert balance_shards({0: 9, 1: 2, 2: 7, 3: 5, 4: 6}, 2) == [[0, 3], [1, 2, 4]]
    assert balance_shards({4: 1}, 3) == [[4], [], []]


def test_shares_are_dealt_by_the_length_of_prompts(tmp_path):
    long, short = Prompt("long", [1] * 500, [2, STOP]), [Prompt(f"{i}", [1], [2, STOP]) for i in range(3)]
    store = PairStore.open_or_create(tmp_path / "a", {"opponent": "w"}, 4)
    prompts = PromptDataset([short[0], long, *short[1:]])
    game = PlayTask(prompts, range(4), SamplingParams(max_new_tokens=10), seed=1)
    shares = [shards_for_rank(range(4), store, game, EngineGroup(index, 2)) for index in (0, 1)]
    assert shares == [[1], [0, 2, 3]]


def test_too_few_responses_are_refused(tmp_path):
    generator = SeedEcho()
    generator.generate = lambda prompts, sampling, seeds: [Response([1, STOP], "stop")]
    with pytest.raises(GeneratorError, match="1 responses to 6 prompts"):
        played(tmp_path / "a", [0], generator)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (None, r"generator: .*SeedEcho gave None of type NoneType to 6 prompts; expected one each"),
        (
            ["words"] * 6,
            r"sample s0: the response is 'words' of type str, expected a spin.generators.Response",
        ),
        ([[1, STOP]] * 6, r"sample s0: the response is \[1, 9\] of type list"),
    ],
)
def test_responses_that_are_none_name_the_generator(tmp_path, answers, message):
    generator = SeedEcho()
    generator.generate = lambda prompts, sampling, seeds: answers
    with pytest.raises(GeneratorError, match=message):
        played(tmp_path / "a", [0], generator)


def test_a_generator_that_lacks_something_is_told_what():
    """SeedEcho has neither weights to take nor an engine to put to sleep."""
    with pytest.raises(GeneratorError, match=r"SeedEcho has no close, sleep, update_weights, wake; expected .* wake\."):
        engine_group(SeedEcho(), ALONE)
    assert engine_group(Streaming(), ALONE).count == 1


def test_a_truncated_response_with_an_end_is_refused(tmp_path):
    generator = SeedEcho()
    generator.generate = lambda prompts, sampling, seeds: [Response([1, STOP], "length") for _ in prompts]
    with pytest.raises(GeneratorError, match="did not write"):
        played(tmp_path / "a", [0], generator)
    assert PairStore.open(tmp_path / "a").missing_shards() == [0, 1, 2]
