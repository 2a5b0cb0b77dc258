"""Triplets, for T-SPIN: pairs with a third response, the answer of what the run started from.

The start's answer to a sample is what iteration 0 answered, or would have answered: drawn from the run's first weights
with iteration 0's random numbers. Where iteration 0 played a sample, its store has the answer; where it did not, the
model is lent the first weights in the iteration that needs them
(:func:`spin.generators.mixed_opponent.weights_of_start`). It is
the second generated response of a :class:`spin.data.Pair`, and stands so in ``iteration_NNN/pairs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from spin.config.parse import component_of
from spin.core.errors import StoreError
from spin.core.ranks import World, broadcast_object, raise_on_all_ranks
from spin.data.dataset import PromptDataset
from spin.pairs.store import MANIFEST, PairStore
from spin.types import Pair, Response, TokenIds


def takes_triplets(cfg: DictConfig) -> bool:
    """Whether a config's loss has ``needs_start_answers``, as :class:`spin.loss.TSPINLoss` does.

    Args:
        cfg (DictConfig): complete, its components allowed.

    Returns:
        bool: from iteration 1 on, pairs are triplets.
    """
    return bool(getattr(component_of(cfg, "loss"), "needs_start_answers", False))


def answers_per_pair(cfg: DictConfig) -> int:
    """Generated responses of a pair at most, the start's among them.

    Args:
        cfg (DictConfig): complete.

    Returns:
        int: 1 or more.
    """
    return int(cfg.pairs.responses_per_prompt) + takes_triplets(cfg)


class StartAnswers:
    """What the run's first weights answered: in iteration 0, which is read once, and to the samples that it lacks.

    Args:
        output_dir (Path): of the run.
        folder (Path): of this iteration, or of its validation pairs.
    """

    def __init__(self, output_dir: Path, folder: Path) -> None:
        within = folder.relative_to(output_dir).parts[1:]  # without iteration_NNN
        self._first = output_dir.joinpath("iteration_000", *within, "responses")
        self._own = folder / "start" / "responses"  # beside an iteration's own answers, those that iteration 0 lacks

    def missing(self, prompts: PromptDataset, samples: Sequence[int], world: World) -> list[int]:
        """Samples that iteration 0 did not answer, or another prompt of that name. Collective.

        Args:
            prompts (PromptDataset): the data set.
            samples (Sequence[int]): which of its samples are asked for.
            world (World): the ranks.

        Returns:
            list[int]: some of ``samples``, in order; all of them if iteration 0's answers are gone.

        Raises:
            StoreError: If these are damaged.
        """
        missing: list[int] = []
        with raise_on_all_ranks(world, StoreError):
            if world.is_main:
                for sample in samples:
                    prompt = prompts[sample]
                    found = self._of_iteration_0.get(prompt.sample_id)
                    if found is None or not np.array_equal(found[0], prompt.prompt_ids):
                        missing.append(sample)
        return broadcast_object(missing, world)

    def add_to(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """Makes triplets of pairs.

        Args:
            pairs (Iterable[Pair]): with one generated response each.

        Yields:
            Pair: with the start's answer as a second generated response.

        Raises:
            StoreError: If there is no answer of the start to a sample.
        """
        answers = self._of_iteration_0 | _answers(self._own)  # what is in both was asked anew
        for pair in pairs:
            if pair.sample_id not in answers:
                raise StoreError(
                    f"sample {pair.sample_id}: neither {self._first} nor {self._own} has an answer of what the run "
                    "started from, which the loss needs. Start the run again from the iteration's start: resume=<path>."
                )
            yield replace(pair, generated=[*pair.generated, answers[pair.sample_id][1]])

    @cached_property
    def _of_iteration_0(self) -> dict[str, tuple[TokenIds, Response]]:
        return _answers(self._first)


def _answers(store: Path) -> dict[str, tuple[TokenIds, Response]]:
    """Each sample's prompt and answer; none if there is no such store."""
    if not (store / MANIFEST).exists():
        return {}
    return {pair.sample_id: (pair.prompt_ids, pair.generated[0]) for pair in PairStore.open(store).pairs()}
