"""Exported adapters: by their file's own numbers, and by peft where it is installed."""

from __future__ import annotations

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from spin.checkpoint.peft import export_peft, merge_peft
from spin.core.errors import CheckpointError
from spin.core.ranks import init_world
from spin.model.adapters import adapted_modules, adapter_parameters, full_magnitude
from spin.model.sharding import reshard
from tests.families import FAMILIES, MODEL_TYPES, MODELS, hf_twin, lora_model
from tests.torchao_versions import needs_peft

TOKENS = torch.arange(3, 23).reshape(2, 10)
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "some": {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False},
    "some_dora": {"lora_attn_modules": ["k_proj"], "apply_lora_to_mlp": True, "use_dora": True},
}


def exported(name: str, kind: str, tmp_path):
    """A family's adapted model, transformers' base with its weights, and the folder of the adapter."""
    model, base = lora_model(name, **KINDS[kind]), hf_twin(name, MODELS[name]())
    base.config.save_pretrained(tmp_path / "base")
    folder = export_peft(
        model, tmp_path / "base", tmp_path / "adapter", MODEL_TYPES.get(name, "HF").upper(), world=init_world("cpu")
    )
    return model, base, folder


@torch.no_grad()
def apply_by_hand(base, folder) -> None:
    """Adds the adapter to the base's weights as peft's documentation defines it."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        module = key.removesuffix(".lora_A.weight")
        leaf = module.rsplit(".", 1)[-1]
        assert leaf in config["target_modules"]
        rank = config["rank_pattern"].get(leaf, config["r"])
        alpha = config["alpha_pattern"].get(leaf, config["lora_alpha"])
        a, b = tensors.pop(key), tensors.pop(f"{module}.lora_B.weight")
        assert a.shape[0] == b.shape[1] == rank
        weight = base.get_parameter(module.removeprefix("base_model.model.") + ".weight")
        weight.add_(alpha / rank * b @ a)
        if config["use_dora"]:
            magnitude = tensors.pop(f"{module}.lora_magnitude_vector")
            weight.mul_((magnitude / weight.norm(dim=1))[:, None])
    assert not tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_the_files_numbers_give_the_adapted_model(name, kind, tmp_path):
    """Every family, Phi's joined weights among them: transformers with the adapter has torchtune's logits, merged by
    hand or by `merge_peft`."""
    model, base, folder = exported(name, kind, tmp_path)
    expected = model(TOKENS)
    if name == "gemma2":
        from spin.model.gemma2 import fix_gemma2_softcap

        fix_gemma2_softcap(model)
        expected = model(TOKENS)
    merged = deepcopy(base)
    merge_peft(merged, folder)
    apply_by_hand(base, folder)
    for each in (base, merged):
        torch.testing.assert_close(each(TOKENS).logits, expected, rtol=1e-3, atol=1e-3)
    reshard(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model.model.lm_head.weight": torch.ones(1)}, "more than an adapter of linear layers"),
        ({"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(1, 1)}, "does not fit its base"),
    ],
)
def test_an_adapter_that_cannot_be_merged(change, words, tmp_path):
    _, base, folder = exported("llama3_2", "lora", tmp_path)
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights) | change, weights)
    with pytest.raises(CheckpointError, match=words):
        merge_peft(base, folder)


def test_the_magnitudes_of_a_bf16_adapter_are_not_rounded(tmp_path):
    """m is the norm of a row and what was learned on top; in bf16 the file would be off by up to 0.4 %."""
    model, base = lora_model("llama3_2", use_dora=True), hf_twin("llama3_2", FAMILIES["llama3_2"]())
    base.config.save_pretrained(tmp_path / "base")
    for module in adapted_modules(model).values():
        for parameter in adapter_parameters(module).values():
            parameter.data = parameter.data.bfloat16()
    folder = export_peft(model, tmp_path / "base", tmp_path / "adapter", "LLAMA3_2", world=init_world("cpu"))
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"
    torch.testing.assert_close(tensors[name], full_magnitude(model.layers[1].mlp.w2), rtol=1e-6, atol=0)
    assert tensors[name.replace("magnitude_vector", "A.weight")].dtype == torch.bfloat16


@needs_peft
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama3_2", "qwen2_5", "phi4", "hf/qwen3", "hf/gemma3", "hf/glm4", "hf/olmo2"])
def test_peft_loads_it(name, kind, tmp_path):
    import peft

    model, base, folder = exported(name, kind, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS), rtol=1e-3, atol=1e-3)
