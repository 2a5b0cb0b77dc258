"""`spin validate`: every fault by its place, nothing loaded or written, the run's own arithmetic."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from omegaconf import OmegaConf

from spin.cli import main
from spin.cli.checks import compare_ids
from spin.config import SPINConfig, complete, load_config
from spin.core.ranks import init_world
from spin.data import ChatTokenizer
from spin.data.inputs import read_inputs
from spin.model.build import build_model
from tests.data.test_chat_templates import CHATML, QWEN3
from tests.recipes.helpers import CONFIG, REPO, tiny_overrides


@pytest.fixture
def validate(tmp_path, capsys, monkeypatch):
    """Exit code, stdout and stderr for the test config with changes; loading weights is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("spin.model.hf.read_rows", refuse)

    def run(*changes, config=CONFIG):
        code = main(["validate", str(config), *tiny_overrides(tmp_path / "out"), *changes])
        out, err = capsys.readouterr()
        assert not (tmp_path / "out").exists() and "Traceback" not in err
        return code, out, err

    return run


def verdicts(out):
    return {line[:16].strip(): line[17:22].strip() for line in out.splitlines() if line[:1] not in ("", " ")}


def test_a_config_that_works(validate):
    """20 samples in batches of 4, 2 epochs, 2 iterations: 20 steps. 20 prompts in shards of 6 are 4 shards."""
    code, out, err = validate()
    assert code == 0 and err == ""
    assert set(verdicts(out).values()) == {"ok"} and len(verdicts(out)) == 14
    assert "20 steps: 2 iterations x 2 epochs x 5 steps of 4 prompts" in out
    assert "20 prompts in an iteration (0 left over), in 4 shards" in out
    assert "validation every 2 steps; checkpoint every 2 steps; 6 validation samples" in out
    assert "918,656 parameters" in out and "vocabulary 1,024" in out and "2 '<|im_end|>'" in out
    assert "jargon_train.jsonl:1 (83 tokens)" in out  # what is cut is said


def test_templates_that_do_not_fit(validate, tmp_path):
    """Responses without reasoning are a fault of the data where a template has the model reason, and the remedy that is
    named works; a template that ignores the user is a fault of its own."""
    (tmp_path / "reasons.jinja").write_text(QWEN3)
    template = f"tokenizer.chat_template={tmp_path / 'reasons.jinja'}"
    code, out, _ = validate(template)
    assert code == 1 and verdicts(out)["data"] == "FAULT" and verdicts(out)["round trip"] == "ok"
    assert "Set tokenizer.template_options.enable_thinking=false, or give the real responses with their" in out
    code, out, _ = validate(template, "tokenizer.template_options.enable_thinking=false")
    assert code == 0 and set(verdicts(out).values()) == {"ok"}
    code, out, _ = validate(template, "tokenizer.template_options.enable_thinkin=false")
    assert code == 1 and verdicts(out)["tokenizer"] == "FAULT" and "it reads enable_thinking." in out
    (tmp_path / "deaf.jinja").write_text(CHATML.replace("m.content", "(m.content if m.role != 'user' else '')"))
    code, out, _ = validate(f"tokenizer.chat_template={tmp_path / 'deaf.jinja'}")
    assert code == 1 and verdicts(out)["tokenizer"] == "FAULT" and "does not show what the user says" in out


@pytest.fixture
def folder_of(tmp_path):
    """The test model's folder with another config.json."""

    def make(**changes):
        folder = shutil.copytree(REPO / "tests/assets/tiny_lm", tmp_path / "model")
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return f"checkpointer.checkpoint_dir={folder}"

    return make


def test_logits_are_compared_with_transformers_of_adapters_too(validate):
    code, out, err = validate("--logits")
    assert code == 0 and err == "" and verdicts(out)["logits"] == "ok" and len(verdicts(out)) == 15
    assert "largest difference to the logits of transformers" in out and "layers 0, 1, " in out
    code, out, _ = validate("--logits", config=CONFIG.with_name("tiny_lora.yaml"))
    assert code == 0 and verdicts(out)["logits"] == "ok" and "for spin_recipe" in out
    code, out, _ = validate("enable_float8_training=true", config=CONFIG.with_name("tiny_lora.yaml"))
    assert code == 1 and "enable_float8_training=true" in out


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_theta": 500000.0}, "rope_theta is 500000.0, the model computes with rope_base 10000"),
        ({"rms_norm_eps": 0.01}, "rms_norm_eps is 0.01, the model computes with norm_eps 1e-05"),
    ],
)
def test_a_folder_whose_logits_would_be_wrong(changes, key, validate, folder_of):
    code, out, _ = validate("--logits", folder_of(**changes))
    assert code == 1 and verdicts(out)["model folder"] == verdicts(out)["logits"] == "FAULT"
    assert key in out and "expected 0.001 at most" in out


