"""Configs: YAML plus command-line overrides in, one checked and resolved ``DictConfig`` out.

Three rules that torchtune's own parser does not have:

- Every key must be known. A typo is an error with the nearest match, and all faults are reported at once.
- A ``_component_`` must be something that its section may hold (:mod:`spin.config.components`). This is checked on
  its text, before anything is imported, in every section of the config whether the recipe uses it or not.
- ``--config`` takes a file or the name of a packaged config, from any directory.

A file may come from anywhere: its size, depth, aliases and ``${...}`` are limited before they take memory, and what
comes from the environment is not written down.

Importing this module imports neither torch nor torchtune; they load when a component is looked up.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import inspect
import io
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from spin.config.components import (
    ALLOW_KEY,
    DOTPATH,
    HOW_TO_ALLOW,
    KINDS,
    ROOTS,
    Kind,
    environment_packages,
    kind_at,
    nearest_of,
    package_problem,
    refusal,
    resolve_component,
)
from spin.core import redact
from spin.core.errors import ConfigError, SpinError, show_traceback
from spin.core.terminal import escape_unencodable_output, printable

COMPONENT = "_component_"
EXTRA = "_extra_"
MISSING = "???"
_KNOWN = " Known keys: "

# Arguments of torchtune components that are themselves import paths: torchtune imports and calls what they name.
PATH_ARGUMENTS = ("prompt_template",)

# Arguments of components that may be lists of one value for each iteration.
PER_ITERATION = ("beta", "lr")

_FROM_OUTSIDE = "allow_components_from_outside"  # flag of a config whose list is not the file's own
_PATH_KEY = re.compile(r"(?:.*_)?(?:dir|path|file|folder)|source|resume")  # keys that hold a path, or a list of them
_VARIABLE = re.compile(r"\$(\w+)")

_MOST_BYTES = 1 << 20  # of a file
_MOST_NODES = 10_000  # of a file, aliases counted as often as they are used
_MOST_DEPTH = 50
_MOST_DIGITS = 30
_MOST_INTERPOLATION = 2_000  # characters of a text with ${...}
_MOST_RESOLVED = 2_000_000  # characters of a resolved config; 100 more for a value, 1000 for a reference
_INTEGER = re.compile(r"[-+]?(0x[\da-fA-F_]+|0[ob]?[\d_]+|[\d_:]+)")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Faults:
    """Collects what is wrong, so that one error can report all of it."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Notes one fault: what was found, where, what was expected, what to do."""
        self.messages.append(message)

    def raise_if_any(self) -> None:
        """Reports everything that was added.

        Raises:
            ConfigError: If anything was added.
        """
        if len(self.messages) == 1:
            raise ConfigError(self.messages[0])
        if self.messages:
            lines = ["\n    ".join(message.splitlines()) for message in self.messages]
            raise ConfigError(f"{len(lines)} faults:\n  - " + "\n  - ".join(lines))


