"""Watches the numbers of a run: steps that were not finite, and values far above the usual."""

import json
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from refusion_jax.errors import Stopped
from refusion_jax.files import Lines

FILE = "bad_steps.jsonl"
HISTORY = 200  # steps that a value is compared with
FEWEST = 50  # steps before any is called a spike
SPIKE = 3  # times the median


class Guard:
    """Notes steps whose loss or gradients are not finite, and stops the run after too many in a row.

    Such a step has changed nothing (`train_step`). All processes of the run use one and get the same answers.

    Args:
      folder: DIR; process 0 adds a line to DIR/bad_steps.jsonl for every such step.
      most: steps in a row after which the run stops.
    """

    def __init__(self, folder: Path, most: int):
        self._path, self._most = folder / FILE, most
        self._lines = Lines(self._path)
        self._in_a_row = 0

    @property
    def is_bad(self) -> bool:
        """Whether the last step was not finite."""
        return self._in_a_row > 0

    def look(self, step: int, metrics: Mapping[str, Any], example_ids: np.ndarray, good: int | None) -> None:
        """Judges a step that has ended; all processes must call this for every step.

        Args:
          step: its number.
          metrics: of `train_step`.
          example_ids: int32, numbers of the examples in this process's rows of its batch, -1 for none.
          good: step of the last good checkpoint, for the message; None if there is none.

        Raises:
          Stopped: too many steps in a row were not finite.
        """
        if not int(metrics["bad_steps"]):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        ids = example_ids if jax.process_count() == 1 else multihost_utils.process_allgather(example_ids)
        if jax.process_index() == 0:
            self._note(step, jax.device_get(metrics), np.asarray(ids))
        if self._in_a_row >= self._most:
            kept = "no checkpoint is good" if good is None else f"the last good checkpoint is of step {good}"
            raise Stopped(
                f"loss or gradients were not finite in the {self._in_a_row} steps up to {step} "
                f"(train.max_bad_steps); {kept}; {self._path} has the examples"
            )

    def _note(self, step: int, metrics: Mapping[str, Any], ids: np.ndarray) -> None:
        numbers = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
        line = {"step": step} | {name: str(value) for name, value in numbers.items()}
        line["example_ids"] = sorted(set(ids[ids >= 0].tolist()))
        self._lines.add(json.dumps(line))
        self._lines.flush()
        if self._in_a_row == 1:
            values = ", ".join(f"{name} {value}" for name, value in numbers.items())
            print(f"step {step}: {values}; it changes nothing, see {self._path}", file=sys.stderr, flush=True)


class Spikes:
    """Finds losses and gradient norms that are far above those of the steps before."""

    def __init__(self):
        self._seen = {name: deque(maxlen=HISTORY) for name in ("loss", "grad_norm")}

    def lines(self, last: int, taken: Sequence[Mapping[str, Any]]) -> list[str]:
        """A line for each value above SPIKE times the median of the last HISTORY steps, and above them all.

        Args:
          last: number of the last step in `taken`.
          taken: metrics of successive steps, on the host.
        """
        found = []
        for step, metrics in enumerate(taken, start=last - len(taken) + 1):
            for name, seen in self._seen.items():
                value = float(metrics[name])
                if not np.isfinite(value):
                    continue
                if len(seen) >= FEWEST and value > max(SPIKE * (usual := median(seen)), *seen):
                    times = f"{value / usual:.0f} times" if usual > 0 else "far above"
                    found.append(f"step {step}: {name} {value:.4g} is {times} the usual {usual:.4g}")
                seen.append(value)
        return found
