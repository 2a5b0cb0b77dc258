"""The documentation's links, configs, keys and component names exist."""

import importlib
import re
from pathlib import Path

import pytest

from spin.config import packaged_configs
from spin.defaults import RECIPE_DEFAULTS

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


def test_tests_named_as_evidence_exist():
    """Every row of docs/reliability.md names tests, and each is a function of that file."""
    text = (REPO / "docs/reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", text, flags=re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 27))
    for _, promise, evidence in rows:
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", evidence)
        assert tests, promise
        for file, name in tests:
            assert (REPO / "tests" / file).is_file(), file
            assert re.search(rf"^ *def {name}\(", (REPO / "tests" / file).read_text(encoding="utf-8"), re.M), name
