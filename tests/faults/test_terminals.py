"""Foreign text that a terminal would obey, or that reads backwards: shown escaped wherever it is shown."""

import json
import logging
import sys
import unicodedata

import pytest
from transformers import AutoTokenizer

from spin import config
from spin.cli import main
from spin.core.terminal import get_logger, printable
from spin.data import Pair, PairStore, Response
from spin.evaluation.verdicts import summary_table
from spin.run.messages import iteration_summary, sample_table
from tests.recipes.helpers import CONFIG, tiny_overrides
from tests.report_runs import write_run

# a title, a cleared screen, a return, a right-to-left override, an isolate, a C1 colour, a separator, a tag, a mark
ATTACK = "a\x1b]0;owned\x07\x1b[2J\rb\u202egnp.exe\u2066\x9b31m\x7f\u2028\U000e0041\u200ez"
SHOWN = r"a\x1b]0;owned\x07\x1b[2J\rb\u202egnp.exe\u2066\x9b31m\x7f\u2028\U000e0041\u200ez"


def unseen(text):
    """What is left of characters that a terminal obeys, or that reorder others."""
    reordering = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    obeyed = {c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")} - {"\n", "\t"}
    return obeyed | {c for c in text if unicodedata.bidirectional(c) in reordering}


def test_what_is_escaped_and_what_is_not():
    assert printable(ATTACK) == SHOWN
    fine = "Größe, 東京, שלום, 👩‍💻\n\ttabs and lines"
    assert printable(fine) == fine
    assert printable("a\nb\tc", one_line=True) == r"a\nb\tc"


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_lm):
    """One pair whose name and texts hold the attack, within a run's folder."""
    run = write_run(tmp_path_factory.mktemp("run"), iterations=1, config={"tokenizer": {"path": str(tiny_lm)}})
    ids = AutoTokenizer.from_pretrained(tiny_lm).encode(ATTACK, add_special_tokens=False)
    store = PairStore.open_or_create(run / "mine", {"opponent": ATTACK}, 1)
    store.write_shard(0, [Pair(ATTACK, 0, ids, ids, [Response(ids, "stop", None)], None)])
    store.seal({})
    return store.path


def test_pairs(store, tiny_lm, capsys):
    assert main(["pairs", str(store), "--sample", "1", "--tokenizer", str(tiny_lm)]) == 0
    out = capsys.readouterr().out
    assert not unseen(out)
    assert out.count(SHOWN) == 5  # opponent, sample_id, prompt, real, generated


def test_errors_of_commands(tmp_path, capsys):
    assert main(["report", str(tmp_path / ATTACK)]) == 1
    err = capsys.readouterr().err
    assert not unseen(err) and err.startswith("error: ") and SHOWN in err


def test_validate(tmp_path, capsys):
    """Bad rows quote the data, and the file's name."""
    data = tmp_path / "data\x1b[2J.jsonl"
    data.write_text(json.dumps({"prompt": "x", ATTACK: "y"}) + "\n" + json.dumps({"prompt": ATTACK, "response": ""}))
    overrides = [*tiny_overrides(tmp_path), f"dataset.source={json.dumps(str(data))}"]
    assert main(["validate", str(CONFIG), *overrides]) == 1
    out, err = capsys.readouterr()
    assert not unseen(out + err) and r"data\x1b[2J.jsonl" in out


@pytest.mark.parametrize("rank", ["0", "1"])
def test_errors_of_recipes(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", ATTACK])

    @config.parse(config.Section)
    def recipe_main(cfg):
        """Never runs."""

    with pytest.raises(SystemExit) as end:
        recipe_main()
    err = capsys.readouterr().err
    assert end.value.code == 1 and err.startswith("error") and not unseen(err) and r"\x1b]0;owned" in err


def test_logs(monkeypatch, capfd):
    """The handler that this package sets up where the program has none."""
    log = logging.getLogger("spin")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "level", logging.INFO)
    get_logger().warning("the server said %s", ATTACK)
    assert capfd.readouterr().err == f"the server said {SHOWN}\n"


def test_tables(tmp_path):
    row = {"prompt": f"{ATTACK}\r\n2", "real": ATTACK, "generated": ATTACK, "margin": 1.0}
    player = {"name": ATTACK, "mean_tokens": 1.0, "truncated_fraction": 0.0}
    summary = {"candidate": player, "baseline": player, "samples": 1, "wins": 1, "ties": 0, "losses": 0}
    folder = tmp_path / ATTACK
    for text in (
        sample_table([row]),
        summary_table({**summary, "unreadable": 0, "win_rate": None}),
        iteration_summary("iteration 0", [], None, folder, folder, folder),
    ):
        assert not unseen(text) and r"\x1b" in text


def test_report(tmp_path):
    """Texts, attributes, labels of charts, the config; markup is escaped as ever."""
    script = f"\"'><script>alert(1)</script>{ATTACK}"
    config = {script: script, "checkpointer": {"checkpoint_dir": "m"}, "dataset": {"source": ATTACK}}
    changes = {f"val_loss/{script}": 1.0}
    run = write_run(tmp_path, iterations=1, prompt=script, config=config, changes=lambda _: changes)
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert not unseen(page) and "<script>alert" not in page and page.count(r"\x1b]0;owned") >= 4
    assert main(["export", str(run)]) == 0
    card = (run / "iteration_000" / "hf_model" / "README.md").read_text()
    assert not unseen(card) and SHOWN in card
