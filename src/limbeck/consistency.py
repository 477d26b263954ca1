"""Consistency: what spans the sections of a recipe. Does this teacher give what the objective needs, are there the blocks that it maps?"""

from __future__ import annotations

from typing import Any

from limbeck.errors import RecipeError, nearest, without_secrets
from limbeck.objectives import HiddenTerm, OutputTerm


def secret_in(tree: Any, where: str = "") -> str:
    """The key of the first value that holds a secret; empty where none does. Rows are data: what looks like one there is a text."""
    if isinstance(tree, dict | list):
        items = [(key, value) for key, value in tree.items() if key != "rows"] if isinstance(tree, dict) else list(enumerate(tree))
        return next(filter(None, (secret_in(value, f"{where}.{key}") for key, value in items)), "")
    return where.lstrip(".") if isinstance(tree, str) and without_secrets(tree) != tree else ""


def check_objective(recipe: Any) -> None:
    """Refuse a teacher that lacks what the terms need, and say what to set instead."""
    if recipe.objective and not recipe.terms:
        raise ValueError("objective: every weight is 0; expected at least one term with a positive weight")
    for index, term in enumerate(recipe.objective):
        if term.weight != 0 and term in recipe.objective[:index]:
            first = recipe.objective.index(term)
            raise ValueError(f"objective.{index}: found the same {term.type!r} term as objective.{first}; give one of them both weights")
    moving = [key for key, term in recipe.terms.items() if "temperature" in term.schedules]
    if moving and recipe.train and recipe.train.uses("compile"):
        raise ValueError(
            f"train.kernels: found 'compile' beside a schedule of temperature (the {moving[0]!r} term), for which every step would be "
            "compiled anew; expected a number for the temperature, or no 'compile'"
        )
    provided = recipe.teacher.provides()
    for key, term in recipe.terms.items():
        asks_output = isinstance(term, OutputTerm) and term.needs(1, 1).output
        if (asks_output and not provided.output) or (isinstance(term, HiddenTerm) and provided.layers == frozenset()):
            raise ValueError(
                f"objective: the {key!r} term needs a teacher's {'output' if asks_output else 'hidden states'}, and teacher type "
                f"{recipe.teacher.type!r} gives none; set teacher to {{type: model, model: NAME}} or to a capture "
                "{type: store, path: FOLDER} with it, or remove the term"
            )
        offered = provided.support, provided.temperatures, provided.k
        if isinstance(term, OutputTerm) and provided.output and (problem := term.refuses(*offered)):
            raise ValueError(f"objective: the {key!r} term: {problem}")
    check_layers(recipe)


def check_evaluations(recipe: Any) -> None:
    """Refuse evaluations during training by a benchmark or metric that is not there."""
    spec, known = recipe.train, {benchmark.key: benchmark for benchmark in recipe.evaluate}
    if spec is None:
        return
    if spec.evaluate_every is None:
        for key in ("best", "evaluate_only"):
            if getattr(spec, key):
                raise ValueError(f"train.{key}: found it without train.evaluate_every, expected the steps between evaluations beside it")
        return
    if not known:
        raise ValueError(f"train.evaluate_every: found {spec.evaluate_every} without a benchmark, expected at least one in `evaluate`")
    for name in spec.evaluate_only or []:
        if name not in known:
            raise ValueError(
                f"train.evaluate_only: found {name!r}, expected benchmarks of `evaluate`: {', '.join(known)}{nearest(name, known)}"
            )
    if spec.best is None:
        return
    name, asked = spec.best.benchmark, [benchmark.key for benchmark in recipe.during]
    if name not in asked:
        where = "`evaluate`" if name not in known else "train.evaluate_only"
        raise ValueError(f"train.best.benchmark: found {name!r}, expected one of {where}: {', '.join(asked)}{nearest(name, asked)}")
    try:
        metric = known[name].metric_named(spec.best.metric, "train.best.metric")
    except RecipeError as error:
        raise ValueError(str(error)) from None
    if metric == "teacher_nll":
        raise ValueError("train.best.metric: found 'teacher_nll', which is the teacher's and the same for every student; expected another")


def check_layers(recipe: Any) -> None:
    """Layer and width checks from config.json alone, where the configs are at hand; the same are made again on the loaded models."""
    provided = recipe.teacher.provides()
    shape = recipe.student.shape() if recipe.student else None
    if not shape:
        return
    for key, term in recipe.terms.items():
        if not isinstance(term, HiddenTerm) or provided.num_layers is None:
            continue
        try:
            needed = term.needs(shape[0], provided.num_layers).layers
        except RecipeError as error:
            raise ValueError(str(error)) from None
        if provided.layers is not None and (lacking := sorted(needed - provided.layers)):
            raise ValueError(
                f"objective: the {key!r} term maps teacher blocks {lacking}, the capture holds {sorted(provided.layers)}; "
                "capture again with capture.layers, or map those"
            )
