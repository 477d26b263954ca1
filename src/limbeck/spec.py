"""Specs: torch-free, frozen configuration models, and the open families that are told apart by `type`.

A family member (a Term, a Teacher, a Source, a Benchmark) is one class that is its own config; defining the class registers it.
Here too: dotted overrides, and the translation of pydantic's errors into messages that name key, found, expected and nearest.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from limbeck.errors import RecipeError, nearest

S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    """Base of all configuration: immutable, refuses unknown keys, documents a field by the docstring under it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Family(Spec):
    """Base of an open family. `class Term(Family)` opens one; each of its subclasses declares `type: Literal["name"] = "name"`."""

    members: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Family in cls.__bases__:
            cls.members = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.model_fields["type"].default if "type" in cls.model_fields else None
        if isinstance(name, str):
            cls.members[name] = cls


class _Member:
    """Annotation marker: validate a mapping by the family member that its `type` names."""

    def __init__(self, family: type[Family]) -> None:
        self.family = family

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        family = self.family

        def choose(value: Any) -> Any:
            if isinstance(value, family):
                return value
            known = ", ".join(sorted(family.members))
            if not isinstance(value, dict):
                raise PydanticCustomError("family_mapping", f"expected a mapping with a `type` (one of: {known})")
            name = value.get("type")
            if not isinstance(name, str) or name not in family.members:
                found = "no `type`" if name is None else f"type {name!r}"
                raise PydanticCustomError("family_type", f"found {found}, expected one of: {known}{nearest(str(name), family.members)}")
            return family.members[name].model_validate(value)

        dump = core_schema.plain_serializer_function_ser_schema(lambda value: value.model_dump(mode="json"))
        return core_schema.no_info_plain_validator_function(choose, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        members = tuple(self.family.members.values())
        one_of = members[0] if len(members) == 1 else Annotated[members, Field(discriminator="type")]
        return handler(TypeAdapter(one_of).core_schema)


def member_of(family: type[Family]) -> Any:
    """The annotation of a field that holds one member of an open family: `objective: list[member_of(Term)]`."""
    return Annotated[family, _Member(family)]


def validate(cls: type[S], tree: Any, where: str) -> S:
    """`tree` as a `cls`, or a RecipeError that lists every problem with its dotted key. `where` names the file or caller."""
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: found {_show(tree)}, expected a mapping of keys to values")
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(cls, tree, tuple(problem["loc"]), problem) for problem in error.errors()]
        raise RecipeError(f"{where}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)) from None


def load_yaml(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file with `key.path=value` overrides applied."""
    path = Path(path)
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise RecipeError(f"{path}: no such file{near}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: found {_show(tree)}, expected a mapping of keys to values")
    return override(tree, overrides)


def override(tree: dict[str, Any], pairs: Iterable[str]) -> dict[str, Any]:
    """A copy of `tree` with each `key.path=value` set; list items by index; values parsed as YAML."""
    tree = _copy(tree)
    for pair in pairs:
        key, separator, raw = pair.partition("=")
        if not separator or not key:
            raise RecipeError(f"override {pair!r}: expected key.path=value")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {pair!r}: value is not readable as YAML: {error}") from None
        node: Any = tree
        *parents, last = key.split(".")
        for part in parents:
            node = _descend(node, part, pair)
        if isinstance(node, list):
            node[_index(node, last, pair)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise RecipeError(f"override {pair!r}: {'.'.join(parents)} is {_show(node)}, which has no keys")
    return tree


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it: mappings merge key by key unless they name another `type`, all else is replaced."""
    merged = _copy(base)
    for key, value in changes.items():
        old = merged.get(key)
        same_kind = isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type")
        merged[key] = merge(old, value) if same_kind else _copy(value)
    return merged


def _descend(node: Any, part: str, pair: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, pair)]
    if not isinstance(node, dict):
        raise RecipeError(f"override {pair!r}: {part!r} is below {_show(node)}, which has no keys")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, pair: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(f"override {pair!r}: found index {part!r}, expected a number from 0 to {len(node) - 1}")
    return int(part)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _explain(cls: type[BaseModel], tree: Any, loc: tuple[Any, ...], problem: Any) -> str:
    """One line: dotted key, what was found, what was expected, and the nearest valid key."""
    key = ".".join(str(part) for part in loc) or "recipe"
    if problem["type"] == "extra_forbidden":
        owner = _owner(cls, tree, loc[:-1])
        known = list(owner.model_fields) if owner else []
        hint = nearest(str(loc[-1]), known) or (f"; known keys: {', '.join(known)}" if known else "")
        return f"{key}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{key}: missing; expected a value"
    message = problem["msg"].removeprefix("Value error, ")
    found = "" if problem["type"] in ("value_error", "family_type") else f"found {_show(problem['input'])}, "
    return f"{key}: {found}{message[0].lower() + message[1:]}"


def _owner(cls: type[BaseModel], tree: Any, loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """The model class that sits at `loc` of `cls` validated from `tree`, as far as annotations and `type` values tell."""
    current: Any = cls
    node = tree
    for part in loc:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
            marker = next((m for m in field.metadata if isinstance(m, _Member)), None) if field else None
        else:
            marker = None
        node = (
            node[part]
            if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int) and part < len(node))
            else None
        )
        current = _resolve(current, marker, node, part)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _resolve(annotation: Any, marker: _Member | None, node: Any, part: Any) -> Any:
    origin = get_origin(annotation)
    if origin is Annotated:
        marker = next((m for m in get_args(annotation)[1:] if isinstance(m, _Member)), marker)
        annotation = get_args(annotation)[0]
        origin = get_origin(annotation)
    if origin in (list, tuple):
        return get_args(annotation)[0] if isinstance(part, int) else annotation
    if origin in (Union, types.UnionType):
        options = [a for a in get_args(annotation) if a is not type(None)]
        return _resolve(options[0], marker, node, part) if len(options) == 1 else None
    if isinstance(annotation, type) and issubclass(annotation, Family):
        kind = node.get("type") if isinstance(node, dict) else None
        return annotation.members.get(str(kind), annotation)
    return annotation
