"""Saves step 1, then dies in the middle of saving step 2. Arguments: output folder, module and function to die in."""

import importlib
import os
import sys

import torch
from tiny import sharded, train

from spin.checkpoint import SPINCheckpointer
from spin.core.ranks import init_world

output_dir, module, function = sys.argv[1:]
world = init_world("cpu")
model = sharded(world)
optimizer = torch.optim.AdamW(model.parameters())
checkpointer = SPINCheckpointer("unused", output_dir, "LLAMA3_2")
train(model, optimizer, world, range(1))
checkpointer.save(step=1, model=model, optimizer=optimizer, state={"step": 1}, world=world)
checkpointer.wait()
train(model, optimizer, world, range(1, 2))
setattr(importlib.import_module(module), function, lambda *args, **kwargs: os._exit(9))
checkpointer.save(step=2, model=model, optimizer=optimizer, state={"step": 2}, world=world)
checkpointer.wait()
