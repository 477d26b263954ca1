"""Items, metrics and results: standard errors, JSON and names."""

from __future__ import annotations

import json
import random
import statistics

import pytest

from limbeck.errors import RecipeError, RunError
from limbeck.evaluate import Agreement, Benchmark, Item, Metric, Result
from limbeck.evaluate.base import ratio
from limbeck.spec import validate


def item(name, total, count):
    return Item(name, {"m": total}, {"m": count})


def test_mean_of_equal_counts_has_the_textbook_error():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    metric = ratio([item(str(i), value, 1.0) for i, value in enumerate(values)], "m", True, 0.5)
    assert metric.value == pytest.approx(0.6)
    assert metric.stderr == pytest.approx(statistics.stdev(values) / 5**0.5)
    assert (metric.num_items, metric.chance, metric.higher_is_better) == (5, 0.5, True)


def test_error_of_a_ratio_is_that_of_a_bootstrap_over_items():
    draw = random.Random(0)
    counts = [draw.randint(5, 60) for _ in range(80)]
    items = [item(str(i), count * draw.gauss(2, 0.5), count) for i, count in enumerate(counts)]
    resampled = []
    for _ in range(2000):
        some = draw.choices(items, k=len(items))
        resampled.append(sum(i.sums["m"] for i in some) / sum(i.counts["m"] for i in some))
    metric = ratio(items, "m", False)
    assert metric.value == pytest.approx(sum(i.sums["m"] for i in items) / sum(counts))
    assert metric.stderr == pytest.approx(statistics.stdev(resampled), rel=0.08)


def test_items_without_a_count_do_not_count():
    items = [item("a", 3.0, 2.0), item("b", 0.0, 0.0), Item("c", {}, {})]
    assert ratio(items, "m", True) == Metric(1.5, None, 1, True)
    assert ratio(items[1:], "m", True) == Metric(None, None, 0, True)


def test_result_survives_json():
    metrics = {"m": Metric(0.5, None, 1, True, 0.25)}
    result = Result("a", 1, {"type": "x"}, metrics, [Item("i", {"m": 0.5}, {"m": 1.0}, {"chosen": 1})], 1.5, "hash", {"weights": "w"})
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize("tree", [[], {"name": "a"}, {"metrics": {"m": 3}, "items": []}, {"metrics": {}, "items": [{"x": 1}]}])
def test_no_result(tree):
    with pytest.raises(RunError, match=r"f\.json: no benchmark result"):
        Result.from_json(tree, "f.json")


def test_members_are_registered():
    assert set(Benchmark.members) >= {"agreement", "bits_per_byte", "exact_match", "multiple_choice"}
    for name, member in Benchmark.members.items():
        assert member.model_fields["type"].default == name
        assert member.version >= 1 and (member.higher_is_better or name == "harness")  # whose metrics are its tasks'


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "a b", "x" * 101, "ä", "a\n"])
def test_unsafe_names_are_refused(name):
    with pytest.raises(RecipeError, match=r"name: .*expected a name that can be a file's"):
        validate(Agreement, {"data": "d", "name": name}, "recipe")


def test_key():
    assert Agreement(data="d").key == "agreement"
    assert Agreement(data="d", name="heldout-2.v1").key == "heldout-2.v1"


@pytest.mark.parametrize("fields", [{"data": ""}, {"data": []}, {"data": "d", "limit": 0}, {"data": "d", "max_length": 1}, {}])
def test_bad_fields_are_refused(fields):
    with pytest.raises(RecipeError):
        validate(Agreement, fields, "recipe")
