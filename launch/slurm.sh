#!/usr/bin/env bash
# Trains on GPUs under SLURM, with one process per GPU, as JAX expects there.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh --config=FILE --workdir=DIR
#   bash launch/slurm.sh --dry_run --config=FILE --workdir=DIR     # prints the command of a job
#
#   --restarts=N   requeue at most N times (default 10)
#   --python=PATH  Python with refusion_jax[gpu] installed, on every node (default python)
#   All other flags are passed to train. DIR and FILE must be on a disk that all nodes mount.
#
# Two minutes before the time limit, and when the job is preempted, all processes get SIGTERM. They save the
# same step and exit with 143; the job then requeues itself and resumes from that step. With any other exit
# code the job ends with that code. After the failure of a node SLURM requeues the job by itself.
#
#SBATCH --job-name=refusion
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

restarts=10 python=python dry_run='' to_train=() given=' '
for flag in "$@"; do
  given+="${flag%%=*} "
  case $flag in
    --restarts=*) restarts=${flag#*=} ;;
    --python=*) python=${flag#*=} ;;
    --dry_run) dry_run=1 ;;
    *) to_train+=("$flag") ;;
  esac
done
for flag in --config --workdir; do
  [[ $given == *" $flag "* ]] || { echo "error: $flag: is missing" >&2; exit 2; }
done
[[ $restarts =~ ^[0-9]+$ ]] || { echo "error: --restarts: must be a number, found '$restarts'" >&2; exit 2; }

# Every process sees all GPUs of its node and uses the one with its local rank; SLURM must not hide them.
run=(srun --kill-on-bad-exit=1 --gpu-bind=none "$python" -m refusion_jax.train "${to_train[@]}")
if [[ $dry_run ]]; then
  printf '%q ' "${run[@]}" && echo
  exit
fi
[[ ${SLURM_JOB_ID:-} ]] || { echo "error: not in a SLURM job, submit this script with sbatch" >&2; exit 2; }
gpus=${SLURM_GPUS_PER_NODE:-none} tasks=${SLURM_NTASKS_PER_NODE:-none}
if [[ ${gpus##*:} != "$tasks" || $tasks == none ]]; then
  echo "error: --gpus-per-node and --ntasks-per-node must be the same number, found $gpus and $tasks" >&2
  exit 2
fi

# The signal must not go to srun, which would kill the processes. They are step 0, the only step of the job.
told=''
trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
"${run[@]}" &
code=0
wait $! || code=$?
if [[ $told ]]; then # the signal interrupted that wait
  code=0
  wait $! || code=$?
fi
if [[ $code == 143 && ${SLURM_RESTART_COUNT:-0} -lt $restarts ]]; then
  echo "preempted, requeue $((${SLURM_RESTART_COUNT:-0} + 1)) of $restarts" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
