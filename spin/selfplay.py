"""The first two stages of an iteration: the opponent plays (answers every prompt), then its answers are scored.

Both fill a pair store shard by shard. A shard's content depends on the seed, the iteration and its samples, not on the
rank that makes it or on what was there before, so a run that was killed makes the missing shards and goes on.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from spin.data.chat import PromptTokenizer
from spin.data.loader import RowBatch
from spin.data.packing import MASK_TRUNCATED, PackedRow, pack_row
from spin.data.prompts import PromptDataset
from spin.data.store import PairStore
from spin.data.types import Pair, Prompt, Response
from spin.distributed import (
    World,
    all_reduce_sums,
    any_rank,
    broadcast_object,
    fail_together,
    gather_objects,
    named_full_tensors,
    unsharded,
)
from spin.errors import CheckpointError, ConfigError, GeneratorError, OutputError, StoreError
from spin.fingerprint import json_fingerprint
from spin.generators.base import Completion, Generator, SamplingParams, StreamingGenerator
from spin.generators.sampling import sample_seed
from spin.logprobs import response_logps
from spin.loss import row_losses
from spin.reference import score_batches

TRUNCATED_POLICIES = ("keep", MASK_TRUNCATED, "drop")
KEEP_OR_DROP = ("keep", "drop")
PROBE_PROMPTS, PROBE_TOKENS = 8, 32  # answers, and tokens of each, that prove a generator's weights


@dataclass(frozen=True)
class Game:
    """What an opponent is asked, and how it is to answer.

    Args:
        prompts (PromptDataset): the data set.
        samples (Sequence[int]): which of its samples are played, in order.
        sampling (SamplingParams): how they are answered.
        seed (int): the run's seed.
        iteration (int): counted from 0.
        responses_per_prompt (int): responses to each prompt.
    """

    prompts: PromptDataset
    samples: Sequence[int]
    sampling: SamplingParams
    seed: int
    iteration: int = 0
    responses_per_prompt: int = 1


@dataclass(frozen=True)
class Team:
    """The ranks that share one engine, among all engines.

    Args:
        index (int): number of this engine.
        count (int): how many engines there are.
        writes (bool): this rank is the one of its team that writes what the engine answers.
        is_shared (bool): there are other ranks in it.
        agree (Callable[[bool], bool]): true if it is true on any rank of the team; collective within the team.
    """

    index: int
    count: int
    writes: bool = True
    is_shared: bool = False
    agree: Callable[[bool], bool] = bool


def team_of(generator: Generator, world: World) -> Team:
    """The team of this rank. Collective if an engine spans several ranks.

    Args:
        generator (Generator): its ``ranks_per_engine``, 1 if it has none, consecutive ranks share an engine.
        world (World): the ranks.

    Returns:
        Team: alone in it, as a rule.
    """
    size = getattr(generator, "ranks_per_engine", 1)
    if size == 1:
        return Team(world.rank, world.world_size)
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world.world_size, size)]
    group = groups[world.rank // size]

    def agree(flag: bool) -> bool:
        flags: list[Any] = [None] * size
        dist.all_gather_object(flags, flag, group=group)
        return any(flags)

    return Team(world.rank // size, world.world_size // size, world.rank % size == 0, True, agree)


def num_shards(num_samples: int, prompts_per_shard: int, teams: int) -> int:
    """Shards of a store of answers: as many for each team, as far as there are samples.

    Args:
        num_samples (int): prompts to play.
        prompts_per_shard (int): prompts of a shard at most.
        teams (int): engines that play.

    Returns:
        int: 1 or more.
    """
    needed = math.ceil(num_samples / prompts_per_shard)
    return max(1, min(num_samples, math.ceil(needed / teams) * teams))


def deal_shards(costs: Mapping[int, int], teams: int) -> list[list[int]]:
    """Deals shards to teams so that all have about the same to do: the dearest first, to whoever has least.

    Args:
        costs (Mapping[int, int]): tokens of each shard, by its number.
        teams (int): how many engines there are.

    Returns:
        list[list[int]]: shards of each team, ascending.
    """
    loads = [(0, team) for team in range(teams)]
    dealt: list[list[int]] = [[] for _ in range(teams)]
    for shard in sorted(costs, key=lambda shard: (-costs[shard], shard)):
        load, team = heapq.heappop(loads)
        dealt[team].append(shard)
        heapq.heappush(loads, (load + costs[shard], team))
    return [sorted(shards) for shards in dealt]


def own_shards(shards: Sequence[int], store: PairStore, game: Game, team: Team) -> list[int]:
    """The shards that this rank's team makes. No rank need be asked: all come to the same deal.

    Args:
        shards (Sequence[int]): all that are to be made.
        store (PairStore): where they will go.
        game (Game): what is asked; an answer counts as long as it may be.
        team (Team): whose share.

    Returns:
        list[int]: ascending.
    """
    parts = split_evenly(len(game.samples), store.num_shards)
    most = game.sampling.max_new_tokens
    costs = {shard: sum(len(game.prompts[game.samples[i]].prompt_ids) + most for i in parts[shard]) for shard in shards}
    return deal_shards(costs, team.count)[team.index]


def open_store(
    path: Any,
    fingerprint: Mapping[str, Any],
    num_shards: int,
    world: World,
    on_stale: Callable[[str], None] | None = None,
) -> PairStore:
    """Opens or begins a store on rank 0 and hands it to all ranks. Collective."""
    store = None
    with fail_together(world, OutputError):
        if world.is_main:
            store = PairStore.open_or_create(path, fingerprint, num_shards, on_stale)
    return broadcast_object(store, world)


def missing_shards(store: PairStore, world: World) -> list[int]:
    """The shards that a store lacks, as rank 0 sees it. Collective."""
    return broadcast_object(store.missing_shards() if world.is_main else None, world)


def seal(store: PairStore, world: World, is_asked_to_stop: bool, report: Mapping[str, float] | None = None) -> bool:
    """Seals a store when all ranks have made their part of it. Collective.

    Args:
        store (PairStore): without a missing shard, unless the run was asked to stop.
        world (World): the ranks.
        is_asked_to_stop (bool): this rank was asked to stop.
        report (Mapping[str, float] | None): figures to keep in it.

    Returns:
        bool: False, and nothing is sealed, if one rank was asked to stop.

    Raises:
        StoreError: On all ranks, if the store is not whole.
        OutputError: On all ranks, if it cannot be written.
    """
    if any_rank(is_asked_to_stop, world):  # waits for all ranks
        return False
    with fail_together(world, OutputError):
        if world.is_main:
            store.seal(report)
    return True


def open_scored(path: Path, opponent: str) -> PairStore:
    """Opens the store of pairs that an iteration is trained on.

    Args:
        path (Path): the store's folder.
        opponent (str): fingerprint of the weights that scored them.

    Returns:
        PairStore: whole.

    Raises:
        CheckpointError: If it is not complete, or another opponent's. The one that could complete it is gone.
    """
    store = PairStore.open(path)
    if not store.is_sealed or store.opponent != opponent:
        raise CheckpointError(
            f"{path}: not the pairs that this run was trained on (the store is "
            f"{'of another opponent' if store.is_sealed else 'not complete'}), and the opponent that could make "
            "them anew is gone. Resume from a checkpoint at the iteration's start: resume=<path>."
        )
    return store


@contextmanager
def awake(generator: Generator, model: nn.Module) -> Iterator[None]:
    """Gives a generator the policy's weights for the time of a block. Collective at entry, not inside.

    Args:
        generator (Generator): the opponent.
        model (nn.Module): the policy, sharded or plain. A generator that runs it in place finds it gathered; another
            one is handed its tensors one at a time.

    Yields:
        None: the generator is ready.
    """
    generator.wake()
    if not generator.shares_policy_weights:
        generator.update_weights(named_full_tensors(model))
    try:
        with unsharded(model) if generator.shares_policy_weights else nullcontext():
            yield
    finally:
        generator.sleep()


def play_fingerprint(
    game: Game, opponent: str, tokenizer: PromptTokenizer, generator: Generator, compute_dtype: str
) -> dict[str, Any]:
    """Everything that the opponent's answers depend on, by name.

    Args:
        game (Game): what is asked.
        opponent (str): fingerprint of the weights.
        tokenizer (PromptTokenizer): with its chat template.
        generator (Generator): the opponent; its ``fingerprint``, if it has one, stands for what it reads.
        compute_dtype (str): precision of its arithmetic.

    Returns:
        dict[str, Any]: JSON values.
    """
    return {
        "opponent": opponent,
        "dataset": game.prompts.fingerprint(),
        **{f"dataset.{key}": value for key, value in game.prompts.settings.items()},
        "samples": json_fingerprint(list(game.samples)),
        "tokenizer": tokenizer.fingerprint,
        "sampling": asdict(game.sampling),
        "seed": game.seed,
        "iteration": game.iteration,
        "responses_per_prompt": game.responses_per_prompt,
        "generator": f"{type(generator).__module__}.{type(generator).__qualname__}",
        "generator_source": getattr(generator, "fingerprint", None),
        "compute_dtype": compute_dtype,
    }


def score_fingerprint(
    *,
    opponent: str,
    batches: Sequence[Sequence[Pair]],
    packing: Mapping[str, Any],
    compute_dtype: str,
    float8: bool = False,
) -> dict[str, Any]:
    """Everything that reference log-probs depend on, by name.

    Args:
        opponent (str): fingerprint of the weights.
        batches (Sequence[Sequence[Pair]]): the pairs in the order of the first epoch.
        packing (Mapping[str, Any]): how they are packed into rows.
        compute_dtype (str): precision of the arithmetic.
        float8 (bool): the layers multiply in float8.

    Returns:
        dict[str, Any]: JSON values.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for pair in batch:
            digest.update(repr(pair.key).encode())
            for ids in (pair.prompt_ids, pair.real_ids, *(response.token_ids for response in pair.generated)):
                digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, np.int32).tobytes())
        digest.update(b"batch")
    return {
        "opponent": opponent,
        "pairs": digest.hexdigest(),
        "packing": dict(packing),
        "compute_dtype": compute_dtype,
        "float8": float8,
    }


