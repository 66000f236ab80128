"""Mistakes of the user: one exception for them, and one place that turns it into an exit code."""

import functools
import sys
import traceback
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
            return report(error)

    return run


def report(error: Exception, who: str = "") -> int:
    """Says on stderr what went wrong and returns the exit code for it.

    Args:
      error: BadInput makes one line; anything else its traceback.
      who: in front of the line, the process in a run of several.
    """
    if isinstance(error, BadInput):
        print(f"error: {who}{error}".replace("\n", " "), file=sys.stderr, flush=True)
        return 2
    print(f"{who}{''.join(traceback.format_exception(error))}", end="", file=sys.stderr, flush=True)
    return 1
