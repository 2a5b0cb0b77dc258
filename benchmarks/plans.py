"""The plans of docs/many_hosts.md: outputs of its `spin estimate` commands, and a table of more and more hosts.

    python benchmarks/plans.py            # writes them into the page
    python benchmarks/plans.py --check    # fails if the page says something else

Nothing is measured here: the rates are those of spin/cli/rates.py, each from a file of benchmarks/results.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from page import table
from work import log_normal_lengths

from spin.cli.memory import estimate, usable_gib
from spin.cli.rates import GPUS
from spin.cli.timing import MEASURED_PAIR, Cluster, clock, stages
from spin.config import SPINConfig, complete, load_config
from spin.pairs.packing import RowLayout, fit_lengths, plan_rows

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "many_hosts.md"
COMMAND = re.compile(r"(?<=```\n)\$ (spin estimate (?:.*\\\n)*.*)\n(?:.*\n)*?(?=```\n)")
TABLE = re.compile(r"(?<=<!-- plans: hosts -->\n)(?:.*\n)*?(?=<!-- plans: end -->)")
GPU, GPUS_OF_HOST, PROMPTS = "H200", 8, 50_000
CHANGES = ("model.path=benchmarks/shapes/mistral_7b", "dataset.source=mine.jsonl", "compute_dtype=bf16", "max_epochs=2")


def output_of(command: str) -> str:
    """A command of the page with what it prints."""
    words = shlex.split(command.replace("\\\n", " "))
    done = subprocess.run([sys.executable, "-m", *words], cwd=REPO, capture_output=True, text=True, check=True)
    return f"$ {command}\n{done.stdout.rstrip()}\n"


def stretch(size: int, ranks: int, row_tokens: int) -> float:
    """By how much padding, and waiting for the rank with most tokens, lengthen what all ranks compute: rows of 16
    batches of pairs of log-normal lengths."""
    rng = np.random.default_rng(0)
    lengths = np.sum([log_normal_lengths(mean, 16 * size, rng) for mean in MEASURED_PAIR], axis=0)
    batches = lengths.reshape(16, size).tolist()
    layout = fit_lengths(batches, RowLayout(row_tokens, 128), ranks)
    positions = 0
    for batch in batches:
        plan = plan_rows(batch, layout, ranks)
        rows = ([layout.padded_length(max(1, sum(batch[i] for i in row))) for row in rank] for rank in plan)
        positions += ranks * sum(map(max, zip(*rows, strict=True)))
    return positions / int(lengths.sum())


def hosts_table() -> str:
    """Times of an iteration of a 7B, for each number of hosts, size of a step, and way to shard."""
    rows = []
    for size in (64, 256):
        alone = 0.0
        for hosts in (1, 2, 4, 8):
            for replicas in sorted({1, hosts}):
                changes = [*CHANGES, f"global_batch_size={size}", f"replicas={replicas}"]
                cfg = complete(load_config("full", changes), SPINConfig)
                gpus = hosts * GPUS_OF_HOST
                found = estimate(cfg, gpus, sum(MEASURED_PAIR), GPUS[GPU].memory_gib, prompts=PROMPTS)
                cluster = Cluster(gpus, hosts, GPU, 8, 400.0)
                times = stages(cfg, found.work, cluster, PROMPTS, found.pair, found.rows)
                generate, score, train, save = times
                longer = stretch(size, gpus, cfg.pairs.row_tokens)
                waits = (longer - 1) * (score.compute + train.compute)
                whole = sum(stage.seconds for stage in times) + waits
                alone = alone or whole
                fits = found.peak <= usable_gib(GPUS[GPU].memory_gib)
                rows.append([
                    str(size), f"{gpus} on {hosts}", "whole cluster" if replicas == 1 else "a host",
                    *map(clock, (generate.seconds, score.compute, train.compute, score.exposed + train.exposed)),
                    *map(clock, (waits, save.seconds, whole)),
                    f"{alone / whole / hosts:.0%}" if fits else "does not fit",
                ])  # fmt: skip
    columns = ["pairs a step", "GPUs on hosts", "sharded over", "generate", "score", "train", "traffic"]
    return table([*columns, "padding, waits", "save", "iteration", "of linear"], rows) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    before = PAGE.read_text(encoding="utf-8")
    after = COMMAND.sub(lambda found: output_of(found[1]), before)
    after = TABLE.sub(lambda _: hosts_table(), after)
    if args.check:
        sys.exit(f"{PAGE.name} is not what benchmarks/plans.py writes" if after != before else 0)
    PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
