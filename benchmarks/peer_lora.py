"""The arms of LoRA: adapters of one rank on the same weights of a frozen base, in bf16 on a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from arms import ARMS
from omegaconf import OmegaConf
from peer_arms import Ours, Peer, PeerBench, Torchtune, torchtune_recipe
from peer_trl import TRL, TRLTuned
from safetensors.torch import load_file
from torch import nn
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.modules.peft import disable_adapter
from work import llama_config

from spin.checkpoint.peft import export_peft
from spin.model.build import build_model
from spin.model.lora import prepare_adapters
from spin.model.sharding import clean_name, local_tensor, materialize, shard_model

# of benchmarks/configs/llama3_1_8B_lora.yaml
ADAPTERS = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_rank": 16,
    "lora_alpha": 32,
}
PEFT_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoRABench(PeerBench):
    """The benchmark with adapted models; adapters are fp32, and not zero, so that all their gradients count.

    Args:
        args (Any): of the command line.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.weight_dtype = self.compute_dtype

    def _build(self, dtype: torch.dtype | None = None) -> nn.Module:
        package, name = self.preset.builder["_component_"].rsplit(".", 1)
        builder = {**self.preset.builder, **ADAPTERS, "_component_": f"{package}.lora_{name}"}
        model = build_model(OmegaConf.create(builder), dtype or self.compute_dtype)
        prepare_adapters(model, torch.float32, self.world)
        return model

    def plain(self, seed: int, dtype: torch.dtype, checkpointing: bool = False) -> nn.Module:
        """torchtune's own adapted model with the weights of the product's.

        Args:
            seed (int): unused: the base is the opponent of its adapters.
            dtype (torch.dtype): of the base and of what it computes.
            checkpointing (bool): make activations again in backward.

        Returns:
            nn.Module: a new one.
        """
        model, source = self._build(dtype), self.model("compiled")
        if checkpointing:
            training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        shard_model(model, self.world, compute_dtype=dtype)
        materialize(model, self.world)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), source.parameters(), strict=True):
                local_tensor(parameter).copy_(local_tensor(value))
        return model

    def twin_weights(self, source: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
        """The base alone."""
        named = ((clean_name(name), local_tensor(parameter.detach())) for name, parameter in source.named_parameters())
        return ((name, tensor) for name, tensor in named if ".lora_" not in name)

    @contextmanager
    def opponent(self) -> Iterator[nn.Module]:
        """The base, computing in fp32."""
        model = self.exact()
        with disable_adapter(model):
            yield model


class OursLoRA(Ours):
    """The product as benchmarks/configs/llama3_1_8B_lora.yaml has it."""

    title = "this project, LoRA"
    arm = ARMS["compiled"]


class TorchtuneLoRA(Torchtune):
    """torchtune's single-device recipe: the adapters are switched off for the reference.

    Four pairs, activation checkpointing and offloading are what its config has; the rank and the adapted modules are
    those of all arms.
    """

    title = "torchtune 0.6.1, LoRA DPO on one device as it is"

    def __init__(self, bench: PeerBench) -> None:
        super().__init__(bench)
        recipe = torchtune_recipe("lora_dpo_single_device").LoRADPORecipeSingleDevice
        self._forward: Callable[..., Any] = recipe.concatenated_forward

    @contextmanager
    def ready(self) -> Iterator[None]:
        policy = self.bench.plain(0, self.bench.compute_dtype, checkpointing=True)
        self._models.append(policy)
        offloading = training.get_act_offloading_ctx_manager(policy, True) if self.bench.on_gpu else nullcontext()
        self._recipe = SimpleNamespace(_device=self.bench.world.device, activations_handling_ctx=offloading)
        try:
            yield
        finally:
            self._models.clear()
            self._recipe = SimpleNamespace()

    def piece_loss(self, piece: Any) -> torch.Tensor:
        real, generated, *logits = self._forward(self._recipe, self.policy, piece)
        for tensor in logits:
            tensor.detach().mean()  # which the recipe logs
        del tensor, logits
        with torch.no_grad(), disable_adapter(self.policy):
            reference = self._forward(self._recipe, self.policy, piece)[:2]
        return self._loss(real, generated, *reference)[0].sum()


class AdaptedTRL(TRL):
    """TRL with adapters of the peft library."""

    packages = (*TRL.packages, "peft")
    # the base is the reference; precomputing would hash all its weights before each trainer's start
    options: dict[str, Any] = {**TRL.options, "precompute_ref_log_probs": False}
    title = "TRL DPOTrainer with peft, default"

    def trainer(self, dataset: Any, **options: Any) -> Any:
        import peft.tuners.lora.torchao

        # it refuses every torchao that torchtune 0.6.1 works with, though nothing here is quantized by torchao
        peft.tuners.lora.torchao.is_torchao_available = lambda: False
        config = peft.LoraConfig(
            r=ADAPTERS["lora_rank"], lora_alpha=ADAPTERS["lora_alpha"], target_modules=PEFT_MODULES
        )
        trainer = super().trainer(dataset, peft_config=config, **options)
        trainer.precompute_ref_logps = True  # the log-probs are in the data
        self.model = trainer.model
        copy_adapters(self.bench, trainer.model)
        return trainer

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class AdaptedTRLTuned(AdaptedTRL):
    """The same, tuned as :class:`peer_trl.TRLTuned`."""

    title = "TRL DPOTrainer with peft, grouped by length, compiled layers"
    micro_batches = (2, 4, 8)
    options = {**TRLTuned.options, "precompute_ref_log_probs": False}
    compiled = True


def copy_adapters(bench: PeerBench, model: Any) -> None:
    """Gives peft's adapters the numbers of the product's."""
    source: Any = bench.model("compiled")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        llama_config(source).save_pretrained(base)
        out = export_peft(source, base, Path(folder) / "adapter", "LLAMA3", world=bench.world)
        tensors = load_file(out / "adapter_model.safetensors")
    parameters = {name.replace(".default.", "."): p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != tensors.keys():
        raise RuntimeError(f"peft has other adapters: {sorted(parameters.keys() ^ tensors.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


LORA_PEERS: dict[str, type[Peer]] = {
    "ours": OursLoRA,
    "torchtune": TorchtuneLoRA,
    "trl": AdaptedTRL,
    "trl_tuned": AdaptedTRLTuned,
}
