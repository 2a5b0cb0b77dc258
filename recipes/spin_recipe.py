"""Self-play fine-tuning (SPIN, arXiv 2401.01335): all weights, or LoRA, DoRA and QLoRA adapters; one device or many.

In every iteration the policy, frozen for a moment as its own opponent, responds to the prompts of a supervised data set
and scores the real responses and its own; then it learns to tell them apart. There is no reference model: at the start
of an iteration the policy is the opponent, so responses and reference log-probs are made first, with the only weights
there are, and land on disk.

One GPU (or CPU):   spin run spin_recipe --config full model.path=FOLDER dataset.source=mine.jsonl
Eight GPUs:         spin run --nproc_per_node 8 spin_recipe --config full ...
Adapters:           spin run spin_recipe --config lora ... model.use_dora=true
Change anything:    spin run spin_recipe --config full ... loss.beta=0.05 max_iterations=2

To make it yours, copy this file and its config and run it with `python spin_recipe.py --config my.yaml` or torchrun.
Lines marked SPIN are the algorithm; lines marked PLUMBING can be left alone. Generation alone: spin_generate.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from spin import config, generators, model, reference, report, run, training
from spin.checkpoint.manifest import as_checkpoint_error
from spin.core.progress import compile_seconds, stage
from spin.core.ranks import all_reduce_sums, init_world, shutdown
from spin.core.terminal import get_logger, show
from spin.data.inputs import read_inputs
from spin.pairs import PackedRow, RowBatch, fit_lengths, load_rows, share_lookup
from spin.types import Pair

log = get_logger("INFO")


class SPINRecipe:
    """A SPIN run: play, score, fit, promote; a ``ConfigError`` if its config cannot work.

    Features: FSDP2 sharding (one process is the one-rank case), fp32 master weights with bf16 compute, adapters over a
    frozen base, packed rows that compute each prompt once, beta and learning rate per iteration, history mixing, exact
    resume, Hugging Face export per iteration.
    """

    _sums = training.PairSums

    def __init__(self, cfg: config.SPINConfig) -> None:
        self._cfg = cfg
        self._output_dir = Path(cfg.output_dir)
        values = (cfg.loss.beta, cfg.optimizer.lr)
        self._betas, self._lrs = (training.in_each_iteration(value, cfg.max_iterations) for value in values)
        # made now, so that a wrong argument shows before anything is loaded, not after the first responses
        self._losses = [config.instantiate(cfg.loss, beta=beta) for beta in self._betas]
        training.check_loss(self._losses[0], cfg.loss.component)
        self._stop = run.StopRequest(cfg.stop_signals, cfg.max_time)
        self._cleanup = ExitStack()  # of what setup has made, in case that it fails half-way
        self._nonfinite = training.NonFiniteGuard(cfg.on_nonfinite, cfg.nonfinite_limit, self._output_dir)
        self._opponent = ""  # fingerprint of the weights that this iteration plays against
        self._trained_in = -1  # the last iteration in which a batch moved the weights
        self._val_loss: float | None = None
        self._val_step = -1  # where that was measured
        self._val_pairs: list[Pair] = []  # with validation.spin: this iteration's pairs of validation prompts
        self._last_batch: Sequence[Pair] = []
        self._row_lengths: tuple[int, ...] = ()  # that an earlier start has fitted
        self._warned: set[int] = set()  # iterations whose steps were found to move next to nothing
        self._history: list[dict[str, float]] = []  # metrics of this iteration's steps
        self._play_metrics: dict[str, float] = {}  # of this iteration's play, not logged yet

    # PLUMBING: everything is checked and made here, cheap things first, weights last.
    def setup(self) -> None:
        """Reads the data and checks the arithmetic, then loads weights and restores the newest checkpoint."""
        cfg = self._cfg
        self._world = world = init_world(
            cfg.device, replicas=cfg.replicas, deterministic=cfg.deterministic, **run.inputs_of_config(cfg)
        )
        self._cleanup.callback(shutdown)
        self._stop.install()
        self._cleanup.callback(self._stop.release)
        self._lock = run.lock_output_dir(self._output_dir, world)  # before anything in the folder is touched
        if self._lock is not None:
            self._cleanup.callback(self._lock.release)
        self._monitor = training.CollapseMonitor(cfg.watch, cfg.output_dir, world.is_main)
        self._checkpointer = config.instantiate(cfg.checkpointer)
        self._checkpointer.validate(cfg.max_iterations)

        # ---- data and arithmetic
        self._model = model.build_policy(cfg, world)  # no memory yet
        context = self._model.max_seq_len
        self._tokenizer, self._prompts, self._val_prompts, unknown_ids = read_inputs(cfg, self._model, world)
        self._sampling = generators.sampling_params(cfg.sampling, self._tokenizer.eos_ids, unknown_ids)
        read = {"dataset": self._prompts, "validation_dataset": self._val_prompts, "tokenizer": self._tokenizer}
        run.check_files_agree(read, cfg.checkpointer, world)
        self._plan = run.RunPlan(cfg, self._prompts, self._val_prompts.samples_per_iteration)
        self._progress = self._plan.progress
        # ---- resume
        content = self._prompts.content_fingerprint()
        self._run_fingerprint = run.run_fingerprint(cfg, content, self._tokenizer.fingerprint, self._prompts.settings)
        resume_path, from_step = self._checkpointer.latest(cfg.resume, world), -1
        if resume_path is not None:
            self.load_state_dict(self._checkpointer.read_state(resume_path))
            from_step = self._progress.step
            log.info(f"Resuming at step {from_step} from {resume_path}")
        self._plan.start(self._stop.ends_at, self._output_dir / "rates.json")

        # ---- model, optimizer, generator
        if cfg.self_test and resume_path is None:
            model.self_test(cfg, world)
        longest = max(self._prompts.longest, self._val_prompts.longest)
        longest += cfg.pairs.responses_per_prompt * self._sampling.max_new_tokens
        self._layout = replace(model.prepare_policy(self._model, world, cfg, longest), fitted=self._row_lengths)
        trained = model.trainable(self._model)
        self._new_optimizer = partial(config.instantiate, cfg.optimizer, trained, lr=self._lrs[0])
        self._optimizer = self._new_optimizer()
        if resume_path is None:
            fine_tuned = self._checkpointer.load_start(self._model, world)
            if fine_tuned and world.is_main:
                for doubt in run.doubts_after_sft(self._checkpointer.read_state(fine_tuned)["run"], cfg):
                    log.warning(doubt)
        else:
            optimizer = None if self._plan.resets_optimizer else self._optimizer
            into = {"model": self._model, "optimizer": optimizer, "world": world}
            self._checkpointer.load(resume_path, **into, new_options="optimizer" in cfg.resume_with_changes)
        engine = generators.GeneratorContext(self._model, world.device, context, self._tokenizer.decode, world)
        self._generator = config.instantiate(cfg.generator, context=engine)
        self._cleanup.callback(self._generator.close)  # an engine may take the process group with it
        self._cleanup.callback(self._checkpointer.close)
        self._engine_group = generators.engine_group(self._generator, world)
        self._task = partial(
            generators.PlayTask, sampling=self._sampling, seed=cfg.seed,
            responses_per_prompt=cfg.pairs.responses_per_prompt,
            limits=generators.limits_of(self._model, context, self._tokenizer),
        )  # fmt: skip
        self._run_log = run.RunLog(cfg, from_step, world)
        self._cleanup.callback(self._run_log.close)

    # SPIN: the algorithm.
    def train(self) -> None:
        """Iterations, epochs and steps, from wherever the run stands to its end, or until it is asked to stop."""
        progress, plan, had_steps_left = self._progress, self._plan, not self._progress.is_done
        try:
            if progress.step == 0 and plan.num_val_samples and self._cfg.validation.at_start:
                self._log(metrics := self.run_validation())
                self._monitor.lowest_val_loss = metrics["val_loss"]
            while not progress.is_done:
                iteration = progress.iteration
                # --- 1. Play and 2. score: the policy is the opponent ---
                pairs = self.augment_dataloader(iteration)
                # --- 3. Fit: tell the real responses from the opponent's ---
                self._begin_training(iteration)
                for batch in self._batches(pairs, iteration):
                    compared = self.compare_gradients(pairs, batch)
                    step = self.train_single_step(batch)
                    step.metrics |= compared
                    if plan.validates_now or step.out_of_time:
                        step.metrics |= self.run_validation()
                    self._log(step.metrics)
                    alert = self._monitor.step(iteration, plan.steps_of(iteration), step.metrics)
                    if alert is not None:
                        self._abort(alert, iteration)
                    if plan.is_iteration_over:
                        continue  # saved with its model, below
                    if step.must_stop or plan.saves_now:
                        self.save_checkpoint()
                    if step.must_stop:
                        raise run.Stopped
                # --- 4. Promote: nothing is copied, the next iteration starts from these weights ---
                self._finish_iteration(iteration)
            self._answer_fixed_prompts()
            message = run.finish_message(self._output_dir, progress, had_steps_left, plan.is_sft)
        except run.Stopped as stopped:  # on all ranks together
            message = run.resume_hint(f"at step {progress.step}", str(stopped), self._cfg.resume)
        self._checkpointer.wait()  # what the message says is there is on the disk
        self._run_log.check()
        log.info(message)

    def augment_dataloader(self, iteration: int) -> Mapping[tuple[int, str], Pair]:
        """The pairs of an iteration by (iteration of the responses, sample), made now or found on disk: the opponent's
        responses, and the log-probs of all under it. Raises ``Stopped`` if the run was asked to stop before."""
        folder, val_folder = self._folder(iteration), self._folder(iteration) / "validation"
        with_val = self._cfg.validation.spin and self._plan.num_val_samples > 0
        if self._progress.is_iteration_start:
            self._opponent = model.weights_fingerprint(self._model)
            prompts, samples = self._prompts.window(iteration), self._plan.samples(iteration)
            expected = generators.response_tokens(self._folder(iteration - 1))
            tasks = {folder: self._task(prompts, samples, iteration=iteration, expected_tokens=expected)}
            if with_val:
                val_samples = range(self._plan.num_val_samples)
                tasks[val_folder] = self._task(self._val_prompts, val_samples, iteration=iteration)
            self._play(tasks | self._fixed_tasks(iteration))
            self._write_fixed_prompts(iteration)
            self._play_metrics = generators.play_report(folder)  # into the line of the first step
            played_in = [*map(self._folder, self._plan.history(iteration)), folder]
            found = training.response_metrics(folder, self._folder(0), self._world) | self._check(played_in)
            if with_val:
                found |= {f"val_{name}": value for name, value in self._check([val_folder]).items()}
            self._monitor.start(iteration, found)
            kept = generators.filtered_responses(played_in, self._cfg.pairs)
            pairs = share_lookup(folder / "rows", kept, self._world)
            self._score(folder, self._fit_rows(pairs, iteration), kept.counts)
            if with_val:
                kept = generators.filtered_responses([val_folder], self._cfg.pairs, drop_verdicts=False)
                self._score(val_folder, self._plan.batched(list(kept)), kept.counts)
        if with_val:
            self._val_pairs = list(reference.open_scored(val_folder / "pairs", self._opponent).pairs())
        scored = reference.open_scored(folder / "pairs", self._opponent).pairs()
        return share_lookup(folder / "rows", scored, self._world)

    def train_single_step(self, batch: RowBatch) -> training.Step:
        """One optimizer step over a global batch of pairs. Raises ``NonFiniteError``, see ``on_nonfinite``, and
        ``SelfTestError`` if an iteration's first loss is not that of two equal models."""
        started = time.perf_counter()
        cfg, progress, world = self._cfg, self._progress, self._world
        iteration, epoch = progress.iteration, progress.epoch
        self._last_batch = batch.pairs
        # the mean over the pairs of the global batch; FSDP2 averages gradients over ranks, world_size undoes that
        scale, sums = world.world_size / (batch.weight or 1.0), self._sums()
        minimised = torch.zeros((), dtype=torch.float64, device=world.device)

        def objective(row: PackedRow, logps: torch.Tensor) -> torch.Tensor:
            return self.row_loss(row, logps) * scale

        with model.accumulating(self._model, batch.rows, unsharded_gradients=cfg.fsdp_accumulate_unsharded) as rows:
            for row in (row.to(world.device) for row in rows):
                of_row = partial(objective, row)
                total, logps = reference.pair_objective(self._model, row, of_row, cfg.logprob_chunk_tokens)
                total.backward()
                minimised += total.detach()
                sums.add(row, logps, self._loss)
        norm = model.clip_grad_norm(self._model, cfg.clip_grad_norm)
        # a checkpoint or a log that could not be written ends the run too: save_checkpoint raises what went wrong
        failed = self._checkpointer.has_failed or self._run_log.has_failed
        asked = {"stop": self._stop.is_asked or failed, "out_of_time": self._stop.is_out_of_time}
        # the norm is the same on all ranks, and rides along
        means = {"grad_norm": norm.double() / world.world_size, "minimised": minimised / world.world_size}
        totals = all_reduce_sums({**sums.totals(), **asked, **means}, world)  # host/device sync
        grad_norm = totals["grad_norm"]
        is_finite = self._nonfinite.check(totals["loss"], grad_norm, progress.step, batch.pairs, world)
        metrics = sums.metrics(totals) if is_finite else {}
        if metrics and not math.isclose(totals["minimised"], metrics["loss"], rel_tol=1e-4, abs_tol=1e-6):
            metrics["total_loss"] = totals["minimised"]  # with an NLL term, or what row_loss adds
        if cfg.self_test and metrics and self._trained_in != iteration:
            expected = training.initial_loss(self._loss, batch.pairs, self._layout)  # ln 2 and 0 for SPIN
            training.check_first_loss(metrics, expected, cfg.compute_dtype, iteration)
        lr, updated = self._lr(), 0.0
        if metrics:  # a batch that is left out, or whose pairs all are, moves nothing, momentum included
            updated = training.optimizer_step(self._optimizer, self._model, lr)
            self._trained_in = iteration
            if world.is_main:
                training.check_updated_fraction(updated, lr, self._optimizer, cfg.dtype, iteration, self._warned)
        self._optimizer.zero_grad(set_to_none=True)
        progress.advance(cfg.global_batch_size)
        metrics |= {
            **({"grad_norm": grad_norm} if is_finite else {}), "lr": lr, "beta": self._betas[iteration],
            "iteration": iteration, "epoch": epoch, "consumed_samples": progress.consumed_samples,
            "updated_fraction": updated, "nonfinite_steps": len(self._nonfinite.skipped), **self._monitor.metrics,
            **training.prefix_keys("samples", self._prompts.count_sources(pair.sample_id for pair in batch.pairs)),
            **training.speed_metrics(totals, len(batch.pairs), time.perf_counter() - started),
        }  # fmt: skip
        return training.Step(metrics, must_stop=totals["stop"] > 0, out_of_time=totals["out_of_time"] > 0)

    def compare_gradients(self, pairs: Mapping[tuple[int, str], Pair], batch: RowBatch) -> dict[str, float]:
        """At an iteration's start and a few times within, before a step on ``batch``: how the loss's gradient compares
        with that of fine-tuning on the same real responses. Changes nothing."""
        progress, plan, cfg = self._progress, self._plan, self._cfg
        step, steps = plan.steps_of(progress.iteration), plan.steps_in(progress.iteration)
        if plan.is_sft or not training.is_checked(step, steps, len(batch.rows), cfg.watch.gradient_checks):
            return {}
        batches = plan.batches(pairs, progress.iteration, progress.epoch, start=progress.step_in_epoch)
        rows = load_rows(batches, self._world, self._layout, num_workers=0)
        return training.compare_gradients(self._model, rows, self.row_loss, self._world, cfg)

    def row_loss(self, row: PackedRow, logps: torch.Tensor) -> torch.Tensor:  # SPIN: change the loss here
        """A row's part of a batch's summed loss, each term of one pair only, by the policy's summed log-probs in nats,
        shape (m,)."""
        real, generated, opponent = row.real, row.generated, row.reference_logps
        losses, _, _ = self._loss(logps[real], logps[generated], opponent[real], opponent[generated])
        if self._cfg.nll_weight > 0:
            losses = losses - self._cfg.nll_weight * (logps / row.response_lengths)[real]
        return (losses * row.weights).sum()

    @torch.no_grad()
    def run_validation(self) -> dict[str, float]:
        """The supervised loss in nats per token (``val_loss``), and with ``validation.spin`` the SPIN metrics of the
        validation prompts' pairs; nothing without a validation set. Shows a few samples."""
        started, metrics = time.perf_counter(), {}
        if num_samples := self._plan.num_val_samples:
            read = (self._val_prompts, num_samples, self._cfg, self._layout)
            metrics = training.validation_loss(self._model, self._world, *read)
            self._val_loss, self._val_step = metrics["val_loss"], self._progress.step
            if self._val_pairs:
                metrics |= training.validation_metrics(*self._eval_losses(self._val_pairs))
        shown = list(self._val_pairs or self._last_batch)[: self._cfg.validation.table_rows]
        if shown:
            _, real_rewards, generated_rewards, _ = self._eval_losses(shown)
            margins = (real_rewards - generated_rewards).tolist()
            rows = run.sample_rows(shown, margins, self._tokenizer.decode, self._progress.step)
            self._run_log.samples(rows, is_shown=self._plan.is_iteration_over)
        return metrics | ({"validation_step_time": time.perf_counter() - started} if metrics else {})

    # SPIN: parts of the stages.
    def _play(self, tasks: Mapping[Path, generators.PlayTask]) -> None:
        """The opponent responds to the prompts of each task, into the store ``responses`` of its folder."""
        prompts = next(iter(tasks.values())).prompts
        checked = (self._generator, self._model, self._world, prompts, self._sampling)
        verify = partial(
            reference.check_generator_logprobs, *checked, layout=self._layout,
            chunk_tokens=self._cfg.logprob_chunk_tokens, as_in_training=self._cfg.compile,
        )  # fmt: skip
        generators.play_tasks(
            tasks, self._generator, self._model, self._world, self._cfg, opponent=self._opponent, verify=verify,
            tokenizer=self._tokenizer, group=self._engine_group, should_stop=lambda: self._stop.is_asked,
        )  # fmt: skip

    def _check(self, folders: Sequence[Path]) -> dict[str, float]:
        """What the user's own checker, if there is one, says of the responses in the folders."""
        checked_by = (self._cfg.pairs.checker, self._tokenizer, self._world)
        return generators.check_responses(folders, *checked_by, should_stop=lambda: self._stop.is_asked)

    def _fixed_tasks(self, finished: int) -> dict[Path, generators.PlayTask]:
        """What the policy of so many finished iterations is asked besides: always the same, with the same numbers."""
        if not self._plan.num_fixed_prompts:
            return {}
        samples = range(self._plan.num_fixed_prompts)
        return {self._fixed_folder(finished): self._task(self._val_prompts, samples, responses_per_prompt=1)}

    def _write_fixed_prompts(self, finished: int) -> list[dict[str, Any]]:
        """Into ``fixed_prompts.jsonl``, from the responses that are on disk; on rank 0."""
        if not self._world.is_main or not self._plan.num_fixed_prompts:
            return []
        steps = [min(self._progress.iteration_start(i), self._progress.step) for i in range(finished + 1)]
        played = {i: (self._fixed_folder(i) / "responses", step) for i, step in enumerate(steps)}
        return report.write_fixed_prompts(self._output_dir / "fixed_prompts.jsonl", played, self._tokenizer.decode)

    def _answer_fixed_prompts(self) -> None:
        """The fixed prompts' last responses, of the weights at the end of the run, and all of them side by side."""
        finished = self._progress.iteration + (not self._progress.is_iteration_start)
        if tasks := self._fixed_tasks(finished):
            self._opponent = model.weights_fingerprint(self._model)
            self._play(tasks)
            if rows := self._write_fixed_prompts(finished):
                show(report.fixed_prompts_table(rows))

    def _score(self, folder: Path, batches: Sequence[list[Pair]], counts: Mapping[str, int]) -> None:
        """The opponent scores all responses, into the store ``pairs`` of the folder, which keeps ``counts`` too."""
        reference.score_pairs(
            folder / "pairs", batches, self._model, self._world, self._cfg, self._layout, opponent=self._opponent,
            report=counts, should_stop=lambda: self._stop.is_asked,
        )  # fmt: skip

    def _fit_rows(self, pairs: Mapping[tuple[int, str], Pair], iteration: int) -> Sequence[list[Pair]]:
        """The batches of an iteration's first epoch, whose rows' lengths are those of all of its rows."""
        batches = self._plan.batches(pairs, iteration, epoch=0)
        tokens = ([pair.num_tokens for pair in batch] for batch in batches)
        self._layout = fit_lengths(tokens, self._layout, self._world.world_size)
        return batches

    def _begin_training(self, iteration: int) -> None:
        """Beta, learning rate and, unless it continues, the optimizer of an iteration."""
        self._loss = self._losses[iteration]
        if self._plan.resets_optimizer:
            self._optimizer = self._new_optimizer()
        self._history, self._val_loss_before = [], self._val_loss

    def _batches(self, pairs: Mapping[tuple[int, str], Pair], iteration: int) -> Iterator[RowBatch]:
        """The steps that an iteration has left, epoch by epoch; to be asked for the next one after each."""
        progress, plan = self._progress, self._plan
        with stage("train", "step", plan.steps_in(iteration), plan.steps_of(iteration)) as bar:
            while progress.iteration == iteration and not progress.is_done:
                batches = plan.batches(pairs, iteration, progress.epoch, start=progress.step_in_epoch)
                # this rank's rows of each, packed while the device computes
                for batch in load_rows(batches, self._world, self._layout):
                    yield batch
                    shown = {k: v for k, v in self._history[-1].items() if k in ("loss", "total_loss", "acc", "margin")}
                    bar.update(notes={name: f"{value:.4f}" for name, value in shown.items()})
                    if progress.is_done:
                        return

    def _lr(self) -> float:
        """The next step's learning rate; a batch that is left out does not move the schedule."""
        progress = self._progress
        first, last = self._plan.lr_span()
        step = progress.step - first - self._nonfinite.skipped_between(first, progress.step)
        lr, schedule = self._lrs[progress.iteration], self._cfg.lr_scheduler
        return lr * training.lr_factor(step=step, total_steps=last - first, **schedule)

    def _eval_losses(self, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses, rewards and weights of scored pairs under the policy as it is now."""
        return training.eval_pair_losses(self._loss, pairs, self._scored_now(pairs), self._layout)

    def _scored_now(self, pairs: Sequence[Pair]) -> list[Pair]:
        """Pairs with log-probs under the policy as it is now, by training's programs. Collective."""
        return reference.score_batches(
            self._model, self._plan.batched(pairs), self._world, layout=self._layout,
            chunk_tokens=self._cfg.logprob_chunk_tokens, as_in_training=self._cfg.compile,
        )  # fmt: skip

    def _finish_iteration(self, iteration: int) -> None:
        stops, folder = self._sampling.stop_token_ids, self._folder(iteration)
        with stage("save"):
            self._check_last_update()
            model_dir = self._checkpointer.export(self._model, iteration, self._world, self._tokenizer, stops)
            checkpoint = self.save_checkpoint()
        if self._world.is_main:
            found = (self._history, self._val_loss_before, folder, model_dir, checkpoint)
            show(run.iteration_summary(self._title(iteration), *found))
            (folder / "rows").unlink(missing_ok=True)  # scratch

    # PLUMBING: what is saved, and small things.
    def save_checkpoint(self) -> Path:
        """Saves what a run resumes from; gives the folder. Raises ``CheckpointError`` if this checkpoint or the last
        one cannot be written, ``NonFiniteError`` if the last update left weights that nothing can be computed with, and
        ``OutputError`` if a line of the log could not be written: resuming would lose it."""
        self._run_log.check()
        self._check_last_update()
        step, optimizer = self._progress.step, None if self._plan.resets_optimizer else self._optimizer
        return self._checkpointer.save(
            step=step, model=self._model, optimizer=optimizer, state=self.state_dict(), world=self._world,
            metric=self._val_loss if self._val_step == step else None,  # of these weights, or unknown
            anchor=self._progress.is_iteration_start and self._monitor.can_roll_back,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """What a run needs besides tensors to resume; JSON values."""
        return {
            "progress": self._progress.state_dict(), "total_steps": self._progress.total_steps,
            "opponent": self._opponent, "trained_in": self._trained_in, "val_loss": self._val_loss,
            "nonfinite": self._nonfinite.skipped, "watch": self._monitor.state_dict(), "run": self._run_fingerprint,
            "row_lengths": self._layout.fitted, "own_code": config.own_code(self._cfg),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` gave; a ``CheckpointError`` if what the results depend on has changed and is
        not in ``resume_with_changes``."""
        with as_checkpoint_error(self._output_dir / "checkpoints"):
            within = not state["progress"].get("is_iteration_start", True)
            run.check_unchanged(state["run"], self._run_fingerprint, self._cfg, within)
            self._progress.load_state_dict(state["progress"])
            if self._world.is_main:
                self._plan.compare_schedules(state.get("total_steps"))
                run.compare_own_code(state.get("own_code", {}), self._cfg)
            self._opponent, self._val_loss = state["opponent"], state["val_loss"]
            self._trained_in = state.get("trained_in", self._progress.iteration - self._progress.is_iteration_start)
            self._nonfinite.skipped = state.get("nonfinite", [])
            self._monitor.load_state_dict(state.get("watch", {}), state["run"] == self._run_fingerprint)
            self._row_lengths = tuple(state.get("row_lengths", ()))

    def cleanup(self) -> None:
        """Closes the logs, the checkpointer, the generator and the process group, and unlocks the folder."""
        self._cleanup.close()

    def _check_last_update(self) -> None:
        """A step's loss is of the weights before it: what it left must be finite before it is saved or exported."""
        step, values = self._progress.step, {}
        pairs = [] if step - 1 in self._nonfinite.skipped else list(self._last_batch)[:4]
        if self._val_step == step:
            values = {"val_loss": self._val_loss or 0.0}
        elif pairs:
            scored = self._scored_now(pairs)
            values = {
                "log-prob of the last batch": sum(logp or 0.0 for pair in scored for logp in pair.reference_logps)
            }
        training.check_last_update(self._model, self._world, step, values)

    def _abort(self, alert: training.Alert, iteration: int) -> None:
        """Ends the run at a limit of the collapse monitor, with what it has, or as if the iteration had not begun."""
        if alert.rolls_back:
            self._checkpointer.roll_back(self._progress.iteration_start(iteration), self._world, alert.message)
        elif self._plan.is_iteration_over:
            self._finish_iteration(iteration)
        else:
            self.save_checkpoint()
        self._checkpointer.wait()
        log.info(f"Best model: {run.best_by_validation(self._output_dir) or 'not known without validation data'}")
        raise alert.error(self._progress.step)

    def _title(self, iteration: int) -> str:
        return f"iteration {iteration}"

    def _folder(self, iteration: int) -> Path:
        return self._output_dir / f"iteration_{iteration:03d}"

    def _fixed_folder(self, finished: int) -> Path:
        return self._output_dir / "fixed_prompts" / f"{finished:03d}"

    def _log(self, metrics: dict[str, float]) -> None:
        metrics, self._play_metrics = metrics | self._play_metrics, {}
        metrics |= training.prefix_keys("compile_time", compile_seconds())
        self._history.append(metrics)
        self._run_log.metrics(self._progress.step, metrics)


# Every key that a config may have; for keys of your own: class MyConfig(config.SPINConfig): my_key: int = 1
@config.parse(config.SPINConfig)
def recipe_main(cfg: config.SPINConfig) -> None:
    """Runs the recipe; see the head of this file."""
    recipe = SPINRecipe(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
