"""The command line of a recipe: ``sys.argv`` in, one checked and typed config out, errors as text and exit codes.

Importing this module imports neither torch nor torchtune; they load when a component is looked up. So `spin run` has
:func:`read_argv` and :func:`read_config` find what they can before it imports a recipe.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue

from spin.config.catalog import warn_shadowed_recipe, wrong_recipe_hint
from spin.config.complete import ConfigT, complete
from spin.config.files import load_config, parse_overrides
from spin.config.follow import TO_FILL
from spin.core.command import spin_command
from spin.core.errors import ConfigError, SpinError, show_traceback
from spin.core.terminal import escape_unencodable_output, printable


def parse(model: type[ConfigT]) -> Callable[[Callable[[ConfigT], int | None]], Callable[[], None]]:
    """Decorator factory for ``recipe_main(cfg)``: reads ``sys.argv``, checks the config, runs the recipe, exits.

    Errors that a user can correct (:class:`~spin.core.errors.SpinError`) end the program with ``error: ...`` on stderr
    and exit code 1; ``SPIN_TRACEBACK=1`` shows where they were raised. Under torchrun rank 0 prints the whole text and
    the other ranks its first line. Ctrl-C ends it likewise, with exit code 130. Any other exception propagates.

    Args:
        model (type[ConfigT]): every key of the recipe's config; see :mod:`spin.config.schema`.

    Returns:
        Callable[[Callable[[ConfigT], int | None]], Callable[[], None]]: the decorator.
    """

    def decorate(recipe_main: Callable[[ConfigT], int | None]) -> Callable[[], None]:
        @functools.wraps(recipe_main)
        def wrapper() -> None:
            escape_unencodable_output()
            name, overrides = read_argv(sys.argv[1:], recipe_main.__globals__.get("__doc__"))
            warn_shadowed_recipe(recipe_main)
            try:
                code = recipe_main(read_config(Path(sys.argv[0]).stem, name, overrides, model))
            except (SpinError, InterpolationResolutionError, MissingMandatoryValue) as error:
                if show_traceback():
                    raise
                _print_error(str(error))
                sys.exit(1)
            except KeyboardInterrupt:
                if show_traceback():
                    raise
                _print_error("interrupted. The same command resumes from what was saved before.")
                sys.exit(130)
            sys.exit(code)

        wrapper.config_model = model  # type: ignore[attr-defined]  # for catalog.config_model
        return wrapper

    return decorate


def read_argv(argv: Sequence[str], description: str | None, prog: str | None = None) -> tuple[str, list[str]]:
    """The config and the overrides on a recipe's command line; ends the program for help and for wrong options."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        usage="%(prog)s --config NAME_OR_FILE [key=value ...] [~key ...]",
        epilog="Overrides are YAML: loss.beta=0.2, loss.beta=[0.1,0.2], validation_dataset=null. ~key removes a key.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a YAML file, or a packaged config such as lora")
    hint = "; options of torchrun, such as --nproc_per_node, stand before the recipe"
    arguments, overrides = parse_overrides(parser, argv, hint)
    return arguments.config, overrides


def read_config(
    recipe: str,
    name: str,
    overrides: Sequence[str],
    model: type[ConfigT],
    check: Callable[[DictConfig, type[ConfigT]], Any] = complete,
) -> Any:
    """What ``check`` makes of a config; its ConfigError says which config it is, and the command that is meant."""
    raw = load_config(name, overrides)
    try:
        return check(raw, model)
    except ConfigError as error:
        origin = f"{name} with overrides" if overrides else name
        hint = wrong_recipe_hint(name, raw, model) or _command_that_fills(recipe, name, overrides, str(error))
        raise ConfigError(f"{origin}: {error}{hint}") from error


def _command_that_fills(recipe: str, name: str, overrides: Sequence[str], faults: str) -> str:
    """A line with the command of a recipe that sets what the config leaves to be filled in, if anything."""
    filled = [f"{path}={example}" for path, (_, example) in TO_FILL.items() if f"{path}: not set" in faults]
    command = spin_command("run", recipe, "--config", name, *overrides, *filled)
    return f"\nFor example: {command}" if filled else ""


def _print_error(text: str) -> None:
    rank, text = os.environ.get("RANK", "0"), printable(text)
    told = f"error: {text}" if rank == "0" else f"error (rank {rank}): {text.splitlines()[0]}"
    print(told, file=sys.stderr, flush=True)
