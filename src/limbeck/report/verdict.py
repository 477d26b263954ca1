"""What a comparison of two arms says: BEATS, LOSES, TIES or INCONCLUSIVE, from every run's items; and what several say together.

The numbers behind it are in `crossed`. No torch; SciPy is imported where it is used. docs/statistics.md says what a reader may conclude.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from limbeck.errors import LimbeckError, RunError
from limbeck.report.crossed import (
    Array,
    Components,
    above,
    apart,
    crossed,
    items_needed,
    mean_squares,
    minimum_detectable,
    seeds_needed,
)
from limbeck.report.stats import Pair, paired_difference

Run = Mapping[str, Pair]
"""A run's (sum, count) by item id."""
Outcome = Literal["BEATS", "LOSES", "TIES", "INCONCLUSIVE", "NO VERDICT"]


@dataclass(frozen=True)
class Comparison:
    """Two arms on one metric: as many runs of each, in the order of their seeds. `is_paired`: they are the same seeds in both."""

    ours: Sequence[Run]
    theirs: Sequence[Run]
    higher_is_better: bool = True
    is_paired: bool = True


@dataclass(frozen=True)
class McNemar:
    """Exact two-sided p-value of two models being right equally often, and the items that only one of them gets right."""

    p: float
    only_ours: int
    only_theirs: int


@dataclass(frozen=True)
class Verdict:
    """One comparison, decided. `value` is ours minus theirs, in the metric's units, as are margin, interval and `detectable`.

    - `interval` holds for this comparison alone, at 1 - alpha; with one seed it is over items only. `df`: see `crossed.Crossed`.
    - `p_better` is two-sided, of no difference; `p_ties` of a difference of at least the margin. The `adjusted` ones are Holm's over the
      comparisons that were judged together, and decide.
    - `detectable`: the difference that this study finds with a probability of 0.8.
    - `items_needed`, `seeds_needed`: where INCONCLUSIVE, how many of the one, with the other as it is, would settle it; None where more
      of that kind alone does not.
    - `mcnemar`: of one seed's right and wrong answers. `left_out`: items that not every run has, or that do not count in some run.
    """

    outcome: Outcome
    why: str
    value: float
    interval: tuple[float, float] | None
    margin: float
    alpha: float
    higher_is_better: bool
    num_seeds: int
    num_items: int
    left_out: int = 0
    df: float | None = None
    p_better: float | None = None
    p_ties: float | None = None
    adjusted_better: float | None = None
    adjusted_ties: float | None = None
    components: Components | None = None
    detectable: float | None = None
    items_needed: int | None = None
    seeds_needed: int | None = None
    mcnemar: McNemar | None = None
    is_alike: bool = False
    """Whether every run answers every item exactly as its partner does: then there is nothing to judge by."""


def verdict(ours: Sequence[Run], theirs: Sequence[Run], margin: float, higher_is_better: bool = True, alpha: float = 0.05) -> Verdict:
    """Judge one comparison on its own; the comparisons of a study belong into `verdicts`."""
    return verdicts({"comparison": Comparison(ours, theirs, higher_is_better)}, margin, alpha)["comparison"]


