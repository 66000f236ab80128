"""The scripts of docs/comparison/phases.py: what would run, in which order, how it is chosen and counted."""

import importlib
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from refusion_jax import config
from refusion_jax.serving.methods import METHODS
from refusion_jax.training.run import RunConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = ("settings", "figures", "tables", "phase_tables", "train_runs", "phases", "phases_drive")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import each other as modules of their folder."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "comparison")
    monkeypatch.chdir(ROOT)
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def of(name):
    return importlib.import_module(name)


@pytest.fixture
def setup(tmp_path):
    return of("phases").Setup(folder=tmp_path)


def counts(right, forwards=50):
    verdicts = "1" * right + "0" * (10 - right)
    row = {"problems": 10, "right": right, "tokens": 100, "forwards": forwards, "verdicts": verdicts}
    return {task: row | {"answer_tokens": 80, "seconds": 2.0} for task in ("paths", "gsm8k")}


def figure(stage, way, right, forwards=50, settings=None, at_a_time=1):
    made = {"stage": stage, "way": way, "settings": settings or {}, "at_a_time": at_a_time}
    made |= {"command": "decode", "device": "a GPU", "jax": "0", "python": "3"}
    return made | {"tasks": counts(right, forwards)}


def searched(setup, rights, forwards=(50, 50, 50)):
    phases = of("phases")
    for share, right, count in zip(phases.SHARES, rights, forwards, strict=True):
        phases.append(setup, f"anchored_{share}", figure("validation", "exact", right, count))


def test_every_run_can_be_trained_and_takes_the_same_steps(setup):
    phases, train_runs = of("phases"), of("train_runs")
    searched(setup, (7, 8, 7))
    for name in ("ar_refusion", "anchored"):
        phases.append(setup, name, figure("validation", "exact", 8))
    for name, run in phases.RUNS.items():
        overrides = phases.overrides(name, setup)
        arguments = train_runs.command(name, overrides, setup.config, setup.folder)
        given = [part for part in arguments if part.startswith("--config.")]
        made = config.load("configs/comparison.py", given, RunConfig)
        assert (made.objective, made.optimizer.learning_rate) == (run.objective, 1e-3)
        before = phases.overrides(run.after, setup)["train.steps"] if run.after else 0
        assert made.train.first_batch == before
        whole = 1800 if name == "ar_half" else 2700 if run.searched else 3600
        assert made.train.steps + before == whole
        if run.after:
            assert made.train.init_from == str(setup.folder / run.after)
    assert (made.train.distill_weight, made.train.teacher) == (0.5, str(setup.folder / "ar_half"))


def test_choices_wait_for_results_and_follow_the_rule(setup):
    phases = of("phases")
    assert phases.overrides("anchored", setup) is None and phases.overrides("taught", setup) is None
    searched(setup, (9, 7, 9), (50, 10, 40))  # the second is not within two points of the most accurate
    chosen = phases.overrides("anchored", setup)
    assert chosen["diffusion.ar_share"] == 0.5
    assert phases.overrides("taught", setup) is None
    phases.append(setup, "anchored", figure("validation", "exact", 8))
    phases.append(setup, "ar_refusion", figure("validation", "exact", 9))
    assert "diffusion.ar_share" not in phases.overrides("taught", setup)


def test_every_figure_can_be_decoded(setup):
    """The settings of every stage are legal, and only missing figures are asked for."""
    phases = of("phases")
    for name, run in phases.RUNS.items():
        found = []
        for stage in phases.STAGES:
            asks = list(phases.asks(name, stage, found, setup))
            for ask in asks:
                way = phases.WAYS[ask.way]
                METHODS[way.method](
                    mask_id=0, eos_id=1, gen_length=setup.gen_length, **(way.fixed | ask.settings)
                )
                assert not ask.is_in(found)
                found.append(figure(stage, ask.way, 8, settings=ask.settings, at_a_time=ask.at_a_time))
                assert ask.is_in(found)
        kinds = {(line["stage"], line["way"]) for line in found}
        stages = [] if not run.ways else ["validation"] if run.searched else ["test", "speed"]
        assert kinds >= {(stage, way) for stage in stages for way in run.ways}
        assert not run.searched or kinds == {("validation", "exact")}


def test_the_front_is_what_no_setting_beats():
    settings = of("settings")
    tried = {"a": (8, 80), "b": (9, 90), "c": (9, 95), "d": (9, 50), "e": (3, 10)}
    entries = [{"settings": name, "tasks": counts(*of)} for name, of in tried.items()]
    assert settings.front(entries) == ["d"]  # as accurate as b and c in fewer passes; e is too inaccurate
    entries[0]["tasks"] = counts(9, 40)
    entries[1]["tasks"] = counts(10, 60)
    assert settings.front(entries) == ["b"]  # all others are ten points below
    settings.WIDTH = 0.11
    assert settings.front(entries) == ["b", "a"]


