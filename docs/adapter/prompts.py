"""Prompts for a lossless adapter: chat and tasks, to train on and held out.

    python docs/adapter/prompts.py --text=text.jsonl --output=runs/adapter

reads conversations, one {"query": …} per line (docs/comparison/general_text.py samples them), and writes
requests for `sample --input`: train.jsonl, with all queries but 200 and 1,500 problems of each generated task
of configs/comparison.py; chat.jsonl, the 200 others; tasks.jsonl, 34 held-out problems of each task. The last
two ask for traces.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from refusion_jax import config
from refusion_jax.data.pipeline import make_tasks
from refusion_jax.training.run import RunConfig

HELD_OUT = 200  # conversations
PER_TASK = {"train": 1500, "test": 34}


def write(path: Path, prompts: Sequence[str], **fields: bool) -> None:
    lines = [json.dumps({"id": i, "prompt": prompt} | fields) + "\n" for i, prompt in enumerate(prompts)]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} requests")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="conversations")
    parser.add_argument("--output", type=Path, required=True, help="folder of the three files")
    flags = parser.parse_args()
    lines = flags.text.read_text(encoding="utf-8").splitlines()
    queries = sorted({json.loads(line)["query"] for line in lines})
    random.Random(0).shuffle(queries)
    settings = config.load("configs/comparison.py", [], RunConfig).data.tasks
    tasks, _ = make_tasks({name: of for name, of in settings.items() if "path" not in of})
    drawn = {
        split: [task.example(i, split).query for task in tasks for i in range(number)]
        for split, number in PER_TASK.items()
    }
    flags.output.mkdir(parents=True, exist_ok=True)
    write(flags.output / "chat.jsonl", queries[:HELD_OUT], trace=True)
    write(flags.output / "tasks.jsonl", drawn["test"], trace=True)
    write(flags.output / "train.jsonl", queries[HELD_OUT:] + drawn["train"])


if __name__ == "__main__":
    main()
