"""Runs a script of tests/two_ranks under torchrun on two CPU ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "two_ranks"


def run_ranks(script: str, env: dict[str, str], *arguments: object, ranks: int = 2) -> str:
    """Gives the script's output; fails with it if a rank failed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*launcher, str(FOLDER / script), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{script} failed:\n{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout
