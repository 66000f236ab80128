"""The decoding method and dtype of the sample command, by the checkpoint's objective or by flags."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from sampling import FLAGS, OF_OTHERS, SUM, assert_refused, change_config, command, copied, lines

from refusion_jax.baselines.decoders import ar
from refusion_jax.baselines.decoders.config import ARConfig, BD3Config, MDMConfig
from refusion_jax.decode.batch import Shape
from refusion_jax.decode.inputs import tokens_ahead
from refusion_jax.serving import engine as serving
from refusion_jax.serving import opened as opening
from refusion_jax.serving.methods import METHODS


def open_model(folder: Path, *flags: str):
    return opening.open_by([f"--checkpoint={folder}", *flags]).defaults


@pytest.mark.parametrize(
    ("fields", "method", "settings"),
    [
        ({}, "refusion", {"token_threshold": 0.4, "slot_size": 8}),
        ({"objective": "ar"}, "ar", {"first_token": "next"}),
        ({"objective": "mdm"}, "mdm", {"token_threshold": 1.0, "num_blocks": 1, "cache": "none"}),
        ({"objective": "bd3", "block_len": 4}, "bd3", {"token_threshold": 1.0, "block_len": 4}),
        ({"objective": "bd3"}, "bd3", {"block_len": 32}),
    ],
    ids=str,
)
def test_the_objective_decides_how_to_decode(tmp_path, fields, method, settings):
    folder = copied(tmp_path / "model")
    change_config(folder, **fields)
    defaults = open_model(folder)
    assert defaults.method == method
    assert settings.items() <= defaults.settings.items()


@pytest.mark.parametrize(
    ("fields", "first_token"),
    [
        ({}, "mask"),
        ({"objective": "ar"}, "next"),
        ({"objective": "refusion"}, "mask"),
        ({"objective": "mdm"}, "mask"),
    ],
)
def test_the_objective_decides_where_the_first_token_is_read(tmp_path, fields, first_token):
    folder = copied(tmp_path / "model")
    change_config(folder, **fields)
    assert open_model(folder, "--method=ar").settings["first_token"] == first_token


def test_an_objective_of_no_method(tmp_path):
    folder = copied(tmp_path / "model")
    change_config(folder, objective="sedd")
    ran = command(f"--checkpoint={folder}", "--prompt=1+1")
    assert_refused(ran, "config.json: objective must be one of refusion, ar, mdm, bd3, found 'sedd'")


@pytest.mark.parametrize(("flag", "first_token"), [([], "mask"), (["--first_token=next"], "next")])
def test_left_to_right(checkpoint, opened, tmp_path, flag, first_token):
    """By default the first token is read as in the checkpoint's training objective."""
    model, params, _ = opened
    prompts = [SUM, [*SUM[:-3], 41]]
    asked = tmp_path / "requests.jsonl"
    requests = [{"id": i, "prompt_ids": prompt, "slot_size": 8} for i, prompt in enumerate(prompts)]
    asked.write_text("".join(json.dumps(request) + "\n" for request in requests))
    ran = command(f"--checkpoint={checkpoint}", *OF_OTHERS, "--method=ar", *flag, f"--input={asked}")
    assert (ran.code, ran.err) == (0, "")
    config = ARConfig(3, 2, gen_length=32, first_token=first_token)
    shape = Shape(rows=2, prompt=64, gen=32)
    samples = jax.device_get(ar.DECODER.sample(model, params, prompts, config, shape=shape))
    for row, result in enumerate(lines(ran.out)):
        assert result["raw_ids"] == samples.raw_ids[row, : samples.num_raw[row]].tolist()
        assert result["num_forwards"] == result["num_tokens"] == result["num_iterations"]
        assert result["tokens_per_forward"] == 1


def test_a_model_without_a_mask_decodes_left_to_right(checkpoint, tmp_path):
    """It answers as it does after a mask token is added to it."""
    folder = shutil.copytree(checkpoint, tmp_path / "base")
    change_config(folder, mask_token_id=None)
    ran = command(f"--checkpoint={folder}", "--method=ar", "--prompt=26+0+10", *OF_OTHERS)
    assert ran.code == 0, ran.err
    masked = command(
        f"--checkpoint={checkpoint}", "--method=ar", "--first_token=next", "--prompt=26+0+10", *OF_OTHERS
    )
    assert ran.out == masked.out
    assert_refused(
        command(f"--checkpoint={folder}", "--method=refusion", "--prompt=26+0+10", *FLAGS),
        "mask_token_id is missing.*--add_tokens",
    )
    asked_nothing = command(f"--checkpoint={folder}", "--prompt=26+0+10", *OF_OTHERS)
    assert asked_nothing.out == ran.out
    for reads_masks in ("--first_token=mask", "--border=draft"):
        assert_refused(
            command(f"--checkpoint={folder}", "--method=ar", reads_masks, "--prompt=1", *OF_OTHERS),
            "mask_token_id is missing",
        )
    by_lookup = ["--method=refusion", "--verify=exact", "--draft_from=lookup", "--prompt=26+0+10"]
    assert command(f"--checkpoint={folder}", *by_lookup, *OF_OTHERS).out == ran.out


@pytest.mark.parametrize(
    ("method", "flags", "config"),
    [
        (
            "mdm",
            ["--num_blocks=4", "--cache=dual"],
            MDMConfig(3, 2, 32, 2, 0.5, num_blocks=4, cache="dual"),
        ),
        ("bd3", ["--block_len=8"], BD3Config(3, 2, 32, 2, 0.5, block_len=8)),
    ],
)
@pytest.mark.long
def test_block_by_block(checkpoint, opened, tmp_path, method, flags, config):
    """Settings of other methods in a request are ignored; those of its own method apply."""
    model, params, _ = opened
    prompts = [SUM, [*SUM[:-3], 41], SUM]
    asked = tmp_path / "requests.jsonl"
    requests = [
        {"id": i, "prompt_ids": p, "slot_size": 5, "first_token": "next"} for i, p in enumerate(prompts)
    ]
    requests[2] |= {"tokens_per_step": 32, "trace": True}
    asked.write_text("".join(json.dumps(request) + "\n" for request in requests))
    flags = [*OF_OTHERS, "--tokens_per_step=2", "--token_threshold=0.5", *flags]
    ran = command(f"--checkpoint={checkpoint}", f"--method={method}", *flags, f"--input={asked}")
    assert (ran.code, ran.err) == (0, "")
    configs = [config, config, dataclasses.replace(config, tokens_per_step=32)]
    decoder = serving.DECODERS[METHODS[method]]
    shape = decoder.exact_shape(prompts, configs).padded(
        4, trace=True, ahead=tokens_ahead(4)
    )  # as in the command
    samples = jax.device_get(decoder.sample(model, params, prompts, configs, shape=shape))
    for row, result in enumerate(lines(ran.out)):
        assert result["raw_ids"] == samples.raw_ids[row, : samples.num_raw[row]].tolist()
        assert result["num_forwards"] == samples.num_forwards[row]
    assert result["trace"] == [] and result["num_forwards"] <= 4


def test_dtype(checkpoint):
    for flags, dtype in (
        ([], jnp.float32),
        (["--dtype=bfloat16"], jnp.bfloat16),
        (["--dtype=float32"], jnp.float32),
    ):
        model, params, *_ = opening.open_by([f"--checkpoint={checkpoint}", *flags])
        assert model.dtype == model.param_dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
