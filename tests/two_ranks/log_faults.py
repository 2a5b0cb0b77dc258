"""Two ranks of the recipe, the first of which cannot write its log: both end with its message. Argument: a folder."""

import sys
from pathlib import Path

from spin_recipe import SPINRecipe

from spin.core.errors import OutputError
from spin.core.ranks import barrier, gather_objects, shutdown

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.recipes.helpers import metrics_of, tiny_config  # noqa: E402

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null")
folder = Path(sys.argv[1])


class NameIsTaken(SPINRecipe):
    """From the second step on a folder has the name of metrics.jsonl."""

    def _log(self, metrics):
        file = self._output_dir / "metrics.jsonl"
        if self._progress.step == 2 and self._world.is_main:
            file.rename(file.with_suffix(".kept"))
            file.mkdir()
        super()._log(metrics)


def error_of(recipe):
    """What ends a run; the same on both ranks."""
    try:
        recipe.setup()
        recipe.train()
    except OutputError as error:
        assert len(set(gather_objects(str(error), recipe._world))) == 1
        recipe._checkpointer.close()
        if recipe._lock is not None:
            recipe._lock.release()
        return str(error)
    raise AssertionError("no error")


for save_interval, ends_after in ((0, 3), (1, 2)):  # a step's collective takes it along, or the next state does
    output = folder / f"save_every_{save_interval}"
    changes = (*SHORT, f"save_interval={save_interval}")
    recipe = NameIsTaken(tiny_config(output, *changes))
    message = error_of(recipe)
    assert message.startswith(f"rank 0: {output}/metrics.jsonl: cannot write (Is a directory)."), message
    assert recipe._progress.step == ends_after
    states = sorted(path.name for path in (output / "checkpoints").glob("step_*"))
    assert states == ["step_00000001"] * save_interval, states  # none whose log lacks a line
    if recipe._world.is_main:
        (output / "metrics.jsonl").rmdir()
        (output / "metrics.kept").replace(output / "metrics.jsonl")
    barrier(recipe._world)
    recipe = SPINRecipe(tiny_config(output, *changes))  # the folder is gone
    recipe.setup()
    recipe.train()
    recipe._checkpointer.close()
    if recipe._lock is not None:
        recipe._lock.release()

rows, others = (metrics_of(folder / f"save_every_{save_interval}") for save_interval in (0, 1))
assert rows == others and [row["step"] for row in rows] == [1, 2, 3, 4, 5]

if recipe._world.is_main:
    (folder / "begin" / "config.yaml").mkdir(parents=True)
barrier(recipe._world)
message = error_of(SPINRecipe(tiny_config(folder / "begin", *SHORT)))
assert message.startswith(f"rank 0: {folder}/begin/config.yaml: cannot write (Is a directory)."), message
shutdown()
