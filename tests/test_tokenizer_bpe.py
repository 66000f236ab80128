"""Byte-level BPE from vocab.json and merges.txt, added tokens, adding a token, and saving."""

import json
import re

import pytest
import tokenizers
from tokenizer_files import (
    PLAIN,
    SPECIAL,
    TEXTS,
    encodings,
    recorded,
    trained,
    write_json,
    write_vocab_and_merges,
)

from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import ByteTokenizer, load_tokenizer
from refusion_jax.tokenizer.bpe import WORDS, byte_level_bpe


@pytest.fixture(scope="module")
def qwen():
    return trained("qwen2")


@pytest.fixture
def folder(tmp_path, qwen):
    """A folder like the authors' repository, without tokenizer.json."""
    return write_vocab_and_merges(tmp_path / "slow", qwen, "Qwen2Tokenizer")


def change(path, **fields):
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **fields})


def fails(folder, *parts):
    """Loading fails with one line that contains all parts."""
    with pytest.raises(BadInput) as error:
        load_tokenizer(folder)
    for part in parts:
        assert part in str(error.value), error.value
    assert "\n" not in str(error.value)


# Ids


@pytest.mark.parametrize(
    ("tokenizer_class", "style"),
    [("Qwen2Tokenizer", "qwen2"), ("Qwen2TokenizerFast", "qwen2"), ("GPT2Tokenizer", "gpt-2")],
)
def test_vocab_and_merges_give_the_ids_and_texts_of_tokenizer_json(tmp_path, tokenizer_class, style):
    backend = trained(style)
    tokenizer = load_tokenizer(write_vocab_and_merges(tmp_path / "slow", backend, tokenizer_class))
    expected = encodings(backend)
    assert tokenizer.encode_batch(TEXTS) == expected
    for ids in expected:
        assert tokenizer.decode(ids) == backend.decode(ids)
    assert tokenizer.vocab_size == backend.get_vocab_size()


def test_tokenizer_json_gives_the_ids_of_the_library(tmp_path, qwen):
    qwen.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    assert load_tokenizer(tmp_path).encode_batch(TEXTS) == encodings(qwen)


def test_every_text_survives(folder):
    tokenizer = load_tokenizer(folder)
    for text in TEXTS[:8] + TEXTS[10:]:
        if not any(special in text for special in SPECIAL) and "\u0301" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_are_those_of_each_family():
    """One vocabulary for all families, whose merges allow every word: only the split into words differs."""
    found = {}
    for style in ("gpt-2", "smollm", "qwen2", "llama-bpe"):
        backend = trained(style)
        model = json.loads(backend.to_str())["model"]
        ours = byte_level_bpe(model["vocab"], [tuple(merge) for merge in model["merges"]], WORDS[style])
        ours.add_special_tokens(SPECIAL)
        ours.add_tokens(PLAIN)
        found[style] = encodings(ours)
        assert found[style] == encodings(backend), style
    for style, ids in found.items():
        assert all(ids != other for name, other in found.items() if name != style), style


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1234567 89", ["123", "456", "7", " ", "89"]),
        ("it's a.b <=> c", ["it", "'", "s", " a", ".", "b", " ", "<=>", " c"]),
        ("über  x\n", ["über", " ", " x", "\n"]),
    ],
)
def test_words_of_files_that_name_no_family(text, words):
    """Punctuation apart, then GPT-2's words, digits apart from the space before them, in threes."""
    cuts = byte_level_bpe({}, [], WORDS["default"]).pre_tokenizer.pre_tokenize_str(text)
    spans = [text[slice(*span)] for _, span in cuts]
    assert spans == words


def test_only_qwen_normalises(tmp_path):
    for tokenizer_class, style in ("Qwen2Tokenizer", "qwen2"), ("GPT2Tokenizer", "gpt-2"):
        backend = trained(style)
        tokenizer = load_tokenizer(write_vocab_and_merges(tmp_path / style, backend, tokenizer_class))
        same = tokenizer.encode("e\u0301") == tokenizer.encode("é")
        assert same == (style == "qwen2")


