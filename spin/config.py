"""Configs: YAML plus command-line overrides in, one checked and resolved ``DictConfig`` out.

Three rules that torchtune's own parser does not have:

- Every key must be known. A typo is an error with the nearest match, and all faults are reported at once.
- A ``_component_`` must live under an allowed package. This is checked on its text, before anything is imported, in
  every section of the config whether the recipe uses it or not.
- ``--config`` takes a file or the name of a packaged config, from any directory.

Importing this module imports neither torch nor torchtune; they load when a component is looked up.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    InterpolationResolutionError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from spin.errors import ConfigError, SpinError, wants_traceback
from spin.terminal import printable, write_any_text

COMPONENT = "_component_"
EXTRA = "_extra_"
ALLOW_KEY = "allow_components"
MISSING = "???"
_KNOWN = " Known keys: "

ALLOWED_ROOTS: tuple[str, ...] = ("torch", "torchtune", "torchao", "torchdata", "spin")

# Names under the allowed packages that run code, start processes, write files or read pickles. Each covers what lies
# below it, and is compared with the path as written and with the place where the object is really defined.
DENIED = (
    "spin.config",
    "torch.classes",
    "torch.compile",
    "torch.compiler",
    "torch.distributed",
    "torch.export",
    "torch.from_file",
    "torch.fx",
    "torch.hub",
    "torch.jit",
    "torch.library",
    "torch.load",
    "torch.multiprocessing",
    "torch.onnx",
    "torch.ops",
    "torch.package",
    "torch.save",
    "torch.serialization",
    "torch.storage",
    "torch.testing",
    "torch.utils.benchmark",
    "torch.utils.bottleneck",
    "torch.utils.collect_env",
    "torch.utils.cpp_extension",
    "torch.utils.hipify",
    "torch.utils.model_zoo",
    "torchtune.config",
    "torchtune.training.checkpointing._utils.safe_torch_load",
)

_DANGER = "run code, start processes, write files or read pickles"

# Arguments of torchtune components that are themselves import paths: torchtune imports and calls what they name.
PATH_ARGUMENTS = ("prompt_template",)

_YAML_MARKS = tuple("*&!%@`|>")  # texts that begin with one of these are no plain texts in YAML
_DOTPATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


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

    Errors that a user can mend (:class:`~spin.errors.SpinError`, and values that are missing or refer to nothing) end
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
            write_any_text()
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
                if wants_traceback():
                    raise
                _print_error(str(error))
                sys.exit(1)
            except KeyboardInterrupt:
                if wants_traceback():
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
    from spin.cli.catalog import load_recipe, recipe_of

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
    from spin.cli.catalog import recipe_files

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
    installed = Path(__file__).parent / "configs"  # a wheel maps configs/ to spin/configs/
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"  # checkout, editable install


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
    try:
        cfg = OmegaConf.load(path)
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
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path}: the top level is a list, expected 'key: value' lines.")
    faults = Faults()
    for override in overrides:
        _apply_override(cfg, override, faults)
    faults.raise_if_any()
    return cfg


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
        faults.add(f"override {override!r}: expected key=value, or ~key to remove a key.")
        return
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
        node = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        is_path = isinstance(value, str) and "." in value and _DOTPATH.fullmatch(value) is not None
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
        hint = f" A text that begins so is quoted: \"{key}='{text}'\"." if text[:1] in _YAML_MARKS else ""
        faults.add(f"override {override!r}: the value is not valid YAML: {problem}.{hint}")
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        faults.add(f"override {override!r}: {_first_line(error)}")


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
    plain = _resolve(OmegaConf.create(merged), faults)
    _check_section(plain, defaults, "", defaults, faults)
    allowed = _check_allowed(plain, faults)
    for path, node in _component_nodes(plain):
        _check_arguments(path, node, allowed, faults)
    faults.raise_if_any()
    return OmegaConf.create(plain)


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


def _resolve(cfg: DictConfig, faults: Faults) -> dict[str, Any]:
    """The config as plain containers, without ``${...}`` unless that is a fault."""
    try:
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]
    except InterpolationToMissingValueError:
        pass  # the missing value is a fault of its own
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        faults.add(f"{where}{_first_line(error)}. Check what stands between ${{ and }}.")
    return OmegaConf.to_container(cfg, resolve=False)  # type: ignore[return-value]


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
    elif value is not None and (kind := _kind(default)) != _kind(value):
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


def _nearest(name: str, known: Sequence[str]) -> str:
    """' Did you mean ...?', or nothing."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""


