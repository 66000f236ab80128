"""Metrics of a run, written to metrics.csv, TensorBoard events, Weights & Biases and the terminal."""

import contextlib
import importlib.util
import secrets
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from refusion_jax.buckets import Outbox
from refusion_jax.devices import peak_flops
from refusion_jax.errors import BadInput
from refusion_jax.files import Lines, naming, write_atomically
from refusion_jax.training.events import Events
from refusion_jax.training.wall_time import WallTime

FILE = "metrics.csv"
# Columns on the logged step itself. `tokens` is the number of tokens in its batch without padding, `padding`
# the fraction of the batch that is padding (0 to 1).
STEP_COLUMNS = ("loss", "ar_loss", "diffusion_loss", "grad_norm", "learning_rate", "tokens", "padding")
COLUMNS = (
    "step",
    *STEP_COLUMNS,
    # Means since the previous row, compilation excluded.
    "tokens_per_second",
    "tokens_per_second_per_device",
    "step_seconds",
    "tflops_per_second_per_device",
    "mfu",
    # Since this process began to train: seconds, and the fractions of them by activity (WallTime).
    "seconds",
    "goodput",
    "input_share",
    "checkpoint_share",
    "compile_share",
    "peak_memory_bytes",
    "bad_steps",  # since the previous row: steps whose loss or gradients were not finite
)


class Reporter:
    """Writes the metrics of a run; a context manager.

    Args:
      folder: DIR.
      step: number of updates already done; rows of later steps, written by a killed run, are dropped.
      last_step: the last step of the run.
      wall_time: the clock of this process; the caller laps it before each report.
      wandb_project: project of Weights & Biases; empty sends nothing there.
      settings: the run's configuration, for Weights & Biases.

    Raises:
      BadInput: DIR/metrics.csv was not written by this class.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        last_step: int,
        wall_time: WallTime,
        wandb_project: str = "",
        settings: Mapping[str, Any] | None = None,
    ):
        truncate(folder / FILE, step)
        self._folder = folder
        self._csv = Lines(folder / FILE)
        self._outbox = Outbox(folder)
        self._events = Events(self._outbox.path, step + 1)
        self._wandb = (
            _wandb_run(wandb_project, folder, self._outbox.path, settings) if wandb_project else None
        )
        self._last_step = last_step
        self._bar = _Bar(step, last_step) if sys.stdout.isatty() else None
        self._wall_time = wall_time
        self._reported_at = self._running_seconds()
        self._reported_step = step
        self._steps, self._tokens, self._flops, self._seconds = 0, 0, 0.0, 0.0  # totals reported so far

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind, *error) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._steps:
            print(self._summary(), flush=True)
        if self._wandb is not None:
            self._wandb.finish()
        # An exception that is on its way says more than one of closing.
        with contextlib.suppress(OSError) if kind else naming(self._folder):
            self._csv.flush()
            self._events.close()
        self._outbox.__exit__(kind, *error)

    def report(self, step: int, taken: Sequence[Mapping[str, Any]]) -> None:
        """Writes a row of metrics.csv, events, and a line on the terminal.

        Args:
          step: number of updates done.
          taken: metrics of each step since the previous report, in order: NumPy scalars under the names of
            STEP_COLUMNS, "flops" and "bad_steps".
        """
        now = self._running_seconds()
        seconds = now - self._reported_at
        steps = step - self._reported_step
        left = (self._last_step - step) * seconds / steps
        self._reported_at, self._reported_step = now, step
        tokens, flops = (sum(float(values[name]) for values in taken) for name in ("tokens", "flops"))
        self._steps += steps
        self._tokens += int(tokens)
        self._flops += flops
        self._seconds += seconds
        row = {"step": step} | {name: taken[-1][name] for name in STEP_COLUMNS}
        row |= _rates(steps, tokens, flops, seconds) | _shares(self._wall_time)
        row |= {"seconds": round(self._wall_time.seconds(), 3), "peak_memory_bytes": _peak_memory_bytes()}
        row["bad_steps"] = sum(int(values["bad_steps"]) for values in taken)
        # str of a NumPy float32 is the shortest text that reads back as the same float32.
        cells = ("" if row[name] is None else str(row[name]) for name in COLUMNS)
        curves = {f"train/{name}": float(row[name]) for name in COLUMNS[1:] if row[name] is not None}
        with naming(self._folder):
            self._csv.add(",".join(cells))
            self._events.add(step, curves)
        if self._wandb is not None:
            self._wandb.log(curves, step=step)
        text = (
            f"loss {row['loss']:.4f} (ar {row['ar_loss']:.4f}, diffusion {row['diffusion_loss']:.4f}) "
            f"{row['tokens_per_second']:,.0f} tokens/s" + _mfu_text(row["mfu"])
        )
        if self._bar is not None:
            self._bar.show(step, text)
        else:
            left = timedelta(seconds=round(left))
            print(f"step {step}/{self._last_step} {text} {left} left", flush=True)

    def flush(self) -> None:
        """Makes sure that all rows and events are stored in DIR; called before a checkpoint is saved."""
        self._csv.flush()
        self._outbox.send()

    def advance(self, step: int) -> None:
        """Moves the progress bar, if there is one, to `step` updates done."""
        if self._bar is not None:
            self._bar.show(step)

    def _running_seconds(self) -> float:
        return self._wall_time.seconds() - self._wall_time.spent("compile")

    def _summary(self) -> str:
        """One line on all steps that this process took."""
        rates = _rates(self._steps, self._tokens, self._flops, self._seconds)
        shares = {name: f"{100 * share:.1f} %" for name, share in _shares(self._wall_time).items()}
        return (
            f"{self._steps} steps, {self._tokens:,} tokens, {rates['tokens_per_second']:,.0f} tokens/s"
            f"{_mfu_text(rates['mfu'])}, goodput {shares['goodput']} (input {shares['input_share']}, "
            f"checkpoints {shares['checkpoint_share']}, compiling {shares['compile_share']})"
        )


def check_wandb(project: str) -> None:
    """Raises BadInput if a project of Weights & Biases is given and its package is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise BadInput(
            f"train.wandb_project: is {project!r}, but the package wandb is not installed; "
            "pip install wandb, or leave the field empty"
        )


