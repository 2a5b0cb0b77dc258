"""A job of an experiment: the product's own recipe, and measurements after each iteration."""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from jobs import overrides
from spin_recipe import SPINRecipe
from spin_sft import SFTRecipe

from spin.checkpoint import SPINCheckpointer
from spin.config import SPINConfig, complete, load_config
from spin.data import Pair, Prompt, Response, prompt_dataset
from spin.data.dataset import PromptSource
from spin.generators.engines import policy_loaded
from spin.generators.sampling import sample_seed
from spin.model.fingerprint import weights_fingerprint
from spin.pairs.loader import RowBatch
from spin.reference.stage import score_batches
from spin.training import Step

Report = Callable[[dict[str, Any]], None]
RECIPES = {"spin": SPINRecipe, "sft": SFTRecipe, "none": SPINRecipe}  # none: measure the start


class ExportsOnly(SPINCheckpointer):
    """Writes models and no checkpoints: a run of an experiment is short."""

    def save(self, *, step: int, **state: Any) -> Path:
        """Nothing; where a checkpoint would be."""
        return self.checkpoints_dir / f"step_{step:08d}"


class KeepsNothing(ExportsOnly):
    """Writes no models either: a run leaves its figures only."""

    def export(self, model: torch.nn.Module, iteration: int, world: Any, *of_tokenizer: object) -> Path:
        """Nothing; where a model would be."""
        return Path(self.output_dir) / f"iteration_{iteration:03d}" / "hf_model"


def prompts(tokenizer: Any, max_seq_len: int, **given: Any) -> PromptSource:
    """``prompt_dataset``, whose result a worker keeps for its next jobs."""
    key = json.dumps([tokenizer.fingerprint, max_seq_len, given], sort_keys=True)
    if key not in _READ:
        _READ[key] = prompt_dataset(tokenizer=tokenizer, max_seq_len=max_seq_len, **given)
    return _READ[key]


_READ: dict[str, PromptSource] = {}


class Measured:
    """Mixed into a recipe: measures at every validation. A ``measure`` function gets the recipe and uses what has no
    underscore here."""

    def __init__(self, cfg: SPINConfig, job: Mapping[str, Any], report: Report) -> None:
        super().__init__(cfg)
        self._job, self._report, self.is_start = job, report, job["keeps"]
        module, name = job["measure"].rsplit(".", 1)
        self._measure = getattr(importlib.import_module(module), name)
        self._trained_tokens, self._gradients = 0, []
        self._spent = dict.fromkeys(("setup", "play", "score", "train", "validate", "measure", "compile"), 0.0)

    def setup(self) -> None:
        """As the recipe's, and what else is asked."""
        with self._timed("setup"):
            super().setup()
            self._began = weights_fingerprint(self._model)[:12]
            reading = {"tokenizer": self._tokenizer, "max_seq_len": self._model.max_seq_len}
            self.others = {name: list(prompts(**reading, **given)) for name, given in self._job["others"].items()}
        self.sampling, self.val_prompts = self._sampling, list(self._val_prompts)
        self._started = time.perf_counter()

    def train_single_step(self, batch: RowBatch) -> Step:
        """As the recipe's; counts tokens through forward and backward, prompts included."""
        self._trained_tokens += sum(row.used_tokens for row in batch.rows)
        with self._timed("train"):
            return super().train_single_step(batch)

    @torch.no_grad()
    def run_validation(self) -> dict[str, float]:
        """As the recipe's, and everything else that is measured."""
        with self._timed("validate"):
            metrics = super().run_validation()
        self.is_over = self._job["recipe"] == "none" or self._progress.is_done
        with self._timed("measure"):
            measured = self._measure(self)
        counts = {
            "began": self._began,
            "trained_tokens": self._trained_tokens,
            "seconds": round(time.perf_counter() - self._started - self._spent["measure"], 1),
            "spent": {stage: round(seconds, 1) for stage, seconds in self._spent.items()},
            **({"gradients": self._gradients} if self._gradients else {}),
        }
        self._report({"val_loss": metrics["val_loss"], **measured, **counts})
        return metrics

    def _play(self, *given: Any) -> None:
        with self._timed("play"):
            super()._play(*given)

    def _score(self, *given: Any) -> None:
        with self._timed("score"):
            super()._score(*given)

    def _log(self, metrics: dict[str, float]) -> None:
        super()._log(metrics)
        logged = self._history[-1]
        self._spent["compile"] += sum(value for name, value in logged.items() if name.startswith("compile_time/"))
        compared = {name.removeprefix("gradient/"): v for name, v in logged.items() if name.startswith("gradient/")}
        if compared:
            at = {"iteration": int(logged["iteration"]), "samples": int(logged["consumed_samples"])}
            self._gradients.append(at | {name: float(f"{value:.4g}") for name, value in compared.items()})

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of its block to those of a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._spent[stage] += time.perf_counter() - started

    def policy(self) -> AbstractContextManager[None]:
        """In its block the generator responds as the policy does."""
        return policy_loaded(self._generator, self._model)

    def respond(self, prompts: Sequence[Prompt], sampling: Any, numbers: Sequence[int] = (0,)) -> list[list[Response]]:
        """Responses to all prompts, once for each number; the same random numbers in every iteration and arm of a
        seed."""
        responses = self._generator.generate(
            [list(map(int, prompt.prompt_ids)) for prompt in prompts] * len(numbers),
            sampling,
            [sample_seed(self._cfg.seed, -1, prompt.sample_id, number) for number in numbers for prompt in prompts],
        )
        return [responses[start : start + len(prompts)] for start in range(0, len(responses), len(prompts))]

    def nll(self, prompts: Sequence[Prompt]) -> list[float]:
        """Mean negative log-prob of each prompt's real response in nats per token."""
        pairs = [Pair(each.sample_id, 0, each.prompt_ids, each.real_ids) for each in prompts]
        scored = score_batches(
            self._model,
            self._plan.batched(pairs),
            self._world,
            layout=self._layout,
            chunk_tokens=self._cfg.logprob_chunk_tokens,
        )
        found = {pair.sample_id: -pair.reference_real_logp / len(pair.real_ids) for pair in scored}
        return [found[prompt.sample_id] for prompt in prompts]

    def text(self, token_ids: Sequence[int]) -> str:
        """Of a response, without its stop token."""
        ids = [int(token) for token in token_ids]
        return self._tokenizer.decode([token for token in ids if token not in self._tokenizer.eos_ids]).strip()


def run_recipe(job: Mapping[str, Any], report: Report) -> None:
    """Runs a job's recipe in a folder of its own. One that ``keeps`` a model leaves it there; of others nothing is left
    but what ``report`` gets after each iteration; a RuntimeError if the recipe stopped before its last step."""
    folder, is_kept = Path(job["folder"]), job["keeps"]
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        **job["settings"],
        "output_dir": str(folder),
        "checkpointer._component_": f"measured.{'ExportsOnly' if is_kept else 'KeepsNothing'}",
    }
    cfg = complete(load_config(job["base"], overrides(settings)), SPINConfig)
    kind = type("Recipe", (Measured, RECIPES[job["recipe"]]), {})
    recipe = kind(cfg, job, report)
    try:
        recipe.setup()
        if job["recipe"] == "none":
            recipe.run_validation()
        else:
            recipe.train()
            if not recipe._progress.is_done:
                raise RuntimeError(f"stopped at step {recipe._progress.step}")
    finally:
        recipe.cleanup()
        del recipe
        gc.collect()
        torch.cuda.empty_cache()
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
