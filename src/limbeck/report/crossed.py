"""A mean over seeds x items with its uncertainty: variance components, interval, p-values and power, for two crossed random effects. No
torch; SciPy is imported where it is used. What a verdict makes of them is in `verdict`.

One cell is d[s, i] = mean + seed[s] + item[i] + residual[s, i], each effect drawn at random, with one value per cell. Mean squares of the
two-way analysis of variance estimate the three variances. The standard error of the grand mean is made of two parts,

    seeds and residual:  MS_seed / (S I)                        S - 1 degrees of freedom
    items alone:         max(MS_item - MS_residual, 0) / (S I)  I - 1 degrees of freedom

so that it is never below what seeds alone, or items alone, give. The interval adds the parts' own squared half-widths:

    half-width^2 = t(S - 1)^2 * seeds and residual + t(I - 1)^2 * items alone                   (Banerjee 1960)

and not t(df)^2 times their sum with Satterthwaite's df: with 3 seeds a seed variance that is small by luck gives a narrow interval *and*
a large df, and 5 % become up to 9 % (`test_satterthwaite_is_not_enough_for_three_seeds`). With 10 seeds the two hardly differ.

Runs that share a seed are paired, and a cell is their difference. Where two arms share no seed, which two runs make a row is arbitrary, so
MS_seed and MS_residual are found within each arm and added, with Welch's df for MS_seed, between S - 1 and 2 (S - 1); items stay paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from limbeck.errors import RunError

Array = NDArray[np.float64]

TARGET_POWER = 0.8
MOST_ITEMS, MOST_SEEDS = 1_000_000, 1_000
"""Where the search for a sufficient number ends."""


@dataclass(frozen=True)
class Components:
    """Variances of the three effects of a difference, in squared units of the metric. `num_sets` of seeds that know nothing of each other:
    1 where two arms share each seed, 2 where each has its own."""

    seed: float
    item: float
    residual: float
    num_sets: int = 1


@dataclass(frozen=True)
class Crossed:
    """A grand mean over `num_seeds` x `num_items` cells. `interval` is value -+ t(df) * stderr at 1 - alpha: `df` is the number at which
    Student's t has the interval's critical value, between those of seeds and of items. `p` is two-sided, of a true mean of 0."""

    value: float
    stderr: float
    df: float
    interval: tuple[float, float]
    p: float
    alpha: float
    components: Components
    num_seeds: int
    num_items: int


@dataclass(frozen=True)
class Squares:
    """Grand means and mean squares of any number of tables [..., num_seeds, num_items]; every array is [...]. `df` is that of `seed`."""

    mean: Array
    seed: Array
    item: Array
    residual: Array
    num_seeds: int
    num_items: int
    df: Array
    num_sets: int = 1

    def parts(self) -> tuple[Array, Array]:
        """Squared standard errors of the grand mean: from seeds and residual, from items alone."""
        cells = self.num_seeds * self.num_items
        return self.seed / cells, np.maximum(self.item - self.residual, 0.0) / cells

    def half_width(self, alpha: float) -> Array:
        """Of the two-sided interval at 1 - alpha."""
        seeds, items = self.parts()
        return np.sqrt(_t(alpha, self.df) ** 2 * seeds + _t(alpha, self.num_items - 1) ** 2 * items)


def crossed(squares: Squares, alpha: float = 0.05) -> Crossed:
    """The mean of one table with its interval at 1 - alpha."""
    value, stderr, half = float(squares.mean), math.sqrt(sum(float(part) for part in squares.parts())), float(squares.half_width(alpha))
    return Crossed(
        value,
        stderr,
        _equivalent_df(half / stderr if stderr else math.inf, alpha, squares),
        (value - half, value + half),
        two_sided(squares, 0.0),
        alpha,
        components(squares),
        squares.num_seeds,
        squares.num_items,
    )


def mean_squares(tables: Array) -> Squares:
    """Two-way analysis of variance without replication of tables [..., num_seeds, num_items], at least two of both.

    A row is what one run of an arm scores minus what one run of another scores, item by item. Both share initial weights and data order
    where the arms do; the spread of the rows shows whether that helped.
    """
    num_seeds, num_items = tables.shape[-2:]
    if min(num_seeds, num_items) < 2:
        raise RunError(f"a difference over {num_seeds} seeds and {num_items} items has no interval; expected at least 2 of both")
    if not np.isfinite(tables).all():
        raise RunError("a difference between runs is not a finite number; expected finite scores of every item")
    mean = tables.mean((-2, -1))
    rows, columns = tables.mean(-1) - mean[..., None], tables.mean(-2) - mean[..., None]
    rest = tables - mean[..., None, None] - rows[..., :, None] - columns[..., None, :]
    return Squares(
        mean,
        num_items * (rows**2).sum(-1) / (num_seeds - 1),
        num_seeds * (columns**2).sum(-1) / (num_items - 1),
        (rest**2).sum((-2, -1)) / ((num_seeds - 1) * (num_items - 1)),
        num_seeds,
        num_items,
        np.full_like(mean, num_seeds - 1),
    )


def apart(ours: Array, theirs: Array) -> Squares:
    """The same of ours minus theirs, tables of as many runs that share no seed: nothing depends on the order of the runs."""
    one, other, both = mean_squares(ours), mean_squares(theirs), mean_squares(ours - theirs)
    seed, squared = one.seed + other.seed, one.seed**2 + other.seed**2
    share = np.divide(seed**2, squared, out=np.ones_like(seed), where=squared > 0)  # 1 where one arm alone varies, 2 where both do alike
    return replace(both, seed=seed, residual=one.residual + other.residual, df=share * (both.num_seeds - 1), num_sets=2)


def components(squares: Squares) -> Components:
    """Variances by the method of moments; what comes out negative is 0."""
    residual = float(squares.residual)
    return Components(
        max((float(squares.seed) - residual) / squares.num_items, 0.0),
        max((float(squares.item) - residual) / squares.num_seeds, 0.0),
        residual,
        squares.num_sets,
    )


def two_sided(squares: Squares, null: float) -> float:
    """The smallest alpha whose interval leaves out `null`, of one table."""
    distance = abs(float(squares.mean) - null)
    if distance == 0 or not sum(float(part) for part in squares.parts()):
        return float(distance == 0)
    return 10 ** _crossing(lambda log_alpha: distance > float(squares.half_width(10**log_alpha)), -300.0, 0.0)


def above(squares: Squares, null: float) -> float:
    """One-sided p-value of a true mean of at most `null`, of one table."""
    p = two_sided(squares, null) / 2
    return p if float(squares.mean) > null else 1 - p


def power(parts: Components, num_seeds: int, num_items: int, effect: float, alpha: float = 0.05) -> float:
    """Probability that the interval at 1 - alpha leaves out 0, on either side, where the true mean is `effect`.

    The mean is normal; the half-width varies with the mean squares, over quantiles of which this is averaged.
    """
    from scipy.special import ndtr

    stderr, half = _planned(parts, num_seeds, num_items, alpha)
    if stderr == 0:
        return float(effect != 0)
    return float(np.mean(ndtr((effect - half) / stderr) + ndtr((-effect - half) / stderr)))


def power_of_ties(parts: Components, num_seeds: int, num_items: int, margin: float, alpha: float = 0.05) -> float:
    """Probability that two one-sided tests at alpha find the true mean within the margin, where it is 0."""
    from scipy.special import ndtr

    stderr, half = _planned(parts, num_seeds, num_items, 2 * alpha)
    return float(np.mean(np.maximum(2 * ndtr((margin - half) / stderr) - 1, 0.0))) if stderr else 1.0


def minimum_detectable(parts: Components, num_seeds: int, num_items: int, alpha: float = 0.05) -> float:
    """The smallest true mean that is told from 0 with a probability of 0.8."""
    stderr, half = _planned(parts, num_seeds, num_items, alpha)
    if stderr == 0:
        return 0.0
    top = float(half.max()) + 2 * stderr
    return _crossing(lambda effect: power(parts, num_seeds, num_items, effect, alpha) >= TARGET_POWER, 0.0, top)


def items_needed(parts: Components, num_seeds: int, margin: float, alpha: float = 0.05) -> int | None:
    """The items per seed with which these seeds decide (see `decides`); None where a million do not."""
    return _smallest(lambda n: decides(parts, num_seeds, n, margin, alpha), MOST_ITEMS)


def seeds_needed(parts: Components, num_items: int, margin: float, alpha: float = 0.05) -> int | None:
    """The seeds with which these items decide (see `decides`); None where a thousand do not."""
    return _smallest(lambda n: decides(parts, n, num_items, margin, alpha), MOST_SEEDS)


def decides(parts: Components, num_seeds: int, num_items: int, margin: float, alpha: float) -> bool:
    """Whether a true difference of the margin is told from 0, and one of 0 from the margin, each with a probability of at least 0.8.

    It asks about the margin, which was stated beforehand, and never about the difference that was found: power at the found difference
    is the p-value in other words (Hoenig and Heisey 2001).
    """
    return (
        power(parts, num_seeds, num_items, margin, alpha) >= TARGET_POWER
        and power_of_ties(parts, num_seeds, num_items, margin, alpha) >= TARGET_POWER
    )


def _planned(parts: Components, num_seeds: int, num_items: int, alpha: float) -> tuple[float, Array]:
    """The true standard error of the grand mean, and equally probable half-widths. The residual's mean square, which has the most degrees
    of freedom by far, is taken as its expectation."""
    from scipy.special import chdtri

    def quantiles(count: int, df: int) -> Array:
        return np.asarray(chdtri(df, (np.arange(count) + 0.5) / count) / df)

    per_set = quantiles(200 if parts.num_sets == 1 else 20, num_seeds - 1)
    one, other = (per_set, per_set) if parts.num_sets == 1 else (each.ravel() for each in np.meshgrid(per_set, per_set))
    df = (num_seeds - 1) * parts.num_sets / 2 * (one + other) ** 2 / (one**2 + other**2)  # of `apart`, whose arms vary alike
    seed = (parts.residual + num_items * parts.seed) * (one + other) / 2
    item = (parts.residual + num_seeds * parts.item) * quantiles(20, num_items - 1)
    (seed, item), (df, _) = (np.meshgrid(each, item) for each in (seed, df))
    residual = np.full_like(seed, parts.residual)
    squares = Squares(np.zeros_like(seed), seed, item, residual, num_seeds, num_items, df)
    variance = parts.seed / num_seeds + parts.item / num_items + parts.residual / (num_seeds * num_items)
    return math.sqrt(variance), squares.half_width(alpha)


def _smallest(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest number from 2 to `most` for which it holds, if it does for all that are larger."""
    high = 2
    while not holds(high):
        if high == most:
            return None
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _crossing(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds from some point on begins to."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _t(alpha: float, df: Array | int) -> Array:
    """Two-sided critical value of Student's t."""
    from scipy.special import stdtrit

    return -np.asarray(stdtrit(df, alpha / 2))


def _equivalent_df(critical: float, alpha: float, squares: Squares) -> float:
    """The degrees of freedom at which Student's t has this critical value; the fewer of both where nothing varies."""
    few, many = sorted((float(squares.df), squares.num_items - 1.0))
    if not math.isfinite(critical):
        return few
    from scipy.special import stdtrit

    return _crossing(lambda df: -stdtrit(df, alpha / 2) <= critical, few, many)
