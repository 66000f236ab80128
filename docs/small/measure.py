"""Measures the model that ships, for docs/small_model.md and for `bench decode --replay`.

    python docs/small/measure.py

evaluates the model as it decodes by default (exact verification), by thresholds and left to right. It
writes the results to docs/small/METHOD.json, their table to docs/small_model.md, and traces of a few problems
of each task to refusion_jax/traces/. Run it after replacing the model in refusion_jax/small.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refusion_jax import evaluate
from refusion_jax.decode.replay import EXACT_KEYS, KEYS
from refusion_jax.serving.opened import open_by
from refusion_jax.serving.score import score

ROOT = Path(__file__).parents[2]
# float32 is the default on a CPU, so the page's command finds about the same figures on every machine.
MODEL = ["--checkpoint=refusion_jax/small", "--dtype=float32", "--gen_length=256"]
CONFIG = "configs/small.py"
METHODS = {
    "exact": ["--batch_size=1"],
    "threshold": ["--verify=threshold", "--num_blocks=4", "--batch_size=1"],
    "ar": ["--method=ar"],
}
MARKS = "<!-- by docs/small/measure.py -->\n", "\n<!-- end -->"
BLOCKS = ["--verify=threshold", "--num_blocks=4"]
TRACES = {  # file -> flags of its decodes
    "small_slots8_blocks4": [*BLOCKS, "--slot_size=8"],
    "small_slots32_blocks4": [*BLOCKS, "--slot_size=32"],
    "small_exact": ["--draft_length=64", "--ahead=191"],  # as one request on an H100 or H200
}
COURSES = 4  # of each task

Figures = Mapping[str, Any]


def measured(flags: Sequence[str]) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        if evaluate.main([*MODEL, *flags, f"--config={CONFIG}", f"--output={folder}"]):
            raise SystemExit(2)
        return json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))


def table(results: Mapping[str, Figures]) -> str:
    """The page's table, from the results of METHODS."""
    asked, cost = f"right of {results['ar']['problems']}", "tokens per forward"
    columns = ["task"]
    for name in ("exact", "by thresholds", "left to right"):
        columns += [f"{name}, {asked}", cost]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for task in results["exact"]["tasks"]:
        cells = [f"`{task}`"]
        for figures in (results[method]["tasks"][task] for method in METHODS):
            low, high = figures["interval"]
            cells.append(f"{figures['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f})")
            cells.append(f"{figures['tokens_per_forward']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def courses(flags: Sequence[str]) -> Iterator[Figures]:
    """Results with traces, a problem of each task in turn, and no more in them than a replay needs."""
    opened = open_by([*MODEL, *flags])
    scores = score(opened, evaluate.config_tasks(CONFIG), "test", COURSES, 1, trace=True)
    for answers in zip(*(scored.answers for scored in scores), strict=True):
        for answer in answers:
            keys = EXACT_KEYS if answer["trace"][0]["branch"] == "exact" else KEYS
            trace = [{key: plan[key] for key in keys} for plan in answer["trace"]]
            counts = {key: answer[key] for key in ("num_tokens", "num_forwards")}
            yield {"id": f"{answer['task']}-{answer['id']}", **counts, "trace": trace}


def main() -> None:
    os.chdir(ROOT)
    results = {}
    for method, flags in METHODS.items():
        results[method] = measured(flags)
        Path(f"docs/small/{method}.json").write_text(json.dumps(results[method], indent=2) + "\n")
    page, (begin, end) = Path("docs/small_model.md"), map(re.escape, MARKS)
    page.write_text(re.sub(f"(?s)(?<={begin}).*(?={end})", lambda _: table(results), page.read_text()))
    for name, flags in TRACES.items():
        lines = [json.dumps(course, separators=(",", ":")) + "\n" for course in courses(flags)]
        Path(f"refusion_jax/traces/{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
