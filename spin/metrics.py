"""Metrics of a step: sums over the rows of a rank, added up over ranks in one all-reduce, then means."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from spin import config
from spin.data.packing import PackedRow
from spin.distributed import World, fail_together, local_tensor
from spin.errors import ConfigError, OutputError, SpinError, wants_traceback
from spin.files import is_marked, json_lines, keep_aside, mark, open_own, replace_text, unused_name, writing
from spin.redact import hide
from spin.tables import log_table, sample_table

log = logging.getLogger(__name__)

_SUMS = (
    "weight",
    "loss",
    "acc",
    "real_rewards",
    "generated_rewards",
    "squared_rewards",
    "real_drift",
    "generated_drift",
    "real_nll",
    "generated_tokens",
    "truncated",
)


class PairSums:
    """Adds up what the metrics of a batch of pairs are made of; one host/device sync, in :meth:`totals`."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None
        self._counts = {"comparisons": 0, "tokens": 0, "positions": 0}

    @torch.no_grad()
    def add(
        self,
        row: PackedRow,
        logps: torch.Tensor,
        losses: torch.Tensor,
        real_rewards: torch.Tensor,
        generated_rewards: torch.Tensor,
    ) -> None:
        """Adds a row.

        Args:
            row (PackedRow): the row.
            logps (torch.Tensor): the policy's summed log-probs, shape (m,).
            losses (torch.Tensor): of each comparison, shape (c,).
            real_rewards (torch.Tensor): shape (c,).
            generated_rewards (torch.Tensor): shape (c,).
        """
        weights = row.weights.double()
        drift = logps.double() - row.reference_logps  # (m,)
        lengths = row.response_lengths.double()
        values = {
            "weight": weights,
            "loss": weights * losses,
            "acc": weights * (real_rewards > generated_rewards),
            "real_rewards": weights * real_rewards,
            "generated_rewards": weights * generated_rewards,
            "squared_rewards": weights * (real_rewards.double() ** 2 + generated_rewards.double() ** 2),
            "real_drift": weights * drift[row.real],
            "generated_drift": weights * drift[row.generated],
            "real_nll": weights * -(logps.double() / lengths)[row.real],
            "generated_tokens": lengths[row.generated],
            "truncated": row.truncated,
        }
        sums = torch.stack([values[name].double().sum() for name in _SUMS])
        self._total = sums if self._total is None else self._total + sums
        self._counts["comparisons"] += row.weights.numel()
        self._counts["tokens"] += row.used_tokens
        self._counts["positions"] += row.tokens.numel()

    def totals(self) -> dict[str, float]:
        """The sums of this rank, by name; waits for the device."""
        sums = [0.0] * len(_SUMS) if self._total is None else self._total.tolist()
        return {**dict(zip(_SUMS, sums, strict=True)), **{name: float(n) for name, n in self._counts.items()}}


def pair_metrics(totals: Mapping[str, float], nll_weight: float = 0.0) -> dict[str, float]:
    """Means over the pairs of a global batch.

    ``loss``, ``acc`` and the ``rewards_*`` carry NeMo-Aligner's names and count pairs whose weight is not 0; rewards
    are scaled by beta. A tie counts as wrong in ``acc``. With an NLL term, ``nll_loss`` is that term before its
    weight, and ``total_loss = loss + nll_weight * nll_loss`` what the step minimises.

    Args:
        totals (Mapping[str, float]): sums over all ranks.
        nll_weight (float): weight of the real responses' mean negative log-prob per token; 0 is no such term.

    Returns:
        dict[str, float]: by name; empty if no pair has weight.

    Source:
        ``megatron_gpt_spin_model.py`` of https://github.com/NVIDIA/NeMo-Aligner for the names.
    """
    n = totals["weight"]
    if n == 0:
        return {}
    real, generated = totals["real_rewards"] / n, totals["generated_rewards"] / n
    both = (real + generated) / 2
    spread = max(0.0, totals["squared_rewards"] - 2 * n * both**2)
    loss, nll = totals["loss"] / n, totals["real_nll"] / n
    return {
        "loss": loss,
        **({"nll_loss": nll, "total_loss": loss + nll_weight * nll} if nll_weight else {}),
        "acc": totals["acc"] / n,
        "rewards_actual_mean": real,
        "rewards_generated_mean": generated,
        "rewards_all_mean": both,
        "rewards_all_std": math.sqrt(spread / max(1.0, 2 * n - 1)),
        "margin": real - generated,
        "avg_generated_lengths": totals["generated_tokens"] / totals["comparisons"],
        "truncated_share": totals["truncated"] / totals["comparisons"],
        "real_logp_drift": totals["real_drift"] / n,
        "generated_logp_drift": totals["generated_drift"] / n,
        "real_nll": nll,
    }


