"""Norms, rotary embeddings and gated activations with one kernel each, for the time of generation on a GPU.

With a cache, rotary embeddings of queries and keys and what is written to the cache are one kernel together, which the
attention finds as ``into_cache`` of its rotary module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from spin.model.modules import Rope
from spin.model.torchtune import (
    FeedForward,
    GemmaRMSNorm,
    Llama3ScaledRoPE,
    Phi3RotaryPositionalEmbeddings,
    Qwen2RotaryPositionalEmbeddings,
    RMSNorm,
    RotaryPositionalEmbeddings,
)

_ROTARY: dict[type, dict[str, bool]] = {
    RotaryPositionalEmbeddings: {"interleaved": True},
    Llama3ScaledRoPE: {"interleaved": True},
    Qwen2RotaryPositionalEmbeddings: {"interleaved": False, "rounded": True},
    Phi3RotaryPositionalEmbeddings: {"interleaved": False},
}
_NORMS: dict[type, float] = {RMSNorm: 0.0, GemmaRMSNorm: 1.0}  # what is added to the weight


@contextmanager
def fused(model: nn.Module, kernels: ModuleType) -> Iterator[None]:
    """Runs the small modules of a torchtune decoder as one kernel each; others, and subclasses, are left alone.

    Forwards are for ``torch.no_grad()``."""
    replaced = []
    for module in model.modules():
        forward = _forward_of(module, kernels)
        if forward is not None and "forward" not in vars(module):
            module.forward = forward
            replaced.append(module)
            if (rotary := _rotary(module)) is not None:
                module.into_cache = partial(kernels.rotate_into_cache, **rotary)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in replaced:
            del module.forward
            vars(module).pop("into_cache", None)


def _forward_of(module: Any, kernels: Any) -> Callable[..., torch.Tensor] | None:
    kind = type(module)
    if kind in _NORMS:
        return lambda x: kernels.rms_norm(x, module.scale, module.eps, _NORMS[kind])
    if (rotary := _rotary(module)) is not None:
        return partial(kernels.rotate, **rotary)
    if kind is FeedForward and module.w3 is not None:
        gelu = type(module.activation) is nn.GELU and module.activation.approximate == "tanh"
        if gelu or type(module.activation) is nn.SiLU:
            return lambda x: module.w2(kernels.gate(module.w1(x), module.w3(x), gelu=gelu))
    return None


def _rotary(module: Any) -> dict[str, Any] | None:
    """The table of a rotary module and how it pairs dimensions; None for another one."""
    kind = type(module)
    if kind is Rope:
        return {"table": module.cache, "interleaved": module.interleaved}
    return {"table": module.cache, **_ROTARY[kind]} if kind in _ROTARY else None
