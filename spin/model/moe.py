"""Sparse MLPs: a router sends each token to a few of many experts.

With a grouped product (bf16 on Hopper and data-centre Blackwell) nothing here waits for the GPU. Elsewhere a loop over
the experts with tokens does, and a step of generation, which is recorded, computes all experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class MoE(nn.Module):
    """A mixture of gated MLPs without a shared expert, an expert's capacity, or a loss for balance.

    The experts' matrices lie one below the other, so that FSDP2 shards rows and a rank reads its own ones.

    Args:
        width (int): of the tokens.
        hidden (int): of an expert.
        experts (int): how many there are.
        top_k (int): how many of them a token goes to.
        normalized (bool): the probabilities of those are divided by their sum.
        activation (nn.Module): of the gate.

    Source:
        Qwen3 (arXiv 2505.09388), section 2; computed as ``Qwen3MoeSparseMoeBlock`` of transformers 5.23.
    """

    def __init__(
        self, width: int, hidden: int, experts: int, top_k: int, normalized: bool, activation: nn.Module
    ) -> None:
        super().__init__()
        self.experts, self.top_k, self.normalized, self.activation = experts, top_k, normalized, activation
        self.router = nn.Parameter(torch.empty(experts, width))  # no nn.Linear, which float8 would convert
        self.gate_up = nn.Parameter(torch.empty(experts * 2 * hidden, width))  # of each expert the gate, then up
        self.down = nn.Parameter(torch.empty(experts * width, hidden))
        for weight in (self.router, self.gate_up, self.down):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)

    @property
    def hidden(self) -> int:
        """Width of an expert."""
        return self.down.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of each token's experts by their probabilities, of the shape of x, (b, s, d)."""
        tokens = x.flatten(0, 1)  # (n, d)
        shares, chosen = self._route(tokens)  # (n, k)
        if x.shape[1] == 1 and x.is_cuda and not torch.is_grad_enabled() and not _has_kernel(tokens, self.hidden):
            return self._all_experts(tokens, shares, chosen).view_as(x)
        ordered, order = chosen.flatten().sort(stable=True)  # (n k,)
        ends = torch.searchsorted(ordered, torch.arange(self.experts, device=x.device), right=True, out_int32=True)
        places = order.argsort()
        rows = _Take.apply(tokens, order // self.top_k, places, self.top_k)  # (n k, d), expert by expert
        gate, up = _products(rows, self.gate_up, ends, False).chunk(2, -1)
        out = _products(self.activation(gate) * up, self.down, ends, False)
        out = _Take.apply(out, places, order, 1).unflatten(0, shares.shape)  # (n, k, d)
        return (out * shares[..., None]).sum(1).view_as(x)

    def _route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The probabilities and numbers of each token's experts, (n, k)."""
        probabilities = F.linear(tokens, self.router).softmax(-1, dtype=torch.float32)
        # Stable: logits in bf16 are often equal, and which expert is taken must not depend on the other tokens.
        shares, chosen = (each[:, : self.top_k] for each in probabilities.sort(dim=-1, descending=True, stable=True))
        if self.normalized:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares.to(tokens.dtype), chosen

    def _all_experts(self, tokens: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """A step of generation where there is no grouped product: reads all experts, which is what takes its time."""
        gate_up, down = (weight.unflatten(0, (self.experts, -1)).mT for weight in (self.gate_up, self.down))
        gate, up = torch.matmul(tokens, gate_up).chunk(2, -1)  # (E, n, hidden)
        weights = torch.zeros_like(tokens[:, :1]).repeat(1, self.experts).scatter(1, chosen, shares)  # (n, E)
        used = torch.zeros_like(weights, dtype=torch.bool).scatter(1, chosen, True)
        hidden = (self.activation(gate) * up).masked_fill(~used.T[..., None], 0)  # what may overflow is not added
        return torch.einsum("ne,end->nd", weights, hidden @ down)


def idle_parameters(model: nn.Module) -> int:
    """The parameters of the experts that a token does not go to: it is multiplied with all others."""
    return sum(
        3 * module.hidden * module.router.shape[1] * (module.experts - module.top_k)
        for module in model.modules()
        if isinstance(module, MoE)
    )


class _Take(torch.autograd.Function):
    """Rows of x, ``copies`` of each; its gradient is gathered as well, so that sums have one order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, places: torch.Tensor, copies: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.copies = copies
        return x[rows]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return grad[places].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


# ---- Products by expert; one operation to compilers, which cannot see a loop over numbers of rows


def _has_kernel(x: torch.Tensor, width: int) -> bool:
    """Whether rows of x can be multiplied into rows of a width, by torch's grouped product and without a wait."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
        and x.shape[1] % 8 == width % 8 == 0  # rows start at multiples of 16 bytes
    )


def _used(ends: torch.Tensor) -> list[tuple[int, slice]]:
    """Experts with tokens, and their rows; on a GPU the host waits here."""
    bounds = [0, *ends.tolist()]
    slices = [slice(*bounds[expert : expert + 2]) for expert in range(len(ends))]
    return [(expert, rows) for expert, rows in enumerate(slices) if rows.start < rows.stop]


@torch.library.custom_op("spin::expert_products", mutates_args=())
def _products(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Rows of x, (n, in), times the matrix of their expert in (E * out, in): (n, out). Transposed, (n, out) gives
    (n, in). ``ends``, int32, (E,), counts the rows up to the end of each expert's."""
    matrices = weight.unflatten(0, (len(ends), -1))  # (E, out, in)
    matrices = matrices if transposed else matrices.mT
    if _has_kernel(x, matrices.shape[2]):
        return F.grouped_mm(x.contiguous(), matrices, offs=ends)
    out = x.new_empty(len(x), matrices.shape[2])
    for expert, rows in _used(ends):
        torch.mm(x[rows], matrices[expert], out=out[rows])
    return out


@_products.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, transposed: bool) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[1] if transposed else weight.shape[0] // ends.shape[0])


@torch.library.custom_op("spin::expert_gradients", mutates_args=())
def _gradients(grad: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Of the experts' matrices, (E * out, in), from those of the products, (n, out), and x, (n, in)."""
    if _has_kernel(x, grad.shape[1]):
        out = F.grouped_mm(grad.contiguous().mT, x.contiguous(), offs=ends)  # (E, out, in)
        if torch.cuda.get_device_capability(x.device)[0] != 9:  # leaves those of experts without a token as they were
            out.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
        return out.flatten(0, 1)
    out = x.new_zeros(len(ends), grad.shape[1], x.shape[1])
    for expert, rows in _used(ends):
        torch.mm(grad[rows].mT, x[rows], out=out[expert])
    return out.flatten(0, 1)


@_gradients.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(ends.shape[0] * grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ends, _ = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight, ends)


def _products_backward(ctx: Any, grad: torch.Tensor) -> Any:
    x, weight, ends = ctx.saved_tensors
    of_x = _products(grad, weight, ends, True) if ctx.needs_input_grad[0] else None
    return of_x, None if x is None else _gradients(grad, x, ends), None, None


_products.register_autograd(_products_backward, setup_context=_keep)
