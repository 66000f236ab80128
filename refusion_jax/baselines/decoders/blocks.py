"""Shared by the decoders that unmask a response block by block (MDM, BD3): requests, state, commit rule.

The response starts as mask tokens. Its blocks are filled left to right. Each pass of a row drafts the masked
tokens of its current block and commits the most confident of them, until the block has no mask token left.

T is the padded block length, P the padded prompt length, S that of the text, Q the number of tokens fed.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.baselines.decoders.config import BlockConfig
from refusion_jax.decode.batch import Shape, check_pairs, padded_column
from refusion_jax.decode.kv_cache import KVCache, scatter_rows
from refusion_jax.decode.samples import is_eos
from refusion_jax.decode.scores import DraftSampling, draft

Array = jax.Array


class BlockRequests(struct.PyTreeNode):
    """A batch of requests. Fields are arrays [B], named as in BlockConfig; padding rows have no blocks.

    Attributes:
      FIELDS: the dtypes of the fields that are taken from the config.
      prompt_len: int32, prompt tokens.
    """

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

    def is_eos(self, tokens: Array, eos_ids: Array) -> Array:
        """bool: which of the tokens [B, ...] end a response."""
        return is_eos(tokens, eos_ids)

    @classmethod
    def batch(cls, prompts: Sequence[Sequence[int]], configs: Sequence[BlockConfig], shape: Shape) -> Self:
        """The requests of these prompts as NumPy arrays, padded to `shape.rows`."""
        rows = shape.rows
        fields = {
            name: padded_column([getattr(c, name) for c in configs], rows, dtype)
            for name, dtype in cls.FIELDS.items()
        }
        return cls(prompt_len=padded_column([len(p) for p in prompts], rows, jnp.int32), **fields)


class BlockState(struct.PyTreeNode):
    """The loop state; see `decode.decoder.State`.

    Attributes:
      cache: keys and values; the method decides of which tokens.
      tokens: int32 [B, S], prompt and committed tokens, by position.
      committed_in: int32 [B, S], the number of the pass that committed a response token, counted from 1; 0
        for tokens that are not committed and for the prompt.
      block: int32 [B], the index of the current block.
      begins: bool [B], whether the next pass is the first over the current block.
      forwards: int32 [B], forward passes made.
      done: bool [B], rows with nothing left to decode.
      requests: the request of each row.
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

    def committed(self, eos_ids: Array) -> Array:
        """bool [B, S]: the committed tokens up to and including the first EOS of each row."""
        is_committed = self.committed_in > 0
        eos = is_committed & self.requests.is_eos(self.tokens, eos_ids)
        return is_committed & (jnp.cumsum(eos, axis=1) - eos == 0)

    @property
    def iterations(self) -> Array:
        """int32 [B]: forward passes made; these methods have no plans."""
        return self.forwards

    @classmethod
    def start(
        cls, model, prompts: Array, requests: BlockRequests, shape: Shape, *, cached: bool = True
    ) -> Self:
        """The state before the first pass, for prompts int32 [B, P]. Rows without blocks are done.

        Args:
          cached: False gives the cache length 0, for a method that keeps no keys and values.
        """
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
        """int32 [B, Q]: the tokens at positions [B, Q]; the mask token where none is committed."""
        is_known = jnp.take_along_axis(self.committed_in, positions, axis=1, mode="clip") > 0
        is_known |= positions < self.requests.prompt_len[:, None]
        return jnp.where(is_known, jnp.take_along_axis(self.tokens, positions, axis=1, mode="clip"), mask_id)


def surest(masked: Array, confidence: Array, count: Array, threshold: Array) -> Array:
    """The tokens of one row's block that a pass commits: the `count` most confident, and all above threshold.

    Args:
      masked: bool [T], the tokens to choose from.
      confidence: float32 [T].
      count: int32, the number of tokens to commit whatever their confidence; among equally confident tokens
        the earliest.
      threshold: float32, confidence above which a token is committed in any case.

    Returns:
      bool [T].
    """
    index = jnp.arange(masked.shape[0])
    earlier = index[:, None] > index
    ranks_before = (confidence > confidence[:, None]) | ((confidence == confidence[:, None]) & earlier)
    rank = jnp.sum(ranks_before & masked, axis=1)
    return masked & ((rank < count) | (confidence > threshold))


def drafts(logits: Array, mask_id: Array, sampling: DraftSampling) -> tuple[Array, Array]:
    """Drafts from logits [N, V], with the mask token excluded.

    Returns:
      the drafted tokens, int32 [N]; and their softmax probabilities over all tokens but the mask token,
      float32 [N].
    """
    exact = jnp.where(jnp.arange(logits.shape[1]) == mask_id, -jnp.inf, logits)
    token = draft(exact, sampling)
    of_token = jnp.take_along_axis(exact, token[:, None], axis=1)[:, 0]
    return token, jnp.exp(of_token - jax.nn.logsumexp(exact, axis=1))


def commit(state: BlockState, logits: Array, mask_id: Array, eos_ids: Array) -> BlockState:
    """The state after a pass: commits the most confident tokens of each row's block (`surest`).

    A row whose block is full goes to the next block, or is done after the last block or a block with an EOS.

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
    of_block = jnp.take_along_axis(tokens, positions, axis=1, mode="clip")
    has_eos = inside & requests.is_eos(of_block, eos_ids)
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
    """The smallest shape that holds these requests as one batch.

    Raises:
      BadInput: there is no prompt, or not one config per prompt.
    """
    check_pairs(prompts, configs)
    return Shape(
        rows=len(prompts),
        prompt=max(map(len, prompts)),
        gen=max(c.gen_length for c in configs),
        block=max(c.block_len for c in configs),
    )
