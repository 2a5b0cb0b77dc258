"""float8 in the layers against bf16: how fast a training step is, what becomes of a real model's gradient and losses.

    python benchmarks/float8.py --what speed --out float8.json                         # one H100 or H200
    python benchmarks/float8.py --what gradients --pairs runs/quickstart/iteration_000/pairs --out float8.json
    python benchmarks/float8.py --what runs --out float8.json
    python benchmarks/float8.py --table float8.json                                    # the tables again

What is measured (--what):
    speed      forward and backward, and whole optimizer steps, of benchmarks/training_step.py's batches, arms by turns;
               first a matrix product for as long as a step, whose rate is what steps are fractions of. TFLOP/s are of
               the least work that the pairs need, whatever the arithmetic
    gradients  the layers' matrices of the quickstart's model against fp32, of SFT's loss and of an iteration's first
               step, over the pairs of a run (--pairs); also with some of the three products in float8 alone. On a CPU
               float8 is emulated and all else fp32: only the quantization shows
    runs       SFT, then two iterations of self-play of the quickstart's model on its data with other arithmetic, all
               runs at once; what they end with is judged in fp32
torchao's recipes stand next to the product's own float8.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from arms import ARMS, FLOAT8, ROW_MULTIPLE, objective_of
from omegaconf import OmegaConf
from page import table
from rounds import free
from torch import nn
from torch.nn import functional as F
from training_step import Bench, ceilings
from training_step import parse_args as step_args
from work import MODELS, floor_of_work, listed

from spin.core.files import write_json
from spin.core.ranks import World, init_world, shutdown
from spin.data import PackedRow, Pair, pack_batch
from spin.model.build import build_model, prepare_model
from spin.model.float8 import Float8Linear, convert_float8
from spin.model.hf import load_hf_weights
from spin.model.sharding import accumulating, local_tensor
from spin.pairs.packing import RowLayout
from spin.pairs.store import PairStore
from spin.reference.logprobs import pair_objective, response_logps

WHAT = ("speed", "gradients", "runs")
TITLES = {
    "compiled": "bf16",
    "tensorwise": "float8, torchao's tensorwise",
    "rowwise": "float8, torchao's rowwise",
    "float8": "float8 (`enable_float8_training`)",
}
LOGGED = ("step", "iteration", "loss", "acc", "margin", "real_nll", "grad_norm", "val_loss", "val_acc", "val_margin")
CHUNK_TOKENS, ROW_TOKENS = 512, 2048
RUNS = {
    "fp32": ("compute_dtype=fp32",),
    "bf16": ("compute_dtype=bf16",),
    "bf16, another seed": ("compute_dtype=bf16", "seed=43"),
    "float8": ("compute_dtype=bf16", "enable_float8_training=true"),
}
GPU_SETTINGS = (  # of the runs, in rows that suit a GPU; nothing is compiled
    "device=cuda", "attention=dense", "pairs.row_tokens=8192", "logprob_chunk_tokens=2048", "global_batch_size=16",
    "limit_train_batches=20", "generator.batch_size=256", "validation_dataset.limit=null", "val_check_interval=0.25",
    "validation.fixed_prompts=100", "validation.spin=true",
)  # fmt: skip


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
        "floor_tflop": floor_of_work(bench.sizes, pairs) / 1e12,
        **ceilings(bench),
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
    if not args.step_alone:
        result["forward and backward"] = bench.race({name: (name, function) for name, function in run.items()})
    bench.drop("tensorwise")
    steps, states = {}, None
    for name, arm in ((name, arm) for name, arm in arms.items() if name != "tensorwise"):
        optimizer = bench.optimizer(arm)
        step = partial(bench.optimizer_step, arm, batch, len(pairs), optimizer)
        if states is None:
            step()
            states = list(optimizer.state.values())  # of the first arm, for all: memory for one
        optimizer.state.update(zip(bench.model(name).parameters(), states, strict=True))
        steps[name] = (name, step)
    result["optimizer step"] = bench.race(steps)
    return result


# --------------------------------------------------------------------------------------------------------- gradients
class PartlyFloat8(Float8Linear):
    """A linear layer of whose three products some are in float8."""

    products: tuple[str, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As ``nn.Linear``; each product comes from a path of its own, and of the other paths nothing is kept."""
        weight = self.weight

        def path(product: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            if product in self.products:
                return Float8Linear.forward(SimpleNamespace(weight=weight, bias=None), x)
            return F.linear(x, weight)

        inputs, weights = path("inputs", x, weight.detach()), path("weights", x.detach(), weight)
        value = path("forward", x.detach(), weight.detach())
        return value + (inputs - inputs.detach()) + (weights - weights.detach())


def _convert_partly(model: nn.Module, device: torch.device, products: tuple[str, ...]) -> None:
    convert_float8(model, device)
    kind = type("PartlyFloat8", (PartlyFloat8,), {"products": products})
    for module in (module for module in model.modules() if type(module) is Float8Linear):
        module.__class__ = kind


PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "forward": ("float8 in forward alone", ("forward",)),
    "inputs": ("float8 in gradients of inputs alone", ("inputs",)),
    "weights": ("float8 in gradients of weights alone", ("weights",)),
    "no weights": ("float8, gradients of weights in bf16", ("forward", "inputs")),
}
CONVERSIONS: dict[str, Callable[[nn.Module, torch.device], Any]] = {
    **FLOAT8,
    **{name: partial(_convert_partly, products=products) for name, (_, products) in PARTS.items()},
}
GRADIENT_TITLES = TITLES | {name: title for name, (title, _) in PARTS.items()}
Objective = Callable[[torch.Tensor], torch.Tensor]
# of a row: the sum of its pairs' losses by the log-probs of its responses
OBJECTIVES: dict[str, Callable[[PackedRow], Objective]] = {
    "SFT": lambda row: lambda logps: -(logps / row.response_lengths)[row.real].sum(),
    "SPIN": objective_of,
}


