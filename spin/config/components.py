"""What the sections of a config may name as their ``_component_``, decided by the section's place; and building it.

A config is data. What it names is compared as text with what its section may hold, before anything is imported; a base
class or a return type is checked afterwards. A package of the user's own is allowed by its name from outside of the
file: ``allow_components=[my_package]`` on the command line, or ``SPIN_ALLOW_COMPONENTS=my_package``.

Importing this module imports neither torch nor torchtune.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import math
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import Field, TypeAdapter, ValidationError

from spin.config.faults import KIND_WORDS, UNIONS, Faults, expected, joined, nearest_or_known, yaml_text
from spin.config.interpolation import MISSING, PATH_KEY
from spin.config.schema import ARGUMENTS, COMPONENT, Component, Config
from spin.core.errors import ConfigError, SpinError
from spin.core.terminal import nearest_of

ALLOW_KEY = "allow_components"
ALLOW_VARIABLE = "SPIN_ALLOW_COMPONENTS"
HOW_TO_ALLOW = f"on the command line, {ALLOW_KEY}=[{{}}], or in the environment, {ALLOW_VARIABLE}={{}}"
ROOTS = ("torch", "torchtune", "torchao", "torchdata", "spin")  # what is allowed of these stands below

# Arguments of torchtune components that are themselves import paths: torchtune imports and calls what they name.
PATH_ARGUMENTS = ("prompt_template",)
LOCATED_BY = {"model": "path", "tokenizer": "path", "dataset": "source", "validation_dataset": "source"}
DATA_SUFFIXES = (".arrow", ".csv", ".json", ".jsonl", ".parquet")
FROM_OUTSIDE = "allow_components_from_outside"  # flag of a config whose list is not the file's own
DOTPATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DATASETS = re.compile(r"(validation_)?dataset(\.common|\.sources\.(?!.*\.source$).+)?")  # not the columns of rows
_TORCHTUNE, _DATA, _LOGGING = "torchtune.models.", "torchtune.data.", "torchtune.training.metric_logging."
_FAMILIES = (  # of torchtune's models: decoders of text
    "code_llama2", "gemma", "gemma2", "llama2", "llama3", "llama3_1", "llama3_2", "llama3_3", "mistral", "phi3", "phi4",
    "qwen2", "qwen2_5",
)  # fmt: skip
_TOKENIZERS = (
    "gemma.GemmaTokenizer", "gemma.gemma_tokenizer", "gemma2.GemmaTokenizer", "gemma2.gemma_tokenizer",
    "llama2.Llama2Tokenizer", "llama2.llama2_tokenizer", "llama3.Llama3Tokenizer", "llama3.llama3_tokenizer",
    "mistral.MistralTokenizer", "mistral.mistral_tokenizer", "phi3.Phi3MiniTokenizer", "phi3.phi3_mini_tokenizer",
    "phi4.phi4_tokenizer", "qwen2.Qwen2Tokenizer", "qwen2.qwen2_tokenizer", "qwen2_5.qwen2_5_tokenizer",
)  # fmt: skip


def _makes_decoder(builder: Any) -> bool:
    """Whether a function, or a partial one, says that it returns a torchtune decoder."""
    from torchtune.modules import TransformerDecoder

    function = getattr(builder, "func", builder)
    try:
        return typing.get_type_hints(function).get("return") is TransformerDecoder
    except (TypeError, NameError, AttributeError):  # no function
        return False


def _is_optimizer(kind: Any) -> bool:
    from torch.optim import Optimizer

    return isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer


@dataclass(frozen=True)
class Kind:
    """What a section may hold."""

    what: str
    names: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    fits: Callable[[Any], bool] | None = None
    supplied: tuple[str, ...] = ()  # arguments that recipes supply, besides those in the schema
    has_all: tuple[str, ...] = ()  # attributes that a recipe asks of what is made

    def check(self, made: Any, where: str, name: str) -> None:
        """Raises ConfigError if what a component has made lacks something that it must have."""
        lacking = [each for each in self.has_all if not hasattr(made, each)]
        if lacking:
            raise ConfigError(
                f"{where}: {name} gave a {type(made).__name__}, expected {self.what}: it has no {', '.join(lacking)}. "
                "Correct it, or take one of ours."
            )

    def has(self, name: str) -> bool:
        """Whether the text of a path can be of this kind."""
        return name in self.names or name.rpartition(".")[0] in self.modules


def _each(before: str, names: Sequence[str], after: str = "") -> tuple[str, ...]:
    return tuple(before + name + after for name in names)


_DATASET = Kind(
    "a data set of spin.data", ("spin.data.prompt_dataset", "spin.data.mixed_prompt_dataset"),
    supplied=("tokenizer", "max_seq_len", "keep_originals"),
)  # fmt: skip
KINDS: dict[str, Kind] = {
    "model": Kind(
        "spin.model.from_hf, or a model builder of torchtune", ("spin.model.from_hf",), _each(_TORCHTUNE, _FAMILIES),
        _makes_decoder,
    ),
    "tokenizer": Kind(
        "a tokenizer of spin.data or torchtune.models",
        (*_each("spin.data.", ("ChatTokenizer", "TorchtuneTokenizer")), *_each(_TORCHTUNE, _TOKENIZERS)),
    ),
    "prompt_template": Kind("a prompt template of torchtune", (
        *_each(_DATA, ("ChatML", "GrammarErrorCorrection", "Prompt", "QuestionAnswer", "Summarize"), "Template"),
        "torchtune.models.llama2.Llama2ChatTemplate", "torchtune.models.mistral.MistralChatTemplate",
    )),
    "dataset": _DATASET,
    "validation_dataset": _DATASET,
    "message_transform": Kind(
        "a message transform of torchtune.data",
        _each(_DATA, ("Alpaca", "ChosenRejected", "InputOutput", "OpenAI", "ShareGPT"), "ToMessages"),
    ),
    "generator": Kind(
        "a generator of spin.generators",
        _each("spin.generators.", ("Replay", "Torchtune", "VLLM", "VLLMServer"), "Generator"), supplied=("context",),
        has_all=("close", "generate", "shares_policy_weights", "sleep", "update_weights", "wake"),
    ),
    "checker": Kind("a function of your own", supplied=("prompt", "real", "generated", "truncated")),
    "loss": Kind("a loss", ("spin.loss.SPINLoss", "spin.loss.SPACELoss", "torchtune.rlhf.loss.DPOLoss")),
    "optimizer": Kind(
        "an optimizer", _each("spin.training.", ("AdamW8bit", "AdamWStochasticRounding")),
        ("torch.optim", "torchao.optim"), _is_optimizer, supplied=("params",),
        has_all=("load_state_dict", "param_groups", "state", "state_dict", "step", "zero_grad"),
    ),
    "checkpointer": Kind(
        "a checkpointer", _each("spin.checkpoint.", ("SPINCheckpointer", "LoRACheckpointer")),
        has_all=("close", "export", "latest", "load", "load_start", "read_state", "save", "validate", "wait"),
    ),
    "metric_logger": Kind(
        "a metric logger",
        (
            *_each(_LOGGING, ("Comet", "Disk", "MLFlow", "Stdout", "TensorBoard", "WandB"), "Logger"),
            "spin.run.TrackioLogger",
        ),
    ),
}  # fmt: skip
# What a section of any other name may hold, such as one that a recipe of the user's own adds
_ANY = Kind(
    "a component of this project, torch.optim or torchtune",
    tuple(name for kind in KINDS.values() for name in kind.names),
    tuple(module for kind in KINDS.values() for module in kind.modules),
    lambda found: _makes_decoder(found) or _is_optimizer(found),
)
_NOTHING = Kind("nothing: components stand within components as message_transform and prompt_template only")


def kind_at(path: str, within: str | None = None) -> Kind:
    """What may stand at a place of a config."""
    key = re.sub(r"\[\d+\]$", "", path.rpartition(".")[2])  # of a list
    return KINDS.get(key, _ANY if within is None else _NOTHING)


def below(path: str, roots: Sequence[str]) -> bool:
    """Whether a dotted path is one of some packages or lies in one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def environment_packages() -> tuple[str, ...]:
    """The packages that ``SPIN_ALLOW_COMPONENTS`` names, separated by commas."""
    names = [name for name in re.split(r"[,\s]+", os.environ.get(ALLOW_VARIABLE, "")) if name]
    for name in names:
        problem = package_problem(name)
        if problem is not None:
            raise ConfigError(f"{ALLOW_VARIABLE}: {problem}")
    return tuple(names)


