"""Ranks that wait for each other for ever. Prints `ready` when all do; argument: seconds of silence to endure."""

import os
import sys
import time

import torch.distributed as dist

from spin.core.heartbeat import set_stage
from spin.core.ranks import any_rank, barrier, init_world

world = init_world("cpu", timeout_seconds=float(sys.argv[1]))
set_stage(f"dance of rank {world.rank}")
started = time.monotonic()
while not any_rank(time.monotonic() - started > 3, world):  # several heartbeats
    barrier(world)
print(f"ready {world.rank} {os.getpid()}", flush=True)
while True:
    dist.barrier(group=world.group)
