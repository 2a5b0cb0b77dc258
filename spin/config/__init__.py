"""Configs: YAML and command-line overrides in, one checked and resolved config out."""

from spin.config.parse import (
    COMPONENT,
    Faults,
    complete,
    escaped,
    find_config,
    holds_secrets,
    instantiate,
    load_config,
    packaged_configs,
    parse,
    parse_overrides,
    plain,
    read_yaml,
    shown,
)

__all__ = [
    "COMPONENT",
    "Faults",
    "complete",
    "escaped",
    "find_config",
    "holds_secrets",
    "instantiate",
    "load_config",
    "packaged_configs",
    "parse",
    "parse_overrides",
    "plain",
    "read_yaml",
    "shown",
]
