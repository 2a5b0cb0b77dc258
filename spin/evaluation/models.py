"""The models of an evaluation, candidate, baseline and judge, and the checks of its config."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spin import config
from spin.config import EvaluateConfig
from spin.config.checks import check_transfer_dir
from spin.config.schema import EvaluatedModel, Sampling
from spin.core.dtypes import torch_dtype
from spin.core.errors import CheckpointError, ConfigError, DataError
from spin.core.files import file_sha256, json_fingerprint
from spin.core.hub import hub_name
from spin.core.ranks import World
from spin.data import ChatTokenizer, PromptDataset, PromptSource, PromptTokenizer, adapt_tokenizer
from spin.data.dates import known_date
from spin.data.read import check_fits_model, unknown_ids
from spin.evaluation import verdicts
from spin.generators import Generator, GeneratorContext, sampling_params
from spin.generators.stage import Limits, limits_of
from spin.model.build import build_model, prepare_model
from spin.model.hf import check_hf_folder, load_hf_weights
from spin.model.hf_folder import read_hf_config, weight_files


class EvalModel:
    """A model that responds or judges: tokenizer and shape now, weights when it is its turn."""

    def __init__(self, role: str, section: EvaluatedModel) -> None:
        self.role, self.section = role, section
        self.name = eval_model_name(role, section)
        self.has_weights = section.checkpoint_dir is not None
        self.weights: str | None = None
        self._folder, self._layout = section.checkpoint_dir or "", section.model_type  # of the weights
        if self.has_weights:
            try:
                read_hf_config(self._folder)
            except CheckpointError as error:
                raise CheckpointError(f"{role}.checkpoint_dir={section.checkpoint_dir}: {error}") from error
        self.tokenizer: PromptTokenizer = adapt_tokenizer(config.instantiate(section.tokenizer))
        if isinstance(self.tokenizer, ChatTokenizer):
            self.tokenizer.checks_reasoning = False  # nothing is trained
            if self.tokenizer.reads_date:  # that of the run which made the model
                self.tokenizer.date = self.tokenizer.date or known_date(section.checkpoint_dir)
        self._shape = build_model(section.model, torch.float32) if self.has_weights and section.model else None
        self.context: int = sys.maxsize if self._shape is None else self._shape.max_seq_len
        self.unknown_ids = () if self._shape is None else unknown_ids(self._shape, self.tokenizer)
        if self._shape is not None:
            check_hf_folder(self._shape, self._folder, self._layout)

    @property
    def limits(self) -> Limits:
        """What its responses must stay within."""
        return limits_of(self._shape, self.context, self.tokenizer)

    def check(self, sampling: Sampling, *prompts: PromptSource) -> None:
        """Raises DataError if the model has no embedding for a token of the prompts, or a stop token is beyond it."""
        if self._shape is not None:
            stop_ids = sampling_params(sampling, self.tokenizer.eos_ids).stop_token_ids
            check_fits_model(self._shape, self.tokenizer, stop_ids, *prompts)

    def fingerprint(self, generator: Generator | None) -> str:
        """Whose responses these are: a hash of the weights' files, or the generator's own fingerprint."""
        if not self.has_weights:
            return str(getattr(generator, "fingerprint", self.name))
        files = {file.name: file_sha256(file) for file in weight_files(Path(self._folder))}
        shape = {key: value for key, value in config.plain(self.section.model).items() if key != "path"}
        return json_fingerprint([files, read_hf_config(Path(self._folder)), shape])

    def load(self, world: World, compute_dtype: str) -> nn.Module:
        """The model, sharded over the ranks, with the folder's weights."""
        dtype = torch_dtype(compute_dtype, world.device)  # nothing is trained: no fp32 master weights
        assert self.section.model is not None  # as check_evaluation asks for
        model = build_model(self.section.model, dtype)
        prepare_model(model, world, compute_dtype=dtype)
        load_hf_weights(model, self._folder, self._layout, world=world)
        return model

    def generator(self, model: nn.Module | None, world: World) -> Generator:
        """What the section's ``generator`` names."""
        context = GeneratorContext(model, world.device, self.context, self.tokenizer.decode, world)
        return config.instantiate(self.section.generator, context=context)


def shared_samples(*datasets: PromptDataset) -> list[str]:
    """The ids of the samples that fit every model, in order; a sample that is too long for one is dropped for all."""
    in_all = set.intersection(*(set(dataset.sample_ids) for dataset in datasets))
    shared = [sample_id for sample_id in datasets[0].sample_ids if sample_id in in_all]
    if not shared:
        raise DataError("no prompt fits both models. Raise dataset.max_prompt_tokens, or choose other data.")
    return shared


def eval_model_name(role: str, section: EvaluatedModel) -> str:
    """The name of a model in tables and folders: its own, or that of its folder (``iteration_001`` for an export)."""
    if section.name is not None:
        return section.name
    if section.checkpoint_dir is None:
        return role
    folder = Path(hub_name(section.checkpoint_dir) or section.checkpoint_dir)
    return folder.parent.name if folder.name in ("hf_model", "adapter") else folder.name


def check_evaluation(cfg: EvaluateConfig) -> None:
    """Checks the values of the config against each other; all faults are in one error."""
    faults = config.Faults()

    def attempt(check: Callable[..., None], *values: str) -> None:
        try:
            check(*values)
        except ConfigError as error:
            faults.add(str(error))

    for role in cfg.roles:
        section = cfg[role]
        if section.tokenizer is None:
            faults.add(f"{role}.tokenizer: not set. It makes the prompts' token ids.")
        folders = {"output_dir": cfg.output_dir, f"{role}.checkpoint_dir": section.checkpoint_dir}
        check_transfer_dir(f"{role}.generator", section.generator, folders, faults)
        name = eval_model_name(role, section)
        if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] == ".":
            faults.add(f"{role}.name={name!r}: expected letters, digits, '-', '_' and '.'; it becomes a folder's name.")
    name = eval_model_name("candidate", cfg.candidate)
    if name == eval_model_name("baseline", cfg.baseline):
        faults.add(
            f"candidate and baseline are both called {name!r}. Set candidate.name or baseline.name; responses are kept "
            "by name."
        )
    if cfg.verdict == "judge":
        attempt(verdicts.check_template, cfg.judge.template)
        attempt(verdicts.check_pattern, "judge.pattern", cfg.judge.pattern)
    else:
        for name in ("pattern", "reference_pattern"):
            if cfg.exact_match[name] is not None:
                attempt(verdicts.check_pattern, f"exact_match.{name}", cfg.exact_match[name])
    data: Any = config.plain(cfg.dataset)
    if data.get("streaming"):
        faults.add("dataset.streaming=true: an evaluation reads its prompts once. Use dataset.limit alone.")
    sources = data.get("sources")
    parts = sources.items() if isinstance(sources, dict) else ()
    weights = [f"dataset.sources.{name}.weight" for name, part in parts if isinstance(part, dict) and "weight" in part]
    if weights or data.get("samples") is not None:
        faults.add(
            f"{', '.join(weights) or 'dataset.samples'}: an evaluation plays every sample once. Remove it, and set "
            "limit in a source to take fewer of its samples."
        )
    faults.raise_if_any()
