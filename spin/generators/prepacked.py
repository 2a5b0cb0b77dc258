"""Linear layers whose weights are packed once for all products of a generation on a CPU.

Products of a few dozen rows, such as a decode step's, are bound by how fast they read the weights, and oneDNN's kernels
read blocks: packed once, every step saves the reordering. The packed weights take the memory that training's gradients
take. Sums are rounded in another order than ``F.linear`` rounds them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from spin.model.torchtune import TiedLinear

_ops: Any = torch.ops.mkldnn


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Runs the plain and tied linear layers of a torchtune decoder on packed weights; others are left alone.

    Weights must stay as they are; forwards are for ``torch.no_grad()``.
    """
    products: list[tuple[nn.Module, torch.Tensor, torch.Tensor | None]] = [
        (module, module.weight, module.bias) for module in model.modules() if type(module) is nn.Linear
    ]
    output = getattr(model, "output", None)
    if isinstance(output, TiedLinear):  # no module of the model: its product is one of its own
        products.append((output.linear, output.tied_module.weight, None))
    replaced = [module for module, weight, _ in products if _is_packable(weight) and "forward" not in vars(module)]
    for module, weight, bias in products:
        if module in replaced:
            module.forward = partial(_product, _ops._reorder_linear_weight(weight.detach(), None), bias)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _is_packable(weight: torch.Tensor) -> bool:
    if not torch.backends.mkldnn.is_available() or type(weight) not in (torch.Tensor, nn.Parameter):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _ops._is_mkldnn_bf16_supported())


def _product(packed: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return _ops._linear_pointwise(x, packed, bias, "none", [], "")
