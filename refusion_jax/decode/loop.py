"""Plan and infill: the slot decoder, one jitted `lax.while_loop` for a batch of independent rows.

Every iteration is one forward pass over the current block of each row, and each row is in a phase of
its own, so that no row waits for another's round (arXiv 2512.13586, section 3.3):

  PLAN     feed the block's undecoded slots as masks; draft them; choose the confident ones
  VERIFY   feed the chosen drafts, each slot seeing those before it; commit the accepted slots, or
  INFILL   feed what is not accepted of every chosen slot, each slot seeing itself alone, as masks to draft
           and then as drafts to accept more of; until all are whole, commit

Masks of what comes next ride along (inputs.py), so that most plans and refills take no pass of their own.

A slot that is infilled on its own attends to the cache and to itself. The slots of a row therefore go
through the model together, under a mask that keeps them apart, and the rule of one slot is vmapped over
the slots as the rule of one row is vmapped over the batch. The keys and values of the pass that
accepted a token are what is kept of it; nothing is computed twice, unless a request says `recompute`.

Letters as in model.py; T is the block as padded, S the cache length, Q the tokens a row feeds.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Prepared, Requests, Shape
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.forward import Forwarded, draft_sampling, forward, score_rows
from refusion_jax.decode.inputs import PassInputs, pass_inputs, tokens_ahead
from refusion_jax.decode.kv_cache import KVCache, scatter_rows
from refusion_jax.decode.outputs import Replay, read_outputs
from refusion_jax.decode.phases import carry_out
from refusion_jax.decode.row_state import Phase, RowState, geometry
from refusion_jax.decode.samples import Samples, in_text_order
from refusion_jax.decode.trace import Trace, record
from refusion_jax.model.transformer import exact_matmuls

Array = jax.Array
NO_LIMIT = 2**31 - 1

exact_shape = Shape.exact


class DecodeState(struct.PyTreeNode):
    """Everything the loop carries; rows B are independent of each other.

    Attributes:
      cache: keys and values of the committed tokens; `cache.filled` says which positions those are.
      tokens: int32 [B, S], the committed tokens by position.
      row: the course of each row.
      requests: what each row asks for.
      trace: or None when it was not asked for.
      replay: a recorded course that each row follows whatever the logits say, or None.
    """

    cache: KVCache
    tokens: Array
    row: RowState
    requests: Requests
    trace: Trace | None
    replay: Replay | None

    @property
    def done(self) -> Array:
        """bool [B]."""
        return self.row.phase == Phase.DONE


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def init(
    model, prompts: Array, requests: Requests, replay: Replay | None = None, *, shape: Shape
) -> DecodeState:
    """The state before the first pass: nothing committed; rows without blocks are done."""
    B, length, by_layer = prompts.shape[0], shape.prompt + shape.gen, model.cache_by_layer
    return DecodeState(
        cache=KVCache.zeros(model.config, B, length, model.dtype, by_layer=by_layer),
        tokens=jnp.pad(prompts, ((0, 0), (0, shape.gen))),
        row=jax.vmap(lambda request: RowState.start(request, shape.slots, shape.block))(requests),
        requests=requests,
        trace=Trace.blank(shape) if shape.trace else None,
        replay=replay,
    )


def batch_inputs(state: DecodeState, mask_id: Array, ahead: int) -> PassInputs:
    """What each row feeds next, [B, ...]; `ahead` as in Shape."""

    def one(row: RowState, request: Requests, filled: Array) -> PassInputs:
        return pass_inputs(row, request, filled, mask_id, ahead)

    return jax.vmap(one)(state.row, state.requests, state.cache.filled)


def advance(state: DecodeState, inputs: PassInputs, result: Forwarded, dtype, eos_id: Array) -> DecodeState:
    """Carries every row through the phase its forward pass was for.

    Args:
      inputs: what the rows fed, [B, ...].
      result: what the pass gave.
      dtype: of the logits.
    """
    before = state.row

    def one(row: RowState, request: Requests, inputs: PassInputs, scores, replay: Replay | None):
        return carry_out(row, request, read_outputs(scores, inputs, row, request, replay, dtype), eos_id)

    row, outcome = jax.vmap(one)(before, state.requests, inputs, result.scores, state.replay)
    positions = jax.vmap(lambda row, request: geometry(row, request).position)(before, state.requests)
    cache = result.write(state.cache, inputs.positions, outcome.keep)
    trace = state.trace
    if trace is not None:
        trace = record(trace, before, row, outcome, state.requests)
    return state.replace(
        cache=cache.fill(positions, outcome.committed),
        tokens=scatter_rows(state.tokens, positions, before.draft, outcome.committed),
        row=row,
        trace=trace,
    )


def first_step(model, params, state: DecodeState, shape: Shape, mask_id: Array, eos_id: Array) -> DecodeState:
    """The first plan of every row; the prompt is fed along in the same pass and kept."""
    B, P, T = state.tokens.shape[0], shape.prompt, shape.block
    places = jnp.broadcast_to(jnp.arange(P), (B, P))
    real = places < state.requests.prompt_len[:, None]
    inputs = batch_inputs(state, mask_id, ahead=0)
    causal = jnp.tril(jnp.ones((P, P), bool)) & real[:, None]
    to_prompt = jnp.concatenate([causal, jnp.broadcast_to(real[:, None], (B, T, P))], axis=1)
    to_block = jnp.concatenate([jnp.zeros((B, P, T), bool), inputs.mask[:, :, -T:]], axis=1)
    x, fresh = model.apply(
        {"params": params},
        jnp.concatenate([state.tokens[:, :P], inputs.tokens], axis=1),
        jnp.concatenate([places, inputs.positions], axis=1),
        mask=jnp.concatenate([to_prompt, to_block], axis=2),
        method="hidden",
    )
    of_prompt = jax.tree.map(lambda kv: kv[:, :, :P], fresh)
    of_block = jax.tree.map(lambda kv: kv[:, :, P:], fresh)
    state = state.replace(cache=state.cache.commit(of_prompt, places, real))
    logits = model.apply({"params": params}, x[:, P:], method="unembed")
    samplings = jax.vmap(draft_sampling)(state.row, state.requests, inputs)
    scores = score_rows(logits, inputs.target, samplings, shape.entropy)
    return advance(state, inputs, Forwarded(scores, of_block, None), model.dtype, eos_id)


def step(model, params, state: DecodeState, shape: Shape, mask_id: Array, eos_id: Array) -> DecodeState:
    """One forward pass, every row in its own phase."""
    inputs = batch_inputs(state, mask_id, shape.ahead)
    result = forward(model, params, state.cache, inputs, state.row, state.requests, shape.entropy)
    return advance(state, inputs, result, model.dtype, eos_id)


def begin(
    model,
    params,
    prompts: Array,
    requests: Requests,
    mask_id: Array,
    eos_id: Array,
    replay: Replay | None = None,
    *,
    shape: Shape,
) -> DecodeState:
    """A batch after its first pass; arguments as those of `decode`."""
    return _begin(model, params, prompts, requests, mask_id, eos_id, replay, shape)


def resume(
    model,
    params,
    state: DecodeState,
    mask_id: Array,
    eos_id: Array,
    until: int = 0,
    passes: int = NO_LIMIT,
    *,
    shape: Shape,
) -> DecodeState:
    """Decodes on until no more than `until` rows are left running, or for so many passes; uses `state` up."""
    return _resume(model, params, state, mask_id, eos_id, until, passes, shape)


# Every argument is given to these: a call of a jitted function that leaves one out compiles it once more.


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def _begin(model, params, prompts, requests, mask_id, eos_id, replay, shape: Shape) -> DecodeState:
    with exact_matmuls(model):
        state = init(model, prompts, requests, replay, shape=shape)
        return first_step(model, params, state, shape, mask_id, eos_id)


@functools.partial(jax.jit, static_argnames=("model", "shape"), donate_argnames=("state",))
def _resume(model, params, state, mask_id, eos_id, until, passes, shape: Shape) -> DecodeState:
    def go_on(carry: tuple[DecodeState, Array]) -> Array:
        state, made = carry
        return (jnp.sum(~state.done) > until) & (made < passes)

    def body(carry: tuple[DecodeState, Array]) -> tuple[DecodeState, Array]:
        state, made = carry
        return step(model, params, state, shape, mask_id, eos_id), made + 1

    with exact_matmuls(model):
        return jax.lax.while_loop(go_on, body, (state, jnp.int32(0)))[0]


def decode(
    model,
    params,
    prompts: Array,
    requests: Requests,
    mask_id: Array,
    eos_id: Array,
    replay: Replay | None = None,
    *,
    shape: Shape,
) -> DecodeState:
    """Decodes a batch to the end: `begin`, then `resume`, each compiled once for a model and a shape.

    Args:
      model: an unrolled Transformer.
      params: its parameters.
      prompts: int32 [B, P], padded on the right.
      requests: what each row asks for, [B].
      mask_id, eos_id: int32 scalars.
      replay: [B, ...], a recorded course to follow whatever the logits say, or None.
      shape: the padded sizes.
    """
    state = begin(model, params, prompts, requests, mask_id, eos_id, replay, shape=shape)
    return resume(model, params, state, mask_id, eos_id, shape=shape)


def prepare(
    model,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig | Sequence[DecodeConfig],
    shape: Shape | None = None,
) -> Prepared:
    """Checks and pads a batch; arguments and errors as those of `sample`."""
    if model.scan_layers:
        raise ValueError("decoding needs an unrolled model: scan_layers=False and unstack_layers(params)")
    configs = [config] * len(prompts) if isinstance(config, DecodeConfig) else list(config)
    needed = exact_shape(prompts, configs)
    if shape is None:
        shape = needed.padded(ahead=tokens_ahead(needed.rows))
    shape.check_holds(needed)
    padded, requests = Requests.batch(prompts, configs, shape, model.config.vocab_size)
    return Prepared.of(padded, requests, configs, shape)


def finish(state: DecodeState, eos_id: Array, shape: Shape) -> Samples:
    """The answers in a state whose rows are done."""
    answers = in_text_order(
        state.tokens, state.cache.filled, state.requests.prompt_len, eos_id, gen=shape.gen
    )
    return Samples(*answers, state.row.forwards, state.row.iterations, state.trace)


def sample(
    model,
    params,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig | Sequence[DecodeConfig],
    *,
    shape: Shape | None = None,
) -> Samples:
    """Decodes prompts by plan and infill.

    Args:
      model: an unrolled Transformer (`scan_layers=False`).
      params: its parameters.
      prompts: token ids, of any lengths.
      config: one for all prompts, or one for each; they must agree on mask_id and eos_id.
      shape: sizes to pad to, so that batches share a compilation; by default as small as the batch allows.

    Raises:
      BadInput: a prompt or setting that cannot be decoded, naming it.
    """
    batch = prepare(model, prompts, config, shape)
    *inputs, shape = batch
    samples = finish(decode(model, params, *inputs, shape=shape), batch.eos_id, shape)
    return jax.tree.map(lambda x: x[: len(prompts)], samples)


def stream(model, params, batch: Prepared) -> Iterator[DecodeState]:
    """The states that `decode` goes through, one a forward pass, for showing a decode as it happens.

    A state is used up when the next one is asked for.
    """
    special = batch.mask_id, batch.eos_id
    state = begin(model, params, batch.prompts, batch.requests, *special, shape=batch.shape)
    yield state
    while not state.done.all():
        state = resume(model, params, state, *special, passes=1, shape=batch.shape)
        yield state
