"""BFCL's AST match: names, arguments, types and admissible values, alone and in parallel."""

from __future__ import annotations

import pytest

from limbeck.evaluate.call_match import Expected, is_admissible, is_same, mismatch, right_arguments
from limbeck.evaluate.calls import Call

SCHEMA = {"properties": {"n": {"type": "integer"}, "unit": {"type": "string"}}, "required": ["n"]}
SCHEMAS = {"f": SCHEMA, "g": SCHEMA}
F = Expected("f", {"n": [3, 4], "unit": ["m", ""]})


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call("f", {"n": 3}), ""),
        (Call("f", {"n": 4, "unit": "M."}), ""),
        (Call("f", {"n": 4, "unit": ""}), ""),
        (Call("f", {"n": 5}), "argument 'n' has another value"),
        (Call("f", {"n": 3.0}), "argument 'n' has another value or type"),
        (Call("f", {"n": "3"}), "argument 'n' has another value or type"),
        (Call("f", {"n": True}), "argument 'n' has another value or type"),
        (Call("f", {"unit": "m"}), "argument 'n' is missing"),
        (Call("f", {"n": 3, "x": 1}), "argument 'x' is not expected"),
        (Call("g", {"n": 3}), "called 'g', expected 'f'"),
        (Call("F", {"n": 3}), "called 'F', expected 'f'"),
    ],
)
def test_one_call(call, reason):
    found = mismatch([call], [F], SCHEMAS)
    assert reason in found and bool(found) == bool(reason)


def test_an_argument_that_only_the_admissible_values_demand():
    wanted = Expected("f", {"n": [3], "unit": ["m"]})
    assert "'unit' is missing" in mismatch([Call("f", {"n": 3})], [wanted], SCHEMAS)


@pytest.mark.parametrize(
    ("value", "choices", "schema", "right"),
    [
        (2, [2.0], {"type": "number"}, True),
        (2.0, [2], {"type": "number"}, True),
        (2.0, [2], {"type": "integer"}, False),
        (True, [1], {"type": "integer"}, False),
        (1, [True], {"type": "boolean"}, False),
        (True, [True], {"type": "boolean"}, True),
        ("True", [True], {"type": "boolean"}, False),
        ("April 1, 2024", ["april 1 2024"], {"type": "string"}, True),
        ("it's", ['it"s'], {"type": "string"}, True),
        ("a;b", ["ab"], {"type": "string"}, False),
        ("x", ["x"], {"type": "integer"}, True),  # the name of a variable
        (["A", "b."], [["a", "B"]], {"type": "array", "items": {"type": "string"}}, True),
        (["b", "a"], [["a", "b"]], {"type": "array", "items": {"type": "string"}}, False),
        ([1, 2], [[1]], {"type": "array", "items": {"type": "integer"}}, False),
        ([1.0], [[1]], {"type": "array", "items": {"type": "integer"}}, False),
        ([1], [[1.0]], {"type": "array", "items": {"type": "number"}}, True),
        ([True], [[1]], {"type": "array", "items": {"type": "integer"}}, False),
        ([], ["", [1]], {"type": "array", "items": {"type": "integer"}}, True),
        ([], [[1]], {"type": "array"}, False),
        ("a", [["a"]], {"type": "array"}, False),
        ({"k": "A"}, [{"k": ["a", "b"]}], {"type": "object"}, True),
        ({"k": "A", "z": 1}, [{"k": ["a"]}], {"type": "object"}, False),
        ({}, [{"k": ["a"]}], {"type": "object"}, False),
        ({}, [{"k": ["a", ""]}], {"type": "object"}, True),
        ({"k": {"i": 2}}, [{"k": [{"i": [1, 2]}]}], {"type": "object"}, True),
        ({"k": 0}, [{"k": [False]}], {"type": "object"}, False),
        ([{"k": 1}, {"k": 2}], [[{"k": [1]}, {"k": [2, 3]}]], {"type": "array", "items": {"type": "object"}}, True),
        ([{"k": 2}, {"k": 1}], [[{"k": [1]}, {"k": [2]}]], {"type": "array", "items": {"type": "object"}}, False),
        (None, [None], {"type": ["string", "null"]}, True),
        (1, [], {"type": "integer"}, False),
        (1, [1], {}, True),
    ],
)
def test_values(value, choices, schema, right):
    assert is_admissible(value, choices, schema) is right


def test_types_that_do_not_compare_are_different():
    values = [None, True, 1, "1", [1], {"1": [1]}]
    assert [[is_same(a, b) for b in values] for a in values[:4]] == [[a is b for b in values] for a in values[:4]]


def test_parallel_calls_match_one_to_one_in_any_order():
    loose, tight = Expected("f", {"n": [3, 4]}), Expected("f", {"n": [3]})
    three, four = Call("f", {"n": 3}), Call("f", {"n": 4})
    for calls in ([three, four], [four, three]):
        for expected in ([loose, tight], [tight, loose]):  # taking the first that fits would fail in one of these
            assert mismatch(calls, expected, SCHEMAS) == ""
    assert mismatch([three, three], [tight, Expected("f", {"n": [4]})], SCHEMAS)
    assert mismatch([four, four], [loose, tight], SCHEMAS)
    assert mismatch([three], [loose, tight], SCHEMAS) == "1 calls, expected 2"
    assert mismatch([three, three], [tight], SCHEMAS) == "2 calls, expected 1"


def test_arguments_count_where_the_function_is_right():
    assert right_arguments([Call("f", {"n": 3})], [F], SCHEMAS) == (1, 1)
    assert right_arguments([Call("f", {"n": 3, "unit": "km"})], [F], SCHEMAS) == (1, 2)
    assert right_arguments([Call("f", {})], [F], SCHEMAS) == (0, 1)
    assert right_arguments([Call("h", {"n": 3})], [F], SCHEMAS) == (0, 0)
    assert right_arguments([Call("f", {"n": 9}), Call("f", {"n": 3})], [F], SCHEMAS) == (1, 1)
