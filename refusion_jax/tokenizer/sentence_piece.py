"""Tokenizers that are SentencePiece models."""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken

from refusion_jax.errors import BadInput
from refusion_jax.files import write_atomically
from refusion_jax.tokenizer.base import TemplatedTokenizer
from refusion_jax.tokenizer.settings import (
    SENTENCE_PIECE,
    SETTINGS,
    SpecialIds,
    added_tokens_decoder,
    find_special_ids,
    read_added_tokens,
)

Piece = ModelProto.SentencePiece


class SentencePieceTokenizer(TemplatedTokenizer):
    """A SentencePiece model, the tokens added to it, and its settings.

    SentencePiece never produces control symbols (`</s>`, ...) from text, but chat templates write them as
    text. So text is first split at control symbols and added tokens, and the segments between them are
    encoded by SentencePiece. The space that SentencePiece prepends to a text is added to every segment, or,
    if `legacy` is false in the settings, only at the start of the text, as in the Llama tokenizers of
    `transformers`.
    """

    def __init__(
        self,
        model: ModelProto,
        added: Mapping[int, AddedToken],
        special: SpecialIds,
        settings: Mapping[str, Any],
    ):
        self._model = model
        self._added = dict(added)
        bos = [] if special.bos is None or not _adds_bos(settings) else [special.bos]
        super().__init__(max([len(model.pieces), *(i + 1 for i in added)]), special, bos, settings)
        self._first = _processor(model)
        inner = ModelProto.FromString(model.SerializeToString())
        inner.normalizer_spec.add_dummy_prefix = False
        self._inner = _processor(inner)
        self._later = self._first if _is_legacy(settings) else self._inner
        marks = {
            piece.piece: i
            for i, piece in enumerate(model.pieces)
            if piece.type in (Piece.UNKNOWN, Piece.CONTROL, Piece.USER_DEFINED)
        }
        marks |= {self._id_to_token(i): i for i in (*special.roles().values(), *added)}
        self._marks = {text: i for text, i in marks.items() if text is not None}
        longest_first = sorted(self._marks, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids = []
        # Splitting gives segment, mark, segment, ..., segment.
        for number, part in enumerate(self._split(text)):
            if number % 2:
                ids.append(self._marks[part])
            elif part:
                ids += (self._later if number else self._first).encode(part)
        return ids

    def _decode(self, ids: list[int]) -> str:
        ids = [i for i in ids if not self._is_special(i)]
        text = ""
        for is_added, run in itertools.groupby(ids, lambda i: i in self._added):
            if is_added:
                text += "".join(self._added[i].content for i in run)
            else:  # only a space at the start of the text was added by SentencePiece
                processor = self._inner if text else self._first
                text += processor.decode([i for i in run if i < len(self._model.pieces)])
        return text

    def _is_special(self, index: int) -> bool:
        if index in self._added:
            return self._added[index].special
        inside = index < len(self._model.pieces)
        return inside and self._model.pieces[index].type in (Piece.UNKNOWN, Piece.CONTROL)

    def _id_to_token(self, index: int) -> str | None:
        if index in self._added:
            return self._added[index].content
        return self._model.pieces[index].piece if 0 <= index < len(self._model.pieces) else None

    def _token_to_id(self, text: str) -> int | None:
        return _token_to_id(self._first, self._added, text)

    def _with_token(
        self, special: SpecialIds, settings: Mapping[str, Any], text: str, index: int
    ) -> "SentencePieceTokenizer":
        token = AddedToken(text, special=True, normalized=False)
        return SentencePieceTokenizer(self._model, {**self._added, index: token}, special, settings)

    def _saved_settings(self) -> dict[str, Any]:
        return {
            "add_bos_token": _adds_bos(self._settings),
            "added_tokens_decoder": added_tokens_decoder(self._added),
            "clean_up_tokenization_spaces": self._settings.get("clean_up_tokenization_spaces", False),
            "legacy": _is_legacy(self._settings),
            "tokenizer_class": self._settings.get("tokenizer_class", "LlamaTokenizer"),
        }

    def _save_vocabulary(self, folder: Path) -> None:
        write_atomically(folder / SENTENCE_PIECE, self._model.SerializeToString())


def load(folder: Path, settings: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The SentencePiece tokenizer of a folder; see `load_tokenizer`."""
    path = folder / SENTENCE_PIECE
    try:
        model = ModelProto.FromString(path.read_bytes())
        processor = _processor(model)
    except (OSError, DecodeError, RuntimeError) as error:
        raise BadInput(f"{path}: not a SentencePiece model that can be read: {error}") from error
    added = {}
    for index, token in read_added_tokens(folder, settings).items():
        if index >= len(model.pieces):
            added[index] = token
        elif model.pieces[index].piece != token.content:
            raise BadInput(
                f"{folder / SETTINGS}: added token {token.content!r} has the id {index}, "
                f"which in {SENTENCE_PIECE} is {model.pieces[index].piece!r}"
            )
        if token.lstrip or token.rstrip or token.single_word:
            raise BadInput(
                f"{folder / SETTINGS}: added token {token.content!r} has lstrip, rstrip or single_word set, "
                f"which needs a tokenizer.json"
            )
    own = {"eos": processor.eos_id(), "bos": processor.bos_id(), "pad": processor.pad_id()}
    special = find_special_ids(
        folder,
        settings,
        max([len(model.pieces), *(index + 1 for index in added)]),
        lambda text: _token_to_id(processor, added, text),
        {role: index for role, index in own.items() if index >= 0},
    )
    return SentencePieceTokenizer(model, added, special, settings)


def _processor(model: ModelProto) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.load_from_serialized_proto(model.SerializeToString())
    return processor


def _token_to_id(
    processor: sentencepiece.SentencePieceProcessor, added: Mapping[int, AddedToken], text: str
) -> int | None:
    for index, token in added.items():
        if token.content == text:
            return index
    index = processor.piece_to_id(text)  # the unknown id if the text is not in the vocabulary
    return index if processor.id_to_piece(index) == text else None


def _is_legacy(settings: Mapping[str, Any]) -> bool:
    return settings.get("legacy") is not False  # old settings have null


def _adds_bos(settings: Mapping[str, Any]) -> bool:
    """Whether BOS precedes a text: `add_bos_token`; its default is true for the Llama class only."""
    is_llama = str(settings.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer"
    return bool(settings.get("add_bos_token", is_llama))
