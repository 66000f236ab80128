"""The command-line flags of the commands that decode. Imports no JAX, so that `--help` is fast."""

import argparse
from typing import Any

from refusion_jax.baselines.decoders.config import CACHES, FIRST_TOKENS
from refusion_jax.decode.config import SEMANTICS, SLOT_SCORES
from refusion_jax.files import SMALL
from refusion_jax.serving.methods import METHODS, SETTINGS, default_settings

DTYPES = ("bfloat16", "float32")


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose the model and how it decodes."""
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        default=str(SMALL),
        help="model folder, in Hugging Face format or written by train "
        "(default: the small model that comes with the package)",
    )
    add("--method", choices=tuple(METHODS), help="decoding method (default: that of the training objective)")
    add_setting_flags(parser)
    add(
        "--semantics",
        choices=SEMANTICS,
        help="refusion: release reproduces the authors' code exactly, its mistakes included (default fixed)",
    )
    add(
        "--first_token",
        choices=FIRST_TOKENS,
        help="ar: read the first response token from the last prompt token (next) or from a mask token after "
        "the prompt (mask) (default: as the checkpoint's training objective has it)",
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
        help="devices that split each matrix product, by tensor parallelism (default %(default)s)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of weights and computation (default bfloat16; float32 on a CPU)",
    )
    add(
        "--int8",
        action="store_true",
        help="quantize the weights to int8, with one scale per output channel; for decoding only",
    )
    add("--raw", action="store_true", help="feed a text prompt as it is, without the chat template")
    add(
        "--enable_thinking",
        choices=("true", "false"),
        help="passed to the chat template (default: not passed; Qwen3's template then lets the model think)",
    )
    add("--stop", metavar="TEXT", action="append", default=[], help="end the text before TEXT; repeatable")


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per setting of the methods, and --ahead. A flag that is not given has the value None."""

    def add(setting: str, help: str, **how: Any) -> None:
        parser.add_argument(f"--{setting}", help=f"{help} {_default(setting)}", **how)

    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    add("gen_length", "the most response tokens", **whole)
    add("slot_size", "refusion: tokens per slot", **whole)
    add(
        "num_blocks",
        "refusion, mdm: blocks decoded left to right; gen_length must be a multiple of num_blocks, for "
        "refusion of num_blocks x slot_size",
        **whole,
    )
    add(
        "block_len",
        "bd3: tokens per block; gen_length must be a multiple; a value in the checkpoint replaces the "
        "default",
        **whole,
    )
    add(
        "slot_threshold",
        "refusion: score, from 0 to 1, above which a slot is chosen; below 0 chooses every slot, 1 or more "
        "none",
        **number,
    )
    add(
        "slot_score",
        "refusion: score of a slot: the probability of the draft of its first token, the mean probability of "
        "the drafts of all its tokens, or exp(-H) with H their mean entropy in nats",
        choices=SLOT_SCORES,
    )
    add(
        "token_threshold",
        "probability above which a drafted token is accepted; below 0 accepts every token, 1 or more none",
        **number,
    )
    add("tokens_per_step", "mdm, bd3: tokens that a pass commits whatever their probability", **whole)
    add("cache", "mdm: keys and values that are cached while a block is filled", choices=CACHES)
    add(
        "recompute",
        "refusion: compute the keys and values of slots that were infilled together again, each token seeing "
        "all tokens before it",
        action="store_true",
        default=None,
    )
    add("temperature", "sampling temperature of the drafts; 0 is greedy", **number)
    add("seed", "random seed of the drafts when temperature is above 0", **whole)
    parser.add_argument(
        "--ahead",
        **whole,
        help="refusion: number of tokens up to which a request's passes are filled with speculative tokens; "
        "0 feeds one phase per pass, as the authors do (default: as many as cost the device almost no time)",
    )


def _default(setting: str) -> str:
    """The default of a setting as --help shows it; listed per method where methods differ."""
    methods_by_value: dict[Any, list[str]] = {}
    for method in METHODS:
        if setting in (settings := default_settings(method)):
            methods_by_value.setdefault(settings[setting], []).append(method)
    if len(methods_by_value) == 1:
        return f"(default {next(iter(methods_by_value))})"
    parts = [f"{value} for {' and '.join(methods)}" for value, methods in methods_by_value.items()]
    return f"(default {', '.join(parts)})"


def given_settings(flags: argparse.Namespace) -> dict[str, Any]:
    """The method settings that were given as flags, by name."""
    found = {name: value for name, value in vars(flags).items() if name in SETTINGS}
    return {name: value for name, value in found.items() if value is not None}
