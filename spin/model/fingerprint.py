"""Fingerprints of weights, by value: they tie a cached response or log-prob to the weights that made it."""

from __future__ import annotations

import functools
import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from spin.core.files import json_fingerprint
from spin.model.adapters import dequantized
from spin.model.sharding import clean_name, reshard

CHUNK_ELEMENTS = 1 << 18  # 2 MiB of int64: stays in the CPU's cache
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(model: nn.Module, frozen_only: bool = False) -> str:
    """Hashes all parameters and persistent buffers, whatever way they are sharded.

    Per tensor, each element's raw bits times an odd pseudo-random weight of its global position are summed modulo 2^64,
    which no sharding changes; the digest covers names, dtypes, shapes and sums. So any change of one element shows, and
    swapped elements or tensors do. It guards against mistakes, not against forgery. Memory stays flat. Collective.

    Args:
        model (nn.Module): plain or sharded; parameters that are still gathered are sharded again first.
        frozen_only (bool): leave out what training changes: the base of adapters alone.

    Returns:
        str: 64 hexadecimal digits, the same on one rank, on many and for a plain model.
    """
    reshard(model)
    trained = {clean_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {clean_name(name): tensor for name, tensor in model.state_dict().items()}
    named = {name: state[name] for name in sorted(state) if not (frozen_only and name in trained)}
    is_sharded = any(isinstance(tensor, DTensor) for tensor in named.values())
    # what is not sharded where others are, such as a buffer, is the same on every rank and counts once
    here = [not is_sharded or isinstance(tensor, DTensor) or dist.get_rank() == 0 for tensor in named.values()]
    sums = [
        position_weighted_sum(*_local_region(tensor)) if counts else 0  # NF4's values one at a time
        for tensor, counts in zip(named.values(), here, strict=True)
    ]
    if is_sharded:
        packed = torch.tensor(sums, dtype=torch.int64, device=next(model.parameters()).device)
        dist.all_reduce(packed)  # wraps around, like the sums
        sums = packed.tolist()
    described = [
        [name, str(tensor.dtype), list(tensor.shape), total]
        for (name, tensor), total in zip(named.items(), sums, strict=True)
    ]
    return json_fingerprint(described)


def _local_region(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The elements that this rank counts, flat, and the global position of the first of them."""
    tensor = dequantized(tensor)
    if not isinstance(tensor, DTensor):
        return tensor.detach().reshape(-1), 0
    coordinate = tensor.device_mesh.get_coordinate()
    counted, row = True, 0
    sharded_dims = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    local = tensor.to_local()
    if len(sharded_dims) == 1 and tensor.placements[sharded_dims[0]].is_shard(0):
        ranks = tensor.device_mesh.size(sharded_dims[0])
        rows_per_rank = -(-tensor.shape[0] // ranks)
        row = min(coordinate[sharded_dims[0]] * rows_per_rank, tensor.shape[0])
    elif sharded_dims:  # not contiguous in memory order: count the whole tensor once
        local = tensor.full_tensor()
        counted = not any(coordinate)
    # Of equal replicas only the first counts.
    counted &= all(index == 0 for dim, index in enumerate(coordinate) if dim not in sharded_dims)
    flat = local.detach().reshape(-1)
    return (flat if counted else flat[:0]), row * (tensor.numel() // tensor.shape[0] if tensor.dim() else 1)


def position_weighted_sum(flat: torch.Tensor, start: int) -> int:
    """Sum of bits times weights modulo 2^64, as a signed integer; ``start`` is the global position of ``flat[0]``."""
    bits = flat.view(_BITS[flat.element_size()])
    weights = _weights(flat.device)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    position = start
    while position < start + flat.numel():
        # Chunks begin at global multiples of the chunk length, whatever rank holds them.
        chunk, offset = divmod(position, CHUNK_ELEMENTS)
        length = min(CHUNK_ELEMENTS - offset, start + flat.numel() - position)
        piece = bits[position - start : position - start + length].to(torch.int64)
        total += piece.mul_(weights[offset : offset + length]).sum() * _chunk_weight(chunk)
        position += length
    return int(total)  # host/device sync


@functools.cache
def _weights(device: torch.device) -> torch.Tensor:
    """Odd pseudo-random int64 weights of the positions in a chunk."""
    seeds = torch.arange(CHUNK_ELEMENTS, dtype=torch.int64, device=device) + 1
    # A multiplicative congruence with xor-shifts; every step wraps around in int64.
    mixed = seeds * -0x61C8864680B583EB
    for shift, multiplier in ((29, -0x40A7B892E31B1A47), (32, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * multiplier
    return (mixed ^ (mixed >> 31)) | 1


def _chunk_weight(chunk: int) -> int:
    """Odd pseudo-random weight of a chunk, as a signed 64-bit integer."""
    digest = hashlib.sha256(chunk.to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:8], "little", signed=True) | 1
