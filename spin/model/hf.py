"""Hugging Face folders in and out.

Next to its shards a rank holds one tensor at a time: reading, the rows of its shards; writing, a whole one, which goes
to its place in the file at once. torchtune's converters know names and layouts. This module asks them with meta tensors
what a folder must contain, so that every fault of a folder is known from its headers, before a byte of weights is read;
and with numbered rows where each row of a tensor lies.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from spin.core.errors import CheckpointError
from spin.core.files import read_json, sync, write_json
from spin.core.heartbeat import set_stage
from spin.core.ranks import World, atomic_dir_of_ranks, gather_objects, raise_on_all_ranks
from spin.core.terminal import first_lines, some_of
from spin.model.adapters import adapted_modules, adapter_parameters, as_nf4, fill_nf4
from spin.model.hf_check import check_model
from spin.model.hf_config import CONFIG, unknown_keys
from spin.model.hf_families import LAYOUTS, Tensors, check_model_type, config_of, converter_arguments, merges
from spin.model.hf_folder import INDEX, broken_file, quantized, read_config, read_hf_config, text_name, weight_files
from spin.model.hf_names import CONSTANTS, STACKED
from spin.model.sharding import check_weights, clean_name, is_finite, reshard, weight_gathers

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
MAX_FILE_BYTES = 5 * 10**9
# What an exported model needs besides weights and config, and what its licence asks to pass on
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "chat_template*",
)  # fmt: skip
_COMPANIONS = (GENERATION_CONFIG, "LICENSE*", "NOTICE*", "USE_POLICY*")
_CHAT_TEMPLATE = "chat_template.jinja"  # goes before what tokenizer_config.json has
_COMPARED_ROWS = 16384  # of two matrices, at a time
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LM_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_INV_FREQ = "rotary_emb.inv_freq"  # a table that old folders hold; torchtune computes its own


@dataclass(frozen=True)
class _Entry:
    """One tensor of a folder, from a file's header; or one expert's rows of a tensor that holds those of all."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    expert: int | None = None
    first_row: int = 0  # in the expert's matrix


def _read_headers(files: Iterable[Path]) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    view = tensors.get_slice(name)
                    own = text_name(name)
                    if own is not None and _INV_FREQ not in name:
                        entry = _Entry(file, name, tuple(view.get_shape()), view.get_dtype())
                        entries |= _by_expert(own, entry) or {own: entry}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(broken_file(file, error)) from error
    return entries


def _by_expert(name: str, entry: _Entry) -> dict[str, _Entry]:
    """The experts in a tensor of all, (experts, rows, columns), under the names of single ones; none in any other."""
    layer, _, inside = name.partition("mlp.experts.")
    parts = STACKED.get(f"mlp.experts.{inside}", ())
    if not parts or len(entry.shape) != 3:
        return {}
    rows = entry.shape[1] // len(parts)
    return {
        layer + part.format(expert): replace(
            entry, shape=(rows, entry.shape[2]), expert=expert, first_row=number * rows
        )
        for expert in range(entry.shape[0])
        for number, part in enumerate(parts)
    }


def stored_elements(checkpoint_dir: str | Path) -> int:
    """The number of parameters in a folder, from the headers; tied ones as often as they are stored."""
    entries = _read_headers(weight_files(Path(checkpoint_dir))).values()
    return sum(torch.Size(entry.shape).numel() for entry in entries)


@dataclass(frozen=True)
class _Group:
    """Tensors that convert together: a layer, or one tensor outside the layers."""

    tune: tuple[str, ...]
    hf: dict[str, tuple[int, ...]]  # name to shape


