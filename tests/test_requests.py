"""Checks of the slot decoder's requests, padded shapes, and packed transfers."""

import dataclasses

import jax
import numpy as np
import pytest
from decoding import (
    CONFIG,
    MASK,
    MODEL,
    NEVER,
    PARAMS,
    SHAPE,
    Case,
    sample,
)

from refusion_jax.decode import loop as decode
from refusion_jax.decode.batch import Shape, bucket
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.errors import BadInput
from refusion_jax.serving.packed_transfer import Packed

# Shapes.


def test_a_shape_fits_all_requests():
    prompts = [[1] * 5, [1] * 17]
    configs = [DecodeConfig(MASK, 2, 48, 4, 2), DecodeConfig(MASK, 2, 32, 16, 2)]
    shape = Shape.exact(prompts, configs).padded()
    assert shape.prompt >= 17
    assert shape == Shape(2, shape.prompt, gen=48, block=24, slots=6, iterations=12)
    assert Shape.exact(prompts, configs).padded(rows=8, trace=True) == dataclasses.replace(
        shape, rows=8, trace=True
    )
    sizes = [bucket(length) for length in range(200)]
    assert sizes == sorted(sizes) and all(size >= length for length, size in enumerate(sizes))
    assert sorted(set(sizes)) == [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]


@pytest.mark.parametrize(
    "case",
    [
        Case([1], DecodeConfig(MASK, NEVER, gen_length=96, slot_size=8, num_blocks=3)),
        Case([1], DecodeConfig(MASK, NEVER, gen_length=48, slot_size=8, num_blocks=1)),
        Case([1], DecodeConfig(MASK, NEVER, gen_length=32, slot_size=2, num_blocks=1)),
        Case([1], DecodeConfig(MASK, NEVER, gen_length=48, slot_size=2, num_blocks=3)),
        Case([1] * 9, DecodeConfig(MASK, NEVER, gen_length=8)),
    ],
    ids=["response", "block", "slots", "iterations", "prompt"],
)
def test_a_shape_that_does_not_hold_a_request_is_refused(case):
    with pytest.raises(BadInput):
        sample([case])


# Mistakes.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_length": 20, "slot_size": 8}, "gen_length must be a multiple .* = 8, found gen_length 20"),
        ({"gen_length": 24, "slot_size": 8, "num_blocks": 2}, "multiple of num_blocks x slot_size = 16"),
        ({"gen_length": 0}, "gen_length must be a whole number from 1 .* found 0"),
        ({"gen_length": -8}, "gen_length .* found -8"),
        ({"gen_length": 8.0}, "gen_length .* found 8.0"),
        ({"gen_length": True}, "gen_length .* found True"),
        ({"gen_length": 1 << 40}, "gen_length .* found"),
        ({"slot_size": 0}, "slot_size .* found 0"),
        ({"num_blocks": 0}, "num_blocks .* found 0"),
        ({"slot_threshold": float("nan")}, "slot_threshold must be a finite number, found nan"),
        ({"token_threshold": float("inf")}, "token_threshold must be a finite number, found inf"),
        ({"token_threshold": "0.4"}, "token_threshold .* found '0.4'"),
        ({"temperature": -0.1}, "temperature must be 0 or above, found -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": -1}, "seed .* found -1"),
        ({"seed": 1 << 32}, "seed"),
        ({"eos_id": None}, "eos_id .* found None"),
        ({"mask_id": -1}, "mask_id .* found -1"),
        ({"semantics": "paper"}, "semantics must be one of fixed, release, found 'paper'"),
        ({"semantics": "release", "gen_length": 20, "slot_size": 4, "num_blocks": 2}, "blocks of 10 tokens"),
        ({"semantics": "release", "gen_length": 4, "slot_size": 4, "num_blocks": 8}, "blocks of 0 tokens"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(BadInput, match=message):
        DecodeConfig(**{"mask_id": MASK, "eos_id": 2} | settings)


def test_lengths_that_release_makes_fit():
    def config(*lengths: int) -> DecodeConfig:
        return DecodeConfig(MASK, 2, *lengths, semantics="release")

    assert (config(10, 4, 1).block_len, config(10, 4, 1).response_len) == (12, 12)
    assert (config(36, 4, 8).block_len, config(36, 4, 8).response_len) == (4, 32)


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        ([[1, CONFIG.vocab_size]], {}, "an id of a prompt must be a whole number from 0 to 23, found 24"),
        ([[-1]], {}, "found -1"),
        ([[1.5]], {}, "found 1.5"),
        ([["a"]], {}, "found 'a'"),
        ([], {}, "prompts"),
        ([[1]], {"mask_id": CONFIG.vocab_size}, "mask_id must be below the vocabulary size 24, found 24"),
    ],
)
def test_impossible_prompts(prompts, change, message):
    config = DecodeConfig(**{"mask_id": MASK, "eos_id": 2} | change)
    with pytest.raises(BadInput, match=message):
        decode.sample(MODEL, PARAMS, prompts, config)


def test_a_batch_has_one_mask_and_one_eos():
    configs = [DecodeConfig(MASK, 2), DecodeConfig(MASK, 4)]
    with pytest.raises(BadInput, match="must share mask_id and eos_id"):
        decode.sample(MODEL, PARAMS, [[1], [1]], configs)
    with pytest.raises(BadInput, match="as many settings as prompts"):
        decode.sample(MODEL, PARAMS, [[1]], configs)


def test_a_scanned_model_is_refused():
    with pytest.raises(ValueError, match="needs an unrolled model"):
        decode.sample(MODEL.clone(scan_layers=True), PARAMS, [[1]], DecodeConfig(MASK, 2))


def test_as_many_settings_as_prompts_are_needed_with_a_shape_too():
    with pytest.raises(BadInput, match="as many settings as prompts"):
        decode.sample(MODEL, PARAMS, [[1], [2]], [DecodeConfig(MASK, NEVER, 8)], shape=SHAPE)


# Packed transfers.


@pytest.mark.parametrize("on_device", [False, True])
def test_arrays_come_back_bit_for_bit_from_one_array(on_device):
    # A NaN, -0 and the smallest positive float.
    odd = np.asarray([0x7FC00001, 0x80000000, 1], np.uint32).view(np.float32)
    tree = {
        "flags": np.asarray([[True, False], [False, True]]),
        "numbers": (np.arange(-3, 3, dtype=np.int32).reshape(1, 2, 3), np.asarray([2**32 - 1], np.uint32)),
        "odd": odd,
        "scalar": np.int32(7),
        "none": None,
    }
    packed = Packed.pack(jax.device_put(tree) if on_device else tree)
    assert packed.words.dtype == np.int32 and packed.words.shape == (4 + 6 + 1 + 3 + 1,)
    for back in (packed.unpack(), jax.jit(lambda packed: Packed.pack(packed.unpack()))(packed).unpack()):
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        for ours, given in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
            assert ours.dtype == given.dtype and ours.shape == given.shape
            assert np.asarray(ours).tobytes() == np.asarray(given).tobytes()
