"""Runs code that a model wrote, in child processes with limits, and brings back what it returned.

    run_all([Job("def f(x): return x + 1", "f", [1, 2])])  # ["[2, 3]"]

Against mistakes of a model this is tight: endless loops, memory eaten up, files written, processes
started, output without end, an early exit, a crash of the interpreter: they cost the answer that makes
them and no other. Every answer runs in a process of its own (forked from a Python started with -I -S in
an empty environment and an empty temporary folder, whose modules are none of ours), with limits on CPU
time, memory and wall-clock time; files cannot be written to or grow (RLIMIT_FSIZE 0), no file, socket or
pipe can be opened (RLIMIT_NOFILE 0) and no process started (RLIMIT_NPROC 0); and its process group is
killed when it is done. What it prints goes nowhere. It learns inputs, never the outputs expected, and
what comes back is text that is compared, not parsed or run.

It is no wall against code that sets out to attack. The kernel is shared, system calls are not filtered.
Files can be removed or renamed with the rights of whoever runs this, and its other processes killed,
except where that is root and may change its user: then answers run as user 65534 ("nobody"). Where it
is root and may not, RLIMIT_NPROC means nothing. For code that nobody can vouch for use a container or a
virtual machine around the whole.

Needs an operating system with fork and resource limits: Linux, macOS.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

_CHILD = Path(__file__).with_name("sandbox_child.py")


class Job(NamedTuple):
    """A function to run: the code, the name it defines, and one argument a call (as JSON has them)."""

    code: str
    name: str
    inputs: Sequence[Any]


class Limits(NamedTuple):
    """What a job may use: seconds of CPU and wall-clock time, bytes of memory and of its outputs as JSON."""

    cpu_seconds: int = 1
    seconds: int = 4
    memory: int = 2**28
    output: int = 2**18


_LIMITS = Limits()
_PROBE = Job("def f(x):\n    return x", "f", [[1, "a"]])


def run_all(jobs: Sequence[Job], limits: Limits = _LIMITS) -> list[str | None]:
    """For each job its outputs in a JSON list (`json.dumps`), or None if there are none.

    There are none if the code fails in any way, exceeds a limit, or returns something else than
    numbers, strings, booleans, None and lists of them.

    Raises RuntimeError where no sandbox can be had.
    """
    done: list[str | None] = []
    while len(done) < len(jobs):
        rest = jobs[len(done) :]
        probe, *found = _run_in_one_child(rest, limits) or [None]
        if probe != json.dumps(_PROBE.inputs):
            raise RuntimeError("the sandbox does not run on this system: a trivial function failed in it")
        # If the child is gone, the job at hand took it along: the others go on in another.
        done += found if len(found) == len(rest) else [*found, None]
    return done


def _run_in_one_child(jobs: Sequence[Job], limits: Limits) -> list[str | None]:
    """Results of the probe and of the jobs, in order, as far as they were reached."""
    work = {"limits": limits._asdict(), "jobs": [job._asdict() for job in (_PROBE, *jobs)]}
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=folder,
            start_new_session=True,
        )
        try:
            # The child itself sees to the limit of each job; this one is for a child that hangs.
            out, _ = child.communicate(json.dumps(work).encode(), timeout=60 + limits.seconds * len(jobs))
        except subprocess.TimeoutExpired:
            child.kill()
            out, _ = child.communicate()
        finally:
            _kill_group(child)
    lines = out.decode().split("\n")[:-1]  # the last has no end if the child was cut short
    return [json.loads(line) for line in lines[: len(jobs) + 1]]


def _kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS says the latter of zombies
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
