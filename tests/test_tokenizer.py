"""Tokenizers: ids and text, special ids, chat templates, saving, and messages for bad files."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer

SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>"]
TEXT = "the cat sat on the mat, the dog ate 17 eggs & 3 <ham>s"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "{{ m.role }}={{ m.content }};\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ start or 'assistant' }}={% endif %}"
)


@pytest.fixture
def bpe_folder(tmp_path):
    """A byte-level BPE tokenizer with ids in config.json."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    # Settings that a file may contain and that ids must not depend on.
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    backend.enable_truncation(max_length=5)
    backend.enable_padding(length=50)
    folder = tmp_path / "bpe"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    write(folder / "config.json", mask_token_id=3, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=model,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<mask>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def sentencepiece_folder(tmp_path, sentencepiece_model):
    folder = tmp_path / "sp"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    write(folder / "tokenizer_config.json", mask_token="<mask>")
    return folder


def write(path, **fields):
    path.write_text(json.dumps(fields), encoding="utf-8")


def change(path, **fields):
    write(path, **{**json.loads(path.read_text(encoding="utf-8")), **fields})


def fails(folder, *parts):
    """Loading fails with one message that contains all parts."""
    with pytest.raises(BadInput) as error:
        load_tokenizer(folder)
    for part in parts:
        assert part in str(error.value)


# Bytes


def test_bytes_round_trip_and_specials():
    tokenizer = ByteTokenizer()
    text = "naïve 測試 😀\n\0"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    specials = [tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id]
    assert sorted(specials) == [256, 257, 258, 259]
    assert tokenizer.vocab_size == 260
    assert tokenizer.decode([*specials, *ids, *specials, 1000, -1]) == text


def test_bytes_that_are_not_utf8_are_replaced():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("aé")[:-1]) == "a\ufffd"
    assert tokenizer.decode([0xFF, ord("b")]) == "\ufffdb"


def test_bytes_prompts():
    tokenizer = ByteTokenizer()
    assert not tokenizer.has_chat_template
    assert tokenizer.prompt("2+2?") == "2+2?"
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2?"}]
    assert tokenizer.prompt(messages) == "system: Add.\nuser: 2+2?\nassistant: "


def test_a_lone_surrogate_is_bad_input():
    with pytest.raises(BadInput, match=r"lone surrogate \(\\ud800\) at character 1"):
        ByteTokenizer().encode("a\ud800")


# Hugging Face


def test_hugging_face_ids_and_text(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (3, 2, 0, 1)
    text = "the cat, naïve 😀"
    ids = tokenizer.encode(text)
    assert 5 < len(ids) < len(text.encode())
    assert not {0, 1, 2, 3} & set(ids)
    assert tokenizer.decode([1, *ids, 3, 2, 0]) == text
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6, -1]) == text
    assert tokenizer.encode_batch([text, "a", ""]) == [ids, tokenizer.encode("a"), []]


def test_special_tokens_in_text_are_special(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.encode("<bos>cat<mask>") == [1, *tokenizer.encode("cat"), 3]


def test_declared_special_tokens_are_skipped_though_the_vocabulary_has_them_as_words(tmp_path):
    vocabulary = {"a": 0, "b": 1, "[M]": 2, "[E]": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.decoder = decoders.Fuse()
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", mask_token_id=2, eos_token_id=3)
    assert load_tokenizer(tmp_path).decode([0, 2, 1, 3]) == "ab"


def test_vocab_size_is_the_tokenizers_own(bpe_folder):
    size = load_tokenizer(bpe_folder).vocab_size
    assert 260 < size <= 300
    change(bpe_folder / "config.json", vocab_size=512)
    assert load_tokenizer(bpe_folder).vocab_size == size


def test_mask_may_be_a_spare_row_of_the_model(bpe_folder):
    change(bpe_folder / "config.json", vocab_size=512, mask_token_id=500)
    assert load_tokenizer(bpe_folder).mask_id == 500
    change(bpe_folder / "config.json", mask_token_id=512)
    fails(bpe_folder, "config.json", "mask_token_id is 512", "0 to 511")


def test_pad_may_be_minus_one(bpe_folder):
    """Old Llama files have no padding token and say so with an id."""
    change(bpe_folder / "config.json", pad_token_id=-1)
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.pad_id == tokenizer.eos_id


def test_eos_may_be_a_list_and_pad_may_be_missing(bpe_folder):
    change(bpe_folder / "config.json", eos_token_id=[2, 0], pad_token_id=None, bos_token_id=None)
    tokenizer = load_tokenizer(bpe_folder)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (2, 2, None)


def test_special_tokens_by_name(bpe_folder):
    (bpe_folder / "config.json").unlink()
    settings = bpe_folder / "tokenizer_config.json"
    write(settings, mask_token={"content": "<mask>", "special": True}, eos_token="<eos>")
    tokenizer = load_tokenizer(bpe_folder)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (3, 2, 2, None)
    # config.json overrides the settings.
    write(bpe_folder / "config.json", eos_token_id=0)
    assert load_tokenizer(bpe_folder).eos_id == 0
    change(settings, mask_token="<gone>")
    fails(bpe_folder, "tokenizer_config.json", "mask_token '<gone>' is not in the vocabulary")


@pytest.mark.parametrize("value", [9999, -1, "3", 3.0, True, []])
def test_an_impossible_id_is_bad_input(bpe_folder, value):
    change(bpe_folder / "config.json", eos_token_id=value)
    fails(bpe_folder, "config.json", "eos_token_id is ", repr(value), "0 to ")


def test_a_missing_eos_is_bad_input(bpe_folder):
    change(bpe_folder / "config.json", eos_token_id=None)
    fails(bpe_folder, "config.json", "eos_token_id is missing")


def test_mask_and_eos_must_differ(bpe_folder):
    change(bpe_folder / "config.json", mask_token_id=2)
    fails(bpe_folder, "mask_token_id and eos_token_id are both 2")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"{} {}", b'{"a": "\\ud800"}', b"[" * 10**5])