def plain(value: Any) -> Any:
    """A part of a config as Python has it: dictionaries, lists, numbers; what is no such part as it is."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


# --- 1. Command line ---


def parse(defaults: dict[str, Any]) -> Callable[[Callable[[DictConfig], int | None]], Callable[[], None]]:
    """Decorator factory for ``recipe_main(cfg)``: reads ``sys.argv``, checks the config, runs the recipe, exits.

    Errors that a user can mend (:class:`~spin.core.errors.SpinError`, and values that are missing or refer to
    nothing) end
    the program with ``error: ...`` on stderr and exit code 1; ``SPIN_TRACEBACK=1`` shows where they were raised. Under
    torchrun rank 0 prints the whole text and the other ranks its first line. Ctrl-C ends it likewise, with exit code
    130. Any other exception propagates.

    Args:
        defaults (dict[str, Any]): every knob of the recipe with its default; see :func:`complete`.

    Returns:
        Callable[[Callable[[DictConfig], int | None]], Callable[[], None]]: the decorator.
    """

    def decorate(recipe_main: Callable[[DictConfig], int | None]) -> Callable[[], None]:
        @functools.wraps(recipe_main)
        def wrapper() -> None:
            escape_unencodable_output()
            name, overrides = _read_argv(sys.argv[1:], recipe_main.__doc__)
            _tell_of_namesake(recipe_main)
            try:
                raw = load_config(name, overrides)
                try:
                    cfg = complete(raw, defaults)
                except ConfigError as error:
                    origin = f"{name} with overrides" if overrides else name
                    raise ConfigError(f"{origin}: {error}{_other_recipe(name, raw, defaults)}") from error
                code = recipe_main(cfg)
            except (SpinError, InterpolationResolutionError, MissingMandatoryValue) as error:
                if show_traceback():
                    raise
                _print_error(str(error))
                sys.exit(1)
            except KeyboardInterrupt:
                if show_traceback():
                    raise
                _print_error("interrupted. The same command goes on from what was saved before.")
                sys.exit(130)
            sys.exit(code)

        return wrapper

    return decorate


def _read_argv(argv: Sequence[str], description: str | None) -> tuple[str, list[str]]:
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s --config NAME_OR_FILE [key=value ...] [~key ...]",
        epilog="Overrides are YAML: loss.beta=0.2, loss.beta=[0.1,0.2], validation_dataset=null. ~key removes a key.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a YAML file, or a packaged config such as llama3_2/1B_full")
    arguments, overrides = parse_overrides(parser, argv)
    return arguments.config, overrides


def parse_overrides(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line on which overrides of a config stand among the options; ends the program at a wrong one.

    Args:
        parser (argparse.ArgumentParser): knows the options.
        argv (Sequence[str]): the command line.

    Returns:
        tuple[argparse.Namespace, list[str]]: the options and the overrides.
    """
    arguments, overrides = parser.parse_known_args(list(argv))
    flags = [item for item in overrides if item.startswith("-")]
    if flags:
        parser.error(f"unknown option {flags[0]}: write overrides as key=value, without dashes")
    return arguments, overrides


def _other_recipe(name: str, raw: DictConfig, defaults: Mapping[str, Any]) -> str:
    """A line that says whose config it is, if it has keys that only that recipe knows."""
    from spin.config.catalog import load_recipe, recipe_of

    recipe = recipe_of(find_config(name))
    strangers = [key for key in raw if key not in defaults]
    if not strangers or not any(key in load_recipe(recipe).DEFAULTS for key in strangers):
        return ""
    return f"\n{name} is a config for {recipe}: tune run {recipe} --config {name}"


def _tell_of_namesake(recipe_main: Callable[..., Any]) -> None:
    """Says on rank 0 which file runs, if the folder has another recipe of the same name.

    An edited copy under its own name is a trap: on one device `tune run` takes the installed file before that of the
    folder, torchrun and `python -m` the other way round.
    """
    from spin.config.catalog import recipe_files

    file = recipe_main.__globals__.get("__file__")
    if file is None or os.environ.get("RANK", "0") != "0":
        return
    running = Path(file).resolve()
    here = Path.cwd() / running.name
    installed = recipe_files().get(running.stem)
    if not here.is_file() or installed is None:
        return
    other = installed if here.resolve() == running else here
    if other.read_bytes() == running.read_bytes():
        return
    print(
        f"warning: {running} runs, not {other}. Which of the two is found depends on the launcher: give a copy of a "
        f"recipe a name of its own, such as my_{running.name}, and start it by that.",
        file=sys.stderr,
        flush=True,
    )


def _print_error(text: str) -> None:
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {printable(text)}", file=sys.stderr, flush=True)
    else:
        first_line = printable(text.split("\n", 1)[0])
        print(f"error (rank {rank}): {first_line}", file=sys.stderr, flush=True)


# --- 2. Files and overrides ---


def packaged_configs() -> list[str]:
    """Names of the configs that come with this package, such as ``llama3_2/1B_full``, sorted."""
    root = configs_root()
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))


