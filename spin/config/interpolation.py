"""``${...}`` in configs, resolved within limits; paths with ``~`` and variables; which values the environment gave."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from spin.config.faults import Faults, first_line
from spin.core import redact
from spin.core.errors import ConfigError

MISSING = "???"
PATH_KEY = re.compile(r"(?:.*_)?(?:dir|path|file|folder)|source|resume")  # keys that hold a path, or a list of them
_PACKAGED = "packaged:"
_VARIABLE = re.compile(r"\$(\w+)")
_MOST_RESOLVED = 2_000_000  # characters of a resolved config; 100 more for a value, 1000 for a reference
Keys = tuple[Any, ...]


def escaped(value: Any) -> Any:
    """Containers whose texts stay as they are in a config, ``${`` too."""
    return _map_texts(value, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def with_paths(value: Any, change: Callable[[str], str]) -> Any:
    """Containers with the texts of path keys changed."""
    if isinstance(value, list):
        return [with_paths(item, change) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _map_texts(item, change)
        if isinstance(item, str | list) and isinstance(key, str) and PATH_KEY.fullmatch(key)
        else with_paths(item, change)
        for key, item in value.items()
    }


def configs_root() -> Path:
    """The folder of the packaged configs and of the quickstart's data."""
    installed = Path(__file__).parents[1] / "configs"  # a wheel maps configs/ to spin/configs/
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"  # checkout, editable install


def expanded(path: str) -> str:
    """A path without ``~``, ``packaged:x`` as a file of this package, ``$HOME/x`` as ``${oc.env:HOME}/x``; a variable
    that is not set stays as typed."""
    if path.startswith(_PACKAGED):
        return str(configs_root() / path.removeprefix(_PACKAGED))
    with_variables = _VARIABLE.sub(lambda name: f"${{oc.env:{name[1]}}}" if name[1] in os.environ else name[0], path)
    return os.path.expanduser(with_variables)


def _texts(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    """Every text with ``${`` in containers, with the keys that lead to it."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(item, (*keys, key))
    elif isinstance(value, str) and "${" in value:
        yield keys, value


def parent_of(cfg: Any, keys: Sequence[Any]) -> Any:
    for key in keys[:-1]:
        cfg = cfg[key]
    return cfg


def from_environment(raw: Any, cfg: DictConfig) -> list[tuple[Keys, str]]:
    """The texts of a config, unresolved, whose values come from the environment, with the keys that lead to them."""
    used: list[str] = []
    found = []

    def watched(evaluate: Callable[..., Any], cfg: Container, **arguments: Any) -> Any:
        value = evaluate(cfg, **arguments)
        if arguments["inter_type"] == "oc.env":
            used.append(arguments["inter_args"][0])
            if redact.is_secret_variable(used[-1]):
                redact.remember(value)
        return value

    with _around("_evaluate_custom_resolver", watched):
        for keys, text in _texts(raw):
            used.clear()
            value = parent_of(cfg, keys)[keys[-1]]
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True)
            if used:
                found.append((keys, text))
    return found


@contextlib.contextmanager
def _around(method: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Lets a function see each call of a method by which OmegaConf resolves: it has no hook for that."""
    original = getattr(Container, method)
    setattr(Container, method, lambda *args, **kwargs: wrapper(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(Container, method, original)


@contextlib.contextmanager
def bounded() -> Iterator[Callable[[Any], None]]:
    """Limits what the ``${...}`` of a config may grow to: doubled a few times, a text fills any memory."""
    left = _MOST_RESOLVED

    def spend(value: Any, cost: int = 100) -> None:
        nonlocal left
        left -= cost + (len(value) if isinstance(value, str) else 0)
        if left < 0:
            raise ConfigError(f"stands for more than {_MOST_RESOLVED:,} characters, through ${{...}} of ${{...}}")

    def counted(resolve: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        node = resolve(*args, **kwargs)
        spend(None if node is None or isinstance(node, Container) else node._value(), cost=1000)
        return node

    with _around("_resolve_interpolation_from_parse_tree", counted):
        yield spend


def _contents(value: Any, spend: Callable[[Any], None]) -> Any:
    """``OmegaConf.to_container(value, resolve=True)`` within limits."""
    spend(value)
    if isinstance(value, ListConfig):
        return [MISSING if OmegaConf.is_missing(value, i) else _contents(value[i], spend) for i in range(len(value))]
    if not isinstance(value, DictConfig):
        return value
    return {key: MISSING if OmegaConf.is_missing(value, key) else _contents(value[key], spend) for key in value}


def resolve(cfg: DictConfig, faults: Faults) -> tuple[dict[str, Any], bool]:
    """The config as plain containers, without ``${...}`` unless that is a fault, and whether it is none."""
    values: dict[str, Any] = {}
    at = ""
    try:
        with bounded() as spend:
            for key in cfg:
                at = str(key)
                values[at] = MISSING if OmegaConf.is_missing(cfg, key) else _contents(cfg[key], spend)
        return values, True
    except InterpolationToMissingValueError:
        pass  # the missing value is a fault of its own
    except (OmegaConfBaseException, ConfigError, RecursionError) as error:
        where = getattr(error, "full_key", None) or at
        problem = first_line(error).removeprefix("ConfigError raised while resolving interpolation: ")
        faults.at(where, f"{problem}. Check what stands between ${{ and }}.")
    return OmegaConf.to_container(cfg, resolve=False), False  # type: ignore[return-value]
