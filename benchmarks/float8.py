"""float8 in the layers against bf16: how fast a training step is, what becomes of a real model's gradient and losses.

    python benchmarks/float8.py --what speed --out float8.json                         # one H100 or H200
    python benchmarks/float8.py --what gradients --pairs runs/quickstart/iteration_000/pairs --out float8.json
    python benchmarks/float8.py --what runs --out float8.json
    python benchmarks/float8.py --table float8.json                                    # the tables again

What is measured (--what):
    speed      forward and backward, and whole optimizer steps, of benchmarks/training_step.py's batches, arms by turns
    gradients  every matrix of the layers of the quickstart's model, against fp32, over the pairs of a run (--pairs);
               an iteration's first step. On a CPU float8 is emulated and all else fp32: only the quantization shows
    runs       the quickstart with other arithmetic: losses step by step
torchao's recipes stand next to the product's own float8.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, FLOAT8, ROW_MULTIPLE, fused_loss
from omegaconf import OmegaConf
from page import table
from training_step import Bench
from training_step import parse_args as step_args
from work import MODELS, listed

from spin.core.files import write_json
from spin.core.ranks import World, init_world, shutdown
from spin.data import Pair, pack_batch
from spin.model.build import build_model, choose_attention, prepare_model
from spin.model.hf import load_hf_weights
from spin.model.sharding import accumulating
from spin.pairs.packing import RowLayout
from spin.pairs.store import PairStore
from spin.reference.logprobs import response_logps

WHAT = ("speed", "gradients", "runs")
TITLES = {
    "compiled": "bf16",
    "tensorwise": "float8, torchao's tensorwise",
    "rowwise": "float8, torchao's rowwise",
    "float8": "float8 (`enable_float8_training`)",
}


# ------------------------------------------------------------------------------------------------------------- speed
def speed(model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward, then whole steps, by turns."""
    options = ["--model", model, "--rounds", str(args.rounds), "--row-tokens", str(args.row_tokens)]
    options += ["--device", args.device] if args.device else []
    bench = Bench(step_args([*options, "--keep-gathered", "--unsharded-gradients"]))
    pairs = bench.mixed_pairs("short")
    arms = {name: replace(ARMS["compiled"], variant=name) for name in args.arms}
    batch = bench.lay_out(arms["compiled"], pairs)
    run = {name: lambda arm=arm: bench.forward_backward(arm, batch, len(pairs)) for name, arm in arms.items()}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if bench.on_gpu else "CPU",
        "torch": torch.__version__,
        "pairs": len(pairs),
        "rows": [piece.tokens.numel() for piece in batch],
    }
    result["off"] = {}  # from bf16's gradient, relative; large for random weights, but 1 would be another gradient
    exact: list[torch.Tensor] = []
    for name, function in run.items():
        function()
        found = [parameter.grad.to_local() for parameter in bench.model(name).parameters()]
        exact = exact or found
        norms = [torch.stack([t.norm() for t in ts]).norm() for ts in (exact, map(torch.sub, found, exact))]
        result["off"][name] = (norms[1] / norms[0]).item()
        bench.zero_grads()
    del exact, found
    result["forward and backward"] = bench.race({name: (name, function) for name, function in run.items()})
    steps = {}
    for name in ("compiled", "float8"):
        optimizer = bench.optimizer(arms[name])
        steps[name] = (name, lambda arm=arms[name], o=optimizer: bench.optimizer_step(arm, batch, len(pairs), o))
    bench.drop("tensorwise", "rowwise")
    result["optimizer step"] = bench.race(steps)
    return result


# --------------------------------------------------------------------------------------------------------- gradients
def gradients(model_dir: Path, pairs: Sequence[Pair], world: World) -> dict[str, Any]:
    """Cosine and relative error of each matrix's gradient by fp32's, for every kind of arithmetic.

    Reference log-probs are the model's own in that arithmetic, as a run has them, so that losses are ln 2.
    """
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    _, exact = _gradient(model_dir, pairs, world, torch.float32, None)
    results = {}
    for name in TITLES:
        loss, found = _gradient(model_dir, pairs, world, dtype, name)
        matrices = {}
        for key, right in exact.items():
            difference = (found[key] - right).norm() / right.norm()
            matrices[key] = {
                "cosine": torch.cosine_similarity(found[key].flatten(), right.flatten(), dim=0).item(),
                "error": difference.item(),
            }
        whole = [torch.cat([part[key].flatten() for key in exact]) for part in (found, exact)]
        results[name] = {
            "loss": loss,
            "cosine": torch.cosine_similarity(*whole, dim=0).item(),
            "norm_ratio": (whole[0].norm() / whole[1].norm()).item(),
            "matrices": matrices,
        }
    return {"device": world.device.type, "model": model_dir.name, "pairs": len(pairs), "arms": results}


def _gradient(
    model_dir: Path, pairs: Sequence[Pair], world: World, dtype: torch.dtype, variant: str | None
) -> tuple[float, dict[str, torch.Tensor]]:
    section = OmegaConf.create({"_component_": "spin.model.from_hf", "path": str(model_dir)})
    model = build_model(section, torch.float32)
    if variant in FLOAT8:
        FLOAT8[variant](model, world.device)
    prepare_model(model, world, compute_dtype=dtype)
    load_hf_weights(model, model_dir, None, world=world)
    flex = choose_attention(model, world, dtype)
    rows = pack_batch(pairs, RowLayout(512, ROW_MULTIPLE, flex=flex), world.rank, world.world_size)
    total = 0.0
    with accumulating(model, rows, unsharded_gradients=True) as each_row:
        for row in each_row:
            placed = row.to(world.device)
            with torch.no_grad():
                placed = replace(placed, reference_logps=response_logps(model, placed, 512))
            loss = fused_loss(model, placed, 512) / len(pairs)
            loss.backward()
            total += loss.item()
    matrices = {name: p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() > 1}
    return total, {name: p.grad.to_local().double().cpu() for name, p in matrices.items()}


