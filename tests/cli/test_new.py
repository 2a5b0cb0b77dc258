"""`spin new`: three formats of data, three methods, what is found and chosen, and what is refused."""

import argparse
import json
import math
import re
import shutil

import pytest
import spin_recipe
import torch
import yaml

from spin import SPIN
from spin.cli import main
from spin.cli.draft import Machine, draft
from spin.cli.rates import kind_of_gpu
from spin.core.command import spin_command
from spin.core.errors import ConfigError, DataError
from spin.data import PairStore
from tests.data.test_chat_templates import QWEN3
from tests.families import HF_NF4_SHAPE
from tests.hf_folders import write_folder
from tests.recipes.helpers import REPO, TINY_LM, metrics_of

TALKS = [json.loads(line) for line in (REPO / "examples/quickstart/jargon_train.jsonl").read_text().splitlines()]
TURNS = [[message["content"] for message in row["messages"]] for row in TALKS]
# name: a row with a question and an answer, and what the config must say of its columns
FORMATS = {
    "messages": (
        lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        None,
    ),
    "alpaca": (lambda q, a: {"instruction": "Say what it is.", "input": q, "output": a}, None),
    "columns": (lambda q, a: {"Question": q, "Answer": a, "n": 1}, {"prompt": "Question", "response": "Answer"}),
}


def write_data(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def jargon(path, count, form="messages"):
    """That many rows of the quickstart's data in a format."""
    return write_data(path, [FORMATS[form][0](*turns[-2:]) for turns in TURNS[:count]])


def new(capsys, *words):
    """Exit code, the lines of stdout, stderr."""
    code = main(["new", *map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out.splitlines(), err


@pytest.fixture
def folder(tmp_path):
    """Makes a tiny folder of a family, with the tests' tokenizer."""

    def make(name, **changes):
        path = tmp_path / name
        write_folder(name, path, vocab_size=1088, **{"max_position_embeddings": 256} | changes)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY_LM / file, path)
        return path

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "form"),
    [("qwen3", "full", "messages"), ("olmo2", "lora", "columns"), ("llama", "qlora", "alpaca"),
     ("qwen3_moe", "lora", "messages")],
)  # fmt: skip
def test_what_is_written_is_valid_and_runs(name, method, form, folder, tmp_path, capsys, monkeypatch):
    """At most 20 lines, none edited; the run's first loss is ln 2, and it validates on what is held out."""
    model, out = folder(name, **(HF_NF4_SHAPE if method == "qlora" else {})), tmp_path / "my.yaml"
    data = jargon(tmp_path / "mine.jsonl", 24, form)
    words = ["--model", model, "--data", data, "--out", out, f"output_dir={tmp_path / 'run'}"]
    code, lines, err = new(capsys, *words, *([f"--{method}"] if method != "full" else []))
    assert code == 0 and len(lines) <= 13, err
    sft, spin = (spin_command("run", recipe, "--config", out) for recipe in ("spin_sft", "spin_recipe"))
    assert [line[10:].partition("    #")[0] for line in lines[-3:]] == [spin_command("validate", out), sft, spin]
    written = yaml.safe_load(out.read_text())
    assert len(out.read_text().splitlines()) <= 20 and written["dataset"].get("column_map") == FORMATS[form][1]
    assert ("quantize_base" in written["model"], "lora_rank" in written["model"]) == (
        method == "qlora",
        method != "full",
    )
    assert main(["validate", str(out)]) == 0, capsys.readouterr().out

    argv = ["--config", str(out), "max_iterations=1", "max_epochs=1", "sampling.max_new_tokens=8"]
    monkeypatch.setattr("sys.argv", ["spin_recipe.py", *argv])
    with pytest.raises(SystemExit) as end:
        spin_recipe.recipe_main()
    assert not end.value.code
    rows = metrics_of(tmp_path / "run")
    assert next(row["loss"] for row in rows if "loss" in row) == pytest.approx(math.log(2), abs=1e-5)
    played = list(PairStore.open(tmp_path / "run/iteration_000/responses").pairs())
    split = next(line.split() for line in lines if line.startswith("split"))
    assert len(played) <= int(split[1]) and "val_loss" in rows[0]
    assert [row["step"] for row in rows if "loss" in row][-1] == int(split[1]) // written["global_batch_size"]


