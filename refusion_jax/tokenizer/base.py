"""The interface `Tokenizer`, the byte tokenizer, and the base class of tokenizers read from files."""

import abc
import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from refusion_jax.buckets import location
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer.chat_template import Message, check_messages, compile_template
from refusion_jax.tokenizer.settings import SETTINGS, SpecialIds, token_text, write_settings

MASK_MISSING = (
    "config.json: mask_token_id is missing, and only --method=ar can do without a mask token; "
    "python -m refusion_jax.convert SRC DST --add_tokens=mask adds one"
)


class Tokenizer(abc.ABC):
    """Encodes texts and prompts to token ids, and decodes token ids to text.

    Attributes:
      vocab_size: highest id of the tokenizer + 1; the model's embedding may have more rows.
      special: ids of the special tokens.
    """

    def __init__(self, vocab_size: int, special: SpecialIds, begin: Sequence[int] = ()):
        self.vocab_size = vocab_size
        self.special = special
        self._begin = list(begin)

    @property
    def mask_id(self) -> int | None:
        return self.special.mask

    @property
    def eos_id(self) -> int:
        return self.special.eos

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer, `eos_id` first."""
        return (self.special.eos, *self.special.further_eos)

    @property
    def pad_id(self) -> int:
        return self.special.pad

    @property
    def bos_id(self) -> int | None:
        return self.special.bos

    def need_mask(self) -> int:
        """The mask id, for code that requires one. Raises BadInput if there is none."""
        if self.special.mask is None:
            raise BadInput(MASK_MISSING)
        return self.special.mask

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Special tokens written in the text become their ids, as in `transformers`; no
        special tokens are added.

        Raises:
          BadInput: the text cannot be encoded as UTF-8.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel if the tokenizer supports it."""
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
        """Text of `ids`. Special ids and ids without text are skipped; invalid UTF-8 becomes U+FFFD."""
        special = set(self.special.roles().values())
        ids = (int(i) for i in ids)
        return self._decode([i for i in ids if 0 <= i < self.vocab_size and i not in special])

    def encode_prompt(self, query: str | Sequence[Message], raw: bool = False, **options: Any) -> list[int]:
        """Prompt token ids of one query; see `encode_prompts`."""
        return self.encode_prompts([query], raw, **options)[0]

    def encode_prompts(
        self, queries: Sequence[str | Sequence[Message]], raw: bool = False, **options: Any
    ) -> list[list[int]]:
        """Prompt token ids of each query, the same in training and in sampling.

        These are the ids of the text that `prompt` returns. A text that was not rendered by a chat template
        is preceded by the tokens that the tokenizer puts before a text (BOS, for Llama models); templates
        contain them already.

        Args:
          queries: texts or conversations.
          raw: do not apply the chat template to texts.
          options: variables of the chat template.
        """
        texts = [self._prompt(query, raw, options) for query in queries]
        begins = [[] if self._is_rendered(query, raw) else self._begin for query in queries]
        return [begin + ids for begin, ids in zip(begins, self.encode_batch(texts), strict=True)]

    def prompt(self, query: str | Sequence[Message], raw: bool = False, **options: Any) -> str:
        """The prompt text of `query`; `options` are variables of the chat template.

        Messages are rendered by the template. A string is rendered as a single user message if there is a
        chat template and `raw` is false; otherwise it is the prompt itself.
        """
        if not self._is_rendered(query, raw):
            return query
        messages = [{"role": "user", "content": query}] if isinstance(query, str) else query
        return self.render(messages, **options)

    def _is_rendered(self, query: str | Sequence[Message], raw: bool) -> bool:
        return not isinstance(query, str) or (self.has_chat_template and not raw)

    def _prompt(self, query: str | Sequence[Message], raw: bool, options: dict[str, Any]) -> str:
        try:
            return self.prompt(query, raw, **options)
        except BadInput as error:
            raise BadInput(f"{error}; the prompt is {str(query)[:200]!r}") from error

    @property
    @abc.abstractmethod
    def has_chat_template(self) -> bool: ...

    @abc.abstractmethod
    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The prompt text of a conversation; `options` are variables of the chat template.

        The template decides which variables have an effect: `enable_thinking=False` for Qwen3, `date_string`
        for Llama 3. Variables that are not given stay undefined, so Qwen3 models think by default, as in the
        code of Qwen3 and of ReFusion.
        """

    @abc.abstractmethod
    def with_token(self, role: str, text: str, index: int | None = None) -> "Tokenizer":
        """A copy of this tokenizer with a new special token for `role`, "mask" or "bos".

        The tokens that prompts begin with do not change.

        Args:
          role: "mask" or "bos".
          text: text of the token.
          index: id of the token; None takes the highest id + 1.

        Raises:
          BadInput: the text or the id is in use, or this tokenizer cannot be extended.
        """

    @abc.abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the files from which `load_tokenizer(folder)` loads the same tokenizer."""

    def fingerprint(self) -> str:
        """A text that is equal for tokenizers that give equal ids: a digest of the files of `save`."""
        kind = type(self).__qualname__, self.has_chat_template, self.special, self._begin
        digest = hashlib.sha256(f"{metadata.version('tokenizers')} {kind}".encode())
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            for path in sorted(Path(folder).iterdir()):
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    @abc.abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class ByteTokenizer(Tokenizer):
    """The 256 byte values, then the special tokens. Needs no file."""

    PAD, BOS, EOS, MASK = range(256, 260)

    def __init__(self):
        super().__init__(260, SpecialIds(mask=self.MASK, eos=self.EOS, pad=self.PAD, bos=self.BOS))

    has_chat_template = False  # a text is the prompt itself; only conversations are rendered

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        turns = (f"{m['role']}: {m['content']}\n" for m in check_messages(messages))
        return "".join(turns) + "assistant: "

    def with_token(self, role: str, text: str, index: int | None = None) -> Tokenizer:
        raise BadInput(f"{role} token {text!r}: a ByteTokenizer has all it can have, mask and BOS included")

    def save(self, folder: str | Path) -> None:
        write_settings(location(folder), {"tokenizer_class": "ByteTokenizer"})

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8")) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class TemplatedTokenizer(Tokenizer):
    """A tokenizer read from files, with the settings of its tokenizer_config.json."""

    def __init__(
        self, vocab_size: int, special: SpecialIds, begin: Sequence[int], settings: Mapping[str, Any]
    ):
        super().__init__(vocab_size, special, begin)
        self._settings = dict(settings)

    @property
    def has_chat_template(self) -> bool:
        return self._settings.get("chat_template") is not None

    @functools.cached_property
    def _template(self) -> Callable[..., str]:
        """The compiled template. Only a prompt that is rendered needs one that parses."""
        try:
            return compile_template(self._settings["chat_template"])
        except BadInput as error:
            raise BadInput(f"{error}; --raw decodes texts without it") from error

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        if not self.has_chat_template:
            raise BadInput(
                "messages were given but the tokenizer has no chat_template: give a plain prompt, "
                f"or add a chat_template to {SETTINGS}"
            )
        return self._template(messages, **{**self._token_texts, **options})

    def with_token(self, role: str, text: str, index: int | None = None) -> Tokenizer:
        index = self.vocab_size if index is None else index
        holder = self._id_to_token(index)
        roles = [r for r, i in self.special.roles().items() if i == index]
        if holder is not None or roles:
            user = repr(holder) if holder is not None else f"the model's {roles[0]} token"
            raise BadInput(f"{role} token {text!r}: id {index} is in use by {user}, expected a free one")
        if index < 0 or not text:
            raise BadInput(f"{role} token {text!r}: expected a text, and an id of 0 or above, not {index}")
        if (known := self._token_to_id(text)) is not None:
            raise BadInput(
                f"{role} token {text!r} is in the vocabulary already, with id {known}: choose another "
                f"text, or set {role}_token_id to {known} in config.json"
            )
        settings = {k: v for k, v in self._settings.items() if k != f"{role}_token_id"}
        settings[f"{role}_token"] = text
        return self._with_token(dataclasses.replace(self.special, **{role: index}), settings, text, index)

    def save(self, folder: str | Path) -> None:
        settings = {**self._token_texts, **self._settings}
        for role, index in self.special.roles().items():
            settings.pop(f"{role}_token_id", None)
            # Written as an id if the text does not give it: a mask may be a spare row of the model, without
            # text.
            text = token_text(settings.get(f"{role}_token"))
            if text is None or self._token_to_id(text) != index:
                settings[f"{role}_token_id"] = index
        settings.pop("auto_map", None)  # names code that is not saved
        folder = location(folder)
        write_settings(folder, {**settings, **self._saved_settings()})
        self._save_vocabulary(folder)

    @functools.cached_property
    def _token_texts(self) -> dict[str, str]:
        """Texts of bos_token, eos_token, ...: from the settings, else from the vocabulary by id."""
        texts = {key: token_text(v) for key, v in self._settings.items() if key.endswith("_token")}
        for role, index in self.special.roles().items():
            texts.setdefault(f"{role}_token", self._id_to_token(index))
        return {key: text for key, text in texts.items() if text is not None}

    @abc.abstractmethod
    def _with_token(
        self, special: SpecialIds, settings: Mapping[str, Any], text: str, index: int
    ) -> Tokenizer: ...

    @abc.abstractmethod
    def _saved_settings(self) -> dict[str, Any]:
        """Settings that `transformers` needs to build the same tokenizer from the saved files."""

    @abc.abstractmethod
    def _save_vocabulary(self, folder: Path) -> None: ...

    @abc.abstractmethod
    def _id_to_token(self, index: int) -> str | None: ...

    @abc.abstractmethod
    def _token_to_id(self, text: str) -> int | None: ...
