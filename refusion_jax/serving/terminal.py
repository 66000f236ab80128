"""Shows a decode on a terminal while it runs: slots appear in place, in the order they are committed."""

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

MISSING = "·"  # shown for each token that is not committed yet
FRESH = "bold green"


@contextlib.contextmanager
def live_view(
    console: Console, tokenizer: Tokenizer, request: Request
) -> Iterator[Callable[[DecodeState], None]]:
    """A `watch` function for `engine.serve` that shows the request in row 0.

    The view is cleared at the end; the caller prints the finished text.
    """
    start, stop = len(request.prompt), len(request.prompt) + request.config.response_len
    seen = np.zeros(request.config.response_len, bool)
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def watch(state: DecodeState) -> None:
            # Fetches whole arrays, because slicing them on the device would compile further programs.
            if request.config.exact:
                count = int(np.asarray(state.exact.count)[0])
                filled, end = np.arange(stop - start) < count, count + int(np.asarray(state.exact.drafted)[0])
            else:
                filled = np.asarray(state.cache.filled)[0, start:stop]
                end = (int(np.asarray(state.row.block)[0]) + 1) * request.config.block_len
            if (filled & ~seen).any():
                tokens = np.asarray(state.tokens)[0, start:stop]
                live.update(picture(tokenizer, tokens[:end], filled[:end], ~seen[:end]), refresh=True)
                seen[:] = filled

        yield watch


def picture(tokenizer: Tokenizer, tokens: np.ndarray, filled: np.ndarray, new: np.ndarray) -> Text:
    """The text of the committed tokens, the newest highlighted, with a dot per missing token.

    Args:
      tokens: int32 [T].
      filled: bool [T], the tokens that are committed.
      new: bool [T], the tokens that were not committed in the previous picture.
    """
    text = Text()
    flags: Sequence[tuple[bool, bool]] = list(zip(filled.tolist(), new.tolist(), strict=True))
    place = 0
    for (is_filled, is_new), run in groupby(flags):
        length = len(list(run))
        piece = tokenizer.decode(tokens[place : place + length].tolist()) if is_filled else MISSING * length
        text.append(piece, style=FRESH if is_filled and is_new else "dim" if not is_filled else "")
        place += length
    return text
