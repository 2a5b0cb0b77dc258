"""What a resumed run may not change, key by key; checks of single values that the fuzz test does not name."""

import math
from pathlib import Path

import pytest
from spin_generate import SPINGenerate

from spin.config import GenerateConfig, SPINConfig, complete, load_config
from spin.core.errors import CheckpointError, ConfigError, SelfTestError
from spin.run.resume import check_unchanged, run_fingerprint
from spin.training.selftest import check_first_loss

CONFIG = Path(__file__).parents[1] / "assets" / "tiny.yaml"


SUPPLIED = ("tokenizer", "max_seq_len", "keep_originals")
BETAS = ("[0.9]", "[0.9,0.99,0.999]", "{a: 1}", "0.9", "[0.9,null]")


def completed(*overrides: str, model=SPINConfig):
    return complete(load_config(str(CONFIG), ["output_dir=runs/none", *overrides]), model)


def test_every_key_that_results_depend_on_is_compared():
    """The tokenizer's fingerprint covers its chat template, see tests/data/test_chat.py."""
    old = run_fingerprint(completed(), "data", "tokens")
    wider = {"base_dtype": "bf16"}
    assert {"seed", "sampling", "pairs", "loss", "optimizer", "model", "dtype", "dataset", "tokenizer"} <= old.keys()
    check_unchanged(old, dict(old), completed())
    for key, value in old.items():
        new = old | {key: {**value, "new": 1} if isinstance(value, dict) else "other"}
        message = rf"config: {key}(\.new)? .* resume_with_changes=\[base_dtype,{key}\]"
        with pytest.raises(CheckpointError, match=message):
            # the first is not compared
            check_unchanged(old, new | wider, completed("resume_with_changes=[save_interval,base_dtype]"))
        check_unchanged(old, new, completed(f"resume_with_changes=[{key}]"))


