"""Training: the same numbers on every mesh, in every number of parts, and after every kind of death."""

import contextlib
import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from whole_params import load_params, stack_layers

from refusion_jax import load
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.checkpoints import orbax_io as checkpoint
from refusion_jax.data.pipeline import DataConfig
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import ModelConfig
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.train import main
from refusion_jax.training import metrics
from refusion_jax.training.loop import first_state
from refusion_jax.training.optimizer import OptimizerConfig
from refusion_jax.training.run import RunConfig, TrainConfig, worker_examples
from refusion_jax.training.signals import PREEMPTED_EXIT_CODE
from refusion_jax.training.step import make_program

ROOT = Path(__file__).parent.parent
MODEL = ModelConfig(260, 2, 16, 2, 2, 8, 32)
DATA = DataConfig(tasks={"extraction": {"fields": 1, "value_length": 2}}, max_length=48)

CONFIG = """
import dataclasses
from ml_collections import ConfigDict
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import ModelConfig

def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig(260, 1, 16, 2, 1, 8, 32)))
    c.data = ConfigDict({"tasks": {"extraction": {"fields": 1, "value_length": 2}}, "max_length": 48})
    c.train = ConfigDict({"steps": 24, "batch_size": 8, "save_every": 3, "log_every": 1, "keep": 2})
    return c
"""


def run_config(mesh=(1, 1, 1), model=MODEL, **changes) -> RunConfig:
    fields = {"steps": 5, "batch_size": 16, "save_every": 100, "log_every": 1} | changes
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)
    return RunConfig(
        model, DATA, TrainConfig(**fields), DiffusionConfig((4, 8)), optimizer, MeshConfig(*mesh)
    )


def random_batches(
    count: int, rows: int = 16, length: int = 48, symbols: int = 256
) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    batches = []
    for number in range(count):
        prompt = rng.integers(3, 12, rows)
        batch = {
            "tokens": rng.integers(0, symbols, (rows, length)),
            "prompt_len": prompt,
            "total_len": prompt + rng.integers(1, length - 12, rows),
            "example_id": number * rows + np.arange(rows),
        }
        batches.append({name: array.astype(np.int32) for name, array in batch.items()})
    return batches


def take_steps(run: RunConfig, params=None, count: int = 5, symbols: int = 256):
    """(first state's parameters, metrics of each step, compiled step) on the run's mesh."""
    sizes = dataclasses.astuple(run.mesh)
    mesh = make_mesh(run.mesh, jax.devices()[: np.prod(sizes)])
    program = make_program(run, mesh, mask_id=259)
    if params is None:
        state = program.init.lower().compile()()
    else:
        state = program.start.lower(program.state.base).compile()(
            jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, program.state.base)
        )
    first = jax.tree.map(np.asarray, state.params)
    for leaf, like in zip(jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True):
        assert leaf.sharding == like.sharding
    batches = random_batches(count, symbols=symbols)
    batches = [jax.make_array_from_process_local_data(program.batch_sharding, batch) for batch in batches]
    step = program.step.lower(program.state, batches[0]).compile()
    taken = []
    for batch in batches:
        state, values = step(state, batch)
        taken.append({name: float(value) for name, value in values.items()})
    return first, taken, step


@pytest.fixture(scope="module")
def alone():
    """One device, one part, layers in a row: what every other way must agree with."""
    return take_steps(run_config())


def assert_agree(taken, wanted):
    for found, right in zip(taken, wanted, strict=True):
        for name, value in right.items():
            # Adam divides tiny gradients by themselves, which blows up their rounding errors.
            assert found[name] == pytest.approx(value, rel=1e-4 if name == "grad_norm" else 1e-5), name


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_meshes_agree(alone, mesh):
    first, taken, _ = take_steps(run_config(mesh))
    jax.tree.map(np.testing.assert_array_equal, first, alone[0])
    assert_agree(taken, alone[1])
    losses = [values["loss"] for values in taken]
    assert len(set(losses)) == len(losses)  # it does learn, and draws new noise


