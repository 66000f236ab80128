"""The second experiment of docs/comparison.md: AR first, then drafts; what is trained, and how it is decoded.

RUNS has a line per run. All take the same start, data and number of steps, warm start included. "AR then X"
are half of the steps as AR and half as X, on the batches that follow. TARGETS is the order in which decoded
runs are wanted; phases_drive.py trains what they need. Imports no JAX.

Files, in the folder of results: phases_train_RUN.json, and phases_RUN.jsonl with a line per figure (a setting
decoded over all tasks) in the order in which they were finished.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import settings as choices

Figure = dict[str, Any]
Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The sizes of the experiment.

    Attributes:
      config: of all runs.
      folder: of the runs, their logs and, in `results`, the result files.
      steps: that every row of the table takes in all.
      gen_length: the most tokens of an answer.
      validation, test: problems per task.
      timed: problems per task whose decoding is timed, by the number decoded at a time.
      repeats: of which the median is the time.
      rows: problems decoded together where nothing is timed.
    """

    config: str = "configs/comparison.py"
    folder: Path = Path("runs/comparison")
    steps: int = 3600
    gen_length: int = choices.GEN_LENGTH
    validation: int = 64
    test: int = 300
    timed: tuple[tuple[int, int], ...] = ((1, 20), (32, 80))
    repeats: int = 3
    rows: int = 64

    @property
    def results(self) -> Path:
        """Beside the runs, as git ignores both; the page is made of copies in docs/comparison/results."""
        return self.folder / "results"

    def steps_of(self, run: "Run") -> int:
        return round(self.steps * run.part)


