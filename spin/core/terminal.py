"""Console output: escaped foreign text, and logging."""

from __future__ import annotations

import difflib
import io
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Sequence
from textwrap import TextWrapper
from typing import Any, TextIO

from tqdm import tqdm

from spin.core.redact import hide

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


def cells(text: str) -> int:
    """The cells of a terminal that a text takes: two for a wide character (CJK, emoji), none for a combining mark."""
    if text.isascii():
        return str.__len__(text)
    return sum(
        0
        if unicodedata.category(char) in ("Mn", "Me") or "\u200b" <= char <= "\u200d"  # marks, and joiners of emoji
        else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def fill(text: str, width: int) -> str:
    """The text, with spaces up to so many cells."""
    return text + " " * (width - cells(text))


def cut(text: str, width: int) -> str:
    """As much of the text's start as fits into so many cells; a mark stays with its character."""
    taken = 0
    for i, char in enumerate(text):
        taken += cells(char)
        if taken > width:
            return text[:i]
    return text


def wrap(text: str, width: int, **options: Any) -> list[str]:
    """Lines of so many cells at most, by :class:`textwrap.TextWrapper` and its options; no line for an empty text."""
    return _CellWrapper(width, **options).wrap(text)


class _Word(str):
    """A word whose length is its cells."""

    __slots__ = ()

    def __len__(self) -> int:
        return cells(self)


class _CellWrapper(TextWrapper):
    """Counts cells where its base counts characters."""

    def _split(self, text: str) -> list[str]:
        return [_Word(chunk) for chunk in super()._split(text)]

    def _handle_long_word(self, reversed_chunks: list[str], cur_line: list[str], cur_len: int, width: int) -> None:
        word = reversed_chunks.pop()
        head = cut(word, width - cur_len) or word[: not cur_len]  # a line has at least one character
        cur_line.append(_Word(head))
        reversed_chunks.append(_Word(word.removeprefix(head)))


class _PrintableFormatter(logging.Formatter):
    """Lines of a log without secrets, and with the foreign text in them escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(hide(super().format(record)))


class _AboveBars(logging.StreamHandler):
    """Writes lines above the bars of a terminal instead of into them."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line."""
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def show(text: str, stream: TextIO | None = None) -> None:
    """Writes a line to the console (default: stdout), above a terminal's bars. No run ends because nobody reads it any
    more, or the disk of its log is full: what follows then goes nowhere."""
    stream = stream or sys.stdout
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        logging.getLogger(__name__).warning(f"{stream.name}: cannot be written ({error.strerror}). The run goes on.")


def get_logger(level: str = "INFO") -> logging.Logger:
    """The logger of this package and its recipes, to stderr unless the program has set up its own; other ranks than 0
    only warn. torchtune's is one for all of its modules, and the last that is imported sets its level."""
    log = logging.getLogger("spin")
    if not log.hasHandlers():
        handler = _AboveBars()
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


def plural(noun: str, count: int = 2) -> str:
    """The noun for a count of it: 1 batch, 2 batches."""
    return noun if count == 1 else f"{noun}es" if noun.endswith(("tch", "s", "x")) else f"{noun}s"


def counted(count: int, noun: str) -> str:
    """A count of something: 1 batch, 2 batches."""
    return f"{count:,} {plural(noun, count)}"


def some_of(names: Sequence[str], most: int) -> str:
    """The first names, and how many more there are: ``a, b and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_lines(lines: Sequence[str], most: int) -> list[str]:
    """The first lines, and one that says how many more there are."""
    return [*lines[:most], *([f"... and {len(lines) - most} more"] if len(lines) > most else [])]


def clock(seconds: float | None) -> str:
    """A duration as a person says it: ``20 ms``, ``1.5 s``, ``12 s``, ``3 min 20 s``, ``19 min``, ``2 h 05 min``;
    nothing for what is not known."""
    if seconds is None:
        return ""
    if seconds < 0.05:
        return f"{1000 * seconds:.0f} ms" if seconds > 0.0005 else "under 1 ms" if seconds else "0 s"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 599.5:
        return "{} min {:02d} s".format(*divmod(round(seconds), 60))
    if seconds < 3570:
        return f"{seconds / 60:.0f} min"
    return "{} h {:02d} min".format(*divmod(round(seconds / 60), 60))


def nearest_of(name: str, known: Sequence[str]) -> str:
    """' Did you mean ...?', or nothing."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""
