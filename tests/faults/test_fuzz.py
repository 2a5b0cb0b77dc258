"""Hostile and broken input: whatever the bytes are, it works or is an error of ours, and nothing of it runs.

More than 10,000 inputs: configs, overrides, data rows, pair shards, manifests, states, model folders. An input is a
seed, from which a valid document is bent in one to three places; hypothesis picks the seeds, and names one that fails.
"""

import copy
import json
import logging
import pickle
import random
import shutil
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import spin_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from spin.checkpoint.states import SPINCheckpointer, _read_metadata
from spin.config.checks import check_run
from spin.config.parse import complete, load_config
from spin.core.errors import SpinError
from spin.core.files import file_sha256, json_fingerprint
from spin.core.ranks import init_world
from spin.data import Pair, PairStore, Prompt, PromptDataset, Response, prompt_dataset
from spin.model.hf import read_hf_config, stored_elements
from spin.run.plan import RunPlan
from tests.data.test_read import Letters
from tests.recipes.helpers import CONFIG, tiny_config
from tests.two_ranks.tiny import sharded

pytestmark = pytest.mark.slow
INPUTS = {
    "config": 1200, "config text": 800, "overrides": 800, "rows": 4000, "lines": 1500, "store manifest": 1000,
    "shard": 900, "state manifest": 800, "state": 200, "metadata": 800, "model folder": 600,
}  # fmt: skip
RAN: Counter[str] = Counter()

# of each kind the outcomes, so that no test passes because its inputs are all refused, or none is
ENDS: dict[str, Counter[str]] = {name: Counter() for name in INPUTS}

VALUES = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.5, 1e308, float("nan"), float("inf"), 10**30, -(10**6), "", " ", "x", "1",
    "???", "${x}", "${output_dir}", "${", "nan", "os.system", "torch.hub.load", "spin.loss.SPINLoss", "cpu", "auto",
    "a\x00b", "\ud800", "ü" * 50, "../../etc/passwd", "/dev/null/x", [], {}, [1], ["a"], [None], [[]], {"a": 1},
    {"": {}}, {"length": 1}, {"_component_": "os.system"}, {"_component_": "torch.optim.AdamW"}, {"_component_": None},
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_logs():
    """Warnings quote the input; half a character, say, which pytest-xdist cannot send to its main process."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True)
def enough():
    """Of every kind some inputs are fine, where anything can be, and some are refused."""
    before = RAN.copy()
    yield
    for name in (name for name in RAN if RAN[name] > before[name]):
        assert ENDS[name]["refused"] >= 20 and ENDS[name]["fine"] >= 5, (name, ENDS[name])
        assert RAN[name] >= 0.8 * INPUTS[name], (name, RAN[name])


def fuzz(name):
    """Decorates a test that takes a seed; the seeds are the same ones every time."""

    def decorate(test):
        chosen = settings(
            max_examples=INPUTS[name], deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        return chosen(given(seed=st.integers(0, 2**63))(test))

    return decorate


def attempt(name, function, *arguments):
    """The value of a function, or None if it raised an error of ours; every other exception is a failure."""
    RAN[name] += 1
    try:
        value = function(*arguments)
    except SpinError as error:
        assert str(error)
        ENDS[name]["refused"] += 1
        return None
    ENDS[name]["fine"] += 1
    return value


def places(value):
    """Every container of a JSON document with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def bent(document, rng):
    """A copy with one to three places changed: another value, a key gone, renamed or new."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        found = list(places(document))
        if not found:
            break
        holder, key = rng.choice(found)
        action = rng.randrange(5)
        if action < 3:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif action == 3:
            del holder[key]
        elif isinstance(holder, dict):
            name = rng.choice([key[:-1] if isinstance(key, str) else "k", "_component_", "x", "a.b", "ü"])
            holder[name] = copy.deepcopy(rng.choice([holder[key], *VALUES]))
    return document


def bent_bytes(content, rng):
    """A copy with bytes flipped, cut off, doubled, put in or replaced by nonsense."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.randint(1, 40))
        action = rng.randrange(5)
        if action == 0 and content:
            content[at % len(content)] ^= 1 << rng.randrange(8)
        elif action == 1:
            del content[at:]
        elif action == 2:
            content[at:at] = content[at:end]
        elif action == 3:
            content[at:at] = rng.choice([b"\x00", b"\xff\xfe", b"{", b"]", b'"', b"\n", b"PAR1", b"- "])
        else:
            content[at:end] = rng.randbytes(end - at)
    return bytes(content)


# ---- configs


@pytest.fixture(scope="module")
def config():
    return OmegaConf.to_container(load_config(str(CONFIG), ["output_dir=out"]))


