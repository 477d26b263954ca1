"""JSON-lines files to conversations, checked row by row.

A file is refused at its first bad row: a row skipped in silence changes what was trained on. What a tokenizer makes of a
conversation is render.py's part.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import DataError, nearest
from limbeck.tokens.sample import Conversation, Sample

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = ("messages", "tools", "prompt", "completion")
EXPECTED = "`messages` (with optional `tools`), or `prompt` and `completion`"


def read_conversations(path: Path, limit: int | None = None) -> list[Conversation]:
    """The conversations of a JSON-lines file, or of its first `limit` rows. Blank lines are not rows."""
    conversations = [conversation_of(row, where) for where, row in islice(_rows(path), limit)]
    if not conversations:
        raise DataError(f"{path}: found no rows, expected one JSON object per line with {EXPECTED}")
    return conversations


def conversation_of(row: Any, where: str) -> Conversation:
    """One row as a Conversation. Keys other than `messages`, `tools`, `prompt` and `completion` are ignored; `where` opens each error."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {_kind(row)}, expected an object with {EXPECTED}")
    _refuse_lone_surrogates(row, where)
    if row.get("messages") is not None:
        return Conversation(messages=_messages(row["messages"], where), tools=_tools(row, where), where=where)
    if row.get("prompt") is None and row.get("completion") is None:
        raise DataError(f"{where}: found {_list(row)}, expected {EXPECTED}{_nearest_key(row, KEYS)}")
    for key in ("prompt", "completion"):
        if row.get(key) is None:
            other = [name for name in row if name not in KEYS]
            raise DataError(f"{where}: `{key}` is missing, expected {EXPECTED}{_nearest_key(other, (key,))}")
        if not isinstance(row[key], str):
            hint = "; a list of messages goes under `messages`" if isinstance(row[key], list) else ""
            raise DataError(f"{where}: {key}: found {_kind(row[key])}, expected a text{hint}")
    return Conversation(prompt=row["prompt"], completion=row["completion"], where=where)


def data_hash(samples: Iterable[Sample]) -> str:
    """SHA-256 over the ids and target masks of the samples, in their order: equal exactly where runs see the same tokens."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(sample.ids, dtype="<i8").tobytes())
        digest.update(np.ascontiguousarray(sample.is_target, dtype=np.uint8).tobytes())
    return digest.hexdigest()


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of every line that is not blank."""
    try:
        with Path(path).open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                where = f"{path}:{number}"
                if line := _decode(raw, where).strip():
                    yield where, _parse(line, where)
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror or error}") from None


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: found byte 0x{raw[error.start]:02x} at column {error.start + 1}, expected UTF-8 text") from None


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        hint = " (JSON lines: the whole object on one line)" if line in ("{", "[") else ""
        raise DataError(f"{where}: not readable as JSON: {error.msg} at column {error.colno}{hint}") from None
    except RecursionError:
        raise DataError(f"{where}: not readable as JSON: nested too deeply") from None


def _messages(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages: found {_kind(value)}, expected a list with at least one message")
    return tuple(_message(message, f"{where}: messages.{index}") for index, message in enumerate(value))


def _message(value: Any, where: str) -> dict[str, Any]:
    """A message without its null values, its tool calls' arguments as objects."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {_kind(value)}, expected an object with `role` and `content`")
    message: dict[str, Any] = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role is None:
        raise DataError(f"{where}: `role` is missing, found {_list(message)}{_nearest_key(message, ('role',))}")
    if role not in ROLES:
        raise DataError(f"{where}.role: found {_show(role)}, expected one of: {', '.join(ROLES)}{nearest(str(role).lower(), ROLES)}")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]
    if "content" not in message:
        if role != "assistant" or "tool_calls" not in message:
            raise DataError(f"{where}: `content` is missing, found {_list(message)}{_nearest_key(message, ('content', 'tool_calls'))}")
    elif not isinstance(message["content"], str):
        raise DataError(f"{where}.content: found {_kind(message['content'])}, expected a text")
    return message


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in the form that chat templates expect: `arguments` an object, where OpenAI's API gives it as JSON text."""
    if not isinstance(value, list):
        raise DataError(f"{where}: found {_kind(value)}, expected a list of tool calls")
    calls = []
    for index, call in enumerate(value):
        place = f"{where}.{index}"
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: found {_show(call)}, expected an object with `function`: `name` and `arguments`")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parse(arguments or "{}", f"{place}: arguments")
        if not isinstance(arguments, dict):
            raise DataError(f"{place}: arguments: found {_kind(arguments)}, expected an object, or one as JSON text")
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if "function" in call else function)
    return calls


def _tools(row: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """The tools of a row: a list of schemas, or the same as JSON text (as data sets with one column type store it)."""
    tools = row.get("tools")
    if tools is None:
        # `tools` under a slightly other name would be trained without, in silence, as any extra key is ignored
        near = difflib.get_close_matches("tools", [key for key in row if key != "tools" and row[key]], n=1, cutoff=0.85)
        if near:
            raise DataError(f"{where}: unknown key {near[0]!r}; did you mean 'tools'?")
        return ()
    if isinstance(tools, str):
        tools = _parse(tools, f"{where}: tools") if tools.strip() else []
        _refuse_lone_surrogates(tools, f"{where}: tools")
    if not isinstance(tools, list):
        raise DataError(f"{where}: tools: found {_kind(tools)}, expected a list of tool schemas, or one as JSON text")
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: tools.{index}: found {_show(tool)}, expected a schema with a function `name`")
    return tuple(tools)


def _refuse_lone_surrogates(value: Any, where: str) -> None:
    """JSON can write half of a character (`\\ud83d`); it has no UTF-8 form, and tokenizers fail on it."""
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


def _nearest_key(found: Iterable[str], expected: Sequence[str]) -> str:
    """The first expected key that an unexpected one resembles, as the tail of a message. Closer than `nearest`: any column may be there."""
    for key in found:
        match = difflib.get_close_matches(key.lower(), expected, n=1, cutoff=0.75)
        if match and key not in expected:
            return f"; did you mean {match[0]!r}?"
    return ""


def _list(row: dict[str, Any]) -> str:
    return f"keys {', '.join(map(repr, row))}" if row else "no keys"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, dict)) and not value:
        return "an empty list" if isinstance(value, list) else "an empty object"
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return f"{names.get(type(value), type(value).__name__)} ({_show(value)})"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
