"""Whole iterations of self-play by the recipe: seconds and GPU memory of every stage.

    python benchmarks/iteration.py --model tiny                                   # on a CPU: does it run?
    python benchmarks/iteration.py --generator vllm --out results.json            # one GPU, Llama 3.2 1B shapes
    python benchmarks/iteration.py --generator embedded --prompts 512
    torchrun --nproc_per_node 2 benchmarks/iteration.py --generator vllm
    python benchmarks/iteration.py --model llama3_1_8b --config benchmarks/configs/llama3_1_8B_qlora.yaml  # adapters

Weights are random; prompts and real responses are pieces of the quickstart's text, of log-normal lengths (199 and 278
tokens on average). A random model does not end its responses: each has all tokens that sampling.max_new_tokens allows,
256. Two iterations of one epoch run; the second one is warm (layers compiled, engine started, optimizer state there).

Memory is what the whole device has in use, polled while a stage runs, whoever holds it: vLLM's does not come from
torch's pool. Beside it stands the most that torch's own allocator had given out, which is what tensors need. Under
torchrun seconds are those of rank 0, peaks those of the fullest rank; --out has every rank's. States and exported
models are not written unless --save is given; --save-last writes those of the last iteration alone, for small disks.

"imports" are what passes from the process's start to the command's own work. The table of starts sums up what a user
waits for: from the process's start to the end of iteration 0, without the making of model and data, against iteration
1, seconds of torch.compile by stage, and how many programs torch's cache had. TORCHINDUCTOR_CACHE_DIR and
TRITON_CACHE_DIR=<an empty folder> make a cold start, the same command again a warm one (with --folder removed and
--model-folder kept). --iterations 1 stops after the first.

The last line compares training with the arithmetic that the pairs need at least; frozen weights need none for
gradients of their own. It takes the median step of the last iteration.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rounds import free
from spin_recipe import SPINRecipe
from torch._dynamo.utils import counters
from transformers import AutoTokenizer
from work import MIXES, MODELS, Sizes, floor_of_work, llama_config, log_normal_lengths, randomize

from spin.config import SPINConfig, complete, load_config
from spin.core.files import write_json
from spin.core.ranks import World, gather_objects, init_world, shutdown
from spin.model.build import build_model
from spin.model.hf import export_hf
from spin.model.sharding import materialize, shard_model
from spin.pairs.store import PairStore

GIB = 2**30
REPO = Path(__file__).resolve().parents[1]
TOKENIZER = REPO / "tests" / "assets" / "tiny_lm"
TEXT = REPO / "examples" / "quickstart" / "jargon_train.jsonl"
TOKENIZER_TOKENS = 1024
POLL_SECONDS = 0.02
MEMORY = ("peak_gib", "tensors_gib", "after_gib")


class Stages:
    """Seconds and peak memory by iteration and stage."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.iteration = -1  # before the first one
        self.spans: list[list[float]] = []  # when each iteration began and ended

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a block and adds it to the stage of this name in the current iteration."""
        row = next((r for r in self.rows if (r["iteration"], r["stage"]) == (self.iteration, name)), None)
        if row is None:
            row = {"iteration": self.iteration, "stage": name, "seconds": 0.0} | dict.fromkeys(MEMORY, 0.0)
            self.rows.append(row)
        done, peak = threading.Event(), [_used_gib()]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

        def poll() -> None:
            while not done.wait(POLL_SECONDS):
                peak.append(max(peak.pop(), _used_gib()))

        watcher = threading.Thread(target=poll, daemon=True)
        watcher.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                row["tensors_gib"] = max(row["tensors_gib"], torch.cuda.max_memory_allocated() / GIB)
            row["seconds"] += time.perf_counter() - start
            done.set()
            watcher.join()
            row["after_gib"] = _used_gib()
            row["peak_gib"] = max(row["peak_gib"], peak[0], row["after_gib"])


def _used_gib() -> float:
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / GIB


class Staged:
    """A recipe's stages, watched; mixed into the recipe as it is.

    Args:
        cfg (DictConfig): complete.
        stages (Stages): where the figures go.
        saved (range): iterations after which a checkpoint and an exported model are written.
    """

    def __init__(self, cfg: DictConfig, stages: Stages, saved: range) -> None:
        super().__init__(cfg)  # type: ignore[call-arg]
        self.stages, self.saved = stages, saved

    def setup(self) -> None:
        """Weights, optimizer, engine."""
        with self.stages.stage("start"):
            super().setup()  # type: ignore[misc]

    def augment_dataloader(self, iteration: int) -> Any:
        """Begins an iteration's rows."""
        self.stages.iteration = iteration
        self.stages.spans.append([time.perf_counter()])
        return super().augment_dataloader(iteration)  # type: ignore[misc]

    def _play(self, *args: Any, **kwargs: Any) -> None:
        with self.stages.stage("generate"):
            super()._play(*args, **kwargs)  # type: ignore[misc]

    def _score(self, *args: Any, **kwargs: Any) -> None:
        with self.stages.stage("reference log-probs"):
            super()._score(*args, **kwargs)  # type: ignore[misc]

    def train_single_step(self, *args: Any, **kwargs: Any) -> Any:
        """A step of the stage `train`."""
        with self.stages.stage("train"):
            return super().train_single_step(*args, **kwargs)  # type: ignore[misc]

    def _finish_iteration(self, iteration: int) -> None:
        if iteration in self.saved:
            with self.stages.stage("save and export"):
                super()._finish_iteration(iteration)  # type: ignore[misc]
                self._checkpointer.wait()  # type: ignore[attr-defined]
        self.stages.spans[-1].append(time.perf_counter())


