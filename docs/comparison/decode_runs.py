"""Decodes held-out problems with the models of train_runs.py.

    python docs/comparison/decode_runs.py search RUN       # validation problems by one setting
    python docs/comparison/decode_runs.py validation RUN   # by every setting of its method
    python docs/comparison/decode_runs.py test RUN         # each task by the setting that validation chose
    python docs/comparison/decode_runs.py speed RUN        # by those best over all tasks, 1 and 32 at a time
    python docs/comparison/decode_runs.py ablations RUN    # validation problems, ReFusion's settings varied
    python docs/comparison/decode_runs.py sizes RUN        # likewise its slot sizes alone

writes docs/comparison/results/STAGE_RUN.json: for each setting (settings.py) and task the number of right
answers, their tokens, forward passes and seconds. One compilation serves all settings, except in `speed`:
there each setting is compiled by itself, and its seconds are the median of several runs.
"""

import argparse
import dataclasses
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import settings as choices

from refusion_jax.data.tasks.task import Task
from refusion_jax.decode.batch import Shape
from refusion_jax.evaluate import config_tasks
from refusion_jax.serving import engine as serving
from refusion_jax.serving import opened as opening
from refusion_jax.serving.requests import Request, parse
from refusion_jax.serving.score import useful_tokens

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/comparison")
REPEATS = 3
STAGES = ("search", "validation", "test", "speed", "ablations", "sizes")

Queries = dict[str, list[str]]  # of each task


def opened_run(run: str, method: str | None) -> opening.Opened:
    flags = [f"--checkpoint={RUNS / run}", f"--gen_length={choices.GEN_LENGTH}"]
    return opening.open_by(flags + ([f"--method={method}"] if method else []))


def requests_of(opened: opening.Opened, queries: Sequence[str], settings: dict[str, Any]) -> list[Request]:
    model, _, tokenizer, defaults, _ = opened
    return [
        parse({"id": i, "prompt": query, **settings}, defaults, tokenizer, model.config.vocab_size)
        for i, query in enumerate(queries)
    ]


