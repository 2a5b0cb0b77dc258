"""The checker of a user's own: what it is given, what its verdicts do, and that none is asked for twice."""

import hashlib
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from spin.config import own_code
from spin.core.errors import CheckerError, ConfigError, Stopped
from spin.core.files import file_sha256
from spin.core.ranks import init_world
from spin.data import ChatTokenizer, Pair, PairStore, Response
from spin.generators import check_responses, filtered_responses
from spin.pairs import RowLayout, share_lookup
from spin.pairs.packing import loss_weight, pack_row
from spin.run.resume import run_fingerprint
from tests.recipes.helpers import TINY_LM, run, stops_at, tiny_config

PACKAGE = "checker_of_test"
SAMPLES = 10  # of two responses each, in four shards; response number i of a sample has i as its last word
SOURCE = """
import os

import numpy as np

calls, says = [], {}

def check(prompt, real, generated, truncated, mark=None, api_key=None):
    calls.append((prompt, real, generated, truncated, mark))
    found = says.get(generated, generated.endswith("1"))
    if isinstance(found, BaseException):
        raise found
    return found

async def check_async(prompt, real, generated, truncated):
    return True

def check_many(prompt, real, generated, truncated):
    yield True

def check_elsewhere(prompt, real, generated, truncated):
    os.chdir("/")
    return True

class Checker:
    def __init__(self, tolerance):
        pass

    def method(self, **given):
        return self

from spin.loss import SPINLoss

class Loss(SPINLoss):
    pass
"""


class Opaque(BaseException):
    """No ``Exception``, as the time limit of a library may be, and without a text."""

    def __str__(self):
        raise ValueError


@pytest.fixture(scope="module")
def tokenizer():
    return ChatTokenizer(TINY_LM)


