"""The runs of experiments/real_model.py: the product's recipe with measurements after every iteration, and supervised
fine-tuning through the same engine, for comparison."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from real_metrics import chosen_right, classifier_accuracy, distinct_fraction, repeated_fraction, says_number
from spin_recipe import SPINRecipe

from spin.checkpoint import SPINCheckpointer
from spin.config import SPINConfig, complete, load_config
from spin.data import Pair, Response, prompt_dataset
from spin.generators.engines import policy_loaded
from spin.generators.sampling import sample_seed
from spin.model.sharding import accumulating, clip_grad_norm
from spin.pairs.loader import RowBatch
from spin.reference.logprobs import pair_objective
from spin.reference.stage import score_batches
from spin.training import Step, lr_factor

SUM_TOKENS = 48  # of a response to a sum
Report = Callable[[dict[str, Any]], None]


class KeepsNothing(SPINCheckpointer):
    """Writes neither checkpoints nor models: a run of the experiment is short and leaves its figures only."""

    def save(self, *, step: int, **state: Any) -> Path:
        """Nothing; where a checkpoint would be."""
        return self.checkpoints_dir / f"step_{step:08d}"

    def export(self, model: torch.nn.Module, iteration: int, world: Any, *of_tokenizer: object) -> Path:
        """Nothing; where a model would be."""
        return Path(self.output_dir) / f"iteration_{iteration:03d}" / "hf_model"


class MeasuredSPIN(SPINRecipe):
    """The recipe as it is, with measurements on held-out prompts where an iteration ends.

    Args:
        cfg (SPINConfig): complete.
        questions (Mapping[str, Mapping[str, Any]]): arguments of ``prompt_dataset`` for ``choices`` and ``sums``.
        report (Report): gets the measurements of each iteration.
    """

    def __init__(self, cfg: SPINConfig, questions: Mapping[str, Mapping[str, Any]], report: Report) -> None:
        super().__init__(cfg)
        self._question_arguments = questions
        self._report = report
        self.trained_tokens = 0  # through forward and backward, prompts included

    def setup(self) -> None:
        """As the recipe's, and the questions."""
        super().setup()
        self._questions = {
            name: prompt_dataset(tokenizer=self._tokenizer, max_seq_len=self._model.max_seq_len, **arguments)
            for name, arguments in self._question_arguments.items()
        }
        self._started = time.perf_counter()
        self._measuring = 0.0

    def train_single_step(self, batch: RowBatch) -> Step:
        """As the recipe's; counts tokens."""
        self.trained_tokens += sum(row.used_tokens for row in batch.rows)
        return super().train_single_step(batch)

    @torch.no_grad()
    def run_validation(self) -> dict[str, float]:
        """As the recipe's; between two iterations also everything else that is measured."""
        metrics = super().run_validation()
        if self._progress.is_iteration_start:
            started = time.perf_counter()
            measured = self._measure()
            self._measuring += time.perf_counter() - started
            self._report(
                {
                    "val_loss": metrics["val_loss"],
                    **measured,
                    "trained_tokens": self.trained_tokens,
                    "seconds": round(time.perf_counter() - self._started - self._measuring, 1),
                }
            )
        return metrics

    def _measure(self) -> dict[str, Any]:
        prompts = [self._val_prompts[i] for i in range(self._plan.num_val_samples)]
        sums = list(self._questions["sums"])
        with policy_loaded(self._generator, self._model):
            responses = self._respond(prompts, self._sampling)
            # greedy, as for a sum
            short = replace(self._sampling, temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=SUM_TOKENS)
            results = self._respond(sums, short)
        real = [self._text(prompt.real_ids) for prompt in prompts]
        generated = [self._text(response.token_ids) for response in responses]
        tokens = [response.token_ids for response in responses]
        right = [
            says_number(self._text(response.token_ids), self._text(question.real_ids))
            for response, question in zip(results, sums, strict=True)
        ]
        return {
            **{
                f"classifier_{features}": classifier_accuracy(real, generated, features)
                for features in ("text", "opening", "length")
            },
            "response_tokens": sum(map(len, tokens)) / len(tokens),
            "real_tokens": sum(len(prompt.real_ids) for prompt in prompts) / len(prompts),
            "truncated_fraction": sum(response.finish_reason == "length" for response in responses) / len(responses),
            "repeated_4grams": repeated_fraction(tokens),
            "distinct_2grams": distinct_fraction(tokens),
            "choices_accuracy": chosen_right(self._choice_scores()),
            "sums_accuracy": sum(right) / len(right),
            "example": {"prompt": prompts[0].sample_id, "real": real[0], "generated": generated[0]},
        }

    def _respond(self, prompts: Sequence[Any], sampling: Any) -> list[Response]:
        """One response to each prompt; the same random numbers in every iteration and arm of a seed."""
        return self._generator.generate(
            [list(map(int, prompt.prompt_ids)) for prompt in prompts],
            sampling,
            [sample_seed(self._cfg.seed, -1, prompt.sample_id, 0) for prompt in prompts],
        )

    def _choice_scores(self) -> dict[str, float]:
        """Mean log-prob per token of each choice, by its id."""
        pairs = [Pair(each.sample_id, 0, each.prompt_ids, each.real_ids) for each in self._questions["choices"]]
        scored = score_batches(
            self._model,
            self._plan.batched(pairs),
            self._world,
            layout=self._layout,
            chunk_tokens=self._cfg.logprob_chunk_tokens,
        )
        return {pair.sample_id: (pair.reference_real_logp or 0.0) / len(pair.real_ids) for pair in scored}

    def _text(self, token_ids: Sequence[int]) -> str:
        ids = [int(token) for token in token_ids]
        return self._tokenizer.decode([token for token in ids if token not in self._tokenizer.eos_ids]).strip()


