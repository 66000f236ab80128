"""The slot decoder (plan and infill): one jitted `lax.while_loop` over a batch of independent rows.

Each iteration makes one forward pass over the current block of every row. Every row has its own phase, so no
row waits for another (arXiv 2512.13586, section 3.3):

  PLAN     Feed the undecoded slots of the block as mask tokens, draft them, and choose the confident slots.
  VERIFY   Feed the drafts of the chosen slots, each slot seeing those before it. Commit the slots that are
           accepted as a whole. If there are none, go to INFILL.
  INFILL   Feed the tokens of every chosen slot that are not accepted yet, each slot seeing the cache and
           itself only: first as mask tokens, to draft them, then as drafts, to accept more of them. Commit
           when all slots are complete.

Each pass also carries speculative mask tokens for the next phase (inputs.py), so most plans and refills take
no pass of their own.

All infilled slots of a row go through the model in the same pass, under a mask that separates them. The rule
for one slot is vmapped over the slots, the rule for one row over the batch. The cached keys and values of a
token come from the pass that accepted it; they are computed again only if a request sets `recompute`.

A request with `verify` "exact" takes none of these phases: each of its passes verifies drafts against the
model's AR reading and drafts what follows (exact.py). Its row shares the batch and its passes with the rest.

Letters as in model/transformer.py; T is the padded block length, S the cache length, Q the number of tokens
that a row feeds.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests, Shape
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.decoder import Decoder, repeated
from refusion_jax.decode.exact import record as record_exact
from refusion_jax.decode.exact import verify
from refusion_jax.decode.exact_inputs import ExactLayout, ExactRow, exact_inputs
from refusion_jax.decode.exact_inputs import most_fed as most_fed_exact
from refusion_jax.decode.forward import Forwarded, forward, padded_to, score_rows
from refusion_jax.decode.inputs import PassInputs, pass_inputs
from refusion_jax.decode.kv_cache import KVCache, scatter_rows
from refusion_jax.decode.lookup import looked_up
from refusion_jax.decode.outputs import read_outputs
from refusion_jax.decode.phases import Outcome, carry_out
from refusion_jax.decode.prefill import feed_prompts
from refusion_jax.decode.row_state import Phase, RowState, geometry
from refusion_jax.decode.samples import Samples
from refusion_jax.decode.scores import Scores
from refusion_jax.decode.tokens_fed import TokensFed
from refusion_jax.decode.trace import Trace, record

Array = jax.Array


class DecodeState(struct.PyTreeNode):
    """The loop state of the slot decoder; see `decoder.State`. The B rows are independent.

    A row is decoded by slots or exactly, as its request asks, and is done in the other half of the state.

    Attributes:
      cache: keys and values; `cache.filled` marks the positions that hold some.
      tokens: int32 [B, S], the prompt and the committed tokens, by position.
      row: the state of each row that is decoded by slots; None where the shape has no such requests.
      exact: the state of each row that is decoded exactly; None where the shape has no such requests.
      requests: the request of each row.
      trace: the result of each plan or exact pass, or None if no request asked for a trace.
    """

    cache: KVCache
    tokens: Array
    row: RowState | None
    exact: ExactRow | None
    requests: Requests
    trace: Trace | None

    def committed(self, eos_ids: Array) -> Array:
        """bool [B, S]: the committed tokens to return, here all of them."""
        del eos_ids  # tokens after an EOS that were committed belong to `raw_ids`, as in the authors' code
        if self.exact is None:
            return self.cache.filled
        # An exact row's last committed token is not cached.
        place = jnp.arange(self.tokens.shape[1]) - self.requests.prompt_len[:, None]
        return jnp.where(self.is_exact[:, None], place < self.exact.count[:, None], self.cache.filled)

    @property
    def done(self) -> Array:
        """bool [B]: rows with nothing left to decode."""
        if self.row is None:
            return self.exact.done
        done = self.row.phase == Phase.DONE
        return done if self.exact is None else done & self.exact.done

    @property
    def forwards(self) -> Array:
        """int32 [B]: forward passes made."""
        return sum(half.forwards for half in (self.row, self.exact) if half is not None)

    @property
    def iterations(self) -> Array:
        """int32 [B]: plans executed, or exact passes that verified drafts."""
        return sum(half.iterations for half in (self.row, self.exact) if half is not None)

    @property
    def is_exact(self) -> Array:
        """bool [B]: rows that are decoded exactly; only where the shape has such requests."""
        return self.requests.exact.gen_length > 0


class Inputs(NamedTuple):
    """The inputs of a pass of all rows, [B, ...].

    Attributes:
      fed: the tokens that the pass feeds.
      slots: those of rows decoded by slots, or None.
      exact: the layout of those of rows decoded exactly, or None.
    """

    fed: TokensFed
    slots: PassInputs | None
    exact: ExactLayout | None


def start(model, prompts: Array, requests: Requests, shape: Shape) -> DecodeState:
    """The state before the first pass, for prompts int32 [B, P]. Rows that request no tokens are done."""
    B, length = prompts.shape[0], shape.prompt + shape.gen
    row = exact = None
    if shape.block:
        row = jax.vmap(lambda request: RowState.start(request, shape.slots, shape.block))(requests)
    if shape.drafts:
        exact = jax.vmap(lambda request: ExactRow.start(request, shape.drafts))(requests)
    return DecodeState(
        cache=KVCache.zeros(model.config, B, length, model.dtype, by_layer=model.cache_by_layer),
        tokens=jnp.pad(prompts, ((0, 0), (0, shape.gen))),
        row=row,
        exact=exact,
        requests=requests,
        trace=Trace.blank(shape) if shape.trace else None,
    )


def first_pass(
    model, params, state: DecodeState, mask_id: Array, eos_ids: Array, shape: Shape
) -> DecodeState:
    """The first plan or exact pass of every row. It also prefills the prompt."""
    lengths = state.requests.prompt_len
    if state.exact is not None:
        lengths -= state.is_exact  # the last prompt token is pending
    inputs = batch_inputs(state, mask_id, shape, first=True)
    fed = inputs.fed
    T = fed.tokens.shape[1]
    with jax.named_scope("forward"):
        prompts, among_fed = state.tokens[:, : shape.prompt], fed.mask[:, :, -T:]
        prefilled = feed_prompts(
            model,
            params,
            state.cache,
            prompts,
            lengths,
            fed.tokens,
            fed.positions,
            among_fed,
            shape.chunk,
        )
        logits = model.apply({"params": params}, prefilled.x, method="unembed")
        scores = score_rows(logits, fed.target, fed.sampling, shape.entropy, model.dtype)
    state = state.replace(cache=prefilled.cache)
    return advance(state, inputs, Forwarded(scores, prefilled.fresh, None), model.dtype, eos_ids)


def next_pass(model, params, state: DecodeState, mask_id: Array, eos_ids: Array, shape: Shape) -> DecodeState:
    """One forward pass, every row in its own phase, with speculative tokens up to `shape.ahead`."""
    if shape.looks_up:
        draft = functools.partial(looked_up, eos_ids=eos_ids, shape=shape)
        state = state.replace(exact=jax.vmap(draft)(state.exact, state.requests, state.tokens))
    inputs = batch_inputs(state, mask_id, shape)
    with jax.named_scope("forward"):
        result = forward(model, params, state.cache, inputs.fed, shape)
    return advance(state, inputs, result, model.dtype, eos_ids)


@jax.named_scope("inputs")
def batch_inputs(state: DecodeState, mask_id: Array, shape: Shape, *, first: bool = False) -> Inputs:
    """The inputs of every row's next pass.

    Args:
      first: whether it is the first pass, which carries no speculative tokens.
    """
    slots = layout = fed_slots = fed_exact = None
    filled = state.cache.filled
    if state.row is not None:
        ahead = 0 if first else shape.ahead
        slots = jax.vmap(lambda row, request, filled: pass_inputs(row, request, filled, mask_id, ahead))(
            state.row, state.requests, filled
        )
        fed_slots = jax.vmap(PassInputs.fed)(slots, state.row, state.requests)
    if state.exact is not None:
        size = most_fed_exact(shape, first)
        fed_exact, layout = jax.vmap(
            lambda row, request, *arrays: exact_inputs(row, request, *arrays, mask_id, size, shape)
        )(state.exact, state.requests, state.tokens, filled)
    if fed_slots is None or fed_exact is None:
        return Inputs(fed_exact if fed_slots is None else fed_slots, slots, layout)
    size = max(fed_slots.tokens.shape[1], fed_exact.tokens.shape[1])

    def of_row(exact: Array, slots: Array) -> Array:
        return jnp.where(state.is_exact.reshape(-1, *(1,) * (slots.ndim - 1)), exact, slots)

    fed = jax.tree.map(of_row, fed_exact.padded(size), fed_slots.padded(size))
    return Inputs(fed, slots, layout)


def advance(state: DecodeState, inputs: Inputs, result: Forwarded, dtype, eos_ids: Array) -> DecodeState:
    """The state after a pass: every row's state transition, and the accepted tokens committed.

    Args:
      inputs: the inputs of the pass.
      result: its result.
      dtype: of the model.
      eos_ids: int32 [E].
    """
    keep = jnp.zeros_like(inputs.fed.active)
    cache, tokens, row, exact, trace = state.cache, state.tokens, state.row, state.exact, state.trace
    if row is not None:
        positions = jax.vmap(lambda row, request: geometry(row, request).position)(row, state.requests)
        after, outcome = _after_slots(state, inputs.slots, result.scores, dtype, eos_ids)
        keep |= padded_to(outcome.keep, 1, keep.shape[1])
        cache = cache.fill(positions, outcome.committed)
        tokens = scatter_rows(tokens, positions, row.draft, outcome.committed)
        trace = None if trace is None else record(trace, row, after, outcome, state.requests)
        row = after
    if exact is not None:
        judge = functools.partial(verify, eos_ids=eos_ids)
        after, found = jax.vmap(judge)(exact, state.requests, inputs.exact, result.scores)
        keep |= found.keep
        cache = cache.fill(inputs.fed.positions, found.keep)
        tokens = scatter_rows(tokens, found.positions, found.tokens, found.committed)
        if trace is not None:
            trace = trace.replace(exact=record_exact(trace.exact, exact, found))
        exact = after
    with jax.named_scope("commit"):
        cache = result.write(cache, inputs.fed.positions, keep)
    return state.replace(cache=cache, tokens=tokens, row=row, exact=exact, trace=trace)


def _after_slots(
    state: DecodeState, inputs: PassInputs, scores: Scores, dtype, eos_ids: Array
) -> tuple[RowState, Outcome]:
    """The next state of the rows decoded by slots, and the outcome of the pass, [B, ...]."""
    size = inputs.tokens.shape[1]  # fewer than the pass fed, if exact rows feed more

    def one(row: RowState, request: Requests, inputs: PassInputs, scores: Scores) -> tuple[RowState, Outcome]:
        return carry_out(row, request, read_outputs(scores, inputs, row, request, dtype), eos_ids)

    scores = jax.tree.map(lambda x: x[:, :size], scores)
    return jax.vmap(one)(state.row, state.requests, inputs, scores)


DECODER = Decoder(Shape.exact, Requests.batch, start, first_pass, repeated(next_pass))


def sample(
    model,
    params,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig | Sequence[DecodeConfig],
    *,
    shape: Shape | None = None,
) -> Samples:
    """Decodes prompts by plan and infill (arXiv 2512.13586, section 3.3); see `Decoder.sample`.

    Args:
      model: an unrolled Transformer (`scan_layers=False`).
      params: its parameters.
      prompts: token ids of each prompt, of any lengths.
      config: one for all prompts, or one per prompt. mask_id and eos_id must be the same in all.
      shape: sizes to pad to, so that several batches share a compilation. By default the exact shape of the
        batch, rounded up to buckets.

    Returns:
      Samples with one row per prompt.

    Raises:
      BadInput: a prompt or setting cannot be decoded; the message names it.
      ValueError: the model scans its layers.
    """
    return DECODER.sample(model, params, prompts, config, shape=shape)
