"""Communication between devices, counted in the text of a compiled program (HLO)."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """All collectives of one kind in a program.

    Attributes:
      operation: one of OPERATIONS.
      count: number of times that they run.
      bytes: total size per device of the whole arrays gathered, reduced, scattered or moved.
    """

    operation: str
    count: int
    bytes: int


class Traffic(NamedTuple):
    """Result of `count`.

    Attributes:
      collectives: collectives of the program; one inside a loop counts once per trip.
      in_open_loops: collectives inside loops of unknown trip count, counted once each. They are not in
        `collectives`.
    """

    collectives: list[Collective]
    in_open_loops: list[Collective]


class _Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    rest: str  # operands and attributes


class _Found(NamedTuple):
    operation: str
    trips: int
    bytes: int
    open_loop: bool


_ByChannel = dict[str, _Found]


def count(hlo: str) -> Traffic:
    """Counts the collectives of a compiled module.

    The trip count of a loop is the one that the compiler noted. Without a note it follows from
    `counter < constant` in the condition and `counter + constant` in the body, with a counter that starts at
    0, as in `lax.scan`.

    The TPU compiler splits a collective that overlaps with computation into several fusions, which share a
    channel and may lie in different loops. Such a collective counts once, with the trips of the fusion that
    runs least often. An all-reduce inside `all-reduce-scatter` counts as a reduce-scatter. Of the branches
    of a conditional, only the one that sends most bytes counts.

    Args:
      hlo: text of the module.
    """
    computations, entry = _parse(hlo)

    def visit(name: str, trips: int, open_loop: bool) -> _ByChannel:
        found: _ByChannel = {}
        for instruction in computations.get(name, ()):
            if operation := _collective(instruction, name):
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                key = channel[1] if channel else f"{name} {instruction.name}"
                _add(found, {key: _Found(operation, trips, trips * _payload(instruction), open_loop)})
            if instruction.operation == "while":
                called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", instruction.rest))
                parts = (computations.get(called[part], ()) for part in ("condition", "body"))
                loop_trips = _trips(instruction, *parts)
                _add(found, visit(called["body"], trips * (loop_trips or 1), open_loop or loop_trips is None))
                continue
            inside = [visit(other, trips, open_loop) for other in _called(instruction)]
            if instruction.operation == "conditional":
                inside = [
                    max(inside, key=lambda branch: sum(one.bytes for one in branch.values()), default={})
                ]
            for other in inside:
                _add(found, other)
        return found

    found = visit(entry, 1, False).values()
    return Traffic(*(_sums(one for one in found if one.open_loop is is_open) for is_open in (False, True)))


def _add(found: _ByChannel, others: _ByChannel) -> None:
    """Adds `others` to `found`; of one channel the entry with the fewest trips counts."""
    for key, other in others.items():
        if key not in found or other.trips < found[key].trips:
            found[key] = other


def _sums(found: Iterable[_Found]) -> list[Collective]:
    by_name = defaultdict(list)
    for one in found:
        by_name[one.operation].append(one)
    return [
        Collective(name, sum(f.trips for f in by_name[name]), sum(f.bytes for f in by_name[name]))
        for name in OPERATIONS
        if name in by_name
    ]


def _parse(hlo: str) -> tuple[dict[str, list[_Instruction]], str]:
    """The instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", []
    for line in hlo.splitlines():
        if opened := _COMPUTATION.match(line):
            current = computations.setdefault(opened[1], [])
            entry = opened[1] if line.startswith("ENTRY") else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(*found.groups()))
    return computations, entry


def _called(instruction: _Instruction) -> Iterator[str]:
    yield from _CALLED.findall(instruction.rest)
    for names in _BRANCHES.findall(instruction.rest):
        yield from (name.strip().lstrip("%") for name in names.split(","))


def _collective(instruction: _Instruction, computation: str) -> str | None:
    operation = instruction.operation.removesuffix("-start")
    if operation == "all-reduce" and computation.startswith("all-reduce-scatter"):
        return "reduce-scatter"
    return operation if operation in OPERATIONS else None


def _trips(loop: _Instruction, condition: list[_Instruction], body: list[_Instruction]) -> int | None:
    """Trip count of a loop, None if it depends on data."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    compares = [i for i in condition if i.operation == "compare" and "direction=LT" in i.rest]
    end = _constant_operand(compares[0], condition) if len(compares) == 1 and len(condition) <= 4 else None
    indices = [re.search(r"index=(\d+)", i.rest) for i in condition if i.operation == "get-tuple-element"]
    if end is None or len(indices) != 1 or not body:
        return None
    carried = _operands(body[-1])  # the root is the tuple carried to the next trip
    counters = [i for i in body if i.operation == "add" and i.name == carried[int(indices[0][1])]]
    step = _constant_operand(counters[0], body) if counters else None
    return -(-end // (step or 1))


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])


def _constant_operand(instruction: _Instruction, among: list[_Instruction]) -> int | None:
    """The value of the only constant operand, None unless there is exactly one."""
    constants = {i.name: re.match(r"(\d+)\)", i.rest) for i in among if i.operation == "constant"}
    values = [constants[name] for name in _operands(instruction) if constants.get(name)]
    return int(values[0][1]) if len(values) == 1 else None


def _payload(instruction: _Instruction) -> int:
    """Bytes of the whole array that a collective works on; the result of a scatter is a part of it."""
    sizes = [_bytes(*found) for found in _ARRAY.findall(instruction.shape)]
    if instruction.operation.endswith("-start"):  # the shape lists operands and results
        return max(sizes)
    return sum(sizes) * (_group_size(instruction.rest) if instruction.operation == "reduce-scatter" else 1)


def _bytes(dtype: str, bits: str, dimensions: str) -> int:
    length = math.prod(map(int, filter(None, dimensions.split(","))))
    return length * max(int(bits or 8), 8) // 8  # pred takes one byte


def _group_size(rest: str) -> int:
    """Number of devices in one group of a collective, from any notation of replica_groups."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", named[2]))
    if strided := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(strided[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 1
