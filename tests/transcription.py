"""Plan and infill for one prompt in plain Python: a literal transcription of the authors' code.

It shares no code with the package and has no cache. Every forward pass feeds all committed tokens again, in
the order of their commits, under a mask that lets each token see the tokens that it saw when it was committed
(the slots before it after a joint verification, only its own slot after infilling). So its keys and values
are those that a cache would hold.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# tokens [n], positions [n], mask [n, n] -> logits [n, V]
Forward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Step(NamedTuple):
    """One outer iteration. Positions are absolute; `planned` has the position of each slot's first token."""

    block: int
    planned: list[int]
    branch: str
    rounds: int
    committed: list[int]
    forwards: int


class Decoded(NamedTuple):
    """The outcome of one decode.

    Attributes:
      tokens, positions: committed, in commit order, the prompt first.
      sees: for each token the indices, in commit order, of the tokens that it attended to.
      steps: one per outer iteration.
      forwards: model calls.
      seen: names of the branches taken, so that tests can check that all are.
      margin: the smallest change of a logit that would change a decision.
    """

    tokens: list[int]
    positions: list[int]
    sees: list[list[int]]
    steps: list[Step]
    forwards: int
    seen: set[str]
    margin: float

    def in_text_order(self, prompt_len: int) -> tuple[list[int], list[int]]:
        """Tokens and positions of the response, sorted by position."""
        order = np.argsort(self.positions, kind="stable")[prompt_len:]
        return [self.tokens[i] for i in order], [self.positions[i] for i in order]


