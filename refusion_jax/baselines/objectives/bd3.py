"""The objective of block diffusion (BD3-LM, arXiv 2503.09573; Fast-dLLM v2 trains alike).

The response is cut into blocks of `block_len` tokens, the last of which may be shorter. Every block is noised
as `mdm` noises an example, with a probability of its own, and is predicted from the prompt, the
clean blocks before it, and all of itself. One pass does so for all blocks: it is fed each row twice, as it is
and then noised, 2 T tokens, under `visible`:

  prompt          sees the prompt up to itself
  clean block b   sees the prompt, clean blocks up to b
  noised block b  sees the prompt, clean blocks before b, noised block b

  L = 1/B sum over examples e and their masked tokens i of ce_i / (p_i A_e)

with p_i the probability of a token's block. So clean tokens never see what follows their block, and decoding
can keep their keys and values.
"""

import jax
import jax.numpy as jnp

from refusion_jax.baselines.objectives import mdm
from refusion_jax.baselines.objectives.mdm import Draw
from refusion_jax.diffusion import segments
from refusion_jax.diffusion.slot_diffusion import Batch, DiffusionConfig, Noised

Array = jax.Array


def corrupt(key: Array, batch: Batch, config: DiffusionConfig, mask_id: int) -> Noised:
    """A probability drawn for every block, then `twice`; arguments as of `slot_diffusion.corrupt`."""
    tokens, prompt_len, total_len = batch["tokens"], batch["prompt_len"], batch["total_len"]
    size = tokens.shape[1], config.eps, config.block_len
    drawn = mdm.draw(key, batch["example_id"], prompt_len, total_len, *size)
    return twice(tokens, prompt_len, total_len, drawn, mask_id, config.block_len)


def twice(
    tokens: Array, prompt_len: Array, total_len: Array, draw: Draw, mask_id: int, block_len: int
) -> Noised:
    """Rows clean and then noised, [B, 2 T]; arguments as of `diffusion.rearrange`.

    `blocks` numbers the blocks of a response from 0; each token of the prompt is a block of its own, numbered
    below 0. In the noised half prompts count as padding.
    """
    noised = mdm.mask(tokens, prompt_len, total_len, draw, mask_id)

    def one(prompt_len: Array, total_len: Array) -> tuple[Array, Array]:
        at = segments.locate_tokens(prompt_len, total_len, tokens.shape[1])
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
    """The attention mask of what `twice` gives, bool [B, 2 T, 2 T]."""
    in_copy = jnp.arange(noised.tokens.shape[1]) >= noised.tokens.shape[1] // 2
    query, key = noised.blocks[:, :, None], noised.blocks[:, None, :]
    of_clean = ~in_copy & (key <= query - in_copy[:, None])
    of_copy = in_copy & in_copy[:, None] & (key == query)
    return (of_clean | of_copy) & (noised.segments[:, :, None] == noised.segments[:, None, :])


def flop_counts(prompt_len: Array, total_len: Array, block_len: int) -> tuple[Array, Array]:
    """As in Objective: responses are fed twice, and a token of either copy sees as many."""
    prompt, response = (jnp.asarray(x, jnp.float32) for x in (prompt_len, total_len - prompt_len))
    blocks = response // block_len  # whole ones
    rest = response - blocks * block_len
    within = block_len**2 * blocks * (blocks + 1) / 2 + rest * response
    return prompt + 2 * response, jnp.square(prompt) / 2 + 2 * (prompt * response + within)
