r"""Qwen3-0.6B to ReFusion: the authors' recipe for 8B (configs/qwen3_8b.py) at a smaller size and batch.

    python -m refusion_jax.convert Qwen3-0.6B start --to=hf --add_tokens=bos,mask
    python -m refusion_jax.train --config=configs/qwen3_0p6b.py --workdir=runs/qwen3_0p6b \
        --config.train.init_from=start --config.data.paths=train.jsonl --config.train.steps=STEPS

Qwen3-0.6B is the Hugging Face folder. Each line of train.jsonl is `{"query": "…", "response": "…"}`; STEPS is
epochs x lines / 128. Expect 4.28 of 15.75 GiB per device on v5e:2x4 (compiled, not run). On more chips,
reduce microbatches so that every chip has a row in each.
"""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model.config import ModelConfig


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig.qwen3_0p6b()))
    c.data = ConfigDict({"source": "jsonl", "max_length": 4096})
    c.train = ConfigDict(
        {
            "steps": 1000,
            "batch_size": 128,
            "microbatches": 16,
            "save_every": 500,
            "log_every": 10,
            "dtype": "bfloat16",
            "remat": "full",
            "scan_layers": True,
        }
    )
    c.optimizer = ConfigDict({"learning_rate": 2e-5, "b2": 0.999})
    c.mesh = ConfigDict({"data": 1, "fsdp": -1})
    return c
