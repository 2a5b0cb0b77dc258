"""What the sections of a config may name as their ``_component_``: lists, decided by the section's place.

A config is data. What it names is compared as text with what its section may hold, before anything is imported; a base
class or a return type is checked afterwards. A package of the user's own is allowed by its name from outside of the
file: ``allow_components=[my_package]`` on the command line, or ``SPIN_ALLOW_COMPONENTS=my_package``.

Importing this module imports neither torch nor torchtune.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from spin.core.errors import ConfigError

ALLOW_KEY = "allow_components"
ALLOW_VARIABLE = "SPIN_ALLOW_COMPONENTS"
HOW_TO_ALLOW = f"on the command line, {ALLOW_KEY}=[{{}}], or in the environment, {ALLOW_VARIABLE}={{}}"
ROOTS = ("torch", "torchtune", "torchao", "torchdata", "spin")  # what is allowed of these stands below

DOTPATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_TORCHTUNE = "torchtune.models."
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
    """What a section may hold.

    Args:
        what (str): in words, for messages.
        names (tuple[str, ...]): dotted paths, each of one class or function.
        modules (tuple[str, ...]): modules whose own names it may hold if they pass ``fits``.
        fits (Callable[[Any], bool] | None): whether an object of these modules is of the kind.
    """

    what: str
    names: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    fits: Callable[[Any], bool] | None = None

    def has(self, name: str) -> bool:
        """Whether the text of a path can be of this kind."""
        return name in self.names or name.rpartition(".")[0] in self.modules


_DATASET = Kind("a data set of spin.data", ("spin.data.prompt_dataset", "spin.data.mixed_prompt_dataset"))
KINDS: dict[str, Kind] = {
    "model": Kind(
        "a model builder of torchtune", modules=tuple(_TORCHTUNE + name for name in _FAMILIES), fits=_makes_decoder
    ),
    "tokenizer": Kind(
        "a tokenizer of spin.data or torchtune.models",
        ("spin.data.ChatTokenizer", "spin.data.TorchtuneTokenizer", *(_TORCHTUNE + name for name in _TOKENIZERS)),
    ),
    "prompt_template": Kind(
        "a prompt template of torchtune",
        (
            *(
                f"torchtune.data.{name}Template"
                for name in ("ChatML", "GrammarErrorCorrection", "Prompt", "QuestionAnswer", "Summarize")
            ),
            "torchtune.models.llama2.Llama2ChatTemplate",
            "torchtune.models.mistral.MistralChatTemplate",
        ),
    ),
    "dataset": _DATASET,
    "validation_dataset": _DATASET,
    "message_transform": Kind(
        "a message transform of torchtune.data",
        tuple(
            f"torchtune.data.{name}ToMessages"
            for name in ("Alpaca", "ChosenRejected", "InputOutput", "OpenAI", "ShareGPT")
        ),
    ),
    "generator": Kind(
        "a generator of spin.generators",
        tuple(f"spin.generators.{name}Generator" for name in ("Replay", "Torchtune", "VLLM", "VLLMServer")),
    ),
    "loss": Kind("a loss", ("spin.loss.SPINLoss", "torchtune.rlhf.loss.DPOLoss")),
    "optimizer": Kind(
        "an optimizer",
        ("spin.training.AdamW8bit", "spin.training.AdamWStochasticRounding"),
        ("torch.optim", "torchao.optim"),
        _is_optimizer,
    ),
    "checkpointer": Kind("a checkpointer", ("spin.checkpoint.SPINCheckpointer", "spin.checkpoint.LoRACheckpointer")),
    "metric_logger": Kind(
        "a metric logger of torchtune",
        tuple(
            f"torchtune.training.metric_logging.{name}Logger"
            for name in ("Comet", "Disk", "MLFlow", "Stdout", "TensorBoard", "WandB")
        ),
    ),
}
# What a section of any other name may hold, such as one that a recipe of the user's own adds
_ANY = Kind(
    "a component of this project, torch.optim or torchtune",
    tuple(name for kind in KINDS.values() for name in kind.names),
    tuple(module for kind in KINDS.values() for module in kind.modules),
    lambda found: _makes_decoder(found) or _is_optimizer(found),
)
_NOTHING = Kind("nothing: components stand within components as message_transform and prompt_template only")


def kind_at(path: str, within: str | None = None) -> Kind:
    """What may stand at a place of a config.

    Args:
        path (str): of the section, such as ``judge.generator`` or ``dataset.sources.a.message_transform``.
        within (str | None): path of the component whose argument it is; None if it is a section of its own.

    Returns:
        Kind: by the last key of the path.
    """
    key = path.rpartition(".")[2]
    return KINDS.get(key, _ANY if within is None else _NOTHING)


def below(path: str, roots: Sequence[str]) -> bool:
    """Whether a dotted path is one of some packages or lies in one."""
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def environment_packages() -> tuple[str, ...]:
    """The packages that ``SPIN_ALLOW_COMPONENTS`` names, separated by commas.

    Returns:
        tuple[str, ...]: in their order.

    Raises:
        ConfigError: If one cannot be allowed.
    """
    names = [name for name in re.split(r"[,\s]+", os.environ.get(ALLOW_VARIABLE, "")) if name]
    for name in names:
        problem = package_problem(name)
        if problem is not None:
            raise ConfigError(f"{ALLOW_VARIABLE}: {problem}")
    return tuple(names)


def package_problem(name: Any) -> str | None:
    """Why a package cannot be allowed as the user's own, or None.

    Args:
        name (Any): what was given as its name.

    Returns:
        str | None: a sentence.
    """
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
    """Why a component is refused by its text, or None. Imports nothing.

    Args:
        name (Any): what stands as ``_component_``.
        kind (Kind): what the section may hold.
        own (Sequence[str]): packages of the user's own.

    Returns:
        str | None: the reason, and what to do.
    """
    if not isinstance(name, str) or not DOTPATH.fullmatch(name) or "." not in name:
        return f"found {name!r}, expected a dotted path such as torchtune.models.llama3_2.llama3_2_1b."
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
    """The class or function that a dotted path names.

    Args:
        name (str): dotted path.
        own (Sequence[str]): packages of the user's own. A path into one may pass only through modules and classes of
            it, and what it ends at must be defined there.
        kind (Kind): what the section may hold.

    Returns:
        Callable[..., Any]: the object.

    Raises:
        ConfigError: If the path is refused, does not exist, or ends at something that is not of the kind.
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
        raise ConfigError(f"{name}: {module} has no {last!r}.{nearest_of(last, _public(package))}")
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
        if isinstance(current, ModuleType) and not hasattr(current, part):
            current = _import_below(current, parent, part, name)
        elif not hasattr(current, part):
            raise ConfigError(f"{name}: {parent} has no {part!r}.{nearest_of(part, _public(current))}")
        else:
            current = getattr(current, part)
        home = current.__name__ if isinstance(current, ModuleType) else getattr(current, "__module__", None)
        scope = [root] if isinstance(current, ModuleType) else own
        if not isinstance(home, str) or not below(home, scope):
            raise ConfigError(f"{name} is not allowed: {reached} is {home or type(current).__name__}, outside {root}.")
    if isinstance(current, ModuleType) or not callable(current):
        raise ConfigError(f"{name} is a {type(current).__name__}, expected a class or a function.")
    return current


def nearest_of(name: str, known: Sequence[str]) -> str:
    """' Did you mean ...?', or nothing."""
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""


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
            raise ConfigError(f"{name}: {parent} has no {part!r}.{nearest_of(part, _public(package))}") from error
        raise ConfigError(
            f"{name}: importing {module} needs the package {error.name!r}, which is not installed."
        ) from error
    except ImportError as error:
        raise ConfigError(f"{name}: cannot import {module}: {error}.") from error


def _public(value: Any) -> list[str]:
    return [attribute for attribute in dir(value) if not attribute.startswith("_")]
