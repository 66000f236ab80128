"""The sampler on several slices, a row of a table each."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from refusion_jax.devices import GIB
from refusion_jax.model.config import ModelConfig
from refusion_jax.tpu.lowering import Compiled, Decoding, Lowered, compile_for, kinds, lower_decoding
from refusion_jax.tpu.slices import Topology

COLUMNS = (
    "slice",
    "chips",
    "weights",
    "requests",
    "prompt + response",
    "arguments",
    "results",
    "temporaries",
    "program",
    "peak",
    "usable",
    "fits",
    "sent in a turn",
)


class Row(NamedTuple):
    """A line of Markdown, and whether the program of which it speaks fits."""

    text: str
    fits: bool


def heading() -> str:
    """The lines above the rows; sizes are GiB of each device."""
    return "\n".join((_line(COLUMNS), _line(["---"] * len(COLUMNS))))


def rows(model: ModelConfig, topologies: Sequence[Topology], asked: Sequence[Decoding]) -> Iterator[Row]:
    """One row for each slice and each of what is asked, as they are compiled.

    What already its arguments are too large for is not compiled.
    """
    for topology, one in product(topologies, asked):
        lowered = lower_decoding(model, topology, one)
        compiled = None
        if sum(lowered.arguments.values()) < topology.chip.usable:
            compiled = compile_for(lowered)
        yield _row(topology, one, lowered, compiled)


def _row(topology: Topology, asked: Decoding, lowered: Lowered, compiled: Compiled | None) -> Row:
    arguments = sum(lowered.arguments.values())
    fits = compiled is not None and compiled.fits
    if fits:
        sizes = [_gib(value) for value in kinds(compiled.memory).values()]
        peak = _gib(compiled.needed)
        turn = compiled.traffic.in_open_loops
        sent = ", ".join(f"{one.count} {one.operation}s {_gib(one.bytes)}" for one in turn) or "nothing"
    else:
        sizes = [_gib(arguments), "", "", ""]
        peak, sent = "more" if compiled is None else _gib(compiled.needed), ""
    cells = [
        topology.name,
        topology.num_chips,
        asked.weights,
        asked.batch_size,
        f"{asked.prompt_length} + {asked.gen_length}",
        *sizes,
        peak,
        _gib(topology.chip.usable),
        "yes" if fits else "no",
        sent,
    ]
    return Row(_line(map(str, cells)), fits)


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"
