"""The decoder compiled for several slices and batch sizes: one row of figures for each."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from refusion_jax.devices import GIB
from refusion_jax.model.config import ModelConfig
from refusion_jax.tpu.lowering import Compiled, Decoding, Lowered, compile_for, kinds, lower_decoding
from refusion_jax.tpu.slices import Topology

# Column -> format of its cells. Sizes are GiB per device.
COLUMNS = {
    "slice": "",
    "chips": "d",
    "weights": "",
    "requests": "d",
    "prompt + response": "",
    "arguments": "",
    "results": "",
    "temporaries": "",
    "program": "",
    "peak": "",
    "usable": "",
    "fits": "",
    "sent per iteration": "",
}
WIDTHS = {"slice": len("v5p:16x16x24")}


class Row(NamedTuple):
    """One compiled program.

    Attributes:
      cells: column -> value, for all of COLUMNS.
      fits: whether the program fits on the slice.
    """

    cells: Mapping[str, Any]
    fits: bool


def rows(model: ModelConfig, topologies: Sequence[Topology], asked: Sequence[Decoding]) -> Iterator[Row]:
    """One row per slice and decoding setting, each as soon as it is compiled.

    A program whose arguments alone do not fit is not compiled.
    """
    for topology, decoding in product(topologies, asked):
        lowered = lower_decoding(model, topology, decoding)
        compiled = None
        if sum(lowered.arguments.values()) < topology.chip.usable:
            compiled = compile_for(lowered)
        yield _row(topology, decoding, lowered, compiled)


def _row(topology: Topology, asked: Decoding, lowered: Lowered, compiled: Compiled | None) -> Row:
    fits = compiled is not None and compiled.fits
    if fits:
        sizes = [_gib(value) for value in kinds(compiled.memory).values()]
        peak = _gib(compiled.needed)
        traffic = compiled.traffic.in_open_loops
        sent = ", ".join(f"{c.count} {c.operation}s {_gib(c.bytes)}" for c in traffic) or "nothing"
    else:
        sizes = [_gib(sum(lowered.arguments.values())), "", "", ""]
        peak, sent = "more" if compiled is None else _gib(compiled.needed), ""
    cells = (
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
    )
    return Row(dict(zip(COLUMNS, cells, strict=True)), fits)


def _gib(value: float) -> str:
    return f"{value / GIB:.2f}"
