"""Tools in words: what is trained on is what the benchmark asks, and the calls that are learned are those that it reads."""

from __future__ import annotations

import pytest

from helpers import make_tokenizer
from limbeck.errors import DataError, RecipeError
from limbeck.evaluate import FunctionCalling
from limbeck.evaluate.calls import parse
from limbeck.evaluate.tool_prompt import asker
from limbeck.spec import validate
from limbeck.tokens.datasets import DataSet
from limbeck.tokens.render import render, render_all

NO_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"n": 3, "unit": "°"}}}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add {3}."}]
ROW = {"messages": [*ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}], "tools": [TOOL]}


def conversations(*rows):
    return DataSet(rows=list(rows), tools="stated").read().conversations


def test_what_is_learned_follows_what_is_asked_and_can_be_read():
    tokenizer = make_tokenizer(template=NO_TOOLS)
    sample = render(conversations(ROW)[0], tokenizer, 2000)
    asked = asker(tokenizer, "stated", "test").ids(ASKED, [TOOL], "test")
    assert sample.ids[: len(asked)].tolist() == asked and not sample.is_target[: len(asked)].any()
    learned = tokenizer.decode(sample.ids[sample.is_target].tolist(), skip_special_tokens=True)
    found = parse(learned)
    assert found.style == "tool_call" and [(each.name, each.arguments) for each in found.calls] == [("add", {"n": 3, "unit": "°"})]


def test_several_calls_words_before_them_and_a_result():
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "Adding.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "6"},
        {"role": "assistant", "content": "It is 6."},
    ]
    (conversation,) = conversations({"messages": messages, "tools": [TOOL]})
    first, calls, result, last = conversation.messages
    assert conversation.tools == () and '"name": "add"' in first["content"] and first["content"].endswith("Add.")
    assert calls["content"].startswith("Adding.\n<tool_call>") and calls["content"].count("</tool_call>") == 2 and "tool_calls" not in calls
    assert result == {"role": "user", "content": "<tool_response>\n6\n</tool_response>"}
    assert last == messages[3]


def test_rows_without_tools_are_as_they_were():
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    assert conversations(row)[0] == DataSet(rows=[row]).read().conversations[0]
    text = {"prompt": "a", "completion": "b"}
    assert conversations(text)[0].prompt == "a"


def test_a_template_without_a_place_for_tools_says_how_to_have_them():
    with pytest.raises(DataError, match=r"chat template ignores them; expected .* `tools: stated`"):
        render_all(DataSet(rows=[ROW]).read().conversations, make_tokenizer(template=NO_TOOLS), 2000)
    assert render_all(conversations(ROW), make_tokenizer(template=NO_TOOLS), 2000)[1].num_scored > 0


def test_the_benchmark_says_it_by_a_key_of_its_own():
    with pytest.raises(RecipeError, match=r"data: found `tools`, which is for training; .* `prompt: stated`"):
        validate(FunctionCalling, {"type": "function_calling", "data": {"rows": [ROW], "tools": "stated"}}, "recipe")