def changed_config(tmp_path, dataset):
    config = OmegaConf.load(CONFIG)
    config.dataset = dataset
    OmegaConf.save(config, tmp_path / "changed.yaml")
    return tmp_path / "changed.yaml"


def test_a_mixture(validate, tmp_path):
    """20 and 6 samples, 3 : 1. Of the 24 that the weights allow, 18 are of a, 6 of b."""
    source = {part: str(REPO / f"examples/quickstart/jargon_{part}.jsonl") for part in ("train", "val")}
    sources = {
        "a": {"source": source["train"], "limit": 20, "weight": 3},
        "b": {"source": source["val"], "limit": 6, "weight": 1},
    }
    common = {"max_response_tokens": 80, "on_long_response": "cut"}
    mixture = {"_component_": "spin.data.mixed_prompt_dataset", "common": common, "sources": sources}
    code, out, err = validate("~dataset.source", config=changed_config(tmp_path, mixture))
    assert code == 0, out + err
    assert "26 samples of 26 rows" in out and "of 24 that an iteration can take: a 18, b 6" in out
    assert "24 prompts in an iteration" in out and "in the first 200 conversations" in out
    sources["b"]["wieght"] = 2
    code, out, _ = validate("~dataset.source", config=changed_config(tmp_path, mixture))
    assert code == 1 and "dataset.sources.b.wieght: unknown key. Did you mean 'weight'?" in out


def test_a_fault_names_the_set_that_has_it(validate, tmp_path):
    code, out, _ = validate("validation_dataset.source=nowhere.jsonl")
    assert code == 1 and "validation_dataset: dataset.source=nowhere.jsonl does not exist" in out
    columns = tmp_path / "columns.jsonl"
    columns.write_text('{"question": "Why?", "answer": "So."}\n')
    mapped = "dataset.column_map={prompt: question, response: answr}"
    code, out, _ = validate(f"dataset.source={columns}", mapped)
    assert code == 1 and "dataset.column_map has {response: answr}, which is not among them" in out


def test_a_logger_whose_package_is_missing_is_found_before_anything_is_loaded(validate, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "comet_ml" else there(name, *rest)
    )
    code, out, _ = validate("metric_logger=torchtune.training.metric_logging.CometLogger")
    assert code == 1 and "CometLogger needs the package comet_ml, which is not installed: pip install comet_ml" in out


def test_a_stream(validate):
    """Its first iteration is read: 8 samples; 2 steps of 4 in each of 2 x 2 epochs."""
    code, out, err = validate("dataset.streaming=true", "dataset.limit=8")
    assert code == 0, out + err
    assert "a stream, of whose first 8 rows iteration 0 takes 8 samples" in out
    assert "8 steps: 2 iterations x 2 epochs x 2 steps of 4 prompts" in out
    code, out, _ = validate("dataset.streaming=true", "dataset.limit=2000")
    assert code == 1 and "has 912 usable samples, dataset.limit=2000 asks for more" in out


def test_all_faults_of_a_config_at_once(validate):
    for changes, words in (
        (("max_epoch=1", "optimiser=x", "generator._component_=os.system"), ("3 faults", "'optimizer'?", "os.system")),
        (("loss.betta=1", "dataset.limitt=3", "ac_mode=selective"), ("3 faults", "'beta'?", "ac_option=null")),
        (("loss.beta=[0.1,-0.2]", "global_batch_size=0", "max_time=soon"), ("3 faults",)),
    ):
        code, out, _ = validate(*changes)
        assert code == 1 and verdicts(out) == {"config": "FAULT"}
        for word in (*words, *(change.partition("=")[0] for change in changes)):
            assert word in out
    code, out, _ = validate("tokenizer.path=/nowhere", "model.num_kv_heads=3")
    assert code == 1 and len(verdicts(out)) == 14
    assert "vocabulary       -      skipped: needs the model and tokenizer" in out
    assert "arithmetic       -      skipped: needs the data" in out