def package_problem(name: Any) -> str | None:
    """Why a package cannot be allowed as the user's own, or None."""
    if not isinstance(name, str) or not DOTPATH.fullmatch(name):
        problem = "is not the name of a package"
    elif name.split(".")[0] in sys.stdlib_module_names:
        problem = "belongs to Python itself, which no config may call"
    elif name.split(".")[0] in ROOTS:
        problem = "is no package of yours; what sections may hold of it is fixed"
    else:
        return None
    return f"{name!r} {problem}. Name packages of your own, such as [my_package]."


def refusal(name: Any, kind: Kind, own: Sequence[str]) -> str | None:
    """Why a component is refused by its text, or None."""
    if not isinstance(name, str) or not DOTPATH.fullmatch(name) or "." not in name:
        return f"found {yaml_text(name)}, expected a dotted path such as torchtune.models.llama3_2.llama3_2_1b."
    if any(part.startswith("_") for part in name.split(".")):
        return f"{name} is not allowed: private names are no components."
    if below(name, own) or kind.has(name):
        return None
    root = name.split(".")[0]
    if root in sys.stdlib_module_names:
        remedy = "It belongs to Python itself, which no config may call."
    elif root in ROOTS:
        remedy = _choices(name, kind)
    else:
        remedy = f"If you trust {root}, allow it {HOW_TO_ALLOW.format(root, root)}."
    return f"{name} is not allowed here: the section takes {kind.what}. {remedy}"


