"""The opponent's responses alone: fills the first store of an iteration, so that other machines can generate.

Takes the same config as spin_recipe and writes `<output_dir>/iteration_NNN/responses`, where spin_recipe, started with
the same config, finds the responses and continues with scoring and training. The iteration is the one that begins at
the newest checkpoint in output_dir (the first, if there is none).

One machine:         tune run spin_generate --config llama3_2/1B_full
One of four:         tune run spin_generate --config llama3_2/1B_full worker=0 num_workers=4
Eight GPUs each:     tune run --nproc_per_node 8 spin_generate --config llama3_2/1B_full worker=0 num_workers=4

Workers share output_dir, or their shards are copied into one folder afterwards; the worker that finds all shards there
seals the store. The same command resumes a worker that was killed, or stopped by a signal or max_time. All workers need
the same config, and without a shared output_dir tokenizer.date where the chat template writes the date. Not here:
scoring and training.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from spin import config
from spin.config import GenerateConfig
from spin.config.checks import check_run
from spin.core.dtypes import torch_dtype
from spin.core.errors import CheckpointError, OutputError
from spin.core.files import FolderLock
from spin.core.ranks import any_rank, check_ranks_agree, init_world, raise_on_all_ranks, shutdown
from spin.core.terminal import get_logger, progress_bar
from spin.data import PromptSource, adapt_tokenizer
from spin.data.dates import fix_date
from spin.data.read import check_vocabulary, unknown_ids
from spin.generators import GeneratorContext, sampling_params, stage
from spin.generators.engines import engine_group, policy_loaded
from spin.model import build_model, prepare_model, weights_fingerprint
from spin.pairs.packing import RowLayout
from spin.pairs.shards import missing_shards, open_store
from spin.reference.generator_check import check_generator_logprobs
from spin.run.plan import RunPlan, check_worker
from spin.run.resume import inputs_of_config, inputs_of_files
from spin.run.stopping import StopRequest, resume_command

log = get_logger("INFO")


class SPINGenerate:
    """Generation without training.

    Args:
        cfg (GenerateConfig): complete and typed.

    Raises:
        ConfigError: If the config cannot work.
    """

    def __init__(self, cfg: GenerateConfig) -> None:
        check_run(cfg)
        check_worker(cfg)
        self._cfg = cfg
        self._stop = StopRequest(cfg.stop_signals, cfg.max_time)

    def setup(self) -> None:
        """Reads the data, then loads the opponent's weights."""
        cfg = self._cfg
        self._world = world = init_world(cfg.device, replicas=cfg.replicas, **inputs_of_config(cfg))
        self._stop.install()
        self._output_dir = Path(cfg.output_dir)
        with raise_on_all_ranks(world, OutputError):  # other workers may be here too, a training run may not
            self._lock = FolderLock(self._output_dir, shared=True) if world.is_main else None
        checkpointer = config.instantiate(cfg.checkpointer)
        checkpointer.validate()
        dtype, compute_dtype = (torch_dtype(name, world.device) for name in (cfg.dtype, cfg.compute_dtype))
        self._model = model = build_model(cfg.model, dtype)
        # --- Data ---
        self._tokenizer = tokenizer = adapt_tokenizer(config.instantiate(cfg.tokenizer))
        fix_date(tokenizer, self._output_dir, world, cfg.resume)
        source: PromptSource = config.instantiate(cfg.dataset, tokenizer=tokenizer, max_seq_len=model.max_seq_len)
        self._sampling = sampling_params(cfg.sampling, tokenizer.eos_ids, unknown_ids(model, tokenizer))
        check_vocabulary(model, tokenizer, self._sampling.stop_token_ids, source)
        check_ranks_agree(inputs_of_files({"dataset": source, "tokenizer": tokenizer}, cfg.checkpointer), world)
        plan = RunPlan(cfg, source)
        # --- The opponent ---
        path = checkpointer.latest(cfg.resume, world)
        self._iteration = 0
        if path is not None:
            progress = checkpointer.read_state(path)["progress"]
            if not progress["is_iteration_start"]:
                raise CheckpointError(
                    f"{path} is inside iteration {progress['iteration']}, whose responses exist. Responses are "
                    "generated at an iteration's start: give such a checkpoint with resume=<path>."
                )
            self._iteration = progress["iteration"]
        prepare_model(model, world, compute_dtype=compute_dtype)
        if path is None:
            checkpointer.load_model(model, world)
        else:
            checkpointer.load(path, model=model, optimizer=None, world=world)
        self._prompts, self._samples = source.window(self._iteration), plan.samples(self._iteration)
        context = GeneratorContext(model, world.device, model.max_seq_len, tokenizer.decode, world)
        self._generator = config.instantiate(cfg.generator, context=context)
        self._group = engine_group(self._generator, world)

    def generate(self) -> None:
        """Makes this worker's missing shards, and seals the store if that completes it."""
        cfg, world, generator = self._cfg, self._world, self._generator
        task = stage.PlayTask(
            self._prompts,
            self._samples,
            self._sampling,
            cfg.seed,
            self._iteration,
            cfg.pairs.responses_per_prompt,
            stage.limits_of(self._model, self._model.max_seq_len, self._tokenizer),
        )
        opponent, model_section = weights_fingerprint(self._model), config.plain(cfg.model)
        fingerprint = stage.play_fingerprint(
            task, opponent, self._tokenizer, generator, cfg.compute_dtype, model_section
        )
        folder = self._output_dir / f"iteration_{self._iteration:03d}" / "responses"
        engines = cfg.num_workers * self._group.count
        num_shards = stage.num_shards(len(self._samples), cfg.pairs.prompts_per_shard, engines)
        store = open_store(folder, fingerprint, num_shards, world)
        own = [shard for shard in missing_shards(store, world) if shard % cfg.num_workers == cfg.worker]
        mine = stage.shards_for_rank(own, store, task, self._group)
        prompts_here = math.ceil(len(self._samples) / engines)
        with (
            progress_bar(f"worker {cfg.worker}", "prompt", prompts_here, enabled=world.is_main) as bar,
            policy_loaded(generator, self._model),
        ):
            check_generator_logprobs(
                generator,
                self._model,
                world,
                self._prompts,
                self._sampling,
                layout=RowLayout(min(cfg.pairs.row_tokens, self._model.max_seq_len)),
                chunk_tokens=cfg.logprob_chunk_tokens,
            )
            with raise_on_all_ranks(world, OutputError):  # inside, each rank makes its shards by itself
                stage.play(
                    store,
                    mine,
                    task,
                    generator,
                    group=self._group,
                    should_stop=lambda: self._stop.is_asked,
                    on_shard=bar.update,
                )
        is_stopped = any_rank(self._stop.is_asked, world)  # waits for all ranks
        if world.is_main:
            missing = store.missing_shards()
            if is_stopped and not set(own).isdisjoint(missing):
                log.info(f"Worker {cfg.worker} stopped; finished shards are kept. Resume with:\n{resume_command()}")
            elif missing:
                log.info(f"Worker {cfg.worker} is done; {len(missing)} of {num_shards} shards are missing in {folder}")
            else:
                store.seal()
                log.info(f"All {num_shards} shards are there: {folder}")

    def cleanup(self) -> None:
        """Closes the generator and the process group, and unlocks the folder."""
        self._generator.close()
        shutdown()
        if self._lock is not None:
            self._lock.release()
        self._stop.release()


@config.parse(GenerateConfig)
def recipe_main(cfg: GenerateConfig) -> None:
    """Runs the recipe; see the head of this file."""
    recipe = SPINGenerate(cfg)
    recipe.setup()
    recipe.generate()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
