"""`spin chat`: what it answers is what transformers answers, in pipes, in columns and in a terminal."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from spin.cli import main
from spin.cli.chat_model import ChatModel
from spin.core.dtypes import DTYPES, fast_dtype
from spin.core.terminal import cells
from tests.recipes.helpers import TINY_LORA, run


class Spoken(list):
    """Pieces of an answer, and what else an answer has."""

    text, is_truncated = "said", False


QUESTIONS = ['What does "copyleft" mean?', "Shorter, please."]
SYSTEM = "Answer in one sentence."


@pytest.fixture(scope="module")
def adapted(tiny_lm, tmp_path_factory):
    """A LoRA run of two iterations on a base without a chat template, which the config brings."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny_lm, folder / "base")
    tokenizer = json.loads((tiny_lm / "tokenizer_config.json").read_text())
    (folder / "chatml.jinja").write_text(tokenizer.pop("chat_template"))
    (folder / "base/tokenizer_config.json").write_text(json.dumps(tokenizer))
    changes = {
        "checkpointer.checkpoint_dir": folder / "base", "tokenizer.path": folder / "base", "max_iterations": 2,
        "tokenizer.chat_template": folder / "chatml.jinja", "checkpointer.export_dtype": "fp32", "max_epochs": 1,
        "validation_dataset": "null", "limit_train_batches": 2, "optimizer.lr": 1e-2,
    }  # fmt: skip
    run(folder / "run", *(f"{key}={value}" for key, value in changes.items()), config=TINY_LORA)
    return folder / "run"


def chat(monkeypatch, capsys, lines, *arguments, code=0):
    """What is printed when these lines are piped in."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", "--max-new-tokens", "24", "--temperature", "0", *map(str, arguments)]) == code
    return capsys.readouterr()


@pytest.fixture(scope="module")
def expected(adapted):
    """What transformers answers to both questions in one conversation, by the name of a model."""

    def answers(weights):
        tokenizer = AutoTokenizer.from_pretrained(adapted / "iteration_001/hf_model")
        model = AutoModelForCausalLM.from_pretrained(weights, dtype=DTYPES[fast_dtype(None)])
        messages = [{"role": "system", "content": SYSTEM}]
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
            ids = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            messages.append({"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)})
        return [message["content"] for message in messages if message["role"] == "assistant"]

    folders = {name: adapted / name / "hf_model" for name in ("iteration_000", "iteration_001")}
    found = {name: answers(folder) for name, folder in (folders | {"base": adapted.parent / "base"}).items()}
    assert len({tuple(texts) for texts in found.values()}) == 3  # every model says something else
    return found


@pytest.mark.parametrize(
    ("model", "options", "name"),
    [
        ("run", [], "iteration_001"),
        ("run", ["--iteration", "0"], "iteration_000"),
        ("run/iteration_000/hf_model", [], "iteration_000"),
        ("run/iteration_001/adapter", [], "iteration_001"),
    ],
)
def test_a_conversation(adapted, expected, monkeypatch, capsys, model, options, name):
    """The second message is answered with the first in mind; after /reset it is not; /exit leaves what follows."""
    lines = [*QUESTIONS, "", "/reset", QUESTIONS[0], "/exit", QUESTIONS[1]]
    out = chat(monkeypatch, capsys, lines, adapted.parent / model, "--system", SYSTEM, *options).out
    first, second = expected[name]
    assert out == f"{first}\n\n{second}\n\n{first}\n\n"


@pytest.mark.parametrize(
    ("against", "name", "title"),
    [
        ("0", "iteration_000", "run, iteration_000"),
        ("base", "base", "base"),
        ("run/iteration_000/adapter", "iteration_000", "run, iteration_000"),
    ],
)
def test_two_models(adapted, expected, monkeypatch, capsys, against, name, title):
    """One below the other, or in columns where there is room; each has a conversation of its own."""
    other = adapted.parent / against if "/" in against else against
    options = (adapted, "--against", other, "--system", SYSTEM)
    both = list(zip(expected["iteration_001"], expected[name], strict=True))
    monkeypatch.setenv("COLUMNS", "99")
    out = chat(monkeypatch, capsys, QUESTIONS, *options).out
    assert out == "".join(f"[run, iteration_001]\n{left}\n\n[{title}]\n{right}\n\n" for left, right in both)
    monkeypatch.setenv("COLUMNS", "100")
    rows = chat(monkeypatch, capsys, QUESTIONS, *options).out.split("\n")
    assert all(row == "" or row[48:51].ljust(3) == " | " for row in rows)
    assert rows[0] == f"{'run, iteration_001':<48} | {title}"
    blocks = "\n".join(rows).strip().split("\n\n")
    for block, (left, right) in zip(blocks, both, strict=True):
        lines = block.split("\n")[2:]
        for column, text in ((slice(48), left), (slice(51, None), right)):
            assert " ".join(line[column].strip() for line in lines).split() == text.split()


def test_what_a_terminal_would_obey_is_escaped(adapted, expected, tmp_path, monkeypatch, capsys):
    """A tokenizer that writes byte 27; and a truncated answer is said to be one, not in its text."""
    shutil.copytree(adapted / "iteration_001/hf_model", tmp_path / "model")
    file = tmp_path / "model/tokenizer.json"
    content = json.loads(file.read_text())
    red = {"type": "Replace", "pattern": {"String": "e"}, "content": "\x1b[31me"}
    file.write_text(json.dumps(content | {"decoder": {"type": "Sequence", "decoders": [content["decoder"], red]}}))
    out = chat(monkeypatch, capsys, [QUESTIONS[0]], tmp_path / "model", "--system", SYSTEM).out
    assert out == expected["iteration_001"][0].replace("e", "\\x1b[31me") + "\n\n" and "\\x1b" in out
    err = chat(monkeypatch, capsys, [QUESTIONS[0]], tmp_path / "model", "--max-new-tokens", "2").err
    assert err == "(truncated by --max-new-tokens: model)\n\n"


INTERRUPTS = """
import random, signal, sys, time
import torch
from spin.cli.chat_model import Answer
from spin.data import ChatTokenizer