def _groups(tensors: Tensors, config: dict[str, Any], model_type: str, by_layer: bool = True) -> list[_Group]:
    """What a folder of this model must hold, by asking the converter with meta tensors."""
    named: dict[str, list[str]] = {}
    for name in tensors:
        layer = re.match(r"layers\.\d+\.", name) if by_layer else None
        named.setdefault(layer.group() if layer else name, []).append(name)
    arguments, groups = converter_arguments(config, model_type), []
    for names in named.values():
        meta = {name: torch.empty(tensors[name].shape, device="meta") for name in names}
        try:
            converted = LAYOUTS[model_type].to_hf(meta, **arguments)
        except Exception as error:  # noqa: BLE001 - torchtune raises Exception itself for a name that it does not know
            raise CheckpointError(
                f"torchtune's {model_type} converter does not accept the model's {', '.join(names)}: {error} "
                f"Do the model's builder, model_type and {CONFIG} belong together?"
            ) from error
        groups.append(_Group(tuple(names), {name: tuple(tensor.shape) for name, tensor in converted.items()}))
    return groups


class HFStream:
    """Gives a torchtune model's tensors Hugging Face names and layouts as they come, for engines that load those.

    It holds one tensor at a time, or one layer's where a family stores several of torchtune's tensors as one (Phi).

    Args:
        model (nn.Module): sharded or plain; only names and shapes are looked at.
        model_dir (str | Path): Hugging Face folder with the model's config.json.
        model_type (str | None): name in torchtune's ``ModelType``; None: built from the folder.

    Raises:
        CheckpointError: If the model and the folder's config do not belong together.
        ConfigError: If ``model_type`` is not supported.
    """

    def __init__(self, model: nn.Module, model_dir: str | Path, model_type: str | None) -> None:
        self.model_type = check_model_type(model_type)
        folder = Path(model_dir)
        config = read_config(folder / CONFIG)
        check_model(model, config, self.model_type, folder / CONFIG)
        tensors = _named_tensors(model)
        self._to_hf = partial(LAYOUTS[self.model_type].to_hf, **converter_arguments(config, self.model_type))
        self._groups = _groups(tensors, config, self.model_type, by_layer=merges(config, self.model_type))
        # a model that ties its output, in a folder that stores it twice
        self._repeats_head = "output.weight" not in tensors and not _ties(config, self.model_type)

    def convert(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Renames and lays out tensors.

        Args:
            named_tensors (Iterable[tuple[str, torch.Tensor]]): every parameter once, all of it, by torchtune name.

        Yields:
            tuple[str, torch.Tensor]: Hugging Face name and tensor.

        Raises:
            CheckpointError: If a name is unknown or did not come.
        """
        group_of = {name: group for group in self._groups for name in group.tune}
        waiting: dict[str, Tensors] = {}  # by the group's first name
        for name, tensor in named_tensors:
            group = group_of.pop(name, None)
            if group is None:
                raise CheckpointError(f"the model has no parameter {name!r} left to convert: each must come once.")
            ready = waiting.setdefault(group.tune[0], {})
            ready[name] = tensor
            if len(ready) < len(group.tune):
                continue
            del waiting[group.tune[0]]
            for hf_name, converted in self._to_hf(ready).items():
                yield hf_name, converted
                if hf_name == _EMBEDDINGS and self._repeats_head:
                    yield _LM_HEAD, converted
        if group_of:
            raise CheckpointError(f"{', '.join(sorted(group_of)[:5])} did not come: every parameter must, once.")


def stored_rows(model: nn.Module, model_dir: str | Path, model_type: str) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """Where a Hugging Face folder stores the rows of a model's weights; only names and shapes are looked at.

    By stored name, the torchtune weights that it is made of, and for each of their rows its row in the stored tensor,
    int64. Experts, of which one weight has many stored tensors, are left out.
    """
    config = read_config(Path(model_dir) / CONFIG)
    arguments = converter_arguments(config, model_type)
    found: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for group in _groups(_named_tensors(model), config, model_type):
        for name, pieces in _row_sources(group, model_type, arguments).items():
            if len(pieces) == 1:
                found.setdefault(pieces[0][0], []).append((name, pieces[0][1]))
    return found


def _ties(config: dict[str, Any], model_type: str) -> bool:
    ties: bool = config_of(config, model_type).tie_word_embeddings
    return ties


def _named_tensors(model: nn.Module) -> Tensors:
    """The weights that a folder holds: all parameters but those of adapters."""
    reshard(model)
    parameters = {clean_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    for name, module in adapted_modules(model).items():
        for part in adapter_parameters(module):
            del parameters[clean_name(f"{name}.{part}")]
    return parameters


def load_hf_weights(model: nn.Module, checkpoint_dir: str | Path, model_type: str | None, *, world: World) -> None:
    """Fills a torchtune model from a Hugging Face folder.

    Every rank reads the rows of its own shards from the files, so no weight is sent; values are cast to the model's
    dtype. Collective.

    Args:
        model (nn.Module): sharded or plain, with memory (see :func:`spin.model.sharding.materialize`).
        checkpoint_dir (str | Path): a Hugging Face folder.
        model_type (str | None): name in torchtune's ``ModelType``; None: built from the folder.
        world (World): the ranks.

    Raises:
        CheckpointError: If the folder is incomplete or does not fit the model, on all ranks; every tensor at fault is
            named, and no weight has been read by then.
        ConfigError: If ``model_type`` is not supported.
    """
    set_stage("loading weights")
    model_type = check_model_type(model_type)
    with raise_on_all_ranks(world, CheckpointError):
        _load(model, Path(checkpoint_dir), model_type, world)


def check_hf_folder(model: nn.Module, checkpoint_dir: str | Path, model_type: str | None) -> None:
    """Checks from a folder's config and headers that a model can be filled from it and computes what the config says.

    It reads no weight, except for an output head that is stored next to the embeddings that it may be tied to.

    Args:
        model (nn.Module): sharded or plain, on any device; only names, shapes and settings are looked at.
        checkpoint_dir (str | Path): a Hugging Face folder.
        model_type (str | None): name in torchtune's ``ModelType``; None: built from the folder.

    Raises:
        CheckpointError: If the folder is incomplete or does not fit the model; every tensor at fault is named.
        ConfigError: If ``model_type`` is not supported.
    """
    folder, model_type = Path(checkpoint_dir), check_model_type(model_type)
    plan = _plan(model, folder, model_type)
    _check_tied_head(plan, folder, 0, 1)
    _warn_of_unknown_keys(plan.config, model_type, folder)


def _warn_of_unknown_keys(config: dict[str, Any], model_type: str, folder: Path) -> None:
    unknown = unknown_keys(config, config_of(config, model_type).model_type)
    if unknown:
        log.warning(f"{folder / CONFIG}: keys that are not known here, and not looked at: {', '.join(unknown)}.")


@dataclass(frozen=True)
class _Plan:
    """What of a folder goes where."""

    config: dict[str, Any]
    groups: list[_Group]
    entries: dict[str, _Entry]
    head: _Entry | None  # the stored output head, if it may repeat the embeddings
    ties: tuple[bool, bool]  # whether the model, and the folder's config, tie the head to the embeddings


def _plan(model: nn.Module, folder: Path, model_type: str) -> _Plan:
    config = read_hf_config(folder)
    check_model(model, config, model_type, folder / CONFIG)
    groups = _groups(_named_tensors(model), config, model_type)
    expected = {name: shape for group in groups for name, shape in group.hf.items()}
    entries = _read_headers(weight_files(folder))
    fault = quantized({name: entry.dtype for name, entry in entries.items()})
    if fault is not None:
        raise CheckpointError(f"{folder}: {fault}")
    ties = _LM_HEAD not in expected, _ties(config, model_type)
    head = entries.get(_LM_HEAD) if any(ties) else None
    if ties[0]:
        entries.pop(_LM_HEAD, None)
    _check_entries(entries, expected, folder, model_type, ties)
    if ties == (True, False) and head is None:
        raise CheckpointError(
            f"{folder}: no {_LM_HEAD}, and {CONFIG} does not tie it to the embeddings (tie_word_embeddings): "
            "transformers would make one of random numbers. If the model is a tied one, write tie_word_embeddings: "
            f"true into {CONFIG}; else download the model again."
        )
    return _Plan(config, groups, entries, head, ties)


def _load(model: nn.Module, folder: Path, model_type: str, world: World) -> None:
    plan = _plan(model, folder, model_type)
    _check_tied_head(plan, folder, world.rank, world.world_size)
    if world.is_main:
        _warn_of_unknown_keys(plan.config, model_type, folder)
    targets = _named_tensors(model)
    arguments = converter_arguments(plan.config, model_type)
    finite: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for group in plan.groups:
            for name, pieces in _row_sources(group, model_type, arguments).items():
                for source, values in _copy_rows(plan.entries, pieces, targets[name]):
                    seen = is_finite(values)
                    finite[source] = finite[source] & seen if source in finite else seen
    broken = [source for source, seen in finite.items() if not seen]  # the only waits for the device
    if broken:
        files = ", ".join(sorted({plan.entries[source].file.name for source in broken}))
        raise CheckpointError(
            f"{folder}: NaN or infinity in {some_of(broken, 10)} ({files}), in the dtype that the model has "
            "here. Download the model again, or take it from another run."
        )


def _check_tied_head(plan: _Plan, folder: Path, rank: int, ranks: int) -> None:
    """A head that was trained apart from the embeddings must not be dropped; and one that the folder's config ties is
    not trained without a warning. Each rank compares its part of the rows."""
    head, embeddings = plan.head, plan.entries[_EMBEDDINGS]
    if head is None:
        return
    part = -(-embeddings.shape[0] // ranks)
    first, end = rank * part, min((rank + 1) * part, embeddings.shape[0])
    if head.shape == embeddings.shape and all(
        torch.equal(
            read_rows(head, row, min(row + _COMPARED_ROWS, end)).float(),
            read_rows(embeddings, row, min(row + _COMPARED_ROWS, end)).float(),
        )
        for row in range(first, end, _COMPARED_ROWS)
    ):
        return
    model_ties, config_ties = plan.ties
    differs = f"{folder}: {_LM_HEAD} differs from {_EMBEDDINGS}"
    if not model_ties:
        log.warning(
            f"{differs}, which {CONFIG} ties (tie_word_embeddings: true). The two are trained as they are stored, as "
            "transformers 5 loads them; transformers 4 drops the head."
        )
        return
    what = "model ties the two" + (
        f", as {CONFIG} says. transformers 5 does not tie heads that differ, transformers 4 drops them"
        if config_ties
        else ""
    )
    raise CheckpointError(
        f"{differs}, but the config's {what}. Use a builder with tie_word_embeddings=False; or, if the head is a "
        "leftover, remove it from the files."
    )


def _check_entries(
    entries: dict[str, _Entry],
    expected: dict[str, tuple[int, ...]],
    folder: Path,
    model_type: str,
    ties: tuple[bool, bool],
) -> None:
    faults = [f"missing: {name} {list(expected[name])}" for name in expected.keys() - entries.keys()]
    faults += [
        f"unexpected: {name} {list(entries[name].shape)} in {entries[name].file.name}"
        for name in entries.keys() - expected.keys()
    ]
    for name in expected.keys() & entries.keys():
        entry = entries[name]
        if entry.shape != expected[name]:
            faults.append(f"{name} in {entry.file.name} is {list(entry.shape)}, the model needs {list(expected[name])}")
        elif entry.dtype not in _DTYPES:
            faults.append(f"{name} in {entry.file.name} has dtype {entry.dtype}, expected {', '.join(sorted(_DTYPES))}")
    if expected.keys() - entries.keys() == {_LM_HEAD} and ties == (False, True):
        raise CheckpointError(
            f"{folder}: no {_LM_HEAD}, because {CONFIG} ties it to the embeddings (tie_word_embeddings), but the "
            "config's model has one of its own. Use a builder with tie_word_embeddings=True."
        )
    if faults:
        raise CheckpointError(
            f"{folder} does not fit the config's model ({model_type}):\n  "
            + "\n  ".join(first_lines(sorted(faults), 20))
            + "\nDo the model's builder, model_type and checkpoint_dir belong together?"
        )


# A parameter's rows from top to bottom: the stored tensors that they come from, and which rows of these they are.
_Pieces = list[tuple[str, torch.Tensor]]


def _row_sources(group: _Group, model_type: str, arguments: dict[str, Any]) -> dict[str, _Pieces]:
    """Where the rows of each torchtune tensor of a group come from.

    Converters rename, split, join and permute rows, and leave columns alone. So one that is given tensors of a single
    column, which hold the numbers of their rows, shows where each row goes, whatever it does.
    """
    sources = list(group.hf)
    numbered = {}
    for i, (source, shape) in enumerate(group.hf.items()):
        if not shape:  # a constant
            continue
        rows = torch.arange(i << 32, (i << 32) + shape[0])  # tensor and row in one number
        numbered[source] = rows.view(-1, *[1] * (len(shape) - 1))
    # `dim` is the number of columns
    converted = LAYOUTS[model_type].to_tune(numbered, **arguments | {"dim": 1})
    found = {}
    for name, tensor in converted.items():
        numbers = tensor.flatten()
        tensors, lengths = (numbers >> 32).unique_consecutive(return_counts=True)
        pieces = (numbers & 0xFFFFFFFF).split(lengths.tolist())
        found[name] = [(sources[i], rows) for i, rows in zip(tensors.tolist(), pieces, strict=True)]
    return found


def _copy_rows(entries: dict[str, _Entry], pieces: _Pieces, target: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Fills this rank's shard of a parameter with rows of stored tensors, the only ones that it reads; gives the name
    of each and what came of it, before it is quantized."""
    nf4, first_row, count = as_nf4(target), 0, len(target)
    if isinstance(target, DTensor):
        shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        first_row, count = offset[0], shape[0]
        target = target.to_local()
    if nf4 is not None:  # all rows are read and quantized together
        block = torch.cat([_read(entries[source], rows) for source, rows in pieces]).to(nf4.device, nf4.dtype)
        fill_nf4(nf4, block, first_row)
        yield pieces[0][0], block
        return
    start = -first_row  # of the piece, in the shard
    for source, rows in pieces:
        first, end = max(start, 0), min(start + len(rows), count)
        if first < end:
            block = _read(entries[source], rows[first - start : end - start])
            yield source, target[first:end].copy_(block.to(target.device))  # cast there: the bus carries what is stored
        start += len(rows)


def _read(entry: _Entry, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a stored tensor, by their numbers."""
    first, end = int(rows.min()), int(rows.max()) + 1
    block = read_rows(entry, first, end)
    if torch.equal(rows, torch.arange(first, end)):
        return block
    return block[rows - first]  # permuted within heads; a shard may split one


def read_rows(entry: _Entry, first: int, end: int) -> torch.Tensor:
    """Rows ``first`` to ``end`` of a stored tensor; the file's other bytes stay on disk."""
    try:
        with safe_open(entry.file, framework="pt") as tensors:
            view = tensors.get_slice(entry.name)
            where = slice(entry.first_row + first, entry.first_row + end)
            rows: torch.Tensor = view[where] if entry.expert is None else view[entry.expert, where]
            return rows
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{entry.file}: cannot read {entry.name} ({error}). Download the model again.") from error


def from_hf_tensors(model: nn.Module, tensors: Tensors, config: dict[str, Any], model_type: str) -> None:
    """Fills a plain model with memory from all tensors of a folder, by Hugging Face name; adapters stay as they are.

    ``model_type`` is in capitals. An output head that the model ties to its embeddings is left out.
    """
    targets = _named_tensors(model)
    if "output.weight" not in targets:
        tensors = {name: tensor for name, tensor in tensors.items() if name != _LM_HEAD}
    try:
        converted = LAYOUTS[model_type].to_tune(tensors, **converter_arguments(config, model_type))
    except Exception as error:  # noqa: BLE001 - torchtune raises Exception itself for a name that it does not know
        raise CheckpointError(f"torchtune's {model_type} converter does not take the tensors: {error}") from error
    wrong = [
        f"{name} {[*tensors[name].shape] if name in tensors else 'none'}"
        for tensors, others in ((converted, targets), (targets, converted))
        for name in tensors
        if name not in others or tensors[name].shape != others[name].shape
    ]
    if wrong:
        raise CheckpointError(f"weights of {model_type} do not fit the config's model: {', '.join(wrong[:5])}.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(converted[name])


def export_hf(
    model: nn.Module,
    source_dir: str | Path,
    out_dir: str | Path,
    model_type: str | None,
    *,
    dtype: torch.dtype,
    world: World,
    max_file_bytes: int = MAX_FILE_BYTES,
    tokenizer_dir: Path | None = None,
    chat_template: str | None = None,
    stop_ids: Sequence[int] = (),
    kind: str = "model",
) -> Path:
    """Writes a model as a Hugging Face folder that transformers and vLLM load: weights, config, tokenizer, licence.

    The folder appears at once when it is complete; all ranks write files side by side, on a file system that they
    share. Collective.

    Args:
        model (nn.Module): sharded or plain.
        source_dir (str | Path): the folder that the model was loaded from; gives config and tokenizer.
        out_dir (str | Path): the folder to write; one of the same kind is replaced, any other kept aside.
        model_type (str | None): name in torchtune's ``ModelType``; None: built from the folder.
        dtype (torch.dtype): of the written weights.
        world (World): the ranks.
        max_file_bytes (int): a file ends with the layer before the one that would exceed this many bytes.
        tokenizer_dir (Path | None): where the tokenizer's files come from; None is ``source_dir``.
        chat_template (str | None): Jinja, in place of the one among those files.
        stop_ids (Sequence[int]): see :func:`write_companions`.
        kind (str): what the folder is for, see :func:`spin.core.files.begin_atomic_dir`.

    Returns:
        Path: ``out_dir``.

    Raises:
        CheckpointError: If the model does not fit the source's config, a weight goes beyond ``dtype``, or a rank could
            not write. A folder that was there before still is.
        NonFiniteError: If a weight is NaN or infinite; nothing is written then.
        ConfigError: If ``model_type`` is not supported.
    """
    set_stage("exporting a model")
    model_type, source, out = check_model_type(model_type), Path(source_dir), Path(out_dir)
    if out.resolve() == source.resolve():
        raise CheckpointError(f"{out}: would replace the model that training started from. Choose another folder.")
    check_weights(model, world, str(out))
    tensors, gathers = _named_tensors(model), weight_gathers(model)
    with raise_on_all_ranks(world, CheckpointError):
        config = read_config(source / CONFIG, "The export copies it from checkpoint_dir.")
        check_model(model, config, model_type, source / CONFIG)  # that it is still the model's
        groups = _groups(tensors, config, model_type)
    files = _split(groups, dtype, max_file_bytes)
    names = (
        ["model.safetensors"]
        if len(files) == 1
        else [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    )
    arguments = converter_arguments(config, model_type)
    too_large: list[str] = []
    with atomic_dir_of_ranks(out, kind, world, CheckpointError) as part:
        # Rank r writes file r of each round of world_size files. One tensor of each file is gathered, then all ranks
        # write at the same time.
        for first in range(0, len(files), world.world_size):
            of_ranks = files[first : first + world.world_size]
            mine = None
            if world.rank < len(of_ranks):
                mine = _TensorFile(part / names[first + world.rank], of_ranks[world.rank], dtype)
            weights = [
                [weight for group in file for weight in _row_sources(group, model_type, arguments).items()]
                for file in of_ranks
            ]
            for turn in zip_longest(*weights):
                for owner, weight in enumerate(turn):
                    if weight is not None:
                        tensor = gathers[weight[0]](dtype)
                        if mine is not None and owner == world.rank:
                            too_large += [] if is_finite(tensor) else [weight[0]]
                            mine.stage(tensor, weight[1])
                        del tensor
                if mine is not None:
                    mine.write()
            with raise_on_all_ranks(world, CheckpointError):
                if mine is not None:
                    mine.close()
        names_too_large = [name for part_of_rank in gather_objects(too_large, world) for name in part_of_rank]
        if names_too_large:
            raise CheckpointError(
                f"{out}: {str(dtype).removeprefix('torch.')} ends at {torch.finfo(dtype).max:.3g}, and the weights "
                f"{', '.join(sorted(names_too_large))} go beyond. Nothing was replaced. Set checkpointer.export_dtype "
                "(or the generator's dtype) to bf16 or fp32."
            )
        with raise_on_all_ranks(world, CheckpointError):
            if world.is_main:
                config |= write_companions(source, part, tokenizer_dir, chat_template, stop_ids)
                if len(files) > 1:
                    _write_index(part / INDEX, files, names, dtype)
                write_json(part / CONFIG, _exported_config(config, dtype, tied="output.weight" not in tensors))
    return out


def _split(groups: list[_Group], dtype: torch.dtype, max_file_bytes: int) -> list[list[_Group]]:
    files: list[list[_Group]] = []
    room = 0
    for group in groups:
        size = sum(torch.Size(shape).numel() for shape in group.hf.values()) * dtype.itemsize
        if not files or size > room:
            files.append([])
            room = max_file_bytes
        files[-1].append(group)
        room -= size
    return files


class _TensorFile:
    """A safetensors file that is written a tensor at a time, after a header that says where each of them lies.

    The first failure is raised by :meth:`close`: until then the ranks gather tensors together.

    Source: https://github.com/huggingface/safetensors#format; the bytes are those of its ``save_file``.
    """

    def __init__(self, file: Path, groups: list[_Group], dtype: torch.dtype) -> None:
        shapes = {name: shape for group in groups for name, shape in sorted(group.hf.items())}
        stored = next(name for name, each in _DTYPES.items() if each == dtype)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shapes):
            start, end = end, end + math.prod(shapes[name]) * dtype.itemsize
            header[name] = {"dtype": stored, "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file, self._fault, self._left = file, None, end
        self._starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}
        self._staged: tuple[torch.Tensor, _Pieces] | None = None
        try:
            self._stream = file.open("wb")
            self._stream.write(len(text).to_bytes(8, "little") + text)
        except OSError as error:
            self._fault = error
        for name, shape in shapes.items():
            if not shape:
                self._put(name, 0, torch.tensor([CONSTANTS[name.rpartition(".")[2]]], dtype=dtype))

    def stage(self, tensor: torch.Tensor, pieces: _Pieces) -> None:
        """Copies a weight to the CPU, with where its rows are stored; :meth:`write` comes before the next one."""
        self._staged = tensor.cpu(), pieces

    def write(self) -> None:
        """Writes the staged weight, if there is one."""
        if self._staged is None:
            return
        (tensor, pieces), self._staged, start = self._staged, None, 0
        for name, rows in pieces:
            block = tensor[start : start + len(rows)]
            start += len(rows)
            order = rows.argsort()
            if not torch.equal(order, torch.arange(len(rows))):  # permuted within heads
                block = block[order]
            self._put(name, int(rows.min()), block)

    def _put(self, name: str, first_row: int, block: torch.Tensor) -> None:
        block = block.contiguous()
        row_bytes = block[0].numel() * block.itemsize
        if self._fault is None:
            try:
                self._stream.seek(self._starts[name] + first_row * row_bytes)
                self._stream.write(memoryview(block.flatten().view(torch.uint8).numpy()))
                self._left -= block.nbytes
            except OSError as error:
                self._fault = error

    def close(self) -> None:
        """Waits until all is on the disk."""
        if self._fault is not None:
            raise CheckpointError(f"{self._file}: cannot write ({self._fault}). Is the disk full?") from self._fault
        self._stream.close()
        if self._left:
            raise CheckpointError(f"{self._file}: {self._left} bytes of its tensors did not come.")
        sync(self._file)


def _write_index(file: Path, files: list[list[_Group]], names: list[str], dtype: torch.dtype) -> None:
    where = {hf: name for name, groups in zip(names, files, strict=True) for group in groups for hf in group.hf}
    elements = sum(torch.Size(shape).numel() for groups in files for group in groups for shape in group.hf.values())
    write_json(file, {"metadata": {"total_size": elements * dtype.itemsize}, "weight_map": dict(sorted(where.items()))})


def write_companions(
    source: Path,
    part: Path,
    tokenizer_dir: Path | None = None,
    chat_template: str | None = None,
    stop_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """Writes what a model needs besides weights and config, so that it stops where it was trained to.

    ``generation_config.json`` is made if there is none. The tokenizer's EOS becomes the first stop token, which closes
    a turn. A pad token that equals it gives way to the EOS before, if that is another one: who trains the model
    further and masks padding by value would mask every end.

    Args:
        source (Path): the folder that the model was loaded from.
        part (Path): the folder to write to.
        tokenizer_dir (Path | None): where the tokenizer's files come from; None is ``source``.
        chat_template (str | None): Jinja, in place of the one among those files.
        stop_ids (Sequence[int]): what ended the run's responses, the token that closes a turn first; the source's own
            stop tokens follow. Without any, files are copied as they are.

    Returns:
        dict[str, Any]: what changes in ``config.json``.

    Raises:
        CheckpointError: If a file of the source is no JSON object, or cannot be written.
    """
    for folder, patterns in ((source, _COMPANIONS), (tokenizer_dir or source, _TOKENIZER_FILES)):
        for file in sorted(folder.iterdir()):
            if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copyfile(file, part / file.name)
                sync(part / file.name)
    if chat_template is not None:
        (part / _CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        sync(part / _CHAT_TEMPLATE)
    if not stop_ids:
        return {}
    config = read_companion(source / CONFIG)
    generation = read_companion(part / GENERATION_CONFIG)
    own = [token for each in (generation, config) for token in _token_ids(each.get("eos_token_id"))]
    stops = list(dict.fromkeys([*stop_ids, *own]))
    changed: dict[str, Any] = {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    others = [token for token in own if token != stop_ids[0]]
    if others and stop_ids[0] in (generation.get("pad_token_id"), config.get("pad_token_id")):
        changed["pad_token_id"] = others[0]
    if not generation:
        generation = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    write_json(part / GENERATION_CONFIG, generation | changed)
    _set_eos_token(part, stop_ids[0])
    return changed


def read_companion(file: Path) -> dict[str, Any]:
    """A JSON file next to a model's weights; empty if there is none, a CheckpointError if it is no JSON object."""
    return read_json(file, CheckpointError, "Download the model again.", allow_nan=True) if file.is_file() else {}


def _token_ids(value: object) -> list[int]:
    """What ``eos_token_id`` holds: none, one or several."""
    return [token for token in (value if isinstance(value, list) else [value]) if type(token) is int]


def _set_eos_token(part: Path, token: int) -> None:
    """Makes a token the EOS of the tokenizer in a folder, where it has another one."""
    text = _added_text(part, token)
    for name in TOKENIZER_CONFIGS:
        content = read_companion(part / name)
        old, pad = content.get("eos_token"), content.get("pad_token")
        if text is None or _text(old) == text or not (content or (part / "tokenizer.json").is_file()):
            continue
        if old is None and name != TOKENIZER_CONFIGS[0]:
            continue
        changed = {"eos_token": {**old, "content": text} if isinstance(old, dict) else text}
        if _text(pad) == text and old is not None:
            changed["pad_token"] = old
        write_json(part / name, content | changed)


def _text(token: Any) -> Any:
    """A special token's text; some files hold an object with more."""
    return token.get("content") if isinstance(token, dict) else token


def _added_text(part: Path, token: int) -> str | None:
    """The text of an added token; None if the folder's files do not say, as of a token of the vocabulary proper."""
    listed = read_companion(part / "tokenizer.json").get("added_tokens")
    decoder = read_companion(part / TOKENIZER_CONFIGS[0]).get("added_tokens_decoder")
    found = [
        each
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, dict) and each.get("id") == token
    ]
    text = _text(found[0] if found else decoder.get(str(token)) if isinstance(decoder, dict) else None)
    return text if isinstance(text, str) else None


def _exported_config(config: dict[str, Any], dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    # auto_map names code files of the source, which are not copied: transformers' own classes load the model.
    exported = {key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path")}
    name = str(dtype).removeprefix("torch.")
    # `torch_dtype` is what transformers 4 and vLLM read, `dtype` what transformers 5 writes.
    return (
        exported | {"torch_dtype": name, "tie_word_embeddings": tied} | ({"dtype": name} if "dtype" in config else {})
    )
