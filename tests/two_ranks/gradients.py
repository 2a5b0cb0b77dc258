"""Prints what is measured of the gradients of eight rows with two pairs each, one on each of two ranks."""

import json
from functools import partial

import torch
from torch import nn

from spin.config import SPINConfig
from spin.core.ranks import World, init_world, shutdown
from spin.data import Pair, Response
from spin.loss import SPINLoss
from spin.model.attention import patch_attention
from spin.model.sharding import shard_model
from spin.pairs import PackedRow, RowBatch
from spin.pairs.packing import pack_row
from spin.training import compare_gradients
from tests.two_ranks.tiny import VOCAB_SIZE, build

CONFIG = SPINConfig.model_construct(fsdp_accumulate_unsharded=True, logprob_chunk_tokens=64, global_batch_size=16)


def pairs() -> list[Pair]:
    """Sixteen, whose references are not the model's log-probs; every other real response begins alike."""
    draw = partial(torch.randint, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    texts = [[draw((length,)).tolist() for length in (3, 6, 4)] for _ in range(16)]
    return [
        Pair(str(i), 0, prompt, [5, 6, 7, *real], [Response(generated, "stop", -20.0 - i)], -60.0)
        for i, (prompt, real, generated) in enumerate(texts)
    ]


def row_loss(row: PackedRow, logps: torch.Tensor) -> torch.Tensor:
    """SPIN's."""
    real, generated, opponent = row.real, row.generated, row.reference_logps
    losses, _, _ = SPINLoss(beta=0.3)(logps[real], logps[generated], opponent[real], opponent[generated])
    return (losses * row.weights).sum()


def rows_of(world: World) -> list[PackedRow]:
    """This rank's."""
    each = 2 // world.world_size
    return [pack_row(pairs()[2 * i + each * world.rank :][:each]) for i in range(8)]


def model_of(world: World) -> nn.Module:
    """The shared tiny model, for packed rows."""
    model = build()
    patch_attention(model)
    shard_model(model, world, compute_dtype=torch.float32)
    return model


def compared(model: nn.Module, world: World) -> dict[str, float]:
    """What is measured."""
    return compare_gradients(model, [RowBatch([], rows_of(world), 16.0)], row_loss, world, CONFIG)


if __name__ == "__main__":
    world = init_world("cpu")
    found = compared(model_of(world), world)
    if world.is_main:
        print("found", json.dumps(found))
    shutdown()
