"""``spin keys``: every key of the configs, from the types that check them."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from spin.cli import parser_of
from spin.config.complete import plain
from spin.config.components import KINDS
from spin.config.faults import expected, joined
from spin.config.follow import follow
from spin.config.full import REQUIRED, arguments_of, inline_yaml
from spin.config.schema import (
    COMPONENT,
    Component,
    EvaluateConfig,
    GenerateConfig,
    Section,
    SPINConfig,
    fields_of,
    section_of,
)
from spin.core.texts import markdown_table

RECIPES: dict[str, tuple[type[Section], Collection[str]]] = {
    "spin_recipe": (SPINConfig, ()),
    "spin_generate, besides those of spin_recipe": (GenerateConfig, SPINConfig.model_fields),
    "spin_evaluate": (EvaluateConfig, ()),
}


def page(word: str = "") -> str:
    """The tables as Markdown; with a word, the rows that have it."""
    tables: dict[str, Iterator[tuple[str, ...]]] = {}
    tables |= {title: _keys(model, "", others) for title, (model, others) in RECIPES.items()}
    tables |= {
        f"{section}: {name}": _arguments(section, name)
        for section, kind in KINDS.items()
        for name in kind.names
        if name.startswith("spin.") and section != "validation_dataset"
    }
    lines = []
    for title, rows in tables.items():
        if shown := [row for row in rows if word.lower() in " | ".join(row).lower()]:
            heads = ("key", "default", *(["value"] if title in RECIPES else []), "meaning")
            lines += [f"## {title}", "", markdown_table(heads, shown), ""]
    return "\n".join(lines).rstrip()


def _keys(
    section: type[Section], path: str, others: Collection[str] = (), values: Any = None, about: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    for name, field in fields_of(section).items():
        if name in others or (path and name == COMPONENT):
            continue
        default = REQUIRED if field.is_required() else field.get_default()
        default = values[name] if values is not None and name in values.keys() else default  # noqa: SIM118
        inner, key = section_of(field.annotation), joined(path, name)
        if inner is None or issubclass(inner, Component):
            value = expected(field.annotation, field.metadata, field.title)
            meaning = field.description or (inner.__doc__ if inner else None) or ""
            yield f"`{key}`", _yaml(default), value, f"{about}; {meaning}" if about else meaning
        if inner is not None:
            yield from _keys(inner, key, (), default, "" if issubclass(inner, Component) else field.description or "")


def _arguments(section: str, name: str) -> Iterator[tuple[str, str, str]]:
    own = section_of(SPINConfig.model_fields[section].annotation) if section in SPINConfig.model_fields else None
    follows = follow({section: {COMPONENT: name}}, SPINConfig)[section]
    for key, (default, meaning) in arguments_of(name, section).items():
        if meaning and not (own and key in fields_of(own)):
            yield f"`{section}.{key}`", _yaml(follows.get(key, default)), meaning


def _yaml(value: Any) -> str:
    text = textwrap.shorten(inline_yaml(plain(value)), 60, placeholder=" ...")
    return f"`{text}`" if value != REQUIRED else "must be set"


def main(argv: Sequence[str]) -> int:
    """Prints the tables; 1 if no row has the word."""
    parser = parser_of("keys", "List every key of the configs: default, what it takes, and what it does.")
    parser.add_argument("word", nargs="?", default="", help="show the rows that have it, as in `spin keys batch`")
    word = parser.parse_args(argv).word
    if not (text := page(word)):
        print(f"error: no key has {word!r} in its name or meaning.", file=sys.stderr)
        return 1
    print(text)
    return 0
