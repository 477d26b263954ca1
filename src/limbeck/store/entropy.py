"""Entropy coding: integers to about as many bits as a table of their frequencies says. The one place that knows constriction.

A table is counts, never probabilities: integers are the same on every machine, and what one wrote another reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

SMALLEST = 2.0**-22
"""Of a probability, as the coder rounds them to 24 bits."""


def table_of(counts: np.ndarray) -> Any:
    """The coder's table of symbols 0, 1, ... that were counted so often. Every symbol can be written, also one that was never counted."""
    from constriction import stream

    return stream.model.Categorical(probabilities_of(counts), perfect=False)


def probabilities_of(counts: np.ndarray) -> np.ndarray:
    counts = np.atleast_1d(counts).astype(np.float64)
    if len(counts) == 1:
        counts = np.append(counts, 0.0)  # the coder wants two symbols
    found = np.maximum(counts / max(counts.sum(), 1.0), SMALLEST)
    return np.asarray(found / found.sum())


def tables(counts: np.ndarray) -> list[Any]:
    """The tables of int32 counts `[tables, symbols]`, or of `[symbols]` alone."""
    counts = np.atleast_2d(counts)
    return tables_of(counts.tobytes(), np.full(len(counts), counts.shape[1], np.int32).tobytes())


@lru_cache(maxsize=8)
def tables_of(counts: bytes, sizes: bytes) -> list[Any]:
    """Tables that lie one after the other in int32 counts, of these int32 sizes. Kept: a capture reads with the same ones all the time."""
    ends = np.cumsum(np.frombuffer(sizes, np.int32))
    return [table_of(part) for part in np.split(np.frombuffer(counts, np.int32), ends[:-1])]


def write(parts: Sequence[tuple[np.ndarray, Any]]) -> bytes:
    """The bytes of (symbols, table), in the order in which they will be read."""
    from constriction import stream

    coder = stream.stack.AnsCoder()
    for symbols, table in reversed(parts):
        if len(symbols):
            coder.encode_reverse(np.ascontiguousarray(symbols, np.int32), table)
    return bytes(coder.get_compressed().astype("<u4").tobytes())


class Reader:
    """Takes symbols out of what `write` gave."""

    def __init__(self, blob: bytes) -> None:
        from constriction import stream

        self._coder = stream.stack.AnsCoder(np.frombuffer(blob, "<u4").astype(np.uint32))

    def take(self, table: Any, count: int) -> np.ndarray:
        return np.asarray(self._coder.decode(table, count)) if count else np.zeros(0, np.int32)
