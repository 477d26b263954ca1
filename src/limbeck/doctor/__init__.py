"""The pair doctor: what can be known of a student, a teacher and their data before a run is paid for. `examine` loads tokenizers and reads
the data; weights only where headroom is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from limbeck.doctor.finding import Finding, is_go, show
from limbeck.errors import LimbeckError, RecipeError
from limbeck.recipe import Recipe
from limbeck.sources.dataset import DatasetSource
from limbeck.teachers.model import ModelTeacher

__all__ = ["Finding", "examine", "is_go", "show"]

COMPARED = 64
"""Conversations that are put through both tokenizers and chat templates."""


def examine(recipe: Recipe, headroom: bool = False) -> list[Finding]:
    """All findings of a recipe. What cannot be looked at (a model that is not here) is `unknown`, what training would refuse `stop`."""
    if headroom and (problem := _lacks(recipe)):
        raise RecipeError(f"--headroom: {problem}")
    return list(_findings(recipe, headroom))


def _lacks(recipe: Recipe) -> str:
    """Why there is no headroom to measure; empty where there is."""
    if recipe.student is None:
        return "found no student, expected one to compare with the teacher"
    if not recipe.teacher.provides().output:
        return f"found teacher type {recipe.teacher.type!r}, expected one with an output: model, or a store"
    if not isinstance(recipe.source, DatasetSource):
        return f"found source type {recipe.source.type!r}, expected 'dataset', whose rows both can read"
    return ""


def _findings(recipe: Recipe, headroom: bool) -> Iterator[Finding]:
    from limbeck.doctor import data, pair
    from limbeck.doctor.headroom import headroom as measure
    from limbeck.models import load_tokenizer

    student, teacher = recipe.student, recipe.teacher
    if student is None or not isinstance(recipe.source, DatasetSource):
        yield Finding("pair", "unknown", "compared where there are a student and a source of type 'dataset'")
        return
    try:
        ours = load_tokenizer(student.model, student.revision)
        theirs = load_tokenizer(teacher.model, teacher.revision) if isinstance(teacher, ModelTeacher) else None
    except LimbeckError as error:
        yield Finding("tokenizers", "unknown", str(error))
        return
    conversations = [row for chosen in recipe.source.chosen() for row in chosen.conversations]
    yield pair.padding(student.model, student.revision, ours, "student")
    if theirs is not None and isinstance(teacher, ModelTeacher):
        yield pair.padding(teacher.model, teacher.revision, theirs, "teacher")
        yield from pair.compare(ours, theirs, list(islice(conversations, COMPARED)))
    elif teacher.type == "store":
        yield _captured(recipe, ours)
    try:
        source = recipe.source.open(ours, recipe.seed)
    except LimbeckError as error:
        yield Finding("data", "stop", str(error))
        return
    yield data.scored(source)
    yield data.truncation(source)
    yield data.repeats(source)
    yield data.endings(source.samples, ours, student.model, student.revision)
    yield from data.leaks(recipe.evaluate, conversations)
    if headroom:
        try:
            yield measure(recipe, student, ours)
        except LimbeckError as error:
            yield Finding("headroom", "stop", str(error))


def _captured(recipe: Recipe, tokenizer: Any) -> Finding:
    """A capture says of which tokenizer and template it is."""
    from limbeck.objectives.base import Needs

    try:
        recipe.teacher.open(tokenizer, Needs())
    except LimbeckError as error:
        return Finding("capture", "stop", str(error))
    return Finding("capture", "ok", "made with this student's tokenizer and chat template")
