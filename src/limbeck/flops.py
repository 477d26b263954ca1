"""FLOPs: what training costs in floating-point operations, counted from sizes alone. Torch-free."""

from __future__ import annotations

from math import prod

from limbeck.cache import weight_shapes
from limbeck.objectives.base import HiddenTerm
from limbeck.recipe import Recipe
from limbeck.teachers import ModelTeacher


def compute(recipe: Recipe, tokens: int) -> dict[str, float | None]:
    """Floating-point operations of a run, of the student and of the teacher as if it had scored every token anew."""
    return {f"{who}_flops": None if each is None else each * tokens for who, each in flops_per_token(recipe).items()}


def flops_per_token(recipe: Recipe) -> dict[str, float | None]:
    """The usual count: 6 for a trained parameter (2 forward, 4 backward), 4 for a frozen one of the student, 2 for one of the teacher."""
    student, _ = recipe.for_training()
    sizes, taught = student.num_parameters(), None
    if not asks_teacher(recipe):
        taught = 0
    elif isinstance(recipe.teacher, ModelTeacher) and (shapes := weight_shapes(recipe.teacher.model, recipe.teacher.revision)):
        taught = sum(prod(shape) for shape in shapes.values())
    return {
        "student": 6.0 * sizes["trained"] + 4.0 * sizes["frozen"] if sizes else None,
        "teacher": None if taught is None else 2.0 * taught,
    }


def asks_teacher(recipe: Recipe) -> bool:
    """Whether any term of positive weight needs one."""
    return any(isinstance(term, HiddenTerm) or term.needs(1, 1).output for term in recipe.terms.values())
