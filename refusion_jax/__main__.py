"""Lists the commands, and runs the one that is named.

    python -m refusion_jax              # the list
    python -m refusion_jax train ...    # the same as python -m refusion_jax.train ...

The list needs no JAX: each command's module is imported when it runs.
"""

import importlib
import sys
from collections.abc import Sequence

# Command -> purpose. setup.py makes a console script of each; it reads this file where nothing is installed
# yet, so the file must import only the standard library.
COMMANDS = {
    "train": "trains a model, or resumes the run in --workdir",
    "sample": "decodes prompts from the command line, a file of requests, or a terminal",
    "evaluate": "scores a checkpoint on tasks and measures the cost of decoding",
    "convert": "converts a checkpoint between Hugging Face, Orbax and GGUF layouts",
    "aot": "compiles a training step or the decoder for TPUs that are not attached",
    "bench": "times training steps or decoding on this machine",
    "demo": "decodes held-out problems with the model of `make demo`",
}


def listing() -> str:
    """The usage line and one line per command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    usage = "usage: python -m refusion_jax COMMAND ...  (COMMAND --help lists its flags)"
    return "\n".join([usage, "", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; 2 for an unknown command."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in COMMANDS:
        return importlib.import_module(f"refusion_jax.{name}").main(rest)
    if name in ("-h", "--help"):
        print(listing())
        return 0
    if name == "--version":
        print(f"refusion_jax {importlib.import_module('refusion_jax').__version__}")
        return 0
    print(f"error: {name!r} is no command, must be one of {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
