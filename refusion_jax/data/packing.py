"""Several examples in a row, so that little of what is fed is padding.

Which examples share a row is planned over all of a finite source at once, and drawn row by row from an
endless one. Either way a row is a function of its number, as examples are: no row depends on those before
it, on the number of processes or on where a run was resumed.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from refusion_jax.data.examples import FiniteExamples, Row, TaskExamples, endless_order, hash32, shuffled

_MISSES = 16  # examples one after the other that do not fit, after which a row is left as it is


@dataclasses.dataclass(frozen=True)
class Plan:
    """Row r holds the examples `members[borders[r] : borders[r + 1]]`.

    Attributes:
      members: int64 [N], every example once.
      borders: int64 [rows + 1].
    """

    members: np.ndarray
    borders: np.ndarray

    def __len__(self) -> int:
        return len(self.borders) - 1


def best_fit(lengths: np.ndarray, row_length: int, most: int) -> Plan:
    """Puts each example, in the order given, where it leaves the least room, or begins a new row.

    Ours, as Grain's packers work on a stream of whole examples: what stands in a row is known only once all
    before it are packed, and each example costs 0.14 ms (a million: over two minutes, here 1.5 s).

    Args:
      lengths: int [N], each of 1 … row_length.
      row_length: tokens of a row.
      most: examples that a row has places for.
    """
    with_room: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by how many tokens are left
    some = 0  # bit n is set where with_room[n] holds a row
    row_of, held = np.empty(len(lengths), np.int64), []
    for example, length in enumerate(lengths.tolist()):
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit set
            row = with_room[room].pop()
            if not with_room[room]:
                some ^= 1 << room
        else:
            room, row = row_length, len(held)
            held.append(0)
        row_of[example] = row
        held[row] += 1
        room -= length
        if room and held[row] < most:
            with_room[room].append(row)
            some |= 1 << room
    return Plan(np.argsort(row_of, kind="stable"), np.concatenate([[0], np.cumsum(held, dtype=np.int64)]))


class PackedExamples:
    """The examples of a finite source in rows, epoch after epoch; `len` is the number of rows in an epoch.

    An epoch has every example once. The rows are planned once, over the examples in random order. Each epoch
    has them in an order of its own, and each place in them goes to another example of the same length: so
    companions change while the number of rows does not, and any row can be looked up. Without a
    `shuffle_seed` all epochs are the same, as nearly in the order of the source as packing allows. See
    `Examples`.
    """

    def __init__(self, examples: FiniteExamples, row_length: int, most: int, shuffle_seed: int | None):
        self.counts = examples.counts
        self._examples = examples
        self._most = most
        self._seed = shuffle_seed
        order = np.arange(len(examples))
        if shuffle_seed is not None:
            # By raw bits: those of Philox are fixed across versions of NumPy, its permutations are not.
            bits = np.random.Philox(key=hash32(f"plan {shuffle_seed}")).random_raw(len(examples))
            order = np.argsort(bits, kind="stable")
        plan = best_fit(examples.lengths[order], row_length, most)
        self._by_length = np.argsort(examples.lengths, kind="stable")
        self._lengths = examples.lengths[self._by_length]  # ascending
        self._places = np.argsort(self._by_length)[order[plan.members]]  # among `_lengths`
        self._borders = plan.borders
        self._order = endless_order(len(plan), shuffle_seed)

    def __len__(self) -> int:
        return len(self._borders) - 1

    def __getitem__(self, place: int) -> Row:
        epoch, row = place // len(self), self._order[place]
        members = self._places[self._borders[row] : self._borders[row + 1]]
        return pack_rows(
            [self._examples.example(epoch, self._member(epoch, int(m))) for m in members], self._most
        )

    def _member(self, epoch: int, place: int) -> int:
        """The example that has a place among those of its length in this epoch."""
        if self._seed is not None:
            length = self._lengths[place]
            first, after = np.searchsorted(self._lengths, [length, length + 1]).tolist()
            seed = hash32(f"pack {self._seed} {epoch} {length}")
            place = first + shuffled(place - first, after - first, seed)
        return int(self._by_length[place])


class PackedTaskExamples:
    """Examples of embedded tasks in rows; each row takes what fits of examples drawn for it alone.

    What does not fit is passed over, so the last in a row are shorter than most. See `Examples`.
    """

    def __init__(self, examples: TaskExamples, row_length: int, most: int):
        self.counts = examples.counts
        self._examples = examples
        self._row_length = row_length
        self._most = most
        # Beyond what a row can look at, and such that each row begins with the next task.
        turns = examples.turns
        self._stride = -(-most * _MISSES // turns) * turns + 1

    def __getitem__(self, place: int) -> Row:
        taken, room, misses = [], self._row_length, 0
        candidate = place * self._stride
        while len(taken) < self._most and misses < _MISSES and room >= self._examples.shortest:
            row = self._examples[candidate]
            candidate += 1
            if row["total_len"] <= room:
                taken.append(row)
                room, misses = room - row["total_len"], 0
            else:
                misses += 1
        return pack_rows(taken, self._most)


def pack_rows(rows: Sequence[Row], places: int) -> Row:
    """One row of the rows of one or more examples, which it has room for; see `Examples`."""
    tokens = [row["tokens"][: row["total_len"]] for row in rows[:-1]] + [rows[-1]["tokens"]]
    packed = {"tokens": np.concatenate(tokens)[: len(rows[0]["tokens"])]}
    for name in ("prompt_len", "total_len", "example_id"):
        packed[name] = np.zeros(places, np.int32)
        packed[name][: len(rows)] = [row[name] for row in rows]
    return packed
