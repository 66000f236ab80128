"""Shows a decode on a terminal while it happens: slots appear in place, in the order they are committed."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from refusion_jax.decode import loop as decode
from refusion_jax.decode.batch import Shape
from refusion_jax.serving import engine as serving
from refusion_jax.serving.engine import Request
from refusion_jax.tokenizer import Tokenizer

MISSING = "·"  # one for each token that is not there yet
FRESH = "bold green"


def answer(
    console: Console, model, params, tokenizer: Tokenizer, request: Request, shape: Shape, stop
) -> Any:
    """Decodes one request in view and returns its result, as `serving.serve` gives it.

    What was shown is wiped at the end, for the caller to print the text as it came out.
    """
    batch = decode.prepare(model, [request.prompt], [request.config], shape)
    start, block_len = len(request.prompt), request.config.block_len
    seen = np.zeros(shape.gen, bool)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for state in decode.stream(model, params, batch):
            filled = np.asarray(state.cache.filled[0, start : start + shape.gen])
            if (filled & ~seen).any():
                tokens = np.asarray(state.tokens[0, start : start + shape.gen])
                end = (int(state.row.block[0]) + 1) * block_len
                live.update(picture(tokenizer, tokens[:end], filled[:end], ~seen[:end]), refresh=True)
                seen = filled
    samples = jax.device_get(decode.finish(state, batch.eos_id, shape))
    return serving.result(request, jax.tree.map(lambda x: x[0], samples), tokenizer, stop)


def picture(tokenizer: Tokenizer, tokens: np.ndarray, filled: np.ndarray, new: np.ndarray) -> Text:
    """The text of committed tokens, the newest highlighted, with dots where tokens are missing.

    Args:
      tokens: int32 [T].
      filled: bool [T], which of them are committed.
      new: bool [T], which were not there in the picture before.
    """
    text = Text()
    kinds: Sequence[tuple[bool, bool]] = list(zip(filled.tolist(), new.tolist(), strict=True))
    place = 0
    for (there, fresh), run in groupby(kinds):
        length = len(list(run))
        piece = tokenizer.decode(tokens[place : place + length].tolist()) if there else MISSING * length
        text.append(piece, style=FRESH if there and fresh else "dim" if not there else "")
        place += length
    return text
