"""A clean end before the end: signals, the time limit, and the command that goes on from there."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from spin.core.errors import ConfigError
from spin.run.progress import RunTimer

_ONE_CTRL_C_SECONDS = 1.0
_TOLD_AT_CTRL_C = b"\nStopping when this step, or shard of answers, is done and saved; Ctrl-C again ends at once.\n"


def parse_signals(names: Sequence[str]) -> list[signal.Signals]:
    """Signals by name.

    Args:
        names (Sequence[str]): such as ``SIGTERM``.

    Returns:
        list[signal.Signals]: the same ones.

    Raises:
        ConfigError: If there is no such signal, or if no process can catch it.
    """
    known = {each.name: each for each in signal.Signals if each not in (signal.SIGKILL, signal.SIGSTOP)}
    for name in names:
        if name not in known:
            raise ConfigError(f"stop_signals={list(names)}: {name!r} is no signal that a run can catch, as SIGTERM is.")
    return [known[name] for name in names]


class StopRequest:
    """Whether this rank was asked to stop. A signal is only noted: the run ends where it can go on from.

    Args:
        signals (Sequence[str]): names of the signals that ask for it.
        max_time (str | None): wall-clock budget, ``DD:HH:MM:SS``; it starts now. None is no budget.

    Raises:
        ConfigError: If a signal or the budget is not one.
    """

    def __init__(self, signals: Sequence[str], max_time: str | None) -> None:
        self._signals = parse_signals(signals)
        self._timer = RunTimer(max_time)
        self._before: dict[signal.Signals, Any] = {}
        self._interrupted_at: float | None = None  # by the first Ctrl-C
        self.is_signalled = False

    def install(self) -> None:
        """Catches the signals from now on, in the main thread."""
        self._before = {each: signal.signal(each, self.note) for each in self._signals}

    def release(self) -> None:
        """Gives the signals back to whom they belonged."""
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}

    def note(self, signum: int, frame: object) -> None:
        """The signals' handler.

        Args:
            signum (int): the signal's number.
            frame (object): where it came.

        Raises:
            KeyboardInterrupt: At a second Ctrl-C. A launcher may hand on the first one twice within a moment.
        """
        if signum == signal.SIGINT:
            if self._interrupted_at is None:
                self._interrupted_at = time.monotonic()
                if os.environ.get("RANK", "0") == "0":
                    os.write(2, _TOLD_AT_CTRL_C)  # print() could interrupt itself here
            elif time.monotonic() - self._interrupted_at > _ONE_CTRL_C_SECONDS:
                raise KeyboardInterrupt
        self.is_signalled = True

    @property
    def is_out_of_time(self) -> bool:
        """The budget is used up."""
        return self._timer.is_over

    @property
    def is_asked(self) -> bool:
        """A signal came, or the budget is used up."""
        return self.is_signalled or self.is_out_of_time


def resume_command(resume: str = "auto") -> str:
    """The command that this process was started with, as a shell takes it, so that it goes on from the newest state.

    Args:
        resume (str): the config's ``resume``; anything but ``auto`` is overridden at the end.

    Returns:
        str: one line. Under torchrun it starts all processes of this host; a run over several hosts has one launcher on
        each, whose own command is not known here.
    """
    interpreter, *arguments = sys.orig_argv
    arguments += [] if resume == "auto" else ["resume=auto"]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join([interpreter, *arguments])
    while arguments and arguments[0] == "-u":  # torchrun's own
        arguments.pop(0)
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    launcher += ["--standalone"] if nodes == 1 else ["--nnodes", str(nodes), "<rendezvous options as before>"]
    launcher += ["--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    where = "" if nodes == 1 else "on each host: "
    return where + shlex.join([*launcher, *arguments])


def resume_hint(step: int, resume: str = "auto") -> str:
    """What a run says that was asked to stop.

    Args:
        step (int): optimizer steps so far.
        resume (str): see :func:`resume_command`.

    Returns:
        str: two lines, the second of which goes on.
    """
    return f"Stopped at step {step} as asked. This command goes on from here:\n{resume_command(resume)}"
