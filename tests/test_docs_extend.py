"""docs/extend.md: its modules and sections, as they stand, in runs of the test config."""

import csv
import json
import re
import shlex
import sqlite3
import sys

import pytest
from omegaconf import OmegaConf

from spin.cli import main
from spin.config import load_config
from tests.recipes.helpers import CONFIG, REPO, metrics_of, tiny_overrides

PAGE = (REPO / "docs" / "extend.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE, re.M | re.S))
SECTIONS = [OmegaConf.create(block) for block in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S)]
(COMMAND,) = re.findall(r"^spin (run .*)$", PAGE, re.M)
TERMS = [(f"What is term {i}?", f"It is answer number {i}.") for i in range(16)]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the page's command in a user's folder, with these sections in my.yaml; the folder."""
    rows = [{"text": f"Q: {question}\nA: {answer}"} for question, answer in TERMS]
    (tmp_path / "interviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with sqlite3.connect(tmp_path / "faq.db") as database:
        database.execute("CREATE TABLE faq (id, question, answer)")
        database.executemany("INSERT INTO faq VALUES (?, ?, ?)", [(i, *term) for i, term in enumerate(TERMS)])
    for name, body in MODULES.items():
        (tmp_path / f"{name}.py").write_text(body, encoding="utf-8")
        sys.modules.pop(name, None)  # another test's module of this name

    def started(sections, command=COMMAND):
        cfg = load_config(str(CONFIG), [*tiny_overrides("run"), "max_iterations=1", "max_epochs=1"])
        for section in sections:
            if "pairs" in section:
                cfg.merge_with(section)
            else:
                cfg.update(section)
        OmegaConf.save(cfg, "my.yaml")
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command))
        assert not ended.value.code
        return [row for row in metrics_of("run") if "loss" in row]

    monkeypatch.chdir(tmp_path)
    path = [*sys.path]
    yield started
    sys.path[:] = path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_transform_checker_loss_generator_and_logger(start, tmp_path):
    """IPO's loss of two equal models is (1 / 2 beta)^2 = 25 at beta 0.1, by hand."""
    steps = start([section for section in SECTIONS if "my_data" not in OmegaConf.to_yaml(section)])
    assert len(steps) == 4 and steps[0]["loss"] == pytest.approx(25.0)
    assert steps[-1]["loss"] < 24.5
    assert sum(steps[0][f"{verdict}_fraction"] for verdict in ("right", "wrong", "unknown")) == 1
    logged = [row for row in csv.reader((tmp_path / "metrics.csv").open()) if row[1] == "loss"]
    assert [float(value) for *_, value in logged] == pytest.approx([row["loss"] for row in steps])
    assert "It is answer number" in (tmp_path / "run" / "samples.jsonl").read_text()


def test_data_set(start, tmp_path):
    (section,) = (section for section in SECTIONS if "my_data" in OmegaConf.to_yaml(section))
    assert len(start([section], re.sub(r"=\[.*\]", "=[my_data]", COMMAND))) == 4
    assert "It is answer number" in (tmp_path / "run" / "samples.jsonl").read_text()


def test_each_is_short_and_a_key_of_ones_own_is_typed():
    assert max(len(body.split("\n")) - body.count("\n\n") for body in MODULES.values()) <= 20
    names = {}
    exec(MODULES["my_config"], names)
    assert names["MyConfig"].model_fields["my_key"].default == 1