@fuzz("config")
def test_configs(config, seed):
    def check(raw):
        check_run(complete(OmegaConf.create(raw), spin_recipe.DEFAULTS))

    rng = random.Random(seed)
    whole = config | {key: value for key, value in spin_recipe.DEFAULTS.items() if rng.random() < 0.3}
    whole = {key: value for key, value in whole.items() if not (isinstance(value, dict) and "_extra_" in value)}
    try:
        raw = OmegaConf.create(bent(whole, rng))
    except Exception:  # noqa: BLE001 - not a config that YAML could have given
        return
    attempt("config", lambda: check(raw))


@fuzz("config text")
def test_config_files(tmp_path_factory, seed):
    rng = random.Random(seed)
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_bytes(bent_bytes(CONFIG.read_bytes(), rng))
    attempt("config text", lambda: complete(load_config(str(file), ["output_dir=out"]), spin_recipe.DEFAULTS))


@fuzz("overrides")
def test_overrides(config, seed):
    rng = random.Random(seed)
    keys = [
        *config,
        "loss.beta",
        "watch.acc.limit",
        "watch",
        "optimizer",
        "sampling.top_k",
        "a.b",
        "pairs[0]",
        "",
        "~",
        ".",
    ]
    overrides = [
        rng.choice(["", "", "", "~"])
        + rng.choice(keys)
        + rng.choice(["=", "=", "=", "", "=="])
        + rng.choice(
            [json.dumps(rng.choice(VALUES)), "[1,", "{a: b", "on", "1e-3", "!!python/object:os.system", "&a *a"]
        )
        for _ in range(rng.randint(1, 3))
    ]

    def check():
        check_run(complete(load_config(str(CONFIG), ["output_dir=out", *overrides]), spin_recipe.DEFAULTS))

    attempt("overrides", check)


# ---- data

ROWS = [
    {"id": "a", "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "you"}], "system": "s"},
    {"prompt": "hello", "response": "you", "id": 3},
    {"instruction": "hello", "input": "there", "output": "you"},
]


def read(source, rng):
    return prompt_dataset(
        Letters(),
        source=source,
        turns=rng.choice(["last", "all"]),
        on_bad_row=rng.choice(["error", "skip"]),
        on_long_prompt=rng.choice(["drop", "error", "cut"]),
        on_long_response=rng.choice(["drop", "error", "cut"]),
        max_seq_len=rng.choice([8, 64, None]),
    )


@fuzz("rows")
def test_rows(seed):
    rng = random.Random(seed)
    data = attempt("rows", lambda: read([bent(rng.choice(ROWS), rng), rng.choice(ROWS)], rng))
    for prompt in data or ():
        assert len(prompt.prompt_ids) and len(prompt.real_ids)


@fuzz("lines")
def test_lines(tmp_path_factory, seed):
    rng = random.Random(seed)
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rng.choices(ROWS, k=4))
    file = tmp_path_factory.getbasetemp() / f"fuzz{rng.choice(['.jsonl', '.json'])}"
    file.write_bytes(bent_bytes(content, rng))
    attempt("lines", lambda: read(str(file), rng))


# ---- pair stores


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    pairs = [Pair(f"s{i}", 0, [1, i], [3, 4], [Response([6, 7], "stop", -1.0)], -2.0) for i in range(6)]
    store = PairStore.open_or_create(tmp_path_factory.mktemp("store") / "p", {"opponent": "w", "seed": 1}, 2)
    store.write_shard(0, pairs[:3])
    store.write_shard(1, pairs[3:])
    store.seal({"truncated": 0})
    return store.path, {file.name: file.read_bytes() for file in store.path.iterdir()}


def use(path):
    """Everything that is done with a store."""
    store = PairStore.open(path)
    assert isinstance(store.is_sealed, bool) and isinstance(store.opponent, str)
    store.count_answers()
    pairs = list(store.pairs())
    store.missing_shards()
    return pairs


def restore(path, files):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)


@fuzz("store manifest")
def test_store_manifests(store, seed):
    path, files = store
    rng = random.Random(seed)
    manifest = bent(json.loads(files["manifest.json"]), rng)
    content = json.dumps(manifest).encode() if rng.random() < 0.8 else bent_bytes(files["manifest.json"], rng)
    restore(path, files | {"manifest.json": content})
    attempt("store manifest", lambda: use(path))
    fresh = PairStore.open_or_create(path, {"opponent": "w", "seed": 1}, 2)  # never refuses: it begins anew
    assert set(fresh.missing_shards()) <= {0, 1}
    for aside in path.parent.glob("p.stale*"):
        shutil.rmtree(aside)


