"""The services themselves, without a network: what they keep is read back by their own libraries."""

import json
import logging
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from spin import config
from spin.core.ranks import init_world
from spin.run.log import MetricService, RunLog
from spin.run.messages import log_table
from tests.recipes.helpers import run

ROWS = [
    {"step": 2, "prompt": "What is\na `pipe |`?", "real": "<b>&", "generated": "# *no*", "margin": 0.25},
    {"step": 2, "prompt": "second", "real": "x", "generated": "$y_1$", "margin": -1.0},
]


@pytest.fixture
def log(tmp_path, caplog):
    """A run's log with a service, which warns of nothing; two steps, the second with a table."""

    def write(service, **arguments):
        logger = {"_component_": f"torchtune.training.metric_logging.{service}", **arguments}
        values = {"output_dir": str(tmp_path), "resume": "auto", "log_every_n_steps": 1, "metric_logger": logger}
        cfg = OmegaConf.create(values)
        run_log = RunLog(cfg, partial(config.instantiate, cfg.metric_logger), -1, init_world("cpu"))
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

    log("TensorBoardLogger", log_dir=str(tmp_path / "events"), organize_logs=False)
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
    log("MLFlowLogger", tracking_uri=uri, experiment_name="spin")
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
    log("WandBLogger", project="spin", log_dir=str(tmp_path), mode="offline")
    (table,) = tables
    assert table.columns == list(ROWS[0]) and table.data == [list(row.values()) for row in ROWS]
    (written,) = tmp_path.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    assert json.loads(written.read_text(encoding="utf-8"))["data"] == table.data


def test_comet_offline(log, tmp_path):
    pytest.importorskip("comet_ml")
    import zipfile

    log("CometLogger", online=False, log_code=False, offline_directory=str(tmp_path / "comet"), api_key="none")
    (archive,) = (tmp_path / "comet").glob("*.zip")
    with zipfile.ZipFile(archive) as content:
        texts = [content.read(name).decode("utf-8", "replace") for name in content.namelist()]
    assert any("second,x,$y_1$,-1.0" in text for text in texts)


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

    def __init__(self):
        self.steps = []

    def log_config(self, cfg):
        pass

    def log_dict(self, metrics, step):
        self.steps.append(step)

    def log_table(self, name, rows, step):
        raise RuntimeError("quota")

    def close(self):
        pass


def test_a_table_that_fails_stops_nothing(tmp_path, monkeypatch, caplog):
    service = Broken()
    instantiate = config.instantiate

    def make(node, *args, **kwargs):
        return service if node is None else instantiate(node, *args, **kwargs)

    monkeypatch.setattr(config, "instantiate", make)
    run(tmp_path, "max_steps=2", "val_check_interval=1")
    assert service.steps == [0, 1, 2]
    assert "metric_logger.log_table failed (RuntimeError: quota), 1 times" in caplog.text
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 8


def _recorded(made_by, into):
    class Recorded(made_by):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            into.append(self)

    return Recorded


@pytest.mark.parametrize("is_asked", [False, True])
def test_where_a_logger_of_your_own_failed_is_shown_on_request(monkeypatch, caplog, is_asked):
    """In a line without, so that a service that is down does not fill the log."""
    monkeypatch.setenv("SPIN_TRACEBACK", "1" if is_asked else "0")
    service = MetricService(Broken)
    service.call("log_table", "samples", ROWS, 2)
    assert caplog.text.count("metric_logger.log_table failed (RuntimeError: quota)") == 1
    assert ('raise RuntimeError("quota")' in caplog.text) == is_asked

    def cannot_start():
        raise RuntimeError("no such place")

    MetricService(cannot_start)
    assert "cannot be started (RuntimeError: no such place)" in caplog.text
    assert ('raise RuntimeError("no such place")' in caplog.text) == is_asked
