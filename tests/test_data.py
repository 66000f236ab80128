"""Sources and pipeline: reading, dropped examples, errors, and batches as a function of the step."""

import contextlib
import dataclasses
import functools
import gzip
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from refusion_jax.data.examples import Counts
from refusion_jax.data.pipeline import DataConfig, batch_iterator, load_examples
from refusion_jax.data.sources.example import Example
from refusion_jax.data.sources.jsonl import FIELDS, read_jsonl
from refusion_jax.data.tasks.registry import make_task
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}


def load_jsonl(paths, fields=FIELDS):
    return [example for path in paths for example in read_jsonl(path, fields)]


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines))
    return str(path)


def numbered(path, count):
    """A file in which example i is about the number i."""
    records = ({"query": f"say {i}", "response": str(i)} for i in range(count))
    return write_lines(path, *records)


def jsonl_config(*paths, **settings):
    return DataConfig(source="jsonl", paths=paths, **{"max_length": 32, **settings})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def read_back(batch, row):
    """Prompt and response of one row as text; checks the layout of the row."""
    tokens = batch["tokens"][row].tolist()
    prompt, total = int(batch["prompt_len"][row]), int(batch["total_len"][row])
    assert tokens[total - 1] == TOKENIZER.eos_id
    assert set(tokens[total:]) <= {TOKENIZER.pad_id}
    assert TOKENIZER.eos_id not in tokens[: total - 1]
    return TOKENIZER.decode(tokens[:prompt]), TOKENIZER.decode(tokens[prompt:total])


# JSONL


def test_jsonl_reads_both_formats_and_skips_blank_lines(tmp_path):
    system = {"role": "system", "content": "be brief"}
    path = write_lines(
        tmp_path / "a.jsonl",
        {"query": "2+2?", "response": "4 é", "further": 1},
        b"",
        {"messages": [USER, ASSISTANT]},
        b"   \r",
        {"messages": [system, USER, ASSISTANT, USER, {"role": "assistant", "content": "hm"}, USER]},
        {"query": "", "response": ""},
    )
    assert load_jsonl([path]) == [
        Example("2+2?", "4 é"),
        Example("hi", "ho"),
        Example([system, USER, ASSISTANT, USER], "hm"),
        Example("", ""),
    ]
    assert load_jsonl([path, path]) == load_jsonl([path]) * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"query": "a", "response": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ([], "a JSON list, expected an object"),
        ({"query": "a"}, r"has no 'response' but \['query'\]"),
        ({"prompt": "a", "response": "b"}, "has no 'query' but .*expected query and response"),
        ({"query": 1, "response": "b"}, "query is 1, expected text"),
        ({"query": "a", "response": None}, "response is None, expected text"),
        ({"query": "a", "response": "\ud800"}, "response has a lone surrogate"),
        ({"messages": "a"}, "messages is 'a', expected a list"),
        ({"messages": [USER, {"role": "assistant"}]}, r"messages\[1\].content is None"),
        ({"messages": [USER]}, r"roles \['user'\], expected a message by the assistant"),
        ({"messages": [ASSISTANT, USER]}, "at least one before it"),
        ({"messages": []}, r"roles \[\]"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "a.jsonl", {"query": "a", "response": "b"}, b"", line)
    lines = read_jsonl(path)
    assert next(lines) == Example("a", "b")
    with pytest.raises(BadInput, match=f"a.jsonl:3: .*{message}"):
        next(lines)


def test_compressed_lines_with_fields_of_other_names(tmp_path):
    records = [{"question": f"say {i}", "answer": str(i)} for i in range(30)]
    plain = write_lines(tmp_path / "a.jsonl", *records)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    wanted = [Example(f"say {i}", str(i)) for i in range(30)]
    assert load_jsonl([plain, packed], ("question", "answer")) == wanted * 2
    names = {"query_field": "question", "response_field": "answer"}
    batch = next(batch_iterator(load_examples(jsonl_config(str(packed), **names), TOKENIZER), 4))
    assert read_back(batch, 0) in wanted
    with pytest.raises(BadInput, match=r"a.jsonl.gz:1: has no 'query' but \['answer', 'question'\]"):
        load_jsonl([packed])
    with pytest.raises(BadInput, match=r"has no 'text' but .*; expected question and text, or messages"):
        load_jsonl([plain], ("question", "text"))


