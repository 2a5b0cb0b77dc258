"""`spin`: the commands as users type them, in this process where that shows the same."""

import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from packaging.requirements import Requirement

from spin.cli import COMMANDS, doctor, main
from spin.config import SPINConfig, complete, load_config, packaged_configs, plain
from spin.config.catalog import config_model, configs, load_recipe, recipe_files, recipe_of
from spin.core.command import spin_command
from spin.data import PairStore
from tests.report_runs import write_run, write_store

REPO = Path(__file__).resolve().parents[2]


def spin(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as end:  # argparse's
        code = end.code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def refused(monkeypatch, capsys, recipe, *arguments):
    """What a recipe says that refuses its command line."""
    monkeypatch.setattr("sys.argv", ["spin_recipe", *arguments])
    with pytest.raises(SystemExit, match="1"):
        load_recipe(recipe).recipe_main()
    return capsys.readouterr().err


# --- The commands as a whole ---


LIGHT = [
    ["ls"], ["cp", "full", "mine"], ["--help"], ["--version"], [], ["typo"], ["run", "typo"], ["run", "spin_recipe"],
    ["run", "spin_recipe", "--config", "typo"], ["validate", "typo"], ["estimate", "typo"], ["models"],
    ["run", "spin_recipe", "--help"], ["run", "spin_recipe", "--config", "full", "max_iteration=1"],
    ["run", "spin_recipe", "--config", "lora", "model.path=/nowhere", "dataset.source=x.jsonl"],
    *([name, "full", "max_iteration=1", "model.path=x"] for name in ("validate", "estimate")),
    *([name, "--help"] for name in COMMANDS),
]  # fmt: skip


def test_help_and_typos_load_nothing_heavy(tmp_path, subprocess_env):
    """What makes a program start slowly: torch, torchtune, transformers, pyarrow."""
    code = (
        "import sys\nfrom spin.cli import main\n"
        f"for arguments in {LIGHT}:\n"
        "    try:\n        main(arguments)\n    except SystemExit:\n        pass\n"
        "    heavy = {'torch', 'torchtune', 'torchao', 'transformers', 'pyarrow', 'numpy'} & sys.modules.keys()\n"
        "    assert not heavy, (arguments, heavy)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=subprocess_env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports, heavy",
    [
        ("spin_recipe, spin_sft", {"torchtune", "torchao", "transformers", "datasets"}),
        ("spin.data; spin.data.PairStore; spin.data.ChatTokenizer; import spin.report", {"torch", "transformers"}),
        ("spin.config; spin.config.SPINConfig", {"torch", "numpy", "pyarrow"}),
    ],
)
def test_what_is_imported_only_where_it_is_used(imports, heavy, subprocess_env):
    """Seconds of every start: of a run whose config is wrong, and of commands that read what a run has written."""
    code = f"import {imports}; import sys; sys.exit(str({heavy} & sys.modules.keys() or 0))"
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_env, capture_output=True, text=True)
    assert done.stderr in ("", "0\n"), done.stderr


def test_doctor_starts_where_torch_is_missing(subprocess_env):
    """It is asked when something is wrong with what is installed."""
    code = "import sys; sys.modules['torch'] = None; from spin.cli.doctor import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_env, capture_output=True, text=True)
    assert done.returncode == 1 and re.search(r"^torch +FAULT +cannot be imported", done.stdout, re.M), done.stderr


def test_python_dash_m_spin(subprocess_env, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "spin", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=subprocess_env, capture_output=True, text=True)

    assert run("ls").stdout.startswith("spin_evaluate\n")
    assert [run("cp", "nothing", "x").returncode, run("nothing").returncode, run().returncode] == [1, 2, 2]


def test_every_command_has_help_and_refuses_unknown_options(capsys):
    _, commands, _ = spin(capsys, "--help")
    for name in COMMANDS:
        code, out, _ = spin(capsys, name, "--help")
        assert code == 0 and out.startswith(f"usage: {spin_command(name)} ") and f"\n  {name} " in commands
        code, _, err = spin(capsys, name, "--no-such-option")
        assert code == 2 and "usage" in err
    assert "Did you mean '--against'?" in spin(capsys, "chat", "run", "--agains", "1")[2]
    assert "Did you mean '--force'?" in spin(capsys, "new", "--model", "x", "--data", "x", "--forse")[2]
    code, _, err = spin(capsys, "reprot")
    assert code == 2 and "Did you mean 'report'?" in err