def decode(
    forward: Forward,
    prompt: Sequence[int],
    *,
    gen_length: int,
    slot_size: int,
    num_blocks: int,
    slot_threshold: float,
    token_threshold: float,
    mask_id: int,
    eos_id: int,
    semantics: str,
    slot_score: str = "first",
    recompute: bool = False,
) -> Decoded:
    """Decodes `prompt` greedily under the semantics "fixed" or "release".

    `slot_score` and `recompute` are not part of the authors' code.
    """
    run = _Run(
        forward, list(prompt), np.float32(slot_threshold), np.float32(token_threshold), mask_id, eos_id
    )
    run.release, run.slot_score, run.recompute = semantics == "release", slot_score, recompute
    length = -(-gen_length // slot_size) * slot_size
    block_len = length // num_blocks
    for block in range(num_blocks):
        start = len(prompt) + block * block_len
        pool = [list(range(slot, slot + slot_size)) for slot in range(start, start + block_len, slot_size)]
        while pool:
            pool = run.outer_iteration(block, pool, slot_size)
        if run.stop:
            break
    return Decoded(run.tokens, run.positions, run.sees, run.steps, run.forwards, run.seen, run.margin)


class _Run:
    def __init__(self, forward, prompt, slot_threshold, token_threshold, mask_id, eos_id):
        self.forward = forward
        self.slot_threshold, self.token_threshold = slot_threshold, token_threshold
        self.mask_id, self.eos_id = mask_id, eos_id
        self.tokens, self.positions = prompt, list(range(len(prompt)))
        self.sees = [list(range(i + 1)) for i in range(len(prompt))]
        self.forwards = 0
        self.steps, self.seen, self.margin = [], set(), np.inf
        self.stop = False

    # Model calls.

    def feed(self, sequences: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        """The logits of several sequences (tokens, positions) in one model call.

        Each sequence is causal, sees the committed tokens, and does not see the other sequences.
        """
        committed = len(self.tokens)
        tokens, positions, sees = list(self.tokens), list(self.positions), list(self.sees)
        for new_tokens, new_positions in sequences:
            start = len(tokens)
            tokens += new_tokens
            positions += new_positions
            for i in range(len(new_tokens)):
                sees.append([*range(committed), *range(start, start + i + 1)])
        mask = np.zeros((len(tokens), len(tokens)), bool)
        for i, seen in enumerate(sees):
            mask[i, seen] = True
        logits = self.forward(np.asarray(tokens), np.asarray(positions), mask)[committed:]
        if not self.release and self.mask_id != self.eos_id:
            logits = np.array(logits)
            logits[:, self.mask_id] = -np.inf  # no answer holds mask tokens
        borders = np.cumsum([len(new_tokens) for new_tokens, _ in sequences])[:-1]
        self.forwards += 1
        return np.split(logits, borders)

    def commit(self, tokens: list[int], positions: list[int], sees: list[list[int]]) -> None:
        self.tokens += tokens
        self.positions += positions
        self.sees += sees

    # Decisions, with their margins.

    def argmax(self, logits: np.ndarray) -> int:
        second, first = np.sort(logits)[-2:]
        self.margin = min(self.margin, float(first - second))
        return int(np.argmax(logits))

    def above(self, probability: np.float32, threshold: np.float32) -> bool:
        if 0 < threshold < 1:
            self.margin = min(self.margin, abs(float(np.log(probability / threshold))))
        return bool(probability > threshold)

    # One plan, its verification and infill; returns the slots that remain in the pool.

    def outer_iteration(self, block: int, pool: list[list[int]], slot_size: int) -> list[list[int]]:
        places = [place for slot in pool for place in slot]
        (logits,) = self.feed([([self.mask_id] * len(places), places)])
        logits = logits.reshape(len(pool), slot_size, -1)
        confidence = [SCORES[self.slot_score](of_slot) for of_slot in logits]
        chosen = [i for i in range(len(pool)) if self.above(confidence[i], self.slot_threshold)]
        if not chosen:
            self.seen.add("fallback")
            if len(pool) > 1:
                second, first = sorted(confidence)[-2:]
                self.margin = min(self.margin, float(np.log(first / second)))
            chosen = [int(np.argmax(confidence))]
        slots = [pool[i] for i in chosen]
        drafts = [[self.argmax(of_token) for of_token in logits[i]] for i in chosen]

        # Verify the concatenation.
        joint, joint_places = joined(drafts), joined(slots)
        (logits,) = self.feed([(joint, joint_places)])
        passes = []
        for j in range(len(joint)):
            first_of_slot = j % slot_size == 0
            passes.append(
                first_of_slot or self.above(probabilities(logits[j - 1])[joint[j]], self.token_threshold)
            )
        n = leading_run(passes)

        if self.eos_id in joint[:n]:
            branch, rounds = "prefix", 0
            end = joint.index(self.eos_id) + 1
            eos_slot = chosen[(end - 1) // slot_size]
            self.seen.add("prefix with EOS")
            self.stop = True
            left = [slot for i, slot in enumerate(pool) if i < eos_slot and i not in chosen]
            self.seen |= {"slots before an EOS are left"} if left else set()
            committed = self.commit_joint(joint[:end], joint_places[:end])
        elif n // slot_size >= 1:
            branch, rounds = "prefix", 0
            self.seen.add("prefix")
            self.seen |= {"drafts rejected"} if n // slot_size < len(chosen) else set()
            end = n // slot_size * slot_size
            accepted = chosen[: n // slot_size]
            left = [slot for i, slot in enumerate(pool) if i not in accepted]
            committed = self.commit_joint(joint[:end], joint_places[:end])
        else:
            branch = "iterative"
            runs = [leading_run(passes[r * slot_size : (r + 1) * slot_size]) for r in range(len(slots))]
            rounds, committed, eos_row = self.infill(drafts, slots, runs)
            left = [slot for i, slot in enumerate(pool) if i not in chosen]
            if eos_row is not None:
                # `release` uses the row number as an index into the pool.
                border = eos_row if self.release else chosen[eos_row]
                left = [slot for i, slot in enumerate(pool) if i not in chosen and i < border]
                lost = [i for i in range(border, chosen[eos_row]) if i not in chosen]
                self.seen |= {"slots before an EOS are lost"} if lost else set()
                self.stop = True
        self.steps.append(Step(block, [slot[0] for slot in slots], branch, rounds, committed, self.forwards))
        self.seen |= {"later blocks"} if block else set()
        return left

    def commit_joint(self, tokens: list[int], places: list[int]) -> list[int]:
        """Commits tokens of a joint verification, where each token saw all tokens before it."""
        base = len(self.tokens)
        self.commit(tokens, places, [list(range(base + i + 1)) for i in range(len(tokens))])
        return places

    def infill(self, rows: list[list[int]], slots: list[list[int]], tags: list[int]):
        """Completes each slot on its own. `tags[r]` leading tokens of row r are accepted.

        Returns:
          the number of rounds, the committed positions, and the first row with an EOS or None.
        """
        size, rounds, a, eos_row = len(rows[0]), 0, 0, None
        self.seen.add("several slots infilled" if len(rows) > 1 else "one slot infilled")
        while min(tags) < size:
            rounds += 1
            masked = [row[:tag] + [self.mask_id] * (size - tag) for row, tag in zip(rows, tags, strict=True)]
            logits = self.feed(list(zip(masked, slots, strict=True)))
            rows = [
                row[:tag] + [self.argmax(of_token) for of_token in of_row[tag:]]
                for row, tag, of_row in zip(rows, tags, logits, strict=True)
            ]
            logits = self.feed(list(zip(rows, slots, strict=True)))
            for r, row in enumerate(rows):
                passes = []
                for j in range(a, size):
                    forced = j == a or j <= tags[r]
                    passes.append(
                        forced or self.above(probabilities(logits[r][j - 1])[row[j]], self.token_threshold)
                    )
                tags[r] = a + leading_run(passes)
            with_eos = [r for r, row in enumerate(rows) if self.eos_id in row[a : tags[r]]]
            if with_eos:
                eos_row = with_eos[0]
                self.seen |= {"rows after an EOS leave"} if len(rows) > eos_row + 1 else set()
                rows, slots, tags = (x[: eos_row + 1] for x in (rows, slots, tags))
                tags[eos_row] = size
                self.seen |= {"rows before an EOS go on"} if min(tags) < size else set()
            # Tokens before index a are not fed again, except the last one that all rows have accepted, whose
            # logits are needed.
            m = min(tags) - a
            a += m if min(tags) == size else m - 1
        tokens, places = joined(rows), joined(slots)
        if self.eos_id in tokens:
            self.seen.add("iterative with EOS")
            end = tokens.index(self.eos_id) + 1
            tokens, places = tokens[:end], places[:end]
        else:
            self.seen.add("iterative")
        if self.recompute and len(rows) > 1:
            self.seen.add("recomputed with EOS" if self.eos_id in tokens else "recomputed")
            self.feed([(tokens, places)])
            return rounds, self.commit_joint(tokens, places), eos_row
        base = len(self.tokens)
        own = [[base + j for j in range(i - i % size, i + 1)] for i in range(len(tokens))]
        self.commit(tokens, places, [[*range(base), *seen] for seen in own])
        return rounds, places, eos_row


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax in float32."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def likeliness(logits: np.ndarray) -> np.float32:
    """exp(-H), with H the mean entropy, in nats, of the softmax of logits [W, V]."""
    p = probabilities(logits)
    return np.exp((p * np.log(np.where(p > 0, p, 1))).sum(-1).mean())


# The score of a slot from its logits [W, V].
SCORES = {
    "first": lambda logits: probabilities(logits[0]).max(),
    "mean": lambda logits: probabilities(logits).max(-1).mean(),
    "entropy": likeliness,
}


def joined(lists: Sequence[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def leading_run(passes: Sequence[bool]) -> int:
    return passes.index(False) if False in passes else len(passes)
