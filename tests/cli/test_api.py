"""A run from Python: the example of docs/python.md, several runs in a process, and errors as exceptions."""

import math
import subprocess
import sys
import threading

import pytest

import spin
from spin import SPIN
from spin.core.errors import ConfigError, SpinError

SMALL = {
    "config": "tests/assets/tiny.yaml", "max_iterations": 1, "max_epochs": 1, "limit_train_batches": 2,
    "sft": {"lr": 1e-3, "limit_train_batches": 2},
}  # fmt: skip


def test_importing_the_package_loads_neither_torch_nor_the_api(subprocess_env):
    code = "import sys, spin; from spin import SPIN; assert not {'torch', 'transformers', 'pydantic'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], env=subprocess_env, check=True)


def test_sft_and_then_self_play_in_one_process_give_metrics_models_a_report_and_answers(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(repo)
    run = SPIN(**SMALL, output_dir=tmp_path / "run")
    tuned = run.sft()
    assert tuned.folder == tmp_path / "run" / "sft" and ["loss" in row for row in rows_of(tuned)] == [False, True, True]
    result = run.train()
    steps = [row for row in rows_of(result) if row["step"] > 0]
    assert len(steps) == 2 and steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["lr"] == pytest.approx(1e-4)
    assert result.models == {0: tmp_path / "run" / "iteration_000" / "hf_model"}
    assert result.report().stat().st_size > 10_000
    assert "<iframe srcdoc=" in result._repr_html_()
    assert isinstance(result.chat("What is a kludge?", max_new_tokens=4), str)
    again = run.train()  # finished before
    assert rows_of(again) == rows_of(result)


def rows_of(result):
    """The metrics by step, each without what it lacks."""
    return [{name: value for name, value in row.items() if value == value} for row in result.metrics.to_dict("records")]


def test_after_an_error_the_same_process_runs_again_also_in_another_thread(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(repo)
    with pytest.raises(SpinError, match="global_batch_size=4000: an epoch has no step"):
        SPIN(**SMALL | {"global_batch_size": 4000}, output_dir=tmp_path / "run").train()
    found = []
    thread = threading.Thread(target=lambda: found.append(SPIN(**SMALL, output_dir=tmp_path / "run").train()))
    thread.start()
    thread.join()
    assert found[0].models


def test_errors_say_what_the_command_line_says(repo, monkeypatch):
    monkeypatch.chdir(repo)
    with pytest.raises(ConfigError, match=r"optimiser: unknown key.*'optimizer'"):
        SPIN(config="tests/assets/tiny.yaml", output_dir="x", optimiser="torch.optim.SGD")
    with pytest.raises(ConfigError, match="says what to train"):
        SPIN(model="x")
    for named in ({"config": "tests/assets/tiny.yaml"}, {"model": "tests/assets/tiny_lm", "data": "x.jsonl"}):
        with pytest.raises(ConfigError, match="method='dora': expected 'full', 'lora' or 'qlora'"):
            SPIN(**named, method="dora")
    with pytest.raises(ConfigError, match="method='lora' is for model=.* itself says what is trained"):
        SPIN(config="tests/assets/tiny.yaml", method="lora")
    with pytest.raises(AttributeError, match="no attribute 'SPN'. Did you mean 'SPIN'?"):
        spin.SPN  # noqa: B018


def test_model_and_data_alone_are_sized_as_spin_new_does_and_read_again(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = repo / "examples/quickstart/jargon_train.jsonl"
    named = {"model": repo / "tests/assets/tiny_lm", "data": data, "device": "cpu", "dataset": {"limit": 40}}
    first = SPIN(**named, max_iterations=2)
    assert first.config.output_dir == "runs/jargon_train" and first.config.max_iterations == 2
    assert "dataset" in (tmp_path / "runs/jargon_train.yaml").read_text()
    assert SPIN(**named, max_iterations=3).config.pairs == first.config.pairs
    with pytest.raises(ConfigError, match=r"runs/jargon_train\.yaml: was made for another model or data"):
        SPIN(**named | {"model": tmp_path})
