"""Runs that look after themselves: numbers that are not finite, one writer, signals, a full disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import Run, config_file, random_batches, run_config  # noqa: F401 (config_file is a fixture)

from refusion_jax import errors
from refusion_jax.checkpoints import orbax_io
from refusion_jax.checkpoints.orbax_io import Checkpoints
from refusion_jax.data.pipeline import DataConfig, load_examples
from refusion_jax.errors import Failed, Stopped
from refusion_jax.interrupt import EXIT_CODE
from refusion_jax.sharding import make_mesh
from refusion_jax.tokenizer import ByteTokenizer
from refusion_jax.train import main
from refusion_jax.training.guard import FEWEST, Guard, Spikes
from refusion_jax.training.lock import sole_writer
from refusion_jax.training.metrics import COLUMNS, truncate
from refusion_jax.training.step import make_program

# Numbers that are not finite


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_that_is_not_finite_changes_only_its_number(microbatches):
    run = run_config(microbatches=microbatches)
    program = make_program(run, make_mesh(run.mesh, jax.devices()[:1]), mask_id=259)
    batches = [
        jax.make_array_from_process_local_data(program.batch_sharding, batch) for batch in random_batches(3)
    ]
    state, metrics = program.step(program.init(), batches[0])
    assert int(metrics["bad_steps"]) == 0

    def broken(state):
        """The state with a norm that makes every activation infinite."""
        params = dict(state.params)
        params["final_norm"] = jax.tree.map(lambda scale: scale * np.inf, params["final_norm"])
        return state.replace(params=params)

    before = jax.tree.map(np.asarray, broken(state))
    after, metrics = program.step(broken(jax.tree.map(jax.numpy.copy, state)), batches[1])
    assert int(metrics["bad_steps"]) == 1 and not np.isfinite(float(metrics["loss"]))
    assert int(after.step) == int(before.step) + 1
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=before.step), before)
    _, metrics = program.step(state, batches[2])
    assert int(metrics["bad_steps"]) == 0


def test_the_guard_stops_after_too_many_in_a_row(tmp_path, capsys):
    guard, ids = Guard(tmp_path, most=3), np.array([[7, -1], [5, 7]], np.int32)
    good, bad = {"bad_steps": 0}, {"bad_steps": 1, "loss": np.float32(np.nan), "grad_norm": np.float32(2)}
    for step, metrics in enumerate([bad, bad, good, bad, bad], start=1):
        guard.look(step, metrics, ids, None)
        assert guard.is_bad == (metrics is bad)
    with pytest.raises(Stopped, match=r"the 3 steps up to 6 .*the last good checkpoint is of step 4"):
        guard.look(6, bad, ids, 4)
    lines = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 5, 6]
    assert lines[0] == {"step": 1, "loss": "nan", "grad_norm": "2.0", "example_ids": [5, 7]}
    # A line for the first of several in a row.
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == ["step 1", "step 4"]


def test_spikes_are_values_far_above_those_before():
    spikes = Spikes()
    usual = [{"loss": 1.0 + 0.1 * (step % 3), "grad_norm": 2.0} for step in range(FEWEST)]
    assert spikes.lines(FEWEST, usual) == []
    assert spikes.lines(FEWEST + 1, [{"loss": 3.4, "grad_norm": 5.9}]) == [
        f"step {FEWEST + 1}: loss 3.4 is 3 times the usual 1.1"
    ]
    assert spikes.lines(FEWEST + 3, [{"loss": 3.4, "grad_norm": 20}, {"loss": np.nan, "grad_norm": 21}]) == [
        f"step {FEWEST + 2}: grad_norm 20 is 10 times the usual 2",
        f"step {FEWEST + 3}: grad_norm 21 is 10 times the usual 2",
    ]


def test_a_run_that_diverges_stops_and_keeps_its_good_checkpoint(config_file, tmp_path, capsys):  # noqa: F811
    flags = [f"--config={config_file}", f"--workdir={tmp_path}", "--config.train.keep=1"]
    assert main([*flags, "--config.train.steps=6"]) == 0
    assert os.listdir(tmp_path / "checkpoints") == ["6"]
    params = orbax_io.saved_params(tmp_path)
    before = jax.tree.map(lambda leaf: leaf.whole(), params)
    capsys.readouterr()
    diverging = ["--config.train.max_bad_steps=4", "--config.optimizer.learning_rate=1e30"]
    assert main([*flags, *diverging, "--config.train.steps=90"]) == 4
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "changes nothing" in told[0] and "last good checkpoint is of step 6" in told[1]
    assert "6" in os.listdir(tmp_path / "checkpoints")
    after = jax.tree.map(lambda leaf: leaf.whole(), orbax_io.saved_params(tmp_path))
    if sorted(os.listdir(tmp_path / "checkpoints")) == ["6"]:
        jax.tree.map(np.testing.assert_array_equal, after, before)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert main([*flags, "--config.train.steps=5"]) == 2
    told = capsys.readouterr().err
    assert f"train.steps: must be at least 6, which {tmp_path} has reached, found 5" in told


# Checkpoints


def saved(folder):
    return sorted(int(name) for name in os.listdir(folder / "checkpoints"))


def test_a_good_checkpoint_outlives_one_that_is_not_proven(tmp_path):
    tree = {"params": {"x": jax.numpy.arange(8.0)}}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, tree, {})
        checkpoints.prove(before=2)
        assert checkpoints.good_step == 1
        checkpoints.save(2, tree, {})
        checkpoints.prove(before=2)  # says nothing of the state after step 2
        assert checkpoints.good_step == 1
    assert saved(tmp_path) == [1, 2]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.good_step == 1
        checkpoints.prove(before=3)
        assert checkpoints.good_step == 2
        checkpoints.save(4, tree, {})
    assert saved(tmp_path) == [2, 4]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.finish()
    assert saved(tmp_path) == [4]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    tree = {"params": {"x": jax.numpy.arange(8.0)}}

    def full(*args, **kwargs):
        raise ValueError(
            f'RESOURCE_EXHAUSTED: Error writing "x/0" in OCDBT database at local file "{tmp_path}": Failed '
            "to write 4 bytes to file 9: No space left on device [os_error_code='28'] [tensorstore_spec='{}']"
        )

    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, tree, {})
        checkpoints.finish()
        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(Failed) as caught:
            checkpoints.save(2, tree, {})
    where = f"{tmp_path}/checkpoints"
    assert str(caught.value) == (
        f"{where}: a checkpoint could not be written (No space left on device); checkpoint 1 is complete"
    )


def test_metrics_of_an_older_version_get_the_new_columns(tmp_path):
    path, old = tmp_path / "metrics.csv", COLUMNS[:-1]
    path.write_text(",".join(old) + "\n" + ",".join(["3"] + ["0.5"] * (len(old) - 1)) + "\n")
    truncate(path, 3)
    header, row = path.read_text().splitlines()
    assert header.split(",") == list(COLUMNS) and row.split(",")[-2:] == ["0.5", ""]


# Data

JSONL = """
import dataclasses
from ml_collections import ConfigDict
from refusion_jax.model.transformer import ModelConfig

