"""Prompts: BOS, chat templates and their options, the same in training and in sampling."""

import io

import pytest
import sentencepiece
from tokenizer_files import trained, write_json, write_vocab_and_merges
from tokenizers import processors

from refusion_jax.data.examples import Encoder
from refusion_jax.data.sources.example import Example
from refusion_jax.errors import BadInput
from refusion_jax.tokenizer import ByteTokenizer, load_tokenizer

HI = [{"role": "user", "content": "hi"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
# The end of Qwen3's template, and the beginning of Llama 3.2's.
THINKING = (
    "{%- if add_generation_prompt %}{{- 'assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
DATE = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = "
    'strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}'
    "{{- date_string }}{%- if tools is not none %} with tools{%- endif %}"
)


def folder_of(tmp_path, before=(), after=(), **settings):
    """A tokenizer.json that puts special tokens around a text."""
    backend = trained("gpt-2")
    names = [*before, *after]
    if names:
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=[*before, "$A", *after],
                    special_tokens=[(n, backend.token_to_id(n)) for n in names],
                ),
            ]
        )
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>", **settings})
    return tmp_path


# BOS


def test_a_raw_text_begins_with_what_the_tokenizer_puts_before_it(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, ["<|im_start|>"], ["<|im_end|>"]))
    (start,) = tokenizer.encode("<|im_start|>")
    ids = tokenizer.encode("hi")
    assert start not in ids  # encode itself adds nothing
    assert tokenizer.encode_prompt("hi") == [start, *ids]
    assert tokenizer.encode_prompts(["hi", ""]) == [[start, *ids], [start]]
    # A BOS written in the text is repeated, as in `transformers`.
    assert tokenizer.encode_prompt("<|im_start|>hi") == [start, start, *ids]


def test_a_rendered_prompt_begins_with_what_the_template_writes(tmp_path):
    settings = {"chat_template": TEMPLATE, "bos_token": "<|im_start|>"}
    tokenizer = load_tokenizer(folder_of(tmp_path, ["<|im_start|>"], **settings))
    text = "<|im_start|>[user]hi"
    assert tokenizer.prompt("hi") == text
    for query in "hi", HI:
        assert tokenizer.encode_prompt(query) == tokenizer.encode(text)
    assert tokenizer.encode_prompt("hi", raw=True) == tokenizer.encode("<|im_start|>hi")


def test_nothing_is_put_before_where_the_tokenizer_does_not(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, bos_token="<|im_start|>", add_bos_token=True))
    # tokenizer.json overrides the settings.
    assert tokenizer.encode_prompt("hi") == tokenizer.encode("hi")
    assert ByteTokenizer().encode_prompt("hi") == list(b"hi")


@pytest.mark.parametrize("asked", [True, False, None])
def test_with_vocab_and_merges_the_settings_ask_for_bos(tmp_path, asked):
    folder = write_vocab_and_merges(
        tmp_path / "slow",
        trained("gpt-2"),
        "GPT2Tokenizer",
        bos_token="<|im_start|>",
        add_bos_token=asked,
        add_eos_token=True,
    )
    tokenizer = load_tokenizer(folder)
    begin = tokenizer.encode("<|im_start|>") if asked else []
    assert tokenizer.encode_prompt("hi") == [*begin, *tokenizer.encode("hi")]
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode_prompt("hi") == tokenizer.encode_prompt("hi")


def test_training_data_begins_as_prompts_do(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, ["<|im_start|>"]))
    (encoded,) = Encoder(tokenizer, 32).encode([Example("hi", "ho")], [0])
    assert encoded.prompt == tokenizer.encode_prompt("hi") != tokenizer.encode("hi")
    assert encoded.response == [*tokenizer.encode("ho"), tokenizer.eos_id]


def test_training_data_is_told_of_thinking(tmp_path):
    template = "{{ messages[0].content }}{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    tokenizer = load_tokenizer(folder_of(tmp_path, chat_template=template))
    for options, text in (({}, "hi"), ({"enable_thinking": False}, "hiFalse")):
        (encoded,) = Encoder(tokenizer, 32, options).encode([Example("hi", "ho")], [0])
        assert encoded.prompt == tokenizer.encode(text)


# SentencePiece


@pytest.fixture(scope="module")
def piece_model():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<user>"],
        control_symbols=["<control>"],
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def pieces(tmp_path, piece_model, **settings):
    (tmp_path / "tokenizer.model").write_bytes(piece_model)
    write_json(tmp_path / "tokenizer_config.json", settings)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "begins"),
    [
        ({}, False),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, False),
        ({"add_bos_token": True}, True),
    ],
)
def test_a_sentencepiece_text_begins_with_bos_where_asked(tmp_path, piece_model, settings, begins):
    tokenizer = pieces(tmp_path, piece_model, **settings)
    assert tokenizer.encode_prompt("cat") == [1] * begins + tokenizer.encode("cat")


@pytest.mark.parametrize("legacy", [None, True, False])
def test_space_before_stretches_of_a_sentencepiece_text(tmp_path, piece_model, legacy):
    tokenizer = pieces(tmp_path, piece_model, legacy=legacy)
    word = tokenizer.encode("cat")
    later = tokenizer.encode("</s>cat")
    assert later[0] == tokenizer.eos_id
    # Only if `legacy` is false, no space is added to a segment after a special token.
    assert (later[1:] == word) == (legacy is not False)
    # Control and user-defined pieces are both split off.
    for mark in "<control>", "<user>", "<unk>":
        assert tokenizer.encode(f"cat{mark}cat") == [*word, *tokenizer.encode(mark), *later[1:]]
        assert len(tokenizer.encode(mark)) == 1


