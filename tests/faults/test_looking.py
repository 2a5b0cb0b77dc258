"""Commands that look at a run's folder of someone else: exit code 0 or an error in a line, in bounded time."""

import io
import json
import os
import random
import re
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import spin_recipe

from spin.cli import main
from spin.core.errors import CheckpointError
from spin.model.hf_folder import read_hf_config
from tests.faults.hostile import Hang, commands_on, hostile_run, snapshot, time_limit, write_whole_run
from tests.recipes.helpers import CONFIG, tiny_overrides
from tests.report_runs import write_run

FOLDERS = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_whole_run(tmp_path_factory.mktemp("whole"))


def look(argv):
    """Exit code and output of a command; what is neither 0 nor an error in a line is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with time_limit(), redirect_stdout(out), redirect_stderr(err):
        code = main(argv)
    assert code == 0 or (code == 1 and err.getvalue().startswith("error: ")), (code, err.getvalue())
    return code, out.getvalue() + err.getvalue()


def check_folder(whole, folder, seed):
    """Every command on one hostile folder: nothing but its output is written, and no control character shown."""
    run, damages = hostile_run(whole, folder, seed)
    (run.parent / "out").mkdir()
    for argv, may_write in commands_on(run, random.Random(seed)):
        before = snapshot(run.parent)
        try:
            _, text = look(argv)
        except (Exception, Hang) as error:
            raise AssertionError(f"seed {seed}: {damages}, {argv}: {type(error).__name__}: {error}") from error
        assert not [c for c in text if c in "\x1b\r\x07\x9b\u202e\u2066"], (seed, damages, argv)
        after = snapshot(run.parent)
        changed = [path for path in {*before, *after} if before.get(path) != after.get(path)]
        outside = [path for path in changed if not any(path == each or each in path.parents for each in may_write)]
        assert not outside, (seed, damages, argv, outside)


@pytest.mark.parametrize("first", range(0, FOLDERS, 20))
def test_hostile_folders(whole, tmp_path, first):
    for seed in range(first, first + 20):
        check_folder(whole, tmp_path / "work", seed)


def test_the_whole_folder_is_fine(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (tmp_path / "out").mkdir()
    for argv, _ in commands_on(run, random.Random(0)):
        assert look(argv)[0] == 0, argv


@pytest.mark.parametrize(
    "name", ["hf_model", "hf_model/config.json", "hf_model/README.md", "hf_model/model.safetensors"]
)
def test_a_link_out_of_the_run_is_neither_written_through_nor_exported(whole, tmp_path, name):
    """Else `export` would publish a private file, or overwrite one that the run's folder points to."""
    run, _ = hostile_run(whole, tmp_path, 0)
    target = tmp_path / "outside" / (name.rpartition("/")[2] if "/" in name else "")
    if "README" in name:
        target.write_text("mine")
    path = run / "iteration_001" / name
    if path.is_dir():
        path.rename(tmp_path / "old")
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)
    before = snapshot(tmp_path / "outside")
    for out in ([], ["--out", str(tmp_path / "new")]):
        code, text = look(["export", str(run), "--iteration", "1", *out])
        assert code == 1 and f"{path}: a link to {target.resolve()}, outside the run's folder" in text
    assert snapshot(tmp_path / "outside") == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "samples.jsonl", "config.yaml", "iteration_000/responses/manifest.json"]
)
def test_a_file_without_end(whole, tmp_path, name):
    """Of 4 TiB, though it takes no place on the disk."""
    run, _ = hostile_run(whole, tmp_path, 0)
    os.truncate(run / name, 2**42)
    look(["report", str(run)])
    look(["export", str(run)])


def test_numbers_at_the_ends_of_what_a_float_can_be(tmp_path):
    for low, high in [(5e-324, 0.0), (1e308, -1e308), (1e308, 1e308), (0.0, 0.0), (-5e-324, 5e-324)]:
        changes = {0: {"loss": low, "val_loss": low}, 1: {"loss": high, "val_loss": low}}
        run = write_run(tmp_path, iterations=1, changes=lambda step, changes=changes: changes[step % 2])
        assert look(["report", str(run)])[0] == 0
        own = re.sub(r"<(style|script)>.*?</\1>", "", (run / "report.html").read_text(), flags=re.DOTALL)
        assert "nan" not in own.lower()


def test_a_name_that_is_too_long_for_a_file(tmp_path, tiny_lm, capsys, monkeypatch):
    """In an index, and as a path in a config."""
    model = Path(shutil.copytree(tiny_lm, tmp_path / "model"))
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "é" * 3000}}))
    with pytest.raises(CheckpointError, match="is missing"):
        read_hf_config(model)
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", str(CONFIG), *tiny_overrides(tmp_path / ("é" * 300))])
    with pytest.raises(SystemExit) as end:
        spin_recipe.recipe_main()
    assert end.value.code == 1 and "File name too long" in capsys.readouterr().err
