"""Where a run stands, as a terminal, a log file and another front end show it; seconds are the test's own."""

import io
import math
import os
import pty
import re
import select
import sys
import termios
import time

import pytest
import torch

from spin.core import progress
from spin.core.progress import Cell, RunProgress, Silence, begin_run, compile_seconds, show_on, stage

ITERATIONS = [("validate", None), *((kind, i) for i in (0, 1) for kind in ("generate", "score", "train", "save"))]
WORK = {"validate": 6, "generate": 20, "score": 4, "train": 10, "save": 2}


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    begin_run(RunProgress())
    yield now
    begin_run(RunProgress())


def catch_stderr(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def work(clock, seconds, kind, unit="", total=None, **options):
    """A stage all of whose units take as long."""
    with stage(kind, unit, total, **options) as bar:
        clock[0] += seconds if total is None else 0
        for _ in range((total or 0) - bar.done):
            clock[0] += seconds
            bar.update()


def test_a_log_file_gets_a_line_now_and_then(clock, monkeypatch):
    """100 steps of a second: lines at the start, every 30 seconds, and at the end. 1000 more of 10 seconds: a line when
    a tenth of the time is over."""
    stderr = catch_stderr(monkeypatch)
    with stage("train", "step", 100) as bar:
        for _ in range(100):
            clock[0] += 1
            bar.update(notes={"loss": "0.5"})
    text = stderr.getvalue()
    assert re.findall(r"^train: (\d+)/100 steps", text, re.M) == ["0", "30", "60", "90", "100"]
    assert text.splitlines()[-1] == "train: 100/100 steps, 1 steps/s, loss 0.5 in 1 min 40 s"
    work(clock, 10, "train", "step", 1000)
    assert "10 s/step" in stderr.getvalue() and 40 < len(stderr.getvalue().splitlines()) - 5 < 60
    assert "\r" not in stderr.getvalue() and "\x1b" not in stderr.getvalue()


def test_the_time_left_is_learned_from_the_runs_own_stages(clock, monkeypatch):
    """By hand: 6 batches of validation take 1 s each, 20 responses 2 s, 4 batches 3 s, 10 steps 4 s, of which the first
    takes 40 s more, and saves 5 s. What was never seen is not in a lower bound."""
    stderr = catch_stderr(monkeypatch)
    begin_run(run := RunProgress(ITERATIONS, 0, WORK, ends_at=clock[0] + 200))
    assert str(run) == "stage 1 of 9, 0 s elapsed, max_time in 3 min 20 s"
    work(clock, 1, "validate", "batch", 2)
    assert run.time_left == (4 * 1, False)
    with stage("generate", "response", 10) as bar:
        for _ in range(5):
            clock[0] += 2
            bar.update(tokens=50)
        assert str(bar) == "iteration 0, generate: 5/10 responses, 2 s/response, 25 tokens/s"
        assert run.time_left == (4 * 1 + 15 * 2, False)
        for _ in range(5):
            clock[0] += 2
            bar.update(tokens=50)
    for _ in range(2):  # the validation set's are scored for themselves
        work(clock, 3, "score", "batch", 1)
        assert str(run).startswith("stage 3 of 9, ")
    with stage("train", "step", 5) as bar:
        clock[0] += 44
        bar.update()
        assert run.time_left == (4 * 1 + 10 * 2 + 2 * 3 + 9 * 44, False)
        assert ", more than 7 min 06 s left, past max_time (in 2 min 08 s)" in str(run)
        for _ in range(4):
            clock[0] += 4
            bar.update()
        work(clock, 1, "validate", "batch", 2)
        assert bar.seconds == 44 + 4 * 4, "without the validation within it"
    work(clock, 5, "save")
    assert run.time_left == (2 * 1 + 10 * 2 + 2 * 3 + 5 * 4 + 5, True)
    assert str(run) == "stage 5 of 9, 1 min 35 s elapsed, about 53 s left, before max_time (in 1 min 45 s)"
    work(clock, 2, "generate", "response", 10)
    work(clock, 3, "score", "batch", 2)
    clock[0] += 60
    work(clock, 4, "train", "step", 3)  # five of which two have nothing to do
    lines = stderr.getvalue().splitlines()
    assert lines[-1] == (
        "iteration 1, train: 3/3 steps, 4 s/step in 12 s | "
        "stage 8 of 9, 3 min 13 s elapsed, about 15 s left, past max_time (in 7.0 s)"
    )
    assert len(lines) == 2 * 9 + 1, "a long first step has a line more, a short stage within another none"


def test_after_a_restart_what_was_done_before_does_not_count(clock, monkeypatch, tmp_path):
    """Eight of ten responses were there: the other two take 2 s each, and the next iteration's ten as long each. The
    next start knows that, and of training no more than a first step."""
    stderr, rates = catch_stderr(monkeypatch), tmp_path / "rates.json"
    begin_run(run := RunProgress(ITERATIONS, 1, WORK | {"validate": 0}, rates=rates))
    work(clock, 2, "generate", "response", 10, done=8)
    assert run.time_left == (10 * 2, False)
    assert "iteration 0, generate: 8/10 responses | stage 2 of 9, 0 s elapsed" in stderr.getvalue()
    assert "iteration 0, generate: 10/10 responses, 2 s/response in 4.0 s | stage 2 of 9" in stderr.getvalue()
    before = stderr.getvalue()
    work(clock, 2, "score", "batch", 2, done=2)
    assert stderr.getvalue() == before, "nothing was left to do"
    assert str(run).startswith("stage 3 of 9, ")
    work(clock, 7, "train", "step", 1)
    work(clock, 5, "save")
    again = RunProgress(ITERATIONS, 4, {"generate": 4, "train": 5, "save": 1}, rates=rates)
    assert again.time_left == (4 * 2 + 5, False)
    assert RunProgress(ITERATIONS, 4, {"generate": 4, "save": 1}, rates=rates).time_left == (4 * 2 + 5, True)


def test_a_terminal_gets_a_line_for_the_run_and_a_bar(clock, monkeypatch):
    stderr = catch_stderr(monkeypatch)
    monkeypatch.setattr(stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    begin_run(RunProgress(ITERATIONS, 3, WORK))
    with stage("train", "step", 2) as bar:
        bar.update()
        work(clock, 1, "validate", "batch", 1)
    shown = stderr.getvalue()
    for text in ("\rstage 4 of 9", "\r  0%|", "| iteration 0, train: 0/2 steps", "| validate: 0/1 batch"):
        assert text in shown
    last = shown.split("\r")[-1]
    assert last.startswith("iteration 0, train: 1/2 steps") and last.endswith("left\n")


def test_another_front_end_gets_every_event(clock, monkeypatch):
    stderr = catch_stderr(monkeypatch)

    class Notebook(Silence):
        def begin(self, stage):
            events.append(("begin", str(stage)))

        def move(self, stage):
            events.append(("move", stage.done, stage.total, stage.is_inner))

        def end(self, stage):
            events.append(("end", stage.kind))

    events, before = [], show_on(Notebook())
    try:
        with pytest.raises(KeyboardInterrupt), stage("generate", "response", 1, title="judge"):
            raise KeyboardInterrupt
        with stage("train", "step", 2) as bar:
            bar.update(2)
            with stage("validate", "batch", 1) as inner:
                inner.update()
    finally:
        assert isinstance(show_on(before), Notebook)
    assert events == [
        ("begin", "judge: 0/1 response"), ("end", "generate"), ("begin", "train: 0/2 steps"), ("move", 2, 2, False),
        ("begin", "validate: 0/1 batch"), ("move", 1, 1, True), ("end", "validate"), ("end", "train"),
    ]  # fmt: skip
    assert not stderr.getvalue()


def test_a_notebooks_cell_has_bars_and_what_has_ended(clock):
    drawn = []
    before = show_on(Cell(drawn.append))
    try:
        begin_run(RunProgress(ITERATIONS, 1, WORK))
        work(clock, 2, "generate", "response", 4)
        with stage("train", "step", 5) as bar:
            clock[0] += 3
            bar.update(2, notes={"loss": "<b>"})
    finally:
        show_on(before)
    assert any('<progress max="4" value="3"></progress> iteration 0, generate: 3/4 responses' in each for each in drawn)
    ended, run, bar = drawn[-2].removesuffix("</div>").split("</div>")
    assert ended == "<div>iteration 0, generate: 4/4 responses, 2 s/response in 8.0 s" and "stage 4 of 9" in run
    assert bar.endswith("</progress> iteration 0, train: 2/5 steps, 1.5 s/step, loss &lt;b&gt;")
    assert "<div>iteration 0, train: 2/5 steps" in drawn[-1] and "<progress" not in drawn[-1]


def test_a_run_without_a_limit_does_not_speak_of_it(clock):
    assert "max_time" not in str(RunProgress(ITERATIONS, ends_at=math.inf)) and str(RunProgress()) == ""


def test_compilation_is_charged_to_the_stage_that_waits_for_it(clock, monkeypatch):
    """Torch counts seconds of its own; of two lengths of an input, the first is compiled while scoring."""
    stream = catch_stderr(monkeypatch)
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with stage("score", "batch", 1) as scoring:
        compiled(torch.zeros(2))
        scoring.update()
        scoring.compiling += 60  # as if it had been a large model
    with stage("train", "step", 1) as training:
        compiled(torch.zeros(2))
        assert [*compile_seconds()] == ["score"]
        compiled(torch.zeros(3))
        training.update()
    assert compile_seconds()["train"] > 0
    assert compile_seconds() == {}
    assert "s of it compiling in 0 s" in stream.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(clock, monkeypatch):
    stderr = catch_stderr(monkeypatch)
    monkeypatch.setattr(stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    work(clock, 1, "train", "step", 2)
    assert len(stderr.getvalue().splitlines()) == 2 and "\r" not in stderr.getvalue()


def test_bars_follow_a_terminal_that_becomes_narrower(monkeypatch):
    """60 columns in place of 120: no line is longer, which would leave its rest on the screen."""
    terminal, other_end = pty.openpty()
    monkeypatch.setattr(sys, "stderr", open(other_end, "w"))  # noqa: SIM115 - closed below
    monkeypatch.setenv("TERM", "xterm")
    begin_run(RunProgress(ITERATIONS, 3, WORK))

    def drawn():
        text = b""
        while select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 9999)
        return text.decode()

    try:
        termios.tcsetwinsize(terminal, (24, 120))
        with stage("train", "step", 9) as bar:
            assert "0/9" in drawn()
            termios.tcsetwinsize(terminal, (24, 60))
            bar.update(notes={"loss": "0.6931", "acc": "0.5000", "margin": "0.0000", "more": "x" * 40})
            time.sleep(0.15)  # than which bars are not drawn more often
            bar.update()
            lines = re.split(r"[\r\n]|\x1b\[A", drawn())
    finally:
        begin_run(RunProgress())
        sys.stderr.close()
        os.close(terminal)
    assert any("train: 2/9 steps" in line for line in lines) and max(map(len, lines)) <= 60
