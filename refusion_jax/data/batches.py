"""Batches that threads or processes prepare ahead; each batch is a function of its number."""

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
    """An iterator over make(0), make(1), ... without end.

    Batches are prepared ahead. The state counts the batches that were taken, not those prepared.

    Args:
      make: batch number -> batch.
      executor: where `make` is called.
      ahead: number of batches to prepare ahead.
    """

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
        """`{"next_index": t}`, where t is the number of batches taken."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._drop()
        self._next = int(state["next_index"])

    def close(self) -> None:
        """Ends the threads or processes and drops the batches that they prepared."""
        self._drop()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _drop(self) -> None:
        for pending in self._pending:
            pending.cancel()
        self._pending.clear()


def stacked(examples: Examples, step: int, *, batch_size: int, first: int, rows: int) -> Batch:
    """Stacks rows `first` to `first + rows - 1` of batch number `step`."""
    begin = step * batch_size + first
    taken = [examples[row_index] for row_index in range(begin, begin + rows)]
    return {key: np.stack([row[key] for row in taken]) for key in taken[0]}


def by_threads(make: Callable[[int], Batch], threads: int) -> Batches:
    return Batches(make, ThreadPoolExecutor(threads), 2 * threads)


def by_processes(open_examples: Callable[[], Examples], workers: int, **of_batch: Any) -> Batches:
    """Batches prepared by `workers` processes, each of which opens the examples itself.

    Args:
      open_examples: pickled, and called once in each process.
      workers: number of processes.
      of_batch: arguments of `stacked` other than `examples` and `step`.
    """
    context = multiprocessing.get_context("spawn")  # JAX runs threads, which must not be forked
    opened = (open_examples, of_batch)
    executor = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=opened)
    return Batches(_make_in_worker, executor, 2 * workers)


_of_this_worker: Callable[[int], Batch]


def _begin_worker(open_examples: Callable[[], Examples], of_batch: dict[str, int]) -> None:
    global _of_this_worker
    # The run itself handles these signals: it finishes its step and then ends its workers.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.disable(logging.WARNING)  # the run logs the same
    _of_this_worker = functools.partial(stacked, open_examples(), **of_batch)


def _end_with_parent() -> None:
    """Ends this process when its parent ends: a killed parent cannot end its workers, which would wait on."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _make_in_worker(step: int) -> Batch:
    return _of_this_worker(step)
