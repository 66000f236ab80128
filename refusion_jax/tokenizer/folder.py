"""Loads the tokenizer of a model folder, of any kind."""

from pathlib import Path

from refusion_jax.buckets import location
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import bpe, hugging_face
from refusion_jax.tokenizer.base import ByteTokenizer, Tokenizer
from refusion_jax.tokenizer.settings import (
    SENTENCE_PIECE,
    SETTINGS,
    find_special_ids,
    read_added_tokens,
    read_settings,
)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the tokenizer of a model or checkpoint folder.

    The vocabulary is read from tokenizer.json, else from tokenizer.model, else from vocab.json and
    merges.txt; the settings from the files beside it. Special ids come from config.json (`mask_token_id`,
    ...), then from tokenizer_config.json (`mask_token_id`, then `mask_token` as text), then from the
    SentencePiece model.

    Raises:
      BadInput: the folder has no tokenizer, a file is malformed, the EOS id is missing, or an id is outside
        the vocabulary. The message names file and field.
    """
    folder = location(folder)
    settings = read_settings(folder)
    if settings.get("tokenizer_class") == "ByteTokenizer":
        return ByteTokenizer()
    if (folder / SENTENCE_PIECE).is_file() and not (folder / hugging_face.FILE).is_file():
        from refusion_jax.tokenizer import sentence_piece  # imports SentencePiece, which few models need

        return sentence_piece.load(folder, settings)
    if (folder / hugging_face.FILE).is_file():
        backend = hugging_face.read_backend(folder / hugging_face.FILE)
        backend = hugging_face.complete(folder, backend, read_added_tokens(folder, settings), settings)
    elif (folder / bpe.VOCAB).is_file():
        backend = bpe.read_bpe(folder, settings)
    else:
        raise BadInput(
            f"{folder}: no tokenizer found; expected {hugging_face.FILE}, {bpe.VOCAB} and {bpe.MERGES}, "
            f"{SENTENCE_PIECE}, or {SETTINGS} with tokenizer_class ByteTokenizer"
        )
    size = hugging_face.highest_id(backend) + 1
    special = find_special_ids(folder, settings, size, backend.token_to_id)
    return hugging_face.HuggingFaceTokenizer(backend, special, settings)
