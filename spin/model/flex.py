"""FlexAttention over a packed row, and why a model cannot have it; :mod:`spin.pairs.row_mask` makes the masks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

MIN_HEAD_DIM = 16  # what they accept
# torch 2.11 to 2.13 choose tiles for heads of 64 dimensions on an H100 that spill: a forward over 16k tokens with 32
# query and 8 key heads took 1.2 ms, and takes 0.39 ms with these; a backward over 12k tokens within a training step
# took 1.03 ms, and takes 0.90 ms (the best of 22 choices). For heads of 128 dimensions theirs are as good.
_HOPPER_TILES = {
    "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 3,
    "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 4, "bwd_num_stages": 2,
}  # fmt: skip
_WELL_TILED = (128, 256)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    scale: float | None = None,
    softcap: float | None = None,
    hopper: bool = False,
) -> torch.Tensor:
    """Attention of a packed row: q (1, h, s, hd), k and v (1, n_kv, s, hd). A compiled layer takes it into its program.

    ``scale`` of ``q k`` is ``hd ** -0.5`` by default; ``softcap`` is ``c`` of ``c * tanh(scale * q k / c)``; ``hopper``
    chooses the kernel's tiles for an H100.
    """

    def capped(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, q_index: torch.Tensor, k_index: torch.Tensor
    ) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    # Without compilation FlexAttention would make all scores at once.
    alone = q.is_cuda and not torch.compiler.is_compiling()
    return (_compiled() if alone else flex_attention)(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=_HOPPER_TILES if hopper and q.shape[-1] not in _WELL_TILED else None,
    )


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Made where it is needed: what it imports takes half a second."""
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_unsupported_reason(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model cannot train with FlexAttention in ``dtype``, to complete "because ..."; None if it can."""
    if device.type != "cuda":
        return "FlexAttention has no backward on the CPU"
    if dtype == torch.float32:
        return "fp32 compute asks for exact products, which its kernels spend most of a GPU's shared memory on"
    for name, module in model.named_modules():
        if hasattr(module, "attn_dropout") and hasattr(module, "head_dim"):
            if module.attn_dropout > 0:
                return f"{name} has attn_dropout={module.attn_dropout} and FlexAttention has no dropout"
            if module.head_dim < MIN_HEAD_DIM:
                return f"{name} has heads of {module.head_dim} dimensions and FlexAttention needs {MIN_HEAD_DIM}"
    return None
