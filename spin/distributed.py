"""Process group, sharding, and the few collectives that recipes need.

One process is the one-rank case of the same code: it gets a process group of size one and a sharded model like
everybody else, so nothing in this project asks whether it runs distributed.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor

from spin.adapters import adapted_modules, adapter_parameters, allocate_nf4, dequantized, merged_weight, nf4_of
from spin.errors import ConfigError, SpinError
from spin.ranks import Heartbeat, compare_ranks, end_with_launcher, set_stage

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KEPT = "_spin_unsharded"  # set on the root while `unsharded` holds the parameters
_RESHARD = "_spin_reshard_after_forward"  # set on each sharded module: as it was given to `fully_shard`
# A rank that is stopped or gone is found by its heartbeat; time-outs of collectives are for one that lives and hangs.
# Tensors are exchanged by ranks that do the same at the same time; before objects are, ranks may generate for hours.
_DEVICE_TIMEOUT, _OBJECT_TIMEOUT = timedelta(minutes=30), timedelta(hours=8)
_START_TIMEOUT = timedelta(minutes=10)  # of the first rank for the last
SILENCE_SECONDS = 300.0

_STORE: Any = None  # of the ranks, while there is a process group of several
_HEARTBEAT: Heartbeat | None = None
_MEETINGS = 0  # keys of the store are used once; ranks count alike

Row = TypeVar("Row")


@dataclass(frozen=True)
class World:
    """The place of this process among all of them.

    Args:
        rank (int): number of this process, 0 to ``world_size - 1``.
        world_size (int): number of processes.
        local_rank (int): number of this process on its host.
        device (torch.device): where this process computes.
        mesh (DeviceMesh): ``("shard",)``, or ``("replicate", "shard")`` with replicas.
        group (dist.ProcessGroup | None): whose collectives carry objects; None is the default group.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes what exists once."""
        return self.rank == 0


def use_deterministic_kernels() -> None:
    """Makes torch choose, from here on, kernels that give the same bits in every run on the same GPU.

    Sums by atomic additions give way to ordered ones, cuBLAS gets a fixed workspace, and the compiler of
    ``torch.compile`` no longer picks kernels by how fast they ran. Call it before the first work on a GPU; it holds for
    the process.
    """
    from torch._inductor import config as inductor_config  # takes 0.8 s to import

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses cuBLAS in this mode
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    inductor_config.deterministic = True


def init_world(
    device: str | None = None,
    *,
    replicas: int = 1,
    deterministic: bool = False,
    inputs: Mapping[str, str] | None = None,
    timeout_seconds: float = SILENCE_SECONDS,
) -> World:
    """Joins the process group that torchrun announces, or make one of size one.

    Without torchrun the group lives in memory and opens no port. A second call in a process describes the group that is
    there already. With several ranks, one that falls silent ends the others, see :class:`spin.ranks.Heartbeat`, and
    under torchrun a rank ends with its launcher.

    Args:
        device (str | None): ``cpu``, ``cuda`` or None for CUDA where there is a GPU.
        replicas (int): number of replicas of the sharded model (HSDP); 1 shards over all ranks.
        deterministic (bool): see :func:`use_deterministic_kernels`.
        inputs (Mapping[str, str] | None): what must be equal on all ranks, see :func:`spin.ranks.compare_ranks`;
            compared before anything else is done together.
        timeout_seconds (float): silence of a rank that the others endure.

    Returns:
        World: rank, device and mesh of this process.

    Raises:
        ConfigError: If ``device`` is unknown or not there, if ``replicas`` does not divide the number of processes, or
            if the process already has a group for another kind of device, or if the ranks' inputs differ.
    """
    device_type = _device_type(device)
    if deterministic:
        use_deterministic_kernels()
    under_torchrun = all(name in os.environ for name in _TORCHRUN_VARIABLES)
    local_rank = int(os.environ.get("LOCAL_RANK", "0")) if under_torchrun else 0
    if device_type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this host has no GPU: torch sees {torch.cuda.device_count()}. "
                "Lower --nproc_per_node, or check CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(local_rank)
        here = torch.device("cuda", local_rank)
    else:
        here = torch.device("cpu")
        _keep_freed_memory()

    if not dist.is_initialized():
        # CPU tensors have their own backend on GPUs too: objects and checkpoints travel without touching the GPU.
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        if under_torchrun:
            _meet(backend, inputs or {}, timeout_seconds)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_DEVICE_TIMEOUT)
    elif device_type == "cuda" and "nccl" not in dist.get_backend_config():
        raise ConfigError(
            f"device is cuda, but this process already has a process group with backend {dist.get_backend()}. "
            "Call spin.distributed.shutdown() first, or set device=cpu."
        )

    world_size = dist.get_world_size()
    if replicas < 1 or world_size % replicas:
        raise ConfigError(
            f"replicas is {replicas}, but there are {world_size} processes. replicas must divide the number of "
            "processes: 1 shards the model over all of them."
        )
    if replicas == 1:
        mesh = init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    else:
        shape = (replicas, world_size // replicas)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
    objects = dist.new_group(backend="gloo", timeout=_OBJECT_TIMEOUT) if world_size > 1 else None
    return World(dist.get_rank(), world_size, local_rank, here, mesh, objects)


def _meet(backend: str, inputs: Mapping[str, str], timeout_seconds: float) -> None:
    """Joins the other ranks at their store, compares inputs, and makes the process group."""
    global _HEARTBEAT, _STORE, _MEETINGS  # noqa: PLW0603 - one process group a process
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # NCCL's flight recorder: the last collectives of a hang
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    store, rank, world_size = next(dist.rendezvous("env://", timeout=_START_TIMEOUT))
    _MEETINGS += 1
    _STORE = dist.PrefixStore(f"spin/{_MEETINGS}", store)
    if world_size > 1:
        _HEARTBEAT = Heartbeat(_STORE.clone(), rank, world_size, timeout_seconds)
        compare_ranks(_STORE, rank, world_size, inputs, "start", _START_TIMEOUT)
        _HEARTBEAT.start()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_DEVICE_TIMEOUT)
    set_stage("reading data and checking")


def check_ranks_agree(inputs: Mapping[str, str], world: World) -> None:
    """Refuses, on all ranks alike, ranks that have read different things. Collective.

    Args:
        inputs (Mapping[str, str]): what must be equal, by name.
        world (World): the ranks.

    Raises:
        ConfigError: If they differ, with each difference, its ranks and their hosts.
    """
    global _MEETINGS  # noqa: PLW0603
    if world.world_size > 1 and _STORE is not None:
        _MEETINGS += 1
        compare_ranks(_STORE, world.rank, world.world_size, inputs, f"inputs/{_MEETINGS}", _OBJECT_TIMEOUT)


def _keep_freed_memory() -> None:
    """Lets malloc keep large blocks instead of returning them to the system.

    FSDP frees and allocates each layer's parameters in every forward and backward, and on CPU the page faults of fresh
    blocks cost more than the copies: 25 % of a step of a 135M model in bfloat16, 7 % with this.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def _device_type(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"device is {device!r}, expected 'cpu', 'cuda' or null. The GPU's number comes from torchrun, or from "
            "CUDA_VISIBLE_DEVICES."
        )
    if device == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        raise ConfigError(
            f"device is cuda, but torch {torch.__version__} ({built}) sees no GPU. Set device=cpu, or install a CUDA "
            "build of torch and check the driver with nvidia-smi."
        )
    return device


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
        ignored = {weight for weight in frozen if weight.dtype == compute_dtype or nf4_of(weight) is not None}
    sharded = (parameter for parameter in model.parameters() if parameter not in ignored)
    stored_dtypes = {parameter.dtype for parameter in sharded if parameter.is_floating_point()}
    mp_policy = MixedPrecisionPolicy(
        param_dtype=None if stored_dtypes == {compute_dtype} else compute_dtype, reduce_dtype=torch.float32
    )
    offload_policy = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for layer in layers.values() if isinstance(layers, nn.ModuleDict) else layers:
        _shard(layer, world, mp_policy, offload_policy, reshard_after_forward, ignored)
    _shard(model, world, mp_policy, offload_policy, reshard_after_forward=False, ignored=ignored)
    model.register_forward_hook(_reshard_root_without_grad)


