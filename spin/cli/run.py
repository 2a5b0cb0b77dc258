"""``spin run``: starts a recipe, in this process or by torchrun in several; takes the arguments of ``tune run``."""

from __future__ import annotations

import ast
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from spin.cli import parser_of
from spin.config.catalog import find_recipe, named_model
from spin.config.complete import check_keys
from spin.config.follow import FROM_HF
from spin.config.parse import read_argv, read_config
from spin.config.schema import COMPONENT
from spin.core.command import spin_command
from spin.core.errors import ConfigError
from spin.model.hf_folder import check_local

_USAGE = "%(prog)s [--nproc_per_node N ...] RECIPE --config NAME_OR_FILE [key=value ...] [~key ...]"
_PROCESSES = "a number from 1, gpu for one process for each GPU, or cpu"
_TEXT = "Start a recipe. Options before its name are those of torchrun, which then starts the processes."


def main(argv: Sequence[str]) -> int | None:
    """Runs a recipe of this package by its name, or any by its file."""
    parser = parser_of("run", _TEXT, _USAGE)
    parser.add_argument("recipe", metavar="RECIPE", help="a name that `spin ls` shows, or a file")
    parser.add_argument("--config", metavar="NAME_OR_FILE", help="a packaged config, or a file; stands behind RECIPE")
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(argv)
    if argv[0].startswith("-"):
        return _run_processes(argv)
    recipe = _check(argv[0], argv[1:])
    # as `tune run`: packages of the user's own may lie in the folder; it is searched last
    sys.path += [folder for folder in (str(recipe.parent), os.getcwd()) if folder not in sys.path]
    sys.argv = [str(recipe), *argv[1:]]
    runpy.run_path(str(recipe), run_name="__main__")
    return None


def _check(name: str, arguments: Sequence[str]) -> Path:
    """The recipe's file. Help, what is not there, faults of the config's keys and of the model folder's config.json end
    here, before torch is loaded."""
    recipe = find_recipe(name)
    model = named_model(recipe)
    if model is not None:
        description = ast.get_docstring(ast.parse(recipe.read_bytes()))
        config, overrides = read_argv(arguments, description, spin_command("run", name))
        section = read_config(name, config, overrides, model, check_keys).get("model") or {}
        folder = section.get("path") if section.get(COMPONENT) == FROM_HF else None
        if folder:
            check_local(folder)
    return recipe


def _run_processes(argv: Sequence[str]) -> int:
    """torchrun's agent in this process; its children are ``spin run RECIPE ...``."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import determine_local_world_size, get_args_parser, run

    parser = get_args_parser()
    parser.prog, parser.usage = spin_command("run"), _USAGE
    arguments = parser.parse_args(list(argv))
    _check(arguments.training_script, arguments.training_script_args)
    own = ["-u", "-m", "spin", "run", arguments.training_script]
    arguments.training_script_args = [*own, *arguments.training_script_args]
    arguments.training_script, arguments.no_python = sys.executable, True
    if arguments.nnodes in ("1", "1:1") and not arguments.rdzv_endpoint and arguments.master_port is None:
        arguments.standalone = True  # a free port, so that several runs share a host
    try:
        processes = determine_local_world_size(arguments.nproc_per_node)
    except ValueError as error:
        problem = f"{error}".rstrip(".")
        raise ConfigError(f"--nproc_per_node {arguments.nproc_per_node}: {problem}. Expected {_PROCESSES}.") from error
    if processes < 1:
        raise ConfigError(f"--nproc_per_node {arguments.nproc_per_node}: expected {_PROCESSES}.")
    if processes > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own choice, which it would print a banner for
    try:
        run(arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:  # whose rank has printed why
        rank, failure = error.get_first_failure()
        print(f"error: rank {rank} ended first, with exit code {failure.exitcode}; see above.", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0
