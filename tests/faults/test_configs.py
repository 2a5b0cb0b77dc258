"""Configs of somebody else's: what they name is not run, what they ask for is limited, their secrets are kept."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spin_recipe
import yaml
from omegaconf import OmegaConf
from pydantic import create_model

from spin.cli import main
from spin.config import EvaluateConfig, SPINConfig, as_written, complete, instantiate, load_config, shown
from spin.config.schema import Section
from spin.core.errors import ConfigError
from spin.core.terminal import get_logger
from tests.recipes.helpers import CONFIG, run, tiny_overrides

# Each has done something in an attack, or could: run a file, unpickle, load a library, write, start, download.
DANGEROUS = (
    "builtins.eval", "builtins.exec", "os.system", "subprocess.run", "pickle.loads", "importlib.import_module",
    "code.interact", "torch.load", "torch.save", "torch.hub.load", "torch.hub.download_url_to_file",
    "torch.compile", "torch.jit.load", "torch.ops.load_library", "torch.classes.load_library",
    "torch.package.PackageImporter", "torch.serialization.load", "torch.cuda.memory.CUDAPluggableAllocator",
    "torch.cuda.memory._dump_snapshot", "torch.utils.model_dump.get_model_info", "torch.utils.model_dump.main",
    "torch.utils.model_zoo.load_url", "torch.utils.cpp_extension.load_inline",
    "torch.utils.data.datapipes.utils.decoder.basichandlers", "torch.utils.data.datapipes.iter.FileOpener",
    "torch.utils.data.DataLoader", "torch.utils.tensorboard.SummaryWriter", "torch.utils.benchmark.Timer",
    "torch.distributed.run.main", "torch.distributed.launch.main", "torch.distributed.rpc.init_rpc",
    "torch.multiprocessing.spawn", "torch.profiler.profile", "torch.profiler.tensorboard_trace_handler",
    "torch.monitor.TensorboardEventHandler", "torch.backends.xeon.run_cpu.main", "torch.fx.Interpreter",
    "torch.export.load", "torch.from_file", "torch.nn.Module", "torch.nn.Linear",
    "torch.optim.swa_utils.AveragedModel", "torch.optim.swap_in_optimizer_params_and_state",
    "torch.optim.os.system", "torchtune.config.instantiate", "torchtune.config.parse",
    "torchtune.training.FullModelHFCheckpointer", "torchtune.training.safe_torch_load",
    "torchtune.datasets.text_completion_dataset", "torchtune.datasets.chat_dataset", "torchtune.data.load_image",
    "torchtune.models.convert_weights.get_mapped_key", "torchtune.models.phi3.phi3_hf_to_tune",
    "torchao.quantization.quantize_", "torchdata.nodes.Loader", "spin.config.catalog.load_recipe",
    "spin.cli.cp.main", "spin.cli.main", "spin.cli.export.main", "spin.core.files.write_json",
    "spin.core.files.replace_text", "spin.core.files.FolderLock", "spin.config.components.instantiate",
    "spin.config.files.load_config", "spin.config.components.resolve_component",
    "spin.pairs.store.PairStore.open_or_create", "spin.data.PairStore.open_or_create", "spin.data.PairStore",
    "spin.data.sources.read_rows", "spin.model.hf.export_hf", "spin.checkpoint.checkpointer.os.system",
    "spin.generators.replay.json.loads", "spin_recipe.recipe_main", "dangerous.run", "subprocess.Popen",
    "torch.utils.data.dataloader.os.system", "torch.storage.UntypedStorage.from_file",
    "torch.UntypedStorage.from_file", "torch.FloatStorage.from_file", "torch._C._jit_init",
    "torchtune.training.checkpointing._checkpointer.torch.load", "torchtune.data.importlib.import_module",
    "spin.config.catalog.importlib.import_module", "spin.core.errors.__builtins__.eval", "spinx.errors.SpinError",
)  # fmt: skip
SECTIONS = (
    "model", "tokenizer", "checkpointer", "dataset", "validation_dataset", "generator", "loss", "optimizer",
    "metric_logger",
)  # fmt: skip
PLACES = {
    **{name: {name: "NODE"} for name in SECTIONS},
    "nested": {"metric_logger": {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "NODE"}},
    "transform": {"dataset": {"message_transform": "NODE"}},
    "list": {"resume_with_changes": [{"x": "NODE"}]},
    "template": {"tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "prompt_template": "NAME"}},
    "interpolated": {"loss": {"_component_": "${resume_with_changes[0]}"}, "resume_with_changes": ["NAME"]},
}


def placed(place, name):
    """The changes of a config that put a name into a place."""
    node = {"_component_": name, "argv": ["x"], "path": "written", "file": "written", "f": "written"}
    text = json.dumps(PLACES[place]).replace('"NODE"', json.dumps(node)).replace('"NAME"', json.dumps(name))
    return json.loads(text)


@pytest.fixture
def lure(tmp_path, monkeypatch):
    """An empty folder to stand in, and a module ``dangerous`` whose import leaves a file in it."""
    site, here = tmp_path / "site", tmp_path / "here"
    site.mkdir()
    here.mkdir()
    (site / "dangerous.py").write_text(f"open({str(here / 'imported')!r}, 'w').close()\ndef run(**kwargs): pass\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("place", PLACES)
def test_dangerous_names_do_nothing(place, lure):
    """In every section, nested, in lists, by interpolation: refused by name, and no module is loaded for it."""
    import torchtune.training.metric_logging  # noqa: F401 - of the logger that one of them is nested in

    loaded = set(sys.modules)
    for name in DANGEROUS:
        cfg = OmegaConf.create(placed(place, name))
        with pytest.raises(ConfigError) as error:
            complete(cfg, create_model("Keys", __base__=Section, **dict.fromkeys(cfg, (Any, None))))
        assert name in str(error.value) and "not allowed" in str(error.value), error.value
        if place in SECTIONS or place in ("nested", "template"):
            with pytest.raises(ConfigError):  # where nobody has called complete() before
                instantiate(cfg[next(iter(cfg))])
    assert not list(lure.iterdir())
    new = set(sys.modules) - loaded
    assert not [
        name for name in DANGEROUS if any(f"{name}.".startswith(f"{module}.") for module in new - {"torchtune"})
    ]


def test_dangerous_names_do_nothing_in_overrides_and_evaluations(lure):
    for number, name in enumerate(DANGEROUS):
        section = SECTIONS[number % len(SECTIONS)]
        with pytest.raises(ConfigError, match=f"{name} is not allowed"):
            complete(load_config(str(CONFIG), [f"{section}._component_={name}"]), SPINConfig)
        key = ("candidate.tokenizer", "judge.generator", "baseline.model")[number % 3]
        roles = OmegaConf.create()
        OmegaConf.update(roles, key, {"_component_": name}, force_add=True)
        with pytest.raises(ConfigError, match=f"{key}._component_: {name} is not allowed"):
            complete(roles, EvaluateConfig)
    assert not list(lure.iterdir())


def test_validate_does_nothing_either(lure, capsys):
    """`spin validate` on configs with all of them: one fault for each place."""
    for number, place in enumerate(PLACES):
        name = DANGEROUS[4 * number]
        cfg = OmegaConf.merge(OmegaConf.load(CONFIG), placed(place, name), {"output_dir": "out"})
        file = lure.parent / "config.yaml"
        file.write_text(OmegaConf.to_yaml(cfg))
        assert main(["validate", str(file)]) == 1
        assert name in capsys.readouterr().out
    assert not list(lure.iterdir())


# ---- allow_components


def test_a_config_cannot_allow_itself(lure, capsys, monkeypatch):
    """Not by its list, by ${...}, nested, as the config.yaml of a run. By the command line, and by a variable."""
    text = CONFIG.read_text().replace("output_dir: ???", "output_dir: out\nallow_components: [dangerous]")
    file = lure.parent / "mine.yaml"
    for change in ("[dangerous]", "${resume_with_changes}", "dangerous", "{a: dangerous}"):
        file.write_text(text.replace("[dangerous]", change) + "resume_with_changes: [dangerous]\nloss: dangerous.run\n")
        assert main(["validate", str(file)]) == 1
        out = capsys.readouterr().out
        assert "A config cannot allow what it names itself" in out and "SPIN_ALLOW_COMPONENTS=" in out
    assert not list(lure.iterdir())
    file.write_text(text)
    for variable, overrides in (("dangerous", []), ("", ["allow_components=[dangerous]"])):
        monkeypatch.setenv("SPIN_ALLOW_COMPONENTS", variable)
        (lure / "imported").unlink(missing_ok=True)
        sys.modules.pop("dangerous", None)
        cfg = complete(load_config(str(file), ["loss=dangerous.run", "loss.beta=0.1", *overrides]), SPINConfig)
        assert (lure / "imported").exists()
    saved = lure / "config.yaml"
    saved.write_text(OmegaConf.to_yaml(as_written(cfg)))
    monkeypatch.delenv("SPIN_ALLOW_COMPONENTS")
    with pytest.raises(ConfigError, match="cannot allow"):
        complete(load_config(str(saved)), SPINConfig)
    with pytest.raises(ConfigError, match="dangerous.run is not allowed here"):
        instantiate(OmegaConf.load(saved).loss)


@pytest.mark.parametrize("name", ["torch", "spin", "torchtune.config", "os"])
def test_what_sections_hold_of_our_packages_is_not_extended(name):
    with pytest.raises(ConfigError, match="allow_components"):
        complete(load_config(str(CONFIG), ["output_dir=out", f"allow_components=[{name}]"]), SPINConfig)


# ---- looking at a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose metric logger has a key of the environment and a key of its own."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    os.environ["SPIN_TEST_SERVICE_KEY"] = "sk-from-the-environment"
    (folder.parent / "own_service.py").write_text(
        "class Service:\n"
        "    def __init__(self, api_key, token):\n        self.keys = [api_key, token]\n"
        "    def log_config(self, cfg):\n"
        f"        open({str(folder.parent / 'sent')!r}, 'w').write(str(cfg))\n"
        "    def log_dict(self, metrics, step):\n        raise RuntimeError(f'refused {self.keys}')\n"
        "    def close(self):\n        pass\n"
    )
    sys.path.insert(0, str(folder.parent))
    try:
        run(
            folder, "max_iterations=1", "max_epochs=1", "limit_train_batches=1",
            "metric_logger._component_=own_service.Service",
            "metric_logger.api_key=${oc.env:SPIN_TEST_SERVICE_KEY}", "metric_logger.token=sk-in-the-config",
            "allow_components=[own_service]",
        )  # fmt: skip
        yield folder
    finally:
        sys.path.remove(str(folder.parent))
        del os.environ["SPIN_TEST_SERVICE_KEY"]


def test_secrets_reach_no_file_but_the_config(finished, capsys):
    saved = finished / "config.yaml"
    logger = yaml.safe_load(saved.read_text())["metric_logger"]
    assert logger["api_key"] == "${oc.env:SPIN_TEST_SERVICE_KEY}" and saved.stat().st_mode & 0o777 == 0o600
    assert main(["report", str(finished)]) == 0 and main(["export", str(finished)]) == 0
    shown_texts = capsys.readouterr()
    (card,) = finished.glob("iteration_000/*/README.md")
    texts = [
        (finished / "report.html").read_text(),
        card.read_text(),
        (finished.parent / "sent").read_text(),
        *shown_texts,
    ]
    files = [file.read_bytes() for file in finished.rglob("*") if file.is_file() and file != saved]
    for secret in ("sk-from-the-environment", "sk-in-the-config"):
        assert not any(secret in text for text in texts) and not any(secret.encode() in content for content in files)
    assert all("oc.env:SPIN_TEST_SERVICE_KEY" in text for text in texts[:3]), "the reference itself is shown"


def test_secrets_are_not_told_in_errors_and_logs(monkeypatch, capfd):
    """What a library says of them in a log too: the handler is the one where the program has none."""
    monkeypatch.setenv("SERVICE_PASSWORD", "hunter2hunter2")
    for name, value in {"handlers": [], "propagate": False, "level": logging.INFO}.items():
        monkeypatch.setattr(logging.getLogger("spin"), name, value)
    log = get_logger()
    for change in (
        "max_epochs=${oc.env:SERVICE_PASSWORD}",
        "seed={token: ghp_0123456789}",
        "watch={api_key: [ghp_0123456789]}",
    ):
        with pytest.raises(ConfigError) as error:
            complete(load_config(str(CONFIG), ["output_dir=out", change]), SPINConfig)
        assert "hunter2" not in str(error.value) and "ghp_" not in str(error.value)
    try:
        raise RuntimeError("no such password: hunter2hunter2")
    except RuntimeError:
        log.exception("https://host/?token=%s was refused", "ghp_0123456789")
    told = capfd.readouterr().err
    assert "token=*** was refused" in told and "no such password: ***" in told
    assert "hunter2" not in told and "ghp_" not in told


def test_what_is_shown_of_a_config(monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", "hunter2hunter2")
    changes = ("resume=${oc.env:SERVICE_PASSWORD}", "dataset.source=https://me:pw12345@host/x?token=abc&y=1")
    cfg = complete(load_config(str(CONFIG), ["output_dir=out", *changes]), SPINConfig)
    assert cfg.resume == "hunter2hunter2"
    text = OmegaConf.to_container(shown(cfg), resolve=True)
    assert (
        text["resume"] == "${oc.env:SERVICE_PASSWORD}"
        and text["dataset"]["source"] == "https://***@host/x?token=***&y=1"
    )


@pytest.fixture
def hostile_run(finished, lure):
    """A copy of a run whose config names other code in every section, and our secrets."""
    folder = lure.parent / "run"
    shutil.copytree(finished, folder)
    cfg = yaml.safe_load((folder / "config.yaml").read_text())
    for section in SECTIONS:
        cfg[section] = {**(cfg[section] or {}), "_component_": "dangerous.run"}
    cfg["allow_components"] = ["dangerous"]
    cfg["dataset"]["source"] = "${oc.env:SERVICE_PASSWORD}"
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    return folder


def test_looking_at_a_run_builds_nothing_and_reads_no_variable(hostile_run, lure, capsys, monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", "hunter2hunter2")
    store = hostile_run / "iteration_000" / "responses"
    assert main(["report", str(hostile_run)]) == 0 and main(["export", str(hostile_run)]) == 0
    assert main(["pairs", str(store)]) == 0
    assert main(["pairs", str(store), "--sample", "1"]) == 1
    err = capsys.readouterr().err
    assert "no spin.data.ChatTokenizer" in err and "--tokenizer" in err
    (card,) = hostile_run.glob("iteration_000/*/README.md")
    assert "hunter2" not in card.read_text() + (hostile_run / "report.html").read_text()
    assert not list(lure.iterdir())


def test_the_tokenizer_of_another_users_run_needs_trust(finished, capsys, monkeypatch):
    """Whoever looks is another user than the owner of the folder."""
    store = str(finished / "iteration_000" / "responses")
    assert main(["pairs", store, "--sample", "1"]) == 0
    monkeypatch.setattr(os, "getuid", lambda: finished.stat().st_uid + 1)
    assert main(["pairs", store, "--sample", "1"]) == 1
    assert "belongs to another user" in capsys.readouterr().err
    assert main(["pairs", store, "--sample", "1", "--trust"]) == 0


# ---- paths are taken as typed


@pytest.mark.parametrize("name", ["run #2", "run: 3", "run\n", " run ", "*x", "a, b", "- x", "{x", "100%", "é ü"])
def test_paths_of_overrides_are_taken_as_typed(name, tmp_path):
    path = f"{tmp_path}/{name}"
    cfg = load_config(str(CONFIG), [f"output_dir={path}", f"tokenizer.path={path}", f"dataset.source={path}"])
    cfg = complete(cfg, SPINConfig)
    assert cfg.output_dir == cfg.tokenizer.path == cfg.dataset.source == cfg.checkpointer.output_dir == path


def test_home_and_variables_are_expanded_once_in_files_and_overrides(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_ROOT", "/data/$HOME")
    monkeypatch.delenv("NOTHING_HERE", raising=False)
    keys = ("output_dir", "tokenizer.path", "checkpointer.checkpoint_dir", "dataset.source", "metric_logger.log_dir")
    logger = "torchtune.training.metric_logging.DiskLogger"
    file = tmp_path / "config.yaml"
    for typed, found in {
        "~/x #1": f"{tmp_path}/x #1", "$DATA_ROOT/y": "/data/$HOME/y", "/z/$NOTHING_HERE": "/z/$NOTHING_HERE",
        "/a/~/b": "/a/~/b",
    }.items():  # fmt: skip
        raw = OmegaConf.load(CONFIG)
        for key in keys:
            OmegaConf.update(raw, key, typed, force_add=True)
        raw.metric_logger._component_ = logger
        file.write_text(OmegaConf.to_yaml(raw))
        overrides = [f"metric_logger._component_={logger}", *(f"{key}={typed}" for key in keys)]
        for cfg in (load_config(str(file)), load_config(str(CONFIG), overrides)):
            done = as_written(complete(cfg, SPINConfig))
            assert {OmegaConf.select(done, key) for key in keys} == {found}


# ---- what is too much


def doubling(count):
    return (
        "device: x${seed}"
        + "".join(f"\nk{i}: ${{k{i - 1}}}${{k{i - 1}}}" for i in range(1, count))
        + "\nk0: xxxxxxxx\n"
    )


HUGE = {
    "doubled texts": (doubling(60), "stands for more than"),
    "doubled sections": (
        "k0: {a: 1}\n" + "".join(f"k{i}: {{x: '${{k{i - 1}}}', y: '${{k{i - 1}}}'}}\n" for i in range(1, 60)),
        "k[0-9]+: stands for more than",
    ),
    "aliases": (
        "k0: &k0 [x, x, x]\n" + "".join(f"k{i}: &k{i} [*k{i - 1}, *k{i - 1}, *k{i - 1}]\n" for i in range(1, 40)),
        r":[0-9]+: k[0-9]: more than 10,000 values",
    ),
    "an alias of itself": ("loss: &x {beta: *x}", r":1: loss\.beta: an alias stands within what it names"),
    "an alias of nothing": ("loss: {beta: *x}", r"alias"),
    "digits": (f"optimizer: {{lr: {'1' * 5000}}}", r":1: optimizer\.lr: found a number of 5000 digits"),
    "depth": (f"loss: {'[' * 200}{']' * 200}", r":1: loss.*: more than 50 levels"),
    "more depth": (f"loss: {'[' * 100_000}", "levels|nesting"),
    "a long reference": (f"loss: {{beta: '{'${seed}' * 1000}'}}", r":1: loss\.beta: a text with"),
    "nested references": (f"loss: {{beta: '{'${' * 400}'}}", "loss|viable"),
    "bytes": ("x: '" + "y" * 2_000_000 + "'", "bytes"),
    "a circle": ("a: ${b}\nb: ${a}", "recursive|interpolation"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HUGE)
def test_configs_that_would_fill_the_memory(kind, tmp_path, capsys):
    """Refused within seconds by file and key, under validate too; a subprocess with 3 GB would do for all of them."""
    import resource

    text, message = HUGE[kind]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=message):
        complete(load_config(str(file)), SPINConfig)
    assert main(["validate", str(file)]) == 1
    assert "FAULT" in capsys.readouterr().out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    "override",
    [
        "optimizer.lr=" + "1" * 5000,
        "loss.beta=" + "[" * 100 + "]" * 100,
        "loss={a: &a [1,1], b: [*b]}",
        "loss.beta=${${${",
    ],
)
def test_overrides_that_are_too_much(override):
    with pytest.raises(ConfigError, match="^override '"):
        load_config(str(CONFIG), [override])


RANGES = (
    "max_iterations=1e7", "max_iterations=10000000", "max_epochs=2e9", "save_interval=1099511627776",
    "seed=99999999999999999999", "pairs.row_tokens=1180591620717411303424", "pairs.row_tokens=1e9",
    "pairs.prompts_per_shard=1e12", "optimizer.lr=1e38", "optimizer.lr=[1e-5,1e38]", "loss.beta=1e300",
    "loss.beta=.nan", "sampling.max_new_tokens=1e15", "sampling.max_new_tokens=9223372036854775808",
    "sampling.temperature=1e30", "sampling.top_k=1e20", "global_batch_size=1e9",
    "generator.batch_size=1099511627776", "dataset.limit=99999999999999999999",
    "validation_dataset.limit=9999999999999", "model.num_layers=1000000000", "model.embed_dim=1099511627776",
    "model.rope_base=1e30", "checkpointer.keep_last=0", "replicas=0", "log_every_n_steps=-1", "nll_weight=1e30",
    "watch.window=1e12", "limit_train_batches=99999999999999999999", "max_steps=1e10",
)  # fmt: skip


@pytest.mark.parametrize("override", RANGES)
def test_numbers_out_of_range_are_named(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=key):
        complete(load_config(str(CONFIG), ["output_dir=out", override]), SPINConfig)


def test_all_of_them_are_named_at_once(lure, capsys):
    several = (
        "max_iterations=1e7",
        "save_interval=1099511627776",
        "pairs.row_tokens=1180591620717411303424",
        "optimizer.lr=1e38",
    )
    main(["validate", str(CONFIG), *tiny_overrides(lure / "out"), *several])
    out = capsys.readouterr().out
    assert all(each.partition("=")[0] in out for each in several), out


def test_a_recipe_ends_with_the_fault_alone(tmp_path, subprocess_env):
    """By the command line: exit code 1, no traceback, nothing written."""
    program = Path(spin_recipe.__file__)
    done = subprocess.run(
        [sys.executable, program, "--config", CONFIG, f"output_dir={tmp_path / 'out'}", "loss=spin.cli.cp.main"],
        cwd=CONFIG.parents[2], env=subprocess_env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    assert "spin.cli.cp.main is not allowed here" in done.stderr
