r"""Qwen3-8B to ReFusion as the authors trained it (arXiv 2512.13586): batches of 512, up to 4096 tokens.

    python -m refusion_jax.convert Qwen3-8B start --to=hf --add_tokens=bos,mask
    python -m refusion_jax.train --config=configs/qwen3_8b.py --workdir=runs/qwen3_8b \
        --config.train.init_from=start --config.data.paths=train.jsonl --config.train.steps=STEPS

Qwen3-8B is the Hugging Face folder. Each line of train.jsonl is `{"query": "…", "response": "…"}`; the
authors' 4 epochs are STEPS = 4 x lines / 512. Every host runs the same command. Expect it to fit on
v5e:16x16, v6e:16x16, v5p:4x4x4 and v5p:4x4x8 (compiled, not run). For other slices ask

    python -m refusion_jax.aot --config=configs/qwen3_8b.py --topology=v5e:8x16
"""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model.config import ModelConfig


def get_config() -> ConfigDict:
    c = ConfigDict()
    # The table has 151,936 rows for 151,669 tokens: BOS and mask take the next two ids, as the authors' do.
    c.model = ConfigDict(dataclasses.asdict(ModelConfig.qwen3_8b()))
    c.data = ConfigDict({"source": "jsonl", "max_length": 4096})
    c.train = ConfigDict(
        {
            "steps": 1000,
            "batch_size": 512,
            "save_every": 500,
            "log_every": 10,
            "dtype": "bfloat16",
            "remat": "full",
            "scan_layers": True,
        }
    )
    # Cosine decay to 0, no warm-up, no weight decay; b2 and clip_norm as Hugging Face's trainer has them.
    c.optimizer = ConfigDict({"learning_rate": 2e-5, "b2": 0.999, "clip_norm": 1.0})
    c.mesh = ConfigDict({"data": 1, "fsdp": -1})
    return c
