"""Signals and the time limit: all ranks stop together, save once, and say which command goes on."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import spin_recipe
from spin_recipe import SPINRecipe

import spin.checkpoint.states
from spin.core.errors import ConfigError
from spin.run.stopping import StopRequest, parse_signals, resume_command
from tests.faults.test_kills import descendants
from tests.recipes.helpers import CONFIG, REPO, metrics_of, run, tiny_overrides

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("unbroken")
    return output_dir, run(output_dir, "max_iterations=1", "max_epochs=2")


def wait_for(process, is_time):
    deadline = time.monotonic() + 200
    while not is_time() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ranks_of(process):
    """Ranks of a torchrun, by number."""
    found = {}
    for pid in descendants(process.pid):
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        found |= {int(each.removeprefix("RANK=")): pid for each in environment if each.startswith("RANK=")}
    return found


def told_command(output):
    return re.search(r"goes on from here:\n(.+)\n", output)[1]


@pytest.mark.slow
def test_one_of_two_ranks_gets_the_signal_and_both_stop(tmp_path, subprocess_env):
    """SIGUSR1, as SLURM sends it, to rank 1 alone; then the command that was told, as a shell runs it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torchtune._cli.tune", "run", "--nproc_per_node", "2", "spin_recipe"]
    command += ["--config", str(CONFIG), *tiny_overrides(out), *SHORT]
    process = subprocess.Popen(
        command, env=subprocess_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    )
    wait_for(process, lambda: (out / "metrics.jsonl").exists() and metrics_of(out))
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    done = len(metrics_of(out))
    assert 1 <= done < 5
    assert (out / "checkpoints" / f"step_{done:08d}" / "manifest.json").exists()
    again = told_command(output)
    assert shlex.split(again)[-len(command[8:]) :] == command[8:] and "--nproc_per_node 2" in again
    finished = subprocess.run(again, shell=True, env=subprocess_env, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert [row["step"] for row in metrics_of(out)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_slurm_script_of_the_documentation(tmp_path, subprocess_env):
    """The script as it stands in docs/reliability.md, with stand-ins for SLURM's commands and a small run.

    SLURM signals the script; the script the step; the run saves and ends; the job is queued again. The second job ends
    by itself and is not.
    """
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.+?)```", (REPO / "docs/reliability.md").read_text(), re.S)[1]
    arguments = shlex.join(["--config", str(CONFIG), *tiny_overrides(tmp_path / "out"), *SHORT])
    assert script.count("--config llama3_1/8B_full output_dir=$HOME/spin") == 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        script = script.replace("MASTER_PORT=29500", f"MASTER_PORT={probe.getsockname()[1]}")
    (tmp_path / "job.sh").write_text(
        script.replace("--config llama3_1/8B_full output_dir=$HOME/spin", arguments).replace(
            " python ", f" {sys.executable} "
        )
    )
    commands = {
        # without the option the ranks that are left wait for one that has failed
        "srun": f'[ "$1" = --kill-on-bad-exit=1 ] || exit 2\nshift; echo $$ > {tmp_path}/step\n'
        'SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"',
        "scancel": f'[ "$1 $2" = "--signal=USR1 77" ] && kill -USR1 $(cat {tmp_path}/step)',
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/asked',
    }
    (tmp_path / "bin").mkdir()
    for name, text in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = subprocess_env | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "here",
    }  # fmt: skip
    job = ["bash", str(tmp_path / "job.sh")]
    process = subprocess.Popen(job, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = tmp_path / "out"
    wait_for(process, lambda: (out / "metrics.jsonl").exists() and metrics_of(out))
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert 1 <= len(metrics_of(out)) < 5
    done = subprocess.run(job, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert [row["step"] for row in metrics_of(out)] == [1, 2, 3, 4, 5]


class SignalledAt(SPINRecipe):
    """Gets a real SIGTERM in the middle of its third step."""

    def train_single_step(self, batch):
        if self._progress.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_single_step(batch)


@pytest.mark.parametrize("async_save", ["true", "false"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_second_sigterm_while_saving(unbroken, tmp_path, monkeypatch, when, async_save):
    original, signals = spin.checkpoint.states._save_tensors, []

    def interrupted(*args):
        if when == "after":
            original(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.append(1)
        if when == "before":
            original(*args)

    changes = ("max_iterations=1", "max_epochs=2", f"checkpointer.async_save={async_save}")
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(spin.checkpoint.states, "_save_tensors", interrupted)
        stopped = run(tmp_path, *changes, recipe_class=SignalledAt)
    assert signals and stopped._progress.step == 3
    assert (tmp_path / "checkpoints" / "step_00000003" / "manifest.json").exists()
    assert signal.getsignal(signal.SIGTERM) == handler  # given back
    assert run(tmp_path, *changes).final_weights == unbroken[1].final_weights
    assert metrics_of(tmp_path) == metrics_of(unbroken[0])


def test_max_time_validates_saves_and_stops(unbroken, tmp_path, caplog):
    """The budget ends in the third step. The next run has one of its own, and the losses are the unbroken run's."""

    class OutOfTime(SPINRecipe):
        def train_single_step(self, batch):
            if self._progress.step == 2:
                self._stop._timer._started -= 3600
            return super().train_single_step(batch)

    changes = ("max_iterations=1", "max_epochs=2", "max_time=00:01:00:00")
    run(tmp_path, *changes, recipe_class=OutOfTime)
    rows = metrics_of(tmp_path)
    assert rows[-1]["step"] == 3 and "val_loss" in rows[-1]
    assert "val_loss" not in metrics_of(unbroken[0])[3]
    assert (tmp_path / "checkpoints" / "step_00000003" / "manifest.json").exists()
    assert "This command goes on from here:" in caplog.text
    assert run(tmp_path, *changes).final_weights == unbroken[1].final_weights
    assert [row.get("loss") for row in metrics_of(tmp_path)] == [row.get("loss") for row in metrics_of(unbroken[0])]


@pytest.mark.parametrize("stage", ["_play", "_score"])
def test_sigterm_while_generating_or_scoring_keeps_what_is_done(unbroken, tmp_path, monkeypatch, stage):
    """After the first shard of each stage, which is not made again."""
    from spin.data import PairStore

    write, written = PairStore.write_shard, []

    def write_and_ask(self, index, pairs):
        write(self, index, pairs)
        written.append((self.path.name, index))
        if self.path.name == {"_play": "responses", "_score": "pairs"}[stage]:
            os.kill(os.getpid(), signal.SIGTERM)

    changes = ("max_iterations=1", "max_epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr(PairStore, "write_shard", write_and_ask)
        run(tmp_path, *changes)
    assert metrics_of(tmp_path)[-1]["step"] == 0
    name, index = written[-1]
    assert [store for store, _ in written].count(name) == 1
    shard = tmp_path / "iteration_000" / name / f"shard-{index:05d}.parquet"
    made = shard.stat().st_mtime_ns
    assert run(tmp_path, *changes).final_weights == unbroken[1].final_weights
    assert shard.stat().st_mtime_ns == made
    assert metrics_of(tmp_path) == metrics_of(unbroken[0])


def test_the_command_under_every_launcher(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "spin_recipe", "--config", "a b.yaml", "resume=never"])
    assert resume_command() == "python -u -m spin_recipe --config 'a b.yaml' resume=never"
    assert resume_command("never").endswith(" resume=never resume=auto")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    launcher = f"{sys.executable} -m torch.distributed.run"
    assert resume_command().startswith(f"{launcher} --standalone --nproc_per_node 8 -m spin_recipe --config")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "4")
    assert resume_command().startswith(f"on each host: {launcher} --nnodes 4 ")


def interrupted(out, env, is_time, *overrides):
    """A run that gets a Ctrl-C, and its output. A shell's background jobs ignore SIGINT, as their children would."""
    command = [sys.executable, str(REPO / "recipes" / "spin_recipe.py"), "--config", str(CONFIG)]
    process = subprocess.Popen(
        [*command, *tiny_overrides(out), *SHORT, *overrides],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for(process, is_time)
    process.send_signal(signal.SIGINT)
    return process, process.communicate(timeout=200)[0]


@pytest.mark.slow
def test_ctrl_c_saves(tmp_path, subprocess_env):
    """And where it does not, stop_signals=[], it ends the run without a traceback."""
    out = tmp_path / "out"
    process, output = interrupted(out, subprocess_env, lambda: (out / "metrics.jsonl").exists() and metrics_of(out))
    assert process.returncode == 0, output
    assert "Ctrl-C again ends at once" in output and told_command(output)
    states = sorted(path.name for path in (out / "checkpoints").glob("step_*"))
    assert states[-1] == f"step_{metrics_of(out)[-1]['step']:08d}"

    out = tmp_path / "other"
    process, output = interrupted(out, subprocess_env, (out / "config.yaml").exists, "stop_signals=[]")
    assert process.returncode == 130 and "error: interrupted." in output and "Traceback" not in output


def test_a_second_ctrl_c_ends_at_once(monkeypatch, capfd):
    """One that a launcher hands on twice within a moment is one."""
    now = 100.0
    monkeypatch.setattr("spin.run.stopping.time.monotonic", lambda: now)
    stop = StopRequest(["SIGINT"], None)
    stop.note(signal.SIGINT, None)
    stop.note(signal.SIGINT, None)
    assert stop.is_asked and capfd.readouterr().err.count("Ctrl-C again ends at once") == 1
    now = 101.5
    with pytest.raises(KeyboardInterrupt):
        stop.note(signal.SIGINT, None)


def test_signals_by_name():
    assert parse_signals(["SIGTERM", "SIGUSR2"]) == [signal.SIGTERM, signal.SIGUSR2]
    for name in ("SIGKILL", "TERM", 15):
        with pytest.raises(ConfigError, match="stop_signals"):
            parse_signals([name])
    stop = StopRequest(["SIGUSR2"], None)
    handler = signal.getsignal(signal.SIGUSR2)
    stop.install()
    os.kill(os.getpid(), signal.SIGUSR2)
    stop.release()
    assert stop.is_asked and not stop.is_out_of_time
    assert signal.getsignal(signal.SIGUSR2) == handler
    assert spin_recipe.DEFAULTS["stop_signals"] == ["SIGINT", "SIGTERM", "SIGUSR1"]


@pytest.mark.slow
def test_a_worker_of_spin_generate_stops_as_a_run_does(tmp_path, subprocess_env):
    """A signal ends it with exit code 0 and whole shards; max_time too; the command that was told makes the others."""
    out = tmp_path / "out"
    folder = out / "iteration_000" / "responses"
    command = [sys.executable, str(REPO / "recipes" / "spin_generate.py"), "--config", str(CONFIG)]
    command += [*tiny_overrides(out), "pairs.prompts_per_shard=1", "generator.batch_size=1"]
    options = {"env": subprocess_env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, **options)
    wait_for(process, lambda: (folder / "shard-00000.parquet").exists())
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    made = len(list(folder.glob("shard-*.parquet")))
    done = subprocess.run([*command, "max_time=00:00:00:00"], timeout=120, **options)
    assert done.returncode == 0 and "stopped as asked" in done.stdout, done.stdout
    assert len(list(folder.glob("shard-*.parquet"))) == made < 20
    done = subprocess.run(shlex.split(told_command(output)), timeout=120, **options)
    assert done.returncode == 0 and "All 20 shards are there" in done.stdout, done.stdout
