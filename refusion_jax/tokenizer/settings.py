"""The settings files beside a vocabulary: tokenizer_config.json, the older files that it replaced, and the
special ids in config.json."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from refusion_jax.errors import BadInput
from refusion_jax.files import read_json_if_there, read_text, write_atomically

SENTENCE_PIECE = "tokenizer.model"
SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
# Names of the field before and since 2025.
LARGEST_ID = 2**31 - 1  # ids are int32
EXTRA_SPECIAL = ("additional_special_tokens", "extra_special_tokens")


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from chat_template.jinja and special_tokens_map.json.

    The template file overrides the setting, as in `transformers`. The map is read only for old settings that
    do not record added tokens.
    """
    settings = read_json_if_there(folder / SETTINGS)
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = read_text(template)
    if "added_tokens_decoder" not in settings:
        settings |= read_json_if_there(folder / "special_tokens_map.json")
    return settings


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    write_atomically(folder / SETTINGS, text + "\n")


def read_added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Tokens recorded outside the vocabulary, by id: from the settings, else from added_tokens.json."""
    path, recorded = folder / SETTINGS, settings.get("added_tokens_decoder")
    if recorded is None:
        path = folder / "added_tokens.json"
        special = special_texts(settings)
        pairs = [
            (i, {"content": text, "special": text in special}) for text, i in read_json_if_there(path).items()
        ]
    elif isinstance(recorded, dict):
        pairs = list(recorded.items())
    else:
        raise BadInput(f"{path}: added_tokens_decoder is {recorded!r}, expected an object")
    tokens: dict[int, AddedToken] = {}
    texts: set[str] = set()
    for key, fields in pairs:
        text = token_text(fields)
        if not text or not isinstance(fields, dict):
            raise BadInput(f"{path}: added token {key!r} is {fields!r}, expected an object with content")
        is_number = not isinstance(key, bool) and isinstance(key, int | str) and str(key).isdecimal()
        if not is_number or len(str(key)) > len(str(LARGEST_ID)) or int(key) > LARGEST_ID:
            raise BadInput(f"{path}: added token {text!r} has the id {key!r}, expected a whole number")
        if int(key) in tokens or text in texts:
            raise BadInput(f"{path}: added token {text!r} or its id {key} appears twice")
        tokens[int(key)] = added_token(fields)
        texts.add(text)
    return tokens


def added_token(fields: Mapping[str, Any]) -> AddedToken:
    """An added token from its JSON object. By default special tokens are not matched in normalised text."""
    special = bool(fields.get("special", False))
    flags = {name: bool(fields.get(name, False)) for name in ("single_word", "lstrip", "rstrip")}
    normalized = bool(fields.get("normalized", not special))
    return AddedToken(fields["content"], special=special, normalized=normalized, **flags)


def added_tokens_decoder(tokens: Mapping[int, AddedToken]) -> dict[str, dict[str, Any]]:
    """The setting `added_tokens_decoder` for these tokens."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in sorted(tokens.items())}


def special_texts(settings: Mapping[str, Any]) -> set[str]:
    """The texts of all special tokens in the settings."""
    named = [value for key, value in settings.items() if key.endswith("_token")]
    for field in EXTRA_SPECIAL:
        extra = settings.get(field) or []
        named += extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    return {text for text in map(token_text, named) if text}


def token_text(value: Any) -> str | None:
    """The text of a token in the settings, which is a string or an object with the field `content`."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens.

    Attributes:
      eos: end of text.
      mask: mask token; None for a model that only decodes left to right.
      pad: padding; by default the EOS id, which is harmless since padding is never attended to.
      bos: beginning of text, or None.
      further_eos: other ids that end an answer as well.
    """

    eos: int
    mask: int | None = None
    pad: int | None = None
    bos: int | None = None
    further_eos: tuple[int, ...] = ()

    def __post_init__(self):
        if self.pad is None:
            object.__setattr__(self, "pad", self.eos)

    def roles(self) -> dict[str, int]:
        """The ids that are set, by role; `pad` is left out if it equals `eos`, and further EOS ids are."""
        pad = None if self.pad == self.eos else self.pad
        ids = {"eos": self.eos, "mask": self.mask, "pad": pad, "bos": self.bos}
        return {role: index for role, index in ids.items() if index is not None}


