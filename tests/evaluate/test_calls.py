"""Calls read from what models write: every style, and no text that raises, takes long or is run."""

from __future__ import annotations

import json
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.evaluate.calls import MAX_BITS, MAX_CALLS, MAX_CHARS, Call, parse

ONE, TWO = Call("f", {"a": 1}), Call("g.h", {"b": "x"})
F, G = '{"name": "f", "arguments": {"a": 1}}', '{"name": "g.h", "arguments": {"b": "x"}}'


@pytest.mark.parametrize(
    ("text", "style", "exact", "calls"),
    [
        (f"<tool_call>\n{F}\n</tool_call>", "tool_call", True, [ONE]),
        (f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>", "tool_call", True, [ONE, TWO]),
        (f"<think>{G}</think>\n<tool_call>{F}</tool_call>", "tool_call", True, [ONE]),
        (f"Sure. <tool_call>{F}</tool_call>", "tool_call", False, [ONE]),
        (f"<tool_call>{F}</tool_call> Done.", "tool_call", False, [ONE]),
        (f"<tool_call>{F}", "tool_call", False, [ONE]),
        (f"<tool_call>[{F}, {G}]</tool_call>", "tool_call", False, [ONE, TWO]),
        (F, "json", True, [ONE]),
        (f"[{F}, {G}]", "json", True, [ONE, TWO]),
        (f"{F}\n{G}", "json", True, [ONE, TWO]),
        (f"The call is {F}.", "json", False, [ONE]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', "json", True, [ONE]),
        ('{"function": "f", "arguments": {"a": 1}}', "json", True, [ONE]),
        ('{"type": "function", "function": ' + F + "}", "json", True, [ONE]),
        ('{"tool_calls": [' + F + "]}", "json", True, [ONE]),
        ('{"name": "f", "parameters": {"a": 1}}', "llama", True, [ONE]),
        ('<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', "llama", True, [ONE]),
        (f"```json\n{F}\n```", "fence", True, [ONE]),
        (f"```\n[{F}, {G}]\n```", "fence", True, [ONE, TWO]),
        (f"```json\n{F}\n{G}\n```", "fence", True, [ONE, TWO]),
        (f"Here:\n```json\n{F}\n```\n```text\nno call\n```", "fence", False, [ONE]),
        (f"```json\n{F}", "fence", False, [ONE]),
        ('```python\n[f(a=1), g.h(b="x")]\n```', "fence", True, [ONE, TWO]),
        ("f(a=1)", "python", True, [ONE]),
        ("[f(a=1), g.h(b='x')]", "python", True, [ONE, TWO]),
        ("f(a=1)\ng.h(b='x')", "python", True, [ONE, TWO]),
        ("I call:\nf(a=1)", "python", False, [ONE]),
        (
            "f(a=-1.5, b=[1, (2,)], c={'k': None}, d=true)",
            "python",
            True,
            [Call("f", {"a": -1.5, "b": [1, [2]], "c": {"k": None}, "d": True})],
        ),
        (f"[TOOL_CALLS] [{F}, {G}]", "mistral", True, [ONE, TWO]),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g.h[CALL_ID]abc123xyz[ARGS]{"b": "x"}', "mistral", True, [ONE, TWO]),
        (f"[TOOL_CALLS] [{F}] ok", "mistral", False, [ONE]),
    ],
)
def test_styles(text, style, exact, calls):
    found = parse(text)
    assert (list(found.calls), found.style, found.exact) == (calls, style, exact)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is 4.",
        "[]",
        "{}",
        '{"name": "Paris"}',
        '{"name": 3, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}',
        "<tool_call>{</tool_call>",
        f"<tool_call>{F}</tool_call><tool_call>nothing</tool_call>",
        "[TOOL_CALLS]",
        "f(1)",
        "f(**{'a': 1})",
        "f(a=g(b=1))",
        "f(a=2 * 3)",
        "f(a=-True)",
        "f(a=1j)",
        "f(a=b'x')",
        "f(a={1: 2})",
        "x = f(a=1)",
        "```python\ndef f(a):\n    return a\n```",
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": {"a": 1e999}}',
        "f(a=1e999)",
        "f(a=0x" + "F" * 400 + ")",
        '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
        '{"name": "f", "arguments": {"a": ' + "[" * 40 + "]" * 40 + "}}",
        "f(a=" + "[" * 40 + "]" * 40 + ")",
        "\n".join(["f(a=1)"] * (MAX_CALLS + 1)),
        "f\x00(a=1)",
        'f(a="\ud800"',
    ],
)
def test_texts_without_a_call(text):
    assert parse(text).calls == ()


def test_numbers_up_to_the_bound_are_read():
    assert parse(f"f(a={2**MAX_BITS - 1})").calls and not parse(f"f(a={2**MAX_BITS})").calls


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "ran"
    for argument in (
        f"open({str(marker)!r}, 'w')",
        f"[open({str(marker)!r}, 'w') for _ in '1']",
        f"(lambda: open({str(marker)!r}, 'w'))()",
    ):
        assert parse(f"f(a={argument})").calls == ()
    assert not marker.exists()


HOSTILE = [
    "(", "[", "{", "f(", "f(a=[", "f(a=(", "f(a={", "-", "not ", "a.", "lambda:", "2**", "1 if 1 else ", "f(a=1,", '{"a":',
    "[1,", "```", "```\n", "``` ",
    "<tool_call>", "[TOOL_CALLS]", "[TOOL_CALLS]f ", "<think>", "f'{", "x[", "await ", "{**", "[x for x in ", "'a' ", "\\",
    "f(a='\\d')\n", "f(a=1)\n", F,
]  # fmt: skip


@pytest.mark.parametrize("before", ["", "f(a="])
@pytest.mark.parametrize("piece", HOSTILE)
def test_long_repeats_take_no_time(piece, before):
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(before + piece * (2 * MAX_CHARS // len(piece)))
    assert time.perf_counter() - start < 5.0


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(HOSTILE) | st.sampled_from([F, G, "</tool_call>", "</think>", ")", "]", "}", "\n", '"', "1"]) | st.text(max_size=8)
    )
)
def test_no_text_raises(pieces):
    for call in parse("".join(pieces)).calls:
        json.dumps(call.arguments, allow_nan=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}_", fullmatch=True), JSON, max_size=3))
def test_what_is_written_comes_back(arguments):
    call = Call("f", arguments)
    text = json.dumps({"name": "f", "arguments": arguments})
    assert parse(f"<tool_call>{text}</tool_call>").calls == (call,)
    if not any(key in arguments for key in ("name", "arguments")):
        assert parse(text).calls == (call,)
    assert parse(f"f({', '.join(f'{name}={value!r}' for name, value in arguments.items())})").calls == (call,)
