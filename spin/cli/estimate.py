"""``spin estimate``; what is estimated how stands in :mod:`spin.cli.workload`, ``memory``, ``timing`` and ``fit``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spin.cli import parser_of
from spin.cli.rates import GPUS
from spin.config.complete import check_keys
from spin.config.files import load_config, parse_overrides
from spin.config.schema import SPINConfig
from spin.core.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Prints the tables of a config, and what makes it fit."""
    usage = "%(prog)s CONFIG [--gpus N] [--hosts N] [--gpu KIND] [--pair-tokens N] [--prompts N] [key=value ...]"
    parser = parser_of("estimate", "Memory and time that a config takes, before anything is loaded.", usage)
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or a packaged config such as lora")
    parser.add_argument("--gpus", type=int, default=1, help="on all hosts together")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--gpu", choices=list(GPUS), help="their kind; without it that of this machine, or H100")
    parser.add_argument("--links", type=_links, default=(8, 400.0), metavar="8x400", help="of a host to the others: "
                        "network cards x Gb/s")  # fmt: skip
    parser.add_argument("--pair-tokens", type=int, help="mean tokens of a pair, prompt and all responses; without it "
                        "those of the data, or 755")  # fmt: skip
    parser.add_argument("--prompts", type=int, help="of an iteration; without it those of the data, or 1,000")
    arguments, overrides = parse_overrides(parser, argv)
    raw = load_config(arguments.config, overrides)
    if "candidate" in raw:
        raise ConfigError(f"{arguments.config} is an evaluation's config; estimates are of training.")
    check_keys(raw, SPINConfig)  # before torch is loaded
    from spin.cli.fit import print_estimate

    print_estimate(arguments, overrides)


def _links(text: str) -> tuple[int, float]:
    cards, _, gigabits = text.partition("x")
    if not cards.isdigit() or not gigabits.isdigit() or not int(cards) or not int(gigabits):
        raise argparse.ArgumentTypeError(f"{text}: expected network cards x Gb/s, as 8x400")
    return int(cards), float(gigabits)
