"""Norms, rotary embeddings and gated activations with one kernel each, for the time of generation on a GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.phi3._position_embeddings import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import FeedForward, RMSNorm, RotaryPositionalEmbeddings

_ROTARY: dict[type, dict[str, bool]] = {
    RotaryPositionalEmbeddings: {"interleaved": True},
    Llama3ScaledRoPE: {"interleaved": True},
    Qwen2RotaryPositionalEmbeddings: {"interleaved": False, "rounded": True},
    Phi3RotaryPositionalEmbeddings: {"interleaved": False},
}
_NORMS: dict[type, float] = {RMSNorm: 0.0, GemmaRMSNorm: 1.0}  # what is added to the weight


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Runs the small modules of a torchtune decoder as one kernel each; others, and subclasses, are left alone.

    Needs Triton and a GPU, see :func:`spin.attention.has_decode_kernel`; forwards are for ``torch.no_grad()``.

    Args:
        model (nn.Module): a torchtune decoder.

    Yields:
        None: the kernels are in place.
    """
    replaced = []
    for module in model.modules():
        forward = _forward_of(module)
        if forward is not None and "forward" not in vars(module):
            module.forward = forward
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _forward_of(module: Any) -> Callable[..., torch.Tensor] | None:
    kind = type(module)
    if kind in _NORMS:
        return partial(_norm, module, _NORMS[kind])
    if kind in _ROTARY:
        return partial(_rotary, module, _ROTARY[kind])
    if kind is FeedForward and module.w3 is not None:
        if type(module.activation) is nn.SiLU:
            return partial(_gated, module, False)
        if type(module.activation) is nn.GELU and module.activation.approximate == "tanh":
            return partial(_gated, module, True)
    return None


def _norm(module: Any, offset: float, x: torch.Tensor) -> torch.Tensor:
    from spin.generation_kernels import rms_norm

    return rms_norm(x, module.scale, module.eps, offset)


def _rotary(
    module: Any, style: dict[str, bool], x: torch.Tensor, *, input_pos: torch.Tensor | None = None
) -> torch.Tensor:
    from spin.generation_kernels import rotate

    return rotate(x, module.cache, input_pos, **style)


def _gated(module: Any, gelu: bool, x: torch.Tensor) -> torch.Tensor:
    from spin.generation_kernels import gate

    return module.w2(gate(module.w1(x), module.w3(x), gelu=gelu))
