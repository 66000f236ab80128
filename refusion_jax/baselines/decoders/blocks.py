"""What decoders that unmask a response block by block share: settings, where a row stands, what to commit.

The response begins as masks. Its blocks are filled left to right; every pass of a row drafts the masked
tokens of its current block and commits the surest of them, until none is left.

T tokens are those of a block as padded.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Prepared, Shape, check_pairs, pad_prompts, padded_column
from refusion_jax.decode.config import MOST_BLOCK_TOKENS, MOST_TOKENS, check_common, check_finite, check_whole
from refusion_jax.decode.kv_cache import KVCache, scatter_rows
from refusion_jax.decode.samples import Samples, in_text_order
from refusion_jax.decode.scores import DraftSampling, draft
from refusion_jax.errors import BadInput

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """How one prompt is answered block by block; a method adds how long its blocks are.

    Attributes:
      mask_id, eos_id: of the tokenizer.
      gen_length: most response tokens, EOS included.
      tokens_per_step: of the masked tokens of a block every pass commits so many, the surest.
      token_threshold: and besides them every one drafted with a probability above this; from 1 on none.
      temperature: of the drafts (Gumbel-max); 0 is greedy. Their probability is that at temperature 1.
      seed: of the drafts where temperature is above 0.

    Raises:
      BadInput: a setting that cannot be decoded.
    """

    mask_id: int
    eos_id: int
    gen_length: int = 128
    tokens_per_step: int = 1
    token_threshold: float = 1.0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_common(self)
        check_whole("tokens_per_step", self.tokens_per_step, 1, MOST_TOKENS)
        check_finite("token_threshold", self.token_threshold)

    def check_blocks(self, of: str, parts: int, block_len: int) -> None:
        """Raises BadInput unless gen_length divides into `parts` (which the setting `of` says) and blocks of
        `block_len` are not too long."""
        if self.gen_length % parts:
            raise BadInput(f"gen_length must be a multiple of {of} = {parts}, found {self.gen_length}")
        if block_len > MOST_BLOCK_TOKENS:
            raise BadInput(f"blocks must be at most {MOST_BLOCK_TOKENS} tokens long, found {block_len}")


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
    def batch(cls, prompts: Sequence[Sequence[int]], configs: Sequence[BlockConfig], rows: int) -> Self:
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


def prepare(
    model,
    prompts: Sequence[Sequence[int]],
    config: BlockConfig | Sequence[BlockConfig],
    shape: Shape | None,
    exact_shape: Callable[..., Shape],
    requests: type[BlockRequests],
) -> Prepared:
    """Checks and pads a batch.

    Args:
      model: an unrolled Transformer.
      prompts: token ids, of any lengths.
      config: one for all prompts, or one for each; they must agree on mask_id and eos_id.
      shape: sizes to pad to; None is as small as the batch allows.
      exact_shape, requests: of the method.

    Raises:
      BadInput: a prompt or setting that cannot be decoded, naming it.
    """
    configs = [config] * len(prompts) if isinstance(config, BlockConfig) else list(config)
    needed = exact_shape(prompts, configs)
    shape = needed.padded() if shape is None else shape
    shape.check_holds(needed)
    padded = pad_prompts(prompts, configs, shape, model.config.vocab_size)
    asked = requests.batch(prompts, configs, shape.rows)
    return Prepared.of(padded, asked, configs, shape)


def finish(state: BlockState, eos_id: Array, shape: Shape) -> Samples:
    """The answers in a state whose rows are done, up to and including the first EOS."""
    committed = state.committed_in > 0
    eos = committed & (state.tokens == eos_id)
    committed &= jnp.cumsum(eos, axis=1) - eos == 0
    answers = in_text_order(state.tokens, committed, state.requests.prompt_len, eos_id, gen=shape.gen)
    return Samples(*answers, state.forwards, state.forwards)
