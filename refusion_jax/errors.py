"""Mistakes of the user: one exception for them, and one place that turns it into an exit code."""

import functools
import sys
from collections.abc import Callable


class BadInput(ValueError):
    """Input that cannot be used as given.

    The message is one line that names the flag, field or `file:line`, the value found and what would
    be right. Commands print it on stderr and exit with 2; library callers catch it as a ValueError.
    """


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a command's `main` so that `BadInput` becomes one line on stderr and exit code 2.

    Everything else keeps its traceback and exits with 1: it is our mistake, not the user's.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except BadInput as error:
            print(f"error: {error}".replace("\n", " "), file=sys.stderr)
            return 2

    return run
