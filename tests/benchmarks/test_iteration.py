"""The benchmark of whole iterations: its command on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


# the test config of adapters, over the tiny model of the benchmarks
ADAPTERS = [
    "model.num_layers=2", "model.embed_dim=64", "model.intermediate_dim=128", "model.rope_base=500000",
    "model.scale_factor=32",
]  # fmt: skip


@pytest.mark.parametrize("adapters", [False, True])
def test_every_stage_of_both_iterations_is_there(adapters, tmp_path, subprocess_env):
    out = tmp_path / "results.json"
    work = ["--model", "tiny", "--device", "cpu", "--prompts", "8", "--batch", "4"]
    if adapters:
        work += ["--save-last", "--config", "tests/assets/tiny_lora.yaml", *ADAPTERS]
    else:
        work += ["--save"]
    done = subprocess.run(
        [sys.executable, "benchmarks/iteration.py", *work, "--out", str(out)],
        cwd=REPO, env={**subprocess_env, "TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text(encoding="utf-8"))
    stages = ["generate", "reference log-probs", "train", "save and export"]
    expected = [(-1, "start"), *((iteration, stage) for iteration in (0, 1) for stage in stages)]
    if adapters:
        expected.remove((0, "save and export"))
    assert [(row["iteration"], row["stage"]) for row in results["stages"]] == expected
    assert all(row["seconds"] > 0 for row in results["stages"])
    assert all(row["peak_gib_by_rank"] == [row["peak_gib"]] for row in results["stages"])
    assert results["setup"]["first_losses"] == [0.6931471805599453] * 2
    assert "| 1 | train |" in done.stdout
    training = results["training"]
    assert training["pairs_per_second"] * sum(training["step_seconds"]) / 2 == pytest.approx(4)  # two steps of 4 pairs
    assert not list(tmp_path.glob("spin-iteration/*")), "what it made is removed"
