"""The interface of all decoders: a few pure functions of a method, and what every method does with them.

The engine, the terminal view, `bench`, `evaluate` and `sample` below use a decoder through this class alone:

    batch = decoder.prepare(model, prompts, config)
    state = decoder.begin(model, params, *batch.inputs, shape=batch.shape)
    state = decoder.resume(model, params, state, batch.mask_id, batch.eos_id, 0, NO_LIMIT, shape=batch.shape)
    samples = decoder.finish(state, batch.eos_id, batch.shape)

B rows, prompts of P tokens, S = P + gen positions.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from refusion_jax.decode.batch import Prepared, Shape, pad_prompts
from refusion_jax.decode.inputs import tokens_ahead
from refusion_jax.decode.kv_cache import KVCache
from refusion_jax.decode.samples import Samples, in_text_order
from refusion_jax.model.transformer import exact_matmuls

Array = jax.Array
NO_LIMIT = 2**31 - 1  # forward passes


class State(Protocol):
    """What the loop of a decoder carries; a `flax.struct.PyTreeNode` whose rows are independent of each
    other.

    Attributes:
      cache: keys and values.
      tokens: int32 [B, S], by position: the prompt and what is committed.
      done: bool [B], rows with nothing left to decode.
      forwards: int32 [B], forward passes made.
      iterations: int32 [B], plans carried out; forward passes for a method without plans.
      requests: what each row asks for, with `prompt_len` int32 [B].
      trace: what each plan came to, or None.
    """

    cache: KVCache
    tokens: Array
    done: Array
    forwards: Array
    iterations: Array
    requests: Any
    trace: Any

    def committed(self, eos_id: Array) -> Array:
        """bool [B, S], the committed tokens that are given out; entries of the prompt do not count."""


Carry = tuple[State, Array]  # a state, and how many passes led to it


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A way to decode. Its fields are the method's own functions, its methods are the same for all.

    Attributes:
      exact_shape: (prompts, settings) -> the smallest Shape that holds these requests as one batch. Raises
        BadInput for a prompt that the method cannot continue.
      batch_requests: (prompts, settings, shape) -> the requests as NumPy arrays [B, ...]; rows of padding ask
        for nothing.
      start: (model, prompts, requests, shape) -> the State before the first pass.
      first_pass: (model, params, state, mask_id, eos_id, shape) -> the State after the pass that feeds the
        prompts.
      passes: (model, params, carry, go_on, mask_id, eos_id, shape) -> the carry after further passes, as many
        as
        `go_on` of a carry asks for: a `lax.while_loop`. `repeated` makes it from a function of one pass.
    """

    exact_shape: Callable[..., Shape]
    batch_requests: Callable[..., Any]
    start: Callable[..., State]
    first_pass: Callable[..., State]
    passes: Callable[..., Carry]

    def prepare(
        self, model, prompts: Sequence[Sequence[int]], config: Any, shape: Shape | None = None
    ) -> Prepared:
        """Checks and pads a batch; arguments and errors as those of `sample`."""
        if model.scan_layers:
            raise ValueError("decoding needs an unrolled model (scan_layers=False), as load() gives it")
        configs = list(config) if isinstance(config, Sequence) else [config] * len(prompts)
        needed = self.exact_shape(prompts, configs)
        if shape is None:
            shape = needed.padded(ahead=tokens_ahead(needed.rows))
        shape.check_holds(needed)
        padded = pad_prompts(prompts, configs, shape, model.config.vocab_size)
        return Prepared.of(padded, self.batch_requests(prompts, configs, shape), configs, shape)

    # A call of a jitted function that leaves an argument out compiles it once more: all are required.

    @functools.partial(jax.jit, static_argnames=("self", "model", "shape"))
    def init(self, model, prompts: Array, requests: Any, *, shape: Shape) -> State:
        """The state before the first pass: nothing committed; rows that ask for nothing are done."""
        return self.start(model, prompts, requests, shape)

    @functools.partial(jax.jit, static_argnames=("self", "model", "shape"))
    def begin(
        self, model, params, prompts: Array, requests: Any, mask_id: Array, eos_id: Array, *, shape: Shape
    ) -> State:
        """A batch after its first pass; arguments as those of `decode`."""
        with exact_matmuls(model):
            state = self.start(model, prompts, requests, shape)
            return self.first_pass(model, params, state, mask_id, eos_id, shape)

    @functools.partial(jax.jit, static_argnames=("self", "model", "shape"), donate_argnames=("state",))
    def resume(
        self,
        model,
        params,
        state: State,
        mask_id: Array,
        eos_id: Array,
        until: Array,
        limit: Array,
        *,
        shape: Shape,
    ) -> State:
        """Decodes on until at most `until` rows are still running, or for `limit` passes; uses `state` up."""

        def go_on(carry: Carry) -> Array:
            state, made = carry
            return (jnp.sum(~state.done) > until) & (made < limit)

        with exact_matmuls(model):
            carry = state, jnp.int32(0)
            return self.passes(model, params, carry, go_on, mask_id, eos_id, shape)[0]

    def decode(
        self, model, params, prompts: Array, requests: Any, mask_id: Array, eos_id: Array, *, shape: Shape
    ) -> State:
        """Decodes a batch to the end: `begin`, then `resume`, each compiled once for a model and a shape.

        Args:
          model: an unrolled Transformer.
          params: its parameters.
          prompts: int32 [B, P], padded on the right.
          requests: what each row asks for, [B].
          mask_id, eos_id: int32 scalars.
          shape: the padded sizes.
        """
        state = self.begin(model, params, prompts, requests, mask_id, eos_id, shape=shape)
        return self.resume(model, params, state, mask_id, eos_id, 0, NO_LIMIT, shape=shape)

    def finish(self, state: State, eos_id: Array, shape: Shape) -> Samples:
        """The answers in a state whose rows are done."""
        prompt_len = state.requests.prompt_len
        answers = in_text_order(state.tokens, state.committed(eos_id), prompt_len, eos_id, gen=shape.gen)
        return Samples(*answers, state.forwards, state.iterations, state.trace)

    def sample(
        self, model, params, prompts: Sequence[Sequence[int]], config: Any, *, shape: Shape | None = None
    ) -> Samples:
        """Decodes prompts.

        Args:
          model: an unrolled Transformer (`scan_layers=False`).
          params: its parameters.
          prompts: token ids, of any lengths.
          config: the method's settings, one for all prompts or one for each; they must agree on mask_id and
            eos_id.
          shape: sizes to pad to, so that batches share a compilation; by default as small as the batch
            allows.

        Raises:
          BadInput: a prompt or setting that cannot be decoded, naming it.
        """
        batch = self.prepare(model, prompts, config, shape)
        state = self.decode(model, params, *batch.inputs, shape=batch.shape)
        samples = self.finish(state, batch.eos_id, batch.shape)
        return jax.tree.map(lambda x: x[: len(prompts)], samples)


def repeated(next_pass: Callable[..., State]) -> Callable[..., Carry]:
    """`Decoder.passes` of a method whose passes are all alike.

    Args:
      next_pass: (model, params, state, mask_id, eos_id, shape) -> the state one pass later.
    """

    def passes(
        model, params, carry: Carry, go_on: Callable, mask_id: Array, eos_id: Array, shape: Shape
    ) -> Carry:
        def body(carry: Carry) -> Carry:
            state, made = carry
            return next_pass(model, params, state, mask_id, eos_id, shape), made + 1

        return jax.lax.while_loop(go_on, body, carry)

    return passes
