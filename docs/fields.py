"""Every key of recipes and studies as Markdown, from the JSON schemas: it stands in the docs where a page says `<!-- fields -->`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from limbeck.schema import recipe_schema, study_schema

MARK = "<!-- fields -->"
FAMILIES = {"teacher": "Teacher", "source": "Source", "objective": "Term", "evaluate": "Benchmark"}


def fill(text: str) -> str:
    """A page with its mark replaced by the tables."""
    return text.replace(MARK, markdown()) if MARK in text else text


def markdown() -> str:
    """A heading, a description and a table for the recipe, for each of its sections, and for the study."""
    recipe, study = recipe_schema(), study_schema()
    lines, told = list(_section("Recipe", recipe, "###")), set[str]()
    for key, value in recipe["properties"].items():
        names = [ref.rpartition("/")[2] for ref in _refs(value)]
        if key in FAMILIES:
            lines += [f"### {key}", "", value.get("description", ""), ""]
            for name in names:
                section = recipe["$defs"][name]
                lines += _section(f"{key}: {section['properties']['type']['const']}", section, "####")
                for inner, deeper in section["properties"].items():
                    for member in (recipe["$defs"][ref.rpartition("/")[2]] for ref in _refs(deeper)):
                        kind = member["properties"].get("type", {}).get("const")
                        if kind and (title := f"{key}.{inner}: {kind}") not in told:  # many terms have a weight
                            told.add(title)
                            lines += _section(title, member, "#####")
        else:
            for name in names:
                lines += _section(key, recipe["$defs"][name], "###")
                for inner, deeper in recipe["$defs"][name]["properties"].items():
                    for ref in _refs(deeper):
                        section = recipe["$defs"][ref.rpartition("/")[2]]
                        member = section["properties"].get("type", {}).get("const")
                        lines += _section(f"{key}.{inner}" + (f": {member}" if member else ""), section, "####")
    lines += _section("Study", study, "###")
    lines += _section("capture, of a study", study["$defs"]["TeacherCapture"], "####")
    return "\n".join(lines)


def _section(title: str, schema: dict[str, Any], level: str) -> Iterator[str]:
    keys = {key: value for key, value in schema["properties"].items() if "const" not in value}
    head = ["| key | value | default | |", "|---|---|---|---|"] if keys else []
    yield from (f"{level} {title}", "", schema.get("description", ""), "", *head)
    for key, value in keys.items():
        default = _code(json.dumps(value["default"])) if value.get("default") is not None and not value.get("$ref") else ""
        shown = "needed" if key in schema.get("required", []) else default
        yield f"| `{key}` | {_type(value)} | {shown} | {_cell(value.get('description', ''))} |"
    yield ""


def _refs(schema: Any) -> list[str]:
    """References to other sections, at whatever depth of alternatives and lists."""
    if isinstance(schema, list):
        return [ref for item in schema for ref in _refs(item)]
    if not isinstance(schema, dict):
        return []
    found = [schema["$ref"]] if "$ref" in schema else []
    return list(dict.fromkeys(found + [ref for key in ("anyOf", "oneOf", "items") for ref in _refs(schema.get(key))]))


def _type(schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in schema:
        return "section"
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_type(option) for option in schema[key] if option.get("type") != "null"))
    if "enum" in schema or "const" in schema:
        return ", ".join(_code(str(value)) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        inside = _type(items) if isinstance(items, dict) and items else ""
        return f"list of {inside}" if inside else "list"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "object": "mapping"}
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema and abs(schema[key]) < 2**53]
    return " ".join([names.get(schema.get("type", ""), "value"), " and ".join(limits)]).strip()


def _code(text: str) -> str:
    return f"`{_cell(text)}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    print(markdown())
