"""Every reader of foreign files and replies, with whole input to damage and a way in that a run or a command takes."""

import gzip
import json
import logging
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import spin_recipe
import torch
import yaml

from spin.checkpoint import SPINCheckpointer
from spin.config import SPINConfig, complete, load_config
from spin.core.errors import SpinError
from spin.core.files import file_sha256, json_fingerprint
from spin.core.ranks import init_world
from spin.data import ChatTokenizer, Pair, PairStore, Response, prompt_dataset
from spin.generators import GeneratorContext, SamplingParams, VLLMServerGenerator
from spin.generators.replay import ReplayGenerator
from spin.model.hf import stored_elements
from spin.model.hf_folder import read_hf_config
from spin.report import read_run, render
from spin.run.log import MetricsFile
from tests.data.test_read import Letters
from tests.false_server import VLLM, FalseServer, headers
from tests.faults.hostile import BEYOND_REPAIR, VALUES, bend, bend_bytes, bend_table, bend_text, time_limit
from tests.recipes.helpers import CONFIG, TINY_LM, tiny_config
from tests.report_runs import write_run
from tests.two_ranks.tiny import sharded

SECONDS = 10  # that an input may take
CONTEXT = GeneratorContext(None, torch.device("cpu"), sys.maxsize, lambda ids: "", None)
SAMPLING = SamplingParams(max_new_tokens=6, stop_token_ids=(9,))
ROWS = [
    {"id": "a", "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]},
    {"prompt": "hello", "response": "you", "id": 3},
    {"instruction": "hello", "input": "there", "output": "you"},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "you"}], "system": "s"},
]
TEMPLATE_PARTS = [
    "{{ 1/0 }}", "{{ messages[99].content }}", "{% for m in messages %}{{ m }}{% endfor %}", "{% if",
    "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}", "{{ messages|tojson }}", "{{ bos_token * 3 }}",
    "{% set x = namespace(a=1) %}", "{{ strftime_now('%Y') }}", "{{ '\\ud800' }}", "{% include 'x' %}",
    "{{ messages | map(attribute='content') | list }}",
]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """What reads some files of a folder, and how many of 1,000 inputs it gets."""

    files: dict[str, bytes]
    read: Callable[[Path, random.Random], object]
    share: int
    damaged: tuple[str, ...] = ()  # of the files; all if there are none
    seal: Callable[[Path], None] | None = None  # makes checksums fit, as an attacker would


