"""Offsets in few bytes come back, whatever they are."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.store.offsets import pack, pack_offsets, pack_spans, unpack, unpack_offsets, unpack_spans


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**62), max_size=40))
def test_numbers_come_back(numbers):
    assert unpack(pack(numbers)).tolist() == numbers


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=80))
def test_offsets_and_places_come_back(tokens):
    lengths = np.array([length for length, _ in tokens], dtype=np.int64)
    offsets = np.array([i - 1 for i, (_, is_target) in enumerate(tokens) if is_target and i], dtype=np.int64)
    assert unpack_offsets(pack_offsets(offsets)).tolist() == offsets.tolist()
    ends = lengths.cumsum()
    expected = [[ends[offset], ends[offset + 1]] for offset in offsets]
    assert unpack_spans(pack_spans(lengths, offsets), offsets).tolist() == expected


def test_they_are_small():
    assert pack([5, 127, 128]) == bytes([5, 127, 128, 1])
    assert len(pack_offsets(np.arange(30, 230))) == 3
    assert len(pack_spans(np.full(300, 4), np.arange(30, 230))) == 201