def _did_you_mean(key: str, known: Sequence[str], top: Mapping[str, Any] | None = None) -> str:
    """The nearest sibling, else the same name in another section, else what is known."""
    siblings = [name for name in known if name not in (COMPONENT, EXTRA)]
    nearest = _nearest(key, siblings)
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


def _check_arguments(path: str, node: Mapping[str, Any], allowed: Sequence[str], faults: Faults) -> None:
    """Notes keys of a component's section that neither its signature nor the recipe knows."""
    name = node[COMPONENT]
    if _refusal(name, allowed) is not None:
        return  # reported by the allow-list check; never imported
    try:
        component = resolve_component(name, allowed)
        for argument in PATH_ARGUMENTS:
            if isinstance(node.get(argument), str) and _refusal(node[argument], allowed) is None:
                resolve_component(node[argument], allowed)
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
        # a list may be one value for each iteration, which the recipe takes apart
        if key in node and key not in node.get(EXTRA, []) and not isinstance(node[key], list | Mapping):
            value = node[key]
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


def _check_allowed(plain: Mapping[str, Any], faults: Faults) -> tuple[str, ...]:
    allowed = _allowed_roots(plain.get(ALLOW_KEY), faults)
    for path, node in _component_nodes(plain):
        for key in (COMPONENT, *PATH_ARGUMENTS):
            if node.get(key) == MISSING:
                continue  # reported as a missing value
            if key == COMPONENT or isinstance(node.get(key), str):
                reason = _refusal(node[key], allowed)
                if reason is not None:
                    faults.add(f"{path}.{key}: {reason}" if path else f"{key}: {reason}")
    return allowed


def _allowed_roots(extra: Any, faults: Faults | None = None) -> tuple[str, ...]:
    if extra is None:
        return ALLOWED_ROOTS
    if not isinstance(extra, list | tuple):
        if faults is not None:
            faults.add(f"{ALLOW_KEY}: found {extra!r}, expected a list of package names such as [my_package].")
        return ALLOWED_ROOTS
    accepted = []
    for name in extra:
        if not isinstance(name, str) or not _DOTPATH.fullmatch(name):
            problem = "is not the name of a package"
        elif name.split(".")[0] in sys.stdlib_module_names:
            problem = "belongs to Python itself, which no config may call"
        else:
            accepted.append(name)
            continue
        if faults is not None:
            faults.add(f"{ALLOW_KEY}: {name!r} {problem}. Name packages of your own, such as [my_package].")
    return ALLOWED_ROOTS + tuple(accepted)


