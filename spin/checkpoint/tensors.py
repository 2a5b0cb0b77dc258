"""The tensors of a checkpoint, in torch.distributed.checkpoint's sharded format, without anything that can run code.

Tensors are read with ``weights_only=True``, and the one pickle that the format has (``.metadata``) by an unpickler that
knows a dozen harmless classes.
"""

from __future__ import annotations

import pickle  # nosec B403
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from spin.checkpoint.manifest import METADATA
from spin.core.dtypes import DTYPES
from spin.core.errors import CheckpointError
from spin.core.ranks import World
from spin.core.terminal import first_lines
from spin.model.sharding import clean_name, reshard


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model, by name: all but its frozen parameters."""
    reshard(model)
    frozen = {clean_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    named = {clean_name(name): tensor for name, tensor in model.state_dict().items()}
    return {f"model.{name}": tensor for name, tensor in named.items() if name not in frozen}


def save_tensors(tensors: dict[str, torch.Tensor], folder: Path, world: World) -> None:
    """Writes each rank's shards. Collective."""
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), process_group=world.group)
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{folder}: cannot write ({_reasons(error)}). Is the disk full?") from error


def load_tensors(targets: dict[str, torch.Tensor], folder: Path, metadata: Metadata) -> None:
    """Fills tensors that :func:`check_targets` has checked. Collective."""
    try:
        dcp.load(targets, storage_reader=_Reader(folder, metadata))
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{folder}: cannot read ({_reasons(error)}).") from error


def _reasons(error: dcp.CheckpointException) -> str:
    return "; ".join(
        f"rank {rank}: {str(failure[0]) or type(failure[0]).__name__}"
        for rank, failure in sorted(error.failures.items())
    )


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that torch.distributed.checkpoint writes into ``.metadata``; none of them runs code."""

    _DCP = "torch.distributed.checkpoint."
    _KNOWN = {
        _DCP + "metadata": {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        _DCP + "filesystem": {"_StorageInfo"},
        "torch": {"Size"}
        | {str(dtype).removeprefix("torch.") for dtype in (*DTYPES.values(), torch.float64)}
        | {"bool", "int8", "int16", "int32", "int64", "uint8"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Looks a class up, if it is a known one."""
        if name not in self._KNOWN.get(module, ()):
            raise CheckpointError(
                f"asks for {module}.{name}, which no checkpoint holds. It may be an attack: loading it is refused."
            )
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """Names, shapes and dtypes of a checkpoint's tensors, and where they are."""
    file = folder / METADATA
    try:
        with open(file, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise TypeError(f"a {type(metadata).__name__}, not the metadata of a checkpoint")
        # Anything but a tensor would be unpickled without restriction when it is loaded.
        entries = metadata.state_dict_metadata.items()
        others = [str(name) for name, entry in entries if not isinstance(entry, TensorStorageMetadata)]
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except Exception as error:  # noqa: BLE001 - broken pickles raise anything, MemoryError among it
        raise CheckpointError(f"{file}: damaged ({error}). Resume from another checkpoint.") from error
    if others:
        raise CheckpointError(
            f"{file}: {', '.join(others[:5])} are not tensors. It may be an attack: loading is refused."
        )
    return metadata


class _Reader(dcp.FileSystemReader):
    """Reads tensors with the metadata that the restricted unpickler has read."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, without opening the file again."""
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


def check_targets(targets: dict[str, torch.Tensor], metadata: Metadata, folder: Path) -> None:
    """Refuses tensors whose names or shapes are not the saved ones, with every difference."""
    saved: dict[str, Any] = metadata.state_dict_metadata
    faults = [f"the checkpoint has no {name}" for name in targets.keys() - saved.keys()]
    faults += [f"the model has no {name}" for name in saved.keys() - targets.keys() if name.startswith("model.")]
    faults += [
        f"{name} is {list(saved[name].size)}, the model needs {list(tensor.shape)}"
        for name, tensor in targets.items()
        if name in saved and saved[name].size != tensor.shape
    ]
    if faults:
        lines = "\n  ".join(first_lines(sorted(faults), 20))
        raise CheckpointError(f"{folder} does not fit the config's model:\n  {lines}")
