"""TRL's DPOTrainer as arms: its own collator, sampler, loss and training step, fed with token ids.

Only what would tokenize text is left out, and ``max_length`` is None instead of 1024, which would cut long pairs. The
reference log-probs come with the data (``precompute_ref_log_probs``), so no reference model is in the step: that is
faster than what TRL does by default.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peer_arms import BETA, LEARNING_RATE, PeerBench, Twin, compile_layers

from spin.data import Pair

TOKENIZER = Path(__file__).parents[1] / "tests" / "assets" / "tiny_lm"  # for its padding token alone
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


@cache
def trainer_class() -> Any:
    """DPOTrainer for data that are token ids already."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a trainer reports its start otherwise
    from trl import DPOTrainer

    class Fed(DPOTrainer):
        """Takes data sets as they are."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            if set(REFERENCES) <= set(dataset.column_names):
                return dataset
            return super()._precompute_ref_logps(dataset, *args, **kwargs)

    return Fed


def preference_data(pairs: Sequence[Pair], references: bool = True) -> Any:
    """Pairs as TRL has them once they are tokenized.

    Args:
        pairs (Sequence[Pair]): with one generated response each.
        references (bool): with the opponent's log-probs.

    Returns:
        Any: a ``datasets.Dataset`` in memory; ``length`` is what it can be grouped by.
    """
    from datasets import Dataset

    columns: dict[str, list[Any]] = {
        "prompt_ids": [pair.prompt_ids.tolist() for pair in pairs],
        "chosen_ids": [pair.real_ids.tolist() for pair in pairs],
        "rejected_ids": [pair.generated[0].token_ids.tolist() for pair in pairs],
        "length": [len(pair.prompt_ids) + max(len(pair.real_ids), len(pair.generated[0].token_ids)) for pair in pairs],
    }
    if references:
        columns["ref_chosen_logps"] = [pair.reference_real_logp for pair in pairs]
        columns["ref_rejected_logps"] = [pair.generated[0].reference_logp for pair in pairs]
    return Dataset.from_dict(columns)


class TRL(Twin):
    """The trainer's defaults: eight pairs in the order that they come in, gradient checkpointing."""

    title = "TRL DPOTrainer, default"
    packages = ("trl", "accelerate", "datasets")
    micro_batch = 8
    writer = "transformers.generate"  # of a whole iteration's responses
    options: dict[str, Any] = {}  # of DPOConfig
    compiled = False  # compile the layers, on a GPU

    def __init__(self, bench: PeerBench) -> None:
        super().__init__(bench)
        self._trainer: Any = None
        self._prepared: Any = None
        if self.compiled and bench.on_gpu:
            compile_layers(self.model, dynamic=True)

    def trainer(self, dataset: Any, peft_config: Any = None, **options: Any) -> Any:
        """A trainer of this arm.

        Args:
            dataset (Any): of :func:`preference_data`.
            peft_config (Any): adapters.
            **options (Any): of DPOConfig, before the arm's own.

        Returns:
            Any: a ``DPOTrainer``, not yet prepared for training.
        """
        from transformers import AutoTokenizer
        from trl import DPOConfig

        on_gpu, precision = self.bench.on_gpu, {"bf16": self.bench.on_gpu, "use_cpu": not self.bench.on_gpu}
        defaults: dict[str, Any] = {
            "output_dir": tempfile.gettempdir(), "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "beta": BETA, "max_length": None, "precompute_ref_log_probs": True, "learning_rate": LEARNING_RATE,
            "remove_unused_columns": False, "dataloader_pin_memory": on_gpu,
        }  # fmt: skip
        config = DPOConfig(**{**defaults, **precision, **options, **self.options})
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        return trainer_class()(
            self.model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
        )

    def lay_out(self, pairs: Sequence[Pair]) -> list[Any]:
        dataset, size = preference_data(pairs), self.micro_batch or len(pairs)
        if self._trainer is None:
            self._start(dataset)
        trainer, args = self._trainer, self._trainer.args
        trainer.train_dataset = dataset
        trainer._train_batch_size = args.per_device_train_batch_size = size
        args.gradient_accumulation_steps = -(-len(pairs) // size)
        pieces = list(trainer.get_train_dataloader())
        trainer.current_gradient_accumulation_steps = len(pieces)  # which `train` sets for each global batch
        return pieces

    def _start(self, dataset: Any) -> None:
        """What ``train`` does before its first step."""
        self._trainer = trainer = self.trainer(dataset)
        if trainer.args.use_liger_kernel:
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)
        if trainer.args.gradient_checkpointing:
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        self._prepared, _ = trainer._prepare_for_training(1, trainer.get_train_dataloader(), None)

    def shapes(self, pieces: Sequence[Any]) -> list[Any]:
        return list(pieces[:1])  # of any length

    def forward_backward(self, pieces: Sequence[Any], num_pairs: int) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.bench.world.device)
        for piece in pieces:
            total += self._trainer.training_step(self._prepared, dict(piece))
        return total

    def optimizer_step(self) -> None:
        trainer = self._trainer
        trainer.accelerator.gradient_state._set_sync_gradients(True)
        trainer._clip_grad_norm(self._prepared)
        trainer.optimizer.step()
        self._prepared.zero_grad()

    def forget(self) -> None:
        super().forget()
        if self._trainer is not None and self._trainer.optimizer is not None:
            self._trainer.optimizer.optimizer.state.clear()


