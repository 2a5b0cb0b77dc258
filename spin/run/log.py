"""Run outputs, written by rank 0: metrics.jsonl, samples.jsonl, starts.jsonl, config.yaml and the metric loggers."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from spin import config
from spin.core.errors import ConfigError, OutputError, SpinError, show_traceback
from spin.core.files import (
    as_output_error,
    is_marked,
    json_lines,
    keep_aside,
    mark,
    open_own,
    read_lines,
    replace_text,
)
from spin.core.ranks import World, raise_on_all_ranks
from spin.core.redact import hide, redacted
from spin.core.terminal import counted, show
from spin.run.messages import log_table, sample_table
from spin.run.stopping import resume_command

log = logging.getLogger(__name__)

_SHOWN = 2  # sample responses on the screen, at the end of an iteration
_RUN = "run"  # a kind of folder, see spin.core.files.begin_atomic_dir


class MetricService:
    """A metric logger with torchtune's methods, which may be down: what it raises is a warning, and training continues.

    Nothing is lost by that: ``metrics.jsonl`` has every step. ConfigError if its package is not installed.
    """

    def __init__(self, section: config.Component) -> None:
        self._name = f"{section._where} ({section.component.rpartition('.')[2]})"
        self._logger: Any = None
        self._failures = 0
        try:
            self._logger = config.instantiate(section)
        except SpinError:
            raise
        except ImportError as error:
            raise ConfigError(f"{self._name}: {error}") from error
        except Exception as error:  # noqa: BLE001 - a service's library may raise anything
            log.warning(
                f"{self._name} cannot be started ({_one_line(error)}). Training continues; metrics.jsonl has "
                "everything.",
                exc_info=show_traceback(),
            )

    def call(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Calls one of the logger's methods; ``log_table`` as :func:`spin.run.messages.log_table` does."""
        if self._logger is None:
            return
        try:
            to_call = partial(log_table, self._logger) if method == "log_table" else getattr(self._logger, method)
            to_call(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - a service's library may raise anything
            self._failures += 1
            if self._failures & (self._failures - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
                times = "for the first time" if self._failures == 1 else f"{self._failures} times so far"
                log.warning(
                    f"{self._name}: {method} failed ({_one_line(error)}), {times}. Training continues; metrics.jsonl "
                    "has everything.",
                    exc_info=show_traceback(),
                )


class RunLog:
    """Run outputs, written by rank 0: ``metrics.jsonl``, ``samples.jsonl``, ``starts.jsonl`` (time, command and
    hardware of each start), ``config.yaml`` and the metric loggers.

    A line that cannot be written must end all ranks, which wait for rank 0 in other places. So it is no error at once:
    nothing more is written, ``has_failed`` is sent with a collective that the run has anyway, and :meth:`check` ends
    the run before a checkpoint is saved whose log would lack the line.

    Raises on all ranks what :class:`MetricService` and :class:`MetricsFile` (of ``from_step``, negative before the
    first run of a folder) raise. The copy of a config with secrets is readable by its owner alone.
    """

    def __init__(self, cfg: config.SPINConfig, from_step: int, world: World) -> None:
        self._folder = Path(cfg.output_dir)
        self._every = cfg.log_every_n_steps
        self._world = world
        self._failure: OutputError | None = None
        with raise_on_all_ranks(world, OutputError):
            if world.is_main:
                self._begin(cfg, from_step)

    def _begin(self, cfg: config.SPINConfig, from_step: int) -> None:
        self._services = [MetricService(section) for section in cfg.metric_loggers]
        self._call("log_config", config.shown(cfg))  # which torchtune's loggers write to a file and send away
        names = ("metrics.jsonl", "samples.jsonl", "starts.jsonl")
        if cfg.resume == "never":
            self._keep_aside("is of a run before this one, and resume is never", names)
        if from_step < 0 and not is_marked(self._folder, _RUN):
            self._keep_aside("was there before the first run of this folder", (*names, "config.yaml"))
        with as_output_error(self._folder):
            mark(self._folder, _RUN)
            with open_own(self._folder / "starts.jsonl", "a") as stream:
                stream.write(json.dumps(_start(max(0, from_step), self._world)) + "\n")
        self._file, self._samples = (MetricsFile(self._folder / name, from_step) for name in names[:2])
        text = OmegaConf.to_yaml(config.as_written(cfg))
        replace_text(self._folder / "config.yaml", text, private=config.holds_secrets(cfg))

    def _call(self, method: str, *args: Any, **kwargs: Any) -> None:
        for service in self._services:
            service.call(method, *args, **kwargs)

    def _keep_aside(self, because: str, names: Sequence[str]) -> None:
        for file in (self._folder / name for name in (*names, "nonfinite.jsonl")):
            if file.is_file() and file.stat().st_size:
                keep_aside(file, because)

    @property
    def has_failed(self) -> bool:
        """A line could not be written; known on rank 0 alone."""
        return self._failure is not None

    def check(self) -> None:
        """Ends the run, on all ranks with one message, if a line could not be written. Collective."""
        with raise_on_all_ranks(self._world, OutputError):
            if self._failure is not None:
                raise self._failure

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a step's metrics; the logger gets every ``log_every_n_steps``-th and each with a validation."""
        if self._world.is_main:
            self._write(self._file, step, metrics)
            if step % self._every == 0 or "val_loss" in metrics:
                self._call("log_dict", metrics, step=step)

    def samples(self, rows: Sequence[Mapping[str, Any]], is_shown: bool = False) -> None:
        """Writes rows of :func:`spin.run.messages.sample_rows` to the file and the loggers; ``is_shown`` writes the
        first ones to the screen too."""
        if self._world.is_main and rows:
            for row in rows:
                self._write(self._samples, row["step"], row)
            self._call("log_table", "samples", rows, rows[0]["step"])
            if is_shown:
                show(sample_table(rows[:_SHOWN]))

    def _write(self, file: MetricsFile, step: int, content: Mapping[str, Any]) -> None:
        if self._failure is not None:
            return
        try:
            file.write(step, content)
        except OutputError as error:
            self._failure = error

    def close(self) -> None:
        """Ends the metric loggers."""
        if self._world.is_main:
            self._call("close")


def _start(step: int, world: World) -> dict[str, Any]:
    """What a report says of a process that takes up a run at a step."""
    if world.device.type == "cuda":
        hardware = f"{world.world_size} x {torch.cuda.get_device_name(world.device)}"
    else:
        hardware = f"{processor_name()}, {counted(len(os.sched_getaffinity(0)), 'core')}"
    hosts = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return {
        "step": step,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": redacted(hide(resume_command())),
        "hardware": hardware + (f" on {hosts} hosts" if hosts > 1 else ""),
    }


def processor_name() -> str:
    """The CPU's, or its kind where the system does not tell."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found[1] if found else platform.machine()


def _one_line(error: Exception) -> str:
    return hide(f"{type(error).__name__}: {error}".split("\n", 1)[0])


class MetricsFile:
    """One JSON object a line, each with its step; after a restart as complete as if there had been none.

    Lines of steps after ``from_step``, where the resumed checkpoint stands, are removed: they are made again.
    """

    def __init__(self, path: Path, from_step: int) -> None:
        self._path = path
        kept = []
        with as_output_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                # a line that a kill cut short belongs to a step that will be made again
                for line, row in json_lines(read_lines(path)):
                    if isinstance(step := row.get("step"), int) and step <= from_step:
                        kept.append(f"{line.decode()}\n")
        replace_text(path, "".join(kept))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a step; an :class:`~spin.core.errors.OutputError` if it cannot."""
        with as_output_error(self._path), open_own(self._path, "a") as stream:
            stream.write(json.dumps({"step": step, **metrics}, ensure_ascii=False) + "\n")
