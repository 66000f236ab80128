"""Trains on a TPU slice of Google Kubernetes Engine, with one pod per host of the slice.

    python launch/gke.py --name=tiny --image=IMAGE --tpu=v5p --topology=2x2x4 \\
        --config=configs/tiny.py --workdir=gs://BUCKET/tiny
    python launch/gke.py … --fuse                  # mounts the bucket with Cloud Storage FUSE
    python launch/gke.py … --xpk_cluster=CLUSTER   # through xpk and its queue instead of kubectl
    python launch/gke.py … --dry_run               # prints the commands, manifest included

Requirements: kubectl with the cluster's credentials (or xpk 1.16); in the cluster JobSet, and a node pool of
that TPU and topology with four chips per host; IMAGE, built from launch/Dockerfile; a bucket that
--service_account can read and write (role Storage Object User). With --fuse also the Cloud Storage FUSE CSI
driver in the cluster, and in the bucket a hierarchical namespace, where renaming a checkpoint is atomic. All
other flags are passed to train; FILE is a path in the image, or gs://.

When a pod is evicted or fails, all pods restart from the newest checkpoint, up to --restarts times. An
evicted pod has --grace seconds to save; spot machines leave it less. Exit code 2, input that cannot be used,
ends the run immediately.
"""

import argparse
import math
import re
import shlex
import subprocess
import sys
from typing import Any

import yaml

# --tpu -> (GKE's node label, xpk's name).
TPUS = {
    "v4": ("tpu-v4-podslice", "v4"),
    "v5e": ("tpu-v5-lite-podslice", "v5litepod"),
    "v5p": ("tpu-v5p-slice", "v5p"),
    "v6e": ("tpu-v6e-slice", "v6e"),
}
CHIPS = 4  # per host
CONTAINER = "train"
NO_RESTART = [2, 4, 130]  # exit codes of train: bad input, stopped itself, interrupted
MOUNT = "/gcs"
# No metadata cache: each host must see what another host wrote immediately.
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0"


def main() -> int:
    flags, overrides = _flags()
    bucket, folder = re.fullmatch(r"gs://([^/]+)/?(.*)", flags.workdir).groups()
    workdir = f"{MOUNT}/{bucket}/{folder}" if flags.fuse else flags.workdir
    train = ["python", "-m", "refusion_jax.train", f"--config={flags.config}", f"--workdir={workdir}"]
    train += overrides
    if flags.xpk_cluster:
        return _run(flags.dry_run, *_xpk(flags, bucket, train))
    manifest = jobset(flags, train)
    if flags.fuse:
        mount_bucket(manifest, bucket)
    manifest = yaml.safe_dump(manifest, sort_keys=False, width=1000)
    return _run(flags.dry_run, ["kubectl", "apply", "--filename=-"], text=manifest)


def jobset(flags: argparse.Namespace, train: list[str]) -> dict[str, Any]:
    """The JobSet manifest, jobset.x-k8s.io/v1alpha2."""
    chips = math.prod(map(int, flags.topology.split("x")))
    hosts = max(chips // CHIPS, 1)
    selector = {
        "cloud.google.com/gke-tpu-accelerator": TPUS[flags.tpu][0],
        "cloud.google.com/gke-tpu-topology": flags.topology,
    }
    container = {
        "name": CONTAINER,
        "image": flags.image,
        "command": train,
        "ports": [{"containerPort": 8471}, {"containerPort": 8482}],  # libtpu, JAX's coordinator
        "resources": {"limits": {"google.com/tpu": min(chips, CHIPS)}},
    }
    pod = {
        "serviceAccountName": flags.service_account,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": flags.grace,
        "nodeSelector": selector | ({"cloud.google.com/gke-spot": "true"} if flags.spot else {}),
        "containers": [container],
    }
    stopped = {"containerName": CONTAINER, "operator": "In", "values": NO_RESTART}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,  # JobSet restarts all pods together; a pod never restarts alone
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": stopped}]},
        "template": {"spec": pod},
    }
    give_up = {"name": "stopped", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": flags.name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": flags.restarts, "rules": [give_up]},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }


def mount_bucket(manifest: dict[str, Any], bucket: str) -> None:
    """Adds Cloud Storage FUSE to a JobSet: the bucket as /gcs/BUCKET in each pod."""
    (job,) = manifest["spec"]["replicatedJobs"]
    template = job["template"]["spec"]["template"]
    template["metadata"] = {"annotations": {"gke-gcsfuse/volumes": "true"}}
    attributes = {"bucketName": bucket, "mountOptions": MOUNT_OPTIONS}
    volume = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
    template["spec"]["volumes"] = [{"name": "bucket", "csi": volume}]
    (container,) = template["spec"]["containers"]
    container["volumeMounts"] = [{"name": "bucket", "mountPath": f"{MOUNT}/{bucket}"}]


def _xpk(flags: argparse.Namespace, bucket: str, train: list[str]) -> list[list[str]]:
    storage = [
        *("xpk", "storage", "attach", bucket, f"--cluster={flags.xpk_cluster}", "--type=gcsfuse"),
        *(f"--bucket={bucket}", f"--mount-point={MOUNT}/{bucket}", "--readonly=false", "--auto-mount=false"),
        *("--size=100", f"--mount-options={MOUNT_OPTIONS}"),
    ]
    workload = [
        *("xpk", "workload", "create", f"--workload={flags.name}", f"--cluster={flags.xpk_cluster}"),
        *(f"--tpu-type={TPUS[flags.tpu][1]}-{flags.topology}", f"--docker-image={flags.image}"),
        *([f"--storage={bucket}"] if flags.fuse else []),
        f"--max-restarts={flags.restarts}",
        # xpk already includes 127 to 255, 130 too. 1 is also the code of a process that lost another process.
        "--restart-on-exit-codes=1",
        f"--termination-grace-period-seconds={flags.grace}",
        *(["--spot"] if flags.spot else []),
        f"--command={shlex.join(train)}",
    ]
    return [storage, workload] if flags.fuse else [workload]


def _run(dry_run: bool, *commands: list[str], text: str | None = None) -> int:
    """Runs or prints commands in order until one fails; `text` is their standard input."""
    for command in commands:
        if dry_run:
            print(shlex.join(command) + (f" <<'EOF'\n{text}EOF" if text else ""))
        elif code := subprocess.run(command, input=text, text=True).returncode:
            return code
    return 0


def _flags() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration file for train")
    parser.add_argument("--workdir", required=True, metavar="gs://BUCKET/DIR", help="folder of the run")
    parser.add_argument("--name", required=True, help="name of the JobSet or of the xpk workload")
    parser.add_argument("--image", required=True, help="image with refusion_jax[tpu] installed")
    parser.add_argument("--tpu", required=True, choices=TPUS)
    parser.add_argument("--topology", required=True, help="chip grid of the slice, for example 2x2x4 or 4x4")
    parser.add_argument("--spot", action="store_true", help="use spot machines")
    parser.add_argument(
        "--service_account", default="default", help="Kubernetes service account (default %(default)s)"
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=300,
        metavar="SECONDS",
        help="time to save on eviction (default %(default)s)",
    )
    parser.add_argument(
        "--restarts", type=int, default=10, metavar="N", help="most restarts (default %(default)s)"
    )
    parser.add_argument(
        "--xpk_cluster", default="", metavar="CLUSTER", help="start through xpk in this cluster"
    )
    parser.add_argument(
        "--fuse",
        action="store_true",
        help="mount the bucket with Cloud Storage FUSE; train sees a folder (default: train uses gs://)",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands without running them")
    flags, overrides = parser.parse_known_args()
    for name, pattern in (
        ("workdir", r"gs://[^/]+(/.*)?"),
        ("topology", r"\d+x\d+(x\d+)?"),
        ("name", r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?"),
    ):
        if not re.fullmatch(pattern, getattr(flags, name)):
            parser.error(f"--{name}: must match {pattern}, found {getattr(flags, name)!r}")
    return flags, overrides


if __name__ == "__main__":
    sys.exit(main())
