"""examples/quickstart.ipynb: its code cells, in order, in one process, on the test model."""

import json
import re
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def cells(repo):
    notebook = json.loads((repo / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return notebook["cells"]


def source(cell):
    return "".join(cell["source"])


def test_it_is_committed_without_outputs(cells):
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


def test_its_links_lead_somewhere(cells, repo):
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", source(cell)):
                assert (repo / "examples" / target).exists(), target


@pytest.mark.slow
def test_it_runs(cells, repo, tmp_path, subprocess_env):
    """From the notebook's own folder, as Jupyter starts it. No cell may need what only Jupyter knows."""
    code = [source(cell) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6 and not re.search(r"^\s*[%!]", "\n".join(code), flags=re.MULTILINE)
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(code), encoding="utf-8")
    env = subprocess_env | {"SPIN_NOTEBOOK_MODEL": "tiny", "SPIN_NOTEBOOK_OUTPUT": str(tmp_path / "run")}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=repo / "examples", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "tests/assets/tiny.yaml" in out
    firsts = r"^ +(\d)\.0000 +0\.6931 +0\.5000 +0\.0000 +0\.0000$"
    assert re.findall(firsts, out, flags=re.MULTILINE) == ["0", "1"]
    assert "32 pairs" in out and "generated (-" in out
    last = out.rsplit(str(tmp_path / "run" / "report.html"), 1)[1]
    assert "iteration_001" in last and last.splitlines()[-1] and "kludge" not in last, "the answer, not the prompt"
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
