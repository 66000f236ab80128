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

Letters as in model/transformer.py; T is the padded block length, S the cache length, Q the number of tokens
that a row feeds.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from refusion_jax.decode.batch import Requests, Shape
from refusion_jax.decode.config import DecodeConfig
from refusion_jax.decode.decoder import Decoder, repeated
from refusion_jax.decode.forward import Forwarded, draft_sampling, forward, score_rows
from refusion_jax.decode.inputs import PassInputs, pass_inputs
from refusion_jax.decode.kv_cache import KVCache, scatter_rows
from refusion_jax.decode.outputs import read_outputs
from refusion_jax.decode.phases import carry_out
from refusion_jax.decode.row_state import Phase, RowState, geometry
from refusion_jax.decode.samples import Samples
from refusion_jax.decode.trace import Trace, record

Array = jax.Array


class DecodeState(struct.PyTreeNode):
    """The loop state of the slot decoder; see `decoder.State`. The B rows are independent.

    Attributes:
      cache: keys and values of the committed tokens; `cache.filled` marks their positions.
      tokens: int32 [B, S], the prompt and the committed tokens, by position.
      row: the decoding state of each row.
      requests: the request of each row.
      trace: the result of each plan, or None if no request asked for a trace.
    """

    cache: KVCache
    tokens: Array
    row: RowState
    requests: Requests
    trace: Trace | None

    def committed(self, eos_ids: Array) -> Array:
        """bool [B, S]: the committed tokens to return, here all of them."""
        del eos_ids  # tokens after an EOS that were committed belong to `raw_ids`, as in the authors' code
        return self.cache.filled

    @property
    def done(self) -> Array:
        """bool [B]: rows with nothing left to decode."""
        return self.row.phase == Phase.DONE

    @property
    def forwards(self) -> Array:
        """int32 [B]: forward passes made."""
        return self.row.forwards

    @property
    def iterations(self) -> Array:
        """int32 [B]: plans executed."""
        return self.row.iterations


def start(model, prompts: Array, requests: Requests, shape: Shape) -> DecodeState:
    """The state before the first pass, for prompts int32 [B, P]. Rows without blocks are done."""
    B, length = prompts.shape[0], shape.prompt + shape.gen
    return DecodeState(
        cache=KVCache.zeros(model.config, B, length, model.dtype, by_layer=model.cache_by_layer),
        tokens=jnp.pad(prompts, ((0, 0), (0, shape.gen))),
        row=jax.vmap(lambda request: RowState.start(request, shape.slots, shape.block))(requests),
        requests=requests,
        trace=Trace.blank(shape) if shape.trace else None,
    )


def first_pass(
    model, params, state: DecodeState, mask_id: Array, eos_ids: Array, shape: Shape
) -> DecodeState:
    """The first plan of every row. The same pass prefills the prompt, whose keys and values are cached."""
    B, P, T = state.tokens.shape[0], shape.prompt, shape.block
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    real = positions < state.requests.prompt_len[:, None]
    inputs = batch_inputs(state, mask_id, ahead=0)
    causal = jnp.tril(jnp.ones((P, P), bool)) & real[:, None]
    to_prompt = jnp.concatenate([causal, jnp.broadcast_to(real[:, None], (B, T, P))], axis=1)
    to_block = jnp.concatenate([jnp.zeros((B, P, T), bool), inputs.mask[:, :, -T:]], axis=1)
    with jax.named_scope("forward"):
        x, fresh = model.apply(
            {"params": params},
            jnp.concatenate([state.tokens[:, :P], inputs.tokens], axis=1),
            jnp.concatenate([positions, inputs.positions], axis=1),
            mask=jnp.concatenate([to_prompt, to_block], axis=2),
            method="hidden",
        )
        of_prompt = jax.tree.map(lambda kv: kv[:, :, :P], fresh)
        of_block = jax.tree.map(lambda kv: kv[:, :, P:], fresh)
        state = state.replace(cache=state.cache.commit(of_prompt, positions, real))
        logits = model.apply({"params": params}, x[:, P:], method="unembed")
        samplings = jax.vmap(draft_sampling)(state.row, state.requests, inputs)
        scores = score_rows(logits, inputs.target, samplings, shape.entropy, model.dtype)
    return advance(state, inputs, Forwarded(scores, of_block, None), model.dtype, eos_ids)


def next_pass(model, params, state: DecodeState, mask_id: Array, eos_ids: Array, shape: Shape) -> DecodeState:
    """One forward pass, every row in its own phase, with speculative tokens up to `shape.ahead`."""
    inputs = batch_inputs(state, mask_id, shape.ahead)
    with jax.named_scope("forward"):
        result = forward(model, params, state.cache, inputs, state.row, state.requests, shape.entropy)
    return advance(state, inputs, result, model.dtype, eos_ids)


@jax.named_scope("inputs")
def batch_inputs(state: DecodeState, mask_id: Array, ahead: int) -> PassInputs:
    """The inputs of every row's next pass, [B, ...]; `ahead` as in Shape."""

    def one(row: RowState, request: Requests, filled: Array) -> PassInputs:
        return pass_inputs(row, request, filled, mask_id, ahead)

    return jax.vmap(one)(state.row, state.requests, state.cache.filled)


def advance(state: DecodeState, inputs: PassInputs, result: Forwarded, dtype, eos_ids: Array) -> DecodeState:
    """The state after a pass: every row's state transition, and the accepted tokens committed.

    Args:
      inputs: the inputs of the pass, [B, ...].
      result: its result.
      dtype: of the logits.
      eos_ids: int32 [E].
    """
    before = state.row

    def one(row: RowState, request: Requests, inputs: PassInputs, scores):
        return carry_out(row, request, read_outputs(scores, inputs, row, request, dtype), eos_ids)

    row, outcome = jax.vmap(one)(before, state.requests, inputs, result.scores)
    positions = jax.vmap(lambda row, request: geometry(row, request).position)(before, state.requests)
    trace = None if state.trace is None else record(state.trace, before, row, outcome, state.requests)
    with jax.named_scope("commit"):
        cache = result.write(state.cache, inputs.positions, outcome.keep)
        return state.replace(
            cache=cache.fill(positions, outcome.committed),
            tokens=scatter_rows(state.tokens, positions, before.draft, outcome.committed),
            row=row,
            trace=trace,
        )


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
