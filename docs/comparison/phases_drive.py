"""Trains and decodes the runs of phases.py, side by side on several GPUs, as far as the time allows.

    python docs/comparison/phases_drive.py --gpus=0,1 --budget=580
    python docs/comparison/phases_drive.py --speeds

The first starts the most wanted training or decoding that can start whenever a GPU is free; a GPU named
twice, as in 0,0, does two things at a time. Before `--budget` seconds have passed it ends what is running
(trainings save, finished figures are in their files) and exits with 143; the same command goes on. It exits
with 0 when everything is decoded, with 1 if something failed (the logs are beside the runs). The second times
the decoding of runs that are decoded, one after the other. Copy the result files to docs/comparison/results
and run render.py.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import phases
from train_runs import command, summary

from refusion_jax.training.signals import PREEMPTED_EXIT_CODE

HERE = Path(__file__).parent
SHORTEST = 45  # seconds; with less time left nothing is started
POLL = 0.5  # seconds


class Job(NamedTuple):
    """A training or a decoding of a run."""

    kind: str  # "train", "decode" or "time"
    run: str
    arguments: list[str]

    @property
    def label(self) -> str:
        return f"{self.kind} {self.run}"


def trained(setup: phases.Setup, name: str) -> bool:
    steps = setup.steps_of(phases.RUNS[name])
    return (setup.folder / name / "checkpoints" / str(steps)).is_dir()


def decoding(kind: str, name: str, setup: phases.Setup) -> Job:
    flags = ["--speeds"] * (kind == "time") + ["--rehearse"] * (setup is phases.REHEARSAL)
    return Job(kind, name, ["python", str(HERE.relative_to(Path.cwd()) / "phases_decode.py"), name, *flags])


def timings(setup: phases.Setup, targets: list[str]) -> Iterator[Job]:
    """The timing of what is trained and decoded."""
    for name in targets:
        counted, timed = (phases.is_done(setup, name, part) for part in phases.PARTS)
        if counted and not timed and trained(setup, name):
            yield decoding("time", name, setup)


def wanted(setup: phases.Setup, targets: list[str]) -> Iterator[Job]:
    """What else can start now, the most wanted first."""
    for target in targets:
        if phases.is_done(setup, target, "counted"):
            continue
        before = phases.RUNS[target].after
        name = before if before and not trained(setup, before) else target
        if trained(setup, name):
            yield decoding("decode", name, setup)
        elif (overrides := phases.overrides(name, setup)) is not None:
            yield Job("train", name, command(name, overrides, setup.config, setup.folder))


def record(setup: phases.Setup, name: str) -> None:
    """Writes phases_train_RUN.json of a run that is trained, unless it is there."""
    path = setup.results / f"phases_train_{name}.json"
    overrides = phases.overrides(name, setup)
    if path.exists() or not trained(setup, name) or overrides is None:
        return
    arguments = command(name, overrides, setup.config, setup.folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary(name, arguments, setup.folder / name, 1), indent=1) + "\n")


class Driver:
    """Workers, one per GPU, that take jobs until none is left or the time is over.

    Args:
      setup: the sizes.
      targets: the runs to decode.
      jobs: (setup, targets) -> what can start now; `wanted` or `timings`.
      stop_at: the time (`time.monotonic`) at which running jobs are ended.
      kill_at: the time at which those that have not ended are killed.
    """

    def __init__(
        self,
        setup: phases.Setup,
        targets: list[str],
        jobs: Callable[[phases.Setup, list[str]], Iterator[Job]],
        stop_at: float,
        kill_at: float,
    ):
        self._setup, self._targets, self._jobs = setup, targets, jobs
        self._stop_at, self._kill_at = stop_at, kill_at
        self._lock = threading.Lock()
        self._taken: set[str] = set()  # labels of jobs that run or failed
        self.failed: list[str] = []

    def run(self, gpus: list[str]) -> None:
        for name in phases.RUNS:
            record(self._setup, name)  # of a run that ended as the driver was killed
        workers = [threading.Thread(target=self._work, args=(gpu,)) for gpu in gpus]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _work(self, gpu: str) -> None:
        while time.monotonic() < self._stop_at - SHORTEST:
            with self._lock:
                jobs = self._jobs(self._setup, self._targets)
                job = next((job for job in jobs if job.label not in self._taken), None)
                waits = len(self._taken) > len(self.failed)
                if job is not None:
                    self._taken.add(job.label)
            if job is not None:
                self._carry_out(job, gpu)
            elif waits:
                time.sleep(POLL)  # for the result of a job that runs
            else:
                return

    def _carry_out(self, job: Job, gpu: str) -> None:
        start, folder = time.monotonic(), self._setup.folder
        folder.mkdir(parents=True, exist_ok=True)
        environment = {"CUDA_VISIBLE_DEVICES": gpu, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        with open(folder / f"{job.run}.log", "a") as log:
            process = subprocess.Popen(
                [sys.executable, *job.arguments[1:]],
                env=environment | os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            code = self._code_of(process)
        record(self._setup, job.run)
        stopped = time.monotonic() >= self._stop_at
        with self._lock:
            if code == 0 or stopped:
                self._taken.remove(job.label)
            else:
                self.failed.append(job.label)
        print(f"{job.label}: exit {code} after {time.monotonic() - start:.0f} s on GPU {gpu}", flush=True)

    def _code_of(self, process: subprocess.Popen) -> int:
        """The exit code of a process, which is ended in time."""
        try:
            return process.wait(max(0, self._stop_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
        try:
            return process.wait(max(0, self._kill_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gpus", default="0", help="a job at a time on each, as in 0,1 (default %(default)s)")
    add("--budget", type=float, default=1e9, help="seconds (default: no limit)")
    add("--margin", type=float, default=40, help="of these for saving, seconds (default %(default)s)")
    add(
        "--only",
        default=",".join(phases.TARGETS),
        help="runs to decode, the most wanted first (default: all)",
    )
    add("--speeds", action="store_true", help="times what is decoded, one run after the other, on one GPU")
    add("--rehearse", action="store_true", help="with the tiny model, on a CPU")
    flags = parser.parse_args()
    targets = flags.only.split(",")
    if unknown := set(targets) - set(phases.TARGETS):
        parser.error(
            f"--only must be some of {', '.join(phases.TARGETS)}, found {', '.join(sorted(unknown))}"
        )
    end = time.monotonic() + flags.budget
    setup = phases.REHEARSAL if flags.rehearse else phases.Setup()
    gpus, jobs = flags.gpus.split(","), timings if flags.speeds else wanted
    if flags.speeds and len(gpus) > 1:
        parser.error(f"--gpus must be one GPU with --speeds, found {flags.gpus}")
    driver = Driver(setup, targets, jobs, end - flags.margin, end - flags.margin / 8)
    driver.run(gpus)
    for label in driver.failed:
        print(f"failed: {label}, see {setup.folder / label.split()[1]}.log")
    part = "timed" if flags.speeds else "counted"
    complete = all(phases.is_done(setup, target, part) for target in targets)
    sys.exit(1 if driver.failed else 0 if complete else PREEMPTED_EXIT_CODE)


if __name__ == "__main__":
    main()
