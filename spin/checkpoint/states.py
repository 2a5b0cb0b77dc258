"""Checkpoints: the model a run starts from, the states it resumes from, the models it exports.

A state is a folder ``checkpoints/step_00000123``: tensors in torch.distributed.checkpoint's sharded format, everything
else in ``state.json``, and ``manifest.json`` with size and SHA-256 of every file. It is written under a hidden name,
the manifest last, and then renamed; so a folder with a step's name is whole, or has been damaged since, which the
manifest shows. Saving costs the training loop a copy to CPU memory; a thread writes while training goes on.

Nothing in a state can run code: tensors are read with ``weights_only=True``, and the one pickle that the format has
(``.metadata``) is read by an unpickler that knows a dozen harmless classes.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import pickle  # nosec B403
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import zeros as distributed_zeros

from spin.core.dtypes import DTYPES
from spin.core.errors import CheckpointError, ConfigError, SpinError
from spin.core.files import (
    file_sha256,
    finish_folder,
    is_marked,
    is_replaceable,
    json_fingerprint,
    make_way,
    mark,
    part_of,
    read_json,
    remove_folder,
    start_folder,
    write_json,
)
from spin.core.heartbeat import set_stage
from spin.core.ranks import World, broadcast_object, gather_objects, raise_on_all_ranks, with_own_process_group
from spin.data.chat import ChatTokenizer
from spin.model.hf import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIGS,
    export_hf,
    load_hf_weights,
    read_companion,
    stored_elements,
)
from spin.model.hf_families import check_model_type
from spin.model.hf_folder import read_hf_config
from spin.model.sharding import check_weights, clean_name, local_tensor, nonfinite_weights, reshard

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"
_EXPORTS = {"iteration_*/hf_model": "model", "iteration_*/adapter": "adapter"}  # and their kinds
_STATE = "state"  # a kind of folder, see spin.core.files.start_folder
_STEP_FOLDER = re.compile(r"step_(\d+)(\.old)?")
# How an optimizer computes, not what: a resumed run follows its own config.
_IMPLEMENTATION_OPTIONS = {"foreach", "fused", "capturable", "differentiable"}


class SPINCheckpointer:
    """Loads, saves, resumes and exports.

    Args:
        checkpoint_dir (str): Hugging Face folder that training starts from.
        model_type (str): layout of its weights, a name of torchtune's ``ModelType`` such as ``LLAMA3_2``.
        output_dir (str): states go to ``checkpoints/`` in it, exports to ``iteration_NNN/hf_model``.
        keep_last (int): number of newest states to keep, at least 1.
        keep_best (int): number of states of lowest validation loss to keep beside them.
        export_dtype (str): ``bf16``, ``fp32`` or ``fp16``.
        async_save (bool): write states while training goes on. Costs as much CPU memory as a rank's part of a state.
        keep_exports (int | None): number of newest iterations whose exports to keep; None keeps all.

    Raises:
        ConfigError: If an argument cannot be.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        model_type: str,
        output_dir: str,
        keep_last: int = 2,
        keep_best: int = 0,
        export_dtype: str = "bf16",
        async_save: bool = True,
        keep_exports: int | None = None,
    ) -> None:
        if keep_last < 1:
            raise ConfigError(
                f"checkpointer.keep_last is {keep_last}, expected at least 1: a run resumes from its newest state."
            )
        if keep_best < 0:
            raise ConfigError(f"checkpointer.keep_best is {keep_best}, expected 0 or more.")
        if keep_exports is not None and (type(keep_exports) is not int or keep_exports < 1):
            raise ConfigError(f"checkpointer.keep_exports is {keep_exports!r}, expected 1 or more, or null for all.")
        if export_dtype not in DTYPES:
            raise ConfigError(f"checkpointer.export_dtype is {export_dtype!r}, expected {', '.join(DTYPES)}.")
        self.checkpoint_dir = Path(checkpoint_dir)
        self.model_type = check_model_type(model_type)
        self.output_dir = Path(output_dir)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.keep_exports = keep_exports
        self.export_dtype = DTYPES[export_dtype]
        self.async_save = async_save
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spin-checkpoint")
        self._pending: Future[None] | None = None
        self._stager: StateDictStager | None = None
        self._writers_world: World | None = None
        self._damaged: set[Path] = set()  # states that were found not to be whole
        self._verified: Path | None = None  # the state whose files have all been read and are the manifest's

    @property
    def checkpoints_dir(self) -> Path:
        """The folder of all states."""
        return self.output_dir / "checkpoints"

    def validate(self, iterations: int = 1) -> None:
        """Checks, before any weight is loaded, that loading and saving can work.

        Args:
            iterations (int): of the run, each of which exports.

        Raises:
            CheckpointError: If the model folder is not whole, or the output folder cannot be written or is too small.
        """
        read_hf_config(self.checkpoint_dir)
        for name in (GENERATION_CONFIG, *TOKENIZER_CONFIGS):  # which an export changes
            read_companion(self.checkpoint_dir / name)
        parameters = stored_elements(self.checkpoint_dir)
        try:
            self.checkpoints_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints_dir) as probe:
                probe.write(b"spin")
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.checkpoints_dir}: cannot write ({error.strerror or error}). Change output_dir."
            ) from error
        free = shutil.disk_usage(self.checkpoints_dir).free
        least, usual, export = self._disk_bytes(parameters)
        # A new export or state is complete before an old one goes.
        kept = iterations if self.keep_exports is None else min(iterations, self.keep_exports + 1)
        exports = max(1, kept - len({folder.parent for _, folder in self._exports()}))
        what = f"one state and {exports} export{'s' if exports > 1 else ''}"
        if free < least + exports * export:
            raise CheckpointError(
                f"{self.output_dir}: {_size(free)} free, but {what} of {parameters:,} parameters take "
                f"{_size(least + exports * export)} to {_size(usual + exports * export)}. Free some space, change "
                "output_dir, or keep fewer exports (checkpointer.keep_exports=1)."
            )
        wanted = usual * (self.keep_last + self.keep_best + 1) + exports * export
        if free < wanted and self._complete() == []:
            log.warning(
                f"{self.output_dir}: {_size(free)} free; keep_last={self.keep_last} and keep_best={self.keep_best} "
                f"with fp32 AdamW and {exports} export{'s' if exports > 1 else ''} can need {_size(wanted)}."
            )

    def _disk_bytes(self, parameters: int) -> tuple[int, int, int]:
        """What a state of so many parameters takes at least, and with fp32 AdamW; and what an export does."""
        # AdamW keeps two moments per weight: 4 bytes for bf16 weights and 8-bit moments, 12 by default.
        return parameters * 4, parameters * 12, parameters * self.export_dtype.itemsize

    def _exports(self) -> list[tuple[int, Path]]:
        """The exports in the run's folder that this program made, with their iterations."""
        found = [(folder, kind) for name, kind in _EXPORTS.items() for folder in self.output_dir.glob(name)]
        return [
            (int(folder.parent.name.removeprefix("iteration_")), folder)
            for folder, kind in found
            if folder.parent.name.removeprefix("iteration_").isdecimal() and is_marked(folder, kind)
        ]

    def _retire_exports(self, iteration: int, world: World) -> None:
        """Removes the exports of iterations before those that are kept; never the model that training starts from."""
        if self.keep_exports is None or not world.is_main:
            return
        for number, folder in self._exports():
            if number <= iteration - self.keep_exports and folder.resolve() != self.checkpoint_dir.resolve():
                try:
                    remove_folder(folder)
                except OSError as error:
                    log.warning(f"{folder}: cannot remove this old export ({error}).")

    def load_model(self, model: nn.Module, world: World) -> None:
        """Fills the model from ``checkpoint_dir``; see :func:`spin.model.hf.load_hf_weights`."""
        load_hf_weights(model, self.checkpoint_dir, self.model_type, world=world)

    def export(
        self,
        model: nn.Module,
        iteration: int,
        world: World,
        tokenizer: object = None,
        stop_ids: Sequence[int] = (),
    ) -> Path:
        """Writes the model for transformers and vLLM; see :func:`spin.model.hf.export_hf`. Waits for a state being
        written.

        Args:
            model (nn.Module): sharded or plain.
            iteration (int): counted from 0, in the folder's name.
            world (World): the ranks.
            tokenizer (object): the run's. Of a :class:`spin.data.ChatTokenizer` the folder gets the files, and the chat
                template that the config put in place of the folder's own; else ``checkpoint_dir``'s.
            stop_ids (Sequence[int]): the run's stop tokens, see :func:`spin.model.hf.write_companions`; without any,
                the tokenizer's.

        Returns:
            Path: ``output_dir/iteration_NNN/hf_model``.
        """
        self.wait()
        out_dir = self.output_dir / f"iteration_{iteration:03d}" / "hf_model"
        export_hf(
            model,
            self.checkpoint_dir,
            out_dir,
            self.model_type,
            dtype=self.export_dtype,
            world=world,
            **self._companions(tokenizer, stop_ids),
        )
        self._retire_exports(iteration, world)
        return out_dir

    @staticmethod
    def _companions(tokenizer: object, stop_ids: Sequence[int]) -> dict[str, Any]:
        """Arguments of :func:`spin.model.hf.write_companions`."""
        own = tokenizer if isinstance(tokenizer, ChatTokenizer) else None
        return {
            "tokenizer_dir": None if own is None else own.path,
            "chat_template": None if own is None else own.chat_template,
            "stop_ids": stop_ids or getattr(tokenizer, "eos_ids", ()),
        }

    # ---- save

    def save(
        self,
        *,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: dict[str, Any],
        world: World,
        metric: float | None = None,
        anchor: bool = False,
    ) -> Path:
        """Saves a state that a run can resume from, then removes the states that need not be kept.

        Every rank writes its own shards, to a file system that all ranks share. A state of the same step is replaced.
        With ``async_save`` this returns when everything is copied to CPU memory, and a thread of each rank writes; the
        state has its name, and counts, when all have written. Whatever goes wrong there is raised by the next call of
        :meth:`wait`, :meth:`save`, :meth:`export` or :meth:`close`. Collective.

        Args:
            step (int): optimizer steps so far; names the folder.
            model (nn.Module): sharded or plain.
            optimizer (torch.optim.Optimizer | None): its state is saved too, unless None.
            state (dict[str, Any]): everything else, JSON values.
            world (World): the ranks.
            metric (float | None): validation loss, for ``keep_best``.
            anchor (bool): keep this state until the next anchor is saved, however many states follow.

        Returns:
            Path: the folder.

        Raises:
            CheckpointError: If a rank could not write; what was there before is still there.
            NonFiniteError: If a weight is NaN or infinite; nothing is written then.
        """
        set_stage("saving a checkpoint")
        self.wait()
        folder = self.checkpoints_dir / f"step_{step:08d}"
        check_weights(model, world, str(folder))
        tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
        document: dict[str, Any] = {"format": FORMAT_VERSION, "step": step, "state": state, "optimizer": None}
        about = {"step": step, "metric": metric, "anchor": anchor}
        try:
            with raise_on_all_ranks(world, CheckpointError, part_of(folder)):
                if optimizer is not None:
                    optimizer_tensors, document["optimizer"] = _describe_optimizer(model, optimizer)
                    tensors |= optimizer_tensors
                if world.is_main:
                    self._clean()
                    start_folder(folder, _STATE)
                    _write_document(part_of(folder) / STATE, document)
        except CheckpointError:
            if world.is_main and is_marked(part_of(folder), _STATE):
                remove_folder(part_of(folder))
            raise
        if not self.async_save:
            self._write(folder, tensors, about, world)
            return folder
        on_gpu = world.device.type == "cuda"
        if self._stager is None or self._writers_world is None:
            # not DefaultStager, which wraps it: torch 2.11's works for one state only
            self._stager = StateDictStager(pin_memory=on_gpu)
            self._writers_world = with_own_process_group(world)
        copies = self._stager.stage(tensors, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        self._pending = self._writer.submit(self._write, folder, copies, about, self._writers_world)
        return folder

    def _write(self, folder: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any], world: World) -> None:
        """Writes a state whose part folder is begun, gives it its name, and removes old ones. Collective."""
        part = part_of(folder)
        try:
            _save_tensors(tensors, part, world)
            with raise_on_all_ranks(world, CheckpointError, part):
                # Who wrote a file checks it in: its bytes are still in this host's cache.
                own = sorted(part.glob(f"__{world.rank}_*")) + (
                    [part / METADATA, part / STATE] if world.is_main else []
                )
                sums = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in own}
            files = {name: entry for entries in gather_objects(sums, world) for name, entry in entries.items()}
            with raise_on_all_ranks(world, CheckpointError, part):
                if world.is_main:
                    states = self._complete()
                    # Steps go back when a run resumes from an older state; the order of saving does not.
                    sequence = max((manifest["sequence"] for _, manifest in states), default=0) + 1
                    _write_manifest(part, files, sequence=sequence, world=world, **about)
                    if folder in dict(states):
                        mark(folder, _STATE)  # earlier versions did not
                    finish_folder(folder)
                    self._damaged.discard(folder)
        except CheckpointError:
            if world.is_main and is_marked(part, _STATE):
                remove_folder(part)
            raise
        if world.is_main:
            self._retire()

    @property
    def has_failed(self) -> bool:
        """The state being written could not be; :meth:`wait` will say why. Known to one rank sooner than to another."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits until the last state is on the disk, if it is still being written.

        Raises:
            CheckpointError: On all ranks, if one could not write; what was there before is still there.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last state, and gives the copies' memory back."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._stager is not None:
                self._stager.close()

    def roll_back(self, step: int, world: World, because: str = "") -> Path | None:
        """Removes the states of later steps, so that a run resumes from ``step``, or with 0 from the first model.

        Newest first: a process that dies here leaves states that a run can resume from and roll back again. Collective.

        Args:
            step (int): of the state that becomes the newest.
            world (World): the ranks.
            because (str): why, in a sentence, for the message.

        Returns:
            Path | None: the state that a run now resumes from; None if it starts with the first model.

        Raises:
            CheckpointError: If there is no state of ``step``, and then nothing is removed; or if one could not be.
        """
        self.wait()
        with raise_on_all_ranks(world, CheckpointError):
            if world.is_main:
                states = self._complete()
                if step > 0 and step not in {manifest["step"] for _, manifest in states}:
                    raise CheckpointError(
                        f"{because} {self.checkpoints_dir}: cannot go back to step {step}, whose checkpoint is "
                        "not there (it is kept only if a limit could roll back when it was saved). No checkpoint was "
                        "removed; the same command, with what you change, resumes from the newest.".lstrip()
                    )
                for folder, manifest in reversed(states):
                    if manifest["step"] > step:
                        _remove(folder)
        return self.latest()

    def _clean(self) -> None:
        """Removes what a dead process left behind; a state that it was replacing gets its name back.

        Other programs have checkpoints/step_N too: what has no marker is left alone.
        """
        if not self.checkpoints_dir.is_dir():
            return
        for folder in [*self.checkpoints_dir.glob(".step_*.part"), *self.checkpoints_dir.glob("step_*")]:
            if not is_marked(folder, _STATE):
                continue
            match = _STEP_FOLDER.fullmatch(folder.name)
            if match is None:
                if folder.suffix == ".part":
                    remove_folder(folder)
            elif not (folder / MANIFEST).exists():  # half deleted
                remove_folder(folder)
            elif match[2]:
                current = folder.with_name(folder.name.removesuffix(match[2]))
                if (current / MANIFEST).exists():
                    remove_folder(folder)
                elif is_replaceable(current, _STATE):
                    make_way(current, _STATE)
                    os.rename(folder, current)

    def _retire(self) -> None:
        """Removes the states that are neither among the newest nor among the best, nor the last anchor."""
        states = self._complete()
        keep = {folder for folder, _ in states[-self.keep_last :]}
        scored = [(manifest["metric"], -manifest["sequence"], folder) for folder, manifest in states]
        best = sorted(entry for entry in scored if entry[0] is not None)[: self.keep_best]
        keep |= {folder for _, _, folder in best}
        keep |= set([folder for folder, manifest in states if manifest.get("anchor")][-1:])
        for folder, _ in states:
            if folder in keep:
                continue
            try:
                _remove(folder)
            except OSError as error:
                log.warning(f"{folder}: cannot remove this old state ({error}).")

    # ---- resume

    def _complete(self) -> list[tuple[Path, dict[str, Any]]]:
        """The whole states with their manifests, oldest first."""
        found: dict[str, tuple[Path, dict[str, Any]]] = {}
        # A folder's `.old` sorts after it and counts only if it is not whole.
        for folder in sorted(self.checkpoints_dir.glob("step_*")):
            match = _STEP_FOLDER.fullmatch(folder.name)
            if match is None or match[1] in found or folder in self._damaged or not (folder / MANIFEST).exists():
                continue
            try:
                found[match[1]] = folder, _read_manifest(folder)
            except CheckpointError as error:
                self._damaged.add(folder)
                log.warning(f"{error} This state is passed over.")
        return sorted(found.values(), key=lambda state: state[1]["sequence"])

    def latest(self, resume: str = "auto", world: World | None = None) -> Path | None:
        """The state to resume from.

        Args:
            resume (str): ``auto`` for the newest whole state if there is one, ``never``, or a state's folder.
            world (World | None): ranks that read the newest state and compare its checksums, each a part of the files;
                where a byte has changed the state before it is taken, and a warning says so. Collective then. None
                looks at manifests and sizes only.

        Returns:
            Path | None: the folder, or None to start anew.

        Raises:
            CheckpointError: If a folder is given that is not a whole state; or if there are states of this run, and
                none of them is whole.
        """
        if resume == "never":
            return None
        if resume != "auto":
            _read_manifest(Path(resume))
            return Path(resume)
        states = self._complete()
        if world is None:
            return states[-1][0] if states else None
        states, damaged = broadcast_object((states, self._damaged), world)
        for folder, manifest in reversed(states):
            entries = sorted(manifest["files"].items())[world.rank :: world.world_size]
            faults = [fault for part in gather_objects(_faults(folder, entries), world) for fault in part]
            if not faults:
                self._verified = folder
                return folder
            self._damaged.add(folder)
            if world.is_main:
                log.warning(f"{folder}: damaged ({'; '.join(faults)}). It is passed over for the state before it.")
        lost = [folder.name for folder in sorted(self._damaged | damaged) if is_marked(folder, _STATE)]
        if lost:
            raise CheckpointError(
                f"{self.checkpoints_dir}: every checkpoint is damaged ({', '.join(lost)}; see the warnings above). "
                "Restore one from a copy, or start a new run with resume=never."
            )
        return None

    def read_state(self, path: str | Path) -> dict[str, Any]:
        """Reads what was given as ``state`` to :meth:`save`; no tensor is touched.

        Args:
            path (str | Path): a state's folder.

        Returns:
            dict[str, Any]: JSON values.

        Raises:
            CheckpointError: If the folder is not a whole state, or its state.json is damaged.
        """
        state: dict[str, Any] = _read_document(Path(path))["state"]
        return state

    def load(
        self,
        path: str | Path,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        world: World,
        new_options: bool = False,
    ) -> None:
        """Restores tensors bit for bit, on any number of ranks. Every file's checksum is verified first. Collective.

        Args:
            path (str | Path): a state's folder.
            model (nn.Module): sharded or plain, with memory.
            optimizer (torch.optim.Optimizer | None): made for ``model``'s parameters; left as it is if the state was
                saved without one. None leaves the saved one aside.
            world (World): the ranks.
            new_options (bool): what ``optimizer`` was made with, such as its weight decay, stands; False brings the
                saved values back.

        Raises:
            CheckpointError: If a file is damaged, or if the state does not fit the model or the optimizer.
        """
        set_stage("loading a checkpoint")
        folder = Path(path)
        with raise_on_all_ranks(world, CheckpointError):
            entries = sorted(_read_manifest(folder)["files"].items())
            # `latest` has read all files of the one that it chose
            for name, entry in entries[world.rank :: world.world_size] if folder != self._verified else ():
                _verify(folder / name, entry)
        with raise_on_all_ranks(world, CheckpointError):
            metadata = _read_metadata(folder)
            targets = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
            saved = _read_document(folder)["optimizer"]
            optimizer_state: dict[torch.Tensor, dict[str, Any]] = {}
            if optimizer is not None and saved is not None:
                _check_optimizer(model, optimizer, saved, folder)
                optimizer_state, tensors = _allocate_optimizer_state(model, optimizer, saved, metadata)
                targets |= tensors
            _check_targets(targets, metadata, folder)
        try:
            dcp.load(targets, storage_reader=_Reader(folder, metadata))
        except dcp.CheckpointException as error:
            raise CheckpointError(f"{folder}: cannot read ({_reasons(error)}).") from error
        broken = nonfinite_weights(model, world)
        if broken:
            raise CheckpointError(
                f"{folder}: was saved with NaN or infinity in {', '.join(broken[:10])}, which no version since does. "
                "Resume from an earlier state: resume=<path>."
            )
        if optimizer is not None and saved is not None:
            optimizer.state.clear()
            optimizer.state.update(optimizer_state)
            kept = inspect.signature(type(optimizer).__init__).parameters if new_options else ()
            for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
                _restore_options(group, {key: value for key, value in options["options"].items() if key not in kept})


def _remove(folder: Path) -> None:
    """Deletes a state whose manifest has been read: it is one of this program, also if an earlier version saved it."""
    mark(folder, _STATE)
    (folder / MANIFEST).unlink()  # from here on it is no state
    remove_folder(folder)


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a state holds of a model: all but its frozen parameters."""
    reshard(model)
    frozen = {clean_name(name) for name, parameter in model.named_parameters() if not parameter.requires_grad}
    named = {clean_name(name): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in named.items() if name not in frozen}


