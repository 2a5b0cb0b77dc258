"""Fixed prompts: what the policy responds to the same held-out prompts before self-play and after each iteration."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from spin.core.files import write_json_lines
from spin.core.terminal import fill, printable, wrap
from spin.core.texts import plain_text, turns
from spin.pairs.store import PairStore

_NARROWEST = 24  # columns of a response that stands next to others
_MOST_LINES = 12


def write_fixed_prompts(
    file: Path, played: Mapping[int, tuple[Path, int]], decode: Callable[[Sequence[int]], str]
) -> list[dict[str, Any]]:
    """Writes the responses of all stores, one JSON object a line, and returns them. ``played`` has, by the number of
    finished iterations, the store's folder and the optimizer steps made; a store that is not there is left out."""
    rows = [
        {
            "iteration": finished,
            "step": step,
            "sample_id": pair.sample_id,
            "prompt": decode(list(map(int, pair.prompt_ids))),
            "real": decode(list(map(int, pair.real_ids))),
            "response": decode(list(map(int, response.token_ids))),
            "finish_reason": response.finish_reason,
        }
        for finished, (folder, step) in played.items()
        if folder.is_dir()
        for pair in PairStore.open(folder).pairs()
        for response in pair.generated
    ]
    write_json_lines(file, rows)
    return rows


def fixed_prompts_table(rows: Sequence[Mapping[str, Any]], columns: int | None = None) -> str:
    """The rows of :func:`write_fixed_prompts` as text: the responses to a prompt side by side, or one below the other
    in a terminal of few ``columns`` (default: this one's)."""
    columns = columns or shutil.get_terminal_size((120, 24)).columns
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["sample_id"], []).append(row)
    lines = ["", "The same held-out prompts, before self-play and after each iteration:"]
    for own in by_prompt.values():
        asked = turns(own[0]["prompt"])
        lines += ["", *_wrap(asked[-1][1] if asked else "", columns)]
        cells = [(_head(row["iteration"]), _response(row)) for row in own] + [("real", plain_text(own[0]["real"]))]
        width = (columns - 3 * (len(cells) - 1)) // len(cells)
        if width < _NARROWEST:
            for head, text in cells:
                lines += [f"  {head}", *(f"    {line}" for line in _wrap(text, columns - 4))]
            continue
        wrapped = [[head, "-" * width, *_wrap(text, width)] for head, text in cells]
        lines += [" | ".join(fill(cell, width) for cell in row).rstrip() for row in zip_longest(*wrapped, fillvalue="")]
    return "\n".join(lines)


def _head(finished: int) -> str:
    return f"after iteration {finished - 1}" if finished else "before self-play"


def _response(row: Mapping[str, Any]) -> str:
    return plain_text(row["response"]) + (" ... (truncated)" if row["finish_reason"] == "length" else "")


def _wrap(text: str, width: int) -> list[str]:
    lines = wrap(printable(" ".join(text.split())), max(width, 8))
    return lines if len(lines) <= _MOST_LINES else [*lines[: _MOST_LINES - 1], "..."]
