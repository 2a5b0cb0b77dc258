"""From what a file says to a typed config: defaults below it, ``${...}`` resolved, every key and value checked."""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from spin.config.checks import check_together
from spin.config.components import ALLOW_KEY, check_arguments, own_packages, refused_components
from spin.config.faults import UNIONS, Faults, expected, joined, known_keys, yaml_text
from spin.config.follow import TO_FILL, follow, settle_dtypes, with_folders
from spin.config.interpolation import (
    MISSING,
    escaped,
    expanded,
    from_environment,
    parent_of,
    resolve,
    with_paths,
)
from spin.config.schema import COMPONENT, Component, Section, fields_of, section_of
from spin.core import redact
from spin.core.command import spin_command
from spin.core.terminal import nearest_of, plural

ConfigT = TypeVar("ConfigT", bound=Section)


def plain(value: Any) -> Any:
    """A part of a config as dictionaries, lists and numbers; other values are returned unchanged."""
    if isinstance(value, BaseModel):
        return value.model_dump(by_alias=True)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_keys(cfg: DictConfig, model: type[Section]) -> dict[str, Any]:
    """The config's values. Of the faults that :func:`complete` finds those of keys, of their values' types and of
    components' names are raised, before any component is imported: torch takes seconds."""
    faults = Faults()
    read = _Reading(cfg, model, faults)
    faults.raise_if_any()
    return read.values


def complete(cfg: DictConfig, model: type[ConfigT]) -> ConfigT:
    """Merges defaults below a config and checks every key and value of it; then fetches the model that it names.

    What a config leaves out follows from its model's folder and from the hardware, see :mod:`spin.config.follow`. A
    section that names a component is open: its keys are the component's arguments, and the recipe's own. Arguments
    among the defaults apply only while the config keeps the default's component.

    Args:
        cfg (DictConfig): as :func:`spin.config.load_config` returns it.
        model (type[ConfigT]): every key with its default, type and range.

    Returns:
        ConfigT: the typed config, with every ``${...}`` resolved.

    Raises:
        ConfigError: If a key is unknown, a value is missing, of the wrong type, out of its range or refers to nothing,
            does not go with another one, or a component is not allowed, does not exist or does not take a key. All
            faults are in one message.
    """
    faults = Faults()
    read = _Reading(cfg, model, faults)
    values, own = read.values, read.own
    settle_dtypes(values)
    check_arguments(values, own, dict(_components(model)), read.refused, faults)
    result = _right_values(values, model, faults.paths) if faults.messages else model.model_validate(values)
    place_components(result, own)
    check_together(result, faults)
    faults.raise_if_any()
    if (located := with_folders(values)) != values:
        values, result = located, model.model_validate(located)
        place_components(result, own)
    result._written = OmegaConf.create(escaped(values))
    for keys, text in read.environment:
        if plain(parent_of(read.whole, keys)[keys[-1]]) == parent_of(values, keys)[keys[-1]]:  # no ~ in the variable
            parent_of(result._written, keys)[keys[-1]] = text
    return result


class _Reading:
    """A config over its defaults, with every ``${...}`` resolved; notes the faults of keys, types and names."""

    def __init__(self, cfg: DictConfig, model: type[Section], faults: Faults) -> None:
        given = follow(OmegaConf.to_container(cfg, resolve=False), model)  # type: ignore[arg-type]
        merged = with_paths(with_defaults(given, {}, model), expanded)
        self.whole = OmegaConf.create(merged)
        resolved, is_whole = resolve(self.whole, faults)
        self.environment = from_environment(merged, self.whole) if is_whole else []
        self.values: dict[str, Any] = with_paths(resolved, os.path.expanduser)
        _remember_secrets(self.values)
        self.own = own_packages(cfg, self.values.get(ALLOW_KEY), faults)
        self.refused = refused_components(self.values, self.own, faults)
        _check_types(self.values, model, self.refused, faults)


def place_components(cfg: Section, own: tuple[str, ...]) -> None:
    """Tells a config's components where they are, and which packages of the user's own they may name."""
    for path, _ in _components(type(cfg)):
        section: Any = cfg
        for key in path.split("."):
            section = getattr(section, key, None)
        for index, part in enumerate(section if isinstance(section, list) else [section]):
            if isinstance(part, Component):
                part._where, part._packages = f"{path}[{index}]" if isinstance(section, list) else path, own