# ---- files of a state


def _write_document(file: Path, document: dict[str, Any]) -> None:
    try:
        write_json(file, document)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.name} of step {document['step']}: {error}. Its values must be JSON.") from error


@contextmanager
def as_checkpoint_error(file: Path) -> Iterator[None]:
    """Turns what Python says about a document that lacks something into an error that names the file.

    Args:
        file (Path): where the document that the block looks into comes from.

    Yields:
        None: the block runs.

    Raises:
        CheckpointError: If the block raises ``KeyError``, ``TypeError``, ``AttributeError`` or ``ValueError``.
    """
    try:
        yield
    except SpinError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: not what this version of SPIN writes ({type(error).__name__}: {error}). "
            "Resume from another state."
        ) from error


def _read_document(folder: Path) -> dict[str, Any]:
    _verify(folder / STATE, _read_manifest(folder)["files"][STATE])
    with as_checkpoint_error(folder / STATE):
        document = read_json(folder / STATE, CheckpointError, "Resume from another state.", allow_nan=True)
        if not isinstance(document["state"], dict) or not isinstance(document["optimizer"], dict | None):
            raise TypeError("no state, or a bad optimizer")
    return document


def _write_manifest(
    folder: Path,
    files: dict[str, Any],
    *,
    step: int,
    sequence: int,
    metric: float | None,
    anchor: bool,
    world: World,
) -> None:
    content = {
        "format": FORMAT_VERSION,
        "step": step,
        "sequence": sequence,
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        "anchor": anchor,
        "world_size": world.world_size,
        "files": dict(sorted(files.items())),
    }
    write_json(folder / MANIFEST, content | {"checksum": json_fingerprint(content)})


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole state: every file is there and has its size. Bytes are verified when they are loaded."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give a folder like checkpoints/step_00000100, auto or never.")
    file = folder / MANIFEST
    if not file.exists():
        states = sorted(path.name for path in folder.iterdir() if _STEP_FOLDER.fullmatch(path.name))
        hint = f" Give one of the states in it: {', '.join(states[-5:])}." if states else ""
        raise CheckpointError(
            f"{folder}: no {MANIFEST}, so this is no state, or one whose saving was interrupted.{hint}"
        )
    content = read_json(file, CheckpointError, "Resume from another state.")
    if content.pop("checksum", None) != json_fingerprint(content):
        raise CheckpointError(f"{file}: damaged, its checksum does not match. Resume from another state.")
    if content.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format {content.get('format')}, this version of SPIN reads {FORMAT_VERSION}. "
            "Resume with the version that wrote it."
        )
    with as_checkpoint_error(file):
        _check_manifest(content)
    faults = []
    for name, entry in content["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None:
            faults.append(f"{name} is missing")
        elif size != entry["bytes"]:
            faults.append(f"{name} has {size} bytes instead of {entry['bytes']}")
    if faults:
        raise CheckpointError(f"{folder}: not whole: {', '.join(faults)}. Resume from another state.")
    return dict(content)


def _check_manifest(content: dict[str, Any]) -> None:
    numbers = [content["step"], content["sequence"], *(entry["bytes"] for entry in content["files"].values())]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("steps, sequence and sizes must be whole numbers")
    if not isinstance(content["metric"], int | float | None) or not isinstance(content.get("anchor", False), bool):
        raise ValueError("a bad metric or anchor")
    if not all(isinstance(entry["sha256"], str) for entry in content["files"].values()):
        raise ValueError("a bad checksum")
    if not {STATE, METADATA} <= content["files"].keys() or any(Path(name).name != name for name in content["files"]):
        raise ValueError(f"files must be in the folder, {STATE} and {METADATA} among them")


def _faults(folder: Path, entries: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Which of a state's files are not what its manifest says."""
    faults = []
    for name, entry in entries:
        try:
            _verify(folder / name, entry)
        except CheckpointError:
            faults.append(f"the SHA-256 of {name} is not the manifest's")
        except OSError as error:
            faults.append(f"{name} cannot be read: {error.strerror or error}")
    return faults


def _verify(file: Path, entry: dict[str, Any]) -> None:
    if file_sha256(file) != entry["sha256"]:
        raise CheckpointError(f"{file}: damaged, its SHA-256 is not the manifest's. Resume from another state.")


# ---- tensors of a state


def _save_tensors(tensors: dict[str, torch.Tensor], folder: Path, world: World) -> None:
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder, sync_files=True), process_group=world.group)
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{folder}: cannot write ({_reasons(error)}). Is the disk full?") from error


