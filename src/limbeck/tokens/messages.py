"""Messages and tools of a conversation, checked key by key, in the one form that chat templates expect; and words for what is wrong."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from limbeck.errors import DataError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")


def messages_of(value: Any, where: str, key: str = "messages") -> tuple[dict[str, Any], ...]:
    """The messages under `key` of a row; `where` opens each error."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {key}: found {kind(value)}, expected a list with at least one message")
    return tuple(_message(message, f"{where}: {key}.{index}") for index, message in enumerate(value))


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message without its null values, its tool calls' arguments as objects."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {kind(value)}, expected an object with `role` and `content`")
    message: dict[str, Any] = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role is None:
        raise DataError(f"{where}: `role` is missing, found {keys_of(message)}{nearest_key(message, ('role',))}")
    if role not in ROLES:
        raise DataError(f"{where}.role: found {show(role)}, expected one of: {', '.join(ROLES)}{nearest(str(role).lower(), ROLES)}")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    if "content" not in message:
        if role != "assistant" or "tool_calls" not in message:
            raise DataError(f"{where}: `content` is missing, found {keys_of(message)}{nearest_key(message, ('content', 'tool_calls'))}")
    elif not isinstance(message["content"], str):
        raise DataError(f"{where}.content: found {kind(message['content'])}, expected a text")
    return message


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in the form that chat templates expect: `arguments` an object, where OpenAI's API gives it as JSON text."""
    if not isinstance(value, list):
        raise DataError(f"{where}: found {kind(value)}, expected a list of tool calls")
    calls = []
    for index, call in enumerate(value):
        place = f"{where}.{index}"
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: found {show(call)}, expected an object with `function`: `name` and `arguments`")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_json(arguments or "{}", f"{place}: arguments")
        if not isinstance(arguments, dict):
            raise DataError(f"{place}: arguments: found {kind(arguments)}, expected an object, or one as JSON text")
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


def tools_of(row: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The tools of a row: a list of schemas, or the same as JSON text (as data sets with one column type store it)."""
    tools = row.get("tools")
    if tools is None:
        # `tools` under a slightly other name would be trained without, in silence, as any extra key is ignored
        near = difflib.get_close_matches("tools", [key for key in row if key != "tools" and row[key]], n=1, cutoff=0.85)
        if near:
            raise DataError(f"{where}: unknown key {near[0]!r}; did you mean 'tools'?")
        return ()
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: tools") if tools.strip() else []
        refuse_lone_surrogates(tools, f"{where}: tools")
    if not isinstance(tools, list):
        raise DataError(f"{where}: tools: found {kind(tools)}, expected a list of tool schemas, or one as JSON text")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tools.{index}: found {show(tool)}, expected a schema with a function `name`")
    return tuple(tools)


def parse_json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        hint = " (JSON lines: the whole object on one line)" if line in ("{", "[") else ""
        raise DataError(f"{where}: not readable as JSON: {error.msg} at column {error.colno}{hint}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{where}: not readable as JSON: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise DataError(f"{where}: not readable as JSON: nested too deeply") from None


def refuse_lone_surrogates(value: Any, where: str) -> None:
    """JSON can write half of a character (`\\ud83d`); it has no UTF-8 form, and tokenizers fail on it."""
    try:
        _refuse_lone_surrogates(value, where)
    except RecursionError:
        raise DataError(f"{where}: nested too deeply") from None


def _refuse_lone_surrogates(value: Any, where: str) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: found a lone surrogate {value[error.start]!r} at character {error.start + 1}, expected text"
            ) from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_lone_surrogates(key, where)
            _refuse_lone_surrogates(item, f"{where}: {key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_lone_surrogates(item, f"{where}.{index}")


def nearest_key(found: Iterable[str], expected: Sequence[str]) -> str:
    """The first expected key that an unexpected one resembles, as the tail of a message. Closer than `nearest`: any column may be there."""
    for key in found:
        match = difflib.get_close_matches(key.lower(), expected, n=1, cutoff=0.75)
        if match and key not in expected:
            return f"; did you mean {match[0]!r}?"
    return ""


def keys_of(row: dict[str, Any]) -> str:
    return f"keys {', '.join(map(repr, row))}" if row else "no keys"


def kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, dict)) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return f"{names.get(type(value), type(value).__name__)} ({show(value)})"


def show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
