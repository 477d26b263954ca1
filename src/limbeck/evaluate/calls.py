"""Function calls as models write them, read from text. Nothing of it is ever run, and no text makes reading it raise or take long.

The styles: `<tool_call>{...}</tool_call>` (Hermes, Qwen), `[TOOL_CALLS]` (Mistral), JSON bare or in a fence, with `arguments` or with
`parameters` (Llama), and calls as Python writes them. What is right about them is call_match.py's part.
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

Style = Literal["tool_call", "mistral", "fence", "json", "llama", "python"]

MAX_CHARS = 16_000
"""Of a text, so much is read."""
MAX_CALLS = 64
MAX_DEPTH = 16
"""Lists and objects inside of each other."""
MAX_BITS = 256
"""Of an integer: no argument needs more, and a huge one takes long to print."""
MAX_STARTS = 200
"""Places of a text at which JSON is looked for, and lines at which Python is."""

FENCE = re.compile(r"```(?:[ \t]*(?:[\w+-]+[ \t]*)?\n)?")
THOUGHT = re.compile(r"\A\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
MISTRAL_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")
PYTHON_CALL = re.compile(r"[\[(\s]*[A-Za-z_][\w.]*\s*\(")
CONSTANTS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Call:
    """A function's name and arguments, the latter as JSON has them."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Parsed:
    """The calls in a text. `exact` says that there is nothing else in it, and that every delimiter is closed."""

    calls: tuple[Call, ...] = ()
    style: Style | None = None
    exact: bool = False


class _NoCallError(Exception):
    """What was read is no call."""


def parse(text: str) -> Parsed:
    """The calls in what a model wrote; none where it holds none, or where one that it begins cannot be read."""
    text = THOUGHT.sub("", text[:MAX_CHARS], count=1).strip()
    for read in (_tagged, _mistral, _fenced, _bare_json, _bare_python):
        try:
            found = read(text)
        except _NoCallError:
            return Parsed()
        if found is not None and found.calls:
            return found if len(found.calls) <= MAX_CALLS else Parsed()
    return Parsed()


# --- styles: each gives None where the text is of another style, and raises _NoCallError where it is of this one and broken


def _tagged(text: str) -> Parsed | None:
    before, *blocks = text.split("<tool_call>")
    if not blocks:
        return None
    calls: list[Call] = []
    exact = not before.strip()
    for block in blocks:
        body, closed, after = block.partition("</tool_call>")
        found = _calls_of(_json(body))
        exact = exact and bool(closed) and not after.strip() and len(found) == 1
        calls += found
    return Parsed(tuple(calls), "tool_call", exact)


def _mistral(text: str) -> Parsed | None:
    before, *parts = text.split("[TOOL_CALLS]")
    if not parts:
        return None
    calls: list[Call] = []
    exact = not before.strip()
    for part in parts:
        if named := MISTRAL_CALL.match(part):
            arguments, end = _json_at(part, named.end())
            calls += _calls_of({"name": named[1], "arguments": arguments})
        else:
            value, end = _json_at(part, len(part) - len(part.lstrip()))
            calls += _calls_of(value)
        exact = exact and not part[end:].strip()
    return Parsed(tuple(calls), "mistral", exact)


def _fenced(text: str) -> Parsed | None:
    """What stands between fences: those that hold calls. A fence that is not closed ends with the text."""
    pieces = FENCE.split(text)
    if len(pieces) < 2:
        return None
    calls: list[Call] = []
    num_blocks = 0
    for body in pieces[1 : 2 * MAX_STARTS : 2]:
        found = _whole(body.strip())
        num_blocks += bool(found)
        calls += found
    exact = len(pieces) == 2 * num_blocks + 1 and not any(piece.strip() for piece in pieces[::2])
    return Parsed(tuple(calls), "fence", exact)


