"""The embedded generator: the policy itself generates, in place, with a cache of slots and continuous batching."""

import gc
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.tensor import DTensor, distribute_tensor

from spin.core.dtypes import DTYPES
from spin.core.errors import ConfigError, GeneratorError
from spin.core.terminal import some_of
from spin.generators.fused import fused
from spin.generators.generator import GeneratorContext, SamplingParams, generate_in_order, max_response_tokens
from spin.generators.prepacked import prepacked
from spin.generators.sampling import uniforms
from spin.generators.slots import Chosen, Slots, StepPlan
from spin.model.attention import generation_kernels, patch_attention
from spin.model.float8 import float8_off
from spin.model.sharding import clean_name, unsharded, without_fsdp_hooks
from spin.types import FinishReason, Response

log = logging.getLogger(__name__)

_PREFILL_TOKENS = 16384  # of prompts that are read together, padding included
_WINDOW = 4  # batches whose prompts are sorted by length together
_SIZES = 4  # numbers of rows that are captured as CUDA graphs at most: all slots, half of them, ...
_SMALLEST_SIZE = 16  # rows; fewer take as long
_PREFILL_PROMPTS = 32  # that are read together at most, unless the config says so; slots wait empty for them
_FEWEST_SLOTS, _SLOTS_STEP, _MOST_SLOTS = 32, 64, 1024  # of ``auto``: speed hardly grows beyond the last
_CACHE_FRACTION = 0.8  # of the free memory that ``auto`` takes; the rest is for prompts that are read
_LOGIT_BYTES = 40  # of a slot for each token of the vocabulary: logits, and those that are sorted for top_p
_CAPACITY_STEP = 256  # tokens; the capacity of a GPU's cache is a multiple, so that later prompts fit too
_LENGTH_STEP = 256  # tokens; of steps without the kernel


