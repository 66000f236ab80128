"""The embedded default: copies facts from a short text into JSON, trained from scratch on bytes.

    python -m refusion_jax.train --config=configs/tiny.py --workdir=runs/tiny

140 thousand parameters; needs no file and no accelerator. Expect about 5 minutes on two CPU cores, a final
loss below 0.1, and more than 90 % of held-out problems answered exactly.

The task suits the method. The values are random letters and digits, so the model cannot know them: it has to
find each fact in the text, whatever its wording and position, and copy it. The content of one slot does not
depend on the other slots, so decoding slots in parallel saves passes.
"""

import dataclasses

from ml_collections import ConfigDict

from refusion_jax.model.config import ModelConfig


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.model = ConfigDict(dataclasses.asdict(ModelConfig.tiny()))
    c.data = ConfigDict({"source": "tasks", "tasks": {"extraction": {"fields": 2}}, "max_length": 92})
    c.train = ConfigDict({"steps": 3600, "batch_size": 32, "save_every": 900, "log_every": 100})
    c.optimizer = ConfigDict({"learning_rate": 3e-3, "warmup_steps": 50, "final_fraction": 0.05, "b2": 0.995})
    return c
