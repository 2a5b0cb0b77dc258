"""What the documentation links to and names can be reached, and its YAML is accepted."""

import importlib
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spin.config import SPINConfig, complete, load_config

REPO = Path(__file__).resolve().parents[1]
PAGES = [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("examples/**/*.md")]
YAML_BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    if page.name != "extend.md"  # whose sections test_docs_extend.py runs
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S))
]


def anchors_of(page):
    """Those that GitHub gives to the headings."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", prose, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_components_can_be_imported(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), f"{target}#{anchor}"
    for module, attribute in re.findall(r"`(spin(?:\.[a-z_]+)+)\.([A-Z]\w+|\w+_dataset)`", text):
        assert hasattr(importlib.import_module(module), attribute), f"{module}.{attribute}"


@pytest.mark.parametrize("block", YAML_BLOCKS)
def test_sections_of_a_config_are_accepted(block):
    """Each in the place of the recipe's own; no data are read."""
    cfg = OmegaConf.merge(
        load_config("full", ["model.path=FOLDER", "dataset.source=mine.jsonl"]), {"output_dir": "runs/x"}
    )
    for name, section in OmegaConf.create(block).items():
        cfg[name] = section
    complete(cfg, SPINConfig)


def test_every_file_of_results_is_cited():
    """By the page that quotes its figures, or by what draws or checks something from it."""
    readers = [*PAGES, *REPO.glob("docs/*.html"), *REPO.glob("benchmarks/*.py"), *REPO.glob("tests/**/*.py")]
    text = "\n".join(file.read_text(encoding="utf-8") for file in readers)
    files = [file.name for file in REPO.glob("benchmarks/results/*")]
    assert files and [name for name in files if Path(name).stem not in text] == []
