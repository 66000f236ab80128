"""Measures what a machine makes of a configuration, against what its chips can do.

    python -m refusion_jax.bench train --config=configs/qwen3_1p7b.py --devices=1,2,4 --output=bench.json
    python -m refusion_jax.bench decode --config=configs/qwen3_8b.py --batch_size=1,8 --output=bench.json

print a table with a row for each number of devices, or each method and batch size, and write the same
figures as JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from refusion_jax import config, sharding
from refusion_jax.benchmarks import decode as bench_decode
from refusion_jax.benchmarks import table as bench_table
from refusion_jax.benchmarks import train as bench_train
from refusion_jax.decode.replay import read_courses
from refusion_jax.errors import BadInput, command
from refusion_jax.loader import decoding_scope, load
from refusion_jax.sample import check_output
from refusion_jax.serving import flags as opening
from refusion_jax.serving.engine import METHODS, Config
from refusion_jax.training.run import RunConfig

DECODING = {"gen_length": 512, "slot_size": 32, "num_blocks": 4}  # where flags say nothing


def train(flags: argparse.Namespace, overrides: Sequence[str]) -> list[dict]:
    """One row of figures for each number of devices of --devices, printed as they come."""
    run = config.load(flags.config, overrides, RunConfig)
    there = len(jax.devices())
    counts = flags.devices or [there]
    if max(counts) > there:
        raise BadInput(f"--devices must be 1 to the {there} devices there are, found {max(counts)}")
    rows = []
    print(bench_table.header(bench_train.COLUMNS), flush=True)
    for count in counts:
        row = bench_train.measure(run, jax.devices()[:count], flags.steps, flags.real_data)
        print(bench_table.line(bench_train.COLUMNS, row), flush=True)
        rows.append(row)
    return rows


def decode(flags: argparse.Namespace, overrides: Sequence[str]) -> list[dict]:
    """One row of figures for each method and batch size, printed as they come."""
    methods = flags.method.split(",")
    if not set(methods) <= set(METHODS):
        raise BadInput(f"--method={flags.method}: must be of {', '.join(METHODS)}, several with commas")
    if (flags.checkpoint is None) == (flags.config is None):
        raise BadInput("--checkpoint and --config: give one of the two")
    courses = read_courses(Path(flags.replay)) if flags.replay else ()
    asked = {method: asked_config(flags, method) for method in methods}
    opening.use_compilation_cache()
    dtype = opening.DTYPES[flags.dtype]
    mesh = None if flags.tensor == 1 else sharding.tensor_mesh(flags.tensor)
    if flags.checkpoint:
        model, params, _ = load(flags.checkpoint, mesh, dtype, flags.int8)
    else:
        shape = config.load(flags.config, overrides, RunConfig).model
        model, params = bench_decode.arbitrary_model(shape, dtype, mesh, flags.int8)
    bandwidth = bench_decode.memory_bandwidth()
    print(f"{jax.devices()[0].device_kind}, moves {bandwidth / 1e12:.2f} TB/s, jax {jax.__version__}")
    print(bench_table.header(bench_decode.COLUMNS), flush=True)
    rows = []
    for batch in flags.batch_size:
        for method in methods:
            work = bench_decode.Work(method, batch, flags.prompt_length, asked[method], courses, flags.ahead)
            with decoding_scope(model, mesh):
                row = bench_decode.measure(model, params, work, flags.repeats, bandwidth)
            print(bench_table.line(bench_decode.COLUMNS, row), flush=True)
            rows.append(row | {"chip": jax.devices()[0].device_kind, "jax": jax.__version__})
    return rows


def asked_config(flags: argparse.Namespace, method: str) -> Config:
    """How a method decodes: by those of the flags that it knows."""
    known, given = METHODS[method].settings, opening.given_settings(flags)
    settings = {name: value for name, value in (DECODING | given).items() if name in known}
    return METHODS[method].config(bench_decode.MASK_ID, bench_decode.NEVER, **settings)


def add_decode(commands) -> None:
    """The subcommand `decode`."""
    parser = commands.add_parser(
        "decode",
        description="Times decoding. Without a checkpoint weights mean nothing, so does what they accept: "
        "thresholds below 0 accept everything, those from 1 nothing (of mdm and bd3 nothing beyond "
        "tokens_per_step), and --replay what a trained model did. A method passes over flags it does not "
        f"know. Here the defaults are {', '.join(f'{name} {value}' for name, value in DECODING.items())}.",
        allow_abbrev=False,
    )
    parser.set_defaults(measure=decode)
    add, whole = parser.add_argument, {"type": config.whole_number, "metavar": "N"}
    add("--checkpoint", metavar="DIR", help="model folder")
    add("--config", metavar="FILE", help=f"{config.FILE_HELP}, whose model is filled with numbers")
    add("--method", default="refusion,ar", metavar="NAME,…", help="decoders (default %(default)s)")
    several = {"type": config.whole_numbers, "metavar": "N,…"}
    add("--batch_size", **several, default="1", help="requests decoded together (default %(default)s)")
    add("--prompt_length", **whole, default=128, help="tokens a prompt (default %(default)s)")
    opening.add_setting_flags(parser)
    add("--replay", metavar="FILE", help="results of `sample` with traces, whose course the rows follow")
    add("--repeats", **whole, default=5, help="timed runs (default %(default)s)")
    add("--dtype", choices=tuple(opening.DTYPES), default="bfloat16", help="default %(default)s")
    add("--int8", action="store_true", help="int8 weights, a scale for each output channel")
    add("--tensor", type=int, default=1, metavar="N", help="devices that share each product (default 1)")
    add("--output", metavar="FILE", help="the figures as JSON")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = config.Parser(prog="python -m refusion_jax.bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add = commands.add_parser(
        "train",
        description="Times the training step. train.batch_size is that of one device, and the mesh's -1 "
        "takes the devices.",
        epilog=config.help_text(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add.set_defaults(measure=train)
    add.add_argument("--config", metavar="FILE", required=True, help=config.FILE_HELP)
    add.add_argument(
        "--devices",
        type=config.whole_numbers,
        metavar="N,…",
        help="numbers of devices to use in turn (default all)",
    )
    add.add_argument(
        "--steps",
        type=config.whole_number,
        metavar="N",
        default=10,
        help="timed steps (default %(default)s)",
    )
    add.add_argument(
        "--real_data",
        action="store_true",
        help="rows of the configured data (default: full rows of random tokens, an eighth of them prompt)",
    )
    add.add_argument("--output", metavar="FILE", help="the figures as JSON")
    add_decode(commands)
    flags, overrides = parser.parse_known_args(arguments)
    check_output("--output", flags.output)
    rows = flags.measure(flags, overrides)
    if flags.output:
        partial = Path(f"{flags.output}.partial")
        partial.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, flags.output)


if __name__ == "__main__":
    sys.exit(main())
