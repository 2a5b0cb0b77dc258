"""The first stage of an iteration: the opponent plays, that is, it responds to every prompt.

Its responses fill a pair store shard by shard. A response depends on the seed, the iteration, its sample and its
number, not on the rank that makes it or on what was there before, so a run that was stopped or killed resumes with
those that are missing: a streaming generator's are in the shard's journal as soon as they are finished.
"""

from __future__ import annotations

import heapq
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, count, groupby, islice
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from spin import config
from spin.config import SPINConfig
from spin.config.schema import Pairs
from spin.core.errors import GeneratorError, OutputError, Stopped, StoreError
from spin.core.files import json_fingerprint
from spin.core.heartbeat import set_stage
from spin.core.progress import Stage, stage
from spin.core.ranks import CountOfRanks, World, any_rank_soon, raise_on_all_ranks
from spin.data.dataset import PromptDataset
from spin.data.tokenizer import PromptTokenizer
from spin.generators.engines import EngineGroup, name_of, policy_loaded, raised_by
from spin.generators.generator import Generator, SamplingParams, StreamingGenerator
from spin.generators.sampling import sample_seed
from spin.pairs.filters import FilteredPairs
from spin.pairs.shards import missing_shards, open_store, seal, split_evenly
from spin.pairs.store import PairStore
from spin.types import Pair, Prompt, Response, TokenIds

log = logging.getLogger(__name__)

T = TypeVar("T")
_ALONE = EngineGroup(0, 1)
_STARTED_LAST = 1024  # responses that are started last: as many as run at a time at most
_STEPS = 16  # of an engine that ranks share, between two times that they agree on whether to stop


@dataclass(frozen=True)
class Limits:
    """What every response must stay within, whoever writes it."""

    vocab_size: int = 2**31  # token ids are below it; a store keeps int32
    max_seq_len: int = sys.maxsize  # tokens of prompt and response together
    decode: Callable[[Sequence[int]], str] | None = None  # to look for stop strings; None: they are not looked for


def limits_of(model: Any, max_seq_len: int, tokenizer: PromptTokenizer) -> Limits:
    """The limits of a model's responses."""
    rows = tokenizer.vocab_size if model is None else model.tok_embeddings.weight.shape[0]
    return Limits(rows, max_seq_len, tokenizer.decode)


@dataclass(frozen=True)
class PlayTask:
    """What an opponent is asked, and how it is to respond.

    Args:
        prompts (PromptDataset): the data set.
        samples (Sequence[int]): which of its samples are played, in order.
        sampling (SamplingParams): how responses are sampled.
        seed (int): the run's seed.
        iteration (int): counted from 0.
        responses_per_prompt (int): responses to each prompt.
        limits (Limits): what responses must stay within.
        expected_tokens (Mapping[str, int]): lengths of earlier responses, by sample; where there is none, the real
            response's stands in. Only the order in which prompts are started depends on it.
    """

    prompts: PromptDataset
    samples: Sequence[int]
    sampling: SamplingParams
    seed: int
    iteration: int = 0
    responses_per_prompt: int = 1
    limits: Limits = field(default_factory=Limits)
    expected_tokens: Mapping[str, int] = field(default_factory=dict)


def num_shards(num_samples: int, prompts_per_shard: int, groups: int) -> int:
    """Shards of a store of responses: as many for each group, as far as there are samples."""
    needed = math.ceil(num_samples / prompts_per_shard)
    return max(1, min(num_samples, math.ceil(needed / groups) * groups))


def balance_shards(costs: Mapping[int, int], groups: int) -> list[list[int]]:
    """Deals shards to groups so that all have about the same to do: the largest first, to whoever has least."""
    loads = [(0, group) for group in range(groups)]
    dealt: list[list[int]] = [[] for _ in range(groups)]
    for shard in sorted(costs, key=lambda shard: (-costs[shard], shard)):
        load, group = heapq.heappop(loads)
        dealt[group].append(shard)
        heapq.heappush(loads, (load + costs[shard], group))
    return [sorted(shards) for shards in dealt]