def provenance() -> dict[str, str]:
    """What decoded: the command, the device and the versions."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def decode(
    opened: opening.Opened,
    tasks: dict[str, Task],
    queries: Queries,
    requests: dict[str, list[Request]],
    shape: Shape,
    repeats: int,
) -> dict[str, dict[str, float]]:
    """What becomes of the requests of every task; seconds are the median of `repeats` times.

    `verdicts` has a 1 for each right answer and a 0 for each wrong one, in the order of the problems.
    """
    model, params, tokenizer, *_ = opened
    found = {}
    for name, of_task in requests.items():
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            answers = list(serving.serve(model, params, tokenizer, of_task, shape))
            seconds.append(time.perf_counter() - start)
        right = tasks[name].check_all([(q, a["text"]) for q, a in zip(queries[name], answers, strict=True)])
        found[name] = {
            "problems": len(of_task),
            "right": sum(right),
            "answer_tokens": sum(map(useful_tokens, answers)),
            "tokens": sum(a["num_tokens"] for a in answers),
            "forwards": sum(a["num_forwards"] for a in answers),
            "seconds": round(statistics.median(seconds), 4),
            "verdicts": "".join("01"[verdict] for verdict in right),
        }
    return found


def compiled(
    opened: opening.Opened, plan: Sequence[tuple[dict, Queries]], batch_size: int
) -> tuple[list[dict[str, list[Request]]], Shape]:
    """The requests of each (settings, queries), and one shape that holds them all and is compiled for."""
    asked = [
        {task: requests_of(opened, of_task, settings) for task, of_task in queries.items()}
        for settings, queries in plan
    ]
    flat = [request for requests in asked for of_task in requests.values() for request in of_task]
    shape = serving.fitting_shape(flat, batch_size)
    serving.warm_up(opened.model, opened.params, opened.tokenizer, flat[0], shape)
    return asked, shape


def every_setting(
    opened: opening.Opened,
    tasks: dict[str, Task],
    plan: Sequence[tuple[dict, Queries]],
    asked: Sequence[dict[str, list[Request]]],
    shape: Shape,
    repeats: int = 1,
) -> list[dict[str, Any]]:
    """Decodes each of (settings, queries), for which `compiled` gave requests and a shape."""
    return [
        {
            "settings": settings,
            "repeats": repeats,
            "shape": dataclasses.asdict(shape),
            "tasks": decode(opened, tasks, queries, requests, shape, repeats),
        }
        for (settings, queries), requests in zip(plan, asked, strict=True)
    ]


def speeds(
    opened: opening.Opened, tasks: dict[str, Task], plan: Sequence[tuple[dict, Queries]], limit: int
) -> list[dict[str, Any]]:
    """Each of (settings, queries) by itself, 1 and 32 at a time."""
    cases = [
        ([(settings, {task: of[: max(1, limit // part)] for task, of in queries.items()})], batch_size)
        for settings, queries in plan
        for batch_size, part in ((1, 8), (32, 2))
    ]
    with ThreadPoolExecutor() as pool:  # Compiling takes longer than decoding.
        ready = list(pool.map(lambda case: compiled(opened, *case), cases))
    return [
        {"batch_size": batch_size} | entry
        for (single, batch_size), (asked, shape) in zip(cases, ready, strict=True)
        for entry in every_setting(opened, tasks, single, asked, shape, REPEATS)
    ]


def plan_of(stage: str, name: str, method: str, queries: Queries) -> list[tuple[dict[str, Any], Queries]]:
    """What to decode how: (settings, queries of tasks)."""
    if stage == "search":
        return [(choices.grid(method)[0], queries)]
    fixed = {
        "validation": choices.grid(method),
        "ablations": choices.ablations(),
        "sizes": choices.slot_sizes(),
    }
    if stage in fixed:
        return [(settings, queries) for settings in fixed[stage]]
    validated = json.loads((RESULTS / f"validation_{name}.json").read_text())["found"]
    if stage == "test":
        return [(choices.best(validated, [task]), {task: of}) for task, of in queries.items()]
    return [(settings, queries) for settings in choices.timed(validated)]


def held_out(config: str = "configs/comparison.py") -> dict[str, Task]:
    """The tasks of a configuration file that have a judge, with their settings there."""
    return {task.name: task for task in config_tasks(config) if task.judged}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("run", help="a folder of runs/comparison")
    parser.add_argument("--method", help="default: what the run was trained for")
    parser.add_argument("--limit", type=int, default=200, help="problems of each task (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="decoded together (default %(default)s)")
    flags = parser.parse_args()
    opened, tasks = opened_run(flags.run, flags.method), held_out()
    split = "test" if flags.stage in ("test", "speed") else "validation"
    queries = {
        name: [task.example(i, split).query for i in range(flags.limit)] for name, task in tasks.items()
    }
    method = opened.defaults.method
    name = flags.run + (f"_{flags.method}" if flags.method else "")
    plan = plan_of(flags.stage, name, method, queries)
    if flags.stage == "speed":
        found = speeds(opened, tasks, plan, flags.limit)
    else:
        found = every_setting(opened, tasks, plan, *compiled(opened, plan, flags.batch_size))
    result = {
        "run": flags.run,
        "method": method,
        "split": split,
        **provenance(),
        "found": found,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{flags.stage}_{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for entry in found:
        rows = entry["tasks"]
        seconds = sum(row["seconds"] for row in rows.values())
        each = ", ".join(f"{task} {row['right'] / row['problems']:.1%}" for task, row in rows.items())
        mean, passes = choices.accuracy(rows.values()), choices.tokens_a_pass(rows.values())
        print(f"{entry['settings']}: {mean:.1%}, {passes:.2f} tokens a pass, {seconds:.1f} s ({each})")


if __name__ == "__main__":
    main()
