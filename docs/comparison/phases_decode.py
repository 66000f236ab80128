"""Decodes a run of phases.py in all its ways, one figure after the other.

    python docs/comparison/phases_decode.py RUN [--speeds] [--rehearse]

adds each finished figure to phases_RUN.jsonl in the folder of results. Figures that are there are not decoded
again, so an interrupted command goes on where it ended. In validation and in the test split problems are
decoded 64 at a time with as many speculative tokens as one at a time, whose passes are therefore counted; a
figure of `speed` is timed as many at a time as it says.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import phases
from decode_runs import Queries, decode, held_out, provenance, requests_of

from refusion_jax.data.tasks.task import Task
from refusion_jax.decode.batch import Shape
from refusion_jax.serving import engine as serving
from refusion_jax.serving import opened as opening
from refusion_jax.serving.requests import Request


class Group(NamedTuple):
    """Figures that share a compilation."""

    asks: list[phases.Ask]
    opened: opening.Opened
    requests: list[dict[str, list[Request]]]  # of each figure, by task
    shape: Shape


def grouped(asks: Sequence[phases.Ask]) -> list[list[phases.Ask]]:
    """Figures of a way together, timed ones each by itself."""
    groups: dict[object, list[phases.Ask]] = {}
    for i, ask in enumerate(asks):
        groups.setdefault(i if ask.stage == "speed" else ask.way, []).append(ask)
    return list(groups.values())


def queries_of(tasks: dict[str, Task], ask: phases.Ask) -> Queries:
    split = "validation" if ask.stage == "validation" else "test"
    return {name: [task.example(i, split).query for i in range(ask.problems)] for name, task in tasks.items()}


def compiled(
    asks: list[phases.Ask], opened: opening.Opened, tasks: dict[str, Task], setup: phases.Setup
) -> Group:
    fixed, queries = phases.WAYS[asks[0].way].fixed, queries_of(tasks, asks[0])
    requests = [
        {name: requests_of(opened, of, fixed | ask.settings) for name, of in queries.items()} for ask in asks
    ]
    flat = [request for of in requests for of_task in of.values() for request in of_task]
    shape = serving.fitting_shape(flat, asks[0].at_a_time)
    if asks[0].stage != "speed":
        shape = dataclasses.replace(shape, rows=setup.rows)
    serving.warm_up(opened.model, opened.params, opened.tokenizer, flat[0], shape)
    return Group(asks, opened, requests, shape)


def run_stage(
    name: str, stage: str, opened: dict[str, opening.Opened], tasks: dict[str, Task], setup: phases.Setup
) -> None:
    found = phases.figures(setup, name)
    missing = [ask for ask in phases.asks(name, stage, found, setup) if not ask.is_in(found)]

    def ready(asks: list[phases.Ask]) -> Group:
        return compiled(asks, opened[phases.WAYS[asks[0].way].method], tasks, setup)

    with ThreadPoolExecutor() as pool:  # Compiling takes longer than decoding.
        groups = list(pool.map(ready, grouped(missing)))
    for group in groups:
        queries = queries_of(tasks, group.asks[0])
        for ask, requests in zip(group.asks, group.requests, strict=True):
            repeats = setup.repeats if stage == "speed" else 1
            counts = decode(group.opened, tasks, queries, requests, group.shape, repeats)
            if stage != "test":
                for of_task in counts.values():
                    del of_task["verdicts"]  # compared in the test split only
            figure = dataclasses.asdict(ask) | {"repeats": repeats, "tasks": counts} | provenance()
            phases.append(setup, name, figure | {"shape": dataclasses.asdict(group.shape)})
            right = sum(of["right"] for of in counts.values()) / sum(of["problems"] for of in counts.values())
            print(
                f"{name}: {stage}, {ask.way} {ask.settings}, {ask.at_a_time} at a time: {right:.1%}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=phases.TARGETS)
    parser.add_argument("--rehearse", action="store_true", help="with the tiny model, on a CPU")
    parser.add_argument("--speeds", action="store_true", help="times, instead of counting")
    flags = parser.parse_args()
    setup = phases.REHEARSAL if flags.rehearse else phases.Setup()
    tasks = held_out(setup.config)
    methods = {phases.WAYS[way].method for way in phases.RUNS[flags.run].ways}
    where = [f"--checkpoint={setup.folder / flags.run}", f"--gen_length={setup.gen_length}"]
    opened = {method: opening.open_by([*where, f"--method={method}"]) for method in methods}
    part = "timed" if flags.speeds else "counted"
    for stage in phases.PARTS[part]:
        run_stage(flags.run, stage, opened, tasks, setup)
    phases.append(setup, flags.run, {"stage": part})


if __name__ == "__main__":
    main()
