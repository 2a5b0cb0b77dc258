"""Reference log-probs: the opponent scores both responses of its pairs.

At the start of an iteration the policy is the opponent, so there is no second model: the policy's own forward, without
gradient, over the very rows that the first epoch will train on. That is why the first loss of an iteration is exactly
that of two equal models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from spin.data.loader import load_rows
from spin.data.types import Pair
from spin.distributed import World, gather_objects, reshard
from spin.logprobs import response_logps


def score_batches(
    model: nn.Module,
    batches: Sequence[Sequence[Pair]],
    world: World,
    *,
    packing: dict[str, Any],
    chunk_tokens: int = 2048,
    as_in_training: bool = False,
    num_workers: int = 0,
) -> list[Pair]:
    """Fills in the reference log-probs of pairs. Collective: every rank scores its rows and gets all pairs.

    Args:
        model (nn.Module): the policy, while it is the opponent.
        batches (Sequence[Sequence[Pair]]): global batches, as the first epoch will see them.
        world (World): the ranks.
        packing (dict[str, Any]): arguments of :func:`spin.data.packing.pack_batch`, the same as in training.
        chunk_tokens (int): see :func:`spin.logprobs.response_logps`; the same as in training.
        as_in_training (bool): record a graph that nobody will use. Compiled layers need that to be the policy's equal:
            torch.compile makes another program for inference, which rounds differently.
        num_workers (int): threads that pack rows ahead.

    Returns:
        list[Pair]: the pairs of all batches in order, scored.
    """
    keys: list[tuple[tuple[int, str], int]] = []
    logps: list[torch.Tensor] = []
    for batch in load_rows(batches, world, packing, num_workers):
        for row in batch.rows:
            with torch.set_grad_enabled(as_in_training):
                logps.append(response_logps(model, row.to(world.device), chunk_tokens).detach())
            keys.extend((key, count) for key, _, count in row.pair_responses)
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
