"""JSON schemas of recipes and studies, for editors: what pydantic makes of the specs, and what it cannot know.

A study's base and arms are parts of recipes. They are described by a copy of the recipe's schema in which no key is required.
"""

from __future__ import annotations

from typing import Any

from limbeck.recipe import Recipe
from limbeck.study import Study


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe."""
    return Recipe.model_json_schema()


def study_schema() -> dict[str, Any]:
    """The schema of a study."""
    schema = Study.model_json_schema()
    recipe = Recipe.model_json_schema()
    parts = {"Recipe": {key: value for key, value in recipe.items() if key != "$defs"}, **recipe["$defs"]}
    schema["$defs"] = {**schema.get("$defs", {}), **{f"Part{name}": _part(part) for name, part in parts.items()}}
    part = {"$ref": "#/$defs/PartRecipe"}
    base, arms = schema["properties"]["base"], schema["properties"]["arms"]
    base["anyOf"] = [part if option.get("type") == "object" else option for option in base["anyOf"]]
    arms["additionalProperties"] = part
    return schema


def _part(schema: Any) -> Any:
    """A schema of which any part may be left out, with references to such schemas."""
    if isinstance(schema, list):
        return [_part(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _part(value) for key, value in schema.items() if key not in ("required", "discriminator", "oneOf")}
    if "oneOf" in schema:  # without its `type`, a member is not told apart from its siblings
        found["anyOf"] = _part(schema["oneOf"])
    if "$ref" in schema:
        found["$ref"] = schema["$ref"].replace("#/$defs/", "#/$defs/Part")
    return found
