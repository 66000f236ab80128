"""The tokenizer inside a GGUF file."""

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import bpe
from refusion_jax.tokenizer.base import Tokenizer
from refusion_jax.tokenizer.hugging_face import HuggingFaceTokenizer, add_tokens
from refusion_jax.tokenizer.sentence_piece import ModelProto, SentencePieceTokenizer
from refusion_jax.tokenizer.settings import SpecialIds

if TYPE_CHECKING:
    from refusion_jax.checkpoints.gguf_file import GGUFFile

# Types of tokens, with the same numbers as in SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ROLES = {"eos": "eos", "bos": "bos", "pad": "padding", "unk": "unknown", "mask": "mask"}


def load_gguf_tokenizer(file: "GGUFFile") -> Tokenizer:
    """Loads the tokenizer of a GGUF file: byte-level BPE or a SentencePiece model.

    It gives the ids of the tokenizer that the file was converted from, provided that its split of text into
    words is in `bpe.WORDS`. Padding tokens at the end of the vocabulary are left out. `save` writes Hugging
    Face's layout.

    Raises:
      BadInput: a field is missing, malformed or of an unknown kind. The message names file and field.
    """
    kind = file.need("tokenizer.ggml.model", str)
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in builders:
        raise BadInput(f"{file.path}: tokenizer.ggml.model is {kind!r}, expected {' or '.join(builders)}")
    vocabulary = _Vocabulary(file)
    settings = {f"{role}_token": text for role, text in vocabulary.roles.items()}
    settings["clean_up_tokenization_spaces"] = False
    if (template := file.get("tokenizer.chat_template", str)) is not None:
        settings["chat_template"] = template
    return builders[kind](file, vocabulary, settings)


class _Vocabulary:
    """The vocabulary of a GGUF file, without the padding at its end.

    Attributes:
      tokens: text of each token, by id.
      kinds: type of each token, by id.
      ids: text -> id.
      roles: role, a key of ROLES -> text of its token.
    """

    def __init__(self, file: "GGUFFile"):
        self.tokens = file.need("tokenizer.ggml.tokens", list, str)
        self.kinds = file.need("tokenizer.ggml.token_type", list, int)
        where = f"{file.path}: tokenizer.ggml"
        if len(self.kinds) != len(self.tokens):
            raise BadInput(f"{where}.token_type has {len(self.kinds)} entries for {len(self.tokens)} tokens")
        while self.kinds and self.kinds[-1] == UNUSED:
            self.kinds.pop()
            self.tokens.pop()
        self.ids: dict[str, int] = {}
        for index, token in enumerate(self.tokens):
            if (first := self.ids.setdefault(token, index)) != index:
                raise BadInput(f"{where}.tokens has {token!r} twice, with ids {first} and {index}")
        found = {role: file.get(f"tokenizer.ggml.{name}_token_id", int) for role, name in ROLES.items()}
        self.roles: dict[str, str] = {}
        for role, index in found.items():
            if index is None:
                continue
            if not 0 <= index < len(self.tokens):
                raise BadInput(
                    f"{where}.{ROLES[role]}_token_id is {index}, expected 0 to {len(self.tokens) - 1}"
                )
            self.roles[role] = self.tokens[index]
        if "eos" not in self.roles:
            raise BadInput(f"{where}.eos_token_id is missing")

    @property
    def special(self) -> SpecialIds:
        return SpecialIds(**{role: self.ids[text] for role, text in self.roles.items() if role != "unk"})


def _byte_level(file: "GGUFFile", vocabulary: _Vocabulary, settings: dict[str, Any]) -> HuggingFaceTokenizer:
    name = file.need("tokenizer.ggml.pre", str)
    words = bpe.WORDS.get(name)
    if words is None:
        raise BadInput(f"{file.path}: tokenizer.ggml.pre is {name!r}, expected {', '.join(bpe.WORDS)}")
    merges = [
        bpe.parse_merge(merge, f"{file.path}: tokenizer.ggml.merges[{number}]", vocabulary.ids)
        for number, merge in enumerate(file.need("tokenizer.ggml.merges", list, str))
    ]
    backend = bpe.byte_level_bpe(vocabulary.ids, merges, words)
    added = {
        index: AddedToken(token, special=kind == CONTROL, normalized=False)
        for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    }
    backend = add_tokens(backend, added)
    settings |= _add_flags(file, bos=name == "llama-bpe")
    bpe.surround(backend, settings)
    if words == bpe.WORDS[bpe.CLASSES["Qwen2Tokenizer"]]:
        settings["tokenizer_class"] = "Qwen2Tokenizer"
    return HuggingFaceTokenizer(backend, vocabulary.special, settings)


def _sentence_piece(
    file: "GGUFFile", vocabulary: _Vocabulary, settings: dict[str, Any]
) -> SentencePieceTokenizer:
    scores = file.need("tokenizer.ggml.scores", list, float)
    if len(scores) < len(vocabulary.tokens):
        raise BadInput(
            f"{file.path}: tokenizer.ggml.scores has {len(scores)} entries for "
            f"{len(vocabulary.tokens)} tokens"
        )
    if not set(vocabulary.kinds) <= set(range(NORMAL, BYTE + 1)):
        raise BadInput(f"{file.path}: tokenizer.ggml.token_type has numbers outside {NORMAL} to {BYTE}")
    model = ModelProto()
    for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, scores, strict=False):
        model.pieces.add(piece=token, type=kind, score=score)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = BYTE in vocabulary.kinds
    for role in ("unk", "bos", "eos", "pad"):
        text = vocabulary.roles.get(role)
        setattr(model.trainer_spec, f"{role}_id", -1 if text is None else vocabulary.ids[text])
        if text is not None:
            setattr(model.trainer_spec, f"{role}_piece", text)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool)
    model.normalizer_spec.add_dummy_prefix = True if prefix is None else prefix
    settings |= _add_flags(file, bos=True)
    settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    return SentencePieceTokenizer(model, {}, vocabulary.special, settings)


def _add_flags(file: "GGUFFile", bos: bool) -> dict[str, bool]:
    """The settings add_bos_token and add_eos_token; the defaults of llama.cpp if the file lacks them."""
    flags = {"add_bos_token": bos, "add_eos_token": False}
    found = {name: file.get(f"tokenizer.ggml.{name}", bool) for name in flags}
    return flags | {name: value for name, value in found.items() if value is not None}
