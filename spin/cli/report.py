"""``spin report``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spin.cli import parser_of
from spin.core.files import replace_text
from spin.core.terminal import printable


def main(argv: Sequence[str]) -> None:
    """Writes a run's report, as far as the run has come."""
    parser = parser_of("report", "Make one HTML file of a run: curves, responses, advice. While it runs or afterwards.")
    parser.add_argument("run", type=Path, help="output_dir of the run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the run's folder")
    arguments = parser.parse_args(argv)
    from spin.report import read_run, render  # load pyarrow

    page = render(read_run(arguments.run))
    out: Path = arguments.out or arguments.run / "report.html"
    replace_text(out, page)
    print(printable(out))
