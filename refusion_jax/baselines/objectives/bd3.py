"""The objective of block diffusion (BD3-LM, arXiv 2503.09573; Fast-dLLM v2 trains alike).

The response is cut into blocks of `block_len` tokens; the last may be shorter. Each block is noised as `mdm`
noises an example, with a masking probability of its own, and is predicted from the prompt, the clean blocks
before it, and the whole of itself. One forward pass does this for all blocks: its input is each row twice,
clean and then noised, 2 T tokens, with the attention mask `visible`:

  prompt          sees the prompt up to itself
  clean block b   sees the prompt, clean blocks up to b
  noised block b  sees the prompt, clean blocks before b, noised block b

  L = 1/B sum over examples e and their masked tokens i of ce_i / (p_i A_e)

p_i is the masking probability of the token's block. Clean tokens never see later blocks, so a decoder can
cache their keys and values.
"""

from typing import Any

import jax
import jax.numpy as jnp

from refusion_jax.baselines.objectives import mdm
from refusion_jax.diffusion import segments
from refusion_jax.diffusion.segments import Batch
from refusion_jax.diffusion.slot_diffusion import DiffusionConfig, Noised

Array = jax.Array


def corrupt(key: Array, batch: Batch, config: DiffusionConfig, mask_id: int) -> Noised:
    """Rows clean and then noised, [B, 2 T]. Arguments as in `slot_diffusion.corrupt`.

    `blocks` numbers the blocks of a response from 0; each prompt token is a block of its own, with a negative
    number. In the noised half, prompts have the segment of padding.
    """
    tokens, prompt_len, total_len = batch["tokens"], batch["prompt_len"], batch["total_len"]
    block_len, length = config.block_len, tokens.shape[1]
    drawn = mdm.draw(key, batch["example_id"], prompt_len, total_len, length, config.eps, block_len)
    noised = mdm.mask(tokens, prompt_len, total_len, drawn, mask_id)

    def one(prompt_len: Array, total_len: Array) -> tuple[Array, Array]:
        at = segments.locate_tokens(prompt_len, total_len, length)
        block = (at.position - prompt_len[at.owner]) // jnp.where(at.response, block_len, 1)
        return block, jnp.where(at.response, at.segments, prompt_len.shape[0])

    blocks, of_copy = jax.vmap(one)(segments.columns(prompt_len), segments.columns(total_len))

    def both(clean: Array, copy: Array) -> Array:
        return jnp.concatenate([clean, copy], axis=1)

    nothing = jnp.zeros(tokens.shape)
    return noised.replace(
        tokens=both(tokens, noised.tokens),
        positions=both(noised.positions, noised.positions),
        segments=both(noised.segments, of_copy),
        targets=both(tokens, noised.targets),
        ar_weights=both(nothing, nothing),
        diffusion_weights=both(nothing, noised.diffusion_weights),
        blocks=both(blocks, blocks),
    )


def visible(noised: Noised) -> Array:
    """The attention mask of a batch that `corrupt` returned, bool [B, 2 T, 2 T] (query, key)."""
    in_copy = jnp.arange(noised.tokens.shape[1]) >= noised.tokens.shape[1] // 2
    query, key = noised.blocks[:, :, None], noised.blocks[:, None, :]
    of_clean = ~in_copy & (key <= query - in_copy[:, None])
    of_copy = in_copy & in_copy[:, None] & (key == query)
    return (of_clean | of_copy) & (noised.segments[:, :, None] == noised.segments[:, None, :])


def attention_kwargs(noised: Noised, packed: bool) -> dict[str, Any]:
    """As `Objective.attention_kwargs`: the mask `visible`, which also separates the examples of a row."""
    return {"mask": visible(noised)}


def flop_counts(prompt_len: Array, total_len: Array, config: DiffusionConfig) -> tuple[Array, Array]:
    """As `Objective.flop_counts`: the response counts twice; both copies of a token see as many tokens."""
    prompt, response = (jnp.asarray(x, jnp.float32) for x in (prompt_len, total_len - prompt_len))
    blocks = response // config.block_len  # complete blocks
    rest = response - blocks * config.block_len
    within = config.block_len**2 * blocks * (blocks + 1) / 2 + rest * response
    return prompt + 2 * response, jnp.square(prompt) / 2 + 2 * (prompt * response + within)
