"""The cheapest change that makes a run fit. Changes are tried from those that cost nothing to those that change what is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.log import progress
from limbeck.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class Change:
    """Overrides of the recipe and what they cost."""

    overrides: tuple[str, ...]
    cost: str


def changes(recipe: Recipe, processes: int = 1) -> list[Change]:
    """What may be changed in this recipe for so many processes, the cheapest first."""
    student, spec = recipe.for_training()
    found = []
    sizes = [size for size in (8, 4, 2, 1) if size < spec.micro_batch_size]
    found += [Change((f"train.micro_batch_size={size}",), "nothing: the result is the same") for size in sizes]
    found += [
        Change((f"train.head_memory_mb={size}",), "little: the head computes in smaller chunks")
        for size in (128, 32)
        if size < spec.head_memory_mb
    ]
    if processes > 1 and not recipe.parallel.is_sharded(processes):
        found.append(Change(("parallel.strategy=fsdp2",), "more to send between processes"))
    if not spec.gradient_checkpointing:
        found.append(Change(("train.gradient_checkpointing=true",), "about a third more time"))
    if recipe.teacher.type == "model":
        if getattr(recipe.teacher, "dtype", "") == "float32" and student.lora is None:
            found.append(Change(("teacher.dtype=bfloat16",), "a teacher that is rounded, by at most 0.4 % a weight"))
        found.append(Change(("teacher.load_in=4bit",), "a slightly other teacher (NF4)"))
    if student.lora is None and student.keep_layers is None and student.num_layers is None:
        found.append(Change(("student.lora={}",), "adapters are trained, and not all weights"))
    return found


def cheapest(recipe: Recipe, limit: float, peak_of: Callable[[Recipe], float], processes: int = 1) -> tuple[list[Change], float]:
    """Changes with which the peak is at most `limit` bytes, and that peak. One alone where one is enough, else each on top of those before
    it. All of them, where even that is too much."""
    candidates = _usable(recipe, changes(recipe, processes), processes)
    if not candidates:
        return [], peak_of(recipe)
    together = _last_of_each(candidates)
    # a step of many blocks takes seconds to simulate
    with progress("what would make it fit", len(candidates) + len(together) - 1) as bar:
        for change in candidates:
            peak = peak_of(parse_recipe(recipe, change.overrides))
            bar.advance(note=" ".join(change.overrides))
            if peak <= limit:
                return [change], peak
        for count in range(2, len(together) + 1):
            overrides = [override for each in together[:count] for override in each.overrides]
            peak = peak_of(parse_recipe(recipe, overrides))
            bar.advance(note=" ".join(overrides))
            if peak <= limit:
                return together[:count], peak
    return together, peak


def _usable(recipe: Recipe, candidates: list[Change], processes: int) -> list[Change]:
    """Those that the recipe allows: `load_in` needs a package that may be missing, adapters one more, and FSDP2 none of the former."""
    usable = []
    for change in candidates:
        try:
            changed: Any = parse_recipe(recipe, change.overrides)
            changed.student.check()
            changed.teacher.check()
            changed.parallel.check(processes, changed.teacher)
        except LimbeckError:
            continue
        usable.append(change)
    return usable


def _last_of_each(candidates: list[Change]) -> list[Change]:
    """Of several values of one key, the one that saves most."""
    return list({change.overrides[0].partition("=")[0]: change for change in candidates}.values())
