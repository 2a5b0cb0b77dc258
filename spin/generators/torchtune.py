"""The embedded generator: the policy itself answers, in place, with a cache of slots and continuous batching."""

import gc
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from spin.attention import attach_kv, detach_kv, patch_attention
from spin.data.types import FinishReason
from spin.distributed import clean_name, unsharded
from spin.errors import ConfigError, GeneratorError
from spin.float8 import float8_off
from spin.gemma2 import final_softcap, softcap
from spin.generators.base import Completion, GeneratorContext, SamplingParams
from spin.generators.sampling import sample_tokens, token_logprobs, uniforms

log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STEP = 64  # tokens; the cache's capacity is a multiple, so that it grows seldom


class TorchtuneGenerator:
    """Generates with the policy's own weights on the policy's own device; nothing is copied between iterations.

    Prompts are answered longest first. A row that finishes leaves its slot to the next prompt at once, so no row waits
    for the longest. A completion depends on its prompt, the sampling parameters and its seed (up to the rounding of
    other batch shapes), not on batch size, order or rank. All ranks must call ``generate`` together, if need be with
    no prompts: the weights are gathered once; after that ranks do not wait for each other.

    Args:
        context (GeneratorContext): gives the model, its device and its longest sequence.
        batch_size (int): sequences at a time; higher is faster and takes more memory for the cache. Halved when memory
            runs out.
        prefill_batch (int | None): prompts that are read together, and slots that must be free before a running batch
            is interrupted for it; None takes an eighth of the batch.
        cache_dtype (torch.dtype | str | None): fp32, bf16 or fp16; None is the dtype that the model computes in.

    Raises:
        ConfigError: If there is no model, its attention is unknown, or a number is out of range.
    """

    shares_policy_weights = True

    def __init__(
        self,
        context: GeneratorContext,
        batch_size: int = 32,
        prefill_batch: int | None = None,
        cache_dtype: torch.dtype | str | None = None,
    ) -> None:
        if context.model is None:
            raise ConfigError("TorchtuneGenerator runs the policy itself and was given no model.")
        if batch_size < 1 or (prefill_batch is not None and prefill_batch < 1):
            raise ConfigError(f"generator.batch_size={batch_size}, prefill_batch={prefill_batch}: expected 1 or more.")
        if isinstance(cache_dtype, str) and cache_dtype not in _DTYPES:
            raise ConfigError(f"generator.cache_dtype={cache_dtype!r}: expected one of {', '.join(_DTYPES)} or null.")
        patch_attention(context.model)
        self.model: Any = context.model
        self.batch_size = batch_size
        self._context = context
        self._prefill_batch = prefill_batch
        self._cache_dtype = _DTYPES[cache_dtype] if isinstance(cache_dtype, str) else cache_dtype
        self._max_seq_len = min(context.max_seq_len, getattr(context.model, "max_seq_len", context.max_seq_len))

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        """One completion per prompt, in order. ``max_new_tokens`` is cut where the context ends (finish reason
        ``length``).

        Args:
            prompts (list[list[int]]): token ids.
            sampling (SamplingParams): how to choose tokens and when to stop.
            seeds (list[int]): one per prompt, see ``spin.generators.sampling.sample_seed``.

        Returns:
            list[Completion]: as many as prompts.

        Raises:
            GeneratorError: If a prompt is empty or leaves no room for a token, if the numbers of prompts and seeds
                differ, or if memory does not suffice for one sequence.
        """
        self._check(prompts, seeds)
        requests = [
            _Request(index, prompt, min(sampling.max_new_tokens, self._max_seq_len - len(prompt)), seed)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        requests.sort(key=lambda request: (-len(request.prompt), request.index))  # memory runs out early if at all
        done: dict[int, Completion] = {}
        # no_grad, not inference_mode: whatever a module or FSDP makes on first use must stay fit for training.
        with unsharded(self.model), torch.no_grad(), _ready_to_generate(self.model):
            while len(done) < len(requests):
                waiting = [request for request in requests if request.index not in done]
                try:
                    _Run(self._context, sampling, waiting, self._slots(len(waiting)), self._cache_dtype, done).loop()
                except torch.OutOfMemoryError as error:
                    shortage = str(error)  # without its traceback, which holds the tensors
                else:
                    break
                self._halve(shortage, waiting[0])
        return [done[index] for index in range(len(prompts))]

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies weights into the policy. A recipe need not call it: the generator runs the policy itself.

        Args:
            named_tensors (Iterable[tuple[str, torch.Tensor]]): every parameter once, by torchtune name, whole or
                sharded like the policy.

        Raises:
            GeneratorError: If a name is unknown or missing or a shape differs; the weights that came before are copied.
        """
        own = {clean_name(name): parameter for name, parameter in self.model.named_parameters()}
        missing = set(own)
        for name, tensor in named_tensors:
            if name not in own:
                raise GeneratorError(f"update_weights: the model has no parameter {name!r}. Send torchtune names.")
            if own[name].shape != tensor.shape:
                raise GeneratorError(
                    f"update_weights: {name} has shape {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}."
                )
            _copy(own[name], tensor)
            missing.discard(name)
        if missing:
            raise GeneratorError(f"update_weights: {_some(sorted(missing))} did not come. Send every parameter once.")

    def sleep(self) -> None:
        """Nothing to do: the cache lives during ``generate`` only."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do: the model belongs to the recipe."""

    def _check(self, prompts: list[list[int]], seeds: list[int]) -> None:
        if len(prompts) != len(seeds):
            raise GeneratorError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed per prompt.")
        empty = [str(index) for index, prompt in enumerate(prompts) if not prompt]
        if empty:
            raise GeneratorError(f"{len(empty)} prompts are empty: {_some(empty)}. A prompt needs at least one token.")
        longest = self._max_seq_len - 1
        long = [f"prompt {i} has {len(prompt)}" for i, prompt in enumerate(prompts) if len(prompt) > longest]
        if long:
            raise GeneratorError(
                f"{len(long)} prompts leave no room for a response: {_some(long)} tokens, expected at most {longest} "
                f"(max_seq_len {self._max_seq_len} - 1). Drop or shorten them, or raise max_seq_len."
            )

    def _slots(self, waiting: int) -> tuple[int, int]:
        slots = min(self.batch_size, waiting)
        return slots, min(slots, self._prefill_batch or max(1, self.batch_size // 8))

    def _halve(self, shortage: str, longest: "_Request") -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.batch_size == 1:
            raise GeneratorError(
                f"out of memory with one sequence at a time, prompt {longest.index} of {len(longest.prompt)} tokens "
                f"and up to {longest.limit} new ones: {shortage} Lower max_new_tokens or max_seq_len, set "
                "generator.cache_dtype=bf16, or shard over more GPUs."
            )
        self.batch_size //= 2
        log.warning("Out of memory while generating; going on with generator.batch_size=%d.", self.batch_size)


@dataclass(frozen=True)
class _Request:
    index: int
    prompt: list[int]
    limit: int  # tokens that the response may have
    seed: int


@dataclass
class _Row:
    """A sequence in a slot; row i of the list is slot i."""

    request: _Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.tokens)


class _Run:
    """One pass over requests with a fixed number of slots. Live rows always fill slots 0 to n - 1.

    Args:
        context (GeneratorContext): model, device, decode.
        sampling (SamplingParams): the same for all requests.
        waiting (list[_Request]): longest prompt first.
        slots (tuple[int, int]): rows at a time, prompts that are read at a time.
        cache_dtype (torch.dtype | None): of the cache.
        done (dict[int, Completion]): finished completions go here, by request index.
    """

    def __init__(
        self,
        context: GeneratorContext,
        sampling: SamplingParams,
        waiting: list[_Request],
        slots: tuple[int, int],
        cache_dtype: torch.dtype | None,
        done: dict[int, Completion],
    ) -> None:
        model: Any = context.model
        self.model = model
        self.decode = context.decode
        self.device = context.device
        self.sampling = sampling
        self.waiting = waiting[::-1]  # taken from the end
        self.slots, self.prefill_batch = slots
        self.done = done
        self.rows: list[_Row] = []
        self.most = max((len(request.prompt) + request.limit for request in waiting), default=0)
        self.stop_ids = set(sampling.stop_token_ids)
        # A token of text has at least one byte; 16 more for tokens without text (special ones, parts of a character).
        self.tail = max((len(text.encode()) for text in sampling.stop_strings), default=0) + 16
        self.prompt_ends: torch.Tensor | None = None  # of a padded group of prompts; None in a decode step

        def state(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(self.slots, *shape, dtype=dtype, device=self.device)

        self.last = state(dtype=torch.int64)  # newest token of each slot
        self.positions = state(dtype=torch.int64)  # where it stands
        self.counts = state(dtype=torch.int64)  # tokens of the response so far
        self.numbers = state(max((r.limit for r in waiting), default=0), dtype=torch.float64)  # one uniform per token
        vocab_size = model.tok_embeddings.num_embeddings
        self.seen = state(vocab_size, dtype=torch.bool) if sampling.repetition_penalty != 1 else None
        self.indices = torch.arange(self.most, device=self.device)
        self.view = attach_kv(self.model, self.slots, capacity=0, dtype=cache_dtype, device=self.device)

    def loop(self) -> None:
        """Until every request is done."""
        self.model.unembed = self._last_logits
        try:
            while self.waiting or self.rows:
                free = self.slots - len(self.rows)
                if self.waiting and free >= min(self.prefill_batch, len(self.waiting)):
                    self._admit(min(self.prefill_batch, len(self.waiting)))
                else:
                    self._step()
        finally:
            detach_kv(self.model)

    def _admit(self, n: int) -> None:
        """Read n prompts into the slots after the live rows, and choose the first token of each."""
        group = [self.waiting.pop() for _ in range(n)]
        first, lengths = len(self.rows), [len(request.prompt) for request in group]
        longest = max(lengths)
        self._make_room(longest + 1)
        # Padding stands on the right, where causal attention never looks at it, and decoding overwrites it in the
        # cache.
        padded = torch.tensor([r.prompt + [0] * (longest - len(r.prompt)) for r in group], device=self.device)
        numbers = torch.zeros(n, self.numbers.shape[1], dtype=torch.float64)
        for row, request in enumerate(group):
            numbers[row, : request.limit] = torch.from_numpy(uniforms(request.seed, 0, request.limit))
        ends = torch.tensor(lengths, device=self.device) - 1
        new = slice(first, first + n)
        self.numbers[new] = numbers.to(self.device)
        self.positions[new] = ends
        self.counts[new] = 0
        if self.seen is not None:
            self.seen[new] = False
            for row, request in enumerate(group):
                self.seen[first + row, torch.tensor(request.prompt, device=self.device)] = True
        self.rows += [_Row(request) for request in group]

        self.view.prefill(first)
        self.prompt_ends = ends
        logits = self.model(padded)
        self.prompt_ends = None
        self._choose(logits, first)

    def _step(self) -> None:
        """One more token for every live row."""
        n, length = len(self.rows), max(row.length for row in self.rows)
        self._make_room(length)
        positions = self.positions[:n]
        self.view.decode(positions, length)
        mask = self.indices[:length] <= positions[:, None, None]  # (n, 1, length)
        self._choose(self.model(self.last[:n, None], mask=mask, input_pos=positions[:, None]), first=0)

    def _last_logits(self, h: torch.Tensor) -> torch.Tensor:
        """Stands in for ``model.unembed``: logits where a token will be chosen, (b, s, d) -> (b, v).

        It runs inside the model's forward, where FSDP guarantees the root's parameters.
        """
        h = h[:, -1] if self.prompt_ends is None else h[torch.arange(len(h), device=h.device), self.prompt_ends]
        return softcap(self.model.output(self.model.norm(h)).float(), final_softcap(self.model))

    def _choose(self, logits: torch.Tensor, first: int) -> None:
        """A token for each row from ``first`` on; rows that end leave.

        Args:
            logits (torch.Tensor): shape (n, v).
            first (int): the slot of the first row.
        """
        live = slice(first, first + len(logits))
        counts = self.counts[live]
        numbers = self.numbers[live].gather(1, counts[:, None])[:, 0]
        seen = None if self.seen is None else self.seen[live]
        tokens = sample_tokens(logits, self.sampling, numbers, seen=seen, new_tokens=counts)
        self.last[live] = tokens
        self.positions[live] += 1
        self.counts[live] += 1
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        logprobs = token_logprobs(logits, tokens).tolist() if self.sampling.logprobs else None
        ended = []
        for offset, token in enumerate(tokens.tolist()):  # host/device sync, one per step
            row = self.rows[first + offset]
            row.tokens.append(token)
            if logprobs is not None:
                row.logprobs.append(logprobs[offset])
            reason = self._finish_reason(row)
            if reason is not None:
                self.done[row.request.index] = Completion(
                    row.tokens, reason, row.logprobs if self.sampling.logprobs else None
                )
                ended.append(first + offset)
        if ended:
            self._remove(ended)

    def _finish_reason(self, row: _Row) -> FinishReason | None:
        if row.tokens[-1] in self.stop_ids or (self.sampling.stop_strings and self._completes_stop_string(row.tokens)):
            return "stop"
        return "length" if len(row.tokens) == row.request.limit else None

    def _completes_stop_string(self, tokens: list[int]) -> bool:
        """True if the newest token completes one, whose beginning may lie in earlier tokens."""
        if len(tokens) <= self.sampling.min_new_tokens:
            return False
        text = self.decode(tokens[-self.tail :])
        if not any(stop in text for stop in self.sampling.stop_strings):
            return False
        before = self.decode(tokens[-self.tail : -1])  # may hold one that min_new_tokens let pass
        return any(text.count(stop) > before.count(stop) for stop in self.sampling.stop_strings)

    def _remove(self, ended: list[int]) -> None:
        """Fill the slots of rows that ended with the last live rows, so that decoding reads one view of the cache."""
        gone = set(ended)
        n = len(self.rows) - len(ended)
        targets = [slot for slot in ended if slot < n]
        sources = [slot for slot in range(n, len(self.rows)) if slot not in gone]
        if sources:
            self.view.move(sources, targets, max(self.rows[slot].length for slot in sources))
            for state in (self.last, self.positions, self.counts, self.numbers, self.seen):
                if state is not None:
                    state[targets] = state[sources]
            for source, target in zip(sources, targets, strict=True):
                self.rows[target] = self.rows[source]
        del self.rows[n:]

    def _make_room(self, length: int) -> None:
        """Capacity for ``length`` tokens: half as much again when it grows, never more than the longest row can
        need."""
        if length > self.view.capacity:
            steps = -(-max(length, self.view.capacity * 3 // 2) // _STEP)
            self.view.grow(max(length, min(steps * _STEP, self.most)))


@contextmanager
def _ready_to_generate(model: Any) -> Iterator[None]:
    """Evaluation mode, layers uncompiled, and all as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    unembed = vars(model).get("unembed")
    model.eval()
    try:
        # Compiled layers would be compiled again for every length of the cache.
        with torch.compiler.set_stance("force_eager"), float8_off(model):
            yield
    finally:
        for module in training:
            module.training = True
        vars(model).pop("unembed", None)
        if unembed is not None:
            model.unembed = unembed


def _copy(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    with torch.no_grad():
        if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
            # Every rank has the whole tensor, so each takes its part without talking to the others.
            tensor = tensor.to(parameter.device)
            tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(tensor)


def _some(items: list[str], shown: int = 5) -> str:
    return ", ".join(items[:shown]) + (f" and {len(items) - shown} more" if len(items) > shown else "")
