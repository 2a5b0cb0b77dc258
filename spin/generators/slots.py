"""The device's side of the embedded generator: sequences in slots, and the step that gives each of them one more token.

Nothing here waits for the device, so that the host can be a step ahead of it. On a GPU a step is hundreds of small
kernels, which the host would launch more slowly than the GPU runs them; so the steps of each size are captured as CUDA
graphs. A graph reads and writes fixed addresses: all state is made once and changed in place.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from spin.generators.generator import SamplingParams
from spin.generators.sampling import sample_tokens, token_logprobs
from spin.model.attention import attach_kv, detach_kv, reattach_kv
from spin.model.gemma2 import final_softcap, softcap

log = logging.getLogger(__name__)

_STEP = 64  # tokens; a growing cache's capacity is a multiple, so that it grows seldom
# Of prompts. cuDNN, PyTorch's first choice on an H100, makes a plan for every new shape, and no two groups are alike.
_PREFILL_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class StepPlan:
    """How decode steps run. The default suits a CPU: exactly the rows and keys there are, every token read at once."""

    # Numbers of rows that a step may have, ascending, the last one all slots; slots without a sequence compute
    # something that nobody reads. Empty: any number.
    sizes: tuple[int, ...] = ()
    length_step: int = 1  # a step attends to a multiple of this many keys
    # Launches that may be running before the tokens of the first are read. With 1, a row that stops runs one step more,
    # whose token is dropped.
    lag: int = 0
    capture: bool = False  # replay the steps of each size as a CUDA graph; needs ``sizes``
    kernel: bool = False  # attend with the kernel that needs no length, see spin.model.attention.generation_kernels

    def rows(self, n: int) -> int:
        """How many rows a step takes when slots 0 to n - 1 hold sequences."""
        return next((size for size in self.sizes if size >= n), n)

    def length(self, length: int, capacity: int) -> int:
        """How many keys a step attends to when the longest row has ``length``."""
        return capacity if self.kernel else min(-(-length // self.length_step) * self.length_step, capacity)


class Chosen:
    """Tokens of one launch on their way to the host: int64, shape (n,), and their log-probs in nats, float32, (n,).

    Both may change as soon as this returns.
    """

    def __init__(self, tokens: torch.Tensor, logprobs: torch.Tensor | None) -> None:
        self._event = torch.cuda.Event() if tokens.is_cuda else None
        given = [tokens] if logprobs is None else [tokens, logprobs]
        self._kept = [_to_host(tensor) if tensor.is_cuda else tensor.clone() for tensor in given]
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[list[int], list[float] | None]:
        """Token ids and log-probs; waits for this launch, not for later ones."""
        if self._event is not None:
            self._event.synchronize()
        tokens, *logprobs = (tensor.tolist() for tensor in self._kept)
        return tokens, logprobs[0] if logprobs else None


class Slots:
    """Sequences in slots, with the cache and all that choosing tokens needs. Forwards use it after :meth:`attach`.

    ``model`` is a patched torchtune decoder whose parameters are gathered; ``capacity`` is the longest sequence,
    in tokens; ``cache_dtype`` None takes the dtype of the keys.
    """

    def __init__(
        self,
        model: Any,
        sampling: SamplingParams,
        slots: int,
        capacity: int,
        plan: StepPlan,
        device: torch.device,
        cache_dtype: torch.dtype | None,
    ) -> None:
        self.sampling, self.slots, self.capacity, self.plan = sampling, slots, capacity, plan
        self._model, self._device, self._weights = model, device, _addresses(model)

        def state(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self._last = state(dtype=torch.int64)  # newest token of each slot
        self._positions = state(dtype=torch.int64)  # where it stands
        self._counts = state(dtype=torch.int64)  # tokens of the response so far
        self._numbers = state(sampling.max_new_tokens, dtype=torch.float64)  # one uniform number per token
        self._logprobs = state(dtype=torch.float32) if sampling.logprobs else None
        penalized = sampling.repetition_penalty != 1
        self._seen = state(model.tok_embeddings.num_embeddings, dtype=torch.bool) if penalized else None
        self._true = torch.ones((), dtype=torch.bool, device=device)
        self._rows = torch.arange(slots, device=device)
        self._indices = torch.arange(capacity, device=device)
        self._prompt_ends: torch.Tensor | None = None  # of a padded group of prompts; None in a decode step
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._captures = plan.capture
        if plan.capture:
            self._stream = _capture_stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        # Slots without a sequence write to the cache too, anywhere in it, so it has its full size at once.
        full = capacity if plan.sizes else 0
        self.view = attach_kv(model, slots, full, dtype=cache_dtype, device=device, kernel=plan.kernel)
        detach_kv(model)

    def fits(self, sampling: SamplingParams, slots: int, capacity: int) -> bool:
        """Whether these slots and graphs serve other requests too; not if the weights have moved to other addresses."""
        suffice = slots <= self.slots and capacity <= self.capacity
        return suffice and sampling == self.sampling and self._weights == _addresses(self._model)

    def attach(self) -> None:
        """Forwards of the model use the cache from now on."""
        reattach_kv(self._model, self.view)
        self._model.unembed = self._last_logits

    def detach(self) -> None:
        """Forwards of the model are as before, but for ``unembed``, which is the caller's to restore."""
        detach_kv(self._model)

    def prefill(self, slots: Sequence[int], prompts: Sequence[list[int]], numbers: Sequence[np.ndarray]) -> Chosen:
        """Reads prompts into free slots, in ascending order, and chooses the first token of each by the uniform
        ``numbers`` of its response's tokens, float64 in [0, 1)."""
        n, longest = len(slots), max(map(len, prompts))
        self._make_room(longest + 1)
        # Padding stands on the right, where causal attention never looks at it, and decoding overwrites it in the
        # cache. It repeats a token of the prompt, which says nothing new to the repetition penalty.
        tokens = self._send(torch.tensor([[*prompt, *prompt[-1:] * (longest - len(prompt))] for prompt in prompts]))
        ends = self._send(torch.tensor([len(prompt) - 1 for prompt in prompts]))
        padded = torch.zeros(n, self._numbers.shape[1], dtype=torch.float64)
        for row, own in enumerate(numbers):
            padded[row, : len(own)] = torch.from_numpy(own)
        first = slots[0]
        in_a_row = slots[-1] == first + n - 1  # they ascend
        where = slice(first, first + n) if in_a_row else self._send(torch.tensor(slots))
        self._numbers[where] = self._send(padded)
        self._positions[where] = ends
        self._counts[where] = self._counts.new_zeros(n)
        if self._seen is not None:
            self._seen[where] = self._seen.new_zeros(n, self._seen.shape[1]).scatter_(1, tokens, True)
        self.view.prefill(first if in_a_row else where)
        self._prompt_ends = ends
        with sdpa_kernel(_PREFILL_BACKENDS) if self._device.type == "cuda" else nullcontext():
            logits = self._model(tokens)
        self._prompt_ends = None
        return Chosen(*self._choose(logits, where))

    def step(self, n: int, length: int) -> Chosen:
        """One more token for the sequences in slots 0 to n - 1, and perhaps for slots above. ``length`` counts the keys
        of the longest sequence, including the one that this step writes."""
        size = self.plan.rows(n), self.plan.length(length, self.capacity)
        self._make_room(length if self.plan.kernel else size[1])
        if size in self.graphs:
            self.graphs[size].replay()
        elif self._captures:
            # The first step of a size runs as it is, on the stream that captures: compilation of kernels and
            # workspaces of libraries have no place in a graph.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._advance(*size)
            torch.cuda.current_stream().wait_stream(self._stream)
            self._capture(size)
        else:
            self._advance(*size)
        return Chosen(self._last[: size[0]], None if self._logprobs is None else self._logprobs[: size[0]])

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copies sequences of at most ``length`` tokens to other slots, none of which is a source."""
        source, target = self._send(torch.tensor(sources)), self._send(torch.tensor(targets))
        self.view.move(source, target, length)
        for state in (self._last, self._positions, self._counts, self._numbers, self._seen):
            if state is not None:
                state[target] = state[source]

    def _advance(self, n: int, length: int) -> None:
        """The device's work of a step, without a single wait: it may be captured."""
        positions = self._positions[:n]
        self.view.decode(positions, length)
        mask = None if self.plan.kernel else self._indices[:length] <= positions[:, None, None]  # (n, 1, length)
        logits = self._model(self._last[:n, None], mask=mask, input_pos=positions[:, None])
        self._choose(logits, slice(0, n))

    def _last_logits(self, h: torch.Tensor) -> torch.Tensor:
        """Stands in for ``model.unembed``: logits where a token will be chosen, (b, s, d) -> (b, v)."""
        h = h[:, -1] if self._prompt_ends is None else h[self._rows[: len(h)], self._prompt_ends]
        logits, cap = self._model.output(self._model.norm(h)), final_softcap(self._model)
        return logits if cap is None else softcap(logits.float(), cap)

    def _choose(self, logits: torch.Tensor, where: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A token for each row, which becomes the newest of its slot: (n, v) -> ids and perhaps log-probs, (n,)."""
        rows, counts = self._rows[where], self._counts[where]
        # Slots without a sequence count on, and stay inside what there is.
        numbers = self._numbers[rows, counts.clamp(max=self._numbers.shape[1] - 1)]
        seen = None if self._seen is None else self._seen[where]
        tokens = sample_tokens(logits, self.sampling, numbers, seen=seen, new_tokens=counts)
        self._last[where] = tokens
        self._positions[where] = (self._positions[where] + 1).clamp(max=self.capacity - 1)
        self._counts[where] = counts + 1
        if self._seen is not None:
            self._seen.index_put_((rows, tokens), self._true)
        if self._logprobs is None:
            return tokens, None
        logprobs = token_logprobs(logits, tokens)
        self._logprobs[where] = logprobs
        return tokens, logprobs

    def _capture(self, size: tuple[int, int]) -> None:
        """Captures the step of a size; capturing runs nothing."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: what other threads do to the GPU (a checkpoint that is still being written) is no fault.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._advance(*size)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that fails to end leaves the other one
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._captures = False
            why = str(error).strip().split("\n")[0]
            log.warning(f"Steps of {size[0]} sequences cannot be captured as a CUDA graph ({why}); continuing without.")
        else:
            self.graphs[size] = graph

    def _make_room(self, length: int) -> None:
        """Capacity for ``length`` tokens; it grows by half, up to what the longest row can need."""
        if length > self.view.capacity:
            steps = -(-max(length, self.view.capacity * 3 // 2) // _STEP)
            self.view.grow(max(length, min(steps * _STEP, self.capacity)))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device without waiting for it."""
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the process: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _addresses(model: Any) -> list[int]:
    return [tensor.data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors]