def test_operations_are_named_by_phase(alone):
    """So that a profile reads like the code."""
    names = set(re.findall(r'op_name="jit\(train_step\)/([^"]*)"', alone[2].as_text()))
    for phase in ("noise/", "gradients/jvp(forward)/", "gradients/transpose(jvp(forward))/", "update/"):
        assert any(name.startswith(phase) for name in names), phase
    assert any("(loss)" in name for name in names)


def test_microbatches_add_up(alone):
    """Rows are cut so that none leaves its device: gradients are all that is exchanged."""
    _, taken, step = take_steps(run_config((4, 1, 1), microbatches=4))
    assert_agree(taken, alone[1])
    text = step.as_text()
    assert "all-reduce" in text
    for moved in ("all-to-all", "collective-permute", "all-gather"):
        assert moved not in text


@pytest.mark.parametrize("objective", ["ar", "mdm", "bd3"])
@pytest.mark.long
def test_other_objectives_train_alike_on_a_mesh_and_in_parts(objective):
    run = dataclasses.replace(run_config(steps=20), objective=objective)
    _, taken, _ = take_steps(run, count=20, symbols=8)
    train = dataclasses.replace(run.train, microbatches=2, remat="full", loss_chunks=2)
    spread = dataclasses.replace(run, mesh=MeshConfig(2, 2, 2), train=train)
    assert_agree(take_steps(spread, count=3, symbols=8)[1], taken[:3])
    losses = [values["loss"] for values in taken]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])  # it learns which tokens there are
    absent = "diffusion_loss" if objective == "ar" else "ar_loss"
    assert all(values[absent] == 0 for values in taken)


def test_scanned_layers_agree_with_layers_in_a_row(alone):
    run = run_config((2, 2, 2), scan_layers=True, remat="full")
    _, taken, _ = take_steps(run, params=stack_layers(alone[0]))
    assert_agree(taken, alone[1])


def test_bfloat16_computes_on_float32_parameters():
    run = run_config(dtype="bfloat16")
    program = make_program(run, make_mesh(run.mesh, jax.devices()[:1]), mask_id=259)
    assert {leaf.dtype for leaf in jax.tree.leaves(program.state.params)} == {np.dtype("float32")}
    text = program.step.lower(program.state, random_batches(1)[0]).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "x260x" in line]
    assert products and all("bf16" in line for line in products)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_starts_from_a_hugging_face_folder(scan_layers):
    folder = ROOT / "tests" / "data" / "oracle" / "tiny_a"
    model = hf.read_config(folder)
    run = run_config((2, 2, 2), model=model, init_from=str(folder), scan_layers=scan_layers)
    program = make_program(run, make_mesh(run.mesh), mask_id=3)
    state = first_state(run, program)
    wanted = load_params(folder, model)
    wanted = stack_layers(wanted) if scan_layers else wanted
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, program.state)
    other = dataclasses.replace(run, model=dataclasses.replace(model, mlp_dim=64))
    with pytest.raises(BadInput, match=r"model.mlp_dim: is 64, the model in .*tiny_a has 256"):
        first_state(other, program)


