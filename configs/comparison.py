r"""SmolLM2-135M-Instruct trained on tasks, with one of four objectives: the models of docs/comparison.md.

    python -m refusion_jax.train --config=configs/comparison.py --workdir=runs/comparison/refusion \
        --config.objective=refusion

Expect about 105 GPU seconds for the 900 steps. The page's models take --config.train.steps=3600 and
--config.optimizer.learning_rate=1e-3 (612 s); ReFusion then answers 69.8 +- 1.4 % of the problems right.

Needs under runs/comparison: `start`, the model with BOS and mask (configs/smollm2_135m.py has the commands);
`gsm8k_train.jsonl.gz` and `gsm8k_test.jsonl.gz`, GSM8K with its fields `question` and `answer`; `text.jsonl`,
written by docs/comparison/general_text.py. docs/comparison/train_runs.py lists all runs.
"""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model.config import ModelConfig

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
    # Generated tasks are drawn twice as often as those read from files, whose examples are limited.
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
