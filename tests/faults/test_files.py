"""Output folders: in use, read-only, full; background writes that fail or die; services that are down."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from spin_recipe import SPINRecipe

import spin.checkpoint.checkpointer
from spin.checkpoint import SPINCheckpointer
from spin.core.errors import CheckpointError, ConfigError, OutputError, StoreError
from spin.core.files import FolderLock
from spin.core.ranks import init_world
from spin.model.fingerprint import weights_fingerprint
from tests.ranks import run_ranks
from tests.recipes.helpers import (
    REPO,
    command,
    dies_before_training,
    flip_bit,
    metrics_of,
    run,
    step_of,
    stops_at,
    tiny_config,
)
from tests.two_ranks.tiny import build, sharded, train

PROGRAM = [sys.executable, str(REPO / "recipes" / "spin_recipe.py")]
SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null")
WANDB, DISK = (f"torchtune.training.metric_logging.{name}Logger" for name in ("WandB", "Disk"))


# ---- the lock

HOLDER = """
import os, sys, time
from pathlib import Path
from spin.core.files import FolderLock
lock = FolderLock(Path(sys.argv[1]), shared=len(sys.argv) > 2)
child = os.fork()  # inherits every file that is open, as an engine's worker does, and outlives its parent
if child:
    os.write(1, f"{child}\\n".encode())
time.sleep(300)
"""


@contextmanager
def held(folder, env, *shared):
    """A process that holds the lock, and has a child; that process, and the child's id."""
    words = [sys.executable, "-c", HOLDER, str(folder), *shared]
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_a_second_run_is_locked_out_until_the_first_is_dead(tmp_path, subprocess_env):
    """By the command line, before anything in the folder is touched; a killed run's children keep nobody out."""
    with held(tmp_path / "out", subprocess_env) as (process, child):
        before = sorted(path.name for path in (tmp_path / "out").iterdir())
        done = command(tmp_path / "out", *SHORT, program=PROGRAM, code=1)
        assert "Traceback" not in done.stderr
        assert f"another run is writing here (process {process.pid} on " in done.stderr
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before == [".lock"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(child, 0)  # still there
        run(tmp_path / "out", *SHORT, "max_steps=1")
    assert len(metrics_of(tmp_path / "out")) == 1


def test_workers_share_and_a_run_does_not(tmp_path, subprocess_env):
    with held(tmp_path, subprocess_env, "shared"):
        FolderLock(tmp_path, shared=True).release()
        with pytest.raises(OutputError, match="another run is writing here"):
            FolderLock(tmp_path)


def test_a_file_in_the_folders_place_and_a_file_system_without_locks(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for folder in ("file", "file/out"):
        with pytest.raises(OutputError, match=rf"{folder}: cannot write \(.*/file is not a folder\)"):
            FolderLock(tmp_path / folder)
    assert (tmp_path / "file").read_text() == "mine"

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with pytest.raises(OutputError, match=r"out/\.lock: cannot be locked \(No locks available\).*another one"):
        FolderLock(tmp_path / "out")


# ---- full and read-only


def limited(bytes_per_file):
    """A run in which no file can grow beyond a size: the kernel refuses the write, as it does on a full disk."""
    code = (
        f"import resource, sys; sys.argv = ['spin_recipe.py', *sys.argv[1:]]; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_per_file}, {bytes_per_file})); "
        "import spin_recipe; spin_recipe.recipe_main()"
    )
    return [sys.executable, "-c", code]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "named"),
    [
        (6_000, "iteration_000/responses/shard-00000.parquet: cannot write (File too large)"),
        (3_000_000, "checkpoints/.step_00000002.part: cannot write"),
    ],
)
def test_a_full_disk_ends_the_run_with_the_path(tmp_path, limit, named):
    """The one shard of responses is larger than 6 kB, a state larger than 3 MB, and all else is smaller."""
    changes = (*SHORT, "save_interval=2", "pairs.prompts_per_shard=20")
    done = command(tmp_path / "out", *changes, program=limited(limit), code=1)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert named in done.stderr[done.stderr.index("error: ") :]
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith((".part", ".tmp"))]
    assert SPINCheckpointer("unused", str(tmp_path / "out"), "LLAMA3_2").latest() is None
    run(tmp_path / "out", *changes)
    run(tmp_path / "unbroken", *changes)
    assert metrics_of(tmp_path / "out") == metrics_of(tmp_path / "unbroken")


