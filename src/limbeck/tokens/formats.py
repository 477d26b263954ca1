"""Rows to conversations: the formats in which people keep their data, told apart by their columns.

A file is refused at its first bad row: a row skipped in silence changes what was trained on. What a tokenizer makes of a conversation is
render.py's part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from limbeck.errors import DataError, nearest
from limbeck.tokens.messages import keys_of, kind, messages_of, nearest_key, parse_json, refuse_lone_surrogates, show, tools_of
from limbeck.tokens.sample import Conversation

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca", "text"]
Row = dict[str, Any]

COLUMNS: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
"""What a row of each format has. Where a row has the columns of several, the first of them is meant: the later ones are often copies."""
KEYS = tuple(key for columns in COLUMNS.values() for key in columns)
EXPECTED = "`messages` (with optional `tools`), `conversations`, `prompt` and `completion`, `instruction` and `output`, or `text`"

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names for who speaks. What `function_call` says is a tool call as JSON text."""


def conversation_of(row: Any, where: str, format: Format | None = None) -> Conversation:
    """One row as a Conversation, in the given format or the one that its columns show. Other columns are ignored; `where` opens errors."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {kind(row)}, expected an object with {EXPECTED}")
    refuse_lone_surrogates(row, where)
    name = format or _detect(row, where)
    for key in COLUMNS[name]:
        if row.get(key) is None:
            raise DataError(f"{where}: `{key}` is missing, found {keys_of(row)}; expected it in format {name!r}{nearest_key(row, (key,))}")
    return _READERS[name](row, where)


def _detect(row: Row, where: str) -> Format:
    """The format whose columns a row has. One that it has by half is a slip, not text with an extra column."""
    for name, columns in COLUMNS.items():
        missing = [key for key in columns if row.get(key) is None]
        if not missing:
            return name
        if len(missing) < len(columns):
            others = [key for key in row if key not in KEYS]
            raise DataError(f"{where}: `{missing[0]}` is missing, expected {EXPECTED}{nearest_key(others, tuple(missing))}")
    hint = nearest_key(row, KEYS) or "; other columns need a function that makes these of them, named by `convert`"
    raise DataError(f"{where}: found {keys_of(row)}, expected {EXPECTED}{hint}")


def _messages(row: Row, where: str) -> Conversation:
    return Conversation(messages=messages_of(row["messages"], where), tools=tools_of(row, where), where=where, format="messages")


def _sharegpt(row: Row, where: str) -> Conversation:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: conversations: found {kind(turns)}, expected a list with at least one turn")
    if isinstance(turns[0], dict) and turns[0].get("from") is None and turns[0].get("role") is not None:
        said = turns
    else:
        said = [_turn(turn, f"{where}: conversations.{index}") for index, turn in enumerate(turns)]
    messages = messages_of(said, where, "conversations")
    if messages[0]["role"] != "system":
        messages = _system(row, where) + messages
    return Conversation(messages=messages, tools=tools_of(row, where), where=where, format="sharegpt")


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: found {kind(turn)}, expected an object with `from` and `value`")
    for key in ("from", "value"):
        if turn.get(key) is None:
            raise DataError(f"{where}: `{key}` is missing, found {keys_of(turn)}{nearest_key(turn, (key,))}")
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        hint = nearest(str(speaker).lower(), SPEAKERS)
        raise DataError(f"{where}.from: found {show(speaker)}, expected one of: {', '.join(SPEAKERS)}{hint}")
    if speaker != "function_call":
        return {"role": SPEAKERS[speaker], "content": value}
    calls = parse_json(value, f"{where}.value") if isinstance(value, str) else value
    return {"role": "assistant", "tool_calls": [calls] if isinstance(calls, dict) else calls}


def _prompt_completion(row: Row, where: str) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list):
        before, after = (messages_of(row[key], where, key) for key in ("prompt", "completion"))
        return Conversation(
            messages=before + after, tools=tools_of(row, where), num_context=len(before), where=where, format="prompt_completion"
        )
    for key in ("prompt", "completion"):
        if not isinstance(row[key], str):
            raise DataError(
                f"{where}: {key}: found {kind(row[key])}, expected a text, or both `prompt` and `completion` as lists of messages"
            )
    return Conversation(prompt=prompt, completion=completion, where=where, format="prompt_completion")


def _alpaca(row: Row, where: str) -> Conversation:
    for key in ("instruction", "input", "output"):
        if not isinstance(row.get(key, ""), str | None):
            raise DataError(f"{where}: {key}: found {kind(row[key])}, expected a text")
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]})
    return Conversation(messages=_system(row, where) + turns, where=where, format="alpaca")


def _text(row: Row, where: str) -> Conversation:
    if not isinstance(row["text"], str):
        raise DataError(f"{where}: text: found {kind(row['text'])}, expected a text")
    return Conversation(text=row["text"], where=where, format="text")


def _system(row: Row, where: str) -> tuple[dict[str, Any], ...]:
    """The system message that some sets keep in a column of its own."""
    said = row.get("system")
    if not said:
        return ()
    if not isinstance(said, str):
        raise DataError(f"{where}: system: found {kind(said)}, expected a text")
    return ({"role": "system", "content": said},)


_READERS: dict[Format, Callable[[Row, str], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "text": _text,
}
