"""FSDP2: sharding a model, gathering its weights, accumulating and clipping gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor

from spin.core.errors import ConfigError, NonFiniteError
from spin.core.heartbeat import set_stage
from spin.core.ranks import Row, World
from spin.core.terminal import some_of
from spin.model.adapters import adapted_modules, adapter_parameters, allocate_nf4, as_nf4, dequantized, merged_weight

NONFINITE_REMEDY = (
    "Nothing of that was saved or exported; earlier checkpoints are complete. Is the learning rate too high? The same "
    "command, with what you change, resumes from the last one: optimizer.lr=... resume_with_changes=[optimizer]"
)
_KEPT = "_spin_unsharded"  # set on the root while `unsharded` holds the parameters
_RESHARD = "_spin_reshard_after_forward"  # set on each sharded module: as it was given to `fully_shard`


def shard_model(
    model: nn.Module,
    world: World,
    *,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shards a torchtune decoder in place, one group per transformer layer and one for the rest.

    Parameters keep their dtype in the shards, compute in ``compute_dtype``, and their gradients are averaged over the
    ranks in float32. Wrap layers (activation checkpointing, ``layer.compile()``) before, and load weights after.

    Alone, frozen weights that need no cast (an adapter's base) are left out: there is nothing to gather, and no second
    copy of them is made. NF4 weights even must be: for one rank, FSDP2 forgets all but the first of their parts.

    The root (embeddings, last norm, output) stays gathered from forward to backward, which needs it first; after a
    forward without gradients it is sharded again at once, so that nobody meets a stale copy after the next step.

    Args:
        model (nn.Module): has ``layers``; may be on the meta device.
        world (World): gives the mesh.
        compute_dtype (torch.dtype): dtype of parameters and activations in forward and backward.
        reshard_after_forward (bool): free a layer's gathered parameters after its forward; False saves all gathers of
            an optimizer step but the first (see :func:`accumulating`) and costs memory for the whole model in
            ``compute_dtype``. On one rank a gather is a cast and a copy.
        cpu_offload (bool): keep shards, gradients and optimizer state in CPU memory; needs a GPU to compute on.

    Raises:
        ConfigError: If the model has no ``layers``, or if ``cpu_offload`` is asked for without a GPU.
    """
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList | nn.ModuleDict):
        raise ConfigError(
            f"cannot shard {type(model).__name__}: it has no `layers` module list. "
            "SPIN trains torchtune decoders (torchtune.modules.TransformerDecoder)."
        )
    if cpu_offload and world.device.type == "cpu":
        raise ConfigError(
            "fsdp_cpu_offload=true moves parameters off the GPU, but device is cpu. Set fsdp_cpu_offload=false."
        )
    ignored: set[nn.Parameter] = set()
    if world.world_size == 1 and not cpu_offload:
        frozen = (parameter for parameter in model.parameters() if not parameter.requires_grad)
        ignored = {weight for weight in frozen if weight.dtype == compute_dtype or as_nf4(weight) is not None}
    sharded = (parameter for parameter in model.parameters() if parameter not in ignored)
    stored_dtypes = {parameter.dtype for parameter in sharded if parameter.is_floating_point()}
    mp_policy = MixedPrecisionPolicy(
        param_dtype=None if stored_dtypes == {compute_dtype} else compute_dtype, reduce_dtype=torch.float32
    )
    for module in (*(layers.values() if isinstance(layers, nn.ModuleDict) else layers), model):
        is_resharded = reshard_after_forward and module is not model
        fully_shard(
            module,
            mesh=world.mesh,
            reshard_after_forward=is_resharded,
            mp_policy=mp_policy,
            offload_policy=CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
            ignored_params=ignored,
        )
        setattr(module, _RESHARD, is_resharded)
    model.register_forward_hook(_reshard_root_without_grad)


