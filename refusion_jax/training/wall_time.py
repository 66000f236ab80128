"""Where the wall time of a run goes.

Own lines instead of the library ml-goodput-measurement: that one needs a Google Cloud project and its
logging, monitoring and storage clients, and keeps its measurements there.
"""

import time


class WallTime:
    """Adds up the seconds of a process by what they were spent on; every second counts once.

    `lap` is called wherever one thing ends and the next begins.

    Parts:
      setup: until the first step: data, parameters or the checkpoint to go on from.
      compile: the first call of the step, which compiles it.
      step: steps, the devices at work.
      input: waiting for a batch with nothing left for the devices to do.
      checkpoint: until a checkpoint was copied off the devices; writing it goes on beside the steps.
    """

    PARTS = ("setup", "compile", "step", "input", "checkpoint")

    def __init__(self):
        self._began = self._lapped = time.monotonic()
        self._spent = dict.fromkeys(self.PARTS, 0.0)

    def lap(self, part: str) -> None:
        """The time since the last lap was spent on `part`."""
        now = time.monotonic()
        self._spent[part] += now - self._lapped
        self._lapped = now

    def seconds(self) -> float:
        """From the beginning to the last lap."""
        return self._lapped - self._began

    def spent(self, part: str) -> float:
        """Seconds spent on `part` up to the last lap."""
        return self._spent[part]

    def share(self, part: str) -> float:
        """Of all seconds up to the last lap those spent on `part`, between 0 and 1."""
        return self._spent[part] / max(self.seconds(), 1e-9)
