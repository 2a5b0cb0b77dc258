"""The benchmarks import each other as scripts do; so do their tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))


@pytest.fixture
def measured_by(tmp_path, subprocess_env):
    """Runs a benchmark's command in a process of its own; what it wrote into ``--out``, and its output."""

    def run(*command):
        out = tmp_path / "results.json"
        done = subprocess.run(
            [sys.executable, *command, "--out", str(out)],
            cwd=REPO, env={**subprocess_env, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text(encoding="utf-8")), done.stdout

    return run
