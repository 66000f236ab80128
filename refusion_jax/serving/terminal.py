"""Shows a decode on a terminal while it happens: slots appear in place, in the order they are committed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from refusion_jax.decode.loop import DecodeState
from refusion_jax.serving.requests import Request
from refusion_jax.tokenizer import Tokenizer

MISSING = "·"  # one for each token that is not there yet
FRESH = "bold green"


@contextlib.contextmanager
def live_view(
    console: Console, tokenizer: Tokenizer, request: Request
) -> Iterator[Callable[[DecodeState], None]]:
    """A `watch` for `engine.serve` that shows the one request being decoded, in row 0.

    The view is wiped at the end; the caller prints the finished text.
    """
    start, stop = len(request.prompt), len(request.prompt) + request.config.response_len
    seen = np.zeros(request.config.response_len, bool)
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def watch(state: DecodeState) -> None:
            # Whole arrays are fetched: slicing them on the device would compile programs of its own.
            filled = np.asarray(state.cache.filled)[0, start:stop]
            if (filled & ~seen).any():
                tokens = np.asarray(state.tokens)[0, start:stop]
                end = (int(np.asarray(state.row.block)[0]) + 1) * request.config.block_len
                live.update(picture(tokenizer, tokens[:end], filled[:end], ~seen[:end]), refresh=True)
                seen[:] = filled

        yield watch


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
