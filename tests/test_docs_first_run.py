"""docs/first_run.md: the very commands of the page, in an empty folder."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.hf_folders import write_folder
from tests.recipes.helpers import REPO, TINY_LM

sys.path.append(str(REPO / "benchmarks"))

import first_run  # noqa: E402


@pytest.fixture
def shell(tmp_path, monkeypatch, subprocess_env):
    """An empty folder where ``spin`` and ``python`` are this environment's, and a tiny Qwen3 folder."""
    bin_folder, model = tmp_path / "bin", tmp_path / "Qwen3-tiny"
    bin_folder.mkdir()
    spin = bin_folder / "spin"  # as the console script, which an environment made before it lacks
    spin.write_text(f'#!/bin/sh\nexec {sys.executable} -m spin "$@"\n')
    spin.chmod(0o755)
    for name, value in subprocess_env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{bin_folder}:{subprocess_env['PATH']}")
    write_folder("qwen3", model, vocab_size=1024, max_position_embeddings=512)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LM / file, model)
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder, str(model)


@pytest.mark.long
@pytest.mark.slow
def test_own_model_and_data_then_fine_tuning_before_self_play(shell):
    """The run that follows fine-tuning begins at ln 2 and from its result; the exported folder is a Qwen3 model."""
    folder, model = shell
    _, own, both = first_run.journeys().values()
    times = first_run.run([*own, *both], folder, MODEL=model)
    assert len(times) == len(own) + len(both) and sum(cores for _, cores in times) > 10

    def steps(run: str) -> list[dict]:
        lines = (folder / run / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss" in row]

    assert [len(steps(run)) for run in ("runs/my", "runs/both/sft", "runs/both")] == [4, 4, 4]
    assert steps("runs/both")[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert json.loads((folder / "my_model" / "config.json").read_text())["model_type"] == "qwen3"
    assert "question" in (folder / "my.yaml").read_text()
    for page in ("runs/my/report.html", "report.html"):
        assert (folder / page).stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.real_model
def test_demo(shell, real_model):
    """With the model that `make model` has made in place of a download."""
    folder, _ = shell
    (folder / ".cache/quickstart").mkdir(parents=True)
    (folder / ".cache/quickstart" / Path(real_model).name).symlink_to(real_model)
    demo, *_ = first_run.journeys().values()
    first_run.run(demo, folder)
