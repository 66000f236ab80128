"""Opens a checkpoint for decoding: the model, and the default settings of requests."""

import argparse
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax import sharding
from refusion_jax.checkpoints import hugging_face
from refusion_jax.compilation import use_compilation_cache
from refusion_jax.config import Parser
from refusion_jax.decode.config import MOST_BLOCK_TOKENS
from refusion_jax.errors import BadInput
from refusion_jax.loader import decoding_scope, load
from refusion_jax.model.transformer import Transformer
from refusion_jax.serving.flags import add_decoding_flags, given_settings
from refusion_jax.serving.methods import METHODS, default_settings
from refusion_jax.serving.requests import Defaults, feeds_masks
from refusion_jax.tokenizer import MASK_MISSING, Tokenizer


class Opened(NamedTuple):
    """A model ready to serve requests. Decode within `scope()`."""

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    defaults: Defaults
    mesh: jax.sharding.Mesh | None

    def scope(self) -> contextlib.AbstractContextManager:
        """A context in which decoding uses the devices that hold the parameters."""
        return decoding_scope(self.model, self.mesh)


def open_model(flags: argparse.Namespace) -> Opened:
    """The model and default settings that the decoding flags ask for.

    Raises:
      BadInput: a flag is wrong, the checkpoint cannot be read, or it does not support the method.
    """
    if flags.batch_size < 1:
        raise BadInput(f"--batch_size must be at least 1 request, found {flags.batch_size}")
    if flags.ahead is not None and not 0 <= flags.ahead <= MOST_BLOCK_TOKENS:
        raise BadInput(f"--ahead must be 0 to {MOST_BLOCK_TOKENS} tokens, found {flags.ahead}")
    template = {} if flags.enable_thinking is None else {"enable_thinking": flags.enable_thinking == "true"}
    mesh = None if flags.tensor == 1 else sharding.tensor_mesh(flags.tensor)
    opened = open_checkpoint(
        flags.checkpoint, flags.method, given_settings(flags), dtype=flags.dtype, mesh=mesh, int8=flags.int8
    )
    defaults = dataclasses.replace(
        opened.defaults, raw=flags.raw, template=template, stop=tuple(flags.stop), ahead=flags.ahead
    )
    return opened._replace(defaults=defaults)


def open_checkpoint(
    checkpoint: str,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    dtype: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    int8: bool = False,
) -> Opened:
    """The model in a folder and the default settings of its requests.

    Args:
      checkpoint: a model folder, as `load` takes it.
      method: one of METHODS; None for that of the checkpoint's training objective.
      settings: settings of the method that replace the defaults of checkpoint and method.
      dtype: of weights and computation; None for bfloat16, but float32 on a CPU.
      mesh, int8: as `load` takes them.

    Raises:
      BadInput: the checkpoint cannot be read, or it does not support the method or a setting.
    """
    use_compilation_cache()
    computed = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    model, params, tokenizer = load(checkpoint, mesh, computed, int8)
    method = asked_method(checkpoint, method)
    asked = asked_settings(checkpoint, method, settings or {})
    if feeds_masks(method, asked) and tokenizer.mask_id is None:
        raise BadInput(f"{checkpoint}: {MASK_MISSING}")
    return Opened(model, params, tokenizer, Defaults(method, asked), mesh)


def open_by(arguments: Sequence[str]) -> Opened:
    """`open_model` for decoding flags given as text, as on a command line."""
    parser = Parser()
    add_decoding_flags(parser)
    return open_model(parser.parse_args(arguments))


def asked_method(checkpoint: str, given: str | None) -> str:
    """The decoding method: `given`, or that of the checkpoint's training objective.

    Raises:
      BadInput: the checkpoint's objective is not one of METHODS, or the checkpoint cannot be read.
    """
    method = given or hugging_face.objective(checkpoint)
    if method not in METHODS:
        where = f"{checkpoint}/config.json: objective"
        raise BadInput(f"{where} must be one of {', '.join(METHODS)}, found {method!r}")
    return method


def asked_settings(checkpoint: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the method: `given`, then the checkpoint's defaults, then those of the method.

    Raises:
      BadInput: `given` has a setting that the method does not have.
    """
    known = default_settings(method)
    for name in given:
        if name not in known:
            methods = [other for other in METHODS if name in default_settings(other)]
            raise BadInput(f"--{name} is for --method={' or '.join(methods)} alone, found --method={method}")
    return known | trained_settings(checkpoint, method) | given


def trained_settings(checkpoint: str, method: str) -> dict[str, Any]:
    """The settings of the method that follow from how the checkpoint was trained.

    Raises:
      BadInput: its config.json cannot be read or has an impossible value.
    """
    fields = {field.name for field in dataclasses.fields(METHODS[method])}
    stated = hugging_face.decoding_defaults(checkpoint)
    trained = {name: value for name, value in stated.items() if name in fields}
    if method == "bd3" and (block_len := hugging_face.block_len(checkpoint)) is not None:
        trained["block_len"] = block_len
    return trained
