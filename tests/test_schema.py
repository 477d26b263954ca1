"""The JSON schemas accept what Limbeck accepts, refuse what it refuses, and explain every key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from limbeck.init import METHODS
from limbeck.schema import recipe_schema, study_schema

RECIPES = sorted((Path(__file__).parent.parent / "src" / "limbeck" / "recipes").glob("demo/*.yaml"))


@pytest.fixture(scope="module")
def recipe() -> Draft202012Validator:
    Draft202012Validator.check_schema(recipe_schema())
    return Draft202012Validator(recipe_schema())


@pytest.fixture(scope="module")
def study() -> Draft202012Validator:
    Draft202012Validator.check_schema(study_schema())
    return Draft202012Validator(study_schema())


def _errors(validator: Draft202012Validator, tree: Any) -> list[str]:
    return [error.json_path for error in validator.iter_errors(tree)]


@pytest.mark.parametrize("tree", [tree for _, tree in METHODS.values()] + [yaml.safe_load(file.read_text()) for file in RECIPES])
def test_valid_files_are_valid(tree: dict[str, Any], recipe: Draft202012Validator, study: Draft202012Validator) -> None:
    is_study = "arms" in tree
    assert _errors(study if is_study else recipe, tree) == []
    assert _errors(recipe if is_study else study, tree) != []


SOURCE = {"type": "dataset", "data": "x.jsonl"}


@pytest.mark.parametrize(
    ("tree", "where"),
    [
        ({}, "$"),
        ({"source": SOURCE, "sourse": {}}, "$"),
        ({"source": {"data": "x.jsonl"}}, "$.source"),
        ({"source": {**SOURCE, "type": "datasets"}}, "$.source"),
        ({"source": SOURCE, "objective": [{"type": "ce", "temperature": 2}]}, "$.objective[0]"),
        ({"source": SOURCE, "objective": [{"weight": 1}]}, "$.objective[0]"),
        ({"source": SOURCE, "train": {"steps": 0}}, "$.train"),
        ({"source": SOURCE, "train": {"steps": 1, "report_to": ["wandbee"]}}, "$.train"),
        ({"source": SOURCE, "seed": -1}, "$.seed"),
    ],
)
def test_mistakes_are_marked(tree: dict[str, Any], where: str, recipe: Draft202012Validator) -> None:
    assert [path[: len(where)] for path in _errors(recipe, tree)] == [where]


def test_study_takes_any_part_of_a_recipe_and_nothing_else(study: Draft202012Validator) -> None:
    assert _errors(study, {"name": "s", "base": "recipe.yaml", "arms": {"a": {"student": {"num_layers": 2}}}}) == []
    assert _errors(study, {"name": "s", "base": {}, "arms": {"a": {"source": {"max_length": 10}, "objective": [{"type": "ce"}]}}}) == []
    assert _errors(study, {"name": "s", "base": {}, "arms": {"a": {"train": {"optimizer": {"learning_rate": 1e-3}}}}}) == []
    assert _errors(study, {"name": "s", "base": {}, "arms": {"a": {"train": {"stpes": 3}}}}) == ["$.arms.a.train"]
    assert _errors(study, {"name": "s", "base": {"sudent": {}}, "arms": {}}) == ["$.base"]


@pytest.mark.parametrize("schema", [recipe_schema(), study_schema()], ids=["recipe", "study"])
def test_every_key_is_explained(schema: dict[str, Any]) -> None:
    """By its own docstring or, where it holds a section, by that of the section."""
    assert list(_silent(schema, schema.get("$defs", {}), "$")) == []


def _silent(schema: dict[str, Any], defs: dict[str, Any], where: str) -> Iterator[str]:
    for name, part in [("", schema), *defs.items()]:
        for key, value in part.get("properties", {}).items():
            refs = [option["$ref"] for option in (value, *value.get("anyOf", []), *value.get("allOf", [])) if "$ref" in option]
            told = value.get("description") or any(defs[ref.rpartition("/")[2]].get("description") for ref in refs)
            if not told and key != "type":
                yield f"{where}.{name}.{key}"
