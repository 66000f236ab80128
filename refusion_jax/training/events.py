"""Curves for TensorBoard, written by the calling thread.

The writers of tensorboardX have threads of their own: on a full disk they end in tracebacks when the process
does, and nobody learns that curves are lost.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

VERSION = "brain.Event:2"


class Events:
    """A new event file in a folder.

    Args:
      folder: a local folder.
      first_step: TensorBoard hides what earlier files have at this step and later ones.

    Raises:
      OSError: the file cannot be written, from any method.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, file_version=VERSION))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step, by the names of their curves."""
        for name, value in values.items():
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