def play(
    store: PairStore,
    shards: Sequence[int],
    game: Game,
    generator: Generator,
    *,
    team: Team | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_shard: Callable[[int], None] = lambda prompts_done: None,
) -> None:
    """Answers prompts into shards of a store. Not collective: each team or machine makes shards of its own, and as many
    as it has. Call it while the generator is :func:`awake`.

    A generator that can is given all prompts at once, and a shard is written when its last answer is there.

    Args:
        store (PairStore): where the responses go; its number of shards divides the samples evenly.
        shards (Sequence[int]): the shards to make.
        game (Game): what is asked.
        generator (Generator): the opponent.
        team (Team | None): the ranks that share the generator's engine; None: this rank alone.
        should_stop (Callable[[], bool]): asked after every answer, or after every shard.
        on_shard (Callable[[int], None]): told the number of prompts after every shard.

    Raises:
        GeneratorError: If the generator's answers do not fit the prompts.
    """
    team = team or Team(0, 1)
    parts = split_evenly(len(game.samples), store.num_shards)

    def chosen(shard: int) -> list[Prompt]:
        return [game.prompts[game.samples[i]] for i in parts[shard]]

    def requests(shard: int) -> Iterator[tuple[Sequence[int], int]]:
        for prompt in chosen(shard):
            for k in range(game.responses_per_prompt):
                seed = sample_seed(game.seed, game.iteration, prompt.sample_id, k)
                yield prompt.prompt_ids, seed  # type: ignore[misc]

    def finish(shard: int, completions: Sequence[Completion]) -> None:
        played = chosen(shard)
        pairs = _join(played, completions, game)
        if team.writes:
            store.write_shard(shard, pairs)
        on_shard(len(played))

    if isinstance(generator, StreamingGenerator):
        if not shards or team.agree(should_stop()):
            return
        sizes = [len(parts[shard]) * game.responses_per_prompt for shard in shards]
        stream: Any = generator.stream(chain.from_iterable(map(requests, shards)), game.sampling)
        with closing(stream):
            # a rank that shares its engine asks its team, which takes a while; one that does not asks at every answer
            ends_here = (lambda: False) if team.is_shared else should_stop
            for number, completions in _in_parts(stream, sizes, ends_here):
                finish(shards[number], completions)
                if team.agree(should_stop()):
                    return
        return
    for shard in shards:
        if should_stop():
            return
        asked = list(requests(shard))
        completions = generator.generate(
            [list(map(int, ids)) for ids, _ in asked], game.sampling, [seed for _, seed in asked]
        )
        if len(completions) != len(asked):
            raise GeneratorError(
                f"The generator gave {len(completions)} answers to {len(asked)} prompts; expected one each, in order."
            )
        finish(shard, completions)