def get_config():
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig(260, 1, 16, 2, 1, 8, 32)))
    c.data = ConfigDict({"source": "jsonl", "paths": "none", "max_length": 48})
    c.train = ConfigDict({"steps": 2, "batch_size": 8, "save_every": 2, "log_every": 1})
    return c
"""


def write_jsonl(path: Path, lines: int) -> str:
    rows = [json.dumps({"query": f"question {i}", "response": f"answer {i}"}) for i in range(lines)]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def test_data_are_the_same_by_content(tmp_path, capsys):
    """A moved file is the same; one that grew is not, though its first lines are."""
    (tmp_path / "jsonl.py").write_text(JSONL)

    def train(steps: int, lines: int, name: str, *flags: str) -> int:
        path = write_jsonl(tmp_path / name, lines)
        flags += (f"--config.data.paths={path}", f"--config.train.steps={steps}")
        return main([f"--config={tmp_path / 'jsonl.py'}", f"--workdir={tmp_path / 'run'}", *flags])

    assert train(2, 40, "a.jsonl") == 0
    assert train(3, 40, "moved.jsonl") == 0
    assert "resuming from step 2 of 3" in capsys.readouterr().out
    for lines in (55, 39):
        assert train(4, lines, "a.jsonl") == 4
        told = capsys.readouterr().err
        assert "had 40 examples (SHA-256 " in told and f"found {lines} (" in told
    assert "--accept_changed_data" in told and saved(tmp_path / "run") == [2, 3]
    assert train(4, 55, "a.jsonl", "--accept_changed_data") == 0
    assert train(5, 55, "a.jsonl") == 0


def test_tasks_in_files_are_the_same_by_content(tmp_path):
    def identity(name: str, lines: int):
        tasks = {"text": {"path": write_jsonl(tmp_path / name, lines)}}
        return load_examples(DataConfig(tasks=tasks, max_length=48), ByteTokenizer()).identity

    assert identity("a.jsonl", 40) == identity("b.jsonl", 40) != identity("a.jsonl", 60)


# One writer


def test_a_folder_in_use_is_refused(config_file, tmp_path, capsys):  # noqa: F811
    with sole_writer(tmp_path):
        assert main([f"--config={config_file}", f"--workdir={tmp_path}"]) == 4
    assert f"is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
    with sole_writer(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = (
        "import os, pathlib, signal, sys; from refusion_jax.training.lock import sole_writer\n"
        "with sole_writer(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -signal.SIGKILL
    assert (tmp_path / "run.lock").read_text().startswith("process ")
    with sole_writer(tmp_path):
        pass


# Signals and pipes


def with_interrupts() -> None:
    """For a new process: SIGINT is not ignored there, though it is here in the background of a shell."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupt_saves(config_file, tmp_path):  # noqa: F811
    run = Run(config_file, tmp_path / "run")
    run.wait_for_step(4)
    run.process.send_signal(signal.SIGINT)
    text = run.finish(EXIT_CODE)
    step = orbax_io.latest_step(tmp_path / "run")
    assert f"SIGINT: saving step {step} of 24, run again to go on" in text and "Traceback" not in text
    assert f"resuming from step {step} of 24" in Run(config_file, tmp_path / "run").finish()


