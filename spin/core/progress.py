"""Where a run stands: its stages, what each has done and how fast, and the time left that follows from it.

Rank 0 shows it on stderr: in a terminal as a line for the run with bars under it, elsewhere as a line now and then.
:func:`show_on` gives it to another front end instead.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Literal, Protocol, get_args

from tqdm import tqdm

from spin.core.errors import OutputError
from spin.core.files import read_json, replace_text
from spin.core.terminal import clock, plural, printable, show

Kind = Literal["validate", "generate", "check", "score", "train", "save"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # the first also before all iterations, and within training

LINE_SECONDS = 30.0  # between two lines of a stage, or a tenth of its time if that is longer


def _compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process so far."""
    counters = sys.modules.get("torch._dynamo.utils")  # it takes a second to import, for nothing where none compiles
    return counters.calculate_time_spent()["total_wall_time"] if counters else 0.0


class RunProgress:
    """A run's stages and the speed of each kind of them.

    Args:
        stages (Sequence[tuple[Kind, int | None]]): all stages of the run in order, with their iterations.
        next_stage (int): the first one that is not done.
        left (Mapping[Kind, int] | None): what is left of each kind, in its unit.
        ends_at (float): when ``max_time`` is over, by ``time.monotonic``.
        rates (Path | None): the file that keeps each kind's seconds, for the next start of the run.
    """

    def __init__(
        self,
        stages: Sequence[tuple[Kind, int | None]] = (),
        next_stage: int = 0,
        left: Mapping[Kind, int] | None = None,
        ends_at: float = math.inf,
        rates: Path | None = None,
    ) -> None:
        self.stages, self.place = stages, next_stage
        self.active: list[Stage] = []  # a stage, and those within it
        self.left, self._done = Counter[Kind](left or {}), Counter[Kind]()
        self._seconds: dict[Kind, float] = defaultdict(float)
        self._first_step = 0.0  # its seconds: it compiles, allocates and reads ahead
        self._ends_at, self._rates_file = ends_at, rates
        known = read_json(rates, OutputError, "Remove it.") if rates and rates.is_file() else {}
        self._known = {kind: float(known[kind]) for kind in KINDS if isinstance(known.get(kind), int | float)}
        self._began = self._charged = time.monotonic()
        self._compiled = _compile_seconds()
        self._compiling: dict[str, float] = defaultdict(float)

    def begin(self, stage: Stage) -> None:
        """A stage begins; if none is active, it is the run's next one of its kind."""
        self._charge()
        stage.is_inner = bool(self.active)
        if not stage.is_inner:
            places = (i for i in range(self.place, len(self.stages)) if self.stages[i][0] == stage.kind)
            self.place = next(places, self.place)
        self.active.append(stage)
        self.left[stage.kind] -= stage.done

    def move(self, stage: Stage, count: int) -> None:
        """A stage has done so many more."""
        self._charge()
        self.left[stage.kind] -= count
        self._done[stage.kind] += count
        if stage.kind == "train" and self._done["train"] == 1:
            self._first_step = self._seconds["train"]

    def end(self, stage: Stage) -> None:
        """A stage has ended, and with it what it did not need to do. One that is not counted is one of its kind."""
        self._charge()
        self.active.remove(stage)
        self.left[stage.kind] -= 1 if stage.total is None else stage.total - stage.done
        self._done[stage.kind] += stage.total is None
        file = self._rates_file
        is_there = file is not None and file.parent.is_dir()  # what a process does after a run may outlive its folder
        if file and is_there and not self.active and os.environ.get("RANK", "0") == "0":
            replace_text(file, json.dumps(self._rates()))

    def _charge(self) -> None:
        """Adds the time since the last call to the innermost stage."""
        now, compiled = time.monotonic(), _compile_seconds()
        if self.active:
            self.active[-1].seconds += now - self._charged
            self._seconds[self.active[-1].kind] += now - self._charged
            self.active[-1].compiling += compiled - self._compiled
            self._compiling[self.active[-1].kind] += compiled - self._compiled
        self._charged, self._compiled = now, compiled

    def compile_seconds(self) -> dict[str, float]:
        """Seconds that torch.compile took since the last call, by stage; only those that took any."""
        self._charge()
        found = {kind: seconds for kind, seconds in self._compiling.items() if seconds}
        self._compiling.clear()
        return found

    @property
    def elapsed(self) -> float:
        """Seconds since the run was started, or started again."""
        return time.monotonic() - self._began

    @property
    def time_left(self) -> tuple[float, bool]:
        """Seconds that what is left takes as fast as what was done, and whether all of its kinds have been seen: if not
        they are a lower bound."""
        total, is_complete, rates = 0.0, True, self._rates()
        for kind, left in self.left.items():
            done = self._done[kind]
            total += max(0, left) * rates.get(kind, self._seconds[kind] / max(1, done))
            is_complete &= left <= 0 or done > 0 or kind in rates
        return total, is_complete

    def _rates(self) -> dict[Kind, float]:
        """Seconds of a unit of each kind, as they were seen now or else by an earlier start of the run."""
        rates = dict(self._known)
        for kind, done in self._done.items():
            seconds = self._seconds[kind]
            if kind == "train":
                done, seconds = done - 1, seconds - self._first_step
            if done > 0:
                rates[kind] = seconds / done
        return rates

    def __str__(self) -> str:
        """The run in a line; empty if it has no plan."""
        if not self.stages:
            return ""
        left, is_complete = self.time_left
        text = f"stage {self.place + 1} of {len(self.stages)}, {clock(self.elapsed)} elapsed"
        if left >= 1:
            text += f", {'about' if is_complete else 'more than'} {clock(left)} left"
        if self._ends_at < math.inf:
            until = max(0.0, self._ends_at - time.monotonic())
            if left > until or (left and is_complete):
                text += f", {'past' if left > until else 'before'} max_time (in {clock(until)})"
            else:
                text += f", max_time in {clock(until)}"
        return text


