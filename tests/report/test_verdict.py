"""Verdicts are right as often as they say: shown by simulation, with what cruder methods do beside it; and small cases worked by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats
from simulate import false_positives, gaussian, right_or_wrong, two_arms

from limbeck.errors import LimbeckError, RunError
from limbeck.report import crossed as crossing
from limbeck.report.crossed import Array, Components, apart, mean_squares
from limbeck.report.gap import gap_recovered
from limbeck.report.verdict import Comparison, holm, mcnemar, scores, verdict, verdicts

NOMINAL, POINT = 0.05, 0.01
SETTINGS = [(seeds, sd, items) for seeds in (3, 5, 10) for sd in (0.0, 1 / 6, 1 / 3) for items in (50, 300)]


def crossed(table: Array) -> Any:
    return crossing.crossed(mean_squares(table))


def noise(rate: float, count: int) -> float:
    """Three standard errors of a simulated rate."""
    return 3 * math.sqrt(rate * (1 - rate) / count)


def rng(*numbers: float) -> np.random.Generator:
    return np.random.default_rng([round(1000 * number) for number in numbers])


@pytest.mark.parametrize(("seeds", "sd", "items"), SETTINGS)
def test_no_lead_is_found_more_often_than_said(seeds, sd, items):
    count = 4000 if items == 50 else 1500
    found = false_positives(gaussian(rng(seeds, sd, items), count, seeds, items, sd))
    assert found <= NOMINAL + POINT + noise(NOMINAL, count) / 3, found


@pytest.mark.parametrize(("seeds", "sd", "items"), [setting for setting in SETTINGS if setting[2] == 50] + [(3, 1 / 3, 300)])
def test_nor_in_right_and_wrong_answers(seeds, sd, items):
    count = 3000 if items == 50 else 1000
    found = false_positives(right_or_wrong(rng(seeds, sd, items, 1), count, seeds, items, sd))
    assert found <= NOMINAL + POINT + noise(NOMINAL, count) / 3, found


@pytest.mark.parametrize(("seeds", "sd"), [(3, 0.0), (3, 1 / 3), (5, 1 / 6), (10, 1 / 3)])
def test_intervals_cover(seeds, sd):
    count = 4000
    squares = mean_squares(gaussian(rng(seeds, sd, 2), count, seeds, 60, sd, effect=0.7))
    covered = float(np.mean(np.abs(squares.mean - 0.7) <= squares.half_width(NOMINAL)))
    assert covered >= 0.94 - noise(0.05, count) / 3, covered


def test_satterthwaite_is_not_enough_for_three_seeds():
    """The usual t(df)^2 * total: a seed variance that is small by luck narrows the interval and raises df at once."""
    squares = mean_squares(gaussian(rng(3), 6000, 3, 300, 1 / 6))
    seed, item = squares.parts()
    df = (seed + item) ** 2 / (seed**2 / 2 + item**2 / 299)
    usual = float(np.mean(np.abs(squares.mean) > scipy_stats.t.ppf(1 - NOMINAL / 2, df) * np.sqrt(seed + item)))
    ours = float(np.mean(np.abs(squares.mean) > squares.half_width(NOMINAL)))
    assert usual > NOMINAL + POINT > ours, (usual, ours)


def test_a_bootstrap_over_seeds_and_items_finds_leads_that_are_none():
    """Three seeds drawn anew with replacement say nothing of seeds: 5 % become more than 10."""
    generator = rng(7)
    tables = gaussian(generator, 300, 3, 100, 1 / 3)
    wrong = 0
    for table in tables:
        rows = generator.integers(3, size=(400, 3))
        columns = generator.multinomial(100, np.full(100, 0.01), size=400)
        means = (table[rows].mean(1) * columns).sum(1) / 100
        low, high = np.quantile(means, [0.025, 0.975])
        wrong += not low <= 0 <= high
    assert wrong / 300 > 0.10, wrong / 300
    assert false_positives(tables) <= NOMINAL + POINT + noise(NOMINAL, 300)


@pytest.mark.parametrize(("seeds", "sd"), [(3, 0.0), (3, 1 / 6), (5, 1 / 3), (10, 0.0)])
def test_ties_are_not_found_where_the_difference_is_the_margin(seeds, sd):
    count, margin = 4000, 0.4
    squares = mean_squares(gaussian(rng(seeds, sd, 3), count, seeds, 50, sd, effect=margin))
    tied = np.abs(squares.mean) + squares.half_width(2 * NOMINAL) < margin  # two one-sided tests at 5 %
    assert float(np.mean(tied)) <= NOMINAL + POINT


@pytest.mark.parametrize(("seeds", "sd"), [(seeds, sd) for seeds in (3, 5, 10) for sd in (0.0, 1 / 3)])
def test_arms_that_share_no_seed_err_no_more_and_are_told_apart_more_often(seeds, sd):
    """Against pairs by the order of the runs, which have half the degrees of freedom."""
    count = 3000
    alike = apart(*two_arms(rng(seeds, sd, 4), count, seeds, 50, sd))
    found = float(np.mean(np.abs(alike.mean) > alike.half_width(NOMINAL)))
    assert found <= NOMINAL + POINT + noise(NOMINAL, count) / 3, found
    stderr = math.sqrt((sd**2 + 1 / 50) / seeds + 0.25 / 50)
    ours, theirs = two_arms(rng(seeds, sd, 5), count, seeds, 50, sd, effect=3 * stderr)
    squares = apart(ours, theirs)
    told = float(np.mean(np.abs(squares.mean) > squares.half_width(NOMINAL)))
    assert told > false_positives(ours - theirs) + (0.0 if seeds == 10 else 0.02)
    parts = Components(sd**2, 0.25, 1.0, num_sets=2)
    assert crossing.power(parts, seeds, 50, 3 * stderr) == pytest.approx(told, abs=0.05)


def test_the_order_of_runs_that_are_not_paired_tells_nothing():
    ours, theirs = (table[0] for table in two_arms(rng(21), 1, 5, 40, 0.3))
    a, b = crossing.crossed(apart(ours, theirs)), crossing.crossed(apart(ours, theirs[::-1]))
    assert (a.value, a.p, *a.interval) == pytest.approx((b.value, b.p, *b.interval))
    assert crossed(ours - theirs).p != pytest.approx(crossed(ours - theirs[::-1]).p), "in pairs, it would"
    assert a.components.num_sets == 2 and 4 <= apart(ours, theirs).df <= 8
    its = [verdicts({"it": Comparison(runs(ours), runs(rows), is_paired=False)}, 0.1)["it"] for rows in (theirs, theirs[::-1])]
    assert its[0].p_better == pytest.approx(a.p) and its[0].p_ties == pytest.approx(its[1].p_ties)
    assert float(apart(np.ones((2, 3)), np.ones((2, 3))).half_width(NOMINAL)) == 0.0


def test_runs_that_are_not_paired_by_hand():
    """Without spread of items or residual, it is Welch's test of the runs' means."""
    means = np.array([0.1, 0.4, 0.2, 0.7]), np.array([0.5, 0.6, 0.5, 0.8])
    its = crossing.crossed(apart(*(np.repeat(each[:, None], 30, axis=1) for each in means)))
    expected = scipy_stats.ttest_ind(*means, equal_var=False)
    assert its.p == pytest.approx(expected.pvalue) and its.df == pytest.approx(expected.df)
    assert its.interval == pytest.approx(tuple(expected.confidence_interval()))


def test_p_values_are_those_of_the_interval():
    for table in gaussian(rng(11), 20, 4, 30, 0.3, effect=0.3):
        its = crossed(table)
        squares = mean_squares(table)
        assert (its.p < NOMINAL) == (its.interval[0] > 0 or its.interval[1] < 0)
        assert abs(abs(its.value) - float(squares.half_width(its.p))) < 1e-6
        assert crossing.above(squares, its.value - 1e-9) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("seeds", "items", "sd", "effect"), [(3, 100, 0.1, 0.5), (5, 50, 0.3, 0.5), (5, 300, 0.1, 0.2), (10, 100, 0.2, 0.2)]
)
def test_power_is_as_predicted(seeds, items, sd, effect):
    parts = Components(sd**2, 0.25, 1.0)
    simulated = false_positives(gaussian(rng(seeds, items, sd), 2000, seeds, items, sd, effect=effect))
    assert crossing.power(parts, seeds, items, effect) == pytest.approx(simulated, abs=0.05)
    least = crossing.minimum_detectable(parts, seeds, items)
    assert crossing.power(parts, seeds, items, least) == pytest.approx(0.8, abs=0.01)


def test_what_would_settle_it_settles_it():
    parts, margin = Components(0.01, 0.25, 1.0), 0.3
    seeds = crossing.seeds_needed(parts, 100, margin)
    assert seeds and false_positives(gaussian(rng(1), 2000, seeds, 100, 0.1, effect=margin)) >= 0.77
    squares = mean_squares(gaussian(rng(2), 2000, seeds, 100, 0.1))
    assert float(np.mean(np.abs(squares.mean) + squares.half_width(2 * NOMINAL) < margin)) >= 0.77
    assert not crossing.decides(parts, seeds - 1, 100, margin, NOMINAL)
    items = crossing.items_needed(Components(0.0001, 0.25, 1.0), 5, margin)
    assert items and false_positives(gaussian(rng(3), 1000, 5, items, 0.01, effect=margin)) >= 0.76
    assert crossing.items_needed(Components(4.0, 0.25, 1.0), 3, margin) is None, "no number of items makes up for seeds that differ"


def test_by_hand():
    """Two seeds, two items: 1 2 / 3 6. Mean 3; rows 1.5 and 4.5, columns 2 and 4."""
    its = crossed(np.array([[1.0, 2.0], [3.0, 6.0]]))
    squares = mean_squares(np.array([[1.0, 2.0], [3.0, 6.0]]))
    assert its.value == 3 and float(squares.seed) == 2 * (1.5**2 + 1.5**2) and float(squares.item) == 2 * (1 + 1)
    assert float(squares.residual) == pytest.approx(4 * 0.5**2)
    assert its.components == Components((9 - 1) / 2, (4 - 1) / 2, 1.0)
    t = scipy_stats.t.ppf(0.975, 1)
    assert its.interval[1] - 3 == pytest.approx(t * math.sqrt(9 / 4 + 3 / 4))
    assert its.stderr == pytest.approx(math.sqrt(3))


def runs(table: np.ndarray, count: float = 1.0) -> list[dict[str, tuple[float, float]]]:
    return [{f"q{i}": (float(value) * count, count) for i, value in enumerate(row)} for row in table]


def judged(table: np.ndarray, margin: float = 0.1, **more: Any) -> Any:
    return verdict(runs(table), runs(np.zeros_like(table)), margin, **more)


def test_outcomes():
    small = 0.05 * rng(5).standard_normal((5, 40))
    assert judged(small + 0.5).outcome == "BEATS" and judged(small - 0.5).outcome == "LOSES"
    assert judged(small + 0.5, higher_is_better=False).outcome == "LOSES"
    assert judged(small).outcome == "TIES"
    told = judged(small + 0.05)
    assert told.outcome == "TIES" and told.p_better < 0.05 and "told from 0" in told.why, "a lead that does not matter is none"
    wide = judged(4 * rng(6).standard_normal((3, 20)), margin=1.0)
    assert wide.outcome == "INCONCLUSIVE" and (wide.seeds_needed or wide.items_needed) and wide.detectable > 1


def test_one_seed_gets_no_verdict():
    answers = (rng(8).random((2, 60)) < 0.5).astype(float)
    its = verdict(runs(answers[:1]), runs(answers[1:]), 0.05)
    assert its.outcome == "NO VERDICT" and "one seed" in its.why and its.interval and its.mcnemar and its.p_better is None


def test_runs_that_are_alike_give_nothing_to_judge_by():
    its = judged(np.zeros((3, 10)))
    assert its.outcome == "INCONCLUSIVE" and its.is_alike and "no spread" in its.why


def test_items_that_some_run_lacks_are_left_out():
    table = rng(9).standard_normal((3, 12))
    ours, theirs = runs(table), runs(np.zeros((3, 12)))
    del ours[1]["q3"]
    theirs[2]["q5"] = (0.0, 0.0)
    its = verdict(ours, theirs, 0.1)
    assert its.num_items == 10 and its.left_out == 2
    assert its.value == pytest.approx(np.delete(table, [3, 5], axis=1).mean())


def test_ratios_are_those_of_the_metric():
    """A metric over tokens: a row's mean is the difference of sum / sum, whatever items count."""
    generator = rng(10)
    ours = [{f"q{i}": (generator.random() * n, float(n)) for i, n in enumerate((3, 50, 7, 11))} for _ in range(2)]
    theirs = [{name: (count * 0.2, count) for name, (_, count) in run.items()} for run in ours]
    items = list(ours[0])
    table = scores(ours, items) - scores(theirs, items)
    for row, run in zip(table, ours, strict=True):
        assert row.mean() == pytest.approx(sum(t for t, _ in run.values()) / 71 - 0.2)


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06)}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_a_family_of_comparisons_errs_no_more_than_one():
    """Five comparisons with one baseline, none of which differs: any BEATS or LOSES in at most nominal + 1 point."""
    generator, count, wrong = rng(12), 400, 0
    for _ in range(count):
        base = generator.standard_normal((5, 40)) + 0.2 * generator.standard_normal((5, 1))
        arms = [generator.standard_normal((5, 40)) + 0.2 * generator.standard_normal((5, 1)) for _ in range(5)]
        p_values = {str(i): crossed(arm - base).p for i, arm in enumerate(arms)}
        wrong += min(holm(p_values).values()) <= NOMINAL
    assert wrong / count <= NOMINAL + POINT + noise(NOMINAL, count) / 3, wrong / count


