"""Small Python functions to be written from a description, verified by running them."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from refusion_jax.data.tasks.function_steps import NOUNS, STEPS, VARIABLES
from refusion_jax.data.tasks.sandbox import Job, run_all
from refusion_jax.data.tasks.task import Dice, Generator

_FORMS = (  # opening, separator of the steps, whether the steps are listed in reverse
    ("Write a Python function f of {}: ", ", then ", False),
    ("Python: f takes {}. Steps: ", "; ", False),
    ("Write a Python function f of {}. Lastly, ", ". Before that, ", True),
)
_EXAMPLE = ". Example: f("
_WORDS = ("stone", "river", "apple", "tea", "lantern", "one", "notes", "soil", "train", "oil", "sea", "list")
_PROBES = {
    "number": [0, -17, 1234, 3, 58, -8, 96, 205],
    "text": ["", "a e  i", "Noon Rises", "lantern one tea", "soil train oil", "sea stone list notes"],
    "list": [
        [],
        [2],
        [-9, -4, -4, 0],
        [7, 3, 12, 3, 8, 5],
        [15, 6, 9, 10, 4, 6, 1, 13],
        [2, 2, 9, 14, -3, 11, 5],
    ],
}
_FEWEST_OUTPUTS = 3
_LONGEST_OUTPUT = 200  # characters
_MOST_STEPS = 8
_LONGEST = 5_000  # characters of a response, far beyond any solution


class Problem(NamedTuple):
    takes: str  # kind of the argument
    steps: tuple[tuple[str, Any], ...]  # keys of STEPS and parameters


@dataclasses.dataclass(frozen=True)
class Functions(Generator):
    """Functions of `min_steps` to `max_steps` steps on a list, a string or a number.

    The query describes the steps, in order or from last to first, and gives one input with its output. Every
    step affects the output. The response is only code. It is right if the function `f` that it defines
    returns the reference's outputs for hidden inputs, which include edge cases and are determined by the
    problem. The code runs in a sandbox; see `sandbox` for the protection that it gives.
    """

    min_steps: int = 3
    max_steps: int = 5

    name: ClassVar[str] = "functions"

    def __post_init__(self):
        self._require("max_steps", 1, _MOST_STEPS)
        self._require("min_steps", 1, self.max_steps)

    def _draw(self, dice: Dice) -> Problem:
        while True:
            takes = kind = dice.pick(_KINDS)
            steps: list[tuple[str, Any]] = []
            for _ in range(dice.between(self.min_steps, self.max_steps)):
                name = dice.pick(_STEPS_OF[kind])
                steps.append((name, dice.pick(STEPS[name].choices)))
                kind = STEPS[name].gives
            problem = Problem(takes, tuple(steps))
            if _every_step_matters(problem):
                return problem

    def _key(self, problem: Problem) -> str:
        return repr(problem)

    def _word(self, problem: Problem, dice: Dice) -> str:
        told = [dice.pick(STEPS[name].wordings).format(k=k) for name, k in problem.steps]
        opening, between, backwards = dice.pick(_FORMS)
        steps = between.join(reversed(told) if backwards else told)
        given = _draw_input(problem.takes, dice)
        example = f"{json.dumps(given)}) == {json.dumps(_run(problem, given))}"
        return f"{opening.format(NOUNS[problem.takes])}{steps}{_EXAMPLE}{example}"

    def parse(self, query: str) -> Problem | None:
        told, found, _ = query.partition(_EXAMPLE)
        if not found:
            return None
        for opening, between, backwards in _FORMS:
            for kind in _KINDS:
                start = opening.format(NOUNS[kind])
                if told.startswith(start):
                    steps = told.removeprefix(start).split(between)
                    problem = _read_steps(kind, steps[::-1] if backwards else steps)
                    if problem is not None:
                        return problem
        return None

    def _solution(self, problem: Problem) -> str:
        lines = [f"def f({VARIABLES[problem.takes]}):"]
        for name, k in problem.steps:
            lines.append(f"    {VARIABLES[STEPS[name].gives]} = {STEPS[name].code.format(k=k)}")
        last = STEPS[problem.steps[-1][0]]
        lines[-1] = f"    return {last.code.format(k=problem.steps[-1][1])}"
        return "\n".join(lines)

    def check(self, query: str, response: str) -> bool:
        return self.check_all([(query, response)])[0]

    def check_all(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Checks all responses in one sandbox, each in its own process.

        Raises:
          RuntimeError: the sandbox does not work on this system.
        """
        problems = [self.parse(query) if len(response) <= _LONGEST else None for query, response in pairs]
        inputs = [problem and _hidden_inputs(problem) for problem in problems]
        runs = [i for i, problem in enumerate(problems) if problem is not None]
        found = run_all([Job(pairs[i][1], "f", inputs[i]) for i in runs])
        right = [False] * len(pairs)
        for i, outputs in zip(runs, found, strict=True):
            # Compared as text: output of the sandbox is not parsed here.
            right[i] = outputs == json.dumps([_run(problems[i], given) for given in inputs[i]])
        return right


_KINDS = tuple(VARIABLES)
_STEPS_OF = {kind: [name for name, step in STEPS.items() if step.takes == kind] for kind in _KINDS}


def _run(problem: Problem, value: Any) -> Any:
    """The reference's output for an input."""
    for name, k in problem.steps:
        value = STEPS[name].run(value, k)
    return value


def _draw_input(kind: str, dice: Dice) -> Any:
    """A random value of a kind."""
    if kind == "number":
        return dice.between(1, 99)
    if kind == "text":
        return " ".join(dice.sample(_WORDS, dice.between(1, 3)))
    return [dice.between(-5, 15) for _ in range(dice.between(3, 7))]


def _hidden_inputs(problem: Problem) -> list[Any]:
    """The inputs of verification: edge cases, and six inputs drawn as in queries."""
    dice = Dice("inputs", problem)
    return [*_PROBES[problem.takes], *(_draw_input(problem.takes, dice) for _ in range(6))]


def _every_step_matters(problem: Problem) -> bool:
    """Whether the probes give several outputs, all short, and other outputs if any one step is left out."""
    states = [_PROBES[problem.takes]]
    for name, k in problem.steps:
        run = STEPS[name].run
        states.append([run(value, k) for value in states[-1]])
    outputs = [repr(output) for output in states[-1]]
    if len(set(outputs)) < _FEWEST_OUTPUTS or max(map(len, outputs)) > _LONGEST_OUTPUT:
        return False
    for i, (name, _) in enumerate(problem.steps):
        if STEPS[name].takes == STEPS[name].gives:
            rest = Problem(STEPS[name].gives, problem.steps[i + 1 :])
            # The last probe first, since it most often shows a difference.
            pairs = zip(reversed(states[i]), reversed(states[-1]), strict=True)
            if all(_run(rest, before) == output for before, output in pairs):
                return False
    return True


def _read_steps(kind: str, told: Sequence[str]) -> Problem | None:
    """The problem with this kind of input and these wordings of steps; None if they are not valid."""
    takes, steps = kind, []
    for text in told:
        step = _told(kind).get(text)
        if step is None:
            return None
        steps.append(step)
        kind = STEPS[step[0]].gives
    return Problem(takes, tuple(steps)) if len(steps) <= _MOST_STEPS else None


@functools.cache
def _told(kind: str) -> dict[str, tuple[str, Any]]:
    """wording -> (name of the step, k), for every step on this kind of value."""
    return {
        wording.format(k=k): (name, k)
        for name in _STEPS_OF[kind]
        for k in STEPS[name].choices
        for wording in STEPS[name].wordings
    }