@dataclass
class Stage:
    """A part of a run, as a front end is shown it."""

    run: RunProgress
    kind: Kind
    title: str
    unit: str  # of the counts, in the singular
    total: int | None  # None: it is not counted
    done: int = 0
    seconds: float = 0.0  # so far, without stages within it
    compiling: float = 0.0  # of these, of torch.compile
    notes: dict[str, str] = field(default_factory=dict)  # such as its loss
    tokens: int = 0  # of what was done now
    before: int = field(init=False)  # done by an earlier start of the run
    is_inner: bool = False  # it stands within another stage

    def __post_init__(self) -> None:
        """What is done before it begins was done before."""
        self.before = self.done

    def update(self, count: int = 1, tokens: int = 0, notes: Mapping[str, str] | None = None) -> None:
        """So many more are done. ``notes`` stand behind the counts from now on."""
        self.done += count
        self.tokens += tokens
        self.notes |= notes or {}
        if count:
            self.run.move(self, count)
        _front_end.move(self)

    def __str__(self) -> str:
        """The stage in a line."""
        parts = [] if self.total is None else [f"{self.done:,}/{self.total:,} {plural(self.unit, self.total)}"]
        made = self.done - self.before
        if made and self.seconds > 0:
            rate = made / self.seconds
            parts.append(
                f"{_number(rate)} {plural(self.unit)}/s" if rate >= 1 else f"{_number(1 / rate)} s/{self.unit}"
            )
            parts += [f"{_number(self.tokens / self.seconds)} tokens/s"] if self.tokens else []
        parts += [f"{name} {value}" for name, value in self.notes.items()]
        parts += [f"{self.compiling:.0f} s of it compiling"] if self.compiling >= 1 else []
        return f"{self.title}: {', '.join(parts)}" if parts else self.title


class FrontEnd(Protocol):
    """Shows a run. Stages within a stage end before it does."""

    def begin(self, stage: Stage) -> None:
        """A stage begins."""

    def move(self, stage: Stage) -> None:
        """The innermost stage has moved."""

    def end(self, stage: Stage) -> None:
        """The innermost stage has ended, or was stopped."""