def test_malformed_files_are_bad_input(bpe_folder, file, content):
    (bpe_folder / file).write_bytes(content)
    fails(bpe_folder, str(bpe_folder / file))


def test_a_folder_without_tokenizer_is_bad_input(tmp_path):
    fails(tmp_path, str(tmp_path), "tokenizer.json", "tokenizer.model")
    fails(tmp_path / "missing", "missing")


# SentencePiece


def test_sentencepiece_ids_and_text(sentencepiece_folder):
    tokenizer = load_tokenizer(sentencepiece_folder)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    # EOS and BOS are control pieces of the model, the mask is a user-defined piece.
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (2, 1, 2)
    assert tokenizer.mask_id not in (0, 1, 2)
    text = "the cat 測"
    ids = tokenizer.encode(text)
    assert tokenizer.decode([1, *ids, tokenizer.mask_id, 2, 10**6]) == text
    assert tokenizer.decode(ids[:-1]) == "the cat \ufffd\ufffd"  # a character of three byte pieces
    assert tokenizer.encode_batch([text, ""]) == [ids, []]


def test_sentencepiece_reads_special_tokens_in_text(sentencepiece_folder):
    tokenizer = load_tokenizer(sentencepiece_folder)
    cat = tokenizer.encode("cat")
    assert tokenizer.encode("<s>cat</s><mask>cat") == [1, *cat, 2, tokenizer.mask_id, *cat]


def test_sentencepiece_bad_input(sentencepiece_folder):
    write(sentencepiece_folder / "tokenizer_config.json", mask_token="<other>")
    fails(sentencepiece_folder, "mask_token '<other>' is not in the vocabulary")
    for content in b"", b"garbage":
        (sentencepiece_folder / "tokenizer.model").write_bytes(content)
        fails(sentencepiece_folder, "tokenizer.model", "not a SentencePiece model")


# Chat templates


def test_chat_template_renders_prompts(bpe_folder):
    write(bpe_folder / "tokenizer_config.json", chat_template=TEMPLATE, bos_token="<bos>")
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.has_chat_template
    # trim_blocks takes the line end after each block.
    assert tokenizer.prompt("hi") == "<bos>user=hi;\nassistant="
    assert tokenizer.prompt("hi", raw=True) == "hi"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.render(messages, start="A") == "<bos>user=a;\nassistant=b;\nA="
    assert tokenizer.render(messages, add_generation_prompt=False).endswith("b;\n")
    assert tokenizer.encode(tokenizer.prompt("hi"))[0] == tokenizer.bos_id


