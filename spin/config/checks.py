"""What a config must have in more than one key, or in the world; the schema checks each value by itself."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from spin.config.components import KINDS, component_of
from spin.config.faults import Faults, nearest_or_known
from spin.config.schema import (
    COMPONENT,
    Component,
    Config,
    EvaluateConfig,
    GenerateConfig,
    Sampling,
    Section,
    SPINConfig,
    fields_of,
)
from spin.core.errors import ConfigError
from spin.core.files import TRANSFER, check_own_folder
from spin.core.terminal import counted, nearest_of

_PACKAGES = {  # of loggers, which import them when they are made: after the weights are loaded
    "TrackioLogger": "trackio",
    "WandBLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "TensorBoardLogger": "tensorboard",
}


def check_together(cfg: Section, faults: Faults) -> None:
    """Notes values that do not work with each other. Keys with a fault of their own are no attributes of the config:
    checks that read one are left out."""
    is_right = not faults.messages
    for kind, checks in _CHECKS.items():
        for check in checks if isinstance(cfg, kind) else ():
            try:
                check(cfg, faults)
            except AttributeError:
                if is_right:
                    raise


def doubtful(cfg: SPINConfig) -> list[str]:
    """What a run of self-play may do with this config, and is seldom meant."""
    found = []
    if cfg.enable_float8_training:
        found.append(
            "enable_float8_training=true: float8's rounding moves log-probs by more than a step of self-play does, "
            "so loss, acc and margin are mostly noise. Set it to false; spin_sft can have it."
        )
    trained = "nll_weight" if cfg.nll_weight else "SPACELoss" if cfg.loss.component.endswith(".SPACELoss") else ""
    if trained and cfg.pairs.equal_to_real == "drop":
        found.append(
            f"pairs.equal_to_real=drop with {trained}: pairs of equal responses have a gradient there, which holds the "
            "model where it is right. Set pairs.equal_to_real=keep."
        )
    return found


def _check_iterations(cfg: SPINConfig, faults: Faults) -> None:
    for section, name in (("loss", "beta"), ("optimizer", "lr")):
        value = getattr(getattr(cfg, section, None), name, None)
        if isinstance(value, list) and len(value) != cfg.max_iterations:
            faults.add(
                f"{section}.{name}: {value} has {counted(len(value), 'value')} for "
                f"{counted(cfg.max_iterations, 'iteration')}. Give one number, or one for each iteration."
            )


def _check_optimizer(cfg: SPINConfig, faults: Faults) -> None:
    step = getattr(component_of(cfg.optimizer), "step", None)
    closure = inspect.signature(step).parameters.get("closure") if callable(step) else None
    if closure is not None and closure.default is inspect.Parameter.empty:
        faults.add(
            f"optimizer._component_={cfg.optimizer.component}: its step computes the loss several times, where a "
            "batch passes through the model once. Choose one whose step needs no closure, such as torch.optim.AdamW."
        )


def _check_resume(cfg: SPINConfig, faults: Faults) -> None:
    known = fields_of(type(cfg))
    for name in cfg.resume_with_changes:
        if name.partition(".")[0] not in known:
            faults.add(f"resume_with_changes: the config has no key {name!r}.{nearest_of(name, list(known))}")


def _check_responses(cfg: SPINConfig, faults: Faults) -> None:
    greedy, responses = cfg.sampling.greedy_by, cfg.pairs.responses_per_prompt
    if greedy and responses != 1 and getattr(component_of(cfg.generator), "takes_sampling", True):
        faults.add(
            f"pairs.responses_per_prompt={responses} with sampling.{greedy}={cfg.sampling[greedy]}: all responses to a "
            f"prompt would be the same. Set sampling.{greedy}={Sampling()[greedy]} to sample them, or "
            "pairs.responses_per_prompt=1."
        )


def _check_checker(cfg: SPINConfig, faults: Faults) -> None:
    section, supplied = cfg.pairs.checker, KINDS["checker"].supplied
    if section is not None:
        check = component_of(section)
        called = check if inspect.isroutine(check) or inspect.isclass(check) else type(check).__call__
        for is_kind, kind in (
            (inspect.isclass, "a class"),
            (inspect.iscoroutinefunction, "an async function"),
            (inspect.isgeneratorfunction, "a generator function"),
        ):
            if is_kind(called):
                faults.add(
                    f"pairs.checker: {section.component} is {kind}, expected a function, or an instance that can be "
                    "called, which returns True, False or None."
                )
                return
        try:
            inspect.signature(check).bind(**dict.fromkeys(supplied), **(section.model_extra or {}))
        except TypeError as error:
            faults.add(f"pairs.checker: {section.component}: {error}; it is called with {', '.join(supplied)} by name.")


def _check_checkpointing(cfg: SPINConfig, faults: Faults) -> None:
    if cfg.ac_mode == "selective" and cfg.ac_option is None:
        faults.add("ac_option=null: ac_mode=selective checkpoints every ac_option-th layer; give 1 or more.")


def _check_dtypes(cfg: SPINConfig, faults: Faults) -> None:
    if cfg.dtype == "bf16" and cfg.compute_dtype == "fp32":
        faults.add("dtype=bf16 with compute_dtype=fp32: weights are not computed in more precision than they have.")


def _check_validation(cfg: SPINConfig, faults: Faults) -> None:
    sources = cfg.dataset.get("sources")
    parts = [cfg.dataset, cfg.dataset.get("common"), *(sources.values() if isinstance(sources, Mapping) else ())]
    held_out = [part.get("validation_fraction") for part in parts if isinstance(part, Mapping | Component)]
    if cfg.validation_dataset is None and cfg.validation.spin and not any(held_out):
        faults.add("validation.spin=true needs a validation_dataset, or dataset.validation_fraction.")
    if cfg.validation_dataset is not None and cfg.validation_dataset.get("validation_fraction"):
        faults.add("validation_dataset.validation_fraction: it is dataset.validation_fraction that holds samples out.")
    if cfg.validation_dataset is not None and cfg.validation_dataset.get("streaming"):
        faults.add("validation_dataset.streaming=true: a validation set is the same each time. Use its limit alone.")


def _check_folders(cfg: SPINConfig, faults: Faults) -> None:
    folders = {
        "output_dir": cfg.output_dir,
        "checkpointer.checkpoint_dir": cfg.checkpointer.get("checkpoint_dir"),
        "checkpointer.output_dir": cfg.checkpointer.get("output_dir"),
        "tokenizer.path": cfg.tokenizer.get("path"),
        "generator.model_dir": cfg.generator.get("model_dir"),
    }
    check_transfer_dir("generator", cfg.generator, folders, faults)


def _check_sampling(sampling: Sampling, path: str, faults: Faults) -> None:
    if sampling.min_new_tokens > sampling.max_new_tokens:
        faults.add(f"{path}.min_new_tokens={sampling.min_new_tokens}: expected 0 to max_new_tokens.")


def _check_worker(cfg: GenerateConfig, faults: Faults) -> None:
    if cfg.worker >= cfg.num_workers:
        faults.add(f"worker={cfg.worker}: expected 0 to num_workers - 1 = {cfg.num_workers - 1}.")


def _check_evaluated_models(cfg: EvaluateConfig, faults: Faults) -> None:
    for role in cfg.roles:
        if cfg[role].checkpoint_dir is None and cfg[role].generator.component == "spin.generators.TorchtuneGenerator":
            folder = "a Hugging Face folder, such as runs/mine/iteration_001/hf_model"
            faults.add(f"{role}.checkpoint_dir: not set. Name {folder}, or a generator that needs no weights.")


def check_transfer_dir(path: str, generator: Component, apart_from: dict[str, Any], faults: Faults) -> None:
    """Notes a generator's folder of weights that is one of the run's other folders, or somebody else's."""
    folder = generator.get("transfer_dir")
    if isinstance(folder, str) and folder:
        try:
            check_own_folder(f"{path}.transfer_dir", folder, TRANSFER, apart_from)
        except ConfigError as error:
            faults.add(str(error))


