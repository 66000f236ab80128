"""Lists the commands: `python -m refusion_jax`, or the console script `refusion`."""

import sys
from collections.abc import Sequence

from refusion_jax.config import Parser
from refusion_jax.errors import BadInput, command

# Each is a module, `python -m refusion_jax.NAME`, and a console script, `refusion-NAME`.
COMMANDS = {
    "train": "train a model, or resume a run",
    "sample": "decode prompts from the command line, a file or the terminal",
    "convert": "convert a checkpoint between Hugging Face, Orbax and GGUF",
    "evaluate": "score a checkpoint on tasks",
    "bench": "time the training step or decoding on this machine",
    "aot": "compile a step for TPUs that are not attached, and say whether it fits",
    "demo": "compare ReFusion with left-to-right decoding on a small trained run",
}


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m refusion_jax",
        description="ReFusion in JAX: a masked diffusion language model that decodes slots in parallel.",
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="*", help="none: the commands below are modules of their own")
    given = parser.parse_args(arguments).command
    if given:
        known = ", ".join(COMMANDS)
        raise BadInput(
            f"commands are modules: python -m refusion_jax.NAME, NAME one of {known}; found {given[0]!r}"
        )
    print("Commands (--help shows the flags of each):")
    for name, about in COMMANDS.items():
        print(f"  python -m refusion_jax.{name:9} {about}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
