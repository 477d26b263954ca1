"""Which cases a benchmark takes from its data: a subset that depends neither on the file's order nor on how many are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TypeVar

from limbeck.tokens.datasets import DataSets, sets_of

T = TypeVar("T")


def choose(rows: Iterable[T], key: Callable[[T], str], limit: int | None) -> list[T]:
    """The first `limit` rows by the hash of their keys, each key once.

    Files are often sorted by source or difficulty, so their first rows are a biased sample. By hash, a smaller limit takes a part of
    what a larger one takes, and every model is asked the same.
    """
    unique: dict[str, T] = {}
    for row in rows:
        unique.setdefault(hashlib.sha256(key(row).encode("utf-8")).hexdigest(), row)
    return [unique[name] for name in sorted(unique)[:limit]]


def benchmark_data(data: DataSets) -> DataSets:
    """The data sets of a benchmark: some, and none with a weight. A ValueError else."""
    if not data:
        raise ValueError("expected a file or the name of a data set")
    if any(part.weight is not None for part in sets_of(data)):
        raise ValueError("found `weight`, which is for training: a benchmark uses every row once")
    return data


def in_batches(rows: Iterable[T], length: Callable[[T], int], batch_size: int) -> list[list[T]]:
    """Batches of like lengths, so that little is padded."""
    ordered = sorted(rows, key=length)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
