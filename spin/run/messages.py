"""Console messages and tables: samples, the per-iteration summary, a run's start and end."""

from __future__ import annotations

import html
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spin.core.command import spin_command
from spin.core.files import SFT_STAGE, AppendedLines
from spin.core.terminal import counted, cut, fill, plural, printable, wrap
from spin.core.texts import plain_text, turns
from spin.run.progress import SPINProgress
from spin.types import Pair

_TEXTS, _MARGIN_WIDTH = ("prompt", "real", "generated"), 8
_MAX_LINES = 6
LEAST_GAIN = 0.005  # of the validation loss, relative to it; less is none


def sample_rows(
    pairs: Sequence[Pair], margins: Sequence[float], decode: Callable[[Sequence[int]], str], step: int
) -> list[dict[str, Any]]:
    """One row for each generated response, as JSON values; ``margins`` are the differences of their rewards."""
    comparisons = [(pair, response) for pair in pairs for response in pair.generated]
    return [
        {
            "step": step,
            "sample_id": pair.sample_id,
            "iteration": pair.iteration,
            "prompt": decode(list(map(int, pair.prompt_ids))),
            "real": decode(list(map(int, pair.real_ids))),
            "generated": decode(list(map(int, response.token_ids))),
            "finish_reason": response.finish_reason,
            "margin": margin,
        }
        for (pair, response), margin in zip(comparisons, margins, strict=True)
    ]


def sample_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of :func:`sample_rows` as a table of text as wide as the terminal; long cells are truncated."""
    room = (shutil.get_terminal_size((120, 24)).columns - _MARGIN_WIDTH - 3 * len(_TEXTS)) // len(_TEXTS)
    widths = dict.fromkeys(_TEXTS, max(8, min(room, 38))) | {"margin": _MARGIN_WIDTH}

    def line(cells: Mapping[str, str]) -> str:
        return " | ".join(fill(cells[name], width) for name, width in widths.items()).rstrip()

    lines = ["margin: reward of the real less that of the generated response"]
    lines += [line({name: name for name in widths}), "-+-".join("-" * width for width in widths.values())]
    for row in rows:
        # of a long prompt the end says most: it is what was asked last
        texts = {name: plain_text(row[name]) for name in ("real", "generated")}
        texts["prompt"] = "\n".join(f"{role}: {text}" if role else text for role, text in turns(row["prompt"]))
        cells = {name: _wrap(text, widths[name], name == "prompt") for name, text in texts.items()}
        cells["margin"] = [f"{row['margin']:+.3f}"]
        for i in range(max(map(len, cells.values()))):
            lines.append(line({name: cell[i] if i < len(cell) else "" for name, cell in cells.items()}))
        lines.append("")
    return "\n".join(lines)


def log_table(logger: Any, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Hands rows, all with the same columns, to a metric logger in its service's form for tables.

    W&B, MLflow and Comet have tables, TensorBoard shows text. A logger of your own gets the rows if it has a method
    ``log_table(name, rows, step)``. Others are skipped.
    """
    columns = list(rows[0])
    cells = [[row[column] for column in columns] for row in rows]
    file = f"{name}/step_{step:08d}"
    kinds = {base.__name__ for base in type(logger).__mro__ if base.__module__ == "torchtune.training.metric_logging"}
    if callable(getattr(logger, "log_table", None)):
        logger.log_table(name, rows, step)
    elif "WandBLogger" in kinds and logger._wandb.run:
        table = logger._wandb.Table(columns=columns, data=cells)
        logger._wandb.log({name: table, "global_step": step})
    elif "MLFlowLogger" in kinds and logger._mlflow.active_run():
        by_column = {column: [row[column] for row in rows] for column in columns}
        logger._mlflow.log_table(by_column, artifact_file=f"{file}.json", run_id=logger._run_id)
    elif "CometLogger" in kinds and logger.experiment is not None:
        logger.experiment.log_table(f"{file}.csv", tabular_data=cells, headers=columns)
    elif "TensorBoardLogger" in kinds and logger._writer is not None:
        logger._writer.add_text(name, _markdown(columns, cells), global_step=step)