def test_lengths_split_and_steps_follow_from_the_data(tmp_path, capsys):
    """Of 400 rows 1 % are longer than the limit; 8 bad ones are skipped; epochs have 8 steps or more."""
    rows = [FORMATS["columns"][0]("w " * 10, "w " * (40 if i % 100 else 300)) for i in range(400)]
    data = write_data(tmp_path / "mine.jsonl", [*rows, *[{"Question": "q", "Answer": ""}] * 8])
    out = tmp_path / "my.yaml"
    code, lines, err = new(capsys, "--model", TINY_LM, "--data", data, "--out", out)
    assert code == 0, err
    written = yaml.safe_load(out.read_text())
    section = written["dataset"]
    assert section["max_response_tokens"] % 16 == 0 and section["max_response_tokens"] < 300
    assert (section["on_long_response"], section["on_bad_row"]) == ("drop", "skip")
    assert any("of 400 1.0% are longer and dropped" in line for line in lines)
    assert any("408 rows, 400 of them in the format prompt_response, prompt is the column" in line for line in lines)
    assert any("8 cannot be used and are skipped: mine.jsonl:401, mine" in line for line in lines)
    trained, held_out = (int(next(line for line in lines if line.startswith("split")).split()[i]) for i in (1, 6))
    assert trained + held_out == 396 and trained // written["global_batch_size"] >= 8 > trained // 64
    assert written.get("sampling", {"max_new_tokens": 256})["max_new_tokens"] == section["max_response_tokens"]
    assert main(["validate", str(out)]) == 0
    told = capsys.readouterr().out
    assert f"{trained} samples of 408 rows" in told and f"{held_out} samples, held out" in told


def test_how_many_rows_have_which_format_is_said(tmp_path, capsys):
    """A run reads them all."""
    forms = [form for form, count in (("messages", 12), ("alpaca", 20)) for _ in range(count)]
    rows = [FORMATS[form][0](*turns[-2:]) for form, turns in zip(forms, TURNS, strict=False)]
    data, out = write_data(tmp_path / "mine.jsonl", rows), tmp_path / "my.yaml"
    code, lines, err = new(capsys, "--model", TINY_LM, "--data", data, "--out", out)
    assert code == 0 and "data      32 rows of several formats: alpaca 20, messages 12" in lines, err
    (split,) = (re.findall(r"\d+", line) for line in lines if line.startswith("split"))
    assert split[2] == split[1], "there are fewer than are answered of many"
    assert main(["validate", str(out)]) == 0 and " of 32 rows" in capsys.readouterr().out
    transform = "dataset.message_transform._component_=torchtune.data.OpenAIToMessages"
    words = ("--model", TINY_LM, "--data", jargon(tmp_path / "talks.jsonl", 20), "--out", out, "--force", transform)
    code, lines, err = new(capsys, *words)
    assert code == 0 and "data      20 rows by dataset.message_transform" in lines, err


def test_what_the_user_sets_is_kept(tmp_path, capsys):
    data, out = jargon(tmp_path / "mine.jsonl", 40), tmp_path / "my.yaml"
    words = ("--model", TINY_LM, "--data", data, "--out", out)
    given = ("dataset.max_response_tokens=90", "global_batch_size=2", "loss.beta=0.2", "generator.batch_size=4")
    assert new(capsys, *words, *given, "validation.spin=true", "dataset.turns=all")[0] == 0
    written = yaml.safe_load(out.read_text())
    assert written["dataset"]["max_response_tokens"] == 90 and written["global_batch_size"] == 2
    assert written["loss"] == {"beta": 0.2} and written["generator"] == {"batch_size": 4}
    code, _, err = new(capsys, *words)
    assert code == 1 and "is there already. Choose another name by --out, or give --force" in err
    assert yaml.safe_load(out.read_text()) == written
    assert new(capsys, *words, "--force")[0] == 0 and yaml.safe_load(out.read_text()) != written


