"""Estimates from items and from seeds, in plain floats. No torch, no SciPy, and no verdict: tests across seeds come later.

An item is a (sum, count) pair, because some metrics are averages over tokens or bytes and not over items. The value of a metric is
sum(sums) / sum(counts); its standard error is that of this ratio when items are drawn at random (delta method).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error over `num_items` items; None where it is not defined."""

    value: float
    stderr: float | None
    num_items: int


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; `sd` is None for one seed."""

    mean: float
    sd: float | None
    num_seeds: int


def ratio(pairs: Sequence[Pair]) -> Estimate | None:
    """sum(sums) / sum(counts) over items that count; None where none does."""
    pairs = [(total, count) for total, count in pairs if count]
    if not pairs:
        return None
    value = _ratio(pairs)
    return Estimate(value, _stderr(_influences(pairs, value)), len(pairs))


def paired_difference(ours: Mapping[str, Pair], theirs: Mapping[str, Pair]) -> Estimate | None:
    """Our ratio minus theirs over the items that both have, matched by id, with the standard error of the difference.

    What an item contributes to the difference is its influence on our ratio minus that on theirs: what makes an item hard for both
    cancels, so this is smaller than the two separate errors suggest.
    """
    shared = [item for item, (_, count) in ours.items() if count and theirs.get(item, (0.0, 0.0))[1]]
    if not shared:
        return None
    a, b = [ours[item] for item in shared], [theirs[item] for item in shared]
    value_a, value_b = _ratio(a), _ratio(b)
    influences = [x - y for x, y in zip(_influences(a, value_a), _influences(b, value_b), strict=True)]
    return Estimate(value_a - value_b, _stderr(influences), len(shared))


def mean_over_seeds(runs: Sequence[Mapping[str, Pair]]) -> dict[str, Pair]:
    """Every item's mean (sum, count) over runs of several seeds; only items that all runs have."""
    if not runs:
        return {}
    shared = [item for item in runs[0] if all(item in run for run in runs)]
    return {item: (_mean([run[item][0] for run in runs]), _mean([run[item][1] for run in runs])) for item in shared}


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation (n - 1) of one value per seed."""
    mean = _mean(values)
    n = len(values)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Spread(mean, sd, n)


def _ratio(pairs: Sequence[Pair]) -> float:
    return math.fsum(total for total, _ in pairs) / math.fsum(count for _, count in pairs)


def _influences(pairs: Sequence[Pair], value: float) -> list[float]:
    """How far each item pulls the ratio, to first order, times n: their mean is 0."""
    mean_count = _mean([count for _, count in pairs])
    return [(total - value * count) / mean_count for total, count in pairs]


def _stderr(influences: Sequence[float]) -> float | None:
    n = len(influences)
    return math.sqrt(math.fsum(x * x for x in influences) / (n - 1) / n) if n > 1 else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
