"""What a log file and other ranks show."""

import io
import logging
import re
import sys

import pytest

from spin import config
from spin.core import terminal


def catch_stderr(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_log_file_gets_lines(monkeypatch):
    """100 steps, one each second: a line at the start, one every 30 seconds, and one at the end."""
    stderr = catch_stderr(monkeypatch)
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    bar = terminal.progress_bar("iteration 0", "step", 100)
    for _ in range(100):
        now[0] += 1
        bar.update()
        bar.set_postfix({"loss": "0.5"})
    bar.close()
    bar.close()
    text = stderr.getvalue()
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n")
    assert re.findall(r"^iteration 0: (\d+)/100", text, re.M) == ["0", "30", "60", "90", "100"]
    assert text.splitlines()[-1].endswith("loss=0.5")


@pytest.mark.parametrize("enabled", [True, False])
def test_an_iterable_is_counted_to_its_end(monkeypatch, enabled):
    stderr = catch_stderr(monkeypatch)
    bar = terminal.progress_bar("validation", "batch", iterable=iter("ab"), total=2, enabled=enabled)
    assert list(bar) == ["a", "b"]
    assert re.findall(r"^validation: (\d)/2 batch", stderr.getvalue(), re.M) == (["0", "2"] if enabled else [])
    assert enabled or not stderr.getvalue()


def test_a_terminal_gets_a_bar(monkeypatch):
    stderr = catch_stderr(monkeypatch)
    monkeypatch.setattr(stderr, "isatty", lambda: True, raising=False)
    bar = terminal.progress_bar("iteration 0", "step", 2)
    bar.close()
    assert "\r" in stderr.getvalue() and not isinstance(bar, terminal.ProgressLines)


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
