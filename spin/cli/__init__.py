"""``spin COMMAND``, or ``python -m spin COMMAND``: starts recipes, and what there is besides them.

Each command is a module with ``main(argv) -> int | None``, imported when it is asked for. It parses its arguments
before it imports torch, so that help and typos are answered at once.
Exit codes: 0 fine, 1 faults were found, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from omegaconf.errors import OmegaConfBaseException

from spin import __version__
from spin.core.command import spin_command
from spin.core.errors import SpinError, show_traceback
from spin.core.terminal import escape_unencodable_output, nearest_of, printable

# name: module, what it does
COMMANDS = {
    "demo": ("spin.cli.demo", "two iterations of self-play of a small model on this CPU, in minutes"),
    "run": ("spin.cli.run", "start a recipe, in one process or by torchrun in several"),
    "ls": ("spin.cli.ls", "list recipes and configs"),
    "new": ("spin.cli.new", "write a config for a model and data of yours, sized for this machine"),
    "cp": ("spin.cli.cp", "copy a recipe or a config, to edit it"),
    "validate": ("spin.cli.validate", "check a config, its data and its arithmetic; loads no weights"),
    "estimate": ("spin.cli.estimate", "say what memory and time a config will take"),
    "keys": ("spin.cli.keys", "list every key of the configs: default, what it takes, what it does"),
    "models": ("spin.cli.models", "list the models that are trained"),
    "pairs": ("spin.cli.pairs", "look at a pair store, filter and export it"),
    "report": ("spin.cli.report", "make an HTML file of a run's curves and responses"),
    "chat": ("spin.cli.chat", "talk to a run's model, or to two models side by side"),
    "export": ("spin.cli.export", "make a Hugging Face folder with a model card"),
    "doctor": ("spin.cli.doctor", "say what is installed, and what is missing or does not fit"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Ends the program; of an option that is not known the nearest one is named."""
        found = re.search(r"(?:unrecognized arguments:|unknown option) (--[\w-]+)", message)
        nearest = nearest_of(found[1], list(self._option_string_actions)) if found else ""
        super().error(f"{message}.{nearest}" if nearest else message)


def parser_of(command: str, description: str, usage: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command's arguments, without any yet."""
    return _Parser(spin_command(command), usage, description, allow_abbrev=False)


def usage() -> str:
    """The text of ``spin --help``."""
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return (
        f"usage: {spin_command()} COMMAND [ARGUMENTS]\n\n"
        + "\n".join(lines)
        + f"\n\nMore: {spin_command('COMMAND', '--help')}\n"
        + f"Training: {spin_command('run', 'spin_recipe', '--config', 'NAME_OR_FILE')}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; a user's error is a line on stderr, without a traceback unless SPIN_TRACEBACK=1."""
    argv = sys.argv[1:] if argv is None else argv
    escape_unencodable_output()
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"spin-torchtune {__version__}")
        return 0
    name, arguments = argv[0], list(argv[1:])
    if name not in COMMANDS:
        print(f"error: unknown command {name!r}.{nearest_of(name, list(COMMANDS))}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[name][0]).main(arguments) or 0
    except (SpinError, OmegaConfBaseException, OSError) as error:  # OSError: a file that may not be read
        if show_traceback() or (name == "run" and not isinstance(error, SpinError)):  # what a recipe lets through
            raise
        if isinstance(error, BrokenPipeError):  # `... | head`: whoever read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
