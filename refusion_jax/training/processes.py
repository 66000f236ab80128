"""Several processes as one run: how they find each other, and how none is left waiting for one that failed.

    with processes.distributed("10.0.0.1:8476", num_processes=4, process_id=2):
        …  # jax.devices() are those of all four

JAX finds the processes of a SLURM step and of a TPU slice by itself. Elsewhere three flags name them.
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

TIMEOUT = 300  # seconds that the others have to appear
GRACE = 2  # seconds that process 0, which the others need to live, stays after an error


@contextlib.contextmanager
def distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = TIMEOUT,
) -> Iterator[None]:
    """Makes this process one of a run, to be entered before JAX is asked for its devices.

    Without arguments it is alone, unless SLURM or a TPU slice says otherwise; with `num_processes` 1 it is
    alone whatever they say. An error inside ends the process at once where it is one of several: the usual
    way out waits for the others, who may be waiting for it.

    Args:
      coordinator: HOST:PORT where process 0 listens, as the others can reach it.
      num_processes: how many there are.
      process_id: which of them this is, from 0.
      timeout: seconds until all have to be there; then this process prints one line and exits with 1.

    Raises:
      BadInput: the arguments do not make sense.
    """
    _check(coordinator, num_processes, process_id, timeout)
    if coordinator is not None:
        # All local devices are this process's, whatever SLURM thinks.
        _initialize(timeout, coordinator, num_processes, process_id, cluster_detection_method="deactivate")
    elif num_processes is None and _in_cluster():
        _initialize(timeout)
    if not jax.distributed.is_initialized():
        yield
        return
    if jax.process_index() > 0:  # what all find in the data, one says
        logging.getLogger("refusion_jax").setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        code = errors.report(error, f"process {jax.process_index()}: ")
        if jax.process_index() == 0:
            time.sleep(GRACE)  # those with the same error say so before they notice that we are gone
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
    """Whether JAX can tell who the other processes are, and there may be some."""
    if jax.distributed.is_initialized():
        return False
    # A step of one task keeps all GPUs of its node this way; JAX would give it the first.
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    # On a TPU machine JAX puts its platform here when it is imported, unless JAX_PLATFORMS names another.
    return slurm or "tpu" in (jax.config.jax_platforms or "").split(",")


def _initialize(timeout: int, *who, **options) -> None:
    """jax.distributed.initialize, with one line and exit code 1 when the processes do not come together."""

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
