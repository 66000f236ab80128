"""The index of encoded examples: made once, shared, never used for other content; broken lines."""

import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_data import numbered
from test_launch import CONFIG

from refusion_jax import train
from refusion_jax.data import index, index_builder
from refusion_jax.data.encoding import Encoder
from refusion_jax.data.pipeline import DataConfig, load_examples
from refusion_jax.data.sources.jsonl import JsonlSource
from refusion_jax.errors import BadInput, Failed
from refusion_jax.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "refusion_jax" / "examples"


@pytest.fixture
def encoded(monkeypatch):
    """The number of examples that were encoded."""
    counted = [0]
    encode = Encoder.encode

    def counting(self, examples, numbers):
        counted[0] += len(examples)
        return encode(self, examples, numbers)

    monkeypatch.setattr(Encoder, "encode", counting)
    return counted


def opened(path: Path, **fields):
    tokenizer = fields.pop("tokenizer", ByteTokenizer())
    return load_examples(DataConfig(source="jsonl", paths=str(path), max_length=64, **fields), tokenizer, 3)


def rows(examples) -> list[dict[str, list[int]]]:
    return [{name: value.tolist() for name, value in examples[number].items()} for number in range(60)]


@pytest.mark.parametrize("packing", [False, True])
def test_examples_are_encoded_once(tmp_path, cache, encoded, packing):
    path = numbered(tmp_path / "a.jsonl", 25)
    first = opened(path, packing=packing)
    wanted = rows(first)
    assert encoded == [25]
    again = opened(path, packing=packing)
    assert rows(again) == wanted and again.identity == first.identity and again.counts == first.counts
    moved = tmp_path / "b.jsonl"
    moved.write_bytes(Path(path).read_bytes())
    assert rows(opened(moved, packing=packing)) == wanted
    assert encoded == [25]


def test_whatever_changes_tokens_makes_another_index(tmp_path, cache, encoded):
    path = Path(numbered(tmp_path / "a.jsonl", 5))
    first = opened(path)

    class Other(ByteTokenizer):
        pass

    for number, fields in enumerate(
        ({"tokenizer": Other()}, {"eos_multiple": 4}, {"eos_extra_blocks": 2}, {"enable_thinking": False}), 2
    ):
        opened(path, **fields)
        assert encoded == [5 * number]
    opened(path, max_broken_share=0.5, shuffle=False)
    assert encoded == [25]
    content = path.read_text()
    path.write_text(content.replace("3", "4"))  # of the same size
    changed = opened(path)
    assert encoded == [30] and changed.identity != first.identity
    path.write_text(content)
    assert opened(path).identity == first.identity and encoded == [30]


