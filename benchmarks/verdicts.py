"""How often a verdict finds a lead that is none, at a nominal 5 %: ours, Satterthwaite's t, and a bootstrap over seeds and items.

Tables of differences [seeds, items] are drawn with a true mean of 0: seeds of standard deviation `sd`, items of 0.5, residuals of 1.

    python benchmarks/verdicts.py [--simulations 4000] [--json]
    python benchmarks/verdicts.py --apart     two arms that share no seed, each run paired with one of the other by their order, or not
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from scipy import stats

from limbeck.report.crossed import Array, Squares, apart, mean_squares

ALPHA, RESAMPLES = 0.05, 400
SETTINGS = [(seeds, sd, items) for seeds in (3, 5, 10) for sd in (0.0, 1 / 6, 1 / 3) for items in (50, 300)]
EFFECT = 3.0
"""Standard errors of the difference that `--apart` looks for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=4000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--apart", action="store_true")
    options = parser.parse_args()
    if options.apart:
        print("| seeds | their sd | leads that are none: by order | not paired | leads of three standard errors: by order | not paired |")
        print("|---|---|---|---|---|---|")
        for seeds, sd, items in SETTINGS:
            if items == 50:
                shares = measure_apart(seeds, sd, items, options.simulations)
                print(f"| {seeds} | {sd:.2f} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
        return
    rows = [measure(*setting, options.simulations) for setting in SETTINGS]
    if options.json:
        print(json.dumps({"simulations": options.simulations, "rows": rows}))
        return
    print("| seeds | their sd | items | Limbeck | Satterthwaite | bootstrap |\n|---|---|---|---|---|---|")
    for row in rows:
        print("| {seeds} | {sd:.2f} | {items} | {limbeck:.1%} | {satterthwaite:.1%} | {bootstrap:.1%} |".format(**row))


def measure(seeds: int, sd: float, items: int, simulations: int) -> dict[str, float]:
    rng = np.random.default_rng([seeds, round(1000 * sd), items])
    tables = (
        sd * rng.standard_normal((simulations, seeds, 1))
        + 0.5 * rng.standard_normal((simulations, 1, items))
        + rng.standard_normal((simulations, seeds, items))
    )
    squares = mean_squares(tables)
    of_seeds, of_items = squares.parts()
    total = of_seeds + of_items
    df = total**2 / (of_seeds**2 / (seeds - 1) + of_items**2 / (items - 1))
    usual = stats.t.ppf(1 - ALPHA / 2, df) * np.sqrt(total)
    return {
        "seeds": seeds,
        "sd": sd,
        "items": items,
        "limbeck": float(np.mean(np.abs(squares.mean) > squares.half_width(ALPHA))),
        "satterthwaite": float(np.mean(np.abs(squares.mean) > usual)),
        "bootstrap": float(np.mean([bootstrap_leads(table, rng) for table in tables[: simulations // 10]])),
    }


def measure_apart(seeds: int, sd: float, items: int, simulations: int) -> list[float]:
    """How often two arms are told apart, without and with an effect, by both ways."""
    rng = np.random.default_rng([seeds, round(1000 * sd), items, 1])
    hard = rng.standard_normal((simulations, 1, items))

    def arm(level: Array | float) -> Array:
        return level + np.sqrt(0.5) * (sd * rng.standard_normal((simulations, seeds, 1)) + rng.standard_normal((simulations, seeds, items)))

    def share(squares: Squares) -> float:
        return float(np.mean(np.abs(squares.mean) > squares.half_width(ALPHA)))

    found = []
    for effect in (0.0, EFFECT * np.sqrt((sd**2 + 1 / items) / seeds + 0.25 / items)):
        ours, theirs = arm(hard + effect + 0.5 * rng.standard_normal((simulations, 1, items))), arm(hard)
        found += [share(mean_squares(ours - theirs)), share(apart(ours, theirs))]
    return found


def bootstrap_leads(table: Array, rng: np.random.Generator) -> bool:
    """Whether the percentile interval of means over resampled seeds and items leaves out 0."""
    seeds, items = table.shape
    rows = table[rng.integers(seeds, size=(RESAMPLES, seeds))].mean(1)
    means = (rows * rng.multinomial(items, np.full(items, 1 / items), size=RESAMPLES)).sum(1) / items
    low, high = np.quantile(means, [ALPHA / 2, 1 - ALPHA / 2])
    return not low <= 0 <= high


if __name__ == "__main__":
    main()
