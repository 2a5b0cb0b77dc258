"""Folders as someone else may hand them over: a run's, with one to three things damaged, replaced or lied about."""

import contextlib
import copy
import json
import math
import os
import random
import shutil
import signal
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save

from spin.config import plain
from tests.recipes.helpers import tiny_config
from tests.report_runs import write_run, write_store

SECONDS = 20  # that a command may take on one folder
ESCAPES = "a\x1b]0;owned\x07\x1b[2J\r\u202egnp.exe\u2066\x9b31m\x00\n\tz"
VALUES = [
    None, True, False, -1, 0, 1, 2, 10**6, 10**30, -(2**63), 0.5, -0.0, 1e308, -1e308, 5e-324, math.nan, math.inf,
    -math.inf, "", "x", "1", "nan", "1e400", "${x}", "${output_dir}", "${oc.env:HOME}", "???", "${", ESCAPES, "\ud800",
    "é" * 3000, "../../..", "/etc/passwd", [], [1], [[]], [None], {}, {"a": 1}, {"_component_": "os.system"},
    {"_component_": "spin.cli.cp.main"},
]  # fmt: skip
RAW = [  # texts put in the place of a value, which no JSON writer writes
    b"1e400", b"-1e400", b"9" * 5000, b"[" * 5000, b"\xff", b"\x00", b'"\\ud800"', b'{"a":1,"a":2}', b"&a [*a, *a]",
    b"!!python/object:os.system",
]  # fmt: skip
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(8)
)
INTERPOLATIONS = "a0: xxxxxxxxxx\n" + "".join(f"a{i + 1}: {f'${{a{i}}}' * 10}\n" for i in range(8))


# what was damaged before, beyond what the functions below can read
BEYOND_REPAIR = (OSError, ValueError, EOFError, RecursionError, pa.ArrowException, yaml.YAMLError, zlib.error)


def write_whole_run(folder):
    """A finished run of two iterations: config, metrics, samples, responses, scored pairs, model, adapter."""
    cfg = plain(tiny_config(folder))
    write_run(folder, steps=4, config={key: value for key, value in cfg.items() if key not in ("loss", "output_dir")})
    for iteration in folder.glob("iteration_*"):
        write_store(iteration / "pairs", scored=True)
        (iteration / "adapter").mkdir()
        (iteration / "adapter" / "adapter_config.json").write_text('{"r": 8}')
        (iteration / "adapter" / "adapter_model.safetensors").write_bytes(save({"w": torch.zeros(1)}))
    return folder


def places(value):
    """Every container of a document with each of its keys."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from places(item)


def bend(document, rng):
    """Changes one place of a JSON document: another value, or its key gone or renamed."""
    found = list(places(document))
    if not found:
        return
    holder, key = rng.choice(found)
    if rng.random() < 0.8:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif rng.random() < 0.5 or isinstance(holder, list):
        del holder[key]
    else:
        holder[rng.choice(["x", "step", ESCAPES, "", "val_loss/" + ESCAPES])] = holder.pop(key)


def bend_bytes(content, rng):
    """Bytes flipped, cut off, doubled, put in."""
    at = rng.randrange(len(content) + 1)
    return rng.choice(
        [
            content[:at],
            content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
            content[:at] + rng.choice([*RAW, b"\n", b'"', b"{", b"- ", b"\xef\xbb\xbf"]) + content[at:],
            content[:at] + rng.choice(RAW) + content[at + rng.randint(1, 40) :],
            content[at:] + content[:at],
            b"",
            rng.randbytes(200),
        ]
    )


def bend_text(file, rng):
    """A JSON, JSON Lines or YAML file with a value of another kind, or damaged bytes."""
    content = file.read_bytes()
    if rng.random() < 0.3 or b"*a" in content:
        return bend_bytes(content, rng)
    if file.suffix == ".yaml":
        if rng.random() < 0.2:
            return rng.choice([BOMB, INTERPOLATIONS, "[]", "x", "a: 1e400\nloss: [", "a: " + "[" * 3000]).encode()
        document = yaml.safe_load(content)
        bend(document, rng)
        return yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass")
    lines = content.split(b"\n") if file.suffix == ".jsonl" else [content]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        if lines[at]:
            document = json.loads(lines[at])
            bend(document, rng)
            lines[at] = json.dumps(document).encode()
    return b"\n".join(lines)


def bend_table(file, rng):
    """A shard whose columns or values are of another kind."""
    table = pq.read_table(file)
    if rng.random() < 0.3:
        return file.write_bytes(bend_bytes(file.read_bytes(), rng))
    name = rng.choice(table.column_names)
    kinds = [pa.string(), pa.int32(), pa.int64(), pa.float64(), pa.date32()]
    kinds += [pa.list_(pa.int32()), pa.list_(pa.string()), *[table.schema.field(name).type] * 4]
    kind = rng.choice(kinds)
    values = [-1, 2**31 - 1, 5.5, math.nan, "length", ESCAPES, [-1], [2**31 - 1], [0] * 5000, [], None]
    fits = [value for value in values if _fits(value, kind)]
    column = pa.array([rng.choice(fits) for _ in range(table.num_rows)], kind)
    action = rng.random()
    if action < 0.7:
        table = table.set_column(table.column_names.index(name), name, column)
    elif action < 0.8:
        table = table.drop_columns([name])
    elif action < 0.9:
        table = table.slice(0, 0)
    else:
        table = pa.concat_tables([table] * 50)
    return pq.write_table(table, file)


def _fits(value, kind):
    try:
        pa.array([value], kind)
    except (pa.ArrowException, TypeError, OverflowError):
        return False
    return True


KINDS = {  # what may lie under a name
    "nothing": lambda path, outside: None,
    "folder": lambda path, outside: path.mkdir(),
    "pipe": lambda path, outside: os.mkfifo(path),
    "loop": lambda path, outside: path.symlink_to(path.name),
    "endless": lambda path, outside: path.symlink_to("/dev/zero"),
    "huge": lambda path, outside: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 2**42),
    "link": lambda path, outside: path.symlink_to(outside / "secret.txt"),
    "folder link": lambda path, outside: path.symlink_to(outside, target_is_directory=True),
    "socket": lambda path, outside: os.mknod(path, 0o600 | 0o140000),
}


def replace(path, rng, outside):
    """Something else under a name: a folder, a pipe, a link, an endless or a huge file, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    what = rng.choice(list(KINDS))
    KINDS[what](path, outside)
    return what


