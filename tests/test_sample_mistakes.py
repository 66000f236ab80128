"""The error lines of the sample command for mistakes in flags and files."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sampling import FLAGS, GOOD, WEIGHTS, assert_refused, change_config, command, copied, lines

from refusion_jax import sample
from refusion_jax.decode.config import DecodeConfig

# In flags.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gen_length=many"], "--gen_length: invalid int value: 'many'"),
        (["--slot_threshold=high"], "--slot_threshold: invalid float value: 'high'"),
        (["--gen_length=0"], "gen_length must be a whole number from 1 .* found 0"),
        (["--gen_length=-8"], "gen_length .* found -8"),
        (["--slot_size=0"], "slot_size .* found 0"),
        (["--num_blocks=-1"], "num_blocks .* found -1"),
        (
            ["--gen_length=30"],
            "gen_length must be a multiple of num_blocks x slot_size = 4, found gen_length 30",
        ),
        (["--slot_threshold=nan"], "slot_threshold must be a finite number, found nan"),
        (["--token_threshold=-inf"], "token_threshold must be a finite number, found -inf"),
        (["--temperature=-1"], "temperature must be 0 or above, found -1.0"),
        (["--seed=-1"], "seed .* found -1"),
        (["--batch_size=0"], "--batch_size must be at least 1 request, found 0"),
        (["--ahead=-1"], "--ahead must be 0 to 4096 tokens, found -1"),
        (["--tensor=9"], "--tensor must be 1 to the 8 available devices, found 9"),
        (["--semantics=paper"], "--semantics: invalid choice: 'paper'"),
        (["--method=guess"], "--method: invalid choice: 'guess'"),
        (["--dtype=float8"], "--dtype: invalid choice: 'float8'"),
        (["--verify=always"], "--verify: invalid choice: 'always'"),
        (
            ["--verify=exact", "--draft_length=0"],
            "draft_length must be a whole number from 1 to 1024, found 0",
        ),
        (
            ["--verify=exact", "--semantics=release"],
            "semantics 'release' needs verify 'threshold', found 'exact'",
        ),
        (["--tokens_per_step=2"], "--tokens_per_step is for --method=mdm or bd3 alone"),
        (["--cache=dual"], "--cache is for --method=mdm alone"),
        (["--cache=all"], "--cache: invalid choice: 'all'"),
        (["--method=bd3", "--first_token=mask"], "--slot_size is for --method=refusion alone"),
        (["--method=mdm"], "--slot_size is for --method=refusion alone, found --method=mdm"),
        (["--method=ar", "--first_token=last"], "--first_token: invalid choice: 'last'"),
        (["--gen_len=8"], "unrecognized arguments: --gen_len=8"),
        (["surplus"], "unrecognized arguments: surplus"),
        (["--input=requests.jsonl"], "--prompt and --input: give one of the two"),
        (["--output=results.jsonl"], "--output needs --input"),
        (["--prompt=2+2", "--trace=trace.json"], "--trace needs exactly one --prompt"),
        (["--method=ar", "--trace=trace.json"], "--trace needs .* --method=refusion"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_flags(checkpoint, flags, message):
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, "--prompt=1+1", *flags)
    assert_refused(ran, message)
    assert ran.out == ""


def test_a_prompt_that_is_no_text(checkpoint):
    assert_refused(command(f"--checkpoint={checkpoint}", "--prompt=\ud800"), "lone surrogate")


def test_help_names_every_flag_with_its_default():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        sample.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(out.getvalue().split())
    for flag in ("checkpoint", "prompt", "input", "output", "stop", "raw", "dtype", "first_token"):
        assert f"--{flag}" in text
    of = DecodeConfig(mask_id=0, eos_id=0)
    for flag in (
        "gen_length",
        "slot_size",
        "num_blocks",
        "slot_threshold",
        "temperature",
        "seed",
    ):
        assert re.search(rf"--{flag} [NX] [^-]*\(default {re.escape(str(getattr(of, flag)))}\)", text), flag
    assert "(default 0.4 for refusion, 1.0 for mdm and bd3)" in text
    for flag, default in (
        ("semantics", "fixed"),
        ("batch_size", "8"),
        ("block_len", "32"),
        ("cache", "none"),
    ):
        assert re.search(rf"--{flag} .*?\(default {default}\)", text), flag


# In files.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "holds no request"),
        (b"\n \n", "holds no request"),
        (b"\xff\xfe", "cannot be read"),
    ],
    ids=["missing", "empty", "blank", "not UTF-8"],
)
def test_inputs_that_hold_no_requests(checkpoint, tmp_path, content, message):
    asked, answered = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    if content is not None:
        asked.write_bytes(content)
    ran = command(f"--checkpoint={checkpoint}", f"--input={asked}", f"--output={answered}")
    assert_refused(ran, f"--input={asked}: {message}")
    assert not answered.exists()


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def truncate(folder: Path, length: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])


NORM = "model.norm.weight"
DAMAGES = {
    # name: (change of the folder, pattern of the error line)
    "no folder": (shutil.rmtree, "is not a folder, expected one with config.json and weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not readable as JSON"),
    "config is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json: must hold a JSON object",
    ),
    "config lacks a field": (
        lambda f: change_config(f, vocab_size=None),
        "config.json: field 'vocab_size' must be int",
    ),
    "another architecture": (
        lambda f: change_config(f, model_type="gpt2"),
        "model_type must be one of .* found 'gpt2'",
    ),
    "odd heads": (
        lambda f: change_config(f, num_attention_heads=3),
        "config.json: num_heads must be a multiple",
    ),
    "no EOS id": (lambda f: change_config(f, eos_token_id=None), "config.json: eos_token_id is missing"),
    "no mask id": (
        lambda f: change_config(f, mask_token_id=None, objective="mdm"),
        "config.json: mask_token_id is missing",
    ),
    "mask outside": (
        lambda f: change_config(f, mask_token_id=64),
        "mask_token_id is 64, expected an id .* 0 to 63",
    ),
    "mask is EOS": (lambda f: change_config(f, mask_token_id=2), "mask_token_id and eos_token_id are both 2"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer found"),
    "no weights": (
        lambda f: (f / WEIGHTS).unlink(),
        "holds neither model.safetensors nor model.safetensors.index",
    ),
    "weights cut short": (lambda f: truncate(f, 1_000_000), f"{WEIGHTS}: cut short"),
    "header cut short": (lambda f: truncate(f, 100), f"{WEIGHTS}: cut short"),
    "empty weights": (lambda f: truncate(f, 0), f"{WEIGHTS}: cut short"),
    "an extra tensor": (
        lambda f: change_tensors(f, lambda tensors: tensors.update(extra=np.zeros(3, np.float32))),
        f"{WEIGHTS}: tensor 'extra' belongs to no part of this model",
    ),
    "a missing tensor": (
        lambda f: change_tensors(f, lambda tensors: tensors.pop(NORM)),
        f"tensor '{NORM}' missing",
    ),
    "a misshapen tensor": (
        lambda f: change_tensors(f, lambda tensors: tensors.update({NORM: np.zeros(127, np.float32)})),
        rf"tensor '{NORM}' has shape \(127,\), config.json makes it \(128,\)",
    ),
    "layers missing": (lambda f: change_config(f, num_hidden_layers=5), "tensor 'model.layers.4.* missing"),
    "layers too many": (
        lambda f: change_config(f, num_hidden_layers=3),
        "tensor 'model.layers.3.* belongs to no part",
    ),
    "a missing shard": (
        lambda f: (f / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}'),
        "names the file 'shard.safetensors', which is not in",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoints(tmp_path, name):
    damage, message = DAMAGES[name]
    folder = copied(tmp_path / "model")
    damage(folder)
    asked, answered = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    asked.write_text(json.dumps(GOOD[0]))
    answered.write_text("of another run")
    ran = command(f"--checkpoint={folder}", f"--input={asked}", f"--output={answered}", "--overwrite")
    assert_refused(ran, message)
    assert str(folder) in ran.err and ran.out == ""
    assert answered.read_text() == "of another run" and not (tmp_path / "results.jsonl.partial").exists()


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    """Without readable input, no partial output is left either."""
    asked = tmp_path / "requests.jsonl"
    asked.write_text(json.dumps(GOOD[0]))
    ran = command(
        f"--checkpoint={tmp_path / 'nowhere'}", f"--input={asked}", f"--output={tmp_path / 'results.jsonl'}"
    )
    assert_refused(ran, "nowhere is not a folder")
    assert os.listdir(tmp_path) == ["requests.jsonl"]


@pytest.mark.parametrize("output", ["missing/results.jsonl", "folder"])
def test_outputs_that_cannot_be_written(checkpoint, tmp_path, output):
    (tmp_path / "folder").mkdir()
    asked = tmp_path / "requests.jsonl"
    asked.write_text("".join(json.dumps(request) + "\n" for request in GOOD))
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, f"--input={asked}", f"--output={tmp_path / output}")
    assert_refused(ran, f"--output={tmp_path / output}: cannot be written")
    assert sorted(os.listdir(tmp_path)) == ["folder", "requests.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"id": "x", "prompt": "1", "slot_threshold": 1' + "0" * 400 + "}",
            "slot_threshold must be a finite number",
        ),
        ("[" * 100_000, "not JSON"),
        ('{"id": "\\ud800", "prompt_ids": "1"}', "prompt_ids must be a list"),
    ],
    ids=["an integer beyond float", "nested too deep", "a lone surrogate as id"],
)
def test_lines_that_are_hard_to_read(checkpoint, tmp_path, line, message):
    asked, answered = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    asked.write_text(line + "\n")
    ran = command(f"--checkpoint={checkpoint}", *FLAGS, f"--input={asked}", f"--output={answered}")
    assert_refused(ran, f"1 of 1 requests could not be served.*{message}")
    (result,) = lines(answered)
    assert re.search(message, result["error"])
