"""The child process of `sandbox`: a script for a bare Python that can import no other module of ours.

It reads the jobs from standard input as one JSON object and writes one line of JSON per job: its outputs as a
string, or null. It forks for each job; only the fork runs the job's code.
"""

import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time

# Modules that answers may import. They are imported here, since answers cannot open files.
MODULES = ["bisect", "collections", "functools", "heapq", "itertools", "math"]
MODULES += ["operator", "re", "string", "typing"]

NOBODY = 65534


def main():
    work = json.load(sys.stdin)
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()
    for job in work["jobs"]:
        result = run_apart(job, work["limits"])
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


def run_apart(job, limits):
    """Runs one job in a fork and returns its outputs as text, or None if it failed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            confine(writing, limits)
            send(outputs_of(job))
            os._exit(0)
        finally:
            os._exit(1)  # after any exception, SystemExit included
    os.close(writing)
    text = receive(reading, limits)
    os.close(reading)
    try:
        os.killpg(pid, signal.SIGKILL)  # before waitpid, after which the pid could be reused
    except OSError:
        os.kill(pid, signal.SIGKILL)  # it has no process group yet
    os.waitpid(pid, 0)
    return text


def confine(writing, limits):
    """Restricts this process: one pipe to write to, no other files, minimal rights and the limits."""
    os.setsid()
    signal.alarm(limits["seconds"] + 1)  # in case the parent is gone and cannot kill it
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.dup2(writing, 3)
    os.closerange(4, 1024)
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        except OSError:
            pass  # root of a container that may not change its user
    for kind, limit in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def outputs_of(job):
    space = {"__name__": "answer"}
    exec(compile(job["code"], "answer", "exec"), space)
    inputs = [json.dumps(given) for given in job["inputs"]]  # copies, since an answer may modify its input
    outputs = [space[job["name"]](json.loads(given)) for given in inputs]
    require_plain(outputs)
    return json.dumps(outputs)


def require_plain(value):
    """Raises TypeError for values that JSON would change (tuples) or run the code of (subclasses)."""
    if type(value) is list:
        for item in value:
            require_plain(item)
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(type(value))


def send(text):
    data = text.encode()
    while data:
        data = data[os.write(3, data) :]


def receive(reading, limits):
    """All text that the job writes; None if it is empty, exceeds the limit or takes too long."""
    deadline = time.monotonic() + limits["seconds"]
    data = b""
    while len(data) <= limits["output"]:
        ready, _, _ = select.select([reading], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return None
        chunk = os.read(reading, 2**16)
        if not chunk:
            return data.decode("ascii", "replace") or None
        data += chunk
    return None


if __name__ == "__main__":
    main()
