"""Signals and the time limit: all ranks stop together, save once, and say which command resumes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from spin_recipe import SPINRecipe

import spin.checkpoint.checkpointer
from spin.config import SPINConfig
from spin.core.command import spin_command
from spin.data import PairStore
from spin.run.stopping import StopRequest, resume_command
from tests.recipes.helpers import (
    CONFIG,
    REPO,
    command,
    command_line,
    environment,
    free_port,
    metrics_of,
    ranks_of,
    run,
    signalled,
    start,
    step_of,
    steps_done,
    stops_at,
    tiny_overrides,
    wait_for,
)

SHORT = ("max_iterations=1", "max_epochs=1", "validation_dataset=null")
LONG = ("max_iterations=1", "max_epochs=2")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("unbroken")
    return output_dir, run(output_dir, *LONG)


def shown_command(output):
    return re.search(r"Resume with:\n(.+)\n", output)[1]


@pytest.mark.slow
def test_one_of_two_ranks_gets_the_signal_and_both_stop(tmp_path):
    """SIGUSR1, as SLURM sends it, to rank 1 alone; then the command that was shown, as a shell runs it."""
    out = tmp_path / "out"
    words = command_line(out, *SHORT, nproc=2)
    process = start(words, cwd=tmp_path)
    wait_for(process, lambda: steps_done(out))
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    done = steps_done(out)
    assert 1 <= done < 5
    assert (out / "checkpoints" / f"step_{done:08d}" / "manifest.json").exists()
    again = shown_command(output)
    assert shlex.split(again)[-len(words[7:]) :] == words[7:] and "--nproc_per_node 2" in again
    finished = subprocess.run(again, shell=True, env=environment(), capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert [row["step"] for row in metrics_of(out)] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_slurm_script_of_the_documentation(tmp_path):
    """The script as it stands in docs/restarts.md, with stand-ins for SLURM's commands and a small run.

    SLURM signals the script; the script the step; the run saves and ends; the job is queued again. The second job ends
    by itself and is not.
    """
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.+?)```", (REPO / "docs/restarts.md").read_text(), re.S)[1]
    arguments = shlex.join(["--config", str(CONFIG), *tiny_overrides(tmp_path / "out"), *SHORT])
    assert script.count("--config mine.yaml output_dir=$HOME/spin") == 1
    script = script.replace("MASTER_PORT=29500", f"MASTER_PORT={free_port()}")
    (tmp_path / "job.sh").write_text(
        script.replace("--config mine.yaml output_dir=$HOME/spin", arguments).replace(" python ", f" {sys.executable} ")
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
    env = environment() | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "here",
    }  # fmt: skip
    job = ["bash", str(tmp_path / "job.sh")]
    out = tmp_path / "out"
    code, output = signalled(job, signal.SIGUSR1, lambda: steps_done(out), env=env)
    assert code == 0, output[-3000:]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert 1 <= len(metrics_of(out)) < 5
    done = subprocess.run(job, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert [row["step"] for row in metrics_of(out)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("async_save", ["true", "false"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_second_sigterm_while_saving(unbroken, tmp_path, monkeypatch, when, async_save):
    original, signals = spin.checkpoint.checkpointer.save_tensors, []

    def interrupted(*args):
        if when == "after":
            original(*args)
        os.kill(os.getpid(), signal.SIGTERM)
        signals.append(1)
        if when == "before":
            original(*args)

    changes = (*LONG, f"checkpointer.async_save={async_save}")
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(spin.checkpoint.checkpointer, "save_tensors", interrupted)
        stopped = run(tmp_path, *changes, recipe_class=stops_at(3))
    assert signals and step_of(stopped) == 3
    assert (tmp_path / "checkpoints" / "step_00000003" / "manifest.json").exists()
    assert signal.getsignal(signal.SIGTERM) == handler  # given back
    assert run(tmp_path, *changes).final_weights == unbroken[1].final_weights
    assert metrics_of(tmp_path) == metrics_of(unbroken[0])


def test_max_time_validates_saves_and_stops(unbroken, tmp_path, monkeypatch, caplog):
    """The budget ends in the third step. The next run has one of its own, and the losses are the unbroken run's."""

    class OutOfTime(SPINRecipe):
        def train_single_step(self, batch):
            if step_of(self) == 2:
                clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600)
                monkeypatch.setattr("spin.run.stopping.time", clock)
            return super().train_single_step(batch)

    changes = (*LONG, "max_time=00:01:00:00")
    run(tmp_path, *changes, recipe_class=OutOfTime)
    monkeypatch.undo()
    rows = metrics_of(tmp_path)
    assert rows[-1]["step"] == 3 and "val_loss" in rows[-1]
    assert "val_loss" not in metrics_of(unbroken[0])[3]
    assert (tmp_path / "checkpoints" / "step_00000003" / "manifest.json").exists()
    assert "Resume with:" in caplog.text
    assert run(tmp_path, *changes).final_weights == unbroken[1].final_weights
    assert [row.get("loss") for row in metrics_of(tmp_path)] == [row.get("loss") for row in metrics_of(unbroken[0])]