def test_the_class_may_be_known_from_the_model_type(folder, qwen):
    change(folder / "tokenizer_config.json", tokenizer_class=None)
    write_json(folder / "config.json", {"model_type": "qwen3"})
    assert load_tokenizer(folder).encode_batch(TEXTS) == encodings(qwen)


# Added tokens


def test_special_tokens_in_plain_text_are_special_and_thinking_is_text(folder, qwen):
    tokenizer = load_tokenizer(folder)
    ids = {text: qwen.token_to_id(text) for text in (*SPECIAL, *PLAIN)}
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode("a<|im_end|>b<think><|mask|>") == [
        *a, ids["<|im_end|>"], *b, ids["<think>"], ids["<|mask|>"]
    ]  # fmt: skip
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b<think><|mask|>")) == "ab<think>"


def test_added_tokens_of_older_folders(folder, qwen):
    """added_tokens.json with special_tokens_map.json, the layout before settings recorded added tokens."""
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    decoder = settings.pop("added_tokens_decoder")
    del settings["eos_token"]
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "added_tokens.json", {token["content"]: int(i) for i, token in decoder.items()})
    special = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": SPECIAL}
    write_json(folder / "special_tokens_map.json", special)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == qwen.token_to_id("<|im_end|>")
    assert tokenizer.encode_batch(TEXTS) == encodings(qwen)
    assert tokenizer.decode(tokenizer.encode("a<|im_start|><think>")) == "a<think>"


def test_special_tokens_that_the_vocabulary_has_as_words(tmp_path):
    """GPT-2 has <|endoftext|> in vocab.json; only its settings call it special."""
    backend = trained("gpt-2")
    folder = write_vocab_and_merges(tmp_path / "gpt2", backend, "GPT2Tokenizer", added_tokens_decoder={})
    end = backend.get_vocab_size(with_added_tokens=False)
    change(folder / "vocab.json", **{"<|endoftext|>": end})
    change(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a<|endoftext|>") == [*tokenizer.encode("a"), end]
    change(folder / "tokenizer_config.json", eos_token=None, pad_token="<|endoftext|>")
    write_json(folder / "config.json", {"eos_token_id": end})
    assert load_tokenizer(folder).encode("<|endoftext|>") == [end]


def test_added_tokens_keep_their_ids_across_a_gap(folder, qwen, tmp_path):
    decoder = recorded(qwen)
    change(
        folder / "tokenizer_config.json",
        added_tokens_decoder={**decoder, "2000": {**decoder[max(decoder)], "content": "<far>"}},
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 2001
    assert tokenizer.encode("<|im_end|><far><think>") == [
        qwen.token_to_id("<|im_end|>"), 2000, qwen.token_to_id("<think>")
    ]  # fmt: skip
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    assert load_tokenizer(saved).encode_batch([*TEXTS, "<far>"]) == [*encodings(qwen), [2000]]


# Mistakes


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"a": 0, "b": 0}, "tokens 'a' and 'b' have the same id 0"),
        ({"a": 0, "b": 2}, "no token has the id 1"),
        ({"a": 1}, "no token has the id 0"),
        ({}, "no token has the id 0"),
        ({"a": "0"}, "token 'a' has the id '0', expected a whole number"),
        ({"a": -1}, "token 'a' has the id -1"),
        ({"a": True}, "token 'a' has the id True"),
        (["a"], "must hold a JSON object, found list"),
    ],
)
def test_a_bad_vocabulary_is_bad_input(folder, vocab, message):
    write_json(folder / "vocab.json", vocab)
    change(folder / "tokenizer_config.json", added_tokens_decoder={})
    fails(folder, str(folder / "vocab.json"), message)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("#version: 0.2\n\nĠ\n", "merges.txt:3: 'Ġ' is no merge"),
        ("a b c", "merges.txt:1: 'a b c' is no merge"),
        ("#version: 0.2\n\na Ж\n", "merges.txt:3: merge 'a Ж' needs 'Ж', which is not in the vocabulary"),
        ("ÿ ÿ", "merges.txt:1: merge 'ÿ ÿ' needs 'ÿÿ'"),
    ],
)
def test_bad_merges_are_bad_input(folder, lines, message):
    (folder / "merges.txt").write_text(lines, encoding="utf-8")
    fails(folder, message)


