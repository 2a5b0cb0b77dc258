"""Ranks that were given different things, that fall silent, or whose launcher is killed."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from spin.checkpoint import SPINCheckpointer
from tests.ranks import FOLDER, run_ranks
from tests.recipes.helpers import command, command_line, metrics_of, ranks_of, start, steps_done, wait_for

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def is_alive(pid):
    """Running or stopped; not a zombie that nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_ranks_that_were_given_different_things_refuse_alike(tmp_path, subprocess_env):
    """Config values, weights, data, tokenizer; before anything is written."""
    output = run_ranks("unlike.py", subprocess_env, tmp_path)
    assert "rank 0 refused" in output and "rank 1 refused" in output


@pytest.fixture
def waiting(tmp_path):
    """Two ranks that wait for each other: the launcher, their process ids, and where their output goes."""
    log = tmp_path / "log"
    with log.open("wb") as out:
        process = start([*TORCHRUN, str(FOLDER / "waiting.py"), "3"], stdout=out, stderr=out)
    wait_for(process, lambda: log.read_text().count("ready") == 2)
    pids = ranks_of(process)
    yield process, pids, log
    for pid in (process.pid, *pids.values()):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_until_dead(*pids, seconds=60):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("silent", [0, 1])
def test_a_rank_that_is_stopped_ends_the_others_by_name(waiting, silent):
    process, pids, log = waiting
    os.kill(pids[silent], signal.SIGSTOP)
    wait_until_dead(pids[1 - silent], seconds=30)
    who = rf"error \(rank {1 - silent}\): rank {silent} \(host \S+, process {pids[silent]}\)"
    what = rf" has been silent for [34] s.*Its last stage: dance of rank {silent}\."
    assert re.search(who + what, log.read_text()), log.read_text()
    process.kill()  # else it waits 30 seconds for the stopped one
    wait_until_dead(pids[silent], seconds=5)


def test_a_launcher_that_is_stopped_ends_its_ranks(waiting):
    """It holds the store that the ranks meet at."""
    process, pids, log = waiting
    os.kill(process.pid, signal.SIGSTOP)
    wait_until_dead(*pids.values())
    assert "the store of the ranks at" in log.read_text()


def test_a_launcher_that_is_killed_takes_its_ranks_along(waiting):
    process, pids, _ = waiting
    process.kill()
    wait_until_dead(*pids.values(), seconds=2)


@pytest.mark.long
def test_a_rank_of_a_run_is_stopped_and_the_run_resumes_from_its_checkpoint(tmp_path):
    """By the recipe's command line; a rank that merely works is not taken for a silent one."""
    out = tmp_path / "out"
    changes = ["max_iterations=1", "max_epochs=1", "save_interval=1", "validation_dataset=null"]
    changes += ["distributed_timeout_seconds=4"]
    process = start(command_line(out, *changes, nproc=2))
    wait_for(process, lambda: steps_done(out) >= 2)
    stopped = ranks_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and not is_alive(stopped)
    assert re.search(r"error \(rank 0\): rank 1 \(host \S+, process \d+\) has been silent", output), output[-3000:]
    checkpointer = SPINCheckpointer(str(tmp_path), str(out), "LLAMA3_2")
    assert checkpointer.latest() is not None
    command(out, *changes, nproc=2)
    assert [row["step"] for row in metrics_of(out)] == [1, 2, 3, 4, 5]
