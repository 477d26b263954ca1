"""Schedules of weights and temperatures: their values, what a recipe may say, and runs that follow them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import limbeck
from helpers import killed_run, write_jsonl
from limbeck import optim
from limbeck.distributed import World
from limbeck.errors import RecipeError
from limbeck.models import load_tokenizer
from limbeck.objectives import CrossEntropy, Logits, Schedule
from limbeck.objectives.base import active
from limbeck.objectives.schedule import Cosine, Linear
from limbeck.report.collect import objective_text
from limbeck.sources.base import microbatches
from limbeck.step import optimizer_step
from limbeck.student import build
from limbeck.trainer import assemble


def values(schedule: Schedule, num_steps: int) -> list[float]:
    return [schedule.at(step, num_steps) for step in range(num_steps)]


# ---- values


def test_linear_goes_in_equal_steps() -> None:
    assert values(Linear(start=1.0, end=0.2), 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert values(Linear(start=0, end=2), 3) == [0.0, 1.0, 2.0]


def test_cosine_is_half_a_period() -> None:
    expected = [1 + 0.5 * (1 - math.cos(math.pi * step / 4)) * 2 for step in range(5)]
    assert values(Cosine(start=1, end=3), 5) == pytest.approx(expected)
    assert Cosine(start=1, end=3).at(2, 5) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", [member for member in Schedule.members.values() if member.__module__.startswith("limbeck.")])
@pytest.mark.parametrize(("start", "end"), [(1.0, 0.2), (0.1, 0.7), (0.0, 0.3), (0.3, 0.0), (2.0, 2.0)])
def test_both_ends_are_exact_and_no_step_leaves_the_range(kind: type[Schedule], start: float, end: float) -> None:
    for num_steps in (2, 3, 7, 100):
        found = values(kind(start=start, end=end), num_steps)  # type: ignore[call-arg]
        assert (found[0], found[-1]) == (start, end)
        assert all(min(start, end) <= value <= max(start, end) for value in found)
        assert found == sorted(found, reverse=start > end)


def test_a_run_of_one_step_starts() -> None:
    assert Linear(start=1.0, end=0.2).at(0, 1) == 1.0


def test_a_term_at_a_step_has_numbers() -> None:
    term = Logits(weight={"type": "linear", "start": 0, "end": 1}, temperature={"type": "cosine", "start": 4, "end": 1})
    assert term.schedules.keys() == {"weight", "temperature"}
    assert [(now.weight, now.temperature) for now in (term.at(step, 3) for step in range(3))] == [(0.0, 4.0), (0.5, 2.5), (1.0, 1.0)]
    plain = CrossEntropy(weight=0.3)
    assert plain.at(1, 3) is plain


def test_a_term_that_has_a_weight_at_some_step_is_kept() -> None:
    ends = [{"type": "linear", "start": 0, "end": 1}, {"type": "linear", "start": 1, "end": 0}]
    assert list(active([CrossEntropy(weight=0), *(Logits(weight=each) for each in ends)])) == ["logits", "logits_2"]


# ---- runs


@pytest.fixture(scope="module")
def base(make_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    words = ["weather", "Paris", "teacher", "student", "answer", "five", "fox", "dog", "sunny", "sleeps", "lazy", "quick"]
    rows = [{"prompt": " ".join(words[: 2 + i % 3]) + ":", "completion": " ".join(words[i : i + 5])} for i in range(7)]
    return {
        "student": {"model": str(make_model_dir(layers=2, seed=1))},
        "teacher": {"type": "model", "model": str(make_model_dir(layers=3, width=32, seed=2))},
        "source": {"type": "dataset", "data": str(write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", rows))},
        "objective": [
            {"type": "ce", "weight": {"type": "linear", "start": 1.0, "end": 0.2}},
            {"type": "logits", "weight": {"type": "cosine", "start": 0, "end": 1}, "temperature": {"type": "linear", "start": 3, "end": 1}},
        ],
        "train": {"steps": 5, "batch_size": 4, "optimizer": {"learning_rate": 0.01}},
    }


def test_what_is_logged_is_what_was_optimised(base: dict[str, Any], tmp_path: Path) -> None:
    rows = limbeck.train(base, tmp_path / "run").metrics()
    assert [row["weight/ce"] for row in rows] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert [row["temperature/logits"] for row in rows] == [3.0, 2.5, 2.0, 1.5, 1.0]
    assert [rows[0]["weight/logits"], rows[-1]["weight/logits"]] == [0.0, 1.0]
    for row in rows:
        assert row["loss"] == pytest.approx(row["weight/ce"] * row["loss/ce"] + row["weight/logits"] * row["loss/logits"])
        assert row["teacher_nll"] > 0, "the teacher is asked also where its term has no weight yet"


def test_a_schedule_is_a_term_with_another_number_at_every_step(base: dict[str, Any], tmp_path: Path) -> None:
    """The same curve by hand: one step at a time, each a recipe without a schedule."""
    changed = {**base, "train": {**base["train"], "steps": 3, "optimizer": {"learning_rate": 0.01, "schedule": "constant"}}}
    changed["train"]["optimizer"]["warmup_fraction"] = 0
    scheduled = limbeck.train(changed, tmp_path / "scheduled")
    recipe = limbeck.parse_recipe(_numbers(changed, 1.0, 1.0, 1.0))
    student_spec, spec = recipe.for_training()
    tokenizer = load_tokenizer(student_spec.model)
    source = recipe.source.open(tokenizer, recipe.seed)
    learner, scorer, _ = assemble(recipe, build(student_spec), tokenizer, source, World())
    assert scorer is not None
    optimizer = optim.build(spec.optimizer, learner)
    curve = []
    for step, numbers in enumerate([(1.0, 0.0, 3.0), (0.6, 0.5, 2.0), (0.2, 1.0, 1.0)]):
        terms = limbeck.parse_recipe(_numbers(changed, *(max(number, 1e-30) for number in numbers))).terms
        batches = microbatches(source.at(step, 4), 1, 0, 1, 0, None)
        curve.append(optimizer_step(learner.train(), terms, batches, scorer.score, optimizer, spec, World()).loss)
    assert [row["loss"] for row in scheduled.metrics()] == pytest.approx(curve, rel=1e-5)
    assert curve[0] != pytest.approx(curve[1], rel=1e-2)


def _numbers(base: dict[str, Any], ce: float, logits: float, temperature: float) -> dict[str, Any]:
    objective = [{"type": "ce", "weight": ce}, {"type": "logits", "weight": logits, "temperature": temperature}]
    return {**base, "objective": objective}


def test_a_weight_of_zero_at_a_step_gives_the_gradient_of_the_others(base: dict[str, Any], tmp_path: Path) -> None:
    mixed = limbeck.train(base, tmp_path / "mixed", ["train.steps=1"])
    sft = limbeck.train({**base, "objective": [{"type": "ce"}], "teacher": {"type": "none"}}, tmp_path / "sft", ["train.steps=1"])
    ours, theirs = (load_file(run.student / "model.safetensors") for run in (mixed, sft))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_follows_its_schedule_to_the_bit(base: dict[str, Any], tmp_path: Path) -> None:
    settings = ["train.steps=40", "train.checkpoint_every=3"]
    straight = limbeck.train(base, tmp_path / "straight", settings)
    resumed = limbeck.train(base, killed_run(base, tmp_path, settings), settings)
    for key in ("loss", "weight/ce", "weight/logits", "temperature/logits"):
        assert [row[key] for row in straight.metrics()] == [row[key] for row in resumed.metrics()]
    ours, theirs = (load_file(run.student / "model.safetensors") for run in (straight, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_stored_recipe_with_schedules_comes_back_equal(base: dict[str, Any]) -> None:
    recipe = limbeck.parse_recipe(base)
    stored = recipe.to_json()
    assert stored["objective"][0]["weight"] == {"type": "linear", "start": 1.0, "end": 0.2}
    assert limbeck.parse_recipe(stored) == recipe


def test_reports_say_both_ends(base: dict[str, Any]) -> None:
    assert objective_text(limbeck.parse_recipe(base).to_json()) == "1 to 0.2 ce + 0 to 1 logits (forward_kl, T 3 to 1)"


def test_a_capture_of_few_temperatures_serves_no_others_on_the_way(base: dict[str, Any], tmp_path: Path) -> None:
    codec = {"type": "topk", "k": 8, "temperatures": [1.0, 2.0]}
    limbeck.capture({**base, "capture": {"path": str(tmp_path / "store"), "codec": codec}})
    changed = {**base, "teacher": {"type": "store", "path": str(tmp_path / "store")}}
    with pytest.raises(
        RecipeError, match="found temperature linear from 3 to 1, expected one for which the capture stored its tail: 1 or 2"
    ):
        limbeck.parse_recipe(changed)
    limbeck.train(changed, tmp_path / "run", ["objective.1.temperature=2", "train.steps=2"])


# ---- what a recipe may not say


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight", {"type": "linear", "start": -1, "end": 1}, r"weight\.start: found -1, expected a number greater than or equal to 0"),
        ("weight", {"type": "linear", "start": 0, "end": 0}, r"weight: found start 0 and end 0, expected at least one above 0"),
        (
            "weight",
            {"type": "linaer", "start": 0, "end": 1},
            r"weight: found type 'linaer', expected one of: .* did you mean 'linear'\?",
        ),
        ("weight", {"start": 0, "end": 1}, r"weight: found no `type`, expected one of: cosine"),
        ("weight", {"type": "linear", "start": 1}, r"weight\.end: missing; expected a value"),
        ("weight", {"type": "linear", "start": 1, "stop": 0}, r"weight\.stop: unknown key"),
        ("weight", {"type": "cosine", "start": 1, "end": ".nan"}, r"weight\.end: found '\.nan', expected a valid number"),
        ("weight", {"type": "cosine", "start": 1, "end": float("inf")}, r"weight\.end: found inf, expected a finite number"),
        ("weight", {"type": "linear", "start": True, "end": 0}, r"weight\.start: found True, expected a number"),
        ("weight", "linear", r"weight: found 'linear', expected a valid number"),
        ("temperature", {"type": "linear", "start": 2, "end": 0}, r"temperature: found end 0, expected 0\.01 to 100"),
        ("temperature", {"type": "linear", "start": 1000, "end": 1}, r"temperature: found start 1000, expected 0\.01 to 100"),
    ],
)
def test_schedules_that_cannot_be(base: dict[str, Any], field: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"objective\.0\.{message}"):
        limbeck.parse_recipe({**base, "objective": [{"type": "logits", field: value}]})
