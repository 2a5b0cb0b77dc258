"""What a log file and other ranks show."""

import io
import logging
import sys

import pytest

from spin import config
from spin.core import terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_whole_lines(monkeypatch, clock):
    """100 steps, one each second: a line at the start, one every 30 seconds, and one at the end."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    bar = terminal.progress_bar("iteration 0", "step", 100)
    for _ in range(100):
        clock[0] += 1
        bar.update()
        bar.set_postfix({"loss": "0.5"})
    bar.close()
    bar.close()
    text = stderr.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    assert [line.split(" step ")[0] for line in text.splitlines()] == [
        f"iteration 0: {done}/100" for done in (0, 30, 60, 90, 100)
    ]
    assert text.splitlines()[-1].endswith("loss=0.5")


def test_an_iterable_is_counted_to_its_end(monkeypatch, clock):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(terminal.progress_bar("validation", "batch", iterable=iter("ab"), total=2)) == ["a", "b"]
    assert [line.split(" batch ")[0] for line in stderr.getvalue().splitlines()] == [
        "validation: 0/2",
        "validation: 2/2",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = terminal.progress_bar("iteration 0", "step", 2)
    bar.close()
    assert "\r" in sys.stderr.getvalue() and not isinstance(bar, terminal.ProgressLines)


def test_a_disabled_bar_says_nothing(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(terminal.progress_bar("validation", "batch", iterable=range(3), total=3, enabled=False)) == [0, 1, 2]
    assert stderr.getvalue() == ""


@pytest.mark.parametrize(("rank", "level"), [(None, logging.INFO), ("0", logging.INFO), ("3", logging.WARNING)])
def test_other_ranks_only_warn(monkeypatch, rank, level):
    """Of this package's modules too, whose remarks (which attention was chosen, and why) nobody saw before."""
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    recipe = terminal.get_logger("INFO")
    assert recipe.level == level
    assert logging.getLogger("spin.model.build").getEffectiveLevel() == level
    monkeypatch.delenv("RANK", raising=False)
    terminal.get_logger("INFO")


def test_a_screen_without_unicode_ends_nothing(monkeypatch):
    """A cluster's Latin or ASCII locale, and an answer in another script."""
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", "nowhere"])

    @config.parse({})
    def main(cfg):
        """Never runs."""

    with pytest.raises(SystemExit):
        main()
    print("caf\xe9 \u65e5")
    assert screen.getvalue() == b"caf\\xe9 \\u65e5\n"