def test_chat_template_from_a_list_or_a_file(bpe_folder):
    templates = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    write(bpe_folder / "tokenizer_config.json", chat_template=templates)
    assert load_tokenizer(bpe_folder).prompt("hi") == "D"
    (bpe_folder / "chat_template.jinja").write_text("{{ messages | tojson }}{{ missing }}")
    expected = '[{"role": "user", "content": "<é>"}]'
    assert load_tokenizer(bpe_folder).prompt("<é>") == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(messages[0]) }}", "SecurityError"),
        ("{% for x in range(10**9) %}{% endfor %}", "a number above 1,000,000 is passed"),
        ("{% for x in range(500) %}{% for y in range(500) %}{% endfor %}{% endfor %}", "range: too many"),
        ("{{ 'a' * 10 ** 10 }}", "repetition: too many"),
        ("{{ 10 ** 10 * [0] }}", "repetition: too many"),
        ("{% for x in range(20) %}{{ 'a' * 1000000 }}{% endfor %}", "repetition: too many"),
        ("{{ ('a' * 9999).replace('a', 'b' * 9999) }}", "replace: too many"),
        ("{{ ('a' * 9999) | replace('a', 'b' * 9999) }}", "replace: too many"),
        ("{{ ('a' * 9999).join(range(9999) | list) }}", "join: too many"),
        ("{{ range(9999) | list | join('a' * 9999) }}", "join: too many"),
        ("{{ 9 ** (9 ** 9) }}", "a number of more than 4,096 bits"),
        ("{{ '%9999999d' % 1 }}", "a format is too wide"),
        ("{{ '%*d' % (9999999, 1) }}", "a number above"),
        ("{{ '%9999999d' | format(1) }}", "a format is too wide"),
        ("{{ '{:9999999}'.format(1) }}", "a format is too wide"),
        ("{{ 'a' | center(9999999) }}", "a number above"),
        ("{{ 'a'.ljust(9999999) }}", "a number above"),
        ("{{ [1] | tojson(indent=9999999) }}", "a number above"),
        ("{{ lipsum(9) }}", "'lipsum' is undefined"),
        ("{% macro r() %}{{ r() }}{% endmacro %}{{ r() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "does not compile: RecursionError"),
    ],
)
def test_a_failing_template_is_bad_input(bpe_folder, template, message):
    write(bpe_folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(BadInput, match=message):
        load_tokenizer(bpe_folder).prompt("hi")


def test_what_templates_may_make(bpe_folder):
    template = "{{ 'ab' * 3 }} {{ 2 ** 10 }} {{ 7 % 4 }} {{ '%03d|%s' % (5, 'x') }} {{ range(2) | list }}"
    template += " {{ ['b', 'a'] | sort | join('-') | replace('a', 'A') }} {{ 'x-y'.replace('-', '+') }}"
    write(bpe_folder / "tokenizer_config.json", chat_template=template)
    assert load_tokenizer(bpe_folder).prompt("hi") == "ababab 1024 3 005|x [0, 1] A-b x+y"


@pytest.mark.parametrize("template", ["\n{% if %}", 7, [{"name": "a"}], [1]])
def test_an_unusable_template_is_bad_input(bpe_folder, template):
    """Only prompts that the template renders need it."""
    write(bpe_folder / "tokenizer_config.json", chat_template=template)
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.encode_prompt("hello", raw=True) == [1, *tokenizer.encode("hello")]
    complaint = "line 2" if isinstance(template, str) else "expected text"
    for query in "hello", [{"role": "user", "content": "hello"}]:
        with pytest.raises(BadInput, match=f"chat_template: .*{complaint}.*; --raw decodes texts without it"):
            tokenizer.encode_prompt(query)


@pytest.mark.parametrize("message", ["hi", {"role": "user"}, {"role": "user", "content": None}])
def test_a_malformed_message_is_bad_input(bpe_folder, message):
    write(bpe_folder / "tokenizer_config.json", chat_template=TEMPLATE)
    for tokenizer in load_tokenizer(bpe_folder), ByteTokenizer():
        with pytest.raises(BadInput, match=r"messages\[1\]"):
            tokenizer.render([{"role": "user", "content": "a"}, message])


def test_messages_need_a_template(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    assert not tokenizer.has_chat_template
    assert tokenizer.prompt("hi") == "hi"
    with pytest.raises(BadInput, match="no chat_template"):
        tokenizer.prompt([{"role": "user", "content": "hi"}])


# Storage


def test_save_and_load_give_the_same_tokenizer(tmp_path, bpe_folder, sentencepiece_folder):
    change(bpe_folder / "config.json", vocab_size=512, mask_token_id=500)
    for folder in bpe_folder, sentencepiece_folder:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    stored = [load_tokenizer(bpe_folder), load_tokenizer(sentencepiece_folder), ByteTokenizer()]
    for number, tokenizer in enumerate(stored):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer.save(folder)
        again = load_tokenizer(folder) if number else load_with_rows(folder, 512)
        assert type(again) is type(tokenizer)
        for field in "vocab_size", "mask_id", "eos_id", "pad_id", "bos_id", "has_chat_template":
            assert getattr(again, field) == getattr(tokenizer, field), field
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        assert again.prompt("hi") == tokenizer.prompt("hi")


def load_with_rows(folder, rows):
    """The config.json of a checkpoint gives the vocabulary size but need not repeat the ids."""
    write(folder / "config.json", vocab_size=rows)
    return load_tokenizer(folder)
