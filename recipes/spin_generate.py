"""The opponent's responses alone: fills the first store of an iteration, so that other machines can generate.

Takes the same config as spin_recipe and writes `<output_dir>/iteration_NNN/responses`, where spin_recipe, started with
the same config, finds the responses and continues with scoring and training. The iteration is the one that begins at
the newest checkpoint in output_dir (the first, if there is none).

One machine:         spin run spin_generate --config full model.path=FOLDER dataset.source=mine.jsonl
One of four:         spin run spin_generate --config full ... worker=0 num_workers=4
Eight GPUs each:     spin run --nproc_per_node 8 spin_generate --config full ... worker=0 num_workers=4

Workers share output_dir, or their shards are copied into one folder afterwards; the worker that finds all shards there
seals the store. The same command resumes a worker that was killed, or stopped by a signal or max_time. All workers need
the same config, and without a shared output_dir tokenizer.date where the chat template writes the date. Not here:
scoring and training.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from spin import config, generators, run
from spin.config import GenerateConfig
from spin.core.dtypes import torch_dtype
from spin.core.errors import CheckpointError
from spin.core.progress import begin_run
from spin.core.ranks import init_world, shutdown
from spin.core.terminal import counted, get_logger
from spin.data.inputs import read_inputs
from spin.model import build_model, prepare_model, weights_fingerprint
from spin.pairs import PairStore, RowLayout
from spin.reference import check_generator_logprobs

log = get_logger("INFO")


class SPINGenerate:
    """Generation without training; a ``ConfigError`` if its config cannot work."""

    def __init__(self, cfg: GenerateConfig) -> None:
        self._cfg = cfg
        self._output_dir = Path(cfg.output_dir)
        self._stop = run.StopRequest(cfg.stop_signals, cfg.max_time)

    def setup(self) -> None:
        """Reads the data, then loads the opponent's weights."""
        cfg = self._cfg
        self._world = world = init_world(cfg.device, replicas=cfg.replicas, **run.inputs_of_config(cfg))
        self._stop.install()
        begin_run()
        # other workers may be here too, a training run may not
        self._lock = run.lock_output_dir(self._output_dir, world, shared=True)
        checkpointer = config.instantiate(cfg.checkpointer)
        checkpointer.validate()
        dtype, compute_dtype = (torch_dtype(name, world.device) for name in (cfg.dtype, cfg.compute_dtype))
        self._model = model = build_model(cfg.model, dtype)
        # --- Data ---
        no_validation = cfg.model_copy(update={"validation_dataset": None})
        self._tokenizer, prompts, _, unknown_ids = read_inputs(no_validation, model, world)
        self._sampling = generators.sampling_params(cfg.sampling, self._tokenizer.eos_ids, unknown_ids)
        run.check_files_agree({"dataset": prompts, "tokenizer": self._tokenizer}, cfg.checkpointer, world)
        plan = run.RunPlan(cfg, prompts)
        # --- The opponent ---
        path, self._iteration = checkpointer.latest(cfg.resume, world), 0
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
            checkpointer.load_start(model, world)
        else:
            checkpointer.load(path, model=model, optimizer=None, world=world)
        self._prompts, self._samples = prompts.window(self._iteration), plan.samples(self._iteration)
        context = generators.GeneratorContext(model, world.device, model.max_seq_len, self._tokenizer.decode, world)
        self._generator = config.instantiate(cfg.generator, context=context)
        self._group = generators.engine_group(self._generator, world)

    def generate(self) -> None:
        """Makes this worker's missing shards, and seals the store if that completes it."""
        cfg, model, world, context = self._cfg, self._model, self._world, self._model.max_seq_len
        task = generators.PlayTask(
            self._prompts, self._samples, self._sampling, cfg.seed, self._iteration, cfg.pairs.responses_per_prompt,
            generators.limits_of(model, context, self._tokenizer),
        )  # fmt: skip
        verify = partial(
            check_generator_logprobs, self._generator, model, world, self._prompts, self._sampling,
            layout=RowLayout(min(cfg.pairs.row_tokens, context)), chunk_tokens=cfg.logprob_chunk_tokens,
        )  # fmt: skip
        folder = self._output_dir / f"iteration_{self._iteration:03d}"
        try:
            generators.play_tasks(
                {folder: task}, self._generator, model, world, cfg, opponent=weights_fingerprint(model), verify=verify,
                tokenizer=self._tokenizer, group=self._group, should_stop=lambda: self._stop.is_asked,
                worker=cfg.worker, num_workers=cfg.num_workers,
            )  # fmt: skip
        except run.Stopped as stopped:  # on all ranks together
            log.info(run.resume_hint(f"worker {cfg.worker}", str(stopped)))
            return
        if world.is_main:
            store = PairStore.open(folder / "responses")
            if store.is_sealed:
                log.info(f"Complete, in {counted(store.num_shards, 'shard')}: {store.path}")
            else:
                found = f"{len(store.missing_shards())} of {counted(store.num_shards, 'shard')} missing in {store.path}"
                log.info(f"Worker {cfg.worker} is done; {found}")

    def cleanup(self) -> None:
        """Closes the generator and the process group, and unlocks the folder."""
        self._generator.close()
        shutdown()
        if self._lock is not None:
            self._lock.release()
        self._stop.release()


@config.parse(config.GenerateConfig)
def recipe_main(cfg: GenerateConfig) -> None:
    """Runs the recipe; see the head of this file."""
    recipe = SPINGenerate(cfg)
    recipe.setup()
    recipe.generate()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
