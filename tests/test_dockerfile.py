"""The Dockerfile, as far as it can be checked where nothing builds it: paths, extras, versions, user, entry point."""

import re
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from spin.config.catalog import recipe_files

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")


@pytest.fixture(scope="module")
def lines(repo):
    """The instructions, one a line, without comments."""
    text = (repo / "Dockerfile").read_text(encoding="utf-8")
    kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return [line.strip() for line in kept.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def project(repo):
    return tomllib.loads((repo / "pyproject.toml").read_text(encoding="utf-8"))


def arguments(lines):
    return dict(line.removeprefix("ARG ").partition("=")[::2] for line in lines if line.startswith("ARG "))


def copied(lines):
    """Sources of every COPY."""
    return [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]


def test_every_path_that_is_copied_exists_and_reaches_the_daemon(repo, lines):
    ignore = (repo / ".dockerignore").read_text(encoding="utf-8").split()
    sources = copied(lines)
    assert sources
    for source in sources:
        assert (repo / source).exists(), source
        assert f"!{source}" in ignore, f"{source} is kept out by .dockerignore"
    assert {each[1:] for each in ignore if each.startswith("!")} == set(sources)


def test_a_build_needs_nothing_else(repo, lines, project):
    """What tests/test_packaging.py copies to build a wheel, and every file that pyproject.toml names."""
    named = {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    folders = {path.split("/")[0] for path in project["tool"]["setuptools"]["package-dir"].values()}
    assert set(copied(lines)) == named | folders


def test_extras_and_versions_are_those_of_the_project(repo, lines, project):
    text = (repo / "Dockerfile").read_text(encoding="utf-8")
    offered = re.search(r"# Names of extras in pyproject.toml, with commas: (.+)", text)[1].split(", ")
    used = re.findall(r"EXTRAS=(\w+)", text)
    assert set(offered) | set(used) <= project["project"]["optional-dependencies"].keys()
    torch = next(Requirement(each) for each in project["project"]["dependencies"] if each.startswith("torch>"))
    assert torch.specifier.contains(Version(arguments(lines)["TORCH"]))


@pytest.mark.parametrize(("extras", "target"), [("", "/src"), ("vllm,wandb", "/src[vllm,wandb]")])
def test_what_pip_is_asked_to_install(lines, extras, target):
    """By the shell that would run it, with pip replaced by what prints its arguments."""
    (run,) = [line.removeprefix("RUN ") for line in lines if line.startswith("RUN pip") and "/src" in line]
    script = f'pip() {{ printf "%s\\n" "$@"; }}; {run}'
    env = {"EXTRAS": extras, "TORCH": arguments(lines)["TORCH"]}
    done = subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["install", f"torch=={env['TORCH']}", target]


def test_it_runs_recipes_as_a_user_without_rights(repo, lines):
    text = (repo / "Dockerfile").read_text(encoding="utf-8")
    assert int(arguments(lines)["UID"]) > 0
    (user,) = [i for i, line in enumerate(lines) if line.startswith("USER ")]
    assert lines[user] == "USER ${UID}" and any('useradd --create-home --uid "${UID}"' in line for line in lines[:user])
    after = lines[user:]
    assert not any(line.startswith(("RUN", "COPY")) for line in after)
    assert 'ENTRYPOINT ["tune", "run"]' in after
    (recipe,) = re.findall(r"(\w+) --config", text)
    assert recipe in recipe_files()
