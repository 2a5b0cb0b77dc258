"""The package as users get it: an sdist, the wheel made of it, an editable install, each in an environment of its own.

RELIABILITY 25: `spin run` and `tune run` work from any directory, and torchtune's own `recipes/` folder is left alone.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torchtune

import spin

pytest.importorskip("setuptools")

SITE_PACKAGES = Path(torchtune.__file__).parents[1]
TUNE = "from torchtune._cli.tune import main; main()"


@pytest.fixture(scope="module")
def checkout(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that building leaves no trace in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("spin", "recipes", "configs"):
        shutil.copytree(repo / name, copy / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    run([sys.executable, "-c", code], cwd=checkout)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as package indices do; what the sdist forgets is missing here."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(out)]
    run([sys.executable, "-m", "pip", "wheel", *options, str(sdist)], cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


class Environment:
    """A virtual environment that sees the packages of this one, but not this project's own installation."""

    def __init__(self, root: Path) -> None:
        run([sys.executable, "-m", "venv", "--without-pip", str(root)], cwd=root.parent)
        self.python, self.spin = root / "bin" / "python", root / "bin" / "spin"
        self.site_packages = next(root.glob("lib/python*/site-packages"))
        (self.site_packages / "parent.pth").write_text(f"{SITE_PACKAGES}\n")

    def pip(self, command: str, *arguments: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), command, "--quiet"]
        run([*pip, *arguments], cwd=self.site_packages)

    def install(self, *arguments: str) -> None:
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", *arguments)

    def tune(self, *arguments: str, cwd: Path, env: dict[str, str], status: int) -> str:
        """Runs `tune ARGUMENTS`; the text of both streams."""
        return run([str(self.python), "-c", TUNE, *arguments], cwd=cwd, env=env, status=status)

    def own(self, *arguments: str, cwd: Path, env: dict[str, str], status: int) -> str:
        """Runs `spin ARGUMENTS`; the text of both streams."""
        return run([str(self.spin), *arguments], cwd=cwd, env=env, status=status)


def run(command: list[str], cwd: Path, env: dict[str, str] | None = None, status: int = 0) -> str:
    result = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == status, result.stdout
    return result.stdout


