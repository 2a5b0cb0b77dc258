"""Tiny Hugging Face folders with random weights: every family that ``spin.model.from_hf`` builds, and odd ones.

``FOLDERS`` maps a name to what its config.json has beside ``_SHAPE``; ``REFUSED`` holds folders of other kinds.
"""

import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

VOCAB_SIZE = 160
MAX_SEQ_LEN = 128
WINDOW = 8
SLIDING, FULL = "sliding_attention", "full_attention"

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_SEQ_LEN,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _rope(rope_type: str, theta: float = 1e4, **keys: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": theta} | keys


_LLAMA3 = _rope(
    "llama3", 5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)


def _longrope(pairs: int, original: int, **keys: Any) -> dict[str, Any]:
    """Of 40 tokens, an ``original`` of 16 takes the long factors and one of 64 the short ones."""
    factors = {"short_factor": [1.0 + 0.25 * i for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    return _rope("longrope", original_max_position_embeddings=original, **factors, **keys)


def _layers(*kinds: str) -> dict[str, Any]:
    return {"num_hidden_layers": len(kinds), "layer_types": list(kinds), "sliding_window": WINDOW}


_MOE = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 24}
_GEMMA3 = {"head_dim": 24, "query_pre_attn_scalar": 12, "final_logit_softcapping": 3.0}
_VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
}  # fmt: skip
_HUNYUAN_NTK = {
    "type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def _gemma3(**text: Any) -> dict[str, Any]:
    kinds = _layers(SLIDING, FULL, SLIDING)
    text = {**_SHAPE, **_GEMMA3, **kinds, "final_logit_softcapping": None, **text}  # transformers leaves out the cap
    ids = {"image_token_index": 157, "boi_token_index": 158, "eoi_token_index": 159}
    return {
        "model_type": "gemma3", "text_config": text, "vision_config": _VISION, "mm_tokens_per_image": 4, **ids,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip


# name: keys of config.json; model_type is the name unless it is among them
FOLDERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_odd": {"model_type": "llama", "head_dim": 24, "num_key_value_heads": 1, "vocab_size": 157,
                  "tie_word_embeddings": True, "num_hidden_layers": 3},
    "llama_no_gqa": {"model_type": "llama", "num_key_value_heads": None, "hidden_act": "gelu"},
    "llama_linear": {"model_type": "llama", "rope_parameters": _rope("linear", factor=4.0)},
    "llama_llama3": {"model_type": "llama", "rope_parameters": _LLAMA3},
    "llama_yarn": {"model_type": "llama", "rope_parameters": _YARN},
    "llama_yarn_scaled": {"model_type": "llama", "head_dim": 32, "rope_parameters": _YARN | {
        "truncate": False, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5}},
    "llama_yarn_factor": {"model_type": "llama", "rope_parameters": _YARN | {"attention_factor": 1.5}},
    "llama_longrope": {"model_type": "llama", "rope_parameters": _longrope(8, 64, factor=4.0)},
    "llama_longrope_long": {"model_type": "llama", "rope_parameters": _longrope(8, 16, attention_factor=1.25)},
    "mistral": {"sliding_window": WINDOW},
    "mistral_full": {"model_type": "mistral", "sliding_window": None, "head_dim": 32, "num_key_value_heads": 1},
    "ministral": {**_layers(SLIDING, FULL, FULL), "head_dim": 16},
    "ministral3": {"head_dim": 32, "rope_parameters": _rope("yarn", 1e6, factor=8.0, mscale=1.0, mscale_all_dim=1.0,
                   original_max_position_embeddings=16, llama_4_scaling_beta=0.5)},
    "ministral3_window": {"model_type": "ministral3", "head_dim": 16, "sliding_window": WINDOW,
                          "rope_parameters": _rope("default", 1e6, original_max_position_embeddings=12,
                                                   llama_4_scaling_beta=0.25)},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_windows": {"model_type": "qwen2", "num_hidden_layers": 3, "use_sliding_window": True,
                      "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "qwen3_windows": {"model_type": "qwen3", **_layers(FULL, SLIDING, SLIDING, FULL), "use_sliding_window": True,
                      "head_dim": 24, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3_yarn": {"model_type": "qwen3", "head_dim": 16, "rope_parameters": _YARN | {"rope_theta": 1e6}},
    "qwen3_moe": {**_MOE, "norm_topk_prob": True},
    "qwen3_moe_raw": {"model_type": "qwen3_moe", **_MOE, "norm_topk_prob": False, "num_experts_per_tok": 2,
                      "attention_bias": True},
    "qwen3_moe_mixed": {"model_type": "qwen3_moe", **_MOE, "norm_topk_prob": True, "num_hidden_layers": 4,
                        "num_experts": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3], "head_dim": 16,
                        "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": WINDOW},
    "phi3": {"num_key_value_heads": 4},
    "phi3_window": {"model_type": "phi3", "sliding_window": WINDOW, "rope_parameters": _longrope(8, 64),
                    "original_max_position_embeddings": 64},
    "phi4_mini": {"model_type": "phi3", "tie_word_embeddings": True, "num_key_value_heads": 1,
                  "original_max_position_embeddings": 64,
                  "rope_parameters": _longrope(6, 64, partial_rotary_factor=0.75)},
    "phi4_mini_long": {"model_type": "phi3", "original_max_position_embeddings": 16, "vocab_size": 163,
                       "rope_parameters": _longrope(6, 16, partial_rotary_factor=0.75)},
    "gemma": {"head_dim": 32, "hidden_act": "gelu"},
    "gemma2": {**_layers(SLIDING, FULL, SLIDING), "head_dim": 24, "query_pre_attn_scalar": 12,
               "attn_logit_softcapping": 1.5, "final_logit_softcapping": 3.0},
    "gemma2_no_caps": {"model_type": "gemma2", "head_dim": 16, "sliding_window": WINDOW, "attn_logit_softcapping": None,
                       "final_logit_softcapping": None, "attention_bias": True, "tie_word_embeddings": False},
    "gemma3_text": {**_layers(SLIDING, SLIDING, FULL), **_GEMMA3},
    "gemma3_text_linear": {"model_type": "gemma3_text", **_layers(FULL, SLIDING, SLIDING, FULL), **_GEMMA3,
                           "num_key_value_heads": 1, "final_logit_softcapping": None, "tie_word_embeddings": False,
                           "rope_parameters": {FULL: _rope("linear", 1e6, factor=4.0), SLIDING: _rope("default", 2e4)}},
    "gemma3": _gemma3(),
    "gemma3_untied": _gemma3(head_dim=16, vocab_size=171) | {"tie_word_embeddings": False},
    "gemma3_other_names": _gemma3(num_key_value_heads=1) | {"tie_word_embeddings": False},
    "olmo": {},
    "olmo_clipped": {"model_type": "olmo", "clip_qkv": 0.7, "attention_bias": True, "tie_word_embeddings": True},
    "olmo2": {"rope_parameters": _rope("default", 5e5)},
    "olmo2_odd": {"model_type": "olmo2", "head_dim": 24, "num_key_value_heads": 1, "attention_bias": True},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": WINDOW},
    "olmo3_yarn": {"model_type": "olmo3", **_layers(FULL, SLIDING, FULL),
                   "rope_parameters": {FULL: _YARN | {"rope_theta": 5e5}, SLIDING: _rope("default", 5e5)}},
    "smollm3": {"num_hidden_layers": 4},
    "smollm3_odd": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0], "mlp_bias": True,
                    "use_sliding_window": True, "sliding_window": WINDOW, "attention_bias": True, "head_dim": 24,
                    "tie_word_embeddings": False},
    "granite": {"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "attention_multiplier": 0.4,
                "logits_scaling": 3.0, "tie_word_embeddings": True},
    "granite_biases": {"model_type": "granite", "attention_bias": True, "mlp_bias": True, "head_dim": 24,
                       "attention_multiplier": 0.1, "logits_scaling": 0.5},
    "stablelm": {"use_qkv_bias": True},
    "stablelm_parallel": {"model_type": "stablelm", "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    "stablelm_qk_norm": {"model_type": "stablelm", "qk_layernorm": True, "tie_word_embeddings": True,
                         "rope_parameters": _rope("linear", factor=2.0, partial_rotary_factor=0.25)},
    "seed_oss": {"head_dim": 24},
    "seed_oss_biases": {"model_type": "seed_oss", "head_dim": 16, "attention_out_bias": True, "mlp_bias": True},
    "hunyuan_v1_dense": {"head_dim": 32, "tie_word_embeddings": True},
    "hunyuan_ntk": {"model_type": "hunyuan_v1_dense", "head_dim": 16, "rope_parameters": _HUNYUAN_NTK,
                    "attention_bias": True},
    "exaone4": {"num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 3},
    "exaone4_full": {"model_type": "exaone4", "layer_types": [FULL, FULL], "sliding_window": None,
                     "rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    "exaone4_odd": {"model_type": "exaone4", **_layers(FULL, SLIDING, FULL), "sliding_window_pattern": "LLLG",
                    "head_dim": 24, "num_key_value_heads": 1},
    "glm4": {"head_dim": 16},
    "glm4_odd": {"model_type": "glm4", "head_dim": 24, "attention_bias": False, "num_key_value_heads": 1,
                 "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.5},
    "cohere_qk_norm": {"model_type": "cohere", "use_qk_norm": True, "attention_bias": True,
                       "logit_scale": 1.5, "tie_word_embeddings": False},
    "cohere2": {"num_hidden_layers": 4, "sliding_window": WINDOW, "logit_scale": 0.25},
    "cohere2_odd": {"model_type": "cohere2", **_layers(FULL, SLIDING, SLIDING), "attention_bias": True,
                    "logit_scale": 1.5, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "starcoder2": {},
    "starcoder2_window": {"model_type": "starcoder2", "use_bias": False, "sliding_window": WINDOW, "vocab_size": 157,
                          "tie_word_embeddings": False},
    "nemotron": {},
    "nemotron_biases": {"model_type": "nemotron", "attention_bias": True, "mlp_bias": True, "head_dim": 24,
                        "partial_rotary_factor": 0.25, "tie_word_embeddings": True},
    "ernie4_5": {"head_dim": 24},
    "ernie4_5_biases": {"model_type": "ernie4_5", "head_dim": 16, "use_bias": True, "tie_word_embeddings": False},
    "apertus": {"rope_parameters": _LLAMA3},
    "apertus_odd": {"model_type": "apertus", "head_dim": 24, "num_key_value_heads": 1, "attention_bias": True,
                    "rope_parameters": _rope("default"), "tie_word_embeddings": True},
    "internlm3": {"head_dim": 24},
    "internlm3_biases": {"model_type": "internlm3", "head_dim": 16, "qkv_bias": True, "bias": True},
}  # fmt: skip

ONE_OF_EACH = [name for name in FOLDERS if FOLDERS[name].get("model_type", name) == name]  # a folder of each model_type

_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", FULL], "head_dim": 16,
}  # fmt: skip
_MAMBA = {
    "mamba_n_heads": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_expand": 2,
    "layer_types": ["mamba", "attention"],
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "llama_dynamic": {"model_type": "llama", "rope_parameters": _rope("dynamic", factor=4.0)},
    "gemma_bidirectional": {"model_type": "gemma", "head_dim": 16, "use_bidirectional_attention": True},
    "gpt_oss": {**_layers(SLIDING, FULL), "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
                "rope_parameters": _rope("default")},
    "mixtral": {"num_local_experts": 4},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": {**_LINEAR, **_MOE, "shared_expert_intermediate_size": 24, "head_dim": 16},
    "lfm2": {"layer_types": ["conv", FULL]},
    "granitemoehybrid": {**_MAMBA, "num_local_experts": 2, "shared_intermediate_size": 96},
}  # fmt: skip

_OTHER_NAMES = {  # of what transformers 4.52 to 4.57 wrote; transformers 5 writes those of the hub and reads both
    "language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.",
    "vision_tower.": "model.vision_tower.", "multi_modal_projector.": "model.multi_modal_projector.",
}  # fmt: skip


def folder_config(name: str, **changes: Any) -> Any:
    """The transformers config of folder ``name`` of ``FOLDERS`` or ``REFUSED``, with other keys."""
    from transformers import AutoConfig

    keys = {"model_type": name} | (FOLDERS | REFUSED)[name]
    if keys["model_type"] == "gemma3":
        ids = {key: value for key, value in changes.items() if key.endswith("_token_id")}
        keys = {**keys, **ids, "text_config": keys["text_config"] | changes}
    return AutoConfig.for_model(**deepcopy(keys if "text_config" in keys else _SHAPE | keys | changes))


def write_folder(name: str, path: Path, **changes: Any) -> nn.Module:
    """Write folder ``name`` to ``path``, with other keys of its config.

    No parameter keeps a constant initial value, so that no loss of one is hidden.

    Returns:
        nn.Module: the transformers model with these weights: float32, eager attention, evaluation mode.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = folder_config(name, **changes)
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                mean = float(parameter.flatten()[0]) if parameter.min() == parameter.max() else 0.0
                nn.init.normal_(parameter, mean=mean, std=0.2 if parameter.dim() == 1 or mean else 0.125)
    model.save_pretrained(path)
    if name.endswith("_other_names"):
        _rename(path / "model.safetensors")
    return model.eval()


def decoder(name: str, shape: dict[str, int] | None = None, **arguments: Any) -> nn.Module:
    """The torchtune model of folder ``name``, plain and in float32, with the folder's weights; adapters are random."""
    from spin.model.adapters import adapted_modules, adapter_parameters, patch_dora, patch_nf4
    from spin.model.decoder import from_hf
    from spin.model.hf import from_hf_tensors
    from spin.model.hf_folder import CONFIG, read_config, text_name

    with tempfile.TemporaryDirectory() as folder:
        write_folder(name, Path(folder), **(shape or {}))
        model: nn.Module = from_hf(folder, **arguments)
        named = {text_name(key): tensor for key, tensor in stored_tensors(Path(folder)).items()}
        named.pop(None, None)  # of images
        from_hf_tensors(model, named, read_config(Path(folder) / CONFIG), "HF")
    patch_dora(model)
    patch_nf4(model)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        for module in adapted_modules(model).values():
            for parameter in adapter_parameters(module).values():
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def forward_ids(length: int = 40, vocab_size: int = VOCAB_SIZE - 10, rows: int = 2) -> torch.Tensor:
    """``[rows, length]`` random token ids, none of them special."""
    return torch.randint(3, vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, which has one file."""
    return load_file(folder / "model.safetensors")


def _rename(file: Path) -> None:
    renamed = {}
    for name, tensor in load_file(file).items():
        start = next(start for start in _OTHER_NAMES if name.startswith(start))
        renamed[_OTHER_NAMES[start] + name.removeprefix(start)] = tensor
    save_file(renamed, file, {"format": "pt"})
