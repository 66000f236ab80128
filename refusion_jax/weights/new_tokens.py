"""Rows for new tokens in a model's embedding and head.

The row of a new token in the embedding, and its column in an untied head, is the mean over the known tokens,
computed in float32: an uninformative row in the range of the trained rows. Embeddings often have more rows
than the tokenizer has tokens (Qwen3: 151,936 rows, 151,669 tokens). The spare rows were never trained, so a
new token that takes one overwrites it with the mean too. The embedding grows only when no spare row is left.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from refusion_jax.weights.lazy import Index, LazyArray, bounds

BLOCK = 4096  # rows per read when computing the mean


def add_rows(params: Mapping[str, Any], ids: Collection[int], num_known: int) -> dict[str, Any]:
    """Parameters with rows for new tokens in the embedding [V, D] and, if untied, columns in the head [D, V].

    V becomes the highest new id + 1 where that is larger.

    Args:
      params: unrolled model, nested dict of LazyArray.
      ids: ids of the new tokens.
      num_known: number of known tokens; the mean is taken over the rows with ids below it.

    Returns:
      the new parameters, LazyArray too. The old embedding and head are read once, in blocks, for the means.
    """
    size = max(params["embedding"].shape[0], max(ids) + 1)
    axes = {"embedding": 0, "head": 1}  # a tied model has no head
    changed = {
        name: _with_means(params[name], axis, size, ids, num_known)
        for name, axis in axes.items()
        if name in params
    }
    return {**params, **changed}


def _with_means(table: LazyArray, axis: int, size: int, ids: Collection[int], num_known: int) -> LazyArray:
    """`table` with `axis` extended to `size`, and the mean of its first `num_known` rows at each of `ids`."""
    old_size = table.shape[axis]
    mean = _mean(table, axis, min(num_known, old_size)).astype(table.dtype)
    shape = tuple(size if i == axis else n for i, n in enumerate(table.shape))

    def read(index: Index) -> np.ndarray:
        spans = [slice(*ends) for ends in bounds(index, shape)]
        start, stop = spans[axis].start, spans[axis].stop
        part = np.empty([span.stop - span.start for span in spans], table.dtype)
        rows = np.moveaxis(part, axis, 0)
        if start < old_size:
            spans[axis] = slice(start, min(stop, old_size))
            rows[: spans[axis].stop - start] = np.moveaxis(table.read(tuple(spans)), axis, 0)
        for new in ids:
            if start <= new < stop:
                rows[new - start] = mean[spans[1 - axis]]
        return part

    return dataclasses.replace(table, shape=shape, read=read)


def _mean(table: LazyArray, axis: int, count: int) -> np.ndarray:
    """float32 mean of the first `count` rows of a matrix, where rows lie along `axis`."""
    total = np.zeros(table.shape[1 - axis], np.float64)
    for start in range(0, count, BLOCK):
        index = [slice(None), slice(None)]
        index[axis] = slice(start, min(start + BLOCK, count))
        total += table.read(tuple(index)).astype(np.float32).sum(axis, dtype=np.float64)
    return (total / count).astype(np.float32)
