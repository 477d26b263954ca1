"""Suites: named lists of benchmarks, for models that come without a recipe. `limbeck eval MODEL --suite NAME`."""

from __future__ import annotations

from pathlib import Path

from limbeck.errors import RecipeError, nearest
from limbeck.evaluate import Benchmark
from limbeck.spec import Spec, load_yaml, member_of, validate

FOLDER = Path(__file__).parent / "recipes" / "suites"


class Suite(Spec):
    """What a suite's file holds."""

    evaluate: list[member_of(Benchmark)]  # type: ignore[valid-type]
    """The benchmarks, as in a recipe."""


def names() -> list[str]:
    """The suites that come with Limbeck."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def load_suite(name: str) -> list[Benchmark]:
    """The benchmarks of a suite by its name, or of a YAML file of one's own."""
    file = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if file.parent == FOLDER and name not in names():
        raise RecipeError(f"suite: found {name!r}, expected a YAML file or one of: {', '.join(names())}{nearest(name, names())}")
    suite = validate(Suite, load_yaml(file), str(file))
    if needy := [benchmark.key for benchmark in suite.evaluate if benchmark.needs_teacher]:
        raise RecipeError(f"{file}: {needy[0]!r} compares with a teacher, which a suite has not; expected it in a recipe (--recipe)")
    if not suite.evaluate:
        raise RecipeError(f"{file}: evaluate is empty; expected at least one benchmark")
    return suite.evaluate
