"""The slot-diffusion objective: `draw` the noise, `rearrange` the tokens, compute the loss.

An example is a prompt of P tokens and a response of A tokens (EOS included). The response is cut into slots
of W tokens, and some slots are masked. The model's input is the prompt, then the clean slots in random order,
then the masked slots in text order with every token replaced by the mask token; each token keeps its
original position id. A clean token predicts the next token of its slot, a masked token predicts itself
(arXiv 2512.13586, section 3.2).

A row holds E examples back to back, then padding. Noising keeps each example in place: the row's input is one
example after another, each in the order above and in its own segment. An example's noise, order, positions
and weights do not depend on the row it is in. Where E is 1, its axis may be left out of shapes.

`draw` is the only function that uses randomness. `rearrange` is a pure function of the draw, so it can be
tested against recorded draws. Both end in one target and weight per token, so the loss is two weighted
sums. ce_i is the cross entropy at input token i; b runs over the B examples that have a response:

  release (default, the authors' code): each slot is masked with probability p = (1 - eps) t + eps,
    L_AR   = sum over all labelled clean tokens of ce_i / their number in the batch
    L_diff = 1/B sum_b sum over masked tokens i of ce_i / (p_b A_b)
  paper (eq. 2 to 4): floor(t K) of the K slots, chosen at random, are masked,
    L_AR   = 1/B sum_b mean over labelled clean tokens of b of ce_i
    L_diff = 1/B sum_b mean over masked tokens of b of ce_i

with t ~ U(0, 1) per example, and L = L_AR + diffusion_weight * L_diff in both. The mean of nothing is 0.

Anchored training (ours, not in the paper): with probability `ar_share` an example is in order. Nothing of it
is masked, its slots keep the order of the text, and it is labelled as in autoregressive training: every
response token is predicted from the token before it, the first one from the last prompt token. These labels
belong to L_AR; the mean over b of L_diff leaves the example out, so `diffusion_weight` keeps its meaning.

Two functions compute L. `loss` takes logits and is the reference. `loss_of_states` is the one that training
differentiates: it takes the final states and the head, and never holds the logits of a whole batch.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.diffusion import segments
from refusion_jax.diffusion.cross_entropy import SoftTargets, weighted_cross_entropy
from refusion_jax.diffusion.segments import Batch

Array = jax.Array
NORMALISATIONS = ("release", "paper")

# Random streams of an example. `fold_in` of its key with 0 to 3 gives the four keys that `split` makes of it.
IN_ORDER, TEXT_ORDER = 4, 5


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Distribution of the noise and normalisation of the loss.

    Attributes:
      slot_sizes: slot sizes in tokens; one is drawn uniformly for each example.
      eps: smallest masking probability of a slot (normalisation "release") or of a token (mdm, bd3).
      normalisation: divisors of the loss: "release", as in the authors' code, or "paper", equations 2 to 4.
      diffusion_weight: weight of the diffusion loss; the autoregressive loss has weight 1.
      block_len: block length in response tokens, for the objective bd3 only.
      ar_share: probability that an example is in order, nothing masked and labelled as by the objective ar;
        for the objective refusion only. 0 is the paper.
      text_order_share: probability that the clean slots of an example keep their order in the text, for the
        objective refusion only.
    """

    slot_sizes: tuple[int, ...] = (4, 8, 16, 32)
    eps: float = 1e-3
    normalisation: str = "release"
    diffusion_weight: float = 1.0
    block_len: int = 32
    ar_share: float = 0.0
    text_order_share: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "slot_sizes", tuple(self.slot_sizes))
        if not self.slot_sizes or min(self.slot_sizes) < 1:
            raise ValueError(f"slot_sizes must be one or more positive lengths, got {self.slot_sizes}")
        if self.block_len < 1:
            raise ValueError(f"block_len must be at least 1, got {self.block_len}")
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be in [0, 1), got {self.eps}")
        if not 0 <= self.ar_share <= 1:
            raise ValueError(f"ar_share must be in [0, 1], got {self.ar_share}")
        if not 0 <= self.text_order_share <= 1:
            raise ValueError(f"text_order_share must be in [0, 1], got {self.text_order_share}")
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {NORMALISATIONS}, got {self.normalisation!r}")

    def max_slots(self, length: int, examples: int = 1) -> int:
        """Upper bound on the total number of slots of `examples` responses in a row of `length` tokens."""
        smallest = min(self.slot_sizes)
        return (length + examples * (smallest - 1)) // smallest


