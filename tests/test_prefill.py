"""Prompts that are fed in chunks: the same keys, values and states, and the same answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_ar
import test_exact
from decoding import CASES, CONFIG, MASK, MODEL, PARAMS, SHAPE, raw_ids, sample

from refusion_jax.decode.kv_cache import KVCache
from refusion_jax.decode.prefill import feed_prompts

LENGTHS = np.array([8, 1, 0, 5, 4, 7], np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["one cache", "a cache per layer"])
def fed(request):
    """The results for chunks of some sizes; all prompts fit into one of 8 tokens."""
    prompts = np.random.default_rng(0).integers(4, CONFIG.vocab_size, (6, 8)).astype(np.int32)
    tokens, among = (
        np.full((6, 2), MASK, np.int32),
        np.broadcast_to(np.tril(np.ones((2, 2), bool)), (6, 2, 2)),
    )
    positions = LENGTHS[:, None] + np.arange(2, dtype=np.int32)
    empty = KVCache.zeros(CONFIG, 6, 12, jnp.float32, by_layer=request.param)

    def of(chunk: int):
        arguments = (MODEL, PARAMS, empty, prompts, LENGTHS, tokens, positions, among, chunk)
        return jax.device_get(jax.jit(feed_prompts, static_argnums=(0, 8))(*arguments))

    return {chunk: of(chunk) for chunk in (8, 4, 3, 1)}


@pytest.mark.parametrize("chunk", [4, 3, 1])
def test_chunks_give_what_a_whole_prompt_gives(fed, chunk):
    whole, found = fed[8], fed[chunk]
    np.testing.assert_array_equal(found.cache.filled, np.arange(12) < LENGTHS[:, None])
    assert not np.asarray(whole.cache.layers)[:, :, 2].any()  # of an empty prompt nothing is cached
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("chunk", [3, 4])
@pytest.mark.parametrize("semantics", CASES)
def test_slots_are_decoded_to_the_same_answers(semantics, chunk):
    cases = CASES[semantics][: SHAPE.rows]
    chunked = sample(cases, shape=dataclasses.replace(SHAPE, chunk=chunk))
    assert [raw_ids(row) for row in chunked] == [raw_ids(row) for row in sample(cases)]
    assert [row.num_forwards for row in chunked] == [row.num_forwards for row in sample(cases)]


def test_exact_verification_gives_the_same_answers():
    cases = test_exact.random_cases(3)
    chunked = test_exact.sample(cases, dataclasses.replace(test_exact.SHAPE, chunk=3))
    assert list(map(test_exact.ids, chunked)) == list(map(test_exact.ids, test_exact.sample(cases)))


@pytest.mark.parametrize("first_token", ["next", "mask"])
def test_ar_gives_the_same_answers(first_token):
    cases = test_ar.CASES[first_token, test_ar.NEVER]
    chunked = test_ar.sample(cases, dataclasses.replace(test_ar.SHAPE, chunk=4))
    assert list(map(raw_ids, chunked)) == list(map(raw_ids, test_ar.sample(cases)))
