"""What follows from a model's folder and the hardware; names on huggingface.co, from a cache made on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import errors

from spin.config import EvaluateConfig, SPINConfig, complete, load_config, plain
from spin.core.dtypes import has_fast_bf16
from spin.core.errors import ConfigError
from spin.core.hub import hub_name, model_folder
from spin.run.resume import run_fingerprint

FOLDER = "tests/assets/tiny_lm"
DATA = "dataset: {source: examples/quickstart/jargon_train.jsonl, on_long_response: drop}\noutput_dir: runs/none\n"


@pytest.fixture
def finished(tmp_path, repo, monkeypatch):
    """Completes a config of these lines."""
    monkeypatch.chdir(repo)

    def complete_(text, *overrides, model=SPINConfig):
        (tmp_path / "c.yaml").write_text(text)
        return complete(load_config(str(tmp_path / "c.yaml"), overrides), model)

    return complete_


def test_a_folder_and_data_are_a_config(finished):
    cfg = finished(f"model: {{path: {FOLDER}}}\n{DATA}")
    assert plain(cfg.model) == {"_component_": "spin.model.from_hf", "path": FOLDER}
    assert plain(cfg.tokenizer) == {"_component_": "spin.data.ChatTokenizer", "path": FOLDER}
    component = {"_component_": "spin.checkpoint.SPINCheckpointer"}
    assert plain(cfg.checkpointer) == component | {"checkpoint_dir": FOLDER, "output_dir": "runs/none"}
    assert cfg.base_dtype is None


@pytest.mark.parametrize("key", ["lora_attn_modules=[q_proj]", "apply_lora_to_mlp=true"])
def test_adapters_get_their_checkpointer_and_a_base_in_the_dtype_of_the_arithmetic(finished, key):
    cfg = finished(f"model: {{path: {FOLDER}}}\n{DATA}", f"model.{key}", "device=cuda")
    assert cfg.checkpointer.component == "spin.checkpoint.LoRACheckpointer"
    assert cfg.base_dtype == cfg.compute_dtype == "bf16"


def test_what_a_config_sets_stays(finished, tmp_path):
    sections = f"tokenizer: {{path: {tmp_path}}}\ncheckpointer: {{checkpoint_dir: {tmp_path}, keep_last: 5}}\n"
    cfg = finished(f"model: {{path: {FOLDER}}}\n{sections}{DATA}base_dtype: null\n", "output_dir=elsewhere")
    assert cfg.tokenizer.path == cfg.checkpointer.checkpoint_dir == str(tmp_path)
    assert (cfg.checkpointer.keep_last, cfg.checkpointer.output_dir) == (5, "elsewhere")


def test_vllm_takes_its_names_from_the_folder(finished):
    text = f"model: {{path: {FOLDER}}}\n{DATA}"
    assert finished(text, "generator=spin.generators.VLLMGenerator").generator.model_dir == FOLDER
    server = "generator={_component_: spin.generators.VLLMServerGenerator, url: http://localhost:8000"
    assert finished(text, f"{server}, transfer_dir: runs/t}}").generator.model_dir == FOLDER
    assert "model_dir" not in plain(finished(text, f"{server}}}").generator)


def test_a_builder_of_torchtune_has_no_folder_to_follow(finished):
    text = f"model: torchtune.models.llama3_2.llama3_2_1b\n{DATA}"
    with pytest.raises(ConfigError, match=r"(?s)^2 faults.*tokenizer\.path: not set.*checkpoint_dir: not set"):
        finished(text)
    given = ["tokenizer.path=a", "checkpointer.checkpoint_dir=b", "checkpointer.model_type=LLAMA3_2"]
    assert finished(text, *given).checkpointer.model_type == "LLAMA3_2"


def test_the_models_of_an_evaluation_need_their_folder_alone(finished):
    roles = "".join(f"{role}: {{name: {role}, checkpoint_dir: {FOLDER}}}\n" for role in ("candidate", "baseline"))
    cfg = finished(roles + DATA, "verdict=exact_match", model=EvaluateConfig)
    for section in (cfg.candidate, cfg.baseline):
        assert section.model.path == section.tokenizer.path == FOLDER and section.model_type is None


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("cuda", "fp32", "bf16"),
        ("cpu", "fp32", "bf16" if has_fast_bf16() else "fp32"),
        ("cpu", "bf16", "bf16"),  # weights are not computed in more precision than they have
    ],
)
def test_auto_is_settled_once_and_recorded(finished, device, dtype, expected):
    text = f"model: {{path: {FOLDER}}}\n{DATA}device: {device}\ndtype: {dtype}\n"
    assert finished(text).compute_dtype == finished(text)._written.compute_dtype == expected
    assert run_fingerprint(finished(text), "data", "tokens")["compute_dtype"] == expected
    assert finished(text, "compute_dtype=bf16").compute_dtype == "bf16"


def test_a_run_may_find_its_folder_elsewhere_but_not_another_model_in_it(finished, tmp_path):
    moved = shutil.copytree(FOLDER, tmp_path / "moved")
    text = f"model: {{path: {FOLDER}}}\n{DATA}"
    first, second = (run_fingerprint(finished(text, f"model.path={path}"), "d", "t") for path in (FOLDER, moved))
    assert first == second
    config = (moved / "config.json").read_text()
    (moved / "config.json").write_text(config.replace("10000.0", "20000.0"))
    assert run_fingerprint(finished(text, f"model.path={moved}"), "d", "t") != first


# --- Names on huggingface.co ---

NAME = "someone/tiny-lm"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, repo):
    """HF_HOME with one model, as huggingface_hub lays it out."""
    model = tmp_path / "hf" / "hub" / "models--someone--tiny-lm"
    shutil.copytree(repo / FOLDER, model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hf"


def spin(repo, cwd, cache, *arguments, **environment):
    """The command line without a network: nothing but HF_HOME and HF_HUB_OFFLINE is set."""
    env = os.environ | {"PYTHONPATH": f"{repo}:{repo / 'recipes'}", "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env | environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_name_is_the_folder_in_the_cache_and_runs(repo, tmp_path, cache):
    """A run of one step by name; its record has the folder, from which the card takes the name again."""
    run = tmp_path / "run"
    overrides = [
        f"model.path={NAME}", f"dataset.source={repo / 'examples/quickstart/jargon_train.jsonl'}", "device=cpu",
        "compile=false", "max_iterations=1", "max_epochs=1", "max_steps=1", "limit_train_batches=1",
        "global_batch_size=2", "sampling.max_new_tokens=4", f"output_dir={run}", "dataset.max_prompt_tokens=100",
        "dataset.max_response_tokens=80", "val_check_interval=1.0",
    ]  # fmt: skip
    result = spin(repo, tmp_path, cache, "-m", "spin_recipe", "--config", "full", *overrides)
    assert result.returncode == 0, result.stderr
    folder = cache / "hub" / "models--someone--tiny-lm" / "snapshots" / COMMIT
    recorded = load_config(str(run / "config.yaml"))
    places = (recorded.model.path, recorded.tokenizer.path, recorded.checkpointer.checkpoint_dir)
    assert set(places) == {str(folder)} and hub_name(folder) == NAME
    card = spin(repo, tmp_path, cache, "-m", "spin", "export", run, "--out", tmp_path / "card")
    assert card.returncode == 0, card.stderr
    assert f"base_model: {NAME}" in (tmp_path / "card" / "README.md").read_text()


def test_a_name_that_is_not_in_the_cache_says_what_to_do(repo, tmp_path, cache):
    arguments = ["validate", "full", "model.path=someone/other", "dataset.source=x.jsonl"]
    result = spin(repo, tmp_path, cache, "-m", "spin", *arguments)
    assert result.returncode == 1
    assert "model.path: 'someone/other' is no folder here" in result.stdout
    assert "`hf download someone/other`" in result.stdout


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("GatedRepoError", "gated. Accept its licence on https://huggingface.co/a/b and set HF_TOKEN."),
        ("RepositoryNotFoundError", "no model of this name, or a private one. Check the name, or set HF_TOKEN."),
        ("LocalEntryNotFoundError", "cannot be reached. Check the name and the network, or"),
        ("OfflineModeIsEnabled", "its download failed (OfflineModeIsEnabled: 500 down)."),
    ],
)
def test_an_error_of_the_hub_is_one_line_that_says_what_to_do(monkeypatch, error, text):
    kind = getattr(errors, error)

    def fail(*_, **__):
        found = kind.__new__(kind, "500\n\ndown")  # newer versions want the library's response, older ones another's
        raise found

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError) as caught:
        model_folder("a/b", "model.path")
    message = str(caught.value)
    assert text in message and message.startswith("model.path: 'a/b' is no folder here, and ")
    assert "\n" not in message and len(message) < 250


def test_a_local_folder_wins_and_other_texts_are_no_names(tmp_path, monkeypatch):
    (tmp_path / "someone" / "tiny-lm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text in (NAME, "/nowhere/at/all", "./someone/else", "a/b/c", "gpt2"):
        assert model_folder(text, "model.path") == text
    assert hub_name(tmp_path) is None
