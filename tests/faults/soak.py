"""A long run must stay flat: open files, threads, objects and memory at each of its iterations.

python -m tests.faults.soak [ITERATIONS]
"""

import gc
import json
import os
import sys
import tempfile
import threading
from pathlib import Path

import spin_recipe

from tests.recipes.helpers import run

WARM_UP = 5  # iterations in which caches fill up
MOST_MIB = 10.0  # that resident memory may grow by after them
OVERRIDES = [
    "dataset.limit=8", "validation_dataset.limit=2", "sampling.max_new_tokens=6", "max_epochs=1",
    "checkpointer.keep_last=2", "optimizer.lr=1e-6", "validation.table_rows=1",
]  # fmt: skip


class Watched(spin_recipe.SPINRecipe):
    """The recipe, measured at the beginning of each iteration."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.counts = []

    def augment_dataloader(self, iteration):
        gc.collect()
        self.counts.append(
            {
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
                "objects": len(gc.get_objects()),
                "rss_mib": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
            }
        )
        return super().augment_dataloader(iteration)


def soak(folder, iterations):
    """Runs the recipe; the counts at the start of each iteration."""
    return run(folder, *OVERRIDES, f"max_iterations={iterations}", recipe_class=Watched).counts


def growth(counts):
    """What the last five iterations have on top of the first five after the warm-up, both at their lowest.

    A state that is being written in the background holds a file open for a moment.
    """
    early, late = counts[WARM_UP : WARM_UP + 5], counts[-5:]
    return {name: min(line[name] for line in late) - min(line[name] for line in early) for name in counts[0]}


def leaks(counts):
    """What grew by more than it may; an iteration's own records (metrics, file names) may stay: 100 objects."""
    grown, iterations = growth(counts), len(counts) - WARM_UP
    limits = {"files": 0, "threads": 0, "objects": 100 * iterations, "rss_mib": MOST_MIB}
    return {name: grown[name] for name, most in limits.items() if grown[name] > most}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        measured = soak(Path(folder) / "run", int(sys.argv[1]) if len(sys.argv) > 1 else 30)
    for number, line in enumerate(measured):
        print(number, json.dumps(line))
    print("growth after warm-up:", json.dumps(growth(measured)))
    sys.exit(f"leaks: {leaks(measured)}" if leaks(measured) else 0)
