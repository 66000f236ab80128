"""Autoregressive decoding (AR) of the same model with the same cache: the paper's speed baseline.

Letters as in model/transformer.py; P is the padded prompt length, S the cache length.
"""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.baselines.decoders.config import ARConfig
from refusion_jax.decode.batch import Shape, check_pairs, padded_column, removed_columns
from refusion_jax.decode.decoder import Decoder, repeated
from refusion_jax.decode.exact_inputs import reads_mask
from refusion_jax.decode.kv_cache import KVCache, scatter_rows
from refusion_jax.decode.prefill import feed_prompts
from refusion_jax.decode.samples import is_eos
from refusion_jax.decode.scores import DraftSampling, draft

Array = jax.Array


class ARRequests(struct.PyTreeNode):
    """A batch of requests. Fields are arrays [B], named as in ARConfig; padding rows have gen_length 0.

    Attributes:
      prompt_len: int32, prompt tokens.
      from_mask: bool, first_token "mask" instead of "next".
      border_every: int32, multiples of it are read off a mask token; 0 for border "ar".
      removed: int32 arrays, token ids that are never chosen (`removed_ids`).
    """

    prompt_len: Array
    gen_length: Array
    temperature: Array
    seed: Array
    from_mask: Array
    border_every: Array
    removed: tuple[Array, ...]

    def is_eos(self, tokens: Array, eos_ids: Array) -> Array:
        """bool: which of the tokens [B, ...] end a response."""
        return is_eos(tokens, eos_ids)

    @classmethod
    def batch(
        cls, prompts: Sequence[Sequence[int]], configs: Sequence[ARConfig], shape: Shape
    ) -> "ARRequests":
        """The requests of these prompts as NumPy arrays, padded to `shape.rows`."""
        rows = shape.rows
        return cls(
            prompt_len=padded_column([len(p) for p in prompts], rows, jnp.int32),
            gen_length=padded_column([c.gen_length for c in configs], rows, jnp.int32),
            temperature=padded_column([c.temperature for c in configs], rows, jnp.float32),
            seed=padded_column([c.seed for c in configs], rows, jnp.uint32),
            from_mask=padded_column([c.first_token == "mask" for c in configs], rows, bool),
            border_every=padded_column([c.border_every for c in configs], rows, jnp.int32),
            removed=removed_columns(configs, rows),
        )


class ARState(struct.PyTreeNode):
    """The loop state; see `decode.decoder.State`.

    Attributes:
      cache: keys and values of the tokens fed.
      tokens: int32 [B, S], prompt and response, by position.
      count: int32 [B], response tokens so far; each took one forward pass.
      done: bool [B], rows with nothing left to decode.
      requests: the request of each row.
    """

    cache: KVCache
    tokens: Array
    count: Array
    done: Array
    requests: ARRequests
    trace: ClassVar[None] = None

    def committed(self, eos_ids: Array) -> Array:
        """bool [B, S]: the response tokens so far."""
        del eos_ids  # no token is decoded after an EOS
        position, prompt_len = jnp.arange(self.tokens.shape[1]), self.requests.prompt_len[:, None]
        return (position >= prompt_len) & (position < prompt_len + self.count[:, None])

    @property
    def forwards(self) -> Array:
        """int32 [B]: forward passes made."""
        return self.count

    @property
    def iterations(self) -> Array:
        """int32 [B]: tokens decoded."""
        return self.count


def start(model, prompts: Array, requests: ARRequests, shape: Shape) -> ARState:
    """The state before the first pass, for prompts int32 [B, P]. Rows that request no tokens are done."""
    B, P = prompts.shape
    by_layer = model.cache_by_layer
    return ARState(
        cache=KVCache.zeros(model.config, B, P + shape.gen, model.dtype, by_layer=by_layer),
        tokens=jnp.pad(prompts, ((0, 0), (0, shape.gen))),
        count=jnp.zeros(B, jnp.int32),
        done=requests.gen_length == 0,
        requests=requests,
    )