@fuzz("shard")
def test_shards(store, seed):
    """Bytes that are bent, and whole files whose columns have other values."""
    path, files = store
    rng = random.Random(seed)
    restore(path, files)
    shard = path / "shard-00001.parquet"
    if rng.random() < 0.6:
        shard.write_bytes(bent_bytes(files[shard.name], rng))
    elif rng.random() < 0.8:  # the rest stay as they are
        table = pq.read_table(shard)
        name = rng.choice(table.column_names)
        kind = rng.choice([pa.string(), pa.int32(), pa.float64(), pa.list_(pa.int32()), table.schema.field(name).type])
        value = {
            pa.string(): rng.choice(["s1", "", "later", "\x00"]),
            pa.int32(): rng.choice([-1, 0, 7, 2**31 - 1]),
            pa.float64(): rng.choice([0.0, float("nan"), -1e308]),
        }.get(kind, rng.choice([[], [1], [-5, 2**31 - 1]]))
        column = pa.array([None if rng.random() < 0.5 else value] * table.num_rows, kind)
        table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, shard)
    pairs = attempt("shard", lambda: use(path))
    for pair in pairs or ():
        assert pair.key and all(response.finish_reason in ("stop", "length") for response in pair.generated)


# ---- states


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    world = init_world("cpu")
    checkpointer = SPINCheckpointer("unused", "LLAMA3_2", str(tmp_path_factory.mktemp("state")))
    saved = {"progress": {"step": 3, "consumed_samples": 12}, "total_steps": 20, "opponent": "w", "val_loss": 1.0}
    saved["run"] = {}
    path = checkpointer.save(step=3, model=sharded(world), optimizer=None, state=saved, world=world)
    checkpointer.close()
    return checkpointer, path, {file.name: file.read_bytes() for file in path.iterdir()}


def sealed(manifest):
    """What an attacker would write: a manifest whose checksum fits."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    try:
        return json.dumps(content | {"checksum": json_fingerprint(content)}).encode()
    except ValueError:
        return json.dumps(manifest).encode()


@fuzz("state manifest")
def test_state_manifests(state, seed):
    checkpointer, path, files = state
    rng = random.Random(seed)
    manifest = bent(json.loads(files["manifest.json"]), rng)
    content = bent_bytes(files["manifest.json"], rng) if rng.random() < 0.2 else sealed(manifest)
    restore(path, files | {"manifest.json": content})
    checkpointer.latest("auto")  # passes over what is broken
    attempt("state manifest", lambda: checkpointer.read_state(checkpointer.latest(str(path))))


@fuzz("state")
def test_states(state, seed):
    """state.json bent, and the manifest made to fit; then what the recipe does with it."""
    checkpointer, path, files = state
    rng = random.Random(seed)
    document = bent(json.loads(files["state.json"]), rng)
    restore(path, files | {"state.json": json.dumps(document).encode()})
    manifest = json.loads(files["manifest.json"])
    manifest["files"]["state.json"] = {
        "bytes": (path / "state.json").stat().st_size, "sha256": file_sha256(path / "state.json"),
    }  # fmt: skip
    (path / "manifest.json").write_bytes(sealed(manifest))

    def load():
        recipe = spin_recipe.SPINRecipe(tiny_config("unused"))
        recipe._plan = RunPlan(recipe._cfg, PromptDataset([Prompt(f"s{i}", [1, i], [2]) for i in range(23)]))
        recipe._progress = recipe._plan.progress  # 2 iterations of 2 epochs of 5 steps
        recipe._watch = spin_recipe.Watch(recipe._cfg.watch, True)
        recipe._run_fingerprint = {}
        recipe.load_state_dict(checkpointer.read_state(path))

    attempt("state", load)


@fuzz("metadata")
def test_metadata(state, seed):
    _, path, files = state
    rng = random.Random(seed)
    content = bent_bytes(files[".metadata"], rng)
    if rng.random() < 0.1:
        content = pickle.dumps(rng.choice([print, exec, [1], {"a": random.Random}, pathological]))
    restore(path, files | {".metadata": content})
    attempt("metadata", lambda: _read_metadata(path))


def pathological():
    raise AssertionError("ran")


# ---- model folders


@fuzz("model folder")
def test_model_folders(tiny_lm, tmp_path_factory, seed):
    rng = random.Random(seed)
    folder = tmp_path_factory.getbasetemp() / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config = (tiny_lm / "config.json").read_bytes()
    document = (
        json.loads(config) | {"quantization_config": {"quant_method": "x"}}
        if rng.random() < 0.2
        else json.loads(config)
    )
    (folder / "config.json").write_bytes(
        json.dumps(bent(document, rng)).encode() if rng.random() < 0.7 else bent_bytes(config, rng)
    )
    weights = (tiny_lm / "model.safetensors").read_bytes()[: 20_000 if rng.random() < 0.5 else None]
    if rng.random() < 0.5:
        index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(bent(index, rng)))
        (folder / "model.safetensors").write_bytes(weights)
    else:
        (folder / "model.safetensors").write_bytes(bent_bytes(weights[:4000], rng) + weights[4000:])

    def look():
        read_hf_config(folder)
        return stored_elements(folder)

    attempt("model folder", look)
