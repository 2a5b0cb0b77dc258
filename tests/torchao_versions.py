"""The newest torchao that pyproject.toml allows, next to the one of this environment; `make torchao` fetches it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
from packaging.version import Version

from tests.recipes.helpers import REPO, environment

NEWEST = REPO / ".cache" / "torchao-newest"
needs_newest = pytest.mark.skipif(not NEWEST.is_dir(), reason="no newest torchao; `make torchao` fetches it")
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None or Version(importlib.metadata.version("torchao")) < Version("0.16"),
    reason="peft refuses torchao before 0.16; tests/test_torchao.py runs this with the newest",
)


def with_newest(words: Sequence[str], timeout: float = 600) -> str:
    """Runs Python with the newest torchao in front of this environment's; what it wrote, of both streams."""
    env = environment()
    env["PYTHONPATH"] = f"{NEWEST}{os.pathsep}{env['PYTHONPATH']}"
    command = [sys.executable, *words]
    done = subprocess.run(
        command, env=env, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
