"""Exceptions that end a command with one line, and their translation into a message and an exit code."""

import errno
import functools
import os
import sys
import traceback
from collections.abc import Callable

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


class BadInput(ValueError):
    """Input that cannot be used as given.

    The message is one line that names the flag, field or `file:line`, the value found and what was expected.
    Commands print it on stderr and exit with 2; library callers can catch it as a ValueError.
    """

    exit_code = 2


class Stopped(RuntimeError):
    """A run that ended itself, with nothing lost; starting it again changes nothing by itself.

    The message is one line that says why, and what to do. Commands exit with 4.
    """

    exit_code = 4


class Failed(RuntimeError):
    """Something outside the program failed, such as a disk that is full. Commands exit with 1.

    The message is one line that says what failed and what is left.
    """

    exit_code = 1


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a command's `main`: BadInput, Stopped and Failed become one line and an exit code.

    A closed pipe on stdout, as in `… | head -1`, ends the command with 1 and no message. Any other exception
    is a bug: it keeps its traceback and exits with 1.
    """

    @functools.wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            code = main(*args, **kwargs) or 0
            sys.stdout.flush()
            return code
        except (BadInput, Stopped, Failed) as error:
            return report(error)
        except BrokenPipeError:
            # What is still buffered goes nowhere, instead of failing again when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except OSError as error:
            if error.errno not in OF_THE_DISK:
                raise
            where = f"{error.filename}: " if error.filename else ""
            return report(Failed(f"{where}cannot be written ({error.strerror})"))

    return run


def report(error: Exception, who: str = "") -> int:
    """Prints an error on stderr and returns its exit code: 1 for those that have none.

    Args:
      error: BadInput, Stopped and Failed are printed as one line, any other exception with its traceback.
      who: prefix that names the process, for runs of several processes.
    """
    if isinstance(error, (BadInput, Stopped, Failed)):
        print(f"error: {who}{error}".replace("\n", " "), file=sys.stderr, flush=True)
        return error.exit_code
    print(f"{who}{''.join(traceback.format_exception(error))}", end="", file=sys.stderr, flush=True)
    return 1
