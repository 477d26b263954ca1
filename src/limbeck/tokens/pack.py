"""Which samples share a row of a batch. Torch-free: what packing saves can be counted before anything is loaded.

Packing happens inside an optimizer step: the step trains on the same samples whether they are packed or not, and no sample is cut.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence

from limbeck.tokens.sample import Sample

Row = list[Sample]


def pack(samples: Sequence[Sample], row_length: int) -> list[Row]:
    """Best-fit decreasing: each sample, longest first, goes into the fullest row of up to `row_length` tokens that still has room.

    A sample that is longer than that has a row of its own, and so has every sample where `row_length` is 0. The fullest rows come first, so
    that neighbours, which make up a microbatch, are of like lengths.
    """
    rows: list[Row] = []
    spaces: list[tuple[int, int]] = []
    """(tokens left, number of the row), rising."""
    for sample in sorted(samples, key=_length, reverse=True):
        fitting = bisect_left(spaces, (_length(sample), 0))
        space, row = spaces.pop(fitting) if fitting < len(spaces) else (max(row_length, _length(sample)), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        insort(spaces, (space - _length(sample), row))
    return sorted(rows, key=row_tokens, reverse=True)


def lay_out(samples: Sequence[Sample], micro_batch_size: int, pack_length: int | None = None) -> list[list[Row]]:
    """The samples of an optimizer step as microbatches of rows."""
    rows = pack(samples, pack_length or 0)
    return [rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]


def row_tokens(row: Row) -> int:
    return sum(map(_length, row))


def num_positions(batches: Sequence[Sequence[Row]]) -> int:
    """Positions that these microbatches compute on, padding included: each is as wide as its fullest row."""
    return sum(len(rows) * max(map(row_tokens, rows)) for rows in batches if rows)


def most_scored(samples: Sequence[Sample], micro_batch_size: int, pack_length: int | None = None) -> int:
    """A bound on the scored tokens of a microbatch, whatever samples meet in it."""
    scored = [int(sample.is_target[1:].sum()) for sample in samples]
    if pack_length is None:
        return micro_batch_size * max(scored, default=0)
    row_length = max(pack_length, *map(_length, samples))
    return math.ceil(micro_batch_size * row_length * max(count / _length(sample) for count, sample in zip(scored, samples, strict=True)))


def _length(sample: Sample) -> int:
    return len(sample.ids)
