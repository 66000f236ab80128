#!/usr/bin/env bash
# A lossless adapter for SmolLM2-135M-Instruct, trained on the model's own answers, and how it decodes.
#
#     docs/adapter/run.sh MODEL.gguf TEXT.jsonl DIR
#
# docs/convert_your_model.md explains the steps, and says where the model comes from; docs/comparison/general_text.py
# samples the text. Results are in DIR.
set -euo pipefail
model=$1 text=$2 dir=$3
shift 3
start=$dir/start
sample() { python -m refusion_jax.sample --gen_length=256 "$@"; }

python -m refusion_jax.convert "$model" "$dir/original" --to=hf
python -m refusion_jax.convert "$model" "$start" --to=hf --add_tokens=mask
python docs/adapter/prompts.py --text="$text" --output="$dir"
sample --checkpoint="$start" --method=ar --input="$dir/train.jsonl" --output="$dir/answers.jsonl" --batch_size=512 --resume
python docs/own_answers.py "$dir/train.jsonl" "$dir/answers.jsonl" > "$dir/own.jsonl"

python -m refusion_jax.train --config=configs/smollm2_135m.py --workdir="$dir/adapter" \
    --config.model.vocab_size=49153 --config.train.init_from="$start" --config.data.paths="$dir/own.jsonl" \
    --config.data.max_length=1024 --config.data.packing=True --config.data.examples_per_row=16 \
    --config.train.microbatches=1 --config.train.remat=none --config.train.scan_layers=False \
    --config.train.loss_chunks=4 --config.lora.rank=64 --config.lora.alpha=128 --config.lora.only_masks=True \
    --config.diffusion.text_order_share=0.5 --config.optimizer.learning_rate=1e-3 "$@"

compare() { # SPLIT DTYPE BATCH_SIZE
    echo "$1, $2, $3 at a time:"
    local how=(--input="$dir/$1.jsonl" --dtype="$2" --batch_size="$3")
    sample --checkpoint="$dir/original" --method=ar "${how[@]}" --output="$dir/ar_$1_$2.jsonl" --resume
    sample --checkpoint="$dir/adapter" "${how[@]}" --output="$dir/exact_$1_$2.jsonl" --resume
    python docs/acceptance.py "$dir/exact_$1_$2.jsonl" "$dir/ar_$1_$2.jsonl"
}
for split in chat tasks; do
    compare $split float32 8
    compare $split bfloat16 1
done
