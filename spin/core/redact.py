"""Secrets in configs: what looks like one stands in the config.yaml of a run, which its owner alone reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"

_SECRET_KEY = re.compile(
    r"(^|[_\-.])(api_?key|access_?key|private_?key|token|secret|passw(or)?d|passphrase|credentials?|auth|authorization"
    r"|bearer|cookie)$",
    flags=re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE", flags=re.IGNORECASE)
_IN_URL = re.compile(
    r"(?<=://)[^/@\s]+(?=@)|(?<=[?&])((?:key|api_?key|access_token|token|sig|signature|secret|password)=)[^&\s]+"
)
_LEAST = 6  # characters; shorter texts occur by chance

_known: set[str] = set()


def is_secret_key(key: str) -> bool:
    """Whether the name of a config's key says that its value is a secret."""
    return _SECRET_KEY.search(key) is not None


def is_secret_variable(name: str) -> bool:
    """Whether the name of an environment variable says that its value is a secret."""
    return _SECRET_VARIABLE.search(name) is not None


def remember(value: Any) -> None:
    """Registers a secret for :func:`hide`."""
    if isinstance(value, str) and len(value) >= _LEAST:
        _known.add(value)


def hide(text: str) -> str:
    """A text with ``***`` in place of the secrets that the configs of this process have."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def redacted(value: Any) -> Any:
    """A copy of a config (plain containers) without the values of keys that look like secrets, and passwords in URLs.

    References to the environment stay: ``${oc.env:KEY}`` gives nothing away.
    """
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if is_secret_key(str(key)) and _holds_one(item) else redacted(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return _IN_URL.sub(lambda match: (match[1] or "") + HIDDEN, value) if isinstance(value, str) else value


def _holds_one(value: Any) -> bool:
    return value not in (None, "") and not (isinstance(value, str) and "${" in value)
