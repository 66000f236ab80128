"""Command-line flags of decoding, shared by the commands that decode. Imports no JAX: `--help` is fast."""

import argparse
from typing import Any

from refusion_jax.baselines.decoders.config import CACHES, FIRST_TOKENS
from refusion_jax.decode.config import SEMANTICS, SLOT_SCORES
from refusion_jax.files import SMALL
from refusion_jax.serving.methods import METHODS, SETTINGS, default_settings

DTYPES = ("bfloat16", "float32")


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
        choices=FIRST_TOKENS,
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
        choices=DTYPES,
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
    add("cache", "mdm: keys and values that are kept while a block is filled", choices=CACHES)
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
    """The default of a setting, as --help shows it; by method where they differ."""
    methods_by_value: dict[Any, list[str]] = {}
    for method in METHODS:
        if setting in (settings := default_settings(method)):
            methods_by_value.setdefault(settings[setting], []).append(method)
    if len(methods_by_value) == 1:
        return f"(default {next(iter(methods_by_value))})"
    parts = [f"{value} for {' and '.join(methods)}" for value, methods in methods_by_value.items()]
    return f"(default {', '.join(parts)})"


def given_settings(flags: argparse.Namespace) -> dict[str, Any]:
    """The settings that flags were given for."""
    found = {name: value for name, value in vars(flags).items() if name in SETTINGS}
    return {name: value for name, value in found.items() if value is not None}
