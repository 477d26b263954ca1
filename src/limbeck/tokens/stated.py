"""Tools in words, for chat templates that have no place for them: one form in which a model is asked and in which it is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from limbeck.tokens.sample import Conversation

STATED = """You can call these functions, each given by its JSON schema:
{tools}

Answer with nothing but the calls that are needed, each in this form:
<tool_call>
{{"name": "function name", "arguments": {{"argument name": value}}}}
</tool_call>
If no function can do what is asked, call none and say so.

"""


def stated(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain text: tools at the head of the first one of the user, as not every template has a system message; calls as the
    assistant's words, and a tool's result as the user's."""
    said = [_plain(message) for message in messages]
    if tools:
        listed = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
        first = next((message for message in said if message["role"] == "user"), said[0])
        first["content"] = STATED.format(tools=listed) + (first.get("content") or "")
    return said


def in_words(conversation: Conversation) -> Conversation:
    """A conversation whose rendering needs no place for tools."""
    return replace(conversation, messages=tuple(stated(conversation.messages, conversation.tools)), tools=())


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"}
    if not message.get("tool_calls"):
        return dict(message)
    parts = [message["content"]] if message.get("content") else []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        written = {"name": function["name"], "arguments": function.get("arguments") or {}}
        parts.append(f"<tool_call>\n{json.dumps(written, ensure_ascii=False)}\n</tool_call>")
    return {key: value for key, value in message.items() if key not in ("tool_calls", "content")} | {"content": "\n".join(parts)}
