"""Each reader of the package, its valid files, and how they are damaged."""

import dataclasses
import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fuzzing import gguf_seeds, seeds
from fuzzing.mutations import mutate_bytes, mutate_json, mutate_text
from fuzzing.seeds import Files
from refusion_jax.checkpoints import hugging_face as hf
from refusion_jax.checkpoints import safetensors_io
from refusion_jax.checkpoints.gguf_file import GGUFFile
from refusion_jax.checkpoints.gguf_weights import read_gguf
from refusion_jax.data.sources.example import Broken
from refusion_jax.data.sources.jsonl import JsonlSource
from refusion_jax.errors import BadInput
from refusion_jax.model.rope import frequencies
from refusion_jax.model.transformer import ModelConfig
from refusion_jax.serving.admission import check_fits
from refusion_jax.serving.methods import METHODS, default_settings
from refusion_jax.serving.opened import asked_method
from refusion_jax.serving.request_file import read_lines
from refusion_jax.serving.requests import Defaults, parse
from refusion_jax.tokenizer import ByteTokenizer, load_gguf_tokenizer, load_tokenizer
from refusion_jax.tokenizer.chat_template import compile_template

MESSAGES = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "<think>\n</think>Hm"}]
SIZES = (0, 1, 2, 3, 16, 17, 32, 64, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
SNIPPETS = (
    *("{{", "}}", "{%", "%}", "{#", "{% for x in range(99999) %}", "{% endfor %}", "{% if %}", "{% else %}"),
    *(
        "{{ 'a' * 10000000000 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ [0] * 10000000000 }}",
        "{{ range(10000000000) }}",
    ),
    *("{{ '%10000000000d' % 1 }}", "{{ '{:10000000000}'.format(1) }}", "{{ 'a' | center(10000000000) }}"),
    *("{{ 'a' | indent(1000000000) }}", "{{ 'a'.ljust(10000000000) }}", "{{ 1 << 10000000000 }}"),
    *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ messages.append(1) }}"),
    *("{% include '/etc/passwd' %}", "{% extends '/etc/passwd' %}", "{% import '/etc/passwd' as x %}"),
    *("{% macro r() %}{{ r() }}{% endmacro %}{{ r() }}", "(" * 300, "{{" + "(" * 2000 + ")" * 2000 + "}}"),
    *(
        "{% if 1 %}" * 200,
        "{{ " + "1+" * 3000 + "1 }}",
        "{{ 1 / 0 }}",
        "{{ [] | first.x }}",
        "{{ {}|tojson }}",
    ),
    *(
        "{{ loop | tojson }}",
        "{{ lipsum(1000000) }}",
        "{{ '\\ud800' }}",
        "{{ 1e999 | int }}",
        "\x00",
        "{{ m. }}",
    ),
    *("{% for x in range(99999) %}{% for y in range(99999) %}a{% endfor %}{% endfor %}",),
    *(
        "{{ ('a' * 1000).replace('a', 'a' * 1000).replace('a', 'a' * 1000) }}",
        "{{ 'abc' | replace('', 'x') }}",
    ),
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
      name: its row of the table.
      files: empty folder -> valid sets of files, one of which is damaged in a case.
      read: reads a folder, and uses all that it read.
    """

    name: str
    files: Callable[[Path], list[Files]]
    read: Callable[[Path], object]


def mutate(rng: random.Random, files: Files) -> Files:
    """The files with one of them damaged; rarely one is missing, or holds the content of another."""
    name = rng.choice(sorted(files))
    if rng.random() < 0.02:
        return {other: content for other, content in files.items() if other != name}
    if rng.random() < 0.02:
        return files | {name: files[rng.choice(sorted(files))]}
    return files | {name: mutate_file(rng, name, files[name])}


def mutate_file(rng: random.Random, name: str, content: bytes) -> bytes:
    """A damaged file: two in three by its structure, the others by bytes."""
    kind = name.rpartition(".")[2]
    if kind == "gguf" and rng.random() < 0.9:
        return mutate_gguf(rng, content)
    if kind in ("gz", "model", "gguf") or rng.random() < 0.33:
        return mutate_bytes(rng, content)
    if kind == "json":
        return mutate_json(rng, json.loads(content)).encode()
    if kind == "jsonl":
        lines = content.decode().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = mutate_json(rng, json.loads(lines[number]))
        return "\n".join(lines).encode()
    if kind == "safetensors":
        length = int.from_bytes(content[:8], "little")
        text = mutate_json(rng, json.loads(content[8 : 8 + length])).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]
    snippets = SNIPPETS if kind == "jinja" else ("\n", " ", "a b c", "Ġ", "é", "\r\n", "#version", "\ufeff")
    return mutate_text(rng, content.decode(), snippets).encode("utf-8", "surrogatepass")


def mutate_gguf(rng: random.Random, content: bytes) -> bytes:
    """A GGUF file with bytes of its header damaged, or a number that follows a name."""
    end = content.rfind(b".weight") + 60
    if rng.random() < 0.5:
        return mutate_bytes(rng, content[:end]) + content[end:]
    names = re.finditer(rb"[a-z0-9_]+\.[a-z0-9_.]+", content[:end])
    place = rng.choice([match.end() for match in names]) + rng.choice((-8, 0, 0, 4, 4, 8, 12, 20, 24))
    number = struct.pack(
        *rng.choice((("<I", rng.randrange(14)), ("<I", 2**32 - 1), ("<Q", rng.choice(SIZES))))
    )
    return content[:place] + number + content[place + len(number) :]


def read_safetensors(folder: Path) -> None:
    for tensor in safetensors_io.read_folder(folder).values():
        tensor.whole()


def read_gguf_file(folder: Path) -> None:
    path = min(folder.glob("*.gguf"), default=folder / "model.gguf")
    file = GGUFFile(path)
    fields, tensors = read_gguf(file)
    _whole_model(hf.parse_config(fields, path), tensors, path)
    for tensor in tensors.values():
        tensor.whole()
    _use(load_gguf_tokenizer(file))


def read_config(folder: Path) -> None:
    config = hf.read_config(folder)
    hf.decoding_defaults(folder)
    asked_method(str(folder), None)
    hf.block_len(folder)
    load_tokenizer(folder)
    _whole_model(config, safetensors_io.read_folder(folder), folder)


def _whole_model(config: ModelConfig, tensors, path: Path) -> None:
    hf.from_tensors(config, tensors, path)
    with np.errstate(all="ignore"):
        frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def read_tokenizer(folder: Path) -> None:
    _use(load_tokenizer(folder))


def _use(tokenizer) -> None:
    ids = tokenizer.encode_prompt("the <eos> cat </s>é🙂\n", raw=True)
    tokenizer.decode([*ids, 0, 1, 2, 3, 10**6])
    if tokenizer.has_chat_template:
        tokenizer.encode_prompt(MESSAGES)


def read_template(folder: Path) -> None:
    try:
        text = (folder / "template.jinja").read_bytes().decode()
    except (UnicodeDecodeError, FileNotFoundError):
        raise BadInput("not UTF-8, which the reader of the folder says") from None
    compile_template(text)(MESSAGES, bos_token="<s>", eos_token="</s>", enable_thinking=False)


def read_jsonl(folder: Path) -> None:
    """Raises BadInput if a line is broken, which `train` skips while they are few."""
    source = JsonlSource([min(folder.iterdir(), default=folder / "data.jsonl")])
    broken = [entry for entry in source.entries() if isinstance(entry, Broken)]
    if broken:
        raise BadInput(broken[0].error)


def read_requests(folder: Path) -> None:
    """Raises BadInput if a request of the file is refused, as `sample` does after serving the others."""
    tokenizer, refused = ByteTokenizer(), None
    for number, (_, line) in enumerate(read_lines(folder / "requests.jsonl")):
        method = list(METHODS)[number % len(METHODS)]
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"not JSON ({error})") from None
        try:
            for method in METHODS:
                request = parse(raw, Defaults(method, default_settings(method)), tokenizer, 260)
                check_fits(request, seeds.CONFIG, np.float32)
        except BadInput as error:
            refused = error
    if refused:
        raise refused


READERS = {
    reader.name: reader
    for reader in (
        Reader("safetensors", lambda _: seeds.safetensors_folders(), read_safetensors),
        Reader(
            "GGUF", lambda folder: [gguf_seeds.llama(folder), gguf_seeds.qwen3_parts(folder)], read_gguf_file
        ),
        Reader("tokenizer files", lambda _: seeds.tokenizer_folders(), read_tokenizer),
        Reader("config", lambda _: seeds.config_folders(), read_config),
        Reader("chat template", lambda _: [{"template.jinja": seeds.TEMPLATE.encode()}] * 2, read_template),
        Reader("JSONL", lambda _: seeds.jsonl_files(), read_jsonl),
        Reader("request", lambda _: seeds.request_files(), read_requests),
    )
}
