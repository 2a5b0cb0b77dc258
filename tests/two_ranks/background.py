"""Two ranks: a background write that fails on one is raised on both by the next call. Argument: the output folder."""

import sys

import pytest
import torch
from tiny import sharded, train

import spin.checkpoint.checkpointer
from spin.checkpoint import SPINCheckpointer
from spin.core.errors import CheckpointError
from spin.core.ranks import barrier, init_world, shutdown

world = init_world("cpu")
model = sharded(world)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
checkpointer = SPINCheckpointer("unused", sys.argv[1], "LLAMA3_2")


def save(step):
    checkpointer.save(step=step, model=model, optimizer=optimizer, state={}, world=world)


train(model, optimizer, world, range(1))
save(1)
train(model, optimizer, world, range(1, 3))  # collectives of both threads at a time
checkpointer.wait()
original = spin.checkpoint.checkpointer.file_sha256
if world.rank == 1:

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    spin.checkpoint.checkpointer.file_sha256 = fail
save(2)
train(model, optimizer, world, range(3, 4))
with pytest.raises(CheckpointError, match="(?s)rank 1: .*No space left"):
    save(3)
barrier(world)
assert [entry.name for entry in checkpointer.checkpoints_dir.iterdir()] == ["step_00000001"]
spin.checkpoint.checkpointer.file_sha256 = original
barrier(world)
save(4)
checkpointer.close()
barrier(world)
assert sorted(entry.name for entry in checkpointer.checkpoints_dir.iterdir()) == ["step_00000001", "step_00000004"]
shutdown()
