"""Takes the first step's gradient of a recipe run and writes it whole: `one_step.py OUT.pt OUTPUT_DIR key=value ...`.

Started alone, or by torchrun; float64 when SPIN_FLOAT64 is set, for a reference.
"""

import os
import sys
from pathlib import Path

import torch
from spin_recipe import SPINRecipe

from spin.model.sharding import full_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.recipes.helpers import tiny_config  # noqa: E402


class OneStep(SPINRecipe):
    """Keeps the gradient that the optimizer would have used, and stops."""

    def _lr(self):  # asked for between the gradient and the update
        self.gradient = {name: full_tensor(p.grad).clone() for name, p in self._model.named_parameters()}
        return super()._lr()


def main(out, output_dir, *overrides):
    recipe = OneStep(
        tiny_config(output_dir, "max_steps=1", "clip_grad_norm=null", "validation_dataset=null", *overrides)
    )
    recipe.setup()
    recipe.train()
    if os.environ.get("RANK", "0") == "0":
        torch.save(recipe.gradient, out)
    recipe.cleanup()


if __name__ == "__main__":
    main(*sys.argv[1:])
