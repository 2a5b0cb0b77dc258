"""The benchmarks of saving and of large pair stores: their commands, small."""

import json
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def run(env, tmp_path, *command):
    out = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, *command, "--folder", str(tmp_path), "--out", str(out)],
        cwd=REPO, env=env, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "what it made is removed"
    return json.loads(out.read_text(encoding="utf-8"))


def test_saving(tmp_path, subprocess_env):
    size = ["--model", "tiny", "--device", "cpu", "--rounds", "2", "--steps", "4", "--every", "2"]
    results = run(subprocess_env, tmp_path, "benchmarks/checkpointing.py", *size)
    assert results["setup"]["saves_per_part"] == 2
    # weights and two moments of each, fp32, and little beside
    assert results["setup"]["state_gb"] * 1e9 > 12 * results["setup"]["parameters"]
    for mode in ("async", "sync"):
        assert results[mode]["blocked_seconds"] > 0
        cost, step = results[mode]["cost_seconds"], results["step_seconds"]
        assert abs(results[mode]["share"] - cost / (781 * step + cost)) < 1e-9


def test_pair_store(tmp_path, subprocess_env):
    results = run(subprocess_env, tmp_path, "benchmarks/pair_store.py", "--pairs", "600,1300")
    assert [size["pairs"] for size in results["sizes"]] == [600, 1300]
    for size in results["sizes"]:
        assert set(size["seconds"]) == {"write", "resume", "seal", "mix", "read", "all"}
        # two iterations; means of 40, 60 and 60 tokens; whole batches of 64
        assert abs(size["tokens_read"] / (2 * size["pairs"] // 64 * 64) / 160 - 1) < 0.05