def verdicts(comparisons: Mapping[str, Comparison], margin: float, alpha: float = 0.05) -> dict[str, Verdict]:
    """Judge the comparisons of a study together.

    Holm's correction keeps the probability of any false BEATS or LOSES at alpha, and that of any false TIES. A difference that is both
    told from 0 and shown to lie within the margin is TIES: the margin was stated beforehand as what matters, and value and p_better stay
    in the verdict. Comparisons of one seed get NO VERDICT and do not count as tests.
    """
    if not margin > 0:
        raise LimbeckError(f"margin: found {margin}, expected the smallest difference that matters, above 0, in units of the metric")
    if not 0 < alpha < 0.5:
        raise LimbeckError(f"alpha: found {alpha}, expected a probability between 0 and 0.5, such as 0.05")
    measured = {name: _measured(name, comparison, margin, alpha) for name, comparison in comparisons.items()}
    better = holm({name: each.p_better for name, each in measured.items() if each.p_better is not None})
    ties = holm({name: each.p_ties for name, each in measured.items() if each.p_ties is not None})
    return {
        name: _decided(replace(each, adjusted_better=better[name], adjusted_ties=ties[name]), alpha / len(better))
        if name in better
        else each
        for name, each in measured.items()
    }


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: rejecting those up to alpha keeps the probability of any false rejection at alpha (Holm 1979)."""
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda entry: entry[1])):
        largest = max(largest, min((len(p_values) - rank) * p, 1.0))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def mcnemar(ours: Run, theirs: Run) -> McNemar | None:
    """McNemar's exact test on the items of two single runs; None where an answer is not simply right or wrong (McNemar 1947).

    It is about these two runs on such items, and says nothing of other seeds.
    """
    from scipy.stats import binomtest

    shared = [(ours[item], theirs[item]) for item in ours if item in theirs and ours[item][1] and theirs[item][1]]
    if not shared or any(count != 1 or total not in (0, 1) for pair in shared for total, count in pair):
        return None
    only_ours = sum(a[0] > b[0] for a, b in shared)
    only_theirs = sum(a[0] < b[0] for a, b in shared)
    discordant = only_ours + only_theirs
    return McNemar(float(binomtest(only_ours, discordant).pvalue) if discordant else 1.0, only_ours, only_theirs)


def scores(runs: Sequence[Run], items: Sequence[str]) -> Array:
    """What each item contributes to the score of each run, [num_seeds, num_items], for items that count in all of them.

    A row's mean is the run's ratio sum(sums) / sum(counts). An item's deviation from it is its influence on the ratio, to first order
    (`stats.paired_difference`); where every count is 1, the cells are what the items scored.
    """
    return np.stack([contributions(run, items) for run in runs])


def shared_items(runs: Sequence[Run]) -> list[str]:
    """The ids of items that count in every run, in the order of the first."""
    return [item for item in runs[0] if all(run.get(item, (0.0, 0.0))[1] for run in runs)]


def contributions(run: Run, items: Sequence[str]) -> Array:
    """[num_items]: the run's ratio plus each item's influence on it."""
    totals, counts = np.array([run[item] for item in items], dtype=float).T
    ratio = totals.sum() / counts.sum()
    return np.asarray(ratio + (totals - ratio * counts) / counts.mean())


def _measured(name: str, comparison: Comparison, margin: float, alpha: float) -> Verdict:
    """Everything but the decision; of one seed, NO VERDICT."""
    ours, theirs = comparison.ours, comparison.theirs
    if not ours or len(ours) != len(theirs):
        raise RunError(f"{name}: found {len(ours)} runs against {len(theirs)}; expected one run per seed of both, for the same seeds")
    runs = [*ours, *theirs]
    items, known = shared_items(runs), len({item for run in runs for item in run})
    if len(items) < 2:
        raise RunError(f"{name}: found {len(items)} of {known} items that count in every run; expected at least 2, measured in all")
    if len(ours) == 1:
        return _one_seed(comparison, margin, alpha, len(items), known - len(items))
    a, b = scores(ours, items), scores(theirs, items)
    squares = mean_squares(a - b) if comparison.is_paired else apart(a, b)
    estimate, is_alike = crossed(squares, alpha), not (a - b).any()
    # within the margin: above its lower end, and below its upper end
    p_ties = max(above(squares, -margin), above(replace(squares, mean=-squares.mean), -margin))
    return Verdict(
        outcome="INCONCLUSIVE",
        why="",
        value=estimate.value,
        interval=estimate.interval,
        margin=margin,
        alpha=alpha,
        higher_is_better=comparison.higher_is_better,
        num_seeds=estimate.num_seeds,
        num_items=estimate.num_items,
        left_out=known - len(items),
        df=estimate.df,
        p_better=estimate.p,
        p_ties=1.0 if is_alike else p_ties,
        components=estimate.components,
        is_alike=is_alike,
    )


def _one_seed(comparison: Comparison, margin: float, alpha: float, num_items: int, left_out: int) -> Verdict:
    from scipy.special import stdtrit

    ours, theirs = comparison.ours[0], comparison.theirs[0]
    estimate = paired_difference(ours, theirs)
    assert estimate is not None and estimate.stderr is not None
    half = -float(stdtrit(num_items - 1, alpha / 2)) * estimate.stderr
    return Verdict(
        outcome="NO VERDICT",
        why="one seed: the interval is over items only, and says nothing of other runs of the same recipe",
        value=estimate.value,
        interval=(estimate.value - half, estimate.value + half),
        margin=margin,
        alpha=alpha,
        higher_is_better=comparison.higher_is_better,
        num_seeds=1,
        num_items=num_items,
        left_out=left_out,
        df=num_items - 1.0,
        mcnemar=mcnemar(ours, theirs),
    )


def _decided(measured: Verdict, planned_alpha: float) -> Verdict:
    """The outcome that the adjusted p-values give, and what the study could have found at `planned_alpha`."""
    parts, seeds, items = measured.components, measured.num_seeds, measured.num_items
    better, ties = measured.adjusted_better, measured.adjusted_ties
    assert parts is not None and better is not None and ties is not None
    if measured.is_alike:
        return replace(measured, why="every run answers every item exactly as its partner does: there is no spread to judge by")
    measured = replace(measured, detectable=minimum_detectable(parts, seeds, items, planned_alpha))
    if ties <= measured.alpha:
        told = " and is told from 0" if better <= measured.alpha else ""
        return replace(measured, outcome="TIES", why=f"the difference lies within the margin of {measured.margin:g}{told}")
    if better <= measured.alpha:
        is_better = (measured.value > 0) == measured.higher_is_better
        return replace(measured, outcome="BEATS" if is_better else "LOSES", why="the difference is told from 0 over seeds and items")
    return replace(
        measured,
        why=f"the difference is neither told from 0 nor shown to lie within the margin of {measured.margin:g}",
        items_needed=items_needed(parts, seeds, measured.margin, planned_alpha),
        seeds_needed=seeds_needed(parts, items, measured.margin, planned_alpha),
    )