def _in_parts(
    answers: Iterable[tuple[int, Completion]], sizes: Sequence[int], should_stop: Callable[[], bool]
) -> Iterator[tuple[int, list[Completion]]]:
    """Sorts numbered answers into consecutive parts; gives each part, in order, when it is complete. Ends early if,
    after an answer, it is asked to stop."""
    bounds = np.cumsum([0, *sizes])
    missing = list(sizes)
    found: dict[int, dict[int, Completion]] = {}
    for index, completion in answers:
        part = int(np.searchsorted(bounds, index, side="right")) - 1
        if not 0 <= part < len(sizes) or index in found.setdefault(part, {}):
            raise GeneratorError(f"The generator answered request {index} twice, or none such was asked.")
        found[part][index] = completion
        missing[part] -= 1
        if not missing[part]:
            yield part, [completion for _, completion in sorted(found.pop(part).items())]
        if should_stop():
            return
    if any(missing):
        raise GeneratorError(f"The generator left {sum(missing)} of {sum(sizes)} prompts without an answer.")


def prove_weights(
    generator: Generator,
    model: nn.Module,
    world: World,
    prompts: PromptDataset,
    sampling: SamplingParams,
    *,
    packing: dict[str, Any],
    chunk_tokens: int,
    as_in_training: bool = False,
) -> float | None:
    """Compares a generator's log-probs of its own answers with the policy's. Collective; call it while it is awake.

    A wrong name map, a tensor that did not arrive, or a cache that was made under other weights shows here and nowhere
    else. The prompts are the same in every iteration, so that a stale cache would be met.

    Args:
        generator (Generator): its ``max_logprob_gap`` (nats per token) is the limit; without one nothing is done.
        model (nn.Module): the policy.
        world (World): the ranks; every engine is asked.
        prompts (PromptDataset): the first few are used.
        sampling (SamplingParams): how to answer.
        packing (dict[str, Any]): see :func:`spin.reference.score_batches`.
        chunk_tokens (int): see :func:`spin.logprobs.response_logps`.
        as_in_training (bool): see :func:`spin.reference.score_batches`.

    Returns:
        float | None: the mean gap in nats per token over all engines, or None.

    Raises:
        GeneratorError: If an engine's mean gap exceeds the limit.
    """
    limit = getattr(generator, "max_logprob_gap", None)
    if limit is None:
        return None
    asked = [prompts[i] for i in range(min(PROBE_PROMPTS, len(prompts)))]
    tokens = min(PROBE_TOKENS, sampling.max_new_tokens)
    answers = generator.generate(
        [list(map(int, prompt.prompt_ids)) for prompt in asked],
        replace(
            sampling,
            max_new_tokens=tokens,
            min_new_tokens=min(tokens, sampling.min_new_tokens),
            stop_strings=(),
            logprobs=True,
        ),
        list(range(len(asked))),
    )
    mine = [
        (Pair(f"{world.rank} {i}", 0, prompt.prompt_ids, answer.token_ids), sum(answer.logprobs or ()))
        for i, (prompt, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    by_rank = gather_objects(mine, world)
    pairs = [pair for part in by_rank for pair, _ in part]
    with torch.no_grad():
        scored = iter(
            score_batches(
                model,
                [pairs],
                world,
                packing=packing,
                chunk_tokens=chunk_tokens,
                as_in_training=as_in_training,
            )
        )
    gaps = []
    for part in by_rank:
        differences = [
            abs(logp - (next(scored).reference_real_logp or 0.0)) / len(pair.real_ids) for pair, logp in part
        ]
        gaps.append(sum(differences) / len(differences))
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    if not gaps[worst] <= limit:  # NaN is not below it either
        raise GeneratorError(
            f"{type(generator).__name__} on rank {worst}: its log-probs differ from the policy's by {gaps[worst]:.4g} "
            f"nats per token on average, expected at most {limit:g} (generator.max_logprob_gap). It does not have the "
            "policy's weights, or computes in another precision. Nothing was generated."
        )
    return sum(gaps) / len(gaps)


def score(
    store: PairStore,
    batches: Sequence[Sequence[Pair]],
    model: nn.Module,
    world: World,
    *,
    packing: dict[str, Any],
    chunk_tokens: int,
    as_in_training: bool = False,
    num_workers: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    on_shard: Callable[[int], None] = lambda pairs_done: None,
) -> None:
    """Scores pairs into the missing shards of a store. Collective.

    Args:
        store (PairStore): where the scored pairs go.
        batches (Sequence[Sequence[Pair]]): global batches, as the first epoch will see them.
        model (nn.Module): the policy, while it is the opponent.
        world (World): the ranks.
        packing (dict[str, Any]): as in training, see :func:`spin.reference.score_batches`.
        chunk_tokens (int): see :func:`spin.logprobs.response_logps`.
        as_in_training (bool): see :func:`spin.reference.score_batches`.
        num_workers (int): see :func:`spin.reference.score_batches`.
        should_stop (Callable[[], bool]): asked before every shard; all ranks stop if it says so on one.
        on_shard (Callable[[int], None]): told the number of pairs after every shard.
    """
    shards = split_evenly(len(batches), store.num_shards)
    for shard in missing_shards(store, world):
        if any_rank(should_stop(), world):
            return
        chosen = [batches[i] for i in shards[shard]]
        pairs = score_batches(
            model,
            chosen,
            world,
            packing=packing,
            chunk_tokens=chunk_tokens,
            as_in_training=as_in_training,
            num_workers=num_workers,
        )
        with fail_together(world, OutputError):
            if world.is_main:
                store.write_shard(shard, pairs)
        on_shard(len(pairs))


@torch.no_grad()
def losses_of_pairs(
    loss: nn.Module,
    model: nn.Module,
    batches: Sequence[Sequence[Pair]],
    world: World,
    *,
    packing: dict[str, Any],
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of scored pairs under the policy as it is now. Collective.

    Args:
        loss (nn.Module): such as :class:`spin.loss.SPINLoss`.
        model (nn.Module): the policy.
        batches (Sequence[Sequence[Pair]]): pairs with reference log-probs.
        world (World): the ranks.
        packing (dict[str, Any]): see :func:`spin.reference.score_batches`.
        chunk_tokens (int): see :func:`spin.logprobs.response_logps`.

    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]: losses, rewards of the real and of the generated responses; one
        for every comparison in order (of a triplet one, else of every generated response), fp64, on the CPU.
    """
    now = iter(score_batches(model, batches, world, packing=packing, chunk_tokens=chunk_tokens))
    found = []
    for batch in batches:
        row, policy = (_one_row(pairs, packing) for pairs in (batch, [next(now) for _ in batch]))
        found.append(row_losses(loss, row, policy.reference_logps))
    losses, real_rewards, generated_rewards = (torch.cat(parts) for parts in zip(*found, strict=True))
    return losses, real_rewards, generated_rewards


@torch.no_grad()
def loss_of_equal_models(loss: nn.Module, pairs: Sequence[Pair], packing: Mapping[str, Any]) -> tuple[float, float]:
    """What a batch's loss and margin are when the policy is the opponent: ln 2 and 0 for the logistic SPIN loss.

    Args:
        loss (nn.Module): such as :class:`spin.loss.SPINLoss`.
        pairs (Sequence[Pair]): a global batch with reference log-probs, of which some have weight.
        packing (Mapping[str, Any]): see :func:`spin.reference.score_batches`.

    Returns:
        tuple[float, float]: means over the pairs: the loss, and the real's less the generated response's reward.
    """
    row = _one_row(pairs, packing)
    losses, real_rewards, generated_rewards = row_losses(loss, row, row.reference_logps)
    weights = row.weights.double() / row.weights.double().sum()
    return (weights @ losses).item(), (weights @ (real_rewards - generated_rewards)).item()


def _one_row(pairs: Sequence[Pair], packing: Mapping[str, Any]) -> PackedRow:
    """All pairs side by side, however many tokens they have: not for a model."""
    return pack_row(pairs, truncated=packing.get("truncated", "keep"), triplets=packing.get("triplets", False))


@torch.no_grad()
def validation_loss(
    model: nn.Module, batches: Iterable[RowBatch], world: World, prompts: PromptDataset, *, chunk_tokens: int
) -> dict[str, float]:
    """The supervised loss: mean negative log-prob in nats of the real responses' tokens. Collective.

    Args:
        model (nn.Module): the policy.
        batches (Iterable[RowBatch]): pairs without generated responses, packed.
        world (World): the ranks.
        prompts (PromptDataset): where the pairs come from.
        chunk_tokens (int): see :func:`spin.logprobs.response_logps`.

    Returns:
        dict[str, float]: ``val_loss`` over all, and ``val_loss/<source>`` of each source of a mixture.
    """
    names = ["", *prompts.count_sources(())]  # the first counts all
    nats, tokens = (torch.zeros(len(names), dtype=torch.float64, device=world.device) for _ in range(2))
    for batch in batches:
        for row in (row.to(world.device) for row in batch.rows):
            logps = response_logps(model, row, chunk_tokens)
            belongs = torch.ones(len(names), row.num_responses, dtype=torch.float64)  # (sources, responses)
            for number, name in enumerate(names[1:], start=1):
                for (_, sample_id), first, count in row.pair_responses:
                    belongs[number, first : first + count] = prompts.count_sources([sample_id])[name]
            belongs = belongs.to(world.device, non_blocking=True)
            nats -= belongs @ logps
            tokens += belongs @ row.response_lengths.double()
    found = {"nats": nats, "tokens": tokens}
    sums = all_reduce_sums(
        {
            f"{kind} {name}": value
            for kind, each in found.items()
            for name, value in zip(names, each.tolist(), strict=True)
        },
        world,
    )
    return {
        f"val_loss/{name}" if name else "val_loss": sums[f"nats {name}"] / sums[f"tokens {name}"]
        for name in names
        if sums[f"tokens {name}"]
    }


def filter_pairs(
    pairs: Iterable[Pair],
    counts: Counter[str],
    *,
    truncated: str = "keep",
    equal_to_real: str = "keep",
    empty: str = "drop",
    whole: bool = False,
) -> Iterator[Pair]:
    """Applies the policies for responses that may not be worth learning from, and counts them.

    Args:
        pairs (Iterable[Pair]): what the opponent answered.
        counts (Counter[str]): filled with counts of responses by name.
        truncated (str): responses cut by the length limit: ``keep`` them as they are (no end token is added), ``mask``
            them (in the store and the metrics, not in the loss), or ``drop`` them.
        equal_to_real (str): responses equal to the real one, which have no gradient: ``keep`` or ``drop``.
        empty (str): responses that consist of a stop token alone: ``keep`` or ``drop``. Responses without any token
            cannot be scored and are always dropped.
        whole (bool): a pair that loses a response loses all of them, as triplets must.

    Yields:
        Pair: the pairs that still have a response.

    Raises:
        ConfigError: If a policy is unknown.
        StoreError: If no pair is left.
    """
    for name, policy, known in (
        ("truncated", truncated, TRUNCATED_POLICIES),
        ("equal_to_real", equal_to_real, KEEP_OR_DROP),
        ("empty", empty, KEEP_OR_DROP),
    ):
        if policy not in known:
            raise ConfigError(f"pairs.{name}={policy!r}: expected {', '.join(known)}.")
    counts.update(responses=0, truncated=0, equal_to_real=0, empty=0, dropped=0, dropped_pairs=0)
    is_any_left = False
    for pair in pairs:
        responses = []
        for response in pair.generated:
            is_truncated = response.finish_reason == "length"
            is_equal = np.array_equal(response.token_ids, pair.real_ids)
            is_empty = len(response.token_ids) == 0 or (len(response.token_ids) == 1 and not is_truncated)
            counts.update(responses=1, truncated=is_truncated, equal_to_real=is_equal, empty=is_empty)
            if (
                (is_truncated and truncated == "drop")
                or (is_equal and equal_to_real == "drop")
                or (is_empty and empty == "drop")
                or len(response.token_ids) == 0
            ):
                counts["dropped"] += 1
            else:
                responses.append(response)
        if whole and len(responses) < len(pair.generated):
            counts["dropped"] += len(responses)
            responses = []
        if responses:
            is_any_left = True
            yield replace(pair, generated=responses)
        else:
            counts["dropped_pairs"] += 1
    if not is_any_left:
        raise StoreError(
            f"No pair is left of {counts['dropped_pairs']}: {dict(counts)}. Every response was dropped by "
            "pairs.truncated, pairs.equal_to_real or pairs.empty; relax them, or raise sampling.max_new_tokens."
        )


def filter_margins(
    pairs: Iterable[Pair],
    counts: Counter[str],
    min_margin: float | None = None,
    max_margin: float | None = None,
    whole: bool = False,
) -> Iterator[Pair]:
    """Leaves out responses that the opponent itself tells from the real one too easily, or not at all, and counts them.

    The margin is the opponent's mean log-prob per token of the real response less that of the generated one, in nats.
    Where it is high the opponent finds the real response the likelier one already; where it is very low the real
    response is foreign to it.

    Args:
        pairs (Iterable[Pair]): scored by the opponent.
        counts (Counter[str]): ``margin_dropped`` counts responses, ``margin_dropped_pairs`` pairs without any left.
        min_margin (float | None): responses with less are left out; None is no limit.
        max_margin (float | None): responses with more are left out; None is no limit.
        whole (bool): the first response speaks for all of its pair, as in triplets.

    Yields:
        Pair: the pairs that still have a response.

    Raises:
        StoreError: If no pair is left.
    """
    counts.update(margin_dropped=0, margin_dropped_pairs=0)
    low, high = float("inf"), -float("inf")
    is_any_left = False
    for pair in pairs:
        margins = [_margin(pair, response) for response in pair.generated]
        low, high = min(low, *margins), max(high, *margins)
        if whole:
            margins = margins[:1] * len(margins)
        kept = [
            response
            for response, margin in zip(pair.generated, margins, strict=True)
            if (min_margin is None or margin >= min_margin) and (max_margin is None or margin <= max_margin)
        ]
        counts["margin_dropped"] += len(pair.generated) - len(kept)
        if kept:
            is_any_left = True
            yield replace(pair, generated=kept)
        else:
            counts["margin_dropped_pairs"] += 1
    if not is_any_left:
        raise StoreError(
            f"No pair is left of {counts['margin_dropped_pairs']}: the opponent's margins are {low:.3g} to {high:.3g} "
            f"nats per token, pairs.min_margin is {min_margin} and pairs.max_margin {max_margin}. Widen them."
        )


def left_out_by_margin(store: Path) -> dict[str, int]:
    """The counts of :func:`filter_margins` that were sealed with a store.

    Args:
        store (Path): an iteration's scored pairs.

    Returns:
        dict[str, int]: by name; empty if nothing was filtered by margin.
    """
    report = PairStore.open(store).manifest.get("report", {})
    return {name: count for name, count in report.items() if name.startswith("margin_dropped")}


def _margin(pair: Pair, response: Response) -> float:
    assert pair.reference_real_logp is not None and response.reference_logp is not None  # the store is of scored pairs
    return pair.reference_real_logp / len(pair.real_ids) - response.reference_logp / len(response.token_ids)


def split_evenly(n: int, parts: int) -> list[range]:
    """``range(n)`` in consecutive parts whose lengths differ by one at most."""
    return [range(n * part // parts, n * (part + 1) // parts) for part in range(parts)]


def _join(prompts: Sequence[Prompt], completions: Sequence[Completion], game: Game) -> list[Pair]:
    count = game.responses_per_prompt
    pairs = []
    for i, prompt in enumerate(prompts):
        answers = completions[i * count : (i + 1) * count]
        for answer in answers:
            ends = len(answer.token_ids) > 0 and answer.token_ids[-1] in game.sampling.stop_token_ids
            if answer.finish_reason == "length" and ends:
                raise GeneratorError(
                    f"sample {prompt.sample_id}: the answer has finish reason 'length' but ends with stop token "
                    f"{answer.token_ids[-1]}. A truncated answer must not be given an end that the model did not write."
                )
        pairs.append(
            Pair(
                sample_id=prompt.sample_id,
                iteration=game.iteration,
                prompt_ids=prompt.prompt_ids,
                real_ids=prompt.real_ids,
                generated=[Response(answer.token_ids, answer.finish_reason) for answer in answers],
            )
        )
    return pairs
