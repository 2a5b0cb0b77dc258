"""The recipes and configs that come with this package, found without importing any of them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from spin.config.parse import configs_root, packaged_configs
from spin.core.errors import ConfigError

_LAUNCH = re.compile(r"^#.*\b(spin_\w+) --config", flags=re.MULTILINE)
# what no other recipe's config has
_SIGNS = {
    "spin_evaluate": re.compile(r"^candidate:", flags=re.MULTILINE),
}


def recipe_files() -> dict[str, Path]:
    """The recipes by name: in a checkout those of ``recipes/``, else the modules installed beside ``spin``."""
    package = Path(__file__).parents[1]
    checkout = package.parent / "recipes"  # in site-packages this folder is torchtune's
    folder = checkout if (checkout / "spin_recipe.py").is_file() else package.parent
    files = sorted(folder.glob("spin_*.py"))
    return {file.stem: file for file in files if "@config.parse(" in file.read_text(encoding="utf-8")}


def recipe_of(config: Path) -> str:
    """The recipe that a config is for: the one that a comment launches, else the one whose keys it has.

    Args:
        config (Path): a YAML file.

    Returns:
        str: the recipe's name.
    """
    text = config.read_text(encoding="utf-8", errors="replace")
    launched = _LAUNCH.search(text)
    if launched:
        return launched[1]
    return next((recipe for recipe, sign in _SIGNS.items() if sign.search(text)), "spin_recipe")


def configs() -> dict[str, tuple[str, str]]:
    """Recipe and first line of every packaged config, by name."""
    found = {}
    for name in packaged_configs():
        file = configs_root() / f"{name}.yaml"
        title = file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        found[name] = (recipe_of(file), title)
    return found


def load_recipe(name_or_path: str) -> ModuleType:
    """Imports a recipe.

    Args:
        name_or_path (str): a packaged recipe's name, or a file.

    Returns:
        ModuleType: the module, with its ``DEFAULTS``.

    Raises:
        ConfigError: If there is no such recipe, or it has no ``DEFAULTS``.
    """
    files = recipe_files()
    path = files.get(name_or_path, Path(name_or_path))
    if not path.is_file():
        raise ConfigError(f"recipe {name_or_path!r} not found: no such file, and the recipes are {', '.join(files)}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file; expected a recipe.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "DEFAULTS", None), dict):
        raise ConfigError(f"{path}: no DEFAULTS, the keys that a recipe's config may have. Is this a recipe?")
    return module
