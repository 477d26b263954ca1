"""Function calling end to end: prompts with tools, answers of a rigged model, metrics, and rows that are refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers import chatml, make_tokenizer, tiny_model
from limbeck.errors import DataError, RecipeError
from limbeck.evaluate import FunctionCalling, Subject
from limbeck.evaluate.function_calling import MAX_SHOWN, grade
from limbeck.evaluate.tool_prompt import Asker, asker
from limbeck.spec import validate

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}}
NO_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WRITTEN = '<tool_call>{"name": "f", "arguments": {"n": 3}}</tool_call>'


def row(identity, **fields):
    return {"id": identity, "messages": [{"role": "user", "content": "Add."}], "tools": [TOOL]} | fields


ROWS = [
    row("right", category="simple", possible_answer=[{"f": {"n": [2, 3]}}]),
    row("wrong", category="simple", calls=[{"name": "f", "arguments": {"n": 4}}]),
    row("none", category="irrelevance", calls=[]),
]


def answering(text, tokenizer, bigram_model):
    """A model that answers everything with `text`, which is made one token, and ends."""
    tokenizer.add_tokens([text])
    ids = [tokenizer("<|im_start|>assistant\n")["input_ids"][-1], tokenizer(text)["input_ids"][0], tokenizer.eos_token_id]
    table = torch.zeros(len(tokenizer), len(tokenizer))
    for before, after in itertools.pairwise(ids):
        table[before, after] = 20.0
    return bigram_model(table)


def run(bench, model, tokenizer):
    with torch.no_grad():
        return {item.id: item for item in bench.run(Subject(model, tokenizer))}


@pytest.fixture
def ask(tokenizer):
    return asker(tokenizer, "auto", "test")


def test_right_wrong_and_unwanted_calls(fresh_tokenizer, bigram_model):
    bench = FunctionCalling(data={"rows": ROWS}, max_new_tokens=4)
    items = run(bench, answering(WRITTEN, fresh_tokenizer, bigram_model), fresh_tokenizer)
    assert {name: item.sums["accuracy"] for name, item in items.items()} == {"right": 1.0, "wrong": 0.0, "none": 0.0}
    assert items["right"].detail == {
        "text": WRITTEN,
        "expected": [{"f": {"n": [2, 3]}}],
        "reason": "",
        "tools_by": "template",
        "style": "tool_call",
        "style_asked_for": "tool_call",
    }
    assert "'n' has another value" in items["wrong"].detail["reason"] and "expected no call" in items["none"].detail["reason"]
    metrics = bench.metrics(list(items.values()))
    values = {name: (metric.value, metric.num_items) for name, metric in metrics.items()}
    assert values == {
        "accuracy": (pytest.approx(1 / 3), 3),
        "accuracy/irrelevance": (0.0, 1),
        "accuracy/simple": (0.5, 2),
        "format": (1.0, 2),
        "parsed": (1.0, 2),
        "hallucinated_tools": (0.0, 3),
        "arguments": (0.5, 2),
        "irrelevance": (0.0, 1),
    }
    assert next(iter(metrics)) == "accuracy" and not metrics["hallucinated_tools"].higher_is_better
    assert metrics["accuracy"].chance == pytest.approx(1 / 3) and metrics["accuracy/simple"].chance == 0.0


def test_a_call_cut_by_the_budget_is_not_in_the_format(fresh_tokenizer, bigram_model):
    model = answering(WRITTEN, fresh_tokenizer, bigram_model)
    (item,) = run(FunctionCalling(data={"rows": ROWS[:1]}, max_new_tokens=1), model, fresh_tokenizer).values()
    assert (item.sums["accuracy"], item.sums["format"], item.sums["parsed"]) == (1.0, 0.0, 1.0)


def test_items_do_not_depend_on_limit_and_batch(tokenizer):
    rows, model = [row(f"r{i}", calls=[]) for i in range(6)], tiny_model()
    many = run(FunctionCalling(data={"rows": rows}, max_new_tokens=3), model, tokenizer)
    few = run(FunctionCalling(data={"rows": rows[::-1]}, limit=2, batch_size=1, max_new_tokens=3), model, tokenizer)
    assert len(many) == 6 and len(few) == 2 and few.items() <= many.items()


def case(expected):
    return FunctionCalling(data={"rows": [row("x", possible_answer=expected)]}).cases()[0]


def test_invented_tools_are_counted_by_call(ask):
    text = '[{"name": "f", "arguments": {"n": 3}}, {"name": "h", "arguments": {}}]'
    item = grade(case([{"f": {"n": [3]}}]), text, True, ask)
    assert (item.sums["hallucinated_tools"], item.counts["hallucinated_tools"]) == (1.0, 2.0)
    assert (item.sums["format"], item.sums["parsed"], item.sums["arguments"]) == (0.0, 1.0, 1.0)  # JSON without the tags is another format
    assert item.detail["reason"] == "2 calls, expected 1"


def test_texts_without_calls(ask):
    item = grade(case([{"f": {"n": [3]}}]), "x" * 5000, False, ask)
    assert "cut by max_new_tokens" in item.detail["reason"] and len(item.detail["text"]) == MAX_SHOWN + 3
    assert item.sums["parsed"] == 0.0 and item.counts["hallucinated_tools"] == 0.0 and item.counts["arguments"] == 0.0
    silent = grade(case([]), "I cannot.", True, ask)
    assert silent.sums["accuracy"] == silent.sums["irrelevance"] == 1.0 and "format" not in silent.counts
    metrics = FunctionCalling(data="x").metrics([silent])
    assert metrics["arguments"].value is None and metrics["accuracy"].chance == 1.0


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (chatml(), "tool_call"),
        (
            NO_TOOLS.replace(
                "{{ m.content }}",
                '{{ m.content }}{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", '
                '"parameters": {{ c.function.arguments | tojson }}}{% endfor %}',
            )
            + "{{ tools | tojson if tools else '' }}",
            "llama",
        ),
    ],
)
def test_the_style_of_a_template(template, style):
    found = asker(make_tokenizer(template=template), "auto", "test")
    assert (found.how, found.style) == ("template", style)


def test_tools_in_words_where_the_template_ignores_them():
    tokenizer = make_tokenizer(template=NO_TOOLS)
    ask = asker(tokenizer, "auto", "test")
    text = tokenizer.decode(ask.ids(ROWS[0]["messages"], [TOOL], "test"))
    assert ask == Asker(tokenizer, "stated", "tool_call")
    assert '"name": "f"' in text and "<tool_call>" in text and text.endswith("Add.<|im_end|>\n<|im_start|>assistant\n")
    assert "messages" not in ROWS[0]["messages"][0]["content"]
    plain = make_tokenizer(template=None)
    text = plain.decode(asker(plain, "auto", "test").ids(ROWS[0]["messages"], [TOOL], "test"))
    assert text.startswith("User: You can call") and text.endswith("Add.\nAssistant:")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_TOOLS, "test: the tokenizer's chat template ignores tools; set `prompt: stated`"),
        (None, "test: the tokenizer has no chat template; set `prompt: stated`"),
        (NO_TOOLS + "{{ tools | tojson if tools else '' }}", "writes calls in a form that cannot be read here; set `prompt: stated`"),
        ("{{ raise_exception('no') }}", "test: the chat template refuses the conversation: no"),
    ],
)
def test_templates_that_do_not_serve(template, message):
    tokenizer = make_tokenizer(template=template)
    with pytest.raises(DataError, match=message):
        asker(tokenizer, "template", "test")
    assert asker(tokenizer, "stated", "test").how == "stated"


def test_the_right_calls_may_be_those_of_the_last_message():
    call = {"type": "function", "function": {"name": "f", "arguments": {"n": 3}}}
    rows = [
        {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]},
        {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}], "tools": [TOOL]},
    ]
    cases = FunctionCalling(data={"rows": rows}).cases()
    assert sorted(len(each.expected) for each in cases) == [0, 1] and all(len(each.messages) == 1 and len(each.id) == 16 for each in cases)


def test_categories_and_held_out_rows():
    bench = FunctionCalling(data={"rows": ROWS}, categories=["irrelevance"])
    assert [each.id for each in bench.cases()] == ["none"]
    assert (
        bench.fingerprint()
        != FunctionCalling(data={"rows": ROWS}).fingerprint()
        == FunctionCalling(data={"rows": ROWS[::-1]}).fingerprint()
    )
    rows = [row(f"r{i}", calls=[], messages=[{"role": "user", "content": str(i)}]) for i in range(40)]
    assert 0 < len(FunctionCalling(data={"rows": rows, "held_out": 0.5}).cases()) < 40


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([row("a")], {}, "row 1: found no right calls, expected `possible_answer`, `calls`"),
        ([{**row("a", calls=[]), "tools": None}], {}, "row 1: `tools` is missing"),
        ([row("a", calls=[{"name": "ff", "arguments": {}}])], {}, "row 1: 'ff' is expected, and none of the tools; did you mean 'f'"),
        ([row("a", calls={})], {}, "row 1: calls: found an empty object, expected a list of calls"),
        ([row("a", calls=[{"name": "f"}])], {}, "row 1: calls.0: found an object .*, expected an object with `name` and `arguments`"),
        ([row("a", possible_answer=[{"f": {"n": 3}}])], {}, "possible_answer.0.f.n: found a number .*; \"\" says that it may be left out"),
        ([row("a", possible_answer=[{}])], {}, "possible_answer.0: found an empty object"),
        ([row("a", possible_answer=[{"f": 1}])], {}, "possible_answer.0.f: found a number"),
        ([row("a", calls=[]), row("a", calls=[])], {}, "row 2: id 'a' is that of row 1 too"),
        ([row(["a"], calls=[])], {}, "row 1: id: found a list"),
        ([row("a", calls=[], category=3)], {}, "row 1: category: found a number"),
        ([row("a", calls=[], messages=[{"role": "assistant", "content": "x"}])], {}, "found none before the assistant's"),
        (
            [row("a", calls=[], category="simple")],
            {"categories": ["simpl"]},
            "categories: found 'simpl', which no row has; did you mean 'simple'",
        ),
        ([row("a", calls=[])], {"categories": ["x"]}, "which no row has; known categories: none"),
        ([], {}, "found no rows"),
    ],
)  # fmt: skip
def test_bad_rows(rows, fields, message):
    with pytest.raises(DataError, match=message):
        FunctionCalling(data={"rows": rows}, **fields).check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": []}, "data: found \\[\\], expected a file or the name of a data set"),
        ({"data": "x", "categories": []}, "categories: found none, expected at least one"),
        ({"data": {"path": "x", "weight": 2}}, "data: found `weight`, which is for training"),
        ({"data": "x", "prompt": "chat"}, "prompt: found 'chat', expected 'auto', 'template' or 'stated'"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(RecipeError, match=message):
        validate(FunctionCalling, {"type": "function_calling"} | fields, "recipe")


def test_a_prompt_longer_than_the_model_names_its_row(tokenizer):
    with pytest.raises(DataError, match=r"row 1: a prompt with max_new_tokens 500: found .* tokens, expected at most 512"):
        run(FunctionCalling(data={"rows": ROWS[:1]}, max_new_tokens=500), tiny_model(), tokenizer)
