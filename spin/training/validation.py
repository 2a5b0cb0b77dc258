"""The policy's loss outside of training: of real responses, of validation pairs, and that of two equal models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from spin.config import SPINConfig
from spin.core.heartbeat import set_stage
from spin.core.ranks import World, all_reduce_sums
from spin.core.terminal import progress_bar
from spin.data.dataset import PromptDataset
from spin.pairs.loader import load_rows
from spin.pairs.packing import PackedRow, RowLayout, pack_row
from spin.reference.logprobs import response_logps
from spin.reference.stage import score_batches
from spin.training.metrics import pair_losses
from spin.types import Pair


@torch.no_grad()
def validation_loss(
    model: nn.Module, world: World, prompts: PromptDataset, num_samples: int, cfg: SPINConfig, layout: RowLayout
) -> dict[str, float]:
    """The supervised loss: mean negative log-prob in nats of the real responses' tokens. Collective.

    Args:
        model (nn.Module): the policy.
        world (World): the ranks.
        prompts (PromptDataset): the validation set.
        num_samples (int): samples of it to take, the first ones.
        cfg (SPINConfig): complete.
        layout (RowLayout): of the rows.

    Returns:
        dict[str, float]: ``val_loss`` over all, and ``val_loss/<source>`` of each source of a mixture.
    """
    set_stage("validation")
    names = ["", *prompts.count_sources(())]  # the first counts all
    nats, tokens = (torch.zeros(len(names), dtype=torch.float64, device=world.device) for _ in range(2))
    samples = (prompts[i] for i in range(num_samples))
    pairs = [Pair(each.sample_id, 0, each.prompt_ids, each.real_ids) for each in samples]
    size = cfg.global_batch_size
    batches = [pairs[i : i + size] for i in range(0, num_samples, size)]
    rows = load_rows(batches, world, layout, cfg.num_workers)
    for batch in progress_bar("validation", "batch", len(batches), rows, enabled=world.is_main):
        for row in (row.to(world.device) for row in batch.rows):
            logps = response_logps(model, row, cfg.logprob_chunk_tokens)
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


@torch.no_grad()
def eval_pair_losses(
    loss: nn.Module,
    model: nn.Module,
    batches: Sequence[Sequence[Pair]],
    world: World,
    layout: RowLayout,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of scored pairs under the policy as it is now. Collective.

    Args:
        loss (nn.Module): such as :class:`spin.loss.SPINLoss`.
        model (nn.Module): the policy.
        batches (Sequence[Sequence[Pair]]): pairs with reference log-probs.
        world (World): the ranks.
        layout (RowLayout): see :func:`spin.reference.stage.score_batches`.
        chunk_tokens (int): see :func:`spin.reference.logprobs.response_logps`.

    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]: losses, rewards of the real and of the generated
        responses, and weights, of which a pair has 1 less what masking takes away; one for every comparison in order
        (of every generated response), on the CPU.
    """
    now = iter(score_batches(model, batches, world, layout=layout, chunk_tokens=chunk_tokens))
    found = []
    for batch in batches:
        row, policy = (_one_row(pairs, layout) for pairs in (batch, [next(now) for _ in batch]))
        found.append((*pair_losses(loss, row, policy.reference_logps), row.weights))
    losses, real_rewards, generated_rewards, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    return losses, real_rewards, generated_rewards, weights


@torch.no_grad()
def initial_loss(loss: nn.Module, pairs: Sequence[Pair], layout: RowLayout) -> tuple[float, float]:
    """What a batch's loss and margin are when the policy is the opponent: ln 2 and 0 for the logistic SPIN loss.

    Args:
        loss (nn.Module): such as :class:`spin.loss.SPINLoss`.
        pairs (Sequence[Pair]): a global batch with reference log-probs, of which some have weight.
        layout (RowLayout): see :func:`spin.reference.stage.score_batches`.

    Returns:
        tuple[float, float]: means over the pairs: the loss, and the real's less the generated response's reward.
    """
    row = _one_row(pairs, layout)
    losses, real_rewards, generated_rewards = pair_losses(loss, row, row.reference_logps)
    weights = row.weights.double() / row.weights.double().sum()
    return (weights @ losses).item(), (weights @ (real_rewards - generated_rewards)).item()


def _one_row(pairs: Sequence[Pair], layout: RowLayout) -> PackedRow:
    """All pairs side by side, however many tokens they have: not for a model."""
    return pack_row(pairs, layout=replace(layout, flex=False))
