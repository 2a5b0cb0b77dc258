from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoTokenizer

import spin.checkpoint.checkpointer
import spin.core.files
import spin.core.ranks
from spin.checkpoint import SPINCheckpointer
from spin.core.errors import CheckpointError, ConfigError, OutputError
from spin.core.files import file_sha256, json_fingerprint
from spin.core.ranks import init_world
from spin.data import ChatTokenizer
from spin.model.build import checkpoint_activations
from spin.model.fingerprint import weights_fingerprint
from spin.model.sharding import shard_model
from tests.families import tiny_lm_model
from tests.ranks import FOLDER, run_ranks
from tests.two_ranks.tiny import build, optimizer_digest, sharded, train


class Killed(BaseException):
    """Ends a save like kill -9 does: nothing that cleans up catches it."""


@pytest.fixture
def world():
    return init_world("cpu")


@pytest.fixture
def checkpointer(tmp_path) -> SPINCheckpointer:
    return SPINCheckpointer("unused", str(tmp_path / "run"), "LLAMA3_2", keep_last=2)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def fresh(world):
    """A model with no value in common with a trained one, and its optimizer."""
    model = sharded(world)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model, adamw(model)


def save(checkpointer, world, step: int, model=None, **arguments) -> Path:
    model = model if model is not None else sharded(world)
    defaults = {"optimizer": None, "state": {"step": step}}
    path = checkpointer.save(step=step, model=model, world=world, **(defaults | arguments))
    checkpointer.wait()
    return path


def digests(model, optimizer) -> tuple[str, str]:
    return weights_fingerprint(model), optimizer_digest(model, optimizer)


def names(checkpointer) -> list[str]:
    return sorted(entry.name for entry in checkpointer.checkpoints_dir.iterdir())


# ---- exactness


def test_resume_is_exact(checkpointer, world):
    """3 steps, save, 3 steps == load in a new model, 3 steps; weights, moments and step counts bit for bit."""
    model = sharded(world)
    optimizer = adamw(model)
    train(model, optimizer, world, range(3))
    saved = digests(model, optimizer)
    path = save(checkpointer, world, 3, model, optimizer=optimizer)
    train(model, optimizer, world, range(3, 6))
    unbroken = digests(model, optimizer)

    model, optimizer = fresh(world)
    checkpointer.load(path, model=model, optimizer=optimizer, world=world)
    assert digests(model, optimizer) == saved
    train(model, optimizer, world, range(3, 6))
    assert digests(model, optimizer) == unbroken != saved


@pytest.mark.slow
def test_one_two_and_four_ranks_exchange_checkpoints(tmp_path, world, subprocess_env):
    one = SPINCheckpointer("unused", str(tmp_path / "one"), "LLAMA3_2")
    model = sharded(world)
    optimizer = adamw(model)
    train(model, optimizer, world, range(3))
    state = dict(zip(("weights", "optimizer"), digests(model, optimizer), strict=True))
    save(one, world, 3, model, optimizer=optimizer, state=state)

    run_ranks("resume.py", subprocess_env, tmp_path)
    run_ranks("read_checkpoint.py", subprocess_env, tmp_path / "two", ranks=4)

    two = SPINCheckpointer("unused", str(tmp_path / "two"), "LLAMA3_2")
    model, optimizer = fresh(world)
    two.load(two.latest(), model=model, optimizer=optimizer, world=world)
    assert list(digests(model, optimizer)) == [two.read_state(two.latest())[key] for key in ("weights", "optimizer")]


def test_wrappers_and_sharding_do_not_show_in_a_checkpoint(checkpointer, world):
    model = build()
    checkpoint_activations(model)
    shard_model(model, world, compute_dtype=torch.bfloat16)
    optimizer = adamw(model)
    train(model, optimizer, world, range(1))
    path = save(checkpointer, world, 1, model, optimizer=optimizer)
    plain = build()
    plain_optimizer = adamw(plain)
    checkpointer.load(path, model=plain, optimizer=plain_optimizer, world=world)
    assert digests(plain, plain_optimizer) == digests(model, optimizer)


