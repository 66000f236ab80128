"""Byte-level BPE from a vocabulary and a list of merges, as in vocab.json + merges.txt and in GGUF files.

These formats do not say how text is split into words before merging (pre-tokenisation). That depends on the
model that the vocabulary was made for, and a wrong guess gives other ids without an error. So the split is
looked up by name in `WORDS`, and an unknown name is an error.
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
    """How text is split into words.

    Attributes:
      patterns: regular expressions, applied in turn; each isolates its matches.
      nfc: normalise the text to Unicode NFC first.
      whole: a word that is in the vocabulary becomes that token, without applying merges.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole: bool = False


# Keys are the names in GGUF files.
WORDS = {
    "gpt-2": Words((_GPT2,)),
    "smollm": Words((r"\p{N}", _GPT2)),
    "qwen2": Words((_CONTRACTIONS + _WORD + r"|\p{N}" + _AFTER_DIGITS,), nfc=True),
    "llama-bpe": Words((_CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _AFTER_DIGITS,), whole=True),
    # The split of llama.cpp for files without a specific name.
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
# Tokenizer class of `transformers`, without the suffix Fast -> key of WORDS.
CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}


def byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], words: Words
) -> tokenizers.Tokenizer:
    """A pipeline for byte-level BPE; the vocabulary and merges must be consistent."""
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
    """Adds BOS before and EOS after a text as set by `add_bos_token` and `add_eos_token`.

    Raises:
      BadInput: the vocabulary lacks the token.
    """

    def wanted(role: str) -> list[str]:
        text = token_text(settings.get(f"{role}_token"))
        return [text] if text and settings.get(f"add_{role}_token") else []

    before, after = wanted("bos"), wanted("eos")
    for text in (*before, *after):
        if backend.token_to_id(text) is None:
            raise BadInput(f"{SETTINGS}: {text!r}, which is added to every text, is not in the vocabulary")
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(text, backend.token_to_id(text)) for text in {*before, *after}],
        )


def read_bpe(folder: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The pipeline of a folder with vocab.json and merges.txt.

    Raises:
      BadInput: a file is missing or malformed, an id is missing or used twice, a merge needs a token that is
        not in the vocabulary, or the settings do not name a tokenizer class in CLASSES.
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
    """The two tokens of a merge. Raises BadInput, starting with `where`, if the vocabulary lacks a token."""
    pair = tuple(line.split(" "))
    if len(pair) != 2:
        raise BadInput(f"{where}: {line!r} is no merge, expected two tokens with a space between")
    for token in (*pair, "".join(pair)):
        if token not in vocab:
            raise BadInput(f"{where}: merge {line!r} needs {token!r}, which is not in the vocabulary")
    return pair
