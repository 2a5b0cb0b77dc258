"""What stands around the training step, against peers: reference pass, generation, a whole iteration of self-play."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from arms import ARMS
from generation import generate_in_batches
from peer_arms import Ours, Peer, PeerBench
from peer_trl import REFERENCES, TRL, TRLBf16WithVLLM, TRLTuned, TRLWithVLLM, preference_data
from rounds import attempt, free, race, spread
from torch._dynamo.utils import calculate_time_spent
from work import hf_twin

from spin.data import Pair, PairStore, Response
from spin.reference.stage import score_batches

HERE = Path(__file__).parent
BATCHES = 4  # global batches of the reference pass
PASS_SIZES = (8, 16, 32, 64)  # pairs of a padded batch; the fastest is TRL's tuned one
PASS_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-3}  # deviation of summed log-probs, a fraction of them
TRL_ARMS: dict[str, type[TRL]] = {"trl": TRL, "trl_tuned": TRLTuned}
PASS_TITLES = {
    "ours": "this project",
    "trl": "TRL's precompute_ref_log_probs, default",
    "trl_tuned": "TRL's precompute_ref_log_probs, sorted by length, best batch",
}
ITERATION_PEERS: dict[str, type[Peer]] = {
    "ours": Ours,
    "trl": TRL,
    "trl_tuned": TRLTuned,
    "trl_vllm": TRLWithVLLM,
    "trl_bf16_vllm": TRLBf16WithVLLM,
}
VLLM_SLOTS = 512  # requests that vLLM works on at once
WARM_BATCHES = 2  # global batches that a peer trains on before its epoch is timed
HASH = "hash of the weights"  # a stage that TRL alone has

Logps = list[tuple[float, float]]  # of the real and the generated response of each pair, in nats


# --------------------------------------------------------------------------------------------------- reference pass
def our_pass(bench: PeerBench, pairs: Sequence[Pair]) -> Logps:
    """The product's: the rows of the first epoch, as the recipe passes them."""
    size, arm = bench.args.pairs or bench.preset.pairs, ARMS["long"]
    scored = score_batches(
        bench.model(arm.variant),
        [pairs[start : start + size] for start in range(0, len(pairs), size)],
        bench.world,
        layout=bench.layout.rows(bench.layout.long_row_tokens),
        chunk_tokens=bench.layout.chunk_tokens,
        as_in_training=bench.is_compiled(arm.variant),
    )
    return [(float(pair.reference_real_logp or 0), float(pair.generated[0].reference_logp or 0)) for pair in scored]


class TRLPass:
    """TRL's ``_precompute_ref_logps``; its hash of all weights, by which it caches, is left out.

    Args:
        peer (TRL): whose trainer runs it.
        pairs (Sequence[Pair]): the trainer needs some.
        tuned (bool): pairs sorted by length.
    """

    def __init__(self, peer: TRL, pairs: Sequence[Pair], tuned: bool) -> None:
        self.trainer = peer.trainer(preference_data(pairs[:1]))
        self.tuned = tuned
        self.batch = 8
        self._runs = 0

    def __call__(self, pairs: Sequence[Pair]) -> Logps:
        """Log-probs of both responses, in the order of the pairs."""
        data = preference_data(pairs, references=False)
        order = list(range(len(pairs)))
        if self.tuned:
            order.sort(key=lambda index: -data["length"][index])
            data = data.select(order)
        self._runs += 1
        self.trainer._precompute_model_hash = f"{id(self)} {self._runs}"  # or it would read its cache
        scored = self.trainer._precompute_ref_logps(data, "train", self.batch)
        found: Logps = [(0.0, 0.0)] * len(pairs)
        for index, real, generated in zip(order, *(scored[name] for name in REFERENCES), strict=True):
            found[index] = (real, generated)
        return found


def largest_deviation(found: Logps, expected: Logps) -> float:
    """Of summed log-probs, as a fraction of them."""
    both = zip(torch.tensor(found).flatten().tolist(), torch.tensor(expected).flatten().tolist(), strict=True)
    return max(abs(a - b) / abs(b) for a, b in both)