def test_how_a_command_may_end(monkeypatch, capsys, tmp_path):
    """By an error of the system's in a line, by Ctrl-C, and with a traceback on request."""
    for error, code in ((PermissionError(13, "denied", "x"), 1), (KeyboardInterrupt(), 130)):
        monkeypatch.setattr("spin.cli.ls.main", Mock(side_effect=error))
        found, _, err = spin(capsys, "ls")
        assert found == code and ("denied" in err) == (code == 1)
    monkeypatch.setenv("SPIN_TRACEBACK", "1")
    with pytest.raises(Exception, match="no such folder"):
        main(["report", str(tmp_path / "nowhere")])


# --- ls and cp ---


@pytest.mark.parametrize("count", ["0", "-1", "two", pytest.param("gpu", id="each")])
def test_a_number_of_processes_that_cannot_be(count, capsys, tmp_path, tiny_lm):
    if count == "gpu" and torch.cuda.is_available():
        pytest.skip("it can be")
    data = tmp_path / "data.jsonl"
    words = ("--config", "full", f"model.path={tiny_lm}", f"dataset.source={data}")
    code, _, err = spin(capsys, "run", "--nproc_per_node", count, "spin_recipe", *words)
    assert code == 1 and re.match(rf"error: --nproc_per_node {count}: .*xpected a number from 1, gpu ", err), err
    code, _, err = spin(capsys, "run", "spin_recipe", "--nproc_per_node", count, *words)
    assert code == 2 and "--nproc_per_node, stand before the recipe" in err, err


def test_ls_shows_every_config_under_its_recipe(capsys):
    code, out, _ = spin(capsys, "ls")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == sorted(recipe_files())
    assert sorted(line.split()[0] for line in lines if line.startswith(" ")) == packaged_configs()
    assert lines.index("spin_generate") < next(i for i, line in enumerate(lines) if "generate " in line)
    assert {recipe for recipe, _ in configs().values()} <= recipe_files().keys()


def test_recipes_are_those_of_the_folder():
    assert recipe_files() == {path.stem: path for path in sorted((REPO / "recipes").glob("*.py"))}
    assert config_model(load_recipe("spin_recipe")) is SPINConfig


