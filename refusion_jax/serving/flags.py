"""A model opened for decoding as the flags say that `sample`, `evaluate` and other commands share."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from refusion_jax import sharding
from refusion_jax.baselines.decoders import ar, mdm
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.config import Parser
from refusion_jax.decode.config import MOST_BLOCK_TOKENS, SEMANTICS, SLOT_SCORES
from refusion_jax.errors import BadInput
from refusion_jax.loader import SMALL, decoding_scope, load
from refusion_jax.model.transformer import Transformer
from refusion_jax.serving import engine as serving
from refusion_jax.serving.engine import METHODS, Defaults
from refusion_jax.tokenizer import MASK_MISSING, Tokenizer

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which model decodes and how; shared by the commands that decode."""
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        default=str(SMALL),
        help="model folder: Hugging Face's, or written by train "
        "(default: the small model that comes with the package)",
    )
    add("--method", choices=tuple(METHODS), help="decoder (default: what the checkpoint was trained for)")
    add_setting_flags(parser)
    add(
        "--semantics",
        choices=SEMANTICS,
        help="of refusion; release: the authors' code to the letter, its slips included (default fixed)",
    )
    add(
        "--first_token",
        choices=ar.FIRST_TOKENS,
        help="where --method=ar reads the first token: off the last prompt token, or off a mask "
        "(default: as the checkpoint's objective trained it)",
    )
    add(
        "--batch_size",
        type=int,
        metavar="N",
        default=8,
        help="requests decoded together (default %(default)s)",
    )
    add(
        "--tensor",
        type=int,
        metavar="N",
        default=1,
        help="devices that share each matrix product (default %(default)s)",
    )
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="of weights and computation (default bfloat16, on a CPU float32)",
    )
    add(
        "--int8",
        action="store_true",
        help="int8 weights, a scale for each output channel, for decoding alone",
    )
    add("--raw", action="store_true", help="feed a text prompt as it is, without the chat template")
    add(
        "--enable_thinking",
        choices=("true", "false"),
        help="told to the chat template (default: not told, and Qwen3's has the model think)",
    )
    add("--stop", metavar="TEXT", action="append", default=[], help="end the text before TEXT; repeatable")


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of what methods can be told, and --ahead; what is not given is None, the method's default."""

    def add(setting: str, help: str, **how: Any) -> None:
        parser.add_argument(f"--{setting}", help=f"{help} {_default(setting)}", **how)

    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    add("gen_length", "most response tokens", **whole)
    add("slot_size", "refusion: tokens of a slot", **whole)
    add(
        "num_blocks",
        "refusion, mdm: blocks decoded left to right; gen_length is a multiple of num_blocks, for refusion "
        "of num_blocks x slot_size",
        **whole,
    )
    add(
        "block_len",
        "bd3: tokens of a block; gen_length is a multiple; where the checkpoint says nothing",
        **whole,
    )
    add(
        "slot_threshold",
        "refusion: score, a probability, above which a slot is chosen; below 0 always, from 1 never",
        **number,
    )
    add(
        "slot_score",
        "refusion: what is compared with that: the probability of the draft of the slot's first token, the "
        "mean of those of all its tokens, or exp of minus their mean entropy",
        choices=SLOT_SCORES,
    )
    add("token_threshold", "probability above which a drafted token is accepted; likewise", **number)
    add("tokens_per_step", "mdm, bd3: tokens that a pass commits however unsure it is of them", **whole)
    add("cache", "mdm: keys and values that are kept while a block is filled", choices=mdm.CACHES)
    add(
        "recompute",
        "refusion: compute keys and values of slots that were infilled together once more, each token seeing "
        "all before it",
        action="store_true",
        default=None,
    )
    add("temperature", "of the drafts, 0 is greedy", **number)
    add("seed", "of the drafts when temperature is above 0", **whole)
    parser.add_argument(
        "--ahead",
        **whole,
        help="refusion: tokens up to which passes of a request are filled with predictions ahead of need; 0 "
        "feeds one phase a pass, as the authors do (default: what costs the device next to nothing)",
    )


