"""Exact verification of one prompt in plain Python: a literal transcription of its rules.

It shares no code with the package and has no cache. Every forward pass is a whole sequence under plain causal
attention: the prompt, the committed tokens and what follows them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

# tokens [n], positions [n], mask [n, n] -> logits [n, V]
Forward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Pass(NamedTuple):
    """One pass: the place of its first token, drafts verified and accepted, bonus, if masks rode along."""

    start: int
    drafted: int
    accepted: int
    bonus: int | None
    ahead: bool


class Decoded(NamedTuple):
    """The response, its passes, and the smallest change of a number that would change a decision."""

    tokens: list[int]
    passes: list[Pass]
    margin: float


def decode(
    forward: Forward,
    prompt: Sequence[int],
    *,
    gen_length: int,
    draft_length: int,
    size: int,
    mask_id: int,
    eos_ids: Sequence[int],
    first_token: str = "next",
    border_every: int = 0,
    temperature: float = 0.0,
    seed: int = 0,
    draft_from: str = "masks",
) -> Decoded:
    """Decodes `prompt`; `size` is Q, the most tokens that a pass feeds."""

    def without_masks(*arguments: np.ndarray) -> np.ndarray:
        logits = np.array(forward(*arguments))
        if mask_id not in eos_ids:
            logits[..., mask_id] = -np.inf  # no answer holds mask tokens
        return logits

    run = _Run(without_masks, temperature, seed)
    tokens, drafts, confidence, passes = [], [], [], []
    while True:
        context, start, m = list(prompt) + tokens, len(tokens), len(drafts)
        # The AR reading of each place, off the token before it or off a mask token in the place.
        readings, masks = [], 0
        for i in range(m + 1):
            place = start + i
            at_border = border_every > 0 and place % border_every == 0
            off_mask = first_token == "mask" if place == 0 else at_border
            masks += off_mask
            before = context + drafts[:i]
            readings.append(run.choose(before + [mask_id] * off_mask, place)[0])
        accepted = 0
        while accepted < m and drafts[accepted] == readings[accepted]:
            accepted += 1

        # Masks ride along for the likely outcomes, while they fit.
        survival, outcomes = 1.0, []
        for k in range(m + 1):
            if not any(token in eos_ids for token in drafts[:k]):
                outcomes.append((survival * (1 - confidence[k] if k < m else 1), k))
            survival *= confidence[k] if k < m else 1
        room, riding = size - 1 - m - masks, {}
        outcomes *= draft_from == "masks"
        run.margins += [abs(p - q) for p, k in outcomes for q, j in outcomes if j < k]
        for _, k in sorted(outcomes, key=lambda outcome: (-outcome[0], outcome[1])):
            wanted = min(draft_length, gen_length - start - k - 2)
            length = min(wanted + 1 if wanted > 0 else 0, room)
            room -= wanted + 1 if wanted > 0 else 0
            if length > 1:
                riding[k] = length
            room = max(room, 0)

        committed = readings[: accepted + 1]
        ends = [i for i, token in enumerate(committed) if token in eos_ids]
        committed = committed[: ends[0] + 1] if ends else committed
        tokens += committed
        done = bool(ends) or len(tokens) >= gen_length
        bonus = committed[-1] if len(committed) == accepted + 1 else None
        before = context + drafts[:accepted]
        drafts, confidence = [], []
        for j in range(1, riding.get(accepted, 0)):
            token, probability = run.choose(before + [mask_id] * (j + 1), start + accepted + j)
            drafts.append(token)
            confidence.append(probability)
            if token in eos_ids:
                break
        ahead = bool(drafts) and not done
        if draft_from == "lookup":
            most = min(draft_length, gen_length - len(tokens) - 1)
            for token in looked_up(list(prompt) + tokens)[: max(most, 0)]:
                drafts.append(token)
                confidence.append(1.0)  # not read
                if token in eos_ids:
                    break
        passes.append(Pass(start, m, accepted, bonus, ahead))
        if done:
            return Decoded(tokens, passes, min(run.margins, default=np.inf))


def looked_up(context: list[int]) -> list[int]:
    """What followed the latest earlier occurrence of the last three, two or one tokens."""
    for n in (3, 2, 1):
        for end in range(len(context) - 1, n - 1, -1):
            if context[end - n : end] == context[-n:]:
                return context[end:]
    return []


class _Run:
    def __init__(self, forward: Forward, temperature: float, seed: int):
        self.forward, self.temperature, self.seed = forward, temperature, seed
        self.margins: list[float] = []

    def choose(self, sequence: list[int], place: int) -> tuple[int, float]:
        """The token of a response place read off the end of a sequence, and its probability."""
        n = len(sequence)
        logits = self.forward(np.asarray(sequence), np.arange(n), np.tri(n, dtype=bool))[-1].astype(
            np.float64
        )
        noisy = logits
        if self.temperature > 0:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), place), 0)
            noisy = logits + self.temperature * np.asarray(jax.random.gumbel(key, logits.shape))
        second, first = np.sort(noisy)[-2:]
        self.margins.append(float(first - second))
        token = int(np.argmax(noisy))
        return token, float(np.exp(logits - logits.max())[token] / np.exp(logits - logits.max()).sum())
