"""Loads a folder into a sharded model in fp32 and exports it in bf16. Arguments: source folder, output folder.

Each rank prints the bytes of its shards and, for either stage, the rise of its resident memory at the stage's peak. The
kernel's mark of that peak is set back before; it counts pages of a mapped file as well as the process's own. Large
blocks go back to the kernel here when they are freed: of those that a run keeps, fragments came to 80 MiB or to none.
"""

import ctypes
import re
import sys
from pathlib import Path

import torch

from spin.core.ranks import barrier, init_world, shutdown
from spin.model.build import build_model, prepare_model
from spin.model.hf import export_hf, load_hf_weights
from spin.model.sharding import local_tensor

source, out = Path(sys.argv[1]), Path(sys.argv[2])
STATUS = Path("/proc/self/status")


def kib(key: str) -> int:
    """A number of the kernel's about this process."""
    return int(re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE).group(1))


world = init_world("cpu")
M_MMAP_THRESHOLD, M_MMAP_MAX = -3, -4  # malloc.h
assert ctypes.CDLL(None).mallopt(M_MMAP_MAX, 2**16) and ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
model = build_model({"_component_": "spin.model.from_hf", "path": str(source)}, torch.float32)
prepare_model(model, world, compute_dtype=torch.float32)
shards = [local_tensor(parameter.detach()) for parameter in model.parameters()]
for shard in shards:
    shard.zero_()  # its pages are there from now on
rises = []
for stage in (
    lambda: load_hf_weights(model, source, None, world=world),
    lambda: export_hf(model, source, out, None, dtype=torch.bfloat16, world=world),
):
    barrier(world)
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    stage()
    rises.append((kib("VmHWM") - before) * 1024)
print(f"\nrank {world.rank}: {sum(shard.nbytes for shard in shards)} {rises[0]} {rises[1]}\n", flush=True)
barrier(world)
shutdown()
