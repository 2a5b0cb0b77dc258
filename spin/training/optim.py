"""torchao's AdamW with 8-bit moments or stochastically rounded bf16 weights, for sharded models.

torchao keeps quantized moments as tensor subclasses inside DTensors, which neither trains nor saves with FSDP2. Here
the state is ordinary DTensors, sharded along the rows like their parameter, and torchao's own step runs over views of
this rank's shards. Blocks of a quantized moment lie within a row, so nothing depends on how many ranks share the rows:
a state comes back bit for bit on any number of them.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any

import torch
import torchao.optim
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import zeros as distributed_zeros
from torchao.optim.subclass_8bit import OptimState8bit

from spin.core.errors import ConfigError
from spin.core.files import json_fingerprint
from spin.model.sharding import local_tensor
from spin.training.metrics import UpdateFraction

_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it has a sign
# As torchao: at most 256 values share a scale, and tensors of less than 4096 values are not worth quantizing.
_MAX_BLOCK, _MIN_BLOCK, _MIN_QUANTIZED = 256, 64, 4096


class _ShardedAdamW(torch.optim.Optimizer):
    """What both optimizers below share; :mod:`spin.checkpoint` saves its state, which torch's ``load_state_dict`` would
    cast to the parameters' dtype."""

    _quantized = False  # moments in 8 bits
    stochastic_rounding = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        seed: int = 0,
    ) -> None:
        name = f"spin.training.{type(self).__name__}"
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(
                f"{name}: found lr={lr}, betas={list(betas)}, eps={eps}, weight_decay={weight_decay}, expected betas "
                "in [0, 1) and no negative number."
            )
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "seed": seed}
        super().__init__(params, defaults)
        # harmless: a torch.compile cache that does without
        warnings.filterwarnings("ignore", message="OptimState8bit does not implement _stable_hash_for_caching")
        self._check_parameters()
        _check_compilers(name, on_gpu=any(p.is_cuda for group in self.param_groups for p in group["params"]))

    def _check_parameters(self) -> None:
        pass

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters that have a gradient; ``closure`` is that of torch's optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups: list[dict[str, Any]] = []
        states: dict[torch.Tensor, dict[str, torch.Tensor]] = {}  # by shard
        shard_number = 0
        for group in self.param_groups:
            shards = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                shard_number = _shard_number(parameter)  # the same for all
                state = self.state[parameter]
                if not state:
                    state.update(self._new_state(parameter))
                shard = local_tensor(parameter).detach()
                if shard.numel() == 0:  # a parameter of fewer rows than ranks: nothing to do but to count
                    state["step"] += 1
                    continue
                shard.grad = local_tensor(parameter.grad)
                states[shard] = {"step": state["step"], **{name: _moment(state, name) for name in _MOMENTS}}
                shards.append(shard)
            if shards:
                groups.append({key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} | {"params": shards})
        if groups:
            # it makes the learning rate a tensor, so that a new one does not compile the step again
            optimizer = torchao.optim.AdamW8bit(groups, bf16_stochastic_round=self.stochastic_rounding)
            optimizer.state.update(states)
            with self._seeded(states, shard_number):
                optimizer.step()
        return loss

    def _new_state(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {"step": torch.tensor(0.0, dtype=torch.float32)}
        block = _block_size(parameter) if self._quantized else 0
        for name in _MOMENTS:
            if block:
                shape = (parameter.shape[0], math.prod(parameter.shape[1:]) // block)
                state[f"{name}_codes"] = torch.zeros_like(parameter.detach(), dtype=torch.uint8)
                state[f"{name}_scale"] = _sharded_zeros(parameter, shape)
            else:  # in bf16 a second moment would soon stand still: it changes by a thousandth a step
                state[name] = torch.zeros_like(parameter.detach(), dtype=torch.float32)
        return state

    def _seeded(self, states: dict[torch.Tensor, Any], shard_number: int) -> AbstractContextManager[Any]:
        """Random numbers of this step and shard alone: a resumed run draws them again, replicas draw the same."""
        stack = ExitStack()
        if self.stochastic_rounding and any(shard.dtype is torch.bfloat16 for shard in states):
            devices = sorted({shard.device.index for shard in states if shard.is_cuda})
            stack.enter_context(torch.random.fork_rng(devices=devices, device_type="cuda"))
            step = max(int(state["step"].item()) for state in states.values())  # on the CPU: no sync
            numbers = [self.param_groups[0]["seed"], step, shard_number]
            seed = int(json_fingerprint(numbers)[:15], 16)
            for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
                generator.manual_seed(seed)
        return stack


class AdamW8bit(_ShardedAdamW):
    """AdamW with moments in 8 bits: 2 bytes of state per weight instead of 8.

    A moment is quantized in blocks of 64 to 256 values of a row; norms, biases, small tensors, and rows whose length is
    not a multiple of 64 keep it in fp32.

    Args:
        params (Iterable[Any]): parameters or groups, DTensors or plain.
        lr (float): learning rate.
        betas (Sequence[float]): decay of the two moments.
        eps (float): added to the denominator.
        weight_decay (float): decoupled, times the learning rate.
        stochastic_rounding (bool): round updated bf16 weights up or down at random, by how near each is, so that steps
            below their precision count on average; weights of other dtypes are not concerned.
        seed (int): of the rounding.

    Raises:
        ConfigError: If a number cannot be, or no compiler is found.

    Source:
        Dettmers et al., 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861; the step is
        ``torchao.optim.AdamW8bit``.
    """

    _quantized = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        self.stochastic_rounding = stochastic_rounding
        super().__init__(params, lr, betas, eps, weight_decay, seed=seed)


class AdamWStochasticRounding(_ShardedAdamW):
    """AdamW for bf16 weights that rounds them up or down at random, by how near each is; moments in fp32.

    A step of 5e-7 is far below the precision of most bf16 weights. Rounded to the nearest it is lost; rounded at random
    it moves a weight with the right probability, and so by the right amount on average. Arguments are those of
    :class:`AdamW8bit`.

    Raises:
        ConfigError: If a number cannot be, no weight is bf16, or no compiler is found.

    Source:
        Zamirai et al., Revisiting BFloat16 Training, https://arxiv.org/abs/2010.06192; the step is torchao's with
        ``bf16_stochastic_round``.
    """

    def _check_parameters(self) -> None:
        dtypes = {parameter.dtype for group in self.param_groups for parameter in group["params"]}
        if torch.bfloat16 not in dtypes:
            raise ConfigError(
                f"spin.training.AdamWStochasticRounding rounds bf16 weights, found only {', '.join(map(str, dtypes))}. "
                "Set dtype=bf16, or use torch.optim.AdamW."
            )


def optimizer_step(optimizer: torch.optim.Optimizer, model: nn.Module, lr: float) -> float:
    """Updates the weights; gives the fraction of them that changed, see :class:`spin.training.metrics.UpdateFraction`.

    If an optimizer's first step fails, unless for want of memory, the device or another rank, it cannot update such
    weights at all: a ConfigError.
    """
    is_first = not optimizer.state
    for group in optimizer.param_groups:
        group["lr"] = lr
    updated = UpdateFraction(model)
    try:
        optimizer.step()
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
        not_its_own = (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError)
        if not is_first or isinstance(error, not_its_own) or "out of memory" in str(error):
            raise
        kind = type(optimizer)
        problem = str(error).strip().split("\n", 1)[0][:300].rstrip(".")
        raise ConfigError(
            f"optimizer: {kind.__module__}.{kind.__name__} cannot update the model's weights: {problem}. No "
            "checkpoint was written of it. Check the section, or choose another, such as torch.optim.AdamW; "
            "SPIN_TRACEBACK=1 shows where it happened."
        ) from error
    return updated.measure()


def _block_size(parameter: torch.Tensor) -> int:
    """Values that share a scale, all in one row; 0 for a parameter whose moments are not quantized."""
    block = math.gcd(math.prod(parameter.shape[1:]), _MAX_BLOCK)
    if block < _MIN_BLOCK or parameter.numel() < _MIN_QUANTIZED:
        return 0
    shards = [p for p in getattr(parameter, "placements", ()) if not p.is_replicate()]
    return block if all(isinstance(placement, Shard) and placement.dim == 0 for placement in shards) else 0


def _sharded_zeros(parameter: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """fp32 zeros whose rows lie where the parameter's rows lie."""
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, device=parameter.device)
    zeros = distributed_zeros(
        shape, dtype=torch.float32, device_mesh=parameter.device_mesh, placements=parameter.placements
    )
    return zeros.to(parameter.device)  # offloaded shards are not where their mesh is


def _moment(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """This rank's part of a moment as torchao takes it; shares its memory with the state."""
    if name in state:
        return local_tensor(state[name])
    codes, scale = local_tensor(state[f"{name}_codes"]), local_tensor(state[f"{name}_scale"])
    return OptimState8bit(codes, scale.view(-1), _code_values(_MOMENTS[name], codes.device), _MOMENTS[name])


@cache
def _code_values(signed: bool, device: torch.device) -> torch.Tensor:
    """The numbers that the 256 codes stand for, times the scale; shape (256,)."""
    return OptimState8bit.zeros((_MIN_BLOCK,), signed, _MIN_BLOCK, device).qmap


def _shard_number(parameter: torch.Tensor) -> int:
    """Which shard of a parameter this rank has; replicas have the same."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh = parameter.device_mesh
    number = 0
    for size, coordinate, placement in zip(mesh.shape, mesh.get_coordinate(), parameter.placements, strict=True):
        if not placement.is_replicate():
            number = number * size + coordinate
    return number


def _check_compilers(name: str, on_gpu: bool) -> None:
    """torchao's step is compiled: scalars by C++; what runs on a GPU by Triton, which needs C."""
    compilers = {"CXX": ["clang++" if sys.platform == "darwin" else "g++"]}
    if on_gpu:
        compilers["CC"] = ["cc", "gcc", "clang"]
    for variable, usual in compilers.items():
        wanted = [os.environ[variable]] if os.environ.get(variable) else usual
        if not any(shutil.which(compiler.split()[0]) for compiler in wanted):
            raise ConfigError(
                f"{name}: its step is compiled, but {' or '.join(wanted)} was not found. Install one, set {variable}, "
                "or use torch.optim.AdamW with dtype=fp32."
            )
