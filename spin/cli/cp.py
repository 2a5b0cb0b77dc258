"""``spin cp``."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from spin.cli import parser_of
from spin.config.catalog import model_of, recipe_files, recipe_of
from spin.config.files import packaged_configs
from spin.config.full import full_text
from spin.config.interpolation import configs_root
from spin.core.command import spin_command
from spin.core.errors import ConfigError
from spin.core.files import as_output_error, atomic_write, check_new_file


def main(argv: Sequence[str]) -> None:
    """Copies a packaged recipe or config."""
    parser = parser_of("cp", "Copy a recipe or a config, to edit it.")
    parser.add_argument("name", help="of a recipe or a config, as `spin ls` shows it")
    parser.add_argument("destination", type=Path, help="a file or a folder")
    parser.add_argument("--full", action="store_true", help="of a config: write all keys, with what each means")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    parser.add_argument("--make-parents", action="store_true", help="make the destination's folder")
    arguments = parser.parse_args(argv)
    source = _source(arguments.name)
    target: Path = arguments.destination
    if target.is_dir():
        target /= source.name
    elif not target.suffix:
        target = target.with_name(target.name + source.suffix)
    if arguments.make_parents:
        with as_output_error(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
    remedy = "Choose another name, or give --force to replace it."
    check_new_file(target, remedy, arguments.force, "Make it, or give --make-parents.")
    with atomic_write(target, "xb") as stream:
        if arguments.full and source.suffix == ".yaml":
            stream.write(full_text(str(source), model_of(recipe_of(source))).encode())
        else:
            stream.write(source.read_bytes())
    print(f"{arguments.name} -> {target}")
    if target.name == source.name and target.stem in recipe_files():
        print(
            "The copy has the installed recipe's name, and which of the two runs depends on the launcher. Rename it, "
            f"to my_{target.name} for instance, before you change it."
        )


def _source(name: str) -> Path:
    recipes, configs = recipe_files(), packaged_configs()
    if name.removesuffix(".py") in recipes:
        return recipes[name.removesuffix(".py")]
    if name.removesuffix(".yaml") in configs:
        return configs_root() / f"{name.removesuffix('.yaml')}.yaml"
    nearest = difflib.get_close_matches(name, [*recipes, *configs], n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
    raise ConfigError(f"{name!r} is neither a recipe nor a packaged config.{hint} All: {spin_command('ls')}")
