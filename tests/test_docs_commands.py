"""Commands of the documentation: `spin` runs, configs and overrides of launches work, scripts are valid."""

import io
import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from spin.cli import main
from spin.config import complete, load_config
from spin.config.catalog import config_model, load_recipe
from spin.data import PairStore
from spin.evaluation.models import check_evaluation
from tests.recipes.helpers import CONFIG, REPO, run, tiny_overrides

PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("examples/**/*.md")])
SPIN = re.compile(r"spin (?!run )")


@dataclass(frozen=True)
class Command:
    page: str
    text: str

    def __str__(self):
        return f"{self.page}: {self.text[:50]}"


def shell_blocks(page):
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [body for language, body in blocks if language in ("", "bash")]


def commands():
    """The lines of shell blocks, without comments."""
    return [
        Command(page.name, line.partition(" #")[0].strip())
        for page in PAGES
        for body in shell_blocks(page)
        if not body.startswith("#!")  # a script, see test_scripts_are_valid
        for line in body.splitlines()
        if line.strip() and not line.startswith("#")
    ]


# test_docs_extend.py and test_docs_first_run.py run those of their pages as they stand
COMMANDS = [each for each in commands() if each.page not in ("extend.md", "first_run.md")]


def test_files_in_commands_exist():
    for command in COMMANDS:
        for script in re.findall(r"((?:benchmarks|examples|experiments|tests)/\S+\.py)", command.text):
            assert Path(REPO / script).is_file(), command.text


FORM = r"\bspin_(recipe|sft|generate|evaluate) --config"
# the user's own files of the documents
MINE = {
    "my.yaml": CONFIG,
    "mine.yaml": CONFIG,
    "my_lora.yaml": CONFIG.with_name("tiny_lora.yaml"),
    "my_evaluation.yaml": CONFIG.with_name("tiny_evaluate.yaml"),
}
LAUNCHES = [each for each in COMMANDS if re.search(FORM, each.text)]


