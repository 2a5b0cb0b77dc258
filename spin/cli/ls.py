"""``python -m spin ls``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spin.config.catalog import configs, recipe_files


def main(argv: Sequence[str]) -> None:
    """Lists recipes, each with the configs that are for it."""
    parser = argparse.ArgumentParser(prog="python -m spin ls", description="List recipes and configs.")
    parser.parse_args(list(argv))
    known = configs()
    width = max(map(len, known)) + 2
    for recipe in recipe_files():
        print(recipe)
        for name, (for_recipe, title) in known.items():
            if for_recipe == recipe:
                print(f"  {name:<{width}}{title}")
