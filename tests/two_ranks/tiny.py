"""The model, the batches and the training step that the two-rank scripts and their one-rank tests share."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules import TransformerDecoder

from spin.core.files import json_fingerprint
from spin.core.ranks import World
from spin.model.sharding import accumulating, clean_name, shard_model

VOCAB_SIZE = 97  # neither this nor most other sizes can be halved: shards are uneven


def build() -> TransformerDecoder:
    """A 2-layer Llama with tied embeddings and the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = llama3_2(
            vocab_size=VOCAB_SIZE,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=32,
            intermediate_dim=51,
            max_seq_len=64,
            rope_base=10_000,
            norm_eps=1e-5,
            scale_factor=1,
            tie_word_embeddings=True,
        )
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def tokens(step: int, row: int) -> torch.Tensor:
    """Row ``row`` of the batch of ``step``, shape (1, 9)."""
    return torch.randint(VOCAB_SIZE, (1, 9), generator=torch.Generator().manual_seed(100 * step + row))


def use_own_head(model: TransformerDecoder) -> list[type]:
    """Replaces the output projection, as the recipe does; returns the types of the weights that it meets."""
    seen: list[type] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        weight = model.tok_embeddings.weight
        seen.append(type(weight))
        return F.linear(model.norm(hidden), weight).float()

    model.unembed = head
    return seen


def backward(model: nn.Module, world: World, step: int, rows: int = 2, unsharded_gradients: bool = False) -> float:
    """Gradient of the mean loss of the step's rows, dealt out to the ranks; returns this rank's part of the loss."""
    total = 0.0
    mine = range(world.rank, rows, world.world_size)
    with accumulating(model, mine, unsharded_gradients=unsharded_gradients) as each_row:
        for row in each_row:
            ids = tokens(step, row)
            losses = F.cross_entropy(model(ids)[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
            # FSDP averages over ranks, so the sum over ranks needs the factor world_size.
            (losses * world.world_size / rows).backward()
            total += losses.item() / rows
    return total


def rows_reduced(model: TransformerDecoder, **how: bool) -> list[bool]:
    """Whether a layer's shards have a gradient after each of three rows."""
    reduced = []
    with accumulating(model, [0, 1, 2], **how) as each_row:
        for row in each_row:
            model(tokens(0, row)).sum().backward()
            reduced.append(model.layers[1].mlp.w1.weight.grad is not None)
    return reduced


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients by name. Collective."""
    whole = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        whole[clean_name(name)] = gradient.clone()
    model.zero_grad(set_to_none=True)
    return whole


def sharded(
    world: World, compute_dtype: torch.dtype = torch.float32, reshard_after_forward: bool = True
) -> TransformerDecoder:
    """:func:`build`, sharded."""
    model = build()
    shard_model(model, world, compute_dtype=compute_dtype, reshard_after_forward=reshard_after_forward)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, world: World, steps: range) -> None:
    """Optimizer steps on the batches of ``steps``."""
    for step in steps:
        backward(model, world, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def optimizer_digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Hash of an optimizer's whole tensors and hyperparameters. Collective."""
    state = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[f"{clean_name(name)}.{key}"] = whole.double().flatten().tolist()
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return json_fingerprint([state, options])