def test_schedule_and_decay_mask():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    rates = [float(config.schedule(12)(step)) for step in range(13)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates[8] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates[12] == pytest.approx(0.2)
    params = {
        "a": {"q": np.ones((2, 2), "f4"), "q_bias": np.ones(2, "f4")},
        "norm": {"scale": np.ones((3, 2), "f4")},
    }
    optimizer = OptimizerConfig(learning_rate=1.0, weight_decay=0.5).transformation(10)
    nothing = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    assert float(updates["a"]["q"][0, 0]) == pytest.approx(-0.5)
    assert not updates["a"]["q_bias"].any() and not updates["norm"]["scale"].any()


def test_metrics_that_a_killed_run_left(tmp_path):
    path = tmp_path / "metrics.csv"
    header = ",".join(metrics.COLUMNS)
    metrics.truncate(path, 0)
    assert path.read_text() == header + "\n"
    for rows, step, kept in [
        ("2,0.5\n4,0.25\n6,0.125\n", 4, "2,0.5\n4,0.25\n"),
        ("2,0.5\n4,0.2", 4, "2,0.5\n"),
        ("2,0.5\n4,0.25\n", 9, "2,0.5\n4,0.25\n"),
    ]:
        path.write_text(f"{header}\n{rows}")
        metrics.truncate(path, step)
        assert path.read_text() == f"{header}\n{kept}"
    for text in ("epoch,loss\n1,2\n", f"{header}\none,2\n"):
        path.write_text(text)
        with pytest.raises(BadInput, match=r"metrics\.csv:[12]: found"):
            metrics.truncate(path, 1)
        assert path.read_text() == text


# Real processes


@pytest.fixture(scope="session")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG)
    return path


def rows(workdir: Path) -> list[list[str]]:
    """The columns of metrics.csv that must not depend on when a run died."""
    lines = (workdir / "metrics.csv").read_text().splitlines()
    return [line.split(",")[:7] for line in lines]


def run_here(config_file: Path, workdir: Path, capsys) -> str:
    """What the command prints, in this process, on its 8 devices."""
    assert main([f"--config={config_file}", f"--workdir={workdir}"]) == 0
    return capsys.readouterr().out


class Run:
    """A run of the command in its own process."""

    def __init__(
        self, config_file: Path, workdir: Path, devices: int = 1, code: str = "", log_compiles=False
    ):
        # Of two counts the last one holds; else programs are compiled here as there.
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        program = ["-m", "refusion_jax.train"] if not code else ["-c", code]
        log = {"JAX_LOG_COMPILES": str(int(log_compiles))}
        self.workdir = workdir
        self.process = subprocess.Popen(
            [sys.executable, *program, f"--config={config_file}", f"--workdir={workdir}"],
            env=os.environ | log | {"XLA_FLAGS": flags},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rows(self) -> list[list[str]]:
        return rows(self.workdir)

    def wait_for_step(self, step: int) -> None:
        while self.process.poll() is None:
            with contextlib.suppress(FileNotFoundError):
                if (self.workdir / "metrics.csv").read_text().count("\n") > step:
                    return
            time.sleep(0.002)
        pytest.fail(f"ended before step {step}: {self.process.communicate()}")

    def finish(self, expected: int = 0) -> str:
        """Waits for the end; stdout followed by stderr."""
        out, err = self.process.communicate(timeout=120)
        assert self.process.returncode == expected, err
        return out + err


@pytest.fixture(scope="session")
def finished(config_file, tmp_path_factory):
    """A run on one device that nothing interrupted."""
    run = Run(config_file, tmp_path_factory.mktemp("finished") / "run", log_compiles=True)
    run.log = run.finish()
    return run


def test_what_a_run_leaves(finished):
    """One compilation of the step, and all that the contract names."""
    assert finished.log.count("Finished XLA compilation of jit(train_step)") == 1
    folder = finished.workdir
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert lines[0].startswith("step,loss,ar_loss,diffusion_loss,grad_norm,learning_rate,")
    assert [line.split(",")[0] for line in lines[1:]] == [str(step) for step in range(1, 25)]
    first, last = (
        dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in (lines[1], lines[-1])
    )
    assert float(last["loss"]) < float(first["loss"])  # it learns
    assert sorted(os.listdir(folder / "checkpoints")) == ["21", "24"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["batch_size"] == 8
    assert list(folder.glob("events.out.tfevents.*"))
    model, params, tokenizer = load(folder)
    assert model.config.mlp_dim == 32 and tokenizer.mask_id == 259
    assert params["layers_0"]["mlp"]["gate_up"].shape == (16, 2, 32)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.long), 8])
