"""kill -9 on a GPU: with deterministic kernels the run goes on bit for bit, compiled layers and all."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.recipes.helpers import CONFIG, metrics_of, tiny_overrides

ON_GPU = ["device=cuda", "compute_dtype=bf16", "compile=true", "deterministic=true", "generator.batch_size=8"]
EVERY_STEP = ["save_interval=1", "checkpointer.keep_last=100", "checkpointer.async_save=true"]


def start(output_dir, env, log):
    """The recipe's command in a process of its own."""
    command = [sys.executable, "-m", "spin_recipe", "--config", str(CONFIG), *tiny_overrides(output_dir)]
    return subprocess.Popen([*command, *ON_GPU, *EVERY_STEP], env=env, stdout=log, stderr=log)


def exported(output_dir):
    """Hash of each iteration's exported weights."""
    files = sorted(output_dir.glob("iteration_*/hf_model/*.safetensors"))
    return {str(file.relative_to(output_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.gpu
def test_killed_and_started_again(tmp_path, subprocess_env):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with (tmp_path / "log").open("w") as log:

        def logged():
            return (tmp_path / "log").read_text()[-4000:]

        assert start(whole, subprocess_env, log).wait(timeout=300) == 0, logged()
        steps = max(row["step"] for row in metrics_of(whole))
        for state in (f"step_{steps // 4:08d}", f"step_{3 * steps // 4:08d}"):  # within each iteration
            process = start(broken, subprocess_env, log)
            deadline = time.monotonic() + 300
            while not (broken / "checkpoints" / state).exists():
                assert process.poll() is None and time.monotonic() < deadline, logged()
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "it had ended before it could be killed"
        assert start(broken, subprocess_env, log).wait(timeout=300) == 0, logged()
    assert (tmp_path / "log").read_text().count("Resuming at step") == 2
    assert metrics_of(broken) == metrics_of(whole)
    assert len(exported(whole)) == 2 and exported(broken) == exported(whole)