def _choices(name: str, kind: Kind) -> str:
    module, _, last = name.rpartition(".")
    modules = difflib.get_close_matches(module, kind.modules, n=1, cutoff=0.8)
    same_name = [known for known in kind.names if known.endswith(f".{last}")]
    nearest = [f"{modules[0]}.{last}"] if modules else same_name or difflib.get_close_matches(name, kind.names, n=1)
    if nearest:
        return f"Did you mean {nearest[0]!r}?"
    known = [*kind.names, *(f"{each}.<name>" for each in kind.modules)]
    return f"It may be {', '.join(known[:6])}{', ...' if len(known) > 6 else '.'}" if known else ""


def resolve_component(name: str, own: Sequence[str] = (), kind: Kind = _ANY) -> Callable[..., Any]:
    """The class or function that a dotted path names; ConfigError if it is refused, missing or of another kind.

    A path into a package of the user's own may pass only through modules and classes of it, and what it ends at must be
    defined there.
    """
    reason = refusal(name, kind, own)
    if reason is not None:
        raise ConfigError(reason)
    if below(name, own):
        return _own_component(name, own)
    module, _, last = name.rpartition(".")
    package = _import(module, name)
    found = getattr(package, last, None)
    if found is None:
        raise _no_such(name, module, package, last)
    if name not in kind.names and not (kind.fits is not None and kind.fits(found)):
        raise ConfigError(f"{name} is not allowed here: it is a {type(found).__name__}, expected {kind.what}.")
    return found