def test_holm_decides_over_the_study():
    table = 0.3 * rng(13).standard_normal((5, 30)) - 0.01
    alone = verdict(runs(table), runs(np.zeros_like(table)), 0.01)
    assert alone.outcome == "BEATS"
    others = {f"noise {i}": Comparison(runs(rng(14, i).standard_normal((5, 30))), runs(np.zeros((5, 30)))) for i in range(60)}
    together = verdicts({"it": Comparison(runs(table), runs(np.zeros_like(table))), **others}, 0.01)["it"]
    assert together.p_better == alone.p_better and together.adjusted_better > alone.adjusted_better
    assert together.outcome == "INCONCLUSIVE"


def test_mcnemar_by_hand():
    ours = {f"q{i}": (float(i < 9), 1.0) for i in range(12)}
    theirs = {f"q{i}": (float(i < 2 or i == 11), 1.0) for i in range(12)}
    found = mcnemar(ours, theirs)
    assert found and (found.only_ours, found.only_theirs) == (7, 1)
    assert found.p == pytest.approx(2 * (1 + 8) / 2**8)  # at most one of eight coins
    assert mcnemar({"a": (0.5, 1.0)}, {"a": (1.0, 1.0)}) is None and mcnemar(ours, ours).p == 1.0


def test_gap_recovered_covers():
    """Fieller's interval holds the true share of 0.5 where the teacher leads by 1."""
    generator, count, covered = rng(15), 300, 0
    for _ in range(count):
        item = 0.3 * generator.standard_normal(40)
        sft, arm = (
            runs(level + item + 0.1 * generator.standard_normal((4, 1)) + 0.3 * generator.standard_normal((4, 40))) for level in (0.0, 0.5)
        )
        gap = gap_recovered(arm, sft, runs((1.0 + item + 0.3 * generator.standard_normal(40))[None])[0])
        assert gap.interval
        covered += gap.interval[0] <= 0.5 <= gap.interval[1]
    assert covered / count >= 0.93, covered / count