def gradients(model_dir: Path, pairs: Sequence[Pair], world: World) -> dict[str, Any]:
    """Cosine and relative error of the layers' gradient by fp32's, for every kind of arithmetic and both losses: of all
    matrices together, of each kind, of each layer.

    Reference log-probs are the model's own in that arithmetic, as a run has them, so that SPIN's losses are ln 2.
    """
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    found: dict[str, dict[str, Any]] = {loss: {} for loss in OBJECTIVES}
    exact = _gradients(model_dir, pairs, world, torch.float32, None)
    for name in GRADIENT_TITLES:
        for loss, (value, gradient) in _gradients(model_dir, pairs, world, dtype, name).items():
            groups: dict[str, list[str]] = defaultdict(list)
            for key in gradient:  # layers.3.attn.q_proj.weight
                layer, kind = re.fullmatch(r"layers\.(\d+)\.\w+\.(\w+)\.weight", key).groups()  # type: ignore[union-attr]
                for group in ("all", kind, f"layer {layer}"):
                    groups[group].append(key)
            right = exact[loss][1]
            found[loss][name] = {"loss": value} | {
                group: compared([gradient[key] for key in keys], [right[key] for key in keys])
                for group, keys in groups.items()
            }
    return {"device": world.device.type, "model": model_dir.name, "pairs": len(pairs), "losses": found}


def compared(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> dict[str, float]:
    """Cosine, relative error and ratio of norms of tensors taken together."""
    dot, ours, theirs = (
        sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True))
        for left, right in ((found, exact), (found, found), (exact, exact))
    )
    return {
        "cosine": float(dot / (ours * theirs) ** 0.5),
        "error": float(((ours - 2 * dot + theirs).clamp_min(0) / theirs) ** 0.5),  # type: ignore[union-attr]
        "norm_ratio": float((ours / theirs) ** 0.5),
    }


def _gradients(
    model_dir: Path, pairs: Sequence[Pair], world: World, dtype: torch.dtype, variant: str | None
) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Mean loss over the pairs and the gradients of the layers' matrices, for both losses."""
    model = _model(model_dir, world, dtype, variant)
    rows = _rows(pairs, world)
    with torch.no_grad():
        rows = [replace(row, reference_logps=response_logps(model, row, CHUNK_TOKENS)) for row in rows]
    found = {}
    for name, objective in OBJECTIVES.items():
        total = 0.0
        with accumulating(model, rows, unsharded_gradients=True) as each_row:
            for row in each_row:
                loss = pair_objective(model, row, objective(row), CHUNK_TOKENS)[0] / len(pairs)
                loss.backward()
                total += loss.item()
        matrices = {name: p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() > 1}
        found[name] = (total, {key: local_tensor(p.grad) for key, p in matrices.items()})
        model.zero_grad(set_to_none=True)
    return found


def _rows(pairs: Sequence[Pair], world: World) -> list[PackedRow]:
    """With dense masks: nothing is compiled."""
    return [row.to(world.device) for row in pack_batch(pairs, RowLayout(ROW_TOKENS, ROW_MULTIPLE), 0, 1)]


def _model(model_dir: Path, world: World, dtype: torch.dtype, variant: str | None) -> nn.Module:
    """A model with its weights, eager."""
    free()
    section = OmegaConf.create({"_component_": "spin.model.from_hf", "path": str(model_dir)})
    model = build_model(section, torch.float32)
    if variant in CONVERSIONS:
        CONVERSIONS[variant](model, world.device)
    prepare_model(model, world, compute_dtype=dtype)
    load_hf_weights(model, model_dir, None, world=world)
    model.max_seq_len = max(model.max_seq_len, ROW_TOKENS)  # of a row, no position in which is beyond it
    return model


