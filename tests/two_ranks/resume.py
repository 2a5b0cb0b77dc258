"""Two ranks: exact resume, and states that cross between one rank and two. Argument: the test's folder.

The folder holds ``one/`` with a state saved by one rank. This saves ``two/`` for one rank to read.
"""

import json
import sys
from pathlib import Path

import torch
from tiny import optimizer_digest, sharded, train

from spin.checkpoint import SPINCheckpointer
from spin.core.ranks import init_world, shutdown
from spin.model.fingerprint import weights_fingerprint

folder = Path(sys.argv[1])
world = init_world("cpu")


def fresh():
    model = sharded(world)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


one = SPINCheckpointer("unused", str(folder / "one"), "LLAMA3_2")
model, optimizer = fresh()
path = one.latest("auto")
one.load(path, model=model, optimizer=optimizer, world=world)
state = one.read_state(path)
assert weights_fingerprint(model) == state["weights"]
assert optimizer_digest(model, optimizer) == state["optimizer"]

two = SPINCheckpointer("unused", str(folder / "two"), "LLAMA3_2")
train(model, optimizer, world, range(3, 5))
state = {"weights": weights_fingerprint(model), "optimizer": optimizer_digest(model, optimizer)}
path = two.save(step=5, model=model, optimizer=optimizer, state=state, world=world)
two.wait()
files = json.loads((path / "manifest.json").read_text())["files"]
assert set(files) == {".metadata", "state.json", "__0_0.distcp", "__1_0.distcp"}, files
train(model, optimizer, world, range(5, 8))
unbroken = weights_fingerprint(model), optimizer_digest(model, optimizer)
model, optimizer = fresh()
two.load(path, model=model, optimizer=optimizer, world=world)
train(model, optimizer, world, range(5, 8))
assert (weights_fingerprint(model), optimizer_digest(model, optimizer)) == unbroken
shutdown()
