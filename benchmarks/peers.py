"""This project against what a user would take instead, side by side: same GPU, same pairs, same precision.

    python benchmarks/peers.py step --model tiny --rounds 1                   # on a CPU: does it run?
    python benchmarks/peers.py step --mixes short --out step_short.json       # one GPU, Llama 3.2 1B shapes
    python benchmarks/peers.py reference --out reference.json
    python benchmarks/peers.py generation --out generation.json
    python benchmarks/peers.py iteration --out iteration.json
    python benchmarks/peers.py lora8b --out lora8b.json                       # one GPU of 141 GB, Llama 3.1 8B shapes

Parts are measured by themselves, so that several GPUs can share them; benchmarks/page.py makes tables and a plot of the
files. Arms (benchmarks/peer_arms.py, peer_trl.py, peer_lora.py) train the same weights on the same token ids, fp32
weights with bf16 compute on a GPU and all in fp32 on a CPU. Before an arm is timed, its loss, gradient norm and, where
they can be compared, all its gradients are held against torchtune's padded forward in fp32: an arm that computes
something else is not timed. Arms take turns in every round. An arm that fails (out of memory, say) is recorded with its
error, one that cannot run here with the reason, and the others continue.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # arms of many shapes share a GPU

import torch
from peer_arms import PLAIN_PEERS, Padded, Peer, PeerBench
from peer_lora import LORA_PEERS, LoRABench
from peer_passes import ITERATION_PEERS, PASS_TITLES, generation, iteration, reference
from peer_trl import TRL_PEERS
from rounds import Figures, attempt, free, race
from training_step import ceilings
from training_step import parse_args as training_arguments
from work import MIXES, MODELS, bytes_of, floor_of_work, listed

from spin.core.files import write_json
from spin.core.packages import installed_version
from spin.core.ranks import shutdown
from spin.data import Pair

GIB = 2**30
PARTS = ("step", "reference", "generation", "iteration", "lora8b")
PEERS: dict[str, type[Peer]] = {**PLAIN_PEERS, **TRL_PEERS}
NOT_BY_DEFAULT = ("trl_torch_compile",)  # takes minutes to compile
ENGINES = "embedded,embedded_64,transformers,transformers_cb,vllm,vllm_bare"  # see benchmarks/generation.py
CHECKED_PAIRS = 8
# by how much an arm may be off, as fractions: in fp32, and in bf16 where torchtune's own forward is not off by much
DEVIATIONS = ("loss_deviation", "grad_norm_deviation", "gradient_deviation")
FP32_LIMITS = (1e-5, 1e-5, 1e-4)
BF16_LIMITS = (0.05, 0.05, 0.1)
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "liger_kernel", "torchtune", "vllm")


# ------------------------------------------------------------------------------------------------------------ step
def turn_of(bench: PeerBench, peer: Peer, pieces: Sequence[Any], num_pairs: int) -> Callable[[bool], Figures]:
    """A turn of the training step: forward and backward of a global batch, then clipping and AdamW.

    An untimed step comes before the timed one; after the first turn, of one piece alone.
    """

    def turn(first: bool) -> Figures:
        with peer.ready():
            held = _allocated(bench)
            try:
                peer.forward_backward(pieces if first else pieces[:1], num_pairs)
                peer.optimizer_step()
                if bench.on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                both = bench.seconds(lambda: peer.forward_backward(pieces, num_pairs))
                rest = bench.seconds(peer.optimizer_step)
                figures = {"forward_backward": both, "step": both + rest}
                if bench.on_gpu:
                    own = sum(bytes_of(module) for module in peer.modules())
                    figures["peak_gib"] = (torch.cuda.max_memory_allocated() - held + own) / GIB
                return figures
            finally:
                peer.forget()

    return turn


def _allocated(bench: PeerBench) -> int:
    return torch.cuda.memory_allocated() if bench.on_gpu else 0


def check(bench: PeerBench, peers: dict[str, Peer], failed: dict[str, str]) -> dict[str, dict[str, float]]:
    """Loss and gradient of every arm against torchtune's padded forward in fp32; who is off fails.

    What bf16 costs grows with the depth of a random model. Where torchtune's own forward in bf16 is off by more than a
    third of a limit, the limit is three times that.

    Args:
        bench (PeerBench): gives pairs and weights.
        peers (dict[str, Peer]): the arms.
        failed (dict[str, str]): errors by name; gets more.

    Returns:
        dict[str, dict[str, float]]: loss and deviations of every arm, and in bf16 of torchtune's forward, ``bf16``.
    """
    with bench.opponent() as opponent:
        pairs = bench.scored(bench.mixed_pairs("short", CHECKED_PAIRS), opponent)
    del opponent
    free()
    exact = computed(Padded(bench, torch.float32), pairs)
    found: dict[str, dict[str, float]] = {}
    limits = dict(zip(DEVIATIONS, FP32_LIMITS, strict=True))
    if bench.compute_dtype != torch.float32:
        found["bf16"] = deviation(Padded(bench, bench.compute_dtype), pairs, exact)
        limits = {key: max(limit, 3 * found["bf16"][key]) for key, limit in zip(DEVIATIONS, BF16_LIMITS, strict=True)}
    for name, peer in peers.items():
        deviations = attempt(failed, name, lambda peer=peer: deviation(peer, pairs, exact))  # type: ignore[misc]
        if deviations is not None:
            found[name] = deviations
            # NaN is not below a limit either
            if not all(deviations[key] < limit for key, limit in limits.items() if key in deviations):
                failed[name] = f"computes something else than fp32 does: {deviations}"
        free()
    return found


def computed(peer: Peer, pairs: Sequence[Pair]) -> tuple[float, dict[str, torch.Tensor]]:
    """An arm's mean loss and its gradients by name."""
    pieces = peer.lay_out(pairs)
    with peer.ready():
        try:
            loss = float(peer.forward_backward(pieces, len(pairs)))
            return loss, peer.gradients()
        finally:
            peer.forget()


