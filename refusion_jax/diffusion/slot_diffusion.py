"""The slot-diffusion objective: `draw` the noise, `rearrange` the tokens, weigh the `loss`.

An example is a prompt of P tokens and a response of A tokens (EOS included). The response is cut into
slots of W tokens; some slots are masked. The model is fed the prompt, the clean slots in random order,
then the masked slots in text order with every token replaced by the mask token; each token keeps its
own position id. A clean token is trained to predict the token after it in its slot, a masked one its
own token (arXiv 2512.13586, section 3.2).

A row holds E examples back to back, then padding. They stay in place as they are noised: a row is fed
example after example, each in the order above, each in a segment of its own, and an example's noise, fed
order, positions and weights are the same whatever row it is in. Where E is 1 it may be left out of shapes.

`draw` is the only place with randomness. `rearrange` is a pure function of its draw, so it can be
checked against recorded ones. All slot logic ends in per-token targets and weights: the loss is two
weighted sums. With ce_i the cross entropy at fed token i and b running over the examples that have a
response (B of them):

  release (default, the authors' code): each slot is masked with probability p = (1 - eps) t + eps,
    L_AR   = sum over all labelled clean tokens of ce_i / their number in the batch
    L_diff = 1/B sum_b sum over masked tokens i of ce_i / (p_b A_b)
  paper (eq. 2 to 4): floor(t K) of the K slots, chosen at random, are masked,
    L_AR   = 1/B sum_b mean over labelled clean tokens of b of ce_i
    L_diff = 1/B sum_b mean over masked tokens of b of ce_i

and L = L_AR + diffusion_weight * L_diff in both. An empty mean is 0, never NaN.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.diffusion import segments
from refusion_jax.diffusion.cross_entropy import weighted_cross_entropy

Array = jax.Array
# int32 tokens [B, T]; prompt_len, total_len and example_id [B], or [B, E] for rows of up to E examples
Batch = Mapping[str, Array]
NORMALISATIONS = ("release", "paper")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """How noise is drawn and the loss normalised.

    Attributes:
      slot_sizes: an example's slot size W is drawn uniformly from these.
      eps: smallest masking probability: of a slot (release), of a token (mdm, bd3).
      normalisation: "release" or "paper", see the module's equations.
      diffusion_weight: lambda, the weight of the diffusion part.
      block_len: response tokens of a block; of the objective bd3 alone.
    """

    slot_sizes: tuple[int, ...] = (4, 8, 16, 32)
    eps: float = 1e-3
    normalisation: str = "release"
    diffusion_weight: float = 1.0
    block_len: int = 32

    def __post_init__(self):
        object.__setattr__(self, "slot_sizes", tuple(self.slot_sizes))
        if not self.slot_sizes or min(self.slot_sizes) < 1:
            raise ValueError(f"slot_sizes must be one or more positive lengths, got {self.slot_sizes}")
        if self.block_len < 1:
            raise ValueError(f"block_len must be at least 1, got {self.block_len}")
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be in [0, 1), got {self.eps}")
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {NORMALISATIONS}, got {self.normalisation!r}")

    def max_slots(self, length: int, examples: int = 1) -> int:
        """The most slots that the responses of so many examples within `length` tokens can have."""
        smallest = min(self.slot_sizes)
        return (length + examples * (smallest - 1)) // smallest


class Draw(struct.PyTreeNode):
    """The random choices of a batch.

    The M slots of a row are those of its examples one after the other; entries beyond have no meaning.

    Attributes:
      slot_size: int32 [B, E], W.
      mask_probability: float32 [B, E], p of the release; unused by the paper's normalisation.
      slot_masked: bool [B, M].
      slot_rank: int32 [B, M], an example's clean slots are fed in ascending order of it.
    """

    slot_size: Array
    mask_probability: Array
    slot_masked: Array
    slot_rank: Array


class Noised(struct.PyTreeNode):
    """What the model is fed and what is asked of it.

    Attributes:
      tokens: int32 [B, T], in the order fed; padding last.
      positions: int32 [B, T], the place of each in the text of its example.
      segments: int32 [B, T], ascending: which example of its row each is of; E for padding.
      targets: int32 [B, T]; meaningful where a weight is positive.
      ar_weights: float32 [B, T], positive at labelled clean tokens.
      diffusion_weights: float32 [B, T], positive at masked tokens.
      ar_count: float32 [B], what the row adds to the divisor of the AR part.
      has_response: float32 [B], its examples that have a response: what it adds to that of the diffusion
        part.
      blocks: int32 [B, T], the block of its example that each is of; None where there are no blocks.
    """

    tokens: Array
    positions: Array
    segments: Array
    targets: Array
    ar_weights: Array
    diffusion_weights: Array
    ar_count: Array
    has_response: Array
    blocks: Array | None = None


def draw(key: Array, example: Array, response_len: Array, max_slots: int, config: DiffusionConfig) -> Draw:
    """Draws slot sizes, masks and orders; an example's draw depends on (key, its number) alone.

    Args:
      key: the key of this training step, `fold_in(seed_key, step)`.
      example: int32 [B, E], a number that names each example.
      response_len: int32 [B, E], A; 0 where there is no example.
      max_slots: M, at least the sum of ceil(A / min(slot_sizes)) over the examples of every row.
      config: the noise.
    """
    sizes = jnp.asarray(config.slot_sizes, jnp.int32)
    # One number a slot and key, so that a draw does not depend on how far rows are padded.
    uniform = jax.vmap(lambda key, slot: jax.random.uniform(jax.random.fold_in(key, slot)))

    def one(example: Array, response_len: Array) -> Draw:
        keys = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number), 4))(example)
        size_key, time_key, mask_key, order_key = (keys[:, i] for i in range(4))
        slot_size = jax.vmap(lambda key: jax.random.choice(key, sizes))(size_key)
        t = jax.vmap(jax.random.uniform)(time_key)
        p = (1 - config.eps) * t + config.eps
        num_slots = _ceil_div(response_len, slot_size)
        first = segments.first(num_slots)
        owner = segments.owners(first, max_slots)
        slot = jnp.arange(max_slots) - first[owner]  # its number within the example
        u = uniform(mask_key[owner], slot)
        if config.normalisation == "release":
            masked = u < p[owner]
        else:
            num_masked = jnp.floor(t * num_slots).astype(jnp.int32)
            u = jnp.where(slot < num_slots[owner], u, 2.0)
            masked = _rank(owner, u) - first[owner] < num_masked[owner]
        return Draw(slot_size, p, masked, _rank(owner, uniform(order_key[owner], slot)))

    drawn = jax.vmap(one)(segments.columns(example), segments.columns(response_len))
    shaped = {name: getattr(drawn, name).reshape(example.shape) for name in ("slot_size", "mask_probability")}
    return drawn.replace(**shaped)


def rearrange(
    tokens: Array, prompt_len: Array, total_len: Array, draw: Draw, mask_id: int, config: DiffusionConfig
) -> Noised:
    """Feeds of each example prompt, clean slots in drawn order, masked slots in text order; then padding.

    Args:
      tokens: int32 [B, T], the examples of a row, each prompt then response, and padding.
      prompt_len: int32 [B, E], P.
      total_len: int32 [B, E], P + A; 0 where there is no example.
      draw: the choices to apply.
      mask_id: the mask token.
      config: which normalisation the weights follow.
    """

    def one(tokens: Array, prompt_len: Array, total_len: Array, draw: Draw) -> Noised:
        num_examples, response_len = prompt_len.shape[0], total_len - prompt_len
        at = segments.locate_tokens(prompt_len, total_len, tokens.shape[0])
        owner, position = at.owner, at.position
        in_prompt = position < prompt_len[owner]
        slot_size = draw.slot_size[owner]
        slot, offset = jnp.divmod(at.offset, slot_size)
        num_slots = _ceil_div(response_len, draw.slot_size)
        slot += segments.first(num_slots)[owner]  # from its example's to the row's
        masked = at.response & draw.slot_masked[slot]
        clean = at.response & ~masked
        # One sort: by example, by groups in the order fed, clean tokens by (rank, offset), others as they
        # stand.
        group = jnp.select([in_prompt, clean, masked], [0, 1, 2], 3)
        within = jnp.where(clean, draw.slot_rank[slot] * slot_size + offset, position)
        stride = draw.slot_rank.shape[0] * slot_size + tokens.shape[0]
        index = jnp.arange(tokens.shape[0])
        source = jax.lax.sort((owner, group * stride + within, index), num_keys=2)[-1]

        last_of_slot = (offset == slot_size - 1) | (position == total_len[owner] - 1)
        labelled = clean & ~last_of_slot
        targets = jnp.where(clean, jnp.roll(tokens, -1), tokens)
        fed = jnp.where(masked, mask_id, tokens)

        has_response = jnp.sum(response_len > 0).astype(jnp.float32)
        if config.normalisation == "release":
            ar_scale, ar_count = jnp.ones(num_examples), jnp.sum(labelled).astype(jnp.float32)
            diffusion_scale = 1 / (draw.mask_probability * jnp.maximum(response_len, 1))
        else:
            ar_scale, ar_count = 1 / _number(labelled, owner, num_examples), has_response
            diffusion_scale = 1 / _number(masked, owner, num_examples)
        return Noised(
            tokens=fed[source],
            positions=position[source],
            segments=at.segments,  # ascending: as before the sort
            targets=targets[source],
            ar_weights=(labelled * ar_scale[owner])[source].astype(jnp.float32),
            diffusion_weights=(masked * diffusion_scale[owner])[source].astype(jnp.float32),
            ar_count=ar_count,
            has_response=has_response,
        )

    of_examples = {name: segments.columns(getattr(draw, name)) for name in ("slot_size", "mask_probability")}
    lengths = segments.columns(prompt_len), segments.columns(total_len)
    return jax.vmap(one)(tokens, *lengths, draw.replace(**of_examples))


def corrupt(
    key: Array, batch: Batch, config: DiffusionConfig, max_examples_per_row: int, mask_id: int
) -> Noised:
    """`draw`, then `rearrange`.

    Args:
      key: the key of this training step.
      batch: the rows.
      config: the noise.
      max_examples_per_row: E.
      mask_id: the mask token.
    """
    tokens, prompt_len, total_len = batch["tokens"], batch["prompt_len"], batch["total_len"]
    max_slots = config.max_slots(tokens.shape[1], max_examples_per_row)
    drawn = draw(key, batch["example_id"], total_len - prompt_len, max_slots, config)
    return rearrange(tokens, prompt_len, total_len, drawn, mask_id, config)


# Two forms of one loss. `loss_of_states` trains: it takes the model's final states and never holds the logits
# of a whole batch. `loss` takes logits: it is the reference that tests and other code compare with.


def divisors(noised: Noised) -> tuple[Array, Array]:
    """What the AR and the diffusion sums are divided by, over all rows of `noised`; at least 1."""
    return jnp.maximum(jnp.sum(noised.ar_count), 1), jnp.maximum(jnp.sum(noised.has_response), 1)


def loss(
    logits: Array,
    noised: Noised,
    diffusion_weight: float = 1.0,
    divided_by: tuple[Array, Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of logits and its parts, float32: the reference form (module docstring, equations).

    Args:
      logits: [B, T, V].
      noised: what the logits were computed from.
      diffusion_weight: lambda.
      divided_by: `divisors` of the whole batch where these rows are only a part of it, so that the
        losses and gradients of the parts add up to those of the whole.

    Returns:
      the loss, and {"loss", "ar_loss", "diffusion_loss"}.
    """
    divided_by = divisors(noised) if divided_by is None else divided_by
    parts = _parts(cross_entropy(logits, noised.targets), noised, divided_by)
    total = parts["ar_loss"] + diffusion_weight * parts["diffusion_loss"]
    return total, {"loss": total} | parts


