"""Compiles a training step, or the sampler, for TPUs that are not there: does it fit, what does it send?

    python -m refusion_jax.aot --config=configs/qwen3_8b.py --topology=v5p:4x4x8
    python -m refusion_jax.aot --config=configs/qwen3_8b.py --topology=v5e:2x2 --decode
    python -m refusion_jax.aot --config=configs/qwen3_8b.py --topology=v5e:2x2,v6e:2x2 --decode --int8

Needs libtpu (`pip install 'refusion_jax[tpu]'`) and no TPU. Prints the memory of each device, the collectives
and the FLOPs of a step. Exits with 0 if it fits, with 3 if it does not; then it compiles a few changes, the
cheapest first, until one fits. Of several slices or batch sizes it makes a table.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from refusion_jax import config, sharding
from refusion_jax.config import PREFIX
from refusion_jax.errors import BadInput, command
from refusion_jax.model.transformer import ModelConfig
from refusion_jax.tpu import table as aot_table
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
from refusion_jax.tpu.slices import CHIPS, GIB, Topology
from refusion_jax.training.flops import peak_flops, train_flops
from refusion_jax.training.objectives import OBJECTIVES
from refusion_jax.training.run import RunConfig

DOES_NOT_FIT = 3
MOST_COMPILED = 6  # changes; each takes as long as the first program

Change = tuple[Topology, list[str]]  # a slice, and flags to add


def report(lowered: Lowered, compiled: Compiled, topology: Topology) -> str:
    """The memory of each device and the collectives, as lines of text."""

    def size(name: str, value: float) -> str:
        return f"  {name:20}{value / GIB:8.2f}"

    def sent(found: Collective) -> str:
        return f"  {found.operation:20}{found.count:8,}  {found.bytes / GIB:10.3f} GiB"

    lines = [f"memory of each device, GiB ({topology.chip.usable / GIB:.2f} usable)"]
    for name, value in kinds(compiled.memory).items():
        lines.append(size(name, value))
        if name == "arguments":
            lines += [size(f"  {part}", held) for part, held in lowered.arguments.items() if held]
    lines.append(size("at the peak", compiled.needed))
    lines.append("collectives of each device, whole arrays gathered or reduced")
    lines += [sent(found) for found in compiled.traffic.collectives] or ["  none"]
    if compiled.traffic.in_open_loops:
        lines.append("and in each turn of a loop that runs as long as the data asks")
        lines += [sent(found) for found in compiled.traffic.in_open_loops]
    return "\n".join(lines)


def training_changes(run: RunConfig, topology: Topology) -> Iterator[Change]:
    """What saves memory, the cheapest in time first, each with those before it; larger slices last."""
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
        # Parameters over all devices, a row at a time on each.
        sharing = math.gcd(run.train.batch_size, other.num_devices)
        tensor = other.num_devices // sharing
        saves = other is not topology or mesh.data > 1
        if saves and run.model.num_kv_heads % tensor == 0:
            changes |= {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": tensor}
            changes["train.microbatches"] = run.train.batch_size // sharing
            yield on(other)


def decoding_changes(asked: Decoding, topology: Topology) -> Iterator[Change]:
    """Smaller batches, then larger slices."""
    rows = asked.batch_size
    while (rows := rows // 2) >= 1:
        yield topology, [f"--batch_size={rows}"]
    for other in topology.larger():
        yield other, []


def first_that_fits(changes: Iterable[Change], lower: Callable[[Topology, list[str]], Lowered]) -> str:
    """Compiles changes one after the other until one fits, printing what each came to.

    Those whose arguments alone are too much are passed over; of others MOST_COMPILED are tried.

    Returns:
      the flags that fit, empty if there are none.
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
    """What is compiled, and the arithmetic of a step."""
    rows, length = run.train.batch_size, run.data.max_length
    total_len = jnp.full(rows, length)
    # An eighth of it prompt, as `bench train` has it; only what bd3 computes depends on that.
    work = OBJECTIVES[run.objective].flop_counts(total_len // 8, total_len, run.diffusion)
    flops = float(train_flops(run.model, *work))
    devices = topology.devices()
    seconds = flops / (len(devices) * peak_flops(devices[0].device_kind))
    mesh = dataclasses.asdict(sharding.sizes(run.mesh, topology.num_devices))
    return (
        f"training step of {rows} x {length} tokens on {topology.name}, "
        f"{topology.num_chips} chips as {mesh}\n"
        f"{flops:.3g} FLOPs if no token is padding, {seconds:.2f} s at the chips' peak"
    )


def describe_decoding(asked: Decoding, topology: Topology) -> str:
    """What is compiled."""
    return (
        f"sampler of {asked.batch_size} x ({asked.prompt_length} + {asked.gen_length}) tokens, weights in "
        f"{asked.weights}, on {topology.name}, {topology.num_chips} chips that share each matrix product"
    )


def _parser() -> config.Parser:
    parser = config.Parser(
        prog="python -m refusion_jax.aot",
        description="Compiles the training step of a run, or the sampler, for TPUs that are not there. "
        "Exits with 0 if it fits in their memory, with 3 if it does not.",
        epilog=config.help_text(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", required=True, help=config.FILE_HELP)
    generations = ", ".join(CHIPS)
    add(
        "--topology",
        metavar="NAME",
        required=True,
        help=f"slice as GENERATION:SHAPE, like v5p:4x4x8; with --decode several, separated by commas, make "
        f"a table; generations are {generations}",
    )
    add("--no_suggestions", action="store_true", help="if it does not fit, do not look for what does")
    add("--decode", action="store_true", help="the sampler instead of the training step; what follows is its")
    whole = {"type": config.whole_number, "metavar": "N"}
    add("--prompt_length", **whole, default=512, help="tokens of a prompt (default %(default)s)")
    add("--gen_length", **whole, default=512, help="most response tokens (default %(default)s)")
    add("--slot_size", **whole, default=32, help="tokens of a slot (default %(default)s)")
    add("--num_blocks", **whole, default=4, help="blocks decoded left to right (default %(default)s)")
    add(
        "--batch_size",
        type=config.whole_numbers,
        metavar="N",
        default="8",
        help="requests decoded together; several numbers, separated by commas, make a table "
        "(default %(default)s)",
    )
    add("--int8", action="store_true", help="weights in int8 instead of bfloat16")
    return parser


def _decodings(flags: argparse.Namespace) -> list[Decoding]:
    """What the flags ask for, one for each batch size."""
    given = {name: getattr(flags, name) for name in Decoding._fields}
    return [Decoding(**given | {"batch_size": number}) for number in flags.batch_size]


def _table(model: ModelConfig, topologies: Sequence[Topology], asked: Sequence[Decoding]) -> int:
    """Prints a row for each slice and batch size; 0 if all fit."""
    print(aot_table.heading(), flush=True)
    fits = []
    for row in aot_table.rows(model, topologies, asked):
        print(row.text, flush=True)
        fits.append(row.fits)
    return 0 if all(fits) else DOES_NOT_FIT


@command
def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    flags, overrides = parser.parse_known_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing is run, and what TPUs there are stay free
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
        print(f"does not fit, by {-left:.2f} GiB; compiling what needs less", flush=True)
        changes = decoding_changes(asked, topology) if flags.decode else training_changes(run, topology)
        found = first_that_fits(changes, lower)
    choices = f"these choices would fit: {found}" if found else "a larger slice or a smaller model may"
    print(f"does not fit, by {-left:.2f} GiB; {choices}")
    return DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
