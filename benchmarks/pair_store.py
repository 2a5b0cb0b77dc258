"""A large pair store: written, resumed in the middle, mixed with an earlier one, looked up and read back.

    python benchmarks/pair_store.py                                  # 250,000, 500,000 and 1,000,000 pairs
    python benchmarks/pair_store.py --pairs 4000,8000,16000          # in seconds

What the recipe does with an iteration's pairs, without a model: ``write`` makes half of the shards of an iteration's
responses, ``resume`` opens that store again as after a kill, checks what is there and makes the rest, ``seal`` records
the checksums. ``mix`` filters these pairs and those of an iteration before (as large; shards are linked, not made
again) into the lookup file, as history mixing does, and ``read`` visits all of them once in the order of an epoch, in
global batches. Token ids are random (mean lengths 40 prompt, 60 real, 60 generated), so they compress badly.

Every size runs in a process of its own; ``peak_rss_mib`` is the most memory that it ever had, Python, torch and pyarrow
included. ``growth`` compares time and memory of the sizes: 1.0 is linear time, 0.0 is flat memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAIRS_PER_SHARD = 256
BATCH = 64


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="250000,500000,1000000", help="sizes, separated by commas")
    parser.add_argument("--folder", help="where the stores are written; default: the system's folder for such files")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # one size, in this process
    return parser.parse_args(arguments)


def run(num_pairs: int, folder: Path) -> dict[str, Any]:
    """All stages for one size."""
    import numpy as np

    from spin.data import Pair, PairStore, Response, epoch_order
    from spin.pairs.filters import FilteredPairs
    from spin.pairs.lookup import LazySequence, PairLookup
    from spin.pairs.shards import split_evenly

    num_shards = -(-num_pairs // PAIRS_PER_SHARD)
    parts = split_evenly(num_pairs, num_shards)
    seconds: dict[str, float] = {}
    baseline = _peak_mib()

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - began

    def made(shard: int) -> list[Pair]:
        rng = np.random.default_rng(shard)
        lengths = rng.integers((20, 30, 30), (61, 91, 91), (len(parts[shard]), 3))
        return [
            Pair(
                f"sample-{i}",
                1,
                rng.integers(0, 128_000, prompt, np.int32),
                rng.integers(0, 128_000, real, np.int32),
                [Response(rng.integers(0, 128_000, generated, np.int32), "stop" if i % 5 else "length")],
            )
            for i, (prompt, real, generated) in zip(parts[shard], lengths, strict=True)
        ]

    fingerprint = {"opponent": "benchmark"}
    store = PairStore.open_or_create(folder / "now", fingerprint, num_shards)
    with timed("write"):
        for shard in range(num_shards // 2):
            store.write_shard(shard, made(shard))
    with timed("resume"):
        store = PairStore.open_or_create(folder / "now", fingerprint, num_shards)
        missing = store.missing_shards()
        assert missing == list(range(num_shards // 2, num_shards))
        for shard in missing:
            store.write_shard(shard, made(shard))
    with timed("seal"):
        store.seal()
    shutil.copytree(folder / "now", folder / "before", copy_function=os.link)

    def of_iteration(iteration: int, name: str) -> Iterator[Pair]:
        for pair in PairStore.open(folder / name).pairs():
            yield Pair(pair.sample_id, iteration, pair.prompt_ids, pair.real_ids, pair.generated)

    with timed("mix"):
        both = (pair for source in ((0, "before"), (1, "now")) for pair in of_iteration(*source))
        kept = FilteredPairs(both)
        PairLookup.write(folder / "rows", kept)
        pairs = PairLookup(folder / "rows")
    assert len(pairs) == 2 * num_pairs == kept.counts["responses"]
    with timed("read"):
        order = epoch_order(2 * num_pairs, 42, 1, 0)

        def batch(step: int) -> list[Pair]:
            chosen = order[step * BATCH : (step + 1) * BATCH]
            return [pairs[i // num_pairs, f"sample-{i % num_pairs}"] for i in chosen]

        tokens = sum(pair.num_tokens for each in LazySequence(batch, range(2 * num_pairs // BATCH)) for pair in each)
    size = sum(file.stat().st_size for file in (folder / "now").iterdir())
    return {
        "pairs": num_pairs,
        "seconds": seconds | {"all": sum(seconds.values())},
        "peak_rss_mib": _peak_mib(),
        "imports_rss_mib": baseline,
        "store_gb": size / 1e9,
        "tokens_read": tokens,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Runs each size in a process of its own, prints JSON, and writes it."""
    args = parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        if args.one:
            print(json.dumps(run(args.one, folder)))
            return
        sizes = []
        for size in args.pairs.split(","):
            command = [sys.executable, __file__, "--one", size, "--folder", str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            sizes.append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(folder)
    first, last = sizes[0], sizes[-1]
    factor = last["pairs"] / first["pairs"]
    results = {
        "setup": {"cpu_cores": len(os.sched_getaffinity(0)), "pairs_per_shard": PAIRS_PER_SHARD, "batch": BATCH},
        "sizes": sizes,
        "growth": {
            "time_over_linear": {
                stage: last["seconds"][stage] / first["seconds"][stage] / factor for stage in first["seconds"]
            },
            "bytes_per_pair": (last["peak_rss_mib"] - first["peak_rss_mib"])
            * 2**20
            / max(1, last["pairs"] - first["pairs"]),
        },
    }
    text = json.dumps(results, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
