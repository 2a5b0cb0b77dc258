"""A vLLM server on other GPUs or another host: token ids over HTTP."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from spin.core.dtypes import DTYPES
from spin.core.errors import ConfigError, GeneratorError
from spin.core.files import TRANSFER, check_own_folder
from spin.core.ranks import barrier, raise_on_all_ranks
from spin.generators.generator import GeneratorContext, SamplingParams, generate_in_order, max_response_tokens
from spin.generators.http import Client, Reply, TimedOutError, UnavailableError
from spin.generators.vllm import KNOWN, is_too_old, tokens_to_ban, vllm_response, vllm_sampling
from spin.model.hf import export_hf
from spin.model.hf_families import check_model_type
from spin.types import Response

log = logging.getLogger(__name__)

_SHORT_SECONDS = 60.0  # for what a server answers at once, if timeout_seconds is not less
_LOOK_SECONDS = 0.5  # the longest time that a stream waits for a response before its caller may stop it
_MOST_TIMEOUTS = 3  # of one request
_PAUSE_SECONDS = 1.0  # before the first repetition; doubled each time
_LONGEST_PAUSE_SECONDS = 30.0
# Of a response: much more than vLLM's JSON takes for a token (its id, and its text up to three times) and the rest.
_BYTES_PER_TOKEN, _OTHER_BYTES = 4096, 1 << 20
_MOST_BYTES = 16 << 20  # of a response to anything else; /metrics is the longest
_HOW_TO_SERVE = "VLLM_SERVER_DEV_MODE=1 vllm serve <model folder> --generation-config vllm"


class VLLMServerGenerator:
    """Generates with ``vllm serve``.

    Before every iteration all ranks write the policy's weights as a Hugging Face folder to ``transfer_dir``, which the
    server must see under the same path, and the server loads them in place. That takes its development endpoints
    (``VLLM_SERVER_DEV_MODE=1``): keep them inside a network that you trust.

    A server that dies in the middle of an iteration may be restarted: requests are repeated until it answers, and the
    weights are sent again before any prompt. Finished responses are kept. A request that is not answered in time is
    repeated twice. Redirects are not followed, and proxies are not used.

    Without ``transfer_dir`` the server keeps the model that it was started with: a judge in an evaluation, never an
    opponent. Then it needs no development endpoints, and ``fingerprint`` is the name of its model.

    Args:
        context (GeneratorContext): gives the policy and the ranks.
        url (str): where it listens, such as ``http://localhost:8000``; ``https`` works as well.
        transfer_dir (str | None): folder for the weights, seen by trainer and server; None: it is sent none. It is
            replaced before every iteration, so it must be new, empty, or of an earlier run, and outside the run's
            folder and those of models.
        model_dir (str | None): Hugging Face folder that training starts from; gives config and tokenizer.
        model_type (str | None): as the checkpointer's.
        dtype (str): of the written weights: ``bf16``, ``fp16`` or ``fp32``.
        concurrency (int): requests of a rank that the server has at a time.
        timeout_seconds (float): for one response from connecting to its last byte, or for loading weights.
        wait_seconds (float): how long to wait for a server that is not there, at the start and later.
        max_logprob_gap (float | None): see :class:`spin.generators.VLLMGenerator`.
        api_key_env (str | None): environment variable that holds the server's API key; the key itself stands nowhere.
        verify (bool | str): check the certificate of an ``https`` server; a path names a CA bundle.

    Raises:
        ConfigError: If an argument cannot be, or the key's variable is not set.
        GeneratorError: If no server answers, or it is too old.
    """

    shares_policy_weights = False

    def __init__(
        self,
        context: GeneratorContext,
        url: str,
        transfer_dir: str | None = None,
        model_dir: str | None = None,
        model_type: str | None = None,
        dtype: str = "bf16",
        concurrency: int = 256,
        timeout_seconds: float = 600.0,
        wait_seconds: float = 300.0,
        max_logprob_gap: float | None = 0.02,
        api_key_env: str | None = None,
        verify: bool | str = True,
    ) -> None:
        if transfer_dir is not None and (context.model is None or context.world is None):
            raise ConfigError("VLLMServerGenerator sends the policy's weights and was given no model or no ranks.")
        if (transfer_dir is None) != (model_dir is None) or (transfer_dir is None and model_type is not None):
            raise ConfigError(
                "generator: transfer_dir and model_dir (and model_type) go together: for a server that is sent the "
                "policy's weights, and none of them for one that keeps its own."
            )
        if transfer_dir is not None and model_dir is not None:
            check_own_folder("generator.transfer_dir", transfer_dir, TRANSFER, {"generator.model_dir": model_dir})
        if not re.match(r"https?://[^/@\s]+", url):
            raise ConfigError(f"generator.url={url!r}: expected http://host:port or https://host:port.")
        if dtype not in DTYPES:
            raise ConfigError(f"generator.dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
        for name, value in (("concurrency", concurrency), ("timeout_seconds", timeout_seconds)):
            if value <= 0:
                raise ConfigError(f"generator.{name}={value}: expected more than 0.")
        headers = {}
        if api_key_env is not None:
            if not os.environ.get(api_key_env):
                raise ConfigError(f"generator.api_key_env: the environment variable {api_key_env} is not set.")
            headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        self.max_logprob_gap = None if transfer_dir is None else max_logprob_gap
        self._world: Any = context.world
        self._model: Any = context.model
        self._url, self._dtype, self._concurrency = url.rstrip("/"), DTYPES[dtype], concurrency
        self._model_dir: Any = model_dir  # these three are not None where weights are sent
        self._model_type = check_model_type(model_type)
        self._transfer_dir: Any = None if transfer_dir is None else Path(transfer_dir)
        self._timeout, self._wait = timeout_seconds, wait_seconds
        self._client = Client(self._url, headers, verify, concurrency)
        self._lock = threading.Lock()
        self._started: float | None = None  # when the server that has the weights was started
        self._has_weights = transfer_dir is None
        self._await_server()
        self._check_version()
        self._name, longest = self._card()
        self.max_seq_len = min(context.max_seq_len, longest or context.max_seq_len)
        if transfer_dir is None:
            self.fingerprint = f"served {self._name}"

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Response]:
        return generate_in_order(self, prompts, sampling, seeds)

    def stream(
        self, requests: Iterable[tuple[Sequence[int], int]], sampling: SamplingParams
    ) -> Iterator[tuple[int, Response] | None]:
        """See ``StreamingGenerator``; the server batches requests and shares what prompts have in common."""
        if not self._has_weights:
            raise GeneratorError("the server has no weights of the policy: update them before it generates.")
        self._ensure_weights()
        waiting = enumerate(requests)
        running: dict[Future[Response], int] = {}
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="vllm-request")
        try:
            while True:
                for index, (prompt, seed) in islice(waiting, 2 * self._concurrency - len(running)):
                    limit = max_response_tokens(prompt, index, sampling, self.max_seq_len)
                    running[pool.submit(self._respond, list(map(int, prompt)), seed, limit, sampling)] = index
                if not running:
                    return
                for future in wait(running, _LOOK_SECONDS, FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
                yield None
        finally:
            self._client.abort()  # a stream that ends early does not wait for its requests
            pool.shutdown(wait=True, cancel_futures=True)
            self._client.aborted.clear()

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Writes the policy's weights to ``transfer_dir`` and has the server load them. Collective: every rank writes
        files of its own shards, and ``named_tensors`` is not consumed."""
        if self._transfer_dir is None:
            raise ConfigError(
                "generator.transfer_dir: not set, so the server cannot be sent the policy's weights. Name a folder "
                "that trainer and server see."
            )
        self._has_weights = False
        with raise_on_all_ranks(self._world, ConfigError):  # what was there at the start may not be what is there now
            check_own_folder("generator.transfer_dir", self._transfer_dir, TRANSFER, {})
        written = self._model_dir, self._transfer_dir, self._model_type
        export_hf(self._model, *written, dtype=self._dtype, world=self._world, kind=TRANSFER)
        with raise_on_all_ranks(self._world, GeneratorError):
            if self._world.is_main:
                self._await_server()
                self._load_weights(idle=True)
        barrier(self._world)
        self._started = self._start_time()
        self._has_weights = True

    def sleep(self) -> None:
        """Does nothing: the server's memory is its own."""

    def wake(self) -> None:
        """Waits for the server."""
        self._await_server()

    def close(self) -> None:
        """Does nothing: the server keeps running."""

    # ---- the server
    def _respond(
        self, prompt: list[int], seed: int, most: int, sampling: SamplingParams, ban: frozenset[int] = frozenset()
    ) -> Response:
        asked = {"model": self._name, "prompt": prompt, "return_token_ids": True}
        body = asked | vllm_sampling(sampling, seed, most, ban) | ({"logprobs": 0} if sampling.logprobs else {})
        size = _OTHER_BYTES + _BYTES_PER_TOKEN * most + 16 * len(prompt)  # the prompt's ids come back
        reply = self._request_with_retries("POST", "/v1/completions", most_bytes=size, body=body)
        choices = reply.json().get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            found = f"{len(choices)} choices" if isinstance(choices, list) else f"choices {choices!r:.60}"
            raise GeneratorError(f"{reply.what}: answered with {found}, expected one, with token_ids.")
        tokens, logprobs = choices[0].get("token_ids"), choices[0].get("logprobs")
        if tokens is not None and not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
            raise GeneratorError(f"{reply.what}: answered with token_ids {tokens!r:.60}, expected whole numbers.")
        values = logprobs.get("token_logprobs") if sampling.logprobs and isinstance(logprobs, dict) else None
        values = values if isinstance(values, list) else None
        response = vllm_response(tokens, choices[0].get("finish_reason"), values, sampling)
        more = tokens_to_ban(response, sampling, ban)
        return self._respond(prompt, seed, most, sampling, more) if more else response

    def _load_weights(self, idle: bool) -> None:
        """The server loads the weights of ``transfer_dir`` in place."""
        started = time.perf_counter()
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._transfer_dir.resolve())}}
        self._request_with_retries("POST", "/collective_rpc", body=body)
        reset = self._request_with_retries("POST", "/reset_prefix_cache")
        # other ranks' running requests, of the same weights, may hold parts of the cache
        says = reset.json() if reset.headers.get("content-type", "").startswith("application/json") else {}
        if idle and not says.get("success", True):
            raise GeneratorError(f"{self._url} did not reset its prefix cache, whose entries are of other weights.")
        log.info(f"{self._url} has the policy's weights ({time.perf_counter() - started:.1f} s).")

    def _ensure_weights(self, after_failure: bool = False) -> None:
        """Sends a restarted server the weights again."""
        if self._transfer_dir is None:
            return
        with self._lock:
            now = self._start_time()
            if now != self._started or (after_failure and now is None):
                log.warning(f"{self._url} restarted; resending the policy weights.")
                self._load_weights(idle=False)
                self._started = now

    def _start_time(self) -> float | None:
        """When the server's process was started, in seconds since 1970, if it says."""
        found = re.search(r"^process_start_time_seconds ([0-9.e+]+)$", self._get("/metrics").text, re.MULTILINE)
        try:
            return float(found[1]) if found else None
        except ValueError:
            return None

    def _check_version(self) -> None:
        found = f"{self._get('/version').json().get('version', 'unknown')!s:.40}"
        if is_too_old(found):
            raise GeneratorError(f"{self._url} runs vLLM {found}, expected {KNOWN}.")
        log.info(f"{self._url} runs vLLM {found} (known: {KNOWN}).")

    def _card(self) -> tuple[str, int | None]:
        """Name and context of the model that it serves."""
        reply = self._get("/v1/models")
        cards = reply.json().get("data")
        card = cards[0] if isinstance(cards, list) and cards and isinstance(cards[0], dict) else {}
        name, longest = card.get("id"), card.get("max_model_len")
        if not isinstance(name, str) or not (longest is None or (type(longest) is int and longest > 0)):
            expected = "expected data with id and max_model_len"
            raise GeneratorError(f"{reply.what}: answered {reply.text[:100]!r}, {expected}.")
        return name, longest

    def _await_server(self) -> None:
        """Returns when the server says that it is healthy."""
        deadline, pause = time.monotonic() + self._wait, _PAUSE_SECONDS
        while True:
            try:
                left = max(1.0, deadline - time.monotonic())
                self._send("GET", "/health", seconds=min(self._timeout, _SHORT_SECONDS, left))
                return
            except UnavailableError as error:
                if (left := deadline - time.monotonic()) <= 0:
                    raise GeneratorError(
                        f"no vLLM server at {self._url} within {self._wait:g} s: {error}. Start one ({_HOW_TO_SERVE}), "
                        "or change generator.url."
                    ) from error
            self._pause(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    # ---- requests
    def _get(self, path: str) -> Reply:
        return self._request_with_retries("GET", path, seconds=min(self._timeout, _SHORT_SECONDS))

    def _pause(self, seconds: float) -> None:
        if self._client.aborted.wait(seconds):
            raise GeneratorError(f"{self._url}: aborted, because another request failed or the run was stopped.")

    def _request_with_retries(self, method: str, path: str, **arguments: Any) -> Reply:
        """A request that is repeated, with exponential backoff, while the server is not there."""
        deadline, pause, timeouts = None, _PAUSE_SECONDS, 0
        while True:
            try:
                return self._send(method, path, **arguments)
            except UnavailableError as error:
                timeouts += isinstance(error, TimedOutError)
                deadline = deadline or time.monotonic() + self._wait
                if (left := deadline - time.monotonic()) <= 0 or timeouts >= _MOST_TIMEOUTS:
                    times = f"{timeouts} times" if timeouts >= _MOST_TIMEOUTS else f"for {self._wait:g} s"
                    raise GeneratorError(
                        f"{self._url} did not answer {times}: {error}. Finished responses are on disk; start the "
                        "server and run the same command again to resume."
                    ) from error
                pause = min(pause, left)
                if not self._client.aborted.is_set():
                    log.warning(f"{self._url}: {error}; asking again in {pause:g} s.")
            self._pause(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            if path == "/v1/completions":
                self._await_server()
                self._ensure_weights(after_failure=True)

    def _send(self, method: str, path: str, **arguments: Any) -> Reply:
        """One request, see :meth:`Client.request`; ``UnavailableError`` if a later one may succeed, ``GeneratorError``
        if none will."""
        usual = {"seconds": self._timeout, "most_bytes": _MOST_BYTES}
        reply = self._client.request(method, path, **usual | arguments)
        status = reply.status
        if status in (429, 502, 503, 504):
            raise UnavailableError(f"{method} {path}: HTTP {status}")
        if status in (401, 403):
            raise GeneratorError(f"{self._url}: HTTP {status}. Name the key's variable: api_key_env.")
        if status == 404 and path in ("/collective_rpc", "/reset_prefix_cache"):
            raise GeneratorError(
                f"{self._url} has no {path}, which brings it the policy's weights. Start it as {_HOW_TO_SERVE}."
            )
        if status == 500 and path == "/v1/completions":
            raise UnavailableError(f"{method} {path}: HTTP 500: {reply.text[:200]}")  # its engine died
        if not 200 <= status < 300:
            raise GeneratorError(f"{reply.what}: HTTP {status}: {reply.text[:500]}")
        return reply
