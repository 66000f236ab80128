"""An AR run and an anchored run after it, by the commands of docs/training.md; where data begin."""

import functools
import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from refusion_jax import load, train
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.convert import convert
from refusion_jax.data.pipeline import DataConfig, batch_iterator, load_examples
from refusion_jax.data.pipeline import load_examples_in_worker as open_in_worker
from refusion_jax.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]
SHORT = ["--config.train.steps=3", "--config.train.save_every=2", "--config.train.log_every=1"]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def commands(title: str) -> list[list[str]]:
    """Arguments of the train commands in a section of the page."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## )", PAGE, flags=re.DOTALL | re.MULTILINE)[1]
    (block,) = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    lines = [shlex.split(line) for line in block.splitlines()]
    assert all(line[:3] == ["python", "-m", "refusion_jax.train"] for line in lines)
    return [line[3:] for line in lines]


FIRST, SECOND = commands("Anchored training")
(TAUGHT,) = commands("Teacher")


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """A folder with the runs of both commands, cut short."""
    folder = tmp_path_factory.mktemp("phases")
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (FIRST, SECOND, TAUGHT):
            assert train.main([*command, *SHORT]) == 0
    return folder / "runs"


def rows(run: Path) -> list[list[str]]:
    """The columns of metrics.csv that do not depend on interruptions."""
    return [line.split(",")[:7] for line in (run / "metrics.csv").read_text().splitlines()]


def test_what_the_phases_say_of_their_models(phases):
    sizes = {"slot_sizes": (4, 8, 16, 32), "border": "ar", "first_token": "next"}
    assert hf.decoding_defaults(phases / "tiny_ar") == sizes | {"verify": "threshold"}
    assert hf.decoding_defaults(phases / "tiny_anchored") == sizes | {"verify": "exact"}
    fields = json.loads((phases / "tiny_anchored" / "config.json").read_text())
    assert fields["slot_sizes"] == [4, 8, 16, 32] and fields["objective"] == "refusion"
    assert "verify" not in json.loads((phases / "tiny_ar" / "config.json").read_text())
    convert(phases / "tiny_anchored", phases / "exported")
    assert hf.decoding_defaults(phases / "exported") == sizes | {"verify": "exact"}
    assert load(phases / "exported")[2].mask_id == ByteTokenizer().mask_id


def test_the_second_phase_goes_on_with_the_data_of_the_first(phases, tmp_path, monkeypatch):
    """Its first batch is the one after the documented 1800, and it starts from the first phase's weights."""
    config = yaml.safe_load((phases / "tiny_anchored" / "config.yaml").read_text())
    batches = batch_iterator(load_examples(DataConfig(**config["data"]), ByteTokenizer()), 32)
    batches.set_state({"next_index": 1800})
    lengths = [int(next(batches)["total_len"].sum()) for _ in range(3)]
    header, *lines = (phases / "tiny_anchored" / "metrics.csv").read_text().splitlines()
    assert [int(line.split(",")[header.split(",").index("tokens")]) for line in lines] == lengths
    # With no share and no learning rate, a run that starts from the first phase keeps its weights.
    monkeypatch.chdir(phases.parent)
    still = [f"--workdir={tmp_path / 'still'}", *SHORT, "--config.optimizer.learning_rate=0.0"]
    assert train.main([*SECOND, *still]) == 0
    wanted, found = (load(folder)[1] for folder in (phases / "tiny_ar", tmp_path / "still"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(("name", "command"), [("tiny_anchored", SECOND), ("tiny_taught", TAUGHT)])
def test_a_run_that_dies_goes_on_to_the_last_bit(phases, monkeypatch, capsys, name, command):
    run = phases / name
    whole, params = rows(run), load(run)[1]
    shutil.rmtree(run / "checkpoints" / "3")
    monkeypatch.chdir(phases.parent)
    assert train.main([*command, *SHORT]) == 0
    assert "resuming from step 2 of 3" in capsys.readouterr().out
    assert rows(run) == whole
    jax.tree.map(np.testing.assert_array_equal, load(run)[1], params)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("diffusion.ar_share=0.5", "diffusion.ar_share: is 0.5, the run in runs/tiny_anchored has 0.33"),
        ("train.first_batch=0", "train.first_batch: is 0, the run in runs/tiny_anchored has 1800"),
        (
            "objective=ar",
            "diffusion.ar_share: must be 0 unless objective is refusion, found 0.33 and ar",
        ),
        ("train.first_batch=-1", "train.first_batch must be at least 0, got -1"),
        ("diffusion.ar_share=2", "diffusion.ar_share must be in [0, 1], got 2.0"),
    ],
)
def test_what_may_not_change_or_cannot_be(phases, monkeypatch, capsys, flag, message):
    monkeypatch.chdir(phases.parent)
    assert train.main([*SECOND, *SHORT, f"--config.{flag}"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_runs_from_before_these_fields_resume(phases, tmp_path, monkeypatch, capsys):
    """Their config.yaml says nothing of them, which means 0."""
    run = tmp_path / "run"
    shutil.copytree(phases / "tiny_ar", run)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    del stored["diffusion"]["ar_share"], stored["train"]["first_batch"]
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    monkeypatch.chdir(phases.parent)
    assert train.main([*FIRST, *SHORT, f"--workdir={run}"]) == 0
    assert "resuming from step 3 of 3" in capsys.readouterr().out
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    assert train.main([*FIRST, *SHORT, f"--workdir={run}", "--config.train.first_batch=2"]) == 2
    assert f"train.first_batch: is 2, the run in {run} has 0" in capsys.readouterr().err


def test_the_teacher_is_not_saved_and_may_not_change(phases, tmp_path, monkeypatch, capsys):
    saved, plain = (
        {
            item.parent.name: sorted(json.loads(item.read_text())["tree_metadata"])
            for item in (phases / run / "checkpoints" / "3").rglob("_METADATA")
        }
        for run in ("tiny_taught", "tiny_anchored")
    )
    assert saved == plain and set(saved) == {"params", "optimizer"}
    teacher = tmp_path / "teacher"
    shutil.copytree(phases / "tiny_ar", teacher)
    monkeypatch.chdir(phases.parent)
    moved = [*TAUGHT, *SHORT, f"--config.train.teacher={teacher}"]
    assert train.main(moved) == 0  # the same teacher elsewhere
    shutil.rmtree(teacher)
    shutil.copytree(phases / "tiny_anchored", teacher)
    capsys.readouterr()
    assert train.main(moved) == 2
    err = capsys.readouterr().err
    assert f"train.teacher: {teacher} has the SHA-256" in err and err.count("\n") == 1
    assert train.main([*TAUGHT, *SHORT, "--config.train.distill_weight=0.25"]) == 2
    assert "train.distill_weight: is 0.25, the run in runs/tiny_taught has 0.5" in capsys.readouterr().err


def test_nothing_is_learnt_from_oneself(phases, tmp_path, monkeypatch):
    """All in order, the student equal to the teacher, no weight on labels: the divergence is 0 at first."""
    monkeypatch.chdir(phases.parent)
    run = tmp_path / "run"
    flags = [f"--workdir={run}", "--config.diffusion.ar_share=1", "--config.train.distill_weight=1"]
    assert train.main([*TAUGHT, *SHORT, *flags]) == 0
    header, first, *_ = (run / "metrics.csv").read_text().splitlines()
    values = dict(zip(header.split(","), first.split(","), strict=True))
    assert abs(float(values["loss"])) < 1e-6 and float(values["grad_norm"]) < 1e-4


class Recording:
    """Rows by index that remember which were read."""

    def __init__(self):
        self.read = set()

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.read.add(index)
        return {"example_id": np.int32(index)}


def test_skipped_batches_are_not_read():
    examples = Recording()
    batches = batch_iterator(examples, 4, process_index=1, process_count=2, num_threads=1)
    batches.set_state({"next_index": 1000})
    assert next(batches)["example_id"].tolist() == [4002, 4003]
    batches.close()
    assert min(examples.read) == 4002


@pytest.mark.parametrize("packing", [False, True])
def test_worker_processes_skip_alike(packing):
    config = DataConfig(tasks=["arithmetic"], max_length=128, packing=packing)
    examples, opener = (
        load_examples(config, ByteTokenizer()),
        functools.partial(open_in_worker, config, None, 0),
    )
    whole = batch_iterator(examples, 4)
    wanted = [next(whole) for _ in range(5)][3:]
    late = batch_iterator(examples, 4, process_index=1, process_count=2, workers=1, open_examples=opener)
    late.set_state({"next_index": 3})
    for batch in wanted:
        jax.tree.map(np.testing.assert_array_equal, next(late), {name: x[2:] for name, x in batch.items()})
    late.close()
