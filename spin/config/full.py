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
from spin.config.faults import joined
from spin.config.files import find_config, load_config
from spin.config.follow import follow
from spin.config.schema import COMPONENT, Component, Section, fields_of, section_of
from spin.core.errors import ConfigError

_ARGUMENT = re.compile(r"^ +(\w+) \([^\n]*?\): (.*(?:\n {8,}.*)*)", flags=re.MULTILINE)
_COLUMN = 44  # of comments
_SIMPLE = (bool, int, float, str, type(None))
REQUIRED = "???"  # in place of a default that there is not


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
        arguments = arguments_of(values[COMPONENT], path)
        comments = {key: textwrap.shorten(text, 100, placeholder=" ...") for key, (_, text) in arguments.items()}
        if values[COMPONENT].startswith("spin."):
            simple = {key: value for key, (value, _) in arguments.items() if isinstance(value, _SIMPLE)}
            values = {**values, **{key: value for key, value in simple.items() if key not in values}}
    comments |= {key: field.description or comments.get(key, "") for key, field in fields.items()}
    for key in [*(key for key in fields if key in values), *(key for key in values if key not in fields)]:
        value = values[key]
        inner = section_of(fields[key].annotation) if key in fields else None
        indent, below = "  " * (path.count(".") + bool(path)), joined(path, key)
        if inner is not None and isinstance(value, Mapping) and (issubclass(inner, Component) or len(value) > 2):
            yield _with_comment(f"{indent}{key}:", comments[key])
            yield from _lines(value, inner, below)
        else:
            yield _with_comment(f"{indent}{key}: {inline_yaml(value)}", comments.get(key, ""))


def inline_yaml(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def _with_comment(line: str, comment: str) -> str:
    return f"{line:<{_COLUMN - 2}}  # {comment}" if comment else line


def arguments_of(name: str, path: str) -> dict[str, tuple[Any, str]]:
    """A component's arguments that a config can hold, each with its default and what its docstring says of it."""
    try:
        component = resolve_component(name, kind=kind_at(path))
        parameters = inspect.signature(component).parameters.values()
    except (ConfigError, ValueError):  # of a package that is not installed
        return {}
    documented = [inspect.getdoc(each) or "" for each in getattr(component, "__mro__", (component,))]
    found = [argument for text in documented for argument in _ARGUMENT.findall(text)]
    texts = {key: _first_sentence(text) for key, text in reversed(found)}  # the first one counts
    return {
        each.name: (REQUIRED if each.default is each.empty else each.default, texts.get(each.name, ""))
        for each in parameters
        if each.name not in kind_at(path).supplied and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }


def _first_sentence(text: str) -> str:
    """Of an argument's description, as a config's comment says it."""
    plain = re.sub(r"\s+|`+|:\w+:|\(see [^)]*\)", " ", text)
    sentence = re.split(r"(?<!\.)\. ", plain)[0].strip().rstrip(".")
    return re.sub(r"\bNone\b", "null", re.sub(r" +(?=[ ,:;)])", "", sentence)).rstrip()
