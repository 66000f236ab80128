"""MDM and BD3 decoding for one prompt in plain Python, from the description of the published decoders.

They share no code with the package. Where a method is exact (MDM without a cache, BD3), every forward pass
feeds the whole text again. Where a method caches keys and values, the cache is an explicit dictionary.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

# (tokens [n], positions [n], sees [n, n], cached keys and values by position) ->
# (logits [n, V], keys and values of the fed tokens by position). All fed tokens see the cached ones.
Forward = Callable[[list[int], list[int], np.ndarray, dict[int, Any]], tuple[np.ndarray, dict[int, Any]]]


class Decoded(NamedTuple):
    """The outcome of one decode.

    Attributes:
      tokens: the committed tokens of the response in text order: all tokens of the blocks that were filled.
      steps: the indices in the response that each forward pass committed.
      margin: the smallest change of a log probability that would change a decision.
      seen: names of the branches taken, so that tests can check that all are.
    """

    tokens: list[int]
    steps: list[list[int]]
    margin: float
    seen: set[str]

    def answer(self, eos_id: int) -> list[int]:
        """The tokens up to and including the first EOS."""
        end = self.tokens.index(eos_id) + 1 if eos_id in self.tokens else len(self.tokens)
        return self.tokens[:end]


class _Run:
    """The response so far, and the commit rule."""

    def __init__(self, prompt, gen_length, block_len, tokens_per_step, token_threshold, mask_id, eos_id):
        self.prompt, self.block_len = list(prompt), block_len
        self.per_step, self.threshold = tokens_per_step, np.float32(token_threshold)
        self.mask_id, self.eos_id = mask_id, eos_id
        self.response: list[int | None] = [None] * gen_length
        self.steps, self.margin, self.seen = [], np.inf, set()

    def text(self) -> list[int]:
        return self.prompt + [self.mask_id if token is None else token for token in self.response]

    def masked(self, block: range) -> list[int]:
        return [place for place in block if self.response[place] is None]

    def commit(self, block: range, logits: dict[int, np.ndarray]) -> None:
        """Commits the most confident masked tokens of the block; `logits` [V] by index in the response."""
        drafts, confidence = {}, {}
        for place in self.masked(block):
            real = logits[place].astype(np.float64).copy()
            real[self.mask_id] = -np.inf
            second, first = np.sort(real)[-2:]
            self.margin = min(self.margin, first - second)
            drafts[place] = int(np.argmax(real))
            confidence[place] = np.float32(first - np.log(np.sum(np.exp(real - first))) - first)
        order = sorted(confidence, key=lambda place: (-confidence[place], place))
        limit = np.log(self.threshold) if self.threshold > 0 else -np.inf
        surest = order[: self.per_step]
        above = [place for place in order if confidence[place] > limit]
        chosen = set(surest) | set(above)
        if len(order) > self.per_step:
            gap = confidence[order[self.per_step - 1]] - confidence[order[self.per_step]]
            self.margin = min(self.margin, gap)
            self.margin = min([self.margin, *(abs(confidence[place] - limit) for place in order)])
        self.seen |= {"above the threshold"} if set(above) - set(surest) else set()
        self.seen |= {"below the threshold"} if set(surest) - set(above) else set()
        self.seen |= {"a block takes several passes"} if len(chosen) < len(order) else set()
        for place in chosen:
            self.response[place] = drafts[place]
        self.steps.append(sorted(chosen))

    def blocks(self) -> Iterable[range]:
        """The blocks in order; stops after a block that has an EOS once it is filled."""
        for start in range(0, len(self.response), self.block_len):
            block = range(start, start + self.block_len)
            self.seen |= {"later blocks"} if start else set()
            yield block
            if self.eos_id in [self.response[place] for place in block]:
                self.seen |= {"blocks are left out"} if block.stop < len(self.response) else set()
                self.seen.add("EOS")
                return

    def decoded(self) -> Decoded:
        there = [token for token in self.response if token is not None]
        return Decoded(there, self.steps, float(self.margin), self.seen)


def mdm(
    forward: Forward,
    prompt: Sequence[int],
    *,
    gen_length: int,
    num_blocks: int,
    tokens_per_step: int,
    token_threshold: float,
    cache: str,
    mask_id: int,
    eos_id: int,
) -> Decoded:
    """LLaDA's decoding, with Fast-dLLM's threshold and caches."""
    run = _Run(
        prompt, gen_length, gen_length // num_blocks, tokens_per_step, token_threshold, mask_id, eos_id
    )
    length = len(prompt) + gen_length
    for block in run.blocks():
        start, end = len(prompt) + block.start, len(prompt) + block.stop
        kept: dict[int, Any] = {}
        first = True
        while run.masked(block):
            if first or cache == "none":
                fed = range(length)
            elif cache == "prefix":
                fed = range(start, length)
            else:
                fed = range(start, end)
            text = run.text()
            outside = {position: kv for position, kv in kept.items() if position not in fed}
            everything = np.ones((len(fed), len(fed)), bool)
            logits, fresh = forward([text[i] for i in fed], list(fed), everything, outside)
            if first:
                kept = {"none": {}, "prefix": {i: fresh[i] for i in range(start)}, "dual": fresh}[cache]
            first = False
            run.commit(block, {place: logits[len(prompt) + place - fed.start] for place in block})
    return run.decoded()


def bd3(
    forward: Forward,
    prompt: Sequence[int],
    *,
    gen_length: int,
    block_len: int,
    tokens_per_step: int,
    token_threshold: float,
    mask_id: int,
    eos_id: int,
) -> Decoded:
    """Block diffusion. Every pass feeds the prompt and all blocks up to and including the current one."""
    run = _Run(prompt, gen_length, block_len, tokens_per_step, token_threshold, mask_id, eos_id)
    for block in run.blocks():
        length = len(prompt) + block.stop
        sees = np.zeros((length, length), bool)
        for i in range(length):
            of_block = (i - len(prompt)) // block_len
            last = i if i < len(prompt) else len(prompt) + (of_block + 1) * block_len - 1
            sees[i, : last + 1] = True
        while run.masked(block):
            logits, _ = forward(run.text()[:length], list(range(length)), sees, {})
            run.commit(block, {place: logits[len(prompt) + place] for place in block})
    return run.decoded()
