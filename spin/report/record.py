"""What a run's folder says about the run, whether it is finished, still writing, or was killed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import pyarrow as pa
import pyarrow.parquet as pq

from spin import config
from spin.core.errors import ConfigError, StoreError
from spin.core.files import AppendedLines, open_regular, read_json
from spin.pairs.store import count_responses
from spin.run.folder import data_sources, iteration_folders, model_of, read_config

Metrics = Mapping[str, Any]
_LENGTHS = ("prompt", "real", "generated")
EVALUATIONS = ("*_vs_*/summary.json", "*/*_vs_*/summary.json")


@dataclass
class IterationRecord:
    """An iteration, as far as it has come."""

    number: int
    steps: list[Metrics] = field(default_factory=list)  # its lines of metrics.jsonl that have a loss
    seconds: dict[str, float] = field(default_factory=dict)  # wall-clock time of the stages that are known
    compiling: float = 0.0  # seconds of these that torch.compile took
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
    fixed_prompts: Sequence[dict[str, Any]] = ()  # their responses before self-play and after each iteration
    starts: Sequence[dict[str, Any]] = ()  # time, command and hardware of each start, see spin.run.log.RunLog
    data: str = ""
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # summaries of spin_evaluate
    remarks: list[str] = field(default_factory=list)  # what could not be read
    written_at: float | None = None  # when metrics.jsonl was last written, in seconds since 1970
    times_replaced: int = 0  # metrics.jsonl, by restarts, while it was read

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
        """The loss of two equal models is ln 2; one of supervised fine-tuning, which has no margin, is another."""
        loss = self.config.get("loss")
        if self.rows and not any("margin" in row for row in self.rows):
            return False
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


class RunReader:
    """Reads a run's folder, and later what was appended or has changed since."""

    def __init__(self, path: Path) -> None:
        self._path = path
        names = ("metrics.jsonl", "samples.jsonl", "fixed_prompts.jsonl", "starts.jsonl")
        self._files = [AppendedLines(path / name) for name in names]
        self._shards: dict[tuple[str, int], Counter[str]] = {}  # by path and time

    def signature(self) -> list[tuple[str, int, int]]:
        """Changes when :meth:`read` would find something else."""
        patterns = ("*.jsonl", "config.yaml", "iteration_*", "iteration_*/*/*", *EVALUATIONS)
        found = []
        for file in {file for pattern in patterns for file in self._path.glob(pattern)}:
            with suppress(FileNotFoundError):  # gone since it was found
                stat = file.stat()
                found.append((str(file), stat.st_size, stat.st_mtime_ns))
        return sorted(found)

    def read(self) -> RunRecord:
        """The run as far as it has come; an OutputError if this is no run's folder."""
        path, folders = self._path, iteration_folders(self._path)
        metrics, samples = ([row for row in f.read() if isinstance(row.get("step"), int)] for f in self._files[:2])
        by_step = {row["step"]: row for row in metrics}
        rows = [by_step[step] for step in sorted(by_step)]
        fixed, starts = (file.read() for file in self._files[2:])
        record = RunRecord(path, {}, rows, [], fixed, starts, times_replaced=self._files[0].times_replaced)
        try:
            if (cfg := read_config(path)) is not None:
                record.config, record.data = config.plain(cfg), data_sources(cfg)
        except ConfigError as error:
            record.remarks.append(str(error))
        if (path / "metrics.jsonl").exists():
            record.written_at = (path / "metrics.jsonl").stat().st_mtime
        own: dict[int, list[Metrics]] = {number: [] for number in folders}
        for row in rows:
            if isinstance(row.get("iteration"), int):
                own.setdefault(row["iteration"], []).append(row)
        for number in sorted(own):
            record.iterations.append(self._iteration(number, own[number], samples, folders.get(number), record.remarks))
        record.evaluations = read_evaluations(path, record.remarks)
        return record

    def _iteration(
        self,
        number: int,
        own: Sequence[Metrics],
        samples: Sequence[dict[str, Any]],
        folder: Path | None,
        remarks: list[str],
    ) -> IterationRecord:
        found = IterationRecord(number)
        found.steps = [row for row in own if is_number(row.get("loss"))]
        if own:
            for stage, name in (("fit", "step_time"), ("validate", "validation_step_time")):
                found.seconds[stage] = sum(row[name] for row in own if is_number(row.get(name)))
            times = (row[name] for row in own for name in row if name.startswith("compile_time/"))
            found.compiling = sum(filter(is_number, times))
            shown = [row for row in samples if own[0]["step"] <= row["step"] <= own[-1]["step"]]
            last = max((row["step"] for row in shown), default=None)
            # a step that was made again after a restart shows its samples again
            latest = [row for row in shown if row["step"] == last]
            found.samples = list(
                {(str(row.get("sample_id")), str(row.get("generated"))): row for row in latest}.values()
            )
        if folder is not None:
            for stage, name in (("play", "responses"), ("score", "pairs")):
                seconds = _store_seconds(folder / name / "manifest.json")
                if seconds is not None:
                    found.seconds[stage] = seconds
            self._count_responses(folder / "responses", found, remarks)
            found.is_exported = model_of(folder) is not None
        return found

    def _count_responses(self, store: Path, found: IterationRecord, remarks: list[str]) -> None:
        """Of the shards that are there: the store may be unfinished."""
        total: Counter[str] = Counter()
        for shard in sorted(store.glob("shard-*.parquet")):
            try:
                key = (str(shard), shard.stat().st_mtime_ns)
                if key not in self._shards:
                    with open_regular(shard) as stream:
                        table = pq.read_table(stream, columns=["finish_reason", *(f"{name}_ids" for name in _LENGTHS)])
                    self._shards[key] = count_responses(table)
            except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                remarks.append(f"{shard}: cannot be read ({error}); its responses are not counted.")
                continue
            total += self._shards[key]
        found.responses, found.truncated = total["responses"], total["truncated"]
        if found.responses:
            found.mean_tokens = {name: total[name] / found.responses for name in _LENGTHS}


def read_run(path: Path) -> RunRecord:
    """Reads a run's folder once."""
    return RunReader(path).read()


def read_evaluations(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """Each ``summary.json`` of spin_evaluate in a folder, or in those within it."""
    found = []
    for file in sorted(file for pattern in EVALUATIONS for file in path.glob(pattern)):
        try:
            found.append(read_json(file, StoreError, ""))
        except StoreError as error:
            remarks.append(str(error))
    return found


def _store_seconds(manifest: Path) -> float | None:
    """From the store's beginning to its sealing; pauses between a kill and a restart are in it."""
    try:
        content = read_json(manifest, StoreError, "")
    except StoreError:
        return None  # not begun
    begun, sealed = content.get("begun_at"), content.get("sealed_at")
    return float(sealed) - float(begun) if is_number(begun) and is_number(sealed) else None
