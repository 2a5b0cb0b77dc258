"""A model with experts plays itself: from a folder by transformers to one that transformers reads."""

import math

import pytest
import spin_recipe
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from spin.cli import main
from spin.config import SPINConfig, complete, load_config
from spin.data import PairStore
from tests.recipes.helpers import REPO, logp_by_transformers, metrics_of

SHAPE = {
    "vocab_size": 1088, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3,
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True,
    "mlp_only_layers": [1],
}  # fmt: skip
METHODS = {"full": {}, "lora": {"lora_attn_modules": ["q_proj", "v_proj"], "lora_rank": 4}}


@pytest.fixture(scope="module")
def folder(tiny_lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SHAPE, **ids), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.3)  # a model of transformers starts with routers of zeros
    model.save_pretrained(folder)
    return folder


def data(part, limit):
    source = str(REPO / f"examples/quickstart/jargon_{part}.jsonl")
    return {"source": source, "split": None, "max_response_tokens": 60, "on_long_response": "cut", "limit": limit}


@pytest.mark.parametrize("method", METHODS)
def test_an_iteration(method, folder, tmp_path, capsys):
    out = tmp_path / "out"
    values = {
        "output_dir": str(out), "model": {"path": str(folder), **METHODS[method]}, "dataset": data("train", 8),
        "validation_dataset": {"_component_": "spin.data.prompt_dataset", **data("val", 4)},
        "checkpointer": {"export_dtype": "fp32"}, "generator": {"batch_size": 8}, "sampling": {"max_new_tokens": 16},
        "pairs": {"row_tokens": 512, "row_multiple": 16}, "global_batch_size": 4, "max_iterations": 1,
        "max_epochs": 1, "validation": {"spin": True}, "optimizer": {"lr": 1e-3}, "compile": False, "device": "cpu",
        "compute_dtype": "fp32",
    }  # fmt: skip
    (tmp_path / "my.yaml").write_text(OmegaConf.to_yaml(values))
    assert main(["validate", str(tmp_path / "my.yaml")]) == 0, capsys.readouterr().out
    assert main(["estimate", str(tmp_path / "my.yaml")]) in (0, None)
    assert "a token is multiplied with" in capsys.readouterr().out
    recipe = spin_recipe.SPINRecipe(complete(load_config(str(tmp_path / "my.yaml"), []), SPINConfig))
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    first = next(row for row in metrics_of(out) if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)

    exported = out / "iteration_000/hf_model"
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (folder, exported))
    pairs = list(PairStore.open(out / "iteration_000/pairs").pairs())
    expected = [logp_by_transformers(before, pair.prompt_ids, pair.real_ids) for pair in pairs]
    assert [pair.reference_real_logp for pair in pairs] == pytest.approx(expected, abs=2e-3)
    held_out = list(PairStore.open(out / "iteration_000/validation/pairs").pairs())
    tokens = sum(len(pair.real_ids) for pair in held_out)
    logps = sum(logp_by_transformers(after, pair.prompt_ids, pair.real_ids) for pair in held_out)
    assert metrics_of(out)[-1]["val_loss"] == pytest.approx(-logps / tokens, abs=1e-4)
    moved = {name for name, weight in after.state_dict().items() if not torch.equal(weight, before.state_dict()[name])}
    experts = {name for name in before.state_dict() if ".mlp.experts." in name or ".mlp.gate." in name}
    assert len(experts) == 2 * 3
    assert experts <= moved if method == "full" else {name.split(".")[-2] for name in moved} == {"q_proj", "v_proj"}