@pytest.mark.parametrize("stage", ["responses", "pairs"])
def test_sigterm_while_generating_or_scoring_keeps_what_is_done(unbroken, tmp_path, monkeypatch, stage):
    """After the first shard of each stage, which is not made again."""
    write, written = PairStore.write_shard, []

    def write_and_ask(self, index, pairs):
        write(self, index, pairs)
        written.append((self.path.name, index))
        if self.path.name == stage:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PairStore, "write_shard", write_and_ask)
        run(tmp_path, *LONG)
    assert metrics_of(tmp_path)[-1]["step"] == 0
    name, index = written[-1]
    assert name == stage and [store for store, _ in written].count(name) == 1
    shard = tmp_path / "iteration_000" / name / f"shard-{index:05d}.parquet"
    made = shard.stat().st_mtime_ns
    assert run(tmp_path, *LONG).final_weights == unbroken[1].final_weights
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


@pytest.mark.parametrize("start", [["/venv/bin/spin"], ["-m", "spin"], ["-u", "-m", "spin"]], ids=str)
def test_the_command_of_spin_run(monkeypatch, start):
    monkeypatch.setattr(sys, "orig_argv", ["python", *start, "run", "spin_recipe", "--config", "a b.yaml"])
    assert resume_command() == spin_command("run", "spin_recipe", "--config", "a b.yaml")
    assert resume_command("never").endswith(" resume=auto")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert resume_command() == spin_command("run", "--nproc_per_node", 8, "spin_recipe", "--config", "a b.yaml")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "4")
    assert resume_command().startswith(f"on each host: {spin_command('run', '--nnodes', 4)} ")


@pytest.mark.slow
@pytest.mark.parametrize("stops", [True, False])
def test_ctrl_c(tmp_path, stops):
    """It saves; with stop_signals=[] it ends the run without a traceback.

    A shell's background jobs ignore SIGINT, as their children would.
    """
    out = tmp_path / "out"
    program = [sys.executable, str(REPO / "recipes" / "spin_recipe.py")]
    words = command_line(out, *SHORT, *([] if stops else ["stop_signals=[]"]), program=program)
    moment = (lambda: steps_done(out)) if stops else (out / "config.yaml").exists
    unignored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    code, output = signalled(words, signal.SIGINT, moment, **unignored)
    if stops:
        assert code == 0, output
        assert "Ctrl-C again ends at once" in output and shown_command(output)
        states = sorted(path.name for path in (out / "checkpoints").glob("step_*"))
        assert states[-1] == f"step_{metrics_of(out)[-1]['step']:08d}"
    else:
        assert code == 130 and "error: interrupted." in output and "Traceback" not in output


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
    stop = StopRequest(["SIGUSR2"], None)
    handler = signal.getsignal(signal.SIGUSR2)
    stop.install()
    os.kill(os.getpid(), signal.SIGUSR2)
    stop.release()
    assert stop.is_asked and not stop.is_out_of_time
    assert signal.getsignal(signal.SIGUSR2) == handler
    usual = SPINConfig.model_fields["stop_signals"].get_default(call_default_factory=True)
    assert usual == ["SIGINT", "SIGTERM", "SIGUSR1"]


@pytest.mark.slow
def test_a_worker_of_spin_generate_stops_as_a_run_does(tmp_path):
    """A signal ends it with exit code 0, and so does max_time; the command that was shown makes the others."""
    out = tmp_path / "out"
    folder = out / "iteration_000" / "responses"
    program = [sys.executable, str(REPO / "recipes" / "spin_generate.py")]
    few = ("pairs.prompts_per_shard=1", "generator.batch_size=1")
    words = command_line(out, *few, program=program)
    code, output = signalled(words, signal.SIGUSR1, (folder / "shard-00000.parquet").exists)
    assert code == 0, output
    made = len(list(folder.glob("shard-*.parquet")))
    done = command(out, *few, "max_time=00:00:00:00", program=program)
    assert f"Stopped worker 0 as asked. {made} of 20 responses are kept" in done.stderr, done.stderr
    assert len(list(folder.glob("shard-*.parquet"))) == made < 20
    output, _ = start(shlex.split(shown_command(output))).communicate(timeout=120)
    assert "Complete, in 20 shards" in output, output