def test_no_gap_where_the_teacher_does_not_lead():
    table = rng(16).standard_normal((3, 30))
    gap = gap_recovered(runs(table + 0.1), runs(table), runs(table.mean(0)[None])[0])
    assert gap.value is None and "not significant" in gap.reason
    assert "one seed" in gap_recovered(runs(table[:1]), runs(table[:1]), runs(table[:1] + 9)[0]).reason
    better = gap_recovered(runs(table + 0.5), runs(table), runs(table.mean(0)[None] - 9)[0])
    assert better.value is None, "a teacher that is told to be worse leads nobody"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: judged(np.ones((2, 3)), margin=0), "margin: found 0, expected the smallest difference that matters"),
        (lambda: judged(np.ones((2, 3)), alpha=0.7), "alpha: found 0.7"),
        (lambda: verdict(runs(np.ones((2, 3))), runs(np.ones((3, 3))), 0.1), "found 2 runs against 3"),
        (lambda: verdict([{"a": (1.0, 1.0)}] * 2, [{"b": (1.0, 1.0)}] * 2, 0.1), "found 0 of 2 items that count in every run"),
        (lambda: crossed(np.ones((1, 5))), "over 1 seeds and 5 items"),
        (lambda: crossed(np.full((2, 5), np.nan)), "not a finite number"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((LimbeckError, RunError), match=message):
        call()
