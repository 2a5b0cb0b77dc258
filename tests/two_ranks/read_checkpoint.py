"""Any number of ranks reads the newest state of a folder. Argument: the output folder."""

import sys

import torch
from tiny import optimizer_digest, sharded

from spin.checkpoint import SPINCheckpointer
from spin.core.ranks import init_world, shutdown
from spin.model.fingerprint import weights_fingerprint

world = init_world("cpu")
model = sharded(world)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
checkpointer = SPINCheckpointer("unused", sys.argv[1], "LLAMA3_2")
path = checkpointer.latest()
checkpointer.load(path, model=model, optimizer=optimizer, world=world)
found = {"weights": weights_fingerprint(model), "optimizer": optimizer_digest(model, optimizer)}
assert found == checkpointer.read_state(path)
shutdown()
