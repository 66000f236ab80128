"""Opens a model folder, in Hugging Face's layout or in ours, for decoding or for training."""

import contextlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refusion_jax import sharding
from refusion_jax.buckets import files_below, location
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.checkpoints import orbax_io as checkpoint
from refusion_jax.checkpoints import peft, safetensors_io
from refusion_jax.errors import BadInput
from refusion_jax.files import SMALL
from refusion_jax.model.adapter import Adapter
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
      Adapters for mask tokens only are beside the model's own matrices (Transformer's `adapter`); others are
      merged into them, in float32.

    Raises:
      BadInput: `folder` is not a model folder, or a file in it is missing or broken.
    """
    folder = location(folder)
    if not folder.is_dir():
        raise BadInput(f"checkpoint: {folder} is not a folder, expected one with config.json and weights")
    config = hf.read_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.mask_id is not None and tokenizer.mask_id >= config.vocab_size:
        raise BadInput(
            f"{folder}: mask_token_id must be below vocab_size {config.vocab_size}, found {tokenizer.mask_id}"
        )
    stored = stored_params(folder, config)
    computed = np.dtype(dtype or lora.base_of(stored)["embedding"].dtype)
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    model = decoding_model(config, computed, platform, int8)
    if lora.only_masks(stored):
        model = model.clone(adapter=_adapter(stored, tokenizer.need_mask()))
        params = lora.beside(stored)
    else:
        params = lora.merge_lazy(stored, dtype)
    if model.fused:
        params = fused.fuse_projections(params)
    if int8:
        params = quantized.quantize(params, rest=computed)
    elif dtype is not None or model.adapter is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(computed), params)
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
    params = lazy_params(folder, config, np.float32)
    return lazy.load_to_devices(lazy.stack(params) if "layers" in abstract else params, abstract)


def lazy_params(folder: str | Path, config: ModelConfig, dtype: Any = None) -> dict[str, Any]:
    """`stored_params`, with adapters merged.

    Args:
      folder, config: as for `stored_params`.
      dtype: dtype of kernels that adapters are merged into; None for the stored dtype.

    Raises:
      BadInput: as `stored_params`, or the adapters are for mask tokens only.
    """
    stored = stored_params(folder, config)
    if lora.only_masks(stored):
        raise BadInput(
            f"{folder}: has adapters for mask tokens only, which cannot be merged; expected the folder of a "
            "model without adapters"
        )
    return lora.merge_lazy(stored, dtype)


def stored_params(folder: str | Path, config: ModelConfig) -> dict[str, Any]:
    """The parameters of the unrolled model in a model folder: nested dict of LazyArray, nothing read yet.

    Returns:
      a plain tree, or that of an adapted model as in `weights.lora`.

    Raises:
      BadInput: a file in the folder is missing or broken, or an array has another shape than `config` gives.
    """
    folder = location(folder)
    if not (folder / checkpoint.FOLDER).is_dir():
        base = hf.from_tensors(config, safetensors_io.read_folder(folder), folder)
        params = peft.with_adapter(config, base, folder)
        if not lora.only_masks(params):  # PEFT may adapt some of the layers only
            return params
    else:
        params = lora.unstack(checkpoint.saved_params(folder))
    model = Transformer(config)
    if "lora" in params:
        any_id = 0  # shapes do not depend on it
        model = model.clone(adapter=_adapter(params, any_id if lora.only_masks(params) else None))
    checkpoint.check_shapes(folder, lora.beside(params), sharding.unbox(boxed_params(model)))
    return params


def weight_files(folder: str | Path) -> list[Path]:
    """The files that `lazy_params` reads, in the order of their names."""
    folder = location(folder)
    step = checkpoint.latest_step(folder)
    if step is None:
        return sorted(folder.glob("*.safetensors"))
    params = folder / checkpoint.FOLDER / str(step) / "params"
    return files_below(params)


def _adapter(params: Any, mask_id: int | None) -> Adapter:
    """The Transformer's `adapter` for the parameters of an adapted model."""
    rank, targets = lora.rank_and_targets(params)
    return Adapter(rank, float(params["scale"].whole()), targets, mask_id)


def boxed_params(model: Transformer) -> Any:
    """Abstract parameters of `model` in Linen's partitioning boxes, which name the logical axes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = model.clone(kernel="dense").init  # same parameters, faster to trace
    return jax.eval_shape(init, jax.random.key(0), tokens, tokens)["params"]
