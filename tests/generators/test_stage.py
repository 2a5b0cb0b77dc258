"""Playing: shards, seeds, what is rejected. What a single response must be: tests/faults/test_responses.py."""

import re

import numpy as np
import pytest
import torch

from spin.core.errors import GeneratorError
from spin.core.ranks import World
from spin.data import PairStore, Prompt, PromptDataset
from spin.generators import EngineGroup, Response, SamplingParams
from spin.generators.stage import PlayTask, balance_shards, num_shards, play, shards_for_rank

STOP = 9
ALL = [0, 1, 2]  # shards
ALONE = World(0, 1, 0, torch.device("cpu"), None)  # one rank, without a mesh
SAMPLING = SamplingParams(max_new_tokens=4, stop_token_ids=(STOP,))
PROMPTS = PromptDataset([Prompt(f"s{i}", [1, i + 1], [2, STOP]) for i in range(10)])


class SeedEcho:
    """Responds with digits of its seed, so that the seed can be read off the response."""

    shares_policy_weights = True

    def __init__(self):
        self.calls = []

    def generate(self, prompts, sampling, seeds):
        self.calls.append(prompts)
        return [Response([seed % 7 + 1, seed // 7 % 7 + 1, STOP], "stop") for seed in seeds]


class Streaming(SeedEcho):
    """Responds to everything at once, the last request first."""

    def __init__(self, change=list):
        super().__init__()
        self.change, self.ended = change, False

    def update_weights(self, named_tensors):
        raise AssertionError

    sleep = wake = close = update_weights

    def stream(self, requests, sampling):
        try:
            requests = list(requests)
            responses = self.generate([ids for ids, _ in requests], sampling, [seed for _, seed in requests])
            yield from self.change(list(enumerate(responses))[::-1])
        finally:
            self.ended = True


def played(path, shards=ALL, generator=None, seed=5, iteration=1, **kwargs):
    store = PairStore.open_or_create(path, {"opponent": "w"}, 3)
    task = PlayTask(PROMPTS, range(10), SAMPLING, seed, iteration, responses_per_prompt=2)
    play(store, shards, task, generator or SeedEcho(), **kwargs)
    return store


def read_journal(store, shard):
    return store.journal(shard).read(8)


def responses(store):
    return [(p.sample_id, [np.asarray(r.token_ids).tolist() for r in p.generated]) for p in store.pairs()]


def test_a_store_does_not_depend_on_who_makes_which_shard(tmp_path):
    whole = responses(played(tmp_path / "a"))
    played(tmp_path / "b", [2])
    assert responses(played(tmp_path / "b", [1, 0])) == whole
    assert [sample for sample, _ in whole] == PROMPTS.sample_ids
    assert whole != responses(played(tmp_path / "c", iteration=2))
    assert whole != responses(played(tmp_path / "d", seed=6))
    assert any(first != second for _, (first, second) in whole)
    generator = Streaming()
    assert responses(played(tmp_path / "e", [2, 0, 1], generator)) == whole
    assert len(generator.calls) == 1, "an engine gets all shards at once"


@pytest.mark.parametrize("kind", [iter, list])
def test_a_stream_need_not_be_a_python_generator(tmp_path, kind):
    """An iterator of a list has no ``close``."""
    generator = Streaming()
    whole = responses(played(tmp_path / "a", ALL, generator))
    python_stream = generator.stream
    generator.stream = lambda requests, sampling: kind(list(python_stream(requests, sampling)))
    assert responses(played(tmp_path / "b", ALL, generator)) == whole
    stopped = played(tmp_path / "c", ALL, generator, should_stop=lambda: any((tmp_path / "c").glob("shard-*")))
    assert stopped.missing_shards() == [0, 1]
    generator.stream = lambda requests, sampling: None
    with pytest.raises(GeneratorError, match="Streaming.stream gave None of type NoneType, expected an iterator"):
        played(tmp_path / "d", ALL, generator)


@pytest.mark.parametrize(("kind", "missing"), [(SeedEcho, [1, 2]), (Streaming, [0, 1])])
def test_stops_between_shards_and_keeps_what_is_done(tmp_path, kind, missing):
    """A stream's last request comes first."""
    first, second = kind(), kind()
    store = played(tmp_path, ALL, first, should_stop=lambda: any(tmp_path.glob("shard-*")))
    assert store.missing_shards() == missing and len(first.calls) == 1
    assert getattr(first, "ended", True)
    played(tmp_path, missing, second)
    assert store.missing_shards() == []
    assert sum(map(len, second.calls)) == 2 * (7 if missing == [1, 2] else 6)


@pytest.mark.parametrize("finished", [0, 1, 6, 7, 13, 19])
def test_every_finished_response_is_kept_and_not_asked_again(tmp_path, finished):
    """Two responses to each of ten prompts in one, two or three shards' journals; the last request comes first."""
    whole, count = responses(played(tmp_path / "whole")), []
    store = played(tmp_path / "a", ALL, Streaming(), should_stop=lambda: len(count) >= finished or count.append(1))
    whole_shards = 2 * sum(len(store.read_shard(shard)) for shard in ALL if store.has_shard(shard))
    journals = sum(len(read_journal(store, shard)) for shard in ALL if not store.has_shard(shard))
    assert whole_shards + journals == finished
    rest = Streaming()
    played(tmp_path / "a", store.missing_shards(), rest)
    assert sum(map(len, rest.calls)) == 20 - finished
    assert responses(store) == whole
    store.seal()
    assert not list(tmp_path.glob("a/journal-*"))


def test_a_response_of_the_journal_passes_the_same_gate(tmp_path, caplog):
    """A journal that says what no response to this prompt can be, under a right checksum."""
    whole = responses(played(tmp_path / "whole"))
    store = PairStore.open_or_create(tmp_path / "a", {"opponent": "w"}, 3)
    journal = store.journal(0)
    for index, ids in enumerate([[1] * 5, [STOP, STOP], [-1, STOP], ["a", STOP], [1, STOP]]):
        journal.append(index, Response(ids, "stop"))
    rest = Streaming()
    played(tmp_path / "a", [0], rest)
    assert len(rest.calls[0]) == 5 and "journal-00000.jsonl: 4 lines are not used" in caplog.text
    assert responses(played(tmp_path / "a", [1, 2]))[3:] == whole[3:]
    kept = [ids for _, found in responses(store)[:3] for ids in found]
    assert kept == [ids if i != 4 else [1, STOP] for i, ids in enumerate(i for _, two in whole[:3] for i in two)]


class Stepping(Streaming):
    """Takes twenty steps to each response."""

    def __init__(self):
        super().__init__(lambda numbered: (item for each in numbered for item in [*[None] * 20, each]))


def test_stops_between_two_steps_of_the_engine(tmp_path):
    """At once where a rank has its own engine; every 16 steps where ranks share one, all at the same step."""
    asked = []
    store = played(tmp_path / "a", ALL, Stepping(), should_stop=lambda: asked.append(1) or len(asked) > 5)
    assert len(asked) == 6 and store.missing_shards() == ALL
    asked = []
    for rank in (0, 1):
        asked.clear()
        group = EngineGroup(0, 1, rank == 0, is_shared=True, agree=lambda flag: asked.append(flag) or len(asked) > 3)
        store = played(tmp_path / f"b{rank}", ALL, Stepping(), group=group)
        # before the start, after steps 16, 32 and 48, when responses to requests 19 and 18 are there
        assert len(asked) == 4 and len(read_journal(store, 2)) == (2 if rank == 0 else 0)
    second = Stepping()
    assert responses(played(tmp_path / "b0", ALL, second)) == responses(played(tmp_path / "whole"))
    assert len(second.calls[0]) == 18


def test_one_rank_of_a_group_writes_and_all_stop_together(tmp_path):
    store = played(tmp_path / "a", [0, 1], Streaming(), group=EngineGroup(0, 1, writes=False))
    assert store.missing_shards() == ALL
    agreed = []
    group = EngineGroup(
        0, 1, is_shared=True, agree=lambda flag: agreed.append(flag) or len(agreed) > 1
    )  # another rank was asked to
    assert played(tmp_path / "b", ALL, Streaming(), group=group).missing_shards() == [0, 1]


def test_engines_get_equal_parts(tmp_path):
    """256 prompts a shard: 1000 prompts make 4 shards for one, two or four engines, 6 for three, 8 for eight."""
    assert [num_shards(1000, 256, groups) for groups in (1, 2, 3, 4, 8)] == [4, 4, 6, 4, 8]
    assert num_shards(3, 256, 8) == 3 and num_shards(0, 256, 2) == 1
    # dearest first, to whoever has least: 9 | 7, then 9 | 7 + 6, then 9 + 5 | 13, then 14 | 13 + 2
    assert balance_shards({0: 9, 1: 2, 2: 7, 3: 5, 4: 6}, 2) == [[0, 3], [1, 2, 4]]
    assert balance_shards({4: 1}, 3) == [[4], [], []]
    # the length of prompts counts
    long, short = Prompt("long", [1] * 500, [2, STOP]), [Prompt(f"{i}", [1], [2, STOP]) for i in range(3)]
    store = PairStore.open_or_create(tmp_path, {"opponent": "w"}, 4)
    task = PlayTask(PromptDataset([short[0], long, *short[1:]]), range(4), SamplingParams(max_new_tokens=10), seed=1)
    assert [shards_for_rank(range(4), store, task, EngineGroup(i, 2)) for i in (0, 1)] == [[1], [0, 2, 3]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([Response([1, STOP], "stop")], "1 responses to 6 prompts"),
        (None, r"generator: .*SeedEcho gave None of type NoneType to 6 prompts; expected one each"),
        (["words"] * 6, r"sample s0: the response is 'words' of type str, expected a spin.generators.Response"),
        ([[1, STOP]] * 6, r"sample s0: the response is \[1, 9\] of type list"),
        (lambda numbered: numbered[:-1], "left 1 of 20 prompts without a response"),
        (lambda numbered: [numbered[0], *numbered], "responded to request 19 twice"),
        (lambda numbered: [(20, numbered[0][1])], "request 20"),
        (lambda numbered: [(-1, numbered[0][1])], "request -1"),
    ],
)
def test_wrong_responses_name_the_generator(tmp_path, given, message):
    generator = Streaming(given) if callable(given) else SeedEcho()
    if not callable(given):
        generator.generate = lambda prompts, sampling, seeds: given
    with pytest.raises(GeneratorError, match=message):
        played(tmp_path, ALL, generator)
    assert PairStore.open(tmp_path).missing_shards()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SystemExit(0), ValueError("two\nlines")])
