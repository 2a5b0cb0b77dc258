"""Config files: packaged ones by name, YAML read within limits, overrides of the command line.

A file may come from anywhere: its size, depth and aliases are limited before they take memory.
"""

from __future__ import annotations

import argparse
import difflib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spin.config.components import ALLOW_KEY, DOTPATH, FROM_OUTSIDE
from spin.config.faults import Faults, first_line, joined, nearest_or_known
from spin.config.interpolation import bounded, configs_root
from spin.config.schema import COMPONENT
from spin.core.errors import ConfigError

_MOST_BYTES = 1 << 20  # of a file
_MOST_NODES = 10_000  # of a file, aliases counted as often as they are used
_MOST_DEPTH = 50
_MOST_DIGITS = 30
_MOST_INTERPOLATION = 2_000  # characters of a text with ${...}
_INTEGER = re.compile(r"[-+]?(0x[\da-fA-F_]+|0[ob]?[\d_]+|[\d_:]+)")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def packaged_configs() -> list[str]:
    """Names of the configs that come with this package, such as ``paper/zephyr_7b``, sorted."""
    root = configs_root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Reads a YAML file and applies overrides; nothing is completed, checked or resolved yet.

    Args:
        name_or_path (str): a file, or else the name of a packaged config (``.yaml`` may be left out).
        overrides (Sequence[str]): ``key=value``, ``nested.key=value`` (value: YAML, may contain ``=``), or ``~key`` to
            remove. ``section=dotted.path`` replaces the ``_component_`` of a section that has one, as in torchtune.

    Returns:
        DictConfig: the raw config.

    Raises:
        ConfigError: If the file is missing, unreadable or not a YAML mapping, or an override has no such form.
    """
    return with_overrides(read_yaml(find_config(name_or_path)), overrides)


def with_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The same raw config, with overrides applied as :func:`load_config` does."""
    if any(override.startswith(f"{ALLOW_KEY}=") for override in overrides):
        cfg.pop(ALLOW_KEY, None)  # what the file allows counts for nothing
        cfg._set_flag(FROM_OUTSIDE, True)
    faults = Faults()
    with bounded():
        for override in overrides:
            _apply_override(cfg, override, faults)
    faults.raise_if_any()
    return cfg


def read_yaml(path: Path) -> DictConfig:
    """Reads a YAML file as a config, within limits; nothing is resolved."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path}: more than {_MOST_BYTES:,} bytes, which no config has.")
        text = content.decode("utf-8")
        _check_yaml(text, f"{path}:")
        cfg = OmegaConf.load(io.StringIO(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error}). Save the file as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except (OmegaConfBaseException, RecursionError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {first_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path}: the top level is a list, expected 'key: value' lines.")
    return cfg


def _check_yaml(text: str, where: str) -> None:
    """Raises ConfigError for a YAML text that would take much memory: by its events, then by its nodes, among which an
    alias is the node that it names."""
    depth, key = 0, ""
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.ScalarEvent) and depth == 1:
            key = event.value
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH:
            raise _too_much(where, event, key[:200], f"more than {_MOST_DEPTH} levels deep, expected a config.")
    sizes: dict[int, int] = {}  # by node; 0: we are in it

    def size_of(node: yaml.Node, path: str) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                raise _too_much(where, node, path, "an alias stands within what it names.")
            return sizes[id(node)]
        size, sizes[id(node)] = 1, 0
        if isinstance(node, yaml.ScalarNode):
            is_number = node.tag.endswith(":int") or not node.style  # as plain text
            if is_number and len(node.value) > _MOST_DIGITS and _INTEGER.fullmatch(node.value):
                problem = f"found a number of {len(node.value)} digits, expected at most {_MOST_DIGITS}."
                raise _too_much(where, node, path, problem)
            if "${" in node.value and len(node.value) > _MOST_INTERPOLATION:
                raise _too_much(
                    where, node, path, f"a text with ${{...}} has at most {_MOST_INTERPOLATION} characters."
                )
        is_mapping = isinstance(node, yaml.MappingNode)
        for index, item in enumerate(node.value if isinstance(node, yaml.CollectionNode) else ()):
            key = f"[{index}]" if not is_mapping else item[0].value if isinstance(item[0], yaml.ScalarNode) else "?"
            below = (joined(path, key) if is_mapping else path + key)[:200]
            size += sum(size_of(part, below) for part in (item if is_mapping else [item]))
            if size > _MOST_NODES:
                problem = f"more than {_MOST_NODES:,} values, aliases counted. Write less into a config."
                raise _too_much(where, item[0] if is_mapping else item, below, problem)
        sizes[id(node)] = size
        return size

    root = yaml.compose(text, Loader=_LOADER)
    if root is not None:
        size_of(root, "")


def _too_much(where: str, at: yaml.Event | yaml.Node, path: str, problem: str) -> ConfigError:
    line = f"{at.start_mark.line + 1}: " if where else ""  # an override has one
    return ConfigError(f"{where}{line}{path}: {problem}".lstrip(": "))


def find_config(name_or_path: str) -> Path:
    """The file of a config."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    name = name_or_path.removesuffix(".yaml")
    names = packaged_configs()
    if name in names:
        return configs_root() / f"{name}.yaml"
    if path.is_dir():
        raise ConfigError(f"config {name_or_path!r} is a folder, expected a YAML file.")
    files = map(str, path.parent.glob("*.yaml"))
    nearest = difflib.get_close_matches(name_or_path, files, n=1) or difflib.get_close_matches(name, names, 3, 0.5)
    hint = f"Did you mean {' or '.join(nearest)}? " if nearest else ""
    raise ConfigError(
        f"config {name_or_path!r} not found: there is no such file and no packaged config of that name. "
        f"{hint}Packaged configs: {', '.join(names)}."
    )