class TRLTuned(TRL):
    """Pairs grouped by length, no checkpointing, compiled layers, the best size of a batch; padded to a multiple of
    eight tokens, which attention's kernel needs: it would copy the mask, and layers would be compiled once more."""

    title = "TRL DPOTrainer, grouped by length, compiled layers"
    micro_batches = (4, 8, 16)
    options = {
        "gradient_checkpointing": False, "train_sampling_strategy": "group_by_length", "pad_to_multiple_of": 8,
    }  # fmt: skip
    compiled = True


class TRLBf16(TRLTuned):
    """The same with weights that were loaded in bf16, and so AdamW's moments: faster, and small updates are lost."""

    title = "TRL DPOTrainer, bf16 weights, grouped by length, compiled layers"
    bf16_weights = True


class TRLWithVLLM(TRLTuned):
    """TRLTuned in whole iterations whose responses vLLM writes."""

    packages = (*TRL.packages, "vllm")
    writer = "vLLM"


class TRLBf16WithVLLM(TRLBf16):
    """TRLBf16 in whole iterations whose responses vLLM writes."""

    packages, writer = TRLWithVLLM.packages, TRLWithVLLM.writer


class TRLTorchCompile(TRL):
    """The same with the whole model compiled, which is what the trainer's ``torch_compile`` does.

    The option itself would count for every trainer of the process, whose state accelerate shares.
    """

    title = "TRL DPOTrainer, grouped by length, torch_compile"
    gpu_only = "compiling takes minutes on a CPU"
    micro_batches = TRLTuned.micro_batches
    options = TRLTuned.options

    def _start(self, dataset: Any) -> None:
        super()._start(dataset)
        self._prepared = torch.compile(self._prepared)


class TRLLiger(TRL):
    """The same with Liger's kernels for the layers instead of compiled ones."""

    title = "TRL DPOTrainer, grouped by length, Liger layers"
    packages = (*TRL.packages, "liger_kernel")
    gpu_only = "Liger's kernels need a GPU"
    micro_batches = TRLTuned.micro_batches
    options = {**TRLTuned.options, "use_liger_kernel": True}

    def __init__(self, bench: PeerBench) -> None:
        super().__init__(bench)
        self._replaced: dict[str, Any] = {}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Liger replaces names of transformers' module for the whole process: other arms get theirs back."""
        from transformers.models.llama import modeling_llama

        names = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
        before = {name: getattr(modeling_llama, name) for name in names}
        vars(modeling_llama).update(self._replaced)
        try:
            yield
        finally:
            self._replaced = {name: getattr(modeling_llama, name) for name in names}
            vars(modeling_llama).update(before)

    def _start(self, dataset: Any) -> None:
        with self.ready():
            super()._start(dataset)


TRL_PEERS: dict[str, type[Twin]] = {
    "trl": TRL,
    "trl_tuned": TRLTuned,
    "trl_bf16": TRLBf16,
    "trl_torch_compile": TRLTorchCompile,
    "trl_liger": TRLLiger,
}
