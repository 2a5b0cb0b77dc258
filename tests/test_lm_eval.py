"""lm-eval on an exported folder: the documented command, and the log-probs that it finds against transformers' own."""

import json
import os
import subprocess
import sys

import pytest
import torch

from spin.data import ChatTokenizer
from spin.data.sources import read_rows

DATA = "examples/quickstart/jargon_val.jsonl"


@pytest.fixture(scope="module")
def asked(repo):
    """The rows as the task asks them, by a list in place of a datasets.Dataset."""
    sys.path.insert(0, str(repo / "examples" / "lm_eval"))
    try:
        from jargon import with_choices
    finally:
        sys.path.pop(0)
    rows = [row.data for row in read_rows(str(repo / DATA))]

    class Docs(list):
        column_names = ("id", "messages")

        def __getitem__(self, name):
            return [row[name] for row in self] if isinstance(name, str) else super().__getitem__(name)

        def map(self, ask, with_indices, remove_columns):
            assert with_indices and remove_columns == self.column_names
            return [ask(row, index) for index, row in enumerate(self)]

    return rows, with_choices(Docs(rows))


def test_the_right_choice_is_the_rows_own_and_stands_in_every_place(asked):
    rows, docs = asked
    assert len(docs) == len(rows) == 102
    for row, doc in zip(rows, docs, strict=True):
        assert doc["question"] == row["messages"][0]["content"]
        assert doc["choices"][doc["right"]] == row["messages"][1]["content"]
        assert len(set(doc["choices"])) == 4
    places = [doc["right"] for doc in docs]
    assert sorted(map(places.count, range(4))) == [25, 25, 26, 26]


@pytest.mark.slow
def test_lm_eval_asks_what_training_saw(repo, tiny_lm, asked, tmp_path):
    """The documented command on the test model. Expected: log-probs of each choice behind the prompt's token ids as
    spin.data.ChatTokenizer makes them, by transformers; so chat template, special tokens and weights agree."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `eval`)")
    from transformers import AutoModelForCausalLM

    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tiny_lm},dtype=float32",
        "--include_path", "examples/lm_eval", "--tasks", "jargon_choice", "--apply_chat_template", "--device", "cpu",
        "--batch_size", "4", "--limit", "8", "--log_samples", "--output_path", str(tmp_path / "results"),
    ]  # fmt: skip
    env = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "|jargon_choice|" in done.stdout
    (samples,) = (tmp_path / "results").rglob("samples_jargon_choice_*.jsonl")
    found = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    tokenizer, model = ChatTokenizer(tiny_lm), AutoModelForCausalLM.from_pretrained(tiny_lm, dtype=torch.float32)
    right = 0
    for sample in sorted(found, key=lambda sample: sample["doc_id"]):
        doc = asked[1][sample["doc_id"]]
        logps = []
        for choice in doc["choices"]:
            prompt, answer = tokenizer.encode_pair(
                [{"role": "user", "content": doc["question"]}, {"role": "assistant", "content": choice}]
            )
            ids = torch.tensor([[*prompt, *answer[:-1]]])  # lm-eval asks for the text alone, not for its end
            with torch.no_grad():
                token_logps = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            logps.append(token_logps.gather(1, ids[0, len(prompt) :, None]).sum().item())
        assert [float(logp) for ((logp, _),) in sample["resps"]] == pytest.approx(logps, abs=2e-3)
        right += max(range(4), key=logps.__getitem__) == doc["right"]
    assert len(found) == 8 and sum(sample["acc"] for sample in found) == right
