"""Shared by tests that kill runs: starts a run, kills one of its processes, looks for what is left."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = "RUN_OF_A_TEST"  # environment variable that all processes of a run inherit


class Victim:
    """A run of the train command in processes of its own.

    Args:
      processes: 1, or 2 by launch/localhost.py.
      flags: of the train command.
      devices: of each process.
    """

    def __init__(self, processes: int, *flags: str, devices: int = 1):
        self.mark = uuid.uuid4().hex
        devices = f"--xla_force_host_platform_device_count={devices}"
        program = ["-m", "refusion_jax.train"] if processes == 1 else [ROOT / "launch" / "localhost.py"]
        several = [] if processes == 1 else [f"--processes={processes}", "--restarts=0"]
        self.process = subprocess.Popen(
            [sys.executable, *program, *several, *flags],
            env=os.environ
            | {MARK: self.mark, "PYTHONPATH": str(ROOT), "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def members(self) -> dict[int, str]:
        """Process id -> command line of all processes of the run that are alive."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                with contextlib.suppress(OSError):
                    if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                        found[int(folder.name)] = (
                            (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                        )
        return found

    def kill_one(self, after: float, chance: random.Random) -> bool:
        """Kills a process that trains or prepares data, `after` seconds; false if the run ended first."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(after)
            return False
        pids = [pid for pid, line in self.members().items() if "localhost.py" not in line]
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(sorted(pids)), signal.SIGKILL)
        return True

    def end(self) -> str:
        """Waits for the end, asserts that nothing lives on, and returns what was printed."""
        text, _ = self.process.communicate(timeout=300)
        deadline = time.monotonic() + 15
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.members(), f"lives on: {self.members()}"
        return text
