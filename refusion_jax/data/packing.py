"""Packing: several examples per row, so that rows have little padding.

For a finite source the rows are planned over all examples at once; for an endless one, examples are drawn for
each row separately. Either way a row is a function of its index: it does not depend on the rows before it, on
the number of processes or on where a run was resumed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from refusion_jax.data.encoding import Row, hash32
from refusion_jax.data.examples import FiniteExamples, TaskExamples, endless_order, shuffled

_MISSES = 16  # consecutive drawn examples that do not fit, after which a row is complete


@dataclasses.dataclass(frozen=True)
class Plan:
    """An assignment of examples to rows: row r contains the examples `members[borders[r] : borders[r + 1]]`.

    Attributes:
      members: int64 [N], every example once, in the order of the rows.
      borders: int64 [rows + 1].
    """

    members: np.ndarray
    borders: np.ndarray

    def __len__(self) -> int:
        return len(self.borders) - 1


def best_fit(lengths: np.ndarray, row_length: int, most: int) -> Plan:
    """Best-fit packing: puts each example, in order, in the fullest row with room for it, or in a new row.

    Grain's packers work on a stream of whole examples: the contents of a row are known only after all rows
    before it are packed, and each example costs 0.14 ms (over two minutes per million; here 1.5 s).

    Args:
      lengths: int [N], tokens of each example, 1 to row_length.
      row_length: tokens per row.
      most: most examples per row.
    """
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by number of tokens left
    occupied = 0  # bit n is set if with_room[n] is not empty
    row_of, held = np.empty(len(lengths), np.int64), []
    for example, length in enumerate(lengths.tolist()):
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit set
            row = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
        else:
            room, row = row_length, len(held)
            held.append(0)
        row_of[example] = row
        held[row] += 1
        room -= length
        if room and held[row] < most:
            with_room[room].append(row)
            occupied |= 1 << room
    return Plan(np.argsort(row_of, kind="stable"), np.concatenate([[0], np.cumsum(held, dtype=np.int64)]))


class PackedExamples:
    """The examples of a finite source in packed rows, repeated epoch after epoch. See `Examples`.

    `len` is the number of rows per epoch. An epoch has every example once. The rows are planned once, over
    the examples in random order. Each epoch shuffles the rows, and permutes the examples of equal length
    among their entries of the plan. So the examples that share a row change from epoch to epoch while the
    number of rows does not, and any row can be looked up. Without a `shuffle_seed` all epochs are the same,
    as close to the order of the source as packing allows.

    Args:
      examples: the examples, one per row.
      row_length: tokens per row.
      most: most examples per row.
      shuffle_seed: seed of the order, or None.
    """

    def __init__(self, examples: FiniteExamples, row_length: int, most: int, shuffle_seed: int | None):
        self.counts, self.identity = examples.counts, examples.identity
        self.broken_lines = examples.broken_lines
        self._examples = examples
        self._most = most
        self._seed = shuffle_seed
        planned = examples.index.derived(
            f"rows of {row_length}, at most {most}, seed {shuffle_seed}",
            lambda: _plan(examples.lengths, row_length, most, shuffle_seed),
        )
        self._by_length, self._lengths = planned["by_length"], planned["lengths"]
        self._ranks, self._borders = planned["ranks"], planned["borders"]
        self._order = endless_order(len(self), shuffle_seed)

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, row_index: int) -> Row:
        epoch, row = row_index // len(self), self._order[row_index]
        ranks = self._ranks[self._borders[row] : self._borders[row + 1]]
        return pack_rows(
            [self._examples.example(epoch, self._member(epoch, int(rank))) for rank in ranks], self._most
        )

    def _member(self, epoch: int, rank: int) -> int:
        """The example that takes rank `rank` (by length) of the plan in this epoch."""
        if self._seed is not None:
            length = self._lengths[rank]
            first, after = np.searchsorted(self._lengths, [length, length + 1]).tolist()
            seed = hash32(f"pack {self._seed} {epoch} {length}")
            rank = first + shuffled(rank - first, after - first, seed)
        return int(self._by_length[rank])


def _plan(lengths: np.ndarray, row_length: int, most: int, shuffle_seed: int | None) -> dict[str, np.ndarray]:
    """The rows of PackedExamples.

    Returns:
      by_length [N]: the examples in ascending order of length; lengths [N]: their lengths; ranks [N]: places
      in `by_length` of the members of all rows, in the order of the rows; borders [rows + 1], as in `Plan`.
    """
    order = np.arange(len(lengths))
    if shuffle_seed is not None:
        # Sorts raw bits of Philox: they are fixed across versions of NumPy, permutations are not.
        bits = np.random.Philox(key=hash32(f"plan {shuffle_seed}")).random_raw(len(lengths))
        order = np.argsort(bits, kind="stable")
    plan = best_fit(lengths[order], row_length, most)
    by_length = np.argsort(lengths, kind="stable")
    ranks = np.argsort(by_length)[order[plan.members]]
    return {"by_length": by_length, "lengths": lengths[by_length], "ranks": ranks, "borders": plan.borders}


class PackedTaskExamples:
    """Examples of tasks in packed rows. Each row takes those that fit of the examples drawn for it alone.

    Drawn examples that do not fit are skipped, so the last examples of a row are shorter than average. See
    `Examples`.

    Args:
      examples: the examples, one per row.
      row_length: tokens per row.
      most: most examples per row.
    """

    broken_lines = None

    def __init__(self, examples: TaskExamples, row_length: int, most: int):
        self.counts, self.identity = examples.counts, examples.identity
        self._examples = examples
        self._row_length = row_length
        self._most = most
        # More than the examples that a row may draw, and such that each row begins with the next task.
        turns = examples.turns
        self._stride = -(-most * _MISSES // turns) * turns + 1

    def __getitem__(self, row_index: int) -> Row:
        taken, room, misses = [], self._row_length, 0
        candidate = row_index * self._stride
        while len(taken) < self._most and misses < _MISSES and room >= self._examples.shortest:
            row = self._examples[candidate]
            candidate += 1
            if row["total_len"] <= room:
                taken.append(row)
                room, misses = room - row["total_len"], 0
            else:
                misses += 1
        return pack_rows(taken, self._most)


def pack_rows(rows: Sequence[Row], most: int) -> Row:
    """Packs rows of single examples, which must fit, into one row with `most` entries; see `Examples`."""
    tokens = [row["tokens"][: row["total_len"]] for row in rows[:-1]] + [rows[-1]["tokens"]]
    packed = {"tokens": np.concatenate(tokens)[: len(rows[0]["tokens"])]}
    for name in ("prompt_len", "total_len", "example_id"):
        packed[name] = np.zeros(most, np.int32)
        packed[name][: len(rows)] = [row[name] for row in rows]
    return packed