def test_a_run_that_dies_goes_on_to_the_last_bit(config_file, finished, tmp_path, capsys, devices):
    whole = finished.workdir
    if devices == 8:
        whole = tmp_path / "whole"
        run_here(config_file, whole, capsys)

    folder = tmp_path / "broken"
    killed_at = random.randint(1, 10)
    killed = Run(config_file, folder, devices)
    killed.wait_for_step(killed_at)
    killed.process.kill()
    killed.finish(-signal.SIGKILL)
    with open(folder / "metrics.csv", "a") as file:
        file.write("25,0.1")  # what a kill in the middle of a row leaves
    step = checkpoint.latest_step(folder)

    if devices == 1:
        reached = int(killed.rows()[-2][0])
        stopped = Run(config_file, folder, devices)
        stopped.wait_for_step(reached + random.randint(1, 6))
        stopped.process.send_signal(signal.SIGTERM)
        text = stopped.finish(PREEMPTED_EXIT_CODE)
        assert ("from the start" if step is None else f"resuming from step {step} of 24") in text
        step = checkpoint.latest_step(folder)
        assert stopped.rows()[-1][0] == str(step)
        assert f"SIGTERM: saving step {step} of 24" in text

    text = run_here(config_file, folder, capsys) if devices == 8 else Run(config_file, folder).finish()
    assert ("from the start" if step is None else f"resuming from step {step} of 24") in text
    assert rows(folder) == rows(whole), f"killed at step {killed_at}, resumed from {step}"
    assert sorted(os.listdir(folder / "checkpoints")) == ["21", "24"]


def test_a_run_described_by_the_config_yaml_of_another(config_file, tmp_path, capsys):
    """The same losses in a folder of its own; in the first folder it resumes, with overrides as always."""
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--config.train.steps=2", "--config.diffusion.slot_sizes=4,8", "--config.model.rope_scaling"]
    flags[-1] += "={'rope_type': 'linear', 'factor': 2.0}"
    assert main([f"--config={config_file}", f"--workdir={first}", *flags]) == 0
    described = first / "config.yaml"
    capsys.readouterr()
    run_here(described, second, capsys)
    assert rows(second) == rows(first)
    assert (second / "config.yaml").read_text() == described.read_text()
    assert main([f"--config={described}", f"--workdir={first}", "--config.train.steps=3"]) == 0
    assert "resuming from step 2 of 3" in capsys.readouterr().out
    assert len(rows(first)) == 4


@pytest.mark.parametrize("objective", ["ar", "mdm", "bd3"])
@pytest.mark.long
def test_a_run_of_another_objective_goes_on_to_the_last_bit(tmp_path, objective):
    fields = {"objective": objective, "data.eos_multiple": 8, "diffusion.block_len": 4, "train.steps": 7}
    (tmp_path / "small.py").write_text(CONFIG)
    flags = [f"--config={tmp_path / 'small.py'}", f"--workdir={tmp_path / 'run'}"]
    flags += [f"--config.{name}={value}" for name, value in fields.items()]
    assert main(flags) == 0
    folder = tmp_path / "run"
    whole = (folder / "metrics.csv").read_text().splitlines()
    assert sorted(os.listdir(folder / "checkpoints")) == ["6", "7"]
    shutil.rmtree(folder / "checkpoints" / "7")
    assert main(flags) == 0
    again = (folder / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[:7] for line in again] == [line.split(",")[:7] for line in whole]
    described = json.loads((folder / "config.json").read_text())
    assert described["objective"] == objective
    assert described.get("block_len") == (4 if objective == "bd3" else None)
    assert yaml.safe_load((folder / "config.yaml").read_text())["objective"] == objective


