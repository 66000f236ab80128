"""A trace of a few steps, as XProf and TensorBoard's profile plugin read it."""

from pathlib import Path
from typing import Any

import jax

from refusion_jax.errors import BadInput

FOLDER = "profile"


def parse_steps(text: str, last: int) -> range:
    """`--profile_steps=FIRST:LAST` as those steps, both ends included.

    Args:
      text: the flag's value.
      last: the run's last step.

    Raises:
      BadInput: it is no such pair, or not within the run.
    """
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 1 <= int(first) <= int(end) <= last):
        raise BadInput(
            f"--profile_steps={text}: must be FIRST:LAST, steps of this run, as in 10:13, with "
            f"1 <= FIRST <= LAST <= {last}"
        )
    return range(int(first), int(end) + 1)


class Profile:
    """Traces `steps` into DIR/profile; a context manager, which ends a trace that is still under way.

    The only thing here that waits for the devices does so at both ends of the trace, for it to hold
    these steps and no others.

    Args:
      folder: DIR.
      steps: which; without any, nothing is traced. A run that goes on beyond their first traces none.
    """

    def __init__(self, folder: Path, steps: range):
        self._folder = folder / FOLDER
        self._steps = steps
        self._tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error) -> None:
        if self._tracing:
            jax.profiler.stop_trace()

    def before(self, step: int, previous: Any) -> None:
        """To be called before `step` begins; `previous` are arrays of the step before it."""
        if self._steps and step == self._steps[0]:
            jax.block_until_ready(previous)
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: int, results: Any) -> None:
        """To be called when `step` was handed to the devices; `results` are arrays it computes."""
        if self._tracing and step == self._steps[-1]:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            self._tracing = False
