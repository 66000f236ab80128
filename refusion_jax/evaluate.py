"""The evaluate command: scores a checkpoint on embedded tasks, by accuracy and by the cost of decoding.

    python -m refusion_jax.evaluate --checkpoint=DIR --task=extraction --task_settings='{"fields": 2}' \
        --output=runs/eval --resume
    python -m refusion_jax.evaluate --checkpoint=DIR --task=extraction,arithmetic --output=runs/eval --resume
    python -m refusion_jax.evaluate --checkpoint=DIR --config=configs/small.py --output=runs/eval --resume

These write OUTPUT/results.json (the figures and every setting) and OUTPUT/samples.jsonl (one line per
problem). With --resume a command that was stopped goes on where it was.
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
from refusion_jax.files import check_output_folder, read_json, write_atomically
from refusion_jax.serving.flags import add_decoding_flags, add_resume_flags
from refusion_jax.serving.opened import Opened, open_model
from refusion_jax.serving.progress import Progress, run_record
from refusion_jax.serving.score import FIGURES, Score, score
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


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags of a command line. Raises BadInput if one of them is wrong by itself."""
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
    add_resume_flags(parser)
    flags = parser.parse_args(arguments)
    if flags.limit < 1:
        raise BadInput(f"--limit must be at least 1 problem, found {flags.limit}")
    check_output_folder("--output", flags.output)
    return flags


@command
def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_flags(arguments)
    tasks = asked_tasks(flags)
    for task in tasks:
        require_judged(task, flags.split, flags.limit)
    progress = progress_in(flags)
    opened = open_model(flags)
    record = evaluation_record(flags, tasks, opened) if progress else None
    scores = score(
        opened, tasks, flags.split, flags.limit, flags.batch_size, progress=progress, record=record
    )
    if progress is not None and progress.is_whole:
        print(json.dumps(read_figures(Path(flags.output))), flush=True)
        return 0
    figures = {task.name: scored.figures() for task, scored in zip(tasks, scores, strict=True)}
    # Printed before they are written, so that a full disk does not lose them.
    print(json.dumps(figures if len(tasks) > 1 else figures[tasks[0].name]), flush=True)
    if flags.output:
        answers = [answer for scored in scores for answer in scored.answers]
        write(Path(flags.output), results(flags, tasks, scores, opened), answers)
        progress.discard()
    return 0


def progress_in(flags: argparse.Namespace) -> Progress | None:
    """The answers so far in the folder --output; None without --output.

    Raises:
      BadInput: the folder holds an evaluation, and no flag says what to do with it.
    """
    if not flags.output:
        if flags.resume or flags.overwrite:
            raise BadInput(f"--{'resume' if flags.resume else 'overwrite'} needs --output")
        return None
    folder = Path(flags.output)
    progress = Progress(folder / "samples.jsonl", resume=flags.resume, overwrite=flags.overwrite)
    progress.check(folder / "results.json")
    return progress


def evaluation_record(flags: argparse.Namespace, tasks: Sequence[Task], opened: Opened) -> dict[str, Any]:
    """What the figures depend on besides the problems, for `Progress.start`."""
    return run_record(flags.checkpoint, opened) | {
        "task": [task.name for task in tasks],
        "task_settings": [dataclasses.asdict(task) for task in tasks],
        "split": flags.split,
        "limit": flags.limit,
        "batch_size": flags.batch_size,
        "devices": 1 if opened.mesh is None else opened.mesh.size,
    }


def read_figures(folder: Path) -> dict[str, Any]:
    """The main figures in FOLDER/results.json, as a run prints them."""
    found = read_json(folder / "results.json")
    if "tasks" in found:
        return {name: {key: of_task[key] for key in FIGURES} for name, of_task in found["tasks"].items()}
    return {key: found[key] for key in FIGURES}


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
