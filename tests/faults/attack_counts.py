"""How many attacks were made in each area, and how many of them ended in what they may not.

    python -m tests.faults.attack_counts [--inputs 100000] [--folders 1000] [--soak 30] [--tests] [--out FILE.json]

`--inputs` damaged inputs go to all readers, `--folders` hostile run folders to the commands that look at runs; each
ends in bounded time with a result or with an error of this project's, or is counted as found. `--tests` runs the tests
of the other areas and counts them: kill points, worlds that changed between restarts, hostile servers, and so on.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "recipes")]

AREAS = {  # of the tests: files and folders, and a pattern of their names
    "kill points": (
        "tests/faults/test_kills.py tests/checkpoint/test_states.py tests/model/test_hf.py",
        "kill or interrupt",
    ),
    "full disks, locks, signals": ("tests/faults/test_files.py tests/faults/test_signals.py", ""),
    "worlds changed between restarts": (
        "tests/faults tests/config/test_checks.py tests/pairs/test_store.py",
        "chang or resume or fingerprint or damaged",
    ),
    "hostile servers": ("tests/faults/test_servers.py tests/generators/test_vllm_server.py", ""),
    "responses": ("tests/faults/test_responses.py", ""),
    "numbers": ("tests/faults/test_numbers.py", ""),
    "ranks that differ": ("tests/faults tests/model/test_sharding.py", "rank"),
    "components": ("tests/config/test_parse.py", "attack or refused or component"),
    "folders of others": ("tests/faults/test_ownership.py tests/faults/test_shards.py tests/faults/test_states.py", ""),
    "terminals": ("tests/faults/test_terminals.py", ""),
}  # fmt: skip


def count_inputs(inputs: int, first: int) -> dict[str, Counter[str]]:
    """Damaged inputs, to each reader by its share."""
    from tests.faults.readers import Found, attempt, planned, readers

    ends: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "whole").mkdir()
        known = readers(place / "whole")
        for name, number in planned(known, inputs).items():
            begun = time.monotonic()
            for seed in range(first, first + number):
                try:
                    ends[name][attempt(known[name], place / "input", seed)] += 1
                except Found as found:
                    ends[name]["found"] += 1
                    _tell(f"{name}, seed {seed}: {found}", found.__cause__)
            seconds = time.monotonic() - begun
            print(f"{name}: {dict(ends[name])}, {1000 * seconds / number:.1f} ms each", file=sys.stderr, flush=True)
    return ends


def count_folders(folders: int, first: int) -> dict[str, Counter[str]]:
    """Hostile run folders, each looked at by five commands."""
    from tests.faults.hostile import write_whole_run
    from tests.faults.test_looking import check_folder

    ends: dict[str, Counter[str]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as folder:
        whole = write_whole_run(Path(folder) / "whole")
        for seed in range(first, first + folders):
            try:
                check_folder(whole, Path(folder) / "work", seed)
                ends["run folders"]["fine or refused"] += 1
            except BaseException as found:
                if isinstance(found, (KeyboardInterrupt, SystemExit)):
                    raise
                ends["run folders"]["found"] += 1
                _tell(f"run folder, seed {seed}: {type(found).__name__}: {found}", found)
    return ends


def count_tests() -> dict[str, Counter[str]]:
    """The tests of the other areas, by their outcomes."""
    ends: dict[str, Counter[str]] = {}
    for area, (files, pattern) in AREAS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "--no-header", "--tb=line", *files.split()]
        done = subprocess.run(
            [*command, *(["-k", pattern] if pattern else [])], cwd=REPO, capture_output=True, text=True
        )
        last = done.stdout.strip().splitlines()[-1:] or [""]
        found = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last[0])}
        ends[area] = Counter(
            {"fine or refused": found.get("passed", 0), "found": found.get("failed", 0) + found.get("error", 0)}
        )
        print(f"{area}: {last[0]}", file=sys.stderr, flush=True)
    return ends


def _tell(text: str, error: BaseException | None) -> None:
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    ours = [frame for frame in frames if f"{os.sep}spin{os.sep}" in frame.filename]
    at = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    print(f"FOUND {text[:300]!r}{at}", file=sys.stderr, flush=True)


def table(ends: dict[str, Counter[str]]) -> str:
    """What was tried and how it ended, an area a line."""
    lines = ["| area | tried | worked | refused | found |", "|---|---|---|---|---|"]
    for area, counts in ends.items():
        refused = counts["refused"] if "refused" in counts else counts["fine or refused"]
        lines.append(f"| {area} | {counts.total()} | {counts['fine'] or ''} | {refused} | {counts['found']} |")
    total = sum(counts.total() for counts in ends.values())
    lines.append(f"| all | {total} | | | {sum(counts['found'] for counts in ends.values())} |")
    return "\n".join(lines)


def main() -> int:
    """Counts, and prints the table; the exit code is 1 if anything was found."""
    parser = argparse.ArgumentParser(description="Counts attacks by area.")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--soak", type=int, default=30, metavar="ITERATIONS")
    parser.add_argument("--tests", action="store_true")
    parser.add_argument("--first", type=int, default=0, help="seed; other ones damage otherwise")
    parser.add_argument("--out", type=Path, help="the counts as JSON")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ends: dict[str, Counter[str]] = {}
    if arguments.soak:
        from tests.faults.soak import growth, leaks, soak

        with tempfile.TemporaryDirectory() as folder:
            counts = soak(Path(folder) / "run", arguments.soak)
        print(f"soak of {arguments.soak} iterations, growth after warm-up: {growth(counts)}", file=sys.stderr)
        ends[f"soak of {arguments.soak} iterations"] = Counter(
            {"found": len(leaks(counts)), "fine": 4 - len(leaks(counts))}
        )
    if arguments.inputs:
        ends |= count_inputs(arguments.inputs, arguments.first)
    if arguments.folders:
        ends |= count_folders(arguments.folders, arguments.first)
    if arguments.tests:
        ends |= count_tests()
    print(table(ends))
    if arguments.out:
        arguments.out.write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
    return 1 if any(counts["found"] for counts in ends.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
