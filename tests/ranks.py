"""Runs a script of tests/two_ranks on ranks of the CPU.

The ranks are forked from one process, which has imported what takes seconds; what torchrun does besides is seen in
tests/recipes/test_command_line.py and tests/faults.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

FOLDER = Path(__file__).parent / "two_ranks"


def run_ranks(script: str, env: dict[str, str], *arguments: object, ranks: int = 2) -> str:
    """Gives the script's output; fails with it if a rank failed."""
    command = [sys.executable, __file__, str(ranks), str(FOLDER / script), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{script} failed:\n{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout


def main(ranks: int, words: list[str]) -> int:
    """Exit code of the first rank that fails, which ends the others, or 0."""
    import spin_recipe  # noqa: F401
    import torchtune.models.llama3_2  # noqa: F401

    from tests.recipes.helpers import free_port

    port, children = str(free_port()), set()
    for rank in map(str, range(ranks)):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = port
            run_rank(words)
        children.add(child)
    while children:
        child, status = os.wait()
        children.discard(child)
        if code := os.waitstatus_to_exitcode(status):
            for other in children:
                os.kill(other, signal.SIGKILL)
            return abs(code)
    return 0


def run_rank(words: list[str]) -> None:
    """Never returns."""
    sys.argv, sys.path[0] = words, str(FOLDER)
    code = 1
    try:
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:  # noqa: BLE001 - for the log that the test shows
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