def configs_root() -> Path:
    """The folder of the packaged configs."""
    installed = Path(__file__).parents[1] / "configs"  # a wheel maps configs/ to spin/configs/
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"  # checkout, editable install


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
    path = find_config(name_or_path)
    cfg = read_yaml(path)
    stated = OmegaConf.to_container(cfg).pop(ALLOW_KEY, None)  # type: ignore[union-attr,call-arg,arg-type]
    if ALLOW_KEY in cfg:
        cfg[ALLOW_KEY] = []
    faults = Faults()
    with _bounded():
        for override in overrides:
            _apply_override(cfg, override, faults)
    if any(override.startswith(f"{ALLOW_KEY}=") for override in overrides):
        cfg._set_flag(_FROM_OUTSIDE, True)
    given = plain(cfg.get(ALLOW_KEY))
    allowed = [*(given if isinstance(given, list) else []), *environment_packages()]
    more = [name for name in stated if name not in allowed] if isinstance(stated, list) else [stated]
    if stated is not None and more:
        names = ",".join(map(str, more))
        faults.add(f"{path}: {ALLOW_KEY}: found {stated!r:.200}. {_not_from_a_file(names)}")
    faults.raise_if_any()
    return cfg


def _not_from_a_file(names: str) -> str:
    how = HOW_TO_ALLOW.format(names, names)
    return f"A config cannot allow what it names itself. If you trust the code, say so {how}."


def read_yaml(path: Path) -> DictConfig:
    """Reads a YAML file as a config, within limits; nothing is resolved.

    Args:
        path (Path): the file.

    Returns:
        DictConfig: what it says.

    Raises:
        ConfigError: If it is unreadable, larger or deeper than a config can be, or not a YAML mapping.
    """
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
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path}: the top level is a list, expected 'key: value' lines.")
    return cfg


@dataclass
class _Open:
    """A mapping or list that :func:`_check_yaml` is in."""

    is_mapping: bool
    anchor: str | None
    is_key: bool
    size: int = 1
    key: str | None = None
    index: int = 0

    def close(self, is_key: bool, size: int, name: str) -> None:
        """Takes a value, or the key of one."""
        self.size += size
        self.key = name if is_key else None
        self.index += 1


def _check_yaml(text: str, where: str) -> None:
    """Goes through the events of a YAML text, which take no memory; raises ConfigError for what would take much."""
    sizes: dict[str, int] = {}  # by anchor
    stack: list[_Open] = []

    def fault(event: yaml.Event, problem: str) -> ConfigError:
        keys = "".join(
            f".{frame.key}" if frame.is_mapping else f"[{frame.index}]" for frame in stack if frame.key or frame.index
        )
        line = f"{event.start_mark.line + 1}: " if where else ""  # an override has one
        return ConfigError(f"{where}{line}{keys.lstrip('.')[:200]}: {problem}".lstrip(": "))

    for event in yaml.parse(text, Loader=_LOADER):
        is_key = bool(stack) and stack[-1].is_mapping and stack[-1].key is None
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            stack.append(_Open(isinstance(event, yaml.MappingStartEvent), event.anchor, is_key))
            if len(stack) > _MOST_DEPTH:
                raise fault(event, f"more than {_MOST_DEPTH} levels deep, expected a config.")
            continue
        name = "?"
        if isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            frame = stack.pop()
            size, anchor, is_key = frame.size, frame.anchor, frame.is_key
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor, name = 1, event.anchor, event.value or "?"
            if event.implicit[0] and len(name) > _MOST_DIGITS and _INTEGER.fullmatch(name):
                raise fault(event, f"found a number of {len(name)} digits, expected at most {_MOST_DIGITS}.")
            if "${" in name and len(name) > _MOST_INTERPOLATION:
                raise fault(event, f"a text with ${{...}} has at most {_MOST_INTERPOLATION} characters.")
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise fault(event, f"the alias *{event.anchor} stands within what it names, or before it.")
            size, anchor = sizes[event.anchor], None
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if stack:
            if stack[-1].size + size > _MOST_NODES:
                raise fault(event, f"more than {_MOST_NODES:,} values, aliases counted. Write less into a config.")
            stack[-1].close(is_key, size, name)