def test_a_merge_may_begin_with_a_number_sign(folder, qwen):
    merges = (folder / "merges.txt").read_text(encoding="utf-8")
    assert merges.startswith("#version")
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["##"] = max(vocab.values()) + 1
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text(f"{merges}# #\r\n", encoding="utf-8")
    change(folder / "tokenizer_config.json", added_tokens_decoder={}, eos_token="##")
    assert len(load_tokenizer(folder).encode("##a")) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class is 'LlamaTokenizer'; with vocab.json and"),
        ({"tokenizer_class": None}, "tokenizer_class is None"),
        ({"tokenizer_class": 3}, "tokenizer_class is 3"),
        ({"add_prefix_space": True}, "add_prefix_space is true"),
        ({"eos_token": "<gone>"}, "eos_token '<gone>' is not in the vocabulary"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder is [], expected an object"),
        ({"added_tokens_decoder": {"x": {"content": "<a>"}}}, "added token '<a>' has the id 'x'"),
        ({"added_tokens_decoder": {"900": {"content": ""}}}, "added token '900' is {'content': ''}"),
        ({"added_tokens_decoder": {"900": 7}}, "added token '900' is 7"),
        ({"added_tokens_decoder": {"900": "<a>"}}, "added token '900' is '<a>', expected an object"),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "<a>"}}}, "expected a whole number"),
        ({"added_tokens_decoder": {str(2**31): {"content": "<a>"}}}, "has the id '2147483648', expected"),
        (
            {"added_tokens_decoder": {"901": {"content": "<a>"}, "902": {"content": "<a>"}}},
            "added token '<a>' or its id 902 appears twice",
        ),
        ({"added_tokens_decoder": {"5": {"content": "<a>"}}}, "added token '<a>' has the id 5 of "),
        (
            {"added_tokens_decoder": {"900": {"content": "Xyzzy"}}},
            "added token 'Xyzzy' has the id 900, in the vocabulary it is ",
        ),
    ],
)
def test_bad_settings_are_bad_input(folder, fields, message):
    change(folder / "tokenizer_config.json", **fields)
    fails(folder, str(folder / "tokenizer_config.json"), message)


def test_a_token_before_every_text_is_in_the_vocabulary(folder):
    (folder / "config.json").write_text('{"bos_token_id": 1}')
    change(folder / "tokenizer_config.json", bos_token="<gone>", add_bos_token=True)
    fails(folder, "'<gone>', which is added to every text, is not in the vocabulary")


def test_added_tokens_json_is_checked(folder):
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del settings["added_tokens_decoder"]
    write_json(folder / "tokenizer_config.json", settings)
    for value, message in [
        ({"<a>": 900, "<b>": 900}, "added token '<b>' or its id 900 appears twice"),
        ({"<a>": [900]}, "added token '<a>' has the id [900]"),
    ]:
        write_json(folder / "added_tokens.json", value)
        fails(folder, str(folder / "added_tokens.json"), message)


def test_both_files_are_needed(folder):
    (folder / "merges.txt").unlink()
    fails(folder, str(folder / "merges.txt"), "no such file")
    (folder / "vocab.json").unlink()
    fails(folder, "no tokenizer found", "vocab.json and merges.txt")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("added_tokens", [{"id": 900, "content": "<a>"}], "added token '<a>' has id 900, expected "),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}}, "not a tokenizer.json that can be"),
        ("normalizer", {"type": "Unheard"}, "not a tokenizer.json that can be read"),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}, "`b` out of vocabulary"),
        ("model", {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}, "gives one id to several"),
        ("model", None, "not a tokenizer.json that can be read"),
    ],
)
def test_a_bad_tokenizer_json_is_bad_input(tmp_path, qwen, part, value, message):
    state = json.loads(qwen.to_str())
    if part == "added_tokens":
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        value = [{**token, **flags} for token in value]
    else:
        state["added_tokens"] = []
    write_json(tmp_path / "tokenizer.json", {**state, part: value})
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "a"})
    fails(tmp_path, str(tmp_path / "tokenizer.json"), message)


