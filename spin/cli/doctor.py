"""``spin doctor``: what is installed, what is missing or does not fit, and how to get it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.version import Version

from spin.cli import parser_of
from spin.core.packages import installed_version, installed_vllm
from spin.core.terminal import counted

DISTRIBUTION = "spin-torchtune"
_OK, _FAULT, _NOTE = "ok", "FAULT", "note"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    what: str
    verdict: str
    text: str


def main(argv: Sequence[str]) -> int:
    """Looks at the environment."""
    parser_of("doctor", "Say what is installed, and what is missing or does not fit.").parse_args(argv)
    findings = [Finding("python", _OK, f"{platform.python_version()}, {sys.executable}"), *packages(), *launchers()]
    findings += [*vllm(), *devices()]
    for finding in findings:
        print(f"{finding.what:<16} {finding.verdict:<6} {finding.text}")
    faults = sum(finding.verdict == _FAULT for finding in findings)
    if faults:
        print(f"error: {faults} of these keep runs from working.", file=sys.stderr)
    return 1 if faults else 0


def packages() -> list[Finding]:
    """Every dependency, by what this package's metadata asks for."""
    try:
        own = importlib.metadata.version(DISTRIBUTION)
        wanted = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        return [Finding(DISTRIBUTION, _FAULT, "not installed: `pip install .` in its checkout (-e to edit it there)")]
    return [Finding(DISTRIBUTION, _OK, own), *(check_requirement(each) for each in wanted if _holds_here(each))]


def _holds_here(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def check_requirement(requirement: Requirement) -> Finding:
    """Compares what is installed with what is wanted."""
    remedy = f"`pip install '{requirement.name}{requirement.specifier}'`"
    found = installed_version(requirement.name)
    if found is None:
        return Finding(requirement.name, _FAULT, f"not installed: {remedy}")
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, _FAULT, f"{found}, expected {requirement.specifier}: {remedy}")
    return Finding(requirement.name, _OK, found)


def launchers() -> list[Finding]:
    """What torchao decides besides: torchtune.training needs 0.15 or earlier, peft 0.16 or later."""
    torchao = installed_version("torchao")
    if torchao is None:  # a fault of its own
        return []
    if Version(torchao) < Version("0.16"):
        return [Finding("launchers", _OK, "spin run, tune run; peft loads adapters with torchao 0.16 or later")]
    text = f"spin run; tune run and torchtune's metric loggers need 'torchao<0.16', found {torchao}"
    return [Finding("launchers", _NOTE, text)]


def vllm() -> list[Finding]:
    """vLLM, if there is one: it is built for one version of torch and of CUDA."""
    installed = installed_vllm()
    if installed is None:
        text = "not installed; only VLLMGenerator needs it. docs/vllm.md says which fits torch"
        return [Finding("vllm", _NOTE, text)]
    package, found = installed
    torch = installed_version("torch")
    if torch is None:  # a fault of its own
        return [Finding("vllm", _OK, found)]
    for requirement in map(Requirement, importlib.metadata.requires(package) or ()):
        fits = requirement.name != "torch" or requirement.specifier.contains(torch, prereleases=True)
        if _holds_here(requirement) and not fits:
            text = f"{found} wants torch{requirement.specifier}, found {torch}: docs/vllm.md says which fit"
            return [Finding("vllm", _NOTE, text)]
    return [Finding("vllm", _OK, found)]


def devices() -> list[Finding]:
    """Processors, memory, GPUs, and the compilers that optional parts ask for."""
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    findings = [Finding("cpu", _OK, f"{counted(len(os.sched_getaffinity(0)), 'core')}, {gib:.0f} GiB of memory")]
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    missing = "no compiler; compile=true and spin.training's optimizers need one (apt install g++)"
    findings.append(Finding("c++", _OK if compiler else _NOTE, compiler or missing))
    try:
        import torch
    except ImportError as error:
        return [*findings, Finding("torch", _FAULT, f"cannot be imported: {error}")]
    if not torch.cuda.is_available():
        from spin.core.dtypes import has_fast_bf16  # which imports torch

        dtype = "" if has_fast_bf16() else " and compute_dtype=fp32, because this CPU has no instructions for bf16"
        built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is for CPUs"
        text = f"none that torch can use ({built}); set device=cpu{dtype}, or see nvidia-smi"
        return [*findings, Finding("gpu", _NOTE, text)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory, capability = properties.total_memory / 2**30, f"{properties.major}.{properties.minor}"
        text = f"{properties.name}, {memory:.0f} GiB, compute {capability}"
        has_bf16 = properties.major >= 8
        more = f", CUDA {torch.version.cuda}" if has_bf16 else ": no bf16; set compute_dtype=fp32"
        findings.append(Finding(f"gpu {index}", _OK if has_bf16 else _NOTE, text + more))
    triton = installed_version("triton")
    missing = "not installed: no FlexAttention, no compile=true, slower generation"
    return [*findings, Finding("triton", _OK if triton else _NOTE, triton or missing)]