@pytest.fixture
def checker(tmp_path, monkeypatch):
    """The user's module, importable and allowed."""
    (tmp_path / f"{PACKAGE}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setenv("SPIN_ALLOW_COMPONENTS", PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    tiny_config("runs/none", f"pairs.checker={PACKAGE}.check")  # imports it
    yield sys.modules[PACKAGE]
    del sys.modules[PACKAGE]


def edit(module):
    with open(module.__file__, "a", encoding="utf-8") as stream:
        stream.write("# other code\n")


def import_again():
    """As a process that starts now."""
    del sys.modules[PACKAGE]
    pairs_config()
    return sys.modules[PACKAGE]


def pairs_config(*overrides):
    return tiny_config("runs/none", f"pairs.checker={PACKAGE}.check", *overrides).pairs


def played(folder, tokenizer):
    """A folder with responses; those of odd samples are truncated."""
    pairs = []
    for i in range(SAMPLES):
        turns = [{"role": "user", "content": f"Größe {i}?"}, {"role": "assistant", "content": "Es ist 1."}]
        prompt, real = tokenizer.encode_pair(turns)
        responses = []
        for k in range(2):
            turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": f"{i} 東 {k}"}]
            ids = tokenizer.encode_pair(turns)[1]
            responses.append(Response(ids[:-1], "length") if i % 2 else Response(ids, "stop"))
        pairs.append(Pair(f"s{i}", 0, prompt, real, responses))
    store = PairStore.open_or_create(folder / "responses", {"opponent": "w"}, 4)
    for shard, part in enumerate(np.array_split(np.arange(SAMPLES), 4)):
        store.write_shard(shard, [pairs[i] for i in part])
    store.seal()
    return folder


def checked(folder, tokenizer, section=None, should_stop=lambda: False):
    return check_responses([folder], section or pairs_config().checker, tokenizer, init_world("cpu"), should_stop)


def verdicts(folder):
    return [[each.verdict for each in pair.generated] for pair in PairStore.open(folder / "checked").pairs()]


def test_what_it_is_given_and_what_becomes_of_what_it_says(checker, tokenizer, tmp_path, caplog):
    """Of ten samples each second response is right but one, of which nothing is known; one of another is numpy's."""
    folder = played(tmp_path / "it", tokenizer)
    checker.says.update({"3 東 1": None, "4 東 0": np.bool_(True)})
    pairs = pairs_config(
        f"pairs.checker={{_component_: {PACKAGE}.check, mark: m, right_weight: 0.25, unknown_weight: 0.5}}"
    )
    with caplog.at_level("INFO"):
        found = checked(folder, tokenizer, pairs.checker)
    assert found == {"right_fraction": 0.5, "wrong_fraction": 0.45, "unknown_fraction": 0.05}
    assert "10 right, 9 wrong, 1 unknown" in caplog.text
    prompt = "<|im_start|>user\nGröße 1?<|im_end|>\n<|im_start|>assistant\n"
    assert checker.calls[2:4] == [(prompt, "Es ist 1.", f"1 東 {k}", True, "m") for k in range(2)]
    expected = [["wrong", "right"]] * SAMPLES
    expected[3], expected[4] = ["wrong", "unknown"], ["right", "right"]
    assert verdicts(folder) == expected

    kept = filtered_responses([folder], pairs)
    lookup = share_lookup(tmp_path / "rows", kept, init_world("cpu"))
    assert [[each.verdict for each in pair.generated] for pair in lookup.values()] == expected
    assert {name: kept.counts[name] for name in ("right", "wrong", "unknown", "dropped")} == {
        "right": 10, "wrong": 9, "unknown": 1, "dropped": 0
    }  # fmt: skip
    layout = RowLayout(right_weight=0.25, unknown_weight=0.5)
    three = [lookup[0, f"s{i}"] for i in (2, 3, 4)]
    assert pack_row(three, layout=layout).weights.tolist() == [0.5, 0.125, 0.5, 0.25, 0.125, 0.125]
    assert loss_weight(three, layout) == 0.625 + 0.75 + 0.25
    unweighted = filtered_responses([folder], pairs_config())  # right: 0, so dropped; unknown: 1
    assert [[each.verdict for each in pair.generated] for pair in unweighted][2:] == [
        ["wrong"], ["wrong", "unknown"], *[["wrong"]] * 5
    ]  # fmt: skip
    assert unweighted.counts["dropped_pairs"] == 1
    held_out = filtered_responses([folder], pairs_config(), drop_verdicts=False)
    assert len(list(held_out)) == SAMPLES and held_out.counts["dropped"] == 0


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (ValueError("no number"), r"raised ValueError: no number, at .*checker_of_test.py:12\."),
        (SystemExit(3), "raised SystemExit: 3"),
        (AssertionError(), "raised AssertionError, at "),
        (Opaque(), r"raised .*Opaque: <exception str\(\) failed>, at "),
        ("wrong", "returned 'wrong' of type str, expected True"),
        (1, "returned 1 of type int"),
        (np.array([True]), r"returned array\(\[ True\]\) of type ndarray"),
    ],
)
def test_a_failure_names_the_sample_and_costs_nothing(checker, tokenizer, tmp_path, says, message):
    folder = played(tmp_path / "it", tokenizer)
    checker.says["4 東 1"] = says
    with pytest.raises(CheckerError, match=rf"^pairs.checker: sample s4: {PACKAGE}.check {message}") as error:
        checked(folder, tokenizer)
    assert "rerun the same command" in str(error.value)
    checker.says.clear()
    before = len(checker.calls)
    checked(folder, tokenizer)
    assert len(checker.calls) == before + 2 * SAMPLES - 9, "nine had their verdict"
    assert verdicts(folder) == [["wrong", "right"]] * SAMPLES
    checked(folder, tokenizer)
    assert len(checker.calls) == before + 2 * SAMPLES - 9