def first_pass(model, params, state: ARState, mask_id: Array, eos_ids: Array, shape: Shape) -> ARState:
    """Prefills the prompts, each followed by one mask token, and appends the first response token.

    Its logits are those of the last prompt token or of the mask token, as the request asks.
    """
    B, requests = state.tokens.shape[0], state.requests
    prefilled = feed_prompts(
        model,
        params,
        state.cache,
        state.tokens[:, : shape.prompt],
        requests.prompt_len,
        jnp.full((B, 1), mask_id, jnp.int32),
        requests.prompt_len[:, None],
        jnp.ones((B, 1, 1), bool),
        shape.chunk,
    )
    x = jnp.where(requests.from_mask[:, None], prefilled.x[:, 0], prefilled.last)
    logits = model.apply({"params": params}, x, method="unembed")
    return append(state.replace(cache=prefilled.cache), logits, eos_ids)


def next_pass(model, params, state: ARState, mask_id: Array, eos_ids: Array, shape: Shape) -> ARState:
    """Feeds the last token of each row and appends the next token.

    If some request reads places off mask tokens, every row feeds a mask token too.
    """
    requests, B = state.requests, state.tokens.shape[0]
    positions = (requests.prompt_len + state.count - 1)[:, None]
    token = jnp.take_along_axis(state.tokens, positions, axis=1)
    keep = ~state.done[:, None]
    if shape.mask_readings:
        token = jnp.concatenate([token, jnp.full((B, 1), mask_id, jnp.int32)], axis=1)
        positions = jnp.concatenate([positions, positions + 1], axis=1)
        keep = jnp.concatenate([keep, jnp.zeros_like(keep)], axis=1)
    T = token.shape[1]
    entries = jnp.broadcast_to(state.cache.filled[:, None], (B, T, state.cache.filled.shape[1]))
    mask = jnp.concatenate([entries, jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))], axis=2)
    logits, fresh = model.apply({"params": params}, token, positions, state.cache.layers, mask)
    cache = state.cache.commit(fresh, positions, keep)
    read_at = jnp.zeros(B, jnp.int32)
    if shape.mask_readings:
        read_at += reads_mask(state.count, requests.from_mask, requests.border_every)
    logits = jnp.take_along_axis(logits, read_at[:, None, None], axis=1)[:, 0]
    return append(state.replace(cache=cache), logits, eos_ids)


def append(state: ARState, logits: Array, eos_ids: Array) -> ARState:
    """Appends a token drafted from logits [B, V] to each row that is not done."""
    requests = state.requests
    sampling = DraftSampling(
        temperature=requests.temperature,
        seed=requests.seed,
        iteration=state.count,
        place=jnp.zeros_like(state.count),
        removed=requests.removed,
    )
    token = draft(logits, sampling)
    positions = (requests.prompt_len + state.count)[:, None]
    count = state.count + ~state.done
    return state.replace(
        tokens=scatter_rows(state.tokens, positions, token[:, None], ~state.done[:, None]),
        count=count,
        done=state.done | requests.is_eos(token, eos_ids) | (count >= requests.gen_length),
    )


def exact_shape(prompts: Sequence[Sequence[int]], configs: Sequence[ARConfig]) -> Shape:
    """The smallest shape that holds these requests as one batch.

    Raises:
      BadInput: there is no prompt, not one config per prompt, or a prompt that cannot be continued (see
        `ARConfig.check_prompt`).
    """
    check_pairs(prompts, configs)
    for prompt, config in zip(prompts, configs, strict=True):
        config.check_prompt(prompt)
    return Shape(
        rows=len(prompts),
        prompt=max(map(len, prompts)),
        gen=max(c.gen_length for c in configs),
        mask_readings=int(any(c.border_every for c in configs)),
    )


DECODER = Decoder(exact_shape, ARRequests.batch, start, first_pass, repeated(next_pass))
