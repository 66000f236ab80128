"""Runs code written by a model in child processes with limits, and returns its outputs.

    run_all([Job("def f(x): return x + 1", "f", [1, 2])])  # ["[2, 3]"]

This protects against the mistakes of a model: endless loops, use of all memory, written files, started
processes, endless output, an early exit, a crash of the interpreter. A mistake fails its own answer and no
other.

- Every answer runs in its own process, forked from a Python that is started with -I -S in an empty
  environment and an empty temporary folder, and that imports none of our modules.
- CPU time, memory and wall-clock time are limited. Files cannot be written to or grow (RLIMIT_FSIZE 0); no
  file, socket or pipe can be opened (RLIMIT_NOFILE 0); no process can be started (RLIMIT_NPROC 0).
- The process group is killed at the end. Printed output is discarded.
- The code gets inputs, never the expected outputs. Its results are compared as text, not parsed or executed.

This does not protect against deliberate attacks. The kernel is shared and system calls are not filtered. The
code can remove or rename files and kill processes with the rights of the user who runs it, unless that is
root and may change its user: then answers run as user 65534 ("nobody"). For a root that may not, RLIMIT_NPROC
has no effect. For untrusted code run the whole in a container or a virtual machine.

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
    """A function to run: code, the name of the function that it defines, and one JSON argument per call."""

    code: str
    name: str
    inputs: Sequence[Any]


class Limits(NamedTuple):
    """Limits of a job: seconds of CPU and of wall-clock time, bytes of memory and of its outputs as JSON."""

    cpu_seconds: int = 1
    seconds: int = 4
    memory: int = 2**28
    output: int = 2**18


_LIMITS = Limits()
_PROBE = Job("def f(x):\n    return x", "f", [[1, "a"]])


def run_all(jobs: Sequence[Job], limits: Limits = _LIMITS) -> list[str | None]:
    """Runs jobs and returns the outputs of each as a JSON list (`json.dumps`), or None if it failed.

    A job fails if its code fails in any way, exceeds a limit, or returns anything else than numbers, strings,
    booleans, None and lists of them.

    Raises:
      RuntimeError: the sandbox does not work on this system.
    """
    done: list[str | None] = []
    while len(done) < len(jobs):
        rest = jobs[len(done) :]
        probe, *found = _run_in_one_child(rest, limits) or [None]
        if probe != json.dumps(_PROBE.inputs):
            raise RuntimeError("the sandbox does not run on this system: a trivial function failed in it")
        # If the child ended early, the current job ended it: the remaining jobs run in another child.
        done += found if len(found) == len(rest) else [*found, None]
    return done


def _run_in_one_child(jobs: Sequence[Job], limits: Limits) -> list[str | None]:
    """Results of the probe and then of the jobs, in order; fewer if the child ended early."""
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
            # The child enforces the limits of each job; this timeout is for a child that hangs.
            out, _ = child.communicate(json.dumps(work).encode(), timeout=60 + limits.seconds * len(jobs))
        except subprocess.TimeoutExpired:
            child.kill()
            out, _ = child.communicate()
        finally:
            _kill_group(child)
    lines = out.decode().split("\n")[:-1]  # the last line is incomplete if the child was killed
    return [json.loads(line) for line in lines[: len(jobs) + 1]]


def _kill_group(child: subprocess.Popen) -> None:
    # The group may have ended already; for zombies macOS raises PermissionError.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
