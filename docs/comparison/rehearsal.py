"""The configuration that rehearses the scripts of phases.py: the tiny model, bytes, two tasks."""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model.config import ModelConfig


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig.tiny()))
    tasks = {"extraction": {"fields": 2}, "multiplication": {"left_digits": 1, "right_digits": 1}}
    c.data = ConfigDict({"source": "tasks", "tasks": tasks, "max_length": 92})
    c.train = ConfigDict({"steps": 24, "batch_size": 8, "save_every": 24, "log_every": 4})
    c.optimizer = ConfigDict({"learning_rate": 3e-3, "warmup_steps": 2})
    return c
