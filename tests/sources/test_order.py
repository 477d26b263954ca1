"""The order of samples: a pure function of seed and position, fair to every sample and every weight."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck.sources.order import Mixed, Shuffled

mixtures = st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 100)), min_size=1, max_size=4)


def test_an_epoch_has_every_sample_once_and_the_next_another_order() -> None:
    order = Shuffled(50, 3)
    epochs = [[order.at(number * 50 + place) for place in range(50)] for number in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [Shuffled(50, 4).at(place) for place in range(50)]


def test_the_order_of_a_seed_is_pinned() -> None:
    """Changing it voids every comparison with a run of an older version."""
    expected = np.random.default_rng([7, 1]).permutation(6).tolist()
    assert [Shuffled(6, 7).at(position) for position in range(6, 12)] == expected
    assert [Mixed([3, 4], [2, 1], 0).at(position) for position in range(9)] == [1, 4, 2, 0, 5, 0, 1, 6, 2]


@given(mixtures, st.integers(0, 2**63 - 1), st.integers(0, 500))
def test_every_set_has_its_share_of_the_first_positions(sets: list[tuple[int, float]], seed: int, positions: int) -> None:
    sizes, weights = [size for size, _ in sets], [weight for _, weight in sets]
    order = Mixed(sizes, weights, seed)
    borders = np.cumsum([0, *sizes])
    taken = Counter(int(np.searchsorted(borders, order.at(position), side="right")) - 1 for position in range(positions))
    counts = [taken[number] for number in range(len(sizes))]
    assert counts == order.counts(positions)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - positions * weight / sum(weights)) < len(sets)


@given(mixtures, st.integers(0, 99))
def test_positions_may_be_asked_in_any_order(sets: list[tuple[int, float]], seed: int) -> None:
    def order() -> Mixed:
        return Mixed([size for size, _ in sets], [weight for _, weight in sets], seed)

    forwards, backwards = order(), order()
    assert [forwards.at(p) for p in range(30)] == [backwards.at(p) for p in reversed(range(30))][::-1]


@given(mixtures, st.integers(0, 99))
def test_an_epoch_of_a_mixture_gives_every_sample_and_no_shorter_one_does(sets: list[tuple[int, float]], seed: int) -> None:
    sets = [(size, max(weight, 1.0)) for size, weight in sets]
    order = Mixed([size for size, _ in sets], [weight for _, weight in sets], seed)
    total = sum(size for size, _ in sets)
    given_ = [order.at(position) for position in range(order.epoch)]
    assert set(given_) == set(range(total))
    assert set(given_[:-1]) != set(range(total))


def test_samples_of_a_set_are_given_equally_often() -> None:
    order = Mixed([10, 3], [1, 1], 0)
    taken = Counter(order.at(position) for position in range(60))
    assert {taken[number] for number in range(10)} == {3} and {taken[number] for number in range(10, 13)} == {10}


def test_far_positions_cost_nothing_and_stay_fair() -> None:
    order = Mixed([10, 10], [1, 999_999], 0)
    assert order.counts(10**12)[0] == pytest.approx(10**6, abs=1)
    assert order.epoch == pytest.approx(10 * 10**6, rel=0.1)
    assert 0 <= order.at(10**12) < 20
