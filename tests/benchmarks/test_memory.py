"""The benchmark of memory: its command on a tiny model, adapters over NF4 and full."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("config", ["tiny", "tiny_lora"])
def test_a_step_and_answers_are_made_and_the_estimate_told(config, tmp_path, subprocess_env):
    changes = [f"output_dir={tmp_path}", "global_batch_size=6", "pairs.row_tokens=256", "sampling.max_new_tokens=4"]
    if config == "tiny_lora":
        changes += ["model.num_kv_heads=4", "model.quantize_base=true", "model.use_dora=true"]
    out = tmp_path / "memory.json"
    command = [sys.executable, "benchmarks/memory.py", "--config", f"tests/assets/{config}.yaml", "--out", str(out)]
    done = subprocess.run(
        [*command, "--pair-tokens", "60", *changes], cwd=REPO, env=subprocess_env, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["training"]["estimated_gib"] > results["training"]["measured_gib"] == 0  # no GPU's allocator here
    assert 0 < results["row_tokens"] <= 256
    assert "playing" in done.stdout and "not measured: no GPU" in done.stdout
