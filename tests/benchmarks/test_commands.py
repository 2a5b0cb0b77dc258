"""Benchmarks of saving, pair stores, memory and whole iterations: their commands on tiny models."""

import pytest

pytestmark = pytest.mark.slow

# the test config of adapters, over the tiny model of the benchmarks
ADAPTERS = [
    "model.num_layers=2", "model.embed_dim=64", "model.intermediate_dim=128", "model.rope_base=500000",
    "model.scale_factor=32",
]  # fmt: skip


def test_saving(measured_by, tmp_path):
    size = ["--model", "tiny", "--device", "cpu", "--rounds", "2", "--steps", "4", "--every", "2"]
    results, _ = measured_by("benchmarks/checkpointing.py", *size, "--folder", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "what it made is removed"
    assert results["setup"]["saves_per_part"] == 2
    assert results["setup"]["state_gb"] * 1e9 > 12 * results["setup"]["parameters"]  # weights and two moments in fp32
    for mode in ("async", "sync"):
        cost, step = results[mode]["cost_seconds"], results["step_seconds"]
        assert results[mode]["blocked_seconds"] > 0
        assert results[mode]["share"] == pytest.approx(cost / (781 * step + cost))


def test_pair_store(measured_by, tmp_path):
    results, _ = measured_by("benchmarks/pair_store.py", "--pairs", "600,1300", "--folder", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "what it made is removed"
    assert [size["pairs"] for size in results["sizes"]] == [600, 1300]
    for size in results["sizes"]:
        assert set(size["seconds"]) == {"write", "resume", "seal", "mix", "read", "all"}
        # two iterations; means of 40, 60 and 60 tokens; whole batches of 64
        assert abs(size["tokens_read"] / (2 * size["pairs"] // 64 * 64) / 160 - 1) < 0.05


@pytest.mark.parametrize("config", ["tiny", "tiny_lora"])
def test_memory(config, tmp_path, measured_by):
    changes = [f"output_dir={tmp_path}", "global_batch_size=6", "pairs.row_tokens=256", "sampling.max_new_tokens=4"]
    if config == "tiny_lora":
        changes += ["model.num_kv_heads=4", "model.quantize_base=true", "model.use_dora=true"]
    command = ["benchmarks/memory.py", "--config", f"tests/assets/{config}.yaml", "--pair-tokens", "60", *changes]
    results, printed = measured_by(*command)
    assert results["training"]["estimated_gib"] > results["training"]["measured_gib"] == 0  # no GPU's allocator here
    assert 0 < results["row_tokens"] <= 256
    assert "playing" in printed and "not measured: no GPU" in printed


@pytest.mark.parametrize("adapters", [False, True])
def test_whole_iterations(adapters, tmp_path, measured_by):
    work = ["--model", "tiny", "--device", "cpu", "--prompts", "8", "--batch", "4"]
    if adapters:
        work += ["--save-last", "--config", "tests/assets/tiny_lora.yaml", *ADAPTERS]
    else:
        work += ["--save"]
    results, printed = measured_by("benchmarks/iteration.py", *work)
    stages = ["generate", "reference log-probs", "train", "save and export"]
    expected = [(-1, "imports"), (-1, "start"), *((iteration, stage) for iteration in (0, 1) for stage in stages)]
    if adapters:
        expected.remove((0, "save and export"))
    assert [(row["iteration"], row["stage"]) for row in results["stages"]] == expected
    assert all(row["seconds"] > 0 and row["peak_gib_by_rank"] == [row["peak_gib"]] for row in results["stages"])
    assert results["setup"]["first_losses"] == [0.6931471805599453] * 2
    starts = results["starts"]
    assert starts["before iteration 0"] > results["stages"][0]["seconds"] > 0
    assert starts["iteration 0 from the process's start / iteration 1"] > 1
    assert "| 1 | train |" in printed
    training = results["training"]
    assert training["pairs_per_second"] * sum(training["step_seconds"]) / 2 == pytest.approx(4)  # two steps of 4 pairs
    assert not list(tmp_path.glob("spin-iteration/*")), "what it made is removed"
