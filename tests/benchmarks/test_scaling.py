"""Runs on several numbers of ranks, and those that are missing when it is started again."""

import json
import shlex

import checkpointing
import iteration
import page
import pytest
import scaling
import training_step
from work import MODELS

from spin.core.ranks import shutdown

TINY = "--models tiny --device cpu --pairs 8 --rounds 1 --hsdp-from 0"


@pytest.fixture
def command(tmp_path, monkeypatch, subprocess_env):
    """Parses a command line whose runs import this checkout; its file is of this test."""
    monkeypatch.setenv("PYTHONPATH", subprocess_env["PYTHONPATH"])
    for launcher in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(launcher, raising=False)
    out = tmp_path / "scaling.json"
    return lambda words: scaling.parse_args([*shlex.split(words), "--out", str(out), "--folder", str(tmp_path)])


@pytest.mark.slow
def test_one_and_two_ranks_and_going_on_with_what_is_missing(command, tmp_path):
    """The run on one rank fails by its time limit, is kept next to that of two, and is repeated when asked for."""
    one, two = "step tiny fsdp weak 1", "step tiny fsdp weak 2"
    results = scaling.measure(command(f"{TINY} --parts step --gpus 1 --limit-seconds 0.01"))
    assert results["runs"][one]["error"] == "not done after 0.01 s"
    results = scaling.measure(command(f"{TINY} --parts step --gpus 1,2"))
    assert results["runs"][one]["error"] == "not done after 0.01 s"
    record = results["runs"][two]
    assert (record["pairs"], record["gpus"], record["result"]["setup"]["devices"]) == (16, 2, 2)
    results = scaling.measure(command(f"{TINY} --parts step --gpus 1,2 --retry"))
    assert results == json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert results["runs"][two] == record, "what is there is not measured again"
    speeds = {name: run["result"]["optimizer_step"]["runs"]["optimizer step"] for name, run in results["runs"].items()}
    share = speeds[two]["pairs_per_second"] / speeds[one]["pairs_per_second"] / 2
    cells = [line.strip("| ").split(" | ") for line in page.scaling_section([results]).splitlines()]
    assert [row[5] for row in cells if row[0] == "tiny"] == ["1.000", f"{share:.3f}"]
    with pytest.raises(SystemExit, match="Give the same options, or choose another --out"):
        scaling.measure(command(f"{TINY} --parts step --gpus 2 --pairs 4"))
    assert [file.name for file in tmp_path.iterdir()] == ["scaling.json"], "what runs wrote is removed"


def test_checkpoints_are_timed(command, tmp_path):
    (run,) = scaling.plan(command(f"{TINY} --parts checkpoint --gpus 1"))
    result = checkpointing.measure(checkpointing.parse_args([*run.arguments, "--folder", str(tmp_path)]))
    shutdown()
    assert not list(tmp_path.iterdir()), "what it wrote is removed"
    assert result["setup"]["state_gb"] * 1e9 > 12 * result["setup"]["parameters"]  # weights and two moments in fp32
    assert min(result["restore_seconds"], result["export_seconds"], result["sync"]["blocked_seconds"]) > 0


def test_runs_of_a_host_of_eight(command, monkeypatch):
    """HSDP from four GPUs; tensor parallelism from two; as many pairs and prompts on every GPU."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    runs = {run.name: run for run in scaling.plan(command("--strong --pairs 32 --prompts 100"))}
    steps = {name for name in runs if name.startswith("step llama3_1_8b")}
    layouts = [("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("fsdp", 8), ("hsdp", 8)]
    loads = ("weak", "strong")
    assert steps == {f"step llama3_1_8b {layout} {load} {gpus}" for layout, gpus in layouts for load in loads}
    iterations = [name for name in runs if name.startswith("iteration")]
    shared = ("tp1 1", "tp1 2", "tp2 2", "tp1 4", "tp2 4", "tp1 8", "tp2 8")
    assert iterations == [f"iteration llama3_1_8b vllm {each}" for each in shared]
    apart = scaling.plan(command("--parts step --models llama3_1_8b --gpus 4 --step-options=--keep-gathered"))
    assert [run.name for run in apart] == [f"step llama3_1_8b {way} weak --keep-gathered 4" for way in ("fsdp", "hsdp")]
    words = " ".join(runs["step llama3_1_8b hsdp weak 4"].arguments)
    assert "--pairs 128 " in words and "--replicas 2" in words and "--optimizer adamw8bit" in words
    assert "--pairs 32 " in " ".join(runs["step llama3_1_8b fsdp strong 8"].arguments)
    assert "adamw8bit" not in runs["step llama3_2_1b fsdp weak 8"].arguments
    assert dict(runs["iteration llama3_1_8b vllm tp2 8"].facts)["prompts"] == 800
    for run in runs.values():  # each script takes its arguments
        scripts = {script.__name__ + ".py": script for script in (training_step, checkpointing, iteration)}
        scripts[run.script].parse_args(list(run.arguments))


def test_the_larger_models_iteration_is_a_config_that_runs(command, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    *_, run = scaling.plan(command("--parts iteration --gpus 2"))
    args = iteration.parse_args(list(run.arguments))
    cfg = iteration.make_config(args, tmp_path, tmp_path / "model", MODELS[args.model], on_gpu=True)
    assert cfg.model["_component_"].endswith("llama3_1_8b") and cfg.checkpointer.model_type == "LLAMA3"
    assert cfg.optimizer["_component_"] == "spin.training.AdamW8bit" and cfg.generator.tensor_parallel_size == 2
    assert cfg.pairs.row_tokens == 6144 and cfg.global_batch_size == 128


def test_what_a_host_cannot_run_is_refused_or_left_out_with_the_reason(command, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert command("").gpus == [1, 2]
    with pytest.raises(SystemExit):
        command("--gpus 2,4")
    assert "--gpus 4: this host has 2." in capsys.readouterr().err
    monkeypatch.setattr(scaling, "installed_vllm", lambda: None)
    results = scaling.measure(command("--models tiny --device cpu --gpus 1 --parts iteration"))
    assert results["skipped"] == {"iteration tiny vllm tp1 1": "vllm is not installed"} and results["runs"] == {}
    assert "Not run: iteration tiny vllm tp1 1 (vllm is not installed)." in page.scaling_section([results])
