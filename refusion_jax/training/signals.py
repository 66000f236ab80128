"""SIGTERM and Ctrl-C during training: noted, so that the loop finishes its step and saves before it stops."""

import os
import signal
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils

from refusion_jax import interrupt

# Exit code of a process that saved and stopped on SIGTERM. SLURM requeues a preempted job whatever its code;
# Kubernetes and xpk restart on 128 + signal number by default.
PREEMPTED_EXIT_CODE = 128 + signal.SIGTERM


class Preemption:
    """A context that notes SIGTERM and SIGINT. A second SIGINT ends the process at once.

    The previous signal handlers are restored on exit.
    """

    def __init__(self):
        self._received: int | None = None

    def __enter__(self) -> "Preemption":
        # With several processes JAX's preemption service listens for SIGTERM and makes all processes stop at
        # one step.
        self._single = jax.process_count() == 1
        self._previous = {signal.SIGINT: signal.signal(signal.SIGINT, self._notice)}
        if self._single:
            self._previous[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`. All processes must call this after every step."""
        if self._single:
            return self._received is not None
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def exit_code(self) -> int:
        """That of this process once `reached`."""
        return interrupt.EXIT_CODE if self._received == signal.SIGINT else PREEMPTED_EXIT_CODE

    @property
    def name(self) -> str:
        """The signal that was received, for messages."""
        return "SIGINT" if self._received == signal.SIGINT else "SIGTERM"

    def _notice(self, number: int, frame: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, interrupt.leave)
            print("\nfinishing the step and saving; Ctrl-C again stops at once", file=sys.stderr, flush=True)
            if not self._single:
                os.kill(os.getpid(), signal.SIGTERM)
