"""Groups of ranks that share a generation engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from spin.config.components import ROOTS, raised_in
from spin.core.errors import GeneratorError, SpinError, Stopped
from spin.core.heartbeat import set_stage
from spin.core.ranks import World
from spin.generators.generator import Generator
from spin.model.sharding import named_full_tensors, unsharded


@dataclass(frozen=True)
class EngineGroup:
    """The ranks that share one engine, among all engines."""

    index: int  # number of this engine
    count: int  # how many engines there are
    writes: bool = True  # this rank is the one of its group that writes the engine's responses
    is_shared: bool = False  # there are other ranks in it
    agree: Callable[[bool], bool] = bool  # true if it is true on any rank of the group; collective within the group


def engine_group(generator: Generator, world: World) -> EngineGroup:
    """The group of this rank, as a rule alone in it: consecutive ranks share an engine, as many as the generator's
    ``ranks_per_engine`` says. Collective if that is more than one."""
    size = getattr(generator, "ranks_per_engine", 1)
    if size == 1:
        return EngineGroup(world.rank, world.world_size)
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world.world_size, size)]
    group = groups[world.rank // size]

    def agree(flag: bool) -> bool:
        flags: list[Any] = [None] * size
        dist.all_gather_object(flags, flag, group=group)
        return any(flags)

    return EngineGroup(world.rank // size, world.world_size // size, world.rank % size == 0, True, agree)


@contextmanager
def policy_loaded(generator: Generator, model: nn.Module) -> Iterator[None]:
    """Gives a generator the policy's weights for the time of a block. Collective at entry, not inside. A generator that
    runs the policy in place finds it gathered; another one is handed its tensors one at a time."""
    set_stage("giving the generator its weights")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # training's free blocks fit neither weights nor a cache
    with unsharded(model) if generator.shares_policy_weights else nullcontext():
        with raised_by(generator):
            generator.wake()
            if not generator.shares_policy_weights:
                generator.update_weights(named_full_tensors(model))
        try:
            yield
        finally:
            with raised_by(generator):
                generator.sleep()


@contextmanager
def raised_by(generator: object) -> Iterator[None]:
    """What a generator of the user's own raises in a block, ``SystemExit`` too, is a GeneratorError that says whose it
    is and where; want of memory, the device and other ranks are not."""
    try:
        yield
    except (SpinError, Stopped, torch.OutOfMemoryError, torch.AcceleratorError, dist.DistError):
        raise
    except (Exception, SystemExit) as error:  # code of the user's own may raise anything
        name = name_of(generator)
        if name.split(".")[0] in ROOTS:
            raise
        raise GeneratorError(
            f"generator: {name} raised {raised_in(name, error)}. Finished responses are kept. SPIN_TRACEBACK=1 shows "
            "more."
        ) from error


def name_of(generator: object) -> str:
    return f"{type(generator).__module__}.{type(generator).__qualname__}"
