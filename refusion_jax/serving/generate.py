"""`generate`: prompts in, answers out, as text."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refusion_jax.files import SMALL
from refusion_jax.serving.engine import fitting_shape, serve
from refusion_jax.serving.opened import Opened, open_checkpoint
from refusion_jax.serving.requests import parse


def generate(
    texts: str | Sequence[str],
    checkpoint: str | Path = SMALL,
    *,
    method: str | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    raw: bool = False,
    stop: Sequence[str] = (),
    **settings: Any,
) -> str | list[str]:
    """Answers prompts; the answers are those of the `sample` command.

    Args:
      texts: one prompt or several.
      checkpoint: a model folder, as `load` takes it; by default the small model that comes with the package.
        The model stays in memory until another one is asked for.
      method: "refusion", "ar", "mdm" or "bd3"; by default that of the checkpoint's training objective.
      dtype: of weights and computation, "bfloat16" or "float32"; by default bfloat16, but float32 on a CPU.
      batch_size: prompts decoded together.
      raw: feed the prompts as they are, without the chat template.
      stop: texts that end an answer; it is cut before the first of them.
      **settings: settings of the method, named as the flags of `sample`: `gen_length`, `slot_size`,
        `temperature`, `seed`, ...

    Returns:
      the answer if `texts` is one prompt, otherwise a list of answers in the order of the prompts.

    Raises:
      BadInput: the folder cannot be read, or a setting or prompt is not valid.
    """
    opened = _opened(str(checkpoint), method, dtype)
    defaults = dataclasses.replace(opened.defaults, raw=raw, stop=tuple(stop))
    model, params, tokenizer = opened.model, opened.params, opened.tokenizer
    prompts = [texts] if isinstance(texts, str) else list(texts)
    requests = [
        parse({"id": number, "prompt": prompt} | settings, defaults, tokenizer, model.config.vocab_size)
        for number, prompt in enumerate(prompts)
    ]
    if not requests:
        return []
    shape = fitting_shape(requests, batch_size, defaults.ahead)
    with opened.scope():
        results = list(serve(model, params, tokenizer, requests, shape, defaults.stop))
    answers = [result["text"] for result in results]
    return answers[0] if isinstance(texts, str) else answers


@functools.lru_cache(maxsize=1)
def _opened(checkpoint: str, method: str | None, dtype: str | None) -> Opened:
    return open_checkpoint(checkpoint, method, dtype=dtype)
