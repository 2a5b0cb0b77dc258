"""From a run's config to that of its first stage, supervised fine-tuning, which is a run in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spin.config.complete import as_written, place_components, plain
from spin.config.follow import LORA_CHECKPOINTER
from spin.config.interpolation import escaped, with_paths
from spin.config.schema import COMPONENT, SFTConfig, SPINConfig
from spin.core.files import SFT_STAGE

_EMBEDDED = "spin.generators.TorchtuneGenerator"


def sft_settings(cfg: SPINConfig) -> dict[str, Any]:
    """The section ``sft``, with the learning rate that it has for null."""
    # what most of torchtune 0.6.1's configs have
    lr = cfg.sft.lr or (3e-4 if cfg.checkpointer.component == LORA_CHECKPOINTER else 2e-5)
    return {**plain(cfg.sft), "lr": lr}


def sft_stage(cfg: SPINConfig) -> SFTConfig:
    """The config of a run's SFT stage: one iteration without opponent, by what the section ``sft`` says."""
    folder, sft, beta = str(Path(cfg.output_dir) / SFT_STAGE), sft_settings(cfg), cfg.loss.beta
    is_embedded = cfg.generator.component == _EMBEDDED

    def moved(path: str) -> str:
        is_within = path == cfg.output_dir or path.startswith(f"{cfg.output_dir}/")
        return folder + path.removeprefix(cfg.output_dir) if is_within else path

    def staged(values: dict[str, Any]) -> dict[str, Any]:
        writes = {name: values[name] for name in ("checkpointer", "metric_logger")}
        return {
            **values, **with_paths(writes, moved),
            "output_dir": folder, "max_iterations": 1, "max_epochs": sft["epochs"],
            "limit_train_batches": sft["limit_train_batches"], "lr_scheduler": sft["lr_scheduler"],
            "optimizer": {**values["optimizer"], "lr": sft["lr"]},
            "loss": {**values["loss"], "beta": beta[0] if isinstance(beta, list) else beta},
            "pairs": {**values["pairs"], "history": 0}, "validation": {**values["validation"], "spin": False},
            # what answers the prompts of the table of samples
            "generator": values["generator"] if is_embedded else {COMPONENT: _EMBEDDED},
        }  # fmt: skip

    kind = type(cfg) if isinstance(cfg, SFTConfig) else SFTConfig
    stage = kind.model_validate(staged(plain(cfg)))
    place_components(stage, tuple(cfg.allow_components))
    written: Any = OmegaConf.to_container(as_written(cfg), resolve=False)
    stage._written = OmegaConf.create(staged(written) | {"output_dir": escaped(folder)})
    return stage