def shards_for_rank(shards: Sequence[int], store: PairStore, task: PlayTask, group: EngineGroup) -> list[int]:
    """The shards that this rank's group makes, computed alike on all ranks."""
    parts = split_evenly(len(task.samples), store.num_shards)
    most = task.sampling.max_new_tokens
    costs = {shard: sum(len(task.prompts[task.samples[i]].prompt_ids) + most for i in parts[shard]) for shard in shards}
    return balance_shards(costs, group.count)[group.index]


def play_fingerprint(
    task: PlayTask, cfg: SPINConfig, opponent: str, tokenizer: PromptTokenizer, generator: Generator
) -> dict[str, Any]:
    """Everything that the opponent's responses depend on, by name."""
    return {
        "opponent": opponent,
        "model": config.plain(cfg.model),
        "dataset": task.prompts.fingerprint(),
        **{f"dataset.{key}": value for key, value in task.prompts.settings.items()},
        "samples": json_fingerprint(list(task.samples)),
        "tokenizer": tokenizer.fingerprint,
        "sampling": asdict(task.sampling),
        "seed": task.seed,
        "iteration": task.iteration,
        "responses_per_prompt": task.responses_per_prompt,
        "generator": name_of(generator),
        "generator_source": getattr(generator, "fingerprint", None),
        "compute_dtype": cfg.compute_dtype,
    }


def play_tasks(
    tasks: Mapping[Path, PlayTask],
    generator: Generator,
    model: nn.Module,
    world: World,
    cfg: SPINConfig,
    *,
    opponent: str,
    tokenizer: PromptTokenizer,
    group: EngineGroup,
    verify: Callable[[], float | None],
    should_stop: Callable[[], bool],
    worker: int = 0,
    num_workers: int = 1,
) -> None:
    """The policy, as it is now, responds to the prompts of each task, into the pair store ``responses`` of its folder.
    Collective. The generator gets the weights once for all tasks, and only if a response is missing.

    ``opponent`` is the fingerprint of the weights. ``verify`` is called when the generator has them; what it returns is
    the report's ``generator/logprob_gap``. Of several machines each makes its own shards, as ``worker``, from 0, of
    ``num_workers``; a store that lacks the others' is not sealed.

    Raises Stopped, which says how many responses are kept, if any rank was asked to stop before a store was complete;
    GeneratorError if responses do not fit the prompts; OutputError on all ranks if a store cannot be written.
    """
    report: dict[str, float] | None = None
    stores = {}
    for folder, task in tasks.items():
        fingerprint = play_fingerprint(task, cfg, opponent, tokenizer, generator)
        shards = num_shards(len(task.samples), cfg.pairs.prompts_per_shard, num_workers * group.count)
        stores[folder] = open_store(folder / "responses", fingerprint, shards, world)

    def count() -> tuple[int, int]:
        """Responses of this worker that are on disk, and all of them."""
        found = [count_kept(tasks[folder], stores[folder], worker, num_workers) for folder in tasks]
        return sum(kept for kept, _ in found), sum(total for _, total in found)

    kept, total = count() if world.is_main else (0, 0)
    with stage("generate", "response", total, kept) as bar, ExitStack() as loaded:
        for folder, task in tasks.items():
            store, missing = stores[folder], missing_shards(stores[folder], world)
            if store.is_sealed and not missing:
                continue
            if report is None:
                loaded.enter_context(policy_loaded(generator, model))
                gap = verify()
                report = {} if gap is None else {"generator/logprob_gap": gap}
            own = [shard for shard in missing if shard % num_workers == worker]
            play_shards(store, own, task, generator, world, group, bar, should_stop)
            if num_workers > 1 and (left := missing_shards(store, world)) and set(own).isdisjoint(left):
                continue
            try:
                seal(store, world, should_stop(), report)
            except Stopped:
                if not world.is_main:
                    raise
                kept, total = count()
                raise Stopped(f"{kept} of {total} responses are kept, {total - kept} left to generate.") from None


