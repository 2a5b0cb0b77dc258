"""JSON that is damaged or hostile: each reader refuses it in a line that names the file, in bounded time."""

import json
import os
import shutil

import pytest
import torch

from spin.checkpoint import SPINCheckpointer
from spin.cli import main
from spin.core.errors import SpinError
from spin.core.ranks import init_world
from spin.data import PairStore
from spin.data.chat import ChatTokenizer
from spin.generators.generator import GeneratorContext
from spin.generators.replay import ReplayGenerator
from spin.model.hf_folder import read_hf_config
from spin.run.log import MetricsFile
from tests.report_runs import write_run
from tests.two_ranks.tiny import sharded

BROKEN = {
    "cut off": (b'{"a": ', "Expecting value"),
    "no UTF-8": (b'{"a":\n "\xff"}', "line 2: byte 0xff is not UTF-8"),
    "two values of a key": (b'{"a": 1, "a": 2}', "the key 'a' has two values"),
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "a number has 5000 digits, more than 100"),
    "deep": (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "nested deeper than 100 levels"),
    "without end": (b'{"a": ' + b"[" * 200_000, "nested deeper than 100 levels"),
    "half a character": (b'{"a": "\\ud800"}', "a text holds half a surrogate pair"),
}
FILES = {
    "a list": (lambda file: file.write_text("[]"), "holds a JSON list, expected an object"),
    "a pipe": (os.mkfifo, "not a regular file"),
    "a folder": (lambda file: file.mkdir(), "not a regular file"),
    "no end": (lambda file: file.symlink_to("/dev/zero"), "not a regular file"),
    "large": (lambda file: os.truncate(os.open(file, os.O_CREAT | os.O_RDWR), 2**40), "larger than 128 MiB"),
}


@pytest.fixture
def readers(tiny_lm, tmp_path):
    """Each JSON file that a run or a command reads, with what reads it."""
    world = init_world("cpu")
    checkpointer = SPINCheckpointer("unused", str(tmp_path / "run"), "LLAMA3_2")
    state = checkpointer.save(step=1, model=sharded(world), optimizer=None, state={}, world=world)
    checkpointer.close()
    store = PairStore.open_or_create(tmp_path / "store", {"opponent": "a"}, 1)
    model = shutil.copytree(tiny_lm, tmp_path / "model")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    return {
        store.path / "manifest.json": lambda: PairStore.open(store.path),
        state / "manifest.json": lambda: checkpointer.latest(str(state)),
        model / "config.json": lambda: read_hf_config(model),
        model / "model.safetensors.index.json": lambda: read_hf_config(model),
        model / "tokenizer.json": lambda: ChatTokenizer(model),
        model / "tokenizer_config.json": lambda: ChatTokenizer(model),
    }


@pytest.mark.parametrize("name", [*BROKEN, *FILES])
def test_every_reader_refuses_it_by_name(readers, name):
    for file, read in readers.items():
        read()
        whole = file.read_bytes()
        file.unlink()
        if name in FILES:
            make, message = FILES[name]
            make(file)
        else:
            content, message = BROKEN[name]
            file.write_bytes(content)
        with pytest.raises(SpinError) as refusal:
            read()
        assert str(file) in str(refusal.value) and message in str(refusal.value)
        file.rmdir() if file.is_dir() else file.unlink()
        file.write_bytes(whole)


@pytest.mark.parametrize("name", BROKEN)
def test_a_replay_file_is_refused_by_line(tmp_path, name):
    content, message = BROKEN[name]
    file = tmp_path / "responses.jsonl"
    file.write_bytes(b'{"prompt_ids": [1], "generated_ids": [2]}\n' + content.replace(b"\n", b" "))
    with pytest.raises(SpinError) as refusal:
        ReplayGenerator(GeneratorContext(None, torch.device("cpu"), 16, str), file)
    assert f"{file}:2: " in str(refusal.value) and message.removeprefix("line 2: ") in str(refusal.value)


@pytest.mark.parametrize("name", BROKEN)
def test_lines_of_metrics_that_are_damaged_are_passed_over(tmp_path, name, capsys):
    """When a run resumes, and when it is looked at."""
    write_run(tmp_path)
    file = tmp_path / "metrics.jsonl"
    whole = [line for line in file.read_bytes().splitlines() if json.loads(line)["step"] <= 5]
    file.write_bytes(b"\n".join((*whole, BROKEN[name][0])))
    assert main(["report", str(tmp_path)]) == 0
    MetricsFile(file, from_step=5)
    assert file.read_bytes().splitlines() == whole
