"""Estimates of memory: against measured peaks, and against what PyTorch holds on a CPU."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from spin.cli import main, rates
from spin.cli.memory import estimate
from spin.cli.timing import MEASURED_PAIR, Cluster, is_extrapolated, stages
from spin.cli.workload import data_limit, most_prompts, workload
from spin.config import SPINConfig, complete, instantiate, load_config
from spin.core.errors import ConfigError
from spin.core.ranks import init_world
from spin.data import MixedPromptDataset, Prompt, PromptDataset
from spin.model.build import build_model, prepare_model
from spin.model.lora import prepare_adapters, trainable
from spin.run.plan import RunPlan

GIB = 2**30
REPO = Path(__file__).parents[2]
# Peaks of forward and backward without AdamW, GiB a GPU, bf16 compute, compiled layers, layers kept gathered; 64 pairs
# of 755 tokens on average. torch 2.11, benchmarks/training_step.py, on an H100 (1B) and on two H200 (8B).
MEASURED = [
    ("llama3_2_1B_full", 1, 2048, 15.2),
    ("llama3_2_1B_full", 1, 4096, 17.7),
    ("llama3_2_1B_full", 1, 8192, 20.6),
    ("llama3_2_1B_full", 1, 12288, 27.7),
    ("llama3_2_1B_full", 1, 16384, 32.5),
    ("llama3_2_1B_full", 1, 32768, 42.0),
    ("llama3_1_8B_full", 2, 8192, 73.8),
    ("llama3_1_8B_full", 2, 12288, 99.6),
]
# whole iterations with embedded generators, benchmarks/iteration.py
ITERATIONS = {"llama3_1_8B_full": "full", "llama3_1_8B_lora": "lora", "llama3_1_8B_qlora": "qlora"}


def measured_iteration(name: str, repo: Path) -> tuple[list[str], dict[str, float]]:
    """The overrides of the run, and the peak of tensors in GiB by stage of its second iteration."""
    file = repo / "benchmarks" / "results" / f"h200_8b_{ITERATIONS[name]}_iteration.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["setup"]["config"] == name.replace("_8B", "/8B")
    stages = {row["stage"]: row["tensors_gib"] for row in results["stages"] if row["iteration"] == 1}
    overrides = [item.replace("spin.optim.", "spin.training.") for item in results["setup"]["overrides"]]
    return overrides, stages


def config(name: str, *overrides: str) -> DictConfig:
    """A config of benchmarks/, whose model is known by its name alone."""
    return complete(load_config(str(REPO / "benchmarks" / "configs" / f"{name}.yaml"), overrides), SPINConfig)


@pytest.mark.parametrize(("name", "ranks", "row_tokens", "measured"), MEASURED)
def test_measured_peaks_are_met_within_15_per_cent(name, ranks, row_tokens, measured):
    changes = ("enable_activation_checkpointing=false", "fsdp_reshard_after_forward=false", "compile=true")
    cfg = config(name, f"pairs.row_tokens={row_tokens}", *changes)
    found = estimate(cfg, ranks, pair_tokens=755)
    assert found.training - found.optimizer == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("name", ITERATIONS)
def test_whole_iterations_are_met_within_15_per_cent(name, repo):
    overrides, stages = measured_iteration(name, repo)
    found = estimate(config(name, *overrides), pair_tokens=755)
    assert found.training == pytest.approx(stages["train"], rel=0.15)
    assert found.scoring == pytest.approx(stages["reference log-probs"], rel=0.15)


def measured_steps(repo: Path) -> dict[str, dict]:
    """Runs of benchmarks/scaling.py: whole optimizer steps on one to four GPUs, FSDP2 and HSDP."""
    results = json.loads((repo / "benchmarks" / "results" / "scaling_h200x4.json").read_text(encoding="utf-8"))
    return {name: run for name, run in results["runs"].items() if run["part"] == "step"}


def test_steps_on_several_gpus_are_met_within_4_per_cent(repo):
    runs = measured_steps(repo)
    assert len(runs) == 9
    for name, run in runs.items():
        words = run["arguments"]
        overrides = [
            f"pairs.row_tokens={words[words.index('--row-tokens') + 1]}", f"replicas={run['replicas']}", "compile=true",
            "enable_activation_checkpointing=false", "fsdp_accumulate_unsharded=false",
            f"fsdp_reshard_after_forward={str('--keep-gathered' not in words).lower()}",
        ]  # fmt: skip
        if "adamw8bit" in words:
            overrides += ["optimizer._component_=spin.training.AdamW8bit", "~optimizer.fused"]
        cfg = config({"llama3_1_8b": "llama3_1_8B_full", "llama3_2_1b": "llama3_2_1B_full"}[run["model"]], *overrides)
        measured = max(run["result"]["optimizer_step"]["runs"]["optimizer step"]["peak_gib_by_rank"])
        assert estimate(cfg, run["gpus"], pair_tokens=755).training == pytest.approx(measured, rel=0.04), name


def test_full_fine_tuning_by_hand():
    """Llama 3.2 1B, 1,235,814,400 weights: 4 bytes each in fp32, 4 of gradient, 8 of AdamW, 2 gathered.

    A layer keeps 2 * 2 * 2048 of norms, 2 * 2048 of q and attention, 2 * 512 of k and v, 3 * 8192 of the MLP: 37,888
    numbers a token, times 16 layers, and 4 * 2048 around them. The head: 2048 * 128,256 logits in bf16, and the
    weight's gradient in fp32. The cache: 256 slots of 1,536 tokens, 16 layers, k and v of 512, bf16; a step's logits.
    """
    found = estimate(config("llama3_2_1B_full"))
    n = 1_235_814_400
    assert (found.trained, found.frozen, found.row_tokens) == (n, 0, 12288)
    expected = {
        **{"weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n, "gathered": 2 * n},
        "activations": 12288 * (16 * 37_888 + 4 * 2048) * 2,
        "head": 2048 * 128_256 * 2 + 128_256 * 2048 * 4,
        "cache": 256 * 1536 * 16 * 2 * 512 * 2 + 256 * 128_256 * 6,
        "checkpoint": 12 * n,
        "export": 2 * n,
    }
    assert {name: getattr(found, name) * GIB for name in expected} == pytest.approx(expected)
    assert found.peak == found.training == pytest.approx(sum(expected[k] for k in list(expected)[:6]) / GIB)


@pytest.mark.parametrize(
    "changes",
    [
        ("base_dtype=bf16", "compute_dtype=bf16"),
        ("base_dtype=fp32", "compute_dtype=bf16", "model.use_dora=true"),
        ("base_dtype=bf16", "compute_dtype=bf16", "model.num_kv_heads=4", "model.quantize_base=true"),
    ],
)
def test_weights_are_what_pytorch_holds(changes, repo, tmp_path):
    """The bytes of a prepared model's storages, its NF4 parts one by one, and of AdamW's state after a step."""
    overrides = [f"output_dir={tmp_path}", "optimizer._component_=torch.optim.AdamW", *changes]
    cfg = complete(load_config(str(repo / "tests/assets/tiny_lora.yaml"), overrides), SPINConfig)
    found = estimate(cfg)
    base_dtype = torch.bfloat16 if cfg.base_dtype == "bf16" else torch.float32
    world = init_world("cpu")
    model = build_model(cfg.model, base_dtype)
    prepare_adapters(model, torch.float32, world)
    prepare_model(model, world, compute_dtype=torch.bfloat16)
    held = 0
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        parts = [local]
        if hasattr(local, "quantized_data"):
            parts = [local.quantized_data, local.quantized_scalers, local.quantization_factor]
        held += sum(part.numel() * part.element_size() for part in parts)
    assert found.weights * GIB == pytest.approx(held, rel=2e-3)  # NF4's factor may be in bf16
    trained = sum(parameter.numel() for parameter in trainable(model))
    optimizer = torch.optim.AdamW(trainable(model))
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = sum(
        value.numel() * 4 for state in optimizer.state.values() for key, value in state.items() if key != "step"
    )
    assert found.optimizer * GIB == moments == 8 * trained
    assert found.gradients * GIB == 4 * trained


def test_a_frozen_base_has_no_gradient_no_state_and_no_second_copy():
    """LoRA of Llama 3.1 8B on one GPU: 15 GiB of base in bf16, used where it is; NF4: a third of that."""
    lora, qlora = (estimate(config(f"llama3_1_8B_{kind}")) for kind in ("lora", "qlora"))
    assert lora.frozen == qlora.frozen == 8_030_261_248
    assert 15.0 < lora.weights < 15.3 and 5.2 < qlora.weights < 6.2
    for found in (lora, qlora):
        assert found.gathered < 0.1 and found.playing_copy < 0.1
        assert found.gradients + found.optimizer + found.checkpoint < 1.5
        assert found.peak < 79
    several = estimate(config("llama3_1_8B_lora"), gpus=8)
    assert several.weights == pytest.approx(lora.weights / 8) and several.playing_copy > 14.9


def test_more_of_a_knob_is_more_memory_where_it_should_be():
    def found(*changes):
        return estimate(config("llama3_1_8B_lora", *changes))

    base = found()
    assert found("pairs.row_tokens=16384").activations > 1.9 * base.activations
    assert found("generator.batch_size=128").cache == pytest.approx(2 * base.cache)
    assert found("logprob_chunk_tokens=4096").head == pytest.approx(2 * base.head)
    assert found("model.lora_rank=32").optimizer == pytest.approx(2 * base.optimizer)
    layers = [found(f"enable_activation_checkpointing={value}").activations for value in ("true", "false")]
    assert layers[0] < layers[1]


@pytest.mark.parametrize("name", ["full", "lora", "qlora"])
def test_a_config_by_method_has_an_estimate(name, tmp_path, repo):
    """Of a folder its config.json is enough. The dtype of the arithmetic is a GPU's, wherever the estimate is made."""
    values = json.loads((repo / "tests/assets/tiny_lm/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"hidden_size": 256, "intermediate_size": 512}))
    overrides = [f"model.path={tmp_path}", "dataset.source=mine.jsonl", "compute_dtype=bf16"]
    found = estimate(complete(load_config(name, overrides), SPINConfig))
    assert found.training > found.weights + found.activations > found.weights > 0
    assert found.playing >= found.weights + found.cache


# Weights by hand, matrix by matrix. Llama 3.3 70B: embeddings and head 2 * 128,256 * 8,192; in each of 80 layers
# queries and output 2 * 8,192^2, keys and values 2 * 8,192 * 1,024, the MLP 3 * 8,192 * 28,672, two norms of 8,192; a
# norm. Qwen3 32B: 2 * 151,936 * 5,120; in each of 64 layers 2 * 5,120 * 8,192, 2 * 5,120 * 1,024, 3 * 5,120 * 25,600,
# norms of 2 * 5,120 and 2 * 128; a norm.
LARGE = {
    "llama_70b": 2_101_346_304 + 80 * (134_217_728 + 16_777_216 + 704_643_072 + 16_384) + 8_192,
    "qwen3_32b": 1_555_824_640 + 64 * (83_886_080 + 10_485_760 + 393_216_000 + 10_496) + 5_120,
}


def large(name: str, *overrides: str) -> DictConfig:
    folder = REPO / "benchmarks" / "shapes" / name
    given = (f"model.path={folder}", "dataset.source=mine.jsonl", "compute_dtype=bf16", *overrides)
    return complete(load_config("full", given), SPINConfig)


@pytest.mark.parametrize("gpus", [8, 16, 64])
@pytest.mark.parametrize(("name", "n"), LARGE.items())
def test_large_models_by_hand(name, n, gpus):
    """fp32 weights and gradients, 4 bytes each, and AdamW's two moments, divided by the GPUs; a checkpoint's part of a
    GPU, 12 bytes a weight, is pinned while it is written. The embedded generator has all weights in bf16."""
    assert LARGE == {"llama_70b": 70_553_706_496, "qwen3_32b": 32_762_123_264}
    found = estimate(large(name), gpus)
    assert (found.trained, found.frozen) == (n, 0)
    expected = {"weights": 4 * n, "gradients": 4 * n, "optimizer": 8 * n, "pinned": 12 * n}
    assert {key: getattr(found, key) * GIB * gpus for key in expected} == pytest.approx(expected)
    assert found.playing_copy * GIB == pytest.approx(2 * n)
    offloaded = estimate(large(name, "fsdp_cpu_offload=true"), gpus)
    assert offloaded.weights == offloaded.gradients == offloaded.optimizer == 0
    assert offloaded.pinned * GIB * gpus == pytest.approx((12 + 4 + 4) * n)
    assert offloaded.host_states * GIB * gpus == pytest.approx(8 * n)
    eight_bit = estimate(large(name, "optimizer._component_=spin.training.AdamW8bit", "~optimizer.fused"), gpus)
    assert eight_bit.optimizer == pytest.approx(found.optimizer / 4)


def test_an_engine_of_several_gpus_divides_its_weights():
    """70.6 B weights in bf16, 131.4 GiB, over eight GPUs: 16.4 GiB; half of 139.8 GiB is the engine's."""
    generator = "generator={_component_: spin.generators.VLLMGenerator, tensor_parallel_size: 8}"
    found = estimate(large("llama_70b", generator), 64, gpu_gib=139.8)
    assert found.playing_copy == pytest.approx(131.42 / 8, rel=1e-3)
    assert found.playing_copy + found.cache == pytest.approx(69.9)
    assert found.playing == pytest.approx(found.weights + found.optimizer + 69.9)


EIGHT_BIT_AND_ENGINE = (
    "  optimizer._component_=spin.training.AdamW8bit '~optimizer.fused' "
    "'generator={{_component_: spin.generators.VLLMGenerator}}' generator.tensor_parallel_size={}\n"
)


@pytest.mark.parametrize(
    ("options", "fits", "change"),
    [
        (("qwen3_32b", "--gpus", "8", "--gpu", "H200"), True, ""),
        (("qwen3_32b", "--gpus", "4", "--gpu", "H200"), False, "  optimizer._component_=spin.training.AdamW8bit"),
        (
            ("qwen3_32b", "--gpus", "4", "--gpu", "H200", "optimizer.fused=null", "optimizer.foreach=false"),
            False,
            "AdamW8bit '~optimizer.fused' '~optimizer.foreach'\n",
        ),
        (("qwen3_32b", "--gpus", "16", "--hosts", "2", "--gpu", "H200"), True, ""),
        (("llama_70b", "--gpus", "8"), False, "generator.tensor_parallel_size=4 fsdp_cpu_offload=true\n"),
        (("llama_70b", "--gpus", "8", "--gpu", "H200"), False, EIGHT_BIT_AND_ENGINE.format(4)),
        (("qwen3_32b", "--gpus", "8", "--gpu", "H100"), False, EIGHT_BIT_AND_ENGINE.format(2)),
        (("llama_70b", "--gpus", "64", "--hosts", "8", "--gpu", "H200"), False, "generator.tensor_parallel_size="),
        (("llama_70b", "--gpus", "64", "--hosts", "8"), False, "VLLMGenerator}' generator.tensor_parallel_size="),
    ],
)
def test_a_plan_says_what_does_not_fit_and_what_makes_it(options, fits, change, capsys):
    """What the advice says, added to the command, fits, and takes the time that was said."""
    name, *others = options
    command = ["estimate", "full", *others, f"model.path={REPO}/benchmarks/shapes/{name}", "dataset.source=mine.jsonl"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert ("It fits" in text) == fits and ("The least change that fits" in text) == (not fits)
    assert change in text
    for part in ("pinned memory", "generate", "score", "train", "save, export", "measured: "):
        assert part in text
    assert ("* extrapolated: " in text) == any(name + " *" in text for name in ("generate", "score", "train", "export"))
    assert text.startswith("no GPU here: H100 assumed (--gpu names another)\n") == (
        "--gpu" not in others and not torch.cuda.is_available()
    )
    if not fits:
        advice = text.split("with which the times are:\n")[1].splitlines()[0]
        assert main([*command, *shlex.split(advice)]) == 0
        changed = capsys.readouterr().out
        assert "It fits" in changed and changed[changed.index("\ntime") :] == text[text.index("\ntime") :]
    assert ("8 x 400 Gb/s" in text) == ("--hosts" in others)


def estimated(capsys, *words: str) -> str:
    assert main(["estimate", *words, "dataset.source=mine.jsonl"]) == 0
    return capsys.readouterr().out


def test_what_a_host_must_have_is_said(capsys):
    """Qwen3 32B on 16 GPUs of two hosts: 12 bytes a weight of a checkpoint, half of it on a host, 196.6e9; offloaded,
    8 more of weights and gradients and 8 of moments: 458.7e9. Nothing is pinned for a save that is waited for."""
    command = [
        "full",
        "--gpus",
        "16",
        "--hosts",
        "2",
        "--gpu",
        "H200",
        f"model.path={REPO}/benchmarks/shapes/qwen3_32b",
    ]
    assert "183.1 GiB of pinned memory, which needs a host with 197 GB of memory\n" in estimated(capsys, *command)
    offloaded = estimated(capsys, *command, "fsdp_cpu_offload=true")
    assert "and 122.0 GiB of optimizer state, which needs a host with 459 GB of memory\n" in offloaded
    on_one = estimated(capsys, *command, "--hosts", "1", "--gpus", "64", "replicas=4", "fsdp_cpu_offload=true")
    assert "which needs a host with 3.7 TB of memory\n" in on_one  # 28 bytes for each weight of four replicas
    waited = estimated(capsys, *command, "checkpointer.async_save=false")
    assert "on each host: nothing is kept in CPU memory\n" in waited


def test_longer_rows_are_named_where_they_fit_and_a_step_fills_them(capsys):
    """64 pairs of 755 tokens, 48,320: rows of 24,576 fit one GPU's part, none beyond 8,192 an eighth of it."""
    command = ["full", "--gpu", "H200", f"model.path={REPO}/benchmarks/shapes/llama_4b"]
    assert "fit too: pairs.row_tokens=24576\n" in estimated(capsys, *command, "--gpus", "1")
    assert "fit too" not in estimated(capsys, *command, "--gpus", "8")
    assert "fit too" not in estimated(capsys, *command, "--gpus", "1", "pairs.row_tokens=24576")


def test_small_figures_are_in_mib(repo, capsys):
    """155,648 weights of adapters, 8 bytes of moments each: 1.2 MiB. 12 bytes a token of 1,000 pairs of 755, and 300
    of each: 8.9 MiB; twice as many prompts store twice as much."""
    text = estimated(capsys, "lora", "--gpu", "H100", f"model.path={repo}/tests/assets/tiny_lm")
    assert text.split("optimizer")[1].split("\n")[0].split() == ["1.2", "MiB"] * 4
    assert "on disk: 8.9 MiB of pairs and 2.3 MiB of exports" in text and "0.00" not in text
    assert re.search(r"\nscore +\d ms +0 s +\d ms ", text), "a small model's times"
    twice = estimated(capsys, "lora", "--prompts", "2000", f"model.path={repo}/tests/assets/tiny_lm")
    assert "on disk: 18 MiB of pairs" in twice


def of_cluster(cfg: DictConfig, gpus: int, hosts: int = 1, gpu: str = "H200", links=(8, 400.0), prompts: int = 64):
    found = estimate(cfg, gpus, pair_tokens=755)
    cluster = Cluster(gpus, hosts, gpu, *links)
    return {each.name: each for each in stages(cfg, found.work, cluster, prompts, found.pair, found.rows)}


def test_times_of_measured_steps_are_met_within_8_per_cent(repo):
    """Of 64 pairs for each GPU, 1 to 4 of them, that reshard or keep what they gathered."""
    for name, run in measured_steps(repo).items():
        words = run["arguments"]
        overrides = [f"pairs.row_tokens={words[words.index('--row-tokens') + 1]}", f"replicas={run['replicas']}",
                     "max_epochs=1", "enable_activation_checkpointing=false", f"global_batch_size={run['pairs']}",
                     f"fsdp_reshard_after_forward={str('--keep-gathered' not in words).lower()}"]  # fmt: skip
        cfg = config({"llama3_1_8b": "llama3_1_8B_full", "llama3_2_1b": "llama3_2_1B_full"}[run["model"]], *overrides)
        seconds = of_cluster(cfg, run["gpus"], prompts=run["pairs"])["train"].seconds
        measured = run["result"]["optimizer_step"]["runs"]["optimizer step"]["median_seconds"]
        assert seconds == pytest.approx(measured, rel=0.08), name


def test_float8_is_as_much_faster_as_it_was_measured(repo):
    """A step of Llama 3.2 1B, and of 8 layers of Llama 3.1 8B. Of smaller layers nothing is known."""
    measured = json.loads((repo / "benchmarks/results/h200_float8.json").read_text(encoding="utf-8"))["speed"]
    names = {"llama3_2_1b": "llama3_2_1B_full", "llama3_1_8b_8_layers": "llama3_1_8B_full"}
    for name, runs in ((name, measured[name]["optimizer step"]) for name in names):
        cfg = config(names[name], "max_epochs=1")
        bf16, float8 = (
            of_cluster(cfg.model_copy(update={"enable_float8_training": on}), 1)["train"] for on in (False, True)
        )
        times = runs["compiled"]["median_seconds"] / runs["float8"]["median_seconds"]
        assert bf16.compute / float8.compute == pytest.approx(times, rel=0.001)
        assert "h200_float8.json" in {rate.source for rate in float8.rates}
    overrides = [f"model.path={repo}/tests/assets/tiny_lm", "device=cpu"]
    tiny = complete(load_config("full", [*overrides, "dataset.source=x"]), SPINConfig)
    assert of_cluster(tiny.model_copy(update={"enable_float8_training": True}), 1) == of_cluster(tiny, 1)


@pytest.mark.parametrize("name", ITERATIONS)
def test_times_of_measured_generation_are_met_within_10_per_cent(name, repo):
    file = repo / "benchmarks" / "results" / f"h200_8b_{ITERATIONS[name]}_iteration.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["stages"]
    measured = next(row["seconds"] for row in rows if (row["iteration"], row["stage"]) == (1, "generate"))
    overrides = ["sampling.max_new_tokens=256"]
    assert of_cluster(config(name, *overrides), 1, prompts=256)["generate"].seconds == pytest.approx(measured, rel=0.1)


def test_traffic_that_does_not_hide_by_hand():
    """A 70B over 64 GPUs of 8 hosts, one row for each GPU: two gathers of 2 bytes and a reduction of 4 bytes a weight,
    63/64 of each received, by one card of 100 Gb/s at 0.8 of its rate: 10 GB/s."""
    cfg = large("llama_70b", "max_epochs=1")
    found = of_cluster(cfg, 64, hosts=8, links=(1, 100.0))["train"]
    traffic = 70_553_706_496 * 8 * 63 / 64 / 10e9
    assert found.exposed == pytest.approx(traffic - found.compute, rel=1e-6)
    assert of_cluster(cfg, 64, hosts=8, links=(8, 1600.0))["train"].exposed < found.exposed / 20
    assert of_cluster(cfg, 8)["train"].exposed == 0


def test_what_no_measurement_shows_is_marked():
    """Dense layers on a host of H200s were measured. Other GPUs, links between hosts and experts were not."""

    def marked(cfg, gpus=1, gpu="H200", hosts=1):
        return [name for name, stage in of_cluster(cfg, gpus, hosts, gpu).items() if is_extrapolated(stage, gpu)]

    full = config("llama3_1_8B_full")
    assert marked(full) == []
    assert marked(full, gpus=8) == []
    assert marked(full, gpus=8, hosts=2) == ["generate", "score", "train"]
    assert marked(full, gpu="A100-80") == ["generate", "score", "train", "save, export"]
    work = replace(estimate(full).work, sparse=True)
    found = stages(full, work, Cluster(1, 1, "H200", 8, 400.0), 64, MEASURED_PAIR, 1)
    assert [stage.name for stage in found if is_extrapolated(stage, "H200")] == ["generate", "score", "train"]


def test_what_was_measured_has_its_file(repo):
    tables = [each for each in vars(rates).values() if isinstance(each, dict)]
    found = [rate for table in tables for rate in table.values() if isinstance(rate, rates.Rate)]
    found += [each for each in vars(rates).values() if isinstance(each, rates.Rate)]
    assert len(found) > 12
    for rate in found:
        assert rate.gpu in rates.GPUS and (rate.date if rate.is_measured else rate.source.startswith("assumed: "))
        assert not rate.is_measured or (repo / "benchmarks" / "results" / rate.source).is_file()


def test_a_mixture_counts_as_the_longest_of_its_sources():
    sources = {"a": {"source": "a", "max_prompt_tokens": 300}, "b": {"source": "b", "max_response_tokens": 9}}
    cfg = mixture(large("llama_4b"), sources, common={"max_prompt_tokens": 100})
    limits = [data_limit(cfg, key) for key in ("max_prompt_tokens", "max_response_tokens")]
    assert limits == [300, None]


def mixture(cfg, sources, **options):
    values = {"_component_": "spin.data.mixed_prompt_dataset", "sources": sources, **options}
    return cfg.model_copy(update={"dataset": type(cfg.dataset)(**values)})


SMALL = ("dataset.max_prompt_tokens=48", "dataset.max_response_tokens=16", "sampling.max_new_tokens=16")


@pytest.mark.parametrize(
    ("pair_tokens", "changes", "parts"),
    [
        (None, (), (199, 278, 278)),
        (None, SMALL, (48, 16, 16)),
        (9000, SMALL, (48, 16, 16)),
        (9000, (), (1024, 1024, 512)),
        (None, (*SMALL, "pairs.responses_per_prompt=3"), (48, 16, 48)),
        (None, ("pairs.responses_per_prompt=2",), (199, 278, 2 * 278)),
        (477 + 32, ("sampling.max_new_tokens=32",), (199, 278, 32)),  # what a response may not have, the others do
        (1000, ("dataset.max_response_tokens=100", "sampling.max_new_tokens=100"), (800, 100, 100)),
    ],
)
def test_no_part_of_a_pair_is_longer_than_the_config_lets_it_be(pair_tokens, changes, parts, repo):
    cfg = large("llama_4b", *changes)
    found = estimate(cfg, pair_tokens=pair_tokens, prompts=64)
    assert found.pair == pytest.approx(parts)
    assert found.pair_store * GIB == pytest.approx(64 * (12 * sum(parts) + 300))
    assert found.row_tokens <= 8192


def test_packed_pairs_are_no_longer_than_the_longest_that_there_can_be():
    """64 pairs of at most 80 tokens, 6 or 12 of them in a row."""
    packed = [estimate(large("llama_4b", *SMALL, f"pairs.row_tokens={n}"), pair_tokens=80) for n in (512, 1024)]
    assert [each.rows for each in packed] == [11, 5]
    one = estimate(large("llama_4b", *SMALL, "pairs.row_tokens=128"), pair_tokens=80)
    assert one.row_tokens == 128  # a log-normal pair of 80 on average may have 266


@pytest.mark.parametrize(
    ("changes", "prompts", "most"),
    [
        ((), None, None),
        ((), 500, 500),
        (("dataset.limit=61", "global_batch_size=4"), None, 60),
        (("dataset.limit=61", "global_batch_size=4"), 1000, 60),
        (("dataset.limit=61", "global_batch_size=4"), 8, 8),
        (("dataset.limit=61", "global_batch_size=4", "dataset.validation_fraction=0.1"), None, 52),  # 54.9
        (
            ("dataset.limit=4", "global_batch_size=4", "dataset.validation_fraction=0.1"),
            None,
            4,
        ),  # perhaps none held out
        (("dataset.split='train[:61]'", "global_batch_size=4"), 1000, 60),
        (("dataset.split='train[10:41]+test[:30]'", "dataset.limit=70", "global_batch_size=4"), None, 60),
        (("dataset.split='train[:10%]'", "global_batch_size=4"), 1000, 1000),
        (("dataset.split='train[:61]'", "dataset.turns=all"), None, None),
        (("dataset.limit=64", "global_batch_size=4", "limit_train_batches=0.25"), None, 16),
        (("global_batch_size=5", "limit_train_batches=4"), 1000, 20),
    ],
)
def test_an_iteration_has_no_more_prompts_than_the_config_lets_it_play(changes, prompts, most):
    assert most_prompts(large("llama_4b", *changes), prompts) == most


def test_prompts_of_a_mixture_are_those_that_a_run_plays():
    """With weights 1 and 2, 17 samples are two thirds of 25, and 10 more than a third; in floats 3 * 8.5 was 26."""
    sizes, weights = {"a": 10, "b": 17}, {"a": 1, "b": 2}
    parts = {name: {"source": name, "limit": size, "weight": weights[name]} for name, size in sizes.items()}
    cfg = large("llama_4b", "global_batch_size=1")
    read = {name: PromptDataset([Prompt(f"{i}", [1], [2]) for i in range(size)]) for name, size in sizes.items()}
    assert most_prompts(mixture(cfg, parts)) == MixedPromptDataset(read, weights).samples_per_iteration == 25


def test_prompts_of_a_mixture():
    """90 and 10 samples: all of them, or 20 if half of an iteration's are of the smaller source; `samples` are played
    whatever there is."""
    cfg = large("llama_4b", "global_batch_size=10")
    parts = {"a": {"source": "a.jsonl", "limit": 90}, "b": {"source": "b.jsonl", "limit": 10}}
    assert most_prompts(mixture(cfg, parts)) == 100
    halves = {name: {**part, "weight": 0.5} for name, part in parts.items()}
    assert most_prompts(mixture(cfg, halves)) == 20
    assert most_prompts(mixture(cfg, halves, samples=50)) == 50


A = {"source": "a.jsonl", "limit": 90}


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ({"a": {**A, "weight": 1}, "b": A}, {}, "b without a weight"),
        ({"a": {**A, "weight": 1}, "b": {**A, "weight": 0}}, {}, "b.weight=0: expected a number above 0"),
        ({"a": {**A, "limit": "many"}}, {}, "a.limit: found 'many', expected a whole number"),
        ({"a": "a.jsonl"}, {}, "a: found 'a.jsonl', expected arguments of prompt_dataset"),
        (["a.jsonl"], {}, "expected a name for each source"),
        ({"a": A}, {"common": "a.jsonl"}, "expected a name for each source"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_as_by_a_run(sources, options, message):
    with pytest.raises(ConfigError, match=message):
        estimate(mixture(large("llama_4b", "global_batch_size=10"), sources, **options))


def test_the_command_says_what_the_config_does_not_let_through(capsys):
    command = ["full", "--gpu", "H200", f"model.path={REPO}/benchmarks/shapes/llama_4b", *SMALL]
    command += ["dataset.limit=61", "global_batch_size=4"]
    text = estimated(capsys, *command)
    assert "time of an iteration of 60 prompts" in text and "\npairs of 80 tokens on average" in text
    assert "lets" not in text
    asked = estimated(capsys, *command, "--prompts", "1000", "--pair-tokens", "755")
    assert "--pair-tokens 755: the config lets 80 through at most, which are counted\n" in asked
    assert "--prompts 1000: the config lets 60 through at most, which are counted\n" in asked
    assert asked[asked.index("\ntime") :] == text[text.index("\ntime") :]


# --- Data that are here ---


@pytest.fixture
def data(tmp_path, monkeypatch, repo):
    """The working directory with mine.jsonl of 60 rows and other.jsonl of 30, prompts of 1 to 60 words."""
    monkeypatch.chdir(tmp_path)
    lines = (repo / "configs/quickstart/jargon_train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, chosen in (("mine", lines[:60]), ("other", lines[60:90])):
        rows = [json.loads(line) for line in chosen]
        for i, row in enumerate(rows):
            row["messages"][0]["content"] = "word " * (i + 1)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


TINY = (f"model.path={REPO}/tests/assets/tiny_lm", "dataset.max_prompt_tokens=300", "dataset.source=mine.jsonl")


def tiny(*overrides: str) -> SPINConfig:
    return complete(load_config("full", (*TINY, "compute_dtype=bf16", *overrides)), SPINConfig)


MIX = {"a": {"source": "mine.jsonl", "weight": 1}, "b": {"source": "other.jsonl", "weight": 2, "limit": 25}}


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("dataset.limit=25",),
        ("dataset.limit=500",),
        ("dataset.validation_fraction=0.2",),
        ("dataset.max_prompt_tokens=48",),
        ("dataset.max_prompt_tokens=48", "dataset.limit=30", "dataset.validation_fraction=0.2"),
        ("dataset.max_response_tokens=20", "dataset.on_long_response=cut", "dataset.split='train[:33]'"),
        ("dataset.streaming=true", "dataset.limit=30", "dataset.shuffle_buffer=8"),
        ("dataset.source=[mine.jsonl,other.jsonl]", "limit_train_batches=0.5", "sampling.max_new_tokens=8"),
        ("pairs.responses_per_prompt=2", "sampling.max_new_tokens=8"),
        MIX,
        {**MIX, "a": {**MIX["a"], "validation_fraction": 0.5, "max_prompt_tokens": 48, "on_long_prompt": "drop"}},
    ],
)
def test_data_that_are_here_are_counted_as_a_run_reads_them(changes, data):
    cfg = mixture(tiny(), changes) if isinstance(changes, dict) else tiny(*changes)
    cfg = cfg.model_copy(update={"global_batch_size": 4})
    read = instantiate(cfg.dataset, tokenizer=instantiate(cfg.tokenizer), max_seq_len=512)
    plan, window = RunPlan(cfg, read), read.window(0)
    found = workload(cfg, 512)
    assert found.prompts == len(plan.samples(0)) >= 12
    played = read.iteration_samples(read.samples_per_iteration, 0, 0)
    prompts, real = window.prompt_lengths[played], window.real_lengths[played]
    generated = cfg.pairs.responses_per_prompt * real.clip(max=cfg.sampling.max_new_tokens)
    assert found.pair == pytest.approx((prompts.mean(), real.mean(), generated.mean()))
    assert "samples for an iteration" in found.note and "Assumed" not in found.note


def test_times_and_disk_are_those_of_the_data_and_memory_that_of_the_limits(data, capsys):
    command = ["estimate", "full", "--gpu", "H200", *TINY, "global_batch_size=8"]
    texts = []
    for name in ("mine", "absent"):
        assert main([*command, f"dataset.source={name}.jsonl"]) == 0
        texts.append(capsys.readouterr().out)
    counted, assumed = texts
    assert counted.startswith("mine.jsonl: 60 samples for an iteration, of 60 rows\non average a prompt has ")
    assert "time of an iteration of 56 prompts" in counted and "Assumed" not in counted
    assert assumed.startswith("absent.jsonl is not here. Assumed: 1,000 prompts (or --prompts N) and pairs of 7")
    tables = [text[text.index("GiB on each GPU") : text.index("on disk")] for text in texts]
    assert tables[0] == tables[1] and "on disk: 0.1 MiB of pairs" in counted and "on disk: 8.9 MiB" in assumed


def test_what_is_not_here_is_assumed_and_said():
    limited = workload(tiny("dataset.source=org/name", "dataset.limit=100"), 512)
    assert limited.prompts == 64 and limited.pair is None
    assert limited.note == (
        "org/name is not here. Assumed: 64 prompts, as many as the config's limits let through (or --prompts N) and "
        "pairs of 755 tokens (or --pair-tokens N)\n"
    )
    mixed = workload(mixture(tiny(), {**MIX, "c": {"source": "hf:x", "weight": 1}}), 512)
    assert mixed.note.startswith("mine.jsonl, other.jsonl, hf:x are not here. Assumed: 1,000 prompts")


def test_a_data_set_of_the_users_own_code_is_not_read(data, monkeypatch):
    monkeypatch.syspath_prepend(str(data))
    Path("data_of_my_own.py").write_text(
        "from spin.data import PromptSource\ndef read(tokenizer, max_seq_len) -> PromptSource: ...\n"
    )
    raw = load_config("full", [f"model.path={REPO}/tests/assets/tiny_lm", "allow_components=[data_of_my_own]"])
    raw.dataset = {"_component_": "data_of_my_own.read"}
    assert workload(complete(raw, SPINConfig), 512).note.startswith(
        "data_of_my_own.read is not read. Assumed: 1,000 prompts"
    )


def test_what_the_user_names_is_not_counted(data):
    cfg = tiny("global_batch_size=8")
    assert workload(cfg, 512, prompts=700, pair_tokens=300).note == ""
    named = workload(cfg, 512, prompts=700)
    assert named.prompts == 700 and named.pair == workload(cfg, 512).pair
    assert named.note.startswith("mine.jsonl: the first 60 rows\non average a prompt has ")
    lengths = workload(cfg, 512, pair_tokens=300)
    assert (lengths.prompts, lengths.pair) == (56, None)
    assert lengths.note == "mine.jsonl: 60 samples for an iteration, of 60 rows\n"
    absent = workload(tiny("dataset.source=absent.jsonl"), 512, prompts=700)
    assert absent.note == "absent.jsonl is not here. Assumed: pairs of 755 tokens (or --pair-tokens N)\n"


def test_without_a_tokenizer_samples_are_counted_and_lengths_assumed(data):
    found = workload(large("llama_4b", "global_batch_size=8", "dataset.max_prompt_tokens=1"), 4096)
    assert (found.prompts, found.pair) == (56, None)
    assert "mine.jsonl: 60 samples" in found.note and "no tokenizer is here" in found.note
    assert found.note.endswith(". Assumed: pairs of 557 tokens (or --pair-tokens N)\n")


def test_rows_that_a_run_refuses_do_not_end_an_estimate(data):
    """Without on_bad_row and on_long_prompt a run would refuse a broken row, and prompts that are too long."""
    with open("mine.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": \n')
    cfg = tiny("global_batch_size=4", "dataset.max_prompt_tokens=48", "~dataset.on_long_prompt")
    found = workload(cfg, 512)
    assert found.prompts == 60 and "of 61 rows; left out or truncated: " in found.note
    assert "bad_row 1" in found.note and "long_prompt_cut" in found.note and "(spin validate says which)" in found.note
    Path("mine.jsonl").write_bytes(b"\xcc\x99\n" * 40)
    broken = workload(cfg, 512)
    assert broken.prompts == 1000 and "mine.jsonl:1" in broken.note and "Assumed: 1,000 prompts" in broken.note
    assert broken.note.count("\n") == 1
    Path("mine.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 40, encoding="utf-8")
    assert "[...]. Assumed: " in workload(cfg, 512).note


def test_data_of_no_step_are_refused_unless_others_are_named(data, capsys):
    command = ["estimate", "full", *TINY]
    assert main(command) == 1
    fault = capsys.readouterr().err
    assert "an epoch has no step" in fault and "mine.jsonl: 60 samples" in fault and "--prompts N" in fault
    assert main([*command, "--prompts", "1000"]) == 0


def test_numbers_that_cannot_be():
    with pytest.raises(ConfigError, match="multiples of replicas=2"):
        estimate(config("llama3_1_8B_full", "replicas=2"), gpus=3)
    with pytest.raises(ConfigError, match="pair_tokens=-5: expected the mean tokens of a pair, 1 or more"):
        estimate(config("llama3_1_8B_full"), pair_tokens=-5)
    with pytest.raises(ConfigError, match="prompts=-5: expected those of an iteration, 1 or more"):
        workload(config("llama3_1_8B_full"), 8192, prompts=-5)
    with pytest.raises(ConfigError, match="batch_size=64: an epoch has no step.* leave 61 samples at most"):
        estimate(config("llama3_1_8B_full", "dataset.limit=61"))
    for nothing in ("limit_train_batches=0", "limit_train_batches=0.0", "dataset.split='train[:0]'"):
        with pytest.raises(ConfigError, match="an epoch has no step.* leave 0 samples at most"):
            estimate(config("llama3_1_8B_full", "dataset.limit=null", nothing))


def test_the_command_prints_all_parts_and_refuses_a_wrong_name(capsys):
    options = ["--gpus", "2", "--pair-tokens", "755", "pairs.row_tokens=4096"]
    benchmark = str(REPO / "benchmarks/configs/llama3_1_8B_lora.yaml")
    assert main(["estimate", benchmark, *options]) == 0
    text = capsys.readouterr().out
    for part in ("weights", "gradients", "optimizer", "activations", "key-value cache", "peak", "on disk", "frozen"):
        assert part in text
    assert main(["estimate", "evaluate"]) == 1
    assert "estimates are of training" in capsys.readouterr().err
    assert main(["estimate", "qlor"]) == 1
    assert "Did you mean qlora" in capsys.readouterr().err
