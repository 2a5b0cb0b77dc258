"""Triplets, for T-SPIN: pairs with a third response, the answer of what the run started from.

The start's answer to a sample is what iteration 0 answered, or would have answered: drawn from the run's first weights
with iteration 0's random numbers. Where iteration 0 played a sample, its store has the answer; where it did not, the
model is lent the first weights in the iteration that needs them (:func:`spin.mixed_opponent.weights_of_start`). It is
the second generated response of a :class:`spin.data.Pair`, and stands so in ``iteration_NNN/pairs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from spin.config import ALLOWED_ROOTS, resolve_component
from spin.data.prompts import PromptDataset
from spin.data.store import MANIFEST, PairStore
from spin.data.types import Pair, Response
from spin.distributed import World, broadcast_object, fail_together
from spin.errors import StoreError


def takes_triplets(cfg: DictConfig) -> bool:
    """Whether a config's loss has ``needs_start_answers``, as :class:`spin.loss.TSPINLoss` does.

    Args:
        cfg (DictConfig): complete, its components allowed.

    Returns:
        bool: from iteration 1 on, pairs are triplets.
    """
    loss = resolve_component(cfg.loss._component_, (*ALLOWED_ROOTS, *cfg.allow_components))
    return bool(getattr(loss, "needs_start_answers", False))


def answers_per_pair(cfg: DictConfig) -> int:
    """Generated responses of a pair at most, the start's among them.

    Args:
        cfg (DictConfig): complete.

    Returns:
        int: 1 or more.
    """
    return int(cfg.pairs.responses_per_prompt) + takes_triplets(cfg)


def not_answered(
    output_dir: Path, folder: Path, prompts: PromptDataset, samples: Sequence[int], world: World
) -> list[int]:
    """Samples that iteration 0 did not answer, or another prompt of that name. Collective.

    Args:
        output_dir (Path): of the run.
        folder (Path): of this iteration, or of its validation pairs.
        prompts (PromptDataset): the data set.
        samples (Sequence[int]): which of its samples are asked for.
        world (World): the ranks.

    Returns:
        list[int]: some of ``samples``, in order; all of them if iteration 0's answers are gone.

    Raises:
        StoreError: If these are damaged.
    """
    missing = list(samples)
    store = _stores(output_dir, folder)[0]
    with fail_together(world, StoreError):
        if world.is_main and (store / MANIFEST).exists():
            asked = {pair.sample_id: pair.prompt_ids for pair in PairStore.open(store).pairs()}
            chosen = ((sample, prompts[sample]) for sample in samples)
            missing = [
                sample
                for sample, prompt in chosen
                if not np.array_equal(asked.get(prompt.sample_id, ()), prompt.prompt_ids)
            ]
    return broadcast_object(missing, world)


def add_start_answers(pairs: Iterable[Pair], output_dir: Path, folder: Path) -> Iterator[Pair]:
    """Makes triplets of pairs.

    Args:
        pairs (Iterable[Pair]): with one generated response each.
        output_dir (Path): of the run.
        folder (Path): of this iteration, or of its validation pairs.

    Yields:
        Pair: with the start's answer as a second generated response.

    Raises:
        StoreError: If there is no answer of the start to a sample.
    """
    stores = _stores(output_dir, folder)
    answers: dict[str, Response] = {}
    for store in stores:  # what is in both was asked anew
        if (store / MANIFEST).exists():
            answers.update((pair.sample_id, pair.generated[0]) for pair in PairStore.open(store).pairs())
    for pair in pairs:
        if pair.sample_id not in answers:
            raise StoreError(
                f"sample {pair.sample_id}: neither {stores[0]} nor {stores[1]} has an answer of what the run started "
                "from, which the loss needs. Start the run again from the iteration's start: resume=<path>."
            )
        yield replace(pair, generated=[*pair.generated, answers[pair.sample_id]])


def _stores(output_dir: Path, folder: Path) -> tuple[Path, Path]:
    """Where the start's answers are: those of iteration 0, and, beside an iteration's own, those that it lacked."""
    within = folder.relative_to(output_dir).parts[1:]  # without iteration_NNN
    return output_dir.joinpath("iteration_000", *within, "responses"), folder / "start" / "responses"
