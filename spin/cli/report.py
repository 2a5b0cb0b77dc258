"""``spin report``."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spin.cli import parser_of
from spin.core.errors import OutputError
from spin.core.files import check_new_file, replace_text
from spin.core.terminal import printable

PORT = 8765


def main(argv: Sequence[str]) -> None:
    """Writes the report of runs, as far as they have come, or serves it live."""
    parser = parser_of("report", "Make one HTML file of a run: curves, responses, advice. While it runs or afterwards.")
    folders = "output_dir of a run, or of several to compare; of an evaluation, to add its results"
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help=folders)
    out_help = "default: report.html in the run's folder, of several runs in this one"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out_help)
    parser.add_argument("--watch", action="store_true", help="serve the page on 127.0.0.1 and update it, until Ctrl-C")
    parser.add_argument("--port", type=int, metavar="N", help=f"of --watch; default: {PORT}, or any if that is taken")
    arguments = parser.parse_args(argv)
    if arguments.watch and arguments.out:
        parser.error("--watch writes no file: leave --out out")
    if arguments.port is not None and not (arguments.watch and 0 < arguments.port < 2**16):
        parser.error("--port goes with --watch, and is between 1 and 65535")
    if arguments.out:
        check_new_file(arguments.out, replaces=True)
    from spin.report import read_evaluations, read_run, render  # load pyarrow

    others = [folder for folder in arguments.folders if not (folder / "metrics.jsonl").exists()]
    found = {folder: read_evaluations(folder, []) for folder in others}
    evaluations = [each for summaries in found.values() for each in summaries]
    runs = [folder for folder in arguments.folders if not found.get(folder)] or arguments.folders
    if arguments.watch:
        _watch(runs, evaluations, arguments.port)
    else:
        out: Path = arguments.out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
        replace_text(out, render(*map(read_run, runs), evaluations=evaluations))
        print(printable(out))


def _watch(runs: Sequence[Path], evaluations: Sequence[dict[str, Any]], port: int | None) -> None:
    from spin.report.watch import make_server

    waited_for: Path | None = None
    while missing := [run for run in runs if not (run / "metrics.jsonl").exists()]:
        if missing[0] != waited_for:
            waited_for = missing[0]
            print(
                printable(f"Waiting for a run to begin in {waited_for}: there is no metrics.jsonl. Ctrl-C ends."),
                flush=True,
            )
        time.sleep(1)
    try:
        server, address = make_server(runs, evaluations, port or PORT)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        if port is not None:
            raise OutputError(f"--port {port}: in use. Name another one, or none for any that is free.") from error
        server, address = make_server(runs, evaluations, 0)
    tunnel = f"ssh -L {server.server_port}:127.0.0.1:{server.server_port} {socket.gethostname()}"
    print(f"{address}\nFrom another machine: {tunnel}, then the same address there. Ctrl-C ends it.", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
