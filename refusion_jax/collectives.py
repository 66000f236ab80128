"""What devices send each other, read off a compiled program's text (HLO)."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
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


def count(hlo: str) -> Traffic:
    """Counts the collectives of a compiled module.

    A loop's trips are those the compiler noted, or else are read off its condition `counter < constant`, the
    counter going from 0 in ones as that of `lax.scan` does. The TPU compiler splits a collective that runs
    beside computation into several fusions, which share its channel: it counts once. An all-reduce inside
    `all-reduce-scatter` is a reduce-scatter.
    """
    computations, entry = _parse(hlo)
    known: dict[str, Counter] = defaultdict(Counter)
    unknown: dict[str, Counter] = defaultdict(Counter)
    seen = set()

    def visit(name: str, loop: tuple[str, ...], trips: int, known_trips: bool) -> None:
        for instruction in computations.get(name, ()):
            operation = _collective(instruction, name)
            if operation is not None:
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                key = (loop, operation, channel[1] if channel else (name, instruction.name))
                if key not in seen:
                    seen.add(key)
                    sums = (known if known_trips else unknown)[operation]
                    sums["count"] += trips
                    sums["bytes"] += trips * _payload(instruction)
            if instruction.operation == "while":
                called = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", instruction.rest))
                turns = _trips(instruction, computations.get(called["condition"], ()))
                inside = (*loop, instruction.name)
                visit(called["body"], inside, trips * (turns or 1), known_trips and turns is not None)
            else:
                for other in _called(instruction):
                    visit(other, loop, trips, known_trips)

    visit(entry, (), 1, True)
    return Traffic(_listed(known), _listed(unknown))


def _listed(sums: dict[str, Counter]) -> list[Collective]:
    return [Collective(name, sums[name]["count"], sums[name]["bytes"]) for name in OPERATIONS if name in sums]


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


def _trips(loop: _Instruction, condition: list[_Instruction]) -> int | None:
    """Trips of a loop, None where they depend on data."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    constants = {i.name: i.rest for i in condition if i.operation == "constant"}
    compares = [i for i in condition if i.operation == "compare" and "direction=LT" in i.rest]
    if len(compares) == 1 and len(condition) <= 4:
        for operand in re.findall(r"%([\w.\-]+)", compares[0].rest.partition(")")[0]):
            if value := re.match(r"(\d+)\)", constants.get(operand, "")):
                return int(value[1])
    return None


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
