"""Process group, and the few collectives that recipes need.

One process is the one-rank case of the same code: it gets a process group of size one and a sharded model like
everybody else, so nothing in this project asks whether it runs distributed.
"""

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spin.core.errors import ConfigError, SpinError
from spin.core.files import abort_atomic_dir, begin_atomic_dir, commit_atomic_dir, staging_dir
from spin.core.heartbeat import Heartbeat, compare_ranks, end_with_launcher, set_stage

# A rank that is stopped or gone is found by its heartbeat; time-outs of collectives are for one that lives and hangs.
# Tensors are exchanged by ranks that do the same at the same time; before objects are, ranks may generate for hours.
_DEVICE_TIMEOUT, _OBJECT_TIMEOUT = timedelta(minutes=30), timedelta(hours=8)
_START_TIMEOUT = timedelta(minutes=10)  # of the first rank for the last
SILENCE_SECONDS = 300.0
_LOOK_SECONDS = 0.5

_STORE: Any = None  # of the ranks, while there is a process group of several
_HEARTBEAT: Heartbeat | None = None
_MEETINGS = 0  # keys of the store are used once; ranks count alike

Row = TypeVar("Row")


@dataclass(frozen=True)
class World:
    """This process among all of them.

    ``mesh`` is ``("shard",)``, or ``("replicate", "shard")`` with replicas. ``group`` carries objects; None is the
    default process group.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, and writes what exists once."""
        return self.rank == 0


def use_deterministic_kernels() -> None:
    """Makes torch choose, for the process and before its first work on a GPU, kernels whose results repeat bit for bit:
    ordered sums, a fixed workspace for cuBLAS, and no choice by speed in ``torch.compile``."""
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
    """Joins the process group that torchrun announces, or makes one of size one.

    Without torchrun the group lives in memory and opens no port. A second call in a process describes the group that is
    there already. With several ranks, one that falls silent ends the others, see
    :class:`spin.core.heartbeat.Heartbeat`, and under torchrun a rank ends with its launcher.

    Args:
        device (str | None): ``cpu``, ``cuda`` or None for CUDA where there is a GPU.
        replicas (int): number of replicas of the sharded model (HSDP); 1 shards over all ranks.
        deterministic (bool): see :func:`use_deterministic_kernels`.
        inputs (Mapping[str, str] | None): what must be equal on all ranks, by name; compared before anything else.
        timeout_seconds (float): how long a rank may be silent before the others end.

    Returns:
        World: rank, device and mesh of this process.

    Raises:
        ConfigError: If ``device`` is unknown or not there, if ``replicas`` does not divide the number of processes, or
            if the process already has a group for another kind of device, or if the ranks' inputs differ.
    """
    device_type = _device_type(device)
    if deterministic:
        use_deterministic_kernels()
    under_torchrun = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
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
            "Call spin.core.ranks.shutdown() first, or set device=cpu."
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
    """Meets the other ranks at their store, compares inputs, and makes the process group."""
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
    """Raises ConfigError on all ranks if they have read different things, see
    :func:`spin.core.heartbeat.compare_ranks`. Collective."""
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


@contextmanager
def raise_on_all_ranks(world: World, kind: type[SpinError], path: Path | None = None) -> Iterator[None]:
    """Runs a block that can fail on one rank alone, such as a write to ``path``: if it fails on any, it fails on all.

    All raise the error of the first rank that failed; an OSError becomes a ``kind``. Without it the other ranks would
    wait in the next collective until its time-out. Collective at the end of the block, which must run no collective.
    """
    cause: Exception | None = None
    found: tuple[type[SpinError], str] | None = None
    try:
        yield
    except SpinError as error:
        cause, found = error, (type(error), str(error) or type(error).__name__)
    except OSError as error:
        text = str(error) or type(error).__name__
        cause, found = error, (kind, text if path is None else f"{path}: cannot write ({text}).")
    for rank, failure in enumerate(gather_objects(found, world)):
        if failure is not None:
            where = f"rank {rank}: " if world.world_size > 1 else ""
            raise failure[0](f"{where}{failure[1]}") from cause


@contextmanager
def atomic_dir_of_ranks(folder: Path, kind: str, world: World, error: type[SpinError]) -> Iterator[Path]:
    """:func:`spin.core.files.atomic_dir` for a folder in which all ranks write. Collective at both ends of the block,
    which fails, if it does, on all ranks."""
    try:
        with raise_on_all_ranks(world, error, folder):
            if world.is_main:
                begin_atomic_dir(folder, kind)
        yield staging_dir(folder)
        with raise_on_all_ranks(world, error, folder):
            if world.is_main:
                commit_atomic_dir(folder, kind)
    except Exception:
        if world.is_main:
            abort_atomic_dir(folder, kind)
        raise


def all_reduce_sums(values: Mapping[str, float | torch.Tensor], world: World) -> dict[str, float]:
    """Sums each value, a number or a tensor of shape (), over all ranks in float64, in one all-reduce and one wait for
    the device; keys are the same on every rank, in any order."""
    tensors = sorted(name for name, value in values.items() if isinstance(value, torch.Tensor))
    numbers = sorted(values.keys() - tensors)
    packed = [torch.tensor([values[name] for name in numbers], dtype=torch.float64), *(values[n] for n in tensors)]
    # a copy from the CPU would wait for all that the device still has to do
    sums = torch.cat([torch.as_tensor(v).to(world.device, torch.float64, non_blocking=True).view(-1) for v in packed])
    dist.all_reduce(sums)
    found = dict(zip([*numbers, *tensors], sums.tolist(), strict=True))  # host/device sync
    return {name: found[name] for name in values}


def any_rank(flag: bool, world: World) -> bool:
    """True on every rank if ``flag`` is true on one."""
    return all_reduce_sums({"flag": float(flag)}, world)["flag"] > 0


def any_rank_soon(flag: Callable[[], bool]) -> Callable[[], bool]:
    """A function that is true within a second of ``flag`` being true on any rank, once and for all. Not collective, for
    ranks that do not wait for each other: it asks their store now and then."""
    store, next_look, found = _STORE, -math.inf, False

    def is_set() -> bool:
        nonlocal next_look, found
        if store is None:
            return flag()
        if not found and time.monotonic() >= next_look:
            next_look = time.monotonic() + _LOOK_SECONDS
            found = flag() or store.check(["asked to stop"])
            if found:
                store.set("asked to stop", "")
        return found

    return is_set


class CountOfRanks:
    """A count that all ranks add to through their store, now and then, without waiting for each other. Every rank makes
    as many of them."""

    def __init__(self) -> None:
        global _MEETINGS  # noqa: PLW0603
        _MEETINGS += 1
        self._key, self._pending, self._known, self._next_look = f"count/{_MEETINGS}", 0, 0, -math.inf

    def add(self, count: int, look: bool = False) -> int:
        """Adds to it; gives by how much it has grown since the last call. What others added is seen twice a second, or
        at once with ``look``."""
        self._pending += count
        if _STORE is not None and (look or time.monotonic() >= self._next_look):
            count = _STORE.add(self._key, self._pending) - self._known
            self._pending, self._next_look = 0, time.monotonic() + _LOOK_SECONDS
        self._known += count
        return count


def with_own_process_group(world: World) -> World:
    """The same ranks with a process group of their own on the CPU, for another thread's collectives. Collective."""
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
        # three). Meshes keep the threads alive, so destroying the group does not wait for them: release the GIL.
        time.sleep(0.1)