# Adding a token


def test_new_tokens_get_the_ids_that_follow(folder, qwen):
    old = load_tokenizer(folder)
    size = old.vocab_size
    new = old.with_token("bos", "<|beginoftext|>").with_token("mask", "<|new_mask|>")
    assert (new.bos_id, new.mask_id, new.vocab_size) == (size, size + 1, size + 2)
    assert new.encode("<|beginoftext|>a<|new_mask|>") == [size, *old.encode("a"), size + 1]
    assert new.decode([size, *old.encode("a"), size + 1]) == "a"
    assert new.encode_batch(TEXTS) == encodings(qwen)
    # The old tokenizer is unchanged.
    assert (old.bos_id, old.mask_id, old.vocab_size) == (None, None, size)
    assert len(old.encode("<|new_mask|>")) > 1


@pytest.mark.parametrize("gap", [0, 1, 700])
def test_a_new_token_is_saved_under_its_id(folder, tmp_path, qwen, gap):
    index = qwen.get_vocab_size() + gap
    new = load_tokenizer(folder).with_token("mask", "<|new_mask|>", index)
    (tmp_path / "saved").mkdir()
    new.save(tmp_path / "saved")
    for tokenizer in new, load_tokenizer(tmp_path / "saved"):
        assert tokenizer.mask_id == index
        assert tokenizer.encode_batch([*TEXTS, "<|new_mask|>"]) == [*encodings(qwen), [index]]
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert library.encode("<|new_mask|><|im_end|>").ids == [index, qwen.token_to_id("<|im_end|>")]


@pytest.mark.parametrize(
    ("text", "index", "message"),
    [
        ("<new>", 5, "id 5 is in use by "),
        ("<new>", "<|im_end|>", "is in use by '<|im_end|>'"),
        ("<new>", 1000, "id 1000 is in use by the model's mask token"),
        ("<new>", -1, "an id of 0 or above, not -1"),
        ("", 900, "expected a text"),
        ("<think>", 900, "'<think>' is in the vocabulary already, with id "),
    ],
)
def test_ids_and_texts_in_use_are_refused(folder, qwen, text, index, message):
    write_json(folder / "config.json", {"vocab_size": 1100, "mask_token_id": 1000})
    index = qwen.token_to_id(index) if isinstance(index, str) else index
    with pytest.raises(BadInput, match=re.escape(message)):
        load_tokenizer(folder).with_token("bos", text, index)


def test_bytes_take_no_new_token():
    with pytest.raises(BadInput, match="ByteTokenizer has all it can have"):
        ByteTokenizer().with_token("mask", "<new>")


# Storage


def test_saved_files_stand_alone(folder, tmp_path, qwen):
    tokenizer = load_tokenizer(folder)
    saved = tmp_path / "saved"
    saved.mkdir()
    tokenizer.save(saved)
    library = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert encodings(library) == encodings(qwen)
    settings = json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "Qwen2Tokenizer"
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["added_tokens_decoder"] == recorded(qwen)
    assert settings["clean_up_tokenization_spaces"] is False
    assert not {key for key in settings if key.endswith("_token_id")}
    # What slow tokenizers read.
    (saved / "tokenizer.json").unlink()
    assert load_tokenizer(saved).encode_batch(TEXTS) == encodings(qwen)


def test_other_pipelines_are_saved_for_the_class_that_keeps_them(tmp_path):
    backend = trained("smollm")
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "eos_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "auto_map": {"AutoTokenizer": "x.y"},
    }
    write_json(tmp_path / "tokenizer_config.json", settings)
    saved = tmp_path / "saved"
    saved.mkdir()
    load_tokenizer(tmp_path).save(saved)
    settings = json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "auto_map" not in settings
    assert not (saved / "vocab.json").exists()
    assert load_tokenizer(saved).encode_batch(TEXTS) == encodings(backend)
