"""The interface of all decoding methods: `Decoder` turns a method's pure functions into jitted decoding.

The engine, the terminal view, `bench`, `evaluate` and `sample` below use a method only through this class:

    batch = decoder.prepare(model, prompts, config)
    state = decoder.begin(model, params, *batch.inputs, shape=batch.shape)
    state = decoder.resume(model, params, state, batch.mask_id, batch.eos_ids, 0, NO_LIMIT, shape=batch.shape)
    samples = decoder.finish(state, batch.eos_ids, batch.shape)

B is the number of rows, P the prompt length, S = P + gen the number of positions; all padded (`Shape`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from refusion_jax.decode.batch import Prepared, Shape, pad_prompts
from refusion_jax.decode.inputs import filled_up
from refusion_jax.decode.kv_cache import KVCache
from refusion_jax.decode.samples import Samples, in_text_order
from refusion_jax.model.transformer import exact_matmuls

Array = jax.Array
NO_LIMIT = 2**31 - 1  # forward passes


class State(Protocol):
    """The loop state of a decoding method: a `flax.struct.PyTreeNode` whose rows are independent.

    Attributes:
      cache: keys and values.
      tokens: int32 [B, S], the prompt and the committed tokens, by position.
      done: bool [B], rows with nothing left to decode.
      forwards: int32 [B], forward passes made.
      iterations: int32 [B], plans executed; forward passes for a method without plans.
      requests: the request of each row, with `prompt_len` int32 [B] and `is_eos(tokens, eos_ids)`, bool of
        the shape of `tokens` [B, ...]: which of them end a response.
      trace: the result of each plan, or None if not recorded.
    """

    cache: KVCache
    tokens: Array
    done: Array
    forwards: Array
    iterations: Array
    requests: Any
    trace: Any

    def committed(self, eos_ids: Array) -> Array:
        """bool [B, S]: the committed tokens to return. Entries at prompt positions are ignored."""


Carry = tuple[State, Array]  # the state, and the passes made since the loop began (int32)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoding method. The fields are the method's own functions; the methods below are shared by all.

    A Decoder is hashable and is a static argument of its own jitted methods.

    Attributes:
      exact_shape: (prompts, configs) -> the smallest Shape that holds these requests as one batch. Raises
        BadInput for a prompt that the method cannot continue.
      batch_requests: (prompts, configs, shape) -> the requests as NumPy arrays [B, ...]. Padding rows request
        no tokens.
      start: (model, prompts, requests, shape) -> the State before the first pass.
      first_pass: (model, params, state, mask_id, eos_ids, shape) -> the State after the pass that feeds the
        prompts.
      passes: (model, params, carry, should_continue, mask_id, eos_ids, shape) -> the Carry once
        `should_continue(carry)` is false: a `lax.while_loop` over passes. `repeated` builds it from a
        function that makes one pass.
    """

    exact_shape: Callable[..., Shape]
    batch_requests: Callable[..., Any]
    start: Callable[..., State]
    first_pass: Callable[..., State]
    passes: Callable[..., Carry]

    def prepare(
        self, model, prompts: Sequence[Sequence[int]], config: Any, shape: Shape | None = None
    ) -> Prepared:
        """Checks and pads a batch. Arguments and errors are those of `sample`.

        Raises:
          ValueError: the model scans its layers.
        """
        if model.scan_layers:
            raise ValueError("decoding needs an unrolled model (scan_layers=False), as load() gives it")
        configs = list(config) if isinstance(config, Sequence) else [config] * len(prompts)
        needed = self.exact_shape(prompts, configs)
        if shape is None:
            shape = filled_up(needed.padded())
        shape.check_holds(needed)
        padded = pad_prompts(prompts, configs, shape, model.config.vocab_size)
        return Prepared.of(padded, self.batch_requests(prompts, configs, shape), configs, shape)

    # jit compiles again for a call that omits an argument, so no argument below has a default.

    @functools.partial(jax.jit, static_argnames=("self", "model", "shape"))
    def init(self, model, prompts: Array, requests: Any, *, shape: Shape) -> State:
        """The state before the first pass. No token is committed; rows that request no tokens are done."""
        return self.start(model, prompts, requests, shape)

    @functools.partial(jax.jit, static_argnames=("self", "model", "shape"))
    def begin(
        self, model, params, prompts: Array, requests: Any, mask_id: Array, eos_ids: Array, *, shape: Shape
    ) -> State:
        """The state after the first pass. Arguments are those of `decode`."""
        with exact_matmuls(model):
            state = self.start(model, prompts, requests, shape)
            return self.first_pass(model, params, state, mask_id, eos_ids, shape)

    @functools.partial(jax.jit, static_argnames=("self", "model", "shape"), donate_argnames=("state",))
    def resume(
        self,
        model,
        params,
        state: State,
        mask_id: Array,
        eos_ids: Array,
        until: Array,
        limit: Array,
        *,
        shape: Shape,
    ) -> State:
        """Decodes on until at most `until` rows are still running, or for `limit` forward passes.

        `state` is donated and must not be used again. `until` and `limit` are integer scalars.
        """

        def should_continue(carry: Carry) -> Array:
            state, made = carry
            return (jnp.sum(~state.done) > until) & (made < limit)

        with exact_matmuls(model):
            carry = state, jnp.int32(0)
            return self.passes(model, params, carry, should_continue, mask_id, eos_ids, shape)[0]

    def decode(
        self, model, params, prompts: Array, requests: Any, mask_id: Array, eos_ids: Array, *, shape: Shape
    ) -> State:
        """Decodes a batch to its end: `begin`, then `resume`, each compiled once per model and shape.

        Args:
          model: an unrolled Transformer (`scan_layers=False`).
          params: its parameters.
          prompts: int32 [B, P], padded on the right.
          requests: the request of each row, a tree of arrays [B, ...].
          mask_id: int32 scalar.
          eos_ids: int32 [E], or a scalar for one id.
          shape: the padded sizes.
        """
        state = self.begin(model, params, prompts, requests, mask_id, eos_ids, shape=shape)
        return self.resume(model, params, state, mask_id, eos_ids, 0, NO_LIMIT, shape=shape)

    def finish(self, state: State, eos_ids: Array, shape: Shape) -> Samples:
        """The Samples of a state whose rows are done."""
        prompt_len = state.requests.prompt_len
        eos = state.requests.is_eos(state.tokens, eos_ids)
        answers = in_text_order(state.tokens, state.committed(eos_ids), eos, prompt_len, gen=shape.gen)
        return Samples(*answers, state.forwards, state.iterations, state.trace)

    def sample(
        self, model, params, prompts: Sequence[Sequence[int]], config: Any, *, shape: Shape | None = None
    ) -> Samples:
        """Decodes prompts.

        Args:
          model: an unrolled Transformer (`scan_layers=False`).
          params: its parameters.
          prompts: token ids of each prompt, of any lengths.
          config: the method's config, one for all prompts or one per prompt. mask_id and eos_id must be the
            same in all.
          shape: sizes to pad to, so that several batches share a compilation. By default the exact shape of
            the batch, rounded up to buckets.

        Returns:
          Samples with one row per prompt.

        Raises:
          BadInput: a prompt or setting cannot be decoded; the message names it.
          ValueError: the model scans its layers.
        """
        batch = self.prepare(model, prompts, config, shape)
        state = self.decode(model, params, *batch.inputs, shape=batch.shape)
        samples = self.finish(state, batch.eos_ids, batch.shape)
        return jax.tree.map(lambda x: x[: len(prompts)], samples)


def repeated(next_pass: Callable[..., State]) -> Callable[..., Carry]:
    """`Decoder.passes` for a method that repeats one function until the loop ends.

    Args:
      next_pass: (model, params, state, mask_id, eos_ids, shape) -> the state after one more pass.
    """

    def passes(
        model, params, carry: Carry, should_continue: Callable, mask_id: Array, eos_ids: Array, shape: Shape
    ) -> Carry:
        def body(carry: Carry) -> Carry:
            state, made = carry
            return next_pass(model, params, state, mask_id, eos_ids, shape), made + 1

        return jax.lax.while_loop(should_continue, body, carry)

    return passes
