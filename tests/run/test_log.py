"""The services themselves, without a network: what they keep is read back by their own libraries."""

import json
import logging
import sqlite3
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from spin.config import Component, SPINConfig
from spin.core.errors import ConfigError
from spin.core.ranks import init_world
from spin.run.log import RunLog
from spin.run.messages import log_table
from tests.recipes.helpers import run, tiny_config

TORCHTUNE = "torchtune.training.metric_logging"
ROWS = [
    {"step": 2, "prompt": "What is\na `pipe |`?", "real": "<b>&", "generated": "# *no*", "margin": 0.25},
    {"step": 2, "prompt": "second", "real": "x", "generated": "$y_1$", "margin": -1.0},
]


@pytest.fixture
def log(tmp_path, caplog):
    """A run's log with a service, which warns of nothing; two steps, the second with a table."""

    def write(service, **arguments):
        logger = Component(_component_=service, **arguments)
        cfg = SPINConfig(output_dir=str(tmp_path), metric_logger=logger)
        run_log = RunLog(cfg, -1, init_world("cpu"))
        for step in (1, 2):
            run_log.metrics(step, {"loss": 1.0 / step, "generator/logprob_gap": 0.5, "samples/a.b": 3.0})
        run_log.samples(ROWS)
        run_log.close()
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING and "spin" in record.name]

    return write


def test_tensorboard(log, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard import plugin_util
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log(f"{TORCHTUNE}.TensorBoardLogger", log_dir=str(tmp_path / "events"), organize_logs=False)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [tuple(event.tensor_proto.float_val) for event in events.Tensors("loss")] == [(1.0,), (0.5,)]
    (text,) = events.Tensors("samples/text_summary")
    assert text.step == 2
    shown = plugin_util.markdown_to_safe_html(text.tensor_proto.string_val[0])
    assert shown.count("<tr>") == 3 and shown.count("<td>") == 10
    for cell in ("What is<br>a `pipe |`?", "&lt;b&gt;&amp;", "# *no*", "$y_1$", "-1"):
        assert f"<td>{cell}</td>" in shown


def test_mlflow(log, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}" if find_spec("sqlalchemy") else (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log(f"{TORCHTUNE}.MLFlowLogger", tracking_uri=uri, experiment_name="spin")
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("spin").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 0.5)]
    assert found.data.params["log_every_n_steps"] == "1"
    file = Path(client.download_artifacts(found.info.run_id, "samples/step_00000002.json", str(tmp_path)))
    table = json.loads(file.read_text(encoding="utf-8"))
    assert table["columns"] == list(ROWS[0]) and table["data"] == [list(row.values()) for row in ROWS]


def test_wandb_offline(log, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tables = []
    monkeypatch.setattr(wandb, "Table", _recorded(wandb.Table, tables))
    log(f"{TORCHTUNE}.WandBLogger", project="spin", log_dir=str(tmp_path), mode="offline")
    (table,) = tables
    assert table.columns == list(ROWS[0]) and table.data == [list(row.values()) for row in ROWS]
    (written,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    assert json.loads(written.read_text(encoding="utf-8"))["data"] == table.data


def test_comet_offline(log, tmp_path):
    pytest.importorskip("comet_ml")
    import zipfile

    log(
        f"{TORCHTUNE}.CometLogger",
        online=False,
        log_code=False,
        offline_directory=str(tmp_path / "comet"),
        api_key="none",
    )
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as content:
        texts = [content.read(name).decode("utf-8", "replace") for name in content.namelist()]
    assert any("second,x,$y_1$,-1.0" in text for text in texts)


def test_trackio(log, tmp_path, monkeypatch, capfd):
    """A local file, which is read with SQLite alone; a restart continues the run of its name."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio")
    for _ in range(2):
        log("spin.run.TrackioLogger", project="own", name="first")
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    found = [(name, step, json.loads(text)) for name, step, text in rows]
    assert {name for name, _, _ in found} == {"first"}
    assert [(step, values["loss"]) for _, step, values in found if "loss" in values] == [(1, 1.0), (2, 0.5)] * 2
    assert found[0][2]["generator/logprob_gap"] == 0.5
    tables = [values["samples"] for _, _, values in found if "samples" in values]
    assert len(tables) == 2 and [row["generated"] for row in tables[0]["_value"]] == ["# *no*", "$y_1$"]


def test_a_logger_of_ones_own_gets_the_rows_and_others_nothing():
    class Mine:
        def log_table(self, *arguments):
            self.got = arguments

    mine = Mine()
    log_table(mine, "samples", ROWS, 2)
    assert mine.got == ("samples", ROWS, 2)
    log_table(object(), "samples", ROWS, 2)


class Broken:
    """A service that takes numbers but no tables."""

    def log_config(self, cfg):
        pass

    def log_dict(self, metrics, step):
        pass

    def log_table(self, name, rows, step):
        raise RuntimeError("quota")

    def close(self):
        pass


class Down:
    """A service that does not answer."""

    def __init__(self):
        raise RuntimeError("no such place")


class Working(Broken):
    """A service that keeps what it gets."""

    got: ClassVar[list] = []

    def log_dict(self, metrics, step):
        self.got.append(step)

    def log_table(self, name, rows, step):
        self.got.append(name)

    def close(self):
        self.got.append("closed")


@pytest.fixture
def own_loggers(monkeypatch):
    package = ModuleType("own_loggers")
    for each in (Broken, Down, Working):
        monkeypatch.setattr(each, "__module__", "own_loggers")
        setattr(package, each.__name__, each)
    monkeypatch.setitem(sys.modules, "own_loggers", package)
    monkeypatch.setattr(Working, "got", [])
    return "allow_components=[own_loggers]"


@pytest.mark.parametrize("is_asked", [False, True])
def test_a_logger_that_fails_stops_neither_the_run_nor_the_others(tmp_path, monkeypatch, caplog, own_loggers, is_asked):
    """What failed is named, and where on request: a service that is down does not fill the log."""
    monkeypatch.setenv("SPIN_TRACEBACK", "1" if is_asked else "0")
    loggers = "metric_logger=[own_loggers.Down, own_loggers.Broken, {_component_: own_loggers.Working}]"
    run(tmp_path, "max_steps=2", "val_check_interval=1", loggers, own_loggers)
    assert Working.got == [0, "samples", 1, "samples", 2, "closed"]
    assert "metric_logger[0] (Down) cannot be started (RuntimeError: no such place). Training" in caplog.text
    assert "metric_logger[1] (Broken): log_table failed (RuntimeError: quota), for the first time. Tr" in caplog.text
    for line in ('raise RuntimeError("no such place")', 'raise RuntimeError("quota")'):
        assert (line in caplog.text) == is_asked
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 8


def test_faults_of_a_list_of_loggers_name_the_logger(tmp_path):
    loggers = "[{_component_: torchtune.training.metric_logging.StdoutLogger, foo: 1}, spin.run.TrackioLoger]"
    with pytest.raises(ConfigError) as caught:
        tiny_config(tmp_path, f"metric_logger={loggers}")
    assert "metric_logger[0].foo: torchtune.training.metric_logging.StdoutLogger has no such par" in str(caught.value)
    assert "Did you mean 'spin.run.TrackioLogger'?" in str(caught.value)
    with pytest.raises(ConfigError, match=r"metric_logger: found 3, expected a section .* a list of .* or null"):
        tiny_config(tmp_path, "metric_logger=3")


def _recorded(made_by, into):
    class Recorded(made_by):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            into.append(self)

    return Recorded
