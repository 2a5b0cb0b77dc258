"""What jargon_choice.yaml does to the quickstart's rows before lm-eval asks them."""

from __future__ import annotations

from typing import Any

CHOICES = 4


def with_choices(docs: Any) -> Any:
    """Gives every question the definitions of three other terms besides its own.

    The others are those of the next rows; the right one stands first, second, third and fourth by turns.

    Args:
        docs (Any): a ``datasets.Dataset`` with ``messages``, one user and one assistant turn a row.

    Returns:
        Any: the data set with ``question``, ``choices`` and ``right``, the index of the right one.
    """
    definitions = [messages[1]["content"] for messages in docs["messages"]]

    def ask(row: dict[str, Any], index: int) -> dict[str, Any]:
        others = [definitions[(index + step) % len(definitions)] for step in range(1, CHOICES)]
        right = index % CHOICES
        return {
            "question": row["messages"][0]["content"],
            "choices": [*others[:right], definitions[index], *others[right:]],
            "right": right,
        }

    return docs.map(ask, with_indices=True, remove_columns=docs.column_names)
