"""Scores a checkpoint on an embedded task: exact match on held-out problems, and what decoding cost.

    python -m refusion_jax.evaluate --checkpoint=DIR --task=extraction --task_settings='{"fields": 2}' \
        --output=runs/eval

writes OUTPUT/results.json (the figures and every setting) and OUTPUT/samples.jsonl (one line a problem).
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refusion_jax import sample, serving
from refusion_jax.config import Parser
from refusion_jax.data.task import SPLITS, Task
from refusion_jax.data.tasks import TASKS, make_task
from refusion_jax.errors import BadInput, command
from refusion_jax.serving import Defaults


@dataclasses.dataclass(frozen=True)
class Score:
    """What a method made of a task.

    Attributes:
      accuracy: share of the problems answered exactly.
      tokens_per_forward: all committed tokens over all forward passes, a pass counted once for each row.
      seconds: to decode them all, compiling excluded.
      compile_seconds: to compile.
      answers: results as `sample` writes them, with query, expected and correct.
    """

    accuracy: float
    tokens_per_forward: float
    seconds: float
    compile_seconds: float
    answers: list[dict[str, Any]]

    def figures(self) -> dict[str, float]:
        """What is compared, rounded for print."""
        names = ("accuracy", "tokens_per_forward", "seconds")
        return {name: round(getattr(self, name), 4) for name in names}


def score(
    opened: sample.Opened, task: Task, split: str, limit: int, batch_size: int, trace: bool = False
) -> Score:
    """Decodes the first `limit` problems of a split.

    Args:
      opened: the model and how it decodes.
      task: what to solve and the judge of it.
      split: "train", "validation" or "test".
      limit: how many problems.
      batch_size: decoded together.
      trace: whether the answers carry their traces.
    """
    model, params, tokenizer, defaults, _ = opened
    examples = [task.example(index, split) for index in range(limit)]
    requests = [
        serving.parse(
            {"id": i, "prompt": e.query, "trace": trace}, defaults, tokenizer, model.config.vocab_size
        )
        for i, e in enumerate(examples)
    ]
    shape = serving.fitting_shape(requests, batch_size, defaults.ahead)
    with opened.scope():
        start = time.perf_counter()
        serving.warm_up(model, params, tokenizer, requests[0], shape)
        compiled = time.perf_counter()
        answers = list(serving.serve(model, params, tokenizer, requests, shape, defaults.stop))
        seconds = time.perf_counter() - compiled
    verdicts = task.check_all([(e.query, a["text"]) for e, a in zip(examples, answers, strict=True)])
    for answer, example, correct in zip(answers, examples, verdicts, strict=True):
        answer |= {"query": example.query, "expected": example.response, "correct": correct}
    forwards = sum(answer["num_forwards"] for answer in answers)
    return Score(
        accuracy=sum(answer["correct"] for answer in answers) / limit,
        tokens_per_forward=sum(answer["num_tokens"] for answer in answers) / forwards,
        seconds=seconds,
        compile_seconds=compiled - start,
        answers=answers,
    )


def require_judged(task: Task, split: str, limit: int) -> None:
    """Raises BadInput unless `task` can judge `limit` different problems of a split."""
    if not task.judged:
        raise BadInput(f"--task={task.name} has no verifier; it is there to be trained on")
    size = task.size(split)
    if size is not None and limit > size:
        raise BadInput(f"--limit is {limit}, but {task.name} has {size} problems in its {split} split")


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
    parser = Parser(
        prog="python -m refusion_jax.evaluate",
        description="Scores a checkpoint on an embedded task.",
        allow_abbrev=False,
    )
    sample.add_decoding_flags(parser)
    parser.add_argument("--task", metavar="NAME", required=True, choices=tuple(TASKS), help=", ".join(TASKS))
    parser.add_argument(
        "--task_settings", metavar="JSON", default="{}", help="of the task (default %(default)s)"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="problems (default %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", default=200, help="problems (default %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="where results.json and samples.jsonl go")
    flags = parser.parse_args(arguments)
    if flags.limit < 1:
        raise BadInput(f"--limit must be at least 1 problem, found {flags.limit}")
    task = make_task(flags.task, read_settings(flags.task_settings))
    require_judged(task, flags.split, flags.limit)
    opened = sample.open_model(flags)
    scored = score(opened, task, flags.split, flags.limit, flags.batch_size)
    figures = scored.figures()
    if flags.output:
        write(Path(flags.output), figures | describe(flags, task, opened.defaults), scored.answers)
    print(json.dumps(figures))
    return 0


def describe(flags: argparse.Namespace, task: Task, defaults: Defaults) -> dict[str, Any]:
    """What results.json says of how the figures came about."""
    return {
        "checkpoint": flags.checkpoint,
        "task": flags.task,
        "task_settings": dataclasses.asdict(task),
        "split": flags.split,
        "problems": flags.limit,
        "method": defaults.method,
        "settings": dict(defaults.settings),
    }


if __name__ == "__main__":
    sys.exit(main())
