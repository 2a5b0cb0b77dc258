"""The steps of the ladder: forward and backward of the same pairs, from torchtune's DPO recipe to the product's engine.

Every arm computes the same loss, the mean over the pairs of a global batch, from the same reference log-probs, and
leaves the same gradients behind. An arm says how its model is prepared, how a rank's share of a batch is laid out on
the host, and what the loss of one piece of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from spin.core.ranks import World
from spin.data import PackedRow, Pair, pack_batch, pack_row, plan_rows
from spin.loss import SPINLoss
from spin.model.float8 import convert_float8
from spin.pairs.packing import RowLayout, fit_lengths
from spin.reference.logprobs import pair_objective, response_logps

LOSS = SPINLoss(beta=0.1)
ROW_MULTIPLE = 128  # tokens; FlexAttention takes whole blocks
CPU_ROW_MULTIPLE = 16


@dataclass(frozen=True)
class Layout:
    """How a batch is laid out.

    Args:
        world (World): the ranks that share it.
        flex (bool): rows describe their mask for FlexAttention; otherwise it is dense.
        row_tokens (int): tokens of a row at most.
        long_row_tokens (int): the same of the arm with long rows.
        micro_batch (int): pairs of a padded batch.
        chunk_tokens (int): response tokens whose logits exist at a time.
        window (int | None): positions that a layer with a sliding window sees.
    """

    world: World
    flex: bool
    row_tokens: int
    long_row_tokens: int
    micro_batch: int
    chunk_tokens: int
    window: int | None = None

    @property
    def row_multiple(self) -> int:
        """Every row's length is a multiple of this."""
        return ROW_MULTIPLE if self.flex else CPU_ROW_MULTIPLE

    def rows_of(self, lengths: Sequence[int]) -> RowLayout:
        """Fitted to a batch of sequences of these lengths: how well it happens to fill rows decides nothing."""
        return fit_lengths([lengths], self.rows(self.row_tokens), self.world.world_size)

    def rows(self, row_tokens: int) -> RowLayout:
        """Of rows with this many tokens."""
        return RowLayout(row_tokens, self.row_multiple, flex=self.flex, window=self.window)


@dataclass(frozen=True)
class PaddedBatch:
    """Real responses, then generated ones, each behind its prompt and padded on the right to the longest.

    Args:
        tokens (torch.Tensor): int64, shape (2 b, s).
        labels (torch.Tensor): tokens that the previous one predicts, -100 where none counts, shape (2 b, s - 1).
        reference_logps (torch.Tensor): the opponent's summed log-probs, float64, shape (2 b,).
        used_tokens (int): tokens that are not padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    reference_logps: torch.Tensor
    used_tokens: int

    def to(self, device: torch.device) -> PaddedBatch:
        """The batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PaddedBatch:
        """The batch in pinned memory."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> PaddedBatch:
        tensors = (self.tokens, self.labels, self.reference_logps)
        return PaddedBatch(*map(change, tensors), self.used_tokens)


@dataclass(frozen=True)
class Arm:
    """One step of the ladder.

    Args:
        title (str): what it adds to the one before.
        variant (str): which model it runs: ``torchtune`` (untouched), ``eager`` or ``compiled`` (the product's), or,
            compiled too, one of ``FLOAT8``.
        lay_out (Callable[[Sequence[Pair], Layout], list[Any]]): this rank's share of a global batch, on the host.
        loss (Callable[[nn.Module, Any, int], torch.Tensor]): sum of the pairs' losses of one piece of it, given the
            model and ``chunk_tokens``; fp64, with a gradient.
    """

    title: str
    variant: str
    lay_out: Callable[[Sequence[Pair], Layout], list[Any]]
    loss: Callable[[nn.Module, Any, int], torch.Tensor]


def padded_batches(pairs: Sequence[Pair], layout: Layout) -> list[PaddedBatch]:
    """Micro-batches of this rank's pairs, concatenated and padded as torchtune's DPO recipe has them."""
    mine = pairs[layout.world.rank :: layout.world.world_size]
    return [_padded(mine[start : start + layout.micro_batch]) for start in range(0, len(mine), layout.micro_batch)]


def _padded(pairs: Sequence[Pair]) -> PaddedBatch:
    sequences = [(pair.prompt_ids, pair.real_ids, pair.reference_real_logp) for pair in pairs]
    sequences += [(pair.prompt_ids, pair.generated[0].token_ids, pair.generated[0].reference_logp) for pair in pairs]
    lengths = [len(prompt) + len(response) for prompt, response, _ in sequences]
    tokens = np.zeros((len(sequences), max(lengths)), np.int64)
    labels = np.full_like(tokens, -100)
    for i, (prompt, response, _) in enumerate(sequences):
        tokens[i, : len(prompt)] = prompt
        tokens[i, len(prompt) : lengths[i]] = labels[i, len(prompt) : lengths[i]] = response
    references = torch.tensor([reference for _, _, reference in sequences], dtype=torch.float64)
    return PaddedBatch(torch.from_numpy(tokens), torch.from_numpy(labels[:, 1:].copy()), references, sum(lengths))


def padded_loss(model: nn.Module, batch: PaddedBatch, chunk_tokens: int) -> torch.Tensor:
    """As torchtune's DPO recipe: fp32 logits of every token, log-softmax over all of them, gather."""
    logits = model(batch.tokens)[:, :-1]  # (2 b, s, v) -> (2 b, s - 1, v)
    counts = batch.labels != -100
    labels = batch.labels.masked_fill(~counts, 0)
    token_logps = logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)  # (2 b, s - 1)
    real, generated = (token_logps * counts).double().sum(-1).chunk(2)
    return LOSS(real, generated, *batch.reference_logps.chunk(2))[0].sum()