def _reshard_root_without_grad(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled() and not getattr(model, _KEPT, False):
        reshard(model)


def materialize(model: nn.Module, world: World, *, cpu_offload: bool = False) -> None:
    """Gives a sharded meta-device model its memory: uninitialised parameters, computed rotary tables.

    ``model`` was built under ``torch.device("meta")`` and sharded with the same ``cpu_offload``. ConfigError if a
    buffer that no checkpoint holds cannot be computed.
    """
    device = torch.device("cpu") if cpu_offload else world.device
    model.to_empty(device=device)
    for parameter in model.parameters():
        allocate_nf4(parameter, device)
    computed: set[str] = set()
    for name, module in model.named_modules():
        if hasattr(module, "rope_init"):
            with torch.device(world.device):
                module.rope_init()
            computed.update(f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False))
    # Buffers outside the state dict have no other source than their module's own code.
    left = sorted(
        clean_name(f"{name}.{buffer}")
        for name, module in model.named_modules()
        for buffer in module._non_persistent_buffers_set
        if getattr(module, buffer) is not None and f"{name}.{buffer}" not in computed
    )
    if left:
        raise ConfigError(
            f"buffers {', '.join(left)} are not in checkpoints and their module has no rope_init() to compute them. "
            "Build the model on its device, not on meta."
        )


def clean_name(name: str) -> str:
    """The name of a parameter or module without the prefixes of activation checkpointing and torch.compile."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """Every module of ``model`` that FSDP2 shards, root first; empty for a plain model."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Frees all gathered parameters, so that ``model.parameters()`` are the shards that the optimizer updates."""
    for module in sharded_modules(model):
        module.reshard()


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Gathers every parameter once, in the compute dtype, and keeps them all until the end of the block.

    Forwards inside run no collective, so ranks may run different numbers of them: this is for generation. Costs the
    memory of the whole model in the compute dtype. Collective at entry; forwards inside are for ``torch.no_grad()``. At
    exit the model is sharded as before. Does nothing for a plain model; may be nested.
    """
    modules = sharded_modules(model)
    if not modules or getattr(model, _KEPT, False):
        yield
        return
    setattr(model, _KEPT, True)
    try:
        # Tensors made in inference mode could never be trained on again.
        with torch.inference_mode(False), torch.no_grad():
            for module in modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        yield
    finally:
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(getattr(module, _RESHARD, True), recurse=False)
        setattr(model, _KEPT, False)


@contextmanager
def without_fsdp_hooks(model: nn.Module) -> Iterator[None]:
    """Runs forwards without FSDP2's hooks, for use inside :func:`unsharded`: there they have nothing to gather.

    They would make streams wait for each other, which no CUDA graph may record, and cost a decode step on a CPU a few
    per cent. Inputs are not cast: what a layer gets has the compute dtype already, because the embeddings have it.
    """
    saved = []
    for module in sharded_modules(model):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            saved.append((hooks, list(hooks.items())))
            for key, hook in saved[-1][1]:
                if isinstance(getattr(hook, "__self__", None), FSDPState):
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, items in saved:
            hooks.clear()
            hooks.update(items)


@contextmanager
def accumulating(
    model: nn.Module, rows: Sequence[Row], *, unsharded_gradients: bool = False
) -> Iterator[Iterator[Row]]:
    """Accumulates gradients over the rows of one optimizer step; a row is one forward and one backward.

    What is gathered after a forward (the root always, the layers with ``reshard_after_forward=False``) stays gathered
    until the last row's backward, so it is gathered once per step; this costs no memory beyond the peak that a forward
    has anyway. Between replicas (HSDP) gradients travel once per step, with the last row.

    At the end of the block the model is sharded and reduces gradients as before. If the block raises, or ends before
    the last row, the gradients so far are dropped, so that nothing of them gets into the next step.

    Example:
        >>> with accumulating(model, rows) as each_row:
        ...     for row in each_row:
        ...         loss(model, row).backward()

    Args:
        model (nn.Module): sharded by :func:`shard_model`, or plain.
        rows (Sequence[Row]): of this rank; every rank has the same number of them.
        unsharded_gradients (bool): add rows up in whole float32 gradients on every rank and reduce-scatter them once,
            with the last row: less traffic, 4 bytes more per parameter of the whole model. False reduce-scatters after
            every row.

    Yields:
        Iterator[Row]: the rows, once.
    """
    set_stage("training step")
    modules = sharded_modules(model)
    is_complete = False

    def each_row() -> Iterator[Row]:
        nonlocal is_complete
        for number, row in enumerate(rows, start=1):
            _set_accumulation(modules, unsharded_gradients, is_last=number == len(rows))
            yield row
        is_complete = True

    try:
        yield each_row()
    finally:
        _set_accumulation(modules, unsharded_gradients, is_last=True)
        reshard(model)
        if not is_complete:
            _drop_gradients(modules)
            model.zero_grad(set_to_none=True)


def _set_accumulation(modules: list[FSDPModule], unsharded_gradients: bool, is_last: bool) -> None:
    # set_is_last_backward stays True: False would let the root's reduce-scatter run into the next forward, with its
    # float32 input (the whole vocabulary) alive at that forward's peak.
    for module in modules:
        module.set_requires_gradient_sync(is_last or not unsharded_gradients, recurse=False)
        module.set_requires_all_reduce(is_last, recurse=False)
        module.set_reshard_after_backward(is_last or getattr(module, _RESHARD, True), recurse=False)


def _drop_gradients(modules: list[FSDPModule]) -> None:
    """Forgets gradients that are not reduced yet; FSDP2 has no method for that."""
    for module in modules:
        group = module._get_fsdp_state()._fsdp_param_group
        if group is None:
            continue
        group._partial_reduce_output = None
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # gathered at least once
                parameter._unsharded_param.grad = None


def clip_grad_norm(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Scales the gradients down to a norm of at most ``max_norm``; one all-reduce, no host/device sync.

    Args:
        model (nn.Module): sharded or plain, after the last backward of the step.
        max_norm (float | None): None only measures.

    Returns:
        torch.Tensor: L2 norm of the whole gradient before clipping, the same on every rank, shape ().
    """
    if max_norm is None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return full_tensor(torch.nn.utils.get_total_norm(gradients, foreach=True))
    return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, foreach=True))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; a plain tensor as it is. Collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether none of a plain tensor's values is NaN or infinite, shape (); one pass, and no wait for the device."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    least, most = tensor.detach().aminmax()  # ten times as fast as isfinite; both are NaN if one value is
    return least.isfinite() & most.isfinite()


