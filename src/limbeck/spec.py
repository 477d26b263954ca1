"""Specs: torch-free, frozen configuration models, and the open families that are told apart by `type`.

A family member (a Term, a Teacher, a Source, a Benchmark) is one class that is its own config; defining the class registers it.
Here too: dotted overrides, and the translation of pydantic's errors into messages that name key, found, expected and nearest.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from limbeck.errors import LimbeckError, RecipeError, nearest

S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    """Base of all configuration: immutable, refuses unknown keys, documents a field by the docstring under it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1; in a recipe it is a slip (`steps: yes`), and it would run."""
        if isinstance(value, bool):
            types_ = _types_in(cls.model_fields[str(info.field_name)].annotation)
            if types_ & {int, float} and bool not in types_:
                raise PydanticCustomError("truth_value", "expected a number")
        return value


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
        taken = cls.members.get(name) if isinstance(name, str) else cls
        if taken is not None and issubclass(cls, taken):  # no type of its own: a recipe that names the type means the parent
            return
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"{cls.__qualname__}: type {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
        cls.members[str(name)] = cls

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """`type` has a default in Python and none in a recipe, where a member is known by nothing else."""
        found = handler(schema)
        resolved = handler.resolve_ref_schema(found)
        resolved["required"] = list(dict.fromkeys(["type", *resolved.get("required", [])]))
        return found


class _Member:
    """Annotation marker: validate a mapping by the family member that its `type` names; with `by_name` also that name alone."""

    def __init__(self, family: type[Family], by_name: bool = False) -> None:
        self.family, self.by_name = family, by_name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        family = self.family

        def choose(value: Any) -> Any:
            if isinstance(value, family):
                return value
            known = ", ".join(sorted(family.members))
            tree = {"type": value} if self.by_name and isinstance(value, str) else value
            if not isinstance(tree, dict):
                what = "a name, or a mapping" if self.by_name else "a mapping"
                raise PydanticCustomError("family_mapping", f"expected {what} with a `type` (one of: {known})")
            name = tree.get("type")
            if not isinstance(name, str) or name not in family.members:
                found = "no `type`" if name is None else f"type {name!r}" if tree is value else repr(name)
                hint = nearest(str(name), family.members) if name is not None else ""
                raise PydanticCustomError("family_type", f"found {found}, expected one of: {known}{hint}")
            return family.members[name].model_validate(tree)

        def dump(value: Family) -> Any:
            tree = value.model_dump(mode="json")
            return tree["type"] if self.by_name and tree.keys() == {"type"} else tree

        return core_schema.no_info_plain_validator_function(choose, serialization=core_schema.plain_serializer_function_ser_schema(dump))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        members = {name: TypeAdapter(member).core_schema for name, member in self.family.members.items()}
        found = handler(core_schema.tagged_union_schema(members, discriminator="type")) if members else {"type": "object"}
        return {"anyOf": [{"enum": sorted(members)}, found]} if self.by_name else found


def member_of(family: type[Family], by_name: bool = False) -> Any:
    """The annotation of a field that holds one member of an open family: `objective: list[member_of(Term)]`. With `by_name`, a member whose
    parameters all have defaults may be given by its name, and one without parameters is always written so."""
    return Annotated[family, _Member(family, by_name)]


def validate(cls: type[S], tree: Any, where: str) -> S:
    """`tree` as a `cls`, or a RecipeError that lists every problem with its dotted key. `where` names the file or caller."""
    if not isinstance(tree, dict):
        raise RecipeError(f"{where}: found {_show(tree)}, expected a mapping of keys to values")
    try:
        return cls.model_validate(tree)
    except LimbeckError as error:  # about a file that the tree names
        raise type(error)(f"{where}: {error}") from None
    except ValidationError as error:
        lines = _explain(cls, tree, error.errors())
        raise RecipeError(f"{where}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)) from None


def load_yaml(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping in a YAML file with `key.path=value` overrides applied."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise RecipeError(f"{path}: {(error.strerror or str(error)).lower()}{near}") from None
    except ValueError as error:
        raise RecipeError(f"{path}: not readable as text: {error}") from None
    tree = _parse(text, str(path))
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: found {_show(tree)}, expected a mapping of keys to values")
    return override(tree, overrides)


def override(tree: dict[str, Any], pairs: Iterable[str]) -> dict[str, Any]:
    """A copy of `tree` with each `key.path=value` set; list items by index; values parsed as YAML."""
    changed: dict[str, Any] = _copy(tree)
    for pair in pairs:
        key, separator, raw = pair.partition("=")
        if not separator or not all(key.split(".")):
            raise RecipeError(f"override {pair!r}: expected key.path=value")
        value = _parse(raw, f"override {pair!r}")
        node: Any = changed
        *parents, last = key.split(".")
        for part in parents:
            node = _descend(node, part, pair)
        if isinstance(node, list):
            node[_index(node, last, pair)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise RecipeError(f"override {pair!r}: {'.'.join(parents)} is {_show(node)}, which has no keys")
    return changed


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it: mappings merge key by key unless they name another `type`, all else is replaced."""
    merged: dict[str, Any] = _copy(base)
    for key, value in changes.items():
        old: Any = merged.get(key)
        same_kind = isinstance(old, dict) and isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type")
        merged[key] = merge(old, value) if same_kind else _copy(value)
    return merged


