"""How the weights of a model lie in a Hugging Face folder, by the layouts that torchtune knows, and by its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from spin.core.errors import ConfigError
from spin.model import hf_names
from spin.model.families import FAMILIES, decoder_config, heads_of
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
        to_tune (Callable[..., Tensors]): from Hugging Face's names and layouts; with :func:`converter_arguments`.
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
    "HF": Layout(tuple(FAMILIES), "spin.model.from_hf", hf_names.to_tune, hf_names.to_hf, halves=True),
}


def check_model_type(model_type: str | None) -> str:
    """A model type in capitals, HF if there is none; a ConfigError if SPIN cannot convert its weights."""
    name = "HF" if model_type is None else str(model_type).upper()
    if name not in LAYOUTS:
        raise ConfigError(f"model_type is {model_type!r}, expected one of {', '.join(LAYOUTS)}.")
    return name


def config_of(config: dict[str, Any], model_type: str) -> Any:
    """transformers' config of a config.json; ``model_type`` decides on the family where the file has none."""
    return decoder_config({"model_type": LAYOUTS[model_type].families[0]} | config)


def merges(config: dict[str, Any], model_type: str) -> bool:
    """Whether several of torchtune's tensors of a layer are stored as one."""
    return hf_names.is_fused(config["model_type"]) if model_type == "HF" else LAYOUTS[model_type].merges


def converter_arguments(config: dict[str, Any], model_type: str) -> dict[str, Any]:
    """What a layout's converters take."""
    made = config_of(config, model_type)
    heads = dict(zip(("num_heads", "num_kv_heads", "head_dim"), heads_of(made), strict=True))
    of_family = {"family": config["model_type"], "experts": getattr(made, "num_experts", 0)}
    return heads | {"dim": made.hidden_size} | (of_family if model_type == "HF" else {})
