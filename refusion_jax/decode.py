"""Plan and infill: the slot decoder, one jitted `lax.while_loop` for a batch of independent rows.

Every iteration is one forward pass over the current block of each row, and each row is in a phase of
its own, so that no row waits for another's round (arXiv 2512.13586, section 3.3):

  PLAN     feed the block's undecoded slots as masks; draft them; choose the confident ones
  VERIFY   feed the chosen drafts, each slot seeing those before it; commit the accepted slots, or
  INFILL   feed what is not accepted of every chosen slot, each slot seeing itself alone, as masks to draft
           and then as drafts to accept more of; until all are whole, commit

Masks of what comes next ride along (feed.py), so that most plans and refills take no pass of their own.

A slot that is infilled on its own attends to the cache and to itself. The slots of a row therefore go
through the model together, under a mask that keeps them apart, and the rule of one slot is vmapped over
the slots as the rule of one row is vmapped over the batch. The keys and values of the pass that
accepted a token are what is kept of it; nothing is computed twice.

Letters as in model.py; T is the block as padded, S the cache length, Q the tokens a row feeds.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.feed import Fed, feed
from refusion_jax.kv_cache import KVCache, scatter_rows
from refusion_jax.model import exact_matmuls
from refusion_jax.phases import Outcome, Replay, carry_out, read
from refusion_jax.requests import DecodeConfig, Requests, Shape
from refusion_jax.rows import Phase, Row, geometry
from refusion_jax.samples import Samples, in_text_order
from refusion_jax.scores import Heat, Scores, score

Array = jax.Array


class Trace(struct.PyTreeNode):
    """What each plan came to, indexed by iteration I: [B, I] or [B, I, M or T].

    Attributes:
      block: int32, the block.
      planned: bool [M], the slots chosen.
      confidence: float32 [M], of every slot in the pool, -1 elsewhere.
      iterative: bool, whether the slots were infilled one by one (False: committed as verified).
      rounds: int32, refills that the infill took.
      accepted: int32 [T]; entry m * slot_size + r is how many tokens of slot m were accepted when verified
        (r = 0) or after the r-th refill, as Replay has it.
      committed: bool [T], the block's tokens committed, ascending.
      forwards: int32, passes made by then.
    """

    block: Array
    planned: Array
    confidence: Array
    iterative: Array
    rounds: Array
    accepted: Array
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


def heat(row: Row, request: Requests, fed: Fed) -> Heat:
    """How a row drafts what it fed [Q]: plans at its temperature, all else greedily."""
    # A plan fed ahead is that of the next iteration.
    iteration = row.iterations + (row.phase != Phase.PLAN)
    return Heat(
        temperature=jnp.where(fed.plan, request.temperature, 0.0),
        seed=jnp.broadcast_to(request.seed, fed.tokens.shape),
        iteration=jnp.broadcast_to(iteration, fed.tokens.shape),
        place=fed.positions - request.prompt_len,
    )


def advance(
    state: DecodeState, requests: Requests, fed: Fed, scores: Scores, fresh, dtype, eos_id: Array, replay=None
) -> DecodeState:
    """Carries every row through the phase its forward pass was for.

    Args:
      fed: what the rows fed, [B, ...].
      scores: [B, Q], of it.
      fresh: its keys and values.
      dtype: of the logits.
      replay: a Replay [B, ...] to follow instead of the scores, or None.
    """
    before = state.row

    def one(row: Row, request: Requests, fed: Fed, scores: Scores, replay: Replay | None):
        return carry_out(row, request, read(scores, fed, row, request, replay, dtype), eos_id)

    row, outcome = jax.vmap(one)(before, requests, fed, scores, replay)
    positions = jax.vmap(lambda row, request: geometry(row, request).position)(before, requests)
    state = state.replace(
        cache=state.cache.write(fresh, fed.positions, outcome.keep).fill(positions, outcome.committed),
        tokens=scatter_rows(state.tokens, positions, before.draft, outcome.committed),
        row=row,
    )
    if state.trace is None:
        return state
    return state.replace(trace=_record(state.trace, before, row, outcome, requests))


def _record(trace: Trace, before: Row, after: Row, outcome: Outcome, requests: Requests) -> Trace:
    """Adds an entry to the rows that have just carried out a plan, and what was accepted in any case."""
    number = before.iterations[:, None]

    def accepted(of_row: Array, before: Row, request: Requests, outcome: Outcome) -> Array:
        judged = jnp.where(before.phase == Phase.VERIFY, before.chosen, before.open & before.drafted)
        place = jnp.arange(before.open.shape[0]) * request.slot_size + before.rounds
        place = jnp.where(judged, place, of_row.shape[1])
        return of_row.at[before.iterations, place].set(outcome.accepted, mode="drop")

    entry = Trace(
        block=before.block,
        planned=before.chosen,
        confidence=before.confidence,
        iterative=before.phase == Phase.INFILL,
        rounds=outcome.rounds,
        accepted=None,
        committed=outcome.committed,
        forwards=after.forwards,
    )
    finished = (after.iterations > before.iterations)[:, None]
    recorded = jax.tree.map(
        lambda buffer, new: scatter_rows(buffer, number, new[:, None], finished),
        trace.replace(accepted=None),
        entry,
    )
    return recorded.replace(accepted=jax.vmap(accepted)(trace.accepted, before, requests, outcome))


def init(model, prompts: Array, requests: Requests, shape: Shape) -> DecodeState:
    """The state before the first pass: nothing committed; rows without blocks are done."""
    B = prompts.shape[0]
    row = jax.vmap(lambda request: Row.start(request, shape.slots, shape.block))(requests)
    trace = None
    if shape.trace:
        number = row.iterations
        of_block = jnp.zeros((B, shape.block), jnp.int32)
        entry = Trace(
            block=number,
            planned=row.chosen,
            confidence=row.confidence,
            iterative=row.eos_found,
            rounds=number,
            accepted=of_block,
            committed=of_block.astype(bool),
            forwards=number,
        )
        trace = jax.tree.map(lambda x: jnp.repeat(x[:, None], shape.iterations, axis=1), entry)
    return DecodeState(
        cache=KVCache.zeros(model.config, B, shape.prompt + shape.gen, model.dtype),
        tokens=jnp.pad(prompts, ((0, 0), (0, shape.gen))),
        row=row,
        trace=trace,
    )


def first_step(
    model, params, prompts: Array, requests: Requests, shape: Shape, mask_id, eos_id, replay=None
) -> DecodeState:
    """The first plan of every row; the prompt is fed along in the same pass and kept.

    Args:
      prompts: int32 [B, P], padded on the right.
    """
    state = init(model, prompts, requests, shape)
    (B, P), T = prompts.shape, shape.block
    places = jnp.broadcast_to(jnp.arange(P), (B, P))
    real = places < requests.prompt_len[:, None]
    fed = _fed(state, requests, mask_id, ahead=0)
    causal = jnp.tril(jnp.ones((P, P), bool)) & real[:, None]
    to_prompt = jnp.concatenate([causal, jnp.broadcast_to(real[:, None], (B, T, P))], axis=1)
    to_block = jnp.concatenate([jnp.zeros((B, P, T), bool), fed.mask[:, :, state.tokens.shape[1] :]], axis=1)
    x, fresh = model.apply(
        {"params": params},
        jnp.concatenate([prompts, fed.tokens], axis=1),
        jnp.concatenate([places, fed.positions], axis=1),
        mask=jnp.concatenate([to_prompt, to_block], axis=2),
        method="hidden",
    )
    of_prompt = jax.tree.map(lambda kv: kv[:, :P], fresh)
    of_block = jax.tree.map(lambda kv: kv[:, P:], fresh)
    state = state.replace(cache=state.cache.commit(of_prompt, places, real))
    logits = model.apply({"params": params}, x[:, P:], method="unembed")
    scores = _scores(logits, state, requests, fed)
    return advance(state, requests, fed, scores, of_block, model.dtype, eos_id, replay)


def step(
    model, params, state: DecodeState, requests: Requests, shape: Shape, mask_id, eos_id, replay=None
) -> DecodeState:
    """One forward pass, every row in its own phase."""
    fed = _fed(state, requests, mask_id, shape.ahead)
    logits, fresh = model.apply({"params": params}, fed.tokens, fed.positions, state.cache.layers, fed.mask)
    scores = _scores(logits, state, requests, fed)
    return advance(state, requests, fed, scores, fresh, model.dtype, eos_id, replay)


def _fed(state: DecodeState, requests: Requests, mask_id: Array, ahead: int) -> Fed:
    def one(row: Row, request: Requests, filled: Array) -> Fed:
        return feed(row, request, filled, mask_id, ahead)

    return jax.vmap(one)(state.row, requests, state.cache.filled)


def _scores(logits: Array, state: DecodeState, requests: Requests, fed: Fed) -> Scores:
    """[B, Q] of logits [B, Q, V]."""
    heats = jax.vmap(heat)(state.row, requests, fed)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    scores = score(flat(logits), flat(fed.target), jax.tree.map(flat, heats))
    return jax.tree.map(lambda x: x.reshape(fed.tokens.shape), scores)


def running(state: DecodeState) -> Array:
    """bool: some row is not done."""
    return jnp.any(state.row.phase != Phase.DONE)


@functools.partial(jax.jit, static_argnames=("model", "shape"))
def decode(
    model, params, prompts: Array, requests: Requests, mask_id: Array, eos_id: Array, replay=None, *, shape: Shape
) -> DecodeState:
    """Decodes a batch to the end; only a new model or shape compiles anew.

    Args:
      model: an unrolled Transformer.
      params: its parameters.
      prompts: int32 [B, P], padded on the right.
      requests: what each row asks for, [B].
      mask_id, eos_id: int32 scalars.
      replay: a Replay [B, ...] to follow whatever the logits say, or None.
      shape: the padded sizes.
    """

    def body(state: DecodeState) -> DecodeState:
        return step(model, params, state, requests, shape, mask_id, eos_id, replay)

    with exact_matmuls(model):
        state = first_step(model, params, prompts, requests, shape, mask_id, eos_id, replay)
        return jax.lax.while_loop(running, body, state)


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
_jitted_step = jax.jit(step, static_argnames=("model", "shape"), donate_argnames=("state",))


def stream(model, params, batch: Prepared) -> Iterator[DecodeState]:
    """The states that `decode` goes through, one a forward pass, for showing a decode as it happens.

    A state is used up when the next one is asked for.
    """
    special = batch.mask_id, batch.eos_id
    with exact_matmuls(model):
        state = _jitted_first_step(model, params, batch.prompts, batch.requests, batch.shape, *special)
        yield state
        while running(state):
            state = _jitted_step(model, params, state, batch.requests, batch.shape, *special)
            yield state