class Console:
    """A run on stderr of rank 0."""

    def __init__(self) -> None:
        self._bars: list[tqdm] = []  # a line for the run, then a bar for each active stage
        self._next_line = math.inf

    def begin(self, stage: Stage) -> None:
        """Draws a bar, or writes a line for a stage that stands within no other."""
        self._next_line = time.monotonic() + LINE_SECONDS
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":  # which cannot move its cursor
            if not self._bars:
                self._bars.append(tqdm(leave=False, dynamic_ncols=True, bar_format="{desc}", desc=str(stage.run)))
            line = "{desc}" if stage.total is None else "{percentage:3.0f}%|{bar:20}| {desc}"
            counts = {"total": stage.total, "initial": stage.done}
            self._bars.append(tqdm(**counts, leave=False, dynamic_ncols=True, bar_format=line))
            self._bars[-1].set_description_str(str(stage))
        elif not stage.is_inner:
            self._write(stage)

    def move(self, stage: Stage) -> None:
        """Draws again, not more often than a screen needs, or writes a line if it is time for one."""
        if self._bars:
            self._bars[-1].set_description_str(str(stage), refresh=False)
            if self._bars[-1].update(stage.done - self._bars[-1].n):
                self._bars[0].set_description_str(str(stage.run))
        elif (now := time.monotonic()) >= self._next_line:
            self._next_line = now + max(LINE_SECONDS, stage.seconds / 10)
            self._write(stage)

    def end(self, stage: Stage) -> None:
        """Removes the bar; what the stage did stays as a line, unless it is a short one within another."""
        closed = self._bars[-1 if stage.is_inner else 0 :]
        del self._bars[len(self._bars) - len(closed) :]
        for bar in reversed(closed):
            bar.close()
        if not stage.is_inner or stage.seconds > LINE_SECONDS:
            self._write(stage, f" in {clock(stage.seconds)}")

    def _write(self, stage: Stage, took: str = "") -> None:
        run = "" if stage.is_inner or not stage.run.stages else f" | {stage.run}"
        show(printable(f"{stage}{took}{run}", one_line=True), sys.stderr)


class Cell:
    """A run in a notebook's cell: what has ended, a line for the run, and bars that move; ``update`` takes HTML."""

    def __init__(self, update: Callable[[str], object]) -> None:
        self._update = update
        self._ended: deque[str] = deque(maxlen=12)
        self._drawn = 0.0

    def begin(self, stage: Stage) -> None:
        """Draws its bar."""
        self._draw(stage.run)

    def move(self, stage: Stage) -> None:
        """Draws again, five times a second at most."""
        if time.monotonic() >= self._drawn + 0.2:
            self._draw(stage.run)

    def end(self, stage: Stage) -> None:
        """A line in place of its bar."""
        if not stage.is_inner:
            self._ended.append(f"{stage} in {clock(stage.seconds)}")
        self._draw(stage.run)

    def _draw(self, run: RunProgress) -> None:
        self._drawn = time.monotonic()
        lines = [escape(line) for line in (*self._ended, str(run)) if line]
        bars = [(f'max="{stage.total}" value="{stage.done}"' if stage.total else "", stage) for stage in run.active]
        lines += [f"<progress {attributes}></progress> {escape(str(stage))}" for attributes, stage in bars]
        self._update("".join(f"<div>{line}</div>" for line in lines))


class Silence:
    """Shows nothing: other ranks than 0."""

    def begin(self, stage: Stage) -> None:
        """Does nothing, as the others do."""

    move = end = begin


_front_end: FrontEnd = Console() if os.environ.get("RANK", "0") == "0" else Silence()
_run = RunProgress()  # one process does one thing at a time


def show_on(front_end: FrontEnd) -> FrontEnd:
    """Shows runs of this process elsewhere from now on; gives the front end that did before."""
    global _front_end  # noqa: PLW0603
    before, _front_end = _front_end, front_end
    return before


def begin_run(progress: RunProgress | None = None) -> None:
    """The stages from now on are those of a run, or of a program that does not know them before: not those of the run
    that this process did last."""
    global _run  # noqa: PLW0603
    _run = progress or RunProgress()


def compile_seconds() -> dict[str, float]:
    """:meth:`RunProgress.compile_seconds` of the current run."""
    return _run.compile_seconds()


@contextmanager
def stage(kind: Kind, unit: str = "", total: int | None = None, done: int = 0, title: str = "") -> Iterator[Stage]:
    """A stage of the current run, or of a program without one.

    Args:
        kind (Kind): what it is.
        unit (str): what is counted, in the singular.
        total (int | None): how many there are; None: it is not counted.
        done (int): how many of them an earlier start of the program did. A stage with nothing left is not shown.
        title (str): what it is called instead of its kind.

    Yields:
        Stage: its ``update`` counts.
    """
    found = Stage(_run, kind, title or kind, unit, total, done)
    _run.begin(found)
    if not title and not found.is_inner and _run.stages and (iteration := _run.stages[_run.place][1]) is not None:
        found.title = f"iteration {iteration}, {kind}"
    is_shown = total is None or done < total
    try:
        if is_shown:
            _front_end.begin(found)
        yield found
    finally:
        found.run.end(found)
        if is_shown:
            _front_end.end(found)


def _number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
