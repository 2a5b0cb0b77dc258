"""Models on huggingface.co: the folder that a name stands for, and the name that a folder stands for."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from spin.core.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "tokenizer*", "vocab*", "merges.txt")
_OTHER_LAYOUTS = ("*/*", "consolidated*")


def model_folder(name: str, key: str) -> str:
    """The folder of a model: a local one as it is, else that of a name such as ``Qwen/Qwen3-4B``, which is downloaded.

    Without a network, or with ``HF_HUB_OFFLINE=1``, it is the one in the cache (``HF_HOME``). Of the processes of a
    host one downloads and the others find it in the cache.

    Args:
        name (str): what a config says.
        key (str): where it says so, for the message.

    Returns:
        str: the folder; what is neither a folder nor a possible name is returned unchanged.

    Raises:
        ConfigError: If the name is unknown, gated, or neither in the cache nor to be had.
    """
    if os.path.exists(name) or not is_hub_name(name):
        return name
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import WeakFileLock

    alone = constants.HF_HUB_OFFLINE or os.environ.get("LOCAL_WORLD_SIZE", "1") == "1"
    locks = Path(constants.HF_HUB_CACHE) / ".locks"
    try:
        if not alone:
            locks.mkdir(parents=True, exist_ok=True)
        with nullcontext() if alone else WeakFileLock(locks / f"spin--{name.replace('/', '--')}.lock"):
            patterns: Any = {"allow_patterns": list(_FILES), "ignore_patterns": list(_OTHER_LAYOUTS)}
            folder: str = snapshot_download(name, **patterns)  # nosec B615 - nothing of it is run; the record has the commit
            return folder
    except hub_errors() as error:
        raise ConfigError(f"{key}: {name!r} is no folder here, and {_reason(error, name)}") from error


def _reason(error: Exception, name: str) -> str:
    """Why a model is not to be had from huggingface.co, and the remedy."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"the model is gated. Accept its licence on https://huggingface.co/{name} and set HF_TOKEN."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "huggingface.co has no model of this name, or a private one. Check the name, or set HF_TOKEN."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "it is not in the cache, and huggingface.co cannot be reached. Check the name and the network, or "
            f"download it elsewhere: `hf download {name}`."
        )
    return f"its download failed ({type(error).__name__}: {' '.join(str(error).split()):.120})."


def is_hub_name(text: str) -> bool:
    """Whether a text has the form ``ORG/NAME``."""
    return _NAME.fullmatch(text) is not None


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises: its own errors, and those of the HTTP library that its version is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    of_library = [each for each in HfHubHTTPError.__mro__ if each.__name__ in ("HTTPError", "RequestException")]
    return (OSError, ValueError, *of_library)


def hub_name(folder: str | Path) -> str | None:
    """The name of the model whose folder in the cache of huggingface_hub this is, or None."""
    parts = Path(folder).parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return None
    return parts[-3].removeprefix("models--").replace("--", "/", 1)