def _shard(
    module: nn.Module,
    world: World,
    mp_policy: MixedPrecisionPolicy,
    offload_policy: OffloadPolicy,
    reshard_after_forward: bool,
    ignored: set[nn.Parameter],
) -> None:
    fully_shard(
        module,
        mesh=world.mesh,
        reshard_after_forward=reshard_after_forward,
        mp_policy=mp_policy,
        offload_policy=offload_policy,
        ignored_params=ignored,
    )
    setattr(module, _RESHARD, reshard_after_forward)


def _reshard_root_without_grad(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.is_grad_enabled() and not getattr(model, _KEPT, False):
        reshard(model)


def materialize(model: nn.Module, world: World, *, cpu_offload: bool = False) -> None:
    """Gives a sharded meta-device model its memory: uninitialised parameters, computed rotary tables.

    Args:
        model (nn.Module): built under ``torch.device("meta")`` and sharded.
        world (World): gives the device.
        cpu_offload (bool): as given to :func:`shard_model`.

    Raises:
        ConfigError: If a buffer that no checkpoint holds cannot be computed.
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

    Args:
        model (nn.Module): sharded by :func:`shard_model`, or plain.

    Yields:
        None: the parameters are gathered.
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
def hooks_off(model: nn.Module) -> Iterator[None]:
    """Runs forwards without FSDP2's hooks, for use inside :func:`unsharded`: there they have nothing to gather.

    They would make streams wait for each other, which no CUDA graph may record, and cost a decode step on a CPU a few
    per cent. Inputs are not cast: what a layer gets has the compute dtype already, because the embeddings have it.

    Args:
        model (nn.Module): gathered, or plain.

    Yields:
        None: the hooks are off.
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
    for module in modules:
        module.set_requires_gradient_sync(is_last or not unsharded_gradients, recurse=False)
        module.set_requires_all_reduce(is_last, recurse=False)
        module.set_reshard_after_backward(is_last or getattr(module, _RESHARD, True), recurse=False)
    # set_is_last_backward stays True: False would let the root's reduce-scatter run into the next forward, with its
    # float32 input (the whole vocabulary) alive at that forward's peak.


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
    """Looks for NaN and infinity in a model's parameters. Collective: each rank looks at its shards.

    Args:
        model (nn.Module): sharded or plain. NF4 weights, which never change, are not looked at.
        world (World): the ranks.

    Returns:
        list[str]: torchtune's names of the parameters that hold one, the same on every rank.
    """
    reshard(model)
    named = {clean_name(name): local_tensor(p.detach()) for name, p in model.named_parameters() if nf4_of(p) is None}
    flags = torch.stack([is_finite(tensor).logical_not().to(world.device) for tensor in named.values()]).int()
    dist.all_reduce(flags)
    return [name for name, count in zip(named, flags.tolist(), strict=True) if count]  # host/device sync


def weight_gathers(model: nn.Module) -> dict[str, Callable[..., torch.Tensor]]:
    """Functions that gather a model's weights, by torchtune name, each when it is called. Collective then.

    A weight that has an adapter comes merged with it, see :func:`spin.adapters.merged_weight`, and the adapter's own
    parameters do not come: these are the weights of the plain model that computes the same.

    Args:
        model (nn.Module): sharded or plain.

    Returns:
        dict[str, Callable[..., torch.Tensor]]: each gives the whole tensor, detached, in the dtype that it is given;
        without one in the parameter's own, or float32 if it is merged.
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
    """Gives the model's weights by torchtune name, gathered one at a time. Collective: every rank takes them all.

    Args:
        model (nn.Module): sharded or plain; adapters are merged, see :func:`weight_gathers`.

    Yields:
        tuple[str, torch.Tensor]: name and whole tensor, detached.
    """
    for name, gather in weight_gathers(model).items():
        yield name, gather()


@contextmanager
def fail_together(world: World, kind: type[SpinError], path: Path | None = None) -> Iterator[None]:
    """Runs a block that can fail on one rank alone, such as a write: if it fails on any, it fails on all.

    Without it the other ranks would wait in the next collective until its time-out. Collective at the end of the block;
    the block itself must run no collective.

    Args:
        world (World): the ranks.
        kind (type[SpinError]): what to raise.
        path (Path | None): what the block writes, for the message.

    Yields:
        None: the block runs.

    Raises:
        SpinError: With the message of the first rank that failed: of its kind if it was a ``SpinError``, of ``kind`` if
            it was an ``OSError``.
    """
    cause: Exception | None = None
    try:
        yield
    except (OSError, SpinError) as error:
        cause = error
    found: tuple[type[SpinError], str] | None = None
    if cause is not None:
        text = str(cause) or type(cause).__name__
        if isinstance(cause, SpinError):
            found = type(cause), text
        else:
            found = kind, text if path is None else f"{path}: cannot write ({text})."
    for rank, failure in enumerate(gather_objects(found, world)):
        if failure is not None:
            where = f"rank {rank}: " if world.world_size > 1 else ""
            raise failure[0](f"{where}{failure[1]}") from cause


def all_reduce_sums(values: dict[str, float], world: World) -> dict[str, float]:
    """Sums each value over all ranks, in one all-reduce.

    Args:
        values (dict[str, float]): the same keys on every rank, in any order.
        world (World): the ranks.

    Returns:
        dict[str, float]: float64 sums, in the order of ``values``.
    """
    names = sorted(values)
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=world.device)
    dist.all_reduce(packed)
    sums = dict(zip(names, packed.tolist(), strict=True))  # host/device sync
    return {name: sums[name] for name in values}


def any_rank(flag: bool, world: World) -> bool:
    """True on every rank if ``flag`` is true on one."""
    return all_reduce_sums({"flag": float(flag)}, world)["flag"] > 0


def beside(world: World) -> World:
    """The same ranks with a process group of their own, for the collectives of another thread. Collective.

    Args:
        world (World): the ranks.

    Returns:
        World: carries objects over the CPU, whatever the main thread does at the time.
    """
    return replace(world, group=dist.new_group(backend="gloo", timeout=_OBJECT_TIMEOUT))


def gather_objects(obj: Any, world: World) -> list[Any]:
    """The objects of all ranks, in rank order, on every rank. Between processes of one run only: it uses pickle."""
    objects: list[Any] = [None] * world.world_size
    dist.all_gather_object(objects, obj, group=world.group)
    return objects


def broadcast_object(obj: Any, world: World) -> Any:
    """Rank 0's object on every rank."""
    objects = [obj if world.is_main else None]
    dist.broadcast_object_list(objects, src=0, group=world.group)
    return objects[0]


def barrier(world: World) -> None:
    """Waits until every rank is here."""
    if world.device.type == "cuda":
        dist.barrier(device_ids=[world.local_rank])
    else:
        dist.barrier(group=world.group)


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    global _HEARTBEAT, _STORE  # noqa: PLW0603
    if _HEARTBEAT is not None:
        _HEARTBEAT.stop()
    _HEARTBEAT = _STORE = None
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads drop the last collective's tensors after it is over, and need the interpreter's lock for that.
        # One that asks for it while the interpreter ends aborts the process, its work all done (seen in one exit of
        # three). Meshes keep the threads alive, so destroying the group does not wait for them: lend them the lock.
        time.sleep(0.1)