def _bare_json(text: str) -> Parsed | None:
    """JSON that is the whole text, or stands somewhere in it."""
    text = text.removeprefix("<|python_tag|>").strip()
    values, exact, place, starts = [], True, 0, 0
    while place < len(text) and starts < MAX_STARTS:
        start = min((at for at in (text.find("{", place), text.find("[", place)) if at >= 0), default=len(text))
        exact = exact and not text[place:start].strip(" \n\t;,")
        if start == len(text):
            break
        starts += 1
        try:
            value, place = _json_at(text, start)
            values.append((value, _calls_of(value)))
        except _NoCallError:
            exact, place = False, max(place, start + 1)
    calls = tuple(call for _, found in values for call in found)
    if not calls:
        return None
    first = next(value for value, _ in values)
    first = first[0] if isinstance(first, list) else first
    return Parsed(calls, "llama" if isinstance(first, dict) and "parameters" in first else "json", exact)


def _bare_python(text: str) -> Parsed | None:
    """Python that is the whole text, or lines of it."""
    text = text.removeprefix("<|python_tag|>").strip()
    if found := _python(text):
        return Parsed(tuple(found), "python", exact=True)
    return Parsed(tuple(call for line in text.splitlines()[:MAX_STARTS] for call in _python(line.strip())), "python")


def _whole(text: str) -> list[Call]:
    """The calls of a text that is JSON or Python as a whole; none where it is not."""
    try:
        return _calls_of(_json(text))
    except _NoCallError:
        pass
    found = _bare_json(text) if text[:1] in ("{", "[") else None  # several objects, one after the other
    return list(found.calls) if found is not None and found.exact else _python(text)


# --- JSON


def _json(text: str) -> Any:
    text = text.strip()
    value, end = _json_at(text, 0)
    if end != len(text):
        raise _NoCallError
    return value


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        raise _NoCallError from None
    return _bounded(value), end


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant, strict=False)


def _calls_of(value: Any) -> list[Call]:
    """The calls that a JSON value is: an object, or a list of them."""
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    if not isinstance(value, list):
        return [_call_of(value)]
    return [_call_of(each) for each in value]


def _call_of(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        raise _NoCallError
    name = value.get("name", value.get("function"))
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        raise _NoCallError
    if arguments.get("type") == "object" and isinstance(arguments.get("properties"), dict):
        raise _NoCallError  # the tool's own schema, said again
    return Call(name.strip(), arguments)


# --- Python


def _python(text: str) -> list[Call]:
    """The calls of Python text that holds nothing but calls with named literals; none where it holds anything else."""
    if not PYTHON_CALL.match(text):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text).body
        return [_python_call(node) for statement in body for node in _elements(statement)]
    except (_NoCallError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _elements(statement: ast.stmt) -> Iterator[ast.expr]:
    if not isinstance(statement, ast.Expr):
        raise _NoCallError
    value = statement.value
    yield from value.elts if isinstance(value, ast.List | ast.Tuple) else [value]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise _NoCallError
    parts, function = [], node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    if not isinstance(function, ast.Name):
        raise _NoCallError
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _NoCallError
        arguments[keyword.arg] = _literal(keyword.value)
    return Call(".".join([function.id, *reversed(parts)]), _bounded(arguments))


def _literal(node: ast.expr) -> Any:
    """The value of a literal; a tuple is a list, as in JSON."""
    match node:
        case ast.Constant(value=str() | bool() | int() | float() | None as value):
            return value
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=int() | float() as value)) if not isinstance(
            value, bool
        ):
            return -value if isinstance(sign, ast.USub) else value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_literal(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _literal(value) for key, value in zip(keys, values, strict=True)}
    raise _NoCallError


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise _NoCallError


def _bounded(value: Any, depth: int = 0) -> Any:
    """The value, or _NoCallError where it is nested too deeply or holds a number that is huge or none."""
    if depth > MAX_DEPTH:
        raise _NoCallError
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _bounded(item, depth + 1)
    if (isinstance(value, int) and value.bit_length() > MAX_BITS) or (isinstance(value, float) and not math.isfinite(value)):
        raise _NoCallError
    return value
