"""Several processes as one run: how they connect, and how they all end when one of them fails.

    with processes.distributed("10.0.0.1:8476", num_processes=4, process_id=2):
        …  # jax.devices() lists the devices of all four

JAX finds the processes of a SLURM step or a TPU slice by itself; elsewhere three flags connect them.
"""

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator

import jax

from refusion_jax import errors
from refusion_jax.errors import BadInput

TIMEOUT = 300  # seconds that all processes have to connect
GRACE = 2  # seconds that process 0 lives on after an error; the others end when it does


@contextlib.contextmanager
def distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = TIMEOUT,
) -> Iterator[None]:
    """Connects this process with the others of its run. Enter it before JAX is asked for its devices.

    Without arguments the process is alone, except under SLURM or on a TPU slice with several processes; with
    `num_processes` 1 it is alone in any case. If it is one of several, an exception inside the context ends
    the process at once: a normal exit would wait for the others, which may be waiting for this process.

    Args:
      coordinator: HOST:PORT at which process 0 listens, reachable by the others.
      num_processes: number of processes.
      process_id: index of this process, from 0.
      timeout: seconds to wait for all processes; then this one prints one line and exits with 1.

    Raises:
      BadInput: the arguments contradict each other or are out of range.
    """
    _check(coordinator, num_processes, process_id, timeout)
    if coordinator is not None:
        # Without cluster detection: SLURM's variables must not restrict the devices of this process.
        _initialize(timeout, coordinator, num_processes, process_id, cluster_detection_method="deactivate")
    elif num_processes is None and _in_cluster():
        _initialize(timeout)
    if not jax.distributed.is_initialized():
        yield
        return
    if jax.process_index() > 0:  # warnings on the data are the same in all processes; one prints them
        logging.getLogger("refusion_jax").setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        code = errors.report(error, f"process {jax.process_index()}: ")
        if jax.process_index() == 0:
            time.sleep(GRACE)  # so that others with the same error can report it first
        os._exit(code)


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
    flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [flag for flag, value in flags.items() if value is None]
    if timeout < 1:
        raise BadInput(f"--coordinator_timeout: must be at least 1 second, found {timeout}")
    if num_processes is not None and num_processes < 1:
        raise BadInput(f"--num_processes: must be at least 1, found {num_processes}")
    if len(missing) == 3 or (num_processes == 1 and len(missing) == 2):
        return
    if missing:
        raise BadInput(f"{missing[0]}: is missing, {', '.join(flags)} go together")
    port = re.fullmatch(r"(?:[^:\s]+|\[[^\]\s]+\]):(\d{1,5})", coordinator)
    if port is None or not 1 <= int(port[1]) <= 65535:
        raise BadInput(f"--coordinator: must be HOST:PORT, found {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise BadInput(f"--process_id: must be from 0 to {num_processes - 1}, found {process_id}")


def _in_cluster() -> bool:
    """Whether there may be other processes that JAX finds by itself."""
    if jax.distributed.is_initialized():
        return False
    # Not for a SLURM step of a single task: JAX would give it only the first GPU of its node.
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    # On a TPU machine, importing JAX sets this to "tpu", unless JAX_PLATFORMS names another platform.
    return slurm or "tpu" in (jax.config.jax_platforms or "").split(",")


def _initialize(timeout: int, *who, **options) -> None:
    """Calls jax.distributed.initialize; if processes do not connect, prints one line and exits with 1."""

    def give_up(reason: str) -> None:
        if who:
            where = "--coordinator={} --num_processes={} --process_id={}".format(*who)
        else:
            where = "processes found by JAX (--num_processes=1 looks for none)"
        print(f"error: {where}: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    # JAX's own time limit aborts the process with a stack trace.
    timer = threading.Timer(timeout, give_up, [f"not all processes were there after {timeout} s"])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(*who, **options, initialization_timeout=2 * timeout + 60)
    except (RuntimeError, ValueError) as error:
        give_up(str(error).splitlines()[0])
    timer.cancel()
