"""Checkpoints that hold the adapters alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from spin.checkpoint.peft import export_peft
from spin.checkpoint.states import SPINCheckpointer
from spin.core.errors import CheckpointError
from spin.core.ranks import World
from spin.model.fingerprint import weights_fingerprint


class LoRACheckpointer(SPINCheckpointer):
    """Loads the base, saves and resumes adapters, exports both adapter and merged model.

    A state holds the adapter and its optimizer. The base is read from ``checkpoint_dir`` again, and must be the same.

    Args:
        checkpoint_dir (str): Hugging Face folder of the base.
        model_type (str): layout of its weights, a name of torchtune's ``ModelType`` such as ``LLAMA3_2``.
        output_dir (str): states go to ``checkpoints/`` in it, exports to ``iteration_NNN/``: ``hf_model`` and
            ``adapter``.
        keep_last (int): number of newest states to keep, at least 1.
        keep_best (int): number of states of lowest validation loss to keep beside them.
        export_dtype (str): of the merged model: ``bf16``, ``fp32`` or ``fp16``; the adapter keeps its own.
        export_merged (bool): write the merged model after each iteration, beside the adapter.
        async_save (bool): write states while training goes on. Costs as much CPU memory as a rank's part of a state.
        keep_exports (int | None): number of newest iterations whose exports to keep; None keeps all.

    Raises:
        ConfigError: If an argument cannot be.
    """

    adapters_only = True

    def __init__(
        self,
        checkpoint_dir: str,
        model_type: str,
        output_dir: str,
        keep_last: int = 2,
        keep_best: int = 0,
        export_dtype: str = "bf16",
        export_merged: bool = True,
        async_save: bool = True,
        keep_exports: int | None = None,
    ) -> None:
        super().__init__(
            checkpoint_dir, model_type, output_dir, keep_last, keep_best, export_dtype, async_save, keep_exports
        )
        self.export_merged = export_merged
        self._base = ""

    def _disk_bytes(self, parameters: int) -> tuple[int, int, int]:
        # adapters are a few per cent of the base at most
        merged = parameters * self.export_dtype.itemsize if self.export_merged else 0
        return 0, parameters * 12 // 50, merged

    def load_model(self, model: nn.Module, world: World) -> None:
        """Fills the frozen base from ``checkpoint_dir``, and notes what it is; adapters are left as they are."""
        super().load_model(model, world)
        self._base = weights_fingerprint(model, frozen_only=True)

    def save(self, *, state: dict[str, Any], **arguments: Any) -> Path:
        """Saves adapter and optimizer, and the fingerprint of the base; see :meth:`SPINCheckpointer.save`."""
        return super().save(state=state | {"base": self._base}, **arguments)

    def load(self, path: str | Path, **arguments: Any) -> None:
        """Restores an adapter onto the base that it was trained on; see :meth:`SPINCheckpointer.load`.

        Args:
            path (str | Path): a state's folder.
            **arguments (Any): see :meth:`SPINCheckpointer.load`; the model gets its base here too.

        Raises:
            CheckpointError: If the base is another one, or see :meth:`SPINCheckpointer.load`.
        """
        if not self._base:
            self.load_model(arguments["model"], arguments["world"])
        saved = self.read_state(path).get("base")
        if saved != self._base:
            raise CheckpointError(
                f"{path}: the adapter was trained on another base than {self.checkpoint_dir} gives (fingerprint "
                f"{str(saved)[:12]}, found {self._base[:12]}): other weights, or another base_dtype. Restore them."
            )
        super().load(path, **arguments)

    def export(
        self,
        model: nn.Module,
        iteration: int,
        world: World,
        tokenizer: object = None,
        stop_ids: Sequence[int] = (),
    ) -> Path:
        """Writes the adapter for peft, and the merged model; waits for a state being written. Collective.

        Args:
            model (nn.Module): sharded or plain.
            iteration (int): counted from 0, in the folder's name.
            world (World): the ranks.
            tokenizer (object): see :meth:`spin.checkpoint.SPINCheckpointer.export`.
            stop_ids (Sequence[int]): see :meth:`spin.checkpoint.SPINCheckpointer.export`.

        Returns:
            Path: ``output_dir/iteration_NNN/hf_model``, or ``adapter`` beside it without ``export_merged``.
        """
        self.wait()
        out_dir = self.output_dir / f"iteration_{iteration:03d}" / "adapter"
        companions = self._companions(tokenizer, stop_ids)
        export_peft(model, self.checkpoint_dir, out_dir, self.model_type, world=world, **companions)
        if self.export_merged:
            return super().export(model, iteration, world, tokenizer, stop_ids)
        self._retire_exports(iteration, world)
        return out_dir
