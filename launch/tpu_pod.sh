#!/usr/bin/env bash
# Trains on a TPU slice of Compute Engine, with one process per machine, through a queued resource.
#
#   launch/tpu_pod.sh --name=tiny --zone=us-east5-a --accelerator_type=v5p-32 \
#     --runtime_version=v2-alpha-tpuv5 --spot --config=configs/tiny.py --workdir=gs://BUCKET/tiny
#
#   --project=NAME  Google Cloud project (default: that of `gcloud config`)
#   --restarts=N    restart at most N times (default 10)
#   --delete        delete the slice at the end; without this flag it stays and costs money
#   --fuse          mount the bucket with Cloud Storage FUSE; train then sees a folder instead of gs://
#   --dry_run       print the commands of a run without failures
#   All other flags are passed to train. The newest commit of this clone runs; FILE is a path in it.
#
# Requirements: gcloud, logged in; this script must keep running during training. The machines' service
# account needs the role Storage Object User for the bucket. With --fuse the bucket needs a hierarchical
# namespace, where renaming a checkpoint is atomic. Any other --workdir must be on a disk that all machines
# already mount.
#
# When the slice is preempted, it is deleted, requested again and set up, and the run resumes from the newest
# checkpoint. When processes are killed on a slice that stays, they restart. Exit code 1 or 2 of training ends
# the script with that code.
set -euo pipefail

name='' zone='' project='' accelerator_type='' runtime_version='' config='' workdir=''
restarts=10 spot='' delete='' fuse='' dry_run='' overrides=()
for flag in "$@"; do
  case $flag in
    --name=* | --zone=* | --project=* | --accelerator_type=* | --runtime_version=* | --config=* | --workdir=* | --restarts=*)
      variable=${flag%%=*}
      printf -v "${variable#--}" '%s' "${flag#*=}"
      ;;
    --spot | --delete | --fuse | --dry_run) printf -v "${flag#--}" yes ;;
    *) overrides+=("$flag") ;;
  esac
done
for variable in name zone accelerator_type runtime_version config workdir; do
  [[ ${!variable} ]] || { echo "error: --$variable: is missing" >&2; exit 2; }
done
[[ $restarts =~ ^[0-9]+$ ]] || { echo "error: --restarts: must be a number, found '$restarts'" >&2; exit 2; }

where=("--zone=$zone" ${project:+"--project=$project"})
bundle=${TMPDIR:-/tmp}/refusion_jax.tar.gz

run() {
  if [[ $dry_run ]]; then printf '%q ' "$@" && echo; else "$@"; fi
}

on_all() { # runs shell code on every machine
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

delete_slice() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' \
    2>/dev/null || echo MISSING
}

# Returns when the slice is active; requests it when it is missing or was preempted.
await_slice() {
  local create=(gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}"
    "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" ${spot:+--spot})
  if [[ $dry_run ]]; then
    run "${create[@]}"
    run gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
    return
  fi
  local now
  while true; do
    now=$(state)
    echo "slice $name: $now" >&2
    case $now in
      ACTIVE) return ;;
      MISSING) "${create[@]}" ;;
      FAILED | SUSPENDING | SUSPENDED) delete_slice ;;
    esac
    sleep 30
  done
}

# The quoted lines run on the machines; their variables are expanded there.
# shellcheck disable=SC2016
set_up() {
  run git -C "$(dirname "$0")/.." archive --format=tar.gz "--output=$bundle" HEAD || return
  run gcloud compute tpus tpu-vm scp "$bundle" "$name:refusion_jax.tar.gz" "${where[@]}" --worker=all || return
  on_all 'set -e
mkdir -p refusion_jax && tar -xzf refusion_jax.tar.gz -C refusion_jax
python3 -m pip install --user --quiet uv
~/.local/bin/uv venv --quiet --allow-existing --python=3.12 venv
~/.local/bin/uv pip install --quiet --python=venv/bin/python "./refusion_jax[tpu,gcs]"' || return
  [[ $bucket ]] || return 0
  # No metadata cache: each machine must see what another machine wrote immediately.
  on_all 'set -e
if ! command -v gcsfuse >/dev/null; then
  curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
  echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install -y gcsfuse
fi
sudo mkdir -p '"$mount"' && sudo chown "$USER" '"$mount"'
mountpoint -q '"$mount"' || gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 '"$bucket $mount"
}

# Trains on all machines; returns 0 done, 1, 2, 4 or 130 stopped, 143 restart.
train() {
  local command codes stopped
  command=$(printf '%q ' ../venv/bin/python -m refusion_jax.train "--config=$config" "--workdir=$folder" \
    ${overrides[@]+"${overrides[@]}"})
  # Processes left over from a lost connection hold the TPU. The brackets keep the pattern from matching itself.
  on_all 'pkill -9 -f "[p]ython -m refusion_jax.train"; rm -f exit_code' || return 143
  # gcloud does not report the exit code of each machine.
  if on_all "cd refusion_jax && $command; code=\$?; echo \$code >~/exit_code; exit \$code"; then return 0; fi
  [[ $(state) == ACTIVE ]] || return 143
  codes=$(on_all 'cat exit_code' 2>/dev/null) || true
  for stopped in 2 4 130; do
    if grep -qx "$stopped" <<<"$codes"; then return "$stopped"; fi
  done
  # Killed by a signal, except 134 (SIGABRT), with which JAX ends the processes that lost another one.
  if grep -qxE '129|13[1-35-9]|1[4-9][0-9]' <<<"$codes"; then return 143; fi
  if grep -qx 1 <<<"$codes"; then return 1; fi
  return 143
}

bucket='' mount='' folder=$workdir
if [[ $fuse && $workdir == gs://* ]]; then
  bucket=${workdir#gs://}
  bucket=${bucket%%/*}
  mount=/gcs/$bucket
  folder=$mount${workdir#"gs://$bucket"}
fi

code=143
for ((start = 0; start <= restarts && code == 143; start++)); do
  [[ $start == 0 ]] || echo "ended before it was done, restart $start of $restarts" >&2
  await_slice
  code=0
  if set_up; then
    train || code=$?
  elif [[ $(state) == ACTIVE ]]; then
    code=1
  else
    code=143
  fi
done
[[ ! $delete ]] || delete_slice
exit "$code"
