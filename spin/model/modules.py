"""Modules of decoders that torchtune does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spin.model.torchtune import GemmaRMSNorm, RMSNorm, TransformerSelfAttentionLayer


class Rope(nn.Module):
    """Rotary position embedding by a table of inverse frequencies.

    Args:
        frequencies (Callable[[], tuple[torch.Tensor, float]]): computes inverse frequencies on the CPU, float32, shape
            (rotated dimensions / 2,), and what cosine and sine are multiplied by.
        max_seq_len (int): positions of the table.
        interleaved (bool): pairs are dimensions 2 i and 2 i + 1; else i and i + half of the rotated ones, as most
            models in Hugging Face's layout have it.
    """

    cache: torch.Tensor  # float32, (positions, rotated dimensions / 2, 2): cosine and sine

    def __init__(
        self, frequencies: Callable[[], tuple[torch.Tensor, float]], max_seq_len: int, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.frequencies, self.max_seq_len, self.interleaved = frequencies, max_seq_len, interleaved
        self.rope_init()

    def rope_init(self) -> None:
        """Computes the table, on the device of the surrounding ``with torch.device(...)``."""
        with torch.device("cpu"):
            theta, factor = self.frequencies()
        device = torch.empty(0).device
        angles = torch.arange(self.max_seq_len).to(device)[:, None].float() * theta.to(device)  # (positions, pairs)
        self.register_buffer("cache", torch.stack([angles.cos(), angles.sin()], -1) * factor, persistent=False)

    def forward(self, x: torch.Tensor, *, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Rotates queries or keys, (b, s, h, hd), by their positions, (b, s); None counts from 0."""
        table = self.cache[: x.shape[1]][None] if input_pos is None else self.cache[input_pos]
        cos, sin = table[:, :, None].unbind(-1)  # (b, s, 1, pairs)
        pairs = cos.shape[-1]
        rotated, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
        if self.interleaved:
            a, b = rotated.unflatten(-1, (pairs, 2)).unbind(-1)
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        else:
            a, b = rotated.chunk(2, -1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        return torch.cat([turned.type_as(x), rest], -1) if rest.shape[-1] else turned.type_as(x)


class ParallelLayer(TransformerSelfAttentionLayer):
    """A layer whose attention and MLP read the same norm and are added together."""

    def forward(
        self, x: torch.Tensor, *, mask: Any = None, input_pos: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """As torchtune's layer: x is (b, s, d)."""
        h = self.sa_norm(x)
        out: torch.Tensor = x + self.attn(h, h, mask=mask, input_pos=input_pos) + self.mlp(h)
        return out


def scale_output(module: nn.Module, factor: float, rounded: bool = False) -> None:
    """Multiplies what a module returns, by a factor that is rounded to the dtype of the output if asked."""
    if factor == 1.0:
        return

    def scaled(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (torch.tensor(factor, dtype=output.dtype).item() if rounded else factor)

    module.output_factor = factor  # type: ignore[assignment]
    module.register_forward_hook(scaled)


def clamp_output(module: nn.Module, limit: float | None) -> None:
    """Clamps what a module returns to plus and minus a limit."""
    if limit is not None:
        module.output_limit = limit  # type: ignore[assignment]
        module.register_forward_hook(lambda module, inputs, output: output.clamp(-limit, limit))


class Scaled(nn.Module):
    """Multiplies its input by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product, of the shape of x."""
        return x * self.factor


class PlainLayerNorm(nn.LayerNorm):
    """LayerNorm with a weight and no bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps, bias=False)


class HeadNorms(nn.Module):
    """LayerNorm of each head, (..., heads, width), with weights of its own and no bias, in fp32."""

    def __init__(self, heads: int, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(heads, width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the shape of x."""
        return (F.layer_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight.float()).type_as(x)


class SeparateHeadNorms(HeadNorms):
    """The same, with a tensor for each head, as StableLM stores them."""

    def __init__(self, heads: int, width: int, eps: float) -> None:
        super().__init__(heads, width, eps)
        del self.weight
        self.norms = nn.ModuleList(PlainLayerNorm(width, eps) for _ in range(heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the shape of x."""
        return torch.stack([norm(head) for norm, head in zip(self.norms, x.unbind(-2), strict=True)], -2)


class ScalelessLayerNorm(nn.LayerNorm):
    """OLMo's LayerNorm, without parameters."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps, elementwise_affine=False)


class LayerNorm1P(nn.LayerNorm):
    """Nemotron's LayerNorm, which multiplies by 1 + weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm over the last dimension."""
        return F.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


# By the names in spin.model.families, which loads no torch. Made with a width and ``eps``, HEAD_NORMS with heads before
NORMS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (RMSNorm, GemmaRMSNorm, nn.LayerNorm, PlainLayerNorm, ScalelessLayerNorm, LayerNorm1P)
}
HEAD_NORMS = {kind.__name__: kind for kind in (HeadNorms, SeparateHeadNorms)}


class ReLU2(nn.Module):
    """``relu(x) ** 2``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return F.relu(x).square()


class XIELU(nn.Module):
    """Apertus' activation with two trained numbers, in fp32.

    Source:
        arXiv 2411.13010, equation 12; stored as transformers' ``XIELUActivation`` stores it, beta and eps included.
    """

    beta: torch.Tensor
    eps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.zeros(1))
        self.alpha_n = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        wide, beta = x.float(), 0.5
        positive = F.softplus(self.alpha_p.float()) * wide * wide
        negative = (torch.expm1(wide.clamp(max=-1e-6)) - wide) * (beta + F.softplus(self.alpha_n.float()))
        return (torch.where(wide > 0, positive, negative) + beta * wide).type_as(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "relu2": ReLU2,
    "xielu": XIELU,
}