class Draw(struct.PyTreeNode):
    """The random choices of a batch.

    The slot axis M of a row numbers the slots of its examples one after another; entries beyond the last
    slot have no meaning.

    Attributes:
      slot_size: int32 [B, E], W.
      mask_probability: float32 [B, E], p of the release; the paper's normalisation does not use it.
      slot_masked: bool [B, M].
      slot_rank: int32 [B, M], sort key that orders the clean slots of an example.
      in_order: bool [B, E], whether the example is in order: none of its slots is masked, they are ranked by
        their number, and it is labelled as in autoregressive training. None: no example is.
    """

    slot_size: Array
    mask_probability: Array
    slot_masked: Array
    slot_rank: Array
    in_order: Array | None = None


class Noised(struct.PyTreeNode):
    """Inputs of the model for a noised batch, with a target and weights for every token.

    Attributes:
      tokens: int32 [B, T], in input order, padding last.
      positions: int32 [B, T], position id of each token in the text of its example.
      segments: int32 [B, T], ascending: index of the token's example in its row; E for padding.
      targets: int32 [B, T]; meaningful where a weight is positive.
      ar_weights: float32 [B, T], positive at labelled clean tokens.
      diffusion_weights: float32 [B, T], positive at masked tokens.
      ar_count: float32 [B], the row's contribution to the divisor of the AR loss.
      has_response: float32 [B], number of examples with a response that are not in order: the row's
        contribution to the divisor of the diffusion loss.
      blocks: int32 [B, T], index of the token's block in its example; None for objectives without blocks.
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


def corrupt(key: Array, batch: Batch, config: DiffusionConfig, mask_id: int) -> Noised:
    """The noised batch: `draw`, then `rearrange`.

    Args:
      key: the key of this training step, `fold_in(seed_key, step)`.
      batch: arrays of a batch, see `segments.Batch`.
      config: the noise and the normalisation.
      mask_id: id of the mask token.
    """
    prompt_len, total_len = batch["prompt_len"], batch["total_len"]
    num_examples = segments.columns(total_len).shape[1]
    max_slots = config.max_slots(batch["tokens"].shape[1], num_examples)
    drawn = draw(key, batch["example_id"], total_len - prompt_len, max_slots, config)
    return rearrange(batch["tokens"], prompt_len, total_len, drawn, mask_id, config)


def draw(key: Array, example_id: Array, response_len: Array, max_slots: int, config: DiffusionConfig) -> Draw:
    """Draws slot sizes, masks and orders. An example's draw depends only on the key and its id.

    Args:
      key: the key of this training step, `fold_in(seed_key, step)`.
      example_id: int32 [B, E], id of each example.
      response_len: int32 [B, E], A; 0 for unused entries.
      max_slots: M, at least the sum of ceil(A / min(slot_sizes)) over the examples of any row.
      config: the noise.
    """
    sizes = jnp.asarray(config.slot_sizes, jnp.int32)
    # Every number is drawn from its own key, so that a draw does not depend on the padding of rows.
    uniform = jax.vmap(lambda key, slot: jax.random.uniform(jax.random.fold_in(key, slot)))

    def one(example_id: Array, response_len: Array) -> Draw:
        own = jax.vmap(lambda number: jax.random.fold_in(key, number))(example_id)
        keys = jax.vmap(lambda key: jax.random.split(key, 4))(own)
        size_key, time_key, mask_key, order_key = (keys[:, i] for i in range(4))
        slot_size = jax.vmap(lambda key: jax.random.choice(key, sizes))(size_key)
        t = jax.vmap(jax.random.uniform)(time_key)
        p = (1 - config.eps) * t + config.eps
        num_slots = _ceil_div(response_len, slot_size)
        first = segments.first(num_slots)
        owner = segments.owners(first, max_slots)
        slot = jnp.arange(max_slots) - first[owner]  # index within the example
        u = uniform(mask_key[owner], slot)
        if config.normalisation == "release":
            masked = u < p[owner]
        else:
            num_masked = jnp.floor(t * num_slots).astype(jnp.int32)
            u = jnp.where(slot < num_slots[owner], u, 2.0)
            masked = _rank(owner, u) - first[owner] < num_masked[owner]
        rank = _rank(owner, uniform(order_key[owner], slot))
        # Each of these choices has a stream of its own, so no other draw depends on its share.
        if config.text_order_share:
            in_text_order = uniform(own, jnp.full(own.shape, TEXT_ORDER)) < config.text_order_share
            rank = jnp.where(in_text_order[owner], jnp.arange(max_slots), rank)
        if not config.ar_share:
            return Draw(slot_size, p, masked, rank)
        in_order = uniform(own, jnp.full(own.shape, IN_ORDER)) < config.ar_share
        masked, rank = masked & ~in_order[owner], jnp.where(in_order[owner], slot, rank)
        return Draw(slot_size, p, masked, rank, in_order)

    drawn = jax.vmap(one)(segments.columns(example_id), segments.columns(response_len))
    return _of_examples(drawn, lambda x: x.reshape(example_id.shape))


def rearrange(
    tokens: Array, prompt_len: Array, total_len: Array, draw: Draw, mask_id: int, config: DiffusionConfig
) -> Noised:
    """Orders each example as prompt, clean slots in drawn order, masked slots in text order; then padding.

    Args:
      tokens: int32 [B, T], the examples of each row (prompt, then response) and padding.
      prompt_len: int32 [B, E], P.
      total_len: int32 [B, E], P + A; 0 for unused entries.
      draw: the random choices to apply.
      mask_id: id of the mask token.
      config: the normalisation that the weights follow.
    """

    def one(tokens: Array, prompt_len: Array, total_len: Array, draw: Draw) -> Noised:
        num_examples, response_len = prompt_len.shape[0], total_len - prompt_len
        at = segments.locate_tokens(prompt_len, total_len, tokens.shape[0])
        owner, position = at.owner, at.position
        in_prompt = position < prompt_len[owner]
        slot_size = draw.slot_size[owner]
        slot, offset = jnp.divmod(at.offset, slot_size)
        num_slots = _ceil_div(response_len, draw.slot_size)
        slot += segments.first(num_slots)[owner]  # index in the row instead of in the example
        masked = at.response & draw.slot_masked[slot]
        clean = at.response & ~masked
        # One sort: by example, then by group, then clean tokens by (rank, offset) and others by position.
        group = jnp.select([in_prompt, clean, masked], [0, 1, 2], 3)
        within = jnp.where(clean, draw.slot_rank[slot] * slot_size + offset, position)
        stride = draw.slot_rank.shape[0] * slot_size + tokens.shape[0]
        index = jnp.arange(tokens.shape[0])
        source = jax.lax.sort((owner, group * stride + within, index), num_keys=2)[-1]

        last_of_slot = (offset == slot_size - 1) | (position == total_len[owner] - 1)
        labelled, shifted = clean & ~last_of_slot, clean
        if draw.in_order is not None:
            labelled = jnp.where(draw.in_order[owner], segments.before_response(at), labelled)
            shifted |= labelled  # the last prompt token has a label too
        targets = jnp.where(shifted, jnp.roll(tokens, -1), tokens)
        fed = jnp.where(masked, mask_id, tokens)

        has_response = jnp.sum(response_len > 0).astype(jnp.float32)
        num_noised = has_response
        if draw.in_order is not None:
            num_noised = jnp.sum((response_len > 0) & ~draw.in_order).astype(jnp.float32)
        if config.normalisation == "release":
            ar_scale, ar_count = jnp.ones(num_examples), jnp.sum(labelled).astype(jnp.float32)
            diffusion_scale = 1 / (draw.mask_probability * jnp.maximum(response_len, 1))
        else:
            ar_scale, ar_count = 1 / _number(labelled, owner, num_examples), has_response
            diffusion_scale = 1 / _number(masked, owner, num_examples)
        return Noised(
            tokens=fed[source],
            positions=position[source],
            segments=at.segments,  # the sort keeps examples in place
            targets=targets[source],
            ar_weights=(labelled * ar_scale[owner])[source].astype(jnp.float32),
            # With eps 0 a probability may be 0, and its scale infinite; nothing is masked then.
            diffusion_weights=jnp.where(masked, diffusion_scale[owner], 0)[source].astype(jnp.float32),
            ar_count=ar_count,
            has_response=num_noised,
        )

    draw = _of_examples(draw, segments.columns)
    return jax.vmap(one)(tokens, segments.columns(prompt_len), segments.columns(total_len), draw)


def divisors(noised: Noised) -> tuple[Array, Array]:
    """Divisors of the AR and the diffusion sums over all rows of `noised`, float32 []; at least 1."""
    return jnp.maximum(jnp.sum(noised.ar_count), 1), jnp.maximum(jnp.sum(noised.has_response), 1)


def loss(
    logits: Array,
    noised: Noised,
    diffusion_weight: float = 1.0,
    divided_by: tuple[Array, Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The training loss computed from logits: the reference for `loss_of_states`, which trains.

    Args:
      logits: [B, T, V], of `noised.tokens`.
      noised: the batch.
      diffusion_weight: lambda.
      divided_by: `divisors` of the whole batch, if `noised` holds only some of its rows; then losses and
        gradients of the parts add up to those of the whole.

    Returns:
      the loss, and {"loss", "ar_loss", "diffusion_loss"}; all float32 [].
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
    soft: SoftTargets | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss that trains: equal to `loss(states @ head, ...)`, without the logits of a whole batch.

    Args:
      states: [B, T, D], the model's final states.
      head: [D, V], of the same dtype.
      noised: the batch.
      diffusion_weight: lambda.
      divided_by: `divisors` of the whole batch.
      num_chunks: as in `cross_entropy.weighted_cross_entropy`.
      soft: a teacher's predictions of the targets. The losses, also those reported, are then its mixture of
        cross entropy and divergence.

    Returns:
      as `loss`. Only the first value has a gradient; the dictionary is for reporting.
    """
    ar_divisor, diffusion_divisor = divided_by
    weights = noised.ar_weights / ar_divisor + diffusion_weight * noised.diffusion_weights / diffusion_divisor
    total, ce = weighted_cross_entropy(states, head, noised.targets, weights, num_chunks, soft)
    return total, {"loss": total} | _parts(ce, noised, divided_by)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Cross entropy of logits [..., V] at targets int32 [...]: float32 [...]."""
    # Not optax.softmax_cross_entropy_with_integer_labels, which subtracts the target's logit from the
    # logsumexp of all logits: of logits [20, 5] its loss at token 0 is 0 instead of 3e-7. Here the largest
    # logit is subtracted from both first.
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


def _parts(ce: Array, noised: Noised, divided_by: tuple[Array, Array]) -> dict[str, Array]:
    """The AR and the diffusion loss from the cross entropy of every token, [B, T]."""
    ar_divisor, diffusion_divisor = divided_by
    return {
        "ar_loss": jnp.sum(ce * noised.ar_weights) / ar_divisor,
        "diffusion_loss": jnp.sum(ce * noised.diffusion_weights) / diffusion_divisor,
    }


def _of_examples(draw: Draw, function: Callable[[Array], Array]) -> Draw:
    """The draw with `function` applied to its arrays [B, E]."""
    names = ["slot_size", "mask_probability"] + ["in_order"] * (draw.in_order is not None)
    return draw.replace(**{name: function(getattr(draw, name)) for name in names})


def _ceil_div(x: Array, y: Array) -> Array:
    return -(-x // y)


def _number(chosen: Array, owner: Array, num_examples: int) -> Array:
    """int32 [E]: number of chosen tokens (bool [T]) of each example; at least 1."""
    count = jax.ops.segment_sum(chosen.astype(jnp.int32), owner, num_examples, indices_are_sorted=True)
    return jnp.maximum(count, 1)


def _rank(owner: Array, x: Array) -> Array:
    """int32 [M]: rank of each slot in the order of (owner, x), both [M]."""
    order = jax.lax.sort((owner, x, jnp.arange(x.shape[0])), num_keys=2)[-1]
    return jnp.argsort(order).astype(jnp.int32)