class TorchtuneGenerator:
    """Generates with the policy's own weights on the policy's own device; nothing is copied between iterations.

    Prompts run a few batches at a time, the longest first. A row that finishes leaves its slot to the next prompt at
    once, so no row waits for the longest. A response depends on its prompt, the sampling parameters and
    its seed (up to the rounding of other batch shapes), not on batch size, order or rank. All ranks must call
    ``generate`` together, if need be with no prompts: the weights are gathered once; after that ranks do not wait for
    each other.

    On a GPU the cache has its full size from the start, steps are captured as CUDA graphs, and tokens are read while
    the next step runs. After :meth:`wake` cache and graphs live until :meth:`sleep`, else until ``generate`` returns.

    Args:
        context (GeneratorContext): gives the model, its device and its longest sequence.
        batch_size (int | Literal["auto"]): sequences at a time; higher is faster and takes more memory for the cache.
            Halved when memory runs out. ``auto`` takes what the GPU has free, up to 1,024; 32 on a CPU and where
            torch's algorithms are deterministic, since other numbers round otherwise.
        prefill_batch (int | None): prompts that are read together; None takes an eighth of the batch, 32 at most. So
            many slots must be free before a running batch is interrupted for it.
        cache_dtype (torch.dtype | str | None): fp32, bf16 or fp16; None is the dtype that the model computes in.
        cuda_graphs (bool): on a GPU, capture decode steps; False is slower and needs less memory. It launches every
            kernel by itself, and is for finding faults. A CPU has none either way.

    Raises:
        ConfigError: If there is no model, its attention is unknown, or a number is out of range.
    """

    shares_policy_weights = True

    def __init__(
        self,
        context: GeneratorContext,
        batch_size: int | Literal["auto"] = "auto",
        prefill_batch: int | None = None,
        cache_dtype: torch.dtype | str | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        if context.model is None:
            raise ConfigError("TorchtuneGenerator runs the policy itself and was given no model.")
        if batch_size != "auto" and (isinstance(batch_size, str) or batch_size < 1):
            raise ConfigError(f"generator.batch_size={batch_size}: expected auto, or 1 or more.")
        if prefill_batch is not None and prefill_batch < 1:
            raise ConfigError(f"generator.prefill_batch={prefill_batch}: expected 1 or more.")
        if isinstance(cache_dtype, str) and cache_dtype not in DTYPES:
            raise ConfigError(f"generator.cache_dtype={cache_dtype!r}: expected one of {', '.join(DTYPES)} or null.")
        patch_attention(context.model)
        self.model: Any = context.model
        self.batch_size, self._prefill_batch = _FEWEST_SLOTS if batch_size == "auto" else batch_size, prefill_batch
        is_free = context.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled()
        self._plans_slots = batch_size == "auto" and is_free
        self._most_slots, self._free_bytes = _MOST_SLOTS, 0
        self._cache_dtype = DTYPES[cache_dtype] if isinstance(cache_dtype, str) else cache_dtype
        self._context, self._cuda_graphs, self._awake = context, cuda_graphs, False
        self.slots: Slots | None = None
        self._max_seq_len = min(context.max_seq_len, getattr(context.model, "max_seq_len", context.max_seq_len))

    def generate(self, prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Response]:
        return generate_in_order(self, prompts, sampling, seeds)

    def stream(
        self, requests: Iterable[tuple[Sequence[int], int]], sampling: SamplingParams
    ) -> Iterator[tuple[int, Response] | None]:
        """See ``StreamingGenerator``; the batch is never emptied in between."""
        # no_grad, not inference_mode: whatever a module or FSDP makes on first use must stay fit for training.
        with unsharded(self.model), torch.no_grad(), _ready_to_generate(self.model, self._context.device):
            if not self._awake:
                self._look_for_memory()
            left = self._in_order(requests, sampling)
            try:
                while left:
                    try:
                        for finished in self._run(list(left.values()), sampling):
                            if finished is not None:
                                del left[finished[0]]
                            yield finished
                    except torch.OutOfMemoryError as error:
                        shortage = str(error)  # without its traceback, which holds the tensors
                    else:
                        break
                    self._halve(shortage, next(iter(left.values())))
            finally:
                if not self._awake:
                    self._drop()

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies weights into the policy, full or sharded like it. A recipe need not call it."""
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
            some = some_of(sorted(missing), 5)
            raise GeneratorError(f"update_weights: {some} did not come. Send every parameter once.")

    def sleep(self) -> None:
        self._awake = False
        self._drop()

    def wake(self) -> None:
        """From now on cache and graphs outlive ``generate``, for the next shard of prompts. With ``batch_size: auto``
        all ranks must call it together, with the weights gathered."""
        self._awake = True
        self._look_for_memory()

    def close(self) -> None:
        self.sleep()  # the model belongs to the recipe

    def _in_order(self, requests: Iterable[tuple[Sequence[int], int]], sampling: SamplingParams) -> dict[int, Any]:
        """The requests by number, in the order in which they run. The longest prompts first keeps padding small and
        finds out early if memory does not suffice; a few batches at a time keep those together that make a shard. The
        last batch stays last: its responses are the shortest, as far as is known."""
        found = [
            _Request(index, prompt, max_response_tokens(prompt, index, sampling, self._max_seq_len), seed)
            for index, (prompt, seed) in enumerate(requests)
        ]
        if self._plans_slots and found:
            self._plan_slots(max(len(request.prompt) + request.limit for request in found))
        window, tail = _WINDOW * self.batch_size, len(found) - self.batch_size
        found.sort(key=lambda each: (each.index >= tail, each.index // window, -len(each.prompt), each.index))
        return {request.index: request for request in found}

    def _run(self, waiting: list["_Request"], sampling: SamplingParams) -> Iterator[tuple[int, Response] | None]:
        most = min(self.batch_size, len(waiting))
        slots = self._slots_for(sampling, most, max(len(request.prompt) + request.limit for request in waiting))
        slots.attach()
        try:
            limits = most, min(most, self._prefill_batch or max(1, min(self.batch_size // 8, _PREFILL_PROMPTS)))
            yield from _Run(slots, self._context.decode, waiting, limits).loop()
        finally:
            slots.detach()

    def _slots_for(self, sampling: SamplingParams, slots: int, capacity: int) -> Slots:
        """The slots of the last call, if they serve; else new ones."""
        if self.slots is None or not self.slots.fits(sampling, slots, capacity):
            self._drop()
            plan = self.step_plan(slots)
            if plan.sizes:
                capacity = self._rounded(capacity)
            self.slots = Slots(self.model, sampling, slots, capacity, plan, self._context.device, self._cache_dtype)
        return self.slots

    def _rounded(self, capacity: int) -> int:
        return min(-(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP, self._max_seq_len)

    def _look_for_memory(self) -> None:
        """The GPU memory that is free for ``auto`` once weights are gathered, on the rank that has least."""
        if self._plans_slots:
            torch.cuda.empty_cache()
            free = torch.tensor(torch.cuda.mem_get_info(self._context.device)[0], device=self._context.device)
            if self._context.world is not None:
                dist.all_reduce(free, dist.ReduceOp.MIN)
            self._free_bytes = int(free)

    def _plan_slots(self, longest: int) -> None:
        """As many slots as there is memory for, unless those that exist serve the longest request."""
        if self.slots is not None and longest <= self.slots.capacity:
            return
        kept = sum(2 * each.num_kv_heads * each.head_dim for each in self.model.modules() if hasattr(each, "spin_kv"))
        weight = self.model.tok_embeddings.weight
        cache = self._rounded(longest) * kept * (self._cache_dtype or weight.dtype).itemsize
        slots = int(self._free_bytes * _CACHE_FRACTION) // (cache + weight.shape[0] * _LOGIT_BYTES)
        planned = max(_FEWEST_SLOTS, min(slots // _SLOTS_STEP * _SLOTS_STEP, self._most_slots))
        if planned != self.batch_size:
            log.info(f"generator.batch_size=auto: {planned} sequences of up to {longest} tokens at a time.")
        self.batch_size = planned

    def step_plan(self, slots: int) -> StepPlan:
        """How steps run on this device."""
        if self._context.device.type != "cuda":
            return StepPlan()
        kernel = generation_kernels(self._context.device.type) is not None
        if not self._cuda_graphs:
            return StepPlan(lag=1, kernel=kernel)
        sizes = [slots]
        while len(sizes) < _SIZES and sizes[-1] // 2 >= _SMALLEST_SIZE:
            sizes.append(sizes[-1] // 2)
        return StepPlan(tuple(sorted(sizes)), _LENGTH_STEP, lag=1, capture=True, kernel=kernel)

    def _drop(self) -> None:
        """Frees cache and graphs."""
        if self.slots is not None:
            self.slots.view.free()
            self.slots = None
            if self._context.device.type == "cuda":
                torch.cuda.empty_cache()

    def _halve(self, shortage: str, longest: "_Request") -> None:
        self._drop()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.batch_size == 1:
            raise GeneratorError(
                f"out of memory with one sequence at a time, prompt {longest.index} of {len(longest.prompt)} tokens "
                f"and up to {longest.limit} new ones: {shortage} Lower max_new_tokens or max_seq_len, set "
                "generator.cache_dtype=bf16, or shard over more GPUs."
            )
        self.batch_size = self._most_slots = self.batch_size // 2
        log.warning("Out of memory while generating; continuing with generator.batch_size=%d.", self.batch_size)


@dataclass(frozen=True)
class _Request:
    index: int
    prompt: Sequence[int]
    limit: int  # tokens that the response may have
    seed: int


@dataclass
class _Row:
    """A sequence in a slot."""

    request: _Request
    slot: int
    chosen: int = 0  # tokens whose choice is launched; those that were read are in ``tokens``
    ended: bool = False
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.prompt) + self.chosen


class _Run:
    """One pass over requests: who is in which slot, what is launched next, where responses end.

    ``limits`` are rows at a time and prompts that are read at a time; ``waiting`` is in the order in which they run.
    """

    def __init__(
        self, slots: Slots, decode: Callable[[Sequence[int]], str], waiting: list[_Request], limits: tuple[int, int]
    ) -> None:
        self.slots, self.plan, self.sampling, self.decode = slots, slots.plan, slots.sampling, decode
        self.waiting = waiting[::-1]  # taken from the end
        self.most, self.prefill_batch = limits
        self.rows: list[_Row | None] = []  # by slot; the last one is not None
        self.live = 0  # rows that are not None
        self.launched: deque[tuple[list[_Row | None], Chosen]] = deque()
        self.stop_ids = set(self.sampling.stop_token_ids)
        # A token of text has at least one byte; 16 more for tokens without text (special ones, parts of a character).
        self.tail = max((len(text.encode()) for text in self.sampling.stop_strings), default=0) + 16

    def loop(self) -> Iterator[tuple[int, Response] | None]:
        """Responses by request index, until every request is done, and None after each step."""
        while self.waiting or self.live or self.launched:
            group = min(self.prefill_batch, len(self.waiting))
            if self.waiting and self.most - self.live >= group:
                longest = max(len(request.prompt) for request in self.waiting[-group:])
                self._admit(min(group, max(1, _PREFILL_TOKENS // longest)))
            elif self.live:
                self._step()
            under_way = self.plan.lag if self.waiting or self.live else 0
            while len(self.launched) > under_way:
                yield from self._read()
            yield None

    def _admit(self, n: int) -> None:
        """Read n prompts into free slots, the first ones first."""
        group = [self.waiting.pop() for _ in range(n)]
        self.rows += [None] * (self.live + n - len(self.rows))
        free = [slot for slot, row in enumerate(self.rows) if row is None][:n]
        new = [_Row(request, slot) for request, slot in zip(group, free, strict=True)]
        for row in new:
            self.rows[row.slot] = row
        self.live += n
        numbers = [uniforms(request.seed, 0, request.limit) for request in group]
        self._launch(list(new), self.slots.prefill(free, [list(map(int, each.prompt)) for each in group], numbers))

    def _step(self) -> None:
        """One more token for every live row."""
        if self.plan.rows(self.live) < self.plan.rows(len(self.rows)):
            self._close_ranks()
        length = max(row.length for row in self.rows if row is not None)
        self._launch(list(self.rows), self.slots.step(len(self.rows), length))

    def _launch(self, rows: list[_Row | None], chosen: Chosen) -> None:
        self.launched.append((rows, chosen))
        for row in rows:
            if row is not None:
                row.chosen += 1
                if row.chosen == row.request.limit:
                    self._leave(row)  # whatever its last token will be

    def _read(self) -> Iterator[tuple[int, Response]]:
        """Hand the tokens of the oldest launch to their rows; rows that end leave, and their responses are given."""
        rows, chosen = self.launched.popleft()
        tokens, logprobs = chosen.read()
        for place, row in enumerate(rows):
            if row is None or row.ended:
                continue
            row.tokens.append(tokens[place])
            if logprobs is not None:
                row.logprobs.append(logprobs[place])
            reason = self._finish_reason(row)
            if reason is not None:
                row.ended = True
                self._leave(row)
                kept = row.logprobs if self.sampling.logprobs else None
                yield row.request.index, Response(row.tokens, reason, logprobs=kept)

    def _leave(self, row: _Row) -> None:
        if row.slot < len(self.rows) and self.rows[row.slot] is row:
            self.rows[row.slot] = None
            self.live -= 1
            while self.rows and self.rows[-1] is None:
                self.rows.pop()

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
        before = self.decode(tokens[-self.tail : -1])  # may hold one that min_new_tokens let pass, and that overlaps
        return any(text.rfind(stop) > before.rfind(stop) for stop in self.sampling.stop_strings)

    def _close_ranks(self) -> None:
        """Fill the gaps between live rows with the last of them, so that a smaller step reaches all."""
        targets = [slot for slot in range(self.live) if self.rows[slot] is None]
        movers = [row for row in self.rows[self.live :] if row is not None]
        self.slots.move([row.slot for row in movers], targets, max(row.length for row in movers))
        for row, target in zip(movers, targets, strict=True):
            row.slot = target
            self.rows[target] = row
        del self.rows[self.live :]


@contextmanager
def _ready_to_generate(model: Any, device: torch.device) -> Iterator[None]:
    """Evaluation mode, layers uncompiled, no checkpointing, no FSDP hooks, on a GPU this project's kernels, on a CPU
    packed weights."""
    kernels = generation_kernels(device.type)
    faster = prepacked(model) if device.type == "cpu" else fused(model, kernels) if kernels else nullcontext()
    training = [module for module in model.modules() if module.training]
    unembed = vars(model).get("unembed")
    wrappers = {each: vars(each).get("forward") for each in model.modules() if isinstance(each, ActivationWrapper)}
    model.eval()
    for module in wrappers:  # a wrapper may save the state of random numbers, which no graph captures
        module.forward = module._checkpoint_wrapped_module.__call__
    try:
        # Compiled layers would be compiled again for every length of the cache.
        with torch.compiler.set_stance("force_eager"), float8_off(model), without_fsdp_hooks(model), faster:
            yield
    finally:
        for module, forward in wrappers.items():
            del module.forward
            if forward is not None:
                module.forward = forward
        for module in training:
            module.training = True
        vars(model).pop("unembed", None)
        if unembed is not None:
            model.unembed = unembed


def _copy(parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    with torch.no_grad():
        if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
            # Every rank has the full tensor, so each takes its part without communication.
            mesh, placements = parameter.device_mesh, parameter.placements
            tensor = distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)
        parameter.copy_(tensor)