# -------------------------------------------------------------------------------------------------------------- runs
def runs(arms: Sequence[str], model_dir: Path, world: World, settings: Sequence[str]) -> dict[str, Any]:
    """SFT and then self-play with each kind of arithmetic, all at the same time: what steps and validations log, and
    what the last responses to held-out prompts are like; then the held-out loss of what they end with, in fp32."""
    on_gpu = world.device.type == "cuda"
    settings = [f"model.path={model_dir}", *(GPU_SETTINGS if on_gpu else ()), *settings]
    with tempfile.TemporaryDirectory(prefix="spin-float8-") as parent:
        folders, started = {name: Path(parent, name.replace(", ", "_")) for name in arms}, []
        for name, folder in folders.items():
            options = ["--config", "quickstart/smollm2_135M_cpu", f"output_dir={folder}", *settings, *RUNS[name]]
            both = [
                subprocess.list2cmdline([sys.executable, "-m", "spin", "run", recipe, *options])
                for recipe in ("spin_sft", "spin_recipe")
            ]
            started.append(subprocess.Popen(["bash", "-c", " && ".join(both)]))
        failed = [name for name, process in zip(arms, started, strict=True) if process.wait()]
        arms = [name for name in arms if name not in failed]
        if not arms:
            raise SystemExit("all runs failed; their errors stand above")
        results = {name: _curves(folders[name]) for name in arms}
        last = max(row["iteration"] for row in results[arms[0]]["SPIN"] if "iteration" in row)
        # validation pairs of one run, for all: real responses, which are the same in each
        pairs = list(PairStore.open(folders[arms[0]] / "iteration_000" / "validation" / "pairs").pairs())
        for name in arms:
            ends = {
                "SFT": folders[name] / "sft" / "iteration_000" / "hf_model",
                "SPIN": folders[name] / f"iteration_{last:03d}" / "hf_model",
            }
            results[name]["held_out_nll"] = {stage: _held_out_nll(end, pairs, world) for stage, end in ends.items()}
    return {"device": world.device.type, "settings": settings[1:], "failed": failed, "arms": results}


