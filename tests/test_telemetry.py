"""What a run tells: work and rates, where the time goes, traces, Weights & Biases."""

import csv
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refusion_jax import train
from refusion_jax.devices import DEVICES, Device, peak_flops
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.model.adapter import Adapter
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.training import flops, metrics, profiling, wall_time
from refusion_jax.training.objectives import OBJECTIVES
from refusion_jax.weights.lora import TARGETS, LoraConfig

ROOT = Path(__file__).parent.parent
SHARES = ("goodput", "input_share", "checkpoint_share", "compile_share")

CONFIG = """
import dataclasses
from ml_collections import ConfigDict
from refusion_jax.model.transformer import ModelConfig

def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig(260, 1, 16, 2, 1, 8, 32)))
    c.data = ConfigDict({"tasks": {"extraction": {"fields": 1, "value_length": 2}}, "max_length": 48})
    c.train = ConfigDict({"steps": 6, "batch_size": 8, "save_every": 3, "log_every": 2})
    return c
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG)
    return path


def rows(folder) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# Work


@pytest.mark.parametrize(
    "config",
    [ModelConfig.tiny(), ModelConfig.smollm2_135m(), ModelConfig.qwen3_8b(), ModelConfig.qwen2p5_7b()],
)
def test_parameters_are_those_of_the_model(config):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens)
    assert flops.num_parameters(config) == sum(leaf.size for leaf in jax.tree.leaves(params))


def work_of(lengths, name="refusion", prompt_len=0) -> float:
    """FLOPs of a step of the tiny model over examples of those lengths, by an objective."""
    lengths = np.asarray(lengths)
    prompts = np.minimum(prompt_len, lengths)
    counts = OBJECTIVES[name].flop_counts(prompts, lengths, DiffusionConfig(block_len=8))
    return float(flops.train_flops(ModelConfig.tiny(), *counts))


def test_work_of_a_step():
    """Against the sum over layers and query positions, written out."""
    config = ModelConfig.tiny()
    work = 0
    for length in (5, 1, 92):
        work += 6 * 140_160 * length
        pairs = length * length / 2  # of a query and a key it may see, as the convention counts them
        work += config.num_layers * 3 * (2 + 2) * pairs * config.num_heads * config.head_dim
    assert work_of([5, 1, 92]) == work_of([5, 1, 92], "ar") == pytest.approx(work, rel=1e-6)
    packed = [[5, 1], [92, 0]]  # two rows with places for two
    assert work_of(packed) == pytest.approx(work, rel=1e-6)


@pytest.mark.parametrize("response", [0, 3, 8, 24, 29])
def test_work_of_the_other_objectives(response):
    """Pairs as the masks have them, but that causality leaves half of a square, as the convention counts."""
    config, prompt = ModelConfig.tiny(), 7
    a_pair = 12 * config.num_layers * config.num_heads * config.head_dim
    length = prompt + response
    assert work_of([length], "mdm") == pytest.approx(6 * 140_160 * length + a_pair * length**2, rel=1e-6)
    of_each = [prompt + min(response, i // 8 * 8 + 8) for i in range(response)]
    pairs = prompt**2 / 2 + 2 * sum(of_each)
    wanted = 6 * 140_160 * (length + response) + a_pair * pairs
    assert work_of([length], "bd3", prompt) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("targets", [("q", "v", "down"), tuple(TARGETS)])
def test_work_of_adapters(targets):
    """4 FLOPs per frozen parameter and token, 6 per parameter of A and B, which are counted."""
    config, rank = ModelConfig.qwen3_0p6b(), LoraConfig(rank=3, targets=targets)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    adapter = Adapter(3, 1.0, targets)
    params = jax.eval_shape(Transformer(config, adapter=adapter).init, jax.random.key(0), tokens, tokens)
    number = sum(leaf.size for leaf in jax.tree.leaves(params)) - flops.num_parameters(config)
    work = float(flops.train_flops(config, jnp.full(2, 100.0), jnp.full(2, 5000.0), rank))
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * 10_000
    assert work == pytest.approx((4 * flops.num_parameters(config) + 6 * number) * 200 + attention, rel=1e-6)


def test_work_of_a_known_measurement():
    """14,544 tokens a second of a 1.7B model, 4096 tokens a row, are 17.2 % of an H200."""
    work = float(flops.train_flops(ModelConfig.qwen3_1p7b(), jnp.full(4, 4096.0), jnp.full(4, 4096.0**2 / 2)))
    assert work / (4 * 4096) * 14_544 / peak_flops("NVIDIA H200") == pytest.approx(0.172, abs=1e-3)


def test_a_packed_row_is_less_work_than_one_long_example():
    assert work_of([40, 40]) < work_of([80])


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "TPU v3", ""])
def test_an_unknown_device_has_no_peak(kind):
    assert peak_flops(kind) is None


# Time


def test_every_second_counts_once(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    wall = wall_time.WallTime()
    for part in ("setup", "step", "input", "step"):
        wall.lap(part)
    assert wall.seconds() == 10
    assert [wall.spent(part) for part in wall.PARTS] == [1, 0, 6, 3, 0]
    assert wall.share("step") == 0.6


class Clock(wall_time.WallTime):
    """One whose seconds are given."""

    def pass_by(self, part: str, seconds: float) -> None:
        self._spent[part] += seconds
        self._lapped += seconds


def step_values(tokens: int) -> dict[str, np.generic]:
    work = {"tokens": np.int32(tokens), "flops": np.float32(8e12 * tokens), "bad_steps": np.int32(0)}
    return {name: np.float32(0.5) for name in metrics.STEP_COLUMNS} | work


def test_a_row_and_the_summary(tmp_path, monkeypatch, capsys):
    """Compiling is in no rate; MFU is work over what all 8 devices could do; empty where unknown."""
    monkeypatch.setitem(DEVICES, jax.devices()[0].device_kind, Device(100e12, 1e12))
    clock = Clock()
    clock.pass_by("setup", 2)
    with metrics.Reporter(tmp_path, 4, 20, clock) as reporter:
        for part, seconds in (("compile", 10), ("step", 6), ("input", 1), ("checkpoint", 1)):
            clock.pass_by(part, seconds)
        reporter.report(8, [step_values(tokens) for tokens in (100, 100, 100, 100)])
    (row,) = rows(tmp_path)
    assert list(row) == list(metrics.COLUMNS)
    wanted = {
        "step": 8,
        "tokens": 100,
        "tokens_per_second": 50,
        "tokens_per_second_per_device": 6.25,
        "step_seconds": 2,
        "tflops_per_second_per_device": 50,
        "mfu": 0.5,
        "seconds": 20,
        "goodput": 0.3,
        "input_share": 0.05,
        "checkpoint_share": 0.05,
        "compile_share": 0.5,
    }
    for name, value in wanted.items():
        assert float(row[name]) == pytest.approx(value, rel=0.02), name
    assert row["peak_memory_bytes"] == ""
    out = capsys.readouterr().out
    assert "tokens/s MFU 50.0 % 0:00:24 left" in out
    summary = "4 steps, 400 tokens, 50 tokens/s MFU 50.0 %, goodput 30.0 % (input 5.0 %, checkpoints 5.0 %"
    assert f"{summary}, compiling 50.0 %)\n" in out


def test_a_run_reports_its_rates_and_shares(config_file, tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    command = f"-m refusion_jax.train --config={config_file} --workdir={tmp_path} --profile_steps=3:4"
    done = subprocess.run(
        [sys.executable, *command.split()],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path)
    assert [row["step"] for row in table] == ["2", "4", "6"]
    for row in table:
        assert row["mfu"] == row["peak_memory_bytes"] == ""  # of a CPU
        shares = [
            float(row[name]) for name in ("goodput", "input_share", "checkpoint_share", "compile_share")
        ]
        assert min(shares) >= 0 and 0 < sum(shares) <= 1.001
        rate = float(row["tokens_per_second"])
        assert rate == pytest.approx(2 * float(row["tokens_per_second_per_device"]), rel=0.01)
    spent = float(table[2]["seconds"]) - float(table[1]["seconds"])
    assert 2 * float(table[2]["step_seconds"]) == pytest.approx(spent, abs=0.01)
    assert float(table[0]["compile_share"]) > float(table[2]["compile_share"]) > 0
    assert float(table[2]["checkpoint_share"]) > 0  # of the save after step 3
    assert re.search(r"\n6 steps, [\d,]+ tokens, [\d,]+ tokens/s, goodput", done.stdout)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert b"train_step" in trace.read_bytes()


# Flags and fields


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "0:3", "4:3", "3:7", "a:b", "1:2:3", "-1:2", "1.0:2"])
def test_steps_to_trace_that_make_no_sense(config_file, tmp_path, capsys, text):
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}", f"--profile_steps={text}"]
    assert train.main(flags) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"--profile_steps={text}: must be FIRST:LAST" in err and "LAST <= 6" in err
    assert not (tmp_path / "run").exists()


def test_steps_to_trace():
    assert list(profiling.parse_steps("10:13", 20)) == [10, 11, 12, 13]
    assert list(profiling.parse_steps("20:20", 20)) == [20]


@pytest.mark.long
def test_a_trace_that_a_run_breaks_off_is_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), profiling.Profile(tmp_path, range(1, 9)) as profile:
        profile.before(1, None)
        raise KeyboardInterrupt
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_weights_and_biases_that_is_not_installed(config_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}", "--config.train.wandb_project=mine"]
    assert train.main(flags) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "train.wandb_project: is 'mine', but the package wandb is not" in err
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = set()
    for step in (1, 2):  # the second goes on with the first's curves
        with metrics.Reporter(tmp_path, step - 1, 2, Clock(), "mine", {"train": {"steps": 2}}) as reporter:
            reporter.report(step, [step_values(10)])
        ids.add((tmp_path / "wandb_id.txt").read_text())
    assert len(ids) == 1
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids.pop()}"))) == 2


def test_without_weights_and_biases_its_package_is_not_imported(tmp_path):
    imported = "wandb" in sys.modules
    with metrics.Reporter(tmp_path, 0, 2, Clock()):
        assert ("wandb" in sys.modules) == imported
