"""Scores of a model on tasks: accuracy on held-out problems, and the cost of decoding."""

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from refusion_jax.data.sources.example import Example
from refusion_jax.data.tasks.task import Task
from refusion_jax.decode.batch import Shape
from refusion_jax.serving import engine
from refusion_jax.serving.opened import Opened
from refusion_jax.serving.progress import Progress, request_digest
from refusion_jax.serving.requests import Request, parse

FIGURES = ("accuracy", "tokens_per_forward", "seconds")  # those that are printed
Z = 1.959964  # 95 % of a normal distribution lie within this many standard deviations of its mean


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a method on a task. Useful tokens are those of an answer and the EOS after it.

    Attributes:
      accuracy: the fraction of problems that the task judges correct, from 0 to 1.
      interval: the 95 % interval of the accuracy (Wilson's).
      tokens_per_forward: committed tokens of all answers per forward pass; a pass counts once per row in it.
      seconds: to decode all problems, without compilation.
      response_tokens: mean useful tokens per answer.
      tokens_per_second: useful tokens of all answers per second.
      latency: mean seconds that a problem spends in its row, assuming that no row is ever idle.
      compile_seconds: to compile, for all tasks scored together.
      answers: results as `sample` writes them, with `task`, `query`, `expected` and `correct` added.
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
        """The main figures, rounded to 4 places."""
        return {name: round(getattr(self, name), 4) for name in FIGURES}

    def all_figures(self) -> dict[str, Any]:
        """All figures of a task in results.json, rounded to 4 places."""
        more = ("response_tokens", "tokens_per_second", "latency", "compile_seconds")
        interval = {"interval": [round(end, 4) for end in self.interval]}
        return self.figures() | interval | {name: round(getattr(self, name), 4) for name in more}


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval (lower end, upper end) for the fraction `share` of `count` trials."""
    centre = share + Z**2 / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    lower, upper = ((centre + sign * half) / (1 + Z**2 / count) for sign in (-1, 1))
    return max(0.0, lower), min(1.0, upper)


def score(
    opened: Opened,
    tasks: Sequence[Task],
    split: str,
    limit: int,
    batch_size: int,
    trace: bool = False,
    progress: Progress | None = None,
    record: Mapping[str, Any] | None = None,
) -> list[Score]:
    """Decodes and judges the first `limit` problems of every task. All tasks share one compilation.

    Args:
      opened: the model and its default settings.
      tasks: tasks with a verifier.
      split: "train", "validation" or "test".
      limit: problems per task.
      batch_size: problems decoded together.
      trace: whether the answers carry traces.
      progress: where answers are kept as they are decoded, and taken from if this run resumes. `seconds` then
        counts the time up to the last answer of each run.
      record: what the answers depend on besides the requests, for `Progress.start`.

    Returns:
      one Score per task; none if the output of `progress` is whole.

    Raises:
      BadInput: the answers that are there were made from something else.
    """
    model, params, tokenizer, defaults, _ = opened

    def request(number: int, example: Example) -> Request:
        raw = {"id": number, "prompt": example.query, "trace": trace}
        return parse(raw, defaults, tokenizer, model.config.vocab_size)

    examples = [[task.example(index, split) for index in range(limit)] for task in tasks]
    requests = [[request(i, example) for i, example in enumerate(of_task)] for of_task in examples]
    everything = list(itertools.chain(*requests))
    kept: Mapping[int, dict[str, Any]] = {}
    if progress is not None:
        digests = [request_digest(request) for request in everything]
        kept = progress.start({**(record or {}), "requests": digests})
        if progress.is_whole:
            return []
    shape = engine.fitting_shape(everything, batch_size, defaults.ahead)
    scores = []
    with opened.scope():
        start = time.perf_counter()
        engine.warm_up(model, params, tokenizer, requests[0][0], shape)
        compile_seconds = time.perf_counter() - start
        for number, (task, of_task) in enumerate(zip(tasks, examples, strict=True)):
            indices = range(limit * number, limit * (number + 1))
            answers, seconds = answer(opened, everything, indices, shape, kept, progress)
            judge(task, of_task, answers)
            scores.append(summary(answers, seconds, compile_seconds, batch_size))
    return scores


def answer(
    opened: Opened,
    requests: Sequence[Request],
    indices: Sequence[int],
    shape: Shape,
    kept: Mapping[int, dict[str, Any]],
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], float]:
    """Decodes the requests at `indices` that have no kept answer.

    Returns:
      the answers to the requests at `indices`, and the seconds that decoding took, in this run and, for kept
      answers, in earlier ones.
    """
    model, params, tokenizer, defaults, _ = opened
    answers = {index: dict(kept[index]) for index in indices if index in kept}
    seconds = max((answer.pop("seconds") for answer in answers.values()), default=0.0)
    left = [index for index in indices if index not in answers]
    if left:
        start = time.perf_counter() - seconds
        asked = [requests[index] for index in left]
        for place, found in engine.served(model, params, tokenizer, asked, shape, defaults.stop):
            answers[left[place]] = found
            if progress is not None:
                progress.add(left[place], found | {"seconds": time.perf_counter() - start})
        seconds = time.perf_counter() - start
    return [answers[index] for index in indices], seconds


def judge(task: Task, examples: Sequence[Example], answers: Sequence[dict[str, Any]]) -> None:
    """Adds `task`, `query`, `expected` and `correct` to each answer, in place."""
    verdicts = task.check_all([(e.query, a["text"]) for e, a in zip(examples, answers, strict=True)])
    for answer, example, correct in zip(answers, examples, verdicts, strict=True):
        answer |= {"query": example.query, "expected": example.response, "correct": correct}
        answer["task"] = task.name


def useful_tokens(answer: Mapping[str, Any]) -> int:
    """The useful tokens of a result as `sample` writes it: those of the answer and the EOS after it."""
    return min(len(answer["ids"]) + 1, answer["num_tokens"])  # raw_ids may go on after an EOS


def summary(answers: list[dict[str, Any]], seconds: float, compile_seconds: float, batch_size: int) -> Score:
    """The Score of judged answers that were decoded `batch_size` at a time in `seconds`."""
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
