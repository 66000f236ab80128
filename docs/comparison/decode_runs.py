"""Decodes held-out problems with the models of train_runs.py.

    python docs/comparison/decode_runs.py validation RUN   # by every setting of its method
    python docs/comparison/decode_runs.py test RUN         # each task by the setting that validation chose
    python docs/comparison/decode_runs.py speed RUN        # by the one it chose for all, 1 and 32 at a time

writes docs/comparison/results/STAGE_RUN.json: for each setting and task how many answers were right, their
tokens, forward passes and seconds. In the first two stages all settings go through one compilation.
"""

import argparse
import dataclasses
import itertools
import json
import platform
import runpy
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from refusion_jax import opening, serving
from refusion_jax.config import Parser
from refusion_jax.data.task import Task
from refusion_jax.data.tasks import make_task
from refusion_jax.requests import Shape
from refusion_jax.serving import Request

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/comparison")
STAGES = ("validation", "test", "speed")
GEN_LENGTH = 256


def grid(method: str) -> list[dict[str, Any]]:
    """The settings that validation chooses from; thresholds as in arXiv 2512.13586, around its own."""
    if method == "ar":
        return [{}]
    if method == "refusion":
        sizes = ({"slot_size": 8, "num_blocks": 8}, {"slot_size": 16, "num_blocks": 4})
        sizes += ({"slot_size": 32, "num_blocks": 4}, {"slot_size": 8, "num_blocks": 4})
        thresholds = itertools.product((0.6, 0.9), (0.3, 0.6))
        return [
            size | {"slot_threshold": slot, "token_threshold": token}
            for size, (slot, token) in itertools.product(sizes, list(thresholds))
        ]
    fewest = [{"token_threshold": 1.0}]
    confident = [{"token_threshold": threshold} for threshold in (0.7, 0.9)]
    if method == "bd3":
        return [{"num_blocks": 8} | threshold for threshold in fewest + confident]
    caches = [{"cache": cache} for cache in ("none", "prefix", "dual")]
    return [
        {"num_blocks": 8} | threshold | cache
        for threshold, cache in itertools.product(fewest + confident, caches)
    ]


Queries = dict[str, list[str]]  # of each task


def opened_run(run: str, method: str | None) -> opening.Opened:
    parser = Parser()
    opening.add_decoding_flags(parser)
    arguments = [f"--checkpoint={RUNS / run}", f"--gen_length={GEN_LENGTH}"]
    return opening.open_model(parser.parse_args(arguments + ([f"--method={method}"] if method else [])))


def requests_of(opened: opening.Opened, queries: Sequence[str], settings: dict[str, Any]) -> list[Request]:
    model, _, tokenizer, defaults, _ = opened
    return [
        serving.parse({"id": i, "prompt": query, **settings}, defaults, tokenizer, model.config.vocab_size)
        for i, query in enumerate(queries)
    ]


def decode(
    opened: opening.Opened, tasks: dict[str, Task], queries: Queries, settings: dict[str, Any], shape: Shape
) -> dict[str, dict[str, float]]:
    """What a setting makes of the queries of every task."""
    model, params, tokenizer, *_ = opened
    found = {}
    for name, of_task in queries.items():
        requests = requests_of(opened, of_task, settings)
        start = time.perf_counter()
        answers = list(serving.serve(model, params, tokenizer, requests, shape))
        seconds = time.perf_counter() - start
        right = tasks[name].check_all([(q, a["text"]) for q, a in zip(of_task, answers, strict=True)])
        found[name] = {
            "problems": len(of_task),
            "right": sum(right),
            "answer_tokens": sum(len(a["ids"]) + (a["finish_reason"] == "eos") for a in answers),
            "tokens": sum(a["num_tokens"] for a in answers),
            "forwards": sum(a["num_forwards"] for a in answers),
            "seconds": round(seconds, 4),
        }
    return found


