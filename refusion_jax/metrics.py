"""What a run reports: metrics.csv, TensorBoard events, and a bar or lines on the terminal."""

import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import tensorboardX
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from refusion_jax.errors import BadInput

FILE = "metrics.csv"
# Of a logged step. `tokens` are those of its batch without padding, `padding` the share of it that is (0 to
# 1); `tokens_per_second` is the rate since the row before; `seconds` have passed since this process began to
# train.
STEP_COLUMNS = ("loss", "ar_loss", "diffusion_loss", "grad_norm", "learning_rate", "tokens")
COLUMNS = ("step", *STEP_COLUMNS, "tokens_per_second", "seconds", "padding")


class Reporter:
    """Writes a run's metrics; a context manager.

    Args:
      folder: DIR.
      step: updates already done; what a run that was killed reported beyond it is dropped.
      last_step: where the run ends.

    Raises:
      BadInput: DIR/metrics.csv is not one that this class wrote.
    """

    def __init__(self, folder: Path, step: int, last_step: int):
        truncate(folder / FILE, step)
        self._csv = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115, closed in __exit__
        self._events = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)
        self._last_step = last_step
        self._bar = _Bar(step, last_step) if sys.stdout.isatty() else None
        self._begin = self._reported_at = time.monotonic()
        self._reported_step = step

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._events.close()
        self._csv.close()

    def report(self, step: int, values: Mapping[str, Any], tokens: int) -> None:
        """Writes a row, events and a line.

        Args:
          step: updates done.
          values: NumPy scalars of this step, STEP_COLUMNS.
          tokens: of all steps since the last report, this one included, without padding.
        """
        now = time.monotonic()
        seconds = now - self._reported_at
        left = (self._last_step - step) * seconds / (step - self._reported_step)
        self._reported_at, self._reported_step = now, step
        row = {"step": step} | {name: values[name] for name in STEP_COLUMNS}
        row |= {"tokens_per_second": round(tokens / seconds, 1), "seconds": round(now - self._begin, 3)}
        row["padding"] = values["padding"]
        # One write a row: a kill can leave half a line at the end, which `truncate` drops, never more.
        # str of a NumPy float32 is the shortest text that reads back as the same float32.
        self._csv.write(",".join(str(row[name]) for name in COLUMNS) + "\n")
        self._csv.flush()
        for name in COLUMNS[1:]:
            self._events.add_scalar(f"train/{name}", float(row[name]), step)
        text = (
            f"loss {row['loss']:.4f} (ar {row['ar_loss']:.4f}, diffusion {row['diffusion_loss']:.4f}) "
            f"{row['tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.show(step, text)
        else:
            left = timedelta(seconds=round(left))
            print(f"step {step}/{self._last_step} {text} {left} left", flush=True)

    def advance(self, step: int) -> None:
        """Moves the bar, if there is one, to `step` updates done."""
        if self._bar is not None:
            self._bar.show(step)


def truncate(path: Path, step: int) -> None:
    """Leaves the header and the whole rows up to `step` in a metrics file; makes one if there is none.

    Raises:
      BadInput: the file has another header or a row without a step.
    """
    header = ",".join(COLUMNS)
    # Whatever follows the last newline is a row that a kill cut short.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    if lines and lines[0] != header:
        raise BadInput(f"{path}:1: found {lines[0]!r}, expected {header!r}; move the file away")
    kept = [header]
    for number, line in enumerate(lines[1:], start=2):
        first = line.partition(",")[0]
        if not first.isdecimal():
            raise BadInput(f"{path}:{number}: found {line!r}, expected a row that begins with a step")
        if int(first) <= step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(kept) + "\n", encoding="utf-8")
    os.replace(temporary, path)


class _Bar:
    """A progress bar with the latest values beside it."""

    def __init__(self, step: int, last_step: int):
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("compiling", total=last_step, completed=step)
        self._progress.start()

    def show(self, step: int, text: str | None = None) -> None:
        self._progress.update(self._task, completed=step, description=text)

    def stop(self) -> None:
        self._progress.stop()
