"""Qwen3-8B to ReFusion with the authors' settings: batches of 512 rows of up to 4096 tokens.

    python -m refusion_jax.convert Qwen3-8B start --to=hf --add_tokens=bos,mask
    python -m refusion_jax.train --config=configs/qwen3_8b.py --workdir=runs/qwen3_8b \
        --config.train.init_from=start --config.data.paths=train.jsonl --config.train.steps=STEPS
"""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model import ModelConfig


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig.qwen3_8b()))
    c.data = ConfigDict({"source": "jsonl", "max_length": 4096, "enable_thinking": False})
    c.train = ConfigDict(
        {
            "steps": 1000,
            "batch_size": 512,
            "microbatches": 1,
            "save_every": 500,
            "log_every": 10,
            "dtype": "bfloat16",
            "remat": "full",
            "scan_layers": True,
        }
    )
    c.optimizer = ConfigDict({"learning_rate": 2e-5, "b2": 0.999})
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    return c
