"""Compiles a training step, or the slot decoder, for TPUs that are not attached.

    python -m refusion_jax.aot --config=configs/qwen3_8b.py --topology=v5p:4x4x8
    python -m refusion_jax.aot --config=configs/qwen3_8b.py --topology=v5e:2x2 --decode
    python -m refusion_jax.aot --config=configs/qwen3_8b.py --topology=v5e:2x2,v6e:2x2 --decode --int8

Needs libtpu (`pip install 'refusion_jax[tpu]'`) and no TPU. Prints memory per device, collectives, and the
FLOPs of a step. Exits with 0 if the program fits and with 3 if it does not. A program that does not fit is
followed by changes that need less memory, cheapest first, each compiled until one fits. With several slices
or batch sizes, prints a table.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import rich.box

from refusion_jax import config, sharding
from refusion_jax.benchmarks.table import Table
from refusion_jax.config import PREFIX
from refusion_jax.devices import GIB, TPU_CHIPS, peak_flops
from refusion_jax.errors import BadInput, command
from refusion_jax.model.config import ModelConfig
from refusion_jax.model.reading import VERIFY
from refusion_jax.tpu import table as tpu_table
from refusion_jax.tpu.collectives import Collective
from refusion_jax.tpu.lowering import (
    Compiled,
    Decoding,
    Lowered,
    compile_for,
    kinds,
    lower_decoding,
    lower_training,
)
from refusion_jax.tpu.slices import Topology
from refusion_jax.training.flops import forward_flops, train_flops
from refusion_jax.training.objectives import OBJECTIVES
from refusion_jax.training.run import RunConfig
from refusion_jax.training.teacher import teacher_config

DOES_NOT_FIT = 3
MOST_COMPILED = 6  # changes; compiling one takes as long as compiling the first program

Change = tuple[Topology, list[str]]  # a slice, and flags to append


def report(lowered: Lowered, compiled: Compiled, topology: Topology) -> str:
    """Memory and collectives per device, as lines of text; sizes in GiB."""

    def size(name: str, value: float) -> str:
        return f"  {name:20}{value / GIB:8.2f}"

    def sent(found: Collective) -> str:
        return f"  {found.operation:20}{found.count:8,}  {found.bytes / GIB:10.3f} GiB"

    lines = [f"memory per device, GiB ({topology.chip.usable / GIB:.2f} usable)"]
    for name, value in kinds(compiled.memory).items():
        lines.append(size(name, value))
        if name == "arguments":
            lines += [size(f"  {part}", held) for part, held in lowered.arguments.items() if held]
    lines.append(size("peak", compiled.needed))
    lines.append("collectives per device: count, size of the whole arrays gathered or reduced")
    lines += [sent(found) for found in compiled.traffic.collectives] or ["  none"]
    if compiled.traffic.in_open_loops:
        lines.append("and per iteration of loops whose length depends on data")
        lines += [sent(found) for found in compiled.traffic.in_open_loops]
    return "\n".join(lines)


def training_changes(run: RunConfig, topology: Topology) -> Iterator[Change]:
    """Changes that save memory, in order of their cost in time, larger slices last.

    Each change includes the ones before it.
    """
    changes: dict[str, Any] = {}

    def on(topology: Topology) -> Change:
        return topology, [f"{PREFIX}{name}={value}" for name, value in changes.items()]

    def then(name: str, value: Any) -> Change:
        changes[name] = value
        return on(topology)

    if run.train.remat != "full":
        yield then("train.remat", "full")
    mesh = sharding.sizes(run.mesh, topology.num_devices)
    rows = run.train.batch_size // (mesh.data * mesh.fsdp)
    for parts in dict.fromkeys((2 * run.train.microbatches, rows)):
        if parts > run.train.microbatches and rows % parts == 0:
            yield then("train.microbatches", parts)
    if run.train.loss_chunks < 8 and run.data.max_length % 8 == 0:
        yield then("train.loss_chunks", 8)
    if run.optimizer.mean_dtype != "bfloat16":
        yield then("optimizer.mean_dtype", "bfloat16")
    for other in (topology, *topology.larger()):
        # Parameters sharded over all devices, one row at a time on each.
        sharing = math.gcd(run.train.batch_size, other.num_devices)
        tensor = other.num_devices // sharing
        saves = other is not topology or mesh.data > 1
        if saves and run.model.num_kv_heads % tensor == 0:
            changes |= {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": tensor}
            changes["train.microbatches"] = run.train.batch_size // sharing
            yield on(other)


def decoding_changes(asked: Decoding, topology: Topology) -> Iterator[Change]:
    """Changes that save memory: smaller batches, then larger slices."""
    rows = asked.batch_size
    while (rows := rows // 2) >= 1:
        yield topology, [f"--batch_size={rows}"]
    for other in topology.larger():
        yield other, []


def first_that_fits(changes: Iterable[Change], lower: Callable[[Topology, list[str]], Lowered]) -> str:
    """Compiles changes in turn until one fits, and prints the result of each.

    Changes whose arguments alone do not fit are not compiled; of the others, at most MOST_COMPILED are.

    Args:
      changes: slices and flags to try.
      lower: lowers the program for a slice with flags appended.

    Returns:
      the flags that fit, empty if none was found.
    """
    compiled_so_far = 0
    for topology, flags in changes:
        if compiled_so_far == MOST_COMPILED:
            break
        lowered = lower(topology, flags)
        needed, usable = sum(lowered.arguments.values()), topology.chip.usable
        fits = False
        if needed < usable:
            compiled = compile_for(lowered)
            compiled_so_far += 1
            needed, fits = compiled.needed, compiled.fits
        words = " ".join((f"--topology={topology.name}", *flags))
        verdict = "fits" if fits else "does not fit"
        print(f"  {verdict}, {needed / GIB:.2f} of {usable / GIB:.2f} GiB: {words}", flush=True)
        if fits:
            return words
    return ""


def describe_training(run: RunConfig, topology: Topology) -> str:
    """The program that is compiled, and the FLOPs of a step."""
    rows, length = run.train.batch_size, run.data.max_length
    total_len = jnp.full(rows, length)
    # One eighth is prompt, as in `bench train`; only the FLOPs of bd3 depend on it.
    work = OBJECTIVES[run.objective].flop_counts(total_len // 8, total_len, run.diffusion)
    flops = float(train_flops(run.model, *work, run.lora))
    if (teacher := teacher_config(run)) is not None:
        flops += float(forward_flops(teacher, *work))
    devices = topology.devices()
    seconds = flops / (len(devices) * peak_flops(devices[0].device_kind))
    mesh = dataclasses.asdict(sharding.sizes(run.mesh, topology.num_devices))
    return (
        f"training step of {rows} x {length} tokens on {topology.name}, "
        f"{topology.num_chips} chips as {mesh}\n"
        f"{flops:.3g} FLOPs without padding, {seconds:.2f} s at the chips' peak"
    )


def describe_decoding(asked: Decoding, topology: Topology) -> str:
    """The program that is compiled."""
    exact = f" verified exactly, {asked.draft_length} drafts per pass" if asked.verify == "exact" else ""
    return (
        f"decoder of {asked.batch_size} x ({asked.prompt_length} + {asked.gen_length}) tokens{exact}, "
        f"weights in {asked.weights}, on {topology.name}, every matrix product split over "
        f"{topology.num_chips} chips"
    )


def _parser() -> config.Parser:
    parser = config.Parser(
        prog="python -m refusion_jax.aot",
        description="Compiles the training step of a run, or the slot decoder, for TPUs that are not "
        "attached. Exits with 0 if it fits in their memory, with 3 if it does not.",
        epilog=config.help_text(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", required=True, help=config.FILE_HELP)
    generations = ", ".join(TPU_CHIPS)
    add(
        "--topology",
        metavar="NAME",
        required=True,
        help=f"slice as GENERATION:SHAPE, for example v5p:4x4x8; with --decode also several, separated by "
        f"commas, which gives a table; generations are {generations}",
    )
    add(
        "--no_suggestions",
        action="store_true",
        help="if the program does not fit, do not search for changes that fit",
    )
    add(
        "--decode",
        action="store_true",
        help="compile the decoder instead of the training step; the flags below apply to it",
    )
    whole = {"type": config.whole_number, "metavar": "N"}
    add("--prompt_length", **whole, default=512, help="tokens per prompt (default %(default)s)")
    add("--gen_length", **whole, default=512, help="response tokens (default %(default)s)")
    add("--slot_size", **whole, default=32, help="tokens per slot (default %(default)s)")
    add("--num_blocks", **whole, default=4, help="blocks decoded left to right (default %(default)s)")
    add(
        "--verify",
        choices=VERIFY,
        default="threshold",
        help="how drafts are accepted; exact has no slots and blocks (default %(default)s)",
    )
    add(
        "--draft_length",
        **whole,
        default=64,
        help="verify exact: most drafts that a pass verifies (default %(default)s)",
    )
    add(
        "--batch_size",
        type=config.whole_numbers,
        metavar="N,…",
        default="8",
        help="requests decoded together; several numbers, separated by commas, give a table "
        "(default %(default)s)",
    )
    add("--int8", action="store_true", help="int8 weights instead of bfloat16")
    return parser


def _decodings(flags: argparse.Namespace) -> list[Decoding]:
    """The decoding settings of the flags, one per batch size."""
    given = {name: getattr(flags, name) for name in Decoding._fields}
    return [Decoding(**given | {"batch_size": number}) for number in flags.batch_size]


def _table(model: ModelConfig, topologies: Sequence[Topology], asked: Sequence[Decoding]) -> int:
    """Prints a Markdown table, one row per slice and batch size; returns 0 if all programs fit."""
    table = Table(tpu_table.COLUMNS, tpu_table.WIDTHS, rich.box.MARKDOWN)
    print(table.header(), flush=True)
    fits = []
    for row in tpu_table.rows(model, topologies, asked):
        print(table.line(row.cells), flush=True)
        fits.append(row.fits)
    return 0 if all(fits) else DOES_NOT_FIT


@command
def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    flags, overrides = parser.parse_known_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing runs, and attached TPUs stay free
    topologies = [Topology.named(name) for name in flags.topology.split(",")]
    run, (asked, *more) = config.load(flags.config, overrides, RunConfig), _decodings(flags)
    if flags.decode and (more or len(topologies) > 1):
        return _table(run.model, topologies, [asked, *more])
    if len(topologies) > 1:
        raise BadInput(f"--topology must be one slice for a training step, found {flags.topology!r}")
    topology = topologies[0]

    def lower(topology: Topology, changes: list[str]) -> Lowered:
        flags, overrides = parser.parse_known_args([*arguments, *changes])
        if flags.decode:
            return lower_decoding(run.model, topology, _decodings(flags)[0])
        return lower_training(config.load(flags.config, overrides, RunConfig), topology)

    lowered = lower(topology, [])
    print(
        describe_decoding(asked, topology) if flags.decode else describe_training(run, topology), flush=True
    )
    compiled = compile_for(lowered)
    print(f"compiled in {compiled.seconds:.0f} s")
    left = (topology.chip.usable - compiled.needed) / GIB
    if compiled.fits:
        print(report(lowered, compiled, topology))
        print(f"fits, {left:.2f} GiB are left on each device")
        return 0
    found = ""
    if not flags.no_suggestions:
        print(f"does not fit, by {-left:.2f} GiB; compiling changes that need less", flush=True)
        changes = decoding_changes(asked, topology) if flags.decode else training_changes(run, topology)
        found = first_that_fits(changes, lower)
    choices = f"these choices would fit: {found}" if found else "a larger slice or a smaller model may"
    print(f"does not fit, by {-left:.2f} GiB; {choices}")
    return DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
