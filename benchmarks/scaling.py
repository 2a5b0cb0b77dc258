"""How training, checkpoints, generation and whole iterations scale over the GPUs of one host, as one command.

    python benchmarks/scaling.py --out benchmarks/results/scaling_h100x8.json         # 1, 2, 4, 8: what the host has
    python benchmarks/scaling.py --parts step --gpus 1,2 --rounds 2 --out scaling.json     # minutes
    python benchmarks/scaling.py --models tiny --device cpu --gpus 1,2 --parts step --out tiny.json   # does it run?

Each run is another benchmark of this folder under torchrun, one after another. Parts (--parts):
    step        whole optimizer steps (training_step.py): FSDP2 over all GPUs, and HSDP with two replicas. Every GPU has
                the same number of pairs (--pairs), so that pairs/s should grow with the GPUs; --strong adds runs of
                that many pairs over all GPUs together.
    checkpoint  saving in the background and synchronously, restoring, exporting (checkpointing.py)
    iteration   whole iterations of the larger model, with a checkpoint and an export after the last one (iteration.py);
                responses by an engine on each rank, and by engines that two ranks share (tensor parallelism)
Generation is the iteration's first stage. The 8B is trained with AdamW's moments in 8 bits at every number of GPUs, so
that one H200 holds it.

The file is written after each run; the same command makes the runs that are missing. A run that fails, by memory
for one, stays in it with its error, and is repeated with --retry. The tables are printed, and benchmarks/page.py writes
them into docs/benchmarks.md. A checkpoint of the 8B has 48 GB: --parts checkpoint needs room for two in --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from page import scaling_section
from work import MODELS, listed

from spin.core.files import write_json
from spin.core.packages import VLLM, installed_version, installed_vllm

HERE = Path(__file__).resolve().parent
PARTS = ("step", "checkpoint", "iteration")
GPUS = (1, 2, 4, 8)
PACKAGES = ("torch", "torchtune", "torchao", "transformers", *VLLM)
# of a packed row. One H200 held the 8B's step with rows of 8,192 tokens; with 6,912 the 64 pairs of each GPU are eight
# rows of about the same length at every number of GPUs, where 8,192 makes them six or eight. vLLM needs room too.
ROW_TOKENS = {"llama3_2_1b": 12288, "llama3_1_8b": 6912}
ITERATION_ROW_TOKENS = {"llama3_1_8b": 6144}
LARGE = "llama3_1_8b"
# as configs/llama3_1_8B_full.yaml, but with AdamW's moments in 8 bits and without activation checkpointing
LARGE_OVERRIDES = (
    "checkpointer.model_type=LLAMA3", "fsdp_reshard_after_forward=true", "fsdp_accumulate_unsharded=false",
    "optimizer._component_=spin.training.AdamW8bit", "~optimizer.fused",
)  # fmt: skip
ERROR = re.compile(r"^(?:\[rank\d+\]: )?((?:\w+\.)*\w*(?:Error|Exception): .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """One command under torchrun.

    Args:
        part (str): of ``PARTS``.
        model (str): of ``work.MODELS``.
        gpus (int): processes, one on each GPU.
        form (str): what else distinguishes it from other runs of the part and model.
        script (str): of this folder.
        arguments (tuple[str, ...]): of the script, without ``--out`` and ``--folder``.
        folder (str | None): option for the folder that the script writes to, by its name; None: it writes none.
        facts (tuple[tuple[str, Any], ...]): what the table says of it.
    """

    part: str
    model: str
    gpus: int
    form: str
    script: str
    arguments: tuple[str, ...]
    folder: str | None = None
    facts: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Its key in the results."""
        return f"{self.part} {self.model} {self.form} {self.gpus}"


# ------------------------------------------------------------------------------------------------------------- runs
def plan(args: argparse.Namespace) -> list[Run]:
    """All runs that were asked for, in the order in which they are made.

    Args:
        args (argparse.Namespace): of the command line.

    Returns:
        list[Run]: by part, model, number of GPUs.
    """
    runs: list[Run] = []
    for model in args.models if "step" in args.parts else ():
        for gpus in args.gpus:
            runs += _steps(args, model, gpus)
    for model in args.models if "checkpoint" in args.parts else ():
        for gpus in args.gpus:
            options = [*_shapes(args, model, args.pairs * gpus), *_optimizer(model)]
            options += ["--rounds", "1", "--steps", "2", "--every", "2"]
            runs.append(Run("checkpoint", model, gpus, "fsdp", "checkpointing.py", tuple(options), "parent"))
    for gpus in args.gpus if "iteration" in args.parts else ():
        runs += _iterations(args, args.models[0], gpus)
    return runs


