"""Loss, gradients, their norm and an AdamW step are those of one rank, however gradients are accumulated.

Four ranks, as four shards and as two replicas of two shards (HSDP). Argument: folder for a checkpoint.
"""

import sys

import torch
from tiny import backward, build, gradients, optimizer_digest, rows_reduced, sharded

from spin.checkpoint import SPINCheckpointer
from spin.core.ranks import World, all_reduce_sums, init_world, shutdown
from spin.model.fingerprint import weights_fingerprint
from spin.model.sharding import clip_grad_norm

worlds = [init_world("cpu", replicas=replicas) for replicas in (1, 2)]
rows = 3 * worlds[0].world_size
max_norm = 0.5


def step(model, world, unsharded_gradients=False):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss = backward(model, world, step=0, rows=rows, unsharded_gradients=unsharded_gradients)
    norm = clip_grad_norm(model, max_norm)
    optimizer.step()
    return optimizer, loss, norm, gradients(model)


alone = build()  # each rank computes all rows by itself
_, expected_loss, expected_norm, expected = step(alone, World(0, 1, 0, worlds[0].device, worlds[0].mesh))
assert expected_norm > max_norm
weights = dict(alone.named_parameters())

for world in worlds:
    for reshard_after_forward in (True, False):
        for unsharded_gradients in (False, True):
            model = sharded(world, reshard_after_forward=reshard_after_forward)
            optimizer, loss, norm, found = step(model, world, unsharded_gradients)
            assert abs(all_reduce_sums({"loss": loss}, world)["loss"] / expected_loss - 1) < 1e-6
            torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(parameter.full_tensor(), weights[name], rtol=1e-6, atol=1e-5, msg=name)

    # bfloat16 compute: rows are added up in float32, so the ways differ by its rounding only.
    ways = []
    for unsharded_gradients in (False, True):
        half = sharded(world, torch.bfloat16, reshard_after_forward=not unsharded_gradients)
        backward(half, world, step=0, rows=rows, unsharded_gradients=unsharded_gradients)
        ways.append(gradients(half))
    for name, gradient in ways[0].items():
        torch.testing.assert_close(ways[1][name], gradient, rtol=1e-6, atol=1e-8, msg=name)

assert rows_reduced(sharded(worlds[0])) == [True, True, True]
assert rows_reduced(sharded(worlds[1])) == [False, False, True]  # between replicas once per step

state = {"weights": weights_fingerprint(model), "optimizer": optimizer_digest(model, optimizer)}
checkpointer = SPINCheckpointer("unused", sys.argv[1], "LLAMA3_2")
checkpointer.save(step=1, model=model, optimizer=optimizer, state=state, world=world)
checkpointer.close()
shutdown()
