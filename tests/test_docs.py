"""The documentation's links, configs, keys and component names exist."""

import importlib
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spin.config.defaults import RECIPE_DEFAULTS
from spin.config.parse import complete, load_config, packaged_configs
from spin.data.mixture import _check_sources

REPO = Path(__file__).resolve().parents[1]
PAGES = [*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("examples/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_and_components_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"--config ([^\s`]+)", text):
        assert name in ("my.yaml", "NAME", "NAME_OR_FILE") or name in packaged_configs(), name
    for module, attribute in re.findall(r"`(spin(?:\.[a-z_]+)+)\.([A-Z]\w+|prompt_dataset)`", text):
        assert hasattr(importlib.import_module(module), attribute), f"{module}.{attribute}"
    for target in re.findall(r"^make (\w+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in (REPO / "Makefile").read_text(encoding="utf-8"), target


@pytest.mark.parametrize("page", sorted(REPO.glob("docs/*.md")), ids=lambda page: page.name)
def test_config_keys_exist(page):
    """Every `section.key` of a section without a component is one of the recipe's."""
    for section in ("pairs", "sampling", "validation", "lr_scheduler", "watch"):
        for key in re.findall(rf"`{section}\.(\w+)", page.read_text(encoding="utf-8")):
            assert key in RECIPE_DEFAULTS[section], f"{section}.{key}"


YAML_BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", YAML_BLOCKS)
def test_sections_of_a_config_are_accepted(block):
    """Each in the place of the recipe's own; no data are read."""
    cfg = OmegaConf.merge(load_config("smollm2/135M_full"), {"output_dir": "runs/x"})
    for name, section in OmegaConf.create(block).items():
        cfg[name] = section
    complete(cfg, RECIPE_DEFAULTS)
    if "sources" in cfg.dataset:
        section = OmegaConf.to_container(cfg.dataset)
        _check_sources(section["sources"], section["common"], section["samples"])


def test_sections_are_found():
    assert len(YAML_BLOCKS) >= 3


def test_the_map_of_the_repository_is_true():
    """Every file and folder of CONTRIBUTING.md's tables is there; a bare file name lies beside the one before it."""
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Layout", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in text.splitlines() if line.startswith("|") and "`" in line]
    assert len(rows) > 15
    for row in rows:
        folder = REPO
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", row):
            if "/" in name:
                folder = (REPO / name).parent
            found = [REPO / name, folder / name, *(REPO / top / name for top in ("benchmarks", "experiments"))]
            assert any(path.exists() for path in found), name


def test_tests_named_as_evidence_exist():
    """Every row of docs/reliability.md names tests, and each is a function of that file."""
    text = (REPO / "docs/reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", text, flags=re.MULTILINE)
    numbers = [int(number) for number, _, _ in rows]
    assert numbers == sorted(set(numbers)) and numbers[:27] == list(range(1, 28))
    for _, promise, evidence in rows:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", evidence)
        assert tests, promise
        for file, name in tests:
            assert (REPO / "tests" / file).is_file(), file
            assert re.search(rf"^ *def {name}\(", (REPO / "tests" / file).read_text(encoding="utf-8"), re.M), name