def _reasons(error: dcp.CheckpointException) -> str:
    return "; ".join(
        f"rank {rank}: {str(failure[0]) or type(failure[0]).__name__}"
        for rank, failure in sorted(error.failures.items())
    )


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that torch.distributed.checkpoint writes into ``.metadata``; none of them runs code."""

    _DCP = "torch.distributed.checkpoint."
    _KNOWN = {
        _DCP + "metadata": {
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        _DCP + "filesystem": {"_StorageInfo"},
        "torch": {"Size"}
        | {str(dtype).removeprefix("torch.") for dtype in (*DTYPES.values(), torch.float64)}
        | {"bool", "int8", "int16", "int32", "int64", "uint8"},
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        """Looks a class up, if it is a known one."""
        if name not in self._KNOWN.get(module, ()):
            raise CheckpointError(
                f"asks for {module}.{name}, which no state holds. It may be an attack: loading it is refused."
            )
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> Metadata:
    file = folder / METADATA
    try:
        with open(file, "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        entries = metadata.state_dict_metadata.items() if isinstance(metadata, Metadata) else ()
        # Anything but a tensor would be unpickled without restriction when it is loaded.
        others = [str(name) for name, entry in entries if not isinstance(entry, TensorStorageMetadata)]
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except Exception as error:  # noqa: BLE001 - broken pickles raise anything, MemoryError among it
        raise CheckpointError(f"{file}: damaged ({error}). Resume from another state.") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{file}: not the metadata of a state. Resume from another state.")
    if others:
        raise CheckpointError(
            f"{file}: {', '.join(others[:5])} are not tensors. It may be an attack: loading is refused."
        )
    return metadata


class _Reader(dcp.FileSystemReader):
    """Reads tensors with the metadata that the restricted unpickler has read."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, without opening the file again."""
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


