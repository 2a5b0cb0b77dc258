"""Runs independent jobs in worker processes, several to a GPU, until they are done or time is up."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Job = dict[str, Any]
_GOODBYE_SECONDS = 10.0
_SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


@dataclass
class _Worker:
    process: Any
    connection: Connection
    gpu: str
    job: Job | None = None


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Job], bool],
    gpus: Sequence[str],
    per_gpu: int,
    deadline_seconds: float | None = None,
    tell: Callable[[str], None] = print,
) -> int:
    """Runs jobs in their order, as many at a time as there are workers. A worker keeps its process from job to job.

    Args:
        jobs (Sequence[Job]): with a ``name``, the ``log`` file that takes what they print and, if it has any, the name
            of the job that it ``needs`` to have succeeded.
        work (Callable[[Job], bool]): a module's function, called in a worker; whether the job succeeded. It keeps its
            own results. A worker whose job failed or that died is replaced.
        gpus (Sequence[str]): what CUDA_VISIBLE_DEVICES is for the workers; an empty text leaves no GPU.
        per_gpu (int): workers to a GPU.
        deadline_seconds (float | None): after so long, workers are killed whatever they do.
        tell (Callable[[str], None]): gets a line when a job ends.

    Returns:
        int: jobs that did not succeed, those that never began among them.
    """
    started = time.monotonic()
    waiting, unfinished = list(jobs), {job["name"] for job in jobs}
    # the first jobs go to different GPUs
    places = [gpu for _ in range(per_gpu) for gpu in gpus][: len(waiting)]
    workers = [_start(gpu, work) for gpu in places]
    try:
        while True:
            for worker in workers:
                job = next((job for job in waiting if job.get("needs") not in unfinished), None)
                if worker.job is None and job:
                    waiting.remove(job)
                    worker.job = job
                    worker.connection.send(job)
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return len(unfinished)
            left = None if deadline_seconds is None else max(0.0, started + deadline_seconds - time.monotonic())
            ready = wait([worker.connection for worker in busy], left)
            if not ready:
                names = ", ".join(worker.job["name"] for worker in busy if worker.job)
                tell(f"time is up after {deadline_seconds:.0f} s; not finished: {names}; not begun: {len(waiting)}")
                return len(unfinished)
            for index, worker in enumerate(workers):
                if worker.job is None or worker.connection not in ready:
                    continue
                try:
                    done, seconds = worker.connection.recv()
                    ended = f"{'done' if done else 'FAILED'} in {seconds:.0f} s"
                except EOFError:
                    done, ended = False, "FAILED: its process died"
                elapsed, log = time.monotonic() - started, "" if done else f"; see {worker.job['log']}"
                tell(f"{elapsed:6.0f} s  {worker.job['name']}: {ended}{log}")
                if done:
                    unfinished.remove(worker.job["name"])
                worker.job = None
                if not done:
                    _stop(worker)
                    if waiting:
                        workers[index] = _start(worker.gpu, work)
    finally:
        for worker in workers:
            worker.connection.close()  # so that those that have nothing to do end at the same time
        for worker in workers:
            _stop(worker)


def _start(gpu: str, work: Callable[[Job], bool]) -> _Worker:
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=_serve, args=(theirs, gpu, work), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, gpu)


def _stop(worker: _Worker) -> None:
    worker.connection.close()  # one that has nothing to do ends by itself
    if worker.job is None:
        worker.process.join(timeout=_GOODBYE_SECONDS)
    # not terminate(): a recipe that is asked to stop finishes its step and says that all is well
    worker.process.kill()
    worker.process.join()


def _serve(connection: Connection, gpu: str, work: Callable[[Job], bool]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = connection.recv()
        except EOFError:  # the parent is gone
            return
        started = time.monotonic()
        Path(job["log"]).parent.mkdir(parents=True, exist_ok=True)
        with open(job["log"], "a", encoding="utf-8") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        connection.send((work(job), time.monotonic() - started))


def _end_with_parent() -> None:
    """Of a parent that is killed nothing stays: its job would go on in the folder of the command that continues."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