def test_faults_of_every_kind_in_one_pass(validate, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"messages": [{"role": "assistant", "content": ""}]},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n" + "[]\n" * 30)
    changes = ("model.vocab_size=1000", "loss.loss_type=logistik", "global_batch_size=6")
    code, out, err = validate(f"dataset.source={data}", *changes)
    assert code == 1 and "checks failed" in err
    faults = [label for label, verdict in verdicts(out).items() if verdict == "FAULT"]
    assert sorted(faults) == ["data", "loss, optimizer", "model folder", "vocabulary"]
    assert "vocab_size is 1024, the model computes with vocab_size 1000" in out and "knows 1024 token ids" in out
    assert "rows.jsonl:2: last message has role 'user'" in out and "rows.jsonl:4: " in out
    assert "rows.jsonl:5, rows.jsonl:6, rows.jsonl:7 and 27 more: found a list" in out


@pytest.mark.parametrize(
    "change",
    [
        *("~checkpointer", "~checkpointer.checkpoint_dir", "~checkpointer.model_type", "~dataset", "~dataset.source"),
        *("dataset.column_map=5", "dataset.column_map=[a]", "dataset.message_transform=5"),
        *("dataset.message_transform=nope", "dataset.message_transform={}"),
    ],
)
def test_what_is_missing_or_of_another_kind_is_a_fault_and_no_traceback(validate, change):
    code, out, err = validate(change)
    assert code == 1 and "FAULT" in verdicts(out).values() and "1 check failed" in err
    assert change.lstrip("~").split("=")[0].split(".")[0] in out


@pytest.mark.parametrize(
    ("changes", "label", "words"),
    [
        (["checkpointer.checkpoint_dir=/nowhere"], "model folder", ["/nowhere: no such folder"]),
        (["tokenizer.path=/nowhere"], "tokenizer", ["/nowhere"]),
        (["global_batch_size=400"], "arithmetic", ["global_batch_size"]),
        (["optimizer.weight_decay=-1"], "loss, optimizer", ["torch.optim.AdamW does not take these", "weight_decay"]),
        (["model.num_kv_heads=3"], "model", ["model: torchtune.models.llama3_2.llama3_2 does not take these values"]),
        (["sampling.stop_token_ids=[5000]"], "vocabulary", ["stop token 5000"]),
        (["checkpointer=spin.checkpoint.LoRACheckpointer"], "adapters", ["has no adapter. Name one of torchtune's"]),
        (["checkpointer.export_dtype=fp8"], "checkpointer", ["export_dtype is 'fp8', expected fp32"]),
        (["resume=/nope"], "checkpointer", ["/nope"]),
        (["model.attn_dropout=0.5"], "config", ["model.attn_dropout=0.5: policy and opponent would drop"]),
        (["dataset.format=foo"], "data", ["dataset.format=foo: expected one of auto, messages"]),
    ],
    ids=lambda value: str(value[0])[:40],
)
def test_single_faults(validate, changes, label, words):
    code, out, _ = validate(*changes)
    assert code == 1 and verdicts(out)[label] == "FAULT"
    for word in words:
        assert word in out


def test_an_output_folder_that_cannot_be_written(validate, tmp_path, monkeypatch, capsys):
    """Its nearest folder is asked, and nothing is made in it."""
    (tmp_path / "file").write_text("")
    code, out, _ = validate(f"output_dir={tmp_path / 'file' / 'run'}")
    assert code == 1 and verdicts(out)["output folder"] == "FAULT"
    assert f"cannot write ({tmp_path / 'file'} is not a folder). Change output_dir." in out
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))  # whoever runs the tests
    code, out, _ = validate("tokenizer.path=/nowhere", "checkpointer.checkpoint_dir=/nowhere")
    assert code == 1 and verdicts(out)["output folder"] == "FAULT"
    assert f"out: cannot write ({tmp_path} may not be written to). Change output_dir." in out
    assert main(["validate", "quickstart/evaluate", f"output_dir={tmp_path / 'out'}"]) == 1
    assert verdicts(capsys.readouterr().out)["output folder"] == "FAULT"