def separate_rows(pairs: Sequence[Pair], layout: Layout) -> list[PackedRow]:
    """Rows in which every response stands behind a prompt of its own; both responses of a pair in one row."""
    lengths = [pair.num_tokens + len(pair.prompt_ids) for pair in pairs]
    row_layout = layout.rows_of(lengths)
    plan = plan_rows(lengths, row_layout, layout.world.world_size)[layout.world.rank]
    rows = []
    for indices in plan:
        singles = [
            Pair(f"{pairs[i].sample_id} {k}", 0, pairs[i].prompt_ids, response, [], reference)
            for i in indices
            for k, (response, reference) in enumerate(zip(pairs[i].parts[1:], pairs[i].reference_logps, strict=True))
        ]
        used = max(1, sum(lengths[i] for i in indices))
        rows.append(pack_row(singles, row_layout.padded_length(used), row_layout))
    return rows


def separate_loss(model: nn.Module, row: PackedRow, chunk_tokens: int) -> torch.Tensor:
    """Responses of :func:`separate_rows` alternate: real, generated."""
    logps, references = response_logps(model, row, chunk_tokens), row.reference_logps
    return LOSS(logps[0::2], logps[1::2], references[0::2], references[1::2])[0].sum()


def shared_rows(pairs: Sequence[Pair], layout: Layout) -> list[PackedRow]:
    """The product's rows: a prompt once for all responses to it."""
    world = layout.world
    return pack_batch(pairs, layout.rows_of([pair.num_tokens for pair in pairs]), world.rank, world.world_size)


def long_rows(pairs: Sequence[Pair], layout: Layout) -> list[PackedRow]:
    """The same, longer."""
    return shared_rows(pairs, replace(layout, row_tokens=layout.long_row_tokens))


def objective_of(row: PackedRow) -> Callable[[torch.Tensor], torch.Tensor]:
    """The sum of the pairs' losses of a row as a function of its responses' log-probs; pairs weigh the same."""
    references = row.reference_logps

    def objective(logps: torch.Tensor) -> torch.Tensor:
        losses, _, _ = LOSS(logps[row.real], logps[row.generated], references[row.real], references[row.generated])
        return (losses * row.weights).sum()

    return objective


def recomputed_loss(model: nn.Module, row: PackedRow, chunk_tokens: int) -> torch.Tensor:
    """Log-probs whose logits are made again in backward."""
    return objective_of(row)(response_logps(model, row, chunk_tokens))


def fused_loss(model: nn.Module, row: PackedRow, chunk_tokens: int) -> torch.Tensor:
    """Loss and gradient of the head in one pass over the vocabulary."""
    return pair_objective(model, row, objective_of(row), chunk_tokens)[0]


ARMS = {
    "padded": Arm("padded, full logits (torchtune's DPO)", "torchtune", padded_batches, padded_loss),
    "packed": Arm("packed rows, chunked log-probs", "eager", separate_rows, separate_loss),
    "shared": Arm("+ shared prompts", "eager", shared_rows, recomputed_loss),
    "fused": Arm("+ fused head", "eager", shared_rows, fused_loss),
    "compiled": Arm("+ compiled layers", "compiled", shared_rows, fused_loss),
    "long": Arm("+ long rows", "compiled", long_rows, fused_loss),
}


def _by_torchao(model: nn.Module, device: torch.device, recipe: str) -> None:
    """torchao's float8 in the layers that the product converts."""
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=device.type == "cpu", pad_inner_dim=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name.startswith("layers."))


# what makes the layers of a variant multiply in float8, given the model and its device
FLOAT8: dict[str, Callable[[nn.Module, torch.device], Any]] = {
    "tensorwise": partial(_by_torchao, recipe="tensorwise"),
    "rowwise": partial(_by_torchao, recipe="rowwise"),
    "float8": convert_float8,
}
