"""One writer per run: a lock on DIR/run.lock, which the operating system frees when its holder ends."""

import contextlib
import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from refusion_jax.errors import Stopped

FILE = "run.lock"
UNSUPPORTED = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)  # some network and FUSE file systems


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Holds the folder of a run for this run. All processes of the run must enter it.

    The file names the host and the process that hold it. It stays when the run ends; a lock is held, not
    there or not there, so nothing has to be cleaned up after a kill.

    Raises:
      Stopped: another run holds the folder.
    """
    path, taken = folder / FILE, True
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            # Not inherited by the processes that prepare data, which may outlive a kill of this one.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            stack.callback(os.close, descriptor)
            taken = _take(descriptor, path)
        if not multihost_utils.broadcast_one_to_all(np.bool_(taken)):
            holder = path.read_text(encoding="utf-8").strip() or "another process"
            raise Stopped(f"--workdir={folder}: is in use by {holder}; wait for it, or choose another folder")
        yield


def _take(descriptor: int, path: Path) -> bool:
    """Whether the lock is held now; true where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print(f"{path}: this file system has no locks, start one run at a time here", file=sys.stderr)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return True