def damage(file: Path, rng: random.Random) -> None:
    """Damages a file once to three times, in the manner of its kind."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        try:
            if file.suffix == ".parquet":
                bend_table(file, rng)
            elif file.suffix == ".gz" and rng.random() < 0.6:
                file.write_bytes(gzip.compress(bend_bytes(gzip.decompress(file.read_bytes()), rng)))
            elif file.suffix == ".jinja" and rng.random() < 0.6:
                text = file.read_text()
                at = rng.randrange(len(text) + 1)
                file.write_text(text[:at] + rng.choice(TEMPLATE_PARTS) + text[at:])
            elif file.suffix == ".safetensors" and rng.random() < 0.7:
                file.write_bytes(_bend_header(file.read_bytes(), rng))
            elif file.suffix in (".json", ".jsonl", ".yaml"):
                file.write_bytes(bend_text(file, rng))
            else:
                file.write_bytes(bend_bytes(file.read_bytes(), rng))
        except BEYOND_REPAIR:
            file.write_bytes(bend_bytes(file.read_bytes(), rng))


def _bend_header(content: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    bend(header, rng)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def readers(folder: Path) -> dict[str, Reader]:
    """All readers, by name; whole input for them is made in the folder."""
    return {
        **_config_readers(),
        **_data_readers(folder),
        **_store_readers(folder),
        **_checkpoint_readers(folder),
        **_run_readers(folder),
        **_model_readers(),
        **_response_readers(folder),
    }


# ---- configs


def _config_readers() -> dict[str, Reader]:
    whole = {"config.yaml": CONFIG.read_bytes()}
    keys = [*yaml.safe_load(CONFIG.read_text()), "loss.beta", "watch.acc.limit", "sampling.top_k", "a.b", "pairs[0]"]
    hostile = ["[1,", "{a: b", "on", "!!python/object:os.system", "&a [*a]", "9" * 5000, "${a}" * 50]

    def config(folder: Path, rng: random.Random) -> None:
        complete(load_config(str(folder / "config.yaml"), ["output_dir=out"]), SPINConfig)

    def overrides(folder: Path, rng: random.Random) -> None:
        parts = (["", "", "~"], [*keys, "", "."], ["=", "=", ""], [*map(repr, VALUES), *hostile])
        given = ["".join(map(rng.choice, parts)) for _ in range(rng.randint(1, 3))]
        cfg = load_config(str(folder / "config.yaml"), ["output_dir=out", *given])
        complete(cfg, SPINConfig)

    return {"config": Reader(whole, config, 15), "override": Reader(whole, overrides, 25, damaged=("none",))}


# ---- data


def _data_readers(folder: Path) -> dict[str, Reader]:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
    pq.write_table(pa.Table.from_pylist([{"prompt": "hello", "response": "you"}] * 3), folder / "rows.parquet")
    files = {
        "rows.jsonl": lines,
        "rows.json": json.dumps(ROWS).encode(),
        "rows.parquet": (folder / "rows.parquet").read_bytes(),
        "rows.csv": b'prompt,response\nhello,you\n"a, b","c\nd"\n',
        "rows.jsonl.gz": gzip.compress(lines),
    }

    def read(name: str) -> Callable[[Path, random.Random], object]:
        def rows(folder: Path, rng: random.Random) -> None:
            data = prompt_dataset(
                Letters(), source=str(folder / name), on_bad_row=rng.choice(["error", "skip"]), max_seq_len=64,
                turns=rng.choice(["last", "all"]), on_long_prompt="drop", on_long_response="drop",
            )  # fmt: skip
            for prompt in data:
                assert len(prompt.prompt_ids) and len(prompt.real_ids)

        return rows

    share = {"rows.jsonl": 200, "rows.json": 100, "rows.parquet": 20}
    return {f"data {name}": Reader({name: content}, read(name), share.get(name, 40)) for name, content in files.items()}


# ---- pair stores


def _store_readers(folder: Path) -> dict[str, Reader]:
    pairs = [Pair(f"s{i}", 0, [1, i], [3, 4], [Response([6, 7], "stop", -1.0)], -2.0) for i in range(6)]
    store = PairStore.open_or_create(folder / "store", {"opponent": "w", "seed": 1}, 2)
    store.write_shard(0, pairs[:3])
    store.write_shard(1, pairs[3:])
    store.seal({"truncated": 0})
    files = {file.name: file.read_bytes() for file in store.path.iterdir() if file.is_file()}

    def read(folder: Path, rng: random.Random) -> None:
        try:
            store = PairStore.open(folder)
            for pair in store.pairs():
                assert pair.key and all(response.finish_reason in ("stop", "length") for response in pair.generated)
            store.count_responses()
        finally:  # a run never fails over a damaged store: it begins another one
            fresh = PairStore.open_or_create(folder, {"opponent": "w", "seed": 1}, 2)
            assert set(fresh.missing_shards()) <= {0, 1}
            for aside in folder.parent.glob(f"{folder.name}.stale*"):
                shutil.rmtree(aside)

    return {
        "store manifest": Reader(files, read, 70, damaged=("manifest.json",)),
        "store shard": Reader(files, read, 30, damaged=("shard-00001.parquet",)),
    }


# ---- checkpoints


def _checkpoint_readers(folder: Path) -> dict[str, Reader]:
    recipe = spin_recipe.SPINRecipe(tiny_config(folder / "checked", "self_test=false"))
    recipe.setup()
    recipe.cleanup()
    world = init_world("cpu")
    checkpointer = SPINCheckpointer("unused", str(folder / "run"), "LLAMA3_2")
    saved = recipe.state_dict() | {"progress": {"step": 3, "consumed_samples": 12}, "val_loss": 1.0}
    path = checkpointer.save(step=3, model=sharded(world), optimizer=None, state=saved, world=world)
    checkpointer.close()
    files = {file.name: file.read_bytes() for file in path.iterdir()}
    model = sharded(world)

    def read(folder: Path, rng: random.Random) -> None:
        place = checkpointer.latest(str(folder))
        recipe.load_state_dict(checkpointer.read_state(place))
        if rng.random() < 0.2:
            checkpointer.load(place, model=model, optimizer=None, world=world)

    def seal(folder: Path) -> None:
        file = folder / "manifest.json"
        try:
            manifest = json.loads(file.read_bytes())
            for name, entry in manifest["files"].items():
                if (folder / name).is_file():
                    entry |= {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
            content = {name: value for name, value in manifest.items() if name != "checksum"}
            file.write_text(json.dumps(content | {"checksum": json_fingerprint(content)}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass  # no manifest any more

    return {
        "checkpoint manifest": Reader(files, read, 50, damaged=("manifest.json",), seal=seal),
        "checkpoint state": Reader(files, read, 30, damaged=("state.json",), seal=seal),
        "checkpoint metadata": Reader(files, read, 30, damaged=(".metadata",), seal=seal),
    }


# ---- what a run's folder says


def _run_readers(folder: Path) -> dict[str, Reader]:
    run = write_run(folder / "report", iterations=1, steps=3)
    files = {name: (run / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "config.yaml")}

    def report(folder: Path, rng: random.Random) -> None:
        render(read_run(folder)).encode("utf-8")

    def metrics(folder: Path, rng: random.Random) -> None:
        MetricsFile(folder / "metrics.jsonl", from_step=2)

    return {
        "report": Reader(files, report, 30),
        "metrics of a resumed run": Reader(files, metrics, 60, damaged=("metrics.jsonl",)),
    }


# ---- model folders


def _model_readers() -> dict[str, Reader]:
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: (TINY_LM / name).read_bytes() for name in names if (TINY_LM / name).is_file()}
    tokenizer_config = json.loads(files["tokenizer_config.json"])
    template = files.pop("chat_template.jinja", None) or tokenizer_config.pop("chat_template").encode()
    tokenizer = {
        "tokenizer.json": files["tokenizer.json"],
        "tokenizer_config.json": json.dumps(tokenizer_config).encode(),
        "chat_template.jinja": template,
    }
    weights = (TINY_LM / "model.safetensors").read_bytes()
    model = {
        "config.json": files["config.json"],
        "model.safetensors": weights,
        "model.safetensors.index.json": json.dumps({"weight_map": {"a": "model.safetensors"}}).encode(),
    }
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]

    def weights_of(folder: Path, rng: random.Random) -> None:
        read_hf_config(folder)
        stored_elements(folder)

    def encode(folder: Path, rng: random.Random) -> None:
        prompt, real = ChatTokenizer(folder).encode_pair(talk)
        assert len(prompt) and len(real)

    return {
        "config.json and index": Reader(
            model | {"model.safetensors": weights}, weights_of, 50, ("config.json", "model.safetensors.index.json")
        ),
        "safetensors header": Reader(model, weights_of, 20, damaged=("model.safetensors",)),
        "tokenizer": Reader(tokenizer, encode, 2, damaged=("tokenizer.json", "tokenizer_config.json")),
        "chat template": Reader(tokenizer, encode, 8, damaged=("chat_template.jinja",)),
    }


# ---- responses


def _response_readers(folder: Path) -> dict[str, Reader]:
    rows = [{"prompt_ids": [5, i], "generated_ids": [7, 9], "finish_reason": "stop", "k": 0} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "responses.parquet")
    files = {
        "responses.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in rows),
        "responses.parquet": (folder / "responses.parquet").read_bytes(),
    }

    def replay(name: str) -> Callable[[Path, random.Random], object]:
        return lambda folder, rng: ReplayGenerator(CONTEXT, folder / name).generate([[5, 0]], SAMPLING, [0])

    server = FalseServer()
    replies = {f"{name}.json": json.dumps(VLLM[path]).encode() for name, path in _PATHS.items()}

    def serve(folder: Path, rng: random.Random) -> None:
        for name, path in _PATHS.items():
            body = (folder / f"{name}.json").read_bytes()
            encoding = ["Content-Encoding: gzip"] if rng.random() < 0.02 else []
            server.answers[path] = headers(len(body), *encoding) + body
        generator = VLLMServerGenerator(CONTEXT, server.url, timeout_seconds=0.5, wait_seconds=0.5, concurrency=1)
        try:
            generator.generate([[1, 2]], SAMPLING, [0])
        finally:
            generator.close()

    return {
        "replay responses.jsonl": Reader(files, replay("responses.jsonl"), 80, ("responses.jsonl",)),
        "replay responses.parquet": Reader(files, replay("responses.parquet"), 20, ("responses.parquet",)),
        "server reply": Reader(replies, serve, 30, damaged=("completions.json", "models.json", "version.json")),
    }


_PATHS = {"completions": "/v1/completions", "models": "/v1/models", "version": "/version", "health": "/health"}


# ---- one input


class Found(Exception):
    """An input that ended in what is no error of this project's, or in no time."""


def attempt(reader: Reader, folder: Path, seed: int) -> str:
    """Reads one damaged input, written to an emptied folder: ``fine`` or ``refused``, or Found if it ends otherwise."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in reader.files.items():
        (folder / name).write_bytes(content)
    if reader.damaged != ("none",):
        damage(folder / rng.choice(reader.damaged or tuple(reader.files)), rng)
    if reader.seal is not None:
        reader.seal(folder)
    logging.disable(logging.CRITICAL)  # warnings quote the input
    try:
        with time_limit(SECONDS):
            reader.read(folder, rng)
    except SpinError as error:
        if not str(error):
            raise Found("an error without a text") from error
        return "refused"
    except BaseException as error:  # Hang too
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise Found(f"{type(error).__name__}: {str(error)[:200]}") from error
    finally:
        logging.disable(logging.NOTSET)
    return "fine"


def planned(names: dict[str, Reader], inputs: int) -> Counter[str]:
    """How many of so many inputs each reader gets; at least one."""
    total = sum(reader.share for reader in names.values())
    return Counter({name: max(1, round(inputs * reader.share / total)) for name, reader in names.items()})
