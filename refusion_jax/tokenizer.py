"""Text to token ids and back, behind one interface.

Three kinds: Hugging Face `tokenizer.json`, SentencePiece `tokenizer.model`, and plain bytes. The
kind is read from the folder by `load_tokenizer`; nothing else in the package asks which one it has.
"""

import abc
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from refusion_jax.chat_template import Message, check_messages, compile_template
from refusion_jax.errors import BadInput

SETTINGS = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids with a meaning of their own; `bos` may be absent, a missing `pad` is the EOS id."""

    mask: int
    eos: int
    pad: int
    bos: int | None = None


class Tokenizer(abc.ABC):
    """What the rest of the package knows of a tokenizer.

    `vocab_size` is the tokenizer's own (highest id + 1); the model's table may have more rows.
    `encode` adds no special tokens; `decode` leaves out special ids and ids that have no text.
    """

    def __init__(self, vocab_size: int, special: SpecialIds):
        self.vocab_size = vocab_size
        self.mask_id = special.mask
        self.eos_id = special.eos
        self.pad_id = special.pad  # padding is never attended to, so sharing the EOS id is harmless
        self.bos_id = special.bos

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Raises BadInput when the text cannot be written as UTF-8."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; in parallel where the tokenizer can."""
        for text in texts:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadInput(
                    f"text has a lone surrogate (\\u{ord(text[error.start]):04x}) at character "
                    f"{error.start}: expected valid Unicode"
                ) from None
        return self._encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special ids are skipped, bytes that are not UTF-8 become U+FFFD."""
        special = {self.mask_id, self.eos_id, self.pad_id, self.bos_id}
        ids = (int(i) for i in ids)
        return self._decode([i for i in ids if 0 <= i < self.vocab_size and i not in special])

    def prompt(self, query: str | Sequence[Message], raw: bool = False) -> str:
        """The text a model is fed for `query`, in training and in sampling alike.

        Messages are rendered. A single string is the only user message if there is a chat template
        (and not `raw`), otherwise it is fed as it is.
        """
        if not isinstance(query, str):
            return self.render(query)
        if raw or not self.has_chat_template:
            return query
        return self.render([{"role": "user", "content": query}])

    @property
    @abc.abstractmethod
    def has_chat_template(self) -> bool: ...

    @abc.abstractmethod
    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The prompt text of a conversation; `options` are passed to the chat template."""

    @abc.abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer(folder)` needs to give the same tokenizer."""

    @abc.abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class ByteTokenizer(Tokenizer):
    """256 byte values, then the special tokens. Needs no file."""

    PAD, BOS, EOS, MASK = range(256, 260)

    def __init__(self):
        super().__init__(260, SpecialIds(mask=self.MASK, eos=self.EOS, pad=self.PAD, bos=self.BOS))

    has_chat_template = False  # a single prompt goes in raw; only conversations are rendered

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        turns = (f"{m['role']}: {m['content']}\n" for m in check_messages(messages))
        return "".join(turns) + "assistant: "

    def save(self, folder: str | Path) -> None:
        _write_json(Path(folder) / SETTINGS, {"tokenizer_class": "ByteTokenizer"})

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class _TemplatedTokenizer(Tokenizer):
    """A tokenizer from files, with the settings of its `tokenizer_config.json`."""

    def __init__(self, vocab_size: int, special: SpecialIds, settings: Mapping[str, Any]):
        super().__init__(vocab_size, special)
        self._settings = dict(settings)
        template = settings.get("chat_template")
        self._render = None if template is None else compile_template(template)

    @property
    def has_chat_template(self) -> bool:
        return self._render is not None

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        if self._render is None:
            raise BadInput(
                "messages were given but the tokenizer has no chat_template: give a plain prompt, "
                f"or add a chat_template to {SETTINGS}"
            )
        variables = {**self._token_texts(), "add_generation_prompt": True, **options}
        return self._render(messages, **variables)

    def _token_texts(self) -> dict[str, str]:
        """bos_token, eos_token, …: what a chat template may refer to, as text."""
        texts = {k: _token_text(v) for k, v in self._settings.items() if k.endswith("_token")}
        for name, index in self._special_ids().items():
            if index is not None and (text := self._id_to_token(index)) is not None:
                texts[f"{name}_token"] = text
        return {k: v for k, v in texts.items() if v is not None}

    def _special_ids(self) -> dict[str, int | None]:
        return {"mask": self.mask_id, "eos": self.eos_id, "pad": self.pad_id, "bos": self.bos_id}

    def save(self, folder: str | Path) -> None:
        # By id as well as by text: a mask id may be a spare row of the model that has no text.
        ids = {f"{name}_token_id": index for name, index in self._special_ids().items()}
        _write_json(Path(folder) / SETTINGS, {**self._settings, **self._token_texts(), **ids})
        self._save_vocabulary(Path(folder))

    @abc.abstractmethod
    def _id_to_token(self, index: int) -> str | None: ...

    @abc.abstractmethod
    def _save_vocabulary(self, folder: Path) -> None: ...


class HuggingFaceTokenizer(_TemplatedTokenizer):
    """A `tokenizers.Tokenizer` (byte-level BPE, WordLevel, …) as read from `tokenizer.json`."""

    FILE = "tokenizer.json"

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialIds, settings: Mapping):
        super().__init__(_highest_id(backend) + 1, special, settings)
        self._backend = backend

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def _id_to_token(self, index: int) -> str | None:
        return self._backend.id_to_token(index)

    def _save_vocabulary(self, folder: Path) -> None:
        (folder / self.FILE).write_text(self._backend.to_str(pretty=True), encoding="utf-8")


class SentencePieceTokenizer(_TemplatedTokenizer):
    """A SentencePiece model as read from `tokenizer.model`.

    SentencePiece never produces control symbols (`</s>`, …) from text, but chat templates write
    them as text; so special tokens are split off first and the stretches between are encoded.
    """

    FILE = "tokenizer.model"

    def __init__(
        self,
        backend: sentencepiece.SentencePieceProcessor,
        special: SpecialIds,
        settings: Mapping,
    ):
        super().__init__(backend.get_piece_size(), special, settings)
        self._backend = backend
        names = {self._id_to_token(i): i for i in self._special_ids().values() if i is not None}
        self._special_pieces = {text: i for text, i in names.items() if text is not None}
        longest_first = sorted(self._special_pieces, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[i for part in self._split(text) for i in self._encode(part)] for text in texts]

    def _encode(self, part: str) -> list[int]:
        special = self._special_pieces.get(part)
        return self._backend.encode(part) if special is None else [special]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids)

    def _id_to_token(self, index: int) -> str | None:
        return self._backend.id_to_piece(index) if 0 <= index < self.vocab_size else None

    def _save_vocabulary(self, folder: Path) -> None:
        (folder / self.FILE).write_bytes(self._backend.serialized_model_proto())


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer stored in a model or checkpoint folder.

    Special ids come from config.json (`mask_token_id`, …), then from tokenizer_config.json
    (`mask_token_id`, then `mask_token` as text), then from the SentencePiece model itself.

    Raises BadInput, naming file and field, when the folder holds no tokenizer, a file is malformed,
    the mask or EOS id is missing, or an id lies outside the vocabulary.
    """
    folder = Path(folder)
    settings = _read_json(folder / SETTINGS)
    if settings.get("tokenizer_class") == "ByteTokenizer":
        return ByteTokenizer()
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = _read_text(folder / "chat_template.jinja")
    if (folder / HuggingFaceTokenizer.FILE).is_file():
        return _load_hugging_face(folder, settings)
    if (folder / SentencePieceTokenizer.FILE).is_file():
        return _load_sentencepiece(folder, settings)
    raise BadInput(
        f"{folder}: no tokenizer found; expected {HuggingFaceTokenizer.FILE}, "
        f"{SentencePieceTokenizer.FILE}, or {SETTINGS} with tokenizer_class ByteTokenizer"
    )


def _load_hugging_face(folder: Path, settings: dict[str, Any]) -> HuggingFaceTokenizer:
    path = folder / HuggingFaceTokenizer.FILE
    try:
        backend = tokenizers.Tokenizer.from_str(_read_text(path))
    except BadInput:
        raise
    # The bindings raise bare `Exception`, there is nothing narrower to catch.
    except Exception as error:
        raise BadInput(f"{path}: not a tokenizer.json that can be read: {error}") from error
    backend.no_padding()  # a file may carry settings of whoever saved it; ids must not depend on
    backend.no_truncation()  # them
    special = _find_special_ids(folder, settings, _highest_id(backend) + 1, backend.token_to_id)
    return HuggingFaceTokenizer(backend, special, settings)


def _load_sentencepiece(folder: Path, settings: dict[str, Any]) -> SentencePieceTokenizer:
    path = folder / SentencePieceTokenizer.FILE
    try:
        backend = sentencepiece.SentencePieceProcessor()
        backend.load_from_serialized_proto(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{path}: not a SentencePiece model that can be read: {error}") from error

    def token_to_id(piece: str) -> int | None:
        index = backend.piece_to_id(piece)  # the unknown id for whatever is not in the vocabulary
        return index if backend.id_to_piece(index) == piece else None

    own = {"eos": backend.eos_id(), "bos": backend.bos_id(), "pad": backend.pad_id()}
    own = {name: index for name, index in own.items() if index >= 0}
    special = _find_special_ids(folder, settings, backend.get_piece_size(), token_to_id, own)
    return SentencePieceTokenizer(backend, special, settings)


def _find_special_ids(
    folder: Path,
    settings: Mapping[str, Any],
    vocab_size: int,
    token_to_id: Callable[[str], int | None],
    own: Mapping[str, int] | None = None,
) -> SpecialIds:
    """Special ids from the folder's files; `own` are those that the vocabulary itself declares."""
    config = _read_json(folder / "config.json")
    # The embedding table is often padded beyond the tokenizer, and a spare row makes a fine mask.
    rows = config.get("vocab_size")
    limit = max(vocab_size, rows) if isinstance(rows, int) else vocab_size

    def find(name: str) -> int | None:
        for file, fields in ("config.json", config), (SETTINGS, settings):
            value = fields.get(f"{name}_token_id")
            if name == "eos" and isinstance(value, list) and value:
                value = value[0]
            if value is None:
                continue
            if type(value) is not int or not 0 <= value < limit:
                raise BadInput(
                    f"{folder / file}: {name}_token_id is {value!r}, expected an id of the "
                    f"vocabulary, 0 to {limit - 1}"
                )
            return value
        text = _token_text(settings.get(f"{name}_token"))
        if text is None:
            return (own or {}).get(name)
        index = token_to_id(text)
        if index is None:
            raise BadInput(f"{folder / SETTINGS}: {name}_token {text!r} is not in the vocabulary")
        return index

    mask, eos, pad, bos = (find(name) for name in ("mask", "eos", "pad", "bos"))
    for name, index in ("mask", mask), ("eos", eos):
        if index is None:
            raise BadInput(
                f"{folder / 'config.json'}: {name}_token_id is missing, and {SETTINGS} has no "
                f"{name}_token; give one of them"
            )
    if mask == eos:
        raise BadInput(
            f"{folder / 'config.json'}: mask_token_id and eos_token_id are both {mask}, expected "
            "different ids"
        )
    return SpecialIds(mask=mask, eos=eos, pad=eos if pad is None else pad, bos=bos)


def _token_text(value: Any) -> str | None:
    """A token of tokenizer_config.json: text, or the fields of an added token."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _highest_id(backend: tokenizers.Tokenizer) -> int:
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
