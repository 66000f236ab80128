"""The evaluate command: scores a checkpoint on embedded tasks, by accuracy and by the cost of decoding.

    python -m refusion_jax.evaluate --checkpoint=DIR --task=extraction --task_settings='{"fields": 2}' \
        --output=runs/eval
    python -m refusion_jax.evaluate --checkpoint=DIR --task=extraction,arithmetic --output=runs/eval
    python -m refusion_jax.evaluate --checkpoint=DIR --config=configs/small.py --output=runs/eval

These write OUTPUT/results.json (the figures and every setting) and OUTPUT/samples.jsonl (one line per
problem).
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from refusion_jax import config
from refusion_jax.data.pipeline import make_tasks
from refusion_jax.data.tasks.registry import TASKS, make_task
from refusion_jax.data.tasks.task import SPLITS, Task
from refusion_jax.errors import BadInput, command
from refusion_jax.files import check_output_folder, write_atomically
from refusion_jax.serving.flags import add_decoding_flags
from refusion_jax.serving.opened import Opened, open_model
from refusion_jax.serving.score import Score, score
from refusion_jax.training.run import RunConfig


def require_judged(task: Task, split: str, limit: int) -> None:
    """Raises BadInput unless `task` has a verifier and at least `limit` problems in the split."""
    if not task.judged:
        raise BadInput(f"--task={task.name} has no verifier; it is there to be trained on")
    size = task.size(split)
    if size is not None and limit > size:
        raise BadInput(f"--limit is {limit}, but {task.name} has {size} problems in its {split} split")


def asked_tasks(flags: argparse.Namespace) -> list[Task]:
    """The tasks of --task or --config. Raises BadInput unless exactly one of the two is given."""
    if (flags.task is None) == (flags.config is None):
        raise BadInput("--task and --config: give one of the two")
    if flags.task is not None:
        return named_tasks(flags.task, read_settings(flags.task_settings or "{}"))
    if flags.task_settings is not None:
        raise BadInput("--task_settings is for --task alone, found --config")
    return config_tasks(flags.config)


def config_tasks(path: str) -> list[Task]:
    """The tasks that a configuration file trains on, with its settings. Raises BadInput if there are none."""
    data = config.load(path, [], RunConfig).data
    if data.source != "tasks":
        raise BadInput(f"--config={path}: must train on tasks, found data.source {data.source!r}")
    return make_tasks(data.tasks)[0]


def named_tasks(names: str, settings: Mapping[str, Any]) -> list[Task]:
    """The tasks of --task.

    Args:
      names: one task name, or several separated by commas.
      settings: the settings of the task; with several tasks, a mapping from task name to settings.

    Raises:
      BadInput: a task or setting is unknown, or a task is named twice.
    """
    found = names.split(",")
    if len(found) == 1:
        return [make_task(names, settings)]
    if len(set(found)) < len(found):
        raise BadInput(f"--task must name each task once, found {names}")
    for name in settings:
        if name not in found:
            raise BadInput(f"--task_settings of several tasks are by their names {names}, found {name!r}")
    return [make_task(name, settings.get(name, {})) for name in found]


def read_settings(text: str) -> Mapping[str, Any]:
    """The JSON object of --task_settings. Raises BadInput if it is not one."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise BadInput(f"--task_settings: not JSON ({error}), found {text!r}") from None
    if not isinstance(settings, dict):
        raise BadInput(f'--task_settings must be a JSON object like {{"fields": 2}}, found {text!r}')
    return settings


def write(folder: Path, figures: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> None:
    """Writes samples.jsonl, then results.json. If results.json exists, samples.jsonl is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    write_atomically(folder / "samples.jsonl", lines)
    write_atomically(folder / "results.json", json.dumps(figures, indent=2) + "\n")


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = config.Parser(
        prog="python -m refusion_jax.evaluate",
        description="Scores a checkpoint on embedded tasks.",
        allow_abbrev=False,
    )
    add_decoding_flags(parser)
    parser.add_argument(
        "--task", metavar="NAME,…", help=f"tasks to score, separated by commas: {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--task_settings",
        metavar="JSON",
        help="settings of the task; for several tasks, settings by task name (default {})",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="configuration file; scores its tasks, with its settings, in place of --task",
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="split the problems come from (default %(default)s)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", default=200, help="problems per task (default %(default)s)"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for results.json and samples.jsonl")
    flags = parser.parse_args(arguments)
    if flags.limit < 1:
        raise BadInput(f"--limit must be at least 1 problem, found {flags.limit}")
    check_output_folder("--output", flags.output)
    tasks = asked_tasks(flags)
    for task in tasks:
        require_judged(task, flags.split, flags.limit)
    opened = open_model(flags)
    scores = score(opened, tasks, flags.split, flags.limit, flags.batch_size)
    figures = {task.name: scored.figures() for task, scored in zip(tasks, scores, strict=True)}
    # Printed before they are written, so that a full disk does not lose them.
    print(json.dumps(figures if len(tasks) > 1 else figures[tasks[0].name]), flush=True)
    if flags.output:
        answers = [answer for scored in scores for answer in scored.answers]
        write(Path(flags.output), results(flags, tasks, scores, opened), answers)
    return 0


def results(
    flags: argparse.Namespace, tasks: Sequence[Task], scores: Sequence[Score], opened: Opened
) -> dict[str, Any]:
    """The contents of results.json: the figures (with several tasks, by task name) and every setting."""
    model, defaults = opened.model, opened.defaults
    by_task = {
        task.name: scored.all_figures() | {"task_settings": dataclasses.asdict(task)}
        for task, scored in zip(tasks, scores, strict=True)
    }
    figures = by_task[tasks[0].name] if len(tasks) == 1 else {"tasks": by_task}
    return figures | {
        "checkpoint": flags.checkpoint,
        "task": ",".join(task.name for task in tasks),
        "split": flags.split,
        "problems": flags.limit,
        "method": defaults.method,
        "settings": dict(defaults.settings),
        "ahead": defaults.ahead,
        "batch_size": flags.batch_size,
        "device": jax.devices()[0].device_kind,
        "devices": 1 if opened.mesh is None else opened.mesh.size,
        "dtype": jnp.dtype(model.dtype).name,
        "int8": model.int8,
    }


if __name__ == "__main__":
    sys.exit(main())
