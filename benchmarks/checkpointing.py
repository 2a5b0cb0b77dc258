"""What a checkpoint costs the training loop: written in the background, written while training waits, or not at all.

    python benchmarks/checkpointing.py --model small --pairs 1 --device cpu   # some minutes on two CPU cores
    python benchmarks/checkpointing.py --out checkpointing.json               # one GPU, Llama 3.2 1B shapes
    torchrun --nproc_per_node 8 benchmarks/checkpointing.py --model llama3_1_8b

Weights and tokens are random, as in benchmarks/training_step.py, and the step is that benchmark's: forward, backward,
clipping and AdamW over a global batch. In each round the loop runs the same number of steps without saving, then with a
background save after every ``--every``-th step, then with synchronous ones. A save's cost is what its part of the round
took longer than the part without, over the saves, and counts everything: the copy, the slower steps meanwhile, and the
waits for writes that are not done; ``blocked_seconds`` is what the call alone took, which for a synchronous save is the
whole of it. ``spread_seconds`` is the interquartile range of that over the rounds: what is less
was not measured. ``share`` is the cost over the time of an interval of ``--interval-steps`` steps, by default an epoch
of 50,000 pairs in batches of 64, which is the configs' interval (save_interval: 1.0). At the end the checkpoint is
restored and the model exported for transformers, once each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from arms import ARMS
from training_step import Bench
from training_step import parse_args as training_arguments
from work import llama_config

from spin.checkpoint import SPINCheckpointer
from spin.core.files import write_json
from spin.core.ranks import barrier, shutdown
from spin.model.hf import export_hf

ARM = "compiled"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3_2_1b", help="a name of work.MODELS")
    parser.add_argument("--device", help="cuda or cpu")
    parser.add_argument("--pairs", type=int, help="of a step; default: the model's")
    parser.add_argument("--row-tokens", type=int, help="of a packed row; default: the model's")
    parser.add_argument("--optimizer", default="adamw", help="adamw or adamw8bit, whose state is smaller")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each part of a round")
    parser.add_argument("--every", type=int, default=4, help="steps from save to save, in the parts that save")
    parser.add_argument("--interval-steps", type=int, default=50_000 // 64, help="from save to save, for the fraction")
    parser.add_argument("--folder", help="where checkpoints are written; default: the system's folder for such files")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all rounds and gives the figures."""
    device = ["--device", args.device] if args.device else []
    size = ["--pairs", str(args.pairs)] if args.pairs else []
    size += ["--row-tokens", str(args.row_tokens)] if args.row_tokens else []
    options = ["--model", args.model, "--optimizer", args.optimizer, *device, *size]
    bench = Bench(training_arguments(options))
    world, model = bench.world, bench.model(ARMS[ARM].variant)
    pairs = bench.mixed_pairs("short")
    batch = bench.lay_out(ARMS[ARM], pairs)
    optimizer = bench.optimizer(ARMS[ARM])
    folder = Path(tempfile.mkdtemp(dir=args.folder)) if world.is_main else Path()
    folders = [str(folder)]
    torch.distributed.broadcast_object_list(folders)
    run, source = Path(folders[0]) / "run", Path(folders[0]) / "source"
    savers = {  # one folder: a disk has to hold two checkpoints, not three
        mode: SPINCheckpointer(str(source), str(run), "LLAMA3_2", keep_last=1, async_save=mode == "async")
        for mode in ("async", "sync")
    }

    def step() -> None:
        bench.optimizer_step(ARMS[ARM], batch, len(pairs), optimizer)

    blocked: dict[str, list[float]] = {mode: [] for mode in savers}

    def part(mode: str | None) -> None:
        for number in range(args.steps):
            step()
            if number % args.every == 0 and mode is not None:
                began = time.perf_counter()
                savers[mode].save(step=1, model=model, optimizer=optimizer, state={}, world=world)
                blocked[mode].append(time.perf_counter() - began)
        if mode is not None:
            savers[mode].wait()

    for mode in (None, "async", "sync"):  # memory of the copies, compiled layers, the optimizer's state
        part(mode)
    seconds: dict[str, list[float]] = {"none": [], "async": [], "sync": []}
    blocked = {mode: [] for mode in savers}
    for _ in range(args.rounds):
        for mode in (None, "async", "sync"):
            seconds[mode or "none"].append(bench.seconds(lambda mode=mode: part(mode)))  # type: ignore[misc]
    state_bytes = sum(file.stat().st_size for file in run.glob("checkpoints/step_*/*"))
    state = savers["sync"].latest()
    if state is None:
        raise SystemExit(f"{run} has no complete checkpoint although saving raised nothing.")
    optimizer.zero_grad(set_to_none=True)
    restore_seconds = bench.seconds(lambda: savers["sync"].load(state, model=model, optimizer=optimizer, world=world))
    if world.is_main:
        llama_config(model).save_pretrained(source)
    barrier(world)
    export_seconds = bench.seconds(
        lambda: export_hf(model, source, run / "hf_model", "LLAMA3_2", dtype=torch.bfloat16, world=world)
    )
    barrier(world)
    if world.is_main:
        shutil.rmtree(folders[0])
    saves = len(range(0, args.steps, args.every))
    step_seconds = statistics.median(seconds["none"]) / args.steps
    results: dict[str, Any] = {
        "setup": {
            "device": torch.cuda.get_device_name() if bench.on_gpu else "cpu",
            "ranks": world.world_size,
            "torch": torch.__version__,
            "model": args.model,
            "optimizer": args.optimizer,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "state_gb": state_bytes / 1e9,
            "pairs_per_step": len(pairs),
            "steps_per_part": args.steps,
            "rounds": args.rounds,
            "saves_per_part": saves,
            "interval_steps": args.interval_steps,
        },
        "step_seconds": step_seconds,
        "seconds_of_parts": seconds,
        "restore_seconds": restore_seconds,
        "export_seconds": export_seconds,
    }
    for mode, saver in savers.items():
        saver.close()
        # each round has its own part without a save: what changes slowly on a shared machine cancels out
        rounds = zip(seconds[mode], seconds["none"], strict=True)
        costs = [(with_saves - without) / saves for with_saves, without in rounds]
        cost = statistics.median(costs)
        quartiles = statistics.quantiles(costs, n=4) if len(costs) > 1 else [cost, cost, cost]
        results[mode] = {
            "blocked_seconds": statistics.median(blocked[mode]),
            "cost_seconds": cost,
            "spread_seconds": quartiles[2] - quartiles[0],
            "share": cost / (args.interval_steps * step_seconds + cost),
            "interval_steps_for_2_percent": cost / (0.02 / 0.98 * step_seconds),
        }
    results["async_over_sync"] = {
        name: results["async"][name] / results["sync"][name] for name in ("blocked_seconds", "cost_seconds")
    }
    return results


def main() -> None:
    """Measures, prints JSON, and writes it."""
    args = parse_args()
    results = measure(args)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(results, indent=2))
        if args.out:
            write_json(args.out, results)
    shutdown()


if __name__ == "__main__":
    main()
