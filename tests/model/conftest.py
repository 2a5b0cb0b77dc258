import shutil
from pathlib import Path

import pytest

from tests.families import FAMILIES, hf_twin


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A Hugging Face folder per family, written by transformers; not to be changed."""
    root = tmp_path_factory.mktemp("hf")
    for name, builder in FAMILIES.items():
        hf_twin(name, builder()).save_pretrained(root / name)
        (root / name / "tokenizer.json").write_text("{}")
        (root / name / "model.py").write_text("raise SystemExit")
    return {name: root / name for name in FAMILIES}


@pytest.fixture
def copy_of(folders, tmp_path):
    """A copy of a family's folder, to damage."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))
