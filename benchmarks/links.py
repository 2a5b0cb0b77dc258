"""What the estimate takes from a host: all-gather and reduce-scatter between its GPUs, and copies to and from the CPU.

    torchrun --standalone --nproc_per_node 2 benchmarks/links.py --out benchmarks/results/h200x2_links.json

Rates are those that FSDP2's traffic is counted by: bytes that a rank receives, of sizes that one layer has, a second.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from spin.core.files import write_json
from spin.core.ranks import barrier, init_world, shutdown

LAYERS = {"8B": 218_112_000, "70B": 855_654_400}  # weights of one layer of Llama 3.1


def seconds_of(call: Callable[[], Any], rounds: int) -> float:
    """The median time of a call, after two that do not count."""
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", help="a JSON file")
    args = parser.parse_args()
    world = init_world("cuda")
    ranks, device = world.world_size, world.device
    results: dict[str, Any] = {
        "setup": {"device": torch.cuda.get_device_name(device), "devices": ranks, "torch": torch.__version__},
        "gb_per_second": {},
    }
    rates = results["gb_per_second"]
    for name, weights in LAYERS.items():
        shard = weights // ranks
        whole = torch.empty(shard * ranks, dtype=torch.bfloat16, device=device)
        part = torch.empty(shard, dtype=torch.bfloat16, device=device)
        barrier(world)
        gather = seconds_of(lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part), args.rounds)
        whole, part = whole.float(), part.float()
        barrier(world)
        reduce = seconds_of(lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole), args.rounds)
        received = shard * (ranks - 1)
        rates[f"all-gather, a layer of {name} in bf16"] = received * 2 / gather / 1e9
        rates[f"reduce-scatter, a layer of {name} in fp32"] = received * 4 / reduce / 1e9
        del whole, part
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    on_gpu = torch.empty(2**28, dtype=torch.uint8, device=device)
    barrier(world)  # all ranks copy at the same time
    for name, target, source in (("pinned CPU to GPU", on_gpu, host), ("GPU to pinned CPU", host, on_gpu)):
        copy = seconds_of(lambda t=target, s=source: t.copy_(s, non_blocking=True), args.rounds)
        rates[name] = host.nbytes / copy / 1e9
    if world.is_main:
        for name, rate in rates.items():
            print(f"{name:<40} {rate:7.1f} GB/s")
        if args.out:
            write_json(Path(args.out), results)
    shutdown()


if __name__ == "__main__":
    main()
