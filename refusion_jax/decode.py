"""Plan and infill: the slot decoder, one jitted `lax.while_loop` for a batch of independent rows.

Every iteration is one forward pass over the current block of each row, and each row is in a phase of
its own, so that no row waits for another's round (arXiv 2512.13586, section 3.3):

  PLAN     feed the block's undecoded slots as masks; draft them; choose the confident ones
  VERIFY   feed the chosen drafts, each slot seeing those before it; commit the accepted slots, or
  REFILL   feed every chosen slot's accepted prefix and masks, each slot seeing itself alone; draft
  RECHECK  feed the slots so filled; accept more of each; back to REFILL until all are whole, commit

A slot that is infilled on its own attends to the cache and to itself. The slots of a row therefore go
through the model together, under a mask that keeps them apart, and the rule of one slot is vmapped over
the slots as the rule of one row is vmapped over the batch. The keys and values of the pass that
completed a token are what is kept of it; nothing is computed twice.

Letters as in model.py; T is the block as padded, S the cache length.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.kv_cache import KVCache, scatter_rows
from refusion_jax.model import exact_matmuls
from refusion_jax.phases import Phase, Query, Row, all_slots, carry_out, query, score
from refusion_jax.requests import DecodeConfig, Requests, Shape
from refusion_jax.samples import Samples, in_text_order

Array = jax.Array


class Trace(struct.PyTreeNode):
    """What each plan came to, indexed by iteration I: [B, I] or [B, I, M or T].

    Attributes:
      block: int32, the block.
      planned: bool [M], the slots chosen.
      confidence: float32 [M], of every slot in the pool, -1 elsewhere.
      iterative: bool, whether the slots were infilled one by one (False: committed as verified).
      rounds: int32, refill-and-recheck rounds.
      committed: bool [T], the block's tokens committed, ascending.
      forwards: int32, passes made by then.
    """

    block: Array
    planned: Array
    confidence: Array
    iterative: Array
    rounds: Array
    committed: Array
    forwards: Array


class DecodeState(struct.PyTreeNode):
    """Everything the loop carries.

    Attributes:
      cache: keys and values of the committed tokens; `cache.filled` says which positions those are.
      tokens: int32 [B, S], the committed tokens by position.
      row: the course of each row.
      trace: or None when it was not asked for.
    """

    cache: KVCache
    tokens: Array
    row: Row
    trace: Trace | None


def advance(
    state: DecodeState, requests: Requests, fed: Query, logits: Array, fresh, eos_id: Array
) -> DecodeState:
    """Carries every row through the phase its forward pass was for.

    Args:
      fed: what the rows fed, [B, ...].
      logits: [B, T, V] of it.
      fresh: its keys and values.
    """
    before = state.row
    scores = score(logits, fed.tokens, before, requests)
    row, committed = jax.vmap(carry_out, (0, 0, 0, None))(before, requests, scores, eos_id)
    state = state.replace(
        cache=state.cache.commit(fresh, fed.positions, committed),
        tokens=scatter_rows(state.tokens, fed.positions, fed.tokens, committed),
        row=row,
    )
    return state if state.trace is None else state.replace(trace=_record(state.trace, before, row, committed))


def _record(trace: Trace, before: Row, after: Row, committed: Array) -> Trace:
    """Adds an entry to the rows that have just carried out a plan."""
    entry = Trace(
        block=before.block,
        planned=before.chosen,
        confidence=before.confidence,
        iterative=before.phase == Phase.RECHECK,
        rounds=before.rounds,
        committed=committed,
        forwards=after.forwards,
    )
    finished = (after.iterations > before.iterations)[:, None]
    return jax.tree.map(
        lambda buffer, new: scatter_rows(buffer, before.iterations[:, None], new[:, None], finished),
        trace,
        entry,
    )


def init(model, prompts: Array, requests: Requests, shape: Shape) -> DecodeState:
    """The state before the first pass: nothing committed; rows without blocks are done."""
    B = prompts.shape[0]
    number = jnp.zeros(B, jnp.int32)
    none = jnp.zeros((B, shape.slots), bool)
    row = Row(
        phase=jnp.where(requests.num_blocks > 0, Phase.PLAN, Phase.DONE).astype(jnp.int32),
        block=number,
        pool=jax.vmap(lambda request: all_slots(request, shape.slots))(requests),
        chosen=none,
        open=none,
        confidence=jnp.zeros(none.shape, jnp.float32),
        draft=jnp.zeros((B, shape.block), jnp.int32),
        accepted=jnp.zeros(none.shape, jnp.int32),
        eos_found=jnp.zeros(B, bool),
        forwards=number,
        iterations=number,
        rounds=number,
    )
    length = shape.prompt + shape.gen
    trace = None
    if shape.trace:
        committed = jnp.zeros((B, shape.block), bool)
        entry = Trace(number, none, row.confidence, row.eos_found, number, committed, number)
        trace = jax.tree.map(lambda x: jnp.repeat(x[:, None], shape.iterations, axis=1), entry)
    return DecodeState(
        cache=KVCache.zeros(model.config, B, length, model.dtype),
        tokens=jnp.pad(prompts, ((0, 0), (0, shape.gen))),
        row=row,
        trace=trace,
    )


def first_step(
    model, params, prompts: Array, requests: Requests, shape: Shape, mask_id: Array, eos_id: Array
) -> DecodeState:
    """The first plan of every row; the prompt is fed along in the same pass and kept.

    Args:
      prompts: int32 [B, P], padded on the right.
    """
    state = init(model, prompts, requests, shape)
    B, P = prompts.shape
    places = jnp.broadcast_to(jnp.arange(P), (B, P))
    real = places < requests.prompt_len[:, None]
    fed = jax.vmap(query, (0, 0, None))(state.row, requests, mask_id)
    T = shape.block
    causal = jnp.tril(jnp.ones((P, P), bool)) & real[:, None]
    to_prompt = jnp.concatenate([causal, jnp.broadcast_to(real[:, None], (B, T, P))], axis=1)
    to_block = jnp.concatenate([jnp.zeros((B, P, T), bool), fed.mask], axis=1)
    x, fresh = model.apply(
        {"params": params},
        jnp.concatenate([prompts, fed.tokens], axis=1),
        jnp.concatenate([places, fed.positions], axis=1),
        mask=jnp.concatenate([to_prompt, to_block], axis=2),
        method="hidden",
    )
    of_prompt, of_block = (
        jax.tree.map(lambda kv, part=part: kv[:, :, part], fresh) for part in (slice(P), slice(P, None))
    )
    state = state.replace(cache=state.cache.commit(of_prompt, places, real))
    logits = model.apply({"params": params}, x[:, P:], method="unembed")
    return advance(state, requests, fed, logits, of_block, eos_id)


def step(model, params, state: DecodeState, requests: Requests, mask_id: Array, eos_id: Array) -> DecodeState:
    """One forward pass, every row in its own phase."""
    fed = jax.vmap(query, (0, 0, None))(state.row, requests, mask_id)
    filled = jnp.broadcast_to(state.cache.filled[:, None], (*fed.tokens.shape, state.tokens.shape[1]))
    mask = jnp.concatenate([filled, fed.mask], axis=2)
    logits, fresh = model.apply({"params": params}, fed.tokens, fed.positions, state.cache.layers, mask)
    return advance(state, requests, fed, logits, fresh, eos_id)


def running(state: DecodeState) -> Array:
    """bool: some row is not done."""
    return jnp.any(state.row.phase != Phase.DONE)


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def decode(
    model, params, prompts: Array, requests: Requests, mask_id: Array, eos_id: Array, *, shape: Shape
) -> DecodeState:
    """Decodes a batch to the end; only a new model or shape compiles anew.

    Args:
      model: an unrolled Transformer.
      params: its parameters.
      prompts: int32 [B, P], padded on the right.
      requests: what each row asks for, [B].
      mask_id, eos_id: int32 scalars.
      shape: the padded sizes.
    """
    with exact_matmuls(model):
        state = first_step(model, params, prompts, requests, shape, mask_id, eos_id)
        return jax.lax.while_loop(
            running, lambda state: step(model, params, state, requests, mask_id, eos_id), state
        )


class Prepared(NamedTuple):
    """A batch ready to decode: what `decode` and `step` take beside the model and its parameters."""

    prompts: Array
    requests: Requests
    mask_id: Array
    eos_id: Array
    shape: Shape


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
    needed = Shape.exact(prompts, configs)
    shape = needed.padded() if shape is None else shape
    shape.check_holds(needed)
    padded, requests = Requests.batch(prompts, configs, shape, model.config.vocab_size)
    return Prepared(padded, requests, jnp.int32(configs[0].mask_id), jnp.int32(configs[0].eos_id), shape)


def finish(state: DecodeState, batch: Prepared) -> Samples:
    """The answers in a state whose rows are done."""
    answers = in_text_order(
        state.tokens, state.cache.filled, batch.requests.prompt_len, batch.eos_id, gen=batch.shape.gen
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
    state = decode(
        model, params, batch.prompts, batch.requests, batch.mask_id, batch.eos_id, shape=batch.shape
    )
    return jax.tree.map(lambda x: x[: len(prompts)], finish(state, batch))


_jitted_first_step = jax.jit(first_step, static_argnames=("model", "shape"))
_jitted_step = jax.jit(step, static_argnames=("model",), donate_argnames=("state",))


def stream(model, params, batch: Prepared) -> Iterator[DecodeState]:
    """The states that `decode` goes through, one a forward pass, for showing a decode as it happens.

    A state is used up when the next one is asked for.
    """
    special = batch.mask_id, batch.eos_id
    with exact_matmuls(model):
        state = _jitted_first_step(model, params, batch.prompts, batch.requests, batch.shape, *special)
        yield state
        while running(state):
            state = _jitted_step(model, params, state, batch.requests, *special)
            yield state