def test_a_changed_section_is_told_by_what_differs_in_it():
    """Nothing is said of the other nine keys of the section, and nothing of how this package marks its own."""
    run = {"optimizer": {"_component_": "AdamW", "lr": 1e-4, "_extra_": ["reset"]}, "seed": 1}
    changed = {"optimizer": {**run["optimizer"], "lr": 1e-6}, "seed": 1}
    with pytest.raises(CheckpointError) as error:
        check_unchanged(run, changed, completed("output_dir=out"))
    assert str(error.value) == (
        "The run in out was started with another config: optimizer.lr is 1e-06, was 0.0001. Restore it "
        "(--config out/config.yaml), start a new output_dir, or allow it by resume_with_changes=[optimizer]."
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *(
            (f"{name}=null", f"{name}: found null, expected a section with _component_")
            for name in ("model", "tokenizer", "checkpointer", "dataset", "generator", "loss", "optimizer")
        ),
        ("checkpointer.keep_last=two", "checkpointer.keep_last: found 'two', expected a whole number"),
        ("checkpointer.async_save=1", "async_save: found 1, expected true or false"),
        ("model.num_layers=2.5", "model.num_layers: found 2.5, expected a whole number"),
        ("model.num_layers=null", "model.num_layers: found null, expected a whole number"),
        ("model.norm_eps=small", "model.norm_eps: found 'small', expected a number"),
        ("model.norm_eps=.nan", "model.norm_eps: found .nan, expected a finite number"),
        ("dataset.limit=many", "dataset.limit: found 'many', expected a whole number or null"),
        *((f"dataset.{key}=4", rf"^dataset.{key}: the recipe supplies it") for key in SUPPLIED),
        ("generator.context=4", "^generator.context: the recipe supplies it"),
        ("optimizer.params=4", "^optimizer.params: the recipe supplies it"),
        ("dataset.tokeniser=4", r"^dataset\.tokeniser: .*Known keys: source, "),
        ("~checkpointer", r"^checkpointer.checkpoint_dir: not set"),
        ("~dataset", "^dataset.source: not set"),
        ("~model.num_heads", "^model.num_heads: not set"),
        ("generator=spin.generators.VLLMServerGenerator", "generator.url: not set"),
        *((f"optimizer.betas={betas}", "betas: found .*, expected a list of 2 numbers") for betas in BETAS),
        ("pairs=[]", r"^pairs: found \[\], expected a section with keys"),
        ("optimizer=[1]", r"^optimizer: found \[1\], expected a section with _component_"),
        ("resume_with_changes={a: 1}", "^resume_with_changes: found {'a': 1}, expected a list"),
        ("optimizer._component_=null", "^optimizer._component_: found null, expected a dotted path"),
        (
            "dataset=mine.jsonl",
            "^dataset._component_: 'mine.jsonl' is no component. Write dataset.source=mine.jsonl, if",
        ),
        (
            "model=Qwen/Qwen3-4B",
            "^model._component_: 'Qwen/Qwen3-4B' is no component. Write model.path=Qwen/Qwen3-4B, if",
        ),
        ("tokenizer=/a.b/c", "^tokenizer._component_: '/a.b/c' is no component. Write tokenizer.path=/a.b/c, if"),
        (
            "dataset=my_data.prompts",
            "^dataset._component_: my_data.prompts is not allowed here.*allow_components=.my_data",
        ),
        ("loss=spin.loss.TSPINLoss", r"^loss\._component_: spin\.loss\.TSPINLoss is not allowed here"),
        ("row_tokens=5", r"row_tokens: unknown key\. Did you mean 'pairs\.row_tokens'"),
        ("pairs.max_new_tokens=5", r"unknown key\. Did you mean 'sampling\.max_new_tokens'"),
        ("zebra=5", r"^zebra: unknown key\. All keys: .*spin keys$"),
        ("optimizer._component_=torch.optim.LBFGS", r"torch\.optim\.LBFGS: .* no closure, such as torch\.optim\.AdamW"),
        ("max_steps=0", "max_steps: found 0, expected -1, a whole number from 1 to"),
        ("limit_train_batches=1.5", r"limit_train_batches: found 1\.5, expected -1, .* a fraction from 0 to 1 or null"),
        ("seed=1.5", r"seed: found 1\.5, expected a whole number"),
        ("seed=null", "seed: found null, expected a whole number"),
        ("resume=null", "resume: found null, expected auto, never, or the folder of a checkpoint"),
        ("resume=''", "resume: found '', expected auto"),
        ("output_dir=' '", "output_dir: found ' ', expected a folder's path"),
        ("max_time=10:00:00:00", "max_time: found 2160000, .* Put quotes around it"),  # a number of base 60
        ("max_time='1 hour'", "max_time: found '1 hour', expected DD:HH:MM:SS, for example"),
        ("stop_signals=[SIGKILL]", r"stop_signals: found \['SIGKILL'\], 'SIGKILL' is no signal that a run can catch"),
        ("save_interval=null", "save_interval: found null, expected a whole number of batches"),
        ("clip_grad_norm=0", "clip_grad_norm: found 0, expected a number, above 0 or null"),
        ("watch.window=0", "watch.window: found 0, expected a whole number from 1"),
        ("watch.acc.limit=0", "watch.acc.limit: found 0, expected a number, above 0 or null"),
        ("watch.length_drift.limit=1.0", r"length_drift.limit: found 1\.0, expected a number, above 1 or null"),
        ("watch.margin.action=ignore", "watch.margin.action: found 'ignore', expected warn, stop or rollback"),
        ("sampling.max_new_tokens=null", r"sampling\.max_new_tokens: found null, expected a whole number"),
        ("sampling.min_new_tokens=500", r"sampling\.min_new_tokens=500: expected 0 to max_new_tokens"),
        ("sampling.stop_token_ids=[abc]", r"stop_token_ids: found \['abc'\], expected a list of token ids"),
        ("sampling.stop_strings=['']", r"stop_strings: found \[''\], expected a list of texts that are not empty"),
        ("loss.beta=[0.1]", r"loss\.beta: \[0\.1\] has 1 value for 2 iterations"),
        ("resume_with_changes=[optimzer.lr]", "no key 'optimzer.lr'. Did you mean 'optimizer'"),
        ("metric_logger={_component_: torchtune.training.metric_logging.DiskLogger, log_dri: a}", "mean 'log_dir'"),
        ("metric_logger={_component_: torchtune.training.metric_logging.StdoutLogger, foo: 1}", "foo: .* takes none"),
        ("metric_logger={_component_: torchtune.training.metric_logging.WandBLogger, projct: a}", "mean 'project'"),
        ("ac_mode=selective", "ac_option=null: ac_mode=selective"),
        ("dtype=bf16", "dtype=bf16 with compute_dtype=fp32"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        completed(override)


def test_faults_of_single_values_and_between_keys_are_one_report():
    """Wrong values hide no fault between right ones, in the same section too; dtype says nothing of a wrong partner."""
    wrong = ("max_epochs=two", "pairs.row_tokens=0", "loss.betta=1", "dtype=bf16", "compute_dtype=fp16", "zebra=1")
    together = {
        "loss.beta=[0.1]": "loss.beta: [0.1] has 1 value for 2 iterations",
        "pairs.responses_per_prompt=2 sampling.top_k=1": "pairs.responses_per_prompt=2 with sampling.top_k=1",
        "ac_mode=selective": "ac_option=null",
        "sampling.min_new_tokens=500": "sampling.min_new_tokens=500",
        "resume_with_changes=[sed]": "resume_with_changes: the config has no key 'sed'",
        "optimizer=torch.optim.LBFGS optimizer.foo=1": "optimizer._component_=torch.optim.LBFGS",
    }
    with pytest.raises(ConfigError) as error:
        completed(*wrong, *" ".join(together).split())
    _, *lines = str(error.value).split("\n  - ")
    starts = [name.split("=")[0] for name in wrong if name != "dtype=bf16"] + ["optimizer.foo", *together.values()]
    assert all(any(line.startswith(start) for line in lines) for start in starts), str(error.value)
    assert len(lines) == len(starts)


def test_odd_keys_beside_a_fault_are_no_crash():
    logger = "metric_logger={_component_: torchtune.training.metric_logging.WandBLogger, 1: 2, cls: 3, _fields_set: 4}"
    with pytest.raises(ConfigError, match="max_epochs: found 'two'"):
        completed("max_epochs=two", logger)


@pytest.mark.parametrize("sources", ["[a.jsonl]", "a.jsonl", "{a: a.jsonl}"])
def test_odd_sources_of_a_mixture_are_no_crash(sources):
    left = [f"~dataset.{key}" for key in ("source", "limit", "max_response_tokens", "on_long_response")]
    mixture = ("dataset._component_=spin.data.mixed_prompt_dataset", f"dataset.sources={sources}", *left)
    with pytest.raises(ConfigError, match=r"^validation\.spin=true needs a validation_dataset"):
        completed(*mixture, "validation_dataset=null", "validation.spin=true")


@pytest.mark.parametrize(
    "override",
    [
        "max_steps=null",
        "metric_logger=null",
        "max_time='10:00:00:00'",
        "seed=-1",
        "dataset.limit=null",
        "loss.beta=[0.1,0.2]",
        "optimizer.lr=1",
        "model.norm_eps=1",
        *(f"optimizer._component_={name}" for name in ("torch.optim.RMSprop", "spin.training.AdamW8bit")),
    ],
)
def test_values_that_work(override):
    completed(override)


@pytest.mark.parametrize("key", ["temperature=0", "temperature=1.0e-6", "top_k=1", "top_p=1.0e-7"])
def test_several_responses_to_a_prompt_are_sampled(key):
    """Greedy ones would all be the same; a file of responses is not sampled from."""
    name = key.partition("=")[0]
    overrides = [f"sampling.{key}", "pairs.responses_per_prompt=2"]
    remedy = (
        rf"responses_per_prompt=2 with sampling\.{key.replace('1.0e-', '1e-0')}.* Set sampling\.{name}=\S+ to sample"
    )
    with pytest.raises(ConfigError, match=remedy):
        completed(*overrides)
    completed(overrides[0])
    replay = [
        "~generator.batch_size",
        "generator._component_=spin.generators.ReplayGenerator",
        "generator.path=a.jsonl",
    ]
    completed(*overrides, *replay)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_workers=0", "num_workers: found 0, expected a whole number from 1"),
        ("worker=1", r"worker=1: expected 0 to num_workers - 1 = 0"),
        ("worker=0.5", r"worker: found 0\.5, expected a whole number"),
    ],
)
def test_workers_that_cannot_be(override, message):
    with pytest.raises(ConfigError, match=message):
        SPINGenerate(completed(override, model=GenerateConfig))


@pytest.mark.parametrize(
    ("drift", "cause"), [(0.25, r"by 0\.25 nats for real and 0 for generated"), (0.0, r"it is the loss that differs")]
)
def test_a_wrong_first_loss_tells_log_probs_from_a_loss_that_the_recipe_changed(drift, cause):
    """Twice ln 2, as of a recipe that multiplies its losses by 2; equal log-probs rule out other causes."""
    metrics = {"loss": 2 * math.log(2), "margin": 0.0, "real_logp_drift": drift, "generated_logp_drift": 0.0}
    with pytest.raises(SelfTestError, match=rf"is 1\.38629436, expected 0\.69314718 .*{cause}"):
        check_first_loss(metrics, (math.log(2), 0.0), "fp32", 0)
    check_first_loss(metrics | {"loss": math.log(2)}, (math.log(2), 0.0), "fp32", 0)