def test_tokens_added_to_a_sentencepiece_model(tmp_path, piece_model):
    decoder = {"1000": {"content": "<|go|>", "special": True}, "1001": {"content": "<think>"}}
    tokenizer = pieces(tmp_path, piece_model, added_tokens_decoder=decoder, mask_token="<|go|>")
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (1000, 1002)
    new = tokenizer.with_token("bos", "<|new|>")
    ids = new.encode("the cat<|go|><think> sat</s>")
    assert [i for i in ids if i >= 1000] == [1000, 1001]
    assert new.decode([new.bos_id, *ids]) == "the cat<think>  sat"  # a segment adds a space
    saved = tmp_path / "saved"
    saved.mkdir()
    new.save(saved)
    again = load_tokenizer(saved)
    assert (again.mask_id, again.bos_id) == (1000, 1002)
    assert again.encode("the cat<|go|><think> sat</s>") == ids
    for fields, message in [
        ({"1": {"content": "<x>"}}, r"added token '<x>' has the id 1, which in tokenizer.model is '<s>'"),
        ({"1000": {"content": "<x>", "rstrip": True}}, "needs a tokenizer.json"),
    ]:
        with pytest.raises(BadInput, match=message):
            pieces(tmp_path, piece_model, added_tokens_decoder=fields)


# Chat templates


def rendered(tmp_path, template, messages=HI, settings=None, **options):
    folder = folder_of(tmp_path, chat_template=template, **(settings or {}))
    return load_tokenizer(folder).render(messages, **options)


def test_thinking_is_on_unless_switched_off(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, chat_template=THINKING))
    assert tokenizer.prompt("hi") == tokenizer.prompt("hi", enable_thinking=True) == "assistant\n"
    off = "assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.prompt("hi", enable_thinking=False) == off
    assert tokenizer.encode_prompt(HI, enable_thinking=False) == tokenizer.encode(off)
    assert tokenizer.encode_prompts([HI, "a"], enable_thinking=False) == [tokenizer.encode(off)] * 2
    assert tokenizer.prompt("hi", raw=True, enable_thinking=False) == "hi"


def test_a_prompt_does_not_depend_on_the_day(tmp_path):
    assert rendered(tmp_path, DATE) == "26 Jul 2024"
    assert rendered(tmp_path, DATE, date_string="1 Jan 2030") == "1 Jan 2030"
    assert rendered(tmp_path, DATE, strftime_now=lambda form: f"<{form}>") == "<%d %b %Y>"
    with pytest.raises(BadInput, match="'strftime_now' is undefined"):
        rendered(tmp_path, "{{ strftime_now('%Y') }}")


def test_tools_and_documents_are_none(tmp_path):
    assert rendered(tmp_path, "{{ tools is none }}{{ documents is none }}") == "TrueTrue"
    assert rendered(tmp_path, DATE, tools=[]) == "26 Jul 2024 with tools"


def test_generation_blocks_change_nothing_in_the_text(tmp_path):
    template = (
        "{% set x = 'out' %}{% for m in messages %}\n"
        "{% generation %}\n{% set x = 'in' %}{{ m.content }}{{ x }}{{ loop.index }}\n{% endgeneration %}\n"
        "{{ x }}{% endfor %}"
    )
    assert rendered(tmp_path, template) == "hiin1\nout"
    with pytest.raises(BadInput, match="chat_template: line 1"):
        rendered(tmp_path, "{% generation %}")


def test_loops_may_be_left(tmp_path):
    template = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}"
    )
    assert rendered(tmp_path, template + "{% endfor %}") == "02"


def test_json_keeps_what_html_escapes(tmp_path):
    template = "{{ {'b': '<é&>', 'a': 1} | tojson(indent=1, sort_keys=true, separators=(',', ':')) }}"
    assert rendered(tmp_path, template) == '{\n "a":1,\n "b":"<é&>"\n}'


def test_token_texts_are_those_of_the_settings(tmp_path):
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}"
    folder = folder_of(tmp_path, chat_template=template, unk_token="<?>", bos_token=None)
    backend = trained("gpt-2")
    ids = {f"{role}_token_id": backend.token_to_id("<|endoftext|>") for role in ("bos", "pad")}
    write_json(folder / "config.json", ids)
    # A token that the settings set to null is absent, though config.json has its id; for an unset one
    # the text of the id is used.
    assert load_tokenizer(folder).prompt("hi") == "|<|im_end|>|<|endoftext|>|<?>"


def test_a_failing_prompt_is_named(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path, chat_template="{{ raise_exception('no') }}"))
    with pytest.raises(BadInput, match="TemplateError: no; the prompt is 'hi'"):
        tokenizer.encode_prompts(["hi"])
    with pytest.raises(BadInput, match="messages is empty"):
        tokenizer.encode_prompt([])


# Special ids


def test_a_mask_is_needed_only_where_it_is_used(tmp_path):
    tokenizer = load_tokenizer(folder_of(tmp_path))
    assert tokenizer.mask_id is None
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi"
    with pytest.raises(BadInput, match=r"mask_token_id is missing.*--add_tokens=mask"):
        tokenizer.need_mask()
    assert tokenizer.with_token("mask", "<m>").need_mask() == tokenizer.vocab_size


def test_of_several_eos_ids_the_tokenizers_counts(tmp_path):
    folder = folder_of(tmp_path)
    end, first = (trained("gpt-2").token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>"))
    write_json(folder / "config.json", {"eos_token_id": [first, 3, end]})
    assert load_tokenizer(folder).eos_id == end
    write_json(folder / "config.json", {"eos_token_id": [first, 3]})
    assert load_tokenizer(folder).eos_id == first
