"""The demo: the shipped study (recipes/demo/study.yaml) on a real model, from fetched files to a report."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from limbeck.cache import resolve_model
from limbeck.conduct import run_study
from limbeck.errors import LimbeckError
from limbeck.log import say
from limbeck.recipe import check_files
from limbeck.study import Study, load_study

STUDY = Path(__file__).parent / "recipes" / "demo" / "study.yaml"


def demo(path: Path | str = "runs/demo", seeds: int = 1, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Run the demo's study in `path` with seeds 0 to `seeds` - 1, fetching what is missing; returns the study's figures.

    Started again it goes on where it was. `overrides` change the study as on the command line.
    """
    start = time.perf_counter()
    study = load_study(STUDY, [f"seeds={list(range(seeds))}", *overrides])
    _fetch(study)
    fetched = time.perf_counter() - start
    figures = run_study(study, path)
    total = time.perf_counter() - start
    say(f"demo: {total:.0f} s in all" + (f", {fetched:.0f} s of them for fetching" if fetched > 1 else ""))
    return figures | {"seconds": {"fetch": fetched, **figures.get("seconds", {}), "total": total}}


def _fetch(study: Study) -> None:
    """Bring the model and data into the cache, if they are not there."""
    if _is_there(study):
        return
    from limbeck.assets import fetch

    try:
        fetch(["demo"])
    except LimbeckError as error:
        raise LimbeckError(f"the demo's model and data are not in the cache, and `limbeck assets fetch demo` failed: {error}") from error


def _is_there(study: Study) -> bool:
    """Whether every model and data set that the study names is on this machine; its arms name the same ones."""
    recipe = next(iter(study.recipes().values()))
    student, _ = recipe.for_training()
    names = {student.model, getattr(recipe.teacher, "model", student.model)}
    return not check_files(recipe) and all(Path(resolve_model(name)).is_dir() for name in names)
