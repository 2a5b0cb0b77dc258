"""Takes the first step's gradient of a recipe run and writes it as one vector: `one_step.py OUT.pt OUTPUT_DIR
key=value ...`, alone or started by torchrun."""

import os
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from spin.model.sharding import full_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.recipes.helpers import run  # noqa: E402


def main(out, output_dir, *overrides):
    kept = []

    def keep(optimizer, *_):
        grads = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        kept.append(torch.cat([full_tensor(grad).double().flatten() for grad in grads]))

    hook = register_optimizer_step_pre_hook(keep)
    run(output_dir, "max_steps=1", "clip_grad_norm=null", "validation_dataset=null", *overrides)
    hook.remove()
    if os.environ.get("RANK", "0") == "0":
        torch.save(kept[0], out)


if __name__ == "__main__":
    main(*sys.argv[1:])
