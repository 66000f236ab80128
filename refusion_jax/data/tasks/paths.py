"""Shortest paths in small directed graphs, worked out by breadth-first search."""

import dataclasses
import itertools
import re
import string
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from refusion_jax.data.tasks.task import Dice, Generator, final_answer

_WORDINGS = (
    "Edges: {edges}. Shortest path from {start} to {goal}?",
    "One-way roads: {edges}. Which is the shortest way from {start} to {goal}?",
    "{edges}. Go from {start} to {goal} in the fewest steps.",
)
_QUERIES = [
    re.compile(
        re.escape(wording)
        .replace(r"\{edges\}", "(?P<edges>[A-Z]>[A-Z](?:, [A-Z]>[A-Z]){0,199})")
        .replace(r"\{start\}", "(?P<start>[A-Z])")
        .replace(r"\{goal\}", "(?P<goal>[A-Z])")
    )
    for wording in _WORDINGS
]


class Problem(NamedTuple):
    edges: tuple[str, ...]  # "AB" from A to B, in the order of the query
    start: str
    goal: str


@dataclasses.dataclass(frozen=True)
class Paths(Generator):
    """Graphs of `nodes` nodes with a unique shortest path, of `min_steps` to `max_steps` edges.

    Every node can be reached from the start. Up to `extra` further edges shorten no distance from the start
    and create no second shortest path. The response lists, for each node in the order of a breadth-first
    search, the nodes first seen from it, until the goal is seen.
    """

    nodes: int = 10
    min_steps: int = 2
    max_steps: int = 4
    extra: int = 5

    name: ClassVar[str] = "paths"

    def __post_init__(self):
        self._require("nodes", 3, 26)
        self._require("max_steps", 1, self.nodes - 1)
        self._require("min_steps", 1, self.max_steps)
        self._require("extra", 0, 100)

    def _draw(self, dice: Dice) -> Problem:
        steps = dice.between(self.min_steps, self.max_steps)
        names = dice.sample(string.ascii_uppercase, self.nodes)
        # Nodes by distance from the start, the node of the path first. A node of the path has an edge only
        # from the previous node of the path among the nodes one step nearer, so the shortest path is unique.
        levels = [[name] for name in names[: steps + 1]]
        edges = {a[0] + b[0] for a, b in itertools.pairwise(levels)}
        distance = {name: i for i, name in enumerate(names[: steps + 1])}
        for name in names[steps + 1 :]:
            distance[name] = dice.between(1, steps)
            edges.add(dice.pick(levels[distance[name] - 1]) + name)
            levels[distance[name]].append(name)
        route = set(names[: steps + 1])
        for _ in range(self.extra):
            a, b = dice.pick(names), dice.pick(names)
            ahead = distance[b] - distance[a]
            if a != b and (ahead <= 0 or (ahead == 1 and b not in route)):
                edges.add(a + b)
        return Problem(tuple(dice.sample(sorted(edges), len(edges))), names[0], names[steps])

    def _key(self, problem: Problem) -> str:
        return f"{sorted(problem.edges)}{problem.start}{problem.goal}"

    def _word(self, problem: Problem, dice: Dice) -> str:
        edges = ", ".join(f"{a}>{b}" for a, b in problem.edges)
        return dice.pick(_WORDINGS).format(edges=edges, start=problem.start, goal=problem.goal)

    def parse(self, query: str) -> Problem | None:
        match = next(filter(None, (pattern.fullmatch(query) for pattern in _QUERIES)), None)
        if match is None:
            return None
        edges = tuple(edge.replace(">", "") for edge in match["edges"].split(", "))
        problem = Problem(edges, match["start"], match["goal"])
        possible = problem.start != problem.goal and len(set(edges)) == len(edges)
        return problem if possible and _search(problem)[0] else None

    def _solution(self, problem: Problem) -> str:
        route, seen = _search(problem)
        steps = (f"{node}: {' '.join(found) or '-'}" for node, found in seen)
        return f"{', '.join(steps)} #### {' '.join(route)}"

    def _accepts(self, problem: Problem, response: str) -> bool:
        route = (final_answer(response) or "").split()
        legs = [a + b for a, b in itertools.pairwise(route)]
        return (
            len(route) == len(_search(problem)[0])
            and (route[0], route[-1]) == (problem.start, problem.goal)
            and set(legs) <= set(problem.edges)
        )


def _search(problem: Problem) -> tuple[Sequence[str], list[tuple[str, list[str]]]]:
    """(a shortest path, empty if there is none; for each node searched, the nodes first seen from it)."""
    after: dict[str, list[str]] = {}
    for a, b in problem.edges:
        after.setdefault(a, []).append(b)
    before, seen = {problem.start: ""}, []
    queue = [problem.start]
    for node in queue:
        found = [other for other in after.get(node, ()) if other not in before]
        before |= dict.fromkeys(found, node)
        seen.append((node, found))
        if problem.goal in found:
            break
        queue += found
    else:
        return "", seen
    route = problem.goal
    while before[route[0]]:
        route = before[route[0]] + route
    return route, seen
