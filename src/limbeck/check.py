"""Check: what can be said of a recipe or study before anything is loaded. No torch, no model; data files are read and parsed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from limbeck.errors import RecipeError
from limbeck.objectives import HiddenTerm
from limbeck.recipe import Recipe, check_files
from limbeck.recipe import parse_recipe as parse
from limbeck.sources import DatasetSource
from limbeck.spec import load_yaml


def check(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Validate the recipe or study in a YAML file and say what it will do. Raises on the first thing that cannot work."""
    overrides = list(overrides)
    if "arms" in load_yaml(path, overrides):
        from limbeck.study import load_study

        study = load_study(path, overrides)
        return {
            "kind": "study",
            "name": study.name,
            "seeds": list(study.seeds),
            "arms": {name: describe(arm, f"{path}: arm {name!r}") for name, arm in study.recipes().items()},
        }
    return {"kind": "recipe", **describe(parse(path, overrides), str(path))}


def describe(recipe: Recipe, where: str) -> dict[str, Any]:
    """What a recipe will do, as far as its files tell."""
    if problems := check_files(recipe):
        raise RecipeError(f"{where}: " + "; ".join(problems))
    shape = recipe.student.shape() if recipe.student else None
    provided = recipe.teacher.provides()
    found: dict[str, Any] = {
        "student": recipe.student.model if recipe.student else None,
        "student_shape": {"num_layers": shape[0], "width": shape[1]} if shape else None,
        "student_parameters": recipe.student.num_parameters() if recipe.student else None,
        "teacher": {"type": recipe.teacher.type, "num_layers": provided.num_layers, "width": provided.width},
        "objective": {key: term.model_dump(mode="json") for key, term in recipe.terms.items()},
        "num_conversations": _num_conversations(recipe),
        "benchmarks": [benchmark.key for benchmark in recipe.evaluate],
    }
    if shape and provided.num_layers:
        hidden = {key: term for key, term in recipe.terms.items() if isinstance(term, HiddenTerm) and term.is_settled}
        maps = {key: term.layer_pairs(shape[0], provided.num_layers) for key, term in hidden.items()}
        found["layer_pairs"] = {key: [list(pair) for pair in pairs] for key, pairs in maps.items()}
    return found


def _num_conversations(recipe: Recipe) -> int | None:
    if not isinstance(recipe.source, DatasetSource):
        return None
    return sum(len(chosen.conversations) for chosen in recipe.source.chosen())