def reference(bench: PeerBench, names: Sequence[str], failed: dict[str, str]) -> dict[str, Any]:
    """Log-probs of the pairs of some global batches by the policy, which is the opponent then.

    Args:
        bench (PeerBench): gives models and pairs.
        names (Sequence[str]): arms, of ``PASS_TITLES``.
        failed (dict[str, str]): errors by name; gets more.

    Returns:
        dict[str, Any]: the number of pairs, and for each arm its deviation from fp32 and figures of all rounds.
    """
    pairs = [pair for seed in range(BATCHES) for pair in bench.mixed_pairs("short", seed=seed)]
    pairs = [replace(pair, sample_id=str(index)) for index, pair in enumerate(pairs)]
    few = pairs[:8]
    exact = [
        (float(pair.reference_real_logp or 0), float(pair.generated[0].reference_logp or 0))
        for pair in bench.scored(few, bench.exact())
    ]
    passes: dict[str, Callable[[Sequence[Pair]], Logps]] = {}
    deviations: dict[str, float] = {}
    for name in names:
        made = attempt(failed, name, lambda name=name: _checked_pass(bench, name, few, exact, deviations))  # type: ignore[misc]
        if isinstance(made, TRLPass) and made.tuned:
            attempt(failed, name, lambda made=made: _choose_batch(bench, made, pairs))  # type: ignore[misc]
        if made is not None:
            passes[name] = made

    def turn_of(run: Callable[[Sequence[Pair]], Logps]) -> Callable[[bool], dict[str, float]]:
        def turn(first: bool) -> dict[str, float]:
            if first:
                run(pairs)
            return {"seconds": bench.seconds(lambda: run(pairs))}

        return turn

    runs = race({name: turn_of(run) for name, run in passes.items()}, bench.args.rounds, failed)
    runs |= {name: {"error": failed[name]} for name in names if name in failed}
    for name, run in runs.items():
        run["title"] = PASS_TITLES[name]
        if "error" not in run:
            run |= {"logps_deviation": deviations[name], "batch": getattr(passes[name], "batch", None)}
            run["pairs_per_second"] = len(pairs) / run["seconds"]["median"]
    return {"pairs": len(pairs), "arms": runs}


def _checked_pass(
    bench: PeerBench, name: str, few: Sequence[Pair], exact: Logps, deviations: dict[str, float]
) -> Callable[[Sequence[Pair]], Logps]:
    """An arm's pass, after its log-probs of a few pairs were held against those in fp32."""
    made: Any = None
    if name == "ours":

        def made(pairs: Sequence[Pair]) -> Logps:
            return our_pass(bench, pairs)
    else:
        made = TRLPass(TRL_ARMS[name](bench), few, tuned=name != "trl")
    deviations[name] = largest_deviation(made(few), exact)
    if not deviations[name] < PASS_LIMITS[bench.compute_dtype]:
        raise RuntimeError(f"log-probs are off by {deviations[name]:.1e} of those in fp32")
    return made


def _choose_batch(bench: PeerBench, run: TRLPass, pairs: Sequence[Pair]) -> None:
    """Leaves the pass with the fastest size of a batch that fits."""
    seconds: dict[int, float] = {}
    for size in PASS_SIZES:
        run.batch = size
        try:
            run(pairs)
            seconds[size] = bench.seconds(lambda: run(pairs))
        except torch.OutOfMemoryError:
            free()
            break
    run.batch = min(seconds, key=seconds.__getitem__) if seconds else PASS_SIZES[0]