def loss_of_states(
    states: Array,
    head: Array,
    noised: Noised,
    diffusion_weight: float,
    divided_by: tuple[Array, Array],
    num_chunks: int,
) -> tuple[Array, dict[str, Array]]:
    """The same loss of final states under a head: the form that trains.

    Cross entropy and its gradients are computed chunk by chunk, so the logits of the whole batch never exist.

    Args:
      states: [B, T, D].
      head: [D, V].
      noised, diffusion_weight, divided_by: as in `loss`.
      num_chunks: as in `weighted_cross_entropy`.

    Returns:
      as `loss`.
    """
    ar_divisor, diffusion_divisor = divided_by
    weights = noised.ar_weights / ar_divisor + diffusion_weight * noised.diffusion_weights / diffusion_divisor
    total, ce = weighted_cross_entropy(states, head, noised.targets, weights, num_chunks)
    return total, {"loss": total} | _parts(ce, noised, divided_by)


def _parts(ce: Array, noised: Noised, divided_by: tuple[Array, Array]) -> dict[str, Array]:
    ar_divisor, diffusion_divisor = divided_by
    return {
        "ar_loss": jnp.sum(ce * noised.ar_weights) / ar_divisor,
        "diffusion_loss": jnp.sum(ce * noised.diffusion_weights) / diffusion_divisor,
    }


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Cross entropy of logits [..., V] at targets int32 [...]: float32 [...].

    The largest logit is subtracted from both terms before they are subtracted from each other: the loss of a
    confident token is a few units in the last place of the logits themselves. optax's function of integer
    labels adds it back to one of them, and is off by a third at a loss of 5e-5 under logits of 1,000.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


def _ceil_div(x: Array, y: Array) -> Array:
    return -(-x // y)


def _number(chosen: Array, owner: Array, num_examples: int) -> Array:
    """int32 [E]: how many of an example's tokens are chosen, bool [T]; at least 1."""
    count = jax.ops.segment_sum(chosen.astype(jnp.int32), owner, num_examples, indices_are_sorted=True)
    return jnp.maximum(count, 1)


def _rank(owner: Array, x: Array) -> Array:
    """int32 [M]: the rank of each slot in the order of (owner, x), both [M]."""
    order = jax.lax.sort((owner, x, jnp.arange(x.shape[0])), num_keys=2)[-1]
    return jnp.argsort(order).astype(jnp.int32)