def _component_nodes(value: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping that has ``_component_``, at any depth, with its dotted path."""
    if isinstance(value, Mapping):
        if COMPONENT in value:
            yield path, value
        for key, item in value.items():
            yield from _component_nodes(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _component_nodes(item, f"{path}[{index}]")


def _below(path: str, roots: Sequence[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _refusal(name: Any, allowed: Sequence[str]) -> str | None:
    """Why the text of a component is refused, or None. Imports nothing."""
    if not isinstance(name, str) or not _DOTPATH.fullmatch(name) or "." not in name:
        return f"found {name!r}, expected a dotted path such as torchtune.models.llama3_2.llama3_2_1b."
    if not _below(name, allowed):
        root = name.split(".")[0]
        remedy = (
            "It belongs to Python itself, which no config may call."
            if root in sys.stdlib_module_names
            else f"If you trust it, add {ALLOW_KEY}: [{root}]."
        )
        return f"{name} is not under an allowed package ({', '.join(allowed)}). {remedy}"
    if _below(name, DENIED):
        return f"{name} is not allowed: it can {_DANGER}."
    if any(part.startswith("_") for part in name.split(".")[1:]):
        return f"{name} is not allowed: private names are no components."
    return None


def resolve_component(name: str, allowed: Sequence[str] = ALLOWED_ROOTS) -> Callable[..., Any]:
    """The class or function that a dotted path names.

    The path may pass only through modules and classes of its own package, and what it ends at must be defined in an
    allowed package, so ``torch.os.system`` fails although ``torch`` is allowed.

    Args:
        name (str): dotted path.
        allowed (Sequence[str]): packages that may be imported.

    Returns:
        Callable[..., Any]: the object.

    Raises:
        ConfigError: If the path is refused, does not exist, or ends at something that cannot be called.
    """
    reason = _refusal(name, allowed)
    if reason is not None:
        raise ConfigError(reason)
    root, *parts = name.split(".")
    if root not in ALLOWED_ROOTS and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as torchtune does: a user's package may lie where the program was started
    current: Any = _import(root, name)
    reached = root
    for part in parts:
        parent, reached = reached, f"{reached}.{part}"
        if isinstance(current, ModuleType) and not hasattr(current, part):
            current = _import_below(current, parent, part, name)
        elif not hasattr(current, part):
            raise ConfigError(f"{name}: {parent} has no {part!r}.{_nearest(part, _public(current))}")
        else:
            current = getattr(current, part)
        home = current.__name__ if isinstance(current, ModuleType) else getattr(current, "__module__", None)
        scope = [root] if isinstance(current, ModuleType) else allowed
        if not isinstance(home, str) or not _below(home, scope):
            raise ConfigError(f"{name} is not allowed: {reached} is {home or type(current).__name__}, outside {root}.")
    if isinstance(current, ModuleType) or not callable(current):
        raise ConfigError(f"{name} is a {type(current).__name__}, expected a class or a function.")
    home = f"{current.__module__}.{getattr(current, '__qualname__', '')}"
    if _below(home, DENIED):
        raise ConfigError(f"{name} is not allowed: it is {home}, which can {_DANGER}.")
    return current


def component_of(cfg: DictConfig, section: str) -> Callable[..., Any]:
    """The class or function that a section of a recipe's config names.

    Args:
        cfg (DictConfig): complete.
        section (str): such as ``loss``.

    Returns:
        Callable[..., Any]: what its ``_component_`` is.

    Raises:
        ConfigError: See :func:`resolve_component`.
    """
    return resolve_component(cfg[section][COMPONENT], (*ALLOWED_ROOTS, *cfg[ALLOW_KEY]))


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{name}: cannot import {module}: {error}.") from error


def _import_below(package: ModuleType, parent: str, part: str, name: str) -> ModuleType:
    module = f"{parent}.{part}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module or not hasattr(package, "__path__"):
            raise ConfigError(f"{name}: {parent} has no {part!r}.{_nearest(part, _public(package))}") from error
        raise ConfigError(
            f"{name}: importing {module} needs the package {error.name!r}, which is not installed."
        ) from error
    except ImportError as error:
        raise ConfigError(f"{name}: cannot import {module}: {error}.") from error


def _public(value: Any) -> list[str]:
    return [attribute for attribute in dir(value) if not attribute.startswith("_")]


def instantiate(node: DictConfig | Mapping[str, Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Builds what a section's ``_component_`` names, nested components first; otherwise as torchtune's function.

    The recipe's own keys (listed under ``_extra_`` by :func:`complete`) are left out. ``allow_components`` is read from
    the config that the section belongs to.

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
    allowed = ALLOWED_ROOTS
    plain: Any = node
    if isinstance(node, DictConfig):
        where = str(node._get_full_key(None)) or where
        root = node._get_root()
        extra = root.get(ALLOW_KEY) if isinstance(root, DictConfig) else None
        allowed = _allowed_roots(OmegaConf.to_container(extra) if isinstance(extra, ListConfig) else extra)
        plain = OmegaConf.to_container(node, resolve=True)
    if not isinstance(plain, Mapping) or COMPONENT not in plain:
        raise ConfigError(f"{where}: found {plain!r}, expected a section with {COMPONENT}.")
    return _build(plain, where, allowed, args, kwargs)


def _build(
    node: Mapping[str, Any], where: str, allowed: Sequence[str], args: Sequence[Any], supplied: dict[str, Any]
) -> Any:
    name = node[COMPONENT]
    try:
        component = resolve_component(name, allowed)
        for argument in PATH_ARGUMENTS:
            if isinstance(node.get(argument), str):
                resolve_component(node[argument], allowed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    left_out = {COMPONENT, EXTRA, *node.get(EXTRA, []), *supplied}
    kwargs = {
        key: _build_nested(value, f"{where}.{key}", allowed) for key, value in node.items() if key not in left_out
    }
    kwargs.update(supplied)
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
    if root in ALLOWED_ROOTS:
        return ""
    lines = [
        f", at {frame.f_code.co_filename}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).split(".")[0] == root
    ]
    return lines[-1] if lines else ""


def _build_nested(value: Any, where: str, allowed: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        if COMPONENT in value:
            return _build(value, where, allowed, (), {})
        return {key: _build_nested(item, f"{where}.{key}", allowed) for key, item in value.items()}
    if isinstance(value, list):
        return [_build_nested(item, f"{where}[{index}]", allowed) for index, item in enumerate(value)]
    return value


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0].rstrip(".")