class MeasuredSFT(MeasuredSPIN):
    """Supervised fine-tuning on the real responses alone, through the same rows, head and optimizer.

    An iteration of it is as many optimizer steps as one of self-play. ``global_batch_size`` is the config's own and
    sets how many tokens a step trains on. The optimizer and its schedule continue over the whole run, as is usual.
    """

    def train(self) -> None:
        """All iterations; there is nothing to play and nothing to score."""
        progress = self._progress
        for iteration in range(self._cfg.max_iterations):
            samples = self._plan.samples(iteration)
            prompts = [self._prompts[sample] for sample in samples]
            batches = self._plan.batched(
                [Pair(each.sample_id, iteration, each.prompt_ids, each.real_ids) for each in prompts]
            )
            for batch in self._rows(batches):
                metrics = self._learn(batch)
                if progress.is_iteration_start:
                    metrics |= self.run_validation()
                self._log(metrics)

    def _learn(self, batch: RowBatch) -> dict[str, float]:
        cfg, world, progress = self._cfg, self._world, self._progress
        self.trained_tokens += sum(row.used_tokens for row in batch.rows)
        tokens = sum(len(pair.real_ids) for pair in batch.pairs)
        nats = 0.0
        with accumulating(self._model, batch.rows, unsharded_gradients=cfg.fsdp_accumulate_unsharded) as rows:
            for row in (row.to(world.device) for row in rows):
                mean = partial(_summed_loss, world.world_size / tokens)
                loss, logps = pair_objective(self._model, row, mean, cfg.logprob_chunk_tokens)
                loss.backward()
                nats -= logps.sum().item()
        clip_grad_norm(self._model, cfg.clip_grad_norm)
        lr = self._lrs[0] * lr_factor(step=progress.step, total_steps=progress.total_steps, **cfg.lr_scheduler)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        iteration = progress.iteration
        progress.advance(len(batch.pairs))
        return {"nll": nats / tokens, "lr": lr, "iteration": iteration}


def _summed_loss(scale: float, logps: torch.Tensor) -> torch.Tensor:
    return -logps.sum() * scale


RECIPES = {"spin": MeasuredSPIN, "sft": MeasuredSFT}


def run_stages(
    base: str,
    stages: Sequence[Mapping[str, Any]],
    questions: Mapping[str, Mapping[str, Any]],
    folder: Path,
    report: Report,
) -> None:
    """Runs an arm: stages one after another, each from the weights that the one before ended with.

    Args:
        base (str): name of the packaged config.
        stages (Sequence[Mapping[str, Any]]): of each its ``recipe`` (one of ``RECIPES``, or ``none`` to measure only)
            and its ``settings``, values by dotted key.
        questions (Mapping[str, Mapping[str, Any]]): see :class:`MeasuredSPIN`.
        folder (Path): scratch space; emptied before and removed afterwards.
        report (Report): gets the measurements after each iteration.

    Raises:
        RuntimeError: If a stage stopped before its last step.
    """
    shutil.rmtree(folder, ignore_errors=True)
    handed_on: Path | None = None
    tokens, seconds = 0, 0.0
    try:
        for number, stage in enumerate(stages):
            settings = {**stage["settings"], "output_dir": str(folder / f"stage_{number}")}
            if handed_on is not None:
                settings["checkpointer.checkpoint_dir"] = str(handed_on)
            overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            cfg = complete(load_config(base, overrides), SPINConfig)

            def add(measured: dict[str, Any], tokens: int = tokens, seconds: float = seconds) -> None:
                so_far = {"trained_tokens": tokens, "seconds": seconds}
                report(measured | {name: round(measured[name] + value, 1) for name, value in so_far.items()})

            recipe = RECIPES.get(stage["recipe"], MeasuredSPIN)(cfg, questions, add)
            recipe.setup()
            if stage["recipe"] == "none":
                recipe.run_validation()
            else:
                recipe.train()
                if not recipe._progress.is_done:
                    raise RuntimeError(f"stage {number} stopped at step {recipe._progress.step}")
            if number + 1 < len(stages):
                handed_on = SPINCheckpointer.export(recipe._checkpointer, recipe._model, number, recipe._world)
            tokens += recipe.trained_tokens
            seconds += time.perf_counter() - recipe._started - recipe._measuring
            recipe.cleanup()
            del recipe
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
