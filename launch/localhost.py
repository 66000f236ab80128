"""Trains in several processes on this machine, which communicate over loopback.

    python launch/localhost.py --processes=2 --config=configs/tiny.py --workdir=runs/tiny
    python launch/localhost.py --processes=4 --platform=gpu --config=FILE --workdir=DIR

The Python that runs this script needs refusion_jax installed. With --platform=cpu each process has --devices
simulated devices; with --platform=gpu it has --devices GPUs of its own. All other flags are passed to train.

When a process is killed by a signal, or saves after SIGTERM and exits with 143, all processes restart from
the newest checkpoint, up to --restarts times. When one process fails with exit code 1, 2 or 4, all are
stopped, and the script exits with that code. On SIGTERM or Ctrl-C the script makes all processes save and
exits with 143 or 130.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time

PREEMPTED = 128 + signal.SIGTERM  # exit code of a process that got SIGTERM and saved
INTERRUPTED = 128 + signal.SIGINT  # of one that got SIGINT and saved
GRACE = 60  # seconds for the other processes to end after one has ended well


def main() -> int:
    flags, to_train = _flags()
    if flags.dry_run:
        for command, variables in _commands(flags, to_train):
            print(shlex.join(["env", *(f"{name}={value}" for name, value in variables.items()), *command]))
        return 0
    terminated = []
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(PREEMPTED))
    # A terminal sends SIGINT to all processes. To those that it does not reach SIGTERM says the same.
    signal.signal(signal.SIGINT, lambda *_: terminated.append(INTERRUPTED))
    for restart in range(flags.restarts + 1):
        running = [
            subprocess.Popen(command, env=os.environ | variables)
            for command, variables in _commands(flags, to_train)
        ]
        print("localhost: processes", *(process.pid for process in running), file=sys.stderr, flush=True)
        try:
            codes = _wait(running, terminated)
        finally:
            for process in running:
                process.kill()  # the remaining ones wait for a process that is gone
                process.wait()
        code = _outcome(codes)
        if terminated and code == PREEMPTED:
            return terminated[0]
        if code != PREEMPTED:
            return code
        again = (
            f"restart {restart + 1} of {flags.restarts}" if restart < flags.restarts else "no restart left"
        )
        print(f"localhost: processes ended with {codes}: {again}", file=sys.stderr, flush=True)
    return code


def _flags() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration file for train")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument(
        "--processes", type=int, default=2, metavar="N", help="number of processes (default %(default)s)"
    )
    parser.add_argument(
        "--devices", type=int, default=1, metavar="D", help="devices per process (default %(default)s)"
    )
    parser.add_argument(
        "--platform", choices=("cpu", "gpu"), default="cpu", help="kind of devices (default %(default)s)"
    )
    parser.add_argument(
        "--restarts", type=int, default=3, metavar="N", help="most restarts (default %(default)s)"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands without running them")
    flags, to_train = parser.parse_known_args()
    for name, least in (("processes", 1), ("devices", 1), ("restarts", 0)):
        if getattr(flags, name) < least:
            parser.error(f"--{name}: must be at least {least}, found {getattr(flags, name)}")
    return flags, [f"--config={flags.config}", f"--workdir={flags.workdir}", *to_train]


def _commands(flags: argparse.Namespace, to_train: list[str]) -> list[tuple[list[str], dict[str, str]]]:
    """Command and environment variables of each process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"  # a free port, which process 0 binds next
    commands = []
    for index in range(flags.processes):
        variables = {
            "JAX_PLATFORMS": "cuda" if flags.platform == "gpu" else "cpu",
            "JAX_COORDINATOR_BIND_ADDRESS": coordinator,  # by default JAX listens on every network interface
        }
        if flags.platform == "gpu":
            first = index * flags.devices
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + flags.devices)))
        else:
            count = f"--xla_force_host_platform_device_count={flags.devices}"
            variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
        command = [sys.executable, "-m", "refusion_jax.train", *to_train]
        command += [f"--coordinator={coordinator}", f"--num_processes={flags.processes}"]
        commands.append(([*command, f"--process_id={index}"], variables))
    return commands


def _wait(running: list[subprocess.Popen], terminated: list[int]) -> list[int | None]:
    """Exit codes once all processes have ended, one has failed, or GRACE is over; None while one runs."""
    ended_at = None
    told = False
    while True:
        if terminated and not told:
            told = True
            for process in running:
                process.terminate()
        codes = [process.poll() for process in running]
        ended = [code for code in codes if code is not None]
        if len(ended) == len(codes) or not set(ended) <= {0, PREEMPTED, INTERRUPTED}:
            return codes
        if ended:
            ended_at = ended_at or time.monotonic()
            if time.monotonic() > ended_at + GRACE:
                return codes
        time.sleep(0.05)


def _outcome(codes: list[int | None]) -> int:
    """One exit code for all processes: 0 done, PREEMPTED restart, others stop."""
    # JAX aborts a process that lost another one; SIGABRT says nothing about why the other one is gone.
    causes = [code for code in codes if code != -signal.SIGABRT] or codes
    for stops in (2, 4, INTERRUPTED):
        if stops in causes:
            return stops
    if any(code == PREEMPTED or (code is not None and code < 0) for code in causes):
        return PREEMPTED
    return 0 if set(causes) == {0} else 1


if __name__ == "__main__":
    sys.exit(main())