def test_a_config_without_a_header_is_known_by_its_keys(tmp_path):
    for name, (recipe, _) in configs().items():
        text = (REPO / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        bare = tmp_path / "bare.yaml"
        bare.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")))
        # generation alone takes the keys of full fine-tuning
        assert recipe_of(bare) == ("spin_recipe" if recipe == "spin_generate" else recipe), name


@pytest.mark.parametrize(
    ("config", "program", "recipe"),
    [
        ("quickstart/evaluate", "spin_recipe", "spin_evaluate"),
        ("quickstart/smollm2_135M_cpu", "spin_evaluate", "spin_recipe"),
    ],
)
def test_a_config_of_another_recipe_is_named(monkeypatch, capsys, config, program, recipe):
    text = refused(monkeypatch, capsys, program, "--config", config)
    assert f"{config} is a config for {recipe}: {spin_command('run', recipe, '--config', config)}" in text
    assert text.count("Known keys:") <= 2  # all strangers in one line


def test_a_misspelt_key_says_nothing_of_other_recipes(monkeypatch, capsys):
    text = refused(monkeypatch, capsys, "spin_generate", "--config", "quickstart/smollm2_135M_cpu", "sed=1")
    assert "sed: unknown key. Did you mean 'seed'?" in text and "is a config for" not in text


def test_cp_of_a_config_and_a_recipe(tmp_path, capsys):
    assert spin(capsys, "cp", "full", tmp_path / "my_1B")[0] == 0
    copied = tmp_path / "my_1B.yaml"
    assert load_config(str(copied)) == load_config("full")
    assert recipe_of(copied) == "spin_recipe"
    assert spin(capsys, "cp", "spin_generate.py", tmp_path)[0] == 0
    assert (tmp_path / "spin_generate.py").read_bytes() == (REPO / "recipes" / "spin_generate.py").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my_1B.yaml", "spin_generate.py"]


@pytest.mark.parametrize("name", ["quickstart/smollm2_135M_cpu", "quickstart/evaluate"])
def test_cp_full_writes_all_keys_and_changes_nothing(tmp_path, name):
    """The copy has the arguments of components too, with the defaults of their signatures."""
    file = tmp_path / "all.yaml"
    assert main(["cp", name, str(file), "--full"]) == 0
    model = config_model(load_recipe(recipe_of(file)))
    short, full = (plain(complete(load_config(source), model)) for source in (name, str(file)))

    def compare(ours, theirs):
        for key, value in ours.items():
            compare(value, theirs[key]) if isinstance(value, dict) else None
            assert isinstance(value, dict) or value == theirs[key], key

    compare(short, full)
    assert full["dataset"]["on_bad_row"] == "error" and "on_bad_row" not in short["dataset"]
    text = file.read_text()
    assert all(f"{key}:" in text for key in model.model_fields)
    assert re.search(r"top_p: 1\.0 +# keep the most probable tokens", text)


def test_a_copy_under_the_recipes_own_name_is_never_mistaken_in_silence(tmp_path, monkeypatch, capsys):
    """Of the installed recipe and an edited copy in the folder, the launcher decides which runs: it is said which."""
    installed, copy = REPO / "recipes" / "spin_recipe.py", tmp_path / "spin_recipe.py"
    _, out, _ = spin(capsys, "cp", "spin_recipe", tmp_path)
    assert "Rename it, to my_spin_recipe.py" in out
    assert "Rename it" not in spin(capsys, "cp", "spin_recipe", tmp_path / "mine.py")[1]
    monkeypatch.chdir(tmp_path)

    def warnings(recipe):
        text = refused(monkeypatch, capsys, recipe, "--config", "there_is_none")
        return [line for line in text.splitlines() if line.startswith("warning: ")]

    assert warnings("spin_recipe") == warnings(str(copy)) == []  # the same text: it does not matter which runs
    copy.write_text(copy.read_text() + "# edited\n")
    (line,) = warnings("spin_recipe")
    assert line.startswith(f"warning: {installed} runs, not {copy}.") and "my_spin_recipe.py" in line
    (line,) = warnings(str(copy))
    assert line.startswith(f"warning: {copy} runs, not {installed}.")
    assert warnings("mine.py") == []


@pytest.mark.parametrize(
    ("name", "message", "option"),
    [("mine.yaml", "mine.yaml: is there already", "--force"), ("a/b/mine.yaml", "no such folder", "--make-parents")],
)
def test_cp_keeps_what_is_there_and_makes_no_folders_unless_asked(tmp_path, capsys, name, message, option):
    (tmp_path / "mine.yaml").write_text("precious")
    code, _, err = spin(capsys, "cp", "full", tmp_path / name)
    assert code == 1 and message in err and (tmp_path / "mine.yaml").read_text() == "precious"
    assert spin(capsys, "cp", "full", tmp_path / name, option)[0] == 0
    assert "SPIN" in (tmp_path / name).read_text()
    code, _, err = spin(capsys, "cp", "ful", tmp_path)
    assert code == 1 and "Did you mean full" in err


# --- pairs ---


@pytest.fixture
def store(tmp_path):
    """Scored: 2 tokens, stop, margin +10; 4 tokens, length, margin -5."""
    write_store(tmp_path / "pairs", scored=True)
    return tmp_path / "pairs"


def test_pairs_counts(store, capsys):
    code, out, _ = spin(capsys, "pairs", store)
    assert code == 0
    assert "2 of 2 shards, sealed" in out and "2 to 2 prompts" in out and "1 (50.0%)" in out
    lines = [line for line in out.splitlines() if ", tokens" in line or ", nats" in line]
    table = {line.split(",")[0]: line.split()[2:] for line in lines}
    assert table["prompt"] == ["3"] * 6
    assert [table["generated"][i] for i in (0, 2, 4, 5)] == ["2", "3", "4", "3"]
    assert [table["margin"][i] for i in (0, 2, 4, 5)] == ["-5.00", "2.50", "10.00", "2.50"]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], ["sample-0", "sample-1"]),
        (["--min-margin", 0], ["sample-0"]),
        (["--max-margin", 0], ["sample-1"]),
        (["--min-margin", -5, "--max-margin", 10], ["sample-0", "sample-1"]),
        (["--min-length", 3], ["sample-1"]),
        (["--max-length", 3], ["sample-0"]),
        (["--finish", "length"], ["sample-1"]),
        (["--finish", "stop", "--min-length", 3], []),
    ],
    ids=str,
)
def test_pairs_exports_what_it_filters_as_text_and_numbers(store, tmp_path, tiny_lm, capsys, options, kept):
    out = tmp_path / "out.jsonl"
    code, text, _ = spin(capsys, "pairs", store, *options, "--export", out, "--tokenizer", tiny_lm)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and [row["sample_id"] for row in rows] == kept
    assert f"{len(kept)} to {len(kept)} prompt" in text
    if options:
        return
    code, _, error = spin(capsys, "pairs", store, "--sample", 1, "--export", out)
    assert code == 1 and f"{out}: is there already. Choose another name, or remove it." in error
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    row = rows[1]
    assert (row["prompt_tokens"], row["real_tokens"], row["generated_tokens"]) == (3, 2, 4)
    assert (row["margin"], row["reference_real_logp"], row["reference_generated_logp"]) == (-5.0, -20.0, -15.0)
    assert row["finish_reason"] == "length" and row["real"].endswith("<|im_end|>") and row["generated"]


