"""Inputs: what lies behind the names in a recipe. Two runs of one recipe are the same only if files, models and modules were too."""

from __future__ import annotations

from typing import Any

from limbeck import plugins
from limbeck.cache import files_hash, model_content
from limbeck.flops import asks_teacher
from limbeck.recipe import Recipe


def inputs_of(recipe: Recipe) -> dict[str, Any]:
    """SHA-256 of data files, of modules of the user's, and of the models that lie in folders: those of the cache and the hub are told by
    name and revision. The teacher's only where it is asked. The cases that choose the student decide it, too."""
    found: dict[str, Any] = {"data": files_hash(recipe.source.names)}
    if recipe.plugins:
        found["plugins"] = plugins.contents(recipe.plugins)
    if modules := recipe.source.modules:
        found["convert"] = plugins.contents(modules)
    if models := models_of(recipe):
        found["models"] = models
    if recipe.chosen_by is not None:
        found["chosen_by"] = recipe.chosen_by.fingerprint()
    return found


def models_of(recipe: Recipe) -> dict[str, str]:
    """Of student and teacher, those that lie in folders."""
    found = {"student": model_content(recipe.student.model) if recipe.student else None}
    if asks_teacher(recipe) or (recipe.chosen_by is not None and recipe.chosen_by.needs_teacher):
        found["teacher"] = recipe.teacher.content()
    return {which: content for which, content in found.items() if content is not None}
