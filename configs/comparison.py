r"""SmolLM2-135M-Instruct trained on tasks, by one of four objectives: what docs/comparison.md compares.

    python -m refusion_jax.train --config=configs/comparison.py --workdir=runs/comparison/refusion \
        --config.objective=refusion

Needs three things under runs/comparison: `start`, the model with BOS and mask (configs/smollm2_135m.py
says how it is made); `gsm8k_train.jsonl.gz` and `gsm8k_test.jsonl.gz`, GSM8K with its fields `question`
and `answer`; `text.jsonl`, of docs/comparison/general_text.py. docs/comparison/train_runs.py has the runs.
"""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model.transformer import ModelConfig

FOLDER = "runs/comparison"


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig.smollm2_135m()) | {"vocab_size": 49152 + 2})
    c.objective = "refusion"
    generated = {
        "multiplication": {"left_digits": 3, "right_digits": 3},
        "countdown": {},
        "word_problems": {"max_steps": 6, "largest": 1000},
        "paths": {"nodes": 14, "max_steps": 6},
        "json_records": {"records": 3, "fields": 4},
        "functions": {"max_steps": 6},
    }
    # Twice as often as what is read from files, of which there is only so much.
    tasks = {name: {**settings, "share": 2} for name, settings in generated.items()} | {
        "gsm8k": {"path": f"{FOLDER}/gsm8k_train.jsonl.gz", "test_path": f"{FOLDER}/gsm8k_test.jsonl.gz"},
        "text": {"path": f"{FOLDER}/text.jsonl"},
    }
    c.data = ConfigDict(
        {
            "source": "tasks",
            "tasks": tasks,
            "max_length": 1024,
            "packing": True,
            "workers": 12,
            "examples_per_row": 16,
        }
    )
    c.train = ConfigDict(
        {
            "steps": 900,
            "batch_size": 32,
            "save_every": 900,
            "log_every": 20,
            "dtype": "bfloat16",
            "loss_chunks": 4,
            "init_from": f"{FOLDER}/start",
        }
    )
    c.optimizer = ConfigDict({"learning_rate": 3e-4, "warmup_steps": 50})
    return c
