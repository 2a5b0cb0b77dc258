"""Supervised fine-tuning on the real responses: what self-play should start from, as the first stage of the same run.

It takes the config of spin_recipe, and of its section `sft` what differs: learning rate, schedule and epochs. It is a
run of its own in `<output_dir>/sft`, with everything that a run has: packed rows, shards, adapters, checkpoints, exact
resume, export, validation loss. spin_recipe with the same config then starts from its result, adapters included.

One GPU (or CPU):   spin run spin_sft --config my.yaml
Then self-play:     spin run spin_recipe --config my.yaml
Eight GPUs:         spin run --nproc_per_node 8 spin_sft --config my.yaml
Change anything:    spin run spin_sft --config my.yaml sft.epochs=2 sft.lr=1e-5
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

import torch
from spin_recipe import SPINRecipe

from spin import config, training
from spin.pairs import PackedRow, RowBatch, share_lookup
from spin.types import Pair


class SFTRecipe(SPINRecipe):
    """An SFT run: one iteration of a SPIN run without opponent. The loss is the mean negative log-likelihood per token
    of a global batch's real responses, in nats; a ``ConfigError`` if its config cannot work."""

    _sums = training.ResponseSums

    def __init__(self, cfg: config.SFTConfig) -> None:
        super().__init__(config.sft_stage(cfg))

    def augment_dataloader(self, iteration: int) -> Mapping[tuple[int, str], Pair]:
        """The prompts and real responses of the data set, as pairs without a generated response."""
        self._trained_in = iteration  # there is no opponent, whose equal the model would be at first
        prompts = self._prompts.window(iteration)
        samples = (prompts[index] for index in self._plan.samples(iteration))
        pairs = (Pair(each.sample_id, iteration, each.prompt_ids, each.real_ids) for each in samples)
        found = share_lookup(self._folder(iteration) / "rows", pairs, self._world)
        self._fit_rows(found, iteration)
        return found

    def train_single_step(self, batch: RowBatch) -> training.Step:
        """One optimizer step over a global batch of responses."""
        tokens = sum(len(pair.real_ids) for pair in batch.pairs)
        step = super().train_single_step(replace(batch, weight=float(tokens)))
        del step.metrics["beta"]
        return step

    def row_loss(self, row: PackedRow, logps: torch.Tensor) -> torch.Tensor:
        """A row's part of a batch's summed loss, by the log-probs of its responses in nats, shape (m,)."""
        return -logps.sum()

    def _title(self, iteration: int) -> str:
        return "supervised fine-tuning"


@config.parse(config.SFTConfig)
def recipe_main(cfg: config.SFTConfig) -> None:
    """Runs the recipe; see the head of this file."""
    recipe = SFTRecipe(cfg)
    recipe.setup()
    recipe.train()
    recipe.cleanup()


if __name__ == "__main__":
    sys.exit(recipe_main())
