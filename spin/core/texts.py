"""Prompts and responses as a person reads them: chat markup as turns, and what differs from an earlier response."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from spin.core.terminal import printable

MAX_CHARS = 10_000  # of a text; the files have all of it

_ROLES = "system|developer|user|human|assistant|model|tool|ipython|gpt"
_TURN = re.compile(  # ChatML, Llama 3, Gemma, Phi and Zephyr, Mistral
    rf"<\|im_start\|>(\w+)\n?|<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*|<start_of_turn>(\w+)\n?"
    rf"|<\|({_ROLES})\|>\n?|\[(/?INST)\]"
)
_CONTROL = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|end|endoftext|end_of_text|begin_of_text|end_of_turn)\|>|<(?:end_of_turn|bos|eos|pad|/?s)>"
)
_NAMES = {"INST": "user", "/INST": "assistant", "model": "assistant"}


def plain_text(value: object) -> str:
    """A text without chat markup, cut to what a page shows of it."""
    text = value if isinstance(value, str) else ""
    text = _CONTROL.sub("", text).strip()
    return text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " … (cut here)"


def turns(value: object) -> list[tuple[str, str]]:
    """Role and text of each turn of a prompt as its tokens are decoded, without the one that is left to be written;
    a text without the markup of a family that is known here is one turn without a role."""
    head, *rest = _TURN.split(value if isinstance(value, str) else "")
    size = _TURN.groups + 1
    found = [("", plain_text(head))]
    for i in range(0, len(rest), size):
        role = next(group for group in rest[i : i + size - 1] if group)
        found.append((_NAMES.get(role, role), plain_text(rest[i + size - 1])))
    return [(role, text) for role, text in found if text]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of plain cells as a table of Markdown."""
    cells = [[printable(cell, one_line=True).replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([first, "|---" * len(heads) + "|", *others])


def marked(before: object, after: object) -> Markup:
    """The second text with ``<mark>`` around the words that are not at this place of the first."""
    old, new = (re.findall(r"\w+|\s+|[^\w\s]", plain_text(text)) for text in (before, after))
    parts = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new).get_opcodes():
        words = printable("".join(new[start:end]))
        parts.append(Markup("<mark>{}</mark>").format(words) if kind != "equal" and words.strip() else words)
    return Markup("").join(parts)
