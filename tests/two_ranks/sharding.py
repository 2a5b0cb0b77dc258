"""Two ranks: gradients are those of one process, `unsharded` needs no partner, collectives agree."""

import pytest
import torch
from tiny import backward, build, gradients, sharded, tokens, use_own_head
from torch.distributed.tensor import DTensor

from spin.core.errors import CheckpointError
from spin.core.ranks import (
    World,
    all_reduce_sums,
    any_rank,
    barrier,
    broadcast_object,
    gather_objects,
    init_world,
    raise_on_all_ranks,
    shutdown,
)
from spin.model.build import checkpoint_activations
from spin.model.fingerprint import weights_fingerprint
from spin.model.sharding import shard_model, unsharded

world = init_world("cpu")
assert (world.world_size, world.mesh.mesh_dim_names) == (2, ("shard",))

# Gradients of a plain model, computed by each rank alone.
alone = build()
use_own_head(alone)
backward(alone, World(0, 1, 0, world.device, world.mesh), step=0)
expected = gradients(alone)
for checkpointing in (False, True):
    model = build()
    if checkpointing:
        checkpoint_activations(model)
    shard_model(model, world, compute_dtype=torch.float32)
    seen = use_own_head(model)
    backward(model, world, step=0)
    found = gradients(model)
    assert seen[0] is torch.nn.Parameter, seen  # not a DTensor: the head sees the gathered weight
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)

    # Different numbers of forwards on the ranks: any collective inside would hang or mix up layers.
    with torch.no_grad(), unsharded(model):
        for _ in range(1 + 4 * world.rank):
            model(tokens(1, world.rank))
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    backward(model, world, step=0)
    again = gradients(model)
    assert all(torch.equal(again[name], found[name]) for name in found)

# bfloat16 compute, float32 shards and gradients.
model = sharded(world, torch.bfloat16)
backward(model, world, step=0)
for name, gradient in gradients(model).items():
    torch.testing.assert_close(gradient, expected[name], rtol=0.1, atol=0.02, msg=name)

# Replicas: the same gradients and fingerprint on a 2-D mesh.
replicated = init_world("cpu", replicas=2)
assert replicated.mesh.mesh_dim_names == ("replicate", "shard")
model = sharded(replicated)
assert weights_fingerprint(model) == weights_fingerprint(build())
backward(model, replicated, step=0)
for name, gradient in gradients(model).items():
    torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)

one_sided = {"b": 1.0, "a": 2.0} if world.is_main else {"a": 3.0, "b": 10.0}
assert all_reduce_sums(one_sided, world)["b"] == 11.0
assert any_rank(world.rank == 1, world) and not any_rank(False, world)
assert gather_objects(world.rank, world) == [0, 1] and broadcast_object(world.rank, world) == 0
with pytest.raises(CheckpointError, match="^rank 1: no space left$"), raise_on_all_ranks(world, CheckpointError):
    if world.rank == 1:
        raise OSError("no space left")

fingerprint = weights_fingerprint(sharded(world))
assert gather_objects(fingerprint, world) == [fingerprint] * 2
with_buffer, plain = sharded(world), build()
for each in (with_buffer, plain):
    each.register_buffer("scale", torch.arange(5.0))  # not sharded, and counted once
assert weights_fingerprint(with_buffer) == weights_fingerprint(plain)
if world.is_main:
    print("fingerprint", fingerprint)
barrier(world)
shutdown()
