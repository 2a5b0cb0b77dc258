"""Figures in the documentation's pages: text between two marks, and pictures that are equal for equal results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MARKED = re.compile(r"(<!-- figures: (?P<name>[\w-]+) -->\n).*?(<!-- figures: end -->)", re.DOTALL)


def fill_sections(page: str, sections: Mapping[str, str]) -> str:
    """A page with text in place of what stands between ``<!-- figures: NAME -->`` and ``<!-- figures: end -->``.

    Args:
        page (str): Markdown.
        sections (Mapping[str, str]): Markdown, by name; what has another name stays.

    Returns:
        str: the new page.
    """

    def replaced(found: re.Match[str]) -> str:
        content = sections.get(found["name"])
        return found[0] if content is None else f"{found[1]}\n{content}\n\n{found[3]}"

    return _MARKED.sub(replaced, page)


def drawing() -> Any:
    """``matplotlib.pyplot``, set to write text as text, and the same file for the same results."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "spin", "svg.fonttype": "none", "font.family": "sans-serif"}
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, file: Path) -> None:
    """Writes a figure, without the date, and closes it."""
    figure.savefig(file, metadata={"Date": None})
    drawing().close(figure)