def deviation(peer: Peer, pairs: Sequence[Pair], exact: tuple[float, dict[str, torch.Tensor]]) -> dict[str, float]:
    """How far an arm's loss and gradients are from those in fp32, as fractions of these."""
    (expected_loss, expected), (loss, gradients) = exact, computed(peer, pairs)
    norm, expected_norm = _norm(gradients), _norm(expected)
    found = {
        "loss": loss,
        "loss_deviation": abs(loss - expected_loss) / abs(expected_loss),
        "grad_norm_deviation": abs(norm - expected_norm) / expected_norm,
    }
    if gradients.keys() == expected.keys():
        differences = {name: gradients[name] - wanted for name, wanted in expected.items()}
        found["gradient_deviation"] = _norm(differences) / expected_norm
    return found


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors.values()]).sum().sqrt())


def best_size(bench: PeerBench, peer: Peer, pairs: Sequence[Pair]) -> list[Any]:
    """The pairs laid out for the arm: in batches of its own size, or the next that fits; or of the fastest size."""
    found: list[tuple[float, int]] = []
    for size in peer.sizes(len(pairs)):
        setattr(peer, peer.size_name, size)
        try:
            pieces = peer.lay_out(pairs)
            with peer.ready():
                try:
                    if not peer.as_it_is:  # compile
                        peer.forward_backward(peer.shapes(pieces), len(pairs))
                    seconds = bench.seconds(lambda pieces=pieces: peer.forward_backward(pieces, len(pairs)))
                finally:
                    peer.forget()
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
            found.append((seconds, size))
        free()
        if fits == peer.as_it_is:
            break
    if found:
        setattr(peer, peer.size_name, min(found)[1])
    return peer.lay_out(pairs)


def made(
    kinds: dict[str, type[Peer]], names: Sequence[str], bench: PeerBench, failed: dict[str, str]
) -> dict[str, Peer]:
    """The arms of these names, as far as they can be made."""
    found = {name: attempt(failed, name, lambda name=name: kinds[name](bench)) for name in names}  # type: ignore[misc]
    return {name: peer for name, peer in found.items() if peer is not None}


