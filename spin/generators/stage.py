"""The first stage of an iteration: the opponent plays, that is, it responds to every prompt.

Its responses fill a pair store shard by shard. A shard's content depends on the seed, the iteration and its samples,
not on the rank that makes it or on what was there before, so a run that was killed resumes with the missing shards.
"""

from __future__ import annotations

import heapq
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from spin import config
from spin.config import SPINConfig
from spin.core.errors import GeneratorError, OutputError
from spin.core.files import json_fingerprint
from spin.core.heartbeat import set_stage
from spin.core.ranks import World, raise_on_all_ranks
from spin.core.terminal import progress_bar
from spin.data.dataset import PromptDataset
from spin.data.tokenizer import PromptTokenizer
from spin.generators.engines import EngineGroup, name_of, policy_loaded
from spin.generators.generator import Generator, SamplingParams, StreamingGenerator
from spin.generators.sampling import sample_seed
from spin.pairs.filters import FilteredPairs
from spin.pairs.shards import missing_shards, open_store, seal, split_evenly
from spin.pairs.store import PairStore
from spin.types import Pair, Prompt, Response

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What every response must stay within, whoever writes it.

    Args:
        vocab_size (int): token ids are below it.
        max_seq_len (int): tokens of prompt and response together.
        decode (Callable[[Sequence[int]], str] | None): token ids to text, to look for stop strings; None: not looked
            for.
    """

    vocab_size: int = 2**31  # a store keeps int32
    max_seq_len: int = sys.maxsize
    decode: Callable[[Sequence[int]], str] | None = None


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
    """

    prompts: PromptDataset
    samples: Sequence[int]
    sampling: SamplingParams
    seed: int
    iteration: int = 0
    responses_per_prompt: int = 1
    limits: Limits = field(default_factory=Limits)


def _shortened(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"


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
    task: PlayTask,
    opponent: str,
    tokenizer: PromptTokenizer,
    generator: Generator,
    compute_dtype: str,
    model: Any = None,
) -> dict[str, Any]:
    """Everything that the opponent's responses depend on, by name."""
    return {
        "opponent": opponent,
        "model": model,
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
        "compute_dtype": compute_dtype,
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
) -> None:
    """The policy, as it is now, responds to the prompts of each task, into the pair store ``responses`` of its folder.
    Collective. The generator gets the weights once for all tasks, and only if a response is missing.

    Args:
        tasks (Mapping[Path, PlayTask]): by folder.
        generator (Generator): the opponent's engine.
        model (nn.Module): the opponent, see :func:`spin.generators.engines.policy_loaded`.
        world (World): the ranks.
        cfg (SPINConfig): complete.
        opponent (str): fingerprint of the weights.
        tokenizer (PromptTokenizer): with its chat template.
        group (EngineGroup): this rank's.
        verify (Callable[[], float | None]): called when the generator has the weights; what it returns is the report's
            ``generator/logprob_gap``.
        should_stop (Callable[[], bool]): asked after every response, or after every shard.

    Raises:
        Stopped: If any rank was asked to stop before a store was complete; what there is stays.
        GeneratorError: See :func:`play`.
        OutputError: On all ranks, if a store cannot be written.
    """
    report: dict[str, float] | None = None
    with ExitStack() as loaded:
        for folder, task in tasks.items():
            played_by = (opponent, tokenizer, generator, cfg.compute_dtype, config.plain(cfg.model))
            fingerprint = play_fingerprint(task, *played_by)
            shards = num_shards(len(task.samples), cfg.pairs.prompts_per_shard, group.count)
            store = open_store(folder / "responses", fingerprint, shards, world)
            missing = missing_shards(store, world)
            if store.is_sealed and not missing:
                continue
            if report is None:
                loaded.enter_context(policy_loaded(generator, model))
                gap = verify()
                report = {} if gap is None else {"generator/logprob_gap": gap}
            mine = shards_for_rank(missing, store, task, group)
            total = math.ceil(len(task.samples) / group.count)
            bar = progress_bar(f"{folder.name} responses", "prompt", total, enabled=world.is_main)
            # inside, each group makes as many shards as it has, without a collective of all ranks
            with bar, raise_on_all_ranks(world, OutputError):
                play(store, mine, task, generator, group=group, should_stop=should_stop, on_shard=bar.update)
            seal(store, world, should_stop(), report)


def filtered_responses(folders: Iterable[Path], policies: Any) -> FilteredPairs:
    """The pairs that were played into folders, see :func:`play_tasks`, less what the config's ``pairs`` drops."""
    stores = [PairStore.open(folder / "responses") for folder in folders]
    pairs = chain.from_iterable(store.pairs() for store in stores)
    chosen = {kind: getattr(policies, kind) for kind in ("truncated", "equal_to_real", "empty")}
    return FilteredPairs(pairs, **chosen)


def play_report(folder: Path) -> dict[str, float]:
    """What was measured when a folder's responses were played, by the log's names."""
    return dict(PairStore.open(folder / "responses").manifest.get("report", {}))