class Talker:
    def generate(self, streamer, stopping_criteria):
        ids = torch.zeros(1, 1, dtype=torch.long)
        while not stopping_criteria[0](ids).all():
            streamer.on_finalized_text("word ")
            time.sleep(1e-4)
        return ids

draw, tokenizer, interrupts = random.Random(0), ChatTokenizer(sys.argv[1]), 0
signal.signal(signal.SIGALRM, signal.default_int_handler)
for _ in range(1000):
    answer = Answer(Talker(), tokenizer, {})
    try:
        for _ in answer:
            if answer.text == "word ":
                signal.setitimer(signal.ITIMER_REAL, draw.uniform(1e-3, 3e-3))
    except KeyboardInterrupt:
        interrupts += 1
print(interrupts)
"""


def test_an_interrupt_at_any_moment_ends_an_answer(tiny_lm, subprocess_env):
    """A thousand of them; a few broke a queue whose lock Python code takes and releases, or left it taken for ever."""
    command = [sys.executable, "-c", INTERRUPTS, str(tiny_lm)]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, timeout=180)
    assert done.stdout == "1000\n", done.stderr


def test_an_interrupt_before_an_answer_begins_forgets_the_message(adapted, expected, monkeypatch, capsys):
    answer, models = ChatModel.answer, []

    def interrupted_at_first(model, *arguments):
        models.append(model)
        if len(models) == 1:
            raise KeyboardInterrupt
        return answer(model, *arguments)

    monkeypatch.setattr(ChatModel, "answer", interrupted_at_first)
    out = chat(monkeypatch, capsys, ["forgotten", QUESTIONS[0]], adapted, "--system", SYSTEM).out
    assert out == f"\n(stopped)\n\n{expected['iteration_001'][0]}\n\n"


SLOWLY = """
import sys, time
from torch.nn.modules.module import register_module_forward_pre_hook
from spin.cli import main
register_module_forward_pre_hook(lambda module, _: time.sleep(0.02) if hasattr(module, "lm_head") else None)
sys.exit(main())
"""


@pytest.mark.slow
def test_an_interrupted_answer_in_a_terminal(adapted, subprocess_env):
    """Ctrl-C ends the answer, not the program, which waits for the next message; Ctrl-D ends it. Of a model so slow
    that its answer goes on for seconds: noise, which hardly any stop token ends."""
    terminal, other_end = pty.openpty()
    words = ["chat", str(adapted), "--temperature", "9", "--max-new-tokens", "400"]
    command = [sys.executable, "-c", SLOWLY, *words]
    process = subprocess.Popen(
        command, env=subprocess_env, stdin=other_end, stdout=other_end, stderr=other_end, start_new_session=True
    )
    os.close(other_end)
    seen = ""

    def wait_for(text):
        nonlocal seen
        deadline = time.monotonic() + 120
        while text not in seen:
            assert time.monotonic() < deadline and process.poll() is None, seen
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    try:
        for _ in range(2):
            wait_for("> ")
            os.write(terminal, b"/rest\n")
            wait_for("error: no command '/rest'. /reset begins a new conversation")
            wait_for("> ")
            os.write(terminal, b"Hello\n")
            wait_for("Hello\r\n")
            wait_for(" ")
            os.kill(process.pid, signal.SIGINT)
            wait_for("(stopped)")
        wait_for("> ")
        os.write(terminal, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no such folder; expected the output_dir of a run"),
        (["run", "--iteration", "2"], "iteration 2 has no model; finished are 0, 1"),
        (["base", "--against", "base"], "base is no model of a run"),
        (["run", "--against", "\N{SUPERSCRIPT TWO}"], "\N{SUPERSCRIPT TWO}: no such folder"),
        (["base", "--iteration", "0"], "--iteration chooses among those of a run"),
        (["base"], "there as chat_template.jinja"),
        (["damaged"], "has no weights for model.norm.weight"),
    ],
)
def test_what_cannot_chat(adapted, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(adapted.parent)
    if arguments == ["damaged"]:
        folder = shutil.copytree("run/iteration_001/hf_model", "damaged")
        tensors = load_file(folder + "/model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder + "/model.safetensors", {"format": "pt"})
    assert words in chat(monkeypatch, capsys, [], *arguments, code=1).err


def test_columns_of_wide_text_are_aligned(adapted, monkeypatch, capsys):
    """Wide names and answers, as the tokenizer of a Chinese model writes them."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(ChatModel, "answer", lambda *_: Spoken(["\u6c49\u5b57", " \uff0c\u304b\u306a" * 30, " end"]))
    rows = chat(monkeypatch, capsys, [QUESTIONS[0]], adapted, "--against", "0").out.split("\n")[2:-2]
    assert len(rows) >= 4 and {cells(row.partition(" | ")[0]) for row in rows} == {48}
    assert "".join(row.partition(" | ")[0].strip() for row in rows).count("\u304b\u306a") == 30


def test_a_conversation_that_is_too_long(adapted, monkeypatch, capsys):
    """The message is dropped with its reason, and the conversation goes on; a script sees it in the exit code."""
    out, err = chat(monkeypatch, capsys, ["word " * 600, QUESTIONS[0]], adapted, code=1)
    assert "the model reads 512. Type /reset" in err and out.strip()


def test_a_message_that_is_no_text(adapted, monkeypatch, capsys):
    """Bytes of another encoding: the message is refused, not the template."""
    out, err = chat(monkeypatch, capsys, ["caf\udce9", QUESTIONS[0]], adapted, code=1)
    assert err.startswith("error: this message is not UTF-8.\n") and out.strip()
