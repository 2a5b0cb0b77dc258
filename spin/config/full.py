"""A packaged config with every key that it may have, each with its value and, as a comment, its meaning."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from omegaconf import OmegaConf

from spin.config.complete import with_defaults
from spin.config.components import kind_at, resolve_component
from spin.config.files import find_config, load_config
from spin.config.follow import follow
from spin.config.schema import COMPONENT, Component, Section, fields_of, section_of
from spin.core.errors import ConfigError

_ARGUMENT = re.compile(r"^ +(\w+) \([^\n]*?\): (.*(?:\n {8,}.*)*)", flags=re.MULTILINE)
_COLUMN = 44  # of comments


def full_text(name: str, model: type[Section]) -> str:
    """A config's text with all keys of its model; what it says is what the shorter one says."""
    text = find_config(name).read_text(encoding="utf-8")
    header = text[: re.search(r"^(?!#)", text, flags=re.MULTILINE).start()]  # type: ignore[union-attr]
    given = follow(OmegaConf.to_container(load_config(name), resolve=False), model)  # type: ignore[arg-type]
    values = with_defaults(given, {}, model)
    return "\n".join([header.rstrip(), "", *_lines(values, model, "")]) + "\n"


def _lines(values: Mapping[Any, Any], section: type[Section], path: str) -> Iterator[str]:
    fields = fields_of(section)
    comments: dict[str, str] = {}
    if issubclass(section, Component):
        defaults, comments = _arguments(values[COMPONENT], path)
        values = {**values, **{key: value for key, value in defaults.items() if key not in values}}
    comments |= {key: field.description or comments.get(key, "") for key, field in fields.items()}
    for key in [*(key for key in fields if key in values), *(key for key in values if key not in fields)]:
        value = values[key]
        inner = section_of(fields[key].annotation) if key in fields else None
        indent, below = "  " * (path.count(".") + bool(path)), f"{path}.{key}" if path else str(key)
        if inner is not None and isinstance(value, Mapping) and (issubclass(inner, Component) or len(value) > 2):
            yield _with_comment(f"{indent}{key}:", comments[key])
            yield from _lines(value, inner, below)
        else:
            shown = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
            yield _with_comment(f"{indent}{key}: {shown.removesuffix('...' + chr(10)).strip()}", comments.get(key, ""))


def _with_comment(line: str, comment: str) -> str:
    return f"{line:<{_COLUMN - 2}}  # {comment}" if comment else line


def _arguments(name: str, path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The defaults of a component's arguments that a config can hold, and what its docstring says of each."""
    try:
        component = resolve_component(name, kind=kind_at(path))
        parameters = inspect.signature(component).parameters.values()
    except (ConfigError, ValueError):  # of a package that is not installed
        return {}, {}
    simple = (bool, int, float, str, type(None))
    ours = [
        each
        for each in parameters
        if name.startswith("spin.") and isinstance(each.default, simple) and each.name not in kind_at(path).supplied
    ]
    texts = {key: _short(text) for key, text in _ARGUMENT.findall(inspect.getdoc(component) or "")}
    return {each.name: each.default for each in ours}, texts


def _short(text: str) -> str:
    """The first sentence of an argument's description, as a config's comment says it."""
    sentence = re.split(r"(?<!\.)\. ", re.sub(r"\s+|`+|:\w+:", " ", text))[0].strip().rstrip(".")
    words = re.sub(r"\bNone\b", "null", re.sub(r" +(?=[ ,;)])", "", sentence))
    return textwrap.shorten(words, 100, placeholder=" ...")
