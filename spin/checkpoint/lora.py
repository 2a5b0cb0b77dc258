"""Checkpoints that hold the adapters alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from spin.checkpoint.checkpointer import SPINCheckpointer
from spin.checkpoint.peft import export_peft
from spin.core.errors import CheckpointError
from spin.core.ranks import World
from spin.model.fingerprint import weights_fingerprint


@dataclass(eq=False)
class LoRACheckpointer(SPINCheckpointer):
    """Loads the base, saves and resumes adapters, exports both adapter (in its own dtype) and merged model.

    A checkpoint holds the adapter and its optimizer. The base is read from ``checkpoint_dir`` again, and must be the
    same. All other arguments are those of :class:`SPINCheckpointer`.

    Args:
        export_merged (bool): write the merged model after each iteration, next to the adapter.
    """

    adapters_only = True

    export_merged: bool = True
    _base: str = field(default="", init=False)

    def _disk_bytes(self, parameters: int) -> tuple[int, int, int]:
        # adapters are a few per cent of the base at most
        return 0, parameters * 12 // 50, super()._disk_bytes(parameters)[2] if self.export_merged else 0

    def load_model(self, model: nn.Module, world: World) -> None:
        """Fills the frozen base from ``checkpoint_dir``, and notes what it is; adapters are left as they are."""
        super().load_model(model, world)
        self._base = weights_fingerprint(model, frozen_only=True)

    def save(self, *, state: dict[str, Any], **arguments: Any) -> Path:
        """Saves adapter and optimizer, and the fingerprint of the base; see :meth:`SPINCheckpointer.save`."""
        return super().save(state=state | {"base": self._base}, **arguments)

    def load(self, path: str | Path, **arguments: Any) -> None:
        """Restores an adapter onto the base that it was trained on, which is loaded too if it is not yet."""
        if not self._base:
            self.load_model(arguments["model"], arguments["world"])
        saved = self.read_state(path).get("base")
        if saved != self._base:
            raise CheckpointError(
                f"{path}: the adapter was trained on another base than {self.checkpoint_dir} gives (fingerprint "
                f"{str(saved)[:12]}, found {self._base[:12]}): other weights, or another base_dtype. Restore them."
            )
        super().load(path, **arguments)

    def _export(self, model: nn.Module, folder: Path, world: World, companions: dict[str, Any]) -> Path:
        source, out_dir = self.checkpoint_dir, folder / "adapter"
        export_peft(model, source, out_dir, self.model_type, world=world, **companions)
        return super()._export(model, folder, world, companions) if self.export_merged else out_dir