def _apply_override(cfg: DictConfig, override: str, faults: Faults) -> None:
    if override.startswith("~"):
        _remove(cfg, override[1:], faults)
        return
    key, equals, text = override.partition("=")
    if not equals or not key:
        one = " A command takes one config." if override.endswith((".yaml", ".yml")) else ""
        faults.add(f"override {override!r:.200}: expected key=value, or ~key to remove a key.{one}")
        return
    try:
        value = _override_value(text)
        node = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        is_path = isinstance(value, str) and "." in value and DOTPATH.fullmatch(value) is not None
        # a section without a component has the recipe's; what else stands in it is kept, as with a component
        if (
            isinstance(node, DictConfig)
            and isinstance(value, str)
            and (COMPONENT in node or is_path)
            and "${" not in value
        ):
            key = f"{key}.{COMPONENT}"
        parent = key.rpartition(".")[0]
        if parent and isinstance(OmegaConf.select(cfg, parent, throw_on_resolution_failure=False), str):
            OmegaConf.update(cfg, parent, {COMPONENT: OmegaConf.select(cfg, parent)})  # section=path came before
        both = isinstance(value, dict) and isinstance(node, DictConfig)
        OmegaConf.update(cfg, key, value, merge=both, force_add=True)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        faults.add(f"override {override!r:.200}: the value is not valid YAML: {problem}. Quote a text that begins so.")
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        faults.add(f"override {override!r:.200}: {first_line(error)}")


def _override_value(text: str) -> Any:
    """The value of an override: YAML for lists, maps, quoted texts, numbers, booleans, null; else as it was typed."""
    is_yaml = text[:1] in tuple("[{\"'")
    if not is_yaml and (re.search(r"(^|\s)#|[:?-]\s|\n|:$", text) or text[:1] in tuple("&*!%@`|>,")):
        return text  # no number; YAML would cut a comment off, or find a map
    _check_yaml(text, "")
    value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    return text if isinstance(value, str) and not is_yaml else value


def _remove(cfg: DictConfig, key: str, faults: Faults) -> None:
    parent_key, _, leaf = key.rpartition(".")
    parent = OmegaConf.select(cfg, parent_key, throw_on_resolution_failure=False) if parent_key else cfg
    if isinstance(parent, DictConfig) and leaf in list(parent):  # "in parent" leaves out what is ???
        del parent[leaf]
        return
    known = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
    faults.add(f"override '~{key}': the config has no such key to remove.{nearest_or_known(leaf, known)}")


def parse_overrides(
    parser: argparse.ArgumentParser, argv: Sequence[str], hint: str = ""
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line on which overrides of a config stand among the options; ends the program at a wrong one,
    with ``hint`` on what else may have been meant."""
    arguments, overrides = parser.parse_known_args(list(argv))
    flags = [item for item in overrides if item.startswith("-")]
    if flags:
        parser.error(f"unknown option {flags[0]}: write overrides as key=value, without dashes{hint}")
    return arguments, overrides
