"""A model with more rows than its tokenizer has tokens, and likely ones: no program ever samples them."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spin.data import PairStore
from tests.generators.test_vllm import VLLM
from tests.recipes.helpers import REPO, command, evaluate, generate, run

ROWS = 1024 + 40
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def padded(tiny_lm, tmp_path_factory):
    """The tiny model with 40 rows behind its vocabulary, each three times that of a token that it often writes."""
    folder = tmp_path_factory.mktemp("padded") / "model"
    shutil.copytree(tiny_lm, folder)
    tensors = load_file(tiny_lm / "model.safetensors")
    rows = tensors[EMBEDDINGS]
    tensors[EMBEDDINGS] = torch.cat([rows, 3 * rows[260:300]])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS}))
    return folder


def overrides(padded):
    folder = [f"tokenizer.path={padded}", f"checkpointer.checkpoint_dir={padded}", f"model.vocab_size={ROWS}"]
    return [*folder, "max_iterations=1", "max_epochs=1", "validation_dataset=null"]


def responses_of(store):
    return [(pair.prompt_ids, pair.generated[0].token_ids) for pair in PairStore.open(store).pairs()]


@pytest.fixture(scope="module")
def trained(padded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, *overrides(padded))
    return folder


def test_a_run_samples_only_what_the_tokenizer_knows(padded, trained):
    model = AutoModelForCausalLM.from_pretrained(padded, dtype=torch.float32)
    wanted = 0
    for prompt, response in responses_of(trained / "iteration_000/responses"):
        assert max(response) < 1024
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        wanted += (logits.softmax(-1)[:, 1024:].sum(-1) > 0.5).sum().item()
    assert wanted > 10, "the padding is not likely, so this test shows nothing"


def test_workers_sample_what_a_run_does(padded, trained, tmp_path):
    generate(tmp_path, *overrides(padded))
    got, expected = (responses_of(folder / "iteration_000/responses") for folder in (tmp_path, trained))
    assert [(list(a), list(b)) for a, b in got] == [(list(a), list(b)) for a, b in expected]


def test_an_evaluation_samples_only_what_the_tokenizer_knows(padded, tiny_lm, tmp_path):
    changes = [f"candidate.checkpoint_dir={padded}", f"candidate.model.vocab_size={ROWS}"]
    changes += [f"baseline.checkpoint_dir={padded}", f"judge.checkpoint_dir={padded}", "sampling.max_new_tokens=12"]
    changes += [f"dataset.source={REPO / 'examples/quickstart/jargon_val.jsonl'}", "verdict=exact_match"]
    evaluate(tmp_path, *changes)
    for name in ("trained", "start"):
        assert max(max(response) for _, response in responses_of(tmp_path / "responses" / name)) < 1024


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM; `make vllm` installs it")
def test_vllm_samples_only_what_the_tokenizer_knows(padded, tmp_path):
    changes = [*overrides(padded), *VLLM, f"generator.model_dir={padded}", "max_steps=1", "sampling.temperature=1"]
    command(tmp_path, *changes)
    assert max(max(response) for _, response in responses_of(tmp_path / "iteration_000/responses")) < 1024
