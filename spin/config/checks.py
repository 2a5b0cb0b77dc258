"""What a run's config must have in more than one key, or in the world; the schema checks each value by itself."""

from __future__ import annotations

import importlib.util
import inspect
import re
from typing import Any

from spin.config.complete import fields_of
from spin.config.components import component_of
from spin.config.faults import Faults, known_keys, nearest_of
from spin.config.schema import COMPONENT, Component, Sampling, SPINConfig
from spin.core.errors import ConfigError
from spin.core.files import TRANSFER, check_own_folder

_PACKAGES = {  # of torchtune's loggers, which import them when they are made: after the weights are loaded
    "WandBLogger": "wandb",
    "MLFlowLogger": "mlflow",
    "CometLogger": "comet_ml",
    "TensorBoardLogger": "tensorboard",
}


def check_run(cfg: SPINConfig) -> None:
    """Raises a ConfigError with every fault, if values of a recipe's config do not work with each other."""
    faults = Faults()
    for name, value in (("loss.beta", cfg.loss.beta), ("optimizer.lr", cfg.optimizer.lr)):
        if isinstance(value, list) and len(value) != cfg.max_iterations:
            count = f"{len(value)} value{'s' if len(value) != 1 else ''}"
            faults.add(
                f"{name}: {value} has {count} for {cfg.max_iterations} iterations. Give one number, or one for each "
                "iteration."
            )
    step = getattr(component_of(cfg.optimizer), "step", None)
    closure = inspect.signature(step).parameters.get("closure") if callable(step) else None
    if closure is not None and closure.default is inspect.Parameter.empty:
        faults.add(
            f"optimizer._component_={cfg.optimizer.component}: its step computes the loss several times, where a "
            "batch passes through the model once. Choose one whose step needs no closure, such as torch.optim.AdamW."
        )
    known = fields_of(type(cfg))
    for name in cfg.resume_with_changes:
        if name.partition(".")[0] not in known:
            faults.add(f"resume_with_changes: the config has no key {name!r}.{nearest_of(name, list(known))}")
    greedy, responses = cfg.sampling.greedy_by, cfg.pairs.responses_per_prompt
    if greedy and responses != 1 and getattr(component_of(cfg.generator), "takes_sampling", True):
        faults.add(
            f"pairs.responses_per_prompt={responses} with sampling.{greedy}={cfg.sampling[greedy]}: all responses to a "
            f"prompt would be the same. Set sampling.{greedy}={Sampling()[greedy]} to sample them, or "
            "pairs.responses_per_prompt=1."
        )
    if cfg.ac_mode == "selective" and cfg.ac_option is None:
        faults.add("ac_option=null: ac_mode=selective checkpoints every ac_option-th layer; give 1 or more.")
    if cfg.dtype == "bf16" and cfg.compute_dtype == "fp32":
        faults.add("dtype=bf16 with compute_dtype=fp32: weights are not computed in more precision than they have.")
    if cfg.validation.spin and cfg.validation_dataset is None:
        faults.add("validation.spin=true needs a validation_dataset.")
    if cfg.validation_dataset is not None and cfg.validation_dataset.get("streaming"):
        faults.add("validation_dataset.streaming=true: a validation set is the same each time. Use its limit alone.")
    folders = {
        "output_dir": cfg.output_dir,
        "checkpointer.checkpoint_dir": cfg.checkpointer.get("checkpoint_dir"),
        "checkpointer.output_dir": cfg.checkpointer.get("output_dir"),
        "tokenizer.path": cfg.tokenizer.get("path"),
        "generator.model_dir": cfg.generator.get("model_dir"),
    }
    check_transfer_dir("generator", cfg.generator, folders, faults)
    if cfg.metric_logger is not None:
        _check_logger(cfg.metric_logger, faults)
    faults.raise_if_any()


def check_transfer_dir(path: str, generator: Component, apart_from: dict[str, Any], faults: Faults) -> None:
    """Notes a generator's folder of weights that is one of the run's other folders, or somebody else's."""
    folder = generator.get("transfer_dir")
    if isinstance(folder, str) and folder:
        try:
            check_own_folder(f"{path}.transfer_dir", folder, TRANSFER, apart_from)
        except ConfigError as error:
            faults.add(str(error))


def _check_logger(section: Component, faults: Faults) -> None:
    """A service's library takes further settings: among them programs to run and servers that get the key."""
    logger = section.component.rpartition(".")[2]
    if section.component.startswith("torchtune."):  # not one of the user's own
        parameters = inspect.signature(component_of(section)).parameters.values()
        named = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters) and logger in _PACKAGES
        for key, value in section.model_dump(by_alias=True).items():
            hint = nearest_of(key, named)
            if key not in (COMPONENT, *named) and (hint or not takes_more):
                hint = hint or known_keys(named) or " It takes none."
                faults.add(f"metric_logger.{key}: {section.component} has no such parameter.{hint}")
            items = value if isinstance(value, list) else [value]
            if key == "settings" or any(isinstance(item, dict | list) for item in items):
                faults.add(
                    f"metric_logger.{key}: found {value!r:.80}, expected a number, a text, a switch or a list of them."
                )
        name = section.get("filename")
        if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*\.(txt|log)", name)):
            faults.add(
                f"metric_logger.filename={name!r}: lines are appended to it; expected a name such as log.txt, without "
                "a folder (that is log_dir)."
            )
    package = _PACKAGES.get(logger)
    if package is not None and importlib.util.find_spec(package) is None:
        faults.add(
            f"metric_logger: {logger} needs the package {package}, which is not installed: pip install {package}. "
            "metrics.jsonl has everything in any case."
        )
