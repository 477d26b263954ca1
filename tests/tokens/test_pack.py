"""Packing: nothing is lost, cut or overfull, and it fills rows about as well as can be."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.tokens.pack import lay_out, most_scored, num_positions, pack, row_tokens
from limbeck.tokens.sample import Sample


def samples_of(lengths: list[int]) -> list[Sample]:
    return [
        Sample(sample_id=number, ids=np.zeros(length, dtype=int), is_target=np.ones(length, dtype=bool))
        for number, length in enumerate(lengths)
    ]


lengths = st.lists(st.integers(1, 40), max_size=40)


@given(lengths, st.integers(1, 50))
def test_every_sample_is_in_one_row_whole(lengths: list[int], row_length: int) -> None:
    samples = samples_of(lengths)
    rows = pack(samples, row_length)
    assert sorted(sample.sample_id for row in rows for sample in row) == list(range(len(samples)))
    assert all(row_tokens(row) <= row_length or len(row) == 1 for row in rows)
    assert [row_tokens(row) for row in rows] == sorted((row_tokens(row) for row in rows), reverse=True)


@given(lengths, st.integers(1, 50))
def test_no_two_rows_could_be_one(lengths: list[int], row_length: int) -> None:
    """What any-fit guarantees, and next-fit (a row is closed when one sample does not fit) does not."""
    rows = pack(samples_of(lengths), row_length)
    smallest = sorted(map(row_tokens, rows))[:2]
    assert len(smallest) < 2 or sum(smallest) > row_length


@given(lengths, st.integers(1, 50), st.randoms())
def test_how_full_rows_are_does_not_depend_on_the_order(lengths: list[int], row_length: int, random: object) -> None:
    shuffled = list(lengths)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert [row_tokens(row) for row in pack(samples_of(lengths), row_length)] == [
        row_tokens(row) for row in pack(samples_of(shuffled), row_length)
    ]


def test_best_fit_decreasing_by_hand() -> None:
    rows = pack(samples_of([3, 6, 4, 7, 2, 12]), 10)
    assert [[len(sample.ids) for sample in row] for row in rows] == [[12], [7, 3], [6, 4], [2]]
    assert [sample.sample_id for sample in pack(samples_of([5, 5, 5]), 0)[0]] == [0]


@pytest.mark.parametrize(("pack_length", "expected"), [(None, [[9], [5, 5], [2, 1]]), (10, [[10], [10, 2]])])
def test_microbatches_are_made_of_rows(pack_length: int | None, expected: list[list[int]]) -> None:
    batches = lay_out(samples_of([1, 9, 5, 2, 5]), 2, pack_length)
    if pack_length is None:
        assert [[row_tokens(row) for row in rows] for rows in batches] == [[9, 5], [5, 2], [1]]
        assert num_positions(batches) == 18 + 10 + 1
    else:
        assert [[row_tokens(row) for row in rows] for rows in batches] == [[10, 10], [2]]
        assert num_positions(batches) == 20 + 2


def test_nothing_to_lay_out() -> None:
    assert pack([], 10) == lay_out([], 2, 10) == []
    assert num_positions([]) == 0


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 50)), st.randoms())
def test_no_microbatch_has_more_scored_tokens_than_the_bound(
    lengths: list[int], rows: int, pack_length: int | None, random: Random
) -> None:
    samples = [
        Sample(sample_id=number, ids=np.zeros(length, dtype=int), is_target=np.array([random.random() < 0.5 for _ in range(length)]))
        for number, length in enumerate(lengths)
    ]
    bound = most_scored(samples, rows, pack_length)
    for microbatch in lay_out(samples, rows, pack_length):
        assert sum(int(sample.is_target[1:].sum()) for row in microbatch for sample in row) <= bound