def wait_for_file(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_the_earlier_checkpoint_outlives_a_disk_that_fills_up_later(tmp_path):
    """One is written; then no file may have more than 3 MB. The run ends at its next step, not its next save."""

    class FillsUp(SPINRecipe):
        def save_checkpoint(self):
            path = super().save_checkpoint()
            if step_of(self) == 1:
                wait_for_file(path / "manifest.json")
                resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, old[1]))
            return path

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    recipe = FillsUp(tiny_config(tmp_path, *SHORT, "save_interval=1"))
    recipe.setup()
    try:
        with pytest.raises(CheckpointError, match=r"step_00000002\.part: cannot write .*Is the disk full"):
            recipe.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    recipe.cleanup()
    states = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert states == ["step_00000001"] and step_of(recipe) == 3
    run(tmp_path, *SHORT)
    run(tmp_path / "unbroken", *SHORT)
    assert metrics_of(tmp_path) == metrics_of(tmp_path / "unbroken")


def test_a_run_whose_last_checkpoint_was_not_written_does_not_say_that_it_has_finished(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise OSError(28, "No space left on device")

    recipe = SPINRecipe(tiny_config(tmp_path, *SHORT, "save_interval=0"))
    recipe.setup()
    monkeypatch.setattr(spin.checkpoint.checkpointer, "file_sha256", fail)
    with caplog.at_level("INFO", "spin_recipe"), pytest.raises(CheckpointError, match="No space left on device"):
        recipe.train()
    recipe.cleanup()
    assert recipe._progress.is_done and "Finished" not in caplog.text


@pytest.mark.parametrize("name", ["config.yaml", "samples.jsonl", "metrics.jsonl"])
def test_other_files_are_named_too(tmp_path, name):
    """A folder has the name."""

    class Full(SPINRecipe):
        def setup(self):
            super().setup()
            if name != "config.yaml":
                (tmp_path / name).unlink()
                (tmp_path / name).mkdir()

    if name == "config.yaml":
        (tmp_path / name).mkdir()
    with pytest.raises(OutputError, match=rf"{name}: cannot write \(Is a directory\)"):
        run(tmp_path, "max_iterations=1", "max_epochs=1", recipe_class=Full)


# ---- background writes


@pytest.fixture
def world():
    return init_world("cpu")


def save(checkpointer, step, **options):
    world = init_world("cpu")
    return checkpointer.save(step=step, model=sharded(world), optimizer=None, state={}, world=world, **options)


def test_training_continues_while_a_checkpoint_is_written(tmp_path, world, monkeypatch):
    """The weights of the moment of saving are written, whatever is trained before the writer gets to them."""
    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2")
    may_write, original = threading.Event(), spin.checkpoint.checkpointer.save_tensors

    def held_up(*args):
        assert may_write.wait(60)
        may_write.clear()
        original(*args)

    monkeypatch.setattr(spin.checkpoint.checkpointer, "save_tensors", held_up)
    model = sharded(world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in (1, 2):  # the second copy goes into the memory of the first
        train(model, optimizer, world, range(step))
        saved = weights_fingerprint(model)
        path = checkpointer.save(step=step, model=model, optimizer=optimizer, state={}, world=world)
        assert not path.exists()
        train(model, optimizer, world, range(3))
        assert weights_fingerprint(model) != saved
        may_write.set()
        checkpointer.wait()
        other = build()
        checkpointer.load(path, model=other, optimizer=None, world=world)
        assert weights_fingerprint(other) == saved
    checkpointer.close()


@pytest.mark.parametrize(
    "call",
    [
        SPINCheckpointer.wait,
        SPINCheckpointer.close,
        lambda checkpointer: checkpointer.export(build(), 0, init_world("cpu")),
        lambda checkpointer: save(checkpointer, 3),
        lambda checkpointer: checkpointer.roll_back(0, init_world("cpu")),
    ],
    ids=["wait", "close", "export", "save", "roll_back"],
)
def test_a_failed_write_is_raised_by_the_next_call_of_every_kind(tmp_path, monkeypatch, call):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2")
    first = save(checkpointer, 1)
    checkpointer.wait()
    assert not checkpointer.has_failed
    monkeypatch.setattr(spin.checkpoint.checkpointer, "file_sha256", fail)
    save(checkpointer, 2)
    with pytest.raises(CheckpointError, match=r"step_00000002\.part: cannot write .*No space left on device"):
        call(checkpointer)
    assert list(checkpointer.checkpoints_dir.iterdir()) == [first] and checkpointer.latest() == first


@pytest.mark.slow
def test_one_rank_fails_in_the_background_and_both_stop(tmp_path, subprocess_env):
    run_ranks("background.py", subprocess_env, tmp_path)


# ---- anchors


def test_an_anchor_stays_until_the_next(tmp_path, world):
    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2", keep_last=1)
    expected = {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [5], 6: [5, 6]}
    for step, kept in expected.items():
        save(checkpointer, step, anchor=step in (2, 5))
        checkpointer.wait()
        assert sorted(int(path.name[-8:]) for path in checkpointer.checkpoints_dir.iterdir()) == kept
    assert checkpointer.roll_back(5, world).name == "step_00000005"
    with pytest.raises(CheckpointError, match="Too far. .*checkpoints: cannot go back to step 4"):
        checkpointer.roll_back(4, world, "Too far.")
    assert checkpointer.latest().name == "step_00000005"
    assert checkpointer.roll_back(0, world) is None


# ---- a metrics service that is down


class Service:
    """A metric logger that sends each step to a server."""

    def __init__(self, url, fails_at_once=False):
        self.url = url
        if fails_at_once:
            self._send({})

    def _send(self, payload):
        urllib.request.urlopen(urllib.request.Request(self.url, json.dumps(payload).encode()), timeout=5)

    def log_config(self, cfg):
        self._send({})

    def log_dict(self, payload, step):
        self._send(payload)

    def close(self):
        self._send({})


@pytest.mark.parametrize("fails_at_once", [True, False])
def test_training_continues_without_a_metrics_service(tmp_path, monkeypatch, caplog, fails_at_once):
    """Nobody listens on the port, from the beginning."""
    monkeypatch.setitem(sys.modules, "own_package", sys.modules[__name__])
    monkeypatch.setattr(Service, "__module__", "own_package")
    run(
        tmp_path, *SHORT, "metric_logger._component_=own_package.Service",
        "metric_logger.url=http://127.0.0.1:1/", f"metric_logger.fails_at_once={str(fails_at_once).lower()}",
        "allow_components=[own_package]",
    )  # fmt: skip
    assert [row["step"] for row in metrics_of(tmp_path)] == [1, 2, 3, 4, 5]
    assert "Connection refused" in caplog.text
    warnings = [record for record in caplog.records if "metric_logger" in record.message]
    # log_config, five steps and close fail; logged the 1st, 2nd and 4th time
    assert len(warnings) == (1 if fails_at_once else 3)


def test_a_logger_that_is_not_installed_is_a_users_mistake(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="metric_logger: .*wandb"):
        run(tmp_path, *SHORT, f"metric_logger._component_={WANDB}")


@pytest.mark.parametrize(
    ("component", "change"),
    [
        (WANDB, "settings={x_executable: /tmp/x, base_url: 'http://elsewhere'}"),
        (WANDB, "config={a: 1}"),
        (WANDB, "tags=[{a: 1}]"),
        (DISK, "filename=/etc/profile.txt"),
        (DISK, "filename=../x.txt"),
        (DISK, "filename=.bashrc"),
        (DISK, "filename=x.py"),
        (DISK, "filename=1"),
    ],
)
def test_a_logger_takes_values_and_appends_to_logs(component, change, tmp_path):
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"metric_logger\.{key}.*expect"):
        SPINRecipe(tiny_config(tmp_path, f"metric_logger._component_={component}", f"metric_logger.{change}"))
    log = f"metric_logger={{_component_: {DISK}, log_dir: {tmp_path}, filename: my-log.1.txt}}"
    SPINRecipe(tiny_config(tmp_path, log))


@pytest.mark.parametrize(
    "change",
    [
        "optimizer=torch.optim.SparseAdam",
        "optimizer=torch.optim.Adafactor",
        "optimizer=torchao.optim.AdamW8bit",
        "optimizer.differentiable=true",
        "optimizer.capturable=true",
    ],
)
def test_an_optimizer_that_cannot_update_such_weights_is_named(change, tmp_path):
    short = ("max_iterations=1", "max_steps=1", "validation_dataset=null", "sampling.max_new_tokens=2")
    with pytest.raises(ConfigError, match=r"optimizer: \S+ cannot update the model's weights: "):
        run(tmp_path, *short, change)
    assert not list(tmp_path.glob("checkpoints/step_*"))


# ---- a damaged pair shard


def test_a_damaged_shard_at_the_iterations_start_is_made_again_alone(tmp_path):
    """One byte of one shard of scored pairs: at the iteration's start the opponent is still there."""
    run(tmp_path / "a", *SHORT)
    dies_before_training(tmp_path / "b", *SHORT)
    folder = tmp_path / "b" / "iteration_000" / "pairs"
    made = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.parquet")}
    flip_bit(folder / "shard-00001.parquet")
    run(tmp_path / "b", *SHORT)
    changed = [name for name, time in made.items() if (folder / name).stat().st_mtime_ns != time]
    assert changed == ["shard-00001.parquet"]
    assert metrics_of(tmp_path / "b") == metrics_of(tmp_path / "a")


def test_a_damaged_shard_in_the_middle_of_an_iteration_is_named(tmp_path):
    """The opponent is gone: the run says which file, and which checkpoint could make it again."""
    run(tmp_path, *SHORT, recipe_class=stops_at(2))
    flip_bit(tmp_path / "iteration_000" / "pairs" / "shard-00001.parquet")
    states = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(StoreError, match=r"shard-00001\.parquet: damaged"):
        run(tmp_path, *SHORT)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == states


# ---- code of others


def test_no_remote_code_anywhere():
    """The option that lets a model folder bring code along is False wherever it is named, and named where it exists."""
    sources = [*REPO.glob("spin/**/*.py"), *REPO.glob("recipes/*.py"), *REPO.glob("configs/**/*.yaml")]
    found = [
        each for file in sources for each in re.findall(r"trust_remote_code[\"']?\s*[=:]\s*(\w+)", file.read_text())
    ]
    assert found and set(found) <= {"False", "false"}, found
    for file in sources:
        if file.name == "card.py":
            continue  # what a model card tells its readers to run, with the library's own default
        for call in re.findall(r"Auto\w+\.from_pretrained\((?:[^()]|\([^()]*\))*\)", file.read_text()):
            assert "trust_remote_code=False" in call, (file, call)


@pytest.mark.slow
def test_a_log_that_cannot_be_written_ends_both_ranks_with_its_message(tmp_path, subprocess_env):
    run_ranks("log_faults.py", subprocess_env, tmp_path)