def test_optimizers_without_state_and_with_other_state(checkpointer, world):
    class Odd(torch.optim.SGD):
        """Keeps a number, a vector of its own shape and a tensor option."""

        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1
                    self.state[parameter]["vector"] = torch.arange(5.0) * self.state[parameter]["count"]

    for make in (lambda p: torch.optim.SGD(p, lr=0.1), lambda p: Odd(p, lr=torch.tensor(0.1), momentum=0.9)):
        model = sharded(world)
        optimizer = make(model.parameters())
        train(model, optimizer, world, range(2))
        path = save(checkpointer, world, 2, model, optimizer=optimizer)
        other, _ = fresh(world)
        other_optimizer = make(other.parameters())
        checkpointer.load(path, model=other, optimizer=other_optimizer, world=world)
        train(model, optimizer, world, range(2, 4))
        train(other, other_optimizer, world, range(2, 4))
        assert weights_fingerprint(other) == weights_fingerprint(model)
    assert other_optimizer.state[next(iter(other.parameters()))]["count"] == 4


def test_options_come_back_or_new_ones_stand(checkpointer, world):
    """How they are computed is the new optimizer's; what an optimizer counts in them comes back in any case."""
    model = sharded(world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, betas=(0.1, 0.2), foreach=True)
    optimizer.param_groups[0]["weight_sum"] = 3.0  # as schedule-free optimizers keep their averages' weight
    train(model, optimizer, world, range(2))
    path = save(checkpointer, world, 2, model, optimizer=optimizer)
    for new_options, expected in ((False, (0.5, (0.1, 0.2), False, 3.0)), (True, (0.1, (0.9, 0.999), False, 3.0))):
        other = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
        checkpointer.load(path, model=model, optimizer=other, world=world, new_options=new_options)
        assert tuple(other.param_groups[0][key] for key in ("lr", "betas", "foreach", "weight_sum")) == expected
        assert {int(state["step"]) for state in other.state.values()} == {2}


def test_a_checkpoint_without_optimizer_leaves_a_fresh_one(checkpointer, world):
    path = save(checkpointer, world, 1)
    model, optimizer = fresh(world)
    checkpointer.load(path, model=model, optimizer=optimizer, world=world)
    assert not optimizer.state and weights_fingerprint(model) == weights_fingerprint(build())


def test_state_is_json_and_comes_back(checkpointer, world):
    state = {"progress": {"step": 3}, "loss": 0.1, "none": None, "list": [1, "é"], "nan": math.nan}
    path = save(checkpointer, world, 3, state=state)
    found = checkpointer.read_state(path)
    assert math.isnan(found.pop("nan")) and state.pop("nan") and found == state


# ---- which state