def _optimizer(model: str) -> list[str]:
    return ["--optimizer", "adamw8bit"] if model == LARGE else []


def _shapes(args: argparse.Namespace, model: str, pairs: int) -> list[str]:
    rows = args.row_tokens or ROW_TOKENS.get(model)
    options = ["--model", model, "--pairs", str(pairs)]
    options += ["--row-tokens", str(rows)] if rows else []
    return options + (["--device", args.device] if args.device else [])


def _steps(args: argparse.Namespace, model: str, gpus: int) -> list[Run]:
    runs = []
    for load, pairs in (("weak", args.pairs * gpus), *([("strong", args.pairs)] if args.strong else [])):
        for replicas in (1, *([2] if args.hsdp_from and gpus >= max(2, args.hsdp_from) else [])):
            options = [*_shapes(args, model, pairs), *_optimizer(model), "--rounds", str(args.rounds)]
            options += ["--what", "optimizer_step", "--step-alone", "--arms", "compiled", "--replicas", str(replicas)]
            more = shlex.split(args.step_options)
            form = " ".join(["hsdp" if replicas > 1 else "fsdp", load, *more])
            facts = (("replicas", replicas), ("load", load), ("pairs", pairs), ("options", more))
            options += more
            runs.append(Run("step", model, gpus, form, "training_step.py", tuple(options), None, facts))
    return runs


def _iterations(args: argparse.Namespace, model: str, gpus: int) -> list[Run]:
    rows = args.row_tokens or ITERATION_ROW_TOKENS.get(model)
    prompts = args.prompts * gpus
    options = ["--model", model, "--generator", args.generator, "--prompts", str(prompts), "--save-last"]
    options += ["--batch", str(args.pairs * gpus), *(["--device", args.device] if args.device else [])]
    overrides = ["checkpointer.keep_last=1", *(LARGE_OVERRIDES if model == LARGE else ())]
    overrides += [f"pairs.row_tokens={rows}"] if rows else []
    runs = []
    for shared in (1, 2) if args.generator == "vllm" and gpus > 1 else (1,):
        engines = [f"generator.tensor_parallel_size={shared}"] if args.generator == "vllm" else []
        facts = (("generator", args.generator), ("tensor_parallel", shared), ("prompts", prompts))
        form = f"{args.generator} tp{shared}"
        arguments = (*options, *overrides, *engines)
        runs.append(Run("iteration", model, gpus, form, "iteration.py", arguments, "new", facts))
    return runs


def reason_to_skip(run: Run) -> str | None:
    """Why a run cannot be made here; None if it can."""
    if "vllm" in run.arguments and installed_vllm() is None:
        return "vllm is not installed"
    return None