def rename(path, rng):
    """A name with control characters, of no number or of a huge one."""
    names = [ESCAPES.replace("\x00", ""), "-rf", *(f"iteration_{part}" for part in ("9" * 200, "٣", "-1", "000\n"))]
    with contextlib.suppress(OSError):
        path.rename(path.with_name(rng.choice(names)))


def damage(run, rng, outside):
    """Changes one thing in a run's folder; a short text of what."""
    paths = sorted(path for path in run.rglob("*") if path.parent != run.parent)
    path = rng.choice(paths)
    action = rng.random()
    if action < 0.25:
        return f"{path.relative_to(run)!s}: {replace(path, rng, outside)}"
    if action < 0.35:
        rename(path, rng)
        return f"{path.relative_to(run)!s}: renamed"
    kinds = (".json", ".jsonl", ".yaml", ".parquet")
    texts = [path for path in paths if path.suffix in kinds and is_small(path, 10**7)]
    if not texts:
        return "nothing left"
    file = rng.choice([*texts, *[path for path in texts if path.parent == run] * 2])
    try:
        if file.suffix == ".parquet":
            bend_table(file, rng)
        else:
            file.write_bytes(bend_text(file, rng))
    except BEYOND_REPAIR:
        file.write_bytes(bend_bytes(file.read_bytes(), rng))
    return f"{file.relative_to(run)!s}: bent"


def is_small(path, most_bytes):
    """A regular file of no more than so many bytes."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size < most_bytes


def hostile_run(whole, folder, seed):
    """A copy of a whole run's folder with one to three things damaged, and what was done to it. It is ``run`` in the
    folder, with ``outside`` next to it, which nothing may change."""
    rng = random.Random(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = Path(shutil.copytree(whole, folder / "run"))
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (outside / "config.json").write_text("{}")
    (outside / "model.safetensors").write_bytes(save({"other": torch.zeros(1)}))
    return run, [damage(run, rng, outside) for _ in range(rng.choice([1, 1, 2, 3]))]


class Hang(BaseException):
    """A command took longer than it may."""


@contextlib.contextmanager
def time_limit(seconds=SECONDS):
    """Ends a block of the main thread that takes longer."""

    def end(*_):
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def commands_on(run, rng):
    """Command lines that look at a run, each with the only paths that it may write to."""
    out = run.parent / "out"
    stores = sorted(path for path in run.glob("*/*") if path.name in ("responses", "pairs"))
    store = rng.choice(stores or [run / "iteration_000/pairs"])
    return [
        (["report", str(run), "--out", str(out / "page.html")], [out]),
        (["report", str(run)], [run / "report.html"]),
        (["export", str(run), "--out", str(out / "model")], [out]),
        (["export", str(run), *rng.choice([[], ["--adapter"], ["--iteration", "0"]])], [run]),
        (["pairs", str(store), "--sample", "2", "--export", str(out / "pairs.jsonl")], [out]),
    ]


def snapshot(folder):
    """Names, kinds and content of what lies outside of the paths that a command may write to."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            state = path.lstat()
            found[path] = state.st_mode, path.read_bytes() if is_small(path, 10**6) else state.st_size
    return found
