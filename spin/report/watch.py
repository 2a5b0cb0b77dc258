"""The live page: an HTTP server on loopback that gives one page, and what is new since a browser last asked."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from spin.core.errors import OutputError
from spin.report.page import chart_data, render, sections
from spin.report.record import RunReader, RunRecord

HOST = "127.0.0.1"
_REST = 20  # times as long as it took to read and draw; a run of 20,000 steps costs 0.3 s
OWN_NAMES = ("127.0.0.1", "localhost")  # any port: `ssh -L` may have another


class LiveRuns:
    """Runs that are still writing, their page, and its changes; for several threads."""

    def __init__(self, folders: Sequence[Path], evaluations: Sequence[Mapping[str, Any]]) -> None:
        self._readers = [RunReader(folder) for folder in folders]
        self._evaluations = evaluations
        self._lock = threading.Lock()
        self._signature: list[object] = []
        self._sections: dict[str, tuple[str, int]] = {}  # html, and the version that brought it
        self._version = 0
        self._runs: list[RunRecord] = []
        self._data: dict[str, Any] = {}
        self._rests_until = 0.0  # by time.monotonic()
        self._refresh()

    def _refresh(self) -> None:
        """Reads what is new, however many ask for it with a twentieth of a core at most: the run needs the others."""
        began = time.monotonic()
        if began < self._rests_until:
            return
        signature: list[object] = [reader.signature() for reader in self._readers]
        if signature == self._signature:
            return
        self._runs = [self._read(number) for number in range(len(self._readers))]
        self._data = chart_data(self._runs)
        self._signature = signature
        self._version = time.time_ns() // 1000  # later than those of a server before this one
        for name, html in sections(self._runs, self._evaluations).items():
            if name not in self._sections or self._sections[name][0] != html:
                self._sections[name] = (str(html), self._version)
        self._rests_until = began + (1 + _REST) * (time.monotonic() - began)

    def _read(self, number: int) -> RunRecord:
        try:
            return self._readers[number].read()
        except (OutputError, OSError):  # removed or moved since: what was shown stays
            if not self._runs:
                raise
            return self._runs[number]

    def page(self) -> str:
        """The page as of now."""
        with self._lock:
            self._refresh()
            return render(*self._runs, evaluations=self._evaluations, version=self._version)

    def since(self, version: int, have: Sequence[str]) -> dict[str, Any] | None:
        """What a page lacks that has a version, and of each run so many points, ``KEY:COUNT``; None if nothing."""
        with self._lock:
            self._refresh()
            if version == self._version:
                return None
            news = []
            for run, (key, _, count) in zip(self._data["runs"], (each.partition(":") for each in have), strict=True):
                # the last point that is there may have been the mean of fewer steps
                start = max(0, int(count) - 1) if key == run["key"] else 0
                columns = {kind: run[kind] for kind in ("y", "low", "high") if kind in run}
                cut = {
                    kind: {name: values[start:] for name, values in found.items()} for kind, found in columns.items()
                }
                news.append({**run, "from": start, "x": run["x"][start:], **cut})
            changed = {name: html for name, (html, since) in self._sections.items() if since > version}
            return {"version": self._version, "sections": changed, "charts": self._data["charts"], "runs": news}


def make_server(
    folders: Sequence[Path], evaluations: Sequence[Mapping[str, Any]], port: int
) -> tuple[ThreadingHTTPServer, str]:
    """A server of the page of some runs, to be started by ``serve_forever``, and the page's address.

    The path is not to be guessed: other users of this machine reach its loopback too. A request by another host name
    than this machine's is refused, so that no foreign page can read this one by a name that it has pointed here.
    """
    live, prefix = LiveRuns(folders, evaluations), f"/{secrets.token_urlsafe(9)}/"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if self.headers.get("Host", "").partition(":")[0].lower() not in OWN_NAMES:
                self._answer(403, "text/plain", "this server is for 127.0.0.1 and localhost alone")
            elif path == prefix:
                self._answer(200, "text/html", live.page())
            elif path == f"{prefix}since":
                asked = {name: values[0] for name, values in parse_qs(query).items()}
                try:
                    news = live.since(int(asked["version"]), asked["have"].split(","))
                except (KeyError, ValueError):
                    self._answer(400, "text/plain", "expected version=N&have=KEY:COUNT,...")
                else:
                    self._answer(204 if news is None else 200, "application/json", json.dumps(news) if news else "")
            else:
                self._answer(404, "text/plain", "nothing here")

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            for name, value in (
                ("Cache-Control", "no-store"),
                ("Content-Security-Policy", "frame-ancestors 'none'"),
                ("Cross-Origin-Resource-Policy", "same-origin"),
                ("Referrer-Policy", "no-referrer"),
                ("X-Content-Type-Options", "nosniff"),
            ):
                self.send_header(name, value)
            with suppress(ConnectionError):  # a browser that has closed the page
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass  # a line for each second

    server = ThreadingHTTPServer((HOST, port), Handler)
    return server, f"http://{HOST}:{server.server_port}{prefix}"
