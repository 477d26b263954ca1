"""Check: what can be said of a recipe or study before anything is loaded. No torch, no model; data files are read and parsed.

`diagnose` goes on from there with the tokenizers, and asks the pair doctor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.errors import RecipeError
from limbeck.log import console, say
from limbeck.objectives import HiddenTerm
from limbeck.recipe import Recipe, check_files, is_study
from limbeck.recipe import parse_recipe as parse
from limbeck.sources import DatasetSource

if TYPE_CHECKING:
    from limbeck.doctor import Finding


def check(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Validate the recipe or study in a YAML file and say what it will do. Raises on the first thing that cannot work."""
    overrides = list(overrides)
    if is_study(path):
        from limbeck.study import load_study

        study = load_study(path, overrides)
        return {
            "kind": "study",
            "name": study.name,
            "seeds": list(study.seeds),
            "arms": {name: describe(arm, f"{path}: arm {name!r}") for name, arm in study.recipes().items()},
        }
    return {"kind": "recipe", **describe(parse(path, overrides), str(path))}


def diagnose(path: str | Path, overrides: Iterable[str] = (), headroom: bool = False) -> dict[str, list[Finding]]:
    """The pair doctor's findings by recipe: one, without a name, or those of a study's arms, where arms that share all that is looked at
    are examined once."""
    from limbeck.doctor import examine

    overrides = list(overrides)
    if not is_study(path):
        return {"": examine(parse(path, overrides), headroom)}
    from limbeck.study import load_study

    alike: dict[str, list[str]] = {}
    recipes = load_study(path, overrides).recipes()
    for arm, recipe in recipes.items():
        seen = recipe.model_dump_json(include={"student", "teacher", "source", "evaluate"})
        alike.setdefault(seen, []).append(arm)
    taught = {", ".join(arms): recipes[arms[0]] for arms in alike.values()}
    return {arms: examine(recipe, headroom and recipe.teacher.provides().output) for arms, recipe in taught.items()}


def show(found: dict[str, Any]) -> None:
    """What a recipe will do, a line each, on the terminal."""
    from rich.table import Column, Table
    from rich.text import Text

    for name, recipe in found["arms"].items() if found["kind"] == "study" else [("", found)]:
        table = Table(Column(), Column(overflow="fold"), box=None, show_header=False, padding=(0, 2, 0, 0))  # paths are to be copied
        if name:
            table.add_row(Text("arm"), Text(name))
        for key, value in recipe.items():
            if value not in (None, [], {}) and key not in ("kind", "verbs"):
                table.add_row(Text(key.replace("_", " ").removeprefix("num ")), Text(_in_words(value)))
        console.print(table)


def show_diagnoses(path: str | Path, found: dict[str, Any], diagnoses: Mapping[str, Sequence[Finding]]) -> None:
    """What the doctor found, and a last line: for what the file is good, and whether to go on."""
    from limbeck.doctor.finding import show as show_findings

    for arms, findings in diagnoses.items():
        say(f"\narms: {arms}" if arms else "")
        show_findings(findings)
    unseen = any(finding.level == "unknown" for findings in diagnoses.values() for finding in findings)
    verdict = "no go: see what says stop" if not found["go"] else "go, as far as could be looked at" if unseen else "go"
    verbs = "" if found["kind"] == "study" else f" for {', '.join(found['verbs']) or 'no verb: it has no objective, train or evaluate'}"
    say(f"{path}: valid {found['kind']}{verbs}; {verdict}")


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        nested = {
            key: f"({_in_words(each)})" if isinstance(each, dict) else _in_words(each) for key, each in value.items() if each is not None
        }
        return ", ".join(f"{key.replace('_', ' ')} {words}" for key, words in nested.items())
    if isinstance(value, list):
        return ", ".join("-".join(map(_in_words, each)) if isinstance(each, list) else _in_words(each) for each in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


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
        "verbs": _verbs(recipe),
    }
    if shape and provided.num_layers:
        hidden = {key: term for key, term in recipe.terms.items() if isinstance(term, HiddenTerm) and term.is_settled}
        maps = {key: term.layer_pairs(shape[0], provided.num_layers) for key, term in hidden.items()}
        found["layer_pairs"] = {key: [list(pair) for pair in pairs] for key, pairs in maps.items()}
    return found


def _verbs(recipe: Recipe) -> list[str]:
    """What a recipe has the sections for."""
    has = {
        "train": recipe.student is not None and recipe.train is not None and bool(recipe.objective),
        "capture": recipe.capture is not None and recipe.teacher.computes,
        "eval": bool(recipe.evaluate),
    }
    return [verb for verb, is_there in has.items() if is_there]


def _num_conversations(recipe: Recipe) -> int | None:
    if not isinstance(recipe.source, DatasetSource):
        return None
    return sum(len(chosen.conversations) for chosen in recipe.source.chosen())
