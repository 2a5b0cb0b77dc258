"""The second stage of an iteration, reference log-probs: the opponent scores both responses of its pairs.

At the start of an iteration the policy is the opponent, so there is no second model: the policy's own forward, without
gradient, over the very rows that the first epoch will train on. That is why the first loss of an iteration is exactly
that of two equal models.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from spin import config
from spin.config import SPINConfig
from spin.core.errors import CheckpointError, OutputError
from spin.core.heartbeat import set_stage
from spin.core.progress import stage
from spin.core.ranks import World, any_rank, gather_objects, raise_on_all_ranks
from spin.model.sharding import reshard
from spin.pairs.loader import load_rows
from spin.pairs.packing import RowLayout
from spin.pairs.shards import missing_shards, open_store, seal, split_evenly
from spin.pairs.store import PairStore
from spin.reference.logprobs import response_logps
from spin.types import Pair


def score_batches(
    model: nn.Module,
    batches: Sequence[Sequence[Pair]],
    world: World,
    *,
    layout: RowLayout,
    chunk_tokens: int = 2048,
    as_in_training: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Pair]:
    """The pairs of global batches, in order, with their reference log-probs. Collective: every rank scores its rows and
    gets all pairs. Batches, ``layout`` and ``chunk_tokens`` (see :func:`spin.reference.logprobs.response_logps`) are
    those of the first epoch.

    With ``as_in_training`` a graph is recorded that nobody will use. Compiled layers need it to be the policy's equal:
    torch.compile makes another program for inference, which rounds differently.
    """
    set_stage("scoring responses")
    keys: list[tuple[tuple[int, str], int]] = []
    logps: list[torch.Tensor] = []
    for batch in load_rows(batches, world, layout):
        for row in batch.rows:
            with torch.set_grad_enabled(as_in_training):
                logps.append(response_logps(model, row.to(world.device), chunk_tokens).detach())
            keys.extend((key, count) for key, _, count in row.pair_responses)
        on_batch()
    if as_in_training:
        reshard(model)  # no backward will
    values = iter(torch.cat(logps).tolist() if logps else [])  # the only wait for the device
    mine = {key: [next(values) for _ in range(count)] for key, count in keys}
    scores: dict[tuple[int, str], list[float]] = {}
    for part in gather_objects(mine, world):
        scores.update(part)
    return [_with_scores(pair, scores[pair.key]) for batch in batches for pair in batch]


def _with_scores(pair: Pair, logps: Sequence[float]) -> Pair:
    generated = [
        replace(response, reference_logp=logp) for response, logp in zip(pair.generated, logps[1:], strict=True)
    ]
    return replace(pair, reference_real_logp=logps[0], generated=generated)


def score_fingerprint(
    batches: Sequence[Sequence[Pair]], cfg: SPINConfig, layout: RowLayout, opponent: str, num_ranks: int
) -> dict[str, Any]:
    """Everything that reference log-probs depend on, by name; down to how they are rounded, which in bf16 is more than
    the self-test of an iteration's first loss lets pass."""
    without = ("compiling_tokens", "right_weight", "unknown_weight")  # which change no log-prob
    digest = hashlib.sha256()
    for batch in batches:
        for pair in batch:
            digest.update(repr(pair.key).encode())
            for ids in pair.parts:
                digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, np.int32).tobytes())
        digest.update(b"batch")
    return {
        "opponent": opponent,
        "pairs": digest.hexdigest(),
        "packing": {name: value for name, value in asdict(layout).items() if name not in without},
        "compute_dtype": cfg.compute_dtype,
        "float8": cfg.enable_float8_training,
        "num_ranks": num_ranks,
        "chunk_tokens": cfg.logprob_chunk_tokens,
        "compiled": cfg.compile,
        "model": config.plain(cfg.model),
    }


def score_pairs(
    path: Path,
    batches: Sequence[Sequence[Pair]],
    model: nn.Module,
    world: World,
    cfg: SPINConfig,
    layout: RowLayout,
    *,
    opponent: str,
    report: Mapping[str, float],
    should_stop: Callable[[], bool],
) -> None:
    """The policy, as it is now, scores all responses of global batches of pairs, as the first epoch will see them, into
    a store; shards that are there stay. Collective.

    ``opponent`` is the fingerprint of the weights, ``report`` what to keep in the store, and ``should_stop`` is asked
    before every shard. Raises Stopped if any rank was asked to stop before the store was complete, OutputError on all
    ranks if it cannot be written.
    """
    num_pairs = len(batches) * cfg.global_batch_size
    fingerprint = score_fingerprint(batches, cfg, layout, opponent, world.world_size)
    store = open_store(path, fingerprint, math.ceil(num_pairs / cfg.pairs.prompts_per_shard), world)
    shards, missing = split_evenly(len(batches), store.num_shards), missing_shards(store, world)
    done = len(batches) - sum(len(shards[shard]) for shard in missing)
    with stage("score", "batch", len(batches), done) as bar:
        for shard in missing:
            if any_rank(should_stop(), world):
                break
            pairs = score_batches(
                model, [batches[i] for i in shards[shard]], world, layout=layout,
                chunk_tokens=cfg.logprob_chunk_tokens, as_in_training=cfg.compile, on_batch=bar.update,
            )  # fmt: skip
            with raise_on_all_ranks(world, OutputError):
                if world.is_main:
                    store.write_shard(shard, pairs)
    seal(store, world, should_stop(), report)


def open_scored(path: Path, opponent: str) -> PairStore:
    """The store of pairs that an iteration is trained on; a ``CheckpointError`` if it is not complete, or scored by
    weights with another fingerprint: the opponent that could complete it is gone."""
    store = PairStore.open(path)
    if not store.is_sealed or store.opponent != opponent:
        raise CheckpointError(
            f"{path}: not the pairs that this run was trained on (the store is "
            f"{'of another opponent' if store.is_sealed else 'not complete'}), and the opponent that could make "
            "them again is gone. Resume from a checkpoint at the iteration's start: resume=<path>."
        )
    return store
