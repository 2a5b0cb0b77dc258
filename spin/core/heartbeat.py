"""Rank identity and liveness: equal inputs at the start, heartbeats from then on.

Both go through the ranks' key-value store, not through collectives, which wait forever for a rank that came with
something else, or does not come at all.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from spin.core.errors import ConfigError
from spin.core.terminal import first_lines, some_of

_LONGEST_BEAT_SECONDS = 5.0
_SHOWN = 8  # differences that a message shows

_REMEDY = (
    "The same command resumes from the last checkpoint. distributed_timeout_seconds is the silence that is endured."
)

_stage = "start"


def set_stage(name: str) -> None:
    """Names what this rank does from here on; other ranks report it if this one falls silent."""
    global _stage  # noqa: PLW0603 - one process does one thing at a time
    _stage = name


def compare_ranks(
    store: dist.Store, rank: int, world_size: int, inputs: Mapping[str, str], label: str, timeout: timedelta
) -> None:
    """Raises ConfigError, on all ranks alike, with each difference between what ranks were given and the ranks' hosts.

    ``label`` is another one for every call, ``timeout`` is for the last rank to come.
    """
    mine = json.dumps([socket.gethostname(), dict(inputs)])
    if rank == 0:
        store.set(f"{label}/0", mine)
    store.wait([f"{label}/0"], timeout)
    first = json.loads(store.get(f"{label}/0"))
    store.set(f"{label}/differs/{rank}", "" if first[1] == dict(inputs) else mine)
    others = [f"{label}/differs/{other}" for other in range(world_size)]
    store.wait(others, timeout)
    differing = {other: json.loads(text) for other, text in enumerate(store.multi_get(others)) if text}
    if not differing:
        return
    lines = []
    for name in {key: None for _, found in (first, *differing.values()) for key in found}:
        values: dict[str, list[str]] = {}
        for other, (host, found) in {0: first, **differing}.items():
            values.setdefault(found.get(name, "missing"), []).append(f"rank {other} ({host})")
        if len(values) > 1:
            lines.append(f"{name}: " + ", ".join(f"{value} on {some_of(ranks, 3)}" for value, ranks in values.items()))
    raise ConfigError(
        f"the {world_size} ranks were given different inputs, and would train on a mixture of them:\n"
        + "\n".join(first_lines(lines, _SHOWN))
        + "\nStart all ranks with the same config, data, tokenizer, weights and code. Nothing was changed."
    )


class Heartbeat:
    """Writes to the store, with a connection of its own, that this rank lives and what it does; ends the process when
    another rank falls silent.

    A rank that works for hours while others wait for it is not silent; one that is stopped, or whose host is gone, is.
    Rank 0 watches all, all watch rank 0, and clocks of two hosts are never compared. The process ends as by SIGKILL:
    what was saved stays as it is.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._store, self._rank, self._timeout = store, rank, timeout_seconds
        self._watched = list(range(1, world_size)) if rank == 0 else [0]
        self._pause = min(_LONGEST_BEAT_SECONDS, timeout_seconds / 5)
        self._count = 0
        self._rounds = 0  # of this rank with the store, finished
        self._is_done = threading.Event()
        self._beat()

    def start(self) -> None:
        """Starts watching; every rank has written its first beat."""
        for work in (self._exchange, self._supervise):
            threading.Thread(target=work, name="spin-heartbeat", daemon=True).start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Says that this rank has finished."""
        if not self._is_done.is_set():
            self._is_done.set()
            atexit.unregister(self.stop)

    def _beat(self, is_done: bool = False) -> None:
        self._count += 1
        about = [self._count, is_done, _stage, socket.gethostname(), os.getpid()]
        self._store.set(f"beat/{self._rank}", json.dumps(about))

    def _exchange(self) -> None:
        silence = dict.fromkeys(self._watched, 0.0)
        last: dict[int, Any] = {}
        while silence and not self._is_done.wait(self._pause):
            try:
                self._beat()
                if self._store.check(["verdict"]):
                    _end(self._store.get("verdict").decode())
                found = self._store.multi_get([f"beat/{other}" for other in silence])
            except (RuntimeError, OSError):  # the store is gone or silent; see _supervise
                continue
            self._rounds += 1
            for other, text in zip(list(silence), found, strict=True):
                about = json.loads(text)
                if about[1]:
                    del silence[other]
                elif about != last.get(other):
                    silence[other], last[other] = 0.0, about
                else:  # counted in rounds of this rank: one that was stopped itself has missed nothing
                    silence[other] += self._pause
                    if silence[other] > self._timeout:
                        _, _, stage, host, pid = about
                        verdict = (
                            f"rank {other} (host {host}, process {pid}) has been silent for {silence[other]:.0f} s: it "
                            f"is stopped or gone, or its host is. Its last stage: {stage}. {_REMEDY}"
                        )
                        self._store.set("verdict", verdict)
                        _end(verdict)
        self._rounds = -1
        if self._is_done.is_set():
            with suppress(RuntimeError, OSError):
                self._beat(is_done=True)

    def _supervise(self) -> None:
        """Ends the process when the store is silent: a call to it may never return."""
        silence, seen = 0.0, 0
        while self._rounds >= 0 and not self._is_done.wait(self._pause):
            silence, seen = (silence + self._pause, seen) if self._rounds == seen else (0.0, self._rounds)
            if silence > self._timeout and self._rounds >= 0:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                _end(
                    f"the store of the ranks at {where} has not answered for {silence:.0f} s: the launcher of that "
                    f"host, or rank 0 there, is stopped or gone. This rank was at: {_stage}. {_REMEDY}"
                )


def _end(text: str) -> None:
    print(f"error (rank {os.environ.get('RANK', '0')}): {text}", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may wait in a collective, which nothing else ends


def end_with_launcher() -> None:
    """Has Linux end this process when its launcher ends, even by SIGKILL."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