def test_a_template_that_reasons_is_told_not_to_where_responses_do_not(tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "my.yaml"
    shutil.copytree(TINY_LM, model)
    (model / "chat_template.jinja").write_text(QWEN3)
    words = ("--model", model, "--data", jargon(tmp_path / "mine.jsonl", 20), "--out", out)
    code, lines, err = new(capsys, *words)
    assert code == 0 and any("enable_thinking=false: the model would reason" in line for line in lines), err
    assert yaml.safe_load(out.read_text())["tokenizer"] == {"template_options": {"enable_thinking": False}}
    assert main(["validate", str(out)]) == 0, capsys.readouterr().out


def sized(tmp_path, machine, method=None, rows=None, overrides=("compute_dtype=bf16",)):
    """The config of a model of 4B parameters (Qwen3's shape) on a machine, for the quickstart's data or other rows."""
    from tests.hf_folders import folder_config

    shape = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40_960}
    folder_config("qwen3", **shape, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LM / file, tmp_path / "model")
    data = jargon(tmp_path / "mine.jsonl", 40) if rows is None else write_data(tmp_path / "mine.jsonl", rows)
    arguments = argparse.Namespace(
        model=str(tmp_path / "model"), data=str(data), method=method, out=tmp_path / "x.yaml"
    )
    text, report = draft(arguments, machine, list(overrides))
    assert len(report) <= 9 and any(
        re.fullmatch(r"time .* s an iteration \(generate .*, .* in all; .*", line) for line in report
    )
    return yaml.safe_load(text)


@pytest.mark.slow
def test_rows_checkpointing_and_optimizer_fit_the_memory(tmp_path):
    """16 bytes a trained weight are 60 GiB, 10 with 8-bit moments 37: one GPU of 74, one of 46, none of 22; adapters
    need a fraction; on eight GPUs nothing is given up."""

    def gpu(gib, ranks=1):
        return Machine("a GPU", ranks, gib, has_gpu=True, kind="H100")

    large = sized(tmp_path, gpu(74))
    assert large["enable_activation_checkpointing"] and large["optimizer"]["fused"] and large["compile"]
    medium = sized(tmp_path, gpu(46))
    assert medium["optimizer"]["_component_"] == "spin.training.AdamW8bit" and "fused" not in medium["optimizer"]
    assert medium["optimizer"]["lr"] == large["optimizer"]["lr"]
    with pytest.raises(ConfigError, match=r"full needs .* GiB to train and .* Give --lora or --qlora, more GPUs"):
        sized(tmp_path, gpu(22))
    assert sized(tmp_path, gpu(22), "qlora")["model"]["quantize_base"]
    assert "enable_activation_checkpointing" not in sized(tmp_path, gpu(74, ranks=8))


@pytest.mark.slow
def test_rows_are_as_long_as_memory_and_a_ranks_part_of_a_batch_allow(tmp_path):
    """Batches of 20 pairs of 400 + 2 x 1,000 words, over 24,576 tokens on one GPU and under 12,288 on each of eight.
    Memory decides down to checkpointing; a dense mask costs the square of a row, so rows stay short with it."""
    rows = [FORMATS["columns"][0]("w " * 400, "w " * 1000)] * 40

    def row_tokens(gib, ranks=1, *overrides):
        machine, changes = Machine("a GPU", ranks, gib, has_gpu=True, kind="H100"), ("global_batch_size=20", *overrides)
        written = sized(tmp_path, machine, "lora", rows, changes)
        return written["pairs"].get("row_tokens", 8192), written.get("enable_activation_checkpointing", False)

    bf16 = "compute_dtype=bf16"
    found = {gib: row_tokens(gib, 1, bf16) for gib in (127, 71, 50, 35, 20)}
    assert found == {127: (24576, False), 71: (16384, False), 50: (12288, False), 35: (4096, False), 20: (24576, True)}
    assert row_tokens(127, 8, bf16)[0] == row_tokens(127, 1, bf16, "attention=dense")[0] == 8192
    assert row_tokens(127, 1, "compute_dtype=fp32")[0] == 8192
    assert row_tokens(127, 1, bf16, "pairs.row_tokens=2048")[0] == 2048


