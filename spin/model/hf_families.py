"""The model families that SPIN trains: defaults of config.json, and how torchtune lays out the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spin.core.errors import ConfigError
from spin.model import hf_names
from spin.model.families import FAMILIES, decoder_config
from spin.model.gemma2 import swap_mlp_norms
from spin.model.torchtune import (
    gemma2_hf_to_tune,
    gemma2_tune_to_hf,
    hf_to_tune,
    phi3_hf_to_tune,
    phi3_tune_to_hf,
    qwen2_hf_to_tune,
    qwen2_tune_to_hf,
    tune_to_hf,
)

Tensors = dict[str, torch.Tensor]

_COMMON: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
}
_GEMMA: dict[str, Any] = _COMMON | {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
# By config.json's model_type: the keys that transformers reads for this family, with the defaults of its config class.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
    "mistral": _COMMON | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _COMMON
    | {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    "gemma": _GEMMA
    | {
        "num_key_value_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": None,  # transformers 4 reads this one
    },
    "gemma2": _GEMMA
    | {
        "num_key_value_heads": 4,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "phi3": _COMMON
    | {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
    },
}


def _gemma2_to_tune(tensors: Tensors, **heads: int) -> Tensors:
    return swap_mlp_norms(gemma2_hf_to_tune(tensors, **heads))


def _gemma2_to_hf(tensors: Tensors, **heads: int) -> Tensors:
    return gemma2_tune_to_hf(swap_mlp_norms(tensors), **heads)


def _phi3_to_tune(tensors: Tensors, *, num_heads: int, num_kv_heads: int, head_dim: int, dim: int) -> Tensors:
    # its `dim` is the number of query rows
    return phi3_hf_to_tune(tensors, num_heads, num_kv_heads, num_heads * head_dim)


def _phi3_to_hf(tensors: Tensors, **heads: int) -> Tensors:
    return phi3_tune_to_hf(tensors)


@dataclass(frozen=True)
class Layout:
    """How the weights of one of torchtune's model types lie in a Hugging Face folder.

    Args:
        families (tuple[str, ...]): the model_type of config.json that it reads.
        builder (str): torchtune's component builder of such models.
        to_tune (Callable[..., Tensors]): from Hugging Face's names and layouts; with :func:`heads_of` as arguments.
        to_hf (Callable[..., Tensors]): back, with the same arguments.
        halves (bool): torchtune's rotary embedding pairs dimension i with i + d / 2, as transformers' does; else 2 i
            with 2 i + 1.
        merges (bool): several of torchtune's tensors of a layer are stored as one.
    """

    families: tuple[str, ...]
    builder: str
    to_tune: Callable[..., Tensors] = hf_to_tune
    to_hf: Callable[..., Tensors] = tune_to_hf
    halves: bool = False
    merges: bool = False


_PHI = Layout(("phi3",), "torchtune.models.phi3.phi3", _phi3_to_tune, _phi3_to_hf, halves=True, merges=True)
# By the names of torchtune.training.checkpointing.ModelType.
LAYOUTS = {
    "LLAMA2": Layout(("llama",), "torchtune.models.llama2.llama2"),
    "LLAMA3": Layout(("llama",), "torchtune.models.llama3_1.llama3_1"),
    "LLAMA3_2": Layout(("llama",), "torchtune.models.llama3_2.llama3_2"),
    "MISTRAL": Layout(("mistral", "llama"), "torchtune.models.mistral.mistral"),
    "GEMMA": Layout(("gemma",), "torchtune.models.gemma.gemma"),
    "GEMMA2": Layout(("gemma2",), "torchtune.models.gemma2.gemma2", _gemma2_to_tune, _gemma2_to_hf),
    "QWEN2": Layout(("qwen2",), "torchtune.models.qwen2.qwen2", qwen2_hf_to_tune, qwen2_tune_to_hf, halves=True),
    "PHI3_MINI": _PHI,
    "PHI4": _PHI,
    "HF": Layout(tuple(FAMILIES), "spin.model.from_hf", hf_names.to_tune, hf_names.to_hf, halves=True, merges=True),
}


def known_keys(family: str) -> set[str]:
    """The keys of config.json that a family reads."""
    return set(DEFAULTS.get(family) or decoder_config({"model_type": family}).to_dict())


def check_model_type(model_type: str | None) -> str:
    """A model type in capitals, HF if there is none; a ConfigError if SPIN cannot convert its weights."""
    name = "HF" if model_type is None else str(model_type).upper()
    if name not in LAYOUTS:
        raise ConfigError(f"model_type is {model_type!r}, expected one of {', '.join(LAYOUTS)}.")
    return name


def family_of(config: dict[str, Any], model_type: str) -> str:
    """The key of ``DEFAULTS`` for a config.json; ``model_type`` decides where the file has none."""
    found = config.get("model_type")
    known = FAMILIES if model_type == "HF" else DEFAULTS
    return str(found) if found in known else LAYOUTS[model_type].families[0]


def settings_of(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """A config.json over the defaults of its family."""
    if model_type == "HF":
        return {**decoder_config(config).to_dict(), **config}
    return DEFAULTS[family_of(config, model_type)] | config


def heads_of(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The arguments that a layout's converters take."""
    family = {"family": family_of(config, model_type)} if model_type == "HF" else {}
    values = settings_of(config, model_type)
    heads, width = values["num_attention_heads"], values["hidden_size"]
    return family | {
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads") or heads,
        "dim": width,
        "head_dim": values.get("head_dim") or width // heads,
    }
