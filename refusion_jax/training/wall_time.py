"""The wall time of a run by activity.

Not the library ml-goodput-measurement, which needs a Google Cloud project with its logging, monitoring and
storage clients, and stores its measurements there.
"""

import time


class WallTime:
    """Sums the seconds of a process by activity; every second counts once.

    `lap` is called whenever one activity ends and the next begins.

    Activities:
      setup: before the first step: opening the data, initializing or restoring the state.
      compile: the first call of the step, which compiles it.
      step: the devices compute steps.
      input: waiting for a batch while the devices have nothing to do.
      checkpoint: copying a checkpoint off the devices; writing it to disk overlaps with later steps.
    """

    PARTS = ("setup", "compile", "step", "input", "checkpoint")

    def __init__(self):
        self._began = self._lapped = time.monotonic()
        self._spent = dict.fromkeys(self.PARTS, 0.0)

    def lap(self, part: str) -> None:
        """Counts the time since the last lap as spent on the activity `part`."""
        now = time.monotonic()
        self._spent[part] += now - self._lapped
        self._lapped = now

    def seconds(self) -> float:
        """Seconds from the start to the last lap."""
        return self._lapped - self._began

    def spent(self, part: str) -> float:
        """Seconds spent on `part` up to the last lap."""
        return self._spent[part]

    def share(self, part: str) -> float:
        """Fraction of all seconds up to the last lap that was spent on `part`, from 0 to 1."""
        return self._spent[part] / max(self.seconds(), 1e-9)
