"""Whether self-play moves a model as fine-tuning on the same real responses would, and how much of it is noise.

At an iteration's start SPIN's mean gradient is that of fine-tuning times half of beta, and noise of the generated
responses comes on top (tests/theory/test_first_order.py). The cosine of two noisy means is too low. Products of means
over different pairs have no bias, so all figures are made of products between rows, which have no pair in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from spin.config import SPINConfig
from spin.core.ranks import World
from spin.model.lora import trainable
from spin.model.sharding import accumulating, local_tensor
from spin.pairs.loader import RowBatch
from spin.pairs.packing import PackedRow
from spin.reference.logprobs import pair_objective

ROWS = 8  # of each rank; as many parts of independent pairs
LEAST_ROWS = 4  # that say anything of their own error
MAX_CHECKS = 4  # of an iteration
_COST = 0.02  # of an iteration's rows, for all of its checks
_COORDINATES = 2**20  # of a gradient, evenly spread; more need more memory
_CLEAR = 2.0  # standard errors by which a signal is above 0

RowLoss = Callable[[PackedRow, torch.Tensor], torch.Tensor]


def is_checked(step: int, steps: int, rows: int, checks: int | None) -> bool:
    """Whether gradients are compared before a step (from 0) of an iteration of so many, of so many rows a rank:
    ``checks`` times, evenly spread from the start on; None for as many, up to four, as cost 2 %."""
    if checks is None:
        checks = min(MAX_CHECKS, int(_COST * rows * steps / (2 * ROWS)))
    return step in {steps * number // checks for number in range(checks)}


def compare_gradients(
    model: nn.Module, batches: Iterable[RowBatch], row_loss: RowLoss, world: World, cfg: SPINConfig
) -> dict[str, float]:
    """:func:`gradient_metrics` of ``row_loss`` and of fine-tuning on the same real responses, over the first rows of
    global batches. Changes nothing: no random number is drawn, and no gradient is left. Collective.

    Costs two passes of forward and backward over eight rows of each rank, and their sampled gradients' memory, 64 MiB
    over all ranks. At an epoch's end it is what rows are left, and nothing with fewer than four.
    """
    rows: list[PackedRow] = []
    for batch in batches:
        rows += batch.rows
        if len(rows) >= ROWS:
            break
    if len(rows) < LEAST_ROWS:
        return {}
    rows = [row.to(world.device) for row in rows[:ROWS]]
    parameters = trainable(model)
    stride = sum(parameter.numel() for parameter in parameters) // _COORDINATES | 1

    def gradient(row: PackedRow, objective: RowLoss) -> torch.Tensor:
        """Of a sum over the pairs of all ranks' rows with one number: this rank's part of it, thinned out."""
        with accumulating(model, [row], unsharded_gradients=cfg.fsdp_accumulate_unsharded) as each_row:
            for only in each_row:  # FSDP2 averages over ranks, world_size undoes that
                total, _ = pair_objective(model, only, partial(objective, only), cfg.logprob_chunk_tokens)
                (total * world.world_size).backward()
        found = []
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found.append(local_tensor(grad).flatten()[::stride].float())
            parameter.grad = None
        return torch.cat(found)

    gradients = torch.stack([gradient(row, objective) for objective in (row_loss, _real_nll) for row in rows])
    products = (gradients @ gradients.T).double().to(world.device)  # (2 r, 2 r)
    weights = torch.stack([row.weights.double().sum() for row in rows])  # (r,)
    for sums in (products, weights):
        dist.all_reduce(sums)
    return gradient_metrics(products.cpu(), weights.cpu(), cfg.global_batch_size)


def _real_nll(row: PackedRow, logps: torch.Tensor) -> torch.Tensor:
    """The loss of fine-tuning in nats a response, weighted as the pairs are."""
    return -(row.weights * logps[row.real]).sum()


def gradient_metrics(products: torch.Tensor, pairs: torch.Tensor, batch_size: int) -> dict[str, float]:
    """What gradients of r parts of independent pairs say, those of SPIN's loss before those of fine-tuning's.

    Args:
        products (torch.Tensor): inner products of all gradients, each a sum over a part's pairs, shape (2 r, 2 r).
        pairs (torch.Tensor): how many each part has, shape (r,).
        batch_size (int): pairs of a step.

    Returns:
        dict[str, float]: ``signal`` and ``sft_signal``, the fraction of a step's squared gradient that is signal,
        negative by noise; and, where both are clear of their noise, ``cosine`` of the two mean gradients with its
        standard error ``cosine_error``, and ``ratio`` of their norms. Their names begin with ``gradient/``.
    """
    parts = len(pairs)
    if not products.isfinite().all() or (pairs == 0).any():
        return {}
    counts = pairs.repeat(2)
    products = products / torch.outer(counts, counts)  # of means

    def between(kept: list[int]) -> torch.Tensor:
        """Means of products between different parts: SPIN's, fine-tuning's, one with the other; shape (3,)."""
        n = len(kept)
        blocks = products.view(2, parts, 2, parts)[:, kept][..., kept].permute(0, 2, 1, 3)  # (2, 2, n, n)
        means = (blocks.sum((2, 3)) - blocks.diagonal(dim1=2, dim2=3).sum(-1)) / (n * (n - 1))
        return torch.stack((means[0, 0], means[1, 1], (means[0, 1] + means[1, 0]) / 2))

    def cosines(squares: torch.Tensor) -> torch.Tensor:
        return squares[..., 2] / (squares[..., 0] * squares[..., 1]).sqrt()

    def error(values: torch.Tensor) -> torch.Tensor:
        """The jackknife's standard error, from values without one part each."""
        return ((parts - 1) * values.var(0, correction=0)).sqrt()

    mean = between(list(range(parts)))
    without = torch.stack([between([each for each in range(parts) if each != part]) for part in range(parts)])
    noise = (counts * (products.diagonal() - mean[:2].repeat_interleave(parts))).view(2, parts).mean(1)  # of one pair
    fractions = mean[:2] / (mean[:2] + noise / batch_size)
    signal, sft_signal = fractions.nan_to_num(0.0).tolist()  # 0 / 0: a gradient that is zero throughout
    found = {"signal": signal, "sft_signal": sft_signal}
    if (mean[:2] > _CLEAR * error(without)[:2]).all() and (without[:, :2] > 0).all():
        found["cosine"], found["cosine_error"] = cosines(mean).item(), error(cosines(without)).item()
        found["ratio"] = math.sqrt(mean[0] / mean[1])
    return {f"gradient/{name}": value for name, value in found.items()}
