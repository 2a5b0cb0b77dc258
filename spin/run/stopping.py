"""Early stops: signals, the time limit, and the command that resumes from there."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin.core.command import spin_command

_ONE_CTRL_C_SECONDS = 1.0


def seconds_of(max_time: str | None) -> float:
    """A wall-clock budget of the form ``DD:HH:MM:SS``; None never ends."""
    if max_time is None:
        return math.inf
    days, hours, minutes, seconds = map(int, max_time.split(":"))
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


class StopRequest:
    """Whether this rank was asked to stop, by a signal or because ``max_time`` from now is over. A signal is noted:
    the run stops where it can be resumed."""

    def __init__(self, signals: Sequence[str], max_time: str | None) -> None:
        self._signals = [signal.Signals[name] for name in signals]
        self.ends_at = time.monotonic() + seconds_of(max_time)  # by the same clock
        self._before: dict[signal.Signals, Any] = {}
        self._interrupted_at: float | None = None  # by the first Ctrl-C
        self.is_signalled = False

    def install(self) -> None:
        """Catches the signals from now on; in another thread than the main one they are the program's."""
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self.note) for each in self._signals}

    def release(self) -> None:
        """Restores the handlers that were there before."""
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}

    def note(self, signum: int, frame: object) -> None:
        """The signals' handler, which rank 0 acknowledges. A second Ctrl-C raises KeyboardInterrupt, unless a launcher
        sent the first twice."""
        self.is_signalled = True
        again = ""
        if signum == signal.SIGINT:
            if self._interrupted_at is not None:
                if time.monotonic() - self._interrupted_at > _ONE_CTRL_C_SECONDS:
                    raise KeyboardInterrupt
                return
            self._interrupted_at, again = time.monotonic(), " Ctrl-C again ends at once."
        if os.environ.get("RANK", "0") == "0":
            text = f"\n{signal.Signals(signum).name}: stopping; finished steps and responses are kept.{again}\n"
            os.write(2, text.encode())  # print() could interrupt itself here

    @property
    def is_out_of_time(self) -> bool:
        """The budget is used up."""
        return time.monotonic() >= self.ends_at

    @property
    def is_asked(self) -> bool:
        """A signal came, or the budget is used up."""
        return self.is_signalled or self.is_out_of_time


def resume_command(resume: str = "auto") -> str:
    """This process's command in one line for a shell, which resumes from the newest checkpoint.

    A ``resume`` other than ``auto`` is overridden at its end. Under torchrun it starts all processes of this host; of
    several hosts each has a launcher, whose own command is not known here.
    """
    if "ipykernel" in sys.modules:
        return "the same cell of the notebook"
    interpreter, *arguments = sys.orig_argv
    arguments += [] if resume == "auto" else ["resume=auto"]
    begins = (i for i in range(1, min(4, len(arguments))) if arguments[i] == "run")
    spin_run = next((arguments[i + 1 :] for i in begins if Path(arguments[i - 1]).name == "spin"), None)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if arguments and Path(arguments[0]) == Path(sys.executable).with_name("spin"):
            return spin_command(*arguments[1:])
        return shlex.join([interpreter, *arguments]) if spin_run is None else spin_command("run", *spin_run)
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    options = [] if nodes == 1 else ["--nnodes", str(nodes), "<rendezvous options as before>"]
    options += ["--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    where = "" if nodes == 1 else "on each host: "
    if spin_run is not None:
        return where + spin_command("run", *options, *spin_run)
    while arguments and arguments[0] == "-u":  # torchrun's own
        arguments.pop(0)
    launcher = [sys.executable, "-m", "torch.distributed.run", *(["--standalone"] if nodes == 1 else [])]
    return where + shlex.join([*launcher, *options, *arguments])


def resume_hint(where: str, kept: str = "", resume: str = "auto") -> str:
    """The message of a run that stops early, with the command to resume in its second line. ``kept`` is a sentence."""
    return f"Stopped {where} as asked.{kept and ' '}{kept} Resume with:\n{resume_command(resume)}"
