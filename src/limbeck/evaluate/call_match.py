"""Whether function calls are right: BFCL's AST match, written from its definition. How calls are read from text is calls.py's part.

Every argument of an expected call has a list of admissible values, in which "" says that it may be left out. Inside of an object each key
again has such a list. (Patil et al., "The Berkeley Function Calling Leaderboard", ICML 2025)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from limbeck.evaluate.calls import Call

OMITTED = ""
"""The admissible value of an argument that may be left out."""
IGNORED = re.compile(r"[ ,./\-_*^]")
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (float, int),
    "float": (float, int),
    "boolean": (bool,),
    "array": (list,),
    "tuple": (list,),
    "object": (dict,),
    "dict": (dict,),
    "null": (NoneType,),
}
"""Values by the type that a schema names, in JSON schema's words or BFCL's. Compared exactly: a truth value is no integer."""


@dataclass(frozen=True)
class Expected:
    """A call that is wanted: the function's name, and the admissible values of each of its arguments."""

    name: str
    arguments: dict[str, list[Any]]


Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of the parameters of each function that is offered, by its name."""


def mismatch(calls: Sequence[Call], expected: Sequence[Expected], schemas: Schemas) -> str:
    """Why the calls are not those that are expected, in any order and one to one; empty where they are."""
    if len(calls) != len(expected):
        return f"{len(calls)} calls, expected {len(expected)}"
    reasons = [[call_mismatch(call, wanted, schemas.get(wanted.name, {})) for call in calls] for wanted in expected]
    taken_by: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        """Kuhn's augmenting path: gives row a call, moving others where they have another choice."""
        for column, reason in enumerate(reasons[row]):
            if not reason and column not in seen:
                seen.add(column)
                if column not in taken_by or place(taken_by[column], seen):
                    taken_by[column] = row
                    return True
        return False

    for row, wanted in enumerate(expected):
        if not place(row, set()):
            same_name = [reason for call, reason in zip(calls, reasons[row], strict=True) if reason and call.name == wanted.name]
            return (same_name or [reason for reason in reasons[row] if reason] or ["found once, expected more often"])[0]
    return ""


def call_mismatch(call: Call, expected: Expected, schema: Mapping[str, Any]) -> str:
    """Why a call is not the one that is expected; empty where it is. `schema` is that of the function's parameters."""
    if call.name != expected.name:
        return f"called {call.name!r:.80}, expected {expected.name!r}"
    properties = _properties(schema)
    for name in schema.get("required") or ():
        if name not in call.arguments:
            return f"{expected.name}: argument {name!r} is missing"
    for name, value in call.arguments.items():
        if name not in expected.arguments or (properties and name not in properties):
            return f"{expected.name}: argument {name!r:.80} is not expected"
        if not is_admissible(value, expected.arguments[name], properties.get(name, {})):
            return f"{expected.name}: argument {name!r} has another value or type than expected"
    for name, choices in expected.arguments.items():
        if name not in call.arguments and OMITTED not in choices:
            return f"{expected.name}: argument {name!r} is missing"
    return ""


def right_arguments(calls: Sequence[Call], expected: Sequence[Expected], schemas: Schemas) -> tuple[int, int]:
    """(right, expected) arguments over the expected calls whose function is called. One that may be left out counts where it is given."""
    left, right, total = list(calls), 0, 0
    for wanted in expected:
        properties = _properties(schemas.get(wanted.name, {}))
        counted = [(*_count(call, wanted, properties), index) for index, call in enumerate(left) if call.name == wanted.name]
        if counted:
            found, num_expected, index = max(counted, key=lambda each: (each[0] - each[1], -each[2]))
            right, total = right + found, total + num_expected
            del left[index]
    return right, total


def is_admissible(value: Any, choices: Sequence[Any], schema: Any) -> bool:
    """Whether a value has the type that its schema states, or that of the first admissible value (which may be the name of a variable),
    and is one of these."""
    schema = schema if isinstance(schema, Mapping) else {}
    kinds = _kinds(schema.get("type"))
    stated = next((type(choice) for choice in choices if choice != OMITTED), None)
    fits = kinds is None or type(value) in kinds or type(value) is stated
    return fits and any(is_same(value, choice, schema.get("items")) for choice in choices)


def is_same(value: Any, choice: Any, items: Any = None) -> bool:
    """Texts without regard to case, spaces and some punctuation; lists element by element, each of the type that `items` states; objects by
    key; all else by equality."""
    if isinstance(value, str) and isinstance(choice, str):
        return normalise(value) == normalise(choice)
    if isinstance(value, list):
        if choice == OMITTED:
            return not value  # an empty list, as an empty text, is as good as none
        return (
            isinstance(choice, list)
            and len(value) == len(choice)
            and all(is_admissible(a, [b], items) for a, b in zip(value, choice, strict=True))
        )
    if isinstance(value, dict):
        return isinstance(choice, dict) and (value == choice or _is_same_object(value, choice))
    return bool(value == choice) and isinstance(value, bool) == isinstance(choice, bool)


def normalise(text: str) -> str:
    """What of a text is compared: dates and units are written in many ways."""
    return IGNORED.sub("", text).lower().replace("'", '"')


def _is_same_object(value: dict[str, Any], choice: dict[str, Any]) -> bool:
    admissible = {key: each if isinstance(each, list) else [each] for key, each in choice.items()}
    return all(key in admissible and any(is_same(item, each) for each in admissible[key]) for key, item in value.items()) and all(
        key in value or OMITTED in each for key, each in admissible.items()
    )


def _count(call: Call, wanted: Expected, properties: Mapping[str, Any]) -> tuple[int, int]:
    given = [name for name in wanted.arguments if name in call.arguments]
    right = sum(is_admissible(call.arguments[name], wanted.arguments[name], properties.get(name, {})) for name in given)
    needed = [name for name, choices in wanted.arguments.items() if name in call.arguments or OMITTED not in choices]
    return right, len(needed)


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _kinds(stated: Any) -> tuple[type, ...] | None:
    """The Python types of a schema's `type`, a name or a list of them; None where it does not say."""
    names = stated if isinstance(stated, list) else [stated]
    if not all(isinstance(name, str) and name in TYPES for name in names):
        return None
    return tuple(kind for name in names for kind in TYPES[name])
