"""Opens a model folder, in Hugging Face's layout or in ours, for decoding or for training."""

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
    """Loads a model for decoding.

    Args:
      folder: a Hugging Face model folder (config.json, safetensors) or a folder written by training or
        conversion (config.json, checkpoints/STEP); both contain their tokenizer. The default is the small
        model that comes with the package.
      mesh: devices over which the parameters are sharded; each process reads only the shards of its own
        devices. None loads onto the default device.
      dtype: dtype of parameters and computation; None keeps the stored dtype.
      int8: quantise the matrices of the layers and the head while reading them, see `weights.quantized`.

    Returns:
      the unrolled model, configured for the fastest decoding on its devices; its parameters; its tokenizer.

    Raises:
      BadInput: `folder` is not a model folder, or a file in it is missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"checkpoint: {folder} is not a folder, expected one with config.json and weights")
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
    """The Transformer with the options that decode fastest on `platform`: "gpu", "tpu" or "cpu"."""
    kernel = fitting_decode_kernel(platform, dtype, config.head_dim)
    # The TPU compiler copies fused matrices into another layout before a loop and so holds them twice.
    tpu = platform == "tpu"
    return Transformer(config, dtype, dtype, kernel=kernel, fused=not tpu, int8=int8, cache_by_layer=tpu)


def decoding_scope(model: Transformer, mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager:
    """A context in which `model`, with parameters loaded to `mesh`, decodes on all devices of `mesh`."""
    return contextlib.nullcontext() if mesh is None else sharding.layout(boxed_params(model), mesh).scope()


def load_params(folder: str | Path, config: ModelConfig, abstract: Any) -> dict[str, Any]:
    """Loads the parameters of a model folder in the structure, dtypes and shardings of `abstract`.

    Args:
      folder: model folder, as for `load`.
      config: shape of the model, equal to the folder's.
      abstract: ShapeDtypeStructs of the unrolled or the scanned model, with shardings.

    Raises:
      BadInput: a file in the folder is missing or broken.
    """
    params = lazy_params(folder, config)
    return lazy.load_to_devices(lazy.stack(params) if "layers" in abstract else params, abstract)


def lazy_params(folder: str | Path, config: ModelConfig) -> dict[str, Any]:
    """The parameters of the unrolled model in a model folder: nested dict of LazyArray, nothing read yet.

    Raises:
      BadInput: a file in the folder is missing or broken, or an array has another shape than `config` gives.
    """
    folder = Path(folder)
    if not (folder / checkpoint.FOLDER).is_dir():
        return hf.from_tensors(config, safetensors_io.read_folder(folder), folder)
    params = lazy.unstack(lora.merge_lazy(checkpoint.saved_params(folder)))
    checkpoint.check_shapes(folder, params, sharding.unbox(boxed_params(Transformer(config))))
    return params


def weight_files(folder: str | Path) -> list[Path]:
    """The files that `lazy_params` reads, in the order of their names."""
    folder = Path(folder)
    step = checkpoint.latest_step(folder)
    if step is None:
        return sorted(folder.glob("*.safetensors"))
    params = folder / checkpoint.FOLDER / str(step) / "params"
    return sorted(path for path in params.rglob("*") if path.is_file())


def boxed_params(model: Transformer) -> Any:
    """Abstract parameters of `model` in Linen's partitioning boxes, which name the logical axes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = model.clone(kernel="dense").init  # same parameters, faster to trace
    return jax.eval_shape(init, jax.random.key(0), tokens, tokens)["params"]