def _rates(steps: int, tokens: float, flops: float, seconds: float) -> dict[str, Any]:
    """The columns on speed, from totals over `steps` steps; None where unknown."""
    seconds = max(seconds, 1e-9)
    devices = jax.device_count()
    peak = peak_flops(jax.devices()[0].device_kind)
    flops_per_device = flops / seconds / devices
    return {
        "step_seconds": round(seconds / steps, 6),
        "tokens_per_second": round(tokens / seconds, 1),
        "tokens_per_second_per_device": round(tokens / seconds / devices, 1),
        "tflops_per_second_per_device": round(flops_per_device / 1e12, 4),
        "mfu": None if peak is None else round(flops_per_device / peak, 4),
    }


def _shares(wall_time: WallTime) -> dict[str, float]:
    """The columns on wall time: goodput, the fraction spent on steps, and other fractions except set-up."""
    parts = {"goodput": "step"} | {f"{part}_share": part for part in ("input", "checkpoint", "compile")}
    return {name: round(wall_time.share(part), 4) for name, part in parts.items()}


def _mfu_text(mfu: float | None) -> str:
    return "" if mfu is None else f" MFU {100 * mfu:.1f} %"


def _peak_memory_bytes() -> int | None:
    """The largest peak of this process's devices; None where devices do not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat), default=None)


def _wandb_run(project: str, folder: Path, local: Path, settings: Mapping[str, Any] | None) -> Any:
    """The run of Weights & Biases that belongs to DIR; a resumed run continues its curves.

    Its own files go to the folder `local`.
    """
    import wandb  # optional, and slow to import

    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        write_atomically(id_file, secrets.token_hex(8))
    run_id = id_file.read_text(encoding="utf-8").strip()
    return wandb.init(
        project=project, id=run_id, name=folder.name, dir=local, config=dict(settings or {}), resume="allow"
    )


def truncate(path: Path, step: int) -> None:
    """Drops rows after `step` and a partial last row from a metrics file; creates the file if missing.

    Columns that a file of an older version lacks stay empty in its rows.

    Raises:
      BadInput: the file has another header or a row without a step.
    """
    header = ",".join(COLUMNS)
    # Text after the last newline is a row that a kill cut short.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    lacks = COLUMNS[lines[0].count(",") + 1 :] if lines else ()
    if lines and ",".join((lines[0], *lacks)) != header:
        raise BadInput(f"{path}:1: found {lines[0]!r}, expected {header!r}; move the file away")
    kept = [header]
    for number, line in enumerate(lines[1:], start=2):
        first = line.partition(",")[0]
        if not first.isdecimal():
            raise BadInput(f"{path}:{number}: found {line!r}, expected a row that begins with a step")
        if int(first) <= step:
            kept.append(line + "," * len(lacks))
    write_atomically(path, "\n".join(kept) + "\n")


class _Bar:
    """A progress bar that also shows the latest metrics."""

    def __init__(self, step: int, last_step: int):
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("compiling", total=last_step, completed=step)
        self._progress.start()

    def show(self, step: int, text: str | None = None) -> None:
        self._progress.update(self._task, completed=step, description=text)

    def stop(self) -> None:
        self._progress.stop()
