"""The finished responses of a shard that is not complete: appended one by one, kept until the store is sealed.

A line holds the SHA-256 of what follows and of the shard's origin, then the response as JSON. So a line that is torn,
edited, or made for another store or shard is found by itself, and neither order nor end of the file matters. Each line
is one write that is not synced: a killed process loses nothing, a host without power the last seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from spin.core.errors import SpinError
from spin.core.files import as_output_error, open_own, parse_json, read_lines
from spin.types import Response

log = logging.getLogger(__name__)


class Journal:
    """The journal of one shard. ``origin`` says which, of which store; JSON values."""

    def __init__(self, file: Path, origin: Mapping[str, Any]) -> None:
        self._file, self._origin = file, json.dumps(origin, sort_keys=True).encode()
        self._stream: Any = None

    def append(self, index: int, response: Response) -> None:
        """Keeps a response, which is number ``index`` of its shard; OutputError if it cannot be written."""
        row = {"index": index, "token_ids": list(response.token_ids), "finish_reason": response.finish_reason}
        row |= {} if response.logprobs is None else {"logprobs": list(response.logprobs)}
        row |= {} if response.verdict is None else {"verdict": response.verdict}
        text = json.dumps(row).encode()
        with as_output_error(self._file):
            self._stream = self._stream or open_own(self._file, "a")
            # the line feed comes first, since the line before may be torn
            os.write(self._stream.fileno(), b"\n%s %s" % (self._checksum(text), text))

    def read(
        self, count: int, check: Callable[[int, Response], Response] = lambda _, found: found
    ) -> dict[int, Response]:
        """Responses by number, those from 0 to below ``count`` that pass ``check``, which may raise a SpinError. The
        file may come from anywhere: whatever else is in it is left out, with a warning."""
        found: dict[int, Response] = {}
        left_out = 0
        try:
            for line in read_lines(self._file):
                checksum, _, text = line.partition(b" ")
                try:
                    row = parse_json(text, allow_nan=True) if checksum == self._checksum(text) else None
                    if isinstance(row, dict) and type(row.get("index")) is int and 0 <= row["index"] < count:
                        index = row.pop("index")
                        found[index] = check(index, Response(**row))
                    else:
                        left_out += line != b""
                except (ValueError, TypeError, SpinError):  # TypeError: other fields
                    left_out += 1
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning(f"{self._file}: cannot be read ({error.strerror or error}); its responses are generated again.")
        if left_out:
            log.warning(
                f"{self._file}: {left_out} lines are not used: torn, edited, or not of this shard. What they held is "
                "generated again."
            )
        return found

    def _checksum(self, text: bytes) -> bytes:
        return hashlib.sha256(self._origin + text).hexdigest().encode()
