"""JSON lines to conversations: what is read, and that each bad row is refused by file, line and key."""

from __future__ import annotations

import hashlib
import json

import pytest

from helpers import chatml
from limbeck.errors import DataError
from limbeck.tokens.datasets import conversation_of, data_hash, read_conversations
from limbeck.tokens.render import render
from limbeck.tokens.sample import make_sample

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def call(**function):
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


def refusal(tmp_path, content):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_conversations(file)
    message = str(caught.value)
    assert message.startswith(str(file))
    return message.removeprefix(str(file))


# ---- what is read


def test_both_forms(write_jsonl):
    rows = [
        {"messages": HI, "tools": [TOOL], "source": "x", "id": 3},
        {"prompt": "a", "completion": "b"},
        {"messages": HI, "prompt": None, "tools": None},
        {"messages": HI, "prompt": "hi", "prompt_id": "77", "tools": []},
    ]
    file = write_jsonl(rows)
    conversations = read_conversations(file)
    assert [c.messages for c in conversations] == [tuple(HI), (), tuple(HI), tuple(HI)]
    assert [c.tools for c in conversations] == [(TOOL,), (), (), ()]
    assert [(c.prompt, c.completion) for c in conversations] == [(None, None), ("a", "b"), (None, None), (None, None)]
    assert [c.where for c in conversations] == [f"{file}:{line}" for line in (1, 2, 3, 4)]


def test_tools_as_json_text():
    assert conversation_of({"messages": HI, "tools": json.dumps([TOOL])}, "x").tools == (TOOL,)
    assert conversation_of({"messages": HI, "tools": ""}, "x").tools == ()
    assert conversation_of({"messages": HI, "tools": [{"name": "f"}]}, "x").tools == ({"name": "f"},)


def test_arguments_as_json_text_become_an_object(tokenizer):
    """A template that writes `arguments | tojson` would else train on JSON inside a JSON string."""
    as_text = conversation_of({"messages": call(name="f", arguments='{"city": "Paris"}')}, "x")
    as_object = conversation_of({"messages": call(name="f", arguments={"city": "Paris"})}, "x")
    flat = conversation_of(
        {"messages": [HI[0], {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"city": "Paris"}'}]}]}, "x"
    )
    assert as_text == as_object
    assert as_text.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert flat.messages[1]["tool_calls"] == [{"name": "f", "arguments": {"city": "Paris"}}]
    assert render(as_text, tokenizer, 999).ids.tolist() == render(flat, tokenizer, 999).ids.tolist()
    assert conversation_of({"messages": call(name="f", arguments="")}, "x").messages[1]["tool_calls"][0]["function"]["arguments"] == {}


def test_null_values_are_absent():
    messages = [{"role": "user", "content": "hi", "name": None, "tool_calls": None}, {**call(name="f", arguments={})[1], "content": None}]
    first, second = conversation_of({"messages": messages}, "x").messages
    assert first == {"role": "user", "content": "hi"}
    assert set(second) == {"role", "tool_calls"}


def test_limit_reads_no_further(write_jsonl, tmp_path):
    file = write_jsonl([{"prompt": str(i), "completion": "b"} for i in range(5)])
    file.write_text(file.read_text() + "not json\n")
    assert [c.prompt for c in read_conversations(file, limit=3)] == ["0", "1", "2"]
    assert len(read_conversations(file, limit=5)) == 5
    with pytest.raises(DataError):
        read_conversations(file)


def test_blank_lines_byte_order_mark_and_line_separators(tmp_path):
    file = tmp_path / "data.jsonl"
    row = '{"prompt": "a\u2028b", "completion": "é🦊"}'
    file.write_bytes(f"\ufeff{row}\r\n\n  \n{row}".encode())
    first, second = read_conversations(file)
    assert first.prompt == second.prompt == "a\u2028b"
    assert second.completion == "é🦊"
    assert second.where.endswith(":4")


def test_a_surrogate_pair_is_a_character(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "\\ud83e\\udd8a", "completion": "b"}')
    assert read_conversations(file)[0].prompt == "🦊"


# ---- what is refused


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"mesages": HI}, ["found keys 'mesages'", "expected `messages`", "did you mean 'messages'?"]),
        ({"Messages": HI}, ["did you mean 'messages'?"]),
        ({"conversations": HI}, ["found keys 'conversations'", "`prompt` and `completion`"]),
        ({}, ["found no keys"]),
        ([HI], ["found a list", "expected an object"]),
        ("hi", ["found a text"]),
        ({"prompt": "a"}, ["`completion` is missing"]),
        ({"prompt": "a", "completion": None}, ["`completion` is missing"]),
        ({"prompt": "a", "completions": "b"}, ["`completion` is missing", "did you mean 'completion'?"]),
        ({"completion": "a"}, ["`prompt` is missing"]),
        ({"prompt": HI, "completion": "b"}, ["prompt: found a list", "goes under `messages`"]),
        ({"prompt": "a", "completion": 4}, ["completion: found a number (4), expected a text"]),
        ({"messages": []}, ["messages: found an empty list"]),
        ({"messages": "hi"}, ["messages: found a text ('hi'), expected a list"]),
        ({"messages": ["hi"]}, ["messages.0: found a text"]),
        ({"messages": [HI[0], {"from": "gpt", "value": "yes"}]}, ["messages.1: `role` is missing, found keys 'from', 'value'"]),
        ({"messages": [{"roll": "user", "content": "a"}]}, ["`role` is missing", "did you mean 'role'?"]),
        ({"messages": [{"role": "asistant", "content": "a"}]}, ["messages.0.role: found 'asistant'", "tool", "did you mean 'assistant'?"]),
        ({"messages": [{"role": "User", "content": "a"}]}, ["did you mean 'user'?"]),
        ({"messages": [{"role": 3, "content": "a"}]}, ["messages.0.role: found 3"]),
        ({"messages": [{"role": ["user"], "content": "a"}]}, ["messages.0.role: found ['user']"]),
        ({"messages": [{"role": "user", "contnet": "a"}]}, ["messages.0: `content` is missing", "did you mean 'content'?"]),
        ({"messages": [{"role": "user", "content": None}]}, ["`content` is missing"]),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, ["`content` is missing"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, ["messages.0.content: found a list"]),
        ({"messages": [{"role": "user", "content": 3.5}]}, ["messages.0.content: found a number (3.5), expected a text"]),
        ({"messages": [{"role": "assistant", "tool_calls": "f()"}]}, ["messages.0.tool_calls: found a text"]),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, ["messages.0.tool_calls.0: found 'f'"]),
        ({"messages": call(arguments={})}, ["messages.1.tool_calls.0", "`name`"]),
        ({"messages": call(name="f", arguments=[1])}, ["messages.1.tool_calls.0: arguments: found a list"]),
        ({"messages": call(name="f", arguments="{city")}, ["messages.1.tool_calls.0: arguments: not readable as JSON"]),
        ({"messages": call(name="f")}, ["messages.1.tool_calls.0: arguments: found null"]),
        ({"messages": HI, "tools": {"name": "f"}}, ["tools: found an object"]),
        ({"messages": HI, "tools": "[{"}, ["tools: not readable as JSON"]),
        ({"messages": HI, "tools": ["f"]}, ["tools.0: found 'f'"]),
        ({"messages": HI, "tools": [{"type": "function", "function": {}}]}, ["tools.0", "function `name`"]),
        ({"messages": HI, "tool": [TOOL]}, ["unknown key 'tool'", "did you mean 'tools'?"]),
    ],
)
def test_bad_rows(row, parts, tmp_path):
    message = refusal(tmp_path, json.dumps({"messages": HI}) + "\n" + json.dumps(row) + "\n")
    assert message.startswith(":2: ")
    for part in parts:
        assert part in message