# --- Of complete configs ---


def as_written(cfg: Section | DictConfig) -> DictConfig:
    """A complete config as config.yaml has it: values of the environment are references."""
    if isinstance(cfg, DictConfig):
        return cfg
    return OmegaConf.create(escaped(plain(cfg))) if cfg._written is None else cfg._written


def shown(cfg: Section | DictConfig) -> DictConfig:
    """A complete config as others may see it: without secrets and values of the environment."""
    written = as_written(cfg)
    result = OmegaConf.create(escaped(plain(written)))
    for keys, text in from_environment(OmegaConf.to_container(written, resolve=False), written):
        parent_of(result, keys)[keys[-1]] = escaped(text)
    result = OmegaConf.create(escaped(redact.redacted(plain(result))))
    if "output_dir" in written:
        result.output_dir = escaped(written.output_dir)  # where torchtune's loggers write
    return result


def holds_secrets(cfg: Section | DictConfig) -> bool:
    """Whether a complete config has what others may not read: secrets, or values of the environment."""
    written = as_written(cfg)
    values = plain(written)
    unresolved = OmegaConf.to_container(written, resolve=False)
    return redact.redacted(values) != values or bool(from_environment(unresolved, written))


def _remember_secrets(value: Any, is_secret: bool = False) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _remember_secrets(item, is_secret or redact.is_secret_key(str(key)))
    elif isinstance(value, list):
        for item in value:
            _remember_secrets(item, is_secret)
    elif is_secret and not (isinstance(value, str) and "${" in value):
        redact.remember(value)


# --- Merging ---


def with_defaults(value: Any, default: Any, section: type[Section]) -> Any:
    """The config's value over the default's, as plain containers; keys keep the config's order."""
    is_component = issubclass(section, Component)
    if is_component and isinstance(value, str) and "${" not in value and value != MISSING:
        value = {COMPONENT: value}  # optimizer=torch.optim.SGD, as in torchtune
    if is_component and isinstance(value, list):
        return [with_defaults(item, {}, section) for item in value]
    if not isinstance(value, Mapping):
        return value
    default = default if isinstance(default, Mapping) else {}
    if is_component and value.get(COMPONENT, default.get(COMPONENT)) != default.get(COMPONENT):
        default = {}
    merged = dict(value)
    for key, field in fields_of(section).items():
        below = default.get(key, _default(field))
        inner = section_of(field.annotation)
        if key not in merged:
            merged[key] = MISSING if below is PydanticUndefined else below
        if inner is not None:
            merged[key] = with_defaults(merged[key], below, inner)
    return {**default, **merged} if is_component else merged


def _default(field: FieldInfo) -> Any:
    return plain(field.get_default(call_default_factory=True))


def _components(section: type[Section], path: str = "") -> Iterator[tuple[str, type[Component]]]:
    """The sections at any depth that name components, with their paths."""
    for key, field in fields_of(section).items():
        inner = section_of(field.annotation)
        if inner is not None and issubclass(inner, Component):
            yield f"{path}{key}", inner
        elif inner is not None:
            yield from _components(inner, f"{path}{key}.")


# --- Checking ---


def _check_types(values: Mapping[str, Any], model: type[Section], refused: set[str], faults: Faults) -> None:
    """Notes unknown and missing keys and values of the wrong type or out of range, each once. What sections lack whose
    component is refused depends on the component that they get."""
    missing = list(_missing_values(values))
    wrong: dict[str, str] = {}  # by path: each part of a union has its own error
    unknown: dict[str, list[str]] = {}  # keys that are like nothing known, by a hint
    try:
        model.model_validate(values)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False):
            path, value, section, field = _place(problem["loc"], values, model)
            if problem["type"] == "missing":
                missing.append(path)
            elif field is None:
                name = str(problem["loc"][-1])
                hint = _hint(name, section, model)
                if hint:
                    wrong[path] = f"unknown key.{hint}"
                else:
                    known = known_keys([key for key in fields_of(section) if key != COMPONENT])
                    hint = f" All keys: {spin_command('keys')}" if section is model else known
                    unknown.setdefault(hint, []).append(path)
            elif value == MISSING or (isinstance(value, str) and "${" in value):
                faults.paths.add(path)  # a fault of its own
            elif problem["type"] == "value_error":
                wrong[path] = f"found {yaml_text(value)}, {problem['ctx']['error']}"
            elif path not in wrong:
                what = expected(field.annotation, field.metadata, field.title)
                wrong[path] = f"found {yaml_text(value)}, expected {what}.{_quote_it(path, field, value)}"
    for path in missing:
        if path.rpartition(".")[0] not in refused or path.endswith(COMPONENT):
            what, example = TO_FILL.get(path, ("", ""))
            faults.at(
                path,
                f"not set. It names {what}. Fill it in, in the config or on the command line: {path}={example}."
                if what
                else "not set. It has no default; add it to the config or the command line.",
            )
    for path, text in wrong.items():
        if path.removesuffix(f".{COMPONENT}") not in refused:
            faults.at(path, text)
    for hint, paths in unknown.items():
        faults.add(f"{', '.join(paths)}: unknown {plural('key', len(paths))}.{hint}")