@pytest.mark.parametrize("damage", ["cut", "no block", "wrong sum", "plain"])
def test_a_damaged_compressed_file_is_bad_input(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    content = gzip.compress(b'{"query": "a", "response": "b"}\n' * 1000)
    damaged = {
        "cut": content[:-20],
        "no block": content[:10] + b"\xff" * 20,
        "wrong sum": content[:-8] + bytes(8),
        "plain": b"{}",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(BadInput, match=r"a.jsonl.gz: cannot be read: \S"):
        load_jsonl([path])


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(BadInput, match=r"missing.jsonl: cannot be read: No such file"):
        load_jsonl([tmp_path / "missing.jsonl"])
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        load_jsonl([tmp_path])
    full = numbered(tmp_path / "full.jsonl", 2)
    for content in b"", b"\n \n":
        empty = write_lines(tmp_path / "empty.jsonl", content)
        with pytest.raises(BadInput, match=r"empty\.jsonl: holds no examples"):
            load_jsonl([full, empty])


# TFDS


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    from refusion_jax.data.sources.tfds import jsonl_to_tfds

    folder = tmp_path_factory.mktemp("tfds")
    train = numbered(folder / "train.jsonl", 20)
    conversation = {"messages": [USER, ASSISTANT, USER, {"role": "assistant", "content": "é"}]}
    test = write_lines(folder / "test.jsonl", {"query": "é", "response": "b"}, conversation)
    jsonl_to_tfds({"train": [train], "test": [train, test]}, folder / "made")
    return folder / "made"


def test_tfds_gives_what_the_jsonl_files_hold(tfds_folder):
    from refusion_jax.data.sources.tfds import TfdsSource

    files = [tfds_folder.parent / "train.jsonl", tfds_folder.parent / "test.jsonl"]
    assert list(TfdsSource(tfds_folder, "train")) == load_jsonl(files[:1])
    test = TfdsSource(next(tfds_folder.glob("*/*/")), "test")
    assert list(test) == load_jsonl(files)
    assert test[len(test) - 1] == Example([USER, ASSISTANT, USER], "é")
    assert len(TfdsSource(tfds_folder, "train[:25%]")) == 5


def test_tfds_batches_equal_jsonl_batches(tfds_folder):
    stored = DataConfig(source="tfds", paths=(str(tfds_folder),), max_length=32)
    plain = jsonl_config(str(tfds_folder.parent / "train.jsonl"))
    batches = [
        take(batch_iterator(load_examples(config, TOKENIZER, seed=5), 8), 6) for config in (stored, plain)
    ]
    assert_same(*batches)


def test_tfds_bad_input(tfds_folder, tmp_path):
    from refusion_jax.data.sources.tfds import TfdsSource, jsonl_to_tfds

    with pytest.raises(BadInput, match="found none"):
        TfdsSource(tmp_path / "missing", "train")
    with pytest.raises(BadInput, match="split 'dev' cannot be read, the dataset has test, train"):
        TfdsSource(tfds_folder, "dev")
    with pytest.raises(BadInput, match="exists already"):
        jsonl_to_tfds({"train": [tfds_folder.parent / "train.jsonl"]}, tfds_folder)
    broken = write_lines(tmp_path / "broken.jsonl", {"query": "a", "response": "b"}, b"{")
    with pytest.raises(BadInput, match=r"broken\.jsonl:2: not valid JSON"):
        jsonl_to_tfds({"train": [broken]}, tmp_path / "new")
    with pytest.raises(BadInput, match="expected one TFDS folder"):
        load_examples(DataConfig(source="tfds"), TOKENIZER)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("dataset_info.json", "array_record", "tfrecord", "is stored as tfrecord, expected array_r"),
        ("dataset_info.json", "{", "[", "cannot be read as a TFDS dataset"),
        ("features.json", '"query"', '"question"', r"\['messages', 'question', 'response'\], expected"),
        ("features.json", "{", "", "cannot be read as a TFDS dataset"),
        ("jsonl_examples-train.array_record-00000-of-00001", "", "", "split 'train' cannot be read"),
    ],
)
def test_a_damaged_dataset_is_bad_input(tfds_folder, tmp_path, file, old, new, message):
    from refusion_jax.data.sources.tfds import TfdsSource

    folder = shutil.copytree(next(tfds_folder.glob("*/*/")), tmp_path / "copy")
    content = (folder / file).read_text(errors="replace")
    (folder / file).write_text(content.replace(old, new) if old else "")
    with pytest.raises(BadInput, match=f"copy: .*{message}"):
        TfdsSource(folder, "train")


