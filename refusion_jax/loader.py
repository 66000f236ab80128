"""One way to open a model folder, whichever layout it has."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from refusion_jax import checkpoint, hf, sharding
from refusion_jax.errors import BadInput
from refusion_jax.model import Transformer, unstack_layers
from refusion_jax.tokenizer import Tokenizer, load_tokenizer


def load(
    folder: str | Path, mesh: jax.sharding.Mesh | None = None, dtype: Any = None
) -> tuple[Transformer, dict[str, Any], Tokenizer]:
    """A model ready for decoding.

    Args:
      folder: a Hugging Face model folder (config.json, safetensors), or one that training or
        conversion wrote (config.json, checkpoints/STEP); both carry their tokenizer.
      mesh: devices to spread the parameters over; None is the default device.
      dtype: of parameters and computation; None keeps what is stored.

    Returns:
      the unrolled model, its parameters, and the tokenizer.

    Raises:
      BadInput: the folder is no such folder, or something in it is missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"checkpoint: {folder} is no folder, expected one with config.json and weights")
    config = hf.read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.mask_id >= config.vocab_size:
        raise BadInput(
            f"{folder}: mask_token_id must be below vocab_size {config.vocab_size}, found {tokenizer.mask_id}"
        )
    model = Transformer(config)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    shardings = None if mesh is None else sharding.layout(boxed, mesh).shardings
    if (folder / checkpoint.FOLDER).is_dir():
        params = _restore(folder, model, boxed, shardings, dtype)
    else:
        params = hf.load_params(folder, config, dtype)
        params = params if mesh is None else jax.device_put(params, shardings)
    stored = jax.tree.leaves(params)[0].dtype
    return model.clone(dtype=stored, param_dtype=stored), params, tokenizer


def _restore(folder: Path, model: Transformer, boxed: Any, shardings: Any, dtype: Any) -> dict[str, Any]:
    """Parameters from the newest checkpoint, unstacked where training scanned its layers."""
    saved = checkpoint.saved_params(folder)
    stored = dtype or jax.tree.leaves(saved)[0].dtype
    scanned = "layers" in saved
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if scanned:
        model = model.clone(scan_layers=True)
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        boxed = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"]
    unboxed = sharding.unbox(boxed)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, stored, sharding=here), unboxed)
    if shardings is not None and not scanned:
        abstract = sharding.with_shardings(abstract, shardings)
    params = checkpoint.restore_params(folder, abstract)
    if scanned:
        params = unstack_layers(params)
        params = params if shardings is None else jax.device_put(params, shardings)
    return params
