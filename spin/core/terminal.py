"""Console output: escaped foreign text, logging, and progress as a bar or plain lines."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from spin.core.redact import hide

LINE_SECONDS = 30.0  # between two lines of a stage
# What a terminal obeys instead of showing it (C0, DEL, C1), or what changes the order, the place or the number of the
# characters around it without being seen: marks of direction, separators, tags, halves of surrogate pairs.
_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f"
)
_UNSEEN_IN_LINES, _UNSEEN_IN_A_LINE = re.compile(f"[{_UNSEEN}]"), re.compile(f"[\t\n{_UNSEEN}]")


def printable(text: object, one_line: bool = False) -> str:
    """Foreign text (from data, models, files, servers) with control characters and invisible marks of direction
    escaped as ``\\x1b`` or ``\\u202e``; ``one_line`` escapes line feeds and tabs too."""
    pattern = _UNSEEN_IN_A_LINE if one_line else _UNSEEN_IN_LINES
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


class _PrintableFormatter(logging.Formatter):
    """Lines of a log without secrets, and with the foreign text in them escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(hide(super().format(record)))


def get_logger(level: str = "INFO") -> logging.Logger:
    """The logger of this package and its recipes, to stderr unless the program has set up its own; other ranks than 0
    only warn. torchtune's is one for all of its modules, and the last that is imported sets its level."""
    log = logging.getLogger("spin")
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(_PrintableFormatter())
        log.addHandler(handler)
        log.propagate = False  # to a root that a library, such as vLLM, sets up later: every line would be there twice
    log.setLevel(level if os.environ.get("RANK", "0") == "0" else "WARNING")
    return log


def escape_unencodable_output() -> None:
    """Writes characters that the console's encoding lacks as ``\\xe9`` instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def progress_bar(
    description: str, unit: str, total: int | None = None, iterable: Iterable[Any] | None = None, enabled: bool = True
) -> tqdm:
    """A progress bar, or plain lines where stderr is no terminal. ``unit``, in the singular, is what ``iterable``
    or calls of ``update`` count."""
    kind = tqdm if sys.stderr.isatty() else ProgressLines
    return kind(iterable, desc=printable(description, one_line=True), unit=unit, total=total, disable=not enabled)


class ProgressLines(tqdm):
    """A tqdm that writes lines: one at the start, one every ``LINE_SECONDS``, one at the end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._next_line = 0.0
        line = "{desc}: {n_fmt}/{total_fmt} {unit} in {elapsed}, {rate_noinv_fmt}{postfix}"
        super().__init__(*args, **kwargs, leave=False, bar_format=line)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Writes a line if it is time for one; tqdm asks with an empty text when the bar is closed."""
        now = time.monotonic()
        if now < self._next_line and msg != "":
            return
        self._next_line = now + LINE_SECONDS
        self.fp.write(f"{self}\n")
        self.fp.flush()

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: lines stay."""
