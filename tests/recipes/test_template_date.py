"""A chat template that writes the date: one date for a run, whenever and wherever its parts start.

Time zones stand for days: where one part of the Earth has UTC-12 and another UTC+14, it is never the same day.
"""

import datetime
import json
import sys
import time

import pytest

from spin.core.errors import CheckpointError, DataError
from spin.data import ChatTokenizer, PairStore
from tests.recipes.helpers import REPO, command, evaluate, generate, metrics_of, run

TEMPLATE = (
    "<|im_start|>system\nToday is {{ strftime_now('%Y-%m-%d') }}.<|im_end|>\n{% for m in messages %}<|im_start|>"
    "{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EARLY, LATE = "Etc/GMT+12", "Etc/GMT-14"
SHORT = ("max_epochs=1", "limit_train_batches=2", "validation_dataset=null", "sampling.max_new_tokens=4")


@pytest.fixture
def zone(monkeypatch):
    """Puts this process into a time zone; gives the day there."""

    def move(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()
        return datetime.date.today().isoformat()

    yield move
    monkeypatch.undo()
    time.tzset()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "dated.jinja"
    file.write_text(TEMPLATE)
    return f"tokenizer.chat_template={file}"


def days_in(store, tiny_lm):
    """The dates in the prompts of a store."""
    decode = ChatTokenizer(tiny_lm).decode
    return {decode(pair.prompt_ids).partition("Today is ")[2][:10] for pair in PairStore.open(store).pairs()}


def test_a_run_that_resumes_the_next_day(tmp_path, template, zone, tiny_lm):
    """Prompts keep the day of the first start; one that was asked for is another run."""
    first = zone(EARLY)
    run(tmp_path, template, *SHORT, "max_steps=1")
    kept = tmp_path / "template_date.json"
    assert json.loads(kept.read_text())["date"] == first
    later = zone(LATE)
    assert later != first
    run(tmp_path, template, *SHORT)
    assert len(metrics_of(tmp_path)) == 4
    for iteration in range(2):
        assert days_in(tmp_path / f"iteration_{iteration:03d}/pairs", tiny_lm) == {first}
    exported = tmp_path / "iteration_001/hf_model"
    assert (exported / "chat_template.jinja").read_text() == TEMPLATE  # with a clock of its own
    with pytest.raises(CheckpointError, match=rf"tokenizer\.date is '{later}', was 'absent'"):
        run(tmp_path, template, *SHORT, f"tokenizer.date={later}")
    assert json.loads(kept.read_text())["date"] == first
    kept.write_text('{"date": "today"}')
    with pytest.raises(DataError, match=r"template_date\.json: expected .*set tokenizer\.date to that"):
        run(tmp_path, template, *SHORT)


def test_workers_and_the_run_after_them(tmp_path, template, zone, tiny_lm, caplog):
    """Worker 1 starts a day later, the run too; nobody sets another one's shards aside."""
    first = zone(EARLY)
    generate(tmp_path, *SHORT, template, "worker=0", "num_workers=2")
    zone(LATE)
    generate(tmp_path, *SHORT, template, "worker=1", "num_workers=2")
    assert days_in(tmp_path / "iteration_000/responses", tiny_lm) == {first}
    run(tmp_path, template, *SHORT, "max_steps=1")
    assert not list((tmp_path / "iteration_000").glob("*.stale-*"))


def test_a_date_of_the_config(tmp_path, template, tiny_lm):
    generate(tmp_path / "set", *SHORT, template, "tokenizer.date=2026-01-31")
    assert days_in(tmp_path / "set/iteration_000/responses", tiny_lm) == {"2026-01-31"}
    assert json.loads((tmp_path / "set/template_date.json").read_text())["date"] == "2026-01-31"
    generate(tmp_path / "none", *SHORT)
    assert not (tmp_path / "none/template_date.json").exists()


def test_an_evaluation_asks_with_the_date_of_the_run(tmp_path, template, tiny_lm):
    """The baseline too, which is of no run."""
    model = tmp_path / "run/iteration_001/hf_model"
    model.parent.mkdir(parents=True)
    model.symlink_to(tiny_lm)
    (tmp_path / "run/template_date.json").write_text('{"kind": "spin.template_date", "date": "2026-01-31"}')
    overrides = [
        f"candidate.checkpoint_dir={model}", f"baseline.checkpoint_dir={tiny_lm}",
        f"candidate.{template}", f"baseline.{template}", "verdict=exact_match", "sampling.max_new_tokens=2",
        f"dataset.source={REPO / 'examples/quickstart/jargon_val.jsonl'}", "dataset.limit=2",
    ]  # fmt: skip
    evaluate(tmp_path / "out", *overrides)
    for name in ("trained", "start"):
        assert days_in(tmp_path / "out/responses" / name, tiny_lm) == {"2026-01-31"}


@pytest.mark.slow
def test_ranks_on_two_sides_of_midnight(tmp_path, template, tiny_lm):
    """Each rank has a day of its own; rank 0's counts."""
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, time\n"
        f"os.environ['TZ'] = ['{EARLY}', '{LATE}'][int(os.environ['RANK'])]\n"
        "time.tzset()\n"
        "import spin_generate\n"
        "spin_generate.recipe_main()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    before = _early_today()
    command(tmp_path / "out", template, *SHORT, program=launcher)
    days = days_in(tmp_path / "out/iteration_000/responses", tiny_lm)
    assert days in ({before}, {_early_today()})


def _early_today():
    return (datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=12)).date().isoformat()
