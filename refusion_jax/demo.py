"""Compares ReFusion with left-to-right decoding (AR) of the same weights, on an embedded task.

    python -m refusion_jax.demo --checkpoint=runs/demo

Decodes held-out problems by both methods, and shows two answers with the order in which their slots were
filled. The last line is JSON: accuracy, tokens per forward pass and seconds of each method.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from refusion_jax.config import Parser
from refusion_jax.data.tasks.registry import make_task
from refusion_jax.data.tasks.task import Task
from refusion_jax.errors import BadInput, command
from refusion_jax.serving.opened import Opened, open_by
from refusion_jax.serving.score import score

PROBLEMS = 200
BATCH_SIZE = 50
COLOURS = ("green", "yellow", "cyan", "magenta", "red", "blue")
# The decoding settings of the demo. ReFusion decodes the whole answer in one block of four slots.
DECODING = {"refusion": ["--gen_length=32", "--slot_size=8", "--num_blocks=1"], "ar": ["--gen_length=32"]}


def trained_task(folder: Path) -> Task:
    """The embedded task that the run in `folder` was trained on.

    Raises:
      BadInput: the run was trained on other data, or on several tasks.
    """
    try:
        data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
        tasks = data["tasks"]
        ((name, settings),) = tasks.items()
    except (OSError, TypeError, KeyError, ValueError, AttributeError, yaml.YAMLError):
        raise BadInput(f"{folder}/config.yaml must name one embedded task in data.tasks") from None
    return make_task(name, settings)


def open_model(folder: Path, method: str) -> Opened:
    """Opens the checkpoint with the demo's settings of a method."""
    return open_by([f"--checkpoint={folder}", f"--method={method}", *DECODING[method]])


def show(console: Console, answer: Mapping[str, Any], prompt_len: int) -> None:
    """Prints an answer, each token in the colour of the plan that committed it, the plan's number below."""
    filled_by = {place: i for i, plan in enumerate(answer["trace"]) for place in plan["committed"]}
    order = [filled_by[place] for place in sorted(filled_by)][: len(answer["ids"])]
    text, numbers = Text("  "), Text("  ")
    for character, i in zip(answer["text"], order, strict=True):  # byte tokenizer: one token per character
        text.append(character, style=COLOURS[i % len(COLOURS)])
        numbers.append(str((i + 1) % 10), style="dim")
    console.print(Text(answer["query"], style="bold"))
    verdict = "right" if answer["correct"] else f"wrong, expected {answer['expected']}"
    console.print(text, numbers, Text(f"    {verdict}"), sep="\n")
    for i, plan in enumerate(answer["trace"]):
        planned = ", ".join(str(place - prompt_len) for place in plan["planned"])
        console.print(
            f"    plan {i + 1}: slots at {planned}; {len(plan['committed'])} tokens committed, "
            f"{plan['forwards']} forwards so far",
            style=COLOURS[i % len(COLOURS)],
            highlight=False,
        )


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m refusion_jax.demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="folder of a run on one embedded task"
    )
    folder = Path(parser.parse_args(arguments).checkpoint)
    task = trained_task(folder)
    console = Console(soft_wrap=True)
    figures = {}
    for method in DECODING:
        opened = open_model(folder, method)
        (scored,) = score(opened, [task], "test", PROBLEMS, BATCH_SIZE, trace=method == "refusion")
        figures[method] = scored.figures()
        console.print(
            f"{method:>8}: {scored.accuracy:.1%} of {PROBLEMS} held-out problems right, "
            f"{scored.tokens_per_forward:.2f} tokens per forward, {scored.seconds:.1f} s",
            highlight=False,
        )
        if method == "refusion":
            tokenizer, answers = opened.tokenizer, scored.answers
    # The answers with the most plans show the order best.
    for answer in sorted(answers, key=lambda answer: -answer["num_iterations"])[:2]:
        show(console, answer, len(tokenizer.encode(answer["query"])))
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
