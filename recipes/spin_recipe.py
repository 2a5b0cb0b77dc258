"""Self-play fine-tuning (SPIN, arXiv 2401.01335): all weights, or LoRA, DoRA and QLoRA adapters; one device or many.

In every iteration the policy, frozen for a moment as its own opponent, answers the prompts of a supervised data set and
scores the real answers and its own; then it learns to tell them apart. There is no reference model: at the start of an
iteration the policy is the opponent, so answers and reference log-probs are made first, with the only weights there
are, and land on disk.

One GPU (or CPU):   tune run spin_recipe --config llama3_2/1B_full
Eight GPUs:         tune run --nproc_per_node 8 spin_recipe --config llama3_1/8B_full
Adapters:           tune run spin_recipe --config llama3_1/8B_lora model.use_dora=true
Change anything:    tune run spin_recipe --config llama3_2/1B_full loss.beta=0.05 max_iterations=2

To make it yours, copy this file and its config and run it with `python spin_recipe.py --config my.yaml` or torchrun.
Lines marked SPIN are the algorithm; lines marked PLUMBING can be left alone. Not here: generation without training,
which is spin_generate.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spin import config
from spin.checkpoint.manifest import as_checkpoint_error
from spin.config import SPINConfig
from spin.config.checks import check_run
from spin.core.dtypes import torch_dtype
from spin.core.errors import CollapseError, OutputError
from spin.core.files import FolderLock
from spin.core.ranks import all_reduce_sums, check_ranks_agree, init_world, raise_on_all_ranks, shutdown
from spin.core.terminal import get_logger, progress_bar
from spin.data import Pair, PairStore, PromptDataset, PromptSource, adapt_tokenizer
from spin.data.dates import fix_date
from spin.data.order import history_window
from spin.data.read import check_vocabulary, unknown_ids
from spin.generators import GeneratorContext, sampling_params
from spin.generators import stage as selfplay
from spin.generators.engines import engine_group, policy_loaded
from spin.model.build import choose_attention, extend_max_seq_len, prepare_model, row_layout, training_options
from spin.model.fingerprint import weights_fingerprint
from spin.model.logits_check import self_test
from spin.model.lora import build_policy, init_adapters, trainable
from spin.model.sharding import accumulating, clip_grad_norm
from spin.pairs.filters import POLICIES, FilteredPairs
from spin.pairs.loader import RowBatch, load_rows
from spin.pairs.lookup import PairLookup, share_lookup
from spin.pairs.packing import PackedRow
from spin.pairs.shards import missing_shards, open_store, seal
from spin.reference import stage as reference
from spin.reference.generator_check import check_generator_logprobs
from spin.reference.logprobs import pair_objective
from spin.run.log import RunLog
from spin.run.messages import finish_message, iteration_summary, sample_rows, start_message
from spin.run.plan import RunPlan
from spin.run.resume import check_unchanged, inputs_of_config, inputs_of_files, run_fingerprint
from spin.run.stopping import StopRequest, resume_hint
from spin.training.metrics import PairSums, UpdateFraction, pair_metrics, prefix_keys, speed_metrics, validation_metrics
from spin.training.nonfinite import NonFiniteGuard, check_last_update
from spin.training.optim import optimizer_step
from spin.training.schedules import lr_factor, per_iteration
from spin.training.selftest import check_first_loss, check_updated_fraction
from spin.training.validation import eval_pair_losses, initial_loss, validation_loss
from spin.training.watch import Alert, CollapseMonitor, response_metrics

log = get_logger("INFO")


class SPINRecipe:
    """The whole of a SPIN run: play, score, fit, promote.

    Features: FSDP2 sharding (one process is the one-rank case), fp32 master weights with bf16 compute, packed rows that
    compute each prompt once, beta and learning rate per iteration, history mixing, exact resume, Hugging Face export
    per iteration.

    Args:
        cfg (SPINConfig): complete and typed.

    Raises:
        ConfigError: If the config cannot work.
    """

    def __init__(self, cfg: SPINConfig) -> None:
        check_run(cfg)
        self._cfg = cfg
        self._output_dir = Path(cfg.output_dir)
        self._betas, self._lrs = (
            [per_iteration(value, i, cfg.max_iterations) for i in range(cfg.max_iterations)]
            for value in (cfg.loss.beta, cfg.optimizer.lr)
        )
        # made now, so that a wrong argument shows before anything is loaded, not after the first answers
        self._losses = [config.instantiate(cfg.loss, beta=beta) for beta in self._betas]
        self._stop = StopRequest(cfg.stop_signals, cfg.max_time)
        self._nonfinite = NonFiniteGuard(cfg.on_nonfinite, cfg.nonfinite_limit, self._output_dir / "nonfinite.jsonl")
        self._val_loss: float | None = None
        self._val_step = -1  # where that was measured
        self._opponent = ""
        self._trained_in = -1  # the last iteration in which a batch moved the weights
        self._val_pairs: list[Pair] = []  # with validation.spin: this iteration's pairs of validation prompts
        self._last_batch: Sequence[Pair] = []
        self._warned: set[int] = set()  # iterations whose steps were found to move next to nothing
        self._history: list[dict[str, float]] = []  # metrics of this iteration's steps
        self._play_metrics: dict[str, float] = {}  # of this iteration's play, not logged yet

    # PLUMBING: everything is checked and made here, cheap things first, weights last.
    def setup(self) -> None:
        """Reads the data and checks the arithmetic, then loads weights and restores the newest state."""
        cfg = self._cfg
        self._world = init_world(
            cfg.device, replicas=cfg.replicas, deterministic=cfg.deterministic, **inputs_of_config(cfg)
        )
        self._stop.install()
        self._bar = partial(progress_bar, enabled=self._world.is_main)
        with raise_on_all_ranks(self._world, OutputError):  # before anything in the folder is touched
            self._lock = FolderLock(self._output_dir) if self._world.is_main else None
        self._watch = CollapseMonitor(cfg.watch, self._world.is_main)
        self._checkpointer = config.instantiate(cfg.checkpointer)
        self._checkpointer.validate(cfg.max_iterations)
        compute_dtype = torch_dtype(cfg.compute_dtype, self._world.device)

        # ---- data
        self._model = build_policy(cfg, self._world)  # no memory yet
        context = self._model.max_seq_len
        self._tokenizer = adapt_tokenizer(config.instantiate(cfg.tokenizer))
        fix_date(self._tokenizer, self._output_dir, self._world, cfg.resume)
        reading = {"tokenizer": self._tokenizer, "max_seq_len": context}
        self._prompts: PromptSource = config.instantiate(cfg.dataset, **reading)
        self._val_prompts: PromptDataset = PromptDataset()  # empty without a validation set
        if cfg.validation_dataset is not None:
            self._val_prompts = config.instantiate(cfg.validation_dataset, **reading)
        unknown = unknown_ids(self._model, self._tokenizer)
        self._sampling = sampling_params(cfg.sampling, self._tokenizer.eos_ids, unknown)
        check_vocabulary(self._model, self._tokenizer, self._sampling.stop_token_ids, self._prompts, self._val_prompts)

        read = {"dataset": self._prompts, "validation_dataset": self._val_prompts, "tokenizer": self._tokenizer}
        check_ranks_agree(inputs_of_files(read, cfg.checkpointer), self._world)

        # ---- arithmetic
        self._plan = RunPlan(cfg, self._prompts, self._val_prompts.samples_per_iteration)
        self._progress = self._plan.progress

        # ---- resume
        self._run_fingerprint = run_fingerprint(
            cfg, self._prompts.content_fingerprint(), self._tokenizer.fingerprint, self._prompts.settings
        )
        resume_path = self._checkpointer.latest(cfg.resume, self._world)
        if resume_path is not None:
            self.load_state_dict(self._checkpointer.read_state(resume_path))
            log.info(f"Resuming at step {self._progress.step} from {resume_path}")
        sizes = cfg.global_batch_size, self._prompts.samples_per_iteration, self._plan.num_val_samples
        log.info(start_message(self._progress, *sizes))

        # ---- model
        if cfg.self_test and resume_path is None:
            self_test(cfg, self._world)
        flex = choose_attention(self._model, self._world, compute_dtype, cfg.attention)
        self._layout = row_layout(self._model, cfg, flex)
        self._scoring: dict[str, Any] = {"layout": self._layout, "chunk_tokens": cfg.logprob_chunk_tokens}
        longest = max(self._prompts.longest, self._val_prompts.longest)
        extend_max_seq_len(
            self._model, longest + cfg.pairs.responses_per_prompt * self._sampling.max_new_tokens, self._layout
        )
        prepare_model(self._model, self._world, compute_dtype=compute_dtype, **training_options(cfg))
        self._optimizer = self._new_optimizer()
        if resume_path is None:
            self._checkpointer.load_model(self._model, self._world)
            init_adapters(self._model, cfg.seed)  # none in full fine-tuning
        else:
            starts_anew = cfg.optimizer.reset_each_iteration and self._progress.is_iteration_start
            optimizer = None if starts_anew else self._optimizer
            changed = {"new_options": "optimizer" in cfg.resume_with_changes}
            self._checkpointer.load(resume_path, model=self._model, optimizer=optimizer, world=self._world, **changed)
        engine = GeneratorContext(self._model, self._world.device, context, self._tokenizer.decode, self._world)
        self._generator = config.instantiate(cfg.generator, context=engine)
        self._group = engine_group(self._generator, self._world)
        self._limits = selfplay.limits_of(self._model, context, self._tokenizer)

        # ---- logs
        from_step = -1 if resume_path is None else self._progress.step
        self._run_log = RunLog(cfg, partial(config.instantiate, cfg.metric_logger), from_step, self._world)

    # SPIN: the algorithm.
    def train(self) -> None:
        """Iterations, epochs and steps, from wherever the state stands."""
        progress, had_steps_left = self._progress, not self._progress.is_done
        if progress.step == 0 and self._plan.num_val_samples and self._cfg.validation.at_start:
            self._log(self.run_validation())
        while not progress.is_done:
            iteration = progress.iteration
            # --- 1. Play and 2. score: the policy is the opponent ---
            pairs = self.augment_dataloader(iteration)
            if pairs is None:
                return self._say_how_to_continue()
            self._start_fitting(iteration)
            # --- 3. Fit: tell the real answers from the opponent's ---
            while progress.iteration == iteration and not progress.is_done:
                epoch = progress.epoch
                bar = self._bar(f"iteration {iteration}, epoch {epoch}", "step", progress.steps_in_epoch(iteration))
                bar.update(progress.step_in_epoch)
                for batch in self._rows(self._plan.batches(pairs, iteration, epoch, start=progress.step_in_epoch)):
                    metrics = self.train_single_step(batch)
                    stop, out_of_time = metrics.pop("stop") > 0, metrics.pop("out_of_time") > 0
                    bar.update()
                    bar.set_postfix(
                        {k: f"{metrics[k]:.4f}" for k in ("loss", "total_loss", "acc", "margin") if k in metrics}
                    )
                    is_last = progress.is_done or progress.iteration > iteration
                    if is_last or out_of_time or (self._plan.val_every and progress.step % self._plan.val_every == 0):
                        metrics.update(self.run_validation())
                    self._log(metrics)
                    alarm = self._watch.step(iteration, progress.step - progress.iteration_start(iteration), metrics)
                    if alarm is not None:
                        self._give_up(alarm, iteration, pairs, is_last)
                    if is_last:
                        break  # saved when the iteration is finished
                    if stop or (self._plan.save_every and progress.step % self._plan.save_every == 0):
                        self.save_checkpoint()
                    if stop:
                        return self._say_how_to_continue()
                bar.close()
            # --- 4. Promote: nothing is copied, the next iteration starts from these weights ---
            self._finish_iteration(iteration, pairs)
        log.info(finish_message(self._output_dir, progress, had_steps_left))

    def augment_dataloader(self, iteration: int) -> PairLookup | None:
        """The pairs of an iteration, made now or found on disk: the opponent's answers and its log-probs of all
        responses.

        Args:
            iteration (int): counted from 0.

        Returns:
            PairLookup | None: pairs by (iteration of the answers, sample); None if the run was asked to stop.
        """
        folder, val_folder = self._folder(iteration), self._folder(iteration) / "validation"
        with_val = self._cfg.validation.spin and self._plan.num_val_samples > 0
        if self._progress.is_iteration_start:
            self._opponent = weights_fingerprint(self._model)
            games = {folder: self._game(iteration, self._prompts.window(iteration), self._plan.samples(iteration))}
            if with_val:
                games[val_folder] = self._game(iteration, self._val_prompts, range(self._plan.num_val_samples))
            if not self._play(games):
                return None
            self._watch.start(iteration, response_metrics(folder, self._folder(0), self._world))
            kept = self._kept(iteration, folder)
            pairs = share_lookup(folder / "rows", kept, self._world)
            if not self._score(folder, self._plan.batches(pairs, iteration, epoch=0), kept.counts):
                return None
            if with_val:
                kept = self._kept(iteration, val_folder, history=0)
                if not self._score(val_folder, self._cut(list(kept)), kept.counts):
                    return None
        if with_val:
            self._val_pairs = list(reference.open_scored(val_folder / "pairs", self._opponent).pairs())
        scored = reference.open_scored(folder / "pairs", self._opponent).pairs()
        return share_lookup(folder / "rows", scored, self._world)

    def train_single_step(self, batch: RowBatch) -> dict[str, float]:
        """One optimizer step over a global batch of pairs; every rank takes its rows of it.

        Args:
            batch (RowBatch): the global batch, and this rank's rows of it.

        Returns:
            dict[str, float]: metrics over all ranks, and ``stop``, above 0 if any rank was asked to stop, of which
            ``out_of_time`` if by ``max_time``.

        Raises:
            NonFiniteError: If the loss or the gradient's norm is not finite and may not be, see ``on_nonfinite``.
            SelfTestError: If an iteration's first loss is not that of two equal models.
        """
        started = time.perf_counter()
        cfg, progress, world = self._cfg, self._progress, self._world
        iteration, epoch = progress.iteration, progress.epoch
        self._last_batch = batch.pairs
        # the mean over the pairs of the global batch; FSDP2 averages gradients over ranks, world_size undoes that
        scale = world.world_size / (batch.weight or 1.0)
        sums = PairSums()
        with accumulating(self._model, batch.rows, unsharded_gradients=cfg.fsdp_accumulate_unsharded) as rows:
            for row in (row.to(world.device) for row in rows):
                objective = partial(self._objective, row, scale)
                total, logps = pair_objective(self._model, row, objective, cfg.logprob_chunk_tokens)
                total.backward()
                sums.add(row, logps, *self._pair_losses(row, logps))
        norm = clip_grad_norm(self._model, cfg.clip_grad_norm)
        # a state or a log that could not be written ends the run too: save_checkpoint raises what went wrong
        failed = self._checkpointer.has_failed or self._run_log.has_failed
        asked = {"stop": self._stop.is_asked or failed, "out_of_time": self._stop.is_out_of_time}
        totals = all_reduce_sums({**sums.totals(), **asked}, world)
        grad_norm = norm.item()
        finite = self._nonfinite.passes(totals["loss"], grad_norm, progress.step, batch.pairs, world)
        metrics = pair_metrics(totals, cfg.nll_weight) if finite else {}
        is_first = self._trained_in != iteration
        if cfg.self_test and metrics and is_first:
            expected = initial_loss(self._loss, batch.pairs, self._layout)  # ln 2 and 0 for SPIN
            check_first_loss(metrics, expected, cfg.compute_dtype, iteration)
        lr = self._lrs[iteration] * self._lr_factor()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        moved = UpdateFraction(self._model)
        if metrics:  # a batch that is left out, or whose pairs all are, moves nothing, momentum included
            optimizer_step(self._optimizer)
            self._trained_in = iteration
        self._optimizer.zero_grad(set_to_none=True)
        moved_share = moved.share(world)
        if metrics and world.is_main:
            rounds_at_random = getattr(self._optimizer, "stochastic_rounding", False)
            check_updated_fraction(moved_share, lr, cfg.dtype, rounds_at_random, iteration, self._warned)
        progress.advance(cfg.global_batch_size)
        return metrics | {
            **({"grad_norm": grad_norm} if finite else {}),
            "lr": lr,
            "beta": self._betas[iteration],
            "iteration": iteration,
            "epoch": epoch,
            "consumed_samples": progress.consumed_samples,
            "updated_fraction": moved_share,
            "nonfinite_steps": len(self._nonfinite.skipped),
            **self._watch.metrics,
            **prefix_keys("samples", self._prompts.count_sources(pair.sample_id for pair in batch.pairs)),
            **speed_metrics(totals, len(batch.pairs), time.perf_counter() - started),
            **{name: totals[name] for name in asked},
        }

    @torch.no_grad()
    def run_validation(self) -> dict[str, float]:
        """Validation loss, and with ``validation.spin`` also the SPIN metrics of the validation prompts' pairs.

        ``val_loss`` is the mean negative log-prob in nats of the real responses' tokens, as in supervised fine-tuning.

        Returns:
            dict[str, float]: metrics over all ranks by name; empty without a validation set.
        """
        if not self._plan.num_val_samples:
            self._show_samples(list(self._last_batch)[: self._cfg.validation.table_rows])
            return {}
        started = time.perf_counter()
        prompts = [self._val_prompts[i] for i in range(self._plan.num_val_samples)]
        pairs = [Pair(prompt.sample_id, 0, prompt.prompt_ids, prompt.real_ids) for prompt in prompts]
        batches = self._cut(pairs)
        metrics = validation_loss(
            self._model,
            self._bar("validation", "batch", total=len(batches), iterable=self._rows(batches)),
            self._world,
            self._val_prompts,
            chunk_tokens=self._cfg.logprob_chunk_tokens,
        )
        self._val_loss, self._val_step = metrics["val_loss"], self._progress.step
        if self._cfg.validation.spin and self._val_pairs:
            metrics |= validation_metrics(*self._margins(self._val_pairs))
        self._show_samples(list(self._val_pairs or self._last_batch)[: self._cfg.validation.table_rows])
        return metrics | {"validation_step_time": time.perf_counter() - started}

    # PLUMBING: state.
    def save_checkpoint(self) -> Path:
        """Saves the resumable state: sharded weights and optimizer, and where the run stands.

        Returns:
            Path: the folder.

        Raises:
            CheckpointError: If this state, or the last one, cannot be written.
            NonFiniteError: If the last update left weights that are not finite, or that nothing can be computed with.
            OutputError: If a line of the log could not be: a state would go on as if it had been.
        """
        self._run_log.check()
        self._check_last_update()
        starts_anew = self._cfg.optimizer.reset_each_iteration and self._progress.is_iteration_start
        return self._checkpointer.save(
            step=self._progress.step,
            model=self._model,
            optimizer=None if starts_anew else self._optimizer,
            state=self.state_dict(),
            world=self._world,
            metric=self._val_loss if self._val_step == self._progress.step else None,  # of these weights, or unknown
            anchor=self._progress.is_iteration_start and self._watch.can_roll_back,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run needs besides tensors to go on; JSON values."""
        return {
            "progress": self._progress.state_dict(),
            "total_steps": self._progress.total_steps,
            "opponent": self._opponent,
            "trained_in": self._trained_in,
            "val_loss": self._val_loss,
            "nonfinite": self._nonfinite.skipped,
            "watch": self._watch.state_dict(),
            "run": self._run_fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes a saved state.

        Args:
            state (dict[str, Any]): from :meth:`state_dict`.

        Raises:
            CheckpointError: If something that the results depend on has changed and is not named in
                ``resume_with_changes``.
        """
        with as_checkpoint_error(self._output_dir / "checkpoints"):
            allowed, within = self._cfg.resume_with_changes, not state["progress"].get("is_iteration_start", True)
            check_unchanged(state["run"], self._run_fingerprint, allowed, self._output_dir, within)
            self._progress.load_state_dict(state["progress"])
            self._plan.compare_schedules(state.get("total_steps"), self._cfg.optimizer.reset_each_iteration)
            self._opponent, self._val_loss = state["opponent"], state["val_loss"]
            self._trained_in = state.get("trained_in", self._progress.iteration - self._progress.is_iteration_start)
            self._nonfinite.skipped = state.get("nonfinite", [])
            self._watch.load_state_dict(state.get("watch", {}))

    def cleanup(self) -> None:
        """Closes the checkpointer, the logs, the generator and the process group, and unlocks the folder."""
        self._checkpointer.close()
        self._run_log.close()
        self._generator.close()  # an engine may take the process group with it
        shutdown()
        if self._lock is not None:
            self._lock.release()
        self._stop.release()

    # SPIN: parts of the stages.
    def _game(self, iteration: int, prompts: PromptDataset, samples: Sequence[int]) -> selfplay.PlayTask:
        answers = self._cfg.pairs.responses_per_prompt
        return selfplay.PlayTask(prompts, samples, self._sampling, self._cfg.seed, iteration, answers, self._limits)

    def _play(self, games: Mapping[Path, selfplay.PlayTask]) -> bool:
        """The opponent answers the prompts of each folder; False if the run was asked to stop before all were."""
        cfg, world = self._cfg, self._world
        player = (self._opponent, self._tokenizer, self._generator)
        answered_by = (*player, cfg.compute_dtype, config.plain(cfg.model))
        report: dict[str, float] | None = None
        with ExitStack() as until_all_are_played:
            for folder, game in games.items():
                fingerprint = selfplay.play_fingerprint(game, *answered_by)
                num_shards = selfplay.num_shards(len(game.samples), cfg.pairs.prompts_per_shard, self._group.count)
                store = open_store(folder / "responses", fingerprint, num_shards, world)
                missing = missing_shards(store, world)
                if store.is_sealed and not missing:
                    continue
                if report is None:  # the generator is woken, and its weights are proved, once for all
                    until_all_are_played.enter_context(policy_loaded(self._generator, self._model))
                    probe = (self._prompts.window(self._progress.iteration), self._sampling)
                    options = {"as_in_training": cfg.compile, **self._scoring}
                    gap = check_generator_logprobs(self._generator, self._model, world, *probe, **options)
                    report = {} if gap is None else {"generator/logprob_gap": gap}
                mine = selfplay.shards_for_rank(missing, store, game, self._group)
                bar = self._bar(f"{folder.name} answers", "prompt", math.ceil(len(game.samples) / self._group.count))
                # inside, ranks make as many shards as they have, each for itself
                with bar, raise_on_all_ranks(world, OutputError):
                    watched: dict[str, Any] = {"should_stop": lambda: self._stop.is_asked, "on_shard": bar.update}
                    selfplay.play(store, mine, game, self._generator, group=self._group, **watched)
                if not seal(store, world, self._stop.is_asked, report):
                    return False
        return True

    def _kept(self, iteration: int, folder: Path, history: int | None = None) -> FilteredPairs:
        """The answers that an iteration learns from: its own and those of the iterations before it, filtered."""
        policy = self._cfg.pairs
        earlier = history_window(iteration, policy.history if history is None else history)[:-1]
        stores = [PairStore.open(place / "responses") for place in (*map(self._folder, earlier), folder)]
        pairs: Iterator[Pair] = itertools.chain.from_iterable(store.pairs() for store in stores)
        policies = {name: policy[name] for name in POLICIES}
        return FilteredPairs(pairs, **policies)

    def _score(self, folder: Path, batches: Sequence[list[Pair]], counts: Mapping[str, int]) -> bool:
        """The opponent scores all responses; False if the run was asked to stop before all were scored."""
        cfg, world = self._cfg, self._world
        num_pairs = len(batches) * cfg.global_batch_size
        made_as: dict[str, Any] = {"num_ranks": world.world_size, "compiled": cfg.compile, **self._scoring}
        made_as |= {"compute_dtype": cfg.compute_dtype, "float8": cfg.enable_float8_training}
        made_as["model"] = config.plain(cfg.model)
        fingerprint = reference.score_fingerprint(opponent=self._opponent, batches=batches, **made_as)
        num_shards = math.ceil(num_pairs / cfg.pairs.prompts_per_shard)
        store = open_store(folder / "pairs", fingerprint, num_shards, world)
        with self._bar(f"{folder.name} reference log-probs", "pair", num_pairs) as bar:
            watched: dict[str, Any] = {"should_stop": lambda: self._stop.is_asked, "on_shard": bar.update}
            options = {"as_in_training": cfg.compile, "num_workers": cfg.num_workers, **self._scoring}
            reference.score(store, batches, self._model, world, **options, **watched)
        return seal(store, world, self._stop.is_asked, counts)

    def _rows(self, batches: Iterable[list[Pair]]) -> Iterator[RowBatch]:
        """This rank's rows of each batch, packed while the device computes."""
        return load_rows(batches, self._world, self._layout, self._cfg.num_workers)

    def _pair_losses(self, row: PackedRow, logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses, real and generated rewards of a row's comparisons, each of shape (c,)."""
        real, generated, references = row.real, row.generated, row.reference_logps
        return self._loss(logps[real], logps[generated], references[real], references[generated])

    def _objective(self, row: PackedRow, scale: float, logps: torch.Tensor) -> torch.Tensor:
        """What a row adds to the objective; every term looks at one pair only."""
        losses, _, _ = self._pair_losses(row, logps)
        if self._cfg.nll_weight > 0:
            losses = losses - self._cfg.nll_weight * (logps / row.response_lengths)[row.real]
        return (losses * row.weights).sum() * scale

    def _start_fitting(self, iteration: int) -> None:
        """Beta, learning rate and, unless it continues, the optimizer of an iteration."""
        self._loss = self._losses[iteration]
        if self._progress.is_iteration_start and self._cfg.optimizer.reset_each_iteration:
            self._optimizer = self._new_optimizer()
        self._history = []
        self._val_loss_before = self._val_loss
        # what is known of the iteration's play goes into the line of its first step
        report = PairStore.open(self._folder(iteration) / "responses").manifest.get("report", {})
        self._play_metrics = dict(report) if self._progress.is_iteration_start else {}

    def _lr_factor(self) -> float:
        """The schedule spans an iteration where the optimizer starts anew in each, else the run."""
        progress = self._progress
        first, last = self._plan.lr_span(self._cfg.optimizer.reset_each_iteration)
        step = progress.step - first - self._nonfinite.skipped_between(first, progress.step)
        return lr_factor(step=step, total_steps=last - first, **self._cfg.lr_scheduler)

    def _margins(self, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses, rewards and weights of scored pairs under the policy as it is now."""
        return eval_pair_losses(self._loss, self._model, self._cut(pairs), self._world, **self._scoring)

    # PLUMBING: small things.
    def _new_optimizer(self) -> torch.optim.Optimizer:
        return config.instantiate(self._cfg.optimizer, trainable(self._model), lr=self._lrs[0])

    def _folder(self, iteration: int) -> Path:
        return self._output_dir / f"iteration_{iteration:03d}"

    def _cut(self, pairs: list[Pair]) -> list[list[Pair]]:
        size = self._cfg.global_batch_size
        return [pairs[i : i + size] for i in range(0, len(pairs), size)]

    def _say_how_to_continue(self) -> None:
        self._checkpointer.wait()
        self._run_log.check()
        log.info(resume_hint(self._progress.step, self._cfg.resume))

    def _give_up(self, alarm: Alert, iteration: int, pairs: PairLookup, is_last: bool) -> None:
        """Ends the run at a limit of the collapse watch, with what it has, or as if the iteration had not begun."""
        if alarm.rolls_back:
            self._checkpointer.roll_back(self._progress.iteration_start(iteration), self._world, alarm.message)
        elif is_last:
            self._finish_iteration(iteration, pairs)
        else:
            self.save_checkpoint()
        self._checkpointer.wait()
        state = "back at the iteration's start" if alarm.rolls_back else f"saved at step {self._progress.step}"
        raise CollapseError(f"{alarm.message} The run is {state}; the same command goes on, with what you change.")

    def _check_last_update(self) -> None:
        """A step's loss is of the weights before it: what it left must be finite before it is saved or exported."""
        step, values = self._progress.step, {}
        pairs = [] if step - 1 in self._nonfinite.skipped else list(self._last_batch)[:4]
        if self._val_step == step:
            values = {"val_loss": self._val_loss or 0.0}
        elif pairs:
            _, real_rewards, generated_rewards, *_ = self._margins(pairs)
            values = {"rewards of the last batch": (real_rewards + generated_rewards).sum().item()}
        check_last_update(self._model, self._world, step, values)

    def _finish_iteration(self, iteration: int, pairs: PairLookup) -> None:
        self._check_last_update()
        stops = self._sampling.stop_token_ids
        model_dir = self._checkpointer.export(self._model, iteration, self._world, self._tokenizer, stops)
        checkpoint = self.save_checkpoint()
        if self._world.is_main:
            summary = iteration_summary(
                iteration, self._history, self._val_loss_before, self._folder(iteration), model_dir, checkpoint
            )
            print(summary, flush=True)
            pairs.remove()

    def _log(self, metrics: dict[str, float]) -> None:
        metrics, self._play_metrics = metrics | self._play_metrics, {}
        self._history.append(metrics)
        self._run_log.metrics(self._progress.step, metrics)

    def _show_samples(self, pairs: list[Pair]) -> None:
        """Prompt, real and generated response and margin of a few pairs, to the screen and to samples.jsonl."""
        if not pairs:
            return
        _, real_rewards, generated_rewards, _ = self._margins(pairs)
        margins = (real_rewards - generated_rewards).tolist()
        self._run_log.samples(sample_rows(pairs, margins, self._tokenizer.decode, self._progress.step))


# SPINConfig has every key that a config may have. For keys of your own: class MyConfig(SPINConfig): my_key: int = 1
@config.parse(SPINConfig)
def recipe_main(cfg: SPINConfig) -> None:
    """Runs the recipe; see the head of this file."""
    recipe = SPINRecipe(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
