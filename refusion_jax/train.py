"""Trains a model.

    python -m refusion_jax.train --config=configs/tiny.py --workdir=runs/tiny

Resumes if DIR (--workdir) holds a checkpoint. Writes to DIR: config.yaml (the run), config.json and the
tokenizer (the model), checkpoints/STEP, metrics.csv and TensorBoard events. On SIGTERM it finishes the
current step, saves and exits with 143, the code on which launchers restart; the same command then resumes.
On TPU slices and under SLURM, several processes form one run by themselves; elsewhere --coordinator,
--num_processes and --process_id connect them (see training/processes.py and launch/).
"""

import argparse
import sys
from collections.abc import Sequence

from refusion_jax.errors import command

# Nothing else is imported at the top: processes that prepare data import this module again, and they need
# neither JAX nor the model.


def _parser(epilog: str, coordinator_timeout: int) -> argparse.ArgumentParser:
    from refusion_jax import config

    parser = config.Parser(
        prog="python -m refusion_jax.train",
        description="Trains a model; resumes if --workdir holds a checkpoint. SIGTERM makes it save and exit "
        "with 143.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", required=True, help=config.FILE_HELP)
    parser.add_argument("--workdir", metavar="DIR", required=True, help="folder of the run")
    parser.add_argument(
        "--profile_steps",
        metavar="FIRST:LAST",
        help="steps to trace into DIR/profile, for XProf or TensorBoard (default: none)",
    )
    parser.add_argument(
        "--accept_changed_data",
        action="store_true",
        help="resume although the training examples are not those that the run had",
    )
    several = parser.add_argument_group("several processes (SLURM and TPU slices need no flags)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address at which process 0 listens")
    several.add_argument(
        "--num_processes", metavar="N", type=int, help="number of processes; 1 looks for no others"
    )
    several.add_argument("--process_id", metavar="I", type=int, help="index of this process, from 0")
    several.add_argument(
        "--coordinator_timeout",
        metavar="SECONDS",
        type=int,
        default=coordinator_timeout,
        help="time to wait for all processes (default %(default)s)",
    )
    return parser


@command
def main(arguments: Sequence[str] | None = None) -> int:
    from refusion_jax import config
    from refusion_jax.training import processes
    from refusion_jax.training.loop import run_training
    from refusion_jax.training.profiling import parse_steps
    from refusion_jax.training.run import RunConfig

    parser = _parser(config.help_text(RunConfig), processes.TIMEOUT)
    flags, overrides = parser.parse_known_args(arguments)
    run = config.load(flags.config, overrides, RunConfig)
    profile_steps = range(0)
    if flags.profile_steps is not None:
        profile_steps = parse_steps(flags.profile_steps, run.train.steps)
    with processes.distributed(
        flags.coordinator, flags.num_processes, flags.process_id, flags.coordinator_timeout
    ):
        return run_training(run, flags.workdir, profile_steps, flags.accept_changed_data)


if __name__ == "__main__":
    sys.exit(main())
