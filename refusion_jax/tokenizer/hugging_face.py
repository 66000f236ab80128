"""Tokenizers that are pipelines of the `tokenizers` library."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from refusion_jax.errors import BadInput
from refusion_jax.files import parse_json, read_text, write_atomically
from refusion_jax.tokenizer.base import TemplatedTokenizer
from refusion_jax.tokenizer.settings import SETTINGS, SpecialIds, added_tokens_decoder, special_texts

FILE = "tokenizer.json"


class HuggingFaceTokenizer(TemplatedTokenizer):
    """A `tokenizers.Tokenizer` (byte-level BPE, WordLevel, ...) and its settings."""

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialIds, settings: Mapping[str, Any]):
        super().__init__(highest_id(backend) + 1, special, _begin(backend), settings)
        self._backend = backend

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def _id_to_token(self, index: int) -> str | None:
        return self._backend.id_to_token(index) if index >= 0 else None

    def _token_to_id(self, text: str) -> int | None:
        return self._backend.token_to_id(text)

    def _with_token(
        self, special: SpecialIds, settings: Mapping[str, Any], text: str, index: int
    ) -> "HuggingFaceTokenizer":
        token = AddedToken(text, special=True, normalized=False)
        backend = add_tokens(tokenizers.Tokenizer.from_str(self._backend.to_str()), {index: token})
        return HuggingFaceTokenizer(backend, special, settings)

    @property
    def _is_qwen(self) -> bool:
        return self._settings.get("tokenizer_class") in ("Qwen2Tokenizer", "Qwen2TokenizerFast")

    def _saved_settings(self) -> dict[str, Any]:
        return {
            "added_tokens_decoder": added_tokens_decoder(self._backend.get_added_tokens_decoder()),
            "clean_up_tokenization_spaces": self._settings.get("clean_up_tokenization_spaces", False),
            # Tokenizer classes named after a model rebuild that model's usual pipeline and ignore parts of
            # tokenizer.json (GPT2Tokenizer, which SmolLM2 names, ignores its split of digits).
            # PreTrainedTokenizerFast uses the file as it is. Qwen2Tokenizer gives the same ids, and has a
            # version that reads vocab.json and merges.txt.
            "tokenizer_class": "Qwen2Tokenizer" if self._is_qwen else "PreTrainedTokenizerFast",
        }

    def _save_vocabulary(self, folder: Path) -> None:
        write_atomically(folder / FILE, self._backend.to_str(pretty=True))
        if self._is_qwen:
            # vocab.json and merges.txt too: the authors' code loads them.
            with tempfile.TemporaryDirectory() as temporary:
                for path in map(Path, self._backend.model.save(temporary)):
                    write_atomically(folder / path.name, path.read_bytes())


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """The pipeline in a tokenizer.json. Raises BadInput if the file cannot be read or is inconsistent."""
    text = read_text(path)
    raw = parse_json(text, path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    # The bindings raise bare `Exception`; nothing narrower can be caught.
    except Exception as error:
        raise BadInput(f"{path}: not a tokenizer.json that can be read: {error}") from error
    # A file may contain the padding and truncation that were set when it was saved; ids must not depend on
    # them.
    backend.no_padding()
    backend.no_truncation()
    vocab = raw["model"].get("vocab")
    if isinstance(vocab, dict) and len(set(vocab.values())) < len(vocab):
        raise BadInput(f"{path}: model.vocab gives one id to several tokens")
    for token in raw.get("added_tokens") or []:
        # The library numbers added tokens consecutively after the vocabulary and ignores the ids in the file.
        if (index := backend.token_to_id(token["content"])) != token["id"]:
            raise BadInput(
                f"{path}: added token {token['content']!r} has id {token['id']}, expected {index}, the "
                "next after the vocabulary"
            )
    return backend


def add_tokens(backend: tokenizers.Tokenizer, tokens: Mapping[int, AddedToken]) -> tokenizers.Tokenizer:
    """Adds tokens with the given ids to a pipeline. `backend` may be changed; use the returned pipeline.

    Raises:
      BadInput: a token cannot have its id.
    """
    before = backend.get_vocab(with_added_tokens=True)
    wanted = before | {token.content: index for index, token in tokens.items()}
    holders = {index: text for text, index in before.items()}
    for index, token in tokens.items():
        if holders.get(index, token.content) != token.content:
            raise BadInput(f"added token {token.content!r} has the id {index} of {holders[index]!r}")
        if before.get(token.content, index) != index:
            had = before[token.content]
            raise BadInput(f"added token {token.content!r} has the id {index}, in the vocabulary it is {had}")
    if max(wanted.values(), default=-1) >= len(wanted):
        # The library numbers added tokens consecutively after the model's vocabulary. If the wanted ids leave
        # a gap, the tokens keep them only as entries of that vocabulary.
        state = json.loads(backend.to_str())
        if isinstance(state["model"].get("vocab"), dict):
            state["model"]["vocab"] = wanted
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.add_tokens([tokens[index] for index in sorted(tokens)])
    after = backend.get_vocab(with_added_tokens=True)
    if after != wanted:
        text = next(text for text, index in wanted.items() if after.get(text) != index)
        raise BadInput(f"added token {text!r} cannot have the id {wanted[text]}, only {after.get(text)}")
    return backend


def complete(
    folder: Path,
    backend: tokenizers.Tokenizer,
    recorded: Mapping[int, AddedToken],
    settings: Mapping[str, Any],
) -> tokenizers.Tokenizer:
    """Adds to a folder's pipeline the tokens `recorded` outside it and the special tokens of its settings.

    A special token to which no file gives an id is left out: the model has no row for it.
    """
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = {index: token for index, token in recorded.items() if token.content not in present}
    present |= {token.content for token in recorded.values()}
    for text in special_texts(settings) - present:
        if (index := backend.token_to_id(text)) is not None:
            missing[index] = AddedToken(text, special=True, normalized=False)
    try:
        return add_tokens(backend, missing) if missing else backend
    except BadInput as error:
        raise BadInput(f"{folder / SETTINGS}: added_tokens_decoder: {error}") from None


def highest_id(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _begin(backend: tokenizers.Tokenizer) -> list[int]:
    """Ids of the tokens that the pipeline's post-processor puts before a text.

    Tokens that it puts after a text (EOS) are ignored, since the model continues the prompt.
    """
    if backend.post_processor is None:
        return []
    probe = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    probe.post_processor = backend.post_processor
    encoding = probe.encode("a")
    return encoding.ids[: encoding.special_tokens_mask.index(0)]