def _place(
    keys: tuple[int | str, ...], values: Any, section: type[Section]
) -> tuple[str, Any, type[Section], FieldInfo | None]:
    """The path of a fault, the value there, the innermost section and the field, None for an unknown key."""
    path, field = "", None
    for key in keys:
        inner = section if field is None else section_of(field.annotation)
        if inner is None or not isinstance(values, Mapping):
            break  # what follows is an item of a list, or a part of a union
        section, path = inner, joined(path, key)
        field, values = fields_of(section).get(str(key)), values.get(key)
    return path, values, section, field


def _hint(name: str, section: type[Section], model: type[Section]) -> str:
    """What an unknown key may stand for: the same name in another section, else the nearest of its own, else of all."""
    if "." in name:
        first, _, rest = name.partition(".")
        return f" In a file write it nested: {first}: {{{rest}: ...}}."
    inner = {key: section_of(field.annotation) for key, field in fields_of(model).items()}
    places: dict[str, list[str]] = {}  # of the keys of sections
    for key, each in inner.items():
        for leaf in set() if each is None else fields_of(each).keys() - {COMPONENT}:
            places.setdefault(leaf, []).append(repr(f"{key}.{leaf}"))
    own = "" if name in places else nearest_of(name, [key for key in fields_of(section) if key != COMPONENT])
    elsewhere = difflib.get_close_matches(name, places, n=1, cutoff=0.8)
    if elsewhere and not own:
        return f" Did you mean {' or '.join(places[elsewhere[0]])}?"
    return own


def _missing_values(value: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of everything that is still ``???``."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _missing_values(item, joined(path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _missing_values(item, f"{path}[{index}]")
    elif value == MISSING:
        yield path


def _quote_it(path: str, field: FieldInfo, value: Any) -> str:
    """How to write a text that YAML takes for something else."""
    if not isinstance(value, bool | int | float) or not _takes(field.annotation, str) or _takes(field.annotation, int):
        return ""
    return (
        " Put quotes around it: YAML reads on, off, yes and no as booleans, and digits with colons as a number. On the "
        f"command line: \"{path}='...'\"."
    )


def _takes(hint: Any, kind: type) -> bool:
    is_union = typing.get_origin(hint) in (Annotated, *UNIONS)
    return hint is kind or (is_union and any(_takes(part, kind) for part in typing.get_args(hint)))


def _right_values(values: Mapping[str, Any], section: type[Section], faulty: set[str], path: str = "") -> Any:
    """A section of which only the keys that have no fault are attributes."""
    result = section.model_construct()
    result.__dict__.clear()  # defaults are not the user's
    names = {field.alias or name: (name, field) for name, field in section.model_fields.items()}
    for key, value in values.items():
        at = joined(path, key)
        if at not in faulty and key in names:
            name, field = names[key]
            inner = section_of(field.annotation)
            if inner is not None and isinstance(value, Mapping):
                value = _right_values(value, inner, faulty, at)
            elif inner is not None and isinstance(value, list):
                value = [_right_values(item, inner, faulty, f"{at}[{i}]") for i, item in enumerate(value)]
            result.__dict__[name] = value
        elif at not in faulty and isinstance(key, str) and result.__pydantic_extra__ is not None:
            result.__pydantic_extra__[key] = value
    return result
