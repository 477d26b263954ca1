"""Estimates against closed forms and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from limbeck.report.stats import mean_over_seeds, paired_difference, ratio, spread


def test_ratio_of_plain_accuracy_is_the_binomial_error():
    estimate = ratio([(1, 1)] * 30 + [(0, 1)] * 10)
    assert estimate is not None
    assert estimate.value == 0.75
    assert estimate.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 39))
    assert estimate.num_items == 40


def test_ratio_equals_the_one_that_benchmarks_use():
    from limbeck.evaluate.base import Item
    from limbeck.evaluate.base import ratio as of_benchmarks

    rng = np.random.default_rng(0)
    pairs = [(float(s), float(c)) for s, c in zip(rng.gamma(2, 3, 25), rng.integers(0, 9, 25), strict=True)]
    estimate = ratio(pairs)
    metric = of_benchmarks([Item(str(i), {"x": s}, {"x": c}) for i, (s, c) in enumerate(pairs)], "x", True)
    assert estimate is not None
    assert (estimate.value, estimate.stderr, estimate.num_items) == (
        pytest.approx(metric.value),
        pytest.approx(metric.stderr),
        metric.num_items,
    )


def test_nothing_that_counts():
    assert ratio([]) is None
    assert ratio([(0, 0)]) is None
    assert paired_difference({"a": (1, 1)}, {"b": (1, 1)}) is None
    one = ratio([(3, 2)])
    assert one is not None and one.value == 1.5 and one.stderr is None


def test_paired_difference_matches_by_id_and_uses_pairs():
    ours = {f"i{k}": (float(k % 2 or k < 4), 1.0) for k in range(20)}
    theirs = {item: (total * 0.5, count) for item, (total, count) in reversed(ours.items())}
    found = paired_difference(ours | {"only ours": (1, 1)}, theirs | {"only theirs": (0, 1), "i3": (0.5, 1)})
    assert found is not None
    differences = [total * 0.5 for total, _ in ours.values()]
    assert found.num_items == 20
    assert found.value == pytest.approx(np.mean(differences))
    assert found.stderr == pytest.approx(np.std(differences, ddof=1) / math.sqrt(20))


def test_difference_of_equal_models_is_exactly_zero():
    items = {str(k): (math.sqrt(k), 1.0 + k % 3) for k in range(9)}
    found = paired_difference(items, dict(items))
    assert found is not None and found.value == 0 and found.stderr == 0


def test_an_item_without_count_in_one_model_is_left_out():
    found = paired_difference({"a": (1, 1), "b": (2, 0), "c": (0, 1)}, {"a": (0, 1), "b": (1, 1), "c": (0, 1)})
    assert found is not None and found.num_items == 2 and found.value == 0.5


def test_paired_error_of_token_averages_covers():
    """Ratio metrics with counts that vary by item and a difficulty that both models share: the 95 % interval holds the truth in 95 % of
    draws, and the pairing is worth a lot."""
    rng = np.random.default_rng(3)
    covered, paired, unpaired, draws = 0, [], [], 2000
    for _ in range(draws):
        counts = rng.integers(5, 60, 60).astype(float)
        hard = rng.normal(2, 0.6, 60)
        ours, theirs = ((counts * (hard + shift + rng.normal(0, 0.15, 60))) for shift in (0.1, 0.0))
        a = {str(k): (ours[k], counts[k]) for k in range(60)}
        b = {str(k): (theirs[k], counts[k]) for k in range(60)}
        found, left, right = paired_difference(a, b), ratio(list(a.values())), ratio(list(b.values()))
        assert found and left and right and found.stderr and left.stderr and right.stderr
        covered += abs(found.value - 0.1) < 2.0 * found.stderr
        paired.append(found.stderr)
        unpaired.append(math.hypot(left.stderr, right.stderr))
    # +-4 standard errors of the simulation around 0.95
    assert 0.93 < covered / draws < 0.97
    assert np.mean(paired) < 0.4 * np.mean(unpaired)


def test_across_seeds():
    assert spread([2.0]).sd is None
    found = spread([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.sd == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert mean_over_seeds([{"a": (1, 2), "b": (1, 1)}, {"a": (3, 4)}]) == {"a": (2, 3)}
    assert mean_over_seeds([]) == {}
