"""What a log file and other ranks show."""

import io
import logging
import os
import sys
import textwrap

import pytest

from spin import config
from spin.core import terminal


@pytest.mark.parametrize(("noun", "many"), [("epoch", "epochs"), ("batch", "batches"), ("prefix", "prefixes")])
def test_one_and_many(noun, many):
    assert [terminal.plural(noun, count) for count in (0, 1, 2)] == [many, noun, many]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""), (0, "0 s"), (1e-5, "under 1 ms"), (5e-4, "under 1 ms"), (0.0496, "50 ms"), (0.06, "0.1 s"),
        (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"),
        (599.4, "9 min 59 s"),
        (599.6, "10 min"), (1151, "19 min"), (3569, "59 min"), (3571, "1 h 00 min"), (7500, "2 h 05 min"),
        (359940, "99 h 59 min"),
    ],
)  # fmt: skip
def test_durations(seconds, text):
    assert terminal.clock(seconds) == text


@pytest.mark.parametrize(("rank", "level"), [(None, logging.INFO), ("0", logging.INFO), ("3", logging.WARNING)])
def test_other_ranks_only_warn(monkeypatch, rank, level):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    recipe = terminal.get_logger("INFO")
    assert recipe.level == level
    assert logging.getLogger("spin.model.build").getEffectiveLevel() == level
    monkeypatch.delenv("RANK", raising=False)
    terminal.get_logger("INFO")


WIDE = "\u6c49\u5b57\uff0c\u304b\u306a"  # five characters of two cells


@pytest.mark.parametrize(
    ("text", "cells"),
    [("word", 4), (WIDE, 10), ("cafe\u0301", 4), ("\u0915\u094d\u0937", 2), ("\U0001f600!", 3), ("\uff76", 1)],
)
def test_widths_are_cells_of_a_terminal(text, cells):
    assert terminal.cells(text) == cells
    assert terminal.fill(text, 12) == text + " " * (12 - cells)


@pytest.mark.parametrize("width", [8, 9, 40])
@pytest.mark.parametrize("text", [WIDE * 9, f"a word, {WIDE * 5} and more of {WIDE} " * 3, "e\u0301" * 50, "a-b " * 30])
def test_wrapped_lines_fit_and_lose_nothing(width, text):
    lines = terminal.wrap(text, width)
    assert width - 2 <= max(map(terminal.cells, lines)) <= width
    assert not any(line.startswith("\u0301") for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    plain = text.encode("ascii", "replace").decode()
    assert terminal.wrap(plain, width) == textwrap.wrap(plain, width)
    assert terminal.wrap("\u6f22\u5b57", 1) == ["\u6f22", "\u5b57"], "a character that is wider than the line ends"


def test_a_screen_without_unicode_ends_nothing(monkeypatch):
    """A cluster's Latin or ASCII locale, and a response in another script."""
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", "nowhere"])

    @config.parse(config.Section)
    def main(cfg):
        """Never runs."""

    with pytest.raises(SystemExit):
        main()
    print("caf\xe9 \u65e5")
    assert screen.getvalue() == b"caf\\xe9 \\u65e5\n"


@pytest.mark.parametrize("where", ["a pipe that nobody reads", "/dev/full"])
def test_a_console_that_is_gone_ends_no_run(monkeypatch, caplog, where):
    """It is said once, and what follows goes nowhere, at the end of the program too."""
    if where == "/dev/full":
        stream = open(where, "w")  # noqa: SIM115 - closed below
    else:
        read, write = os.pipe()
        os.close(read)
        stream = open(write, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", stream)
    terminal.show("the first line")
    terminal.show("the second line")
    stream.close()
    assert len(caplog.messages) == 1 and "cannot be written" in caplog.text and "The run goes on" in caplog.text
