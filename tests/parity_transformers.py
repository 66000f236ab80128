"""Compares with the real `transformers` on PyTorch, and prints what it finds. Not a test: it needs torch.

    make parity

Everything is float32 on a CPU. Exit code 1 if any row is beyond its limit.
"""

import argparse
import contextlib
import io
import itertools
import os
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import torch
import transformers

from refusion_jax import convert, load
from refusion_jax.baselines.decoders import ar
from refusion_jax.baselines.decoders.config import ARConfig
from refusion_jax.tokenizer import ByteTokenizer

RANDOM_LIMIT, SMOLLM2_LIMIT = 1e-4, 1e-3  # largest difference of a logit
CONFIGS = {
    "qwen3": transformers.Qwen3Config,
    "qwen2": transformers.Qwen2Config,
    "llama": transformers.LlamaConfig,
}
LENGTH = {"original_max_position_embeddings": 32}
SCALINGS = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | LENGTH,
    "yarn": {"rope_type": "yarn", "factor": 4.0} | LENGTH,
    "yarn, exact": {"rope_type": "yarn", "factor": 2.5, "truncate": False, "attention_factor": 0.8} | LENGTH,
}
QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child in two sentences.",
    "List three uses of a paper clip.",
    "What is 17 + 25?",
    "Translate to Spanish: Good morning, my friend.",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "Give me a short recipe for pancakes.",
    "Why is the sky blue?",
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, two men walked on the Moon while a third stayed in orbit above them.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Water boils at a hundred degrees, unless you are on a mountain.",
    "東京は日本の首都です。人口は約1400万人です。",
    "🙂 Emoji, naïve café, Ελληνικά, русский.",
    "SELECT name, COUNT(*) FROM users GROUP BY name HAVING COUNT(*) > 1;",
    "Once upon a time",
    "a",
    "Q: What is the largest planet?\nA: Jupiter.\nQ: And the smallest?\nA:",
)
failures = 0


def row(name: str, found: str, good: bool) -> None:
    global failures
    failures += not good
    print(f"  {name:<46} {found:<28} {'ok' if good else 'BEYOND ITS LIMIT'}", flush=True)


def their_logits(model, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    # Without a mask they would take a fall in the positions for the border of another text.
    ones = torch.ones(tokens.shape, dtype=torch.long)
    with torch.no_grad():
        fed = {"input_ids": torch.tensor(tokens), "position_ids": torch.tensor(positions)}
        return model(**fed, attention_mask=ones).logits.numpy()


def our_logits(folder: Path, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    model, params, _ = load(folder)
    return np.asarray(jax.jit(model.apply)({"params": params}, tokens, positions)[0])


def converted(source: Path, folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        convert.convert(source, folder)


def read(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compare_random_models(folder: Path) -> None:
    """Their folder read by us, and by them again after it went through both our layouts."""
    print(f"random models, largest difference of a logit, limit {RANDOM_LIMIT:.0e}")
    rng = np.random.default_rng(0)
    for number, (family, tied, (name, scaling)) in enumerate(
        itertools.product(CONFIGS, (False, True), SCALINGS.items())
    ):
        kv_heads = (4, 2, 1)[number % 3]
        config = CONFIGS[family](
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=32 if family == "qwen3" else 16,
            tie_word_embeddings=tied,
            max_position_embeddings=256,
            initializer_range=0.15,
            rope_parameters=scaling | {"rope_theta": 10000.0},
        )
        torch.manual_seed(number)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # norms and biases too: all ones and zeros hide mistakes
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1.0, 0.2)
        theirs, ours, back = (folder / f"{number}{part}" for part in ("theirs", "ours", "back"))
        model.save_pretrained(theirs)
        ByteTokenizer().save(theirs)
        converted(theirs, ours)
        converted(ours, back)
        tokens = rng.integers(0, 300, (2, 24))
        positions = np.stack([rng.permutation(200)[:24] for _ in range(2)])
        wanted = their_logits(model, tokens, positions)
        imported = max(np.abs(our_logits(f, tokens, positions) - wanted).max() for f in (theirs, ours))
        exported = np.abs(their_logits(read(back), tokens, positions) - wanted).max()
        found = f"import {imported:.1e}, export {exported:.1e} of {np.abs(wanted).max():.0f}"
        head = f"{family}, {'tied' if tied else 'untied'}, {kv_heads} kv heads, {name}"
        row(head, found, imported < RANDOM_LIMIT and exported == 0)


def compare_smollm2(gguf: Path, folder: Path) -> None:
    """A real model: their reader of GGUF files, ours, and theirs on the folder that ours exported."""
    ours = folder / "smollm2"
    converted(gguf, ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    exported, tokenizer = read(ours), load(ours)[2]
    print(f"SmolLM2, largest difference of a logit, limit {SMOLLM2_LIMIT:.0e}")
    prompts = [tokenizer.encode(text) for text in TEXTS]
    prompts += [tokenizer.encode_prompt(text) for text in QUESTIONS]
    worst = {"transformers on the GGUF file": 0.0, "transformers on our folder": 0.0}
    for prompt in prompts:
        tokens = np.asarray([prompt])
        positions = np.arange(len(prompt))[None]
        found = our_logits(ours, tokens, positions)
        for name, model in zip(worst, (theirs, exported), strict=True):
            worst[name] = max(worst[name], np.abs(their_logits(model, tokens, positions) - found).max())
    for name, difference in worst.items():
        row(f"{name}, {len(prompts)} prompts", f"{difference:.1e}", difference < SMOLLM2_LIMIT)
    compare_text(ours, exported)


def compare_text(folder: Path, theirs) -> None:
    """Greedy answers to chat prompts."""
    model, params, tokenizer = load(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode_prompt(text) for text in QUESTIONS]
    config = ARConfig(mask_id=tokenizer.eos_id, eos_id=tokenizer.eos_id, gen_length=64, first_token="next")
    samples = jax.device_get(ar.DECODER.sample(model, params, prompts, config))
    same_prompts = same_answers = 0
    for i, (question, prompt) in enumerate(zip(QUESTIONS, prompts, strict=True)):
        chat = [{"role": "user", "content": question}]
        fed = their_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        same_prompts += fed["input_ids"][0].tolist() == prompt
        with torch.no_grad():
            answer = theirs.generate(**fed, max_new_tokens=64, do_sample=False)[0, len(prompt) :]
        ours = tokenizer.decode(samples.raw_ids[i, : samples.num_ids[i]])
        same_answers += ours == their_tokenizer.decode(answer, skip_special_tokens=True)
    number = len(QUESTIONS)
    row("chat prompts with equal ids", f"{same_prompts} of {number}", same_prompts == number)
    row("greedy answers with equal text", f"{same_answers} of {number}", same_answers == number)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "gguf", type=Path, nargs="?", help="SmolLM2-135M-Instruct.Q4_1.gguf; without it only random models"
    )
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, jax {jax.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        compare_random_models(Path(folder))
        if flags.gguf:
            compare_smollm2(flags.gguf, Path(folder))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
