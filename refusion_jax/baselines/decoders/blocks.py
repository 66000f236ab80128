"""What decoders that unmask a response block by block share: requests, state, and what a pass commits.

The response begins as masks. Its blocks are filled left to right; every pass of a row drafts the masked
tokens of its current block and commits the surest of them, until none is left.

T tokens are those of a block as padded.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.baselines.decoders.config import BlockConfig
from refusion_jax.decode.batch import Shape, check_pairs, padded_column
from refusion_jax.decode.kv_cache import KVCache, scatter_rows
from refusion_jax.decode.scores import DraftSampling, draft

Array = jax.Array


class BlockRequests(struct.PyTreeNode):
    """A batch of requests as arrays [B]; a row of padding has no blocks. Fields as in a method's config."""

    FIELDS: ClassVar[dict[str, Any]] = {
        "block_len": jnp.int32,
        "num_blocks": jnp.int32,
        "tokens_per_step": jnp.int32,
        "token_threshold": jnp.float32,
        "temperature": jnp.float32,
        "seed": jnp.uint32,
    }

    prompt_len: Array
    block_len: Array
    num_blocks: Array
    tokens_per_step: Array
    token_threshold: Array
    temperature: Array
    seed: Array

    @classmethod
    def batch(cls, prompts: Sequence[Sequence[int]], configs: Sequence[BlockConfig], shape: Shape) -> Self:
        rows = shape.rows
        fields = {
            name: padded_column([getattr(c, name) for c in configs], rows, dtype)
            for name, dtype in cls.FIELDS.items()
        }
        return cls(prompt_len=padded_column([len(p) for p in prompts], rows, jnp.int32), **fields)


class BlockState(struct.PyTreeNode):
    """What the loop carries.

    Attributes:
      cache: keys and values; what they are of is the method's.
      tokens: int32 [B, S], prompt and committed tokens by position.
      committed_in: int32 [B, S], the pass in which a response token was committed, from 1; 0 for all others.
      block: int32 [B], the block being filled.
      begins: bool [B], the next pass is the first over its block.
      forwards: int32 [B], passes made.
      done: bool [B].
      requests: what each row asks for.
    """

    cache: KVCache
    tokens: Array
    committed_in: Array
    block: Array
    begins: Array
    forwards: Array
    done: Array
    requests: BlockRequests
    trace: ClassVar[None] = None

    def committed(self, eos_id: Array) -> Array:
        """bool [B, S], up to and including the first EOS of each row."""
        there = self.committed_in > 0
        eos = there & (self.tokens == eos_id)
        return there & (jnp.cumsum(eos, axis=1) - eos == 0)

    @property
    def iterations(self) -> Array:
        """int32 [B]."""
        return self.forwards

    @classmethod
    def start(
        cls, model, prompts: Array, requests: BlockRequests, shape: Shape, *, cached: bool = True
    ) -> Self:
        """The state before the first pass, with or without a cache; rows without blocks are done."""
        B, S = prompts.shape[0], shape.prompt + shape.gen
        none = jnp.zeros(B, jnp.int32)
        done = requests.num_blocks == 0
        return cls(
            cache=KVCache.zeros(
                model.config, B, S if cached else 0, model.dtype, by_layer=model.cache_by_layer
            ),
            tokens=jnp.pad(prompts, ((0, 0), (0, shape.gen))),
            committed_in=jnp.zeros((B, S), jnp.int32),
            block=none,
            begins=~done,
            forwards=none,
            done=done,
            requests=requests,
        )

    @property
    def block_start(self) -> Array:
        """int32 [B]: the position of the first token of the current block."""
        return self.requests.prompt_len + self.block * self.requests.block_len

    def fed_tokens(self, positions: Array, mask_id: Array) -> Array:
        """int32 [B, Q]: the tokens at positions [B, Q], masks where the response has none yet."""
        there = jnp.take_along_axis(self.committed_in, positions, axis=1, mode="clip") > 0
        there |= positions < self.requests.prompt_len[:, None]
        return jnp.where(there, jnp.take_along_axis(self.tokens, positions, axis=1, mode="clip"), mask_id)


def surest(masked: Array, confidence: Array, count: Array, threshold: Array) -> Array:
    """Which tokens of one row's block a pass commits.

    Args:
      masked: bool [T], those there are to choose from.
      confidence: float32 [T].
      count: int32, how many are committed whatever their confidence; of equally sure ones the earliest.
      threshold: float32, above which a token is committed in any case.

    Returns:
      bool [T].
    """
    place = jnp.arange(masked.shape[0])
    earlier = place[:, None] > place
    before = (confidence > confidence[:, None]) | ((confidence == confidence[:, None]) & earlier)
    rank = jnp.sum(before & masked, axis=1)
    return masked & ((rank < count) | (confidence > threshold))


def drafts(logits: Array, mask_id: Array, sampling: DraftSampling) -> tuple[Array, Array]:
    """int32 and float32 [N]: the token that each of logits [N, V] names, never the mask, and its probability
    among the tokens that are not the mask."""
    exact = jnp.where(jnp.arange(logits.shape[1]) == mask_id, -jnp.inf, logits.astype(jnp.float32))
    token = draft(exact, sampling)
    of_token = jnp.take_along_axis(exact, token[:, None], axis=1)[:, 0]
    return token, jnp.exp(of_token - jax.nn.logsumexp(exact, axis=1))


def commit(state: BlockState, logits: Array, mask_id: Array, eos_id: Array) -> BlockState:
    """Every row after a pass: the surest tokens of its block committed, and where it goes from there.

    Args:
      logits: [B, T, V], of the tokens of each row's current block.
    """
    (B, T, _), requests = logits.shape, state.requests
    index = jnp.arange(T)
    positions = state.block_start[:, None] + index
    inside = (index < requests.block_len[:, None]) & ~state.done[:, None]
    masked = inside & (jnp.take_along_axis(state.committed_in, positions, axis=1, mode="clip") == 0)

    def by_token(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None], (B, T)).reshape(-1)

    place = positions - requests.prompt_len[:, None]
    sampling = DraftSampling(
        by_token(requests.temperature), by_token(requests.seed), by_token(state.forwards), place.reshape(-1)
    )
    token, confidence = (x.reshape(B, T) for x in drafts(logits.reshape(B * T, -1), mask_id, sampling))
    chosen = jax.vmap(surest)(masked, confidence, requests.tokens_per_step, requests.token_threshold)

    forwards = state.forwards + ~state.done
    tokens = scatter_rows(state.tokens, positions, token, chosen)
    has_eos = inside & (jnp.take_along_axis(tokens, positions, axis=1, mode="clip") == eos_id)
    full = ~jnp.any(masked & ~chosen, axis=1)
    last = jnp.any(has_eos, axis=1) | (state.block + 1 >= requests.num_blocks)
    done = state.done | (full & last)
    return state.replace(
        tokens=tokens,
        committed_in=scatter_rows(
            state.committed_in, positions, jnp.broadcast_to(forwards[:, None], (B, T)), chosen
        ),
        block=state.block + (full & ~done),
        begins=full & ~done,
        forwards=forwards,
        done=done,
    )


def exact_shape(prompts: Sequence[Sequence[int]], configs: Sequence[BlockConfig]) -> Shape:
    """The smallest shape that holds these requests as one batch."""
    check_pairs(prompts, configs)
    return Shape(
        rows=len(prompts),
        prompt=max(map(len, prompts)),
        gen=max(c.gen_length for c in configs),
        block=max(c.block_len for c in configs),
    )