def _check_loggers(cfg: SPINConfig, faults: Faults) -> None:
    for section in cfg.metric_loggers:
        _check_logger(section, faults)


def _check_logger(section: Component, faults: Faults) -> None:
    """A service's library takes further settings: among them programs to run and servers that get the key."""
    where, logger = section._where, section.component.rpartition(".")[2]
    if section.component.startswith("torchtune."):  # not one of the user's own
        parameters = inspect.signature(component_of(section)).parameters.values()
        named = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters) and logger in _PACKAGES
        for key, value in section.model_dump(by_alias=True).items():
            hint = nearest_of(key, named)
            if key not in (COMPONENT, *named) and (hint or not takes_more):
                hint = nearest_or_known(key, named) or " It takes none."
                faults.add(f"{where}.{key}: {section.component} has no such parameter.{hint}")
            items = value if isinstance(value, list) else [value]
            if key == "settings" or any(isinstance(item, dict | list) for item in items):
                faults.add(
                    f"{where}.{key}: found {value!r:.80}, expected a number, a text, a switch or a list of them."
                )
        name = section.get("filename")
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.(txt|log)", name)):
            faults.add(
                f"{where}.filename={name!r}: lines are appended to it; expected a name such as log.txt, without "
                "a folder (that is log_dir)."
            )
    package = _PACKAGES.get(logger)
    if package is not None and importlib.util.find_spec(package) is None:
        faults.add(
            f"{where}: {logger} needs the package {package}, which is not installed: pip install {package}. "
            "metrics.jsonl has everything in any case."
        )


_CHECKS: dict[type[Section], tuple[Callable[[Any, Faults], None], ...]] = {
    Config: (lambda cfg, faults: _check_sampling(cfg.sampling, "sampling", faults),),
    EvaluateConfig: (
        lambda cfg, faults: _check_sampling(cfg.judge.sampling, "judge.sampling", faults), _check_evaluated_models,
    ),
    SPINConfig: (
        _check_iterations, _check_optimizer, _check_resume, _check_responses, _check_checker, _check_checkpointing,
        _check_dtypes, _check_validation, _check_folders, _check_loggers,
    ),
    GenerateConfig: (_check_worker,),
}  # fmt: skip
