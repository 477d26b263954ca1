"""Offsets in few bytes: which tokens of a sample were scored, and where they stand in its text. Differences, as variable-length numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(numbers: np.ndarray | Sequence[int]) -> bytes:
    """Numbers from 0, seven bits to a byte, the least of them first; the eighth bit says that more follow."""
    rest = np.asarray(numbers, dtype=np.int64)
    columns = []
    while True:
        columns.append(rest & 127 | (rest >= 128).astype(np.int64) << 7)
        rest = rest >> 7
        if not rest.any():
            break
    values = np.stack(columns, axis=1).astype(np.uint8)  # [n, bytes]
    is_used = np.ones(values.shape, dtype=bool)
    is_used[:, 1:] = np.logical_and.accumulate(values[:, :-1] >= 128, axis=1)
    return values[is_used].tobytes()


def unpack(blob: bytes) -> np.ndarray:
    """The numbers of `pack`, as int64."""
    values = np.frombuffer(blob, dtype=np.uint8).astype(np.int64)
    is_last = values < 128
    number = np.concatenate([[0], np.cumsum(is_last)[:-1]]).astype(np.int64) if len(values) else np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], is_last[:-1]])) if len(values) else np.zeros(0, dtype=np.int64)
    found = np.zeros(int(is_last.sum()), dtype=np.int64)
    np.add.at(found, number, (values & 127) << (7 * (np.arange(len(values)) - starts[number])))
    return found


def pack_offsets(offsets: np.ndarray) -> bytes:
    """Ascending offsets as runs: tokens left out, tokens taken, and so on."""
    starts, ends = _runs(offsets)
    return pack(np.stack([starts - np.concatenate([[0], ends[:-1]]), ends - starts], axis=1).ravel())


def unpack_offsets(blob: bytes) -> np.ndarray:
    pairs = unpack(blob).reshape(-1, 2)
    ends = pairs.sum(1).cumsum()
    starts = ends - pairs[:, 1]
    return np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)]) if len(pairs) else ends


def pack_spans(lengths: np.ndarray, offsets: np.ndarray) -> bytes:
    """Where the targets of scored tokens stand in the text: those of a run follow on one another, so each adds its length in bytes.

    `lengths` are the bytes of every token of the sample; token `o` is scored on token `o + 1`.
    """
    edges = np.concatenate([[0], np.cumsum(lengths)])
    bounds = [edges[start + 1 : end + 2] for start, end in zip(*_runs(offsets), strict=True)]
    return pack(np.diff(np.concatenate([[0], *bounds]).astype(np.int64)))


def unpack_spans(blob: bytes, offsets: np.ndarray) -> np.ndarray:
    """`[n, 2]`: first byte of each target in the text, and the byte after its last."""
    bounds, spans, at = unpack(blob).cumsum(), [], 0
    for start, end in zip(*_runs(offsets), strict=True):
        edges = bounds[at : at + end - start + 1]
        spans.append(np.stack([edges[:-1], edges[1:]], axis=1))
        at += end - start + 1
    return np.concatenate(spans) if spans else np.zeros((0, 2), dtype=np.int64)


def _runs(offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First offset of each run of consecutive ones, and the one after its last."""
    offsets = np.asarray(offsets, dtype=np.int64)
    if not len(offsets):
        return offsets, offsets
    breaks = np.flatnonzero(np.diff(offsets) != 1)
    return offsets[np.concatenate([[0], breaks + 1])], offsets[np.concatenate([breaks, [len(offsets) - 1]])] + 1
