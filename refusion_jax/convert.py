"""Converts a checkpoint to another layout. The layout of SRC is recognised from its files.

    python -m refusion_jax.convert Qwen3-8B runs/qwen3_8b                  # Hugging Face to Orbax
    python -m refusion_jax.convert runs/mine exported --dtype=bfloat16     # and back
    python -m refusion_jax.convert SmolLM2.gguf smollm2 --add_tokens=mask  # GGUF to Hugging Face
    python -m refusion_jax.convert runs/lora exported --to=peft            # base and adapters apart

Tensors are converted one at a time: the memory needed is that of a few of the largest. DST is written under
a temporary name and renamed when it is complete; in a bucket (gs://BUCKET/DIR) config.json is written last.
"""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from refusion_jax.buckets import is_remote, location
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.checkpoints import orbax_io as checkpoint
from refusion_jax.checkpoints import peft, safetensors_io
from refusion_jax.checkpoints.gguf_file import GGUFFile
from refusion_jax.checkpoints.gguf_weights import read_gguf
from refusion_jax.config import Parser
from refusion_jax.errors import BadInput, command
from refusion_jax.files import read_json
from refusion_jax.loader import stored_params
from refusion_jax.model.transformer import ModelConfig
from refusion_jax.tokenizer import Tokenizer, load_gguf_tokenizer, load_tokenizer
from refusion_jax.weights import lora
from refusion_jax.weights.new_tokens import add_rows

DTYPES = tuple(dtype.name for dtype in safetensors_io.DTYPES.values())
SHARD_BYTES = 5 * 10**9  # most bytes per safetensors file, as in `transformers`
COPIED = ("generation_config.json",)  # files copied unchanged
NEW_TOKENS = {"bos": "<|beginoftext|>", "mask": "<|mask|>"}  # texts and order of the authors' code


class Model(NamedTuple):
    """A checkpoint on disk, opened.

    Attributes:
      layout: "hf", "orbax" or "gguf".
      config: shape of the model.
      fields: fields of config.json, with Hugging Face's names.
      params: parameters of the unrolled model, nested dict of LazyArray; with adapters as in `weights.lora`.
      tokenizer: the checkpoint's tokenizer.
    """

    layout: str
    config: ModelConfig
    fields: Mapping[str, Any]
    params: Mapping[str, Any]
    tokenizer: Tokenizer


def open_model(path: Path) -> Model:
    """Opens the checkpoint at `path` without reading any array.

    Raises:
      BadInput: `path` is not a checkpoint, or a broken one.
    """
    if path.suffix == ".gguf" and is_remote(path):
        raise BadInput(f"SRC={path}: must be on a local disk, copy it there first")
    if path.is_file() and path.suffix == ".gguf":
        file = GGUFFile(path)
        fields, tensors = read_gguf(file)
        config = hf.parse_config(fields, path)
        params = hf.from_tensors(config, tensors, path)
        return Model("gguf", config, fields, params, load_gguf_tokenizer(file))
    if not (path / "config.json").is_file():
        what = "is no checkpoint" if path.exists() else "no such file or folder"
        raise BadInput(
            f"SRC={path}: {what}, expected a folder with config.json and weights (of Hugging Face, train or "
            "convert), or a .gguf file"
        )
    fields = read_json(path / "config.json")
    config = hf.parse_config(fields, path / "config.json")
    layout = "orbax" if (path / checkpoint.FOLDER).is_dir() else "hf"
    return Model(layout, config, fields, stored_params(path, config), load_tokenizer(path))


def add_tokens(model: Model, asked: Mapping[str, int | None]) -> Model:
    """Adds special tokens to a model; `weights.new_tokens` says how their rows are initialised.

    Args:
      model: the opened checkpoint.
      asked: "bos" or "mask" -> id of the new token; None takes the first free id. A new BOS token replaces
        the present one in that role, as in the authors' training from Qwen3.

    Raises:
      BadInput: the model has adapters or a mask token already, or the id or the token's text is in use.
    """
    if "lora" in model.params:
        raise BadInput("--add_tokens: SRC has adapters that stay apart from it; add tokens before training")
    extended, num_known = model.tokenizer, model.tokenizer.vocab_size
    # A higher id would leave rows in between that belong to no token.
    highest = max(model.config.vocab_size, num_known + len(asked)) - 1
    for role, index in asked.items():
        has = extended.special.roles().get(role)
        if role == "mask" and has is not None:
            raise BadInput(f"--add_tokens={role}: the model has a {role} token, id {has}")
        if index is not None and index > highest:
            raise BadInput(f"--add_tokens={role}:{index}: must be at most {highest}")
        extended = extended.with_token(role, NEW_TOKENS[role], index)
    ids = {role: extended.special.roles()[role] for role in asked}
    params = add_rows(model.params, ids.values(), num_known)
    config = dataclasses.replace(model.config, vocab_size=params["embedding"].shape[0])
    fields = dict(model.fields) | {f"{role}_token_id": index for role, index in ids.items()}
    if "mask" in ids:
        fields.setdefault("objective", "ar")  # a mask token alone does not make a diffusion model
    return model._replace(config=config, params=params, fields=fields, tokenizer=extended)


