"""The exception for bad user input, and its translation into a message on stderr and an exit code."""

import functools
import sys
import traceback
from collections.abc import Callable


class BadInput(ValueError):
    """Input that cannot be used as given.

    The message is one line that names the flag, field or `file:line`, the value found and what was expected.
    Commands print it on stderr and exit with 2; library callers can catch it as a ValueError.
    """


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a command's `main` so that `BadInput` becomes one line on stderr and exit code 2.

    Any other exception is a bug: it keeps its traceback and exits with 1.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except BadInput as error:
            return report(error)

    return run


def report(error: Exception, who: str = "") -> int:
    """Prints an error on stderr and returns its exit code: 2 for BadInput, else 1.

    Args:
      error: BadInput is printed as one line, any other exception with its traceback.
      who: prefix that names the process, for runs of several processes.
    """
    if isinstance(error, BadInput):
        print(f"error: {who}{error}".replace("\n", " "), file=sys.stderr, flush=True)
        return 2
    print(f"{who}{''.join(traceback.format_exception(error))}", end="", file=sys.stderr, flush=True)
    return 1
