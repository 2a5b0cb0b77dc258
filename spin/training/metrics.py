"""Metrics of a step: sums over the rows of a rank, added up over ranks in one all-reduce, then means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from spin.pairs.packing import PackedRow


@dataclass
class Step:
    """What an optimizer step was."""

    metrics: dict[str, float]  # over all ranks
    must_stop: bool = False  # some rank was asked to stop
    out_of_time: bool = False  # by max_time


def pair_losses(
    loss: nn.Module, row: PackedRow, logps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, real and generated rewards of a row's comparisons, each of shape (c,), from log-probs of shape (m,)."""
    real, generated, reference = row.real, row.generated, row.reference_logps
    return loss(logps[real], logps[generated], reference[real], reference[generated])


class PairSums:
    """Adds up what the metrics of a batch of pairs are made of, on the device."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._total = torch.zeros(())
        self._counts = {"comparisons": 0, "tokens": 0, "positions": 0}

    @torch.no_grad()
    def add(self, row: PackedRow, logps: torch.Tensor, loss: nn.Module) -> None:
        """Adds a row."""
        values = self.values(row, logps, loss)
        sums = torch.stack([each.double().sum() for each in values.values()])
        self._names, self._total = tuple(values), self._total + sums
        self._counts["comparisons"] += row.weights.numel()
        self._counts["tokens"] += row.used_tokens
        self._counts["positions"] += row.tokens.numel()

    def values(self, row: PackedRow, logps: torch.Tensor, loss: nn.Module) -> dict[str, torch.Tensor]:
        """What is summed up of a row, by name; ``loss`` among it."""
        losses, real_rewards, generated_rewards = pair_losses(loss, row, logps)
        weights = row.weights.double()
        drift = logps.double() - row.reference_logps  # (m,)
        lengths = row.response_lengths.double()
        return {
            "weight": weights,
            "loss": weights * losses,
            "ties": weights * (row.equal | (real_rewards == generated_rewards)),
            "won": weights * (~row.equal & (real_rewards > generated_rewards)),
            "real_rewards": weights * real_rewards,
            "generated_rewards": weights * generated_rewards,
            "squared_rewards": weights * (real_rewards.double() ** 2 + generated_rewards.double() ** 2),
            "real_drift": weights * drift[row.real],
            "real_reference": weights * row.reference_logps[row.real],
            "generated_drift": weights * drift[row.generated],
            "real_nll": weights * -(logps.double() / lengths)[row.real],
            "generated_tokens": lengths[row.generated],
            "truncated": row.truncated,
        }

    def totals(self) -> dict[str, float | torch.Tensor]:
        """The sums of this rank, by name; those that the device makes have shape ()."""
        return {**dict(zip(self._names, self._total.unbind(), strict=True)), **self._counts}

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """:func:`pair_metrics` of the totals of all ranks."""
        return pair_metrics(totals)


class ResponseSums(PairSums):
    """The same for real responses alone, without pairs."""

    def values(self, row: PackedRow, logps: torch.Tensor, loss: nn.Module) -> dict[str, torch.Tensor]:
        """Nats and tokens of the responses."""
        return {"loss": -logps, "response_tokens": row.response_lengths}

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """``loss`` in nats per token."""
        return {"loss": totals["loss"] / totals["response_tokens"]}


def pair_metrics(totals: Mapping[str, float]) -> dict[str, float]:
    """Means over the pairs of a global batch.

    ``loss``, ``acc`` and the ``rewards_*`` carry NeMo-Aligner's names and count pairs whose weight is not 0; rewards
    are scaled by beta. ``acc`` is of pairs that are no ties, and 0.5 where all are. Nothing if no pair has weight.

    Source:
        ``megatron_gpt_spin_model.py`` of https://github.com/NVIDIA/NeMo-Aligner for the names.
    """
    n = totals["weight"]
    if n == 0:
        return {}
    real, generated = totals["real_rewards"] / n, totals["generated_rewards"] / n
    both = (real + generated) / 2
    spread = max(0.0, totals["squared_rewards"] - 2 * n * both**2)
    return {
        "loss": totals["loss"] / n,
        "acc": _fraction_won(totals["won"], n - totals["ties"]),
        "rewards_actual_mean": real,
        "rewards_generated_mean": generated,
        "rewards_all_mean": both,
        "rewards_all_std": math.sqrt(spread / max(1.0, 2 * n - 1)),
        "margin": real - generated,
        "avg_generated_lengths": totals["generated_tokens"] / totals["comparisons"],
        "truncated_fraction": totals["truncated"] / totals["comparisons"],
        "real_logp_drift": totals["real_drift"] / n,
        "generated_logp_drift": totals["generated_drift"] / n,
        "real_nll": totals["real_nll"] / n,
        "real_nll_rise": totals["real_drift"] / min(totals["real_reference"], -1e-9),
    }


def _fraction_won(won: float, decided: float) -> float:
    """Pairs won of those that are no ties."""
    return won / decided if decided > 1e-9 else 0.5


def speed_metrics(totals: Mapping[str, float], pairs: int, seconds: float) -> dict[str, float]:
    """How fast a step was, and how full its rows."""
    return {
        "row_fill": totals["tokens"] / max(1.0, totals["positions"]),
        "step_time": seconds,
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": totals["tokens"] / seconds,
    }


def validation_metrics(
    losses: torch.Tensor, real_rewards: torch.Tensor, generated_rewards: torch.Tensor, weights: torch.Tensor
) -> dict[str, float]:
    """The SPIN metrics of validation pairs: means of what :func:`spin.training.validation.eval_pair_losses` gives."""
    total = weights.double().sum()
    if total == 0:
        return {}
    values = {
        "val_spin_loss": losses,
        "val_margin": real_rewards - generated_rewards,
    }
    means = {name: (weights.double() @ each.double() / total).item() for name, each in values.items()}
    won, lost = (
        weights.double() @ each.double()
        for each in (real_rewards > generated_rewards, real_rewards < generated_rewards)
    )
    return means | {"val_acc": _fraction_won(won.item(), (won + lost).item())}


def prefix_keys(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the parts of something under its name, ``<name>/<part>``, as metrics services group them."""
    return {f"{name}/{part}": value for part, value in metrics.items()}


class UpdateFraction:
    """The fraction of weights that an optimizer step really changes, from a sample of each of this rank's shards.

    Made before the step, asked after it. At SPIN's learning rates a step on pure bf16 weights rounds back to where it
    started almost everywhere.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, per_parameter: int = 1024) -> None:
        from spin.model.sharding import local_tensor  # imports torchtune, which sums of metrics need not

        self._sample = []  # views: the step changes weights in place
        for parameter in model.parameters():
            if parameter.requires_grad:
                flat = local_tensor(parameter).detach().view(-1)
                stride = flat.numel() // per_parameter | 1  # odd, so that a sample is not all of one column
                self._sample.append(flat[::stride][:per_parameter])
        self._before = torch.cat(self._sample)

    def measure(self) -> float:
        """Changed weights per sampled one; waits for the step to be done."""
        return (torch.cat(self._sample) != self._before).double().mean().item()  # host/device sync
