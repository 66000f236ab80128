"""The slot-diffusion objective: `draw` the noise, `rearrange` the tokens, weigh the `loss`.

An example is a prompt of P tokens and a response of A tokens (EOS included). The response is cut into
slots of W tokens; some slots are masked. The model is fed the prompt, the clean slots in random order,
then the masked slots in text order with every token replaced by the mask token; each token keeps its
own position id. A clean token is trained to predict the token after it in its slot, a masked one its
own token (arXiv 2512.13586, section 3.2).

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

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.cross_entropy import weighted_cross_entropy

Array = jax.Array
NORMALISATIONS = ("release", "paper")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """How noise is drawn and the loss normalised.

    Attributes:
      slot_sizes: an example's slot size W is drawn uniformly from these.
      eps: smallest masking probability of a slot (release).
      normalisation: "release" or "paper", see the module's equations.
      diffusion_weight: lambda, the weight of the diffusion part.
    """

    slot_sizes: tuple[int, ...] = (4, 8, 16, 32)
    eps: float = 1e-3
    normalisation: str = "release"
    diffusion_weight: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "slot_sizes", tuple(self.slot_sizes))
        if not self.slot_sizes or min(self.slot_sizes) < 1:
            raise ValueError(f"slot_sizes must be one or more positive lengths, got {self.slot_sizes}")
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must be in [0, 1), got {self.eps}")
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(f"normalisation must be one of {NORMALISATIONS}, got {self.normalisation!r}")

    def max_slots(self, length: int) -> int:
        """The most slots a response within `length` tokens can have."""
        return -(-length // min(self.slot_sizes))


class Draw(struct.PyTreeNode):
    """The random choices of a batch; entries beyond a row's number of slots have no meaning.

    Attributes:
      slot_size: int32 [B], W.
      mask_probability: float32 [B], p of the release; unused by the paper's normalisation.
      slot_masked: bool [B, M].
      slot_rank: int32 [B, M], the clean slots are fed in ascending order of it.
    """

    slot_size: Array
    mask_probability: Array
    slot_masked: Array
    slot_rank: Array


class Noised(struct.PyTreeNode):
    """What the model is fed and what is asked of it.

    Attributes:
      tokens: int32 [B, T], in the order fed; padding last.
      positions: int32 [B, T], the place of each in the text.
      targets: int32 [B, T]; meaningful where a weight is positive.
      ar_weights: float32 [B, T], positive at labelled clean tokens.
      diffusion_weights: float32 [B, T], positive at masked tokens.
      ar_count: float32 [B], what the row adds to the divisor of the AR part.
      has_response: float32 [B], 1 or 0: what it adds to the divisor of the diffusion part.
    """

    tokens: Array
    positions: Array
    targets: Array
    ar_weights: Array
    diffusion_weights: Array
    ar_count: Array
    has_response: Array


def draw(key: Array, example: Array, response_len: Array, max_slots: int, config: DiffusionConfig) -> Draw:
    """Draws slot sizes, masks and orders; a row's draw depends on (key, example number) alone.

    Args:
      key: the key of this training step, `fold_in(seed_key, step)`.
      example: int32 [B], a number that names each example.
      response_len: int32 [B], A.
      max_slots: M, at least ceil(A / min(slot_sizes)) for every row.
      config: the noise.
    """

    def one(example: Array, response_len: Array) -> Draw:
        size_key, time_key, mask_key, order_key = jax.random.split(jax.random.fold_in(key, example), 4)
        slot_size = jax.random.choice(size_key, jnp.asarray(config.slot_sizes, jnp.int32))
        t = jax.random.uniform(time_key)
        p = (1 - config.eps) * t + config.eps
        # One number a slot and key, so that a row's draw does not depend on how far rows are padded.
        slots = jnp.arange(max_slots)
        uniform = jax.vmap(lambda key, m: jax.random.uniform(jax.random.fold_in(key, m)), (None, 0))
        u = uniform(mask_key, slots)
        if config.normalisation == "release":
            masked = u < p
        else:
            num_slots = -(-response_len // slot_size)
            num_masked = jnp.floor(t * num_slots).astype(jnp.int32)
            masked = _rank(jnp.where(slots < num_slots, u, 2.0)) < num_masked
        return Draw(slot_size, p, masked, _rank(uniform(order_key, slots)))

    return jax.vmap(one)(example, response_len)


def rearrange(
    tokens: Array, prompt_len: Array, total_len: Array, draw: Draw, mask_id: int, config: DiffusionConfig
) -> Noised:
    """Feeds prompt, clean slots in drawn order, masked slots in text order, padding.

    Args:
      tokens: int32 [B, T], prompt then response then padding.
      prompt_len: int32 [B], P.
      total_len: int32 [B], P + A.
      draw: the choices to apply.
      mask_id: the mask token.
      config: which normalisation the weights follow.
    """

    def one(tokens: Array, prompt_len: Array, total_len: Array, draw: Draw) -> Noised:
        index = jnp.arange(tokens.shape[0])
        slot, offset = jnp.divmod(jnp.clip(index - prompt_len, 0), draw.slot_size)
        in_response = (index >= prompt_len) & (index < total_len)
        masked = in_response & draw.slot_masked[slot]
        clean = in_response & ~masked
        # One sort key: groups in the order fed, clean tokens by (rank, offset), all others as they stand.
        group = jnp.select([index < prompt_len, clean, masked], [0, 1, 2], 3)
        within = jnp.where(clean, draw.slot_rank[slot] * draw.slot_size + offset, index)
        stride = draw.slot_rank.shape[0] * draw.slot_size + tokens.shape[0]
        source = jnp.argsort(group * stride + within)

        last_of_slot = (offset == draw.slot_size - 1) | (index == total_len - 1)
        labelled = clean & ~last_of_slot
        targets = jnp.where(clean, jnp.roll(tokens, -1), tokens)
        fed = jnp.where(masked, mask_id, tokens)

        has_response = (total_len > prompt_len).astype(jnp.float32)
        num_labelled = jnp.sum(labelled).astype(jnp.float32)
        if config.normalisation == "release":
            ar_scale, ar_count = 1.0, num_labelled
            diffusion_scale = 1 / (draw.mask_probability * jnp.maximum(total_len - prompt_len, 1))
        else:
            ar_scale, ar_count = 1 / jnp.maximum(num_labelled, 1), has_response
            diffusion_scale = 1 / jnp.maximum(jnp.sum(masked), 1)
        return Noised(
            tokens=fed[source],
            positions=source.astype(jnp.int32),
            targets=targets[source],
            ar_weights=(labelled * ar_scale)[source].astype(jnp.float32),
            diffusion_weights=(masked * diffusion_scale)[source].astype(jnp.float32),
            ar_count=ar_count,
            has_response=has_response,
        )

    return jax.vmap(one)(tokens, prompt_len, total_len, draw)


def divisors(noised: Noised) -> tuple[Array, Array]:
    """What the AR and the diffusion sums are divided by, over all rows of `noised`; at least 1."""
    return jnp.maximum(jnp.sum(noised.ar_count), 1), jnp.maximum(jnp.sum(noised.has_response), 1)


def loss(
    logits: Array,
    noised: Noised,
    diffusion_weight: float = 1.0,
    divided_by: tuple[Array, Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The training loss and its parts, float32.

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
    """`loss` of final states [B, T, D] under a head [D, V], without logits of the whole; for training.

    `num_chunks` as in `weighted_cross_entropy`.
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
    """float32 [...] of logits [..., V] at targets int32 [...].

    The largest logit is taken off both terms before they are subtracted: the loss of a confident token
    is a few units in the last place of the logits themselves.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


def _rank(x: Array) -> Array:
    """int32 rank of each entry of x [M] in ascending order."""
    return jnp.argsort(jnp.argsort(x)).astype(jnp.int32)
