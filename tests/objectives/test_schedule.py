"""Numbers that change over a run: what they are at a step, that the loss is made of them, and that a resume has nothing to restore."""

from __future__ import annotations

import math
from typing import Any

import pytest

from helpers import write_jsonl
from limbeck.errors import RecipeError
from limbeck.recipe import parse_recipe
from limbeck.trainer import train


def term(**fields: Any) -> Any:
    tree = {"source": {"type": "dataset", "data": "x"}, "teacher": {"type": "model", "model": "a/b"}}
    return parse_recipe(tree | {"objective": [{"type": "ce"}, {"type": "logits", **fields}]}).terms["logits"]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ({"type": "linear", "start": 1.0, "end": 0.2}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"type": "linear", "start": 0.0, "end": 2.0}, [0.0, 0.5, 1.0, 1.5, 2.0]),
        ({"type": "cosine", "start": 1.0, "end": 0.0}, [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(5)]),
        ({"type": "linear", "start": 0.3, "end": 0.3}, [0.3] * 5),
    ],
)
def test_values(schedule, values):
    found = [term(weight=schedule).at(step, 5).weight for step in range(5)]
    assert found == pytest.approx(values, abs=1e-12) and (found[0], found[-1]) == (schedule["start"], schedule["end"])
    assert term(weight=schedule).at(0, 1).weight == schedule["start"]  # a run of one step
    assert term(weight=0.7).at(3, 5).weight == 0.7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": {"type": "linear", "start": 0, "end": 0}}, "found start 0 and end 0"),
        ({"weight": {"type": "linear", "start": -1, "end": 1}}, "objective.1.weight.start: found -1"),
        ({"weight": {"type": "linaer", "start": 1, "end": 0}}, "did you mean 'linear'"),
        ({"weight": {"type": "linear", "start": 1}}, "weight.end: missing"),
        ({"weight": -1}, "objective.1.weight: found -1"),
        ({"weight": float("nan")}, "objective.1.weight"),
        ({"weight": float("inf")}, "objective.1.weight"),
        ({"weight": True}, "objective.1.weight"),
        ({"temperature": {"type": "cosine", "start": 4, "end": 0}}, "found end 0, expected 0.01 to 100"),
        ({"temperature": 0}, "objective.1.temperature: found 0"),
        ({"temperature": 1e9}, "objective.1.temperature"),
        ({"temperature": "warm"}, "objective.1.temperature"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(RecipeError) as caught:
        term(**fields)
    assert message in str(caught.value), str(caught.value)


def test_a_capture_with_a_list_of_temperatures_serves_numbers_only():
    scheduled = term(temperature={"type": "cosine", "start": 4.0, "end": 1.0})
    problem = scheduled.refuses("top_k", {1.0, 4.0})
    assert problem and "cosine from 4 to 1" in problem and "stored its tail: 1 or 4; set that" in problem
    assert term(temperature={"type": "linear", "start": 4, "end": 4}).refuses("top_k", {1.0, 4.0}) is None
    assert scheduled.refuses("dense", None) is None
    assert "expected 1, at which tokens were drawn" in scheduled.refuses("sampled", None)


@pytest.fixture
def recipe(model_dir, tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]} for n in range(8)]

    def make(logits: dict[str, Any], ce: dict[str, Any] | None = None, **train_fields: Any) -> Any:
        return parse_recipe(
            {
                "student": {"model": str(model_dir), "keep_layers": [0, 3]},
                "teacher": {"type": "model", "model": str(model_dir)},
                "source": {"type": "dataset", "data": str(write_jsonl(tmp_path / "rows.jsonl", rows))},
                "objective": [{"type": "ce", **(ce or {})}, {"type": "logits", **logits}],
                "train": {"steps": 5, "batch_size": 4, "micro_batch_size": 2, **train_fields},
            }
        )

    return make


LINEAR = {"weight": {"type": "linear", "start": 1.0, "end": 0.0}, "temperature": {"type": "linear", "start": 3.0, "end": 1.0}}


def test_what_is_logged_is_what_was_optimised(recipe, tmp_path):
    rows = train(recipe(LINEAR, {"weight": {"type": "linear", "start": 0.0, "end": 1.0}}), tmp_path / "run").metrics()
    assert [row["weight/logits"] for row in rows] == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert [row["weight/ce"] for row in rows] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert [row["temperature/logits"] for row in rows] == pytest.approx([3, 2.5, 2, 1.5, 1])
    for row in rows:
        assert row["loss"] == pytest.approx(row["weight/ce"] * row["loss/ce"] + row["weight/logits"] * row["loss/logits"])


def test_a_schedule_is_at_every_step_the_number_that_it_says(recipe, tmp_path):
    """The first step of a schedule is the first of a run with those numbers, and a level schedule is the number."""
    level = {"weight": {"type": "cosine", "start": 0.5, "end": 0.5}, "temperature": {"type": "linear", "start": 2.0, "end": 2.0}}
    by_schedule = train(recipe(level), tmp_path / "schedule").metrics()
    by_number = train(recipe({"weight": 0.5, "temperature": 2.0}), tmp_path / "number").metrics()
    assert [row["loss"] for row in by_schedule] == [row["loss"] for row in by_number]
    falling = train(recipe(LINEAR), tmp_path / "falling").metrics()
    first = train(recipe({"weight": 1.0, "temperature": 3.0}), tmp_path / "first").metrics()
    assert falling[0]["loss"] == first[0]["loss"] and falling[2]["loss/logits"] != first[2]["loss/logits"]


def test_a_resumed_run_goes_on_at_its_place_in_the_schedule(recipe, tmp_path, monkeypatch):
    whole = train(recipe(LINEAR, checkpoint_every=2), tmp_path / "whole")
    import limbeck.trainer

    step = limbeck.trainer.optimizer_step
    calls = []

    def stop(*args: Any) -> Any:
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(limbeck.trainer, "optimizer_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(LINEAR, checkpoint_every=2), tmp_path / "stopped")
    resumed = train(recipe(LINEAR, checkpoint_every=2), tmp_path / "stopped")
    kept = ("loss", "weight/logits", "temperature/logits")
    assert [[row[key] for key in kept] for row in resumed.metrics()] == [[row[key] for key in kept] for row in whole.metrics()]
    assert resumed.read_json("run.json")["weights_sha256"] == whole.read_json("run.json")["weights_sha256"]


def test_report_says_the_schedule():
    from limbeck.report.collect import objective_text

    tree = {"objective": [{"type": "ce"}, {"type": "logits", "divergence": "forward_kl", **LINEAR}]}
    assert objective_text(tree) == "ce + 1 to 0 logits (forward_kl, T 3 to 1)"