def test_a_disk_that_is_too_small(validate, monkeypatch):
    """0.9M parameters: a checkpoint of 4 bytes each and two exports of as many are 10.5 MiB at least."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 2**20))
    code, out, _ = validate()
    assert code == 1 and [name for name, verdict in verdicts(out).items() if verdict == "FAULT"] == ["output folder"]
    assert "5.0 MiB free, but one checkpoint and 2 exports of 918,656 parameters take 10.5 MiB to" in out
    assert "checkpointer.keep_exports=1" in out


def test_the_arithmetic_counts_history_and_limits(validate):
    """3 steps of new pairs an iteration; from iteration 1 on as many of the one before: 3 + 6 + 6."""
    changes = ("pairs.history=1", "max_iterations=3", "max_epochs=1", "limit_train_batches=3", "global_batch_size=4")
    code, out, _ = validate(*changes)
    assert code == 0 and "15 steps: 3 iterations x 1 epoch x 3, 6, 6 steps of 4 prompts" in out


def test_a_batch_size_that_leaves_samples_over_and_a_tokenizer_of_another_model(validate, tmp_path, tiny_lm):
    """Neither ends a run; of 20 samples in batches of 3 two are left over."""
    folder = shutil.copytree(tiny_lm, tmp_path / "model")
    model = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(model | {"bos_token_id": 300, "eos_token_id": [2, 5000]}))
    code, out, _ = validate("global_batch_size=3", f"checkpointer.checkpoint_dir={folder}")
    assert code == 0 and "18 prompts in an iteration (2 left over; none with global_batch_size=2 or 4)" in out
    assert "warning: " + str(folder / "config.json") in out and "Does the tokenizer belong to this model?" in out
    assert "bos_token_id 300 is '" in out and "eos_token_id 5000 is '\N{REPLACEMENT CHARACTER}'" in out
    assert "eos_token_id 2 " not in out


def test_a_run_warns_of_a_tokenizer_of_another_model(tmp_path, tiny_lm, caplog):
    folder = shutil.copytree(tiny_lm, tmp_path / "model")
    (folder / "config.json").write_text('{"eos_token_id": 300}')
    for path, warned in ((folder, True), (tiny_lm, False)):
        changes = [*tiny_overrides(tmp_path / "out"), f"checkpointer.checkpoint_dir={path}"]
        cfg = complete(load_config(str(CONFIG), changes), SPINConfig)
        caplog.clear()
        read_inputs(cfg, build_model(cfg.model, torch.float32), init_world("cpu"))
        assert ("Does the tokenizer belong to this model?" in caplog.text) is warned


def test_a_generate_config_is_checked_by_its_own_recipe(validate, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("# spin run spin_generate --config mine.yaml\n" + CONFIG.read_text() + "\nnum_workers: 4\n")
    code, out, _ = validate("num_workers=4", "worker=1", config=config)
    assert code == 0 and "for spin_generate" in out and "trained" not in out
    assert not {"loss, optimizer", "validation data"} & set(verdicts(out)) and "steps" not in out
    assert "20 prompts in an iteration (0 left over), in 4 shards (more with" in out
    assert "; this is worker 1, from 0, of 4\n" in out
    code, out, _ = validate("num_workers=4", "worker=5", config=config)
    assert code == 1 and "worker=5: expected 0 to num_workers - 1 = 3" in out
    code, out, _ = validate("num_workers=4", "worker=1")
    assert code == 1 and "worker: unknown key" in out


def test_what_fine_tuning_does_not_use_is_not_printed(validate, tmp_path, monkeypatch):
    """It has a loss and a rate of its own, plays nothing and asks no checker; a wrong argument of the run's loss stops
    it all the same."""
    (tmp_path / "a_checker.py").write_text("def check(prompt, real, generated, truncated):\n    return True\n")
    monkeypatch.setenv("SPIN_ALLOW_COMPONENTS", "a_checker")
    monkeypatch.syspath_prepend(tmp_path)
    changes = ("pairs.checker=a_checker.check", "loss.beta=0.3", "nll_weight=1", "pairs.equal_to_real=drop")
    changes += ("sft.lr=3e-5", "sft.epochs=3")
    code, out, _ = validate(*changes, "--recipe", "spin_sft")
    assert code == 0 and "checker" not in verdicts(out), out
    assert "ok     negative log-likelihood of the real responses, AdamW with learning rate 3e-05\n" in out
    assert "15 steps: 3 epochs x 5 steps of 4 real responses\n" in out and "20 in an epoch (0 left over)\n" in out
    for word in ("SPINLoss", "beta", "warning", "iteration", "prompts in an", "shard"):
        assert word not in out.replace("iteration_", ""), word
    code, out, _ = validate(*changes)
    assert (
        code == 0 and "SPINLoss with beta 0.3, AdamW with learning rate 0.0001\n" in out and "checker" in verdicts(out)
    )
    code, out, _ = validate("--recipe", "spin_sft", "loss.loss_type=logistik")
    assert code == 1 and verdicts(out)["loss, optimizer"] == "FAULT"


def test_one_config_is_taken(validate, tmp_path):
    code, out, _ = validate(str(tmp_path / "other.yaml"))
    assert code == 1 and "other.yaml': expected key=value, or ~key to remove a key. A command takes one config." in out


def test_a_recipe_of_your_own(validate, tmp_path):
    """Its model says which keys there are."""
    text = (REPO / "recipes" / "spin_recipe.py").read_text()
    own = 'class Mine(config.SPINConfig):\n    greeting: str = "hello"\n\n\n@config.parse(Mine)'
    mine = tmp_path / "mine.py"
    mine.write_text(text.replace("@config.parse(config.SPINConfig)", own))
    assert validate("greeting=moin")[0] == 1
    assert validate("greeting=moin", "--recipe", str(mine))[0] == 0


# --- Round trip and parity ---


class Spoiled(ChatTokenizer):
    """Wrong in one way or another."""

    fault = ""

    def encode_prompt(self, messages):
        ids = super().encode_prompt(messages)
        return [*ids, 5] if self.fault == "prompt" else ids

    def encode_pairs(self, conversations):
        if self.fault == "stop":
            return [(prompt, response[:-1]) for prompt, response in super().encode_pairs(conversations)]
        return super().encode_pairs(conversations)

    def decode(self, ids, skip_special_tokens=False):
        text = super().decode(ids, skip_special_tokens)
        return text.replace("é", "?") if self.fault == "text" else text


def test_what_compare_ids_finds(tiny_lm):
    tokenizer = Spoiled(tiny_lm)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "café"}]
    assert compare_ids(tokenizer, talk) is None
    for tokenizer.fault, words in (
        ("prompt", "differ from position"),
        ("stop", "the response ends with token"),
        ("text", "from character 3 on the response decodes to '?'"),
    ):
        assert words in compare_ids(tokenizer, talk)


def test_an_unequal_prompt_is_a_fault_of_its_row(validate, monkeypatch):
    """As a tokenizer would have it that writes other tokens in generation than in training."""
    encode = ChatTokenizer.encode_prompt
    monkeypatch.setattr(ChatTokenizer, "encode_prompt", lambda self, messages: [7, *encode(self, messages)])
    code, out, _ = validate()
    assert code == 1 and verdicts(out)["round trip"] == verdicts(out)["token ids"] == "FAULT"
    assert "jargon_train.jsonl:1: the prompt's token ids differ from position 0 on" in out


def test_a_data_set_of_another_component_is_not_compared(validate, monkeypatch, tmp_path):
    module = tmp_path / "my_data.py"
    module.write_text(
        "from spin.data import Prompt, PromptDataset\n"
        "def make(tokenizer, max_seq_len):\n"
        "    return PromptDataset([Prompt(str(i), [1, 2], [3, 2]) for i in range(8)])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = [f"~dataset.{key}" for key in ("source", "limit", "max_response_tokens", "on_long_response")]
    code, out, _ = validate(*changes, "dataset._component_=my_data.make", "allow_components=[my_data]")
    assert code == 0 and "not compared" in out and "8 samples" in out, out
    module.write_text("def make(tokenizer, max_seq_len):\n    return []\n")
    monkeypatch.delitem(sys.modules, "my_data")
    code, out, _ = validate(*changes, "dataset._component_=my_data.make", "allow_components=[my_data]")
    assert code == 1 and "dataset: its _component_ gave a list" in out, out


def test_what_was_changed_and_not_used_is_shown(validate, tmp_path):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "B"}]
    rows = [{"id": str(number), "messages": turns, "score": 1} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = validate(f"dataset.source={tmp_path / 'rows.jsonl'}")
    assert code == 0, out
    assert "read with a change: trailing_user_dropped 20" in out and "not used: score" in out
