"""A false server for the tests of those that speak HTTP: it answers what it is given, and keeps what it was asked."""

import json
import ssl
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = {"choices": [{"token_ids": [7, 9], "finish_reason": "stop"}]}
VLLM = {
    "/health": {},
    "/version": {"version": "0.30.0"},
    "/v1/models": {"data": [{"id": "m", "max_model_len": 64}]},
    "/v1/completions": GOOD,
    "/metrics": "process_start_time_seconds 1.5\n",
    "/collective_rpc": {"success": True},
    "/reset_prefix_cache": {"success": True},
}


def headers(length, *more, status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {length}", *more, "", ""]).encode()


class FalseServer:
    """A vLLM server, unless ``answers`` say otherwise; ``v1__models`` is the answer at ``/v1/models``.

    An answer is JSON, a text, a pair of status and one of these, the bytes of a whole response, a function (of self)
    that yields such bytes, or a list of answers, the last of which stays.
    """

    def __init__(self, certificate=None, **answers):
        self.answers = VLLM | {"/" + path.replace("__", "/"): answer for path, answer in answers.items()}
        self.asked = []  # (path, JSON body or None, headers)
        self.is_over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):  # noqa: N802 - http.server's name
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                outer.asked.append((self.path, json.loads(body) if body else None, dict(self.headers)))
                with suppress(OSError):
                    for piece in outer.response(self.path):
                        self.wfile.write(piece)
                        self.wfile.flush()

            do_POST = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # clients that went away
        scheme = "http"
        if certificate is not None:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(*certificate)
            self.server.socket, scheme = tls.wrap_socket(self.server.socket, server_side=True), "https"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"{scheme}://localhost:{self.server.server_port}"

    def response(self, path):
        answer = self.answers[path]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            return answer(self)
        if isinstance(answer, bytes):
            return [answer]
        status, answer = answer if isinstance(answer, tuple) else (200, answer)
        kind = "text/plain" if isinstance(answer, str) else "application/json"
        text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        return [headers(len(text), f"Content-Type: {kind}", status=f"{status} Status") + text]

    @property
    def paths(self):
        return [path for path, _, _ in self.asked]

    def bodies(self, path):
        return [body for at, body, _ in self.asked if at == path]

    def close(self):
        self.is_over.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def false_servers():
    """A function that starts servers, all of which end with the block."""
    servers = []

    def start(**arguments):
        servers.append(FalseServer(**arguments))
        return servers[-1]

    try:
        yield start
    finally:
        for server in servers:
            server.close()
