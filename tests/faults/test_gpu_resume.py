"""kill -9 on a GPU: with deterministic kernels the run resumes bit for bit, compiled layers and all."""

import hashlib
import signal
import sys

import pytest

from tests.recipes.helpers import command_line, metrics_of, signalled, start

ON_GPU = ["device=cuda", "compute_dtype=bf16", "compile=true", "deterministic=true", "generator.batch_size=8"]
EVERY_STEP = ["save_interval=1", "checkpointer.keep_last=100", "checkpointer.async_save=true"]


def exported(output_dir):
    """Hash of each iteration's exported weights."""
    files = sorted(output_dir.glob("iteration_*/hf_model/*.safetensors"))
    return {str(file.relative_to(output_dir)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.gpu
def test_killed_and_started_again(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def words(output_dir):
        return command_line(output_dir, *ON_GPU, *EVERY_STEP, program=[sys.executable, "-m", "spin_recipe"])

    def finished(output_dir):
        process = start(words(output_dir))
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-4000:]
        return output

    finished(whole)
    steps = max(row["step"] for row in metrics_of(whole))
    for state in (f"step_{steps // 4:08d}", f"step_{3 * steps // 4:08d}"):  # within each iteration
        code, output = signalled(words(broken), signal.SIGKILL, (broken / "checkpoints" / state).exists)
        assert code == -signal.SIGKILL, output[-4000:]
    assert "Resuming at step" in output and "Resuming at step" in finished(broken)
    assert metrics_of(broken) == metrics_of(whole)
    assert len(exported(whole)) == 2 and exported(broken) == exported(whole)