def test_kinds_of_gpus_are_known_by_the_drivers_names():
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100-80", "NVIDIA A100-PCIE-40GB": "A100-40"}
    assert {name: kind_of_gpu(name) for name in names} == names and kind_of_gpu("Tesla T4") is None


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            ("a.jsonl", "b.jsonl"),
            "a.jsonl, b.jsonl. Name the folder that they are in, or a pattern in quotes: '*.jsonl'.",
        ),
        (
            tuple(f"part=1/{i}.csv" for i in range(5)),  # as a shell expands part=1/*.csv
            "part=1/0.csv, part=1/1.csv, part=1/2.csv and 2 more. Name the folder that they are in, or a pattern in "
            "quotes: 'part=1/*.csv'.",
        ),
        (("x/a.jsonl", "y/b.jsonl"), "or a pattern in quotes: 'FOLDER/*.jsonl'."),
        (
            ("org/one", "org/two"),
            "org/one, org/two. Give one of them, and add the others to the config with spin.data.mi",
        ),
        (("a.csv", "b.jsonl"), "a.csv, b.jsonl. Give one of them, and add"),  # no pattern has both
    ],
)
def test_several_sources_are_refused_with_what_to_do(sources, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in sources[: 0 if "org" in sources[0] else None]:
        (tmp_path / source).parent.mkdir(exist_ok=True)
        jargon(tmp_path / source, 12)
    code, lines, err = new(capsys, "--model", TINY_LM, "--data", *sources, "--out", "my.yaml")
    assert code == 1 and lines == [] and "--data takes one source; there are " in err and message in err
    with pytest.raises(ConfigError, match=re.escape(message)):
        SPIN(model=TINY_LM, data=list(sources))
    code, _, err = new(capsys, "--model", TINY_LM, "--data", sources[0], "lora")
    assert code == 1 and err == "error: override 'lora': expected key=value, or ~key to remove a key.\n"


def test_the_pattern_that_is_named_works(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        jargon(tmp_path / f"{name}.jsonl", 12)
    code, lines, err = new(capsys, "--model", TINY_LM, "--data", "*.jsonl")
    assert code == 0 and "data      24 rows in the format messages" in lines, err


def test_what_is_refused(tmp_path, capsys):
    data, out = jargon(tmp_path / "mine.jsonl", 20), tmp_path / "my.yaml"
    unknown = write_data(tmp_path / "unknown.jsonl", [{"foo": "a", "bar": "b"}])
    unusable = write_data(tmp_path / "unusable.jsonl", [{"prompt": "a", "response": ""}] * 3)
    (tmp_path / "mamba").mkdir()
    (tmp_path / "mamba/config.json").write_text('{"model_type": "mamba2", "vocab_size": 8}')
    found = torch.cuda.device_count()
    for words, text in {
        ("--data", tmp_path / "no.jsonl"): "no.jsonl does not exist",
        ("--data", unknown): "unknown.jsonl:1: columns foo, bar; expected messages",
        ("--data", unusable): "none of its 3 rows can be used; the first one has the columns prompt, response",
        ("--data", jargon(tmp_path / "one.jsonl", 1)): "too few to train on some and hold out others",
        ("--model", tmp_path / "nowhere"): "nowhere",
        ("--model", "nobody/nothing"): "'nobody/nothing' is no folder here, and it is not in the cache",
        ("--model", tmp_path / "mamba"): "mamba2",
        ("--gpus", found + 1): f"--gpus {found + 1}: expected 0 to {found}, the GPUs that torch finds here",
        ("--out", tmp_path / "no/my.yaml"): "no such folder",
        ("dataset.streaming=true", "dataset.limit=4"): "one data set that is read whole",
        ("dataset.max_response_tokens=1", "x.y=1"): "x: unknown key",
    }.items():
        base = {"--model": TINY_LM, "--data": data, "--out": out}
        options = base | (dict([words]) if str(words[0]).startswith("--") else {})
        rest = [] if str(words[0]).startswith("--") else words
        code, _, err = new(capsys, *(word for pair in options.items() for word in pair), *rest)
        assert code == 1 and text in err, (words, err)
        assert not out.exists()
    with pytest.raises(DataError, match="none of its 3 rows"):
        draft(argparse.Namespace(model=str(TINY_LM), data=str(unusable), method=None, out=out), Machine.here(0), [])
