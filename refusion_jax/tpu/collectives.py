"""What devices send each other, read off a compiled program's text (HLO)."""

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
    """All collectives of one kind.

    Attributes:
      operation: one of OPERATIONS.
      count: how often it runs.
      bytes: of the whole arrays gathered, reduced, scattered or moved, per device.
    """

    operation: str
    count: int
    bytes: int


class Traffic(NamedTuple):
    """What `count` found.

    Attributes:
      collectives: of the whole program; what stands in a loop counts once for each of its trips.
      in_open_loops: what stands in loops of unknown trips, counted once each; not in `collectives`.
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

    A loop's trips are those the compiler noted, or else are read off `counter < constant` in its condition
    and `counter + constant` in its body, the counter beginning at 0 as that of `lax.scan` does.

    The TPU compiler splits a collective that runs beside computation into several fusions, which share its
    channel and may stand in other loops: it counts once, as often as the rarest of them runs. An all-reduce
    inside `all-reduce-scatter` is a reduce-scatter. Of the branches of a conditional the one that sends most
    counts.
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
                turns = _trips(instruction, *parts)
                _add(found, visit(called["body"], trips * (turns or 1), open_loop or turns is None))
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
    """Adds to what was found; of one channel the rarest counts."""
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
    """The instructions of each computation, and the name of the entry."""
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
    """Trips of a loop, None where they depend on data."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    compares = [i for i in condition if i.operation == "compare" and "direction=LT" in i.rest]
    end = _constant_operand(compares[0], condition) if len(compares) == 1 and len(condition) <= 4 else None
    places = [re.search(r"index=(\d+)", i.rest) for i in condition if i.operation == "get-tuple-element"]
    if end is None or len(places) != 1 or not body:
        return None
    carried = _operands(body[-1])  # the root is the tuple of what is carried to the next turn
    counters = [i for i in body if i.operation == "add" and i.name == carried[int(places[0][1])]]
    step = _constant_operand(counters[0], body) if counters else None
    return -(-end // (step or 1))


def _operands(instruction: _Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.partition(")")[0])


def _constant_operand(instruction: _Instruction, among: list[_Instruction]) -> int | None:
    """The value of the one operand that is a constant."""
    constants = {i.name: re.match(r"(\d+)\)", i.rest) for i in among if i.operation == "constant"}
    values = [constants[name] for name in _operands(instruction) if constants.get(name)]
    return int(values[0][1]) if len(values) == 1 else None


def _payload(instruction: _Instruction) -> int:
    """Bytes of the whole array that a collective works on; its result is a part of that if it scatters."""
    sizes = [_bytes(*found) for found in _ARRAY.findall(instruction.shape)]
    if instruction.operation.endswith("-start"):  # operands and results stand side by side
        return max(sizes)
    return sum(sizes) * (_group_size(instruction.rest) if instruction.operation == "reduce-scatter" else 1)


def _bytes(dtype: str, bits: str, dimensions: str) -> int:
    length = math.prod(map(int, filter(None, dimensions.split(","))))
    return length * max(int(bits or 8), 8) // 8  # pred takes a byte


def _group_size(rest: str) -> int:
    """Devices that take part in one run of a collective, in any of the notations of replica_groups."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", named[2]))
    if strided := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(strided[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 1