def play(
    store: PairStore,
    shards: Sequence[int],
    task: PlayTask,
    generator: Generator,
    *,
    group: EngineGroup | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_shard: Callable[[int], None] = lambda prompts_done: None,
) -> None:
    """Generates responses into shards of a store. Not collective: each group or machine makes its own shards.
    Call it while the generator is :func:`policy_loaded`.

    A generator that can is given all prompts at once, and a shard is written when its last response is there. Every
    response passes :func:`check_response` when it arrives.

    Args:
        store (PairStore): where the responses go; its number of shards divides the samples evenly.
        shards (Sequence[int]): the shards to make.
        task (PlayTask): what is asked.
        generator (Generator): the opponent.
        group (EngineGroup | None): the ranks that share the generator's engine; None: this rank alone.
        should_stop (Callable[[], bool]): asked after every response, or after every shard.
        on_shard (Callable[[int], None]): called with the number of prompts after every shard.

    Raises:
        GeneratorError: If the generator's responses do not fit the prompts.
    """
    set_stage("generating responses")
    group = group or EngineGroup(0, 1)
    count = task.responses_per_prompt
    parts = split_evenly(len(task.samples), store.num_shards)
    check = partial(check_response, generator=generator, sampling=task.sampling, limits=task.limits)

    def chosen(shard: int) -> list[Prompt]:
        return [task.prompts[task.samples[i]] for i in parts[shard]]

    def requests(shard: int) -> Iterator[tuple[Sequence[int], int]]:
        for prompt in chosen(shard):
            for k in range(count):
                seed = sample_seed(task.seed, task.iteration, prompt.sample_id, k)
                yield prompt.prompt_ids, seed  # type: ignore[misc]

    def checked(shard: int, index: int, response: object) -> Response:
        """The response to request ``index`` of a shard."""
        prompt = task.prompts[task.samples[parts[shard][index // count]]]
        return check(response, sample_id=prompt.sample_id, prompt_tokens=len(prompt.prompt_ids))

    def finish(shard: int, responses: Sequence[Response]) -> None:
        played = chosen(shard)
        pairs = _join(played, responses, task)
        if group.writes:
            store.write_shard(shard, pairs)
        on_shard(len(played))

    if isinstance(generator, StreamingGenerator):
        if not shards or group.agree(should_stop()):
            return
        sizes = [len(parts[shard]) * count for shard in shards]
        stream: Any = generator.stream(chain.from_iterable(map(requests, shards)), task.sampling)
        with closing(stream):
            # a rank that shares its engine asks its group, which takes a while; others ask after every response
            ends_here = (lambda: False) if group.is_shared else should_stop

            def checked_part(part: int, index: int, response: object) -> Response:
                return checked(shards[part], index, response)

            for number, responses in _in_parts(stream, sizes, checked_part, ends_here, name_of(generator)):
                finish(shards[number], responses)
                if group.agree(should_stop()):
                    return
        return
    for shard in shards:
        if should_stop():
            return
        asked = list(requests(shard))
        responses = generator.generate(
            [list(map(int, ids)) for ids, _ in asked], task.sampling, [seed for _, seed in asked]
        )
        check_count(responses, len(asked), generator)
        finish(shard, [checked(shard, index, response) for index, response in enumerate(responses)])


def check_count(responses: object, asked: int, generator: Generator) -> None:
    """Raises a GeneratorError unless there is one response for each prompt."""
    if not isinstance(responses, Sequence) or len(responses) != asked:
        given = f"{len(responses)} responses" if isinstance(responses, Sequence) else _shortened(responses)
        raise GeneratorError(
            f"generator: {name_of(generator)} gave {given} to {asked} prompts; expected one each, in order."
        )


def _in_parts(
    stream: Iterable[object],
    sizes: Sequence[int],
    check: Callable[[int, int, object], Response],
    should_stop: Callable[[], bool],
    name: str,
) -> Iterator[tuple[int, list[Response]]]:
    """Sorts numbered responses into consecutive parts; gives each part, in order, when it is complete. Ends early if,
    after a response, it is asked to stop."""
    bounds = np.cumsum([0, *sizes])
    missing = list(sizes)
    found: dict[int, dict[int, Response]] = {}
    for item in stream:
        if not isinstance(item, tuple) or len(item) != 2 or type(item[0]) is not int:
            raise GeneratorError(
                f"generator: {name} gave {_shortened(item)}, expected (number of the request, its Response)."
            )
        index, response = item
        part = int(np.searchsorted(bounds, index, side="right")) - 1
        if not 0 <= part < len(sizes) or not missing[part] or index in found.setdefault(part, {}):
            raise GeneratorError(
                f"generator: {name} responded to request {index} twice, or none such was asked; the "
                f"{sum(sizes)} requests are 0 to {sum(sizes) - 1}."
            )
        found[part][index] = check(part, index - int(bounds[part]), response)
        missing[part] -= 1
        if not missing[part]:
            yield part, [response for _, response in sorted(found.pop(part).items())]
        if should_stop():
            return
    if any(missing):
        raise GeneratorError(f"generator: {name} left {sum(missing)} of {sum(sizes)} prompts without a response.")


def check_response(
    response: object,
    *,
    generator: Generator,
    sampling: SamplingParams,
    limits: Limits,
    sample_id: str,
    prompt_tokens: int,
) -> Response:
    """The one gate that every response passes, whoever wrote it: embedded or in-process engine, server, file, or a
    generator of the user's own.

    A response may have ``max_new_tokens``, or as many as the context leaves (that of the model or, if it is shorter,
    the generator's ``max_seq_len``). One that stopped ends with a stop token or a stop string; one that was cut has all
    the tokens that it may have, unless the generator has ``takes_sampling = False``: other limits cut it. Empty
    responses pass: ``pairs.empty`` says what becomes of them.
    """

    def refuse(found: str) -> GeneratorError:
        return GeneratorError(f"generator: {name_of(generator)}, sample {sample_id}: the response {found}")

    if not isinstance(response, Response):
        raise refuse(f"is {_shortened(response)}, expected a spin.generators.Response of token ids and finish reason.")
    ids, reason = response.token_ids, response.finish_reason
    if isinstance(ids, str | bytes) or not hasattr(ids, "__len__") or not hasattr(ids, "__getitem__"):
        raise refuse(f"has token_ids {_shortened(ids)}, expected a list of token ids.")
    room = min(limits.max_seq_len, getattr(generator, "max_seq_len", sys.maxsize)) - prompt_tokens
    most = max(0, min(sampling.max_new_tokens, room))
    if len(ids) > most:  # before anything walks over it
        why = f"max_new_tokens={most}" if most == sampling.max_new_tokens else f"what the context leaves: {most}"
        raise refuse(f"has {len(ids)} tokens, expected at most {why}.")
    wrong = next((i for i, token in enumerate(ids) if not isinstance(token, Integral) or isinstance(token, bool)), None)
    if wrong is not None:
        raise refuse(f"has {_shortened(ids[wrong])} as token {wrong}, expected whole numbers.")
    ids = list(map(int, ids))  # from numpy's
    if len(ids) and not 0 <= min(ids) <= max(ids) < limits.vocab_size:
        wrong = next(i for i, token in enumerate(ids) if not 0 <= token < limits.vocab_size)
        raise refuse(f"has the id {ids[wrong]} as token {wrong}, expected 0 to {limits.vocab_size - 1}.")
    banned = set(sampling.banned_token_ids).intersection(ids)
    if banned:
        raise refuse(
            f"has the id {min(banned)}, which the tokenizer lacks; it cannot be text, and is never sampled here."
        )
    early = set(sampling.stop_token_ids).intersection(ids[:-1])
    if early:
        where = next(i for i, token in enumerate(ids) if token in early)
        raise refuse(f"has stop token {ids[where]} as token {where} of {len(ids)}, expected it at the end only.")
    if reason not in ("stop", "length"):
        raise refuse(f"has finish reason {_shortened(reason)}, expected stop or length.")
    ends = len(ids) > 0 and ids[-1] in sampling.stop_token_ids
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
        expected = f"a stop token of {list(sampling.stop_token_ids)}"
        if sampling.stop_strings:
            expected += f" or a text with one of {list(sampling.stop_strings)}"
        raise refuse(
            f"has finish reason 'stop' but ends with token {ids[-1]}, expected {expected}. If the engine left the stop "
            "token out, append it: SPIN scores it; if it stops at others, name them in sampling.stop_token_ids."
        )
    if sampling.logprobs or response.logprobs is not None:
        logprobs = response.logprobs
        if not isinstance(logprobs, Sequence) or len(logprobs) != len(ids):
            found = f"{len(logprobs)} log-probs" if isinstance(logprobs, Sequence) else f"logprobs {logprobs!r:.60}"
            raise refuse(f"has {found} for {len(ids)} tokens, expected one each.")
        wrong = next((i for i, value in enumerate(logprobs) if not isinstance(value, float | int)), None)
        if wrong is not None:
            raise refuse(f"has {_shortened(logprobs[wrong])} as log-prob {wrong}, expected numbers.")
    return replace(response, token_ids=ids)


def _has_stop_string(ids: Sequence[int], sampling: SamplingParams, limits: Limits) -> bool:
    if not sampling.stop_strings or limits.decode is None:
        return bool(sampling.stop_strings)
    text = limits.decode(list(ids))
    return any(string in text for string in sampling.stop_strings)


def _join(prompts: Sequence[Prompt], responses: Sequence[Response], task: PlayTask) -> list[Pair]:
    count = task.responses_per_prompt
    pairs = []
    for i, prompt in enumerate(prompts):
        generated = responses[i * count : (i + 1) * count]
        pairs.append(
            Pair(
                sample_id=prompt.sample_id,
                iteration=task.iteration,
                prompt_ids=prompt.prompt_ids,
                real_ids=prompt.real_ids,
                generated=[Response(each.token_ids, each.finish_reason) for each in generated],
            )
        )
    return pairs
