"""Byte-level BPE from a list of tokens and a list of merges: what vocab.json + merges.txt and a GGUF hold.

Neither says how text is cut into words before it is merged; that depends on the model the vocabulary was
made for, and a wrong guess gives other ids without an error. So it is looked up, and unknown is refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from refusion_jax.errors import BadInput
from refusion_jax.files import read_json, read_json_if_there, read_text
from refusion_jax.tokenizer.hugging_face import complete
from refusion_jax.tokenizer.settings import SETTINGS, read_added_tokens, token_text

VOCAB, MERGES = "vocab.json", "merges.txt"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"


class Words(NamedTuple):
    """How text becomes words: each pattern in turn cuts out what it matches.

    With `whole`, a word that is a token is taken as it is, whatever the merges would make of it.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole: bool = False


# By the names that GGUF files use.
WORDS = {
    "gpt-2": Words((_GPT2,)),
    "smollm": Words((r"\p{N}", _GPT2)),
    "qwen2": Words((_CONTRACTIONS + _WORD + r"|\p{N}" + _AFTER_DIGITS,), nfc=True),
    "llama-bpe": Words((_CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _AFTER_DIGITS,), whole=True),
    # For files whose maker knew no name; llama.cpp reads them so.
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}  # of `transformers`, with or without Fast


def byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], words: Words
) -> tokenizers.Tokenizer:
    """The pipeline of byte-level BPE; vocabulary and merges must be consistent."""
    model = models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=words.whole)
    backend = tokenizers.Tokenizer(model)
    if words.nfc:
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in words.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def surround(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Sets what the settings want put before and after a text: `add_bos_token`, `add_eos_token`."""

    def wanted(role: str) -> list[str]:
        text = token_text(settings.get(f"{role}_token"))
        return [text] if text and settings.get(f"add_{role}_token") else []

    before, after = wanted("bos"), wanted("eos")
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(text, backend.token_to_id(text)) for text in {*before, *after}],
        )


def read_bpe(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The pipeline of a folder with vocab.json and merges.txt.

    Raises BadInput when a file is missing or malformed, when ids are missing or given twice, when a
    merge names a token that is not there, and when the settings name no tokenizer class we know.
    """
    words = _words_of(folder, settings)
    added = read_added_tokens(folder, settings)
    vocab = _read_vocab(folder / VOCAB, added)
    merges = _read_merges(folder / MERGES, vocab)
    backend = complete(folder, byte_level_bpe(vocab, merges, words), added, settings)
    surround(backend, settings)
    return backend


def _words_of(folder: Path, settings: Mapping[str, Any]) -> Words:
    name = settings.get("tokenizer_class")
    if name is None and read_json_if_there(folder / "config.json").get("model_type") in ("qwen2", "qwen3"):
        name = "Qwen2Tokenizer"
    known = CLASSES.get(name.removesuffix("Fast")) if isinstance(name, str) else None
    if known is None:
        raise BadInput(
            f"{folder / SETTINGS}: tokenizer_class is {name!r}; with {VOCAB} and {MERGES} it must be one of "
            f"{', '.join(CLASSES)}, for any other a tokenizer.json is needed"
        )
    if settings.get("add_prefix_space"):
        raise BadInput(f"{folder / SETTINGS}: add_prefix_space is true, which needs a tokenizer.json")
    return WORDS[known]


def _read_vocab(path: Path, added: Mapping[int, AddedToken]) -> dict[str, int]:
    vocab = read_json(path)
    texts: dict[int, str] = {}
    for text, index in vocab.items():
        if type(index) is not int or index < 0:
            raise BadInput(f"{path}: token {text!r} has the id {index!r}, expected a whole number from 0")
        if index in texts:
            raise BadInput(f"{path}: tokens {texts[index]!r} and {text!r} have the same id {index}")
        texts[index] = text
    missing = next((i for i in range(max(texts, default=0)) if i not in texts and i not in added), None)
    if missing is not None or not texts:
        raise BadInput(f"{path}: no token has the id {missing or 0}")
    return vocab


def _read_merges(path: Path, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    if not path.is_file():
        raise BadInput(f"{path}: no such file, expected the merges of {VOCAB}")
    lines = read_text(path).split("\n")
    numbered = [
        (f"{path}:{number}", line.rstrip("\r"))
        for number, line in enumerate(lines, 1)
        if line.strip() and not (number == 1 and line.startswith("#version"))
    ]
    return [parse_merge(line, where, vocab) for where, line in numbered]


def parse_merge(line: str, where: str, vocab: Mapping[str, int]) -> tuple[str, str]:
    """The two tokens of a merge; raises BadInput, beginning with `where`, unless the vocabulary has them."""
    pair = tuple(line.split(" "))
    if len(pair) != 2:
        raise BadInput(f"{where}: {line!r} is no merge, expected two tokens with a space between")
    for token in (*pair, "".join(pair)):
        if token not in vocab:
            raise BadInput(f"{where}: merge {line!r} needs {token!r}, which is not in the vocabulary")
    return pair