def speed_metrics(totals: Mapping[str, float], pairs: int, seconds: float) -> dict[str, float]:
    """How fast a step was, and how full its rows.

    Args:
        totals (Mapping[str, float]): sums over all ranks.
        pairs (int): of the global batch.
        seconds (float): that the step took.

    Returns:
        dict[str, float]: by name.
    """
    return {
        "row_fill": totals["tokens"] / max(1.0, totals["positions"]),
        "step_time": seconds,
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": totals["tokens"] / seconds,
    }


def validation_metrics(
    losses: torch.Tensor, real_rewards: torch.Tensor, generated_rewards: torch.Tensor, weights: torch.Tensor
) -> dict[str, float]:
    """The SPIN metrics of validation pairs, as :func:`spin.validation.losses_of_pairs` gives them.

    They are means over the pairs, as in training.

    Args:
        losses (torch.Tensor): of each generated response, shape (c,).
        real_rewards (torch.Tensor): shape (c,).
        generated_rewards (torch.Tensor): shape (c,).
        weights (torch.Tensor): what each comparison has of its pair, shape (c,).

    Returns:
        dict[str, float]: means by name; a tie counts as wrong. Empty if no pair has weight.
    """
    total = weights.double().sum()
    if total == 0:
        return {}
    values = {
        "val_spin_loss": losses,
        "val_acc": real_rewards > generated_rewards,
        "val_margin": real_rewards - generated_rewards,
    }
    return {name: (weights.double() @ each.double() / total).item() for name, each in values.items()}


def below(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of the parts of something under its name, ``<name>/<part>``, as metrics services group them."""
    return {f"{name}/{part}": value for part, value in metrics.items()}


class MovedShare:
    """The share of weights that an optimizer step really changes, from a sample of every parameter.

    Made before the step, asked after it. At SPIN's learning rates a step on pure bf16 weights rounds back to where it
    started almost everywhere.

    Args:
        model (nn.Module): the policy; every rank samples its own shards.
        per_parameter (int): weights sampled of each parameter, at most.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, per_parameter: int = 1024) -> None:
        self._sample = []  # views: the step changes weights in place
        for parameter in model.parameters():
            if parameter.requires_grad:
                flat = local_tensor(parameter).detach().view(-1)
                stride = flat.numel() // per_parameter | 1  # odd, so that a sample is not all of one column
                self._sample.append(flat[::stride][:per_parameter])
        self._before = torch.cat(self._sample)

    def share(self, world: World) -> float:
        """Moved weights per sampled weight, over all ranks: one all-reduce, and one wait for the step to be done."""
        moved = torch.cat(self._sample) != self._before
        counts = torch.stack((moved.sum(), moved.new_full((), moved.numel(), dtype=torch.int64))).to(world.device)
        dist.all_reduce(counts)
        moved_weights, sampled_weights = counts.tolist()  # host/device sync
        return moved_weights / sampled_weights


_RUN = "run"  # a kind of folder, see spin.files.start_folder


