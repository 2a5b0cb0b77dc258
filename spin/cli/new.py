"""``spin new``; the config is drafted in :mod:`spin.cli.draft`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from spin.cli import parser_of
from spin.config.complete import check_keys
from spin.config.files import parse_overrides, with_overrides
from spin.config.schema import SPINConfig
from spin.core.command import spin_command
from spin.core.errors import ConfigError
from spin.core.files import atomic_write, check_new_file
from spin.core.hub import is_hub_name
from spin.core.terminal import printable, some_of
from spin.data.rows import kind_of
from spin.data.sources import read_rows
from spin.model.hf_folder import check_local


def main(argv: Sequence[str]) -> None:
    """Writes a config for a model and a data set."""
    usage = (
        "%(prog)s --model FOLDER_OR_NAME --data SOURCE [--lora|--qlora] [--out FILE] [--gpus N] [--force] "
        "[key=value ...]"
    )
    parser = parser_of("new", "Write a config for a model and data of yours, sized for this machine.", usage)
    parser.epilog = (
        "What you set by key=value is written and not chosen: dataset.split=train_sft, output_dir=/data/run."
    )
    parser.add_argument("--model", required=True, help="a Hugging Face folder, or a name on huggingface.co")
    parser.add_argument("--data", required=True, help="prompts with responses: a file, glob, folder or data set's name")
    method = parser.add_mutually_exclusive_group()
    for name, text in (("lora", "adapters over a frozen base"), ("qlora", "adapters over a base in 4 bits")):
        method.add_argument(f"--{name}", dest="method", action="store_const", const=name, help=f"train {text}")
    parser.add_argument("--out", type=Path, default=Path("my.yaml"), help="the file to write (default: my.yaml)")
    parser.add_argument("--gpus", type=int, help="how many to use; default: all; 0: the CPU")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    arguments, overrides = parse_overrides(parser, argv)
    if more := [each for each in overrides if _is_source(each)]:
        raise ConfigError(f"--data takes one source; there are {several_files([arguments.data, *more])}")
    out: Path = arguments.out
    check_new_file(out, "Choose another name by --out, or give --force to replace it.", arguments.force)
    given = {"model": {"path": arguments.model}, "dataset": {"source": arguments.data}}
    dataset = check_keys(with_overrides(OmegaConf.create(given), overrides), SPINConfig)["dataset"]
    check_local(arguments.model)
    if not is_hub_name(arguments.data.removeprefix("hf:")):
        next(read_rows(arguments.data, **{key: dataset.get(key) for key in ("split", "name", "data_dir")}))
    from spin.cli.draft import Machine, draft  # load torch, for whose sake the above is checked first

    machine = Machine.here(arguments.gpus)
    text, report = draft(arguments, machine, overrides)
    with atomic_write(out, "xb") as stream:
        stream.write(text.encode())
    ranks = ("--nproc_per_node", machine.ranks) if machine.ranks > 1 else ()
    report += [f"written   {out}, for {machine.name}", f"next      {spin_command('validate', out)}"]
    sft, spin = (spin_command("run", *ranks, recipe, "--config", out) for recipe in ("spin_sft", "spin_recipe"))
    report += [f"          {sft}    # unless the model was fine-tuned on this data", f"          {spin}"]
    print(printable("\n".join(report)))


def several_files(sources: Sequence[str]) -> str:
    """Which they are, and what to do with them where one is expected."""
    kinds, folders = {kind_of(Path(source)) for source in sources}, {Path(source).parent for source in sources}
    shown = some_of(sources, 3)
    if len(kinds) > 1 or not all(kinds):
        return f"{shown}. Give one of them, and add the others to the config with spin.data.mixed_prompt_dataset."
    folder = folders.pop() if len(folders) == 1 else Path("FOLDER")
    return f"{shown}. Name the folder that they are in, or a pattern in quotes: '{folder / f'*{kinds.pop()}'}'."


def _is_source(word: str) -> bool:
    """Whether a word among the overrides is a file or a data set's name, as where a shell has expanded a pattern."""
    return os.path.exists(word) or ("=" not in word and bool(kind_of(Path(word)) or "/" in word))
