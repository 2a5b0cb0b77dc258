"""The documentation's pages of figures are those of benchmarks/results."""

import subprocess
import sys
from xml.etree import ElementTree

import page
import pytest


def test_pages_of_this_repository_are_made_from_its_results():
    """Every section is on a page, and says what benchmarks/results does."""
    text = "".join((page.REPO / name).read_text(encoding="utf-8") for name in page.PAGES)
    assert {match["name"] for match in page.MARKED.finditer(text)} == page.SECTIONS.keys()
    page.main(["--check"])


def test_pages_are_written_between_their_markers(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("words\n\n<!-- peers: sentence -->\nold\n<!-- peers: end -->\nmore\n")
    (tmp_path / "docs" / "benchmarks.md").write_text("# Title\n<!-- peers: plot -->\n<!-- peers: end -->\n")
    with pytest.raises(SystemExit, match="Run: python benchmarks/page.py"):
        page.main(["--root", str(tmp_path), "--check"])
    page.main(["--root", str(tmp_path)])
    page.main(["--root", str(tmp_path), "--check"])
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("words\n") and text.endswith("<!-- peers: end -->\nmore\n") and "old" not in text
    ElementTree.parse(tmp_path / "docs" / "benchmarks.svg")
    with pytest.raises(SystemExit, match="marks the section speed; expected one of goals"):
        page.filled("<!-- peers: speed -->\n<!-- peers: end -->\n", [])


@pytest.mark.slow
def test_plans_of_many_hosts_are_what_their_command_writes(subprocess_env):
    command = [sys.executable, "benchmarks/plans.py", "--check"]
    done = subprocess.run(command, cwd=page.REPO, env=subprocess_env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
