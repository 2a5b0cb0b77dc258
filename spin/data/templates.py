"""Chat templates, rendered within limits of time and memory by :mod:`spin.data.template_worker`."""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import subprocess  # nosec B404
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin.core.errors import DataError
from spin.data.template_worker import CPU_SECONDS, MEMORY_BYTES

_BATCH_CHARS = 1 << 22  # of JSON in one request
# The parent's import path as it is: the worker's own folder has a types.py.
_PROGRAM = "import sys, runpy; sys.path[:] = {path!r}; runpy.run_path({file!r}, run_name='__main__')"


@dataclass(frozen=True)
class TemplateFault:
    """What a template did instead of rendering one conversation.

    ``kind`` is ``syntax`` (with the template's ``line``), ``refused`` by its own ``raise_exception``, or ``failed``, by
    an error of Python's; ``message`` is what it says.
    """

    kind: str
    message: str
    line: int = 0


class ChatTemplate:
    """A chat template. ``origin`` says where it stands, for messages: a file, or a config's key. Every use may raise a
    DataError, if the template exceeds its limits."""

    def __init__(self, text: str, origin: str) -> None:
        self.text, self.origin = text, origin

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The variables that it reads, ``strftime_now`` among them; none if it is not valid Jinja."""
        found = self._request(json.dumps({"template": self.text}))[0]
        return frozenset(found.get("value", ()))

    def render(
        self, conversations: Iterable[Mapping[str, Any]], variables: Mapping[str, Any], date: str
    ) -> list[str | TemplateFault]:
        """Text or fault of each conversation, in order. ``conversations`` are the variables of each (``messages``,
        ``tools``, ...), ``variables`` those of all; ``date`` is ISO, the day that ``strftime_now`` gives."""
        results: list[str | TemplateFault] = []
        shared = json.dumps({"template": self.text, "variables": dict(variables), "date": date}, default=str)[1:-1]
        batches: list[list[str]] = [[]]
        size = 0
        for conversation in conversations:
            batches[-1].append(json.dumps(conversation, default=str))
            size += len(batches[-1][-1])
            if size > _BATCH_CHARS:
                batches, size = [*batches, []], 0
        for batch in filter(None, batches):
            for found in self._request(f'{{{shared}, "conversations": [{", ".join(batch)}]}}'):
                if found.get("kind") == "limit":
                    raise self._exceeds(found["message"])
                results.append(TemplateFault(**found) if "kind" in found else found["value"])
        return results

    def _request(self, line: str) -> list[dict[str, Any]]:
        code, found = _worker(os.getpid()).ask(line)
        if found is None:
            how = f"ended the process that renders it (exit code {code}, {MEMORY_BYTES >> 20} MiB of memory)"
            if code == -signal.SIGPROF:
                how = f"takes more than {CPU_SECONDS} s of processor time"
            raise self._exceeds(how)
        return found

    def _exceeds(self, how: str) -> DataError:
        return DataError(
            f"{self.origin}: the chat template {how} for one conversation. Does it loop for ever? Fix it, or set "
            "tokenizer.chat_template to another one."
        )


class _Worker:
    """The process, of this process alone: a fork's child starts one of its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self._stop)

    def ask(self, line: str) -> tuple[int, list[dict[str, Any]] | None]:
        """The results of a request, or None and the exit code of a process that has died of it."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                found = process.stdout.readline()
            except BrokenPipeError:
                found = ""
            except BaseException:  # Ctrl-C: its result would be taken for that of the next request
                process.kill()
                process.wait()
                raise
            if found.endswith("\n"):
                return 0, json.loads(found)
            process.kill()
            return process.wait(), None

    def _stop(self) -> None:
        if self._process is not None and self.pid == os.getpid():
            self._process.kill()
            self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        program = _PROGRAM.format(path=sys.path, file=str(Path(__file__).with_name("template_worker.py")))
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(  # nosec B603
            [sys.executable, "-I", "-c", program],
            **pipes,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the run
        )


@functools.lru_cache(maxsize=1)
def _worker(pid: int) -> _Worker:
    return _Worker()