@pytest.mark.long
def test_a_packed_run_that_dies_goes_on_to_the_last_bit(tmp_path, capsys):
    source = tmp_path / "source.jsonl"
    lines = [json.dumps({"query": "q" * (i % 11 + 1), "response": str(i)}) for i in range(50)]
    source.write_text("\n".join(lines))
    data = {"source": "jsonl", "paths": str(source), "max_length": 48, "packing": True, "examples_per_row": 8}
    packed = tmp_path / "packed.py"
    old = CONFIG[CONFIG.index('{"tasks"') : CONFIG.index(")\n    c.train")]
    packed.write_text(CONFIG.replace(old, repr(data)).replace('"steps": 24', '"steps": 12'))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert "rows of 48 tokens: 5.0 examples, 89.0% used" in run_here(packed, whole, capsys)
    killed = Run(packed, broken, devices=8)
    killed.wait_for_step(5)  # some epochs on
    killed.process.kill()
    killed.finish(-signal.SIGKILL)
    step = checkpoint.latest_step(broken)
    text = run_here(packed, broken, capsys)
    assert ("from the start" if step is None else f"resuming from step {step} of 12") in text
    assert rows(broken) == rows(whole)
    header, *lines = (whole / "metrics.csv").read_text().splitlines()
    padding = [float(line.split(",")[header.split(",").index("padding")]) for line in lines]
    assert len(padding) == 12 and max(padding) < 0.2


TWO_PROCESSES = """
import sys
import jax
jax.distributed.initialize("localhost:{port}", 2, {index})
from refusion_jax.train import main
from refusion_jax.training.loop import first_state
sys.exit(main(sys.argv[1:]))
"""


# The start of a data worker: it imports the command again and unpickles the function that opens the examples.
WORKER = """
import pickle, runpy, sys
runpy.run_module("refusion_jax.train", run_name="__mp_main__")
print(*(name for name in sys.modules if name.partition(".")[0] in ("jax", "flax", "grain", "orbax", "yaml")))
open_examples = pickle.load(sys.stdin.buffer)
print(*(name for name in sys.modules if name.startswith(("flax", "optax", "refusion_jax.training"))))
print(len(open_examples()[0]["tokens"]))
"""


def test_data_workers_import_neither_model_nor_training():
    run = dataclasses.replace(run_config(), data=DATA)
    pickled = pickle.dumps(worker_examples(run))
    done = subprocess.run([sys.executable, "-c", WORKER], input=pickled, cwd=ROOT, capture_output=True)
    assert (done.stdout.decode(), done.stderr) == ("\n\n48\n", b"")


