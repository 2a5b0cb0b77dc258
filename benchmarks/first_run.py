"""The journeys of docs/first_run.md, from an empty folder: runs the page's commands and writes their times into it.

python benchmarks/first_run.py    # two cores: about ten minutes; downloads the demo's model
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from pathlib import Path

from spin.run.log import processor_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "first_run.md"
TIMES = re.compile(r"(?<=<!-- times -->\n).*(?=<!-- /times -->)", re.DOTALL)


def journeys() -> dict[str, list[str]]:
    """The page's commands by the headings that they stand under."""
    parts = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    sections = zip(parts[::2], parts[1::2], strict=True)
    blocks = {title: re.findall(r"^```bash\n(.*?)^```$", body, re.M | re.S) for title, body in sections}
    return {title: "".join(found).splitlines() for title, found in blocks.items() if found}


def run(commands: list[str], folder: Path, **environment: str) -> list[tuple[float, float]]:
    """Runs commands one after another in one shell, as a user does.

    Args:
        commands (list[str]): a line each.
        folder (Path): where.
        **environment (str): variables besides those of this process.

    Returns:
        list[tuple[float, float]]: seconds that each took, and those of its processes on all cores.

    Raises:
        CalledProcessError: If one failed; those behind it were not run.
    """
    times = folder / ".times"
    timed = [f"{{ time {{\n{each}\n}} 2>&3; }} 2>> {times}" for each in commands]
    script = "\n".join(["exec 3>&2", "TIMEFORMAT='%R %U %S'", *timed])
    subprocess.run(["bash", "-euc", script], cwd=folder, env=os.environ | environment, check=True)
    found = [[float(word) for word in line.split()] for line in times.read_text().splitlines()]
    times.unlink()
    return [(real, user + system) for real, user, system in found]


def main() -> None:
    """Runs all journeys in one folder and writes the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for commands in journeys().values():
            rows += zip(commands, run(commands, Path(folder)), strict=True)
    table = table_of(rows, os.getloadavg()[2])
    PAGE.write_text(TIMES.sub(lambda _: table, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table)


def table_of(rows: list[tuple[str, tuple[float, float]]], load: float) -> str:
    """The page's table of ``spin`` commands, by the times of :func:`run` and the machine's load meanwhile."""
    head = f"On {os.cpu_count()} cores ({processor_name()}) with a load of {load:.0f} processes, with the demo's model:"
    lines = [
        f"| `{command}` | {real:.0f} | {cores:.0f} |".replace("| spin", "\\| spin")
        for command, (real, cores) in rows
        if "spin" in command
    ]
    return "\n".join([head, "", "| command | seconds | processor seconds |", "|---|---|---|", *lines, ""])


if __name__ == "__main__":
    main()