REHEARSAL = Setup(
    "docs/comparison/rehearsal.py", Path("runs/rehearsal"), 24, 64, 4, 6, ((1, 2), (2, 4)), 1, 4
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A line of the table.

    Attributes:
      objective: of training.
      part: of the steps of the experiment.
      ways: of WAYS, in which it is decoded.
      after: the run whose weights it starts from, at the batch where that ended.
      overrides: of the configuration, besides those.
      chosen: (setup) -> overrides that depend on results; None as long as these are not there.
      searched: whether the run is decoded in validation only.
    """

    objective: str
    part: float
    ways: tuple[str, ...] = ()
    after: str = ""
    overrides: Overrides = dataclasses.field(default_factory=dict)
    chosen: Callable[[Setup], Overrides | None] = lambda setup: {}
    searched: bool = False


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of decoding: its method, fixed settings, and those whose speed is measured (None: the best)."""

    method: str
    fixed: Overrides = dataclasses.field(default_factory=dict)
    timed: tuple[Overrides, ...] | None = ({},)


def lengths(*of: int) -> tuple[Overrides, ...]:
    return tuple({"draft_length": length} for length in of)


EXACT = {"verify": "exact"}
WAYS = {
    "ar": Way("ar"),
    "lookup": Way("refusion", EXACT | {"draft_from": "lookup"}, lengths(32, 8)),
    "threshold": Way("refusion", {"verify": "threshold"}, None),
    "exact": Way("refusion", EXACT, lengths(64, 16)),
}
SHARES = (0.17, 0.33, 0.5)
BOTH = ("threshold", "exact")


def best_share(setup: Setup) -> Overrides | None:
    """The ar_share with most tokens per pass within two points of the most accurate, read exactly."""
    return _best({f"anchored_{share}": {"diffusion.ar_share": share} for share in SHARES}, setup)


def best_with_a_teacher(setup: Setup) -> Overrides | None:
    """The better of the runs after AR, by the same rule, with the AR run that they start from as teacher."""
    share = best_share(setup)
    found = share and _best({"ar_refusion": {}, "anchored": share}, setup)
    teacher = {"train.teacher": setup.folder / "ar_half", "train.distill_weight": 0.5}
    return None if found is None else found | teacher


ADAPTER = {"lora.rank": 64, "lora.alpha": 128, "lora.only_masks": True, "diffusion.text_order_share": 0.5}
RUNS = {
    "ar": Run("ar", 1, ("ar", "lookup")),
    "ar_half": Run("ar", 1 / 2, ("ar",)),
    **{
        f"anchored_{share}": Run(
            "refusion", 1 / 4, ("exact",), "ar_half", {"diffusion.ar_share": share}, searched=True
        )
        for share in SHARES
    },
    "anchored": Run("refusion", 1 / 2, BOTH, "ar_half", chosen=best_share),
    "refusion": Run("refusion", 1, BOTH),
    "adapter": Run("refusion", 1 / 2, BOTH, "ar_half", ADAPTER),
    "ar_refusion": Run("refusion", 1 / 2, BOTH, "ar_half"),
    "taught": Run("refusion", 1 / 2, BOTH, "ar_half", chosen=best_with_a_teacher),
}
TARGETS = [name for name, run in RUNS.items() if run.ways]


def overrides(name: str, setup: Setup) -> Overrides | None:
    """What trains a run; None as long as a choice that it needs is open."""
    run = RUNS[name]
    chosen = run.chosen(setup)
    if chosen is None:
        return None
    steps = setup.steps_of(run)
    start = {}
    if run.after:
        start = {
            "train.init_from": setup.folder / run.after,
            "train.first_batch": setup.steps_of(RUNS[run.after]),
        }
    # Saved now and then, so that little is lost where a machine goes without notice.
    fixed = {"objective": run.objective, "train.steps": steps, "train.keep": 1, "train.save_every": 600}
    return fixed | start | run.overrides | chosen


# The figures.


def read(results: Path, name: str) -> list[Figure]:
    """The lines of phases_NAME.jsonl in a folder; none if there is no file."""
    path = results / f"phases_{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def figures(setup: Setup, name: str) -> list[Figure]:
    return read(setup.results, name)


def append(setup: Setup, name: str, figure: Figure) -> None:
    """Adds a line to a result file. The file is replaced as a whole, so no line is ever incomplete."""
    path = setup.results / f"phases_{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in [*figures(setup, name), figure]))
    temporary.replace(path)


def is_done(setup: Setup, name: str, part: str) -> bool:
    """Whether a part of PARTS of a run's decoding has ended."""
    return any(figure["stage"] == part for figure in figures(setup, name))


def of_stage(found: Sequence[Figure], stage: str, way: str) -> list[Figure]:
    return [figure for figure in found if (figure["stage"], figure.get("way")) == (stage, way)]


@dataclasses.dataclass(frozen=True)
class Ask:
    """A figure to find.

    Attributes:
      stage: "validation", "test" or "speed".
      way: of WAYS.
      settings: besides the way's.
      at_a_time: problems decoded together; where nothing is timed, as whose passes the passes are counted.
      problems: per task.
    """

    stage: str
    way: str
    settings: Overrides
    at_a_time: int
    problems: int

    def is_in(self, found: Sequence[Figure]) -> bool:
        key = (self.settings, self.at_a_time)
        done = of_stage(found, self.stage, self.way)
        return any((figure["settings"], figure["at_a_time"]) == key for figure in done)


# What is decoded together: speeds by themselves, so that nothing else takes time of the GPU.
PARTS = {"counted": ("validation", "test"), "timed": ("speed",)}
STAGES = tuple(stage for stages in PARTS.values() for stage in stages)


def asks(name: str, stage: str, found: Sequence[Figure], setup: Setup) -> Iterator[Ask]:
    """The figures of a stage of a run, given those of the stages before it."""
    run = RUNS[name]
    for way in run.ways:
        timed = WAYS[way].timed
        validated = of_stage(found, "validation", way)
        if stage == "validation":
            # Left to right and with looked-up drafts there is nothing to choose.
            tried = choices.blocks_of_32(setup.gen_length) if timed is None else timed[:1]
            chosen = tried if way in BOTH else ()
            problems = [(1, setup.validation)]
        elif stage == "test":
            chosen = choices.front(validated) if timed is None else timed[:1]
            problems = [(1, setup.test)]
        else:
            chosen = choices.front(validated)[:1] if timed is None else timed
            problems = setup.timed
        if stage == "validation" or not run.searched:
            yield from (Ask(stage, way, of, *each) for of in chosen for each in problems)


def _best(tried: dict[str, Overrides], setup: Setup) -> Overrides | None:
    entries = []
    for name, of in tried.items():
        found = of_stage(figures(setup, name), "validation", "exact")
        if not found:
            return None
        entries.append({"settings": of, "tasks": found[0]["tasks"]})
    return choices.fastest(entries)