def count_kept(task: PlayTask, store: PairStore, worker: int = 0, num_workers: int = 1) -> tuple[int, int]:
    """Responses of a worker's shards that are on disk, and all of theirs."""
    parts = split_evenly(len(task.samples), store.num_shards)
    shards = range(worker, store.num_shards, num_workers)
    sizes = {shard: len(parts[shard]) * task.responses_per_prompt for shard in shards}
    kept = (n if store.has_shard(shard) else len(store.journal(shard).read(n)) for shard, n in sizes.items())
    return sum(kept), sum(sizes.values())


def play_shards(
    store: PairStore,
    shards: Sequence[int],
    task: PlayTask,
    generator: Generator,
    world: World,
    group: EngineGroup,
    bar: Stage,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Makes shards of a store, each group its part, see :func:`play`, and counts the responses of all ranks on a bar.
    Collective at the end: each group makes as many shards as it has without waiting for other ranks."""
    mine, should_stop = shards_for_rank(shards, store, task, group), any_rank_soon(should_stop)
    responses, tokens = CountOfRanks(), CountOfRanks()

    def count(num_responses: int = 0, num_tokens: int = 0, look: bool = False) -> None:
        bar.update(responses.add(num_responses, look), tokens.add(num_tokens, look))

    def on_response(response: Response) -> None:
        if group.writes:
            count(1, len(response.token_ids))

    with raise_on_all_ranks(world, OutputError):
        play(store, mine, task, generator, group=group, should_stop=should_stop, on_response=on_response)
        count(look=True)
    count(look=True)  # all have added theirs


def filtered_responses(folders: Iterable[Path], policies: Pairs, drop_verdicts: bool = True) -> FilteredPairs:
    """The pairs that were played into folders, see :func:`play_tasks`, and checked if there is a checker, less what the
    config's ``pairs`` drops. Without ``drop_verdicts`` pairs of a verdict without weight stay, and only have none."""
    chosen: dict[str, Any] = {kind: policies[kind] for kind in ("truncated", "equal_to_real", "empty")}
    if policies.checker is not None:
        weights = {"right": policies.checker.right_weight, "wrong": 1.0, "unknown": policies.checker.unknown_weight}
        dropped = [verdict for verdict, weight in weights.items() if weight == 0 and drop_verdicts]
        chosen["verdicts"] = dict.fromkeys(weights, "keep") | dict.fromkeys(dropped, "drop")
    stores = [PairStore.open(folder / ("checked" if "verdicts" in chosen else "responses")) for folder in folders]
    return FilteredPairs(chain.from_iterable(store.pairs() for store in stores), **chosen)


def response_tokens(folder: Path) -> dict[str, int]:
    """The mean length of the responses that were played into a folder, by sample; nothing if they cannot be read, since
    only an order depends on them."""
    try:
        pairs = list(PairStore.open(folder / "responses").pairs())
    except StoreError:
        return {}
    return {
        pair.sample_id: sum(len(each.token_ids) for each in pair.generated) // len(pair.generated) for pair in pairs
    }


def play_report(folder: Path) -> dict[str, float]:
    """What was measured when a folder's responses were played, by the log's names."""
    return dict(PairStore.open(folder / "responses").manifest.get("report", {}))


def play(
    store: PairStore,
    shards: Sequence[int],
    task: PlayTask,
    generator: Generator,
    *,
    group: EngineGroup = _ALONE,
    should_stop: Callable[[], bool] = lambda: False,
    on_response: Callable[[Response], None] = lambda response: None,
) -> None:
    """Generates responses into shards of a store while the generator is :func:`policy_loaded`. Not collective: each
    group of ranks, or machine, makes its own shards. ``on_response`` is called with every new response.

    A generator that can is given all prompts at once, and ``should_stop`` is asked between its steps. Its responses are
    in the shard's journal until the last one is there; those that an earlier run left there are not asked again. Any
    other generator is given a shard at a time. Every response passes :func:`check_response` when it arrives; a
    ``GeneratorError`` if they do not fit the prompts.
    """
    set_stage("generating responses")
    making = _Making(store, shards, task, generator, group)
    if not shards or group.agree(should_stop()):  # all who share an engine have read the journals
        return
    making.finish_complete()
    order = making.left()
    asked: Any
    stream: Any
    if isinstance(generator, StreamingGenerator):
        order = shortest_last(order, list(map(making.expected_tokens, order)))
        asked = map(making.request, order)
        with raised_by(generator):
            stream = generator.stream(asked, task.sampling)
    else:
        asked = (list(map(making.request, places)) for _, places in groupby(order, key=lambda place: place[0]))
        stream = _shard_by_shard(generator, asked, task.sampling)
    steps = 0
    with ExitStack() as stack:
        if hasattr(stream, "close"):  # of a Python generator; an iterator need not have one
            stack.callback(stream.close)
        for item in _numbered(stream, len(order), generator):
            if item is None:  # between two steps
                steps += 1
                asks = not group.is_shared or steps % _STEPS == 0
            else:
                number, response = item
                kept, is_complete = making.keep(order[number], response)
                on_response(kept)
                if is_complete:
                    making.finish(order[number][0])
                # asking those who share an engine takes a while; a shard that came at once is kept
                asks = is_complete or (making.streams and not group.is_shared)
            if asks and group.agree(should_stop()):
                return


_Place = tuple[int, int]  # a response's shard, and its number there


class _Making:
    """Shards that a group makes, and the responses that it has for them."""

    def __init__(
        self, store: PairStore, shards: Sequence[int], task: PlayTask, generator: Generator, group: EngineGroup
    ) -> None:
        self._store, self._task, self._generator, self._group = store, task, generator, group
        self.streams = isinstance(generator, StreamingGenerator)  # then finished responses are in journals
        parts = split_evenly(len(task.samples), store.num_shards)
        self._samples = {shard: [task.samples[i] for i in parts[shard]] for shard in shards}
        self._journals = {shard: store.journal(shard) for shard in shards}
        self._found: dict[int, dict[int, Response]] = {  # of shards that are not complete
            shard: self._journals[shard].read(self._size(shard), partial(self._checked, shard)) if self.streams else {}
            for shard in shards
        }

    def _size(self, shard: int) -> int:
        return len(self._samples[shard]) * self._task.responses_per_prompt

    def _prompt(self, place: _Place) -> Prompt:
        shard, index = place
        return self._task.prompts[self._samples[shard][index // self._task.responses_per_prompt]]

    def _checked(self, shard: int, index: int, response: object) -> Response:
        prompt = self._prompt((shard, index))
        return check_response(response, prompt, self._generator, self._task.sampling, self._task.limits)

    def request(self, place: _Place) -> tuple[TokenIds, int]:
        """Prompt and seed."""
        prompt, number = self._prompt(place), place[1] % self._task.responses_per_prompt
        return prompt.prompt_ids, sample_seed(self._task.seed, self._task.iteration, prompt.sample_id, number)

    def expected_tokens(self, place: _Place) -> int:
        prompt = self._prompt(place)
        return self._task.expected_tokens.get(prompt.sample_id, len(prompt.real_ids))

    def left(self) -> list[_Place]:
        """Where a response is missing, shard by shard."""
        return [(shard, i) for shard, found in self._found.items() for i in range(self._size(shard)) if i not in found]

    def keep(self, place: _Place, response: object) -> tuple[Response, bool]:
        """The response as it is kept, and whether its shard is complete with it."""
        shard, index = place
        self._found[shard][index] = kept = self._checked(shard, index, response)
        if self.streams and self._group.writes:
            self._journals[shard].append(index, kept)
        return kept, len(self._found[shard]) == self._size(shard)

    def finish(self, shard: int) -> None:
        """Writes a shard that is complete."""
        if self._group.writes:
            prompts = [self._task.prompts[sample] for sample in self._samples[shard]]
            self._store.write_shard(shard, _pairs(prompts, self._found[shard], self._task))
        del self._found[shard], self._journals[shard]

    def finish_complete(self) -> None:
        """Writes the shards that an earlier run left complete."""
        for shard in [shard for shard, found in self._found.items() if len(found) == self._size(shard)]:
            self.finish(shard)


def _numbered(stream: object, count: int, generator: Generator) -> Iterator[tuple[int, object] | None]:
    """What a generator's stream gives, each item once it is known to be a step's end or the only response to one of
    ``count`` requests; a ``GeneratorError`` also if it ends and some have none."""
    name = name_of(generator)
    if not isinstance(stream, Iterable):
        raise GeneratorError(f"generator: {name}.stream gave {_shortened(stream)}, expected an iterator of responses.")
    is_done = np.zeros(count, bool)
    for item in _items(stream, generator):
        if item is not None:
            if not isinstance(item, tuple) or len(item) != 2 or type(item[0]) is not int:
                expected = "expected (number of the request, its Response)"
                raise GeneratorError(f"generator: {name} gave {_shortened(item)}, {expected}.")
            number = item[0]
            if not 0 <= number < count or is_done[number]:
                raise GeneratorError(
                    f"generator: {name} responded to request {number} twice, or none such was asked; the {count} "
                    f"requests are 0 to {count - 1}."
                )
            is_done[number] = True
        yield item
    if not is_done.all():
        raise GeneratorError(f"generator: {name} left {np.sum(~is_done)} of {count} prompts without a response.")


def _items(stream: Iterable[object], generator: Generator) -> Iterator[object]:
    with raised_by(generator):
        yield from stream


def shortest_last(requests: Sequence[T], expected_tokens: Sequence[int]) -> list[T]:
    """The requests as they are started: the shortest responses last, and the longest of these first, so that all end
    together. Others stay in order, and shards complete one after another."""
    by_length = sorted(range(len(requests)), key=lambda i: -expected_tokens[i])[-_STARTED_LAST:]
    last = set(by_length)
    return [request for i, request in enumerate(requests) if i not in last] + [requests[i] for i in by_length]


def _pairs(prompts: Sequence[Prompt], responses: Mapping[int, Response], task: PlayTask) -> list[Pair]:
    """Prompts with their responses, by request; without the log-probs, which are not stored."""
    kept = (Response(responses[i].token_ids, responses[i].finish_reason) for i in sorted(responses))
    return [
        Pair(each.sample_id, task.iteration, each.prompt_ids, each.real_ids, [*islice(kept, task.responses_per_prompt)])
        for each in prompts
    ]


def generate_each(
    generator: Generator, requests: Sequence[tuple[TokenIds, int]], sampling: SamplingParams
) -> Sequence[object]:
    """What ``generate`` gives to prompts and their seeds, one each, not checked otherwise."""
    prompts, seeds = [list(map(int, ids)) for ids, _ in requests], [seed for _, seed in requests]
    with raised_by(generator):
        responses: object = generator.generate(prompts, sampling, seeds)
    if not isinstance(responses, Sequence) or len(responses) != len(requests):
        given = f"{len(responses)} responses" if isinstance(responses, Sequence) else _shortened(responses)
        asked = f"{len(requests)} prompts; expected one each, in order"
        raise GeneratorError(f"generator: {name_of(generator)} gave {given} to {asked}.")
    return responses


def _shard_by_shard(
    generator: Generator, shards: Iterable[Sequence[tuple[TokenIds, int]]], sampling: SamplingParams
) -> Iterator[tuple[int, object]]:
    """As ``stream``, by ``generate``."""
    numbers = count()
    for requests in shards:
        yield from ((next(numbers), response) for response in generate_each(generator, requests, sampling))


def check_response(
    response: object, prompt: Prompt, generator: Generator, sampling: SamplingParams, limits: Limits
) -> Response:
    """The one gate that every response passes, whoever wrote it: embedded or in-process engine, server, file, or a
    generator of the user's own.

    A response may have ``max_new_tokens``, or as many as the context leaves (that of the model or, if it is shorter,
    the generator's ``max_seq_len``). One that stopped ends with a stop token or a stop string; one that was cut has all
    the tokens that it may have, unless the generator has ``takes_sampling = False``: other limits cut it. Empty
    responses pass: ``pairs.empty`` says what becomes of them.
    """

    def refuse(found: str) -> GeneratorError:
        return GeneratorError(f"generator: {name_of(generator)}, sample {prompt.sample_id}: the response {found}")

    if not isinstance(response, Response):
        raise refuse(f"is {_shortened(response)}, expected a spin.generators.Response of token ids and finish reason.")
    ids, reason = response.token_ids, response.finish_reason
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__") or not hasattr(ids, "__getitem__"):
        raise refuse(f"has token_ids {_shortened(ids)}, expected a list of token ids.")
    room = min(limits.max_seq_len, getattr(generator, "max_seq_len", sys.maxsize)) - len(prompt.prompt_ids)
    most = max(0, min(sampling.max_new_tokens, room))
    if len(ids) > most:  # before anything walks over it
        why = f"max_new_tokens={most}" if most == sampling.max_new_tokens else f"what the context leaves: {most}"
        raise refuse(f"has {len(ids)} tokens, expected at most {why}.")
    for i, token in enumerate(ids):
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise refuse(f"has {_shortened(token)} as token {i}, expected whole numbers.")
    ids = list(map(int, ids))  # from numpy's
    stops, banned = set(sampling.stop_token_ids), set(sampling.banned_token_ids)
    for i, token in enumerate(ids):
        if not 0 <= token < limits.vocab_size:
            raise refuse(f"has the id {token} as token {i}, expected 0 to {limits.vocab_size - 1}.")
        if token in banned:
            raise refuse(
                f"has the id {token}, which the tokenizer lacks; it cannot be text, and is never sampled here."
            )
        if token in stops and i < len(ids) - 1:
            raise refuse(f"has stop token {token} as token {i} of {len(ids)}, expected it at the end only.")
    if reason not in ("stop", "length"):
        raise refuse(f"has finish reason {_shortened(reason)}, expected stop or length.")
    ends = len(ids) > 0 and ids[-1] in stops
    if reason == "length" and ends:
        raise refuse(
            f"has finish reason 'length' but ends with stop token {ids[-1]}, expected 'stop'. A truncated response "
            "must not be given an end that the model did not write."
        )
    if reason == "length" and 0 < len(ids) < most and getattr(generator, "takes_sampling", True):
        raise refuse(
            f"has finish reason 'length' with {len(ids)} tokens, expected {most} then, or 'stop' with a stop token at "
            "the end. A generator whose context is shorter says so by its attribute max_seq_len."
        )
    if reason == "stop" and len(ids) and not ends and not _has_stop_string(ids, sampling, limits):
        text = f" or a text with one of {list(sampling.stop_strings)}" if sampling.stop_strings else ""
        raise refuse(
            f"has finish reason 'stop' but ends with token {ids[-1]}, expected a stop token of "
            f"{list(sampling.stop_token_ids)}{text}. If the engine left the stop token out, append it: SPIN scores it; "
            "if it stops at others, name them in sampling.stop_token_ids."
        )
    logprobs = response.logprobs
    if sampling.logprobs or logprobs is not None:
        if not isinstance(logprobs, Sequence) or len(logprobs) != len(ids):
            found = f"{len(logprobs)} log-probs" if isinstance(logprobs, Sequence) else f"logprobs {logprobs!r:.60}"
            raise refuse(f"has {found} for {len(ids)} tokens, expected one each.")
        for i, value in enumerate(logprobs):
            if not isinstance(value, float | int):
                raise refuse(f"has {_shortened(value)} as log-prob {i}, expected numbers.")
    return replace(response, token_ids=ids)


def _has_stop_string(ids: Sequence[int], sampling: SamplingParams, limits: Limits) -> bool:
    if not sampling.stop_strings or limits.decode is None:
        return bool(sampling.stop_strings)
    text = limits.decode(list(ids))
    return any(string in text for string in sampling.stop_strings)


def _shortened(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"