def _check_targets(targets: dict[str, torch.Tensor], metadata: Metadata, folder: Path) -> None:
    saved: dict[str, Any] = metadata.state_dict_metadata
    faults = [f"the state has no {name}" for name in targets.keys() - saved.keys()]
    faults += [f"the model has no {name}" for name in saved.keys() - targets.keys() if name.startswith("model.")]
    faults += [
        f"{name} is {list(saved[name].size)}, the model needs {list(tensor.shape)}"
        for name, tensor in targets.items()
        if name in saved and saved[name].size != tensor.shape
    ]
    if faults:
        shown = sorted(faults)[:20]
        more = [f"... and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        raise CheckpointError(f"{folder} does not fit the config's model:\n  " + "\n  ".join(shown + more))


# ---- the optimizer: tensors beside the model's, all else in state.json


def _class_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {parameter: clean_name(name) for name, parameter in model.named_parameters()}
    foreign = sum(parameter not in names for group in optimizer.param_groups for parameter in group["params"])
    if foreign:
        raise CheckpointError(
            f"{_class_name(optimizer)} holds {foreign} parameters that are not the model's. "
            "Make the optimizer after the model is sharded."
        )
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def _describe_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's tensors by name, and how to put them together again.

    It is read as it is: helpers that make missing state by a step of learning rate 0 do not suit every optimizer.
    """
    tensors: dict[str, torch.Tensor] = {}
    state: dict[str, dict[str, Any]] = {}
    groups = []
    for group, names in zip(optimizer.param_groups, _group_names(model, optimizer), strict=True):
        groups.append({"parameters": names, "options": _describe_options(group)})
        for parameter, name in zip(group["params"], names, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                entry: dict[str, Any] = {"value": value}
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
                    entry = _describe_tensor(value, f"{_class_name(optimizer)}: {key} of {name}")
                state.setdefault(name, {})[key] = entry
    return tensors, {"class": _class_name(optimizer), "groups": groups, "state": state}


def _describe_tensor(value: torch.Tensor, what: str) -> dict[str, Any]:
    local = local_tensor(value)
    if hasattr(local, "__tensor_flatten__"):
        raise CheckpointError(
            f"{what} is a {type(local).__name__}, which torch.distributed.checkpoint cannot save. "
            "Use spin.training.AdamW8bit for moments in 8 bits, or torch.optim.AdamW."
        )
    shard_dims = (
        [placement.dim for placement in value.placements if isinstance(placement, Shard)] if local is not value else []
    )
    return {
        "distributed": isinstance(value, DTensor),
        "shard_dim": shard_dims[0] if shard_dims else None,
        "on_cpu": local.device.type == "cpu",
    }


def _describe_options(group: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.item() if isinstance(value, torch.Tensor) else value
        for key, value in group.items()
        if key != "params" and key not in _IMPLEMENTATION_OPTIONS
    }


def _restore_options(group: dict[str, Any], options: dict[str, Any]) -> None:
    for key, value in options.items():
        current = group.get(key)
        if isinstance(current, torch.Tensor):
            current.fill_(value)
        else:
            group[key] = tuple(value) if isinstance(current, tuple) else value


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], folder: Path) -> None:
    if saved["class"] != _class_name(optimizer):
        raise CheckpointError(
            f"{folder}: saved with {saved['class']}, the config's optimizer is {_class_name(optimizer)}. "
            "Restore the config, or start a new run from the exported model."
        )
    if [group["parameters"] for group in saved["groups"]] != _group_names(model, optimizer):
        raise CheckpointError(f"{folder}: the optimizer's parameter groups are not the saved ones. Restore the config.")


def _allocate_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any], metadata: Metadata
) -> tuple[dict[torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]]:
    """Memory for an optimizer's state, and the same tensors by the names under which they were saved."""
    parameters = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    # these want the count of steps on the device, all others on the CPU
    counted_on_device = {
        parameter
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    state: dict[torch.Tensor, dict[str, Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, entries in saved["state"].items():
        state[parameters[name]] = values = {}
        for key, entry in entries.items():
            if "value" in entry:
                values[key] = entry["value"]
                continue
            if key == "step":
                entry = entry | {"on_cpu": parameters[name] not in counted_on_device}
            full_name = f"optimizer.{name}.{key}"
            stored: Any = metadata.state_dict_metadata[full_name]
            values[key] = tensors[full_name] = _empty_like_saved(
                parameters[name].detach(), entry, stored.size, stored.properties.dtype
            )
    return state, tensors


def _empty_like_saved(
    parameter: torch.Tensor, entry: dict[str, Any], size: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    if not entry["distributed"]:
        return torch.zeros(size, dtype=dtype, device="cpu" if entry["on_cpu"] else parameter.device)
    if size == parameter.shape:
        return torch.zeros_like(parameter, dtype=dtype)
    if not isinstance(parameter, DTensor):
        return torch.zeros(size, dtype=dtype, device=parameter.device)
    shard_dim = entry["shard_dim"]
    placements = [
        Shard(shard_dim) if shard_dim is not None and isinstance(placement, Shard) else Replicate()
        for placement in parameter.placements
    ]
    zeros = distributed_zeros(size, dtype=dtype, device_mesh=parameter.device_mesh, placements=placements)
    return zeros.to(parameter.device)  # offloaded shards are not where their mesh is
