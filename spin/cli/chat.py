"""``spin chat``: talk to what a run has made, or to two models side by side."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.cli import parser_of
from spin.core.errors import OutputError, SpinError
from spin.core.terminal import fill, printable, wrap

if TYPE_CHECKING:
    from spin.cli.chat_model import Answer, ChatModel

_COMMANDS = "/reset begins a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."
_WIDE = 100  # columns of a terminal in which two answers stand side by side


def main(argv: Sequence[str]) -> int:
    """Answers every line of the standard input."""
    parser = parser_of("chat", f"Talk to a model: every line is a message. {_COMMANDS}")
    where = "output_dir of a run, folder of a model or of an adapter, or a name on huggingface.co"
    parser.add_argument("model", metavar="RUN_OR_FOLDER", help=where)
    parser.add_argument("--iteration", type=int, metavar="N", help="of the run; default: the last that is finished")
    against = (
        "answers too: another run or folder (after spin_sft: RUN/sft), N for that iteration of the run, "
        "or `base` for the model as it was before all training"
    )
    parser.add_argument("--against", metavar="OTHER", help=against)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer; default: 512")
    temperature = "0 is greedy; default: what the model's generation_config.json says"
    parser.add_argument("--temperature", type=float, metavar="T", help=temperature)
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1 or not (arguments.temperature or 0) >= 0:  # NaN is not
        parser.error("--max-new-tokens must be at least 1, --temperature at least 0")
    models = _load(arguments.model, arguments.iteration, arguments.against)
    start = [{"role": "system", "content": arguments.system}] if arguments.system else []
    conversations: list[list[Any]] = [start for _ in models]
    code = 0
    for message in _messages():
        if message == "/exit":
            break
        if message == "/reset":
            conversations = [start for _ in models]
            continue
        if re.fullmatch(r"/\w+", message):
            print(f"error: no command {message!r}. {_COMMANDS}", file=sys.stderr)
            code = 1
            continue
        if re.search("[\ud800-\udfff]", message):
            print("error: this message is not UTF-8.", file=sys.stderr)
            code = 1
            continue
        asked = [[*conversation, {"role": "user", "content": message}] for conversation in conversations]
        answers: list[Answer] = []
        try:
            answers = [
                model.answer(messages, arguments.max_new_tokens, arguments.temperature)
                for model, messages in zip(models, asked, strict=True)
            ]
            _show(models, answers)
        except SpinError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            answers, code = [], 1
        except KeyboardInterrupt:
            print("\n(stopped)\n")
        if answers and all(answer.text for answer in answers):  # else a message that was interrupted is forgotten
            replies = [[{"role": "assistant", "content": answer.text}] for answer in answers]
            conversations = [messages + reply for messages, reply in zip(asked, replies, strict=True)]
    return 0 if sys.stdin.isatty() else code


def _load(model: str, iteration: int | None, against: str | None) -> list[ChatModel]:
    from spin.core.hub import model_folder
    from spin.model.hf_folder import ADAPTER_CONFIG, CONFIG
    from spin.run.folder import exported_model, read_config, run_of

    def find(name: str, iteration: int | None = None) -> Path:
        path = Path(model_folder(name, "model"))
        if not any((path / file).is_file() for file in (CONFIG, ADAPTER_CONFIG)):
            return exported_model(path, iteration)[1]
        if iteration is not None:
            raise OutputError(f"{path}: the folder of a model; --iteration chooses among those of a run.")
        return path

    folder, other = find(model, iteration), None
    if against is not None and (against == "base" or against.isdecimal()):
        run = run_of(folder)
        cfg = read_config(run) if run else None
        if run is None or cfg is None:
            raise OutputError(f"--against {against}: {folder} is no model of a run. Name the other folder.")
        if against == "base":
            other = Path(model_folder(str(cfg.checkpointer.checkpoint_dir), "checkpointer.checkpoint_dir"))
        else:
            other = exported_model(run, int(against))[1]
    elif against is not None:
        other = find(against)
    from spin.cli.chat_model import ChatModel  # loads torch, when both folders are found

    first = ChatModel(folder)
    return [first] if other is None else [first, ChatModel(other, like=first if against == "base" else None)]


def _messages() -> Iterator[str]:
    """What is typed, or the lines that are piped; without the empty ones."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    import readline  # noqa: F401 - gives input() its editing and history

    print(_COMMANDS)

    while True:
        try:
            if message := input("> ").strip():
                yield message
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)")


def _show(models: Sequence[ChatModel], answers: Sequence[Answer]) -> None:
    """Prints answers as they come: two of them in columns where the terminal is wide, else one below the other."""
    width = shutil.get_terminal_size().columns
    if len(models) == 2 and width >= _WIDE:
        _show_in_columns([model.name for model in models], answers, (width - 3) // 2)
    else:
        for model, answer in zip(models, answers, strict=True):
            if len(models) == 2:
                print(f"[{model.name}]")
            for piece in answer:
                print(piece, end="", flush=True)
            print("\n", flush=True)
    truncated = [model.name for model, answer in zip(models, answers, strict=True) if answer.is_truncated]
    if truncated:
        print(f"(truncated by --max-new-tokens: {'; '.join(truncated)})\n", file=sys.stderr)


def _show_in_columns(names: Sequence[str], answers: Sequence[Answer], width: int) -> None:
    """Prints a row as soon as both answers have its line, or one of them has ended."""
    columns = [_lines(answer, width) for answer in answers]
    try:
        for left, right in chain([names, ("-" * width, "-" * width)], zip_longest(*columns, fillvalue="")):
            print(f"{fill(left, width)} | {right}".rstrip(), flush=True)
        print()
    finally:
        for column in columns:
            column.close()


def _lines(pieces: Iterable[str], width: int) -> Generator[str]:
    """A text that comes in pieces as lines of ``width`` cells at most, each as soon as it is complete."""
    wrapped = partial(wrap, width=width, drop_whitespace=False, replace_whitespace=False)
    begun = ""
    for piece in chain(pieces, ["\n"]):
        *ended, begun = (begun + piece).split("\n")
        *full, begun = wrapped(begun) or [""]
        lines = [part for line in ended for part in wrapped(line) or [""]] + full
        yield from map(str.rstrip, lines)
