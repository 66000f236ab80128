"""Left-to-right decoding of the same model through the same cache: the baseline of the paper's claims."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Prepared, Shape, check_pairs, pad_prompts, padded_column
from refusion_jax.decode.config import check_common, quoted
from refusion_jax.decode.kv_cache import KVCache, scatter_rows
from refusion_jax.decode.samples import Samples, in_text_order
from refusion_jax.decode.scores import DraftSampling, draft
from refusion_jax.errors import BadInput
from refusion_jax.model.transformer import exact_matmuls

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
                f"first_token must be one of {', '.join(FIRST_TOKENS)}, found {quoted(self.first_token)}"
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
            prompt_len=padded_column([len(p) for p in prompts], rows, jnp.int32),
            gen_length=padded_column([c.gen_length for c in configs], rows, jnp.int32),
            temperature=padded_column([c.temperature for c in configs], rows, jnp.float32),
            seed=padded_column([c.seed for c in configs], rows, jnp.uint32),
            from_mask=padded_column([c.first_token == "mask" for c in configs], rows, bool),
        )


class ARState(struct.PyTreeNode):
    """What the loop carries.

    Attributes:
      cache: keys and values of the tokens fed.
      tokens: int32 [B, S], prompt and response by position.
      count: int32 [B], response tokens so far; each took one forward pass.
      done: bool [B].
      requests: what each row asks for.
    """

    cache: KVCache
    tokens: Array
    count: Array
    done: Array
    requests: ARRequests


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def init(model, prompts: Array, requests: ARRequests, *, shape: Shape) -> ARState:
    """The state before the first pass; rows that ask for nothing are done."""
    B, P = prompts.shape
    by_layer = model.cache_by_layer
    return ARState(
        cache=KVCache.zeros(model.config, B, P + shape.gen, model.dtype, by_layer=by_layer),
        tokens=jnp.pad(prompts, ((0, 0), (0, shape.gen))),
        count=jnp.zeros(B, jnp.int32),
        done=requests.gen_length == 0,
        requests=requests,
    )


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def begin(
    model, params, prompts: Array, requests: ARRequests, mask_id: Array, eos_id: Array, *, shape: Shape
) -> ARState:
    """A batch of prompts int32 [B, P] after its first pass, which reads the first token of each."""
    with exact_matmuls(model):
        return first_pass(model, params, init(model, prompts, requests, shape=shape), mask_id, eos_id, shape)


@functools.partial(jax.jit, static_argnames=("model", "shape"), donate_argnames=("state",))
def resume(
    model, params, state: ARState, mask_id: Array, eos_id: Array, until: int = 0, *, shape: Shape
) -> ARState:
    """Goes on until no more than `until` rows are left running; uses `state` up."""
    del mask_id, shape
    with exact_matmuls(model):
        return jax.lax.while_loop(
            lambda state: jnp.sum(~state.done) > until,
            lambda state: next_pass(model, params, state, eos_id),
            state,
        )


def first_pass(model, params, state: ARState, mask_id: Array, eos_id: Array, shape: Shape) -> ARState:
    """Feeds the prompts with a mask query at the end, and reads the first token off one or the other."""
    B, P, requests = state.tokens.shape[0], shape.prompt, state.requests
    places = jnp.broadcast_to(jnp.arange(P), (B, P))
    real = places < requests.prompt_len[:, None]
    visible = jnp.concatenate([real, jnp.ones((B, 1), bool)], axis=1)
    x, fresh = model.apply(
        {"params": params},
        jnp.concatenate([state.tokens[:, :P], jnp.full((B, 1), mask_id, jnp.int32)], axis=1),
        jnp.concatenate([places, requests.prompt_len[:, None]], axis=1),
        mask=jnp.tril(jnp.ones((P + 1, P + 1), bool)) & visible[:, None],
        method="hidden",
    )
    of_prompt = jax.tree.map(lambda kv: kv[:, :, :P], fresh)
    state = state.replace(cache=state.cache.commit(of_prompt, places, real))
    read_at = jnp.where(requests.from_mask, P, requests.prompt_len - 1)
    x = jnp.take_along_axis(x, read_at[:, None, None], axis=1)
    logits = model.apply({"params": params}, x, method="unembed")[:, 0]
    return append(state, logits, eos_id)


def next_pass(model, params, state: ARState, eos_id: Array) -> ARState:
    """Feeds the last token of each row and appends the next."""
    positions = (state.requests.prompt_len + state.count - 1)[:, None]
    token = jnp.take_along_axis(state.tokens, positions, axis=1)
    itself = jnp.ones_like(positions, bool)
    mask = jnp.concatenate([state.cache.filled, itself], axis=1)[:, None]
    logits, fresh = model.apply({"params": params}, token, positions, state.cache.layers, mask)
    cache = state.cache.commit(fresh, positions, ~state.done[:, None])
    return append(state.replace(cache=cache), logits[:, 0], eos_id)


def append(state: ARState, logits: Array, eos_id: Array) -> ARState:
    """Adds the token that logits [B, V] name to the rows that go on."""
    requests = state.requests
    sampling = DraftSampling(
        temperature=requests.temperature,
        seed=requests.seed,
        iteration=state.count,
        place=jnp.zeros_like(state.count),
    )
    token = draft(logits.astype(jnp.float32), sampling)
    positions = (requests.prompt_len + state.count)[:, None]
    count = state.count + ~state.done
    return state.replace(
        tokens=scatter_rows(state.tokens, positions, token[:, None], ~state.done[:, None]),
        count=count,
        done=state.done | (token == eos_id) | (count >= requests.gen_length),
    )


def prepare(
    model,
    prompts: Sequence[Sequence[int]],
    config: ARConfig | Sequence[ARConfig],
    shape: Shape | None = None,
) -> Prepared:
    """Checks and pads a batch; arguments and errors as those of `sample`."""
    configs = [config] * len(prompts) if isinstance(config, ARConfig) else list(config)
    needed = exact_shape(prompts, configs)
    shape = needed.padded() if shape is None else shape
    shape.check_holds(needed)
    padded = pad_prompts(prompts, configs, shape, model.config.vocab_size)
    requests = ARRequests.batch(prompts, configs, shape.rows)
    return Prepared.of(padded, requests, configs, shape)


def finish(state: ARState, eos_id: Array, shape: Shape) -> Samples:
    """The answers in a state whose rows are done."""
    prompt_len = state.requests.prompt_len
    committed = jnp.arange(state.tokens.shape[1]) < (prompt_len + state.count)[:, None]
    answers = in_text_order(state.tokens, committed, prompt_len, eos_id, gen=shape.gen)
    return Samples(*answers, state.count, state.count)


def exact_shape(prompts: Sequence[Sequence[int]], configs: Sequence[ARConfig]) -> Shape:
    """The smallest shape that holds these requests as one batch.

    Raises:
      BadInput: a prompt that cannot be continued.
    """
    check_pairs(prompts, configs)
    for prompt, config in zip(prompts, configs, strict=True):
        config.check_prompt(prompt)
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
    batch = prepare(model, prompts, config, shape)
    *inputs, shape = batch
    state = begin(model, params, *inputs, shape=shape)
    state = resume(model, params, state, batch.mask_id, batch.eos_id, shape=shape)
    return jax.tree.map(lambda x: x[: len(prompts)], finish(state, batch.eos_id, shape))