@pytest.fixture
def user_env(subprocess_env: dict[str, str]) -> dict[str, str]:
    """The environment of a user, who has no PYTHONPATH to this checkout."""
    return {key: value for key, value in subprocess_env.items() if key != "PYTHONPATH"}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory that has nothing to do with this project, except that it has folders of the same names."""
    folder = tmp_path / "elsewhere"
    for name in ("recipes", "configs", "tests"):
        (folder / name).mkdir(parents=True)
    return folder


def tree_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert files
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


def test_wheel_holds_the_package_the_recipes_and_the_configs_and_nothing_else(wheel, repo):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"spin_torchtune-{spin.__version__}.dist-info/METADATA").decode()
    tops = {name.split("/")[0] for name in names}
    recipes = {path.name for path in (repo / "recipes").glob("*.py")}
    assert tops == {"spin", f"spin_torchtune-{spin.__version__}.dist-info"} | recipes
    python = {str(path.relative_to(repo)) for path in (repo / "spin").rglob("*.py")}
    configs = {f"spin/{path.relative_to(repo)}" for path in (repo / "configs").rglob("*.*")}
    report = (
        "page.html",
        "sections.html",
        "page.css",
        "page.js",
        "uPlot.iife.min.js",
        "uPlot.min.css",
        "uPlot.LICENSE",
    )
    data = {"spin/py.typed"} | {f"spin/report/{name}" for name in report}
    assert {name for name in names if name.startswith("spin/")} == python | configs | data
    assert f"Version: {spin.__version__}\n" in metadata and "Requires-Dist: torchtune==0.6.1\n" in metadata


def test_every_recipe_and_package_is_listed(repo):
    """A module that pyproject.toml forgets works in a checkout, and is missing for everyone else."""
    pyproject = (repo / "pyproject.toml").read_text(encoding="utf-8")
    for init in (repo / "spin").rglob("__init__.py"):
        assert f'"{".".join(init.parent.relative_to(repo).parts)}"' in pyproject
    for recipe in (repo / "recipes").glob("*.py"):
        assert f'"{recipe.stem}"' in pyproject


def test_sdist_holds_the_licence_and_the_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "recipes/spin_recipe.py"} <= names
    assert "configs/lora.yaml" in names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_both_launchers_from_any_directory(kind, wheel, checkout, environment, elsewhere, user_env, tiny_lm):
    """One process: a packaged config is looked up, and a wrong name is answered. Two: torchrun finds the module too."""
    environment.install(*(["--editable", str(checkout)] if kind == "editable" else [str(wheel)]))
    found = run(
        [
            str(environment.python),
            "-c",
            "import spin, spin.config as c; print(spin.__file__, c.packaged_configs())",
        ],
        cwd=elsewhere,
        env=user_env,
    )
    assert found.startswith(str(checkout if kind == "editable" else environment.site_packages))
    assert "lora" in found

    listed = run([str(environment.spin), "ls"], cwd=elsewhere, env=user_env)
    assert "spin_recipe\n" in listed and "  lora " in listed
    run([str(environment.spin), "cp", "spin_recipe", "mine.py"], cwd=elsewhere, env=user_env)
    assert (elsewhere / "mine.py").read_bytes() == (checkout / "recipes" / "spin_recipe.py").read_bytes()

    wrong = ["run", "spin_recipe", "--config", "quickstart/smollm2_135M_cp"]
    changes = ["device=cpu", f"model.path={tiny_lm}", "dataset.source=nowhere.jsonl"]
    two = ["run", "--nproc_per_node", "2", "mine", "--config", "lora", *changes]
    for launch in (environment.tune, environment.own):
        text = launch(*wrong, cwd=elsewhere, env=user_env, status=1)
        assert "error: config 'quickstart/smollm2_135M_cp' not found" in text
        assert "Did you mean quickstart/smollm2_135M_cpu" in text and "Traceback" not in text
        if kind == "wheel":
            assert launch(*two, cwd=elsewhere, env=user_env, status=1).count("leaves no room for a response") == 2


@pytest.mark.slow
def test_demo_from_a_wheel_in_an_empty_folder(wheel, environment, tmp_path, tiny_lm, user_env):
    """Config and data come with the wheel; the model is one that is there, because tests have no network."""
    environment.install(str(wheel))
    shutil.copytree(tiny_lm, tmp_path / "empty" / ".cache" / "quickstart" / "SmolLM2-135M-Instruct")
    changes = ["dataset.max_prompt_tokens=256", "max_iterations=1", "limit_train_batches=1", "global_batch_size=4"]
    text = environment.own("demo", "--out", "mine", *changes, cwd=tmp_path / "empty", env=user_env, status=0)
    assert (tmp_path / "empty" / "mine" / "iteration_000" / "hf_model" / "model.safetensors").is_file()
    assert f"{environment.spin} report mine" in text or "spin report mine" in text


def test_install_and_uninstall_leave_torchtunes_recipes_alone(wheel, environment):
    """torchtune's wheel owns the folder `recipes` in site-packages; a wheel that ships one deletes it on uninstall."""
    theirs = environment.site_packages / "recipes"
    shutil.copytree(SITE_PACKAGES / "recipes", theirs, ignore=shutil.ignore_patterns("__pycache__"))
    before = tree_digest(theirs)
    environment.install(str(wheel))
    assert (environment.site_packages / "spin_recipe.py").is_file()
    assert tree_digest(theirs) == before
    environment.pip("uninstall", "--yes", "spin-torchtune")
    assert not (environment.site_packages / "spin_recipe.py").exists()
    assert not (environment.site_packages / "spin").exists()
    assert tree_digest(theirs) == before