def _curves(folder: Path) -> dict[str, Any]:
    def lines(file: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    answers: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in lines(folder / "fixed_prompts.jsonl"):
        answers[row["iteration"]].append(row)

    def curve(file: Path) -> list[dict[str, Any]]:
        return [{key: line[key] for key in LOGGED if key in line} for line in lines(file)]

    return {
        "SFT": curve(folder / "sft" / "metrics.jsonl"),
        "SPIN": curve(folder / "metrics.jsonl"),
        "answers": [answer_figures(answers[iteration]) for iteration in sorted(answers)],
    }


def answer_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of responses and the real ones: words, fraction that was truncated, F1 of their words, fraction of trigrams that
    stand in a response for the second time."""
    words, overlaps, repeated = [], [], []
    for row in rows:
        own, real = (re.findall(r"\w+", row[key].lower()) for key in ("response", "real"))
        common = sum(min(own.count(word), real.count(word)) for word in set(own))
        trigrams = list(zip(own, own[1:], own[2:], strict=False))
        words.append(len(own))
        overlaps.append(2 * common / max(1, len(own) + len(real)))
        repeated.append(1 - len(set(trigrams)) / max(1, len(trigrams)))
    return {
        "answers": len(rows),
        "words": statistics.mean(words),
        "truncated": statistics.mean(row["finish_reason"] == "length" for row in rows),
        "overlap": statistics.mean(overlaps),
        "repeated": statistics.mean(repeated) if repeated else 0.0,
    }


@torch.no_grad()
def _held_out_nll(model_dir: Path, pairs: Sequence[Pair], world: World) -> float:
    """Mean negative log-likelihood per token of the real responses in fp32, in nats."""
    model = _model(model_dir, world, torch.float32, None)
    rows = _rows(pairs, world)
    logps = [response_logps(model, row, CHUNK_TOKENS)[row.real].sum() for row in rows]
    return -float(sum(logps)) / sum(len(pair.real_ids) for pair in pairs)


# ------------------------------------------------------------------------------------------------------------ tables
def tables(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = []
    for model, section in results.get("speed", {}).items():
        sustained = section.get("sustained_matmul_tflops")
        parts.append(
            f"**{model}**, {section['device']}, {section['pairs']} pairs in rows of {section['rows']} tokens"
            + (f"; a matrix product in bf16 {sustained:.0f} TFLOP/s, sustained" if sustained else "")
        )
        rows = []
        for name in section["off"]:
            cells, peak = [TITLES[name]], None
            for what in ("forward and backward", "optimizer step"):
                run, bf16 = (section.get(what, {}).get(key) for key in (name, "compiled"))
                cells += [f"{1e3 * run['median_seconds']:.0f}", _ratio(bf16, run)] if run else ["-", "-"]
                peak = peak or (run and run["peak_gib"])
            step = section["optimizer step"].get(name)
            tflops = section["floor_tflop"] / step["median_seconds"] if step and "floor_tflop" in section else None
            rate = tflops / sustained if tflops and sustained else None
            rows.append([*cells, _number(tflops, ".0f"), _percent(rate), _number(peak, ".1f")])
        columns = [
            "",
            "forward and backward, ms",
            "x bf16",
            "optimizer step, ms",
            "x bf16",
            "TFLOP/s",
            "of the product",
            "peak GiB",
        ]
        parts.append(table(columns, rows))
    if "gradients" in results:
        parts += _gradient_tables(results["gradients"])
    if "runs" in results:
        parts += _run_tables(results["runs"])
    return "\n\n".join(parts)


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.0f} %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _gradient_tables(section: dict[str, Any]) -> list[str]:
    """For each loss: all matrices by arm; then cosines of bf16 and float8 by kind and by layer."""
    parts = []
    for loss, arms in section["losses"].items():
        parts.append(f"**Gradients**, {loss}, {section['model']}, {section['pairs']} pairs, {section['device']}")
        groups = [group for group in arms["float8"] if group not in ("loss", "all")]
        rows = []
        for name, arm in arms.items():
            worst = min(groups, key=lambda group, arm=arm: arm[group]["cosine"])  # type: ignore[misc]
            whole = [f"{arm['all'][key]:.4f}" for key in ("cosine", "error", "norm_ratio")]
            rows.append([GRADIENT_TITLES[name], *whole, f"{arm[worst]['cosine']:.4f} ({worst})"])
        parts.append(table(["", "cosine with fp32", "relative error", "norm / fp32's", "worst kind or layer"], rows))
        rows = [
            [group, *(f"{arms[name][group]['cosine']:.4f}" for name in TITLES), f"{arms['float8'][group]['error']:.3f}"]
            for group in groups
        ]
        parts.append(table(["cosine", *TITLES.values(), "relative error of the last"], rows))
    return parts


def _run_tables(section: dict[str, Any]) -> list[str]:
    """The curves, each metric a row of arms; what the runs end with."""
    arms, parts = section["arms"], [f"**Runs**, {section['device']}: {' '.join(section['settings'])}"]
    for stage, keys in (("SFT", ("val_loss", "loss")), ("SPIN", ("val_loss", "val_margin", "loss", "real_nll"))):
        steps = list(zip(*(arm[stage] for arm in arms.values()), strict=True))
        rows = [
            [f"{lines[0]['step']}", key, *(f"{line[key]:.4f}" for line in lines)]
            for key in keys
            for lines in _few([lines for lines in steps if key in lines[0]])
        ]
        parts.append(table([f"{stage}, step", "", *arms], rows))
    rows = [
        [f"held-out NLL after {stage}, in fp32", *(f"{arm['held_out_nll'][stage]:.4f}" for arm in arms.values())]
        for stage in ("SFT", "SPIN")
    ]
    for iteration in range(len(next(iter(arms.values()))["answers"])):
        rows += [
            [f"{key}, after iteration {iteration}", *(f"{arm['answers'][iteration][key]:.3f}" for arm in arms.values())]
            for key in ("words", "truncated", "overlap", "repeated")
        ]
    return [*parts, table(["", *arms], rows)]


def _few(lines: list[Any], most: int = 8) -> list[Any]:
    """The first, the last and some between."""
    count = min(most, len(lines))
    return [lines[round(i * (len(lines) - 1) / max(1, count - 1))] for i in range(count)]


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
    parser.add_argument("--step-alone", action="store_true", help="speed without forward and backward")
    parser.add_argument("--model", type=Path, default=Path(".cache/quickstart/SmolLM2-135M-Instruct"))
    parser.add_argument("--pairs", type=Path, default=Path("runs/quickstart/iteration_000/pairs"))
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--run-arms", default="; ".join(RUNS), help="of the runs, with semicolons between them")
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
        arms = [name.strip() for name in args.run_arms.split(";")]
        keep("runs", runs(arms, args.model.resolve(), init_world(args.device), args.settings))
    print(tables(results), flush=True)
    shutdown()


if __name__ == "__main__":
    main()
