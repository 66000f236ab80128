r"""Qwen3-8B to ReFusion as the authors trained it (arXiv 2512.13586): batches of 512, up to 4096 tokens.

    python -m refusion_jax.convert Qwen3-8B start --to=hf --add_tokens=bos,mask
    python -m refusion_jax.train --config=configs/qwen3_8b.py --workdir=runs/qwen3_8b \
        --config.train.init_from=start --config.data.paths=train.jsonl --config.train.steps=STEPS

Qwen3-8B is the Hugging Face folder; train.jsonl holds `{"query": "…", "response": "…"}` a line, and 4 epochs
of them are STEPS = 4 x lines / 512. Every host runs the same command. Fits on TOPOLOGY.
"""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model import ModelConfig


def get_config() -> ConfigDict:
    c = ConfigDict()
    # 151,936 rows for 151,669 tokens: there is room for BOS and mask, as which the authors' ids are taken.
    c.model = ConfigDict(dataclasses.asdict(ModelConfig.qwen3_8b()))
    c.data = ConfigDict({"source": "jsonl", "max_length": 4096})
    c.train = ConfigDict(
        {
            "steps": 1000,
            "batch_size": 512,
            "microbatches": 2,  # a row at a time on 256 chips
            "save_every": 500,
            "log_every": 10,
            "dtype": "bfloat16",
            "remat": "full",
            "scan_layers": True,
        }
    )
    # Cosine to 0, no warm-up, no weight decay; b2 and clipping as the authors' trainer has them by default.
    c.optimizer = ConfigDict({"learning_rate": 2e-5, "b2": 0.999, "clip_norm": 1.0})
    c.mesh = ConfigDict({"data": 1, "fsdp": -1})
    return c
