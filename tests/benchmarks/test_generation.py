"""The benchmark of generation on a tiny model: its command, its tables, and arms that do the same work."""

import importlib.util
import json
import sys

import generation
import pytest
import torch

from spin.core.ranks import shutdown

TINY = ["--model", "tiny", "--device", "cpu", "--requests", "12", "--batch-size", "4", "--rounds", "1"]


@pytest.fixture
def bench():
    """The tiny model, one rank."""
    yield generation.Bench(generation.parse_args(TINY))
    shutdown()


def test_the_command_and_the_table_from_the_file(tmp_path, capsys, monkeypatch):
    out = tmp_path / "results.json"
    arms = [name for name in generation.ARMS if not name.startswith("vllm")]  # these have a test of their own
    monkeypatch.setattr(sys, "argv", ["generation.py", *TINY, "--arms", ",".join(arms), "--profile", "--out", str(out)])
    generation.main()
    printed = capsys.readouterr().out
    results = json.loads(out.read_text(encoding="utf-8"))
    assert results["check"] == {"embedded": {"float32": 1.0}, "transformers": {"float32": 1.0}}
    left_out = {"title": "transformers, continuous batching", "skipped": "needs a GPU"}
    assert results["arms"].pop("transformers_cb") == left_out
    for name, run in results["arms"].items():
        assert run["requests"] == (3 if name == "transformers" else 12)  # every fourth
        assert run["tokens_per_second"] == pytest.approx(run["useful_tokens"] / run["seconds"][0])
        assert (run["first_tokens_per_second"] is None) == (name == "transformers")
    assert results["profile"]["kernels"]
    assert 0 <= results["setup"]["busy_cpus"] <= results["setup"]["cpus"]
    monkeypatch.setattr(sys, "argv", ["generation.py", "--table", str(out)])
    generation.main()
    assert printed.endswith(capsys.readouterr().out)
    for name in arms:
        assert generation.ARMS[name].title in printed


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM; `make vllm` installs it")
def test_vllm_does_the_same_work(measured_by):
    """In a process of its own; heads of 32 dimensions, the smallest that vLLM takes on a CPU."""
    arms = ["embedded", "vllm", "vllm_bare", "vllm_bare_seeded"]
    work = ["--model", "small", "--device", "cpu", "--requests", "4", "--max-new-tokens", "16", "--rounds", "1"]
    results, _ = measured_by("benchmarks/generation.py", *work, "--arms", ",".join(arms))
    assert results["check"] == {"embedded": {"float32": 1.0}, "vllm": {"float32": 1.0}}
    assert set(results["arms"]) == set(arms)
    assert len({run["useful_tokens"] for run in results["arms"].values()}) == 1
    assert results["vllm_sync"]["update_weights_seconds"] > 0


@pytest.mark.parametrize("name", ["embedded", "embedded_eager", "transformers"])
def test_responses_have_the_lengths_that_are_asked_for(bench, name):
    assert len(set(bench.limits)) > 3 and max(bench.limits) <= bench.max_new_tokens
    arm = generation.ARMS[name](bench)
    with arm.ready():
        assert list(map(len, arm.run(bench.prompts, bench.limits))) == bench.limits


def test_tokens_that_part_count_as_different():
    assert generation._agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == 6 / 8


def test_an_arm_that_draws_other_tokens_is_refused(bench, monkeypatch):
    """The embedded generator is held to fp32's tokens before anything is timed."""
    arms = {"embedded": generation.Embedded(bench)}
    monkeypatch.setattr(generation, "_forwards", lambda model, prompts, n: [[0] * n for _ in prompts])
    with pytest.raises(SystemExit, match="not those of whole forwards in fp32"):
        generation.check(bench, arms, {})


def test_transformers_twin_has_the_same_logits(bench):
    tokens = torch.tensor(bench.prompts[:1])
    with torch.no_grad():
        torch.testing.assert_close(bench.hf_model(torch.float32)(tokens).logits, bench.model(tokens))
