"""``spin validate``; the checks are in :mod:`spin.cli.checks`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from spin.cli import parser_of
from spin.config.catalog import model_of, recipe_of
from spin.config.complete import check_keys, complete
from spin.config.files import find_config, load_config, parse_overrides
from spin.config.schema import Section
from spin.core.errors import SpinError
from spin.core.terminal import printable


def main(argv: Sequence[str]) -> int:
    """Checks a config, its model folder, its tokenizer, its data and its arithmetic; loads no weights."""
    usage = "%(prog)s CONFIG [key=value ...] [~key ...] [--recipe NAME_OR_FILE] [--logits]"
    description = "Check a config, its data and its arithmetic. Loads no weights and writes nothing."
    parser = parser_of("validate", description, usage)
    parser.add_argument("config", help="a YAML file, or a packaged config such as lora")
    parser.add_argument("--recipe", help="the recipe whose config it is; default: the one that its header launches")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="build the folder's architecture in transformers, with few layers and random weights, and compare logits",
    )
    arguments, overrides = parse_overrides(parser, argv)
    recipe = arguments.recipe or recipe_of(find_config(arguments.config))
    check = Checks()
    cfg = check("config", partial(_config, arguments.config, overrides, recipe))
    if cfg is not None:
        from spin.cli.checks import run_checks

        run_checks(cfg, check, arguments.logits)
    if check.faults:
        print(f"error: {check.faults} {'check' if check.faults == 1 else 'checks'} failed.", file=sys.stderr)
    return 1 if check.faults else 0


def _config(name: str, overrides: Sequence[str], recipe: str) -> tuple[Section, str]:
    raw, model = load_config(name, overrides), model_of(recipe)
    check_keys(raw, model)
    from spin.cli.checks import stage_of  # imports torch, for whose sake keys are checked first

    return stage_of(complete(raw, model)), f"{name} for {recipe}: every key is known, and their values go together"


class Checks:
    """Runs checks, prints a line for each, and counts faults."""

    def __init__(self) -> None:
        self.faults = 0

    def __call__(self, label: str, check: Callable[..., tuple[Any, str]], **needs: Any) -> Any:
        """The result of ``check(*needs)``; None after a fault, or if something that it needs is None."""
        missing = [name for name, value in needs.items() if value is None]
        if missing:
            result, verdict, text = None, "-", f"skipped: needs the {' and '.join(missing)}"
        else:
            try:
                result, text = check(*needs.values())
                verdict = "ok"
            except SpinError as error:
                result, verdict, text = None, "FAULT", str(error)
                self.faults += 1
        head, *rest = printable(text).split("\n")
        print(f"{label:<16} {verdict:<6} {head}", *(f"{'':<23} {line}" for line in rest), sep="\n", flush=True)
        return result
