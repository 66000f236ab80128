"""The model that comes with the package: the embedded tasks, trained from scratch on bytes.

    python -m refusion_jax.train --config=configs/small.py --workdir=runs/small

trains by the paper's objective alone. The model in the package takes two phases:

    docs/small/train.sh runs/small_phases
    rm -r refusion_jax/small
    python -m refusion_jax.convert runs/small_phases/anchored refusion_jax/small --dtype=bfloat16
    python docs/small/measure.py

5.6 million parameters, 11 MB in bfloat16, small enough to decode on a laptop's CPU. docs/small/train.sh
trains it in two phases on the same data: 13,000 steps left to right, then 49,000 steps anchored. Expect 13
minutes on an H100; then at least 99 % of held-out problems are answered right on seven of the eight tasks
(docs/small_model.md has the table). Training takes too long on a CPU; use configs/tiny.py there.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = ConfigDict(
        {
            "vocab_size": 260,
            "num_layers": 8,
            "embed_dim": 256,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 64,
            "mlp_dim": 640,
            "rope_theta": 1e4,
            "tie_embeddings": True,
        }
    )
    tasks = {
        "arithmetic": {},
        "multiplication": {"left_digits": 2, "right_digits": 2},
        "countdown": {"numbers": 3, "largest": 12, "share": 1},
        "word_problems": {"max_steps": 3},
        "paths": {"nodes": 6, "extra": 2, "max_steps": 3},
        "extraction": {},
        "json_records": {"records": 1, "fields": 4},
        "functions": {},
    }
    c.data = ConfigDict(
        {
            "source": "tasks",
            "tasks": tasks,
            "max_length": 1024,
            "packing": True,
            "workers": 12,
            "examples_per_row": 8,
        }
    )
    c.train = ConfigDict(
        {"steps": 36000, "batch_size": 32, "save_every": 9000, "log_every": 100, "dtype": "bfloat16"}
    )
    c.optimizer = ConfigDict({"learning_rate": 2e-3, "warmup_steps": 200, "b2": 0.99})
    return c
