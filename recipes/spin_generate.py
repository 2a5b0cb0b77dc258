"""The opponent's answers alone: fills the first store of an iteration, so that other machines can do it.

Takes the same config as spin_recipe and writes `<output_dir>/iteration_NNN/responses`, where spin_recipe, started with
the same config, finds the answers and goes on with scoring and training. The iteration is the one that the newest
checkpoint in output_dir stands before (the first, if there is none).

One machine:         tune run spin_generate --config llama3_2/1B_full
One of four:         tune run spin_generate --config llama3_2/1B_full worker=0 num_workers=4
Eight GPUs each:     tune run --nproc_per_node 8 spin_generate --config llama3_2/1B_full worker=0 num_workers=4

Workers share output_dir, or their shards are copied into one folder afterwards; whoever finds all shards there seals
the store. A worker that was killed, or stopped by a signal or max_time, is started again with the same command and
makes what is missing. All workers need the same config, and without a shared output_dir tokenizer.date where the chat
template writes the date. Not here: scoring and training.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spin import config
from spin.config.checks import check_run
from spin.config.defaults import RECIPE_DEFAULTS
from spin.core.dtypes import torch_dtype
from spin.core.errors import CheckpointError, ConfigError, OutputError
from spin.core.files import FolderLock
from spin.core.ranks import any_rank, check_ranks_agree, init_world, raise_on_all_ranks, shutdown
from spin.core.terminal import get_logger, progress_bar
from spin.data import PromptSource, adapt_tokenizer
from spin.data.dates import fix_date
from spin.data.read import check_vocabulary, unknown_ids
from spin.generators import GeneratorContext, sampling_params
from spin.generators import stage as selfplay
from spin.generators.engines import engine_group, policy_loaded
from spin.model import build_model, prepare_model, weights_fingerprint
from spin.pairs.packing import RowLayout
from spin.pairs.shards import missing_shards, open_store
from spin.reference.generator_check import check_generator_logprobs
from spin.run.plan import RunPlan
from spin.run.resume import inputs_of_config, inputs_of_files
from spin.run.stopping import StopRequest, resume_command

log = get_logger("INFO")

DEFAULTS = RECIPE_DEFAULTS | {"worker": 0, "num_workers": 1}


class SPINGenerate:
    """Generation without training.

    Args:
        cfg (DictConfig): complete, see ``DEFAULTS``.

    Raises:
        ConfigError: If the config cannot work.
    """

    def __init__(self, cfg: DictConfig) -> None:
        check_run(cfg)
        if cfg.num_workers < 1:
            raise ConfigError(f"num_workers={cfg.num_workers}: expected how many machines answer, 1 or more.")
        if type(cfg.worker) is not int or not 0 <= cfg.worker < cfg.num_workers:
            raise ConfigError(f"worker={cfg.worker}: expected 0 to num_workers - 1 = {cfg.num_workers - 1}.")
        self._cfg = cfg
        self._stop = StopRequest(cfg.stop_signals, cfg.max_time)

    def setup(self) -> None:
        """Reads the data, then loads the opponent's weights."""
        cfg = self._cfg
        self._world = init_world(cfg.device, replicas=cfg.replicas, **inputs_of_config(cfg))
        self._stop.install()
        with raise_on_all_ranks(self._world, OutputError):  # other workers may be here too, a training run may not
            self._lock = FolderLock(Path(cfg.output_dir), shared=True) if self._world.is_main else None
        checkpointer = config.instantiate(cfg.checkpointer)
        checkpointer.validate()
        dtype, compute_dtype = (torch_dtype(name, self._world.device) for name in (cfg.dtype, cfg.compute_dtype))
        model = build_model(cfg.model, dtype)
        context = self._context = model.max_seq_len
        self._tokenizer = adapt_tokenizer(config.instantiate(cfg.tokenizer))
        fix_date(self._tokenizer, Path(cfg.output_dir), self._world, cfg.resume)
        source: PromptSource = config.instantiate(cfg.dataset, tokenizer=self._tokenizer, max_seq_len=context)
        unknown = unknown_ids(model, self._tokenizer)
        self._sampling = sampling_params(cfg.sampling, self._tokenizer.eos_ids, unknown)
        check_vocabulary(model, self._tokenizer, self._sampling.stop_token_ids, source)
        read = {"dataset": source, "tokenizer": self._tokenizer}
        check_ranks_agree(inputs_of_files(read, cfg.checkpointer), self._world)

        resume_path = checkpointer.latest(cfg.resume, self._world)
        self._iteration = 0
        self._plan = RunPlan(cfg, source)
        if resume_path is not None:
            progress = checkpointer.read_state(resume_path)["progress"]
            if not progress["is_iteration_start"]:
                raise CheckpointError(
                    f"{resume_path} is inside iteration {progress['iteration']}, whose answers exist. Answers are "
                    "made at an iteration's start: give such a checkpoint with resume=<path>."
                )
            self._iteration = progress["iteration"]
        self._prompts = source.window(self._iteration)
        prepare_model(model, self._world, compute_dtype=compute_dtype)
        if resume_path is None:
            checkpointer.load_model(model, self._world)
        else:
            checkpointer.load(resume_path, model=model, optimizer=None, world=self._world)
        self._generator = config.instantiate(
            cfg.generator,
            context=GeneratorContext(model, self._world.device, context, self._tokenizer.decode, self._world),
        )
        self._group = engine_group(self._generator, self._world)
        self._row_tokens = min(cfg.pairs.row_tokens, context)
        self._model = model
        self._opponent = weights_fingerprint(model)

    def generate(self) -> None:
        """Makes this worker's missing shards, and seals the store if that completes it."""
        cfg, world = self._cfg, self._world
        samples = self._plan.samples(self._iteration)
        responses = cfg.pairs.responses_per_prompt
        limits = selfplay.limits_of(self._model, self._context, self._tokenizer)
        game = selfplay.PlayTask(self._prompts, samples, self._sampling, cfg.seed, self._iteration, responses, limits)
        fingerprint = selfplay.play_fingerprint(
            game, self._opponent, self._tokenizer, self._generator, cfg.compute_dtype, config.plain(cfg.model)
        )
        folder = Path(cfg.output_dir) / f"iteration_{self._iteration:03d}" / "responses"
        groups = cfg.num_workers * self._group.count
        num_shards = selfplay.num_shards(len(samples), cfg.pairs.prompts_per_shard, groups)
        store = open_store(folder, fingerprint, num_shards, world, log.warning)
        own = [shard for shard in missing_shards(store, world) if shard % cfg.num_workers == cfg.worker]
        mine = selfplay.shards_for_rank(own, store, game, self._group)
        bar = progress_bar(f"worker {cfg.worker}", "prompt", math.ceil(len(samples) / groups), enabled=world.is_main)
        with bar, policy_loaded(self._generator, self._model):
            check_generator_logprobs(
                self._generator,
                self._model,
                world,
                self._prompts,
                self._sampling,
                layout=RowLayout(self._row_tokens),
                chunk_tokens=cfg.logprob_chunk_tokens,
            )
            watched: dict[str, Any] = {"should_stop": lambda: self._stop.is_asked, "on_shard": bar.update}
            with raise_on_all_ranks(
                world, OutputError
            ):  # inside, ranks make as many shards as they have, each for itself
                selfplay.play(store, mine, game, self._generator, group=self._group, **watched)
        is_stopped = any_rank(self._stop.is_asked, world)  # waits for all ranks
        if world.is_main:
            left = store.missing_shards()
            if is_stopped and any(shard in left for shard in own):
                log.info(
                    f"Worker {cfg.worker} stopped as asked; complete shards are kept. Resume with:\n{resume_command()}"
                )
            elif left:
                log.info(
                    f"Worker {cfg.worker} is done; {len(left)} of {num_shards} shards are still missing in {folder}"
                )
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


@config.parse(DEFAULTS)
def recipe_main(cfg: DictConfig) -> None:
    """Runs the recipe; see the head of this file."""
    recipe = SPINGenerate(cfg)
    recipe.setup()
    recipe.generate()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