def find_config(name_or_path: str) -> Path:
    """The file of a config.

    Args:
        name_or_path (str): a file, or else the name of a packaged config (``.yaml`` may be left out).

    Returns:
        Path: the file.

    Raises:
        ConfigError: If there is neither, with the nearest names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"config {name_or_path!r} is a folder, expected a YAML file.")
    name = name_or_path.removesuffix(".yaml")
    names = packaged_configs()
    if name in names:
        return configs_root() / f"{name}.yaml"
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
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
        faults.add(f"override {override!r:.200}: expected key=value, or ~key to remove a key.")
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
        OmegaConf.update(cfg, key, value, merge=True, force_add=True)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        faults.add(f"override {override!r:.200}: the value is not valid YAML: {problem}. Quote a text that begins so.")
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
        faults.add(f"override {override!r:.200}: {_first_line(error)}")


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
    if isinstance(parent, DictConfig) and leaf in parent:
        del parent[leaf]
        return
    known = [str(name) for name in parent] if isinstance(parent, DictConfig) else []
    faults.add(f"override '~{key}': the config has no such key to remove.{_did_you_mean(leaf, known)}")


# --- 3. Completing and checking ---


def complete(cfg: DictConfig, defaults: dict[str, Any]) -> DictConfig:
    """Merges defaults below a config and checks every key of it.

    What a default says about its key:

    - a dict: a section. Its keys are known; any other is a fault. ``{}`` is a section with keys of any name.
    - a dict with ``_component_``: an open section. Its keys are the component's parameters, plus the recipe's own keys
      listed with their defaults under ``_extra_``. Arguments among the defaults apply only while the config keeps the
      default's component. The result lists the names of the recipe's own keys under ``_extra_``, for
      :func:`instantiate`.
    - ``None``: anything. ``"???"``: anything, but it must be set.
    - a bool, a number, a string or a list: a value of that kind, or null where the recipe gives null a meaning.

    Args:
        cfg (DictConfig): the raw config.
        defaults (dict[str, Any]): every knob with its default.

    Returns:
        DictConfig: the merged config with every ``${...}`` resolved.

    Raises:
        ConfigError: If a key is unknown, a value is of the wrong kind, missing or refers to nothing, or a component is
            not allowed, does not exist or does not take a key. All faults are in one message.
    """
    faults = Faults()
    raw = OmegaConf.to_container(cfg, resolve=False)
    merged = _merge(raw, defaults)
    for path in _missing_values(merged):
        faults.add(f"{path}: not set. It has no default; add it to the config or the command line.")
    merged = _with_paths(merged, _expanded)
    whole = OmegaConf.create(merged)
    resolved, is_whole = _resolve(whole, faults)
    from_environment = _from_environment(merged, whole) if is_whole else []
    values: dict[str, Any] = _with_paths(resolved, os.path.expanduser)
    _remember_secrets(values)
    _check_section(values, defaults, "", defaults, faults)
    own = _check_allowed(values, bool(cfg._get_flag(_FROM_OUTSIDE)), faults)
    for path, node, within in _component_nodes(values):
        _check_arguments(path, node, kind_at(path, within), own, faults)
    faults.raise_if_any()
    result = OmegaConf.create(escaped(values), flags={_FROM_OUTSIDE: bool(cfg._get_flag(_FROM_OUTSIDE))})
    for keys, text in from_environment:
        if plain(_parent_of(whole, keys)[keys[-1]]) == _parent_of(values, keys)[keys[-1]]:  # no ~ in the variable
            _parent_of(result, keys)[keys[-1]] = text
    return result


def escaped(value: Any) -> Any:
    """Containers whose texts stay as they are in a config, ``${`` too."""
    return _map_texts(value, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def shown(cfg: DictConfig) -> DictConfig:
    """A complete config as others may see it: without secrets and values of the environment.

    Args:
        cfg (DictConfig): as :func:`complete` returns it.

    Returns:
        DictConfig: a copy.
    """
    result = OmegaConf.create(escaped(plain(cfg)))
    for keys, text in _from_environment(OmegaConf.to_container(cfg, resolve=False), cfg):
        _parent_of(result, keys)[keys[-1]] = escaped(text)
    result = OmegaConf.create(escaped(redact.redacted(plain(result))))
    if "output_dir" in cfg:
        result.output_dir = escaped(cfg.output_dir)  # where torchtune's loggers write
    return result


def holds_secrets(cfg: DictConfig) -> bool:
    """Whether a complete config has what others may not read: secrets, or values of the environment."""
    values = plain(cfg)
    return redact.redacted(values) != values or bool(_from_environment(OmegaConf.to_container(cfg, resolve=False), cfg))


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _with_paths(value: Any, change: Callable[[str], str]) -> Any:
    """Containers with the texts of path keys changed."""
    if isinstance(value, list):
        return [_with_paths(item, change) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _map_texts(item, change)
        if isinstance(item, str | list) and isinstance(key, str) and _PATH_KEY.fullmatch(key)
        else _with_paths(item, change)
        for key, item in value.items()
    }


def _expanded(path: str) -> str:
    """A path without ``~``, and ``$HOME/x`` as ``${oc.env:HOME}/x``; a variable that is not set stays as typed."""
    with_variables = _VARIABLE.sub(lambda name: f"${{oc.env:{name[1]}}}" if name[1] in os.environ else name[0], path)
    return os.path.expanduser(with_variables)


def _texts(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Every text with ``${`` in containers, with the keys that lead to it."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(item, (*keys, key))
    elif isinstance(value, str) and "${" in value:
        yield keys, value


def _parent_of(cfg: Any, keys: Sequence[Any]) -> Any:
    for key in keys[:-1]:
        cfg = cfg[key]
    return cfg


def _from_environment(raw: Any, cfg: DictConfig) -> list[tuple[tuple[Any, ...], str]]:
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
            plain(_parent_of(cfg, keys)[keys[-1]])
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


def _remember_secrets(value: Any, is_secret: bool = False) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _remember_secrets(item, is_secret or redact.is_secret_key(str(key)))
    elif isinstance(value, list):
        for item in value:
            _remember_secrets(item, is_secret)
    elif is_secret and not (isinstance(value, str) and "${" in value):
        redact.remember(value)


@contextlib.contextmanager
def _bounded() -> Iterator[Callable[[Any], None]]:
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
    if isinstance(value, DictConfig):
        return {
            key: MISSING if OmegaConf.is_missing(value, key) else _contents(value[key], spend)
            for key in value  # type: ignore[arg-type]
        }
    if isinstance(value, ListConfig):
        return [
            MISSING if OmegaConf.is_missing(value, index) else _contents(value[index], spend)
            for index in range(len(value))
        ]
    return value


def _merge(value: Any, default: Any) -> Any:
    """The config's value over the default's, as plain containers; keys keep the config's order."""
    is_component = isinstance(default, Mapping) and COMPONENT in default
    if is_component and isinstance(value, str) and "${" not in value and value != MISSING:
        value = {COMPONENT: value}  # optimizer=torch.optim.SGD, as in torchtune
    if not isinstance(default, Mapping) or not isinstance(value, Mapping):
        return value
    same_component = COMPONENT not in value or value[COMPONENT] == default.get(COMPONENT)
    below = {key: item for key, item in default.items() if key != EXTRA} if same_component else {}
    extra = default.get(EXTRA, {})
    merged = {key: item for key, item in value.items() if key != EXTRA}
    for key, item in {**below, **extra}.items():
        merged[key] = _merge(merged[key], item) if key in merged else _strip_extra(item)
    if extra:
        merged[EXTRA] = list(extra)
    return merged


def _strip_extra(default: Any) -> Any:
    """A default as it stands in a completed config: recipe keys beside the arguments, their names under ``_extra_``."""
    return _merge({}, default) if isinstance(default, Mapping) else default


def _resolve(cfg: DictConfig, faults: Faults) -> tuple[dict[str, Any], bool]:
    """The config as plain containers, without ``${...}`` unless that is a fault, and whether it is none."""
    values: dict[str, Any] = {}
    at = ""
    try:
        with _bounded() as spend:
            for key in cfg:
                at = str(key)
                values[at] = MISSING if OmegaConf.is_missing(cfg, key) else _contents(cfg[key], spend)
        return values, True
    except InterpolationToMissingValueError:
        pass  # the missing value is a fault of its own
    except (OmegaConfBaseException, ConfigError, RecursionError) as error:
        where = getattr(error, "full_key", None) or at
        problem = _first_line(error).removeprefix("ConfigError raised while resolving interpolation: ")
        faults.add(f"{where}: {problem}. Check what stands between ${{ and }}.")
    return OmegaConf.to_container(cfg, resolve=False), False  # type: ignore[return-value]


def _check_section(
    values: Mapping[Any, Any], defaults: Mapping[str, Any], path: str, top: Mapping[str, Any], faults: Faults
) -> None:
    is_component = COMPONENT in defaults
    known = defaults.get(EXTRA, {}) if is_component else defaults  # a component's arguments: see _check_arguments
    strangers = []  # like nothing that is known
    for key, value in values.items():
        full_key = f"{path}{key}"
        if key in known:
            _check_value(full_key, value, known[key], top, faults)
        elif known and not is_component:
            hint = _did_you_mean(str(key), list(known), top)
            if hint.startswith(_KNOWN):
                strangers.append(full_key)
            else:
                faults.add(f"{full_key}: unknown key.{hint}")
    if strangers:
        hint = _did_you_mean("", list(known))
        faults.add(f"{', '.join(strangers)}: unknown key{'s' if len(strangers) > 1 else ''}.{hint}")


def _check_value(path: str, value: Any, default: Any, top: Mapping[str, Any], faults: Faults) -> None:
    if default is None or MISSING in (default, value) or (isinstance(value, str) and "${" in value):
        return
    if isinstance(default, Mapping):
        if isinstance(value, Mapping):
            _check_section(value, default, f"{path}.", top, faults)
        elif value is not None or COMPONENT not in default:
            faults.add(f"{path}: found {value!r}, expected a section with keys {_names(default)}.")
    elif (value is not None or isinstance(default, bool)) and (kind := _kind(default)) != _kind(value):
        unquoted = kind == "text" and isinstance(value, bool)
        hint = " Quote it: YAML reads on, off, yes and no as booleans." if unquoted else ""
        faults.add(f"{path}: found {value!r}, expected a {kind} such as {default!r}.{hint}")


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "section" if isinstance(value, Mapping) else "list"


def _names(defaults: Mapping[str, Any]) -> str:
    return ", ".join(key for key in [*defaults, *defaults.get(EXTRA, {})] if key != EXTRA)


def _missing_values(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of everything that is still ``???``."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _missing_values(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _missing_values(item, f"{path}[{index}]")
    elif value == MISSING:
        yield path


def _did_you_mean(key: str, known: Sequence[str], top: Mapping[str, Any] | None = None) -> str:
    """The nearest sibling, else the same name in another section, else what is known."""
    siblings = [name for name in known if name not in (COMPONENT, EXTRA)]
    nearest = nearest_of(key, siblings)
    if nearest:
        return nearest
    elsewhere = [
        f"{section}.{key}"
        for section, default in (top or {}).items()
        if isinstance(default, Mapping) and key in {**default, **default.get(EXTRA, {})}
    ]
    if elsewhere:
        return f" Did you mean {' or '.join(map(repr, elsewhere))}?"
    return f"{_KNOWN}{', '.join(siblings)}." if siblings else ""


def _check_arguments(path: str, node: Mapping[str, Any], kind: Kind, own: Sequence[str], faults: Faults) -> None:
    """Notes keys of a component's section that neither its signature nor the recipe knows."""
    name = node[COMPONENT]
    if refusal(name, kind, own) is not None:
        return  # reported by _check_allowed; never imported
    try:
        component = resolve_component(name, own, kind)
        for argument in PATH_ARGUMENTS:
            if isinstance(node.get(argument), str) and refusal(node[argument], KINDS[argument], own) is None:
                resolve_component(node[argument], own, KINDS[argument])
    except ConfigError as error:
        faults.add(f"{path}: {error}")
        return
    try:
        parameters = inspect.signature(component).parameters.values()
    except (TypeError, ValueError):  # builtins without a signature
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    positional_only = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    known = [parameter.name for parameter in parameters if parameter.kind not in positional_only]
    known += node.get(EXTRA, [])
    for key in node:
        if key not in known and key not in (COMPONENT, EXTRA):
            faults.add(f"{path}.{key}: {name} has no such parameter.{_did_you_mean(str(key), known)}")
    for key, kinds in _simple_parameters(component).items():
        if key in node and key not in node.get(EXTRA, []):
            value = node[key]
            if isinstance(value, list) and key in PER_ITERATION:
                continue  # one value for each iteration, which the recipe takes apart
            if value != MISSING and not any(_is_of(value, kind) for kind in kinds):
                expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
                faults.add(f"{path}.{key}: found {value!r}, {name} expects {expected}.")


def _simple_parameters(component: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """The parameters of a component that take numbers, texts, booleans or null only, and which of these."""
    function = component.__init__ if isinstance(component, type) else component  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only
        return {}
    simple = {}
    for name, hint in hints.items():
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if name != "return" and all(kind in (bool, int, float, str, type(None)) for kind in kinds):
            simple[name] = kinds
    return simple


def _is_of(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


# --- 4. Components ---


def _check_allowed(values: Mapping[str, Any], from_outside: bool, faults: Faults) -> tuple[str, ...]:
    """Notes what sections may not hold; returns the packages of the user's own."""
    own = _own_packages(values.get(ALLOW_KEY), from_outside, faults)
    for path, node, within in _component_nodes(values):
        for key in (COMPONENT, *PATH_ARGUMENTS):
            value = node.get(key)
            if value == MISSING:
                continue  # reported as a missing value
            if key == COMPONENT or isinstance(value, str):
                reason = refusal(value, kind_at(path, within) if key == COMPONENT else KINDS[key], own)
                if reason is not None:
                    faults.add(f"{path}.{key}: {reason}" if path else f"{key}: {reason}")
    return own


def _own_packages(given: Any, from_outside: bool, faults: Faults) -> tuple[str, ...]:
    """The user's own packages: of the environment, and of ``allow_components`` if it does not come from a file."""
    try:
        own = environment_packages()
    except ConfigError as error:
        faults.add(str(error))
        own = ()
    if given is None:
        return own
    if not isinstance(given, list | tuple):
        faults.add(f"{ALLOW_KEY}: found {given!r}, expected a list of package names such as [my_package].")
        return own
    faults.messages += [f"{ALLOW_KEY}: {problem}" for name in given if (problem := package_problem(name)) is not None]
    accepted = tuple(name for name in given if package_problem(name) is None)
    more = [name for name in accepted if name not in own]
    if more and not from_outside:
        faults.add(f"{ALLOW_KEY}: found {given!r}. {_not_from_a_file(','.join(more))}")
        return own
    return (*own, *more)


def _component_nodes(
    value: Any, path: str = "", within: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Every mapping that has ``_component_``, at any depth, with its path and that of the component around it."""
    if isinstance(value, Mapping):
        is_component = COMPONENT in value
        if is_component:
            yield path, value, within
        for key, item in value.items():
            yield from _component_nodes(item, f"{path}.{key}" if path else str(key), path if is_component else within)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _component_nodes(item, f"{path}[{index}]", within)


def component_of(cfg: DictConfig, section: str) -> Callable[..., Any]:
    """The class or function that a section of a recipe's config names.

    Args:
        cfg (DictConfig): complete.
        section (str): such as ``loss``.

    Returns:
        Callable[..., Any]: what its ``_component_`` is.

    Raises:
        ConfigError: See :func:`spin.config.components.resolve_component`.
    """
    return resolve_component(cfg[section][COMPONENT], _own_packages_of(cfg), kind_at(section))


def _own_packages_of(cfg: DictConfig) -> tuple[str, ...]:
    faults = Faults()
    own = _own_packages(plain(cfg.get(ALLOW_KEY)), bool(cfg._get_flag(_FROM_OUTSIDE)), faults)
    faults.raise_if_any()
    return own


def instantiate(node: DictConfig | Mapping[str, Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Builds what a section's ``_component_`` names, nested components first; otherwise as torchtune's function.

    The recipe's own keys (listed under ``_extra_`` by :func:`complete`) are left out. What it may be is decided by
    the section's place in its config; see :mod:`spin.config.components`.

    Args:
        node (DictConfig | Mapping[str, Any] | None): the section.
        *args (Any): positional arguments that the recipe supplies.
        **kwargs (Any): keyword arguments that the recipe supplies; they win over the config's.

    Returns:
        Any: the object, or None for no section.

    Raises:
        ConfigError: If there is no component, it is not allowed, the arguments do not fit its signature, or the file of
            a tokenizer cannot be read.
        SpinError: If the component raises one; the message names the section.
    """
    if node is None:
        return None
    where = "config"
    own: tuple[str, ...] = ()
    values: Any = node
    if isinstance(node, DictConfig):
        where = str(node._get_full_key(None)) or where
        root = node._get_root()
        own = _own_packages_of(root) if isinstance(root, DictConfig) else environment_packages()
        values = plain(node)
    if not isinstance(values, Mapping) or COMPONENT not in values:
        raise ConfigError(f"{where}: found {values!r}, expected a section with {COMPONENT}.")
    return _build(values, where, kind_at(where), own, args, kwargs)


def _build(
    node: Mapping[str, Any],
    where: str,
    kind: Kind,
    own: Sequence[str],
    args: Sequence[Any],
    supplied: dict[str, Any],
) -> Any:
    name = node[COMPONENT]
    try:
        component = resolve_component(name, own, kind)
        for argument in PATH_ARGUMENTS:
            if isinstance(node.get(argument), str):
                resolve_component(node[argument], own, KINDS[argument])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    left_out = {COMPONENT, EXTRA, *node.get(EXTRA, []), *supplied}
    kwargs = {
        key: _build_nested(value, f"{where}.{key}", where, own) for key, value in node.items() if key not in left_out
    }
    kwargs.update(supplied)
    if kind is KINDS["tokenizer"]:
        os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken keeps copies by path, of files that have changed since
        for key, value in kwargs.items():
            if isinstance(value, str) and _PATH_KEY.fullmatch(key) and "://" in value:
                raise ConfigError(f"{where}.{key}: found {value!r:.100}, expected a path; nothing is downloaded.")
    try:
        inspect.signature(component).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{where}: {name}: {error}.") from error
    except ValueError:  # builtins without a signature
        pass
    try:
        return component(*args, **kwargs)
    except SpinError as error:
        if where in str(error):
            raise
        # what a data set says of itself does not know that it is the one for validation, say
        raise type(error)(f"{where}: {error}") from error
    except OSError as error:
        # spin's own parts tell of their files; a metrics service may be down
        if where.rpartition(".")[2] != "tokenizer":
            raise
        # torchtune's tokenizers: a file that is not there, or a folder
        raise ConfigError(f"{where}: {name} cannot be made: {error}. Check the paths of the section.") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{where}: {name} does not take these values ({type(error).__name__}: {error}{_place_in(name, error)}). "
            "Check the section; SPIN_TRACEBACK=1 shows where it happened."
        ) from error


def _place_in(name: str, error: BaseException) -> str:
    """Where a component of the user's own raised, as ', at file:line': the last line that is its package's."""
    root = name.split(".")[0]
    if root in ROOTS:
        return ""
    lines = [
        f", at {frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).split(".")[0] == root
    ]
    return lines[-1] if lines else ""


def _build_nested(value: Any, where: str, within: str, own: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        if COMPONENT in value:
            return _build(value, where, kind_at(where, within), own, (), {})
        return {key: _build_nested(item, f"{where}.{key}", within, own) for key, item in value.items()}
    if isinstance(value, list):
        return [_build_nested(item, f"{where}[{index}]", within, own) for index, item in enumerate(value)]
    return value


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:500].rstrip(".")
