"""Runs of several processes, started for real, and what the launch scripts of other places would do."""

import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from refusion_jax import checkpoint, processes
from refusion_jax.errors import BadInput
from refusion_jax.train import main

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

CONFIG = """
import dataclasses
from ml_collections import ConfigDict
from refusion_jax.model import ModelConfig

def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig(260, 1, 16, 2, 1, 8, 32)))
    c.data = ConfigDict({"tasks": {"extraction": {"fields": 1, "value_length": 2}}, "max_length": 48})
    c.train = ConfigDict({"steps": 24, "batch_size": 8, "save_every": 3, "log_every": 1, "keep": 2})
    return c
"""


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("launch") / "small.py"
    path.write_text(CONFIG)
    return path


class Run:
    """A run of the training command: under the launcher of this machine, or alone on several devices."""

    def __init__(self, config_file: Path, workdir: Path, *flags: str, alone_on: int = 0):
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(config_file.parent / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_backend_optimization_level=0"
            + (f" --xla_force_host_platform_device_count={alone_on}" if alone_on else ""),
        }
        program = ["-m", "refusion_jax.train"] if alone_on else [LAUNCH / "localhost.py"]
        self.workdir = workdir
        self.process = subprocess.Popen(
            [sys.executable, *program, f"--config={config_file}", f"--workdir={workdir}", *flags],
            env=os.environ | cache,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        path = self.workdir / "metrics.csv"
        while not path.exists() or path.read_text().count("\n") <= step:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.002)

    def finish(self, expected: int = 0) -> str:
        """Waits for the end; stdout followed by stderr."""
        out, err = self.process.communicate(timeout=180)
        assert self.process.returncode == expected, err
        return out + err

    def rows(self) -> np.ndarray:
        """The columns of metrics.csv that must not depend on when a run died."""
        return np.loadtxt(self.workdir / "metrics.csv", delimiter=",", skiprows=1)[:, :7]

    def params(self) -> dict[str, np.ndarray]:
        saved = jax.tree_util.tree_flatten_with_path(checkpoint.saved_params(self.workdir))[0]
        return {jax.tree_util.keystr(key): leaf.whole() for key, leaf in saved}


def assert_same(run: Run, wanted: Run, rtol: float = 0) -> None:
    np.testing.assert_allclose(run.rows(), wanted.rows(), rtol=rtol)
    params, right = run.params(), wanted.params()
    assert params.keys() == right.keys()
    for name, array in right.items():
        np.testing.assert_allclose(params[name], array, rtol=rtol, atol=rtol, err_msg=name)


@pytest.fixture(scope="session")
def two_devices(config_file, tmp_path_factory):
    """One process with two devices."""
    run = Run(config_file, tmp_path_factory.mktemp("alone") / "run", alone_on=2)
    run.finish()
    return run


def test_two_processes_are_one_run_with_two_devices(config_file, two_devices, tmp_path):
    """To the last bit: the gradients of two devices have one sum. Only process 0 speaks."""
    run = Run(config_file, tmp_path / "run", "--processes=2")
    text = run.finish()
    assert_same(run, two_devices)
    assert text.count("parameters on {'data': 2, 'fsdp': 1, 'tensor': 1}, from the start") == 1
    assert text.count("step 24/24") == 1
    assert "restart 1" not in text


def test_a_killed_process_is_started_again_with_the_other(config_file, two_devices, tmp_path):
    run = Run(config_file, tmp_path / "run", "--processes=2", "--restarts=1")
    pids = list(
        map(int, re.match(r"localhost: processes (\d+) (\d+)", run.process.stderr.readline()).groups())
    )
    run.wait_for_step(random.randint(4, 12))
    os.kill(random.choice(pids), signal.SIGKILL)
    text = run.finish()
    assert "-9" in text and "restart 1 of 1" in text
    assert re.search(r"resuming from step \d+ of 24|from the start[^$]*from the start", text)
    assert_same(run, two_devices)


def test_sigterm_makes_all_processes_save_and_end(config_file, tmp_path):
    run = Run(config_file, tmp_path / "run", "--processes=2", "--devices=2")
    run.wait_for_step(4)
    run.process.terminate()
    text = run.finish(checkpoint.PREEMPTED_EXIT_CODE)
    step = checkpoint.latest_step(run.workdir)
    assert text.count(f"SIGTERM: saving step {step} of 24") == 1
    assert run.rows()[-1, 0] == step