@pytest.mark.parametrize("command", LAUNCHES, ids=str)
def test_configs_and_overrides_of_launches_work(command):
    """As far as that can be known without the hardware and the model."""
    recipe, name, overrides = re.search(r"\b(spin_\w+) --config (\S+)(.*)", command.text).groups()
    words = [os.path.expandvars(word) for word in shlex.split(overrides)]
    if name in MINE:
        folders = ["candidate.checkpoint_dir=tests/assets/tiny_lm", "output_dir=x", "dataset.source=y"]
        folders = folders if recipe == "spin_evaluate" else tiny_overrides("x")
        raw = load_config(str(MINE[name]), [*folders, *words])
    else:  # nothing is downloaded for a test
        raw = load_config(name, [*words, *(["model.path=tests/assets/tiny_lm"] if recipe != "spin_evaluate" else [])])
    cfg = complete(raw, config_model(load_recipe(recipe)))
    if recipe == "spin_evaluate":
        check_evaluation(cfg)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder in which the documented commands work: a finished run, a config, the packaged model if it is there."""
    folder = tmp_path_factory.mktemp("desk")
    run(folder / "runs" / "quickstart", "max_epochs=1", "limit_train_batches=2")
    cfg = load_config(str(CONFIG), tiny_overrides(folder / "runs" / "mine"))
    for name in ("my.yaml", "own.yaml"):  # which commands write too, maybe in another process
        OmegaConf.save(cfg, folder / name)
    for name in ("beta_1", "my"):
        (folder / "runs" / name).symlink_to(folder / "runs" / "quickstart")
    (folder / "Qwen").mkdir()
    (folder / "Qwen/Qwen3-4B").symlink_to(REPO / "tests/assets/tiny_lm")
    (folder / "mine.jsonl").symlink_to(REPO / "examples/quickstart/jargon_train.jsonl")
    return folder


# tests/report/test_watch.py has those that run until Ctrl-C, test_docs_first_run.py the demo
ELSEWHERE = ("--watch", "spin demo")
SPIN_COMMANDS = [
    each for each in COMMANDS if SPIN.match(each.text) and not any(word in each.text for word in ELSEWHERE)
]


@pytest.mark.parametrize("command", SPIN_COMMANDS, ids=str)
def test_commands_of_spin(desk, monkeypatch, capsys, command):
    monkeypatch.chdir(desk)
    words = shlex.split(command.text)[1:]
    if words[0] == "cp":
        (desk / words[-1]).unlink(missing_ok=True)
    if words[0] == "new":
        words.append("--force")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))  # of spin chat
    assert main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def test_the_readme_answers_with_the_model_of_a_run(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", (REPO / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    exec(snippet, {})
    assert capsys.readouterr().out.strip()


def test_pairs_go_to_trl_and_preferences_come_from_there(tmp_path, monkeypatch):
    """docs/from_trl.md as it stands. TRL's trainer tokenizes prompt and prompt with response, and adds no end that is
    there; the ids are the store's, or of the same text. The rejected responses are those that a run replays."""
    run(tmp_path / "runs/quickstart", "max_steps=1", "sampling.max_new_tokens=96", "dataset.on_long_response=drop")
    (tmp_path / "my_model").symlink_to(REPO / "tests/assets/tiny_lm")
    monkeypatch.chdir(tmp_path)
    page = (REPO / "docs/from_trl.md").read_text(encoding="utf-8")
    (export,) = (shlex.split(each.text)[1:] for each in COMMANDS if each.page == "from_trl.md")
    to_trl, from_trl = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    tokenizer = AutoTokenizer.from_pretrained("my_model")

    store = PairStore.open(Path(export[1]))
    stopped = {pair.sample_id: pair for pair in store.pairs() if not pair.generated[0].truncated}
    assert main(export) == 0
    exec(to_trl, found := {})
    assert len(found["pairs"]) == len(stopped) > 0
    for row, pair in zip(found["pairs"], stopped.values(), strict=True):
        assert tokenizer(row["prompt"])["input_ids"] == list(pair.prompt_ids)
        ids = {name: tokenizer(row["prompt"] + row[name])["input_ids"] for name in ("chosen", "rejected")}
        assert ids["chosen"] == [*pair.prompt_ids, *pair.real_ids] and row["chosen"].endswith(tokenizer.eos_token)
        assert tokenizer.decode(ids["rejected"]) == tokenizer.decode([*pair.prompt_ids, *pair.generated[0].token_ids])
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == list(pair.reference_logps)

    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"No {i}."} for i in range(8)]
    Path("preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    exec(from_trl, {})
    (section,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    words = ["dataset.source=preferences.jsonl", "dataset.column_map={response: chosen}", "max_epochs=1"]
    cfg = load_config(str(CONFIG), tiny_overrides("out"))
    cfg.update(OmegaConf.create(section))
    OmegaConf.save(cfg, "my.yaml")
    run("out", *words, config="my.yaml")
    replayed = list(PairStore.open(Path("out/iteration_000/pairs")).pairs())
    texts = {tokenizer.decode(list(pair.generated[0].token_ids)) for pair in replayed}
    assert texts == {f"No {i}.<|im_end|>" for i in range(8)}


def test_what_the_report_of_a_real_run_says(desk):
    """Two iterations of two steps; the recipe's stores, metrics and samples are what the report reads."""
    from spin.report import read_run, render

    record = read_run(desk / "runs" / "quickstart")
    assert record.is_finished and record.last_step == 4 and record.remarks == []
    for iteration in record.iterations:
        assert iteration.seconds.keys() == {"play", "score", "fit", "validate"}
        assert all(0 < seconds < 120 for seconds in iteration.seconds.values())
        assert iteration.responses == 8 and len(iteration.steps) == 2 and len(iteration.samples) == 4
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
            load_config(str(MINE.get(name, name)))
