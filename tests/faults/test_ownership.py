"""Nothing is deleted or replaced that does not carry this program's marker."""

import logging
import shutil

import pytest
from spin_recipe import SPINRecipe

from spin.checkpoint import SPINCheckpointer
from spin.core.errors import ConfigError
from spin.core.files import atomic_dir
from spin.core.ranks import init_world
from tests.generators.test_vllm_server import context, generator_of, serve, untied  # noqa: F401 - fixtures
from tests.recipes.helpers import run, tiny_config
from tests.two_ranks.tiny import sharded

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null", "save_interval=1", "checkpointer.keep_last=1")


def tree(folder):
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def user_files(folder):
    """A folder of somebody's files."""
    (folder / "photos").mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    (folder / "photos" / "a.jpg").write_bytes(b"\xff\xd8")
    return tree(folder)


# ---- the folder through which a server gets its weights


def server_config(tmp_path, transfer_dir, *changes):
    return tiny_config(
        tmp_path / "run", "generator._component_=spin.generators.VLLMServerGenerator", "~generator.batch_size",
        "generator.url=http://127.0.0.1:1", f"generator.transfer_dir={transfer_dir}",
        "generator.model_dir=${checkpointer.checkpoint_dir}", "generator.model_type=LLAMA3_2",
        "generator.wait_seconds=0.1", *changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("files", "is a folder with files that this program did not put there"),
        ("link", "is a folder with files that this program did not put there"),
        ("files/thesis.tex", "is not a folder"),
        ("run", "is output_dir"),
        ("run/for_vllm", "is in output_dir"),
        ("files/../run/for_vllm", "is in output_dir"),
        (".", "holds output_dir"),
        ("models", "holds checkpointer.checkpoint_dir"),
        ("models/base", "is checkpointer.checkpoint_dir"),
        ("models/base/copy", "is in checkpointer.checkpoint_dir"),
    ],
)
def test_a_transfer_dir_that_is_not_ours_is_refused_before_anything_is_made(tmp_path, tiny_lm, where, message):
    shutil.copytree(tiny_lm, tmp_path / "models" / "base")
    user_files(tmp_path / "files")
    (tmp_path / "link").symlink_to("files")
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=rf"generator\.transfer_dir=.*: {message}"):
        SPINRecipe(server_config(tmp_path, tmp_path / where, f"checkpointer.checkpoint_dir={tmp_path}/models/base"))
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()


def test_new_empty_and_own_transfer_dirs_are_taken(tmp_path):
    """A model's export is none: it carries the marker, but of another kind."""
    (tmp_path / "empty").mkdir()
    for other, kind in (("own", "transfer_dir of a generator"), ("hf_model", "model")):
        with atomic_dir(tmp_path / other, kind):
            pass
    for name in ("new", "empty", "own"):
        SPINRecipe(server_config(tmp_path, tmp_path / name))
    with pytest.raises(ConfigError, match="that this program did not put"):
        SPINRecipe(server_config(tmp_path, tmp_path / "hf_model"))


def test_what_is_put_into_a_transfer_dir_later_stays(context, untied, tmp_path, serve):  # noqa: F811
    """Checked again before each replacement, by a generator that has replaced its own folder twice."""
    generator = generator_of(context, untied, tmp_path, serve().url)
    for _ in range(2):
        generator.update_weights([])
    assert {path.name for path in tmp_path.iterdir() if "weights" in path.name} == {"weights"}
    shutil.rmtree(tmp_path / "weights")
    before = user_files(tmp_path / "weights")
    with pytest.raises(ConfigError, match="It would be deleted: name a new or an empty folder"):
        generator.update_weights([])
    assert tree(tmp_path / "weights") == before
    with pytest.raises(ConfigError, match="did not put there"):
        generator_of(context, untied, tmp_path, "http://127.0.0.1:1")


# ---- the run's folder


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A run in a folder that other programs use too; the folder, what was in it, and the log."""
    folder = tmp_path_factory.mktemp("crowded") / "out"
    for name in (
        "checkpoints/step_1", "checkpoints/step_00000001", "checkpoints/step_00000002.old", "checkpoints/step_7",
        "checkpoints/.step_00000001.part", "checkpoints/.step_3.part", "iteration_000/hf_model",
        "iteration_000/hf_model.old", "iteration_000/.hf_model.part", "iteration_000/responses", "wandb",
    ):  # fmt: skip
        user_files(folder / name)
    (folder / "checkpoints/step_7/manifest.json").write_text('{"step": 7}')
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "iteration_000/rows"):
        (folder / name).write_text('{"loss": 1.5, "step": 3}\n')
    (folder / "iteration_000/responses/.mine.tmp").write_text("mine")
    before = tree(folder)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("spin").addHandler(handler)
    run(folder, *SHORT)
    logging.getLogger("spin").removeHandler(handler)
    return folder, before, "\n".join(said)


def test_a_run_deletes_nothing_that_was_there(crowded):
    """Each file is where it was, or in a folder or file that was renamed to ``.stale-0``, which the log names."""
    folder, before, log = crowded
    after = tree(folder)
    for name, content in before.items():
        places = [name, *(name.replace(part, f"{part}.stale-0", 1) for part in name.split("/"))]
        assert any(after.get(place) == content for place in places), name
    for name in ("checkpoints/step_1", "checkpoints/step_7", "checkpoints/.step_3.part", "wandb"):
        assert (folder / name / "thesis.tex").exists(), name
    for name in ("checkpoints/step_00000001", "iteration_000/hf_model", "iteration_000/.hf_model.part"):
        assert f"{folder}/{name} is in the way and is not a" in log and (folder / f"{name}.stale-0").is_dir(), name
    assert f"{folder}/metrics.jsonl was there before the first run of this folder: kept as metrics.jsonl.stale-0" in log


def test_it_works_in_such_a_folder_and_clears_up_after_itself(crowded):
    folder, _, _ = crowded
    assert SPINCheckpointer("unused", str(folder), "LLAMA3_2", keep_last=1).latest().name == "step_00000005"
    ours = sorted(path.parent.name for path in folder.rglob(".spin") if path.parent != folder)
    assert ours == ["hf_model", "step_00000005"]
    before = tree(folder)
    run(folder, *SHORT)  # the same run again: finished
    changed = {name for name, content in tree(folder).items() if before.get(name) != content}
    assert changed <= {"config.yaml", ".lock", "starts.jsonl"} | {name for name in changed if name.startswith("logs/")}


def test_what_a_dead_process_left_is_removed_if_it_is_marked(tmp_path):
    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2")
    arguments = {"model": sharded(init_world("cpu")), "optimizer": None, "state": {}, "world": init_world("cpu")}
    first = checkpointer.save(step=1, **arguments)
    checkpointer.wait()
    shutil.copytree(first, first.with_name(".step_00000009.part"))
    shutil.copytree(first, first.with_name("step_00000008"))
    (first.with_name("step_00000008") / "manifest.json").unlink()  # half deleted
    checkpointer.save(step=2, **arguments)
    checkpointer.close()
    assert sorted(path.name for path in checkpointer.checkpoints_dir.iterdir()) == ["step_00000001", "step_00000002"]