@pytest.mark.parametrize("command", [("pairs", "--export"), ("report", "--out")], ids=str)
@pytest.mark.parametrize(("name", "message"), [("no/out", "{}/no: no such folder. Make it."), ("", "{}: is a folder.")])
def test_a_file_that_cannot_be_made_is_refused_before_the_work(tmp_path, capsys, command, name, message):
    nowhere = tmp_path / "nowhere"  # which would be refused next
    code, _, error = spin(capsys, command[0], nowhere, command[1], tmp_path / name)
    assert code == 1 and message.format(tmp_path) in error and "nowhere" not in error


def test_pairs_shows_a_sample_with_the_tokenizer_of_the_run(tmp_path, tiny_lm, capsys):
    config = {"tokenizer": {"_component_": "spin.data.ChatTokenizer", "path": str(tiny_lm)}}
    folder = write_run(tmp_path, iterations=1, steps=1, config=config)
    code, out, _ = spin(capsys, "pairs", folder / "iteration_000" / "responses", "--sample", 1)
    assert code == 0 and out.count("[generated]") == 1 and "<|im_end|>" in out


def test_pairs_of_a_store_that_is_being_made(store, capsys):
    manifest = store / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "sealed": False}))
    (store / "shard-00001.parquet").unlink()
    code, out, _ = spin(capsys, "pairs", store)
    assert code == 0 and "1 of 2 shards, not sealed" in out and "1 to 1 prompt\n" in out


def test_pairs_refuses_what_it_cannot_do(tmp_path, capsys):
    write_store(tmp_path / "responses")
    write_store(tmp_path / "broken")
    (tmp_path / "broken" / "shard-00001.parquet").unlink()
    for name, options, message in (
        ("responses", ("--min-margin", 0), "is not scored"),
        ("responses", ("--sample", 1), "--tokenizer"),
        ("nowhere", (), "no pair store here"),
        (".", (), "Below it there are broken, responses."),
        ("broken", (), "shard-00001.parquet: missing"),
    ):
        code, _, err = spin(capsys, "pairs", tmp_path / name, *options)
        assert code == 1 and message in err
    assert PairStore.open(tmp_path / "responses").is_sealed


# --- doctor ---


def test_doctor_knows_what_is_installed(capsys):
    code, out, err = spin(capsys, "doctor")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert lines["torch"] == ["ok", torch.__version__] and lines["torchtune"] == ["ok", "0.6.1"]
    assert {"python", "torchao", "transformers", "vllm", "cpu"} <= lines.keys()
    assert code == ("FAULT" in out) and bool(err) == bool(code)


def test_doctor_says_what_is_missing_or_does_not_fit():
    texts = ("torchtune==0.5.0", "no-such-package>=2", "torch>=2")
    old, gone, fine = (doctor.check_requirement(Requirement(text)) for text in texts)
    assert old.verdict == gone.verdict == "FAULT" and fine.verdict == "ok"
    assert "0.6.1, expected ==0.5.0: `pip install 'torchtune==0.5.0'`" in old.text
    assert "not installed: `pip install 'no-such-package>=2'`" in gone.text


@pytest.mark.parametrize(
    ("torchao", "verdict", "launcher"), [("0.15.0", "ok", "tune run;"), ("0.17.0", "note", "spin run;")]
)
def test_doctor_knows_which_launchers_torchao_lets_start(monkeypatch, torchao, verdict, launcher):
    monkeypatch.setattr(doctor, "installed_version", lambda package: torchao)
    (finding,) = doctor.launchers()
    assert finding.verdict == verdict and launcher in finding.text


def test_doctor_says_which_dtype_a_cpu_is_fast_in(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for fast in (True, False):
        monkeypatch.setattr("spin.core.dtypes.has_fast_bf16", lambda fast=fast: fast)
        (text,) = (finding.text for finding in doctor.devices() if finding.what == "gpu")
        assert "device=cpu" in text and ("compute_dtype=fp32" in text) is not fast


@pytest.mark.parametrize(("installed", "verdict"), [(None, "ok"), ("2.11.0", "ok"), ("2.13.0+cpu", "note")])
def test_doctor_compares_vllm_with_the_torch_that_is_there(monkeypatch, installed, verdict):
    monkeypatch.setattr(doctor, "installed_vllm", lambda: ("vllm", "0.23.0"))
    monkeypatch.setattr(doctor, "installed_version", lambda package: installed)
    monkeypatch.setattr("importlib.metadata.requires", lambda package: ["torch==2.11.0", "numpy"])
    (finding,) = doctor.vllm()
    assert finding.verdict == verdict and "0.23.0" in finding.text


def test_doctor_ends_with_1_if_something_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "packages", lambda: [doctor.Finding("torch", "FAULT", "not installed")])
    code, out, err = spin(capsys, "doctor")
    assert code == 1 and "FAULT" in out and "1 of these" in err
