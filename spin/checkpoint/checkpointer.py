"""Checkpoints: the model a run starts from, the checkpoints it resumes from, the models it exports.

A checkpoint is a folder ``checkpoints/step_00000123``: tensors (see :mod:`spin.checkpoint.tensors`), everything else in
``state.json``, and ``manifest.json`` with size and SHA-256 of every file. It is written under a hidden name, the
manifest last, and then renamed; so a folder with a step's name is complete, or has been damaged since, which the
manifest shows. Saving costs the training loop a copy to CPU memory; a thread writes while training continues.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from spin.checkpoint.manifest import (
    MANIFEST,
    METADATA,
    STATE,
    STEP_FOLDER,
    encode_document,
    find_damage,
    read_document,
    read_manifest,
    verify,
    write_manifest,
)
from spin.checkpoint.optimizer_state import allocate_optimizer_state, describe_optimizer, restore_optimizer
from spin.checkpoint.tensors import check_targets, load_tensors, model_tensors, read_metadata, save_tensors
from spin.core.dtypes import DTYPES
from spin.core.errors import CheckpointError, ConfigError
from spin.core.files import (
    SFT_STAGE,
    as_output_error,
    check_can_be_made,
    file_sha256,
    is_marked,
    is_replaceable,
    remove_folder,
    remove_or_keep_aside,
    replace_text,
)
from spin.core.heartbeat import set_stage
from spin.core.ranks import (
    World,
    atomic_dir_of_ranks,
    broadcast_object,
    gather_objects,
    raise_on_all_ranks,
    with_own_process_group,
)
from spin.core.terminal import counted, some_of
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
from spin.model.sharding import check_weights, nonfinite_weights

log = logging.getLogger(__name__)

_EXPORTS = {"iteration_*/hf_model": "model", "iteration_*/adapter": "adapter"}  # and their kinds
_KIND = "checkpoint"  # of folder, see spin.core.files.begin_atomic_dir


@dataclass(eq=False)
class SPINCheckpointer:
    """Loads, saves, resumes and exports.

    Args:
        checkpoint_dir (str): Hugging Face folder that training starts from.
        output_dir (str): checkpoints go to ``checkpoints/`` in it, exports to ``iteration_NNN/hf_model``.
        model_type (str | None): for models of torchtune's builders, the layout of the folder's weights: a name of
            torchtune's ``ModelType`` such as ``LLAMA3_2``. None: the model is built by ``spin.model.from_hf``.
        keep_last (int): number of newest checkpoints to keep, at least 1.
        keep_best (int): number of checkpoints of lowest validation loss to keep in addition.
        export_dtype (str): ``bf16``, ``fp32`` or ``fp16``.
        async_save (bool): write while training continues. Costs as much CPU memory as a rank's part of a checkpoint.
        keep_exports (int | None): number of newest iterations whose exports to keep; None keeps all.

    Raises:
        ConfigError: If there is no such dtype or layout. Ranges of numbers stand in :mod:`spin.config.schema`.
    """

    checkpoint_dir: str
    output_dir: str
    model_type: str | None = None
    keep_last: int = 2
    keep_best: int = 0
    export_dtype: str = "bf16"
    async_save: bool = True
    keep_exports: int | None = None

    def __post_init__(self) -> None:
        """Checks names, and prepares the thread that writes."""
        if self.export_dtype not in DTYPES:
            raise ConfigError(f"checkpointer.export_dtype is {self.export_dtype!r}, expected {', '.join(DTYPES)}.")
        check_model_type(self.model_type)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spin-checkpoint")
        self._pending: Future[None] | None = None
        self._stager: StateDictStager | None = None
        self._writers_world: World | None = None
        self._damaged: set[Path] = set()
        self._verified: Path | None = None  # the checkpoint whose files have all been compared with the manifest

    @property
    def checkpoints_dir(self) -> Path:
        """The folder of all checkpoints."""
        return Path(self.output_dir) / "checkpoints"

    def validate(self, iterations: int = 1) -> None:
        """Checks, before any weight is loaded, that loading and saving can work: CheckpointError if the model folder is
        incomplete, or too little is free for the exports of so many iterations; OutputError if nothing can be
        written."""
        self.check_space(self.check_source(), iterations)
        with as_output_error(self.checkpoints_dir):
            self.checkpoints_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints_dir) as probe:
                probe.write(b"spin")
                probe.flush()
                os.fsync(probe.fileno())

    def check_space(self, parameters: int, iterations: int) -> None:
        """CheckpointError if too little is free for checkpoints and exports of so many parameters. Writes nothing."""
        free = shutil.disk_usage(check_can_be_made(self.checkpoints_dir)).free
        least, usual, export = self._disk_bytes(parameters)
        # A new export or checkpoint is complete before an old one goes.
        kept = iterations if self.keep_exports is None else min(iterations, self.keep_exports + 1)
        exports = max(1, kept - len({folder.parent for _, folder in self._exports()}))
        if free < least + exports * export:
            raise CheckpointError(
                f"{self.output_dir}: {_size(free)} free, but one checkpoint and {counted(exports, 'export')} of "
                f"{parameters:,} parameters take {_size(least + exports * export)} to "
                f"{_size(usual + exports * export)}. Free some space, change output_dir, or keep fewer exports "
                "(checkpointer.keep_exports=1)."
            )
        wanted = usual * (self.keep_last + self.keep_best + 1) + exports * export
        if free < wanted and not self._complete():
            log.warning(
                f"{self.output_dir}: {_size(free)} free; keep_last={self.keep_last} and keep_best={self.keep_best} "
                f"with fp32 AdamW and {counted(exports, 'export')} can need {_size(wanted)}."
            )

    def check_source(self) -> int:
        """The number of weights in ``checkpoint_dir``; CheckpointError if a file cannot be read. Writes nothing."""
        source = Path(self.checkpoint_dir)
        read_hf_config(source)
        for name in (GENERATION_CONFIG, *TOKENIZER_CONFIGS):  # which an export changes
            read_companion(source / name)
        return stored_elements(source)

    def _disk_bytes(self, parameters: int) -> tuple[int, int, int]:
        """What a checkpoint takes with bf16 weights and 8-bit moments, and with fp32 AdamW; and what an export does."""
        return parameters * 4, parameters * 12, parameters * DTYPES[self.export_dtype].itemsize

    def _exports(self) -> list[tuple[int, Path]]:
        """The exports in the run's folder that this program made, with their iterations."""
        found = [(folder, kind) for name, kind in _EXPORTS.items() for folder in Path(self.output_dir).glob(name)]
        numbered = [(folder.parent.name.removeprefix("iteration_"), folder, kind) for folder, kind in found]
        return [(int(n), folder) for n, folder, kind in numbered if n.isdecimal() and is_marked(folder, kind)]

    def _retire_exports(self, iteration: int) -> None:
        """Removes the exports of iterations before those that are kept; never the model that training starts from."""
        kept = math.inf if self.keep_exports is None else self.keep_exports
        for number, folder in self._exports():
            if number <= iteration - kept and folder.resolve() != Path(self.checkpoint_dir).resolve():
                _try_to_remove(folder, remove_folder)

    def load_model(self, model: nn.Module, world: World) -> None:
        """Fills the model from ``checkpoint_dir``; see :func:`spin.model.hf.load_hf_weights`."""
        load_hf_weights(model, self.checkpoint_dir, self.model_type, world=world)

    def load_start(self, model: nn.Module, world: World) -> Path | None:
        """Fills the model with what a new run starts from: ``checkpoint_dir``, or what :meth:`sft_result` returns."""
        self.load_model(model, world)
        if (checkpoint := self.sft_result(world)) is not None:
            log.info(f"Starting from the result of supervised fine-tuning, {checkpoint}")
            self._verified = checkpoint
            self.load(checkpoint, model=model, optimizer=None, world=world)
        return checkpoint

    def sft_result(self, world: World | None = None) -> Path | None:
        """The checkpoint that the SFT stage in the run's folder ended with; None without such a stage, CheckpointError
        if it has not ended. With ``world`` collective and compared with its checksums, as :meth:`latest` does."""
        folder = Path(self.output_dir) / SFT_STAGE
        if not (folder.is_dir() if world is None else broadcast_object(folder.is_dir(), world)):
            return None
        checkpoint = replace(self, output_dir=str(folder)).latest(world=world)
        state = self.read_state(checkpoint) if checkpoint else {}
        if not state or state["progress"]["step"] < state["total_steps"]:
            raise CheckpointError(
                f"{folder}: supervised fine-tuning has not ended, and self-play starts from its result. Run spin_sft "
                "with this config again, which resumes it, or remove the folder to start from the model as it is."
            )
        return checkpoint

    def export(
        self, model: nn.Module, iteration: int, world: World, tokenizer: object = None, stop_ids: Sequence[int] = ()
    ) -> Path:
        """Writes the model for transformers and vLLM to ``iteration_NNN/hf_model``, and a LoRA run's adapter for peft
        next to it; gives the folder. Waits for a checkpoint being written. Collective.

        Of a :class:`spin.data.ChatTokenizer` the folder gets the files, and the chat template that the config put in
        place of the folder's own; of another tokenizer those of ``checkpoint_dir``. Without ``stop_ids`` the
        tokenizer's are written, see :func:`spin.model.hf.write_companions`.
        """
        self.wait()
        companions = {
            "tokenizer_dir": getattr(tokenizer, "path", None),
            "chat_template": getattr(tokenizer, "chat_template", None),
            "stop_ids": stop_ids or getattr(tokenizer, "eos_ids", ()),
        }
        out_dir = self._export(model, Path(self.output_dir) / f"iteration_{iteration:03d}", world, companions)
        if world.is_main:
            self._retire_exports(iteration)
        return out_dir

    def _export(self, model: nn.Module, folder: Path, world: World, companions: dict[str, Any]) -> Path:
        """Writes an iteration's exports. ``companions`` are arguments of :func:`spin.model.hf.write_companions`."""
        dtype = DTYPES[self.export_dtype]
        source, out_dir = self.checkpoint_dir, folder / "hf_model"
        return export_hf(model, source, out_dir, self.model_type, dtype=dtype, world=world, **companions)

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
        """Saves a checkpoint that a run can resume from, then removes those that need not be kept.

        Every rank writes its own shards, to a file system that all ranks share. A checkpoint of the same step is
        replaced. With ``async_save`` this returns when everything is copied to CPU memory, and a thread of each rank
        writes; the checkpoint has its name, and counts, when all have written. What goes wrong there is raised by the
        next call of :meth:`wait`, :meth:`save`, :meth:`export` or :meth:`close`. Collective.

        ``state`` is everything besides tensors, as JSON values; ``metric`` is the validation loss, for ``keep_best``;
        an ``anchor`` is kept until the next one is saved, however many follow. CheckpointError if a rank could not
        write: what was there before is still there. NonFiniteError if a weight is: then nothing is written.
        """
        set_stage("saving a checkpoint")
        self.wait()
        folder = self.checkpoints_dir / f"step_{step:08d}"
        check_weights(model, world, str(folder))
        tensors, described = model_tensors(model), None
        with raise_on_all_ranks(world, CheckpointError, self.checkpoints_dir):
            if optimizer is not None:
                optimizer_tensors, described = describe_optimizer(model, optimizer)
                tensors |= optimizer_tensors
            document = encode_document(step, state, described)
            if world.is_main:
                self._clean()
        about = {"step": step, "metric": metric, "anchor": anchor}
        if not self.async_save:
            self._write(folder, tensors, document, about, world)
            return folder
        on_gpu = world.device.type == "cuda"
        if self._stager is None or self._writers_world is None:
            # not DefaultStager, which wraps it: torch 2.11's works for one checkpoint only
            self._stager = StateDictStager(pin_memory=on_gpu)
            self._writers_world = with_own_process_group(world)
        copies = self._stager.stage(tensors, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize()
        self._pending = self._writer.submit(self._write, folder, copies, document, about, self._writers_world)
        return folder

    def _write(
        self, folder: Path, tensors: dict[str, torch.Tensor], document: str, about: dict[str, Any], world: World
    ) -> None:
        """Writes a checkpoint, and removes old ones. Collective."""
        with atomic_dir_of_ranks(folder, _KIND, world, CheckpointError) as part:
            save_tensors(tensors, part, world)
            with raise_on_all_ranks(world, CheckpointError, part):
                own = sorted(part.glob(f"__{world.rank}_*"))
                if world.is_main:
                    replace_text(part / STATE, document)
                    own += [part / METADATA, part / STATE]
                # Who wrote a file hashes it: its bytes are still in this host's cache.
                sums = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in own}
            files = {name: entry for entries in gather_objects(sums, world) for name, entry in entries.items()}
            with raise_on_all_ranks(world, CheckpointError, part):
                if world.is_main:
                    sequence = max((manifest["sequence"] for _, manifest in self._complete()), default=0) + 1
                    write_manifest(part, files=files, sequence=sequence, **about)
        if world.is_main:
            self._damaged.discard(folder)
            self._retire()

    @property
    def has_failed(self) -> bool:
        """The last checkpoint could not be written; :meth:`wait` says why. Known to one rank sooner than to another."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk; CheckpointError on all ranks if one could not write it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last checkpoint, and gives the copies' memory back."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            if self._stager is not None:
                self._stager.close()

    def roll_back(self, step: int, world: World, because: str = "") -> Path | None:
        """Removes the checkpoints of later steps, so that a run resumes from ``step``, or with 0 from the first model,
        and gives the checkpoint that it resumes from. Collective.

        Newest first: a process that dies here leaves checkpoints that a run can resume from and roll back again.
        CheckpointError, which begins with ``because``, if there is none of ``step``: then nothing is removed.
        """
        self.wait()
        with raise_on_all_ranks(world, CheckpointError):
            if world.is_main:
                complete = self._complete()
                if step > 0 and step not in {manifest["step"] for _, manifest in complete}:
                    raise CheckpointError(
                        f"{because} {self.checkpoints_dir}: cannot go back to step {step}, whose checkpoint is "
                        "not there (it is kept only if a limit could roll back when it was saved). No checkpoint was "
                        "removed; the same command, with what you change, resumes from the newest.".lstrip()
                    )
                for folder, manifest in reversed(complete):
                    if manifest["step"] > step:
                        _remove(folder)
        return self.latest()

    def _clean(self) -> None:
        """Removes what a dead process left behind; a checkpoint that it was replacing gets its name back.

        Other programs have checkpoints/step_N too: what has no marker is left alone.
        """
        for folder in [*self.checkpoints_dir.glob(".step_*.part"), *self.checkpoints_dir.glob("step_*")]:
            if not is_marked(folder, _KIND):
                continue
            match = STEP_FOLDER.fullmatch(folder.name)
            current = folder.with_name(folder.name.removesuffix(".old"))
            is_half_deleted = match is not None and not (folder / MANIFEST).exists()
            is_replaced = match is not None and folder != current and (current / MANIFEST).exists()
            if folder.suffix == ".part" or is_half_deleted or is_replaced:
                remove_folder(folder)
            elif match is not None and folder != current and is_replaceable(current, _KIND):
                remove_or_keep_aside(current, _KIND)
                os.rename(folder, current)

    def _retire(self) -> None:
        """Removes checkpoints that are neither among the newest nor among the best, nor the last anchor."""
        complete = self._complete()
        keep = {folder for folder, _ in complete[-self.keep_last :]}
        scored = [(manifest["metric"], -manifest["sequence"], folder) for folder, manifest in complete]
        best = sorted(entry for entry in scored if entry[0] is not None)[: self.keep_best]
        keep |= {folder for _, _, folder in best}
        keep |= set([folder for folder, manifest in complete if manifest["anchor"]][-1:])
        for folder, _ in complete:
            if folder not in keep and is_marked(folder, _KIND):
                _try_to_remove(folder, _remove)

    # ---- resume

    def _complete(self) -> list[tuple[Path, dict[str, Any]]]:
        """The complete checkpoints with their manifests, oldest first."""
        found: dict[str, tuple[Path, dict[str, Any]]] = {}
        # A folder's `.old` sorts after it and counts only if it is incomplete.
        for folder in sorted(self.checkpoints_dir.glob("step_*")):
            match = STEP_FOLDER.fullmatch(folder.name)
            if match is None or match[1] in found or folder in self._damaged or not (folder / MANIFEST).exists():
                continue
            try:
                found[match[1]] = folder, read_manifest(folder)
            except CheckpointError as error:
                self._damaged.add(folder)
                log.warning(f"{error} This checkpoint is passed over.")
        return sorted(found.values(), key=lambda checkpoint: checkpoint[1]["sequence"])

    def latest(self, resume: str = "auto", world: World | None = None) -> Path | None:
        """The checkpoint to resume from, or None to start a new run; ``resume`` is ``auto``, ``never`` or a folder.

        With ``world``, collectively, the newest checkpoint's checksums are compared; where a byte has changed the one
        before it is taken, with a warning. Without, manifests and sizes alone are looked at. CheckpointError if the
        folder is no complete checkpoint, or if the run has checkpoints and none is complete.
        """
        if resume == "never":
            return None
        if resume != "auto":
            read_manifest(Path(resume))
            return Path(resume)
        complete = self._complete()
        if world is None:
            return complete[-1][0] if complete else None
        complete, damaged = broadcast_object((complete, self._damaged), world)
        for folder, manifest in reversed(complete):
            entries = sorted(manifest["files"].items())[world.rank :: world.world_size]
            faults = [fault for part in gather_objects(find_damage(folder, entries), world) for fault in part]
            if not faults:
                self._verified = folder
                return folder
            self._damaged.add(folder)
            if world.is_main:
                log.warning(f"{folder}: damaged ({'; '.join(faults)}). It is passed over for the checkpoint before it.")
        lost = [folder.name for folder in sorted(self._damaged | damaged) if is_marked(folder, _KIND)]
        if lost:
            raise CheckpointError(
                f"{self.checkpoints_dir}: every checkpoint is damaged ({', '.join(lost)}; see the warnings above). "
                "Restore one from a copy, or start a new run with resume=never."
            )
        return None

    def read_state(self, path: str | Path) -> dict[str, Any]:
        """What was given as ``state`` to :meth:`save`; no tensor is read. CheckpointError if the checkpoint is
        incomplete or its state.json is damaged."""
        state: dict[str, Any] = read_document(Path(path))["state"]
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

        An optimizer is left as it is if the checkpoint was saved without one; None leaves the saved one aside. With
        ``new_options`` what the optimizer was made with, such as its weight decay, stands, else the saved values come
        back. CheckpointError if a file is damaged, or if the checkpoint does not fit the model or the optimizer.
        """
        set_stage("loading a checkpoint")
        folder = Path(path)
        with raise_on_all_ranks(world, CheckpointError):
            entries = sorted(read_manifest(folder)["files"].items())
            # `latest` has read all files of the one that it chose
            for name, entry in entries[world.rank :: world.world_size] if folder != self._verified else ():
                verify(folder / name, entry)
        with raise_on_all_ranks(world, CheckpointError):
            metadata, saved = read_metadata(folder), read_document(folder)["optimizer"]
            targets = model_tensors(model)
            optimizer_state: dict[torch.Tensor, dict[str, Any]] = {}
            if optimizer is not None and saved is not None:
                optimizer_state, tensors = allocate_optimizer_state(model, optimizer, saved, metadata, folder)
                targets |= tensors
            check_targets(targets, metadata, folder)
        load_tensors(targets, folder, metadata)
        broken = nonfinite_weights(model, world)
        if broken:
            raise CheckpointError(
                f"{folder}: was saved with NaN or infinity in {some_of(broken, 10)}. Resume from an earlier "
                "checkpoint: resume=<path>."
            )
        if optimizer is not None and saved is not None:
            restore_optimizer(optimizer, optimizer_state, saved, keep_options=new_options)


def _remove(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first: from then on it is none. One without a marker is kept aside."""
    if is_marked(folder, _KIND):
        (folder / MANIFEST).unlink()
    remove_or_keep_aside(folder, _KIND)


def _try_to_remove(folder: Path, remove: Callable[[Path], None]) -> None:
    try:
        remove(folder)
    except OSError as error:
        log.warning(f"{folder}: cannot be removed, though it need not be kept ({error}).")


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"
