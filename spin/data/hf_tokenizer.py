"""The files of a Hugging Face tokenizer's folder: loaded, and named where they are broken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spin.core.errors import DataError
from spin.core.files import read_bytes, read_json

_ANY_VOCABULARY = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_MAX_TEMPLATE_BYTES = 1 << 20


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    return read_json(path, DataError, "Download the model again.") if path.exists() else {}


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise DataError(
            f"tokenizer.path={path} is no folder. Download the model first (hf download ORG/NAME --local-dir FOLDER) "
            "and name the folder with tokenizer.json or tokenizer.model."
        )
    for file in (path / "chat_template.jinja", *path.glob("chat_templates/*.jinja")):
        if file.is_file():
            _read_jinja(file, str(file))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        read_tokenizer_json(path / name)  # the tokenizers library says only that "data did not match"
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)  # nosec B615
    except Exception as error:  # the tokenizers library raises no narrower one, of a regex say
        if not any(each for pattern in _ANY_VOCABULARY for each in path.glob(pattern)):
            fault = (
                f"tokenizer.path={path}: no tokenizer is here. Name the model's folder, with tokenizer.json or "
                "tokenizer.model; of a run that is iteration_NNN/hf_model."
            )
        elif regex := next(_bad_regexes(read_tokenizer_json(path / "tokenizer.json"), ""), None):
            fault = f"{path / 'tokenizer.json'}: {regex}. Correct it, or take another tokenizer."
        else:
            fault = f"No tokenizer can be loaded from {_damaged_file(path)}: {type(error).__name__}: {error}"
        raise DataError(fault) from error


def _damaged_file(path: Path) -> Path:
    """Which of a folder's files no tokenizer can be made from; the folder itself if it has no tokenizer.json."""
    from tokenizers import Tokenizer

    if not (path / "tokenizer.json").is_file():
        return path
    try:
        Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception:  # the library raises no narrower one
        return path / "tokenizer.json"
    return path / "tokenizer_config.json"


def _bad_regexes(value: Any, key: str) -> Iterator[str]:
    """Key, pattern and fault of each regular expression in tokenizer.json that does not compile."""
    from tokenizers import Regex

    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _bad_regexes(item, f"{key}[{index}]")
    for name, item in value.items() if isinstance(value, dict) else ():
        where = f"{key}.{name}".lstrip(".")
        if name == "Regex" and isinstance(item, str):
            try:
                Regex(item)
            except Exception as error:  # the library has no narrower one
                yield f"{where} is {item!r}, no valid regular expression ({error})"
        elif where != "model":  # a vocabulary
            yield from _bad_regexes(item, where)


def folder_templates(tokenizer: Any, path: Path) -> dict[str, str]:
    """The folder's chat templates by name; one alone is ``default``."""
    found = tokenizer.chat_template
    if not found:
        return {}
    named = found if isinstance(found, dict) else {"default": found}
    for name, text in named.items():
        if not isinstance(text, str):
            raise DataError(
                f"{path / 'tokenizer_config.json'}: chat_template ({name}) is {text!r:.60}, expected a Jinja text. Fix "
                "it, or set tokenizer.chat_template."
            )
    return named


def read_template(template: str, named: Iterable[str] = ()) -> str:
    # A template is recognised by its braces, since a path hardly has two in a row.
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        known = f"; the folder's named templates are {', '.join(named)}" if named else ""
        raise DataError(
            f"tokenizer.chat_template={template} is neither a file nor a Jinja template (no '{{{{' or '{{%' in it)"
            f"{known}."
        )
    return _read_jinja(path, f"tokenizer.chat_template={template}")


def _read_jinja(file: Path, label: str) -> str:
    content = read_bytes(file, DataError, "Name a Jinja file.", max_bytes=_MAX_TEMPLATE_BYTES)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{label}: not UTF-8 text ({error}). Save it as UTF-8.") from error
