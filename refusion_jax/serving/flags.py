"""The command-line flags of the commands that decode. Imports no JAX, so that `--help` is fast."""

import argparse
from typing import Any

from refusion_jax.baselines.decoders.config import CACHES
from refusion_jax.config import DTYPES
from refusion_jax.decode.config import DRAFT_FROM, SEMANTICS, SLOT_SCORES
from refusion_jax.files import SMALL
from refusion_jax.model.reading import BORDERS, FIRST_TOKENS, VERIFY
from refusion_jax.serving.methods import METHODS, SETTINGS, default_settings


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose the model and how it decodes, shared by the commands that decode."""
    add = parser.add_argument
    add(
        "--checkpoint",
        metavar="DIR",
        default=str(SMALL),
        help="model folder: a Hugging Face folder, or one that train or convert wrote "
        "(default: the small model that comes with the package)",
    )
    add(
        "--method",
        choices=tuple(METHODS),
        help="decoding method (default: the one the checkpoint was trained for)",
    )
    add_setting_flags(parser)
    add(
        "--semantics",
        choices=SEMANTICS,
        help="refusion: release reproduces the authors' code bit for bit, mistakes included (default fixed)",
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
        help="devices that every matrix product is split over (default %(default)s)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of weights and computation (default bfloat16, on a CPU float32)",
    )
    add(
        "--int8",
        action="store_true",
        help="quantise the weights to int8, with one scale per output channel",
    )
    add("--raw", action="store_true", help="feed text prompts as they are, without the chat template")
    add(
        "--enable_thinking",
        choices=("true", "false"),
        help="passed to the chat template (default: not passed; Qwen3's template then lets the model think)",
    )
    add("--stop", metavar="TEXT", action="append", default=[], help="cut the answer before TEXT; repeatable")


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of the methods, and --ahead. A flag not given is None: the method's default."""

    def add(setting: str, help: str, **how: Any) -> None:
        parser.add_argument(f"--{setting}", help=f"{help} {_default(setting)}", **how)

    whole: dict[str, Any] = {"type": int, "metavar": "N"}
    number: dict[str, Any] = {"type": float, "metavar": "X"}
    add("gen_length", "maximum response length in tokens, EOS included", **whole)
    add("slot_size", "refusion: tokens per slot", **whole)
    add(
        "num_blocks",
        "refusion, mdm: blocks, decoded left to right; gen_length must be a multiple of num_blocks, for "
        "refusion of num_blocks x slot_size",
        **whole,
    )
    add(
        "block_len",
        "bd3: tokens per block, used if the checkpoint states none; gen_length must be a multiple",
        **whole,
    )
    add(
        "slot_threshold",
        "refusion: a slot is planned if its score is above this; below 0 always, 1 and above never",
        **number,
    )
    add(
        "slot_score",
        "refusion: score of a slot: probability of the draft of its first token, mean probability of all its "
        "drafts, or exp(-mean entropy)",
        choices=SLOT_SCORES,
    )
    add(
        "token_threshold",
        "a drafted token is accepted if its probability is above this; below 0 always, 1 and above never",
        **number,
    )
    add("tokens_per_step", "mdm, bd3: tokens committed per forward pass whatever their probability", **whole)
    add("cache", "mdm: which keys and values are reused while a block is filled", choices=CACHES)
    add(
        "recompute",
        "refusion: recompute the keys and values of slots infilled in parallel, each token attending to all "
        "tokens before it",
        action="store_true",
        default=None,
    )
    add("temperature", "sampling temperature of the drafts; 0 is greedy", **number)
    add("seed", "seed of the drafts if temperature is above 0", **whole)
    _add_exact_flags(parser)
    parser.add_argument(
        "--ahead",
        **whole,
        help="refusion: fill each pass of a request with speculative tokens up to this many; 0 feeds one "
        "phase per pass, as the authors do; verify exact: mask tokens beside the drafts (default: the number "
        "that costs the device next to nothing)",
    )


def _add_exact_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the settings of exact verification; some are also for ar."""
    parser.add_argument(
        "--verify",
        choices=VERIFY,
        help="refusion: accept drafts by the thresholds, or only where the model read left to right chooses "
        "the same tokens (exact): the answers are those of --method=ar, and the slot settings do not apply "
        "(default: as the checkpoint was trained)",
    )
    parser.add_argument(
        "--first_token",
        choices=FIRST_TOKENS,
        help="ar, verify exact: read the first response token off the last prompt token (next) or off a mask "
        "token (mask) (default: as the checkpoint was trained)",
    )
    parser.add_argument(
        "--border",
        choices=BORDERS,
        help="ar, verify exact: read response tokens at borders of slots of every size off the token before "
        "(ar) or off a mask token (draft) (default: as the checkpoint's config.json says, else ar)",
    )
    parser.add_argument(
        "--draft_length",
        type=int,
        metavar="N",
        help=f"verify exact: most drafts that a pass verifies {_default('draft_length')}",
    )
    parser.add_argument(
        "--draft_from",
        choices=DRAFT_FROM,
        help="verify exact: draft with mask tokens, or look drafts up in the prompt and the answer so far "
        f"{_default('draft_from')}",
    )


def add_resume_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --resume and --overwrite."""
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the results that an earlier run with the same model, settings and requests left in "
        "--output, and decode the others",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")


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
