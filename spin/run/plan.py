"""What a run is going to do, from its config and the size of its data: samples, steps, intervals."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from spin.config import SFTConfig, SPINConfig
from spin.config.checks import doubtful
from spin.core.errors import ConfigError
from spin.core.progress import KINDS, Kind, RunProgress, begin_run
from spin.data.dataset import PromptSource
from spin.data.order import epoch_order, history_window, iteration_items
from spin.pairs.lookup import LazySequence
from spin.run.messages import start_message
from spin.run.progress import SPINProgress, compute_interval, compute_limit_batches, compute_num_steps_per_epoch
from spin.types import Pair

log = logging.getLogger(__name__)


class RunPlan:
    """The arithmetic of a run. Nothing in it changes but ``progress``.

    ``steps`` counts those of an epoch over an iteration's own samples (history adds to that), ``val_every`` and
    ``save_every`` those between two validations or checkpoints (0 for never), ``num_val_samples`` is what a validation
    takes, ``num_fixed_prompts`` the held-out prompts that are always answered. ConfigError if there would be no step.
    """

    def __init__(self, cfg: SPINConfig, prompts: PromptSource, num_val_prompts: int = 0) -> None:
        self._cfg, self._prompts, self._seed, self._size = cfg, prompts, cfg.seed, cfg.global_batch_size
        size = self._size
        self.is_sft = isinstance(cfg, SFTConfig)
        self._history = cfg.pairs.history, cfg.pairs.history_fraction
        self._reset_each_iteration = cfg.optimizer.reset_each_iteration
        self.steps = compute_num_steps_per_epoch(prompts.samples_per_iteration, size, cfg.limit_train_batches)
        if self.steps < 1:
            raise ConfigError(
                f"global_batch_size={size}: an epoch has no step, so nothing would be trained. An iteration can play "
                f"{prompts.samples_per_iteration} samples, and limit_train_batches is {cfg.limit_train_batches}. Lower "
                "the batch size, add data, or raise the limit."
            )
        per_epoch = [len(self.items(iteration)) // size for iteration in range(cfg.max_iterations)]
        self.progress = SPINProgress(per_epoch, cfg.max_epochs, cfg.max_iterations, cfg.max_steps)
        self.val_every = compute_interval(cfg.val_check_interval, self.steps)
        self.save_every = compute_interval(cfg.save_interval, self.steps)
        val_batches = compute_limit_batches(math.ceil(num_val_prompts / size), cfg.limit_val_batches)
        self.num_val_samples = min(num_val_prompts, val_batches * size)
        self.num_fixed_prompts = 0 if self.is_sft else min(num_val_prompts, cfg.validation.fixed_prompts)
        if self.num_fixed_prompts and cfg.generator.component == "spin.generators.ReplayGenerator":
            log.info("validation.fixed_prompts: left out, because recorded responses are not the policy's.")
            self.num_fixed_prompts = 0

    def start(self, ends_at: float, rates: Path | None = None) -> None:
        """Says what the run is going to do, and begins its progress where it stands; ``ends_at`` is when ``max_time``
        is over, by ``time.monotonic``, ``rates`` the file that keeps how fast its stages are."""
        progress, cfg, samples = self.progress, self._cfg, self._prompts.samples_per_iteration
        lr = cfg.optimizer["lr"] if self.is_sft else None
        log.info(start_message(progress, self._size, samples, self.num_val_samples, lr))
        for doubt in () if self.is_sft else doubtful(cfg):
            log.warning(doubt)
        # --- stages ---
        step, total, first = progress.step, progress.total_steps, progress.iteration_start
        iterations = [i for i in range(progress.max_iterations) if first(i) < total]
        at_start = int(self.num_val_samples > 0 and cfg.validation.at_start)
        stages: list[tuple[Kind, int | None]] = [("validate", None)] * at_start
        kinds = KINDS[KINDS.index("train" if self.is_sft else "generate") :]
        kinds = tuple(kind for kind in kinds if kind != "check" or cfg.pairs.checker is not None)
        stages += [(kind, None if self.is_sft else i) for i in iterations for kind in kinds]
        stages += [("generate", None)] * min(1, self.num_fixed_prompts)  # by the weights at the end
        within = 0 if progress.is_iteration_start else kinds.index("train")
        done = at_start + len(kinds) * progress.iteration + within if step else 0
        # --- work ---
        to_play = [] if self.is_sft else [i for i in iterations if first(i) >= step]
        val_samples = self.num_val_samples if cfg.validation.spin else 0
        validated = {first(i) + self.steps_in(i) for i in iterations}  # after these steps
        validated |= set(range(self.val_every, total, self.val_every)) if self.val_every else set()
        validations = sum(each > step for each in validated) + (at_start if step == 0 else 0)
        responses = len(to_play) * (self.steps * self._size + val_samples) * cfg.pairs.responses_per_prompt
        left: dict[Kind, int] = {
            "validate": validations * math.ceil(self.num_val_samples / self._size),
            "generate": responses + (len(to_play) + 1) * self.num_fixed_prompts,
            "check": responses if "check" in kinds else 0,
            "score": sum(progress.steps_in_epoch(i) + math.ceil(val_samples / self._size) for i in to_play),
            "train": total - step,
            "save": sum(first(i + 1) > step for i in iterations),
        }
        begin_run(RunProgress(stages, done, left, ends_at, rates))

    def batched(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """Pairs in order, as many as a global batch has in each list."""
        return [list(pairs[i : i + self._size]) for i in range(0, len(pairs), self._size)]

    def samples(self, iteration: int) -> list[int]:
        """The samples of the data set that an iteration's opponent responds to."""
        return self._prompts.iteration_samples(self.steps * self._size, self._seed, iteration)

    def items(self, iteration: int) -> list[tuple[int, int]]:
        """What an iteration trains on, as (iteration whose opponent responded, sample of the data set)."""
        return iteration_items(self.samples, iteration, *self._history)

    def history(self, iteration: int) -> list[int]:
        """The iterations before it whose pairs an iteration trains on too."""
        return history_window(iteration, self._history[0])[:-1]

    @property
    def resets_optimizer(self) -> bool:
        """The next step begins an iteration that has an optimizer and a learning rate schedule of its own."""
        return self._reset_each_iteration and self.progress.is_iteration_start

    @property
    def is_iteration_over(self) -> bool:
        """The step that was just made was the iteration's last."""
        return self.progress.is_done or self.progress.is_iteration_start

    @property
    def validates_now(self) -> bool:
        """After the step that was just made."""
        return self.is_iteration_over or bool(self.val_every and self.progress.step % self.val_every == 0)

    @property
    def saves_now(self) -> bool:
        """After the step that was just made, which was not the iteration's last."""
        return bool(self.save_every and self.progress.step % self.save_every == 0)

    def steps_of(self, iteration: int) -> int:
        """Steps of the iteration so far."""
        return self.progress.step - self.progress.iteration_start(iteration)

    def steps_in(self, iteration: int) -> int:
        """Steps of the iteration in all."""
        first = self.progress.iteration_start
        return min(first(iteration + 1), self.progress.total_steps) - first(iteration)

    def lr_span(self, total_steps: int | None = None) -> tuple[int, int]:
        """The first step of the learning rate's schedule, and the step after its last: of the iteration with
        ``optimizer.reset_each_iteration``, else of the run, or of one with other ``total_steps``."""
        progress = self.progress
        last = progress.total_steps if total_steps is None else total_steps
        if not self._reset_each_iteration:
            return 0, last
        return progress.iteration_start(progress.iteration), min(last, progress.iteration_start(progress.iteration + 1))

    def compare_schedules(self, total_steps: int | None) -> None:
        """Warns if a checkpoint was saved in the middle of a schedule that has another end now, because the run that
        saved it had other ``total_steps`` (None if it did not say)."""
        if total_steps is None or self.progress.is_done:
            return
        (first, last), (_, before) = self.lr_span(), self.lr_span(total_steps)
        if last != before and first < self.progress.step:
            log.warning(
                f"The learning rate's schedule ends at step {last} now; when the checkpoint was saved it ended at step "
                f"{before}. From here on the rate is another one than in a run with these settings from the start. "
                "Was max_steps or max_iterations changed?"
            )

    def batches(
        self, pairs: Mapping[tuple[int, str], Pair], iteration: int, epoch: int, start: int = 0
    ) -> Sequence[list[Pair]]:
        """Global batches of an epoch from a step on, each looked up when it is asked for."""
        items, size = self.items(iteration), self._size
        visited = self.progress.steps_in_epoch(iteration) * size
        # fractions of history: what is in whole batches of the first epoch is scored
        if epoch > 0 and visited < len(items):
            items = [items[i] for i in epoch_order(len(items), self._seed, iteration, epoch=0)[:visited]]
        order = epoch_order(len(items), self._seed, iteration, epoch)

        def batch(step: int) -> list[Pair]:
            chosen = (items[i] for i in order[step * size : (step + 1) * size])
            keys = [(played, self._prompts.sample_id(played, sample)) for played, sample in chosen]
            return [pair for key in keys if (pair := pairs.get(key)) is not None]

        return LazySequence(batch, range(start, self.progress.steps_in_epoch(iteration)))