@pytest.mark.parametrize("generator", [SeedEcho, Streaming])
def test_what_a_generator_raises_is_said_to_be_its(tmp_path, generator, error):
    """No full disk of the run's, no end with exit code 0, and the line where it happened."""

    class Raises(generator):
        def generate(self, prompts, sampling, seeds):
            raise error

    with pytest.raises(GeneratorError) as raised:
        played(tmp_path, ALL, Raises())
    said = str(raised.value)
    assert re.search(rf"generator: tests.*Raises raised {type(error).__name__}: .*, at {__file__}:\d+\. Finished", said)


def test_the_shortest_responses_are_started_last(tmp_path, monkeypatch):
    """The longest of the four first; the rest in order; what is stored is as ever. A sample without an earlier response
    counts as its real one, of two tokens."""
    monkeypatch.setattr("spin.generators.stage._STARTED_LAST", 4)
    expected = {f"s{i}": tokens for i, tokens in enumerate([9, 1, 9, 9, 9, 9, 3, 9, 9])}  # none for s9
    store = PairStore.open_or_create(tmp_path / "sorted", {"opponent": "w"}, 3)
    generator = Streaming()
    play(store, ALL, PlayTask(PROMPTS, range(10), SAMPLING, 5, 1, expected_tokens=expected), generator)
    assert [ids[1] - 1 for ids in generator.calls[0]] == [0, 2, 3, 4, 5, 7, 8, 6, 9, 1]
    as_ever = PairStore.open_or_create(tmp_path / "as_ever", {"opponent": "w"}, 3)
    play(as_ever, ALL, PlayTask(PROMPTS, range(10), SAMPLING, 5, 1), SeedEcho())
    kept, expected = ([list(p.generated[0].token_ids) for p in each.pairs()] for each in (store, as_ever))
    assert kept == expected
