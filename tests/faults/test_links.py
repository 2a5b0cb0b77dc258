"""Links and modules left where this program writes or is started: no file of the user is lost, no code runs."""

import base64
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from spin.cli import main
from spin.config import instantiate
from spin.core.errors import ConfigError, OutputError
from spin.core.files import FolderLock, file_lock
from spin.data import Pair, PairStore, Response
from spin.run.log import MetricsFile
from tests.faults.hostile import write_whole_run
from tests.recipes.helpers import REPO, tiny_config

LURES = ("yaml", "torch", "numpy", "tqdm", "omegaconf", "jinja2", "pyarrow", "datasets", "json")


@pytest.fixture
def precious(tmp_path):
    file = tmp_path / "precious"
    file.write_text("mine")
    return file


def test_a_link_under_a_temporary_name_is_not_followed(tmp_path, precious):
    """The name of a temporary file can be guessed: links under all of them cost their maker nothing."""
    run = write_whole_run(tmp_path / "whole")
    store = next(run.rglob("pairs/manifest.json")).parent
    for file in (run / "report.html", run / "mine.jsonl", run / "mine.yaml"):
        (file.parent / f".{file.name}.{os.getpid()}.tmp").symlink_to(precious)
    for argv in (
        ["report", str(run)],
        ["pairs", str(store), "--export", str(run / "mine.jsonl"), "--tokenizer", str(REPO / "tests/assets/tiny_lm")],
        ["cp", "full", str(run / "mine.yaml")],
    ):
        assert main(argv) == 0
        assert precious.read_text() == "mine", argv
    new = tmp_path / "store"
    new.mkdir()
    for name in ("manifest.json", "shard-00000.parquet"):
        (new / f".{name}.{os.getpid()}.tmp").symlink_to(precious)
    made = PairStore.open_or_create(new, {"opponent": "x"}, 1)
    made.write_shard(0, [Pair("a", 0, [1], [2], generated=[Response([3], "stop")])])
    assert precious.read_text() == "mine" and made.read_shard(0)


def test_locks_and_metrics_are_no_links_and_no_pipes(tmp_path, precious):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").symlink_to(precious)
    (tmp_path / ".b.lock").symlink_to(precious)
    (tmp_path / "c").mkdir()
    os.mkfifo(tmp_path / "c" / ".lock")
    with pytest.raises(OutputError, match=r"a/\.lock: cannot write \(a link"):
        FolderLock(tmp_path / "a")
    with pytest.raises(OutputError, match="a link"), file_lock(tmp_path / "b"):
        pass
    with pytest.raises(OutputError, match="not a regular file"):
        FolderLock(tmp_path / "c")
    log = MetricsFile(tmp_path / "metrics.jsonl", from_step=0)
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    (tmp_path / "metrics.jsonl").symlink_to(precious)
    with pytest.raises(OutputError, match="a link"):
        log.write(1, {"loss": 1.0})
    assert precious.read_text() == "mine"


def test_modules_of_the_folder_where_a_command_is_started_are_not_imported(tmp_path):
    """`cd somebodys_run; spin report .`: the folder may hold a yaml.py."""
    for name in LURES:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').close()\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPO), str(REPO / "recipes")])}
    for argv in (["report", "."], ["ls", "."], ["validate", "quickstart/cpu"]):
        done = subprocess.run(
            [sys.executable, "-m", "spin", *argv], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert "Traceback" not in done.stderr and not (tmp_path / "imported").exists(), done.stderr


@pytest.mark.parametrize(
    "override",
    [
        "model.norm_eps=[1]", "model.norm_eps={a: 1}", "model.scale_factor=[[1]]", "model.rope_base={}",
        "compile=null", "fsdp_reshard_after_forward=null", "allow_components=5", "allow_components=true",
        "optimizer.weight_decay=[0.1]", "optimizer.lr=1e38", "optimizer.lr=[1e38]", "optimizer.lr=1e300",
        "optimizer.lr=.inf", "optimizer.lr=[.nan]", "optimizer.lr=[[1.0]]", "optimizer.lr={a: 1}",
    ],
)  # fmt: skip
def test_lists_maps_and_nulls_for_numbers_and_rates_that_no_optimizer_takes_are_faults(tmp_path, override):
    with pytest.raises(ConfigError, match=override.partition("=")[0].replace(".", r"\.")):
        tiny_config(tmp_path, override)


def test_a_tokenizer_is_read_from_its_file_alone(tmp_path, monkeypatch):
    """tiktoken would fetch an address, and go on with its copy of a file that was changed."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    node = {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "http://127.0.0.1:9/tokenizer.model"}
    cfg = OmegaConf.create({"tokenizer": node})
    with pytest.raises(ConfigError, match=r"tokenizer\.path: found 'http.*expected a path"):
        instantiate(cfg.tokenizer)
    file = tmp_path / "tokenizer.model"
    cfg.tokenizer.path = str(file)
    sizes = []
    for count in (256, 255):
        file.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(count)))
        sizes.append(instantiate(cfg.tokenizer).base_vocab_size)
    assert sizes == [256, 255] and not (tmp_path / "cache").exists()
