"""Measures what a machine makes of a configuration, against what its chips can do.

    python -m refusion_jax.bench train --config=configs/qwen3_1p7b.py --devices=1,2,4 --output=bench.json

prints a table with a row for each number of devices, and writes the same figures as JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from refusion_jax import bench_train, config
from refusion_jax.errors import BadInput, command
from refusion_jax.sample import check_output
from refusion_jax.train_step import RunConfig


def train(flags: argparse.Namespace, overrides: Sequence[str]) -> list[dict]:
    """One row of figures for each number of devices of --devices, printed as they come."""
    run = config.load(flags.config, overrides, RunConfig)
    there = len(jax.devices())
    try:
        counts = [int(part) for part in (flags.devices or str(there)).split(",")]
    except ValueError:
        counts = []
    if not counts or not all(1 <= count <= there for count in counts):
        raise BadInput(f"--devices={flags.devices}: must be numbers with commas, 1 to {there}")
    if flags.steps < 1:
        raise BadInput(f"--steps={flags.steps}: must be at least 1")
    rows = []
    print(bench_train.HEADER, flush=True)
    for count in counts:
        row = bench_train.measure(run, jax.devices()[:count], flags.steps, flags.real_data)
        print(bench_train.shown(row), flush=True)
        rows.append(row)
    return rows


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
    add.add_argument("--config", metavar="FILE", required=True, help="Python file with get_config()")
    add.add_argument("--devices", metavar="N,…", help="numbers of devices to use in turn (default all)")
    add.add_argument("--steps", type=int, metavar="N", default=10, help="timed steps (default %(default)s)")
    add.add_argument(
        "--real_data",
        action="store_true",
        help="rows of the configured data (default: full rows of random tokens, an eighth of them prompt)",
    )
    add.add_argument("--output", metavar="FILE", help="the figures as JSON")
    flags, overrides = parser.parse_known_args(arguments)
    check_output("--output", flags.output)
    rows = flags.measure(flags, overrides)
    if flags.output:
        partial = Path(f"{flags.output}.partial")
        partial.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, flags.output)


if __name__ == "__main__":
    sys.exit(main())