def test_latest(checkpointer, world, tmp_path):
    assert checkpointer.latest() is None
    one = save(checkpointer, world, 1)
    ten = save(checkpointer, world, 10)
    assert checkpointer.latest("auto") == ten
    assert checkpointer.latest("never") is None
    assert checkpointer.latest(str(one)) == one
    shutil.copytree(ten, ten.with_name("step_00000010.old"))  # of a process that died while it replaced ten
    assert checkpointer.latest() == ten
    model = one.parents[1] / "iteration_000" / "hf_model"
    model.mkdir(parents=True)
    for path, message in (
        (tmp_path / "no" / "folder", r"no such folder.* never\.$"),
        (one.parent, f"no manifest.json.* Checkpoints near it: {one}, {ten}"),
        (one.parents[1], f"no manifest.json.* Checkpoints near it: {one}, {ten}"),
        (model, f"no manifest.json.* Checkpoints near it: {one}, {ten}"),
        (one.with_name("step_00000002"), f"no such folder.* Checkpoints near it: {one}, {ten}"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpointer.latest(str(path))


def test_newest_is_what_was_saved_last_and_the_same_step_is_replaced(checkpointer, world):
    """A run that resumes from an older checkpoint continues from there, not from the branch that it left."""
    for step, state in ((5, {}), (10, {}), (6, {"first": True}), (6, {"first": False})):
        path = save(checkpointer, world, step, state=state)
    assert checkpointer.latest() == path and names(checkpointer) == ["step_00000006", "step_00000010"]
    assert checkpointer.read_state(path) == {"first": False}


def test_retention(tmp_path, world):
    """Losses 5, 3, 4, 3, 6, nan, 7: the best two are steps 2 and 4, the newest two steps 6 and 7."""
    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2", keep_last=2, keep_best=2)
    for step, metric in enumerate((5.0, 3.0, 4.0, 3.0, 6.0, math.nan, 7.0), start=1):
        save(checkpointer, world, step, metric=metric)
    assert names(checkpointer) == [f"step_0000000{step}" for step in (2, 4, 6, 7)]
    keeps_one = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2", keep_last=1)
    save(keeps_one, world, 8)
    assert names(checkpointer) == ["step_00000008"]


def test_retention_never_leaves_less_than_one(tmp_path, world, monkeypatch):
    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2", keep_last=1)
    one = save(checkpointer, world, 1)
    original, seen = spin.core.ranks.commit_atomic_dir, []

    def commit(*args):
        seen.append(one.exists())
        original(*args)
        seen.append(one.exists())

    monkeypatch.setattr(spin.core.ranks, "commit_atomic_dir", commit)
    save(checkpointer, world, 2)
    assert seen == [True, True] and names(checkpointer) == ["step_00000002"]


# ---- faults while saving

WRITE_POINTS = [
    (spin.core.ranks, "begin_atomic_dir"),
    (spin.checkpoint.checkpointer, "replace_text"),
    (spin.checkpoint.checkpointer, "save_tensors"),
    (spin.checkpoint.checkpointer, "file_sha256"),
    (spin.checkpoint.checkpointer, "write_manifest"),
    (spin.core.ranks, "commit_atomic_dir"),
    (spin.core.files, "sync"),
    (spin.core.files.os, "rename"),
]


@pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("module", "function"), WRITE_POINTS, ids=[name for _, name in WRITE_POINTS])
def test_killed_at_a_write_point(module, function, when, step, checkpointer, world, monkeypatch):
    """The earlier state, or the new one if it was complete by then; the next save works and leaves nothing behind."""
    save(checkpointer, world, 1, state={"save": 1})
    original = getattr(module, function)

    def die(*args, **kwargs):
        if function == "rename" and not Path(args[1]).name.startswith("step_"):
            return original(*args, **kwargs)  # a library's own
        if when == "after":
            original(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, function, die)
        with pytest.raises(Killed):
            save(checkpointer, world, step, state={"save": 2})
    path = checkpointer.latest()
    is_new = step == 2 and when == "after" and function in ("commit_atomic_dir", "rename")
    is_new |= step == 1 and when == "after" and function == "commit_atomic_dir"
    assert checkpointer.read_state(path) == {"save": 2 if is_new else 1}
    model, _ = fresh(world)
    checkpointer.load(path, model=model, optimizer=None, world=world)
    assert weights_fingerprint(model) == weights_fingerprint(build())

    save(checkpointer, world, 3, state={"save": 3})
    assert names(checkpointer) == [path.name.removesuffix(".old"), "step_00000003"]


def test_killed_between_rename_and_removal(checkpointer, world, monkeypatch):
    """The new checkpoint stands, the one it replaced lies next to it."""
    save(checkpointer, world, 1, state={"save": 1})

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(spin.core.files.shutil, "rmtree", Mock(side_effect=Killed))
        save(checkpointer, world, 1, state={"save": 2})
    assert names(checkpointer) == ["step_00000001", "step_00000001.old"]
    assert checkpointer.read_state(checkpointer.latest()) == {"save": 2}
    save(checkpointer, world, 3)
    assert names(checkpointer) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize(
    ("module", "function"),
    [("spin.checkpoint.checkpointer", "write_manifest"), ("torch.distributed.checkpoint.filesystem", "os.fsync")],
)
def test_process_really_killed(module, function, tmp_path, world, subprocess_env):
    """os._exit while a tensor file is being written, and before the manifest."""
    if "." in function:
        module, function = function.split(".")
    command = [sys.executable, str(FOLDER / "killed_save.py"), str(tmp_path), module, function]
    assert subprocess.run(command, env=subprocess_env, capture_output=True, timeout=120).returncode == 9
    checkpointer = SPINCheckpointer("unused", str(tmp_path), "LLAMA3_2")
    assert [name for name in names(checkpointer) if not name.startswith(".")] == ["step_00000001"]
    assert (checkpointer.checkpoints_dir / ".step_00000002.part").is_dir()
    path = checkpointer.latest()
    model, optimizer = fresh(world)
    checkpointer.load(path, model=model, optimizer=optimizer, world=world)
    assert checkpointer.read_state(path) == {"step": 1}
    save(checkpointer, world, 2)
    assert names(checkpointer) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("point", ["tensors", "state", "hash"])
def test_failed_save_leaves_nothing_and_changes_nothing(point, checkpointer, world, monkeypatch):
    path = save(checkpointer, world, 1)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    fail = Mock(side_effect=OSError("No space left on device"))
    state = {"bad": object()} if point == "state" else {}
    if point == "tensors":
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem.torch.save", fail)
    if point == "hash":
        monkeypatch.setattr(spin.checkpoint.checkpointer, "file_sha256", fail)
    message = "state.json of step 2.*not JSON serializable.*must be JSON" if point == "state" else "No space left"
    for step in (1, 2):
        with pytest.raises(CheckpointError, match=message.replace("step 2", f"step {step}")):
            save(checkpointer, world, step, state=state)
    assert names(checkpointer) == ["step_00000001"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_optimizer_that_cannot_be_saved_says_so(checkpointer, world):
    from torchao.optim.subclass_8bit import OptimState8bit

    model = sharded(world)
    optimizer = adamw(model)
    optimizer.state[next(iter(model.parameters()))]["exp_avg"] = OptimState8bit.zeros((256,))
    with pytest.raises(CheckpointError, match="OptimState8bit, which torch.distributed.checkpoint cannot save"):
        save(checkpointer, world, 1, model, optimizer=optimizer)
    foreign = adamw(build())
    with pytest.raises(CheckpointError, match="Make the optimizer after the model is sharded"):
        save(checkpointer, world, 1, model, optimizer=foreign)


# ---- faults found when loading


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "metadata": (lambda path: flip(path / ".metadata"), r"\.metadata: damaged"),
    "tensors": (lambda path: flip(path / "__0_0.distcp"), r"__0_0\.distcp: damaged"),
    "state": (lambda path: flip(path / "state.json"), r"state\.json: damaged"),
    "manifest": (lambda path: flip(path / "manifest.json"), r"manifest\.json: damaged"),
    "missing": (lambda path: (path / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
    "short": (lambda path: os.truncate(path / "__0_0.distcp", 9), r"__0_0\.distcp has 9 bytes instead of \d+"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"no manifest\.json"),
    "no JSON": (lambda path: (path / "manifest.json").write_text('{"format": 1'), r"manifest\.json: not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, checkpointer, world):
    """For a checkpoint that is given; how ``auto`` passes over it: faults/test_checkpoints.py."""
    damage, message = DAMAGE[name]
    path = save(checkpointer, world, 2)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        checkpointer.load(checkpointer.latest(str(path)), model=sharded(world), optimizer=None, world=world)


def test_foreign_version_is_refused(checkpointer, world):
    path = save(checkpointer, world, 1)
    reseal(path, format=99)
    with pytest.raises(CheckpointError, match="format 99, this version of SPIN reads 1"):
        checkpointer.latest(str(path))


def test_other_model_is_refused_and_every_difference_named(checkpointer, world):
    path = save(checkpointer, world, 1)
    other = build()
    other.norm.scale = nn.Parameter(torch.ones(7))
    other.extra = nn.Linear(2, 2, bias=False)
    del other.layers[1].mlp_norm.scale
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load(path, model=other, optimizer=None, world=world)
    for fault in (
        "the checkpoint has no model.extra.weight",
        "the model has no model.layers.1.mlp_norm.scale",
        "model.norm.scale is [32], the model needs [7]",
    ):
        assert fault in str(caught.value)


def test_other_optimizer_is_refused(checkpointer, world):
    model = sharded(world)
    path = save(checkpointer, world, 1, model, optimizer=adamw(model))
    with pytest.raises(CheckpointError, match=r"saved with torch.optim.adamw.AdamW, .* is torch.optim.sgd.SGD"):
        checkpointer.load(path, model=model, optimizer=torch.optim.SGD(model.parameters()), world=world)
    parameters = list(model.parameters())
    split = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    with pytest.raises(CheckpointError, match="parameter groups"):
        checkpointer.load(path, model=model, optimizer=split, world=world)


# ---- hostile files


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def reseal(path: Path, **changes) -> None:
    """What an attacker would do: make the manifest's checksum fit its content."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    del manifest["checksum"]
    (path / "manifest.json").write_text(json.dumps(manifest | {"checksum": json_fingerprint(manifest)}))


@pytest.mark.parametrize("where", ["metadata", "broken metadata", "tensors", "objects"])
def test_hostile_files_run_no_code(where, checkpointer, world, tmp_path):
    """torch.distributed.checkpoint would unpickle the metadata, and objects among tensors, without restriction."""
    path, mark = save(checkpointer, world, 1), tmp_path / "attacked"
    data = path / "__0_0.distcp"
    size, message = data.stat().st_size, None
    if where == "metadata":
        (path / ".metadata").write_bytes(pickle.dumps(Attack(mark)))
        message = r"\.metadata: asks for posix\.mkdir"
    elif where == "broken metadata":
        (path / ".metadata").write_bytes(b"not a pickle")
        message = "damaged"
    elif where == "tensors":
        torch.save(Attack(mark), tmp_path / "attack")
        content = (tmp_path / "attack").read_bytes()
        data.write_bytes((content * (size // len(content) + 1))[:size])
    else:
        data.unlink()
        tensors = {f"model.{name}": tensor for name, tensor in build().state_dict().items()}
        dcp.save(tensors | {next(iter(tensors)): Attack(mark)}, storage_writer=dcp.FileSystemWriter(path))
        shutil.rmtree(mark, ignore_errors=True)
        message = r"BytesStorageMetadata|are not tensors"
    files = [file for file in path.iterdir() if file.name != "manifest.json"]
    reseal(path, files={each.name: {"bytes": each.stat().st_size, "sha256": file_sha256(each)} for each in files})
    with pytest.raises(CheckpointError, match=message):
        checkpointer.load(path, model=sharded(world), optimizer=None, world=world)
    assert not mark.exists()


# ---- before weights are loaded


def test_impossible_arguments():
    with pytest.raises(ConfigError, match="export_dtype is 'int8', expected fp32, bf16, fp16"):
        SPINCheckpointer("x", "y", "QWEN2", export_dtype="int8")
    with pytest.raises(ConfigError, match="model_type is 'CLIP_TEXT', expected one of"):
        SPINCheckpointer("x", "y", "CLIP_TEXT")


def test_validate(tiny_lm, tmp_path, monkeypatch, caplog):
    good = SPINCheckpointer(str(tiny_lm), str(tmp_path / "run"), "LLAMA3_2")
    good.validate()
    assert not caplog.records and not list(good.checkpoints_dir.iterdir())

    with pytest.raises(CheckpointError, match="no such folder"):
        SPINCheckpointer(str(tmp_path / "no"), str(tmp_path / "run"), "LLAMA3_2").validate()
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write \(.*/file is not a folder\)\. Change output_dir"):
        SPINCheckpointer(str(tiny_lm), str(tmp_path / "file" / "run"), "LLAMA3_2").validate()

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    good.validate()  # 0.9M parameters: a state and an export are 13 MB, three states 39 MB
    assert "can need" in caplog.text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(CheckpointError, match=r"1\.0 MiB free, but one .* of 918,656 parameters take 5\.3 MiB to"):
        good.validate()


# ---- the model


def test_load_model_and_export(tiny_lm, tmp_path, world):
    checkpointer = SPINCheckpointer(str(tiny_lm), str(tmp_path), "LLAMA3_2")
    model = tiny_lm_model().eval()
    checkpointer.load_model(model, world)
    path = checkpointer.export(model, 7, world)
    assert path == tmp_path / "iteration_007" / "hf_model"
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(theirs, model(ids), rtol=1e-4, atol=1e-4)


def test_export_asks_as_the_run_did(tiny_lm, tmp_path, world):
    """The config's chat template and tokenizer go with the model: transformers, vLLM and an evaluation render alike."""
    base, template = tmp_path / "base", "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    shutil.copytree(tiny_lm, base, ignore=shutil.ignore_patterns("tokenizer*"))
    tokenizer = ChatTokenizer(tiny_lm, chat_template=template)
    checkpointer = SPINCheckpointer(str(base), str(tmp_path), "LLAMA3_2")
    path = checkpointer.export(tiny_lm_model(), 0, world, tokenizer)
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert ChatTokenizer(path).encode_pair(talk) == tokenizer.encode_pair(talk)
    assert AutoTokenizer.from_pretrained(path).apply_chat_template(talk, tokenize=False) == (
        "[user] Hello<|im_end|>[assistant] Hi<|im_end|>"
    )
    own = checkpointer.export(tiny_lm_model(), 0, world, ChatTokenizer(tiny_lm))
    assert not (own / "chat_template.jinja").exists()