def _default(setting: str) -> str:
    """The default of a setting, as --help shows it; that of each method where they differ."""
    by_method = {
        name: method.settings[setting] for name, method in METHODS.items() if setting in method.settings
    }
    values = set(by_method.values())
    return f"(default {values.pop() if len(values) == 1 else by_method})"


class Opened(NamedTuple):
    """A model ready to serve requests, in `scope`."""

    model: Transformer
    params: Any
    tokenizer: Tokenizer
    defaults: Defaults
    mesh: jax.sharding.Mesh | None

    def scope(self) -> contextlib.AbstractContextManager:
        """Within it decoding takes the devices that hold the parameters."""
        return decoding_scope(self.model, self.mesh)


def open_model(flags: argparse.Namespace) -> Opened:
    """The model and default settings that the decoding flags name."""
    if flags.batch_size < 1:
        raise BadInput(f"--batch_size must be at least 1 request, found {flags.batch_size}")
    if flags.ahead is not None and not 0 <= flags.ahead <= MOST_BLOCK_TOKENS:
        raise BadInput(f"--ahead must be 0 to {MOST_BLOCK_TOKENS} tokens, found {flags.ahead}")
    use_compilation_cache()
    on_cpu = jax.default_backend() == "cpu"
    dtype = DTYPES[flags.dtype or ("float32" if on_cpu else "bfloat16")]
    mesh = None if flags.tensor == 1 else sharding.tensor_mesh(flags.tensor)
    model, params, tokenizer = load(flags.checkpoint, mesh, dtype, flags.int8)
    method = asked_method(flags)
    settings = asked_settings(flags, method)
    if method != "ar" and tokenizer.mask_id is None:
        raise BadInput(f"{flags.checkpoint}: {MASK_MISSING}")
    template = {} if flags.enable_thinking is None else {"enable_thinking": flags.enable_thinking == "true"}
    defaults = Defaults(method, settings, flags.raw, template, tuple(flags.stop), flags.ahead)
    return Opened(model, params, tokenizer, defaults, mesh)


def open_by(arguments: Sequence[str]) -> Opened:
    """The model and default settings that these decoding flags name, as on a command line."""
    parser = Parser()
    add_decoding_flags(parser)
    return open_model(parser.parse_args(arguments))


def asked_method(flags: argparse.Namespace) -> str:
    """How to decode: --method, or what the checkpoint was trained for.

    Raises:
      BadInput: the checkpoint was trained for something else, or cannot be read.
    """
    method = flags.method or hf.objective(flags.checkpoint)
    if method not in METHODS:
        where = f"{flags.checkpoint}/config.json: objective"
        raise BadInput(f"{where} must be one of {', '.join(METHODS)}, found {method!r}")
    return method


def asked_settings(flags: argparse.Namespace, method: str) -> dict[str, Any]:
    """What the method is told: the flags given, in place of the defaults of checkpoint and method.

    Raises:
      BadInput: a flag is given that the method does not know.
    """
    known, given = METHODS[method].settings, given_settings(flags)
    for name in given:
        if name not in known:
            having = [other for other in METHODS if name in METHODS[other].settings]
            raise BadInput(f"--{name} is for --method={' or '.join(having)} alone, found --method={method}")
    trained = {}
    if method == "ar":
        trained["first_token"] = hf.first_token(flags.checkpoint)
    if method == "bd3" and (block_len := hf.block_len(flags.checkpoint)) is not None:
        trained["block_len"] = block_len
    return known | trained | given


def given_settings(flags: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags were given for."""
    found = {name: value for name, value in vars(flags).items() if name in serving.SETTINGS}
    return {name: value for name, value in found.items() if value is not None}


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or ~/.cache/refusion_jax."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "refusion_jax"))
