"""Runs on several numbers of ranks, going on with what is missing, and the tables by hand."""

import json
import shlex
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))  # as when one of them runs

import checkpointing  # noqa: E402
import iteration  # noqa: E402
import page  # noqa: E402
import scaling  # noqa: E402
import training_step  # noqa: E402
from work import MODELS  # noqa: E402

from spin.config.checks import check_run  # noqa: E402
from spin.core.ranks import shutdown  # noqa: E402

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
    """The run on one rank fails by its time limit, is kept beside that of two ranks, and is repeated when asked for."""
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
    assert steps == {
        f"step llama3_1_8b {layout} {load} {gpus}" for layout, gpus in layouts for load in ("weak", "strong")
    }
    iterations = [name for name in runs if name.startswith("iteration")]
    assert iterations == ["iteration llama3_1_8b vllm tp1 1"] + [
        f"iteration llama3_1_8b vllm tp{shared} {gpus}" for gpus in (2, 4, 8) for shared in (1, 2)
    ]
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
    check_run(cfg)
    assert cfg.model["_component_"].endswith("llama3_1_8b") and cfg.checkpointer.model_type == "LLAMA3"
    assert cfg.optimizer["_component_"] == "spin.training.AdamW8bit" and cfg.generator.tensor_parallel_size == 2
    assert cfg.pairs.row_tokens == 6144 and cfg.global_batch_size == 128


def test_more_gpus_than_there_are(command, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert command("").gpus == [1, 2]
    with pytest.raises(SystemExit):
        command("--gpus 2,4")
    assert "--gpus 4: this host has 2." in capsys.readouterr().err


def test_without_vllm_its_runs_are_left_out_with_the_reason(command, monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "installed_vllm", lambda: None)
    results = scaling.measure(command("--models tiny --device cpu --gpus 1 --parts iteration"))
    assert results["skipped"] == {"iteration tiny vllm tp1 1": "vllm is not installed"} and results["runs"] == {}
    assert "Not run: iteration tiny vllm tp1 1 (vllm is not installed)." in page.scaling_section([results])


def test_the_first_error_of_all_ranks_is_the_runs():
    output = """
[rank1]: Traceback (most recent call last):
[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
[rank0]: torch.distributed.DistBackendError: NCCL error
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
"""
    assert scaling.error_in(output) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert scaling.error_in("a\nKilled\n") == "Killed"


# ------------------------------------------------------------------------------------------------------- tables by hand
def step(gpus, speed=None, replicas=1, model="llama3_1_8b", load="weak", error=None, options=()):
    """A run with this many pairs per second."""
    pairs = 64 * gpus if load == "weak" else 64
    run = {"part": "step", "model": model, "gpus": gpus, "replicas": replicas, "load": load, "pairs": pairs}
    run["options"] = list(options)
    if error:
        return run | {"error": error}
    figures = {"pairs_per_second": speed, "min_pairs_per_second": speed, "max_pairs_per_second": speed, "tflops": 500.0}
    memory = {"peak_gib_by_rank": [30.0 + rank for rank in range(gpus)]}
    result = {
        "ceilings": {"matmul_tflops": 750.0},
        "optimizer_step": {"runs": {"optimizer step": figures | memory}},
    }
    return run | {"result": result}


def file(*runs):
    setup = {"device": "Some GPU", "host_gpus": 8, "versions": {"torch": "2.0"}}
    return {"setup": setup, "skipped": {}, "runs": {str(number): run for number, run in enumerate(runs)}}


def rows(results):
    """Cells of the tables' lines."""
    lines = page.scaling_section(results).splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "---" not in line][1:]


