"""What a run's folder says about the run, whether it is finished, still writing, or was killed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spin import config
from spin.core.errors import ConfigError, StoreError
from spin.core.files import open_regular, read_json
from spin.run.folder import iteration_folders, model_of, read_config, read_json_lines

Metrics = Mapping[str, Any]


@dataclass
class IterationRecord:
    """An iteration, as far as it has come."""

    number: int
    steps: list[Metrics] = field(default_factory=list)  # its lines of metrics.jsonl that have a loss
    seconds: dict[str, float] = field(default_factory=dict)  # wall-clock time of the stages that are known
    responses: int = 0  # of the opponent, on disk
    truncated: int = 0  # of these, by the length limit
    mean_tokens: dict[str, float] = field(default_factory=dict)  # of ``prompt``, ``real`` and ``generated``
    is_exported: bool = False  # its model is there, so it is finished
    samples: list[dict[str, Any]] = field(default_factory=list)  # shown at its last validation


@dataclass
class RunRecord:
    """A run, as far as it has come."""

    path: Path  # its output_dir
    config: dict[str, Any]  # what it was started with; empty before it has written it
    rows: Sequence[Metrics]  # metrics by step, ascending
    iterations: list[IterationRecord]  # ascending
    remarks: list[str] = field(default_factory=list)  # what could not be read
    written_at: float | None = None  # when metrics.jsonl was last written, in seconds since 1970

    @property
    def is_finished(self) -> bool:
        """The last iteration's model is there, or ``max_steps`` are done."""
        wanted, most = self.config.get("max_iterations"), self.config.get("max_steps")
        done = {iteration.number for iteration in self.iterations if iteration.is_exported}
        return (isinstance(wanted, int) and wanted - 1 in done) or (
            isinstance(most, int) and 0 < most <= self.last_step
        )

    @property
    def is_logistic(self) -> bool:
        """The loss of two equal models is ln 2."""
        loss = self.config.get("loss")
        if not isinstance(loss, dict):
            return True
        known = loss.get("_component_", "spin.loss.SPINLoss") == "spin.loss.SPINLoss"
        return known and loss.get("loss_type", "logistic") in ("logistic", "sigmoid")

    @property
    def last_step(self) -> int:
        """Optimizer steps so far."""
        return max((row["step"] for row in self.rows), default=0)

    def series(self, name: str) -> list[tuple[float, float]]:
        """A metric by step; values that are not finite, or beyond drawing, are left out."""
        return [(row["step"], float(n)) for row in self.rows if is_number(n := row.get(name)) and abs(n) < 1e100]


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number, which a damaged or foreign line may not hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(path: Path) -> RunRecord:
    """Reads a run's folder."""
    folders = iteration_folders(path)
    metrics, samples = (
        [row for row in read_json_lines(path / name) if isinstance(row.get("step"), int)]
        for name in ("metrics.jsonl", "samples.jsonl")
    )
    by_step = {row["step"]: row for row in metrics}
    rows = [by_step[step] for step in sorted(by_step)]
    record = RunRecord(path, {}, rows, [])
    try:
        record.config = {} if (cfg := read_config(path)) is None else config.plain(cfg)
    except ConfigError as error:
        record.remarks.append(str(error))
    if (path / "metrics.jsonl").exists():
        record.written_at = (path / "metrics.jsonl").stat().st_mtime
    played = {row["iteration"] for row in rows if isinstance(row.get("iteration"), int)}
    for number in sorted(played | folders.keys()):
        record.iterations.append(_iteration(number, rows, samples, folders.get(number), record.remarks))
    return record


def _iteration(
    number: int, rows: Sequence[Metrics], samples: Sequence[dict[str, Any]], folder: Path | None, remarks: list[str]
) -> IterationRecord:
    found = IterationRecord(number)
    own = [row for row in rows if row.get("iteration") == number]
    found.steps = [row for row in own if is_number(row.get("loss"))]
    if own:
        for stage, name in (("fit", "step_time"), ("validate", "validation_step_time")):
            found.seconds[stage] = sum(row[name] for row in own if is_number(row.get(name)))
        shown = [row for row in samples if own[0]["step"] <= row["step"] <= own[-1]["step"]]
        last = max((row["step"] for row in shown), default=None)
        # a step that was made again after a restart shows its samples again
        latest = [row for row in shown if row["step"] == last]
        found.samples = list({(str(row.get("sample_id")), str(row.get("generated"))): row for row in latest}.values())
    if folder is not None:
        for stage, name in (("play", "responses"), ("score", "pairs")):
            seconds = _store_seconds(folder / name / "manifest.json")
            if seconds is not None:
                found.seconds[stage] = seconds
        _count_responses(folder / "responses", found, remarks)
        found.is_exported = model_of(folder) is not None
    return found


def _store_seconds(manifest: Path) -> float | None:
    """From the store's beginning to its sealing; pauses between a kill and a restart are in it."""
    try:
        content = read_json(manifest, StoreError, "")
    except StoreError:
        return None  # not begun
    begun, sealed = content.get("begun_at"), content.get("sealed_at")
    return float(sealed) - float(begun) if is_number(begun) and is_number(sealed) else None


def _count_responses(store: Path, found: IterationRecord, remarks: list[str]) -> None:
    tokens = {"prompt": 0, "real": 0, "generated": 0}
    for shard in sorted(store.glob("shard-*.parquet")):
        try:
            with open_regular(shard) as stream:
                table = pq.read_table(stream, columns=["finish_reason", *(f"{name}_ids" for name in tokens)])
            truncated = pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
            lengths = {name: pc.sum(pc.list_value_length(table[f"{name}_ids"])).as_py() or 0 for name in tokens}
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            remarks.append(f"{shard}: cannot be read ({error}); its responses are not counted.")
            continue
        found.responses += table.num_rows
        found.truncated += truncated
        for name, length in lengths.items():
            tokens[name] += length
    if found.responses:
        found.mean_tokens = {name: count / found.responses for name, count in tokens.items()}
