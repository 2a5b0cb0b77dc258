"""Two ranks: optimizers resume from one rank's states, and save theirs. Argument: the test's folder.

The folder holds ``one/<name>`` with states of one rank after 2 steps. This saves ``two/<name>`` after 4.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh

from spin.checkpoint import SPINCheckpointer
from spin.core.ranks import gather_objects, init_world, shutdown
from spin.model.fingerprint import weights_fingerprint
from spin.training.optim import AdamW8bit, AdamWStochasticRounding
from tests.two_ranks.small import small, train
from tests.two_ranks.tiny import optimizer_digest

OPTIMIZERS = {
    "AdamW8bit": (lambda p: AdamW8bit(p, lr=1e-2), torch.float32),
    "AdamWStochasticRounding": (lambda p: AdamWStochasticRounding(p, lr=1e-2), torch.bfloat16),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=1e-2), torch.float32),
    "fused AdamW": (lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True), torch.float32),
    "SGD": (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), torch.float32),
}


def digests(model, optimizer):
    return {"weights": weights_fingerprint(model), "optimizer": optimizer_digest(model, optimizer)}


def main(folder: Path) -> None:
    world = init_world("cpu")
    for name, (make, dtype) in OPTIMIZERS.items():
        one = SPINCheckpointer("unused", str(folder / "one" / name), "LLAMA3_2")
        path = one.latest("auto")
        model = small(world, dtype)
        optimizer = make(model.parameters())
        one.load(path, model=model, optimizer=optimizer, world=world)
        assert digests(model, optimizer) == one.read_state(path), name

        two = SPINCheckpointer("unused", str(folder / "two" / name), "LLAMA3_2")
        train(model, optimizer, range(2, 4))
        state = digests(model, optimizer)
        path = two.save(step=4, model=model, optimizer=optimizer, state=state, world=world)
        train(model, optimizer, range(4, 6))
        unbroken = digests(model, optimizer)
        two.wait()
        model = small(world, dtype)
        optimizer = make(model.parameters())
        two.load(path, model=model, optimizer=optimizer, world=world)
        train(model, optimizer, range(4, 6))
        assert digests(model, optimizer) == unbroken != state, name

    # Replicas round alike, though each has its own generator.
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(world.rank)
    model = small(dataclasses.replace(world, mesh=mesh), torch.bfloat16)
    train(model, AdamWStochasticRounding(model.parameters(), lr=1e-2), range(2))
    locals_ = [parameter.to_local().tolist() for parameter in model.parameters()]
    first, second = gather_objects(locals_, world)
    assert first == second
    shutdown()


if __name__ == "__main__":
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all the rest
        main(Path(sys.argv[1]))
