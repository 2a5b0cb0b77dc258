"""Training adapters over a frozen base: what the LoRA recipe does that the full one does not.

During a run nothing is merged and there is no second model: the opponent of an iteration is the base with the adapter
as it is at the iteration's start, and generation and the reference pass run with just that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from spin.adapters import adapted_modules, adapter_parameters, nf4_of, patch_dora, patch_nf4
from spin.checkpoint import SPINCheckpointer
from spin.config import Faults
from spin.distributed import World, clean_name
from spin.dtypes import TRAINED_DTYPES
from spin.errors import CheckpointError, ConfigError
from spin.fingerprint import weights_fingerprint
from spin.peft import export_peft


def check_lora(cfg: DictConfig) -> None:
    """Checks what the LoRA recipe's config has beside or without the full recipe's.

    Args:
        cfg (DictConfig): complete.

    Raises:
        ConfigError: If anything cannot work, with every fault in a line of its own.
    """
    faults = Faults()
    if cfg.base_dtype not in TRAINED_DTYPES:
        faults.add(f"base_dtype={cfg.base_dtype!r}: expected {' or '.join(TRAINED_DTYPES)}, of the frozen weights.")
    if cfg.enable_float8_training:
        faults.add("enable_float8_training=true: adapters and their frozen base do not multiply in float8. Set false.")
    if cfg.model.get("lora_dropout"):
        faults.add(
            f"model.lora_dropout={cfg.model.lora_dropout}: policy and opponent would drop different weights, and the "
            "first loss of an iteration would not be that of two equal models. Set 0."
        )
    if cfg.model.get("apply_lora_to_output"):
        faults.add("model.apply_lora_to_output=true: the fused head takes a plain weight. Set false.")
    if cfg.replicas > 1 and cfg.model.get("quantize_base"):
        faults.add(f"replicas={cfg.replicas} with an NF4 base: torchao gathers NF4 in one dimension only. Set 1.")
    if cfg.fsdp_cpu_offload and cfg.model.get("quantize_base"):
        faults.add("fsdp_cpu_offload=true with an NF4 base is not supported: it is small already. Set false.")
    faults.raise_if_any()


def prepare_adapters(model: nn.Module, dtype: torch.dtype, world: World) -> str:
    """Freezes all but the adapters, which get a dtype of their own.

    Args:
        model (nn.Module): from :func:`spin.models.build_model`, on the meta device.
        dtype (torch.dtype): of the adapters' master weights.
        world (World): the ranks, among which NF4 weights are split by whole blocks.

    Returns:
        str: one line for the log that says how much is trained.

    Raises:
        ConfigError: If the model has no adapter, or one that cannot be trained.
    """
    adapted = adapted_modules(model)
    if not adapted:
        raise ConfigError(
            f"model: {type(model).__name__} has no adapter. Name one of torchtune's lora_* or qlora_* builders, e.g. "
            "torchtune.models.llama3_2.lora_llama3_2_1b, or use spin_recipe for full fine-tuning."
        )
    if "output" in adapted:
        raise ConfigError("model.apply_lora_to_output=true: the fused head takes a plain weight. Set false.")
    if any(isinstance(module.dropout, nn.Dropout) for module in adapted.values()):
        raise ConfigError("model: adapters with dropout would make policy and opponent differ. Set lora_dropout=0.")
    ranks = world.mesh.size(world.mesh.ndim - 1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        nf4 = nf4_of(parameter)
        if nf4 is not None and (parameter.shape[0] % ranks or nf4.quantization_factor.numel() % ranks):
            block = nf4.block_size * nf4.scaler_block_size
            raise ConfigError(
                f"{name} {list(parameter.shape)} has {parameter.numel() // block} NF4 blocks of {block} weights, which "
                f"{ranks} ranks cannot share evenly. Use another number of GPUs, or quantize_base=false."
            )
    for module in adapted.values():
        for parameter in adapter_parameters(module).values():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    patch_dora(model)
    patch_nf4(model)
    # torchtune's hook of NF4 models makes `state_dict` copy all weights to the CPU in bf16
    model._state_dict_hooks.clear()
    trained = sum(parameter.numel() for parameter in trainable(model))
    total = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"parameters: {trained:,} trainable ({trained / total:.2%}) in {len(adapted)} adapters, "
        f"{total - trained:,} frozen"
    )


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimizer updates."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def init_adapters(model: nn.Module, seed: int) -> None:
    """Adapters that change nothing yet: A uniform in +-1/sqrt(in), B and DoRA's magnitude (its change) zero.

    The numbers depend on the seed and the module's name only, not on the number of ranks. No collective.

    Args:
        model (nn.Module): after :func:`prepare_adapters`, with memory.
        seed (int): the run's seed.

    Source:
        LoRA (arXiv 2106.09685), section 4.1, with the bounds of its code and of torchtune's ``LoRALinear``.
    """
    for name, module in adapted_modules(model).items():
        for part, parameter in adapter_parameters(module).items():
            if part != "lora_a.weight":
                parameter.zero_()
                continue
            digest = hashlib.sha256(f"{seed} {clean_name(name)} {part}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            bound = 1 / math.sqrt(module.in_dim)
            whole = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator).to(parameter.device)
            if isinstance(parameter, DTensor):
                whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(whole)


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

    def load_start(self, model: nn.Module, world: World) -> None:
        """Adapters that change nothing: the base alone. Which numbers their other half has does not matter."""
        init_adapters(model, seed=0)

    def save_state(self, *, state: dict[str, Any], **arguments: Any) -> Path:
        """Saves adapter and optimizer, and the fingerprint of the base; see :meth:`SPINCheckpointer.save_state`."""
        return super().save_state(state=state | {"base": self._base}, **arguments)

    def load_state(self, path: str | Path, **arguments: Any) -> None:
        """Restores an adapter onto the base that it was trained on; see :meth:`SPINCheckpointer.load_state`.

        Args:
            path (str | Path): a state's folder.
            **arguments (Any): those of the full recipe; the model after :meth:`load_model`.

        Raises:
            CheckpointError: If the base is another one, or as in the full recipe.
        """
        saved = self.read_state(path).get("base")
        if saved != self._base:
            raise CheckpointError(
                f"{path}: the adapter was trained on another base than {self.checkpoint_dir} gives (fingerprint "
                f"{str(saved)[:12]}, found {self._base[:12]}): other weights, or another base_dtype. Restore them."
            )
        super().load_state(path, **arguments)

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
