"""Text to token ids and back, behind one interface.

Three kinds: `tokenizers` pipelines (tokenizer.json, or vocab.json and merges.txt), SentencePiece models
(tokenizer.model) and plain bytes. The kind is read from the files by `load_tokenizer` and
`load_gguf_tokenizer`; nothing else in the package asks which one it has.
"""

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
