"""Samples general text from the starting model: user turns from its chat template, then its answers to them.

    python docs/comparison/general_text.py --start=start --turns=24000 --output=text.jsonl

Training on this text beside the tasks keeps the model from forgetting, without text from other sources. User
turns that end within --longest tokens are kept, each once, and so are their answers: about one turn in
seven. Writes {"query", "response"} lines.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from refusion_jax import load
from refusion_jax.baselines.decoders.config import ARConfig
from refusion_jax.serving import engine as serving
from refusion_jax.serving.requests import Request

FEWEST, MOST = 8, 800  # characters of a turn


def continued(opened, prompts: Sequence[Sequence[int]], longest: int, temperature: float, rows: int):
    """(number of a prompt, its continuation as text) of continuations that end within `longest` tokens."""
    model, params, tokenizer = opened
    requests = [
        Request(i, prompt, ARConfig(tokenizer.mask_id, tokenizer.eos_id, longest, temperature, seed=i))
        for i, prompt in enumerate(prompts)
    ]
    shape = serving.fitting_shape(requests, rows)
    for number, samples in serving.decoded(model, params, requests, shape):
        length = int(samples.num_ids)
        text = tokenizer.decode(samples.raw_ids[:length].tolist()).strip()
        if length < int(samples.num_raw) and len(text) >= FEWEST:
            yield number, text


def conversations(opened, flags: argparse.Namespace) -> Iterator[dict[str, str]]:
    tokenizer = opened[2]
    begin = tokenizer.encode("<|im_start|>user\n")
    turns = continued(opened, [begin] * flags.turns, flags.longest, 1.0, flags.batch_size)
    queries = sorted({text for _, text in turns if len(text) <= MOST})
    prompts = tokenizer.encode_prompts(queries)
    for number, text in continued(opened, prompts, flags.longest_answer, 0.7, flags.batch_size):
        yield {"query": queries[number], "response": text}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", required=True, help="the model to sample from")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--turns", type=int, default=24000, help="user turns to sample (default %(default)s)")
    parser.add_argument("--longest", type=int, default=192, help="tokens of one (default %(default)s)")
    parser.add_argument("--longest_answer", type=int, default=320, help="of an answer (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=1024, help="decoded together (default %(default)s)")
    flags = parser.parse_args()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    opened = load(flags.start, dtype=dtype)
    lines = [json.dumps(c, ensure_ascii=False) + "\n" for c in conversations(opened, flags)]
    flags.output.write_text("".join(lines), encoding="utf-8")
    print(f"{flags.output}: {len(lines)} conversations")


if __name__ == "__main__":
    main()
