"""The formats in which people keep data, told apart by their columns, as conversations."""

from __future__ import annotations

import json
from typing import Any

import pytest

from limbeck.errors import DataError
from limbeck.tokens.formats import COLUMNS, conversation_of
from limbeck.tokens.sample import Conversation

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ROWS: dict[str, tuple[dict[str, Any], Conversation]] = {
    "messages": ({"messages": [user("a"), assistant("b")]}, Conversation(messages=(user("a"), assistant("b")))),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "Be brief.", "tools": [TOOL]},
        Conversation(messages=(SYSTEM, user("a"), assistant("b")), tools=(TOOL,)),
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]'},
                {"from": "tool", "value": "3"},
                {"from": "gpt", "value": "b"},
            ],
            "system": "not used: the turns have one",
            "tools": json.dumps([TOOL]),
        },
        Conversation(
            messages=(
                SYSTEM,
                user("a"),
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
                {"role": "tool", "content": "2"},
                {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]},
                {"role": "tool", "content": "3"},
                assistant("b"),
            ),
            tools=(TOOL,),
        ),
    ),
    "sharegpt with roles": ({"conversations": [user("a"), assistant("b")]}, Conversation(messages=(user("a"), assistant("b")))),
    "prompt_completion": ({"prompt": "a", "completion": "b"}, Conversation(prompt="a", completion="b")),
    "prompt_completion of messages": (
        {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")], "tools": [TOOL]},
        Conversation(messages=(user("a"), assistant("b"), user("c"), assistant("d")), tools=(TOOL,), num_context=3),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is an instruction ..."},
        Conversation(messages=(user("Add.\n\n1 2"), assistant("3"))),
    ),
    "alpaca without input": (
        {"instruction": "Add 1 2.", "input": "", "output": "3", "system": "Be brief."},
        Conversation(messages=(SYSTEM, user("Add 1 2."), assistant("3"))),
    ),
    "text": ({"text": "Once.", "url": "x"}, Conversation(text="Once.")),
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_formats_are_told_by_their_columns(name: str) -> None:
    row, expected = ROWS[name]
    found = conversation_of(row, "file:1")
    assert (found.format, found.where) == (name.split()[0], "file:1")
    assert found.content == expected.content
    assert conversation_of(row, "file:1", name.split()[0]) == found  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_nulls_are_absent_columns(name: str) -> None:
    """As they are where formats share a table."""
    row, expected = ROWS[name]
    nulls = {key: None for columns in COLUMNS.values() for key in columns if key not in row}
    assert conversation_of({**nulls, **row}, "x").content == expected.content


def test_a_format_that_is_named_is_taken() -> None:
    row = {"messages": [user("a"), assistant("b")], "prompt": "c", "completion": "d", "text": "e"}
    assert conversation_of(row, "x").format == "messages"
    assert conversation_of(row, "x", "text").text == "e"
    assert conversation_of(row, "x", "prompt_completion").prompt == "c"
    with pytest.raises(DataError, match=r"x: `instruction` is missing, found keys 'messages', .* expected it in format 'alpaca'"):
        conversation_of(row, "x", "alpaca")


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"conversations": []}, ["conversations: found an empty list"]),
        ({"conversations": "hi"}, ["conversations: found a text ('hi')"]),
        ({"conversations": ["hi"]}, ["conversations.0: found a text", "`from` and `value`"]),
        ({"conversations": [{"from": "human", "valeu": "a"}]}, ["conversations.0: `value` is missing", "did you mean 'value'?"]),
        ({"conversations": [{"from": "Human", "value": "a"}]}, ["conversations.0.from: found 'Human'", "did you mean 'human'?"]),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, ["conversations.0.from: found ['gpt']"]),
        ({"conversations": [{"from": "human", "value": 3}]}, ["conversations.0.content: found a number (3)"]),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, ["conversations.0.value: not readable as JSON"]),
        ({"conversations": [{"from": "function_call", "value": '{"nam": "f"}'}]}, ["conversations.0.tool_calls.0", "`name`"]),
        ({"conversations": [{"from": "human", "value": "a"}], "system": 3}, ["system: found a number (3)"]),
        ({"instruction": "a", "response": "b", "text": "c"}, ["`output` is missing"]),
        ({"instruction": "a", "outputs": "b"}, ["`output` is missing", "did you mean 'output'?"]),
        ({"instruction": "a", "output": 3}, ["output: found a number (3)"]),
        ({"instruction": "a", "input": [], "output": "b"}, ["input: found an empty list"]),
        ({"prompt": "a", "text": "b"}, ["`completion` is missing"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["`completion` is missing"]),
        ({"text": 3}, ["text: found a number (3), expected a text"]),
        ({"texts": "a"}, ["did you mean 'text'?"]),
        ({"question": "a", "answer": "b"}, ["found keys 'question', 'answer'", "a function that makes these of them, named by `convert`"]),
    ],
)
def test_bad_rows(row: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        conversation_of(row, "file:3")
    assert str(caught.value).startswith("file:3: ")
    for part in parts:
        assert part in str(caught.value)
