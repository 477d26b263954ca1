"""Tables of differences drawn from the model that verdicts assume, and from right and wrong answers, for which it is an approximation."""

from __future__ import annotations

import numpy as np

from limbeck.report.crossed import Array

ITEM_SD = 0.5


def gaussian(rng: np.random.Generator, count: int, seeds: int, items: int, seed_sd: float, effect: float = 0.0) -> Array:
    """[count, seeds, items]: effect + seed + item + residual, of standard deviations `seed_sd`, 0.5 and 1."""
    return (
        effect
        + seed_sd * rng.standard_normal((count, seeds, 1))
        + ITEM_SD * rng.standard_normal((count, 1, items))
        + rng.standard_normal((count, seeds, items))
    )


def two_arms(rng: np.random.Generator, count: int, seeds: int, items: int, seed_sd: float, effect: float = 0.0) -> tuple[Array, Array]:
    """Two arms that share no seed; the difference of a run of each is drawn like `gaussian`'s."""
    hard = rng.standard_normal((count, 1, items))

    def arm(level: Array | float) -> Array:
        return level + np.sqrt(0.5) * (seed_sd * rng.standard_normal((count, seeds, 1)) + rng.standard_normal((count, seeds, items)))

    return arm(effect + hard + ITEM_SD * rng.standard_normal((count, 1, items))), arm(hard)


def right_or_wrong(rng: np.random.Generator, count: int, seeds: int, items: int, seed_sd: float) -> Array:
    """Two arms that are equally good: items are hard or easy for both, runs are good or bad, answers 0 or 1."""
    from scipy.special import ndtr

    hard = rng.standard_normal((count, 1, items))

    def answers() -> Array:
        chance = ndtr(hard + 2 * seed_sd * rng.standard_normal((count, seeds, 1)))
        return (rng.random((count, seeds, items)) < chance).astype(float)

    return answers() - answers()


def false_positives(tables: Array, alpha: float = 0.05) -> float:
    """Share of the tables whose interval leaves out 0."""
    from limbeck.report.crossed import mean_squares

    squares = mean_squares(tables)
    return float(np.mean(np.abs(squares.mean) > squares.half_width(alpha)))