def _own_component(name: str, own: Sequence[str]) -> Callable[..., Any]:
    root, *parts = name.split(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as torchtune does: a user's package may lie where the program was started
    current: Any = _import(root, name)
    reached = root
    for part in parts:
        parent, reached = reached, f"{reached}.{part}"
        if hasattr(current, part):
            current = getattr(current, part)
        elif isinstance(current, ModuleType):
            current = _import(reached, name, current)
        else:
            raise _no_such(name, parent, current, part)
        is_module = isinstance(current, ModuleType)
        home = current.__name__ if is_module else getattr(current, "__module__", None)
        if not isinstance(home, str) or not below(home, [root] if is_module else own):
            raise ConfigError(f"{name} is not allowed: {reached} is {home or type(current).__name__}, outside {root}.")
    if isinstance(current, ModuleType) or not callable(current):
        raise ConfigError(f"{name} is a {type(current).__name__}, expected a class or a function.")
    return current


def _import(module: str, name: str, package: ModuleType | None = None) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if package is not None and isinstance(error, ModuleNotFoundError):
            parent, _, part = module.rpartition(".")
            if error.name == module:
                raise _no_such(name, parent, package, part) from error
            raise ConfigError(
                f"{name}: importing {module} needs the package {error.name!r}, which is not installed."
            ) from error
        remedy = ""
        if module.startswith("torchtune.training"):
            remedy = " torchtune's metric loggers need torchao 0.15 or earlier: pip install 'torchao<0.16'."
        raise ConfigError(f"{name}: cannot import {module}: {error}.{remedy}") from error
    except (Exception, SystemExit) as error:  # code of the user's own may raise anything
        raise ConfigError(
            f"{name}: importing {module} raised {raised_in(name, error)}. SPIN_TRACEBACK=1 shows more."
        ) from error


def _no_such(name: str, parent: str, holder: Any, part: str) -> ConfigError:
    public = [attribute for attribute in dir(holder) if not attribute.startswith("_")]
    return ConfigError(f"{name}: {parent} has no {part!r}.{nearest_of(part, public)}")


def own_packages(cfg: DictConfig, given: Any, faults: Faults) -> tuple[str, ...]:
    """The user's own packages: of the environment, and of ``allow_components`` if it does not come from a file."""
    try:
        own = environment_packages()
    except ConfigError as error:
        faults.add(str(error))
        own = ()
    names = given if isinstance(given, list) else [given] if given else []
    if not cfg._get_flag(FROM_OUTSIDE) and not all(name in own for name in names):
        how = HOW_TO_ALLOW.format(*[",".join(map(str, names))] * 2)
        problem = "A config cannot allow what it names itself. If you trust the code, say so"
        faults.at(ALLOW_KEY, f"found {given!r:.200}. {problem} {how}.")
    elif isinstance(given, list):
        problems = {name: package_problem(name) for name in map(str, names)}
        for problem in filter(None, problems.values()):
            faults.at(ALLOW_KEY, problem)
        own = (*own, *(name for name, problem in problems.items() if problem is None))
    return own


def refused_components(values: Mapping[str, Any], own: Sequence[str], faults: Faults) -> set[str]:
    """Notes components that their places may not name, by their text; returns these places."""
    refused = set()
    for path, node, within in _component_nodes(values):
        for key in (COMPONENT, *PATH_ARGUMENTS):
            value = node.get(key)
            if value != MISSING and (key == COMPONENT or isinstance(value, str)):
                reason = refusal(value, kind_at(path, within) if key == COMPONENT else KINDS[key], own)
                if reason is not None:
                    refused.add(path)
                    faults.at(joined(path, key), (key == COMPONENT and _meant_location(path, value)) or reason)
    return refused


def _meant_location(path: str, value: Any) -> str | None:
    """What to write for a file, a folder or a name on the hub that stands where a section's component does."""
    if path not in LOCATED_BY or not isinstance(value, str):
        return None
    if DOTPATH.fullmatch(value) and not Path(value).exists() and Path(value).suffix not in DATA_SUFFIXES:
        return None
    return f"{yaml_text(value)} is no component. Write {path}.{LOCATED_BY[path]}={value}, if that is where it lies."


def check_arguments(
    values: Mapping[str, Any],
    own: Sequence[str],
    sections: Mapping[str, type[Component]],
    refused: Collection[str],
    faults: Faults,
) -> None:
    """Notes arguments that components do not take or lack; those that are not refused are imported."""
    for path, node, within in _component_nodes(values):
        if path not in refused and node[COMPONENT] != MISSING:
            _check_arguments(path, node, kind_at(path, within), own, sections.get(path, Component), faults)


def _check_arguments(
    path: str, node: Mapping[str, Any], kind: Kind, own: Sequence[str], section: type[Component], faults: Faults
) -> None:
    name = node[COMPONENT]
    try:
        component = _resolve_with_paths(node, kind, own)
    except ConfigError as error:
        return faults.at(path, str(error))
    arguments = {key: value for key, value in node.items() if key != COMPONENT and key not in section.own}
    for key in [key for key in kind.supplied if key in arguments]:
        faults.at(f"{path}.{key}", "the recipe supplies it. Remove it from the config.")
        del arguments[key]
    try:
        parameters = list(inspect.signature(component).parameters.values())
    except (TypeError, ValueError):  # builtins without a signature
        return None
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    named = [each for each in named if each.name not in kind.supplied]
    if kind in KINDS.values() and not below(name, own):  # a recipe may supply more to what is the user's own
        for each in named:
            if each.default is each.empty and each.name not in {*arguments, *section.model_fields}:
                faults.at(f"{path}.{each.name}", f"not set. {name} has no default for it.")
    known = [each.name for each in named] + list(section.own)
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        for key in [key for key in arguments if key not in known]:
            if key in section.model_fields and section.model_fields[key].is_required():
                faults.at(f"{path}.{key}", f"{name} does not take it, and the recipe gives it to all. Add a parameter.")
                continue
            remove = f" If it is left from another component, remove it: ~{path}.{key}."
            faults.at(f"{path}.{key}", f"{name} has no such parameter.{nearest_or_known(str(key), known)}{remove}")
    # of the recipe's own keys, and of its arguments, the schema has the types
    typed = {key: value for key, value in arguments.items() if key not in section.model_fields and value != MISSING}
    return check_values(path, component, typed, faults)


def check_values(path: str, component: Callable[..., Any], values: Mapping[str, Any], faults: Faults) -> None:
    """Notes arguments of a component whose type or range is not the parameter's."""
    function = component.__init__ if isinstance(component, type) else component  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that exist for type checkers only
        hints = {}
    parameters = inspect.signature(component).parameters
    for key, value in values.items():
        kind = _simple_type(hints.get(key), parameters[key].default if key in parameters else None)
        try:
            TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            faults.at(f"{path}.{key}", f"found {yaml_text(value)}, expected {expected(kind)}.")
        else:
            _check_ranges(value, f"{path}.{key}", faults)


def _simple_type(hint: Any, default: Any) -> Any:
    """The type of an argument that takes numbers, texts, paths, booleans or null only, or as many numbers as its
    default has, as an optimizer's betas; else Any."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    if all(kind in KIND_WORDS or kind is Path or typing.get_origin(kind) is Literal for kind in kinds):
        return typing.Union[tuple(str if kind is Path else kind for kind in kinds)]  # noqa: UP007
    if isinstance(default, tuple) and default and all(type(item) in (int, float, type(None)) for item in default):
        count = len(default)
        limits = Field(min_length=count, max_length=count, title=f"a list of {count} numbers")
        return Annotated[list[float | None] if None in default else list[float], limits]
    return Any


def _check_ranges(value: Any, path: str, faults: Faults) -> None:
    """Notes numbers that are out of the range of their argument, at any depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_ranges(item, f"{path}.{key}", faults)
    elif isinstance(value, list):
        for item in value:
            _check_ranges(item, path, faults)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        within, _, key = path.rpartition(".")
        name = f"{'dataset' if _DATASETS.fullmatch(within) else within.rpartition('.')[2]}.{key}"
        least, most = ARGUMENTS.get(name, (-(2**63), 2**63))
        # infinity may stand for no limit where there is none of ours
        if math.isnan(value):
            faults.at(path, "found .nan, expected a finite number.")
        elif not least <= value <= most and (name in ARGUMENTS or not math.isinf(value)):
            faults.at(path, f"found {value!r:.100}, expected a number from {least:,} to {most:,}.")


def _resolve_with_paths(node: Mapping[str, Any], kind: Kind, own: Sequence[str]) -> Callable[..., Any]:
    """The component of a section, if that and what its arguments name by path exist."""
    component = resolve_component(node[COMPONENT], own, kind)
    for argument in PATH_ARGUMENTS:
        if isinstance(node.get(argument), str):
            resolve_component(node[argument], own, KINDS[argument])
    return component


def _component_nodes(
    value: Any, path: str = "", within: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Every mapping that has ``_component_``, at any depth, with its path and that of the component around it."""
    if isinstance(value, Mapping):
        if COMPONENT in value:
            yield path, value, within
            within = path
        for key, item in value.items():
            yield from _component_nodes(item, joined(path, key), within)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _component_nodes(item, f"{path}[{index}]", within)


def component_of(section: Component) -> Callable[..., Any]:
    """The class or function that a section names."""
    return resolve_component(section.component, section._packages, kind_at(section._where))


def own_code(cfg: Config) -> dict[str, str]:
    """:func:`code_of` each component of the user's own, by its name."""
    nodes = (node for _, node, _ in _component_nodes(cfg.model_dump(by_alias=True)))
    own = (*environment_packages(), *cfg.allow_components)
    return {
        name: code_of(_own_component(name, own))
        for name in sorted({node[COMPONENT] for node in nodes if below(node[COMPONENT], own)})
    }


def code_of(component: Callable[..., Any]) -> str:
    """SHA-256 of the file that defines a component, as it was when it was first asked for: a process goes on with the
    code that it has imported. Empty for what comes from no file, or from one that cannot be read any more."""
    if id(component) not in _CODE:
        module: Any = sys.modules.get(component.__module__)
        try:  # by its loader: a package may be a zip archive
            code = hashlib.sha256(module.__loader__.get_data(module.__file__)).hexdigest()
        except (AttributeError, OSError):
            code = ""
        _CODE[id(component)] = component, code
    return _CODE[id(component)][1]


_CODE: dict[int, tuple[Any, str]] = {}  # by id, which stays that of what was imported: a module may be loaded again


def nested(section: Component, node: Mapping[str, Any] | None, key: str) -> Component | None:
    """A component that stands among a section's arguments, to be built by itself."""
    if node is None:
        return None
    where = f"{section._where}.{key}"
    if not isinstance(node, Mapping) or COMPONENT not in node:
        raise ConfigError(f"{where}: found {yaml_text(node)}, expected a section with {COMPONENT}.")
    part = Component.model_validate(node)
    part._where, part._packages = where, section._packages
    return part


def instantiate(node: Component | Mapping[str, Any] | DictConfig | None, *args: Any, **kwargs: Any) -> Any:
    """Builds what a section's ``_component_`` names, nested components first; otherwise as torchtune's function.

    The recipe's own keys are left out. What it may be is decided by the section's place in its config.

    Args:
        node (Component | Mapping[str, Any] | DictConfig | None): the section.
        *args (Any): positional arguments that the recipe supplies.
        **kwargs (Any): keyword arguments that the recipe supplies; they win over the config's.

    Returns:
        Any: the object, or None for no section.

    Raises:
        ConfigError: If there is no component, it is not allowed, the arguments do not fit its signature, or the file of
            a tokenizer cannot be read, or what is made lacks what a recipe calls.
        SpinError: If the component raises one; the message names the section.
    """
    if node is None:
        return None
    if isinstance(node, Component):
        left_out, values = type(node).own, node.model_dump(by_alias=True)
        values = {key: value for key, value in values.items() if key not in left_out}
        return _build(values, node._where, kind_at(node._where), node._packages, args, kwargs)
    where = "config"
    if isinstance(node, DictConfig):  # of no complete config
        where = str(node._get_full_key(None)) or where
        node = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    if not isinstance(node, Mapping) or COMPONENT not in node:
        raise ConfigError(f"{where}: found {yaml_text(node)}, expected a section with {COMPONENT}.")
    return _build(node, where, kind_at(where), environment_packages(), args, kwargs)


def _build(
    node: Mapping[str, Any], where: str, kind: Kind, own: Sequence[str], args: Sequence[Any], supplied: dict[str, Any]
) -> Any:
    name = node[COMPONENT]
    try:
        component = _resolve_with_paths(node, kind, own)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    parts = {key: value for key, value in node.items() if key != COMPONENT and key not in supplied}
    kwargs = _built(parts, where, where, own) | supplied
    if kind is KINDS["tokenizer"]:
        os.environ["TIKTOKEN_CACHE_DIR"] = ""  # tiktoken keeps copies by path, of files that have changed since
        for key, value in kwargs.items():
            if isinstance(value, str) and PATH_KEY.fullmatch(key) and "://" in value:
                raise ConfigError(f"{where}.{key}: found {value!r:.100}, expected a path; nothing is downloaded.")
    try:
        inspect.signature(component).bind(*args, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{where}: {name}: {error}.") from error
    except ValueError:  # builtins without a signature
        pass
    try:
        made = component(*args, **kwargs)
    except SpinError as error:
        if where in str(error):
            raise
        # what a data set says of itself does not know that it is the one for validation, say
        raise type(error)(f"{where}: {error}") from error
    except OSError as error:
        if where.rpartition(".")[2] != "tokenizer":  # spin's own parts name their files; a metrics service may be down
            raise
        raise ConfigError(f"{where}: {name} cannot be made: {error}. Check the paths of the section.") from error
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigError(
            f"{where}: {name} does not take these values ({type(error).__name__}: {error}{place_in(name, error)}). "
            "Check the section; SPIN_TRACEBACK=1 shows where it happened."
        ) from error
    kind.check(made, where, name)
    return made


def raised_in(name: str, error: BaseException) -> str:
    """What code of the user's own raised, in one line, and where."""
    return f"{' '.join(''.join(traceback.format_exception_only(error)).split()):.300}{place_in(name, error)}"


def place_in(name: str, error: BaseException) -> str:
    """Where a component of the user's own raised, as ', at file:line': the last line that is its package's."""
    root, place = name.split(".")[0], ""
    if root in ROOTS:
        return place
    for frame, line in traceback.walk_tb(error.__traceback__):
        if str(frame.f_globals.get("__name__")).split(".")[0] == root:
            place = f", at {frame.f_code.co_filename}:{line}"
    return place


def _built(value: Any, where: str, within: str, own: Sequence[str]) -> Any:
    """A value with the components that stand in it built."""
    if isinstance(value, Mapping):
        if COMPONENT in value:
            return _build(value, where, kind_at(where, within), own, (), {})
        return {key: _built(item, f"{where}.{key}", within, own) for key, item in value.items()}
    if isinstance(value, list):
        return [_built(item, f"{where}[{index}]", within, own) for index, item in enumerate(value)]
    return value
