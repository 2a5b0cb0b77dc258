"""A model of two linear layers whose head has one row: on two ranks one of them has no part of it."""

from __future__ import annotations

import torch
from torch import nn

from spin.core.ranks import World
from spin.model.sharding import shard_model

WIDTH, ROWS = 256, 33


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, ROWS)])
        self.output = nn.Linear(ROWS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.layers[0](x)))


def small(world: World, dtype: torch.dtype) -> Small:
    """Sharded, with the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small().to(dtype)
    shard_model(model, world, compute_dtype=dtype)
    return model


def train(model: Small, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps on a batch that is the same on every rank, so that gradients do not depend on the number of ranks."""
    for step in steps:
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
        x = x.to(next(model.parameters()).dtype)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
