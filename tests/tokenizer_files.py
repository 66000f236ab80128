"""Texts that are difficult for tokenizers, and small byte-level BPE vocabularies in every layout of files.

The pipelines are built as in the published tokenizer.json of each family, from the library's own components
where they exist, so that they are independent of the package's code.
"""

import json

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
PLAIN = ["<think>", "</think>"]  # added tokens that are part of the text

TEXTS = [
    *(
        "",
        " ",
        "   ",
        "\n",
        "\r\n",
        "\t\t x",
        " \n \n\n  a",
        "trailing \t ",
        "\n leading",
        "a" + " " * 99 + "b",
    ),
    "Hello, world! don't DON'T I'LL we've 'S it's y'all '' ''s",
    "1234567890 12.5e-3 3,000,000 0x1F ½ ² Ⅻ ١٢٣ \uff11\uff12\uff13",
    "天地玄黃\uff0c宇宙洪荒。こんにちは世界、カタカナ ﾊﾝｶｸ 안녕하세요 中英mixed文字123混合 𠀀𠮷",
    "👩\u200d👩\u200d👧\u200d👦 family 👨🏽\u200d💻 🏳\ufe0f\u200d🌈 🇩🇪🇫🇷 ❤\ufe0f ☺ ☺\ufe0f" + "😀" * 20,
    "e\u0301 é a\u0308\u0323 \u0301 n\u0303o\u0302\u0301 \u212b \u1e9b\u0323 \ufb01 Z\u0338\u0322\u031ba",
    "שלום עולם مرحبا بالعالم \u202eRTL\u202c \u200f ﷺ हिन्दी देवनागरी ไทย தமிழ் Ελληνικά Русский İıŞş ßẞ",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31m\x7f\x80\x85\x9f",
    "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\u2029h \u00ad\ufffd\uffff\U0010ffff\ue000",
    "def f(x):\n    return x**2  # comment\n\n\tif True:\n\t\tpass\r\n#include <stdio.h>\r\n",
    'SELECT * FROM t WHERE a=\'x\' AND b<>"y"; {"a": [1, 2.5, null], "b": "\\u00e9"} \\frac{a}{b} x_i^2',
    "https://example.com/a?b=c&d=%20#frag user@host.tld C:\\path ▁▁ Ġ Ċ Ã",
    "x" * 3000 + "ab1" * 300 + "天" * 500 + "!?" * 200 + "\n" * 100,
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>a<|mask|>b <|mask|> <think>\n</think>天<|im_end|>",
    "<|im_start| im_end|> <|IM_END|> <|im_end|><th<think>ink>",
    "Xyzzy",  # a token that no merges produce
]

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pipeline(style):
    """An untrained byte-level BPE pipeline of a family: gpt-2, smollm, qwen2 or llama-bpe."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=style == "llama-bpe"))
    by_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if style in ("qwen2", "llama-bpe"):
        regex = QWEN2 if style == "qwen2" else QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
        split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    elif style == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, by_regex])
    else:
        backend.pre_tokenizer = by_regex
    if style == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def trained(style):
    """A trained pipeline; its special and plain added tokens have the ids that follow the vocabulary."""
    # Merges for all kinds of words, so that only the split into words can prevent a merge.
    backend = pipeline("gpt-2")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS[:-1] * 2, trainer)
    state = json.loads(pipeline(style).to_str())
    model = json.loads(backend.to_str())["model"]
    vocab = model["vocab"] | {TEXTS[-1]: len(model["vocab"])}
    state["model"] |= {"vocab": vocab, "merges": model["merges"]}
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    return backend


def recorded(backend):
    """The `added_tokens_decoder` of a pipeline's tokenizer_config.json."""
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    tokens = backend.get_added_tokens_decoder()
    return {str(i): {flag: getattr(token, flag) for flag in flags} for i, token in tokens.items()}


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_vocab_and_merges(folder, backend, tokenizer_class, **settings):
    """The older layout: vocab.json, merges.txt and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    backend.model.save(str(folder))
    settings = {"tokenizer_class": tokenizer_class, "eos_token": "<|im_end|>", **settings}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": recorded(backend), **settings})
    return folder


def encodings(backend):
    return [encoding.ids for encoding in backend.encode_batch(TEXTS, add_special_tokens=False)]
