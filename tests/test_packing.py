"""Packed rows: which examples share a row, and that they do not affect each other."""

import dataclasses
import functools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refusion_jax import sharding
from refusion_jax.data.packing import best_fit
from refusion_jax.data.pipeline import DataConfig, batch_iterator, load_examples, row_use
from refusion_jax.diffusion import slot_diffusion as diffusion
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.sharding import MeshConfig, make_mesh
from refusion_jax.tokenizer import ByteTokenizer
from refusion_jax.training.optimizer import OptimizerConfig
from refusion_jax.training.run import RunConfig, TrainConfig
from refusion_jax.training.step import make_program

TOKENIZER = ByteTokenizer()
MASK = TOKENIZER.mask_id
ROW = 96
EMPTY = 3  # of the source below are dropped
COUNT = 203


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of COUNT examples of many lengths, EMPTY of them without a response."""
    dice = random.Random(0)
    path = tmp_path_factory.mktemp("source") / "a.jsonl"
    with open(path, "w") as file:
        for number in range(COUNT):
            response = "" if number % 80 == 7 else f"{number} " + "r" * dice.randrange(40)
            file.write(json.dumps({"query": "q" * dice.randrange(1, 40), "response": response}) + "\n")
    return str(path)


@pytest.fixture(params=["finite", "finite in order", "tasks"])
def config(request, path):
    if request.param == "tasks":
        return DataConfig(tasks=["arithmetic", "extraction"], max_length=256, packing=True)
    shuffle = request.param == "finite"
    return DataConfig(source="jsonl", paths=path, max_length=ROW, packing=True, shuffle=shuffle)


def examples_of(row) -> list[tuple[int, list[int], int]]:
    """(number, tokens, prompt length) of each example in a row; checks the layout of the row."""
    found, at = [], 0
    totals = row["total_len"].tolist()
    held = np.count_nonzero(totals)
    assert 0 not in totals[:held] and not any(totals[held:])
    for number, prompt, total in zip(row["example_id"], row["prompt_len"], totals[:held], strict=False):
        found.append((int(number), row["tokens"][at : at + total].tolist(), int(prompt)))
        at += total
    assert set(row["tokens"][at:].tolist()) <= {TOKENIZER.pad_id}
    return found


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    jax.tree.map(np.testing.assert_array_equal, batches, others)


# Which examples share a row.


@pytest.mark.parametrize("most", [1, 4, 100])
def test_a_plan_is_whole_and_fits(most):
    lengths = np.random.default_rng(0).integers(1, 101, 5000)
    plan = best_fit(lengths, 100, most)
    rows = np.split(plan.members, plan.borders[1:-1])
    assert len(rows) == len(plan)
    assert sorted(plan.members) == list(range(5000))
    assert max(map(len, rows)) <= most
    totals = np.array([lengths[row].sum() for row in rows])
    assert totals.min() > 0 and totals.max() <= 100
    # Halved lengths fit almost anywhere; only the number of entries limits the rows, and rarely.
    if most == 4:
        assert totals.mean() > 98
    np.testing.assert_array_equal(best_fit(lengths, 100, most).members, plan.members)


def test_a_small_plan():
    plan = best_fit(np.array([60, 50, 39, 10, 41, 100]), 100, 3)
    # 39 leaves 1 beside 60 but 11 beside 50; 10 has room only beside 50; 41 fits in no row.
    assert [row.tolist() for row in np.split(plan.members, plan.borders[1:-1])] == [[0, 2], [1, 3], [4], [5]]


def test_each_epoch_has_every_example_once_and_whole_in_new_company(path):
    config = DataConfig(source="jsonl", paths=path, max_length=ROW, packing=True)
    packed = load_examples(config, TOKENIZER, seed=3)
    alone = load_examples(dataclasses.replace(config, packing=False), TOKENIZER, seed=3)
    assert packed.counts == alone.counts
    epochs = []
    for epoch in range(3):
        wanted = {}
        for place in range(epoch * len(alone), (epoch + 1) * len(alone)):
            ((number, *example),) = examples_of({k: np.atleast_1d(v) for k, v in alone[place].items()})
            wanted[number] = example
        rows = [examples_of(packed[r]) for r in range(epoch * len(packed), (epoch + 1) * len(packed))]
        found = {number: example for row in rows for number, *example in row}
        assert sum(map(len, rows)) == len(found) == COUNT - EMPTY
        assert found == wanted
        epochs.append({frozenset(number % COUNT for number, *_ in row) for row in rows if len(row) > 1})
    # There are few examples of very many lengths, so some share a row again by chance.
    assert all(len(a & b) < len(a) / 3 for a, b in [epochs[:2], epochs[1:], epochs[::2]])
    other = load_examples(config, TOKENIZER, seed=4)
    assert examples_of(other[0]) != examples_of(packed[0])


def test_without_shuffling_rows_follow_the_source(path):
    config = DataConfig(source="jsonl", paths=path, max_length=ROW, packing=True, shuffle=False)
    packed = load_examples(config, TOKENIZER)
    rows = [[number for number, *_ in examples_of(packed[r])] for r in range(2 * len(packed))]
    first = [row[0] for row in rows]
    assert first == sorted(first) and all(row == sorted(row) for row in rows)
    assert rows[len(packed) :] == [[n + COUNT for n in row] for row in rows[: len(packed)]]


def test_rows_of_tasks_are_filled_with_examples_of_their_own():
    config = DataConfig(tasks=["arithmetic", "extraction"], max_length=256, packing=True)
    packed = load_examples(config, TOKENIZER, seed=1)
    alone = load_examples(dataclasses.replace(config, packing=False), TOKENIZER, seed=1)
    seen, begins = set(), set()
    for place in range(200):
        row = examples_of(packed[place])
        begins.add(row[0][0] % 2)
        for number, tokens, prompt in row:
            wanted = alone[number]
            assert tokens == wanted["tokens"][: wanted["total_len"]].tolist()
            assert prompt == wanted["prompt_len"]
            seen.add(number)
    assert len(seen) == sum(len(examples_of(packed[place])) for place in range(200))
    assert begins == {0, 1}


@pytest.mark.parametrize("row_length", [256, 1024])
def test_little_of_a_row_is_padding(row_length):
    config = DataConfig(tasks={"extraction": {"fields": 2}}, max_length=row_length, packing=True)
    held, used = row_use(load_examples(config, TOKENIZER))
    assert used > 0.95 and held > 2.9
    assert row_use(load_examples(dataclasses.replace(config, packing=False), TOKENIZER))[1] < 0.35


def test_places_are_a_limit(path):
    config = DataConfig(source="jsonl", paths=path, max_length=ROW, packing=True, examples_per_row=2)
    packed = load_examples(config, TOKENIZER)
    assert packed[0]["example_id"].shape == (2,)
    assert 1.5 < row_use(packed, len(packed))[0] <= 2
    tasks = DataConfig(tasks="arithmetic", max_length=256, packing=True, examples_per_row=2)
    assert row_use(load_examples(tasks, TOKENIZER))[0] == 2
    for wrong in (-1, "9"):
        with pytest.raises(BadInput, match=f"data.examples_per_row is {wrong!r}, expected"):
            load_examples(dataclasses.replace(tasks, examples_per_row=wrong), TOKENIZER)


def test_batches_are_functions_of_their_number(config):
    """Rows are the same for any number of processes and after resuming."""
    examples = load_examples(config, TOKENIZER)
    whole = take(batch_iterator(examples, 12), 6)
    places = config.max_length // 32
    assert {name: array.shape for name, array in whole[0].items()} == {
        "tokens": (12, config.max_length),
        "prompt_len": (12, places),
        "total_len": (12, places),
        "example_id": (12, places),
    }
    shards = [take(batch_iterator(examples, 12, p, 3), 6) for p in range(3)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert_same(joined, whole)
    resumed = batch_iterator(load_examples(config, TOKENIZER), 12, num_threads=4)
    resumed.set_state({"next_index": 4})
    assert_same(take(resumed, 2), whole[4:])


# Packed rows in training.

CONFIGS = [DiffusionConfig((4, 8), normalisation=name) for name in diffusion.NORMALISATIONS]


def rows_of(groups, width: int, places: int | None):
    """A batch of rows, each with the examples (number, tokens, prompt length) of its group."""
    batch = {"tokens": np.full((len(groups), width), 7, np.int32)}
    for name in ("prompt_len", "total_len", "example_id"):
        batch[name] = np.zeros((len(groups), places or 1), np.int32)
    for row, group in enumerate(groups):
        joined = [token for _, tokens, _ in group for token in tokens]
        batch["tokens"][row, : len(joined)] = joined
        for place, (number, tokens, prompt) in enumerate(group):
            batch["example_id"][row, place] = number
            batch["prompt_len"][row, place], batch["total_len"][row, place] = prompt, len(tokens)
    if places is None:
        batch |= {name: array[:, 0] for name, array in batch.items() if name != "tokens"}
    return batch


@pytest.fixture(scope="module")
def packed_and_alone():
    """The same examples in 8 rows of up to 6, and one per row; some prompts and responses are empty."""
    dice = np.random.default_rng(5)
    groups, number = [], 1000
    for count in (6, 1, 4, 5, 2, 3, 6, 0):
        group = []
        for _ in range(count):
            total = int(dice.integers(1, 16))
            prompt = int(dice.choice([0, total, dice.integers(0, total)], p=[0.1, 0.1, 0.8]))
            group.append((number, dice.integers(0, 256, total).tolist(), prompt))
            number += int(dice.integers(1, 5))
        groups.append(group)
    groups[0][-1][1].extend([1] * (ROW - sum(len(tokens) for _, tokens, _ in groups[0])))  # a full row
    alone = [[example] for group in groups for example in group]
    alone += [[]] * (-len(alone) % 8)
    return rows_of(groups, ROW, 6), rows_of(alone, ROW, None), groups


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda config: config.normalisation)
def noised(request, packed_and_alone):
    """Draws and model inputs of the same examples, packed and one per row."""
    config = request.param

    def of(batch):
        prompt_len, total_len = batch["prompt_len"], batch["total_len"]
        most = config.max_slots(ROW, prompt_len[0].size)
        drawn = diffusion.draw(jax.random.key(2), batch["example_id"], total_len - prompt_len, most, config)
        return drawn, diffusion.rearrange(batch["tokens"], prompt_len, total_len, drawn, MASK, config)

    return [jax.device_get(jax.jit(of)(batch)) for batch in packed_and_alone[:2]]


def test_an_example_is_noised_as_it_would_be_alone(packed_and_alone, noised):
    (drawn, together), (drawn_alone, apart) = noised
    at = 0
    for row, group in enumerate(packed_and_alone[2]):
        start = 0
        for place, (_, tokens, _) in enumerate(group):
            assert drawn.slot_size[row, place] == drawn_alone.slot_size[at]
            assert drawn.mask_probability[row, place] == drawn_alone.mask_probability[at]
            end = start + len(tokens)
            for name in ("tokens", "positions", "ar_weights", "diffusion_weights"):
                ours, theirs = (
                    getattr(together, name)[row, start:end],
                    getattr(apart, name)[at, : len(tokens)],
                )
                np.testing.assert_array_equal(ours, theirs, name)
            asked = (together.ar_weights + together.diffusion_weights)[row, start:end] > 0
            np.testing.assert_array_equal(
                together.targets[row, start:end][asked], apart.targets[at, : len(tokens)][asked]
            )
            assert (together.segments[row, start:end] == place).all()
            start, at = end, at + 1
        assert (together.segments[row, start:] == 6).all()
        assert not (together.ar_weights + together.diffusion_weights)[row, start:].any()
        assert together.has_response[row] == sum(len(tokens) > prompt for _, tokens, prompt in group)
    assert together.ar_count.sum() == apart.ar_count.sum()


def test_losses_and_gradients_are_those_of_the_examples_alone(noised):
    model = Transformer(ModelConfig(260, 1, 16, 2, 1, 8, 32))
    nothing = jnp.zeros((1, 1), jnp.int32)
    params = sharding.unbox(jax.jit(model.init)(jax.random.key(0), nothing, nothing))
    params = jax.tree.map(lambda x: x * 5, params)  # so that the attention mask matters

    def loss(params, part, segments):
        logits, _ = model.apply(params, part.tokens, part.positions, segments=segments)
        return diffusion.loss(logits, part, 0.7)

    (_, together), (_, apart) = noised
    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, ours), our_gradients = value_and_grad(params, together, together.segments)
    (_, theirs), their_gradients = value_and_grad(params, apart, None)
    assert all(value > 0.1 for value in theirs.values())
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(their_gradients))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * largest),
        our_gradients,
        their_gradients,
    )
    _, blind = jax.jit(loss)(params, together, None)
    assert abs(blind["loss"] - theirs["loss"]) > 1e-3, "without segments examples see each other"


def step_metrics(batch, packing: bool, mesh=(1, 1, 1), **changes) -> dict[str, float]:
    run = RunConfig(
        ModelConfig(260, 1, 16, 2, 2, 8, 32),
        DataConfig(max_length=ROW, packing=packing, examples_per_row=6),
        TrainConfig(
            **{"steps": 1, "batch_size": len(batch["tokens"]), "save_every": 1, "log_every": 1} | changes
        ),
        CONFIGS[0],
        OptimizerConfig(),
        MeshConfig(*mesh),
    )
    program = make_program(run, make_mesh(run.mesh, jax.devices()[: np.prod(mesh)]), MASK)
    placed = jax.make_array_from_process_local_data(program.batch_sharding, batch)
    state = program.init.lower().compile()()
    _, values = program.step.lower(state, placed).compile()(state, placed)
    return {name: float(value) for name, value in values.items()}


def test_a_step_on_any_mesh_is_that_of_the_examples_alone(packed_and_alone):
    packed, alone, _ = packed_and_alone
    wanted = step_metrics(alone, packing=False)
    found = step_metrics(packed, packing=True, mesh=(2, 2, 2), microbatches=2)
    for name in ("loss", "ar_loss", "diffusion_loss", "grad_norm"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
    assert found["tokens"] == wanted["tokens"] == packed["total_len"].sum()
    assert found["padding"] == pytest.approx(1 - found["tokens"] / (8 * ROW), rel=1e-6)
