"""What every `spin` command takes, and the imports of a recipe: wall and CPU seconds of a new process.

    python benchmarks/commands.py                                   # this checkout; a minute or two on two CPU cores
    git worktree add ../before COMMIT
    python benchmarks/commands.py --before ../before --out commands.json

Each command does its smallest real work in a folder of its own: the tests' model of four layers, and a run of one
iteration that is made first. Figures are the least of ``--rounds`` processes, checkouts in turns; CPU seconds are those
of all threads and children, so they hold on a busy machine as well, nearly.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
_TINY, _MODEL, _DATA = "tests/assets/tiny.yaml", "tests/assets/tiny_lm", "examples/quickstart/jargon_train.jsonl"
_SPIN = ["-m", "spin"]


def commands(folder: Path) -> dict[str, list[str]]:
    """Arguments of Python, by what is shown; ``folder`` has a run."""
    run = folder / "run"
    spin = {
        "--help": ["--help"],
        "--version": ["--version"],
        "vaildate (a typo)": ["vaildate"],
        "ls": ["ls"],
        "models": ["models"],
        "cp": ["cp", "full", f"{folder}/full.yaml", "--force"],
        "cp --full": ["cp", "full", f"{folder}/full.yaml", "--full", "--force"],
        "new": ["new", "--model", _MODEL, "--data", _DATA, "--out", f"{folder}/new.yaml", "--force"],
        "validate": ["validate", _TINY, f"output_dir={folder}/other"],
        "validate max_iteration=1 (a typo)": ["validate", _TINY, f"output_dir={folder}/other", "max_iteration=1"],
        "validate, no such model folder": ["validate", "full", "model.path=nowhere", f"dataset.source={_DATA}"],
        "estimate": ["estimate", _TINY, f"output_dir={folder}/other"],
        "pairs": ["pairs", f"{run}/iteration_000/pairs"],
        "report": ["report", str(run), "--out", f"{folder}/report.html"],
        "export": ["export", str(run), "--iteration", "0"],
        "doctor": ["doctor"],
        "run spin_recipe --help": ["run", "spin_recipe", "--help"],
    }
    helps = ("ls", "models", "cp", "new", "validate", "estimate", "pairs", "report", "export", "doctor", "run")
    spin |= {f"{name} --help": [name, "--help"] for name in helps}
    imports = {f"import {name}": ["-c", f"import {name}"] for name in ("torch", "spin_recipe")}
    return {f"spin {name}": [*_SPIN, *arguments] for name, arguments in spin.items()} | imports


def measure(checkout: Path, arguments: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a Python process in a checkout."""
    paths = [str(checkout), str(checkout / "recipes"), os.environ.get("PYTHONPATH", "")]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures, prints a table, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="commands that have this in them")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    args = parser.parse_args()
    checkouts = {"before": args.before.resolve(), "after": REPO} if args.before else {"now": REPO}
    least: dict[str, dict[str, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        size = ["max_iterations=1", "max_epochs=1", "dataset.limit=4", f"output_dir={folder}/run"]
        measure(REPO, [*_SPIN, "run", "spin_recipe", "--config", _TINY, *size])
        for name, arguments in commands(Path(folder)).items():
            for label, checkout in list(checkouts.items()) * args.rounds if args.only in name else ():
                found, known = measure(checkout, arguments), least.setdefault(name, {}).get(label)
                least[name][label] = found if known is None else (min(found[0], known[0]), min(found[1], known[1]))
    print(f"| command | {' | '.join(f'{label}: wall s | CPU s' for label in checkouts)} |")
    print("|---|" + "---|---|" * len(checkouts))
    for name, figures in least.items():
        cells = (f"{seconds:.2f}" for label in checkouts for seconds in figures[label])
        print(f"| `{name}` | {' | '.join(cells)} |")
    if args.out:
        cores = len(os.sched_getaffinity(0))
        seconds = {name: {label: dict(zip(("wall", "cpu"), found, strict=True)) for label, found in figures.items()}
                   for name, figures in least.items()}  # fmt: skip
        args.out.write_text(
            json.dumps({"setup": {"cpu_cores": cores, "rounds": args.rounds}, "seconds": seconds}, indent=2)
        )


if __name__ == "__main__":
    main()
