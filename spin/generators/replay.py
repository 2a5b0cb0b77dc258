"""Responses from a file: made elsewhere, by another engine or on another cluster."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from spin.core.errors import ConfigError, GeneratorError
from spin.core.files import parse_json, read_lines
from spin.core.terminal import counted
from spin.generators.generator import GeneratorContext, SamplingParams
from spin.types import FinishReason, Response

log = logging.getLogger(__name__)

_COLUMNS = ("prompt_ids", "generated_ids")
_REASONS = get_args(FinishReason)


class _Recorded(NamedTuple):
    k: int
    token_ids: np.ndarray
    finish_reason: FinishReason | None


class ReplayGenerator:
    """Looks responses up by the exact token ids of the prompt.

    ``path`` is one of

    - a JSON Lines file, one response a line: ``{"prompt_ids": [...], "generated_ids": [...]}`` and, if known,
      ``"finish_reason": "stop" | "length"`` and ``"k": 0``;
    - a parquet file with these columns, or a folder of such files: a pair store.

    Token ids only: text, encoded again, need not give back the ids that the model wrote. The stop token belongs to
    ``generated_ids``. Without a finish reason, a response that ends with a stop token stopped, any other was truncated.

    Several responses to a prompt are ordered by k, then by their place in the file. In one call of ``generate`` the
    i-th request for a prompt gets its i-th response; the next call starts with the first again. So responses depend
    neither on earlier calls nor on a restart, and seeds are ignored. They are truncated at ``max_new_tokens`` and at
    ``max_seq_len``.

    The responses are fixed: ``update_weights`` changes nothing. From the second iteration on they are not the
    opponent's own; reference log-probs still are the current opponent's.

    Args:
        context (GeneratorContext): gives ``max_seq_len`` and, for messages, ``decode``.
        path (str | Path): the file or folder.
        on_missing (str): ``error``, or ``empty``: a prompt without a response left gets an empty one, which the recipe
            treats like any empty response.

    Raises:
        ConfigError: If ``on_missing`` is unknown.
        GeneratorError: If the file is missing, unreadable, or a row is not as above; the message names the row.
    """

    shares_policy_weights = False
    takes_sampling = False  # responses may have been truncated before max_new_tokens

    def __init__(self, context: GeneratorContext, path: str | Path, on_missing: str = "error") -> None:
        if on_missing not in ("error", "empty"):
            raise ConfigError(f"generator.on_missing={on_missing!r}: expected 'error' or 'empty'.")
        self.path = Path(path)
        self._context = context
        self._on_missing = on_missing
        self._recorded: dict[bytes, list[_Recorded]] = {}
        for prompt, recorded in _read(self.path):
            self._recorded.setdefault(_key(prompt), []).append(recorded)
        if not self._recorded:
            raise GeneratorError(f"{self.path}: no responses in it.")
        digest = hashlib.sha256()
        for key, found in self._recorded.items():
            found.sort(key=lambda recorded: recorded.k)  # stable: the file's order within the same k
            digest.update(len(key).to_bytes(8, "little") + key)
            for k, ids, reason in found:
                digest.update(f"{k} {reason} {len(ids)} ".encode() + ids.tobytes())
        self.fingerprint = digest.hexdigest()  # tells a store of these responses from one of another file's

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Response]:
        if sampling.logprobs:
            raise GeneratorError(f"{self.path}: a replayed response has no log-probs. Set sampling.logprobs=false.")
        asked: Counter[bytes] = Counter()
        responses, missing = [], []
        for index, prompt in enumerate(prompts):
            key = _key(prompt)
            found = self._recorded.get(key, [])
            if asked[key] < len(found):
                responses.append(self._response(found[asked[key]], prompt, sampling))
            else:
                responses.append(Response([], "length"))
                missing.append((index, len(found)))
            asked[key] += 1
        if missing and self._on_missing == "error":
            texts = {index: self._context.decode(prompts[index])[:60] for index, _ in missing[:3]}
            shown = "; ".join(f"prompt {i} ({len(prompts[i])} tokens, {texts[i]!r}) has {n}" for i, n in missing[:3])
            raise GeneratorError(
                f"{self.path}: {len(missing)} of {len(prompts)} requests have no response left, e.g. {shown}. Prompts "
                "are matched by their exact token ids: make the file with the same tokenizer, chat template and number "
                "of responses per prompt, or set generator.on_missing=empty."
            )
        if missing:
            found_none = f"{len(missing)} of {counted(len(prompts), 'prompt')} got an empty response"
            log.warning(f"{self.path}: {found_none} (on_missing=empty).")
        return responses

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Ignored, and not iterated: the responses are fixed."""

    def sleep(self) -> None:
        """Does nothing, like ``wake`` and ``close``."""

    wake = close = sleep

    def _response(self, recorded: _Recorded, prompt: Sequence[int], sampling: SamplingParams) -> Response:
        room = max(0, min(sampling.max_new_tokens, self._context.max_seq_len - len(prompt)))
        token_ids, truncated = recorded.token_ids[:room].tolist(), len(recorded.token_ids) > room
        ends: FinishReason = "stop" if token_ids and token_ids[-1] in sampling.stop_token_ids else "length"
        return Response(token_ids, "length" if truncated else recorded.finish_reason or ends)


