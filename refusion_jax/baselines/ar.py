"""Left-to-right decoding of the same model through the same cache: the baseline of the paper's claims."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.errors import BadInput
from refusion_jax.kv_cache import KVCache, scatter_rows
from refusion_jax.model import exact_matmuls
from refusion_jax.requests import Shape, check_common, check_pairs, column, pad_prompts, shown
from refusion_jax.samples import Samples, in_text_order

Array = jax.Array
FIRST_TOKENS = ("next", "mask")


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """How one prompt is continued left to right.

    Attributes:
      mask_id, eos_id: of the tokenizer.
      gen_length: most response tokens, EOS included.
      temperature: 0 is greedy.
      seed: of the samples where temperature is above 0.
      first_token: where the first response token is read: "next", off the last prompt token, as AR
        models are trained, or "mask", off one mask fed after the prompt, as ReFusion models are (no
        prompt token was ever trained to predict what follows it).

    Raises:
      BadInput: a setting that cannot be decoded.
    """

    mask_id: int
    eos_id: int
    gen_length: int = 128
    temperature: float = 0.0
    seed: int = 0
    first_token: str = "next"

    def __post_init__(self):
        check_common(self)
        if self.first_token not in FIRST_TOKENS:
            raise BadInput(
                f"first_token must be one of {', '.join(FIRST_TOKENS)}, found {shown(self.first_token)}"
            )

    def check_prompt(self, prompt: Sequence[int]) -> None:
        """Raises BadInput for an empty prompt where the first token is read off its last."""
        if self.first_token == "next" and not len(prompt):
            raise BadInput("first_token must be 'mask' for an empty prompt, found 'next'")


class ARRequests(struct.PyTreeNode):
    """A batch of requests as arrays [B]; a row of padding has gen_length 0. Fields as in ARConfig."""

    prompt_len: Array
    gen_length: Array
    temperature: Array
    seed: Array
    from_mask: Array

    @classmethod
    def batch(cls, prompts: Sequence[Sequence[int]], configs: Sequence[ARConfig], rows: int) -> "ARRequests":
        return cls(
            prompt_len=column([len(p) for p in prompts], rows, jnp.int32),
            gen_length=column([c.gen_length for c in configs], rows, jnp.int32),
            temperature=column([c.temperature for c in configs], rows, jnp.float32),
            seed=column([c.seed for c in configs], rows, jnp.uint32),
            from_mask=column([c.first_token == "mask" for c in configs], rows, bool),
        )


class ARState(struct.PyTreeNode):
    """What the loop carries.

    Attributes:
      cache: keys and values of the tokens fed.
      tokens: int32 [B, S], prompt and response by position.
      count: int32 [B], response tokens so far; each took one forward pass.
      done: bool [B].
    """

    cache: KVCache
    tokens: Array
    count: Array
    done: Array


@functools.partial(jax.jit, static_argnames=("model", "gen"))
def decode(
    model, params, prompts: Array, requests: ARRequests, mask_id: Array, eos_id: Array, *, gen: int
) -> ARState:
    """Continues prompts int32 [B, P] by at most `gen` tokens; one forward pass a token."""
    with exact_matmuls(model):
        state = first_pass(model, params, prompts, requests, mask_id, eos_id, gen)
        return jax.lax.while_loop(
            lambda state: ~jnp.all(state.done),
            lambda state: next_pass(model, params, state, requests, eos_id),
            state,
        )


def first_pass(model, params, prompts: Array, requests: ARRequests, mask_id, eos_id, gen: int) -> ARState:
    """Feeds the prompts with a mask query at the end, and reads the first token off one or the other."""
    B, P = prompts.shape
    places = jnp.broadcast_to(jnp.arange(P), (B, P))
    real = places < requests.prompt_len[:, None]
    visible = jnp.concatenate([real, jnp.ones((B, 1), bool)], axis=1)
    x, fresh = model.apply(
        {"params": params},
        jnp.concatenate([prompts, jnp.full((B, 1), mask_id, jnp.int32)], axis=1),
        jnp.concatenate([places, requests.prompt_len[:, None]], axis=1),
        mask=jnp.tril(jnp.ones((P + 1, P + 1), bool)) & visible[:, None],
        method="hidden",
    )
    of_prompt = jax.tree.map(lambda kv: kv[:, :, :P], fresh)
    cache = KVCache.zeros(model.config, B, P + gen, model.dtype).commit(of_prompt, places, real)
    read_at = jnp.where(requests.from_mask, P, requests.prompt_len - 1)
    x = jnp.take_along_axis(x, read_at[:, None, None], axis=1)
    logits = model.apply({"params": params}, x, method="unembed")[:, 0]
    tokens = jnp.pad(prompts, ((0, 0), (0, gen)))
    state = ARState(cache, tokens, jnp.zeros(B, jnp.int32), requests.gen_length == 0)
    return append(state, requests, logits, eos_id)


def next_pass(model, params, state: ARState, requests: ARRequests, eos_id: Array) -> ARState:
    """Feeds the last token of each row and appends the next."""
    positions = (requests.prompt_len + state.count - 1)[:, None]
    token = jnp.take_along_axis(state.tokens, positions, axis=1)
    itself = jnp.ones_like(positions, bool)
    mask = jnp.concatenate([state.cache.filled, itself], axis=1)[:, None]
    logits, fresh = model.apply({"params": params}, token, positions, state.cache.layers, mask)
    cache = state.cache.commit(fresh, positions, ~state.done[:, None])
    return append(state.replace(cache=cache), requests, logits[:, 0], eos_id)


def append(state: ARState, requests: ARRequests, logits: Array, eos_id: Array) -> ARState:
    """Adds the token that logits [B, V] name to the rows that go on."""
    logits = logits.astype(jnp.float32)

    def noise(seed: Array, count: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[-1:])

    def sampled() -> Array:
        scaled = requests.temperature[:, None] * jax.vmap(noise)(requests.seed, state.count)
        return jnp.argmax(logits + scaled, axis=-1)

    greedy = functools.partial(jnp.argmax, logits, axis=-1)
    token = jax.lax.cond(jnp.any(requests.temperature > 0), sampled, greedy).astype(jnp.int32)
    positions = (requests.prompt_len + state.count)[:, None]
    count = state.count + ~state.done
    return state.replace(
        tokens=scatter_rows(state.tokens, positions, token[:, None], ~state.done[:, None]),
        count=count,
        done=state.done | (token == eos_id) | (count >= requests.gen_length),
    )


def exact_shape(prompts: Sequence[Sequence[int]], configs: Sequence[ARConfig]) -> Shape:
    """The smallest shape that holds these requests as one batch."""
    check_pairs(prompts, configs)
    return Shape(len(prompts), max(map(len, prompts)), max(c.gen_length for c in configs))


def sample(
    model,
    params,
    prompts: Sequence[Sequence[int]],
    config: ARConfig | Sequence[ARConfig],
    *,
    shape: Shape | None = None,
) -> Samples:
    """Continues prompts left to right; see `refusion_jax.decode.sample`.

    Raises:
      BadInput: a prompt or setting that cannot be decoded; an empty prompt has no last token to read a
        first one off, so it needs first_token "mask".
    """
    configs = [config] * len(prompts) if isinstance(config, ARConfig) else list(config)
    needed = exact_shape(prompts, configs)
    shape = needed.padded() if shape is None else shape
    shape.check_holds(needed)
    for prompt, c in zip(prompts, configs, strict=True):
        c.check_prompt(prompt)
    padded = pad_prompts(prompts, configs, shape, model.config.vocab_size)
    requests = ARRequests.batch(prompts, configs, shape.rows)
    mask_id, eos_id = jnp.int32(configs[0].mask_id), jnp.int32(configs[0].eos_id)
    state = decode(model, params, padded, requests, mask_id, eos_id, gen=shape.gen)
    end = (requests.prompt_len + state.count)[:, None]
    committed = jnp.arange(state.tokens.shape[1]) < end
    answers = in_text_order(state.tokens, committed, requests.prompt_len, eos_id, gen=shape.gen)
    return jax.tree.map(lambda x: x[: len(prompts)], Samples(*answers, state.count, state.count))