@pytest.mark.long
def test_two_processes_save_together_when_one_is_told_to_stop(config_file, finished, tmp_path):
    def start():
        port = random.randint(20000, 60000)
        code = [TWO_PROCESSES.format(port=port, index=index) for index in range(2)]
        return [Run(config_file, tmp_path / "run", 2, text) for text in code]

    stopped = start()
    stopped[0].wait_for_step(5)
    stopped[1].process.send_signal(signal.SIGTERM)
    for run in stopped:
        run.finish(PREEMPTED_EXIT_CODE)
    step = checkpoint.latest_step(tmp_path / "run")
    assert 5 <= step < 24
    resumed = start()
    assert f"resuming from step {step} of 24" in resumed[0].finish()
    assert "resuming" not in resumed[1].finish()
    assert [row[0] for row in resumed[0].rows()[1:]] == [str(step) for step in range(1, 25)]

    for row, wanted in zip(resumed[0].rows()[1:], finished.rows()[1:], strict=True):
        assert list(map(float, row)) == pytest.approx(list(map(float, wanted)), rel=1e-4)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.no_such=1"], "--config.no_such: no such field"),
        (["--config.train.steps=many"], "--config.train.steps: must be int, found 'many'"),
        (["--config.train.steps=0"], "train.steps must be at least 1, got 0"),
        (["--config.train.dtype=float64"], "train.dtype must be one of float32, bfloat16, got 'float64'"),
        (["--config.train.batch_size=12"], "train.batch_size must be a multiple of 8"),
        (["--config.train.microbatches=3"], "train.batch_size must be a multiple of 24"),
        (["--config.mesh.data=3"], "mesh: data=3, fsdp=1, tensor=1 must multiply to the 8 available devices"),
        (["--config.model.vocab_size=259"], "model.vocab_size: must be above 259"),
        (["--config.train.tokenizer=/no/such"], "/no/such: no tokenizer found"),
        (["--config.train.init_from=/no/such"], "/no/such"),
        (["--config.objective=mlm"], "objective: must be one of refusion, ar, mdm, bd3, found 'mlm'"),
        (
            ["--config.objective=bd3", "--config.data.eos_multiple=48"],
            "data.eos_multiple: must be 1 or a multiple of diffusion.block_len, 32, found 48",
        ),
        (["--config.data.eos_multiple=0"], "data.eos_multiple is 0, expected 1 or more"),
        (["--config.data.eos_extra_blocks=-1"], "data.eos_extra_blocks is -1, expected 0 or more"),
        (["--steps=3"], "--steps=3: no such flag"),
        (["--config=/no/such.py"], "--config=/no/such.py: no such file"),
        (
            ["--workdir=s3://bucket/run"],
            "s3://bucket/run: files are read from local disks and from gs:// only",
        ),
        (["--workdir=/dev/null/run"], "--workdir=/dev/null/run: cannot be made"),
    ],
)
def test_bad_input_is_one_line(config_file, tmp_path, capsys, arguments, message):
    code = main([f"--config={config_file}", f"--workdir={tmp_path / 'run'}", *arguments])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "run").exists()


def test_missing_flags_and_help(capsys):
    assert main(["--config=x.py"]) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --workdir; see --help\n"
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "--workdir",
        "--config.train.steps=INT  number of updates of the whole run (required)",
        "(default 1e-08)",
    ):
        assert part in text


@pytest.mark.parametrize(
    "field",
    [
        "model.mlp_dim=64",
        "train.scan_layers=True",
        "train.seed=3",
        "data.max_length=50",
        "data.eos_multiple=2",
        "objective='ar'",
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_folder_with_another_run(config_file, finished, tmp_path, capsys, field, old):
    """Also one from before objectives and responses that are filled up, which says nothing of them."""
    stored = yaml.safe_load((finished.workdir / "config.yaml").read_text())
    folder = finished.workdir
    if old:
        folder = tmp_path / "run"
        subprocess.run(["cp", "-r", finished.workdir, folder], check=True)
        del stored["objective"], stored["data"]["eos_multiple"], stored["data"]["eos_extra_blocks"]
        (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    name, value = field.split("=")
    flag = f"--config.{name}={value.strip(chr(39))}"
    assert main([f"--config={config_file}", f"--workdir={folder}", flag]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"{name}: is {value}, the run in {folder} has" in err


def test_a_folder_with_somebody_elses_model(config_file, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main([f"--config={config_file}", f"--workdir={tmp_path}"]) == 2
    assert "holds a model that no run wrote" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_finished_run_has_nothing_left_to_do(config_file, finished, capsys):
    path = finished.workdir / "metrics.csv"
    before = path.read_text()
    assert "resuming from step 24 of 24" in run_here(config_file, finished.workdir, capsys)
    assert path.read_text() == before


def test_a_damaged_checkpoint_is_one_line(config_file, finished, tmp_path, capfd):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", finished.workdir, folder], check=True)
    for path in (folder / "checkpoints" / "24" / "params" / "d").iterdir():
        path.unlink()
    assert main([f"--config={config_file}", f"--workdir={folder}"]) == 0
    out, err = capfd.readouterr()
    assert "resuming from step 21 of 24" in out and err.count("\n") == 1
    assert f"{folder}/checkpoints/24" in err and err.endswith(": set aside\n")
