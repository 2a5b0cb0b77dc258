"""Every command of the documentation runs here or in another test, or names the hardware that it needs."""

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spin.cli import main
from spin.config.catalog import load_recipe
from spin.config.checks import check_run
from spin.config.parse import complete, load_config
from spin.evaluation.models import check_evaluation
from tests.recipes.helpers import CONFIG, REPO, run, tiny_overrides

PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("examples/**/*.md")])
HARDWARE = re.compile(r"\b(GPUs?|CPU|cores)\b")
SPIN = "python -m spin "
# who runs what this file does not: a command's form, and the place that runs it
RUN_ELSEWHERE = {
    r"make (test|model|vllm)\b.*": ".ci/run",
    r"pytest\b.*": ".ci/run",  # by way of make test; see test_pytest_commands_select_something
    r"SPIN_REAL_MODEL=\S+ pytest .*": "Makefile",
    r"lm_eval --model hf .* --include_path examples/lm_eval .*": "tests/test_lm_eval.py",
    r"python benchmarks/training_step.py --model tiny": "tests/benchmarks/test_training_step.py",
    r"python benchmarks/peers.py step --model tiny --rounds 1": "tests/benchmarks/test_peers.py",
    r"python benchmarks/scaling.py --models tiny .*": "tests/benchmarks/test_scaling.py",
    r"python benchmarks/page.py": "tests/benchmarks/test_page.py",
    r"git clone .*|\. \.venv/bin/activate": "",  # nothing of ours
}


@dataclass(frozen=True)
class Command:
    page: str
    text: str
    comment: str

    def __str__(self):
        return f"{self.page}: {self.text[:50]}"


def shell_blocks(page):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in blocks if language in ("", "bash")]


def commands():
    """The lines of shell blocks; a comment counts for its own line, or for the lines below it up to an empty one."""
    found = []
    for page in PAGES:
        for body in shell_blocks(page):
            if body.startswith("#!"):
                continue  # a script, see test_scripts_are_valid
            above = ""
            for line in body.splitlines():
                command, _, comment = line.partition(" #") if not line.startswith("#") else ("", "", line)
                if not line.strip():
                    above = ""
                elif not command.strip():
                    above = comment
                else:
                    found.append(Command(page.name, command.strip(), f"{above} {comment}"))
    return found


COMMANDS = commands()


def test_commands_are_found():
    assert {command.page for command in COMMANDS} >= {"README.md", "CONTRIBUTING.md", "cli.md", "many_hosts.md"}
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_run_somewhere_or_names_its_hardware(command):
    if command.text.startswith(SPIN) or HARDWARE.search(command.comment):
        return
    place = next((place for form, place in RUN_ELSEWHERE.items() if re.fullmatch(form, command.text)), None)
    assert place is not None, f"{command.text}: run it in a test, or say in a comment which hardware it needs"
    if place == ".ci/run" and command.text.startswith("make"):
        assert f"\n{' '.join(command.text.split()[:2])}\n" in (REPO / place).read_text()
    elif place.startswith("tests/"):
        assert (REPO / place).is_file()


def test_pytest_commands_select_something():
    for command in COMMANDS:
        for file, word in re.findall(r"pytest (tests/\S+)(?: -k (\w+))?", command.text):
            assert (REPO / file).exists(), command.text
            assert not word or re.search(rf"def test_\w*{word}", (REPO / file).read_text()), command.text


FORM = r"\bspin_(recipe|generate|lora_recipe|evaluate) --config"
LAUNCHES = [each for each in COMMANDS if re.search(FORM, each.text)]


@pytest.mark.parametrize("command", LAUNCHES, ids=str)
def test_configs_and_overrides_of_launches_work(command):
    """As far as that can be known without the hardware and the model."""
    recipe, name, overrides = re.search(r"\b(spin_\w+) --config (\S+)(.*)", command.text).groups()
    words = [os.path.expandvars(word) for word in shlex.split(overrides)]
    raw = load_config(*((str(CONFIG), [*tiny_overrides("x"), *words]) if name == "my.yaml" else (name, words)))
    cfg = complete(raw, load_recipe(recipe).DEFAULTS)
    (check_evaluation if recipe == "spin_evaluate" else check_run)(cfg)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder in which the documented commands work: a finished run, a config, the packaged model if it is there."""
    folder = tmp_path_factory.mktemp("desk")
    run(folder / "runs" / "quickstart", "max_epochs=1", "limit_train_batches=2")
    cfg = load_config(str(CONFIG), tiny_overrides(folder / "runs" / "mine"))
    OmegaConf.save(cfg, folder / "my.yaml")
    return folder


SPIN_COMMANDS = [each for each in COMMANDS if each.text.startswith(SPIN)]


@pytest.mark.parametrize("command", SPIN_COMMANDS, ids=str)
def test_commands_of_python_m_spin(desk, monkeypatch, capsys, command):
    monkeypatch.chdir(desk)
    if " cp " in command.text:
        (desk / shlex.split(command.text)[-1]).unlink(missing_ok=True)
    assert main(shlex.split(command.text)[3:]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def test_what_the_report_of_a_real_run_says(desk):
    """Two iterations of two steps; the recipe's stores, metrics and samples are what the report reads."""
    from spin.report import read_run, render

    record = read_run(desk / "runs" / "quickstart")
    assert record.is_finished and record.last_step == 4 and record.remarks == []
    for iteration in record.iterations:
        assert iteration.seconds.keys() == {"play", "score", "fit", "validate"}
        assert all(0 < seconds < 120 for seconds in iteration.seconds.values())
        assert iteration.answers == 8 and len(iteration.steps) == 2 and len(iteration.samples) == 4
    page = render(record)
    assert "What does the hacker slang term" in page and "Finished after 4 steps" in page


def test_scripts_are_valid():
    """Batch scripts: bash reads them, and their head names the nodes and GPUs that they need."""
    scripts = [body for page in PAGES for body in shell_blocks(page) if body.startswith("#!")]
    assert len(scripts) == 2
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert re.search(r"#SBATCH .*--nodes=\d+.*--gpus-per-node=\d+", script)
        for name in re.findall(r"--config (\S+)", script):
            load_config(name)


def test_paths_in_commands_exist():
    for command in COMMANDS:
        for script in re.findall(r"python ((?:benchmarks|examples)/\S+\.py)", command.text):
            assert Path(REPO / script).is_file(), command.text
