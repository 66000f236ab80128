"""Batches prepared ahead, each a function of its number, by threads or by processes."""

import collections
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np

from refusion_jax.data.examples import Examples

Batch = dict[str, np.ndarray]


class Batches:
    """make(0), make(1), … without end, prepared ahead; what is ahead is not part of the state."""

    def __init__(self, make: Callable[[int], Batch], executor: Executor, ahead: int):
        self._make, self._executor, self._ahead = make, executor, ahead
        self._next = 0
        self._pending: collections.deque[Future[Batch]] = collections.deque()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        while len(self._pending) <= self._ahead:
            self._pending.append(self._executor.submit(self._make, self._next + len(self._pending)))
        self._next += 1
        return self._pending.popleft().result()

    def get_state(self) -> dict[str, int]:
        """`{"next_index": t}`, t being the number of batches taken."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._drop()
        self._next = int(state["next_index"])

    def close(self) -> None:
        """Ends threads and processes; what they prepared is dropped."""
        self._drop()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _drop(self) -> None:
        for pending in self._pending:
            pending.cancel()
        self._pending.clear()


def stacked(examples: Examples, step: int, *, batch_size: int, first: int, rows: int) -> Batch:
    """Rows `first` … `first + rows - 1` of batch number `step`."""
    begin = step * batch_size + first
    taken = [examples[place] for place in range(begin, begin + rows)]
    return {key: np.stack([row[key] for row in taken]) for key in taken[0]}


def by_threads(make: Callable[[int], Batch], threads: int) -> Batches:
    return Batches(make, ThreadPoolExecutor(threads), 2 * threads)


def by_processes(open_examples: Callable[[], Examples], workers: int, **of_batch: Any) -> Batches:
    """Batches by so many processes, each of which opens the examples for itself.

    Args:
      open_examples: is pickled, to be called in each.
      of_batch: the other arguments of `stacked`, but for `step`.
    """
    context = multiprocessing.get_context("spawn")  # what JAX has running must not be forked
    opened = (open_examples, of_batch)
    executor = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=opened)
    return Batches(_make_in_worker, executor, 2 * workers)


_of_this_worker: Callable[[int], Batch]


def _begin_worker(open_examples: Callable[[], Examples], of_batch: dict[str, int]) -> None:
    global _of_this_worker
    # The signals are for the run, which finishes its step and then ends its workers.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.disable(logging.WARNING)  # the run has said it
    _of_this_worker = functools.partial(stacked, open_examples(), **of_batch)


def _end_with_parent() -> None:
    """A parent that was killed ends nobody: its workers would wait for it without end."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _make_in_worker(step: int) -> Batch:
    return _of_this_worker(step)
