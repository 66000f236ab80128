"""The tokenizer inside a GGUF file."""

import io
import json

import pytest
import sentencepiece
from tokenizer_files import PLAIN, SPECIAL, TEXTS, encodings, trained

from refusion_jax.checkpoints.gguf_file import GGUFFile
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import load_gguf_tokenizer, load_tokenizer

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"


def fields_of(style):
    """The metadata that llama.cpp's converter writes for a trained pipeline, with three rows of padding."""
    backend = trained(style)
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    kinds = [3 if token in SPECIAL else 4 if token in PLAIN else 1 for token in tokens]
    merges = [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": style,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{i}]" for i in range(3)],
        "tokenizer.ggml.token_type": kinds + [5] * 3,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.chat_template": TEMPLATE,
    }


def write_gguf(path, fields):
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("style", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_ids_are_those_of_the_original(tmp_path, style):
    backend = trained(style)
    tokenizer = load_gguf_tokenizer(GGUFFile(write_gguf(tmp_path / "a.gguf", fields_of(style))))
    expected = encodings(backend)
    assert tokenizer.encode_batch(TEXTS) == expected
    for ids in expected:
        assert tokenizer.decode(ids) == backend.decode(ids)
    assert tokenizer.eos_id == backend.token_to_id("<|im_end|>")
    assert tokenizer.bos_id == backend.token_to_id("<|im_start|>")
    assert tokenizer.pad_id == backend.token_to_id("<|endoftext|>")
    assert tokenizer.mask_id is None
    assert tokenizer.vocab_size == backend.get_vocab_size()  # without the padding
    assert tokenizer.prompt("hi") == "hi<|im_end|>"


@pytest.mark.parametrize("style", ["smollm", "qwen2"])
def test_it_is_saved_in_hugging_faces_layout(tmp_path, style):
    tokenizer = load_gguf_tokenizer(GGUFFile(write_gguf(tmp_path / "a.gguf", fields_of(style))))
    tokenizer.with_token("mask", "<|new|>").save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert again.mask_id == tokenizer.vocab_size
    assert (again.eos_id, again.bos_id, again.pad_id) == (
        tokenizer.eos_id,
        tokenizer.bos_id,
        tokenizer.pad_id,
    )
    assert again.prompt("hi") == tokenizer.prompt("hi")


@pytest.mark.parametrize(
    ("style", "flag", "begins"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_before_a_text(tmp_path, style, flag, begins):
    fields = fields_of(style) | ({} if flag is None else {"tokenizer.ggml.add_bos_token": flag})
    tokenizer = load_gguf_tokenizer(GGUFFile(write_gguf(tmp_path / "a.gguf", fields)))
    begin = [tokenizer.bos_id] * begins
    assert tokenizer.encode_prompt("hi", raw=True) == [*begin, *tokenizer.encode("hi")]


def test_a_mask_of_its_own(tmp_path):
    fields = fields_of("qwen2")
    mask = fields["tokenizer.ggml.tokens"].index("<|mask|>")
    path = write_gguf(tmp_path / "a.gguf", fields | {"tokenizer.ggml.mask_token_id": mask})
    assert load_gguf_tokenizer(GGUFFile(path)).need_mask() == mask


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model trained like Llama's, and its metadata in a GGUF file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[10:12] * 20),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["<control>"],
        user_defined_symbols=["<think>"],
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=10000,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(processor.get_piece_size())
    kinds = [2 if i == 0 else 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1 for i in ids]
    kinds[processor.piece_to_id("<think>")] = 4
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return processor, fields


@pytest.mark.parametrize("prefix", [None, False])
def test_sentencepiece_models(tmp_path, pieces, prefix):
    processor, fields = pieces
    flag = {} if prefix is None else {"tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = load_gguf_tokenizer(GGUFFile(write_gguf(tmp_path / "a.gguf", fields | flag)))
    plain = [text for text in TEXTS if "<" not in text]
    if prefix is None:
        assert tokenizer.encode_batch(plain) == processor.encode(plain)
    else:
        found = [processor.id_to_piece(i) for i in tokenizer.encode("int")]
        assert "".join(found) == "int" != "".join(processor.encode("int", out_type=str))
    assert tokenizer.decode(tokenizer.encode("a b天")) == "a b天"
    assert tokenizer.encode("<think><control>") == [
        processor.piece_to_id(x) for x in ("<think>", "<control>")
    ]
    assert tokenizer.encode_prompt("a") == [1, *tokenizer.encode("a")]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert again.encode_prompt("a") == tokenizer.encode_prompt("a")
    assert (again.eos_id, again.bos_id, again.pad_id) == (2, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert', expected gpt2 or llama"),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre is 'tekken', expected gpt-2, smollm"),
        ({"pre": 3}, "tokenizer.ggml.pre must be str, found 3"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must be list of str"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "tokens has 'a' twice, with ids 0 and 1"),
        ({"token_type": [1]}, "token_type has 1 entries for "),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["t h", "ÿ ÿ"]}, "tokenizer.ggml.merges[1]: merge 'ÿ ÿ' needs 'ÿÿ'"),
        ({"merges": ["a"]}, "tokenizer.ggml.merges[0]: 'a' is no merge"),
        ({"eos_token_id": None}, "tokenizer.ggml.eos_token_id is missing"),
        ({"eos_token_id": 5000}, "tokenizer.ggml.eos_token_id is 5000, expected 0 to "),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be bool, found 1"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.5]}, "tokenizer.ggml.scores has 1 entries for "),
    ],
)
def test_bad_metadata_is_bad_input(tmp_path, change, message):
    fields = fields_of("gpt-2") | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    path = write_gguf(
        tmp_path / "a.gguf", {name: value for name, value in fields.items() if value is not None}
    )
    with pytest.raises(BadInput) as error:
        load_gguf_tokenizer(GGUFFile(path))
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_types_of_sentencepiece_are_one_to_six(tmp_path):
    fields = fields_of("gpt-2") | {"tokenizer.ggml.model": "llama"}
    size = len(fields["tokenizer.ggml.tokens"])
    fields |= {"tokenizer.ggml.scores": [0.5] * size, "tokenizer.ggml.token_type": [65539] * size}
    with pytest.raises(BadInput, match="token_type has numbers outside 1 to 6"):
        load_gguf_tokenizer(GGUFFile(write_gguf(tmp_path / "a.gguf", fields)))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"garbage" * 100, None])
def test_what_is_no_gguf_file_is_bad_input(tmp_path, content):
    path = tmp_path / "a.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match="not a readable GGUF file"):
        load_gguf_tokenizer(GGUFFile(path))


def test_a_truncated_file_is_bad_input(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", fields_of("gpt-2"))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(BadInput, match="not a readable GGUF file"):
        load_gguf_tokenizer(GGUFFile(path))
