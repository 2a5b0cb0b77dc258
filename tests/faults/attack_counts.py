"""How many attacks were made in each area, and how many of them ended in what they may not.

    python -m tests.faults.attack_counts [--inputs 100000] [--folders 1000] [--tests] [--first SEED]

`--inputs` damaged inputs go to all readers, `--folders` hostile run folders to the commands that look at runs; each
ends in bounded time with a result or with an error of this project's, or is counted as found. `--tests` runs the tests
of the other areas and counts them: kill points, worlds that changed between restarts, hostile servers, and so on.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "recipes")]

FAULTS = "tests/faults/test_"
AREAS = {  # of the tests: files and folders, and a pattern of their names
    "kill points": (f"{FAULTS}kills.py tests/checkpoint tests/model/test_hf.py", "kill or interrupt"),
    "full disks, locks, signals": (f"{FAULTS}files.py {FAULTS}signals.py", ""),
    "worlds changed between restarts": (
        "tests/faults tests/config/test_checks.py tests/pairs/test_store.py",
        "chang or resume or fingerprint or damaged",
    ),
    "hostile servers": (f"{FAULTS}servers.py tests/generators/test_vllm_server.py", ""),
    "responses": (f"{FAULTS}responses.py", ""),
    "numbers": (f"{FAULTS}numbers.py", ""),
    "ranks that differ": (f"tests/model/test_sharding.py {FAULTS}identity.py {FAULTS}ranks.py", "rank"),
    "components": (f"{FAULTS}configs.py", ""),
    "folders of others": (f"{FAULTS}ownership.py {FAULTS}shards.py {FAULTS}checkpoints.py", ""),
    "terminals": (f"{FAULTS}terminals.py", ""),
    "soak": (f"{FAULTS}soak.py", ""),
}


def count_inputs(inputs: int, first: int) -> dict[str, Counter[str]]:
    """Damaged inputs, to each reader by its fraction."""
    from tests.faults.readers import Found, attempt, planned, readers

    ends: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "whole").mkdir()
        known = readers(place / "whole")
        for name, number in planned(known, inputs).items():
            for seed in range(first, first + number):
                try:
                    ends[name][attempt(known[name], place / "input", seed)] += 1
                except Found as found:
                    ends[name]["found"] += 1
                    print(f"FOUND {name}, seed {seed}: {str(found)[:300]!r}", file=sys.stderr, flush=True)
    return ends


def count_folders(folders: int, first: int) -> dict[str, Counter[str]]:
    """Hostile run folders, each looked at by five commands."""
    from tests.faults.hostile import write_whole_run
    from tests.faults.test_looking import check_folder

    ends = Counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = write_whole_run(Path(folder) / "whole")
        for seed in range(first, first + folders):
            try:
                check_folder(whole, Path(folder) / "work", seed)
                ends["fine or refused"] += 1
            except AssertionError as found:
                ends["found"] += 1
                print(f"FOUND {str(found)[:300]!r}", file=sys.stderr, flush=True)
    return {"run folders": ends}


def count_tests() -> dict[str, Counter[str]]:
    """The tests of the other areas, by their outcomes."""
    ends = {}
    for area, (files, pattern) in AREAS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "--no-header", "--tb=line", *files.split()]
        command += ["-k", pattern] if pattern else []
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        print(f"{area}: {last}", file=sys.stderr, flush=True)
        found = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?)", last)}
        passed = found.pop("passed", 0)
        ends[area] = Counter({"fine or refused": passed, "found": sum(found.values())})
    return ends


def table(ends: dict[str, Counter[str]]) -> str:
    """What was tried and how it ended, an area a line."""
    lines = ["| area | tried | worked | refused | found |", "|---|---|---|---|---|"]
    for area, counts in ends.items():
        refused = counts["refused"] or counts["fine or refused"]
        lines.append(f"| {area} | {counts.total()} | {counts['fine'] or ''} | {refused} | {counts['found']} |")
    return "\n".join(lines)


def main() -> int:
    """Counts, and prints the table; the exit code is 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Counts attacks by area.")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--first", type=int, default=0, help="seed; other ones damage otherwise")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ends = count_inputs(arguments.inputs, arguments.first) | count_folders(arguments.folders, arguments.first)
    if arguments.tests:
        ends |= count_tests()
    print(table(ends))
    return 1 if any(counts["found"] for counts in ends.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
