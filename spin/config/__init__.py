"""Configs: YAML and command-line overrides in, one checked, resolved and typed config out."""

from spin.config.complete import as_written, complete, holds_secrets, plain, shown
from spin.config.components import code_of, component_of, instantiate, nested, own_code
from spin.config.faults import Faults
from spin.config.files import find_config, load_config, packaged_configs, parse_overrides, read_yaml
from spin.config.interpolation import escaped
from spin.config.parse import parse
from spin.config.schema import (
    COMPONENT,
    Component,
    Config,
    EvaluateConfig,
    GenerateConfig,
    Section,
    SFTConfig,
    SPINConfig,
)
from spin.config.sft import sft_settings, sft_stage

__all__ = [
    "COMPONENT", "Component", "Config", "EvaluateConfig", "Faults", "GenerateConfig", "SFTConfig", "SPINConfig",
    "Section", "as_written", "code_of", "complete", "component_of", "escaped", "find_config", "holds_secrets",
    "instantiate", "load_config", "nested", "own_code", "packaged_configs", "parse", "parse_overrides", "plain",
    "read_yaml", "sft_settings", "sft_stage", "shown",
]  # fmt: skip