@pytest.mark.parametrize("name", ["meta.json", "tokens.bin", "ends.npy", "prompts.npy", "sums.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_index_is_made_anew(tmp_path, cache, encoded, name, damage):
    path = numbered(tmp_path / "a.jsonl", 5)
    wanted = rows(opened(path))
    (file,) = cache.glob(f"*/{name}")
    if damage == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    assert rows(opened(path)) == wanted
    assert encoded == [10]


def test_a_changed_token_is_found(tmp_path, cache):
    path = numbered(tmp_path / "a.jsonl", 5)
    opened(path)
    (file,) = cache.glob("*/tokens.bin")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    examples = opened(path, shuffle=False)
    with pytest.raises(Failed, match="damaged; delete this folder, it will be made anew"):
        examples[0]
    examples[1]


@pytest.mark.parametrize("damage", ["missing", "cut"])
@pytest.mark.parametrize("name", ["keys.json", "ranks.npy"])
def test_a_damaged_plan_of_rows_is_made_anew(tmp_path, cache, name, damage):
    path = numbered(tmp_path / "a.jsonl", 25)
    wanted = rows(opened(path, packing=True))
    for _ in range(2):
        assert rows(opened(path, packing=True)) == wanted
        (file,) = cache.glob(f"*/rows*/{name}")
        if damage == "missing":
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size // 2)


def test_where_the_cache_cannot_be_written(tmp_path, monkeypatch, encoded):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = numbered(tmp_path / "a.jsonl", 5)
    assert rows(opened(path)) == rows(opened(path)) and encoded == [5]
    assert (tmp_path / f"refusion_jax-{os.getuid()}" / "examples").is_dir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(Failed, match=r"the index of examples cannot be written \(.*Not a directory"):
        opened(path)


def test_what_a_killed_process_left_is_deleted(tmp_path, cache):
    path = numbered(tmp_path / "a.jsonl", 5)
    opened(path)
    (folder,) = (file.parent for file in cache.glob("*/meta.json"))
    folder.rename(partial := folder.with_name(f"{folder.name}.partial"))
    (partial / "meta.json").unlink()
    opened(path)
    assert folder.is_dir() and not partial.exists()


def test_an_index_that_is_not_used_is_deleted(tmp_path, cache):
    opened(numbered(tmp_path / "a.jsonl", 5))
    (old,) = cache.glob("*/meta.json")
    long_ago = time.time() - (index.UNUSED_DAYS + 1) * 86400
    os.utime(old, (long_ago, long_ago))
    opened(numbered(tmp_path / "b.jsonl", 6))
    assert not old.parent.exists() and len(list(cache.glob("*/meta.json"))) == 1


def _open_and_count(path: str, results) -> None:
    results.put(opened(Path(path)).identity)


def test_two_processes_at_once(tmp_path, cache):
    path = numbered(tmp_path / "a.jsonl", 3000)
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    processes = [spawn.Process(target=_open_and_count, args=(str(path), results)) for _ in range(2)]
    for process in processes:
        process.start()
    assert results.get(timeout=60) == results.get(timeout=60)
    for process in processes:
        process.join()
    assert len(list(cache.glob("*/meta.json"))) == 1
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2  # the index, and digests of files


def test_tokens_take_two_bytes_if_they_fit(tmp_path, cache):
    class Large(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.vocab_size = 70_000

        def _encode_batch(self, texts):
            return [[id_ + 65_600 for id_ in ids] for ids in super()._encode_batch(texts)]

    path = numbered(tmp_path / "a.jsonl", 5)
    assert opened(path).index.meta.dtype == "uint16"
    large = opened(path, tokenizer=Large())
    assert large.index.meta.dtype == "uint32" and large[0]["tokens"].max() > 65_600


# Broken lines

BROKEN = [b"{", b"\xff\xfe", b'{"query": 1, "response": "b"}', b"[]"]


def test_broken_lines_are_skipped_and_listed(tmp_path, cache):
    path = Path(numbered(tmp_path / "a.jsonl", 300))
    good = opened(path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([*lines[:100], BROKEN[0], *lines[100:], BROKEN[2]]) + b"\n")
    examples = opened(path)
    assert examples.identity == good.identity and rows(examples) == rows(good)
    (counts,) = examples.counts.values()
    assert counts == good.counts[str(path)]._replace(broken=2) and "2 broken lines skipped" in str(counts)
    first, last = map(json.loads, examples.broken_lines.read_text().splitlines())
    assert first["where"] == f"{path}:101" and "not valid JSON" in first["error"]
    assert last == {"where": f"{path}:302", "error": "query is 1, expected text"}


def test_too_many_broken_lines_are_an_error(tmp_path, cache):
    path = Path(numbered(tmp_path / "a.jsonl", 10))
    path.write_bytes(path.read_bytes() + b"\n" + b"\n".join(BROKEN))
    message = r"a.jsonl:11: not valid JSON.*; 4 of 14 lines of .*a.jsonl are broken, at most a share of 0.01"
    with pytest.raises(BadInput, match=message):
        opened(path)
    assert len((next(cache.glob("*-broken.jsonl"))).read_text().splitlines()) == 4
    assert len(opened(path, max_broken_share=0.3)) == 10
    with pytest.raises(BadInput, match=message):  # the index is there now
        opened(path)
    with pytest.raises(BadInput, match=r"data.max_broken_share is 1\.5, expected a share from 0 to 1"):
        opened(path, max_broken_share=1.5)


def test_a_conversation_that_the_template_refuses_is_a_broken_line(tmp_path, cache):
    class Strict(ByteTokenizer):
        has_chat_template = True

        def render(self, messages, **options):
            if "3" in messages[0]["content"]:
                raise BadInput("no threes")
            return super().render(messages, **options)

    path = numbered(tmp_path / "a.jsonl", 10)
    with pytest.raises(BadInput, match=r"a.jsonl:4: .*no threes; .* 1 of 10 lines"):
        opened(path, tokenizer=Strict())
    assert len(opened(path, tokenizer=Strict(), max_broken_share=0.1)) == 9


def test_a_file_of_another_kind_is_not_read_to_its_end(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 10 * index_builder.BATCH)
    read = []
    lines = JsonlSource.entries

    def counting(self):
        for line in lines(self):
            read.append(line)
            yield line

    monkeypatch.setattr(JsonlSource, "entries", counting)
    with pytest.raises(BadInput, match=r"a.jsonl:1: has no 'query' .*, and so are the 1,023 lines after it"):
        opened(path)
    assert len(read) == index_builder.BATCH


def test_a_run_lists_its_broken_lines(tmp_path, cache, capsys):
    path = Path(numbered(tmp_path / "a.jsonl", 30))
    path.write_bytes(path.read_bytes() + b"\n" + BROKEN[0])
    config = tmp_path / "config.py"
    config.write_text(CONFIG.replace('{"tasks": {"extraction": {"fields": 1, "value_length": 2}}, ', "{"))
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=1"]
    flags += ["--config.data.source=jsonl", f"--config.data.paths={path}"]
    assert train.main(flags) == 2
    assert "1 of 31 lines" in capsys.readouterr().err
    assert train.main([*flags, "--config.data.max_broken_share=0.1"]) == 0
    assert "the broken lines that are skipped" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "broken_lines.jsonl").read_text())["where"] == f"{path}:31"


# A million examples

START = """
import resource, sys, time
from refusion_jax.data.pipeline import DataConfig, batch_iterator, load_examples
from refusion_jax.tokenizer import ByteTokenizer
start = time.perf_counter()
config = DataConfig(source="jsonl", paths=sys.argv[1], max_length=256, packing=sys.argv[2] == "packed")
next(batch_iterator(load_examples(config, ByteTokenizer()), 8))
used = [line for line in open("/proc/self/status") if line.startswith("RssAnon")][0].split()[1]
print(time.perf_counter() - start, int(used) // 1024)
"""


@pytest.mark.soak
@pytest.mark.parametrize("packing", ["packed", "one a row"])
def test_a_million_examples_start_as_fast_as_forty(tmp_path, cache, packing):
    """Seconds to the first batch of a restart, and memory of the process that no file backs, in MiB."""
    found = {}
    for count in (40, 1_000_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for number in range(count):
                record = {
                    "query": f"Question {number}: " + "why " * (number % 20),
                    "response": f"{number} " * 5,
                }
                file.write(json.dumps(record) + "\n")
        for attempt in ("first", "restart"):
            done = subprocess.run(
                [sys.executable, "-c", START, path, packing],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            found[count, attempt] = tuple(map(float, done.stdout.split()))
    print(f"\n{packing}: (seconds, MiB) {found}")
    assert found[1_000_000, "restart"][0] < found[40, "restart"][0] + 2
    assert found[1_000_000, "restart"][1] < found[40, "restart"][1] + 100


def test_the_digest_is_that_of_before(tmp_path, cache):
    """Runs that were saved before examples were kept on disk resume."""
    path = numbered(tmp_path / "a.jsonl", 3)
    encoder = Encoder(ByteTokenizer(), 64)
    whole = [example for _, example in JsonlSource([path]).entries()]
    digest = hashlib.sha256()
    for one in encoder.encode(whole, range(3)):
        digest.update(np.array([len(one.prompt), *one.prompt, *one.response], np.int64).tobytes())
    assert opened(path).identity == (3, digest.hexdigest())
