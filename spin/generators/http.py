"""Requests to a server that need not be friendly: each has a deadline and a size, and goes to that server alone.

urllib3's own time-outs are for single reads, which a server that sends a byte now and then never exceeds. Here a timer
shuts the connection down, whatever it is waiting for. Redirects are not followed, proxies and ``~/.netrc`` are not
looked at: prompts and keys go to the configured address and to no other.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from spin.core.errors import GeneratorError
from spin.core.files import parse_json

_CONNECT_SECONDS = 10.0


class UnavailableError(Exception):
    """The server did not answer, or said that it cannot now; a later request may succeed."""


class TimedOutError(UnavailableError):
    """The complete response was not there in time."""


@dataclass(frozen=True)
class Reply:
    """A response, read to its end; ``what`` names server, method and path for messages."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    what: str

    @property
    def text(self) -> str:
        """The body as text; what is no UTF-8 is replaced."""
        return self.body.decode("utf-8", errors="replace")

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; GeneratorError if it is none."""
        try:
            value = parse_json(self.body, allow_nan=True)
        except ValueError as error:
            raise GeneratorError(f"{self.what}: answered {self.text[:60]!r}, expected JSON ({error}).") from error
        if not isinstance(value, dict):
            raise GeneratorError(f"{self.what}: answered {self.text[:60]!r}, expected a JSON object.")
        return value


class Client:
    """Talks to one server, from any number of threads.

    ``verify`` checks an ``https`` server's certificate; a path names a CA bundle or a folder of them.
    """

    def __init__(self, url: str, headers: Mapping[str, str], verify: bool | str = True, connections: int = 1) -> None:
        parsed = urllib3.util.parse_url(url)
        options: dict[str, Any] = {}
        if parsed.scheme == "https":
            bundle = verify if isinstance(verify, str) else os.environ.get("REQUESTS_CA_BUNDLE")
            options["cert_reqs"] = "CERT_REQUIRED" if verify else "CERT_NONE"
            if verify and bundle:
                options["ca_cert_dir" if os.path.isdir(bundle) else "ca_certs"] = bundle
        self._pool: Any = urllib3.connection_from_url(url, maxsize=connections, **options)
        self._pool.ConnectionCls = _WatchedTLS if parsed.scheme == "https" else _Watched
        self._url, self._prefix = url.rstrip("/"), (parsed.path or "").rstrip("/")
        # what a compressed body needs in memory cannot be known before
        self._headers = {"Accept-Encoding": "identity", **headers}
        self._running: set[_Deadline] = set()
        self.aborted = threading.Event()  # while it is set, nothing is asked

    def request(
        self, method: str, path: str, *, seconds: float, most_bytes: int, body: Mapping[str, Any] | None = None
    ) -> Reply:
        """One request; ``seconds`` count from connecting to the last byte, ``most_bytes`` limits the response. Raises
        UnavailableError if there is no complete response, TimedOutError if there was not enough time for it, and
        GeneratorError if it is larger, compressed, or a redirect, or the certificate is not valid."""
        what = f"{self._url}: {method} {path}"
        headers, data = self._headers, None
        if body is not None:
            headers, data = {**headers, "Content-Type": "application/json"}, json.dumps(body).encode()
        deadline = _CURRENT.deadline = _Deadline(seconds)
        self._running.add(deadline)
        try:
            if self.aborted.is_set():
                raise UnavailableError(f"{method} {path}: aborted")
            timeout = urllib3.Timeout(connect=min(_CONNECT_SECONDS, seconds), read=seconds)
            response = self._pool.urlopen(
                method, self._prefix + path, body=data, headers=headers, timeout=timeout,
                redirect=False, retries=False, preload_content=False, decode_content=False,
            )  # fmt: skip
            try:
                content = self._read(response, what, most_bytes)
            except BaseException:
                response.close()  # what is left of it belongs to nobody
                raise
            response.release_conn()
            if deadline.is_over:
                raise TimeoutError
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            if isinstance(error, urllib3.exceptions.SSLError) and not deadline.is_over:
                raise GeneratorError(f"{self._url}: {error}. Set generator.verify to your CA bundle.") from error
            if deadline.is_over or isinstance(error, urllib3.exceptions.ReadTimeoutError):
                raise TimedOutError(f"{method} {path}: no complete response within {seconds:g} s (Timeout)") from error
            raise UnavailableError(f"{method} {path}: {type(error).__name__}") from error
        finally:
            deadline.cancel()
            self._running.discard(deadline)
        return Reply(response.status, response.headers, content, what)

    def abort(self) -> None:
        """Ends running requests, as if their time were up, and lets none begin until ``aborted`` is cleared."""
        self.aborted.set()
        for deadline in list(self._running):
            deadline.end()

    def _read(self, response: Any, what: str, most_bytes: int) -> bytes:
        if response.status in (301, 302, 303, 307, 308):
            raise GeneratorError(
                f"{what}: HTTP {response.status}, a redirect to {response.headers.get('location', 'nowhere')!r:.100}. "
                "Redirects are not followed: prompts go to generator.url alone. Set it to where the server is."
            )
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise GeneratorError(f"{what}: the response has content-encoding {encoding!r:.40}, expected none.")
        length = response.headers.get("content-length", "")
        declared = int(length) if length.isdecimal() else 0
        content: bytes = b"" if declared > most_bytes else response.read(most_bytes + 1)
        if max(declared, len(content)) > most_bytes:
            raise GeneratorError(
                f"{what}: the response has more than {most_bytes} bytes, which is more than what was asked can take."
            )
        if len(content) < declared:
            raise urllib3.exceptions.IncompleteRead(len(content), declared - len(content))
        return content


class _Deadline:
    """Shuts a connection down when its time is up."""

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self.end)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, connection: socket.socket) -> None:
        """From here on the connection may wait for the server."""
        if self._socket is None:
            # a descriptor of its own: the handshake of TLS takes the connection's object away
            self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        if self.is_over:
            raise TimeoutError

    def end(self) -> None:
        """Time is up."""
        self.is_over = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def cancel(self) -> None:
        """The response is there."""
        self._timer.cancel()
        if self._socket is not None:
            self._socket.close()


_CURRENT = threading.local()  # deadline of this thread's request


class _Watched(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        connection = super()._new_conn()
        _CURRENT.deadline.watch(connection)
        return connection

    def getresponse(self) -> Any:  # type: ignore[override]
        _CURRENT.deadline.watch(self.sock)  # one that was kept open
        return super().getresponse()


class _WatchedTLS(_Watched, HTTPSConnection):
    pass