# ---------------------------------------------------------------------------------------------------- other scripts
def run_script(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The results of another benchmark, run in a process of its own: vLLM's engine keeps memory, and sets a process up.

    Args:
        script (str): of this folder.
        arguments (Sequence[str]): of its command line, without ``--out``.

    Returns:
        dict[str, Any]: what it writes.

    Raises:
        RuntimeError: If it fails.
    """
    free()
    environment = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}
    with tempfile.TemporaryDirectory(prefix="spin-peers-") as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, str(HERE / script), *arguments, "--out", str(out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"benchmarks/{script} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
        return json.loads(out.read_text(encoding="utf-8"))


def generation(args: Any) -> dict[str, Any]:
    """benchmarks/generation.py with every engine that is installed; responses have the lengths that are asked for."""
    command = ["--model", args.model or "llama3_2_1b", "--rounds", str(args.rounds), "--arms", args.engines]
    command += ["--requests", str(args.prompts)]
    return run_script("generation.py", [*command, *(["--device", args.device] if args.device else [])])


# -------------------------------------------------------------------------------------------------- whole iteration
def our_iterations(bench: PeerBench, args: Any) -> tuple[list[dict[str, Any]], list[Pair]]:
    """Stages of the recipe's iterations, run by benchmarks/iteration.py, and the pairs of the last one.

    The first iteration compiles and starts the generator's engine; those after it count, one for each round, without
    the seconds that they still compile.

    Args:
        bench (PeerBench): gives model and device.
        args (Any): of the command line.

    Returns:
        tuple[list[dict[str, Any]], list[Pair]]: seconds by stage of each iteration that counts, and the pairs.
    """
    with tempfile.TemporaryDirectory(prefix="spin-peers-") as parent:
        folder = Path(parent) / "work"
        command = ["--model", bench.args.model, "--folder", str(folder), "--generator", args.generator]
        command += ["--device", bench.world.device.type, "--prompts", str(args.prompts)]
        command += ["--batch", str(bench.args.pairs or bench.preset.pairs), f"max_iterations={args.rounds + 1}"]
        if bench.on_gpu:
            command += [f"pairs.row_tokens={bench.layout.long_row_tokens}"]
            command += ["generator.batch_size=auto"] if args.generator == "embedded" else []
        found = run_script("iteration.py", command)
        stages = []
        for iteration in range(1, args.rounds + 1):
            rows = {row["stage"]: row["seconds"] for row in found["stages"] if row["iteration"] == iteration}
            compiling = found["starts"]["compiling"][iteration]
            kinds = {"generate": "generate", "score": "reference log-probs", "train": "train"}
            stages.append({stage: rows[stage] - compiling.get(kind, 0.0) for kind, stage in kinds.items()})
        store = PairStore.open(folder / "run" / f"iteration_{args.rounds:03d}" / "pairs")
        return stages, [_fitting(pair, bench.sizes.vocab_size) for pair in store.pairs()]


def _fitting(pair: Pair, vocab_size: int) -> Pair:
    """The pair for a model that has fewer tokens than the tokenizer; only the tests' tiny one has."""
    prompt, real = pair.prompt_ids % vocab_size, pair.real_ids % vocab_size
    response = replace(pair.generated[0], token_ids=pair.generated[0].token_ids % vocab_size)
    return replace(pair, prompt_ids=prompt, real_ids=real, generated=[response])


@contextmanager
def hashing(instead: str | None) -> Iterator[list[float]]:
    """Seconds of TRL's hash of all weights, by which it finds log-probs of the same data and weights again.

    Args:
        instead (str | None): a hash to take without computing one.

    Yields:
        list[float]: of each hash that was computed.
    """
    from trl.trainer import dpo_trainer

    whole, seconds = dpo_trainer.hash_module, []

    def timed(module: Any) -> str:
        if instead is not None:
            return instead
        began = time.perf_counter()
        try:
            return str(whole(module))
        finally:
            seconds.append(time.perf_counter() - began)

    dpo_trainer.hash_module = timed
    try:
        yield seconds
    finally:
        dpo_trainer.hash_module = whole


class PeerIteration:
    """Responses by another engine, then reference log-probs and an epoch by TRL's trainer.

    Args:
        bench (PeerBench): gives weights and device.
        pairs (Sequence[Pair]): for whose prompts is generated, as many tokens as their responses have.
    """

    def __init__(self, bench: PeerBench, pairs: Sequence[Pair]) -> None:
        self.bench, self.pairs = bench, pairs

    @cached_property
    def model(self) -> Any:
        """transformers' model that generates."""
        return hf_twin(self.bench.model("compiled"), self.bench.compute_dtype, self.bench.world.device).eval()

    @cached_property
    def engines(self) -> Any:
        """vLLM, in a process of its own, as ``vllm.LLM`` has it; random weights of its own write as fast."""
        from vllm_arms import Engines, at_its_best

        engine = at_its_best(VLLM_SLOTS) if self.bench.on_gpu else {"max_num_seqs": 4}
        return Engines(SimpleNamespace(model=self.bench.model("compiled"), on_gpu=self.bench.on_gpu), engine)

    def responses(self, writer: str, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs with responses of their own."""
        prompts = [pair.prompt_ids.tolist() for pair in pairs]
        limits = [len(pair.generated[0].token_ids) for pair in pairs]
        if writer == "vLLM":
            written = self.engines.ask((prompts, limits, False))
        else:
            written = generate_in_batches(self.model, prompts, limits, do_sample=True)
        return [
            replace(pair, generated=[Response(torch.tensor(ids).numpy(), "length")])
            for pair, ids in zip(pairs, written, strict=True)
        ]

    def learn(self, peer: TRL, pairs: Sequence[Pair], warm: bool = True) -> dict[str, float]:
        """Seconds of the trainer's start, which hashes the weights and scores the pairs, and of an epoch over them.

        Args:
            peer (TRL): whose trainer it is.
            pairs (Sequence[Pair]): without log-probs of the reference.
            warm (bool): not the first time. Before, weights are not hashed.

        Returns:
            dict[str, float]: by stage.
        """
        batch = self.bench.args.pairs or self.bench.preset.pairs
        size = min(peer.micro_batch or 1, batch)
        options = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": batch // size,
            "num_train_epochs": 1,
        }
        made: list[Any] = []
        data = preference_data(pairs, references=False)
        with hashing(None if warm else str(time.perf_counter())) as hashed:
            scored = self._seconds(lambda: made.append(peer.trainer(data, **options)))
        (trainer,) = made
        if warm:
            trainer.train()  # layers meet the batches' lengths, and are compiled
        trained = self.bench.seconds(trainer.train)  # the same batches
        peer.forget()
        del trainer
        made.clear()
        free()  # the optimizer's states
        return {HASH: sum(hashed), "reference log-probs": scored - sum(hashed), "train": trained}

    def _seconds(self, function: Callable[[], Any]) -> float:
        """Of a function, without compilation."""
        compiled = calculate_time_spent()["total_wall_time"]
        seconds = self.bench.seconds(function)
        return seconds - (calculate_time_spent()["total_wall_time"] - compiled)

    def close(self) -> None:
        """Ends vLLM, whose memory the trainer gets."""
        if "engines" in vars(self):
            self.engines.close()
            del self.engines


def iteration(
    bench: PeerBench,
    args: Any,
    names: Sequence[str],
    failed: dict[str, str],
    on_arm: Callable[[dict[str, Any]], None] = lambda section: None,
) -> dict[str, Any]:
    """Whole iterations, warm: responses to all prompts, reference log-probs, one epoch.

    The product's run first, in a process of their own, because its engine keeps memory; peers then generate for the
    same prompts, responses as long as its own were, and learn from these pairs, one peer after another. Before, each
    learns from some of them, which compiles; what is compiled later is left out of all times. vLLM ends when it has
    written, so that all of the GPU's memory is TRL's; its sleep and wake are not counted.

    Args:
        bench (PeerBench): gives model and device.
        args (Any): of the command line.
        names (Sequence[str]): arms, of ``ITERATION_PEERS``.
        failed (dict[str, str]): errors by name; gets more.
        on_arm (Callable[[dict[str, Any]], None]): gets what is returned, as it is after each arm.

    Returns:
        dict[str, Any]: numbers of prompts and tokens, and for each arm the seconds of every stage and their sum.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    rows["ours"], pairs = our_iterations(bench, args)
    lengths = [len(pair.generated[0].token_ids) for pair in pairs]

    def section() -> dict[str, Any]:
        arms: dict[str, dict[str, Any]] = {}
        for name in (name for name in names if name in rows or name in failed):
            kind = ITERATION_PEERS[name]
            arms[name] = {"title": f"{kind.writer}, {kind.title}" if issubclass(kind, TRL) else kind.title}
            if name in failed:
                arms[name]["error"] = failed[name]
            else:
                totals = [sum(row.values()) for row in rows[name]]
                arms[name]["stages"] = {stage: spread([row[stage] for row in rows[name]]) for stage in rows[name][0]}
                arms[name]["seconds"] = spread(totals)
        return {"prompts": len(pairs), "generated_tokens": sum(lengths) / len(lengths), "arms": arms}

    on_arm(section())
    peers = PeerIteration(bench, pairs)
    written: dict[str, tuple[list[Pair], list[float]]] = {}  # by engine: the last responses, seconds of each round

    def write(writer: str) -> None:
        if writer not in written:
            peers.responses(writer, pairs[:8])  # waits for vLLM
            found: list[list[Pair]] = []
            seconds = [bench.seconds(lambda: found.append(peers.responses(writer, pairs))) for _ in range(args.rounds)]
            written[writer] = found[-1], seconds
            peers.close()

    def measured(kind: Any) -> list[dict[str, float]]:
        write(kind.writer)
        own, seconds = written[kind.writer]
        peer = kind(bench)
        peers.learn(peer, pairs[: WARM_BATCHES * (bench.args.pairs or bench.preset.pairs)], warm=False)
        # in another order each time, or TRL would find its reference log-probs in its cache
        learnt = [peers.learn(peer, own[i:] + own[:i]) for i in range(args.rounds)]
        return [{"generate": s, **row} for s, row in zip(seconds, learnt, strict=True)]

    for name in (name for name in names if name != "ours"):
        found = attempt(failed, name, lambda name=name: measured(ITERATION_PEERS[name]))  # type: ignore[misc]
        if found is not None:
            rows[name] = found
        on_arm(section())
        free()
    peers.close()
    return section()