class MetricsFile:
    """One JSON object a line, each with its step: whole after a restart as if there had been none.

    Args:
        path (Path): the file; lines of steps after ``from_step`` are removed, for they will be made again.
        from_step (int): steps that the resumed state has behind it.

    Raises:
        OutputError: If the file cannot be written.
    """

    def __init__(self, path: Path, from_step: int) -> None:
        self._path = path
        kept = []
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                # a line that a kill cut short belongs to a step that will be made again
                for line, row in json_lines(path):
                    if isinstance(step := row.get("step"), int) and step <= from_step:
                        kept.append(f"{line.decode()}\n")
        replace_text(path, "".join(kept))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a step; an :class:`~spin.errors.OutputError` if it cannot."""
        with writing(self._path), open_own(self._path, "a") as stream:
            stream.write(json.dumps({"step": step, **metrics}, ensure_ascii=False) + "\n")


class MetricService:
    """A metric logger that may be down: what it raises is a warning, and training goes on.

    Nothing is lost by that: ``metrics.jsonl`` has every step.

    Args:
        make (Callable[[], Any]): makes a logger with torchtune's methods ``log_config``, ``log_dict`` and ``close``.

    Raises:
        ConfigError: If the logger's package is not installed.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._logger: Any = None
        self._failures = 0
        try:
            self._logger = make()
        except SpinError:
            raise
        except ImportError as error:
            raise ConfigError(f"metric_logger: {error}") from error
        except Exception as error:  # noqa: BLE001 - a service's library may raise anything
            log.warning(
                f"metric_logger cannot be started ({_told(error)}); metrics.jsonl has everything all the same.",
                exc_info=wants_traceback(),
            )

    def log_config(self, cfg: Any) -> None:
        """Hands over the run's config."""
        self._try("log_config", cfg)

    def log_dict(self, metrics: Mapping[str, float], step: int) -> None:
        """Hands over a step's metrics."""
        self._try("log_dict", metrics, step=step)

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Hands over a table, if the logger can take one; see :func:`spin.tables.log_table`."""
        self._attempt("log_table", lambda: log_table(self._logger, name, rows, step))

    def close(self) -> None:
        """Ends the logger, which may send what it has kept."""
        self._try("close")

    def _try(self, method: str, *args: Any, **kwargs: Any) -> None:
        self._attempt(method, lambda: getattr(self._logger, method)(*args, **kwargs))

    def _attempt(self, method: str, call: Callable[[], object]) -> None:
        if self._logger is None:
            return
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a service's library may raise anything
            self._failures += 1
            if self._failures & (self._failures - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
                log.warning(
                    f"metric_logger.{method} failed ({_told(error)}), {self._failures} times so far. Training goes on; "
                    "metrics.jsonl has everything.",
                    exc_info=wants_traceback(),
                )


class RunLog:
    """What a run tells: ``metrics.jsonl``, ``samples.jsonl``, ``config.yaml`` and the metric logger. Rank 0 does.

    A line that cannot be written must end all ranks, which wait for rank 0 in other places. So it is not an error at
    once: nothing more is written, ``has_failed`` rides on a collective that the run has anyway, and :meth:`check` ends
    the run before a state is saved whose log would lack the line.

    Args:
        cfg (DictConfig): the run's, written down as it is; for its owner alone if it has secrets.
        make_logger (Callable[[], Any]): see :class:`MetricService`.
        from_step (int): see :class:`MetricsFile`.
        world (World): the ranks; on others than 0 nothing happens.

    Raises:
        ConfigError: On all ranks, if the logger's package is not installed.
        OutputError: On all ranks, if a file cannot be begun.
    """

    def __init__(self, cfg: DictConfig, make_logger: Callable[[], Any], from_step: int, world: World) -> None:
        self._folder = Path(cfg.output_dir)
        self._every = cfg.log_every_n_steps
        self._world = world
        self._failure: OutputError | None = None
        with fail_together(world, OutputError):
            if world.is_main:
                self._begin(cfg, make_logger, from_step)

    def _begin(self, cfg: DictConfig, make_logger: Callable[[], Any], from_step: int) -> None:
        self._service = MetricService(make_logger)
        self._service.log_config(config.shown(cfg))  # which torchtune's loggers write to a file and send away
        names = ("metrics.jsonl", "samples.jsonl")
        if cfg.get("resume") == "never":
            self._keep_log((*names, "nonfinite.jsonl"))  # which is begun when a batch is not finite
        if from_step < 0 and not is_marked(self._folder, _RUN):
            for file in (self._folder / name for name in (*names, "nonfinite.jsonl", "config.yaml")):
                if file.is_file() and file.stat().st_size:
                    keep_aside(file, "was there before the first run of this folder")
        with writing(self._folder):
            mark(self._folder, _RUN)
        self._file, self._samples = (MetricsFile(self._folder / name, from_step) for name in names)
        with writing(self._folder / "config.yaml"):
            replace_text(self._folder / "config.yaml", OmegaConf.to_yaml(cfg), private=config.holds_secrets(cfg))

    def _keep_log(self, names: Sequence[str]) -> None:
        """What was asked to start anew does not go on with the files of the run before, which may have come far."""
        for file in (self._folder / name for name in names):
            if file.exists() and file.stat().st_size:
                aside = unused_name(file)
                with writing(aside):
                    file.rename(aside)
                log.warning(f"{file} is of a run before this one, and resume is never: kept as {aside.name}.")

    @property
    def has_failed(self) -> bool:
        """A line could not be written; known on rank 0 alone."""
        return self._failure is not None

    def check(self) -> None:
        """Ends the run, on all ranks with one message, if a line could not be written. Collective."""
        with fail_together(self._world, OutputError):
            if self._failure is not None:
                raise self._failure

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step's metrics; the logger gets every ``log_every_n_steps``-th and each with a validation."""
        if self._world.is_main:
            self._write(self._file, step, metrics)
            if step % self._every == 0 or "val_loss" in metrics:
                self._service.log_dict(metrics, step=step)

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Answers for people to read, from :func:`spin.tables.sample_rows`, to the screen too; all of one step."""
        if self._world.is_main and rows:
            for row in rows:
                self._write(self._samples, row["step"], row)
            self._service.log_table("samples", rows, rows[0]["step"])
            tqdm.write(sample_table(rows))

    def _write(self, file: MetricsFile, step: int, content: Mapping[str, Any]) -> None:
        if self._failure is not None:
            return
        try:
            file.write(step, content)
        except OutputError as error:
            self._failure = error

    def close(self) -> None:
        """Ends the metric logger."""
        if self._world.is_main:
            self._service.close()


def _told(error: Exception) -> str:
    return hide(f"{type(error).__name__}: {error}".split("\n", 1)[0])