@pytest.mark.parametrize(
    ("source", "unwanted"),
    [
        ("tasks=('arithmetic',)", "jax flax optax orbax tensorstore grain sentencepiece tensorflow_datasets"),
        # The order of a finite source comes from Grain, which imports JAX and Orbax.
        ("source='jsonl', paths=('lines.jsonl',)", "flax optax sentencepiece tensorflow_datasets"),
    ],
)
def test_what_a_worker_imports(tmp_path, source, unwanted):
    """A worker unpickles a function of the data package and starts no backend of JAX."""
    (tmp_path / "lines.jsonl").write_text('{"query": "1", "response": "2"}\n' * 4)
    worker = f"""
import functools, pickle, sys
import refusion_jax.train
from refusion_jax.data.pipeline import DataConfig, load_examples_in_worker
made = functools.partial(load_examples_in_worker, DataConfig({source}), None, 0)
opened = pickle.loads(pickle.dumps(made))
opened()[3]
print(*(name for name in {unwanted.split()} if name in sys.modules))
if "jax" in sys.modules:
    assert not sys.modules["jax._src.xla_bridge"]._backends
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run(
        [sys.executable, "-c", worker], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == ""


# Rows


def test_rows_hold_prompt_response_eos_and_padding(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"query": "ab", "response": "cdé"})
    batch = next(batch_iterator(load_examples(jsonl_config(path, max_length=12), TOKENIZER), 2))
    eos, pad = TOKENIZER.eos_id, TOKENIZER.pad_id
    row = [*b"ab", *"cdé".encode(), eos, *[pad] * 5]
    assert batch["tokens"].tolist() == [row, row]
    assert batch["prompt_len"].tolist() == [2, 2]
    assert batch["total_len"].tolist() == [7, 7]
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "tokens": ((2, 12), np.int32),
        "prompt_len": ((2,), np.int32),
        "total_len": ((2,), np.int32),
        "example_id": ((2,), np.int32),
    }


def test_responses_are_filled_up_with_eos(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"query": "ab", "response": "x" * n} for n in (1, 3, 4, 9)))
    config = jsonl_config(path, max_length=12, shuffle=False, eos_multiple=4)
    examples = load_examples(config, TOKENIZER)
    assert examples.counts[path] == Counts(3, 1, 0)  # 9 tokens and EOS are padded to 12
    batch = next(batch_iterator(examples, 3))
    assert batch["total_len"].tolist() == [6, 6, 10]
    assert [row[2:] for row in batch["tokens"].tolist()] == [
        [*b"x" * n, *[TOKENIZER.eos_id] * (fill - n), *[TOKENIZER.pad_id] * (10 - fill)]
        for n, fill in ((1, 4), (3, 4), (4, 8))
    ]


def test_further_blocks_of_eos_are_drawn_for_each_example(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", *({"query": "a", "response": "x" * (i % 3)} for i in range(1, 91))
    )
    config = jsonl_config(path, max_length=17, shuffle=False, eos_multiple=4, eos_extra_blocks=4)
    examples = load_examples(config, TOKENIZER)
    assert examples.counts[path].empty == 30 and 2 <= examples.counts[path].too_long <= 22  # one in five
    rows = [examples[place] for place in range(2 * len(examples))]
    lengths = np.asarray([row["total_len"] for row in rows])
    values, counts = np.unique(lengths, return_counts=True)
    assert values.tolist() == [5, 9, 13, 17] and counts.min() > 8
    np.testing.assert_array_equal(
        lengths[: len(examples)], lengths[len(examples) :]
    )  # of the example, not the epoch
    packed = load_examples(
        dataclasses.replace(config, max_length=64, packing=True, eos_extra_blocks=2), TOKENIZER
    )
    for place in range(len(packed)):
        row = packed[place]
        assert ((row["total_len"] == 0) | (row["total_len"] % 4 == 1)).all()
        assert row["total_len"].sum() <= 64


def test_prompts_are_rendered(tmp_path):
    class Templated(ByteTokenizer):
        has_chat_template = True

    path = write_lines(
        tmp_path / "a.jsonl",
        {"query": "hi", "response": "x"},
        {"messages": [USER, ASSISTANT, USER, ASSISTANT]},
    )
    config = jsonl_config(path, shuffle=False, max_length=64)
    raw = next(batch_iterator(load_examples(config, TOKENIZER), 2))
    conversation = "user: hi\nassistant: ho\nuser: hi\nassistant: "
    assert [read_back(raw, row) for row in range(2)] == [("hi", "x"), (conversation, "ho")]
    templated = next(batch_iterator(load_examples(config, Templated()), 2))
    assert read_back(templated, 0) == ("user: hi\nassistant: ", "x")


def test_unusable_examples_are_dropped_whole_and_counted(tmp_path, caplog):
    records = [{"query": "q" * n, "response": "r"} for n in range(1, 11)]
    records[2]["response"] = ""
    records[4]["response"] = " \n"
    path = write_lines(tmp_path / "a.jsonl", *records)
    with caplog.at_level(logging.WARNING):
        examples = load_examples(jsonl_config(path, max_length=10, shuffle=False), TOKENIZER)
    # 8 tokens of prompt, 1 of response and EOS just fit.
    assert examples.counts == {path: Counts(kept=6, too_long=2, empty=2)}
    assert len(examples) == 6
    assert "6 examples kept, 2 longer than max_length and 2 with an empty response" in caplog.text
    batch = next(batch_iterator(examples, 12))
    assert batch["prompt_len"].tolist() == [1, 2, 4, 6, 7, 8] * 2
    # Ids count all examples of the source, dropped ones included, and continue in the next epoch.
    assert batch["example_id"].tolist() == [0, 1, 3, 5, 6, 7, 10, 11, 13, 15, 16, 17]


def test_a_source_with_nothing_left_is_bad_input(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"query": "abcdef", "response": "gh"},
        {"query": "abcde", "response": "gh"},
        {"query": "a", "response": ""},
    )
    message = r"a.jsonl: no example can be used with data.max_length 7 .*2 longer .* and 1 with an empty"
    with pytest.raises(BadInput, match=message + ".*the shortest takes 8"):
        load_examples(jsonl_config(path, max_length=7), TOKENIZER)
    config = DataConfig(tasks=["extraction"], max_length=20)
    with pytest.raises(BadInput, match=r"Extraction\(.*no example can be used .* 1024 longer"):
        load_examples(config, TOKENIZER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data.tasks is empty, expected some of arithmetic, .*word_problems"),
        ({"tasks": {"arithmetic": {"share": 0}}}, "arithmetic.share is 0, expected 1 or more turns"),
        ({"tasks": {"arithmetic": 3}}, "arithmetic is set to 3"),
        ({"tasks": ["chess"]}, "task is 'chess'"),
        ({"tasks": {"arithmetic": {"digit": 1}}}, "arithmetic.digit is no setting"),
        ({"tasks": "arithmetic", "split": "dev"}, "split is 'dev'"),
        ({"source": "csv"}, "data.source is 'csv', expected tasks, jsonl or tfds"),
        ({"source": "jsonl"}, "data.paths is empty"),
        ({"tasks": "arithmetic", "max_length": 1}, "data.max_length is 1, expected 2 or more"),
        ({"tasks": "arithmetic", "max_length": "9"}, "data.max_length is '9'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        load_examples(DataConfig(**settings), TOKENIZER)


# Order


def test_each_epoch_of_a_finite_source_has_every_example_in_a_new_order(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 30)

    def epochs(seed):
        batches = take(batch_iterator(load_examples(jsonl_config(path), TOKENIZER, seed), 10), 9)
        assert all(
            read_back(batch, row)[1] == str(batch["example_id"][row] % 30)
            for batch in batches
            for row in range(10)
        )
        return np.concatenate([batch["example_id"] for batch in batches]).reshape(3, 30)

    indices = epochs(seed=0)
    for epoch in range(3):
        assert sorted(indices[epoch]) == list(range(30 * epoch, 30 * epoch + 30))
    orders = [tuple(order % 30) for order in (*indices, *epochs(seed=1))]
    assert len(set(orders)) == 6  # also not seed 0's second epoch as seed 1's first
    assert tuple(range(30)) not in orders
    np.testing.assert_array_equal(indices, epochs(seed=0))


def test_batches_go_across_the_end_of_an_epoch(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 3)
    examples = load_examples(jsonl_config(path), TOKENIZER)
    indices = np.concatenate([b["example_id"] for b in take(batch_iterator(examples, 7), 3)])
    assert sorted(indices) == list(range(21))


def test_tasks_are_endless_and_take_turns():
    tasks = {"arithmetic": {"digits": 2}, "extraction": {"fields": 2}}
    config = DataConfig(tasks=tasks, split="validation", max_length=128)
    examples = load_examples(config, TOKENIZER, seed=3)
    assert examples.counts.keys() == tasks.keys()
    batch = take(batch_iterator(examples, 6), 2)[1]
    assert batch["example_id"].tolist() == [6, 7, 8, 9, 10, 11]
    for row, place in enumerate(batch["example_id"].tolist()):
        name = list(tasks)[place % 2]
        expected = make_task(name, tasks[name]).example(place // 2, "validation", 3)
        assert read_back(batch, row) == expected


def test_tasks_have_as_many_turns_as_their_share():
    tasks = {"arithmetic": {"share": 3}, "extraction": {}, "paths": {"share": 2}}
    made = [make_task(name, {}) for name in tasks]
    config = DataConfig(tasks=tasks, max_length=256)
    batch = next(batch_iterator(load_examples(config, TOKENIZER), 60))
    pairs = [read_back(batch, row) for row in range(60)]
    turns = [next(i for i, task in enumerate(made) if task.parse(query)) for query, _ in pairs]
    assert [turns.count(i) for i in range(3)] == [30, 10, 20]
    assert all(turns[i : i + 6] == turns[:6] for i in range(0, 60, 6))
    assert turns[:6] == [0, 2, 0, 1, 2, 0]  # spread out
    for i, task in enumerate(made):
        found = [pair for pair, turn in zip(pairs, turns, strict=True) if turn == i]
        assert found == [task.example(number) for number in range(len(found))]
    # A packed row begins with the next turn.
    config = dataclasses.replace(config, packing=True, examples_per_row=1)
    packed = next(batch_iterator(load_examples(config, TOKENIZER), 6))
    rows = [packed["tokens"][row, : packed["prompt_len"][row, 0]] for row in range(6)]
    begun = [next(i for i, task in enumerate(made) if task.parse(TOKENIZER.decode(row))) for row in rows]
    assert begun == turns[:6]


def test_task_examples_that_are_too_long_are_replaced():
    config = DataConfig(tasks="word_problems", max_length=150)
    examples = load_examples(config, TOKENIZER)
    counts = examples.counts["word_problems"]
    assert counts.too_long > 100
    assert counts.kept > 100
    task = make_task("word_problems", {})
    batch = next(batch_iterator(examples, 64))
    assert batch["total_len"].max() <= 150
    assert batch["example_id"].tolist() == list(range(64))
    pairs = [read_back(batch, row) for row in range(64)]
    assert len(set(pairs)) == 64
    assert all(task.check(*pair) for pair in pairs)
    kept = [pair == task.example(row) for row, pair in enumerate(pairs)]
    assert any(kept)
    assert not all(kept)


# Sharding and resuming


@pytest.fixture(params=["finite", "task"])
def examples(request, tmp_path):
    if request.param == "task":
        return load_examples(DataConfig(tasks="arithmetic", max_length=64), TOKENIZER)
    return load_examples(jsonl_config(numbered(tmp_path / "a.jsonl", 50)), TOKENIZER)


@pytest.mark.parametrize("processes", [2, 3, 12])
def test_processes_together_feed_the_batch_of_one(examples, processes):
    whole = take(batch_iterator(examples, 12), 7)
    shards = [take(batch_iterator(examples, 12, p, processes), 7) for p in range(processes)]
    joined = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert_same(joined, whole)
    assert len({tuple(batch["example_id"]) for batch in whole}) == 7


@pytest.mark.parametrize(("batch_size", "processes"), [(10, 4), (0, 1), (2, 4)])
def test_batch_size_must_be_a_multiple_of_the_processes(examples, batch_size, processes):
    with pytest.raises(BadInput, match=f"batch_size is {batch_size}, expected a positive multiple"):
        batch_iterator(examples, batch_size, 0, processes)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_resuming_gives_the_rest_of_the_run(examples, num_threads):
    uninterrupted = take(batch_iterator(examples, 8), 20)
    iterator = batch_iterator(examples, 8, num_threads=num_threads)
    take(iterator, 9)
    state = iterator.get_state()
    assert state == {"next_index": 9}
    take(iterator, 4)
    iterator.set_state(state)
    assert_same(take(iterator, 11), uninterrupted[9:])
    # The state of one process also fits another number of processes.
    second = batch_iterator(examples, 8, 1, 2)
    second.set_state(state)
    assert next(second)["example_id"].tolist() == uninterrupted[9]["example_id"][4:].tolist()


def test_state_goes_through_orbax(examples, tmp_path):
    uninterrupted = take(batch_iterator(examples, 4), 8)
    iterator = batch_iterator(examples, 4)
    take(iterator, 5)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(5, args=ocp.args.Composite(data=ocp.args.JsonSave(iterator.get_state())))
        manager.wait_until_finished()
        state = manager.restore(5, args=ocp.args.Composite(data=ocp.args.JsonRestore())).data
    restored = batch_iterator(examples, 4)
    restored.set_state(state)
    assert_same(take(restored, 3), uninterrupted[5:])


def test_worker_processes_give_the_same_batches():
    open_examples = functools.partial(load_examples, DataConfig(tasks="arithmetic", max_length=64), TOKENIZER)
    plain = take(batch_iterator(open_examples(), 8, 1, 2), 8)
    with contextlib.closing(
        batch_iterator(open_examples(), 8, 1, 2, workers=2, open_examples=open_examples)
    ) as batches:
        assert_same(take(batches, 3), plain[:3])
        batches.set_state({"next_index": 5})
        assert_same(take(batches, 3), plain[5:])
    assert wait_until(lambda: not multiprocessing.active_children())


RUN_WITH_WORKERS = """
import functools, multiprocessing
from refusion_jax.data.pipeline import DataConfig, batch_iterator, load_examples
from refusion_jax.tokenizer import ByteTokenizer

if __name__ == "__main__":
    config = DataConfig(tasks="arithmetic", max_length=64)
    examples = functools.partial(load_examples, config, ByteTokenizer())
    batches = batch_iterator(examples(), 8, workers=2, open_examples=examples)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    input()
"""


def test_workers_end_with_a_run_that_was_killed(tmp_path):
    (tmp_path / "run.py").write_text(RUN_WITH_WORKERS)
    command = [sys.executable, str(tmp_path / "run.py")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as run:
        pids = list(map(int, run.stdout.readline().split()))
        assert len(pids) == 2 and all(map(alive, pids))
        run.kill()
    assert wait_until(lambda: not any(map(alive, pids)))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> bool:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()
