"""Fixtures that every test may use. Tests run on the CPU, without a network."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Before torch is imported. Small tensors gain nothing from a second thread, and wait for it where cores are shared:
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

REPO = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips, with the reason, what this machine cannot run; what is long comes first."""
    skip_model = pytest.mark.skip(reason="SPIN_REAL_MODEL is not set; `make model` fetches the model")
    skip_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "real_model" in item.keywords and not os.environ.get("SPIN_REAL_MODEL"):
            item.add_marker(skip_model)
        if "gpu" in item.keywords and not _has_gpu():
            item.add_marker(skip_gpu)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout that the tests stand in."""
    return REPO


@pytest.fixture(scope="session")
def tiny_lm(repo: Path) -> Path:
    """Hugging Face folder of a small trained Llama: vocabulary 1024, 4 layers, width 128, ChatML."""
    return repo / "tests" / "assets" / "tiny_lm"


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder; for tests marked ``real_model``."""
    return Path(os.environ["SPIN_REAL_MODEL"])


@pytest.fixture
def subprocess_env() -> dict[str, str]:
    """Environment for a command that imports this checkout, one thread a process, no launcher variables."""
    from tests.recipes.helpers import environment

    return environment()


@pytest.fixture(scope="session")
def oracles(repo: Path) -> dict:
    """What reference implementations really returned on small inputs."""
    return json.loads((repo / "tests" / "oracles" / "spin_oracles.json").read_text(encoding="utf-8"))


@pytest.fixture
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchtune's norms and rotary embeddings call ``.float()``; without that rounding the algebra alone is left."""
    import torch

    to_float = torch.Tensor.float

    def keep_double(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return x if x.dtype == torch.float64 else to_float(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", keep_double)
