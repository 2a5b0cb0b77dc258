"""`spin export`: a folder that loads, and a card that says where it comes from."""

import hashlib
import re
import shutil

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save

from spin.cli import main
from spin.cli.card import model_card
from tests.report_runs import write_fixed_prompts, write_run


@pytest.fixture
def run_folder(tmp_path, tiny_lm):
    """Two finished iterations whose models are real ones, and a third that is not finished."""
    changes = {
        "max_iterations": 3, "loss": {"beta": [0.1, 0.2, 0.3]}, "checkpointer": {"checkpoint_dir": "/models/Some-1B"},
        "dataset": {"source": "org/data|set"}, "global_batch_size": 4,
    }  # fmt: skip
    folder = write_run(tmp_path / "run", iterations=3, steps=5, finished=False, config=changes)
    for iteration in (0, 1):
        model = folder / f"iteration_{iteration:03d}" / "hf_model"
        shutil.rmtree(model)
        shutil.copytree(tiny_lm, model)
    return folder


def test_the_last_finished_iteration_is_exported_elsewhere(run_folder, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "model"
    assert main(["export", str(run_folder), "--out", str(out), "--base-model", "org/Some-1B", "--license", "mit"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == "org/Some-1B" and head["license"] == "mit" and "spin" in head["tags"]
    assert "# org/Some-1B, SPIN iteration 1" in card and "after 2 iterations" in card
    assert "/models" not in card and "| `Some-1B` |" in card and "`org/data\\|set`" in card
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith(("| 0 |", "| 1 |"))]
    assert [row[1] for row in rows] == ["0.1", "0.2"] and [row[2] for row in rows] == ["5", "5"]
    assert rows[0][3].startswith("0.6931 to 0.1269") and "2.9000" in rows[0][5]
    assert f"`{'d' * 64}`" in card and f"| opponent of iteration 1 | `{'0' * 64}`" in card
    assert "opponent of iteration 2" not in card
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    assert digest in card and "beta:" in card
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    assert "datasets" not in head and "## Samples" not in card and "chen2024selfplay" in card


def test_the_code_on_the_card_runs(run_folder, tmp_path, monkeypatch, capsys):
    """As it stands there, in the folder of the card; what it prints is an answer of the model."""
    out = tmp_path / "model"
    assert main(["export", str(run_folder), "--out", str(out)]) == 0
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), flags=re.DOTALL)[1]
    capsys.readouterr()
    monkeypatch.chdir(out)
    torch.manual_seed(0)  # a pipeline samples
    exec(compile(code, "card", "exec"), {})
    answer = capsys.readouterr().out.strip()
    assert len(answer.split()) > 3 and "What is self-play" not in answer and "<|" not in answer


def test_data_sets_and_samples_are_on_the_card(run_folder):
    """A local file is no data set of huggingface.co; a response cannot end the block that it stands in."""
    cfg = OmegaConf.load(run_folder / "config.yaml")
    cfg.dataset = {"sources": {"a": {"source": "org/data"}, "b": {"source": "data/mine.jsonl"}}}
    OmegaConf.save(cfg, run_folder / "config.yaml")
    hostile = "```\n# Owned\n<img src=x>\x1b[2J"
    write_fixed_prompts(run_folder, ["First.", "Second.", hostile])
    model = run_folder / "iteration_001" / "hf_model"
    card = model_card(run_folder, 1, model, name="org/my-model")
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["org/data"]
    block = re.search(r"^(````+)text\n(.*?)\n\1$", card, flags=re.MULTILINE | re.DOTALL)[2]
    for part in ("[system]\nBe.", "[user]\nSay it.", "[before self-play]\nFirst.", "[this model]\n```\n# Owned"):
        assert part in block
    assert "Second." not in card and "\x1b" not in card and r"\x1b[2J" in block
    assert (
        "vllm serve org/my-model" in card
        and "First." not in model_card(run_folder, 0, model).partition("[this model]")[2]
    )


def test_the_options_that_were_used_are_on_the_card(run_folder):
    """Only what was used: the rest of the config stands below."""
    cfg = OmegaConf.load(run_folder / "config.yaml")
    card = model_card(run_folder, 0, run_folder / "iteration_000" / "hf_model")
    assert not any(words in card for words in ("responses to a prompt", "streamed"))
    cfg.pairs = {"responses_per_prompt": 2, "history": 1}
    cfg.dataset |= {"streaming": True, "limit": 640}
    OmegaConf.save(cfg, run_folder / "config.yaml")
    card = model_card(run_folder, 0, run_folder / "iteration_000" / "hf_model")
    for row in ("responses to a prompt | 2", "earlier iterations trained on | 1", "of an iteration, streamed | 640"):
        assert f"{row} |" in card


def test_a_card_is_added_to_an_iterations_own_folder(run_folder, capsys):
    assert main(["export", str(run_folder), "--iteration", "0"]) == 0
    model = run_folder / "iteration_000" / "hf_model"
    assert capsys.readouterr().out == f"{model}\n"
    card = (model / "README.md").read_text()
    assert "# Some-1B, SPIN iteration 0" in card and "base_model" not in card
    assert not (run_folder / "iteration_001" / "hf_model" / "README.md").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter"], "its iterations have no adapter, only LoRA runs do"),
        (["--iteration", "2"], "iteration 2 has no model; finished are 0, 1"),
        (["--out", "."], "is there already"),
        (["--out", "run/config.yaml/model"], "config.yaml is not a folder). Change --out."),
    ],
)
def test_what_cannot_be_exported_is_refused(run_folder, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run_folder), *options]) == 1
    assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_adapter_of_a_lora_run(run_folder, tmp_path):
    """Asked for, or all there is; its card says that peft reads it."""
    adapter = run_folder / "iteration_001" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_bytes(save({"w": torch.ones(1)}))
    assert main(["export", str(run_folder), "--adapter", "--out", str(tmp_path / "asked")]) == 0
    shutil.rmtree(run_folder / "iteration_001" / "hf_model")
    assert main(["export", str(run_folder), "--out", str(tmp_path / "only")]) == 0
    for out in (tmp_path / "asked", tmp_path / "only"):
        assert (out / "adapter_model.safetensors").read_bytes() == save({"w": torch.ones(1)})
        assert "library_name: peft" in (out / "README.md").read_text()


def test_a_run_without_a_finished_iteration_or_a_config_is_refused(run_folder, capsys):
    (run_folder / "config.yaml").unlink()
    assert main(["export", str(run_folder)]) == 1
    assert "config.yaml: missing" in capsys.readouterr().err
    for iteration in (0, 1):
        (run_folder / f"iteration_{iteration:03d}" / "hf_model" / "config.json").unlink()
    assert main(["export", str(run_folder)]) == 1
    assert "no iteration is finished" in capsys.readouterr().err
