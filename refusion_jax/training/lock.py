"""One writer per run.

On a local disk the lock is on DIR/run.lock, and the operating system frees it when its holder ends. In a
bucket it is the object DIR/run.lock itself: it is created only if it does not exist, its holder rewrites it
every BEAT_SECONDS and deletes it at the end, and one that has not changed for LEASE_SECONDS has no holder.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from refusion_jax.buckets import file_system, is_remote
from refusion_jax.errors import Stopped

FILE = "run.lock"
UNSUPPORTED = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)  # some network and FUSE file systems
BEAT_SECONDS = 10
LEASE_SECONDS = 45


class Lock:
    """The lock of a run, held.

    Attributes:
      holds: whether it still is; false once another run has taken the lock of a bucket over, because this one
        could not rewrite it for LEASE_SECONDS.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.holds = True

    def check(self) -> None:
        """Raises Stopped unless the lock is still held; called before anything is saved."""
        if not self.holds:
            raise Stopped(f"--workdir={self._folder}: another run has taken it over, this one saves no more")


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[Lock]:
    """Holds the folder of a run for this run. All processes of the run must enter it.

    The file names the host and the process that hold it. On a local disk it stays when the run ends; a lock
    is held, not there or not there, so nothing has to be cleaned up after a kill.

    Raises:
      Stopped: another run holds the folder.
    """
    path, lock, taken = folder / FILE, Lock(folder), True
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            take = _take_in_bucket if is_remote(path) else _take
            taken = take(path, lock, stack)
        if not multihost_utils.broadcast_one_to_all(np.bool_(taken)):
            raise Stopped(
                f"--workdir={folder}: is in use by {_holder(path)}; wait for it, or choose another folder"
            )
        yield lock


def _holder(path: Path) -> str:
    """The process that holds a lock, for messages."""
    text = path.read_text().strip() if path.exists() else ""
    if not text.startswith("{"):
        return text or "another process"
    found = json.loads(text)
    return f"process {found['process']} on {found['host']}"


def _take(path: Path, lock: Lock, stack: contextlib.ExitStack) -> bool:
    """Whether the lock of a local folder is held now; true where the file system has no locks."""
    # Not inherited by the processes that prepare data, which may outlive a kill of this one.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    stack.callback(os.close, descriptor)
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


def _take_in_bucket(path: Path, lock: Lock, stack: contextlib.ExitStack) -> bool:
    """Whether the lock of a folder in a bucket is held now; then a thread keeps it until the stack ends."""
    name, files = str(path), file_system()
    ours = {"process": os.getpid(), "host": socket.gethostname(), "kernel": _kernel(), "id": uuid.uuid4().hex}
    while True:
        try:
            files.pipe_file(name, json.dumps(ours | {"beat": 0}).encode(), mode="create")
            break
        except FileExistsError:
            if not _remove_if_dead(path):
                return False
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(path, ours, lock, ended), daemon=True)
    thread.start()

    def give_back() -> None:
        ended.set()
        thread.join()
        if lock.holds:
            path.unlink(missing_ok=True)

    stack.callback(give_back)
    return True


def _keep(path: Path, ours: dict, lock: Lock, ended: threading.Event) -> None:
    """Rewrites the lock until `ended`, or until it is another run's."""
    beat, written_at = 0, time.monotonic()
    while not ended.wait(BEAT_SECONDS):
        beat += 1
        try:
            if json.loads(path.read_text())["id"] != ours["id"]:
                lock.holds = False
                return
            path.write_text(json.dumps(ours | {"beat": beat}))
            written_at = time.monotonic()
        except FileNotFoundError:  # removed by a run that is about to take it
            lock.holds = False
            return
        except Exception:  # of the connection: the next beat tries again
            if time.monotonic() > written_at + LEASE_SECONDS:
                lock.holds = False
                return


def _remove_if_dead(path: Path) -> bool:
    """Removes a lock whose holder is gone, and returns true; false if the holder lives."""
    try:
        seen = path.read_bytes()
        generation = file_system().info(str(path))["generation"]
    except FileNotFoundError:
        return True
    holder = json.loads(seen)
    if holder["kernel"] == _kernel() and holder["process"] != os.getpid():
        alive = os.path.exists(f"/proc/{holder['process']}")
    else:
        print(
            f"{path}: names process {holder['process']} on {holder['host']}, waiting up to {LEASE_SECONDS} s "
            "to see whether it lives",
            file=sys.stderr,
            flush=True,
        )
        alive = _changes(path, seen)
    if not alive:
        bucket, _, key = str(path).removeprefix("gs://").partition("/")
        with contextlib.suppress(Exception):  # another run was faster, which the next attempt will find
            file_system().call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=generation)
    return not alive


def _changes(path: Path, seen: bytes) -> bool:
    """Whether the lock changes within LEASE_SECONDS; its end is no change."""
    deadline = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1)
        try:
            if path.read_bytes() != seen:
                return True
        except FileNotFoundError:
            return False
    return False


def _kernel() -> str:
    """What processes have in common that see each other by their numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    if not boot.exists() or not space.exists():
        return uuid.uuid4().hex  # macOS: nobody is known
    return f"{boot.read_text().strip()} {os.readlink(space)}"