# -------------------------------------------------------------------------------------------------------------- runs
def runs(settings: Sequence[str]) -> dict[str, Any]:
    """The quickstart with and without float8, at the same time: what its steps and validations log."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for name, flag in (("without", "false"), ("float8", "true")):
            config = ["--config", "quickstart/smollm2_135M_cpu", f"output_dir={folder}/{name}"]
            command = [sys.executable, "-m", "spin", "run", "spin_recipe", *config, f"enable_float8_training={flag}"]
            started.append(subprocess.Popen([*command, *settings]))
        if max([process.wait() for process in started]):
            raise SystemExit("a run failed; its error stands above")
        logs = {name: Path(folder, name, "metrics.jsonl").read_text(encoding="utf-8") for name in ("without", "float8")}
    return {
        "settings": list(settings),
        **{name: [json.loads(line) for line in log.splitlines()] for name, log in logs.items()},
    }


# ------------------------------------------------------------------------------------------------------------ tables
def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = []
    for model, section in results.get("speed", {}).items():
        parts.append(f"**{model}**, {section['device']}, {section['pairs']} pairs in rows of {section['rows']} tokens")
        rows = []
        for name in section["forward and backward"]:
            cells = [TITLES[name]]
            for what in ("forward and backward", "optimizer step"):
                run, bf16 = (section[what].get(key) for key in (name, "compiled"))
                cells += [f"{1e3 * run['median_seconds']:.0f}", _ratio(bf16, run)] if run else ["-", "-"]
            peak = section["forward and backward"][name]["peak_gib"]
            rows.append([*cells, "-" if peak is None else f"{peak:.1f}"])
        parts.append(
            table(["", "forward and backward, ms", "x bf16", "optimizer step, ms", "x bf16", "peak GiB"], rows)
        )
    if "gradients" in results:
        section = results["gradients"]
        parts.append(f"**Gradients** of {section['model']}, {section['pairs']} pairs, {section['device']}")
        rows = []
        for name, arm in section["arms"].items():
            each = sorted(arm["matrices"].values(), key=lambda matrix: matrix["cosine"])
            least, middle = each[0], each[len(each) // 2]
            rows.append(
                [
                    TITLES[name],
                    *(
                        f"{value:.4f}"
                        for value in (arm["cosine"], middle["cosine"], least["cosine"], arm["norm_ratio"])
                    ),
                ]
            )
        parts.append(table(["", "cosine with fp32", "median matrix", "worst matrix", "norm / fp32's"], rows))
    if "runs" in results:
        section = results["runs"]
        steps = zip(section["without"], section["float8"], strict=True)
        keys = ("val_loss", "loss", "real_nll", "grad_norm")
        rows = [[str(a["step"]), key, f"{a[key]:.5f}", f"{b[key]:.5f}"] for a, b in steps for key in keys if key in a]
        parts.append("**Runs** of the quickstart")
        parts.append(table(["step", "", "without", "float8"], rows))
    return "\n\n".join(parts)


def _ratio(bf16: dict[str, Any], run: dict[str, Any]) -> str:
    """With its range over rounds."""
    ratios = [a / b for a, b in zip(bf16["seconds"], run["seconds"], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


# -------------------------------------------------------------------------------------------------------------- main
def main() -> None:
    """Measures or reads, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results; keeps the sections that it has")
    parser.add_argument("--table", type=Path, help="print the tables of a results file and measure nothing")
    parser.add_argument("--what", type=listed(WHAT), default=list(WHAT), help=",".join(WHAT))
    parser.add_argument("--models", type=listed(list(MODELS)), default=["llama3_2_1b", "llama3_1_8b_8_layers"])
    parser.add_argument("--arms", type=listed(list(TITLES)), default=list(TITLES), help=",".join(TITLES))
    parser.add_argument("--row-tokens", type=int, default=12288)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=Path(".cache/quickstart/SmolLM2-135M-Instruct"))
    parser.add_argument("--pairs", type=Path, default=Path("runs/quickstart/iteration_000/pairs"))
    parser.add_argument("--num-pairs", type=int, default=48)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("settings", nargs="*", help="of the runs, as in `spin run`")
    args = parser.parse_args()
    if args.table:
        print(tables(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    results: dict[str, Any] = {}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))

    def keep(section: str, values: Any) -> None:
        results[section] = values
        if args.out:
            write_json(args.out, results)

    if "speed" in args.what:
        for model in args.models:
            keep("speed", results.get("speed", {}) | {model: speed(model, args)})
    if "gradients" in args.what:
        pairs = list(PairStore.open(args.pairs).pairs())[: args.num_pairs]
        keep("gradients", gradients(args.model, pairs, init_world(args.device)))
    if "runs" in args.what:
        keep("runs", runs(args.settings))
    print(tables(results), flush=True)
    shutdown()


if __name__ == "__main__":
    main()
