"""Importing a capture of another toolkit: a capture as any other, whose teacher is what lies on the disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from limbeck.errors import RecipeError
from limbeck.recipe import Recipe, parse_recipe, require_files
from limbeck.spec import load_yaml
from limbeck.store.distillkit import read_settings


def importing_recipe(
    recipe: str | Path,
    folder: str | Path,
    overrides: Iterable[str] = (),
    out: str | Path | None = None,
    settings: str | Path | None = None,
    teacher: str = "unknown",
) -> Recipe:
    """A recipe that captures the source of `recipe` from a capture by DistillKit. What trains and evaluates is left out; where it does not
    say how the output is kept, as many tokens are kept as are there."""
    tree = load_yaml(recipe, overrides)
    named = [tree[key] for key in ("student", "teacher") if isinstance(tree.get(key), dict)]
    tokenizer = next((one[key] for one in named for key in ("model", "tokenizer") if key in one), None)
    if tokenizer is None:
        raise RecipeError(f"{recipe}: student: missing; expected a model whose tokenizer renders the data")
    section = tree.get("capture") or {}
    if isinstance(section, dict):  # else the recipe is refused
        codec = section.get("codec") or {"type": "topk", "k": read_settings(folder, settings).k, "prior": False}
        section = {**section, **({"path": str(out)} if out else {}), "codec": codec}
    known = {"path": str(folder), "tokenizer": tokenizer, "settings": str(settings) if settings else None, "name": teacher}
    kept = {key: value for key, value in tree.items() if key not in ("objective", "train", "evaluate")}
    changed = {**kept, "teacher": {"type": "distillkit", **known}, "capture": section}
    parsed = parse_recipe(changed, where=str(recipe))
    require_files(parsed, str(recipe))
    parsed.for_capture()
    return parsed
