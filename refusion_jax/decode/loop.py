"""Plan and infill: the slot decoder, one jitted `lax.while_loop` over a batch of independent rows.

Every iteration is one forward pass over the current block of each row. Each row is in a phase of its own, so
no row waits for another's round (arXiv 2512.13586, section 3.3):

  PLAN     feed the block's undecoded slots as masks; draft them; choose the confident ones
  VERIFY   feed the chosen drafts, each slot seeing those before it; commit the accepted slots, or
  INFILL   feed what is not accepted of every chosen slot, each slot seeing itself alone: first as masks to
    draft,
           then as drafts to accept more of; commit when all are whole

Masks for the next phase ride along (inputs.py), so most plans and refills take no pass of their own.

A slot that is infilled on its own attends to the cache and to itself. All slots of a row therefore go through
the model together, under a mask that keeps them apart. The rule of one slot is vmapped over the slots, the
rule of one row over the batch. The keys and values that are kept of a token come from the pass that accepted
it; nothing is computed twice unless a request sets `recompute`.

Letters as in model/transformer.py; T is the block as padded, S the cache length, Q the tokens that a row
feeds.
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
    """Everything the loop carries; rows B are independent of each other. See `decoder.State`.

    Attributes:
      cache: keys and values of the committed tokens; `cache.filled` says which positions those are.
      tokens: int32 [B, S], the committed tokens by position.
      row: the state of each row.
      requests: what each row asks for.
      trace: or None when no request asked for it.
    """

    cache: KVCache
    tokens: Array
    row: RowState
    requests: Requests
    trace: Trace | None

    def committed(self, eos_id: Array) -> Array:
        """bool [B, S]."""
        del eos_id  # what stands after an EOS is committed only where `raw_ids` shows it
        return self.cache.filled

    @property
    def done(self) -> Array:
        """bool [B]."""
        return self.row.phase == Phase.DONE

    @property
    def forwards(self) -> Array:
        """int32 [B]."""
        return self.row.forwards

    @property
    def iterations(self) -> Array:
        """int32 [B]."""
        return self.row.iterations


def start(model, prompts: Array, requests: Requests, shape: Shape) -> DecodeState:
    """The state before the first pass; rows without blocks are done."""
    B, length = prompts.shape[0], shape.prompt + shape.gen
    return DecodeState(
        cache=KVCache.zeros(model.config, B, length, model.dtype, by_layer=model.cache_by_layer),
        tokens=jnp.pad(prompts, ((0, 0), (0, shape.gen))),
        row=jax.vmap(lambda request: RowState.start(request, shape.slots, shape.block))(requests),
        requests=requests,
        trace=Trace.blank(shape) if shape.trace else None,
    )


def first_pass(model, params, state: DecodeState, mask_id: Array, eos_id: Array, shape: Shape) -> DecodeState:
    """The first plan of every row; the prompt is fed in the same pass and its keys and values are kept."""
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
        scores = score_rows(logits, inputs.target, samplings, shape.entropy)
    return advance(state, inputs, Forwarded(scores, of_block, None), model.dtype, eos_id)


def next_pass(model, params, state: DecodeState, mask_id: Array, eos_id: Array, shape: Shape) -> DecodeState:
    """One forward pass, every row in its own phase."""
    inputs = batch_inputs(state, mask_id, shape.ahead)
    with jax.named_scope("forward"):
        result = forward(model, params, state.cache, inputs, state.row, state.requests, shape.entropy)
    return advance(state, inputs, result, model.dtype, eos_id)


@jax.named_scope("inputs")
def batch_inputs(state: DecodeState, mask_id: Array, ahead: int) -> PassInputs:
    """What each row feeds next, [B, ...]; `ahead` as in Shape."""

    def one(row: RowState, request: Requests, filled: Array) -> PassInputs:
        return pass_inputs(row, request, filled, mask_id, ahead)

    return jax.vmap(one)(state.row, state.requests, state.cache.filled)


def advance(state: DecodeState, inputs: PassInputs, result: Forwarded, dtype, eos_id: Array) -> DecodeState:
    """Carries every row through the phase its forward pass was for, and commits what was accepted.

    Args:
      inputs: what the rows fed, [B, ...].
      result: what the pass gave.
      dtype: of the logits.
    """
    before = state.row

    def one(row: RowState, request: Requests, inputs: PassInputs, scores):
        return carry_out(row, request, read_outputs(scores, inputs, row, request, dtype), eos_id)

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
    """Decodes prompts by plan and infill; see `Decoder.sample`.

    Args:
      model: an unrolled Transformer (`scan_layers=False`).
      params: its parameters.
      prompts: token ids, of any lengths.
      config: one for all prompts, or one for each; they must agree on mask_id and eos_id.
      shape: sizes to pad to, so that batches share a compilation; by default as small as the batch allows.

    Raises:
      BadInput: a prompt or setting that cannot be decoded, naming it.
    """
    return DECODER.sample(model, params, prompts, config, shape=shape)