def cast(params: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    """The parameters in `dtype`; adapters keep theirs, float32."""
    base = jax.tree.map(lambda leaf: leaf.astype(dtype), lora.base_of(params))
    return {**params, "base": base} if "lora" in params else base


def layout_written(model: Model, asked: str | None) -> str:
    """The layout of DST, "hf", "orbax" or "peft": `asked`, or the default for the model.

    Raises:
      BadInput: the model has no adapters to keep apart, or adapters that cannot be merged.
    """
    only_masks = lora.only_masks(model.params)
    if asked == "peft" and "lora" not in model.params:
        raise BadInput("--to=peft: SRC must have adapters, found none")
    if asked == "hf" and only_masks:
        raise BadInput(
            "--to=hf: must be peft or orbax for adapters of mask tokens, which cannot be merged, found hf"
        )
    if asked is None and model.layout == "hf":
        return "orbax"
    return asked or ("peft" if only_masks else "hf")


def write_model(model: Model, folder: Path, layout: str, name: str) -> None:
    """Writes a model into an empty folder, in layout "hf", "orbax" or "peft"; `name` is that of DST."""
    base = lora.base_of(model.params)
    fields = dict(model.fields) | {"torch_dtype": base["embedding"].dtype.name}
    for role, index in model.tokenizer.special.roles().items():
        if fields.get(f"{role}_token_id") is None:
            fields[f"{role}_token_id"] = index
    model.tokenizer.save(folder)
    if layout == "orbax":
        checkpoint.write_params(folder, model.params)
    else:
        safetensors_io.write_folder(folder, hf.to_tensors(model.config, base), SHARD_BYTES)
    if layout == "peft":
        peft.write_adapter(folder, model.config, model.params, name)
    hf.write_config(folder, model.config, fields)  # last: it makes the folder a model


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder, renamed to `path` at the end of the block and removed if the block raises.

    In a bucket it is `path` itself, which is a model once it has config.json.
    """
    if is_remote(path):
        try:
            yield path
        except BaseException:
            path.rmtree(missing_ok=True)
            raise
        return
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise BadInput(f"DST={path}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str | None = None,
    dtype: str | None = None,
    asked: Mapping[str, int | None] | None = None,
) -> None:
    """Converts the checkpoint SRC to a new folder DST.

    Args:
      src: Hugging Face folder, folder of a run or of an earlier conversion, or .gguf file.
      dst: folder to write. Removed if the conversion fails.
      to: layout "hf", "orbax" or "peft": as "hf", with the adapters beside the base instead of merged. None
        is the one of "hf" and "orbax" that SRC does not have, "hf" for a GGUF file. Adapters of mask tokens
        only are never merged: they need "orbax", or "peft", which is then the default instead of "hf".
      dtype: one of DTYPES; None keeps the stored dtype, which for a GGUF file is float32.
      asked: tokens to add, as for `add_tokens`.

    Raises:
      BadInput: SRC is broken or cannot be converted as asked; DST exists or cannot be written.
    """
    src, dst = location(src), location(dst)
    if dst.exists() or (not is_remote(dst) and dst.is_symlink()):
        raise BadInput(f"DST={dst}: exists, expected a folder to be made")
    model = open_model(src)
    layout = layout_written(model, to)
    if layout != "peft" and not lora.only_masks(model.params):
        model = model._replace(params=lora.merge_lazy(model.params, dtype))
    if asked:
        model = add_tokens(model, asked)
    if dtype:
        model = model._replace(params=cast(model.params, dtype))
    leaves = jax.tree.leaves(model.params)
    needed = sum(leaf.nbytes for leaf in leaves)
    start = time.perf_counter()
    with new_folder(dst) as folder:
        _check_room(folder, dst, needed)
        write_model(model, folder, layout, str(dst))
        for name in COPIED:
            if (src / name).is_file():
                (folder / name).write_bytes((src / name).read_bytes())
    parameters = sum(leaf.nbytes // leaf.dtype.itemsize for leaf in leaves)
    seconds = time.perf_counter() - start
    print(f"{dst}: {parameters:,} parameters, {needed / 1e6:,.1f} MB, {leaves[0].dtype} in {seconds:.1f} s")


def _check_room(folder: Path, dst: Path, needed: int) -> None:
    free = math.inf if is_remote(folder) else shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(f"DST={dst}: needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free")


def parse_tokens(text: str) -> dict[str, int | None]:
    """Parses `--add_tokens=bos,mask:151670` into role -> id or None, in the order that ids are assigned."""
    asked = {}
    for part in text.split(","):
        name, colon, index = part.partition(":")
        if name not in NEW_TOKENS or name in asked or (colon and not index.isdecimal()):
            raise BadInput(
                f"--add_tokens={text}: must be mask, bos or both with a comma, each as NAME or NAME:ID"
            )
        asked[name] = int(index) if colon else None
    return {name: asked[name] for name in NEW_TOKENS if name in asked}


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(
        prog="python -m refusion_jax.convert",
        description="Converts a checkpoint to another layout: Hugging Face to Orbax, Orbax or GGUF to "
        "Hugging Face. DST appears only when it is complete.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="Hugging Face folder, folder of train or convert, or .gguf file")
    add("dst", metavar="DST", help="folder to write; must not exist")
    add(
        "--to",
        choices=("hf", "orbax", "peft"),
        help="layout of DST (default: the one of hf and orbax that SRC does not have). Adapters are merged, "
        "except with peft: the base as for hf, its adapters beside it in the files of the PEFT library",
    )
    add(
        "--dtype", choices=DTYPES, help="dtype of the weights written (default: as stored; float32 from GGUF)"
    )
    add(
        "--add_tokens",
        metavar="NAMES",
        help="special tokens to add: mask, bos or bos,mask; append :ID to choose an id (default: the first "
        "free ids). Their rows start as the mean of the other rows; bos replaces the present BOS token",
    )
    flags = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # conversion computes nothing: leave accelerators to others
    asked = parse_tokens(flags.add_tokens) if flags.add_tokens is not None else None
    convert(flags.src, flags.dst, flags.to, flags.dtype, asked)


if __name__ == "__main__":
    sys.exit(main())
