"""Times training steps or decoding on this machine, and compares with the limits of its chips.

    python -m refusion_jax.bench train --config=configs/qwen3_1p7b.py --devices=1,2,4 --output=bench.json
    python -m refusion_jax.bench decode --config=configs/qwen3_8b.py --batch_size=1,8 --output=bench.json

print a table, one row per number of devices or per method and batch size, and write the same figures as JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from refusion_jax import config, sharding
from refusion_jax.benchmarks import decode as bench_decode
from refusion_jax.benchmarks import train as bench_train
from refusion_jax.benchmarks.table import Table
from refusion_jax.compilation import use_compilation_cache
from refusion_jax.decode.replay import read_courses
from refusion_jax.errors import BadInput, command
from refusion_jax.files import check_output, write_atomically
from refusion_jax.loader import decoding_scope, load
from refusion_jax.serving.flags import add_setting_flags, given_settings
from refusion_jax.serving.methods import METHODS, Config, default_settings
from refusion_jax.serving.opened import trained_settings
from refusion_jax.training.run import RunConfig

DECODING = {"gen_length": 512, "slot_size": 32, "num_blocks": 4}  # defaults of this command


def train(flags: argparse.Namespace, overrides: Sequence[str]) -> list[dict]:
    """One row of figures per number of devices in --devices, printed as measured."""
    run = config.load(flags.config, overrides, RunConfig)
    available = len(jax.devices())
    counts = flags.devices or [available]
    if max(counts) > available:
        raise BadInput(f"--devices must be 1 to the {available} available devices, found {max(counts)}")
    rows, table = [], Table(bench_train.COLUMNS)
    print(table.header(), flush=True)
    for count in counts:
        row = bench_train.measure(run, jax.devices()[:count], flags.steps, flags.real_data)
        print(table.line(row), flush=True)
        rows.append(row)
    return rows


def decode(flags: argparse.Namespace, overrides: Sequence[str]) -> list[dict]:
    """One row of figures per batch size and method, printed as measured."""
    methods = flags.method.split(",")
    if not set(methods) <= set(METHODS):
        raise BadInput(f"--method={flags.method}: must be of {', '.join(METHODS)}, several with commas")
    if (flags.checkpoint is None) == (flags.config is None):
        raise BadInput("--checkpoint and --config: give one of the two")
    courses = read_courses(Path(flags.replay)) if flags.replay else ()
    asked = {method: asked_config(flags, method) for method in methods}
    use_compilation_cache()
    dtype = jnp.dtype(flags.dtype)
    mesh = None if flags.tensor == 1 else sharding.tensor_mesh(flags.tensor)
    if flags.checkpoint:
        model, params, _ = load(flags.checkpoint, mesh, dtype, flags.int8)
    else:
        shape = config.load(flags.config, overrides, RunConfig).model
        model, params = bench_decode.arbitrary_model(shape, dtype, mesh, flags.int8)
    bandwidth = bench_decode.memory_bandwidth()
    print(f"{jax.devices()[0].device_kind}, copies at {bandwidth / 1e12:.2f} TB/s, jax {jax.__version__}")
    rows, table = [], Table(bench_decode.COLUMNS)
    print(table.header(), flush=True)
    for batch in flags.batch_size:
        for method in methods:
            work = bench_decode.Work(method, batch, flags.prompt_length, asked[method], courses, flags.ahead)
            with decoding_scope(model, mesh):
                row = bench_decode.measure(model, params, work, flags.repeats, bandwidth)
            print(table.line(row), flush=True)
            rows.append(row | {"chip": jax.devices()[0].device_kind, "jax": jax.__version__})
    return rows


def asked_config(flags: argparse.Namespace, method: str) -> Config:
    """Decoding settings of a method: the checkpoint's, DECODING and the flags, where the method has them."""
    known, given = default_settings(method), given_settings(flags)
    settings = {name: value for name, value in (DECODING | given).items() if name in known}
    trained = trained_settings(flags.checkpoint, method) if flags.checkpoint else {}
    return METHODS[method](bench_decode.MASK_ID, bench_decode.NO_EOS, **trained | settings)


def add_decode(commands) -> None:
    """The subcommand `decode`."""
    parser = commands.add_parser(
        "decode",
        description="Times decoding. With --config the weights are meaningless, so thresholds decide what is "
        "accepted: below 0 everything, from 1 on nothing (mdm and bd3: nothing beyond tokens_per_step). "
        "--replay accepts what a trained model accepted. A method ignores flags that it does not have. "
        f"Defaults here: {', '.join(f'{name} {value}' for name, value in DECODING.items())}.",
        allow_abbrev=False,
    )
    parser.set_defaults(measure=decode)
    add, whole = parser.add_argument, {"type": config.whole_number, "metavar": "N"}
    add("--checkpoint", metavar="DIR", help="model folder")
    add("--config", metavar="FILE", help="Python file with get_config(); its model gets meaningless weights")
    add(
        "--method",
        default="refusion,ar",
        metavar="NAME,…",
        help="decoders, each timed in turn (default %(default)s)",
    )
    several = {"type": config.whole_numbers, "metavar": "N,…"}
    add("--batch_size", **several, default="1", help="requests decoded together (default %(default)s)")
    add("--prompt_length", **whole, default=128, help="tokens per prompt (default %(default)s)")
    add_setting_flags(parser)
    add("--replay", metavar="FILE", help="results of `sample` with traces; decoding accepts the same tokens")
    add("--repeats", **whole, default=5, help="timed runs (default %(default)s)")
    add(
        "--dtype",
        choices=config.DTYPES,
        default="bfloat16",
        help="of weights and computation (default %(default)s)",
    )
    add("--int8", action="store_true", help="int8 weights, with one scale per output channel")
    add(
        "--tensor",
        type=int,
        default=1,
        metavar="N",
        help="devices that share each matrix product (default 1)",
    )
    add("--output", metavar="FILE", help="write the figures as JSON")


def add_train(commands) -> None:
    """The subcommand `train`."""
    parser = commands.add_parser(
        "train",
        description="Times the training step. train.batch_size is the number of rows per device, and the "
        "mesh axis of size -1 takes all devices.",
        epilog=config.help_text(RunConfig),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(measure=train)
    add = parser.add_argument
    add("--config", metavar="FILE", required=True, help=config.FILE_HELP)
    several = {"type": config.whole_numbers, "metavar": "N,…"}
    add("--devices", **several, help="numbers of devices, each timed in turn (default: all devices)")
    whole = {"type": config.whole_number, "metavar": "N"}
    add("--steps", **whole, default=10, help="timed steps (default %(default)s)")
    add(
        "--real_data",
        action="store_true",
        help="use rows of the configured data (default: full rows of random tokens, one eighth prompt)",
    )
    add("--output", metavar="FILE", help="write the figures as JSON")


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = config.Parser(prog="python -m refusion_jax.bench", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True, help="train or decode")
    add_train(commands)
    add_decode(commands)
    flags, overrides = parser.parse_known_args(arguments)
    check_output("--output", flags.output)
    rows = flags.measure(flags, overrides)
    if flags.output:
        write_atomically(flags.output, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
