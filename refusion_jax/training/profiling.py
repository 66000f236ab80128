"""Traces some steps of a run, for XProf and TensorBoard's profile plugin."""

from pathlib import Path
from typing import Any

import jax

from refusion_jax.buckets import Outbox
from refusion_jax.errors import BadInput

FOLDER = "profile"


def parse_steps(text: str, last: int) -> range:
    """The steps that `--profile_steps=FIRST:LAST` names, both ends included.

    Args:
      text: the flag's value.
      last: the last step of the run.

    Raises:
      BadInput: the value is not such a pair, or not within the run.
    """
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 1 <= int(first) <= int(end) <= last):
        raise BadInput(
            f"--profile_steps={text}: must be FIRST:LAST, steps of this run, as in 10:13, with "
            f"1 <= FIRST <= LAST <= {last}"
        )
    return range(int(first), int(end) + 1)


class Profile:
    """Traces `steps` into DIR/profile. A context manager; leaving it ends an unfinished trace.

    It waits for the devices at both ends of the trace only, so that the trace holds exactly these steps.

    Args:
      folder: DIR.
      steps: the steps to trace; may be empty. A run resumed after the first of them traces none.
    """

    def __init__(self, folder: Path, steps: range):
        self._outbox = Outbox(folder)
        self._steps = steps
        self._tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
        self._outbox.__exit__()

    def before(self, step: int, previous: Any) -> None:
        """Call before dispatching `step`; `previous` are arrays that the step before it computes."""
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(previous)
            jax.profiler.start_trace(self._outbox.path / FOLDER)
            self._tracing = True

    def after(self, step: int, results: Any) -> None:
        """Call after dispatching `step`; `results` are arrays that it computes."""
        if self._tracing and step == self._steps[-1]:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._tracing = False
