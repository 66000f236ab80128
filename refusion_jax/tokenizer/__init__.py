"""Tokenizers: text to token ids and back, and chat templates.

Three kinds have one interface, `Tokenizer`: pipelines of the `tokenizers` library (tokenizer.json, or
vocab.json and merges.txt), SentencePiece models (tokenizer.model) and plain bytes. `load_tokenizer` and
`load_gguf_tokenizer` recognise the kind from the files; no other code depends on it. SentencePiece is
imported only when a tokenizer of that kind is opened. Imports no other folder of the package.
"""

from typing import TYPE_CHECKING

from refusion_jax.deferred import deferred

if TYPE_CHECKING:
    from refusion_jax.tokenizer.base import MASK_MISSING, ByteTokenizer, Tokenizer
    from refusion_jax.tokenizer.folder import load_tokenizer
    from refusion_jax.tokenizer.from_gguf import load_gguf_tokenizer
    from refusion_jax.tokenizer.hugging_face import HuggingFaceTokenizer
    from refusion_jax.tokenizer.sentence_piece import SentencePieceTokenizer

__all__ = [
    "MASK_MISSING",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_gguf_tokenizer",
    "load_tokenizer",
]

__getattr__ = deferred(
    __name__,
    {
        "MASK_MISSING": "refusion_jax.tokenizer.base",
        "ByteTokenizer": "refusion_jax.tokenizer.base",
        "HuggingFaceTokenizer": "refusion_jax.tokenizer.hugging_face",
        "SentencePieceTokenizer": "refusion_jax.tokenizer.sentence_piece",
        "Tokenizer": "refusion_jax.tokenizer.base",
        "load_gguf_tokenizer": "refusion_jax.tokenizer.from_gguf",
        "load_tokenizer": "refusion_jax.tokenizer.folder",
    },
)
