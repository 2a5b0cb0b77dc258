"""Servers that drip, flood, redirect or lie: each ends the stage in bounded time, by name."""

import gzip
import json
import socket
import sys
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch

from spin.core.errors import GeneratorError
from spin.data import PairStore, Prompt, PromptDataset
from spin.generators import GeneratorContext, SamplingParams, VLLMServerGenerator
from spin.generators.stage import Limits, PlayTask, play
from tests.false_server import GOOD, false_servers, headers

STOP = 9
SAMPLING = SamplingParams(max_new_tokens=6, stop_token_ids=(STOP,))
PROMPTS = PromptDataset([Prompt(f"s{i}", [1, i + 1], [2, STOP]) for i in range(4)])


@pytest.fixture
def serve():
    with false_servers() as start:
        yield start


def drip(first):
    """The first bytes at once, then one at a time, for ever."""

    def pieces(server):
        yield first
        while not server.is_over.wait(0.05):
            yield b"x"

    return pieces


def flood(server):
    """A chunked body without end."""
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    while not server.is_over.is_set():
        yield b"10000\r\n" + b"1" * 0x10000 + b"\r\n"


def played(tmp_path, url, **arguments):
    context = GeneratorContext(None, torch.device("cpu"), sys.maxsize, lambda ids: "", None)
    arguments = {"timeout_seconds": 0.5, "wait_seconds": 0.5, "concurrency": 2} | arguments
    generator = VLLMServerGenerator(context, url, **arguments)
    store = PairStore.open_or_create(tmp_path / "store", {"opponent": "w"}, 1)
    play(store, [0], PlayTask(PROMPTS, range(4), SAMPLING, 5, limits=Limits(50, 64)), generator)
    return [np.asarray(pair.generated[0].token_ids).tolist() for pair in store.pairs()]


@pytest.mark.parametrize("path", ["v1__completions", "health", "v1__models"])
@pytest.mark.parametrize("where", ["body", "headers", "status line", "interim"])
def test_a_server_that_drips_is_given_up(tmp_path, serve, path, where):
    """The deadline is for the whole response; urllib3's own would begin again with every byte."""

    def interim(server):
        while not server.is_over.wait(0.05):
            yield b"HTTP/1.1 100 Continue\r\n\r\n"

    first = {"body": headers(10_000), "headers": b"HTTP/1.1 200 OK\r\nX-Slow: ", "status line": b"HTTP/1.1 2"}
    server = serve(**{path: interim if where == "interim" else drip(first[where])})
    started = time.monotonic()
    with pytest.raises(GeneratorError, match=r"no complete response within 0\.5 s"):
        played(tmp_path, server.url)
    assert time.monotonic() - started < 20, "three time-outs and two pauses at most"


def test_a_body_that_ends_early_is_asked_for_again(tmp_path, serve):
    """A connection that broke off must not look like a short response."""
    text = json.dumps(GOOD).encode()
    server = serve(v1__completions=[headers(len(text) + 9, "Connection: close") + text, headers(len(text)) + text])
    assert played(tmp_path, server.url, concurrency=1, timeout_seconds=1, wait_seconds=30) == [[7, STOP]] * 4


def test_a_request_without_a_reply_is_repeated_twice(tmp_path, serve):
    """However long a server that is not there would be waited for; and other requests in flight are not waited for."""
    server = serve(v1__completions=drip(headers(10_000)))
    with pytest.raises(GeneratorError, match="did not answer 3 times: POST /v1/completions"):
        played(tmp_path, server.url, wait_seconds=1000, timeout_seconds=0.3)
    # two at a time, each of which may have begun another when the first was given up
    assert 3 <= server.paths.count("/v1/completions") <= 8