def find_special_ids(
    folder: Path,
    settings: Mapping[str, Any],
    vocab_size: int,
    token_to_id: Callable[[str], int | None],
    own: Mapping[str, int] | None = None,
) -> SpecialIds:
    """Finds the special ids of a folder: in config.json (`mask_token_id`, ...), else in the settings
    (`mask_token_id`, then `mask_token` as text), else in `own`.

    Args:
      folder: the model folder.
      settings: its settings, from `read_settings`.
      vocab_size: highest id of the tokenizer + 1.
      token_to_id: text of a token -> its id, None if it is not in the vocabulary.
      own: role -> id as declared by the vocabulary itself.

    Raises:
      BadInput: an id or text is outside the vocabulary, there is no EOS, or mask and EOS are the same. The
        message names file and field.
    """
    config = read_json_if_there(folder / "config.json")
    # The embedding often has more rows than the tokenizer has tokens, and a spare row can be the mask.
    rows = config.get("vocab_size")
    limit = max(vocab_size, rows) if isinstance(rows, int) else vocab_size

    def by_text(role: str) -> int | None:
        text = token_text(settings.get(f"{role}_token"))
        index = None if text is None else token_to_id(text)
        if text is not None and index is None:
            raise BadInput(f"{folder / SETTINGS}: {role}_token {text!r} is not in the vocabulary")
        return index

    def find(role: str) -> int | None:
        for file, fields in ("config.json", config), (SETTINGS, settings):
            value = fields.get(f"{role}_token_id")
            if role == "eos" and isinstance(value, list) and value:
                # Of several EOS ids, the one that the settings name ends a turn (Llama 3).
                chosen = by_text(role)
                value = chosen if chosen in value else value[0]
            if value is None or (role == "pad" and value == -1):  # -1 in old Llama files: there is none
                continue
            if type(value) is not int or not 0 <= value < limit:
                raise BadInput(
                    f"{folder / file}: {role}_token_id is {value!r}, expected an id of the "
                    f"vocabulary, 0 to {limit - 1}"
                )
            return value
        index = by_text(role)
        return (own or {}).get(role) if index is None else index

    ids = {role: find(role) for role in ("mask", "eos", "pad", "bos")}
    if ids["eos"] is None:
        raise BadInput(
            f"{folder / 'config.json'}: eos_token_id is missing, and {SETTINGS} has no eos_token; "
            "give one of them"
        )
    if ids["mask"] == ids["eos"]:
        raise BadInput(
            f"{folder / 'config.json'}: mask_token_id and eos_token_id are both {ids['eos']}, expected "
            "different ids"
        )
    return SpecialIds(**ids, further_eos=_further_eos(folder, config, ids, limit))


def _further_eos(
    folder: Path, config: Mapping[str, Any], ids: Mapping[str, int | None], limit: int
) -> tuple[int, ...]:
    """The EOS ids of config.json and generation_config.json besides the chosen one, in their order.

    Raises:
      BadInput: one of them is outside the vocabulary or is the mask token.
    """
    found: list[int] = []
    generation = read_json_if_there(folder / GENERATION)
    for file, fields in ("config.json", config), (GENERATION, generation):
        value = fields.get("eos_token_id")
        for index in value if isinstance(value, list) else [] if value is None else [value]:
            if type(index) is not int or not 0 <= index < limit or index == ids["mask"]:
                raise BadInput(
                    f"{folder / file}: eos_token_id is {value!r}, expected ids of the vocabulary, 0 to "
                    f"{limit - 1}, that are not the mask token's"
                )
            if index != ids["eos"] and index not in found:
                found.append(index)
    return tuple(found)
