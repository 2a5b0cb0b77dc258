"""Training steps that a user would take instead: the same pairs through the product and through its peers.

Every arm computes the mean loss of a global batch over the same weights and leaves its gradients behind; it may do so
in whatever way is its own. An arm gets token ids, so that no tokenizer stands between them. All arms of transformers
are modules of their own that share one set of parameters; what is not compiled and large is made for an arm's turn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torchtune
from arms import ARMS, LOSS, Arm, Layout, PaddedBatch, objective_of, padded_batches, padded_loss, separate_rows
from torch import nn
from torchtune import training
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_dpo
from torchtune.models.convert_weights import hf_to_tune
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.rlhf.loss import DPOLoss
from training_step import Bench
from work import heads_of, hf_twin, randomize

from spin.data import PackedRow, Pair
from spin.model.sharding import (
    clean_name,
    clip_grad_norm,
    full_tensor,
    materialize,
    named_full_tensors,
    reshard,
    shard_model,
)
from spin.reference.logprobs import linear_logprob, pair_objective, segment_sums

BETA = LOSS.beta
MAX_NORM = 1.0  # gradients are clipped to this norm, which every recipe and trainer here does by default
LEARNING_RATE = 1e-12  # later rounds shall see the same weights
OPPONENT = 1  # seed of the reference model's weights; the policy's is 0


class PeerBench(Bench):
    """The benchmark of the training engine, with the models of its peers.

    Args:
        args (Any): of the command line.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.weight_dtype = torch.float32
        self._shared: dict[torch.dtype, Any] = {}

    def plain(self, seed: int, dtype: torch.dtype, checkpointing: bool = False) -> nn.Module:
        """torchtune's own model, sharded over this one device.

        Args:
            seed (int): of its weights.
            dtype (torch.dtype): that it computes in.
            checkpointing (bool): make activations again in backward.

        Returns:
            nn.Module: a new one.
        """
        model = self._build()
        if checkpointing:
            training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        shard_model(model, self.world, compute_dtype=dtype)
        materialize(model, self.world)
        randomize(model, self.world, seed)
        return model

    def twin(self, attention: str, dtype: torch.dtype) -> Any:
        """A ``LlamaForCausalLM`` of its own whose parameters are those of all twins of this type; memory for them
        exists once."""
        from transformers import LlamaForCausalLM

        if dtype not in self._shared:
            source = self.model("compiled")
            self._shared[dtype] = hf_twin(source, dtype, self.world.device, self.twin_weights(source))
        shared = self._shared[dtype]
        config = type(shared.config).from_dict(shared.config.to_dict())
        config._attn_implementation = attention
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        with torch.device(self.world.device):
            model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
        sources = dict(shared.named_modules())
        for name, module in model.named_modules():  # Liger's layers lack modules without parameters
            module._parameters.update(sources[name]._parameters)
        return model.train()

    def twin_parameters(self, dtype: torch.dtype) -> Iterable[tuple[str, nn.Parameter]]:
        """The parameters that all twins of a type share, by transformers' names."""
        return self._shared[dtype].named_parameters()  # type: ignore[no-any-return]

    def twin_weights(self, source: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
        """What twins have of the product's model, by torchtune's names."""
        return named_full_tensors(source)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 compute over fp32 weights on a GPU, as trainers of transformers do it; fp32 on a CPU."""
        if self.on_gpu:
            return torch.autocast("cuda", dtype=self.compute_dtype)
        return nullcontext()

    def exact(self) -> nn.Module:
        """The policy, computing in fp32; less memory matters more than time."""
        return self.plain(0, torch.float32, checkpointing=True)

    @contextmanager
    def opponent(self) -> Iterator[nn.Module]:
        """The reference model of those arms that have one in their step, computing in fp32."""
        yield self.plain(OPPONENT, torch.float32)

    def scored(self, pairs: Sequence[Pair], model: nn.Module) -> list[Pair]:
        """The pairs with the log-probs that a model gives their responses."""
        scored = []
        for start in range(0, len(pairs), 2):
            two = pairs[start : start + 2]
            (batch,) = padded_batches(two, replace(self.layout, micro_batch=2))
            with torch.no_grad():
                real, generated = sequence_logps(model(batch.tokens.to(self.world.device)), batch).chunk(2)
            for pair, *logps in zip(two, real.tolist(), generated.tolist(), strict=True):
                response = replace(pair.generated[0], reference_logp=logps[1])
                scored.append(replace(pair, reference_real_logp=logps[0], generated=[response]))
        return scored


def sequence_logps(logits: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
    """Summed log-probs of a padded batch's responses from fp32 logits (2 b, s, v): fp64, shape (2 b,)."""
    labels = batch.labels.to(logits.device)
    counts = labels != CROSS_ENTROPY_IGNORE_IDX
    chosen = labels.masked_fill(~counts, 0)[..., None]
    token_logps = logits[:, :-1].log_softmax(-1).gather(-1, chosen).squeeze(-1)  # (2 b, s - 1)
    return (token_logps * counts).double().sum(-1)


class Peer:
    """A way to train on pairs.

    Args:
        bench (PeerBench): gives weights, work and device.
    """

    title = ""
    packages: tuple[str, ...] = ()
    gpu_only = ""  # why
    micro_batch: int | None = None  # pairs of a padded batch
    micro_batches: tuple[int, ...] = ()  # the fastest of these that fits becomes micro_batch, or the first
    as_it_is = False  # the first that fits
    size_name = "micro_batch"  # what sizes are of

    def __init__(self, bench: PeerBench) -> None:
        self.bench = bench
        self._optimizer: Any = None

    @classmethod
    def skip_reason(cls, on_gpu: bool) -> str | None:
        """Why the arm cannot run here, or None."""
        missing = [name for name in cls.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"{', '.join(missing)} not installed"
        return cls.gpu_only if cls.gpu_only and not on_gpu else None

    def sizes(self, num_pairs: int) -> list[int]:
        """What to choose from for a global batch of so many pairs."""
        return [size for size in self.micro_batches if num_pairs % size == 0]

    def shapes(self, pieces: Sequence[Any]) -> list[Any]:
        """Some of the pieces, after which no other compiles."""
        return list(pieces)

    def ready(self) -> AbstractContextManager[Any]:
        """Around an arm's turn: holds what need not stay between turns."""
        return nullcontext()

    def modules(self) -> list[nn.Module]:
        """The models that the arm needs, while it is ready."""
        return [self.policy]

    @property
    def policy(self) -> nn.Module:
        """The model that it trains."""
        raise NotImplementedError

    def lay_out(self, pairs: Sequence[Pair]) -> list[Any]:
        """A global batch as the pieces that it is computed in."""
        raise NotImplementedError

    def piece_loss(self, piece: Any) -> torch.Tensor:
        """Sum of the losses of a piece's pairs, with a gradient."""
        raise NotImplementedError

    def forward_backward(self, pieces: Sequence[Any], num_pairs: int) -> torch.Tensor:
        """Adds up the gradients of the mean loss over ``num_pairs`` pairs, which it returns."""
        total = torch.zeros((), dtype=torch.float64, device=self.bench.world.device)
        for piece in pieces:
            loss = self.piece_loss(piece) / num_pairs
            loss.backward()
            total += loss.detach()
        return total

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def optimizer_step(self) -> None:
        """Clipping, AdamW with one kernel for all parameters, and no gradients left."""
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        self.clip()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def clip(self) -> None:
        """Scales the gradients down to ``MAX_NORM``."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), MAX_NORM)

    def forget(self) -> None:
        """Frees gradients and optimizer states."""
        self._optimizer = None
        for parameter in self.parameters():
            parameter.grad = None

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by torchtune's names, in torchtune's order of rows."""
        named = self.policy.named_parameters()
        return {clean_name(name): full_tensor(p.grad) for name, p in named if p.grad is not None}


class Padded(Peer):
    """torchtune's own model and padded batches, with log-probs of the reference given: what all arms are held against.

    Args:
        bench (PeerBench): gives weights, work and device.
        dtype (torch.dtype): that it computes in.
    """

    title = "torchtune's forward, padded"
    micro_batch = 2  # in fp32 the logits of two pairs take gigabytes

    def __init__(self, bench: PeerBench, dtype: torch.dtype) -> None:
        super().__init__(bench)
        self.dtype = dtype
        self._models: list[nn.Module] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        self._models.append(self.bench.plain(0, self.dtype, checkpointing=True))
        try:
            yield
        finally:
            self._models.clear()

    @property
    def policy(self) -> nn.Module:
        return self._models[0]

    def lay_out(self, pairs: Sequence[Pair]) -> list[PaddedBatch]:
        return padded_batches(pairs, replace(self.bench.layout, micro_batch=self.micro_batch or len(pairs)))

    def piece_loss(self, piece: PaddedBatch) -> torch.Tensor:
        return padded_loss(self.policy, piece.to(self.bench.world.device), 0)


# ------------------------------------------------------------------------------------------------------------- ours
class Ours(Peer):
    """The product as its config for one GPU has it: shared prompts, fused head, compiled layers, long rows."""

    title = "this project"
    arm = ARMS["long"]

    @property
    def policy(self) -> nn.Module:
        return self.bench.model(self.arm.variant)

    def lay_out(self, pairs: Sequence[Pair]) -> list[Any]:
        return self.bench.lay_out(self.arm, pairs)

    def forward_backward(self, pieces: Sequence[Any], num_pairs: int) -> torch.Tensor:
        return self.bench.forward_backward(self.arm, pieces, num_pairs)

    def clip(self) -> None:
        clip_grad_norm(self.policy, MAX_NORM).item()  # the recipe's guard reads it

    def forget(self) -> None:
        super().forget()
        reshard(self.policy)  # layers stay gathered between steps


def unshared_rows(pairs: Sequence[Pair], layout: Layout) -> list[PackedRow]:
    """Long rows in which every response has a prompt of its own."""
    return separate_rows(pairs, replace(layout, row_tokens=layout.long_row_tokens))


def alternating(row: PackedRow) -> PackedRow:
    """A row of :func:`unshared_rows` that says which responses make a pair: real and generated alternate."""
    index = torch.arange(row.num_responses, device=row.tokens.device)
    keys = [(key, first, 2) for key, first, _ in row.pair_responses[::2]]
    weights = torch.ones(len(keys), device=row.tokens.device)
    return replace(row, real=index[0::2], generated=index[1::2], weights=weights, pair_responses=keys)


def _unshared_loss(model: nn.Module, row: PackedRow, chunk_tokens: int) -> torch.Tensor:
    row = alternating(row)
    return pair_objective(model, row, objective_of(row), chunk_tokens)[0]


class OursUnshared(Ours):
    """All of it but the sharing: what shared prompts alone are worth."""

    title = "this project, prompts not shared"
    arm = Arm(title, "compiled", unshared_rows, _unshared_loss)


# --------------------------------------------------------------------------------------------------- transformers
class Twin(Peer):
    """A model of transformers under autocast."""

    packages = ("transformers",)
    attention = "sdpa"
    bf16_weights = False  # where it computes in bf16

    def __init__(self, bench: PeerBench) -> None:
        super().__init__(bench)
        self.dtype = bench.compute_dtype if self.bf16_weights else bench.weight_dtype
        self.model = bench.twin(self.attention if bench.on_gpu else "sdpa", self.dtype)

    @property
    def policy(self) -> nn.Module:
        return self.model

    def forward_backward(self, pieces: Sequence[Any], num_pairs: int) -> torch.Tensor:
        device = self.bench.world.device
        return super().forward_backward([piece.to(device) for piece in pieces], num_pairs)

    def gradients(self) -> dict[str, torch.Tensor]:
        # by the names of the first twin, because an arm may have other modules (Liger's)
        named = {name: p.grad for name, p in self.bench.twin_parameters(self.dtype) if p.grad is not None}
        return hf_to_tune(named, **heads_of(self.model.config))


def compile_layers(model: Any, dynamic: bool) -> None:
    """Compiles each decoder layer of a transformers model in place.

    ``torch_compile=True`` of a trainer compiles the whole model instead, for minutes; its time goes to the layers.

    Args:
        model (Any): a ``LlamaForCausalLM``.
        dynamic (bool): one program for all shapes; otherwise one for each.
    """
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # all layers share one code
    for layer in model.model.layers:
        layer.compile(dynamic=dynamic)


FLEX = "flex_attention_one_dtype"


@cache
def register_flex() -> None:
    """FlexAttention of transformers for autocast, under which rotary embeddings make queries and keys fp32."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.masking_utils import flex_attention_mask

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        return flex_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, *rest, **more)

    AttentionInterface.register(FLEX, attend)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)


class PackedTwin(Twin):
    """Padding-free: many sequences in a row, separated by position ids; no prompt is shared.

    transformers builds the mask from the position ids, for FlexAttention on a GPU (its FlashAttention needs a package
    of its own). Layers are compiled, log-probs of response tokens taken in chunks.
    """

    title = "Hugging Face, padding-free by position ids, compiled layers"
    attention = FLEX
    size_name = "row_tokens"

    def __init__(self, bench: PeerBench) -> None:
        register_flex()
        super().__init__(bench)
        self.row_tokens = bench.layout.long_row_tokens
        if bench.on_gpu:
            compile_layers(self.model, dynamic=False)

    def sizes(self, num_pairs: int) -> list[int]:
        """Rows as long as the product's, or half as long."""
        longest = self.bench.layout.long_row_tokens
        return [longest // 2, longest]

    def shapes(self, pieces: Sequence[PackedRow]) -> list[PackedRow]:
        return list({piece.tokens.numel(): piece for piece in pieces}.values())

    def lay_out(self, pairs: Sequence[Pair]) -> list[PackedRow]:
        rows = unshared_rows(pairs, replace(self.bench.layout, long_row_tokens=self.row_tokens))
        return [row.pin_memory() for row in rows] if self.bench.on_gpu else rows

    def piece_loss(self, piece: PackedRow) -> torch.Tensor:
        positions = piece.positions.long()
        padding = torch.arange(positions.numel(), device=positions.device) - piece.used_tokens
        positions = torch.where(padding >= 0, padding, positions)  # the padding is one more sequence
        with self.bench.autocast():
            hidden = self.model.model(piece.tokens[None], position_ids=positions[None], use_cache=False)
            predicting = hidden.last_hidden_state[0, piece.predictors].to(self.bench.compute_dtype)  # (n, d)
        weight = self.model.lm_head.weight.to(self.bench.compute_dtype)
        token_logps = linear_logprob(predicting, weight, piece.targets, self.bench.layout.chunk_tokens)
        logps, references = segment_sums(token_logps, piece.segments, piece.num_responses), piece.reference_logps
        return LOSS(logps[0::2], logps[1::2], references[0::2], references[1::2])[0].sum()


class Authors(Twin):
    """As the authors' trainer: a second model in every step, both sequences padded to the longest, fp32 logits.

    Eight pairs at a time and gradient checkpointing, as in their released configs. The padding is on the right, so the
    mask of causal attention alone suffices, which is faster than theirs.
    """

    title = "the authors' style: two models, padded, fp32 logits"
    micro_batch = 8
    micro_batches = (8, 4, 2)
    as_it_is = True
    _opponent: Any = None

    def __init__(self, bench: PeerBench) -> None:
        super().__init__(bench)
        self.model.gradient_checkpointing_enable()

    @contextmanager
    def ready(self) -> Iterator[None]:
        bench = self.bench
        self._opponent = hf_twin(bench.plain(OPPONENT, torch.float32), torch.float32, bench.world.device).eval()
        self._opponent.requires_grad_(False)
        try:
            yield
        finally:
            self._opponent = None

    def modules(self) -> list[nn.Module]:
        return [self.model, self._opponent]

    def lay_out(self, pairs: Sequence[Pair]) -> list[PaddedBatch]:
        batches = padded_batches(pairs, replace(self.bench.layout, micro_batch=self.micro_batch or len(pairs)))
        return [batch.pin_memory() for batch in batches] if self.bench.on_gpu else batches

    def piece_loss(self, piece: PaddedBatch) -> torch.Tensor:
        with self.bench.autocast():
            with torch.no_grad():
                theirs = self._opponent(piece.tokens, use_cache=False).logits.float()
                theirs = sequence_logps(theirs, piece)
            return padded_loss(self._logits, replace(piece, reference_logps=theirs), 0)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, use_cache=False).logits.float()


# ------------------------------------------------------------------------------------------------------- torchtune
@cache
def torchtune_recipe(name: str) -> Any:
    """A recipe of torchtune's wheel as a module; its package ``recipes`` may not be imported by name."""
    file = Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"torchtune_{name}", file)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{file} is not there; expected torchtune 0.6.1, whose wheel brings its recipes.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dpo_examples(pairs: Sequence[Pair]) -> list[dict[str, list[int]]]:
    """Pairs as torchtune's preference data sets give them."""
    examples = []
    for pair in pairs:
        prompt, example = pair.prompt_ids.tolist(), {}
        for side, response in (("chosen", pair.real_ids), ("rejected", pair.generated[0].token_ids)):
            example[f"{side}_input_ids"] = prompt + response.tolist()
            example[f"{side}_labels"] = [CROSS_ENTROPY_IGNORE_IDX] * len(prompt) + response.tolist()
        examples.append(example)
    return examples


class Torchtune(Peer):
    """torchtune's full DPO recipe: its forward, loss and collation; four pairs, checkpointing, a reference model.

    Those are the values of its configs; weights are fp32 instead of the configs' bf16, as in all arms.
    """

    title = "torchtune 0.6.1, full DPO as it is"
    micro_batch = 4
    micro_batches = (4, 2)
    as_it_is = True

    def __init__(self, bench: PeerBench) -> None:
        super().__init__(bench)
        self._forward: Callable[..., Any] = torchtune_recipe(
            "full_dpo_distributed"
        ).FullDPORecipeDistributed.concatenated_forward
        self._recipe = SimpleNamespace(_device=bench.world.device, activations_handling_ctx=nullcontext())
        self._loss = DPOLoss(beta=BETA)
        self._models: list[nn.Module] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        dtype = self.bench.compute_dtype
        with ExitStack() as stack:
            stack.callback(self._models.clear)
            self._models += [self.bench.plain(0, dtype, checkpointing=True), self.bench.plain(OPPONENT, dtype).eval()]
            self._models[1].requires_grad_(False)
            yield

    def modules(self) -> list[nn.Module]:
        return list(self._models)

    @property
    def policy(self) -> nn.Module:
        return self._models[0]

    def lay_out(self, pairs: Sequence[Pair]) -> list[Any]:
        size, examples = self.micro_batch or len(pairs), dpo_examples(pairs)
        return [padded_collate_dpo(examples[start : start + size]) for start in range(0, len(examples), size)]

    def piece_loss(self, piece: Any) -> torch.Tensor:
        real, generated, *logits = self._forward(self._recipe, self.policy, piece)
        for tensor in logits:
            tensor.detach().mean()  # which the recipe logs
        del tensor, logits
        with torch.no_grad():
            reference = self._forward(self._recipe, self._models[1], piece, activations_handling=False)[:2]
        return self._loss(real, generated, *reference)[0].sum()


PLAIN_PEERS: dict[str, type[Peer]] = {
    "ours": Ours,
    "ours_unshared": OursUnshared,
    "hf_packed": PackedTwin,
    "torchtune": Torchtune,
    "authors": Authors,
}
