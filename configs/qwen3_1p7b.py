r"""Qwen3-1.7B to ReFusion on NVIDIA H200: the recipe of configs/qwen3_8b.py at a smaller size and batch.

    python -m refusion_jax.convert Qwen3-1.7B start --to=hf --add_tokens=bos,mask
    python -m refusion_jax.train --config=configs/qwen3_1p7b.py --workdir=runs/qwen3_1p7b \
        --config.train.init_from=start --config.data.paths=train.jsonl --config.train.steps=STEPS

Qwen3-1.7B is the Hugging Face folder. Each line of train.jsonl is `{"query": "…", "response": "…"}`. Expect
48,000 tokens/s and 57 % MFU on one H200, and 76 GB of activations for the 8 rows that a GPU computes at once;
docs/training_speed.md has the measurements, and settings for less memory. More GPUs share the batch: divide
microbatches by their number.
"""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model.config import ModelConfig


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig.qwen3_1p7b()))
    c.data = ConfigDict({"source": "jsonl", "max_length": 4096, "packing": True, "examples_per_row": 32})
    c.train = ConfigDict(
        {
            "steps": 1000,
            "batch_size": 64,
            "microbatches": 8,
            "loss_chunks": 8,
            "save_every": 500,
            "log_every": 10,
            "dtype": "bfloat16",
        }
    )
    c.optimizer = ConfigDict({"learning_rate": 2e-5, "b2": 0.999, "mean_dtype": "bfloat16"})
    c.mesh = ConfigDict({"data": -1})
    return c
