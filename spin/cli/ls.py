"""``spin ls``."""

from __future__ import annotations

from collections.abc import Sequence

from spin.cli import parser_of
from spin.config.catalog import configs, recipe_files


def main(argv: Sequence[str]) -> None:
    """Lists recipes, each with the configs that are for it."""
    parser_of("ls", "List recipes and configs.").parse_args(argv)
    known = configs()
    width = max(map(len, known)) + 2
    for recipe in recipe_files():
        print(recipe + ("  takes the configs of spin_recipe" if recipe == "spin_sft" else ""))
        for name, (for_recipe, title) in known.items():
            if for_recipe == recipe:
                print(f"  {name:<{width}}{title}")
