"""The recipes and configs that come with this package, found without importing any of them."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from spin.config import schema
from spin.config.files import find_config, packaged_configs
from spin.config.interpolation import configs_root
from spin.config.schema import Section
from spin.core.command import spin_command
from spin.core.errors import ConfigError
from spin.core.terminal import nearest_of

_PARSED = re.compile(r"^@config\.parse\(config\.(\w+)\)$", flags=re.MULTILINE)
_LAUNCH = re.compile(r"^#.*\b(spin_\w+) --config", flags=re.MULTILINE)


def recipe_files() -> dict[str, Path]:
    """The recipes by name: in a checkout those of ``recipes/``, else the modules installed beside ``spin``."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "recipes"  # in site-packages this folder is torchtune's
    folder = checkout if (checkout / "spin_recipe.py").is_file() else package.parent
    files = sorted(folder.glob("spin_*.py"))
    return {file.stem: file for file in files if "@config.parse(" in file.read_text(encoding="utf-8")}


def recipe_of(config: Path) -> str:
    """The recipe that a config is for: the one that a comment launches, else the one whose keys it has."""
    text = config.read_text(encoding="utf-8", errors="replace")
    launched = _LAUNCH.search(text)
    if launched:
        return launched[1]
    return "spin_evaluate" if re.search(r"^candidate:", text, flags=re.MULTILINE) else "spin_recipe"


def configs() -> dict[str, tuple[str, str]]:
    """Recipe and first line of every packaged config, by name."""
    found = {}
    for name in packaged_configs():
        file = configs_root() / f"{name}.yaml"
        title = file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        found[name] = (recipe_of(file), title)
    return found


def find_recipe(name_or_path: str) -> Path:
    """The file of a recipe: of a packaged one by its name, else of a file, whose suffix may be left out; ConfigError if
    there is none."""
    files = recipe_files()
    if name_or_path in files:
        return files[name_or_path]
    for path in (Path(name_or_path), Path(f"{name_or_path}.py")):
        if path.is_file():
            return path
    hint = nearest_of(name_or_path, list(files))
    if name_or_path in packaged_configs():
        command = spin_command("run", recipe_of(find_config(name_or_path)), "--config", name_or_path)
        hint = f" It is a config: {command}"
    raise ConfigError(f"recipe {name_or_path!r} not found: no such file, and the recipes are {', '.join(files)}.{hint}")


def load_recipe(name_or_path: str) -> ModuleType:
    """Imports a recipe, by the name of a packaged one or from a file; ConfigError if there is none."""
    path = find_recipe(name_or_path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file; expected a recipe.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def config_model(recipe: ModuleType) -> type[Section]:
    """The model that ``@config.parse(...)`` took in a recipe: every key that its config may have."""
    for value in vars(recipe).values():
        model = getattr(value, "config_model", None)
        if isinstance(model, type) and issubclass(model, Section):
            return model
    raise ConfigError(f"{recipe.__file__}: no function with @config.parse(...). Is this a recipe?")


def named_model(recipe: Path) -> type[Section] | None:
    """What :func:`config_model` finds, where a recipe's text names a model of :mod:`spin.config`; imports nothing."""
    named = _PARSED.search(recipe.read_text(encoding="utf-8", errors="replace"))
    return getattr(schema, named[1], None) if named else None


def model_of(name_or_path: str) -> type[Section]:
    """Every key that the config of a recipe may have. The recipe, and torch with it, is imported if that is needed."""
    return named_model(find_recipe(name_or_path)) or config_model(load_recipe(name_or_path))


def wrong_recipe_hint(name: str, keys: Iterable[Any], model: type[Section]) -> str:
    """A line that says whose config it is, if it has keys that only that recipe knows."""
    recipe = recipe_of(find_config(name))
    unknown = [key for key in keys if key not in model.model_fields]
    if not unknown or not any(key in model_of(recipe).model_fields for key in unknown):
        return ""
    return f"\n{name} is a config for {recipe}: {spin_command('run', recipe, '--config', name)}"


def warn_shadowed_recipe(recipe_main: Callable[..., Any]) -> None:
    """Says on rank 0 which file runs, if the folder has another recipe of the same name.

    `spin run`, and on one device `tune run`, take the installed file before that of the folder, torchrun and
    `python -m` the other way round.
    """
    file = recipe_main.__globals__.get("__file__")
    if file is None or os.environ.get("RANK", "0") != "0":
        return
    running = Path(file).resolve()
    here = Path.cwd() / running.name
    installed = recipe_files().get(running.stem)
    if not here.is_file() or installed is None:
        return
    other = installed if here.resolve() == running else here
    if other.read_bytes() != running.read_bytes():
        print(
            f"warning: {running} runs, not {other}. Which of the two is found depends on the launcher: give a copy of "
            f"a recipe a name of its own, such as my_{running.name}, and start it by that.",
            file=sys.stderr,
            flush=True,
        )
