"""The scripts of docs/comparison: what they would run can be run, and how they choose and count."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from refusion_jax import config
from refusion_jax.serving.engine import METHODS
from refusion_jax.training.run import RunConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import each other as modules of their folder."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "comparison")
    monkeypatch.chdir(ROOT)
    yield
    for name in ("settings", "figures", "tables", "train_runs"):
        sys.modules.pop(name, None)


def of(name):
    return importlib.import_module(name)


def entry(settings, right, forwards=50, tasks=("paths", "gsm8k")):
    """What decode_runs.py finds: `right` of 10 problems of each task."""
    counts = {"problems": 10, "right": right, "tokens": 100, "forwards": forwards}
    return {"settings": settings, "tasks": {task: dict(counts) for task in tasks}}


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_of_the_grid_can_be_decoded(method):
    settings = of("settings")
    for choice in settings.grid(method):
        METHODS[method].config(mask_id=0, eos_id=1, gen_length=settings.GEN_LENGTH, **choice)


def test_every_ablation_can_be_decoded_once():
    settings = of("settings")
    choices = settings.ablations()
    made = {METHODS["refusion"].config(0, 1, settings.GEN_LENGTH, **choice) for choice in choices}
    assert len(made) == len(choices) and len(made) > 50


@pytest.mark.parametrize("stage", ["search", "main", "ablations"])
def test_every_run_can_be_trained(stage):
    train_runs = of("train_runs")
    names = []
    for name, overrides in train_runs.plan(stage):
        given = [part for part in train_runs.command(name, overrides) if part.startswith("--config.")]
        run = config.load("configs/comparison.py", given, RunConfig)
        assert (run.objective, run.train.save_every) == (name.split("_")[0], run.train.steps)
        assert (run.data.eos_multiple == 32) == (run.objective in ("mdm", "bd3"))
        names.append(name)
    assert len(set(names)) == {"search": 24, "main": 4, "ablations": 5}[stage]


def test_the_best_setting_has_most_right_answers_then_fewest_passes():
    settings = of("settings")
    entries = [entry({"a": 1}, 7, 50), entry({"a": 2}, 8, 90), entry({"a": 3}, 8, 80)]
    assert settings.best(entries, ["paths"]) == {"a": 3}
    entries[0]["tasks"]["gsm8k"]["right"] = 10
    assert settings.best(entries, ["gsm8k"]) == settings.best(entries, ["paths", "gsm8k"]) == {"a": 1}


def test_the_fastest_setting_gives_up_two_points_at_most(monkeypatch):
    settings = of("settings")
    entries = [entry({"a": 1}, 8, 80), entry({"a": 2}, 8, 70), entry({"a": 3}, 7, 10)]
    assert settings.fastest(entries) == {"a": 2}
    monkeypatch.setattr(settings, "TOLERANCE", 0.11)
    assert settings.fastest(entries) == {"a": 3}


def test_of_each_cache_one_setting_is_timed_and_one_token_a_pass_besides():
    settings = of("settings")
    found = [
        entry({"cache": cache, "token_threshold": threshold}, 8, 20 if threshold < 1 else 100)
        for cache in ("dual", "none")
        for threshold in (0.9, 1.0)
    ]
    assert [tuple(choice.values()) for choice in settings.timed(found)] == [
        ("none", 1.0),
        ("dual", 0.9),
        ("none", 0.9),
    ]
    assert settings.timed([entry({}, 5)]) == [{}]
    slots = [entry({"slot_size": 8}, 8, 80), entry({"slot_size": 32}, 8, 60)]
    assert settings.timed(slots) == [{"slot_size": 32}]


def test_the_interval_of_a_mean():
    figures = of("figures")
    (row,) = entry({}, 5, tasks=["paths"])["tasks"].values()
    # sqrt(0.5 * 0.5 / 10) = 0.158 of one task; of the mean of two independent ones less by sqrt(2).
    assert figures.half_width([row]) == pytest.approx(1.96 * 0.15811, rel=1e-4)
    assert figures.half_width([row, row]) == pytest.approx(1.96 * 0.15811 / 2**0.5, rel=1e-4)
    assert figures.with_interval([row]) == "50.0 ± 31.0 %"


def test_what_a_request_takes_besides_its_passes():
    figures = of("figures")
    # 4 problems of 10 or 30 passes each, 5 ms and 2 ms a pass
    tasks = [
        {"problems": 4, "forwards": 4 * passes, "seconds": 4e-3 * (5 + 2 * passes)} for passes in (10, 30)
    ]
    assert figures.request_costs(tasks) == pytest.approx((5, 2))


def test_the_page_is_made_of_the_results():
    tables = of("tables").TABLES

    def part(match):
        name = match[1]
        return tables[name]() if name in tables else f"![{name}](comparison/{name.replace(' ', '_')}.svg)"

    text = (ROOT / "docs/comparison/text.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    assert re.sub(r"\{\{(.+?)\}\}", part, text) == page
    assert tables["summary"]() in (ROOT / "README.md").read_text(encoding="utf-8")
    for plot in re.findall(r"\]\((comparison/.+?\.svg)\)", page):
        assert (ROOT / "docs" / plot).read_text(encoding="utf-8").rstrip().endswith("</svg>")
