"""A repository on huggingface.co that a model is uploaded to."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from spin.core.errors import ConfigError, OutputError
from spin.core.hub import hub_errors, is_hub_name
from spin.core.terminal import printable


class Repository:
    """What is known of it before anything is sent.

    Args:
        name (str): ``ORG/NAME``.
        public (bool): whether everybody may read it; one that is public already asks for True.

    Raises:
        ConfigError: If the name is none, or ``HF_TOKEN`` is not set.
        OutputError: If huggingface.co cannot be reached, refuses the token, or the repository is public unasked.
    """

    def __init__(self, name: str, public: bool) -> None:
        self.name, self._public, self._held = name, public, list[str]()
        if not is_hub_name(name):
            raise ConfigError(f"--push {name}: expected ORG/NAME, a user or organization and the model's name.")
        token = os.environ.get("HF_TOKEN")
        if not token:
            raise ConfigError(
                "HF_TOKEN is not set. Put an access token that may write into this environment variable "
                "(huggingface.co, Settings, Access Tokens)."
            )
        self._api = HfApi(token=token)
        with self._errors("look it up"):
            try:
                found = self._api.model_info(name)
            except RepositoryNotFoundError:
                self._state = f"a new {'public' if public else 'private'} repository"
                return
        self._held = [each.rfilename for each in found.siblings or []]
        self._state = f"a {'private' if found.private else 'public'} repository that exists"
        if not found.private and not public:
            raise OutputError(f"{name} is public on huggingface.co. If everybody may read the model, add --public.")

    def upload(
        self, folder: Path, names: Sequence[str], texts: Mapping[str, str], message: str, confirmed: bool
    ) -> str:
        """Shows what would be done and does it if that is confirmed, in one commit.

        Weights of another export that the repository holds are deleted, since they would be loaded with the new ones.

        Args:
            folder (Path): where the files are.
            names (Sequence[str]): the files.
            texts (Mapping[str, str]): of those of them that are published with another content.
            message (str): of the commit.
            confirmed (bool): do not ask.

        Returns:
            str: address of the model's page.

        Raises:
            OutputError: If it is not confirmed, or the upload fails.
        """
        stale = [
            held
            for held in self._held
            if held.endswith((".safetensors", ".safetensors.index.json")) and held not in names
        ]
        sizes = [(folder / name).stat().st_size for name in names]
        print(f"Upload to {self.name}, {self._state} on {self._api.endpoint}:")
        for name, size in zip(names, sizes, strict=True):
            print(printable(f"  {size / 1e6:12,.3f} MB  {name}"))
        for name in stale:
            print(printable(f"  {'delete':>15}  {name}"))
        print(f"  {sum(sizes) / 1e6:12,.3f} MB  in {len(names)} files", flush=True)
        if not confirmed and not (sys.stdin.isatty() and input("Upload? [y/N] ").strip().lower() in ("y", "yes")):
            raise OutputError("nothing was uploaded. Answer y, or add --yes.")
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, texts[name].encode() if name in texts else folder / name) for name in names),
            *map(CommitOperationDelete, stale),
        ]
        with self._errors("upload"):
            self._api.create_repo(self.name, private=not self._public, exist_ok=True)
            self._api.create_commit(self.name, operations, commit_message=message)
        return f"{self._api.endpoint}/{self.name}"

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except hub_errors() as error:
            cause = f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
            raise OutputError(
                f"--push {self.name}: cannot {what} ({cause}). Check the network, that HF_HUB_OFFLINE is not set, and "
                f"that HF_TOKEN may write to {self.name}."
            ) from error
