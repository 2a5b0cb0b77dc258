"""The model families that are built from their folder: what a config.json does not say of each.

A row of :data:`FAMILIES` is read by :mod:`spin.model.decoder`, which builds, and by :mod:`spin.model.hf_names`, which
names the weights. A family that differs in what the fields of :class:`Family` say is one more row.

Source: ``modeling_*.py`` and ``configuration_*.py`` of transformers 5.23, one folder for each model_type.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from spin.core.errors import CheckpointError

# A layer's norms: torchtune's name to the stored one. sa_scale and mlp_scale stand after attention and MLP.
_BEFORE = {"sa_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_AFTER = {"sa_scale": "post_attention_layernorm", "mlp_scale": "post_feedforward_layernorm"}
_AROUND = {
    "sa_norm": "input_layernorm",
    "sa_scale": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_scale": "post_feedforward_layernorm",
}
_GLM4 = {
    "sa_norm": "input_layernorm",
    "sa_scale": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_scale": "post_mlp_layernorm",
}

Config = Any  # transformers' config of the family, complete
Scale = Callable[[Config], float]


def _one(config: Config) -> float:
    return 1.0


def _own_biases(config: Config) -> tuple[bool, bool, bool]:
    attention = bool(getattr(config, "attention_bias", False))
    return attention, attention, bool(getattr(config, "mlp_bias", False))


def _no_biases(config: Config) -> tuple[bool, bool, bool]:
    return (False,) * 3


def _all_biases(config: Config) -> tuple[bool, bool, bool]:
    return (bool(config.use_bias),) * 3


def _always_rotates(config: Config, layer: int, sliding: bool) -> bool:
    return True


def _rotates_sliding(config: Config, layer: int, sliding: bool) -> bool:
    return sliding or config.sliding_window is None


def _every_sparse_step(config: Config, layer: int) -> bool:
    listed = layer in (config.mlp_only_layers or ())
    return not listed and config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0


@dataclass(frozen=True)
class Family:
    """How a family's decoder differs from Llama's.

    Args:
        models (str): released models of the family.
        norms (Mapping[str, str]): a layer's norms, torchtune's name to the stored one.
        norm (str): class of every norm, a name of :data:`spin.model.modules.NORMS`.
        qk_norm (Literal["head", "rotated", "whole"] | None): norms of queries and keys: of each head before the
            rotation, of each head after it, or of all heads as one vector.
        head_norms (Callable[[Config], str | None]): norms of queries and keys before the rotation that have weights for
            each head, a name of :data:`spin.model.modules.HEAD_NORMS`.
        qk_names (tuple[str, str]): the stored names of both.
        biases (Callable[[Config], tuple[bool, bool, bool]]): of q, k and v; of the output projection; of the MLP.
        mlp (tuple[str, ...]): stored names of w1, w2 and, in a gated MLP, w3.
        fused_qkv (bool): queries, keys and values are stored as one ``qkv_proj``.
        fused_mlp (bool): w1 and w3 are stored as one ``gate_up_proj``.
        parallel (Callable[[Config], bool]): attention and MLP read the same norm, and are added together.
        interleaved (bool): the rotation pairs dimension 2 i with 2 i + 1; else i with i + d / 2.
        rotates (Callable[[Config, int, bool], bool]): whether a layer's queries and keys are rotated, by number and
            whether its window slides.
        embedding_scale (Scale): factor of the embeddings, rounded to their dtype.
        residual_scale (Scale): factor of what attention and MLP add.
        logits_scale (Scale): factor of the logits.
        attention_scale (Callable[[Config], float | None]): factor of q k; None is ``head_dim ** -0.5``.
        windows (Literal["none", "all", "listed"]): which layers see ``sliding_window`` positions alone: none, all, or
            those that ``layer_types`` lists.
        partial_rotary (bool): ``partial_rotary_factor`` of a head is rotated; other families rotate all of it.
        eps (str | None): the key of the norms' epsilon; None: 1e-5.
        softcaps (tuple[str | None, str | None]): the keys of the attention's and the logits' soft caps.
        clip_qkv (Callable[[Config], float | None]): queries, keys and values are clamped to plus and minus this.
        sparse (Callable[[Config, int], bool]): whether a layer has experts in place of one MLP.
        refused (Mapping[str, tuple[Any, ...]]): keys that may ask for what is not built here: the values that do not.
    """

    models: str
    norms: Mapping[str, str] = field(default_factory=lambda: _BEFORE)
    norm: str = "RMSNorm"
    qk_norm: Literal["head", "rotated", "whole"] | None = None
    head_norms: Callable[[Config], str | None] = lambda config: None
    qk_names: tuple[str, str] = ("q_norm", "k_norm")
    biases: Callable[[Config], tuple[bool, bool, bool]] = _own_biases
    mlp: tuple[str, ...] = ("gate_proj", "down_proj", "up_proj")
    fused_qkv: bool = False
    fused_mlp: bool = False
    parallel: Callable[[Config], bool] = lambda config: False
    interleaved: bool = False
    rotates: Callable[[Config, int, bool], bool] = _always_rotates
    embedding_scale: Scale = _one
    residual_scale: Scale = _one
    logits_scale: Scale = _one
    attention_scale: Callable[[Config], float | None] = lambda config: None
    windows: Literal["none", "all", "listed"] = "none"
    partial_rotary: bool = False
    eps: str | None = "rms_norm_eps"
    softcaps: tuple[str | None, str | None] = (None, None)
    clip_qkv: Callable[[Config], float | None] = lambda config: None
    sparse: Callable[[Config, int], bool] = lambda config, layer: False
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_GEMMA: dict[str, Any] = {
    "norm": "GemmaRMSNorm",
    "embedding_scale": lambda config: config.hidden_size**0.5,
    "refused": {"use_bidirectional_attention": (None, False)},
}
_GEMMA2: dict[str, Any] = _GEMMA | {
    "norms": _AROUND,
    "windows": "listed",
    "attention_scale": lambda config: config.query_pre_attn_scalar**-0.5,
}

_COHERE: dict[str, Any] = {
    "norms": {"sa_norm": "input_layernorm"},
    "norm": "PlainLayerNorm",
    "eps": "layer_norm_eps",
    "parallel": lambda config: True,
    "interleaved": True,
    "logits_scale": lambda config: config.logit_scale,
}

# By config.json's model_type.
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2 to 3.3, SmolLM2, TinyLlama, Yi, DeepSeek-R1-Distill-Llama"),
    "mistral": Family("Mistral 7B, Nemo, Small 2409; Zephyr", biases=_no_biases, windows="all"),
    "ministral": Family("Ministral 8B", biases=_no_biases, windows="listed"),
    "ministral3": Family("Ministral 3, its text part alone", biases=_no_biases, windows="all"),
    "qwen2": Family(
        "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen", biases=lambda config: (True, False, False), windows="listed"
    ),
    "qwen3": Family("Qwen3 0.6B to 32B", qk_norm="head", windows="listed"),
    "qwen3_moe": Family("Qwen3-30B-A3B, Qwen3-235B-A22B", qk_norm="head", windows="all", sparse=_every_sparse_step),
    "phi3": Family(
        "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
        biases=_no_biases,
        fused_qkv=True,
        fused_mlp=True,
        windows="all",
        partial_rotary=True,
    ),
    "gemma": Family("Gemma", **_GEMMA),
    "gemma2": Family("Gemma 2", **_GEMMA2, softcaps=("attn_logit_softcapping", "final_logit_softcapping")),
    "gemma3_text": Family(
        "Gemma 3 1B; the text part of 4B to 27B (model_type gemma3)",
        **_GEMMA2,
        qk_norm="head",
        softcaps=(None, "final_logit_softcapping"),
    ),
    "olmo": Family("OLMo", norm="ScalelessLayerNorm", eps=None, clip_qkv=lambda config: config.clip_qkv),
    "olmo2": Family("OLMo 2", norms=_AFTER, qk_norm="whole"),
    "olmo3": Family("OLMo 3", norms=_AFTER, qk_norm="whole", windows="listed"),
    "smollm3": Family(
        "SmolLM3", windows="listed", rotates=lambda config, layer, sliding: bool(config.no_rope_layers[layer])
    ),
    "granite": Family(
        "Granite 3, Granite 3.3",
        embedding_scale=lambda config: config.embedding_multiplier,
        residual_scale=lambda config: config.residual_multiplier,
        logits_scale=lambda config: 1 / config.logits_scaling,
        attention_scale=lambda config: config.attention_multiplier,
    ),
    "stablelm": Family(
        "StableLM 2 1.6B, StableLM Zephyr 3B",
        norm="LayerNorm",
        eps="layer_norm_eps",
        partial_rotary=True,
        biases=lambda config: (config.use_qkv_bias, False, False),
        parallel=lambda config: config.use_parallel_residual,
        head_norms=lambda config: "SeparateHeadNorms" if config.qk_layernorm else None,
        qk_names=("q_layernorm", "k_layernorm"),
    ),
    "seed_oss": Family(
        "Seed-OSS 36B", biases=lambda config: (config.attention_bias, config.attention_out_bias, config.mlp_bias)
    ),
    "hunyuan_v1_dense": Family(
        "Hunyuan dense 0.5B to 7B", qk_norm="rotated", qk_names=("query_layernorm", "key_layernorm")
    ),
    "exaone4": Family("EXAONE 4.0", norms=_AFTER, qk_norm="head", windows="listed", rotates=_rotates_sliding),
    "glm4": Family(
        "GLM-4 0414",
        norms=_GLM4,
        biases=lambda config: (config.attention_bias, False, False),
        fused_mlp=True,
        interleaved=True,
        partial_rotary=True,
    ),
    "cohere": Family("Command R", **_COHERE, head_norms=lambda config: "HeadNorms" if config.use_qk_norm else None),
    "cohere2": Family(
        "Command R7B, Command A", **_COHERE, windows="listed", rotates=lambda config, layer, sliding: sliding
    ),
    "starcoder2": Family(
        "StarCoder2", norm="LayerNorm", eps="norm_epsilon", biases=_all_biases, mlp=("c_fc", "c_proj"), windows="all"
    ),
    "nemotron": Family(
        "Nemotron 4, Minitron", norm="LayerNorm1P", eps="norm_eps", mlp=("up_proj", "down_proj"), partial_rotary=True
    ),
    "ernie4_5": Family("ERNIE 4.5 0.3B", biases=_all_biases, interleaved=True),
    "apertus": Family(
        "Apertus",
        norms={"sa_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
        qk_norm="head",
        mlp=("up_proj", "down_proj"),
    ),
    "internlm3": Family("InternLM3 (with transformers 5.23)"),
}


def decoder_config(config: dict[str, Any], file: str | Path = "config.json") -> Any:
    """transformers' config of a config.json's content, with the family's defaults; CheckpointError if it takes none."""
    from transformers import AutoConfig

    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{file}: no model_type. Put the original's there; expected one of {', '.join(FAMILIES)}."
        )
    # a copy: the classes change the objects in it
    values = {key: deepcopy(value) for key, value in config.items() if key not in ("model_type", "auto_map")}
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))  # for generation; defaults need not fit
    warnings, level = logging.getLogger("transformers"), logging.getLogger("transformers").level
    warnings.setLevel(logging.ERROR)  # it remarks upon each rotary table whose keys it finds odd
    try:
        made = AutoConfig.for_model(config["model_type"], **values)
        made.standardize_rope_params()  # as the model does once more, when it has all keys
        return made
    except Exception as error:  # noqa: BLE001 - each config class checks in its own way
        said = " ".join(str(error).split())[:500]
        raise CheckpointError(f"{file}: transformers does not take these values ({said}).") from error
    finally:
        warnings.setLevel(level)


@cache
def keys_read(family: str) -> frozenset[str]:
    """The keys of config.json that transformers' config of a family declares."""
    made = decoder_config({"model_type": family})
    return frozenset(made.to_dict()) | type(made).attribute_map.keys()


def heads_of(config: Config) -> tuple[int, int, int]:
    """Heads, key/value heads and dimensions of a head."""
    heads: int = config.num_attention_heads
    return (
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )
