"""spin/config: files and overrides, unknown keys, and components that must never be imported."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import Field, ValidationError, create_model

from spin import config
from spin.config import SPINConfig
from spin.config.schema import Component, LRScheduler, Optimizer, Section, component
from spin.core.errors import ConfigError, DataError

TINY = "tests/assets/tiny.yaml"


class Model(Section):
    output_dir: str
    model: Component
    optimizer: Optimizer = Field(default=component("torch.optim.AdamW", lr=5e-7, fused=True))
    lr_scheduler: LRScheduler = LRScheduler()
    validation_dataset: Any = None
    extra: Component | None = None
    metadata: dict[str, Any] = {}
    max_iterations: int = Field(default=3, ge=1, le=10)
    clip_grad_norm: float | None = 1.0
    resume: str = "auto"
    compile: bool = False
    log_dir: str = "${output_dir}/logs"
    allow_components: list[str] = []


def model_of(**keys: Any) -> type[Section]:
    """A model that has these keys, with values of any type."""
    return create_model("Keys", __base__=Section, **{key: (Any, default) for key, default in keys.items()})


VALID = """\
output_dir: out
model:
  _component_: torchtune.models.llama2.llama2
  vocab_size: 32
  num_layers: 1
  num_heads: 2
  num_kv_heads: 1
  embed_dim: 8
  max_seq_len: 16
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_file(text: str, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable module ``evil_package`` that leaves a file behind when it is imported."""
    marker = tmp_path / "imported"
    package = tmp_path / "site" / "evil_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\ndef run(value=1):\n    return value\n"
    )
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "evil_package", raising=False)
    yield marker
    sys.modules.pop("evil_package", None)


def completed(text: str = VALID, *overrides: str, model: type[Section] = Model) -> Any:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return config.complete(config.load_config(file.name, overrides), model)


# --- Files and overrides ---


def test_import_is_light():
    """`spin_recipe --config typo` answers at once: torch loads only when a component is looked up."""
    code = "import sys, spin.config; sys.exit('torch' in sys.modules or 'torchtune' in sys.modules)"
    repo = Path(config.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0


def test_overrides_are_typed_as_yaml(write):
    path = write(VALID)
    cfg = config.load_config(
        path,
        ["a=1", "b=1e-7", "c=true", "d=null", "e=[1,2]", "f={g: 2}", "h.i=x=y=z", "j=", "model.num_layers=5"],
    )
    assert (cfg.a, cfg.b, cfg.c, cfg.d, cfg.e, cfg.f.g, cfg.h.i) == (1, 1e-7, True, None, [1, 2], 2, "x=y=z")
    assert cfg.j in ("", None)
    assert cfg.model._component_ == "torchtune.models.llama2.llama2" and cfg.model.num_layers == 5


@given(st.integers(-(10**28), 10**28) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False))
def test_override_value_survives(value):
    """repr of a number or bool, given on the command line, comes back as that value."""
    cfg = completed("", f"section.key={value!r}", model=model_of(section={}))
    found = cfg.section["key"]
    assert found == value and type(found) is type(value)


def test_a_path_gives_a_section_its_component_whether_it_had_one_or_not(write):
    """Both sections keep what else stands in them, in torchtune's notation."""
    path = write(
        "loss: {beta: 0.3}\noptimizer: {_component_: torch.optim.AdamW, lr: 0.1}\nlr_scheduler: {name: cosine}\n"
    )
    cfg = config.load_config(path, ["loss=torchtune.rlhf.loss.DPOLoss", "optimizer=torch.optim.SGD"])
    assert cfg.loss == {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.3}
    assert cfg.optimizer == {"_component_": "torch.optim.SGD", "lr": 0.1}
    # no path: a fault that complete() reports
    assert config.load_config(path, ["lr_scheduler=linear"]).lr_scheduler == "linear"


def test_tilde_removes(write):
    cfg = config.load_config(write(VALID), ["~model.num_heads", "~output_dir"])
    assert list(cfg) == ["model"] and "num_heads" not in cfg.model and cfg.model.num_layers == 1
    with pytest.raises(ConfigError, match="num_head.*no such key to remove.*Did you mean 'num_heads'"):
        config.load_config(write(VALID), ["~model.num_head"])


def test_malformed_overrides_are_all_reported(write):
    with pytest.raises(ConfigError) as error:
        config.load_config(write(VALID), ["lonely", "=1", "a=[1,", "b=${"])
    assert str(error.value).startswith("4 faults")
    for override in ("lonely", "=1", "a=[1,", "b=${"):
        assert repr(override) in str(error.value)


NO_CONFIGS = {
    "a: 1\nb: [1, 2\n": ":3:.*not valid YAML", "a: 1\nb: 2\n\ta: 3\n": ":3:.*not valid YAML",
    "a: 1\na: 2\n": ":2:.*not valid YAML", "x: 1\n y: 2\n": ":2:.*not valid YAML",
    "- a\n- b\n": ": the top level is a list", b"\xff\xfe\x00": ": not valid YAML|: not UTF-8",
}  # fmt: skip


@pytest.mark.parametrize("content", NO_CONFIGS)
def test_a_file_that_is_no_config_is_named_with_the_line(tmp_path, content):
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}({NO_CONFIGS[content]})"):
        config.load_config(str(path))
    with pytest.raises(ConfigError, match="is a folder"):
        config.load_config(str(tmp_path))


def test_packaged_names(tmp_path, monkeypatch):
    """A packaged name works from any directory, with or without .yaml; a file of that name goes first."""
    monkeypatch.chdir(tmp_path)
    assert "paper/zephyr_7b" in config.packaged_configs()
    packaged = config.load_config("paper/zephyr_7b")
    assert packaged == config.load_config("paper/zephyr_7b.yaml") and "model" in packaged
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "zephyr_7b.yaml").write_text("mine: true\n")
    assert config.load_config("paper/zephyr_7b.yaml") == {"mine": True}


def test_missing_config_suggests_packaged_names_and_files_nearby(tmp_path):
    with pytest.raises(ConfigError, match=r"'paper/zephyr_7' not found.*Did you mean paper/zephyr_7b"):
        config.load_config("paper/zephyr_7")
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"Did you mean \S+/mine.yaml\?"):
        config.load_config(str(tmp_path / "mien.yaml"))
    with pytest.raises(ConfigError, match="not found"):
        config.load_config("../spin/core/errors.py/none")


# --- Completing ---


def test_defaults_are_merged_below_and_interpolations_resolved():
    cfg = completed(VALID, "lr_scheduler.warmup=5", "optimizer.lr=[1e-6,2e-6]")
    assert cfg.lr_scheduler == LRScheduler(warmup=5)
    assert cfg.optimizer.lr == [1e-6, 2e-6] and cfg.optimizer.reset_each_iteration is True
    assert cfg.log_dir == "out/logs" and config.plain(cfg)["optimizer"]["_component_"] == "torch.optim.AdamW"
    assert Model.model_fields["lr_scheduler"].default == LRScheduler(warmup=0.1), "defaults must not be changed"
    with pytest.raises(ValidationError, match="frozen"):
        cfg.max_iterations = 4


def test_completing_twice_changes_nothing():
    """A config that a run has written down is a config that a run can read."""
    cfg = completed()
    assert config.complete(config.as_written(cfg), Model) == cfg


def test_default_arguments_belong_to_the_default_component():
    """AdamW's fused=True must not reach SGD, but the recipe's own keys stay."""
    cfg = completed(VALID, "optimizer=torch.optim.SGD", "optimizer.momentum=0.9", "optimizer.lr=0.1")
    assert cfg.optimizer.component == "torch.optim.SGD"
    assert cfg.optimizer.get("fused") is None and cfg.optimizer.reset_each_iteration is True


def test_all_faults_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        completed("model: {_component_: os.system, command: x}\nresum: auto\ncompile: 3\noptimizer: {learning_rate: 1}")
    text = str(error.value)
    assert text.startswith("5 faults:")
    for part in (
        "output_dir: not set",
        "model._component_: os.system",
        "resum:",
        "compile:",
        "optimizer.learning_rate:",
    ):
        assert part in text


WRONG = (
    ("max_iterations=two", "max_iterations: found 'two', expected a whole number from 1 to 10."),
    ("max_iterations=true", "max_iterations: found true, expected a whole number"),
    ("max_iterations=2.5", r"max_iterations: found 2\.5, expected a whole number"),
    ("max_iterations=11", r"max_iterations: found 11, expected a whole number from 1 to 10\."),
    ("compile=1", "compile: found 1, expected true or false"),
    ("resume=off", r"resume: found false, expected a text\. Put quotes around it: YAML"),
    ("resume=10:00:00:00", r"resume: found 2160000, .* \"resume='...'\""),
    ("lr_scheduler=cosine", "lr_scheduler: found 'cosine', expected a section with keys name, warmup"),
    ("lr_scheduler=null", "lr_scheduler: found null, expected a section"),
    ("lr_scheduler.name=step", "lr_scheduler.name: found 'step', expected linear, cosine or constant"),
    ("lr_scheduler.warmup=2.5", r"found 2\.5, expected a whole number of steps .* or a fraction from 0 to 1"),
    ("optimizer.lr=[1e-6,-1]", r"lr: found \[1e-06, -1\], expected a number, above 0, at most .* or a list of these"),
    ("optimizer=torch.optim.SGD", r"optimizer\.lr: not set"),
    ("allow_components=my_package", r"allow_components: .*expected a list"),
    *((f"allow_components=['{name}']", f"allow_components: '{name}' ") for name in
      ("os", "subprocess", "builtins", "importlib.util", "not a name", "3")),
    ("log_dir=${nowhere}", "log_dir: .*nowhere"),
    ("resume=???", "resume: not set"),
    ("max_iteratons=2", r"max_iteratons: unknown key\. Did you mean 'max_iterations'"),
    ("lr_scheduler.warmpu=2", r"lr_scheduler\.warmpu: unknown key\. Did you mean 'warmup'"),
    ("warmpu=5", r"warmpu: unknown key\. Did you mean 'lr_scheduler\.warmup'"),
    ("warmup=5", r"warmup: unknown key\. Did you mean 'lr_scheduler\.warmup'"),
    ("optimizer.reset_each_iter=true", r"optimizer\.reset_each_iter: .*Did you mean 'reset_each_iteration'"),
    ("lr_scheduler._component_=torch.optim.SGD", r"lr_scheduler\._component_: unknown key"),
    ("optimizer=torch.optim.AdamWW", r"optimizer: torch\.optim\.AdamWW: torch\.optim has no 'AdamWW'.*'AdamW'"),
    ("optimizer=torch.optum.AdamW", r"torch\.optum\.AdamW is not allowed here.* Did you mean 'torch.optim.AdamW'"),
    ("model=evil_package.run", "evil_package.run is not allowed here"),
    ("metadata.x=evil_package model._component_=${metadata.x}.run", "evil_package.run is not allowed here"),
)  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_wrong_values(overrides, message, evil):
    with pytest.raises(ConfigError, match=message):
        completed(VALID, *(overrides.split(" ") if "." in overrides else [overrides]))
    assert not evil.exists()


def test_a_key_with_dots_in_a_file_is_told_how_to_nest():
    with pytest.raises(ConfigError, match=r"lr_scheduler\.warmup: unknown key\. In a file .* lr_scheduler: {warmup: "):
        completed(VALID + "lr_scheduler.warmup: 5\n")


def test_values_that_are_fine():
    cfg = completed(VALID, "clip_grad_norm=null", "metadata.any.name=1", "validation_dataset=null")
    assert cfg.clip_grad_norm is None and cfg.metadata == {"any": {"name": 1}}


# --- Components ---

LOGGER = "torchtune.training.metric_logging.WandBLogger"
TOKENIZER = "torchtune.models.llama3.llama3_tokenizer"


@pytest.mark.parametrize(
    "name", ["torch", "torch.nn", "torch.float32", "torch..nn.Linear", "torch.nn.Linear()", "../evil_package.run", ""]
)
def test_what_is_no_path_of_a_component_is_refused(name, evil):
    """tests/faults/test_configs.py has dangerous ones, in every place."""
    node = {"_component_": name}
    with pytest.raises(ConfigError, match="model._component_"):
        config.complete(OmegaConf.merge(OmegaConf.create(VALID), {"model": node}), Model)
    for nested in (node, {"_component_": LOGGER, "a": node}, {"_component_": TOKENIZER, "prompt_template": name}):
        with pytest.raises(ConfigError):  # where nobody has called complete() before
            config.instantiate(nested)
    assert not evil.exists()


def test_components_in_lists_that_nothing_uses_are_refused_before_anything_is_imported(evil):
    cfg = OmegaConf.create({"unused": [{"x": {"_component_": "evil_package.run"}}], "name": "${key}", "key": 1})
    with pytest.raises(
        ConfigError, match=r"unused\[0\]\.x\._component_: evil_package\.run.*allow_components=\[evil_pa"
    ):
        config.complete(cfg, model_of(unused=[], name="", key=0))
    assert not evil.exists()


def test_user_package_is_allowed_by_name(evil):
    cfg = completed(VALID, "allow_components=[evil_package]", "extra={_component_: evil_package.run}")
    assert config.instantiate(cfg.extra, value=7) == 7
    assert evil.exists(), "the module is really the one that was asked for"
    with pytest.raises(ConfigError, match="evil_package.Path is not allowed"):
        completed(VALID, "allow_components=[evil_package]", "extra={_component_: evil_package.Path}")


def test_user_package_is_found_where_the_program_started(tmp_path, monkeypatch):
    (tmp_path / "my_local_parts.py").write_text("def part():\n    return 'mine'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    cfg = completed(VALID, "allow_components=[my_local_parts]", "extra={_component_: my_local_parts.part}")
    assert config.instantiate(cfg.extra) == "mine"


def test_a_loss_without_beta_is_told_to_take_it(tmp_path, monkeypatch):
    """To remove the key, as of any other component, would be no remedy: beta must be set."""
    (tmp_path / "my_plain_loss.py").write_text("def loss(scale=1.0): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = ["loss._component_=my_plain_loss.loss", "allow_components=[my_plain_loss]"]
    with pytest.raises(ConfigError, match=r"loss\.beta: my_plain_loss\.loss does not take it, .* Add a parameter\.$"):
        completed(VALID, *own, "loss.beta=0.1", model=config.SPINConfig)


def test_instantiate_leaves_out_the_recipes_own_keys():
    cfg = completed(VALID, "optimizer.lr=[1e-6,2e-6]")
    model = config.instantiate(cfg.model)
    assert model.tok_embeddings.weight.shape == (32, 8)
    optimizer = config.instantiate(cfg.optimizer, model.parameters(), lr=3e-6, fused=False)
    assert optimizer.defaults["lr"] == 3e-6 and "reset_each_iteration" not in optimizer.defaults
    assert cfg.optimizer.lr == [1e-6, 2e-6]


def test_instantiate_builds_nested_components(tmp_path, monkeypatch):
    text = "def outer(inner):\n    return [inner]\n\n\ndef inner(x):\n    return x + 1\n"
    (tmp_path / "my_nested.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SPIN_ALLOW_COMPONENTS", "other_package,my_nested")
    node = {"_component_": "my_nested.outer", "inner": {"_component_": "my_nested.inner", "x": 2}}
    assert config.instantiate(OmegaConf.create(node)) == [3]
    assert config.instantiate(None) is None


UNFIT = (
    ({"model": {"_component_": "torchtune.models.llama2.llama2", "num_layers": 2}},
     r"^model: torchtune\.models\.llama2\.llama2: missing a required argument: 'vocab_size'"),
    ({"model": {"a": 1}}, "^model: found .*expected a section with _component_"),
    ({"optimizer": {"_component_": "torch.optim.AdamW", "lr": -1.0}},
     r"^optimizer: torch.optim.AdamW does not take these values \(ValueError: Inva"),
    ({"tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "."}},
     r"^tokenizer: torchtune\.models.*Is a directory.*Check the paths"),
)  # fmt: skip


@pytest.mark.parametrize(("section", "message"), UNFIT)
def test_what_a_component_does_not_take_names_the_section(section, message):
    (name,) = section
    values = ([torch.nn.Parameter(torch.ones(1))],) if name == "optimizer" else ()
    with pytest.raises(ConfigError, match=message):
        config.instantiate(OmegaConf.create(section)[name], *values)


# --- The command line ---


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Runs a recipe_main under parse() as `python recipe.py ARGS`; returns exit code and stderr."""

    def run(recipe_main, *argv: str):
        monkeypatch.setattr(sys, "argv", ["recipe.py", *argv])
        with pytest.raises(SystemExit) as stop:
            config.parse(Model)(recipe_main)()
        return stop.value.code, capsys.readouterr().err

    return run


def test_parse_hands_over_the_completed_config(run_main, write):
    seen = []
    path = write(VALID)
    for argv in (["--config", path, "max_iterations=7"], [f"--config={path}", "max_iterations=7"]):
        code, _ = run_main(lambda cfg: seen.append(cfg.max_iterations), *argv)
        assert not code
    assert seen == [7, 7]
    assert run_main(lambda cfg: 3, "--config", path)[0] == 3


def test_parse_prints_errors_without_a_traceback(run_main, write):
    def fail(cfg):
        raise DataError("train.jsonl:3: no answer.")

    path = write(VALID)
    assert run_main(fail, "--config", path) == (1, "error: train.jsonl:3: no answer.\n")
    code, text = run_main(fail, "--config", path, "compille=true")
    assert code == 1 and text.startswith(
        f"error: {path} with overrides: compille: unknown key. Did you mean 'compile'?"
    )
    assert run_main(lambda cfg: cfg.nothing_here and None, "--config", write("output_dir: ${x}\n"))[0] == 1


def test_faults_of_a_recipes_own_checks_are_listed(run_main, write):
    def check(cfg):
        faults = config.Faults()
        faults.add("first\nwith a second line")
        faults.add("second")
        faults.raise_if_any()

    code, text = run_main(check, "--config", write(VALID))
    assert code == 1
    assert text.endswith("2 faults:\n  - first\n    with a second line\n  - second\n")


def test_only_rank_0_prints_the_whole_error(run_main, write, monkeypatch):
    path = write("a: 1\nb: 2\noutput_dir: x\n")
    monkeypatch.setenv("RANK", "1")
    code, text = run_main(lambda cfg: 0, "--config", path)
    assert code == 1 and text == f"error (rank 1): {path}: 2 faults:\n"


def test_other_exceptions_and_the_debug_switch_propagate(write, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--config", write(VALID)])

    def fail(cfg):
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        config.parse(Model)(fail)()
    monkeypatch.setenv("SPIN_TRACEBACK", "1")
    with pytest.raises(DataError):
        config.parse(Model)(lambda cfg: (_ for _ in ()).throw(DataError("x")))()


def test_unknown_option_and_missing_config_are_usage_errors(run_main, write):
    code, text = run_main(lambda cfg: 0, "--config", write(VALID), "--lr", "3")
    assert code == 2 and "--lr" in text and "key=value" in text
    assert run_main(lambda cfg: 0)[0] == 2


@pytest.mark.parametrize("node", [5, "nope", {}, {"column_map": {}}])
def test_a_message_transform_is_a_section_with_a_component(node, repo):
    cfg = config.complete(config.load_config(str(repo / TINY), ["output_dir=out"]), SPINConfig)
    with pytest.raises(ConfigError, match="dataset.message_transform: found .*, expected a section with _component_"):
        config.nested(cfg.dataset, node, "message_transform")


def test_an_override_that_yaml_takes_for_something_else_says_how_to_quote_it(write):
    path = write("dataset: {source: a.jsonl}")
    with pytest.raises(ConfigError, match=r"not valid YAML: .*Quote a text that begins so"):
        config.load_config(path, ["dataset.source=[a.jsonl"])
    assert config.load_config(path, ["dataset.source=*.jsonl"]).dataset.source == "*.jsonl"
    assert config.load_config(path, ["dataset.source='*.jsonl'"]).dataset.source == "*.jsonl"


def test_what_a_component_of_your_own_raises_names_its_line(tmp_path, monkeypatch):
    """The last line of the user's package, not that of the library which it called."""
    (tmp_path / "my_losses.py").write_text(
        "import math\n\n\nclass Loss:\n    def __init__(self, beta):\n        check(beta)\n\n\n"
        "def check(beta):\n    math.sqrt(-beta)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SPIN_ALLOW_COMPONENTS", "my_losses")
    cfg = OmegaConf.create({"loss": {"_component_": "my_losses.Loss"}})
    place = re.escape(f"{tmp_path}/my_losses.py:10")
    with pytest.raises(ConfigError, match=rf"loss: my_losses.Loss .*\(ValueError: .*, at {place}\)"):
        config.instantiate(cfg.loss, beta=1.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("def broken(", r"raised File .*my_fault\.py.*, line 2 .* SyntaxError: '\(' was never closed"),
        ("float('x')", r"raised ValueError: could not convert.*, at .*my_fault\.py:2"),
        ("raise SystemExit", r"raised SystemExit, at .*my_fault\.py:2"),
    ],
)
def test_a_module_of_your_own_that_fails_is_a_fault_among_the_others(line, message, tmp_path, monkeypatch):
    (tmp_path / "my_fault.py").write_text(f"def check(prompt, real, generated, truncated): ...\n{line}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SPIN_ALLOW_COMPONENTS", "my_fault")
    with pytest.raises(ConfigError, match=rf"(?s)2 faults.*my_fault\.check: importing my_fault {message}") as error:
        completed("output_dir: out\nmodel: {_component_: my_fault.check}\nmax_iterations: 11\n")
    assert "max_iterations: found 11" in str(error.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("generator", r"gave a Bare, expected a generator of spin.generators: it has no close, .*, sleep, "),
        ("optimizer", r"gave a Bare, expected an optimizer: it has no load_state_dict, param_groups, state"),
        ("checkpointer", r"gave a Bare, expected a checkpointer: it has no close, export, latest"),
    ],
)
def test_what_lacks_what_a_recipe_calls_is_refused_where_it_is_made(section, message, tmp_path, monkeypatch):
    (tmp_path / "my_bare.py").write_text("class Bare:\n    def generate(self): ...\n    def step(self): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SPIN_ALLOW_COMPONENTS", "my_bare")
    cfg = OmegaConf.create({section: {"_component_": "my_bare.Bare"}})
    with pytest.raises(ConfigError, match=rf"^{section}: my_bare.Bare {message}"):
        config.instantiate(cfg[section])