def test_a_handshake_that_drips_is_given_up(tmp_path):
    """TLS: the server sends a record's length, and then its bytes one by one."""
    over = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while not over.is_set():
            with suppress(OSError):
                connection, _ = listener.accept()
                connection.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc")
                while not over.wait(0.05):
                    connection.sendall(b"\x00")

    threading.Thread(target=accept, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(GeneratorError, match="no vLLM server at https"):
        played(tmp_path, f"https://127.0.0.1:{listener.getsockname()[1]}")
    over.set()
    listener.close()
    assert time.monotonic() - started < 20


def choice(ids, reason="stop"):
    return {"choices": [{"token_ids": ids, "finish_reason": reason}]}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (flood, "has more than 107.* bytes"),
        (headers(1 << 40), "has more than 107.* bytes"),
        (lambda server: [headers(1 << 40)[:-4] + b"\r\nConnection: close\r\n\r\n"], "has more than 107.* bytes"),
        (lambda server: [headers(4 << 20), b"1" * (4 << 20)], "has more than 107.* bytes"),
        (
            lambda server: [headers(5000, "Content-Encoding: gzip"), gzip.compress(b"1" * 5_000_000)],
            "content-encoding 'gzip', expected none",
        ),
        (headers(5) + b"[1,2]", r"answered '\[1,2\]', expected a JSON object"),
        (headers(4) + b"{1:2", "answered '{1:2', expected JSON"),
        (headers(100_000) + b"[" * 100_000, "expected JSON"),
        (headers(4) + b"\xff\xfe\x00{", "expected JSON"),
        ({}, "answered with choices None, expected one"),
        ({"choices": []}, "answered with 0 choices"),
        ({"choices": GOOD["choices"] * 2}, "answered with 2 choices"),
        ({"choices": ["a"]}, "answered with 1 choices"),
        (choice("7 9"), "answered with token_ids '7 9'"),
        (choice([7.5, 9]), "answered with token_ids .7.5, 9., expected whole"),
        (choice([True, 9]), "answered with token_ids .True, 9."),
        (choice([[7], 9]), "answered with token_ids"),
        (choice([10**12, 9]), "has the id 1000000000000 as token 0"),
        (choice([7] * 400, "length"), "has 400 tokens, expected at most"),  # the gate of tests/faults/test_responses.py
        (choice([7, 9], ["stop"]), "ended a response with reason"),
    ],
)
def test_a_response_that_cannot_be_is_refused_by_name(tmp_path, serve, reply, message):
    with pytest.raises(GeneratorError, match=message):
        played(tmp_path, serve(v1__completions=reply).url)
    assert PairStore.open(tmp_path / "store").missing_shards() == [0]


@pytest.mark.parametrize(
    "card",
    [{}, {"data": None}, {"data": []}, {"data": ["m"]}, {"data": [{}]}, {"data": [{"id": "m", "max_model_len": "x"}]}],
)
def test_a_server_that_does_not_say_what_it_serves(tmp_path, serve, card):
    with pytest.raises(GeneratorError, match="/v1/models: answered .*, expected data with id and max_model_len"):
        played(tmp_path, serve(v1__models=card).url)


@pytest.mark.parametrize("path", ["health", "version", "v1__models", "v1__completions"])
@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_prompts_and_keys_do_not_follow_redirects(tmp_path, serve, monkeypatch, path, status):
    monkeypatch.setenv("SPIN_TEST_KEY", "a-key")
    elsewhere = serve()
    target = f"{elsewhere.url}/{path.replace('__', '/')}"
    server = serve(**{path: headers(0, f"Location: {target}", status=status)})
    message = rf"HTTP {status[:3]}, a redirect to '{target}'. Redirects are not followed"
    with pytest.raises(GeneratorError, match=message):
        played(tmp_path, server.url, api_key_env="SPIN_TEST_KEY")
    assert not elsewhere.asked


def test_proxies_and_netrc_are_not_asked(tmp_path, serve, monkeypatch):
    """A cluster's proxy for the outside would see prompts and key; ~/.netrc would replace the key."""
    server, proxy = serve(), serve()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.setenv("SPIN_TEST_KEY", "a-key")
    (tmp_path / "netrc").write_text("machine localhost login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert played(tmp_path, server.url, api_key_env="SPIN_TEST_KEY") == [[7, STOP]] * 4
    assert not proxy.asked
    assert {sent["Authorization"] for _, _, sent in server.asked} == {"Bearer a-key"}