class StagedRecipe(Staged, SPINRecipe):
    """Full fine-tuning, or adapters."""


def make_model(folder: Path, target: Path, preset: Any, device: str | None) -> None:
    """A Hugging Face folder of random weights, with the test model's tokenizer; ``folder`` holds what is no weight."""
    world = init_world(device)
    is_shape = "path" in preset.builder
    model: Any = build_model(OmegaConf.create(preset.builder), torch.float32)
    shard_model(model, world, compute_dtype=torch.float32)
    materialize(model, world)
    randomize(model, world)
    if world.is_main:
        folder.mkdir(parents=True)
        if is_shape:
            shutil.copy(Path(preset.builder["path"]) / "config.json", folder)
        else:
            llama_config(model).save_pretrained(folder)
        for file in TOKENIZER.glob("tokenizer*"):
            shutil.copy(file, folder)
        fill_vocabulary(folder / "tokenizer.json", model.tok_embeddings.num_embeddings)
    torch.distributed.barrier()
    export_hf(model, folder, target, "HF" if is_shape else "LLAMA3_2", dtype=torch.bfloat16, world=world)


def fill_vocabulary(file: Path, size: int) -> None:
    """Gives every row of the embeddings a token: a random model draws them all, and none may be unknown."""
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    taken = {*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocab |= {f"<unused_{number}>": number for number in range(size) if number not in taken}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


def make_data(file: Path, num: int, share: float) -> None:
    """Conversations of random pieces of the quickstart's text."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
    text = " ".join(row["messages"][-1]["content"] for row in rows)
    stream = tokenizer(text, add_special_tokens=False)["input_ids"]
    rng = np.random.default_rng(0)
    prompts, responses, _ = (log_normal_lengths(max(8, mean * share), num, rng) for mean in MIXES["short"])

    def piece(length: int) -> str:
        start = int(rng.integers(0, len(stream) - length))
        return tokenizer.decode(stream[start : start + length])

    with file.open("w", encoding="utf-8") as out:
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            messages = [
                {"role": "user", "content": piece(int(prompt))},
                {"role": "assistant", "content": piece(int(response))},
            ]
            out.write(json.dumps({"id": str(i), "messages": messages}) + "\n")


def make_config(args: argparse.Namespace, folder: Path, model_folder: Path, preset: Any, on_gpu: bool) -> DictConfig:
    """A packaged config, with this model's weights, these data and this generator."""
    is_shape = "path" in preset.builder
    name = args.config or ("full" if is_shape else str(Path(__file__).parent / "configs" / "llama3_2_1B_full.yaml"))
    overrides = [f"{'model' if is_shape else 'tokenizer'}.path={model_folder}"]
    overrides += [] if is_shape else [f"checkpointer.checkpoint_dir={model_folder}"]
    overrides += [
        f"output_dir={folder / 'run'}", f"dataset.source={folder / 'data.jsonl'}", "dataset.split=null",
        "dataset.limit=null", "validation_dataset=null", f"max_iterations={args.iterations}", "max_epochs=1",
        "dataset.on_long_prompt=cut", "dataset.on_long_response=cut",
        f"sampling.max_new_tokens={max(8, round(256 * preset.lengths))}", f"global_batch_size={args.batch}",
    ]  # fmt: skip
    if args.generator == "vllm":
        overrides += [
            "generator=spin.generators.VLLMGenerator",
            *([] if is_shape else ["~generator.batch_size"]),
            "generator.max_model_len=2048",
        ]
    if not on_gpu:
        overrides += ["device=cpu", "compute_dtype=fp32", "compile=false"]
        overrides += [f"pairs.row_tokens={4 * preset.row_tokens}"]  # masks are dense here
        if args.generator == "vllm":
            overrides += ["generator.dtype=fp32", "generator.enforce_eager=true", "generator.max_model_len=512"]
            overrides += ["generator.engine.kv_cache_memory_bytes=67108864"]
    raw = load_config(name, [*overrides, *args.overrides])
    if raw.get("base_dtype") is None and not is_shape:
        raw.model = OmegaConf.create(preset.builder)
    return complete(raw, SPINConfig)


def age() -> float:
    """Seconds since this process was started."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def starts(stages: Stages, before: float, metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What came before iteration 0, whole iterations, and compilation, in seconds; two ratios of them."""
    compiling: list[dict[str, float]] = [{} for _ in stages.spans]
    for row in metrics:
        for name in (name for name in row if name.startswith("compile_time/")):
            own = compiling[row.get("iteration", 0)]
            own[name.partition("/")[2]] = own.get(name.partition("/")[2], 0.0) + row[name]
    whole = [end - begin for begin, end in stages.spans]
    seconds = {(row["iteration"], row["stage"]): row["seconds"] for row in stages.rows}
    found = {
        "before iteration 0": before,
        "iterations": whole,
        "compiling": compiling,
        "program cache": {
            name: count
            for kind in ("aot_autograd", "inductor")
            for name, count in counters[kind].items()
            if "cache" in name
        },
        "reference pass / epoch": [
            seconds[i, "reference log-probs"] / seconds[i, "train"] for i in range(len(stages.spans))
        ],
    }
    if len(whole) > 1:
        found["iteration 0 from the process's start / iteration 1"] = (before + whole[0]) / whole[1]
    return found


def with_every_rank(rows: list[dict[str, Any]], world: World) -> None:
    """Puts every rank's peak of memory into rank 0's rows, and the highest in the place of its own. Collective."""
    for row, ranks in zip(rows, zip(*gather_objects(rows, world), strict=True), strict=True):
        row["peak_gib_by_rank"] = [other["peak_gib"] for other in ranks]
        for peak in MEMORY:
            row[peak] = max(other[peak] for other in ranks)


def against_floor(
    folder: Path, sizes: Sizes, step_seconds: Sequence[float], frozen: bool, ranks: int
) -> dict[str, Any]:
    """Training speed of an iteration of one epoch, from its pairs and its median step: a row length that comes for the
    first time is compiled."""
    pairs = list(PairStore.open(folder / "pairs").pairs())
    seconds = statistics.median(step_seconds) * len(step_seconds)
    work = floor_of_work(sizes, pairs, frozen=frozen)
    return {
        "pairs_per_second": len(pairs) / seconds,
        "floor_tflops_per_gpu": work / seconds / ranks / 1e12,
        "step_seconds": list(step_seconds),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown.

    Args:
        results (dict[str, Any]): what ``--out`` holds.

    Returns:
        str: a line on the machine, and a row for every stage.
    """
    setup = results["setup"]
    lines = [
        f"{setup['devices']} x {setup['device']}, torch {setup['torch']}, {setup['model']}, generator "
        f"{setup['generator']}; {setup['prompts']} prompts, {setup['generated_tokens']:.0f} generated tokens each.",
        "",
        "| iteration | stage | seconds | peak GiB | of it tensors | GiB afterwards |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["stages"]:
        iteration = "-" if row["iteration"] < 0 else row["iteration"]
        lines.append(
            f"| {iteration} | {row['stage']} | {row['seconds']:.1f} | {row['peak_gib']:.1f} | {row['tensors_gib']:.1f} "
            f"| {row['after_gib']:.1f} |"
        )
    for name, value in results.get("starts", {}).items():
        lines.append(f"\n{name}: {json.dumps(value, default=str)}")
    speed = results["training"]
    lines += [
        "",
        f"Training, median step: {speed['pairs_per_second']:.1f} pairs/s, {speed['floor_tflops_per_gpu']:.0f} TFLOP/s "
        "of needed work a GPU.",
    ]
    return "\n".join(lines)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, or ``arguments`` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--model", choices=MODELS, default="llama3_2_1b")
    parser.add_argument("--model-folder", type=Path, help="where the model is kept, or taken from if it is there")
    parser.add_argument("--config", help="one that fits --model; default: configs/llama3_2_1B_full.yaml, or full")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--generator", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="global_batch_size")
    parser.add_argument("--save", action="store_true", help="write checkpoints and exported models, as a stage")
    parser.add_argument("--save-last", action="store_true", help="the same after the last iteration alone")
    parser.add_argument("--folder", type=Path, help="a new one to work in, which is kept; default: one that is removed")
    parser.add_argument("overrides", nargs="*", help="of the config, key=value")
    return parser.parse_args(arguments)


def main() -> None:
    """Makes model and data, runs the recipe, prints."""
    args, imports = parse_args(), age()
    if args.generator == "embedded":  # vLLM's memory cannot be had back with it
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    preset = MODELS[args.model]
    if preset.builder.get("vocab_size", TOKENIZER_TOKENS) < TOKENIZER_TOKENS:
        preset = replace(preset, builder={**preset.builder, "vocab_size": TOKENIZER_TOKENS})
    folder = args.folder or Path(tempfile.gettempdir()) / "spin-iteration"
    world = init_world(args.device)
    prepared = time.perf_counter()
    if world.is_main:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make_data(folder / "data.jsonl", args.prompts, preset.lengths)
    torch.distributed.barrier()
    model_folder = args.model_folder or folder / "model"
    if not (model_folder / "config.json").exists():
        make_model(folder / "source", model_folder, preset, args.device)
    prepared = time.perf_counter() - prepared  # model and data, which a user has
    stages = Stages()
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        free()  # of the model whose weights were made
    cfg = make_config(args, folder, model_folder, preset, on_gpu)
    is_lora = cfg.base_dtype is not None
    last = cfg.max_iterations - 1
    saved = range(0 if args.save else last, last + 1 if args.save or args.save_last else 0)
    recipe: Any = StagedRecipe(cfg, stages, saved)
    stages.rows.append({"iteration": -1, "stage": "imports", "seconds": imports} | dict.fromkeys(MEMORY, 0.0))
    recipe.setup()
    before = age() - prepared
    recipe.train()
    if len(stages.spans[-1]) == 1:
        raise SystemExit("The run was stopped before its last iteration ended; nothing is written.")
    with_every_rank(stages.rows, world)
    sizes = Sizes.of(build_model(OmegaConf.create(preset.builder), torch.float32))
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    results = {
        "setup": {
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "devices": world.world_size,
            "torch": torch.__version__,
            "model": args.model,
            "generator": args.generator,
            "config": args.config,
            "overrides": args.overrides,
            "prompts": args.prompts,
            "batch": args.batch,
            "generated_tokens": sum(row["avg_generated_lengths"] for row in metrics) / len(metrics),
            "logprob_gap": [row[name] for row in metrics for name in row if name == "generator/logprob_gap"],
            "first_losses": [
                next(row["loss"] for row in metrics if row["iteration"] == i) for i in range(cfg.max_iterations)
            ],
        },
        "stages": stages.rows,
        "starts": starts(stages, before, metrics),
        "training": against_floor(
            folder / "run" / f"iteration_{last:03d}",
            sizes,
            [row["step_time"] for row in metrics if row["iteration"] == last and "step_time" in row],
            is_lora,
            world.world_size,
        ),
    }
    if world.is_main:
        print(table(results), flush=True)
        print(f"first losses {results['setup']['first_losses']}, gap {results['setup']['logprob_gap']}")
        if args.out:
            write_json(args.out, results)
    recipe.cleanup()
    if args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    shutdown()


if __name__ == "__main__":
    main()
