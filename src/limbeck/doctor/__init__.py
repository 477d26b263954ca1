"""The pair doctor: what can be known of a student, a teacher and their data before a run is paid for. `examine` loads tokenizers, reads
the data and the rows of heads; whole models only where headroom is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from limbeck.doctor.finding import Finding, is_go, show
from limbeck.errors import LimbeckError, RecipeError
from limbeck.recipe import Recipe
from limbeck.sources.dataset import DatasetSource
from limbeck.student import Student
from limbeck.teachers.model import ModelTeacher
from limbeck.tokens.sample import Conversation, Sample

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
    from limbeck.doctor import data

    student = recipe.student
    if student is None or not isinstance(recipe.source, DatasetSource):
        yield Finding("pair", "unknown", "compared where there are a student and a source of type 'dataset'")
        return
    conversations = [row for chosen in recipe.source.chosen() for row in chosen.conversations]
    ours, theirs = _tokenizer((student.model, student.revision)), _tokenizer(recipe.teacher.speaks)
    absent = [tokenizer for tokenizer in (ours, theirs) if isinstance(tokenizer, Finding)]
    yield from {finding.message: finding for finding in absent}.values()
    if not isinstance(ours, Finding):
        yield from _pair(recipe, student, ours, theirs, conversations)
        try:
            source = recipe.source.open(ours, recipe.seed)
        except LimbeckError as error:
            yield Finding("data", "stop", str(error))
            return
        yield data.scored(source)
        yield data.truncation(source)
        yield data.repeats(source)
        yield data.endings(source.samples, ours, student.model, student.revision)
        yield from _markers(recipe, student, ours, theirs, source.samples)
    yield from data.leaks(recipe.evaluate, conversations)
    if headroom and absent:
        yield Finding("headroom", "unknown", "not measured: it needs both models here")
    elif headroom:
        yield _headroom(recipe, student, ours)


def _tokenizer(named: tuple[str, str | None] | None) -> Any:
    """A tokenizer, None for a teacher without one, or the finding that it is not here."""
    from limbeck.models import load_tokenizer

    try:
        return load_tokenizer(*named) if named else None
    except LimbeckError as error:
        return Finding("tokenizers", "unknown", str(error))


def _pair(recipe: Recipe, student: Student, ours: Any, theirs: Any, conversations: list[Conversation]) -> Iterator[Finding]:
    """What can be said of the student's tokenizer alone, and beside the teacher's."""
    from limbeck.doctor import pair

    teacher = recipe.teacher
    yield pair.padding(student.model, student.revision, ours, "student")
    if teacher.type == "store":
        yield _captured(recipe, ours)
    if theirs is None or isinstance(theirs, Finding):
        return
    if isinstance(teacher, ModelTeacher):
        yield pair.padding(teacher.model, teacher.revision, theirs, "teacher")
    yield from pair.compare(ours, theirs, list(islice(conversations, COMPARED)))


def _markers(recipe: Recipe, student: Student, ours: Any, theirs: Any, samples: Sequence[Sample]) -> Iterator[Finding]:
    """Markers that the data teach, against a head that adapters leave as it is, and against the teacher's."""
    from limbeck.doctor import markers

    taught, teacher = markers.taught(samples, ours), recipe.teacher
    if student.lora is not None:
        consequence = "the student will not learn to write them, since adapters leave the head as it is; train all weights"
        yield from markers.examine("student", (student.model, student.revision), taught, ours, consequence)
    if isinstance(teacher, ModelTeacher) and theirs is not None and not isinstance(theirs, Finding):
        shared = {token: count for token, count in taught.items() if _names(theirs, token) == _names(ours, token)}
        consequence = "what the teacher says where the data have them is worth nothing"
        yield from markers.examine("teacher", (teacher.model, teacher.revision), shared, ours, consequence)


def _names(tokenizer: Any, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


def _headroom(recipe: Recipe, student: Student, tokenizer: Any) -> Finding:
    from limbeck.doctor.headroom import headroom

    try:
        recipe.teacher.reach()
        return headroom(recipe, student, tokenizer)
    except LimbeckError as error:
        return Finding("headroom", "stop", str(error))


def _captured(recipe: Recipe, tokenizer: Any) -> Finding:
    """A capture says of which tokenizer and template it is."""
    from limbeck.objectives.base import Needs

    try:
        recipe.teacher.open(tokenizer, Needs())
    except LimbeckError as error:
        return Finding("capture", "stop", str(error))
    return Finding("capture", "ok", "made with this student's tokenizer and chat template")
