"""``spin validate``; the checks are in :mod:`spin.cli.checks`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spin.cli import parser_of
from spin.config.files import find_config, parse_overrides


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
    find_config(arguments.config)  # a typo is reported before torch is loaded
    from spin.cli.checks import run_checks

    faults = run_checks(arguments.config, overrides, arguments.recipe, arguments.logits)
    if faults:
        print(f"error: {faults} {'check' if faults == 1 else 'checks'} failed.", file=sys.stderr)
    return 1 if faults else 0