def test_an_interrupt_while_compiling_is_one_line(tmp_path):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_LOG_COMPILES": "1"}
    sample = subprocess.Popen(
        [sys.executable, "-m", "refusion_jax.sample", "--prompt=683 - 352 = ?"],
        env=os.environ | cache,
        preexec_fn=with_interrupts,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert any("Compiling" in line for line in sample.stderr)  # reads up to the first such line
    sample.send_signal(signal.SIGINT)
    out, err = sample.communicate(timeout=120)
    assert (sample.returncode, out) == (EXIT_CODE, "")
    assert err.splitlines()[-1] == "interrupted" and "Traceback" not in err


INTERRUPTED = """
import os, signal, sys
from refusion_jax import interrupt
from refusion_jax.files import open_atomically
interrupt.install()
with open_atomically(sys.argv[1]) as file:
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_an_interrupt_leaves_no_temporary_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, tmp_path / "out.json"],
        preexec_fn=with_interrupts,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr, os.listdir(tmp_path)) == (EXIT_CODE, "interrupted\n", [])


@pytest.mark.parametrize(
    ("started", "argv", "expected"),
    [
        (["python", "-m", "refusion_jax.sample", "--prompt=a"], ["-m", "--prompt=a"], True),
        (["python", "-m", "refusion_jax"], ["-m"], True),
        (["python", "/usr/bin/refusion-sample", "--prompt=a"], ["/usr/bin/refusion-sample"], True),
        (["python", "-m", "pytest", "tests"], ["/site/pytest/__main__.py", "tests"], False),
        (["python", "-c", "import refusion_jax"], ["-c"], False),
        (["python"], [""], False),
    ],
)
def test_what_is_a_command(monkeypatch, started, argv, expected):
    from refusion_jax import interrupt

    monkeypatch.setattr(sys, "orig_argv", started)
    monkeypatch.setattr(sys, "argv", argv)
    assert interrupt.is_command() == expected


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash for PIPESTATUS")
def test_a_closed_pipe_is_silent(tmp_path):
    script = tmp_path / "lines.py"
    script.write_text(
        "import sys\nfrom refusion_jax.errors import command\n@command\ndef main():\n"
        "    for i in range(100000): print(i)\nsys.exit(main())\n"
    )
    shell = f'{sys.executable} {script} | head -1; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "0\n", "")


@pytest.mark.parametrize(("error", "code"), [(errors.BadInput, 2), (Stopped, 4), (Failed, 1)])
def test_each_kind_of_error_has_its_code(error, code, capsys):
    @errors.command
    def main():
        raise error("a line\nmore")

    assert main() == code and capsys.readouterr().err == "error: a line more\n"
