"""All tasks by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from refusion_jax.data.sources.example import Example
from refusion_jax.data.tasks.arithmetic import Arithmetic
from refusion_jax.data.tasks.countdown import Countdown
from refusion_jax.data.tasks.extraction import Extraction
from refusion_jax.data.tasks.functions import Functions
from refusion_jax.data.tasks.gsm8k import Gsm8k
from refusion_jax.data.tasks.json_records import JsonRecords
from refusion_jax.data.tasks.multiplication import Multiplication
from refusion_jax.data.tasks.paths import Paths
from refusion_jax.data.tasks.task import Task
from refusion_jax.data.tasks.text import Text
from refusion_jax.data.tasks.word_problems import WordProblems
from refusion_jax.errors import BadInput

__all__ = ["TASKS", "Example", "Task", "make_task"]

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Arithmetic,
        Multiplication,
        Countdown,
        WordProblems,
        Paths,
        Extraction,
        JsonRecords,
        Functions,
        Gsm8k,
        Text,
    )
}


def make_task(name: str, parameters: Mapping[str, Any]) -> Task:
    """The task `name` with these settings. Raises BadInput for an unknown name or setting."""
    if name not in TASKS:
        raise BadInput(f"task is {name!r}, expected one of {', '.join(TASKS)}")
    fields = [field.name for field in dataclasses.fields(TASKS[name])]
    if not isinstance(parameters, Mapping):
        raise BadInput(f"{name} is set to {parameters!r}, expected a mapping of {', '.join(fields)}")
    for key in parameters:
        if key not in fields:
            raise BadInput(f"{name}.{key} is no setting of the task; it has {', '.join(fields)}")
    return TASKS[name](**parameters)
