"""One way to open a model folder, whichever layout it has."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax import sharding
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.checkpoints import orbax_io as checkpoint
from refusion_jax.checkpoints import safetensors_io
from refusion_jax.errors import BadInput
from refusion_jax.files import SMALL
from refusion_jax.model.attention import fitting_decode_kernel
from refusion_jax.model.transformer import ModelConfig, Transformer
from refusion_jax.tokenizer import Tokenizer, load_tokenizer
from refusion_jax.weights import fused, lazy, lora, quantized


def load(
    folder: str | Path = SMALL,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    int8: bool = False,
) -> tuple[Transformer, dict[str, Any], Tokenizer]:
    """A model ready for decoding.

    Args:
      folder: a Hugging Face model folder (config.json, safetensors), or one that training or
        conversion wrote (config.json, checkpoints/STEP); both carry their tokenizer. Without it, the
        small model that comes with the package.
      mesh: devices to spread the parameters over, each process reading what its own hold; None is the
        default device.
      dtype: of parameters and computation; None keeps what is stored.
      int8: the layers' matrices and the head are quantised as they are read, see `quantized`.

    Returns:
      the unrolled model as it decodes fastest on its devices, its parameters, and the tokenizer.

    Raises:
      BadInput: the folder is no such folder, or something in it is missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"checkpoint: {folder} is no folder, expected one with config.json and weights")
    config = hf.read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.mask_id is not None and tokenizer.mask_id >= config.vocab_size:
        raise BadInput(
            f"{folder}: mask_token_id must be below vocab_size {config.vocab_size}, found {tokenizer.mask_id}"
        )
    params = lazy_params(folder, config)
    computed = np.dtype(dtype or params["embedding"].dtype)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    model = decoding_model(config, computed, platform, int8)
    if model.fused:
        params = fused.fuse_projections(params)
    if int8:
        params = quantized.quantize(params, rest=dtype)
    elif dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    if mesh is not None:
        abstract = sharding.with_shardings(abstract, sharding.layout(boxed_params(model), mesh).shardings)
    return model, lazy.load_to_devices(params, abstract), tokenizer


def decoding_model(config: ModelConfig, dtype: Any, platform: str, int8: bool = False) -> Transformer:
    """The model of that shape as it decodes fastest on "gpu", "tpu" or "cpu"."""
    kernel = fitting_decode_kernel(platform, dtype, config.head_dim)
    # The TPU compiler would lay joined matrices out anew before a loop, and hold them twice.
    tpu = platform == "tpu"
    return Transformer(config, dtype, dtype, kernel=kernel, fused=not tpu, int8=int8, cache_by_layer=tpu)


def decoding_scope(model: Transformer, mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """Within it `model`, with parameters loaded to `mesh`, decodes on all its devices."""
    return contextlib.nullcontext() if mesh is None else sharding.layout(boxed_params(model), mesh).scope()


def load_params(folder: str | Path, config: ModelConfig, abstract: Any) -> dict[str, Any]:
    """The parameters of a model folder as `abstract` wants them.

    Args:
      folder: as `load` takes it.
      config: the model's shape, as in the folder.
      abstract: ShapeDtypeStructs of the unrolled or the scanned model, with dtypes and shardings.

    Raises:
      BadInput: something in the folder is missing or broken.
    """
    params = lazy_params(folder, config)
    return lazy.load_to_devices(lazy.stack(params) if "layers" in abstract else params, abstract)


def lazy_params(folder: str | Path, config: ModelConfig) -> dict[str, Any]:
    """The unrolled model's parameters in a model folder, yet to be read: nested dict of LazyArray.

    Raises:
      BadInput: something in the folder is missing or broken, or of another shape than `config`.
    """
    folder = Path(folder)
    if not (folder / checkpoint.FOLDER).is_dir():
        return hf.from_tensors(config, safetensors_io.read_folder(folder), folder)
    params = lazy.unstack(lora.merge_stored(checkpoint.saved_params(folder)))
    checkpoint.check_shapes(folder, params, sharding.unbox(boxed_params(Transformer(config))))
    return params


def boxed_params(model: Transformer) -> Any:
    """Abstract parameters in Linen's partitioning boxes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = model.clone(kernel="dense").init  # which has the same parameters and is soon traced
    return jax.eval_shape(init, jax.random.key(0), tokens, tokens)["params"]