def test_no_far_fetched_hint(tmp_path):
    assert "did you mean" not in refusal(tmp_path, json.dumps({"id": 1, "passage": "a", "question": "b"}))


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"', 2, "not readable as JSON"),
        (b"{\n", 1, "the whole object on one line"),
        (b"[" * 100_000, 1, "nested too deeply"),
        (b'\n{"prompt": "caf\xe9", "completion": "b"}\n', 2, "found byte 0xe9 at column 16, expected UTF-8 text"),
        ('{"prompt": "a"}'.encode("utf-16"), 1, "expected UTF-8"),
        (b'{"prompt": "a", "completion": "x\\ud83dy"}', 1, "completion: found a lone surrogate '\\ud83d' at character 2"),
        (b'{"messages": [{"role": "user", "content": "\\udc00"}]}', 1, "messages.0: content: found a lone surrogate"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": "[{\\"name\\": \\"\\\\ud800\\"}]"}', 1, "tools.0: name: found a lone"),
    ],
)
def test_bad_bytes(content, line, part, tmp_path):
    message = refusal(tmp_path, content)
    assert message.startswith(f":{line}: ")
    assert part in message


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(content, tmp_path):
    assert "found no rows" in refusal(tmp_path, content)


def test_unreadable_file(tmp_path):
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        with pytest.raises(DataError, match="not readable"):
            read_conversations(path)


def test_messages_are_long_but_errors_are_not(tmp_path):
    assert len(refusal(tmp_path, json.dumps({"messages": "x" * 10_000}))) < 200


# ---- the hash


def test_data_hash_tells_ids_masks_order_and_borders_apart():
    def hash_of(*rows):
        return data_hash([make_sample(ids, mask, 100) for ids, mask in rows])

    one, other = ([1, 2, 3], [False, True, True]), ([4, 5], [False, True])
    hashes = [
        hash_of(one, other),
        hash_of(other, one),
        hash_of(one),
        hash_of(([1, 2, 3], [False, False, True]), other),
        hash_of(([1, 2, 4], one[1]), other),
        hash_of(([1, 2], [False, True]), ([3, 4, 5], [False, False, True])),
        hash_of(),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_of(one, other) == hashes[0]
    assert len(hashes[0]) == 64


def test_data_hash_is_the_same_on_every_machine():
    sample = make_sample([1, 2], [False, True], 100)
    written_out = bytes([2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    assert data_hash([sample]) == hashlib.sha256(written_out).hexdigest()


def test_rendering_what_was_read(write_jsonl, fresh_tokenizer):
    fresh_tokenizer.chat_template = chatml(generation=True)
    file = write_jsonl([{"messages": HI}])
    sample = render(read_conversations(file)[0], fresh_tokenizer, 99)
    assert fresh_tokenizer.decode(sample.ids[sample.is_target]) == "yes<|im_end|>"
