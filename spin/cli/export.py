"""``spin export``: a Hugging Face folder that says where it comes from, and its upload."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from spin.cli import parser_of
from spin.core.errors import OutputError
from spin.core.files import MARKER, as_output_error, atomic_dir, check_can_be_made, read_json, replace_text, sync
from spin.core.hub import hub_name, is_hub_name
from spin.core.terminal import printable
from spin.model.hf_folder import ADAPTER_CONFIG


def main(argv: Sequence[str]) -> None:
    """Adds a model card to an iteration's model, or copies both elsewhere."""
    text = (
        "Write a model card (README.md) next to an iteration's Hugging Face model; with --out copy both, with --push "
        "upload both to huggingface.co."
    )
    parser = parser_of("export", text)
    parser.add_argument("run", type=Path, help="output_dir of the run")
    parser.add_argument("--iteration", type=int, metavar="N", help="counted from 0; default: the last that is finished")
    parser.add_argument("--adapter", action="store_true", help="a LoRA run's adapter, not the merged model")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder for the copy")
    parser.add_argument("--base-model", metavar="ID", help="Hugging Face id of the model that training started from")
    parser.add_argument("--license", metavar="ID", help="of the exported model, which its base's and data's allow")
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="upload to this repository, after showing what; see HF_TOKEN"
    )
    parser.add_argument("--public", action="store_true", help="everybody may read it; without this it is private")
    parser.add_argument("--yes", action="store_true", help="upload without asking")
    arguments = parser.parse_args(argv)
    if arguments.push is None and (arguments.public or arguments.yes):
        parser.error("--public and --yes go with --push")
    from spin.cli.push import Repository  # loads huggingface_hub

    repository = None if arguments.push is None else Repository(arguments.push, arguments.public)
    from spin.cli.card import model_card  # loads torch
    from spin.run.folder import exported_model

    run: Path = arguments.run
    iteration, source = exported_model(run, arguments.iteration, arguments.adapter)
    files = _files_of(source, run)
    card = model_card(run, iteration, source, arguments.base_model, arguments.license, arguments.push)
    texts = {"README.md": card, **_with_base_named(files, arguments.base_model, arguments.push)}
    if arguments.out is None:
        replace_text(source / "README.md", card)
    else:
        _copy(files, texts, arguments.out)
    folder = arguments.out or source
    print(printable(folder))
    if repository is not None:
        names = sorted({"README.md", *(file.name for file in files)})
        print(repository.upload(folder, names, texts, f"SPIN, iteration {iteration}", arguments.yes))


def _with_base_named(files: Sequence[Path], base: str | None, push: str | None) -> dict[str, str]:
    """The texts of the JSON files that name the base by a folder of this machine, with its name on huggingface.co."""
    found = {}
    for file in (file for file in files if file.name in ("config.json", "tokenizer_config.json", ADAPTER_CONFIG)):
        content = read_json(file, OutputError, "Export another iteration.")
        local = {key: str(value) for key, value in content.items() if key.endswith("name_or_path") and value}
        local = {key: value for key, value in local.items() if not is_hub_name(value)}
        for key, folder in local.items():
            name = base or hub_name(folder)
            if push and not name and file.name == ADAPTER_CONFIG:
                raise OutputError(
                    f"{file}: the adapter's base is a folder of this machine, {folder}. --base-model ORG/NAME says "
                    "which model on huggingface.co that is."
                )
            content[key] = name or (Path(folder).name if push else folder)
        if local:
            found[file.name] = json.dumps(content, indent=2) + "\n"
    return found


def _copy(files: Sequence[Path], texts: Mapping[str, str], out: Path) -> None:
    if out.exists():
        raise OutputError(f"{out}: is there already. Give --out a folder that is not.")
    with as_output_error(out):
        size, free = sum(file.stat().st_size for file in files), shutil.disk_usage(check_can_be_made(out, "--out")).free
        if size > free:
            raise OutputError(f"{out}: needs {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free. Make room.")
        with atomic_dir(out, "copy of a model") as part:
            for file in files:
                shutil.copyfile(file, part / file.name)
            for name, text in texts.items():
                (part / name).write_text(text, encoding="utf-8")
            for file in part.iterdir():
                sync(file)


def _files_of(model: Path, run: Path) -> list[Path]:
    """The files of an exported model. None is a link out of the run, whose target would be published or written to."""
    from safetensors import SafetensorError, safe_open

    files = [file for file in sorted(model.iterdir()) if file.is_file() and file.name != MARKER]
    for path in (model, *files):
        if run.resolve() not in path.resolve().parents:
            raise OutputError(
                f"{path}: a link to {path.resolve()}, outside the run's folder. If that is meant, put a "
                "copy in its place."
            )
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                raise OutputError(
                    f"{file}: not a complete safetensors file ({error}); export another iteration."
                ) from error
    return files