def class_at(cls: type[BaseModel], tree: Any, loc: tuple[Any, ...]) -> type[BaseModel] | None:
    """The model class that sits at `loc` of `cls` validated from `tree`, as far as annotations and `type` values tell."""
    current: Any = cls
    node = tree
    for part in loc:
        node = node[part]
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        elif get_origin(current) in (list, tuple, dict):
            current = get_args(current)[-1 if get_origin(current) is dict else 0]
        current = _resolve(current, node)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _descend(node: Any, part: str, pair: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, pair)]
    if not isinstance(node, dict):
        raise RecipeError(f"override {pair!r}: {part!r} is below {_show(node)}, which has no keys")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, pair: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        expected = f"a number from 0 to {len(node) - 1}" if node else "no index: the list is empty. Give the whole list"
        raise RecipeError(f"override {pair!r}: found index {part!r}, expected {expected}")
    return int(part)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _explain(cls: type[BaseModel], tree: Any, problems: Sequence[Any]) -> list[str]:
    """A line per key: dotted key, what was found, what was expected, and the nearest valid choice."""
    by_key: dict[tuple[Any, ...], list[Any]] = {}
    for problem in problems:
        by_key.setdefault(_key(tree, problem), []).append(problem)
    # of the branches of a union, the one that got further into the value says more than the one that failed at its door
    keys = [key for key in by_key if not any(other[: len(key)] == key != other and _has_branches(by_key[key], key) for other in by_key)]
    return [_line(cls, tree, key, by_key[key]) for key in keys]


def _line(cls: type[BaseModel], tree: Any, key: tuple[Any, ...], problems: Sequence[Any]) -> str:
    problem = problems[0]
    name = ".".join(str(part) for part in key)
    if problem["type"] == "extra_forbidden":
        owner = class_at(cls, tree, key[:-1])
        known = list(owner.model_fields) if owner else []
        hint = nearest(str(key[-1]), known) or (f"; known keys: {', '.join(known)}" if known else "")
        return f"{name}: unknown key{hint}"
    if problem["type"] == "missing":
        return f"{name}: missing; expected a value"
    expected = [_expected(problem) for problem in problems]
    message = " or ".join([expected[0], *(other.removeprefix("expected ") for other in expected[1:])])
    # our own messages say what was found, or what is wrong, as they see fit
    if problem["type"] not in ("value_error", "family_type") or message.startswith("expected"):
        message = f"found {_show(problem['input'])}, {message}"
    for problem in problems:
        if problem["type"] == "literal_error":
            message += nearest(str(problem["input"]), re.findall("'([^']*)'", problem["ctx"]["expected"]))
    return f"{name}: {message}" if name else message


def _expected(problem: Any) -> str:
    """pydantic's message in our words."""
    message = problem["msg"].removeprefix("Value error, ")
    number = "a number " if problem["type"].startswith(("greater_than", "less_than")) else ""
    message = message.replace("Input should be ", f"expected {number}", 1)
    message = re.sub(r"a valid dictionary( or instance of \w+)?", "a mapping of keys to values", message)
    return str(message[0].lower() + message[1:])


def _key(tree: Any, problem: Any) -> tuple[Any, ...]:
    """Where a problem is, without the names of union branches that pydantic puts into its path."""
    key, node = [], tree
    for part in problem["loc"]:
        inside = (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int) and part < len(node))
        if inside:
            node = node[part]
        if inside or (problem["type"] == "missing" and part == problem["loc"][-1]):
            key.append(part)
    return tuple(key)


def _has_branches(problems: Sequence[Any], key: tuple[Any, ...]) -> bool:
    return any(len(problem["loc"]) > len(key) for problem in problems)


def _resolve(annotation: Any, node: Any) -> Any:
    """The plain class or container behind Annotated, `| None` and a family."""
    if get_origin(annotation) is Annotated:
        return _resolve(get_args(annotation)[0], node)
    if get_origin(annotation) in (Union, types.UnionType):
        options = [_resolve(option, node) for option in get_args(annotation) if option is not type(None)]
        return next((option for option in options if len(options) == 1 or _fits(option, node)), None)
    if isinstance(annotation, type) and issubclass(annotation, Family):
        return annotation.members.get(str(node.get("type")), annotation) if isinstance(node, dict) else annotation
    return annotation


def _fits(option: Any, node: Any) -> bool:
    """Whether a branch of a union is the one for a mapping, or for a list."""
    if isinstance(node, dict):
        return isinstance(option, type) and issubclass(option, BaseModel)
    return isinstance(node, list) and get_origin(option) is list


def _types_in(annotation: Any) -> set[Any]:
    """All classes that an annotation names."""
    return {annotation}.union(*(_types_in(part) for part in get_args(annotation)))


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where YAML takes the last one in silence."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(problem=f"found the key {key!r} twice", problem_mark=node.value[index][0].start_mark)
        return node


def _parse(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        return _copy(loader.get_single_data())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RecipeError(f"{where}: not readable as YAML: {error.problem or error.context}{place}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where}: not readable as YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{where}: not readable as YAML: nested too deeply, or an alias inside of what it stands for") from None
