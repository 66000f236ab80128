"""The sample command: decodes prompts from flags, from a file of requests, or typed on a terminal.

python -m refusion_jax.sample --prompt="..."
python -m refusion_jax.sample --checkpoint=DIR --prompt="..."
python -m refusion_jax.sample --checkpoint=DIR --input=requests.jsonl --output=results.jsonl --resume
python -m refusion_jax.sample --checkpoint=DIR

Without --checkpoint it uses the small model that comes with the package.
"""

import sys
from collections.abc import Sequence

from refusion_jax.config import Parser
from refusion_jax.errors import command
from refusion_jax.serving.flags import add_decoding_flags, add_resume_flags


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m refusion_jax.sample",
        description="Decodes prompts. Without --prompt or --input it asks for prompts on the terminal.",
        allow_abbrev=False,
    )
    add_decoding_flags(parser)
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a prompt; repeatable")
    parser.add_argument("--input", metavar="FILE", help="requests, one JSON object per line; - for stdin")
    parser.add_argument(
        "--output", metavar="FILE", help="results, one JSON object per line (default -, stdout)"
    )
    add_resume_flags(parser)
    parser.add_argument("--trace", metavar="FILE", help="file for the trace of a single --prompt, as JSON")
    flags = parser.parse_args(arguments)
    from refusion_jax.serving.answer import answer  # imports JAX, which --help does not need

    return answer(flags)


if __name__ == "__main__":
    sys.exit(main())
