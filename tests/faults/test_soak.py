"""A long run stays flat: open files, threads, objects and memory at the start of each of its iterations."""

import gc
import os
import threading
from pathlib import Path

import pytest
from spin_recipe import SPINRecipe

from tests.recipes.helpers import run

ITERATIONS, WARM_UP = 18, 5  # caches fill up in the first
OVERRIDES = [
    "dataset.limit=8", "validation_dataset.limit=2", "sampling.max_new_tokens=6", "max_epochs=1",
    "checkpointer.keep_last=2", "optimizer.lr=1e-6", "validation.table_rows=1", f"max_iterations={ITERATIONS}",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.slow
def test_a_long_run_stays_flat(tmp_path):
    """No file or thread is kept; an iteration may keep 100 objects (metrics, file names), all of them 10 MiB."""
    counts = []

    class Counted(SPINRecipe):
        def augment_dataloader(self, iteration):
            gc.collect()
            files, threads, objects = len(os.listdir("/proc/self/fd")), threading.active_count(), len(gc.get_objects())
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            counts.append((files, threads, objects, pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
            return super().augment_dataloader(iteration)

    run(tmp_path, *OVERRIDES, recipe_class=Counted)
    # the lowest of five iterations each: a checkpoint that is being written holds a file open for a moment
    early, late = (map(min, zip(*part, strict=True)) for part in (counts[WARM_UP : WARM_UP + 5], counts[-5:]))
    grown = [after - before for before, after in zip(early, late, strict=True)]
    assert all(growth <= most for growth, most in zip(grown, (0, 0, 100 * ITERATIONS, 10.0), strict=True)), grown
