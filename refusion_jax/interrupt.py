"""Ctrl-C ends a command at once, with one line and exit code 130. Imports nothing heavy.

Python's own way, an exception in the main thread, is not safe here: raised while another thread compiles, it
ends in a crash when the interpreter shuts down; raised in a callback of the garbage collector, it is lost.
"""

import os
import signal
import sys
from pathlib import Path

EXIT_CODE = 128 + signal.SIGINT
temporary: set[Path] = set()  # files that an interrupt removes


def is_command() -> bool:
    """Whether this process was started as a command of this package, by `python -m` or as a script."""
    name = Path(sys.argv[0]).name
    if name == "-m":  # while `python -m MODULE` imports the module's package
        name = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    return name.split(".")[0].split("-")[0] in ("refusion", "refusion_jax")


def install() -> None:
    """Makes SIGINT end this process, unless it is ignored, as in the background of a shell."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def leave(number: int = signal.SIGINT, frame: object = None) -> None:
    """A signal handler: removes temporary files, ends child processes, prints one line and exits."""
    for path in temporary:
        path.unlink(missing_ok=True)
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            child.kill()
    os.write(2, b"interrupted\n")
    os._exit(EXIT_CODE)