def test_shares_of_linear_by_hand():
    """One GPU 10 pairs/s: 19 on two are 19 / 20; 76 and 74 on eight are 0.95 and 0.925 of 80. 40 on eight with the same
    64 pairs in all are 0.5 of 80, by that work's own run on one GPU, which had 10."""
    runs = [step(1, 10.0), step(2, 19.0), step(4, error="torch.OutOfMemoryError: large"), step(8, 76.0)]
    runs += [step(8, 74.0, replicas=2), step(1, 10.0, load="strong"), step(8, 40.0, load="strong")]
    found = rows([file(*runs)])
    assert [cells[5] for cells in found] == ["1.000", "0.950", "-", "0.950", "0.925", "1.000", "0.500"]
    assert found[2][4] == "torch.OutOfMemoryError: large"
    assert found[3][:5] == ["llama3_1_8b", "8", "FSDP2", "512", "76 (76 to 76)"]
    assert found[4][2] == "HSDP, 2 replicas" and found[6][3] == "64 in all"
    assert found[0][8] == "30" and found[3][8] == "30 to 37"
    text = page.scaling_section([file(*runs)])
    assert "measured 0.950, against one GPU: reached." in text
    assert "the 8B's step on 4; the 1B's step on 1, 2, 4, 8;" in text
    assert "measured 0.875, against one GPU: not reached." in page.scaling_section([file(step(1, 10.0), step(8, 70.0))])


def test_the_fewest_gpus_that_hold_the_model_are_the_baseline():
    """Two GPUs 18 pairs/s, eight 68.4: 8.55 a GPU against 9. Another host's run is none of this one's business."""
    small = file(step(1, error="out of memory"), step(2, 18.0), step(8, 68.4))
    assert [cells[5] for cells in rows([small])] == ["-", "1.000 of 2 GPUs", "0.950 of 2 GPUs"]
    text = page.scaling_section([small, file(step(1, 100.0))])
    assert "measured 0.950, against 2 GPUs: fewer do not hold it, or were not measured: reached." in text


def test_a_run_with_options_stands_beside_the_one_without():
    """One GPU 10 pairs/s, or 12 with an option, which is then the baseline: 45 on four are 45 / 48, 36 are 0.75."""
    fast = {"options": ["--keep-gathered"]}
    found = rows([file(step(1, 10.0), step(1, 12.0, **fast), step(4, 36.0), step(4, 45.0, **fast))])
    assert [cells[5] for cells in found] == ["0.833", "1.000", "0.750", "0.938"]
    assert [cells[2] for cells in found] == ["FSDP2", "FSDP2, keep gathered"] * 2


def test_nothing_measured_is_said():
    text = page.scaling_section([])
    assert "eight GPUs, the pairs on each GPU the same; not measured." in text
    assert "the 8B's iteration on 1, 2, 4, 8." in text
    alone = page.scaling_section([file(step(8, 70.0))])
    assert "; not measured." in alone, "eight GPUs alone say nothing about scaling"


def test_checkpoints_and_iterations_by_hand():
    """512 prompts of 256 tokens in 4 s are 32,768 tokens/s; the last iteration has 4 + 2 + 6 + 8 s; peaks over it."""
    saved = {"setup": {"state_gb": 48.2}, "async": {"blocked_seconds": 3.0}, "sync": {"blocked_seconds": 20.0},
             "restore_seconds": 15.0, "export_seconds": 9.0}  # fmt: skip
    checkpoint = {"part": "checkpoint", "model": "llama3_1_8b", "gpus": 2, "result": saved}

    def stage(number, name, seconds, *peaks):
        return {"iteration": number, "stage": name, "seconds": seconds, "peak_gib_by_rank": list(peaks)}

    stages = [stage(-1, "start", 99.0, 1.0, 1.0), stage(0, "generate", 50.0, 200.0, 200.0)]
    stages += [stage(1, "generate", 4.0, 70.0, 60.0), stage(1, "reference log-probs", 2.0, 50.0, 50.0)]
    stages += [stage(1, "train", 6.0, 65.0, 90.0), stage(1, "save and export", 8.0, 40.0, 40.0)]
    whole = {"part": "iteration", "model": "llama3_1_8b", "gpus": 2, "generator": "vllm", "tensor_parallel": 2,
             "prompts": 512, "result": {"stages": stages, "setup": {"generated_tokens": 256.0}}}  # fmt: skip
    text = page.scaling_section([file(checkpoint, whole)])
    assert "| llama3_1_8b | 2 | 48.2 | 3 | 20 | 15 | 9 |" in text
    assert "| llama3_1_8b | 2 | vllm, 2 ranks share one | 512 | 32,768 | 4 | 2 | 6 | 8 | 20 | 70 to 90 |" in text
    assert "the 8B's checkpoints on 1, 4, 8; the 8B's iteration on 1, 4, 8." in text