def test_aup_by_hand():
    aup = of("figures").aup
    assert aup([(1.0, 79.0)], 79.0) == 79.0
    assert aup([(4.0, 80.0)], 90.0) == 320.0  # the first rectangle has no weight
    # 1 * 80, then two trapezoids of width 1; weights: 80 has 1, 76 exp(-0.15) = 0.860708; 60 does not count.
    expected = 80 + (80 + 76 * 0.860708) / 2 + (76 * 0.860708 + 80) / 2
    assert aup([(3.0, 80.0), (1.0, 80.0), (4.0, 60.0), (2.0, 76.0)], 80.0) == pytest.approx(
        expected, rel=1e-6
    )
    assert math.isclose(expected, 225.4138, rel_tol=1e-6)


def test_the_paired_interval_is_that_of_all_resamples():
    """Four problems of one task: the 256 equally likely resamples, one by one."""
    figures = of("figures")
    ours, theirs = {"a": {"verdicts": "1101"}}, {"a": {"verdicts": "1010"}}
    changes = [0, 1, -1, 1]
    means = [np.mean(drawn) for drawn in itertools.product(changes, repeat=4)]
    found, low, high = figures.difference(ours, theirs)
    assert found == 25.0
    assert [low, high] == [100 * np.quantile(means, end) for end in (0.025, 0.975)]
    # Equal verdicts differ by nothing, whatever the accuracy; a second task halves the difference.
    assert figures.difference(ours, ours) == (0, 0, 0)
    same = {"b": {"verdicts": "0000"}}
    assert figures.difference(ours | same, theirs | same)[0] == 12.5


def test_the_section_of_the_page(tmp_path, monkeypatch):
    """Empty without test figures, one row per run and way that has some; MDM and BD3 stay."""
    phases, figures, phase_tables = of("phases"), of("figures"), of("phase_tables")
    (tmp_path / "results").symlink_to(ROOT / "docs/comparison/results")
    monkeypatch.setattr(figures, "HERE", tmp_path)
    found = {}
    monkeypatch.setattr(phase_tables, "read", lambda results, name: found.get(name, []))
    assert phase_tables.section() == ""
    found["ar"] = [figure("test", "ar", 6, 100)]
    found["anchored"] = [
        figure("test", "threshold", 5, settings={"slot_size": 32}),
        figure("test", "exact", 8, 25),
        *(figure("speed", "exact", 8, count, at_a_time=1) for count in (30, 20)),
    ]
    found["anchored_0.33"] = [figure("validation", "exact", 7)]
    section = phase_tables.section()
    rows = [
        line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| AR, then anch")
    ]
    assert [row[1] for row in rows[:2]] == ["thresholds", "exact"]
    ours = rows[1]
    assert (
        ours[2].startswith("80.0 ±")
        and ours[3].startswith("+20.0 (")
        and ours[4:7] == ["320", "4.00", "40"]  # 160 tokens in 4 s
    )
    assert "| 0.33 | 70.0 ±" in section and section.count("| MDM |") == section.count("| BD3 |") == 1
    assert "a GPU, JAX 0, Python 3" in section and "{{" not in section
    assert phases.is_done(phases.Setup(folder=tmp_path), "ar", "counted") is False


def test_the_most_wanted_job_that_can_start(setup):
    phases, drive = of("phases"), of("phases_drive")

    def labels():
        return list(dict.fromkeys(job.label for job in drive.wanted(setup, phases.TARGETS)))

    def finish(name):
        steps = setup.steps_of(phases.RUNS[name])
        (setup.folder / name / "checkpoints" / str(steps)).mkdir(parents=True)

    assert labels() == ["train ar", "train ar_half", "train refusion"]
    finish("ar")
    finish("ar_half")
    by_share = [f"train anchored_{share}" for share in phases.SHARES]
    assert labels() == [
        "decode ar",
        "decode ar_half",
        *by_share,
        "train refusion",
        "train adapter",
        "train ar_refusion",
    ]
    phases.append(setup, "ar", {"stage": "counted"})
    searched(setup, (7, 8, 7))
    for share in phases.SHARES:
        phases.append(setup, f"anchored_{share}", {"stage": "counted"})
    rest = ["train refusion", "train adapter", "train ar_refusion"]
    assert labels() == ["decode ar_half", "train anchored", *rest]
    # Timed is what is decoded and still there, once.
    assert [job.label for job in drive.timings(setup, phases.TARGETS)] == ["time ar"]
    phases.append(setup, "ar", {"stage": "timed"})
    assert not list(drive.timings(setup, phases.TARGETS))


def test_the_driver_stops_in_time_and_goes_on_after_a_failure(setup, monkeypatch):
    drive = of("phases_drive")
    codes = {
        "quick": "pass",
        "broken": "raise SystemExit(3)",
        "slow": "import time; time.sleep(60)",
        # ignores the first signal
        "stubborn": "import signal, time; signal.signal(signal.SIGTERM, lambda *_: 0); time.sleep(60)",
    }
    started = []

    def wanted(*_):
        for name, code in codes.items():
            if name != "quick" or name not in started:
                started.append(name)
                yield drive.Job("decode", name, ["python", "-c", code])

    monkeypatch.setattr(drive, "record", lambda *_: None)
    monkeypatch.setattr(drive, "SHORTEST", 0)
    start = time.monotonic()
    driver = drive.Driver(setup, ["ar"], wanted, start + 2, start + 3)
    driver.run(["0", "1"])
    assert 2 <= time.monotonic() - start < 10
    assert driver.failed == ["decode broken"]