# ---------------------------------------------------------------------------------------------------------- running
def launch(run: Run, folder: Path, limit_seconds: float) -> dict[str, Any]:
    """Makes a run, in processes of their own.

    Args:
        run (Run): which.
        folder (Path): parent of what it writes, which is removed, but for a model that later runs take too.
        limit_seconds (float): longer ones are ended.

    Returns:
        dict[str, Any]: what identifies the run, its seconds with start and end, and ``result``, or ``error``.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}  # vLLM's limit
    environment.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it for more than one process
    with tempfile.TemporaryDirectory(dir=folder) as work:
        out, words = Path(work) / "results.json", Path(work) / "output.txt"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(run.gpus)]
        command = [*torchrun, str(HERE / run.script), *run.arguments, "--out", str(out)]
        if run.folder is not None:
            command += ["--folder", work if run.folder == "parent" else str(Path(work) / "run")]
        if run.folder == "new":
            command += ["--model-folder", str(folder / run.model)]
        began = time.perf_counter()
        with words.open("w", encoding="utf-8") as stream:
            code = _ended(command, environment, stream, limit_seconds)
        said = words.read_text(encoding="utf-8", errors="replace")
        record: dict[str, Any] = {
            "part": run.part, "model": run.model, "gpus": run.gpus, "arguments": list(run.arguments), **dict(run.facts),
            "wall_seconds": time.perf_counter() - began,
        }  # fmt: skip
        if code is None:
            return record | {"error": f"not done after {limit_seconds:g} s"}
        if code:
            print("\n".join(said.splitlines()[-60:]), file=sys.stderr, flush=True)
            return record | {"error": error_in(said)}
        result = json.loads(out.read_text(encoding="utf-8"))
    errors = [each["error"] for each in result.get("optimizer_step", {}).get("runs", {}).values() if "error" in each]
    return record | ({"error": errors[0]} if errors else {"result": result})


def _ended(command: Sequence[str], environment: dict[str, str], stream: Any, limit_seconds: float) -> int | None:
    """The command's exit status; None if it was ended because it took too long."""
    process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
    try:
        return process.wait(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # torchrun ends its workers when it is asked to end
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def error_in(output: str) -> str:
    """The first error that a rank printed: the others fail because of it."""
    found = [line for line in ERROR.findall(output) if "ChildFailedError" not in line]
    return (found or output.strip().splitlines()[-1:] or ["it ended without a word"])[0][:300]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the runs that the file does not have.

    Args:
        args (argparse.Namespace): of the command line.

    Returns:
        dict[str, Any]: all results, those of earlier commands included.

    Raises:
        SystemExit: If the file holds results of another machine, of other packages, or of other settings.
    """
    setup = {
        "device": torch.cuda.get_device_name() if args.device != "cpu" else "CPU",
        "host_gpus": torch.cuda.device_count() if args.device != "cpu" else 0,
        "versions": {name: version for name in PACKAGES if (version := installed_version(name)) is not None},
    }
    results: dict[str, Any] = {"setup": setup, "skipped": {}, "runs": {}}
    if args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))
        if results["setup"] != setup:
            raise SystemExit(f"{args.out} was measured with {results['setup']}, not {setup}. Choose another --out.")
    runs = plan(args)
    for run in runs:
        known = results["runs"].get(run.name)
        if known is not None and known["arguments"] != list(run.arguments):
            raise SystemExit(
                f"{args.out} has {run.name!r} with {' '.join(known['arguments'])}, not {' '.join(run.arguments)}. "
                "Give the same options, or choose another --out."
            )
    with tempfile.TemporaryDirectory(prefix="spin-scaling-", dir=args.folder) as folder:
        for run in runs:
            known = results["runs"].get(run.name)
            if known is not None and not (args.retry and "error" in known):
                continue
            reason = reason_to_skip(run)
            if reason is None:
                print(f"{run.name} ...", file=sys.stderr, flush=True)
                results["runs"][run.name] = record = launch(run, Path(folder), args.limit_seconds)
                results["skipped"].pop(run.name, None)
                print(f"    {record['wall_seconds']:.0f} s, {record.get('error', 'done')}", file=sys.stderr, flush=True)
            else:
                results["skipped"][run.name] = reason
            write_json(args.out, results)
    return results


# ------------------------------------------------------------------------------------------------------------- main
def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or ``arguments`` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results; adds to one that is there")
    parser.add_argument("--parts", type=listed(PARTS), default=list(PARTS), help=",".join(PARTS))
    models = [LARGE, *(name for name in MODELS if name != LARGE)]
    parser.add_argument("--models", type=listed(models), default=[LARGE, "llama3_2_1b"], help=",".join(models))
    parser.add_argument("--gpus", type=listed([str(n) for n in GPUS]), help="default: of 1,2,4,8 what the host has")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: GPUs; cpu: --gpus counts processes")
    parser.add_argument("--rounds", type=int, default=3, help="of the step, after two untimed ones")
    parser.add_argument("--pairs", type=int, default=64, help="on each GPU in an optimizer step")
    parser.add_argument("--prompts", type=int, default=256, help="on each GPU in an iteration")
    parser.add_argument("--row-tokens", type=int, help="default: 12,288 for the 1B; for the 8B 6,912, iterations 6,144")
    parser.add_argument("--hsdp-from", type=int, default=4, help="GPUs from which HSDP is measured too; 0: not at all")
    parser.add_argument("--strong", action="store_true", help="also --pairs over all GPUs together")
    parser.add_argument("--step-options", default="", help="of training_step.py: --step-options=--keep-gathered")
    parser.add_argument("--generator", choices=("vllm", "embedded"), default="vllm")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: the system's folder for such files")
    parser.add_argument("--limit-seconds", type=float, default=3600.0, help="for one run")
    parser.add_argument("--retry", action="store_true", help="repeat the runs that failed")
    args = parser.parse_args(arguments)
    here = torch.cuda.device_count() if args.device != "cpu" else max(GPUS)
    if here == 0:
        parser.error("this host has no GPU. Give --device cpu to see whether the command runs.")
    counts = (
        [int(n) for n in args.gpus] if args.gpus else [n for n in GPUS if n <= (here if args.device != "cpu" else 1)]
    )
    if max(counts) > here:
        parser.error(f"--gpus {max(counts)}: this host has {here}.")
    args.gpus = counts
    return args


def main() -> None:
    """Measures and prints the tables."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run that is under way is ended too
    print(scaling_section([measure(parse_args())]), flush=True)


if __name__ == "__main__":
    main()
