"""The journeys of docs/first_run.md, from an empty folder: runs the page's commands and writes their times into it.

python benchmarks/first_run.py    # two cores: about ten minutes; downloads the demo's model
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "first_run.md"
TIMES = re.compile(r"(?<=<!-- times -->\n).*(?=<!-- /times -->)", re.DOTALL)


def journeys() -> dict[str, list[str]]:
    """The page's commands by the headings that they stand under."""
    parts = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    sections = zip(parts[::2], parts[1::2], strict=True)
    blocks = {title: re.findall(r"^```bash\n(.*?)^```$", body, re.M | re.S) for title, body in sections}
    return {title: "".join(found).splitlines() for title, found in blocks.items() if found}


def run(commands: list[str], folder: Path, **environment: str) -> list[float]:
    """Runs commands one after another in one shell, as a user does.

    Args:
        commands (list[str]): a line each.
        folder (Path): where.
        **environment (str): variables besides those of this process.

    Returns:
        list[float]: seconds that each took.

    Raises:
        CalledProcessError: If one failed; those behind it were not run.
    """
    times = folder / ".times"
    timed = [f'begun=$EPOCHREALTIME\n{each}\necho "$begun $EPOCHREALTIME" >> {times}' for each in commands]
    subprocess.run(["bash", "-euc", "\n".join(timed)], cwd=folder, env=os.environ | environment, check=True)
    seconds = [float(end) - float(begun) for begun, end in (line.split() for line in times.read_text().splitlines())]
    times.unlink()
    return seconds


def main() -> None:
    """Runs all journeys in one folder and writes the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for commands in journeys().values():
            rows += list(zip(commands, run(commands, Path(folder)), strict=True))
    lines = [f"| `{command}` | {seconds:.0f} |" for command, seconds in rows if command.split()[0] in ("spin", "echo")]
    head = f"On {os.cpu_count()} cores of {cpu()}, with the demo's model in all three journeys:"
    table = "\n".join([head, "", "| command | seconds |", "|---|---|", *lines, ""])
    PAGE.write_text(TIMES.sub(lambda _: table, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(table)


def cpu() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found[1] if found else platform.processor()


if __name__ == "__main__":
    main()