def step(
    bench: PeerBench,
    peers: dict[str, Peer],
    failed: dict[str, str],
    mix: str,
    until: float = math.inf,
    on_round: Callable[[dict[str, Any]], None] = lambda section: None,
) -> dict[str, Any]:
    """A training step of one global batch by every arm.

    Args:
        bench (PeerBench): gives pairs and clock.
        peers (dict[str, Peer]): the arms.
        failed (dict[str, str]): errors of arms that failed before.
        mix (str): key of ``MIXES``.
        until (float): see :func:`rounds.race`.
        on_round (Callable[[dict[str, Any]], None]): gets what is returned, as it is after each round.

    Returns:
        dict[str, Any]: the work, and for each arm the figures of all rounds or its error.
    """
    pairs, failed = bench.mixed_pairs(mix), dict(failed)  # who fails with one mix may do another
    turns = {}
    for name, peer in peers.items():
        pieces = attempt(failed, name, lambda peer=peer: best_size(bench, peer, pairs))  # type: ignore[misc]
        if pieces is not None:
            turns[name] = turn_of(bench, peer, pieces, len(pairs))
    has_adapters = isinstance(bench, LoRABench)
    work = {
        "pairs": len(pairs),
        "mean_tokens": {
            "prompt": statistics.mean(len(pair.prompt_ids) for pair in pairs),
            "real": statistics.mean(len(pair.real_ids) for pair in pairs),
            "generated": statistics.mean(len(pair.generated[0].token_ids) for pair in pairs),
        },
        "floor_tflop": floor_of_work(bench.sizes, pairs, frozen=has_adapters) / 1e12,
    }
    kinds = LORA_PEERS if has_adapters else PEERS

    def section(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        runs = runs | {name: {"error": error} for name, error in failed.items()}
        for name, run in runs.items():
            run["title"] = kinds[name].title
            if "error" not in run:
                peer = peers[name]
                run["micro_batch"] = None
                run[peer.size_name] = getattr(peer, peer.size_name)
                for key in ("forward_backward", "step"):
                    run[key]["pairs_per_second"] = len(pairs) / run[key]["median"]
        return {**work, "arms": runs}

    return section(race(turns, bench.args.rounds, failed, until, lambda runs: on_round(section(runs))))


# ------------------------------------------------------------------------------------------------------------ main
def versions() -> dict[str, str]:
    """Of the packages that arms come from, where they are installed."""
    return {name: version for name in PACKAGES if (version := installed_version(name)) is not None}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or ``arguments`` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, help="JSON file for the results; one that exists keeps its other sections")
    parser.add_argument("--model", choices=MODELS, help="default: llama3_2_1b, of lora8b llama3_1_8b")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    arms = [*PEERS, *(name for name in ITERATION_PEERS if name not in PEERS)]
    default = [name for name in arms if name not in NOT_BY_DEFAULT]
    parser.add_argument("--arms", type=listed(arms), default=default, help=",".join(arms))
    parser.add_argument("--mixes", type=listed(list(MIXES)), default=["short"], help=",".join(MIXES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further round of step after as many")
    parser.add_argument("--pairs", type=int, help="pairs of a global batch; default: the model's")
    parser.add_argument("--prompts", type=int, default=512, help="of generation and of an iteration")
    parser.add_argument("--generator", choices=("embedded", "vllm"), default="embedded", help="ours, of an iteration")
    parser.add_argument("--engines", default=ENGINES, help=f"of generation; default: {ENGINES}")
    return parser.parse_args(arguments)


def engine_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """Arguments of benchmarks/training_step.py with which the product is what its config for one GPU says."""
    model = args.model or ("llama3_1_8b" if args.part == "lora8b" else "llama3_2_1b")
    command = ["--model", model, "--rounds", str(args.rounds), "--keep-gathered", "--unsharded-gradients"]
    # as long as an H200's memory allows where all weights are trained, which is what `spin new` chooses
    command += ["--long-row-tokens", str(MODELS[model].row_tokens * 3)]
    if args.device:
        command += ["--device", args.device]
    if args.pairs:
        command += ["--pairs", str(args.pairs)]
    return training_arguments(command)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One part of the comparison; what exists is in the file after each section, and after each round of a step.

    Args:
        args (argparse.Namespace): of the command line.

    Returns:
        dict[str, Any]: the results, those of earlier runs in ``--out`` included.

    Raises:
        SystemExit: If the file holds results of another machine, model or version, or under torchrun.
    """
    until = time.monotonic() + 60 * args.minutes
    bench = (LoRABench if args.part == "lora8b" else PeerBench)(engine_arguments(args))
    if bench.world.world_size > 1:
        raise SystemExit("benchmarks/peers.py compares on one GPU. Run it without torchrun.")
    results: dict[str, Any] = {
        "setup": {
            "device": torch.cuda.get_device_name() if bench.on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "versions": versions(),
            "model": bench.args.model,
            "compute_dtype": str(bench.compute_dtype).removeprefix("torch."),
            "rounds": args.rounds,
            "row_tokens": bench.layout.row_tokens if args.part == "lora8b" else bench.layout.long_row_tokens,
        }
    }
    if args.out and args.out.exists():
        setup, results = results["setup"], json.loads(args.out.read_text(encoding="utf-8"))
        if results["setup"] != setup:
            raise SystemExit(f"{args.out} was measured with {results['setup']}, not {setup}. Choose another --out.")

    def keep(section: str, values: Any) -> None:
        results[section] = values
        if args.out:
            write_json(args.out, results)

    keep("ceilings", ceilings(bench))
    failed: dict[str, str] = {}
    if args.part == "generation":
        keep("generation", generation(args))
        return results
    kinds: dict[str, type[Peer]] = {"lora8b": LORA_PEERS, "iteration": ITERATION_PEERS}.get(args.part, PEERS)
    wanted = [name for name in args.arms if name in kinds]
    skipped = {name: reason for name in wanted if (reason := kinds[name].skip_reason(bench.on_gpu))}
    names = [name for name in wanted if name not in skipped]
    if args.part in ("step", "lora8b"):
        section = "step" if args.part == "step" else "lora"
        peers = made(kinds, names, bench, failed)
        keep("check", results.get("check", {}) | check(bench, peers, failed))
        for mix in args.mixes:

            def keep_mix(figures: dict[str, Any], mix: str = mix) -> None:
                keep(section, results.get(section, {}) | {mix: figures})

            keep_mix(step(bench, peers, failed, mix, until, keep_mix))
    elif args.part == "reference":
        keep("reference", reference(bench, [name for name in names if name in PASS_TITLES], failed))
    elif args.part == "iteration":
        keep("iteration", iteration(bench, args, names, failed, partial(keep, "iteration")))
    keep("skipped", results.get("skipped", {}) | skipped)
    return results


def main() -> None:
    """Measures and prints."""
    args = parse_args()
    print(json.dumps(measure(args), indent=1), flush=True)
    shutdown()


if __name__ == "__main__":
    main()