def _key(prompt: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(prompt, dtype=np.int32).tobytes()


def _read(path: Path) -> Iterator[tuple[np.ndarray, _Recorded]]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        expected = "Expected a pair store, a parquet file or a .jsonl"
        raise GeneratorError(f"{path}: no *.parquet file in this folder. {expected}.")
    for file in files:
        if not file.is_file():
            raise GeneratorError(f"{file}: no such file. Set generator.path to a .jsonl, a .parquet or a pair store.")
        for where, row in _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file):
            yield _checked(where, row)


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        for number, line in enumerate(read_lines(file), start=1):
            if line.strip():
                yield f"{file}:{number}", parse_json(line, allow_nan=True)
    except ValueError as error:
        raise GeneratorError(f"{file}:{number}: not a JSON object in UTF-8 ({error}).") from error
    except OSError as error:
        raise GeneratorError(f"{file}: cannot be read ({error.strerror or error}).") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        wanted = [name for name in (*_COLUMNS, "finish_reason", "k") if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(batch_size=1024, columns=wanted)
        for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches)):
            yield f"{file}: row {number}", row
    except (OSError, ValueError, OverflowError, SystemError, MemoryError, pa.ArrowException) as error:  # or no UTF-8
        raise GeneratorError(f"{file}: not a readable parquet file ({error}).") from error


def _checked(where: str, row: Any) -> tuple[np.ndarray, _Recorded]:
    if not isinstance(row, dict) or any(row.get(name) is None for name in _COLUMNS):
        found = f"the fields {sorted(row)}" if isinstance(row, dict) else type(row).__name__
        raise GeneratorError(
            f"{where}: has {found}, expected prompt_ids and generated_ids, lists of token ids. Text is not taken: "
            "encoding it again need not give the ids that the model wrote."
        )
    for name in _COLUMNS:
        ids = row[name]
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise GeneratorError(f"{where}: {name} is {str(ids)[:60]}, expected a list of token ids.")
    reason, k = row.get("finish_reason"), row.get("k")
    if reason is not None and reason not in _REASONS:
        raise GeneratorError(f"{where}: finish_reason is {reason!r}, expected one of {', '.join(_REASONS)}.")
    if k is not None and type(k) is not int:
        raise GeneratorError(f"{where}: k is {k!r}, expected the number of the response.")
    token_ids = np.asarray(row["generated_ids"], dtype=np.int32)
    return np.asarray(row["prompt_ids"], dtype=np.int32), _Recorded(k or 0, token_ids, reason)
