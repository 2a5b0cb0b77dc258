"""Two ranks of the recipe, the first of which cannot write its log: both end with its message. Argument: a folder."""

import os
import sys
from pathlib import Path

from spin_recipe import SPINRecipe

from spin.core.errors import OutputError
from spin.core.ranks import barrier, gather_objects, init_world, shutdown

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.recipes.helpers import metrics_of, step_of, tiny_config  # noqa: E402

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null")
folder, is_main = Path(sys.argv[1]), os.environ["RANK"] == "0"


class NameIsTaken(SPINRecipe):
    """From the second step on a folder has the name of metrics.jsonl."""

    def train_single_step(self, batch):
        step = super().train_single_step(batch)
        if step_of(self) == 2 and is_main:
            file = output / "metrics.jsonl"
            file.rename(file.with_suffix(".kept"))
            file.mkdir()
        return step


def release(recipe):
    """Closes a recipe, and keeps the process group."""
    recipe._checkpointer.close()
    if recipe._lock is not None:
        recipe._lock.release()


def error_of(recipe):
    """What ends a run; the same on both ranks."""
    try:
        recipe.setup()
        recipe.train()
    except OutputError as error:
        assert len(set(gather_objects(str(error), init_world("cpu")))) == 1
        release(recipe)
        return str(error)
    raise AssertionError("no error")


for save_interval, ends_after in ((0, 3), (1, 2)):  # a step's collective takes it along, or the next state does
    output = folder / f"save_every_{save_interval}"
    changes = (*SHORT, f"save_interval={save_interval}")
    recipe = NameIsTaken(tiny_config(output, *changes))
    message = error_of(recipe)
    assert message.startswith(f"rank 0: {output}/metrics.jsonl: cannot write (Is a directory)."), message
    assert step_of(recipe) == ends_after
    states = sorted(path.name for path in (output / "checkpoints").glob("step_*"))
    assert states == ["step_00000001"] * save_interval, states  # none whose log lacks a line
    if is_main:
        (output / "metrics.jsonl").rmdir()
        (output / "metrics.kept").replace(output / "metrics.jsonl")
    barrier(init_world("cpu"))
    recipe = SPINRecipe(tiny_config(output, *changes))  # the folder is gone
    recipe.setup()
    recipe.train()
    release(recipe)

rows, others = (metrics_of(folder / f"save_every_{save_interval}") for save_interval in (0, 1))
assert rows == others and [row["step"] for row in rows] == [1, 2, 3, 4, 5]

if is_main:
    (folder / "begin" / "config.yaml").mkdir(parents=True)
barrier(init_world("cpu"))
message = error_of(SPINRecipe(tiny_config(folder / "begin", *SHORT)))
assert message.startswith(f"rank 0: {folder}/begin/config.yaml: cannot write (Is a directory)."), message
shutdown()