def nonfinite_weights(model: nn.Module, world: World) -> list[str]:
    """Names of parameters that hold NaN or infinity, the same on every rank; NF4 weights, which never change, are left
    out. Collective: each rank looks at its shards."""
    reshard(model)
    named = {clean_name(name): local_tensor(p.detach()) for name, p in model.named_parameters() if as_nf4(p) is None}
    flags = torch.stack([is_finite(tensor).logical_not().to(world.device) for tensor in named.values()]).int()
    dist.all_reduce(flags)
    return [name for name, count in zip(named, flags.tolist(), strict=True) if count]  # host/device sync


def weight_gathers(model: nn.Module) -> dict[str, Callable[..., torch.Tensor]]:
    """Functions that gather a model's weights, by torchtune name, each when it is called. Collective then.

    Each takes a dtype, and without one gives the parameter's own, or float32 if it is merged: a weight that has an
    adapter comes merged with it, see :func:`spin.model.adapters.merged_weight`, and the adapter's own parameters do not
    come. These are the weights of the plain model that computes the same.
    """
    reshard(model)
    adapted = {module.weight: module for module in adapted_modules(model).values()}
    parts = {part for module in adapted.values() for part in adapter_parameters(module).values()}

    def gather(parameter: nn.Parameter, dtype: torch.dtype | None = None) -> torch.Tensor:
        if parameter in adapted:
            merged = merged_weight(adapted[parameter], full_tensor)
            return merged if dtype is None else merged.to(dtype)
        weight = dequantized(parameter.detach())
        return full_tensor(weight if dtype is None else weight.to(dtype))

    return {
        clean_name(name): partial(gather, parameter)
        for name, parameter in model.named_parameters()
        if parameter not in parts
    }


def named_full_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's full weights by torchtune name, gathered one at a time; adapters are merged. Collective."""
    for name, gather in weight_gathers(model).items():
        yield name, gather()


def check_weights(model: nn.Module, world: World, what: str) -> None:
    """Raises NonFiniteError on all ranks if a weight is NaN or infinite; ``what`` would be made of them. Collective."""
    broken = nonfinite_weights(model, world)
    if broken:
        raise NonFiniteError(f"{what}: NaN or infinity in the weights {some_of(broken, 10)}. {NONFINITE_REMEDY}")
