"""Arms: what a study trains. Those that its user names, and those that it adds: two controls, and the baseline at the cost of others.

An arm is `at_cost_of` others where it is the baseline with their FLOPs: a method that asks a teacher is better at equal tokens only, unless
it beats that too. More steps take rows that were not seen yet, while there are any, and after that the same again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from limbeck.errors import RecipeError
from limbeck.flops import flops_per_token
from limbeck.recipe import Recipe
from limbeck.report.collect import TEACHER, TEACHER_OF
from limbeck.teachers import NoTeacher, Teacher
from limbeck.training import Train

AGAIN, PLANTED = "-again", "-planted"
"""Behind the baseline's name: its controls."""
OTHER_SEEDS = 10_000
"""How far the A/A control's seeds are from the study's."""


@dataclass(frozen=True)
class Arm:
    """An arm as it is run. `recipe` has the seed of the first run, and where `parent` is set, the parent's student in place of what comes
    of its training. `role` says what a control is for."""

    name: str
    recipe: Recipe
    seeds: list[int]
    parent: str | None = None
    role: Literal["arm", "again", "planted"] = "arm"
    at_cost_of: list[str] = field(default_factory=list)
    """The arms whose FLOPs it has; none of an arm that the study names."""


def named_teachers(arms: Mapping[str, Arm], baseline: str) -> dict[str, str]:
    """By arm: the name of its teacher. The baseline's is the study's, `teacher`; another is named after the first arm that has it."""
    names: dict[str, str] = {}
    known: list[tuple[Teacher, str]] = [(NoTeacher(), TEACHER), (arms[baseline].recipe.teacher, TEACHER)]
    for arm, its in arms.items():
        teacher = its.recipe.teacher
        names[arm] = next((name for other, name in known if other == teacher), TEACHER_OF + arm)
        known.append((teacher, names[arm]))
    return names


def at_equal_compute(
    arms: Mapping[str, Arm], baseline: str, compared: list[str], where: str
) -> dict[str, tuple[dict[str, Any], list[str]]]:
    """By name, the change of `train` that gives the baseline the FLOPs of some of the compared arms, and those arms. Left out are arms on
    other data, whose tokens are not known before they are rendered, and those that cost what the baseline costs."""
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for arm in compared:
        ours, theirs = arms[arm], arms[baseline]
        line = [*_line(arms, ours), *_line(arms, theirs)]
        if any(one.recipe.source != theirs.recipe.source for one in line):
            continue
        unit = "epochs" if all(_train(one).epochs for one in line) else "steps"
        if any(getattr(_train(one), unit) is None for one in line):
            raise RecipeError(
                f"{where}: primary.equal_compute: found both train.steps and train.epochs in {ours.name!r} and {theirs.name!r}, expected "
                "one of them"
            )
        own = _per_length(theirs, where) * getattr(_train(theirs), unit)
        spent = sum(_per_length(one, where) * getattr(_train(one), unit) for one in _line(arms, ours))
        before = sum(_per_length(one, where) * getattr(_train(one), unit) for one in _line(arms, theirs)) - own
        length = (spent - before) / _per_length(theirs, where)
        if length <= 0:
            continue
        length = max(round(length), 1) if unit == "steps" else float(f"{length:.4g}")
        if length != getattr(_train(theirs), unit):
            found.setdefault(f"{baseline}-{length}-{unit}", ({unit: length}, []))[1].append(arm)
    return found


def _line(arms: Mapping[str, Arm], arm: Arm) -> list[Arm]:
    """An arm and all that it starts from."""
    return [arm, *_line(arms, arms[arm.parent])] if arm.parent else [arm]


def _train(arm: Arm) -> Train:
    return arm.recipe.for_training()[1]


def _per_length(arm: Arm, where: str) -> float:
    """FLOPs per step, or per pass over the data, for tokens in units of a conversation."""
    each = flops_per_token(arm.recipe)
    if each["student"] is None or each["teacher"] is None:
        student, _ = arm.recipe.for_training()
        raise RecipeError(
            f"{where}: primary.equal_compute: arm {arm.name!r}: the sizes of {student.model!r} and of its teacher are read from the "
            "weights' files, and these are not here; load the models once, or give the baseline an arm with more steps yourself"
        )
    train = _train(arm)
    return (each["student"] + each["teacher"]) * (1 if train.epochs else train.batch_size)
