#!/usr/bin/env bash
# Trains the model that ships, in two phases on the same data: left to right, then anchored.
#
#     docs/small/train.sh DIR [SHARE] [STEPS of phase 1] [STEPS of phase 2]
#
# writes the runs DIR/ar and DIR/anchored; SHARE is diffusion.ar_share. A phase that was interrupted goes on.
set -euo pipefail
dir=$1 share=${2:-0.2} first=${3:-13000} second=${4:-49000}
shift $(($# < 4 ? $# : 4))
train() { python -m refusion_jax.train --config=configs/small.py "$@"; }
train --workdir="$dir/ar" --config.objective=ar --config.train.steps="$first" "$@"
train --workdir="$dir/anchored" --config.train.steps="$second" --config.train.init_from="$dir/ar" \
    --config.train.first_batch="$first" --config.diffusion.ar_share="$share" "$@"
