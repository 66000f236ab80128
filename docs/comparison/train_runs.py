"""Trains the models that docs/comparison.md compares, one a GPU, as many side by side as there are GPUs.

    python docs/comparison/train_runs.py search
    python docs/comparison/train_runs.py main         # at the rates in RATES, which the search chose
    python docs/comparison/train_runs.py ablations

configs/comparison.py says which files have to be there. Of each run docs/comparison/results/train_NAME.json
has the command, what was fed, how long it took and the curve of its loss; checkpoints stay in
runs/comparison/NAME.
"""

import argparse
import csv
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/comparison")
STEPS = 900  # of 32 rows of 1024 tokens
SEARCH_STEPS = 300
RATES = {"ar": 3e-4, "refusion": 3e-4, "mdm": 3e-4, "bd3": 3e-4}
CANDIDATES = (1e-4, 3e-4, 1e-3)

# Masked diffusion is trained to fill what is left of its last blocks with EOS.
FILLED = {"data.eos_multiple": 32, "data.eos_extra_blocks": 2}
OBJECTIVES = {"ar": {}, "refusion": {}, "mdm": FILLED, "bd3": FILLED}


def plan(stage: str) -> Iterator[tuple[str, dict]]:
    """(name of a run, its overrides)."""
    for objective, filled in OBJECTIVES.items():
        common = {"objective": objective} | filled
        if stage == "search":
            for rate in CANDIDATES:
                steps = {"train.steps": SEARCH_STEPS, "optimizer.learning_rate": rate}
                yield f"search_{objective}_{rate:g}", common | steps
        if stage == "main":
            yield objective, common | {"train.steps": STEPS, "optimizer.learning_rate": RATES[objective]}
    if stage == "ablations":
        refusion = {"objective": "refusion", "optimizer.learning_rate": RATES["refusion"]}
        for part in (4, 2):
            yield f"refusion_data_1_{part}", refusion | {"train.steps": STEPS // part}
        for sizes in ((4,), (8,), (16,), (32,)):
            yield (
                f"refusion_slots_{sizes[0]}",
                refusion | {"diffusion.slot_sizes": sizes, "train.steps": STEPS},
            )


def command(name: str, overrides: dict) -> list[str]:
    settings = {"train.save_every": overrides["train.steps"]} | overrides
    return [
        "python",
        "-m",
        "refusion_jax.train",
        "--config=configs/comparison.py",
        f"--workdir={RUNS / name}",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]


def summary(name: str, arguments: list[str], folder: Path, seconds: float) -> dict:
    """What results/train_NAME.json says, off the logged steps in the run's metrics.csv."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    steps, logged = rows[-1]["step"], len(rows)
    flops = sum(row["tflops_per_second_per_device"] * row["step_seconds"] for row in rows) / logged * 1e12
    return {
        "run": name,
        "command": shlex.join(arguments),
        "seconds": round(seconds, 1),
        "steps": int(steps),
        "tokens": round(steps * sum(row["tokens"] for row in rows) / logged),
        "flops": float(f"{steps * flops:.4g}"),
        "curve": {key: [row[key] for row in rows] for key in ("step", "loss", "ar_loss", "diffusion_loss")},
    }


def train(jobs: queue.Queue, gpu: int) -> None:
    """Takes runs off the queue until it is empty, on one GPU."""
    while True:
        try:
            name, overrides = jobs.get_nowait()
        except queue.Empty:
            return
        arguments, folder = command(name, overrides), RUNS / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with open(f"{folder}.log", "w") as log:
            done = subprocess.run(
                [sys.executable, *arguments[1:]],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        seconds = time.perf_counter() - start
        print(f"{name}: exit {done.returncode} after {seconds:.0f} s", flush=True)
        if done.returncode == 0:
            text = json.dumps(summary(name, arguments, folder, seconds), indent=1)
            (RESULTS / f"train_{name}.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=("search", "main", "ablations"))
    parser.add_argument("--gpus", type=int, default=1, help="how many there are (default %(default)s)")
    parser.add_argument("--only", default="", help="of the stage's runs those whose name begins like this")
    flags = parser.parse_args()
    jobs: queue.Queue = queue.Queue()
    for name, overrides in plan(flags.stage):
        if name.startswith(flags.only):
            jobs.put((name, overrides))
    workers = [threading.Thread(target=train, args=(jobs, gpu)) for gpu in range(flags.gpus)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