def _markdown(columns: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
    """A table whose cells hold any text: no character of it is taken for markup."""

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        escaped = re.sub(r"([\\`*_{}\[\]()#+\-.!|])", r"\\\1", html.escape(text, quote=False))
        return escaped.replace("\r", "").replace("\n", "<br>")

    lines = [columns, ["---"] * len(columns), *(map(cell, row) for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def iteration_summary(
    title: str,
    history: Sequence[Mapping[str, float]],
    val_loss_before: float | None,
    folder: Path,
    model_dir: Path,
    checkpoint: Path,
) -> str:
    """What an iteration did, and where its results are; ``history`` has the metrics of its steps since the start of the
    program, ``val_loss_before`` the validation loss when the iteration began."""
    steps = [metrics for metrics in history if "loss" in metrics]
    lines = [f"\n=== {title[0].upper()}{title[1:]}: {counted(len(history), 'step')} ==="]
    if steps and abs(steps[0].get("margin", 1.0)) < 1e-4:
        lines.append("(at the first step model and opponent are still the same: no rewards, acc 0.5)")
    for name, label in (
        ("loss", "loss"),
        ("total_loss", "total loss"),
        ("acc", "acc"),
        ("rewards_actual_mean", "reward of real"),
        ("rewards_generated_mean", "reward of generated"),
        ("avg_generated_lengths", "generated tokens"),
        ("truncated_fraction", "truncated fraction"),
    ):
        if any(name in metrics for metrics in steps):
            values = [metrics.get(name, metrics["loss"]) for metrics in steps]  # total_loss: only where it is another
            mean = sum(values) / len(values)
            lines.append(f"{label:>20}: {values[0]:9.4f} first step  {mean:9.4f} mean  {values[-1]:9.4f} last step")
    for name, label, before in (
        ("val_loss", "validation loss", val_loss_before),
        ("val_spin_loss", "validation SPIN loss", None),
        ("val_acc", "validation acc", None),
    ):
        values = [metrics[name] for metrics in history if name in metrics]
        if values:
            start = "" if before is None else f"{before:9.4f} before      "
            lines.append(f"{label:>20}: {start}{values[-1]:9.4f} after")
    output = folder.parent
    for label, path in (
        ("model", model_dir),
        ("checkpoint", checkpoint),
        *([("pairs", folder / "pairs")] if (folder / "pairs").exists() else []),
        ("log", output / "metrics.jsonl"),
        ("report", spin_command("report", output)),
    ):
        lines.append(f"{label:>20}: {path}")
    return printable("\n".join(lines))


def start_message(
    progress: SPINProgress, batch_size: int, num_samples: int, num_val_samples: int, sft_lr: float | None = None
) -> str:
    """What a run is going to do, in a line; ``sft_lr`` is the learning rate of fine-tuning, None for self-play."""
    steps = [progress.steps_in_epoch(iteration) for iteration in range(progress.max_iterations)]
    per_epoch = str(steps[0]) if len(set(steps)) == 1 else f"({', then '.join(map(str, steps))})"
    does, trained = "the model responds to prompts, scores its own and the real responses, and trains", "pair"
    does = f"{counted(progress.max_iterations, 'iteration')}: in each {does}"
    if sft_lr is not None:
        does, trained = f"Fine-tuning (sft.lr={sft_lr:g}) trains", "real response"
    return (
        f"{counted(num_samples, 'sample')}, {num_val_samples:,} for validation. {does} "
        f"{progress.max_epochs} x {per_epoch} {plural('step', max(steps))} of {counted(batch_size, trained)}; "
        f"{counted(progress.total_steps, 'step')} in all, {progress.step:,} done."
    )


def finish_message(output_dir: Path, progress: SPINProgress, had_steps_left: bool, is_sft: bool = False) -> str:
    """Outputs and next commands at a run's end; ``had_steps_left`` tells whether this start of the program trained."""
    models, adapters = (sorted(output_dir.glob(f"iteration_*/{kind}")) for kind in ("hf_model", "adapter"))
    lines = [f"Finished after {counted(progress.step, 'step')}; everything is in {output_dir}"]
    if not had_steps_left:
        lines = [
            f"The run in {output_dir} was finished before, after {counted(progress.step, 'step')}: nothing was "
            "left to do. output_dir=<another folder> starts a new one."
        ]
    lines.append(f"  report:      {spin_command('report', output_dir)}")
    lines += [f"  best:        {best}"] if (best := best_by_validation(output_dir)) else []
    if models:
        lines.append(f"  model:       {models[-1]} loads in transformers and vLLM")
    if adapters:
        lines.append(f"  adapter:     {adapters[-1]} loads in peft")
    if models or adapters:
        before = output_dir / SFT_STAGE if (output_dir / SFT_STAGE).is_dir() else "base"
        lines.append(f"  try it:      {spin_command('chat', output_dir, '--against', before)}")
    if is_sft:
        lines.append("  self-play:   spin_recipe with the same config starts from it")
    elif progress.step >= progress.iteration_start(progress.max_iterations):
        lines.append(f"  train more:  the same command with max_iterations={progress.max_iterations + 1}")
    return "\n".join(lines)


def best_by_validation(output_dir: Path) -> str:
    """Which of the models that a run began with and made has the lowest validation loss; empty if none was measured."""
    losses: dict[int, float] = {}  # at the end of each iteration; of -1: before the first
    for row in AppendedLines(output_dir / "metrics.jsonl").read():
        if "val_loss" in row:
            losses[row.get("iteration", -1)] = row["val_loss"]
    losses = {number: loss for number, loss in losses.items() if math.isfinite(loss)}  # NaN compares as the lowest
    if not losses.keys() - {-1}:
        return ""
    names = {number: f"iteration {number}" if number >= 0 else "the start" for number in losses}
    best = min(losses, key=lambda number: losses[number])
    others = [number for number in dict.fromkeys((-1, max(losses))) if number in losses and number != best]
    shown = {number: f"{loss:.4g}" for number, loss in losses.items()}
    if any(shown[number] == shown[best] for number in others):
        shown = {number: f"{loss:.6g}" for number, loss in losses.items()}
    compared = "".join(f"; {names[number]} {shown[number]}" for number in others)
    if best >= 0 and losses.get(-1, math.inf) - losses[best] < LEAST_GAIN * losses[best]:
        compared += ": next to no gain"
    text = f"{names[best]} by validation (val_loss {shown[best]}{compared}), "
    if best < 0:
        return f"{text}so no iteration is better: lower optimizer.lr, raise nll_weight, or fine-tune (spin_sft)"
    kinds = (output_dir / f"iteration_{best:03d}" / kind for kind in ("hf_model", "adapter"))
    kept = next((str(folder) for folder in kinds if folder.exists()), None)
    return text + (kept or "which was not kept (checkpointer.keep_exports)")


def _wrap(text: str, width: int, keep_end: bool) -> list[str]:
    lines = wrap(printable(" ".join(text.split())), width) or [""]
    if len(lines) <= _MAX_LINES:
        return lines
    if keep_end:
        return ["..." + lines[-_MAX_LINES].removeprefix(cut(lines[-_MAX_LINES], 4)), *lines[1 - _MAX_LINES :]]
    return [*lines[: _MAX_LINES - 1], cut(lines[_MAX_LINES - 1], width - 3) + "..."]
