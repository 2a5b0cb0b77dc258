"""A run from Python: the example of docs/python.md, several runs in a process, and errors as exceptions."""

import math
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import spin
from spin import SPIN
from spin.core.errors import ConfigError, SpinError
from spin.core.progress import Silence, show_on

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


@pytest.mark.parametrize("name", ["data", "model", "config"])
def test_what_is_no_path_is_refused_with_what_to_do(repo, name):
    with pytest.raises(ConfigError, match=rf"{name} is a list: expected a path or a name.*to_json"):
        SPIN(**{"config": repo / "tests/assets/tiny.yaml", name: [{"prompt": "a", "response": "b"}]})
    with pytest.raises(ConfigError, match=rf"{name} is a list: expected a path or a name"):
        SPIN(**{"config": repo / "tests/assets/tiny.yaml", name: ["one.jsonl"]})


def test_numbers_of_numpy_are_numbers(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(repo)
    values = {"max_iterations": np.int64(2), "nll_weight": np.float32(0.5), "seed": torch.tensor(3)}
    found = SPIN(**SMALL | values, output_dir=tmp_path / "run").config
    assert (found.max_iterations, found.nll_weight, found.seed) == (2, 0.5, 3)


def test_one_run_at_a_time_in_a_process(repo, tmp_path, monkeypatch):
    """Another front end is shown a stage of the first run, and starts the second one from there."""
    monkeypatch.chdir(repo)
    refused = []

    class Impatient(Silence):
        def begin(self, stage):
            if not refused:
                with pytest.raises(ConfigError, match="another run is going on in this process") as error:
                    SPIN(**SMALL, output_dir=tmp_path / "other").train()
                refused.append(error)

    before = show_on(Impatient())
    try:
        assert SPIN(**SMALL, output_dir=tmp_path / "run").train().models
    finally:
        show_on(before)
    assert refused and not (tmp_path / "other").exists()
