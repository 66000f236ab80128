"""Trains the models that docs/comparison.md compares, side by side on as many GPUs as there are.

    python docs/comparison/train_runs.py search       # then `decode_runs.py search` of each
    python docs/comparison/train_runs.py main
    python docs/comparison/train_runs.py ablations

configs/comparison.py names the files that must exist. docs/comparison/results/train_NAME.json holds each
run's command, its amount of data, its step times and its loss curve; checkpoints stay in
runs/comparison/NAME. On SIGTERM runs save and end; the same command resumes them.
"""

import argparse
import csv
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from refusion_jax.training.signals import PREEMPTED_EXIT_CODE

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/comparison")
STEPS = 3600  # of 32 rows of 1024 tokens
# Steps of the search -> learning rates. The longer search is among the best rates of the shorter one.
SEARCH = {300: (1e-4, 3e-4, 1e-3, 3e-3), 900: (1e-3, 3e-3)}
LEARNING_RATE = 1e-3  # chosen by the search, for all four objectives

# Masked diffusion is trained to fill the rest of its last blocks with EOS.
FILLED = {"data.eos_multiple": 32, "data.eos_extra_blocks": 2}
OBJECTIVES = {"ar": {}, "refusion": {}, "mdm": FILLED, "bd3": FILLED}


def plan(stage: str) -> Iterator[tuple[str, dict]]:
    """(name of a run, its overrides)."""
    for objective, filled in OBJECTIVES.items():
        if stage == "search":
            for steps, rates in SEARCH.items():
                for rate in rates:
                    tried = {"train.steps": steps, "optimizer.learning_rate": rate}
                    yield searched(objective, rate, steps), {"objective": objective} | filled | tried
        if stage == "main":
            yield objective, {"objective": objective} | filled | {"train.steps": STEPS}
    if stage == "ablations":
        few = {"objective": "refusion", "train.steps": STEPS // 4}
        yield "refusion_data_1_4", few
        for size in (4, 8, 16, 32):
            yield f"refusion_slots_{size}", few | {"diffusion.slot_sizes": (size,)}


def searched(objective: str, rate: float, steps: int) -> str:
    """A run of the search."""
    return f"{objective}_rate_{rate:g}" + (f"_{steps}" if steps > min(SEARCH) else "")


def command(
    name: str, overrides: dict, config: str = "configs/comparison.py", runs: Path = RUNS
) -> list[str]:
    """What trains a run; at the chosen rate where the overrides say none."""
    chosen = {"train.save_every": overrides["train.steps"], "optimizer.learning_rate": LEARNING_RATE}
    settings = chosen | overrides
    return [
        "python",
        "-m",
        "refusion_jax.train",
        f"--config={config}",
        f"--workdir={runs / name}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def summary(name: str, arguments: list[str], folder: Path, gpus: int) -> dict:
    """What results/train_NAME.json says, off the logged steps in the run's metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    steps, logged = rows[-1]["step"], len(rows)
    seconds = steps * sum(row["step_seconds"] for row in rows) / logged
    tflops = gpus * sum(row["tflops_per_second_per_device"] * row["step_seconds"] for row in rows) / logged
    return {
        "run": name,
        "command": shlex.join(arguments),
        "gpus": gpus,
        "seconds": round(seconds, 1),
        "steps": int(steps),
        "tokens": round(steps * sum(row["tokens"] for row in rows) / logged),
        "flops": float(f"{steps * tflops * 1e12:.4g}"),
        "curve": {key: [row[key] for row in rows] for key in ("step", "loss", "ar_loss", "diffusion_loss")},
    }


def train(jobs: queue.Queue, gpus: str, codes: list[int]) -> None:
    """Takes runs off the queue until it is empty or one was ended by SIGTERM; adds their exit codes.

    Each is trained on all of `gpus`, as in 2+3.
    """
    visible = gpus.split("+")
    while True:
        try:
            name, overrides = jobs.get_nowait()
        except queue.Empty:
            return
        arguments, folder = command(name, overrides), RUNS / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with open(f"{folder}.log", "a") as log:
            done = subprocess.run(
                [sys.executable, *arguments[1:]],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible)},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        seconds = time.perf_counter() - start
        print(f"{name}: exit {done.returncode} after {seconds:.0f} s", flush=True)
        codes.append(done.returncode)
        if done.returncode == PREEMPTED_EXIT_CODE:
            return
        if done.returncode == 0:
            text = json.dumps(summary(name, arguments, folder, len(visible)), indent=1)
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"train_{name}.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("search", "main", "ablations"))
    parser.add_argument(
        "--gpus",
        default="0",
        help="a run on each, as in 0,1, or on several, as in 0,1+2 (default %(default)s)",
    )
    parser.add_argument("--only", default="", help="of the stage's runs those whose name begins like this")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to the group, it is the runs' to act on
    jobs: queue.Queue = queue.Queue()
    for name, overrides in plan(flags.stage):
        if name.startswith(flags.only):
            jobs.put((name, overrides))
    codes: list[int] = []
    workers = [threading.Thread(target=train, args=(jobs, gpus, codes)) for gpus in flags.gpus.split(",")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(codes, default=0))


if __name__ == "__main__":
    main()
