"""Scores a checkpoint on embedded tasks: exact match on held-out problems, and what decoding cost.

    python -m refusion_jax.evaluate --checkpoint=DIR --task=extraction --task_settings='{"fields": 2}' \
        --output=runs/eval
    python -m refusion_jax.evaluate --checkpoint=DIR --task=extraction,arithmetic --output=runs/eval
    python -m refusion_jax.evaluate --checkpoint=DIR --config=configs/small.py --output=runs/eval

write OUTPUT/results.json (the figures and every setting) and OUTPUT/samples.jsonl (one line a problem).
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from refusion_jax import config
from refusion_jax.data.pipeline import make_tasks
from refusion_jax.data.sources.example import Example
from refusion_jax.data.tasks.registry import TASKS, make_task
from refusion_jax.data.tasks.task import SPLITS, Task
from refusion_jax.errors import BadInput, command
from refusion_jax.serving import engine as serving
from refusion_jax.serving import flags as opening
from refusion_jax.serving.engine import Request
from refusion_jax.training.run import RunConfig

Z = 1.959964  # of the normal distribution: 95 % lie within so many standard deviations


@dataclasses.dataclass(frozen=True)
class Score:
    """What a method made of a task. Useful tokens are those of an answer and the EOS after it.

    Attributes:
      accuracy: share of the problems answered exactly.
      interval: the accuracies that this one is compatible with at 95 % (Wilson's interval).
      tokens_per_forward: all committed tokens over all forward passes, a pass counted once for each row.
      seconds: to decode them all, compiling excluded.
      response_tokens: useful tokens of an answer, the mean.
      tokens_per_second: useful tokens of all answers.
      latency: seconds that a problem stays in its row, were no row ever idle.
      compile_seconds: to compile for all tasks scored together.
      answers: results as `sample` writes them, with task, query, expected and correct.
    """

    accuracy: float
    interval: tuple[float, float]
    tokens_per_forward: float
    seconds: float
    response_tokens: float
    tokens_per_second: float
    latency: float
    compile_seconds: float
    answers: list[dict[str, Any]]

    def figures(self) -> dict[str, float]:
        """What is compared, rounded for print."""
        names = ("accuracy", "tokens_per_forward", "seconds")
        return {name: round(getattr(self, name), 4) for name in names}

    def all_figures(self) -> dict[str, Any]:
        """What results.json holds of a task."""
        more = ("response_tokens", "tokens_per_second", "latency", "compile_seconds")
        interval = {"interval": [round(end, 4) for end in self.interval]}
        return self.figures() | interval | {name: round(getattr(self, name), 4) for name in more}


def wilson(share: float, count: int) -> tuple[float, float]:
    """The ends of Wilson's 95 % interval for a share of `count` trials."""
    centre = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    lower, upper = ((centre + sign * half) / (1 + Z**2 / count) for sign in (-1, 1))
    return max(0.0, lower), min(1.0, upper)


def score(
    opened: opening.Opened,
    tasks: Sequence[Task],
    split: str,
    limit: int,
    batch_size: int,
    trace: bool = False,
) -> list[Score]:
    """Decodes the first `limit` problems of a split of every task; one compilation serves them all.

    Args:
      opened: the model and how it decodes.
      tasks: what to solve and the judges of it.
      split: "train", "validation" or "test".
      limit: how many problems.
      batch_size: decoded together.
      trace: whether the answers carry their traces.
    """
    model, params, tokenizer, defaults, _ = opened

    def request(number: int, example: Example) -> Request:
        raw = {"id": number, "prompt": example.query, "trace": trace}
        return serving.parse(raw, defaults, tokenizer, model.config.vocab_size)

    examples = [[task.example(index, split) for index in range(limit)] for task in tasks]
    requests = [[request(i, example) for i, example in enumerate(of_task)] for of_task in examples]
    shape = serving.fitting_shape(list(itertools.chain(*requests)), batch_size, defaults.ahead)
    scores = []
    with opened.scope():
        start = time.perf_counter()
        serving.warm_up(model, params, tokenizer, requests[0][0], shape)
        compile_seconds = time.perf_counter() - start
        for task, of_task, asked in zip(tasks, examples, requests, strict=True):
            start = time.perf_counter()
            answers = list(serving.serve(model, params, tokenizer, asked, shape, defaults.stop))
            seconds = time.perf_counter() - start
            judge(task, of_task, answers)
            scores.append(summary(answers, seconds, compile_seconds, batch_size))
    return scores


def judge(task: Task, examples: Sequence[Example], answers: Sequence[dict[str, Any]]) -> None:
    """Adds to answers what was asked, what was expected and whether they are right."""
    verdicts = task.check_all([(e.query, a["text"]) for e, a in zip(examples, answers, strict=True)])
    for answer, example, correct in zip(answers, examples, verdicts, strict=True):
        answer |= {"query": example.query, "expected": example.response, "correct": correct}
        answer["task"] = task.name


def useful_tokens(answer: Mapping[str, Any]) -> int:
    """Of a result as `sample` writes it: those of the answer and the EOS after it."""
    return min(len(answer["ids"]) + 1, answer["num_tokens"])  # raw_ids go on where ids end at an EOS


def summary(answers: list[dict[str, Any]], seconds: float, compile_seconds: float, batch_size: int) -> Score:
    """The figures of answers that were judged, decoded `batch_size` at a time."""
    count = len(answers)
    forwards = sum(answer["num_forwards"] for answer in answers)
    useful = sum(map(useful_tokens, answers))
    accuracy = sum(answer["correct"] for answer in answers) / count
    return Score(
        accuracy=accuracy,
        interval=wilson(accuracy, count),
        tokens_per_forward=sum(answer["num_tokens"] for answer in answers) / forwards,
        seconds=seconds,
        response_tokens=useful / count,
        tokens_per_second=useful / seconds,
        latency=seconds * min(batch_size, count) / count,
        compile_seconds=compile_seconds,
        answers=answers,
    )


def require_judged(task: Task, split: str, limit: int) -> None:
    """Raises BadInput unless `task` can judge `limit` different problems of a split."""
    if not task.judged:
        raise BadInput(f"--task={task.name} has no verifier; it is there to be trained on")
    size = task.size(split)
    if size is not None and limit > size:
        raise BadInput(f"--limit is {limit}, but {task.name} has {size} problems in its {split} split")


def asked_tasks(flags: argparse.Namespace) -> list[Task]:
    """The tasks of --task or --config; raises BadInput unless there is one of the two."""
    if (flags.task is None) == (flags.config is None):
        raise BadInput("--task and --config: give one of the two")
    if flags.task is not None:
        return named_tasks(flags.task, read_settings(flags.task_settings or "{}"))
    if flags.task_settings is not None:
        raise BadInput("--task_settings is for --task alone, found --config")
    return config_tasks(flags.config)


def config_tasks(path: str) -> list[Task]:
    """The tasks that a configuration file trains on, as it sets them; raises BadInput if it does not."""
    data = config.load(path, [], RunConfig).data
    if data.source != "tasks":
        raise BadInput(f"--config={path}: must train on tasks, found data.source {data.source!r}")
    return make_tasks(data.tasks)[0]


def named_tasks(names: str, settings: Mapping[str, Any]) -> list[Task]:
    """The tasks of --task, names with commas.

    Args:
      names: of one task or several.
      settings: of the one, or of each of several by its name.

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
    """The JSON object of --task_settings."""
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise BadInput(f"--task_settings: not JSON ({error}), found {text!r}") from None
    if not isinstance(settings, dict):
        raise BadInput(f'--task_settings must be a JSON object like {{"fields": 2}}, found {text!r}')
    return settings


def write(folder: Path, figures: Mapping[str, Any], answers: Sequence[Mapping[str, Any]]) -> None:
    """samples.jsonl first, then results.json: where the figures are, the samples are whole."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    for name, text in (("samples.jsonl", lines), ("results.json", json.dumps(figures, indent=2) + "\n")):
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = config.Parser(
        prog="python -m refusion_jax.evaluate",
        description="Scores a checkpoint on embedded tasks.",
        allow_abbrev=False,
    )
    opening.add_decoding_flags(parser)
    parser.add_argument("--task", metavar="NAME,…", help=f"one or several with commas: {', '.join(TASKS)}")
    parser.add_argument(
        "--task_settings",
        metavar="JSON",
        help="of the task, or of several by their names (default {})",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="in place of --task, a configuration whose tasks are scored, as set there",
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="problems (default %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", default=200, help="problems (default %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="where results.json and samples.jsonl go")
    flags = parser.parse_args(arguments)
    if flags.limit < 1:
        raise BadInput(f"--limit must be at least 1 problem, found {flags.limit}")
    tasks = asked_tasks(flags)
    for task in tasks:
        require_judged(task, flags.split, flags.limit)
    opened = opening.open_model(flags)
    scores = score(opened, tasks, flags.split, flags.limit, flags.batch_size)
    if flags.output:
        answers = [answer for scored in scores for answer in scored.answers]
        write(Path(flags.output), results(flags, tasks, scores, opened), answers)
    figures = {task.name: scored.figures() for task, scored in zip(tasks, scores, strict=True)}
    print(json.dumps(figures if len(tasks) > 1 else figures[tasks[0].name]))
    return 0


def results(
    flags: argparse.Namespace, tasks: Sequence[Task], scores: Sequence[Score], opened: opening.Opened
) -> dict[str, Any]:
    """What results.json says: the figures, of several tasks by their names, and how they came about."""
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