def test_ctrl_c_names_the_response_at_which_it_hung(checker, tokenizer, tmp_path, caplog):
    folder = played(tmp_path / "it", tokenizer)
    checker.says["4 東 1"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        checked(folder, tokenizer)
    assert f"sample s4: {PACKAGE}.check had not returned" in caplog.text


def test_a_checker_that_changes_the_working_directory(checker, tokenizer, tmp_path, monkeypatch):
    """The run's paths are relative to it."""
    monkeypatch.chdir(tmp_path)
    played(tmp_path / "it", tokenizer)
    section = tiny_config("runs/none", f"pairs.checker={PACKAGE}.check_elsewhere").pairs.checker
    assert checked(Path("it"), tokenizer, section)["right_fraction"] == 1.0
    assert Path.cwd() == tmp_path


def test_stops_between_responses_and_looks_again_when_the_code_has_changed(checker, tokenizer, tmp_path):
    folder = played(tmp_path / "it", tokenizer)
    with pytest.raises(Stopped):
        checked(folder, tokenizer, should_stop=lambda: len(checker.calls) == 7)
    checked(folder, tokenizer)
    assert len(checker.calls) == 2 * SAMPLES
    edit(checker)
    checked(folder, tokenizer)
    assert len(checker.calls) == 2 * SAMPLES, "this process has the code of before"
    again = import_again()
    checked(folder, tokenizer)
    assert len(again.calls) == 2 * SAMPLES


def test_a_resume_with_other_code_says_so_once(checker, tmp_path, caplog):
    """Edited while the run trains: its verdicts are recorded as those of the code that it had imported."""
    own = (f"pairs.checker={PACKAGE}.check", f"loss={PACKAGE}.Loss", "loss.beta=0.1")
    changes = (*own, "max_epochs=1", "validation_dataset=null")
    said = "The code of checker_of_test.Loss, checker_of_test.check has changed since"

    class Edits(stops_at(2)):
        def augment_dataloader(self, iteration):
            edit(checker)
            return super().augment_dataloader(iteration)

    def codes():
        stores = [PairStore.open(tmp_path / "run" / f"iteration_{i:03d}" / "checked") for i in range(2)]
        return [store.manifest["fingerprint"]["checker"]["source"] for store in stores]

    begun = file_sha256(checker.__file__)
    run(tmp_path / "run", *changes, recipe_class=Edits)
    import_again()
    assert said not in caplog.text
    run(tmp_path / "run", *changes, recipe_class=stops_at(7))
    assert caplog.text.count(said) == 1
    assert codes() == [begun, file_sha256(checker.__file__)] and begun != file_sha256(checker.__file__)
    caplog.clear()
    run(tmp_path / "run", *changes)
    assert said not in caplog.text


def test_code_of_an_archive_is_known_and_what_comes_from_no_file_runs_too(tokenizer, tmp_path, monkeypatch):
    code = "def check(prompt, real, generated, truncated):\n    return True\n"
    code += "made = type(check)(check.__code__, {'__name__': 'a_zipped.made'})\n"
    with zipfile.ZipFile(tmp_path / "site.zip", "w") as archive:
        archive.writestr("a_zipped.py", code)
    monkeypatch.setenv("SPIN_ALLOW_COMPONENTS", "a_zipped")
    monkeypatch.syspath_prepend(tmp_path / "site.zip")
    for name, digest in {"check": hashlib.sha256(code.encode()).hexdigest(), "made": ""}.items():
        cfg = tiny_config("runs/none", f"pairs.checker=a_zipped.{name}")
        assert own_code(cfg) == {f"a_zipped.{name}": digest}
        assert checked(played(tmp_path / name, tokenizer), tokenizer, cfg.pairs.checker)["right_fraction"] == 1


def test_a_key_of_a_server_is_written_nowhere(checker, tokenizer, tmp_path):
    """Another one asks for no verdict again, and a resume does not refuse it."""
    folder, prints = played(tmp_path / "it", tokenizer), []
    for key in ("hidden-once", "hidden-twice"):
        cfg = tiny_config("runs/none", f"pairs.checker={{_component_: {PACKAGE}.check, api_key: {key}, mark: m}}")
        checked(folder, tokenizer, cfg.pairs.checker)
        prints.append(run_fingerprint(cfg, "data", "tokens"))
    assert len(checker.calls) == 2 * SAMPLES and prints[0] == prints[1]
    assert prints[0]["pairs"]["checker"]["mark"] == "m"
    assert "hidden" not in (folder / "checked" / "manifest.json").read_text() + str(prints)


def test_without_one_nothing_changes(tokenizer, tmp_path):
    cfg = tiny_config("runs/none")
    assert "checker" not in run_fingerprint(cfg, "data", "tokens")["pairs"]
    folder = played(tmp_path / "it", tokenizer)
    assert check_responses([folder], cfg.pairs.checker, tokenizer, init_world("cpu"), bool) == {}
    assert set(filtered_responses([folder], cfg.pairs).counts) == set()
    assert not (folder / "checked").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"pairs.checker={PACKAGE}.chekc", "has no 'chekc'. Did you mean 'check'"),
        (f"pairs.checker={PACKAGE}.Checker", "Checker is a class, expected a function"),
        (f"pairs.checker={PACKAGE}.Checker.method", "missing a required argument: 'self'; it is called with prompt"),
        (f"pairs.checker={PACKAGE}.check_async", "check_async is an async function"),
        (f"pairs.checker={PACKAGE}.check_many", "check_many is a generator function"),
        (f"pairs.checker={{_component_: {PACKAGE}.check, marc: 1}}", "marc: .*Did you mean 'mark'"),
        (f"pairs.checker={{_component_: {PACKAGE}.check, real: 1}}", "checker.real: the recipe supplies it"),
        (f"pairs.checker={{_component_: {PACKAGE}.check, right_weight: 2}}", "right_weight: found 2"),
        ("pairs.checker=another.check", r"the section takes a function of your own.*allow_components=\[another\]"),
        ("pairs.checker=os.system", "belongs to Python itself"),
    ],
)
def test_refused_before_anything_is_loaded(checker, override, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("runs/none", override)
