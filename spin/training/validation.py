"""The policy's loss outside of training: of real responses, of validation pairs, and that of two equal models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from spin.config import SPINConfig
from spin.core.heartbeat import set_stage
from spin.core.progress import stage
from spin.core.ranks import World
from spin.data.dataset import PromptDataset
from spin.pairs.loader import load_rows
from spin.pairs.packing import PackedRow, RowLayout, fit_lengths, pack_row
from spin.reference.logprobs import response_logps
from spin.training.metrics import pair_losses
from spin.types import Pair


@torch.no_grad()
def validation_loss(
    model: nn.Module, world: World, prompts: PromptDataset, num_samples: int, cfg: SPINConfig, layout: RowLayout
) -> dict[str, float]:
    """The supervised loss of the first samples, in nats per token of their real responses: ``val_loss`` over all, and
    ``val_loss/<source>`` of each source of a mixture. Collective."""
    set_stage("validation")
    names = ["", *prompts.count_sources(())]  # the first counts all
    nats, tokens = (torch.zeros(len(names), dtype=torch.float64, device=world.device) for _ in range(2))
    samples = (prompts[i] for i in range(num_samples))
    pairs = [Pair(each.sample_id, 0, each.prompt_ids, each.real_ids) for each in samples]
    size = cfg.global_batch_size
    batches = [pairs[i : i + size] for i in range(0, num_samples, size)]
    tokens_of = ([pair.num_tokens for pair in batch] for batch in batches)
    rows = load_rows(batches, world, fit_lengths(tokens_of, replace(layout, fitted=()), world.world_size))
    with stage("validate", "batch", len(batches)) as bar:
        for batch in rows:
            for row in (row.to(world.device) for row in batch.rows):
                logps = response_logps(model, row, cfg.logprob_chunk_tokens)
                belongs = torch.ones(len(names), row.num_responses, dtype=torch.float64)  # (sources, responses)
                for number, name in enumerate(names[1:], start=1):
                    for (_, sample_id), first, count in row.pair_responses:
                        belongs[number, first : first + count] = prompts.count_sources([sample_id])[name]
                belongs = belongs.to(world.device, non_blocking=True)
                nats -= belongs @ logps
                tokens += belongs @ row.response_lengths.double()
            bar.update()
    sums = torch.stack((nats, tokens))
    dist.all_reduce(sums)
    losses = dict(zip(names, zip(*sums.tolist(), strict=True), strict=True))  # host/device sync
    return {f"val_loss/{name}" if name else "val_loss": total / n for name, (total, n) in losses.items() if n}


@torch.no_grad()
def eval_pair_losses(
    loss: nn.Module, pairs: Sequence[Pair], now: Sequence[Pair], layout: RowLayout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, rewards of the real and of the generated responses, and weights of pairs that the opponent has scored,
    and ``now`` the policy: one for every generated response in order, each of shape (c,), on the CPU. A pair's weights
    sum to 1 less what masking takes away."""
    row, policy = (_one_row(each, layout) for each in (pairs, now))
    return (*pair_losses(loss, row, policy.reference_logps), row.weights)


@torch.no_grad()
def initial_loss(loss: nn.Module, pairs: Sequence[Pair], layout: RowLayout) -> tuple[float, float]:
    """A scored batch's mean loss and margin when the policy is the opponent: ln 2 and 0 for the logistic SPIN loss."""
    row = _one_row(pairs, layout)
    losses, real_rewards, generated_rewards = pair_losses(loss, row, row.reference_logps)
    weights = row.weights.double() / row.weights.double().sum()
    return (weights @ losses.double()).item(), (weights @ (real_rewards - generated_rewards).double()).item()


def _one_row(pairs: Sequence[Pair], layout: RowLayout) -> PackedRow:
    """All pairs side by side, however many tokens they have: not for a model."""
    return pack_row(pairs, layout=replace(layout, flex=False))