def test_four_processes_are_one_run_with_four_devices(config_file, tmp_path):
    """Up to rounding: the sum over four devices depends on who adds first."""
    alone = Run(config_file, tmp_path / "alone", alone_on=4)
    alone.finish()
    run = Run(config_file, tmp_path / "run", "--processes=4")
    run.finish()
    assert_same(run, alone, rtol=1e-6)


def test_an_error_in_one_process_ends_all(config_file, tmp_path):
    """metrics.csv is opened by process 0 alone."""
    (tmp_path / "metrics.csv").write_text("epoch,loss\n")
    run = Run(config_file, tmp_path, "--processes=2")
    text = run.finish(2)
    assert f"error: process 0: {tmp_path}/metrics.csv:1: found 'epoch,loss'" in text
    assert "restart 1" not in text


def localhost():
    spec = importlib.util.spec_from_file_location("localhost", LAUNCH / "localhost.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("codes", "outcome"),
    [
        ([0, 0], 0),
        ([143, 143], 143),
        ([None, -9], 143),
        ([1, -9], 143),
        ([-6, -6], 143),
        ([-6, 1], 1),
        ([-6, 2], 2),
        ([1, None], 1),
        ([0, None], 1),
    ],
)
def test_what_the_ends_of_processes_mean(codes, outcome):
    """A signal kills a process by itself; SIGABRT is also how JAX ends those that miss another one."""
    assert localhost()._outcome(codes) == outcome


# How processes find each other


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=a:1"], "--num_processes: is missing, --coordinator, --num_processes, --process_id"),
        (["--num_processes=2"], "--coordinator: is missing"),
        (["--num_processes=0"], "--num_processes: must be at least 1, found 0"),
        (["--process_id=0"], "--coordinator: is missing"),
        (
            ["--coordinator=a", "--num_processes=2", "--process_id=0"],
            "--coordinator: must be HOST:PORT, found 'a'",
        ),
        (
            ["--coordinator=a:65536", "--num_processes=2", "--process_id=0"],
            "--coordinator: must be HOST:PORT, found 'a:65536'",
        ),
        (
            ["--coordinator=[::1]:80", "--num_processes=2", "--process_id=2"],
            "--process_id: must be from 0 to 1, found 2",
        ),
        (["--coordinator_timeout=0"], "--coordinator_timeout: must be at least 1 second, found 0"),
        (["--process_id=first"], "argument --process_id: invalid int value: 'first'"),
    ],
)
def test_bad_flags_are_one_line(config_file, tmp_path, capsys, flags, message):
    assert main([f"--config={config_file}", f"--workdir={tmp_path}", *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_a_coordinator_that_nobody_reaches_is_one_line(config_file, tmp_path):
    flags = ["--coordinator=127.0.0.1:9", "--num_processes=2", "--process_id=1", "--coordinator_timeout=1"]
    text = Run(config_file, tmp_path, *flags, alone_on=1).finish(1)
    assert text == (
        "error: --coordinator=127.0.0.1:9 --num_processes=2 --process_id=1: "
        "not all processes were there after 1 s\n"
    )


@pytest.fixture
def initialized(monkeypatch):
    """The calls of jax.distributed.initialize, which are not made."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append((args, options)))
    return calls


SLURM = {"SLURM_STEP_NODELIST": "gpu[1-2]", "SLURM_NTASKS": "16", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("environment", "platforms", "arguments", "called"),
    [
        ({}, "cpu", (), None),
        ({}, None, (), None),
        ({}, "tpu,cpu", (), ()),  # what JAX makes of None on a TPU machine
        ({}, "tpu,cpu", (None, 1), None),
        (SLURM, "cpu", (), ()),
        (SLURM, "cpu", (None, 1), None),
        (SLURM | {"SLURM_NTASKS": "1"}, "cpu", (), None),
        ({"SLURM_NTASKS": "16"}, "cpu", (), None),  # in a job but in none of its steps
        (SLURM, "cpu", ("host:80", 2, 1), ("host:80", 2, 1)),
    ],
)
def test_where_processes_look_for_others(monkeypatch, initialized, environment, platforms, arguments, called):
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    here = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        with processes.joined(*arguments):
            pass
    finally:
        jax.config.update("jax_platforms", here)
    assert [args for args, _ in initialized] == ([] if called is None else [called])
    if called:
        assert initialized[0][1]["cluster_detection_method"] == "deactivate"


def test_bad_input_of_a_run_of_its_own_is_raised():
    with pytest.raises(BadInput, match="as it was"), processes.joined():
        raise BadInput("as it was")