def every_setting(
    opened: opening.Opened, tasks: dict[str, Task], plan: Sequence[tuple[dict, Queries]], batch_size: int
) -> list[dict[str, Any]]:
    """Decodes each of (settings, queries) at one shape that holds them all."""
    requests = [
        request
        for settings, queries in plan
        for of_task in queries.values()
        for request in requests_of(opened, of_task, settings)
    ]
    shape = serving.fitting_shape(requests, batch_size)
    serving.warm_up(opened.model, opened.params, opened.tokenizer, requests[0], shape)
    return [
        {
            "settings": settings,
            "shape": dataclasses.asdict(shape),
            "tasks": decode(opened, tasks, queries, settings, shape),
        }
        for settings, queries in plan
    ]


def merit(rows: Sequence[dict[str, float]]) -> tuple[float, float]:
    """More right answers first, then more tokens a pass."""
    return sum(row["right"] for row in rows), sum(row["tokens"] for row in rows) / sum(
        row["forwards"] for row in rows
    )


def plan_of(stage: str, run: str, method: str, queries: Queries) -> list[tuple[dict[str, Any], Queries]]:
    """What to decode how: (settings, queries of tasks)."""
    if stage == "validation":
        return [(settings, queries) for settings in grid(method)]
    validated = json.loads((RESULTS / f"validation_{run}.json").read_text())["found"]
    if stage == "test":
        best = {task: max(validated, key=lambda e, t=task: merit([e["tasks"][t]])) for task in queries}
        return [(best[task]["settings"], {task: of_task}) for task, of_task in queries.items()]
    by_cache: dict[str, list[dict]] = {}
    for entry in validated:
        by_cache.setdefault(entry["settings"].get("cache", ""), []).append(entry)
    return [
        (max(entries, key=lambda e: merit(list(e["tasks"].values())))["settings"], queries)
        for entries in by_cache.values()
    ]


def held_out() -> dict[str, Task]:
    """The tasks of configs/comparison.py that have a judge, with their settings there."""
    config = runpy.run_path("configs/comparison.py")["get_config"]()
    settings = config.data.tasks.to_dict()
    return {name: make_task(name, of) for name, of in settings.items() if name != "text"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("run", help="a folder of runs/comparison")
    parser.add_argument("--method", help="default: what the run was trained for")
    parser.add_argument("--limit", type=int, default=200, help="problems of each task (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="decoded together (default %(default)s)")
    flags = parser.parse_args()
    opened, tasks = opened_run(flags.run, flags.method), held_out()
    split = "validation" if flags.stage == "validation" else "test"
    queries = {
        name: [task.example(i, split).query for i in range(flags.limit)] for name, task in tasks.items()
    }
    method = opened.defaults.method
    plan, found = plan_of(flags.stage, flags.run, method, queries), []
    if flags.stage == "speed":
        few = {name: of_task[: max(1, flags.limit // 8)] for name, of_task in queries.items()}
        for settings, _ in plan:  # each at the shape that suits it
            for batch_size, asked in ((1, few), (32, queries)):
                (entry,) = every_setting(opened, tasks, [(settings, asked)], batch_size)
                found.append({"batch_size": batch_size} | entry)
    else:
        found = every_setting(opened, tasks, plan, flags.batch_size)
    result = {
        "run": flags.run,
        "method": method,
        "split": split,
        "command": shlex.join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "found": found,
    }
    name = f"{flags.stage}_{flags.run}" + (f"_{method}" if flags.method else "")
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for entry in found:
        shares = {task: row["right"] / row["problems"] for task, row in entry["tasks"].items()}
        mean = sum(shares.values()) / len(shares)
        passes = sum(row["tokens"] for row in entry["tasks"].values()) / sum(
            row["forwards"] for row in entry["tasks"].values()
        )
        seconds = sum(row["seconds"] for row in entry["tasks"].values())
        each = ", ".join(f"{task} {share:.1%}" for task, share in shares.items())
        print(
            f"{entry['settings']}: {mean:.1%}, {passes:.2f} tokens a pass, {seconds:.1f} s ({each})",
            flush=True,
        )


if __name__ == "__main__":
    main()
