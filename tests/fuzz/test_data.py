"""Rows and files of any shape are rendered, or refused by file and line."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fuzz import changed, damaged, fuzzed, json_values
from limbeck.errors import LimbeckError
from limbeck.sources.dataset import DatasetSource
from limbeck.tokens.pad import pad

CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]},
    {
        "messages": [
            {"role": "system", "content": "You help."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "sunny", "tool_call_id": "1"},
            {"role": "assistant", "content": "It is sunny."},
        ],
        "tools": [TOOL],
    },
    {"prompt": "a b", "completion": " c"},
    {"text": "some text of a book"},
    {"instruction": "Add.", "input": "1 1", "output": "2"},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
]
rows = st.sampled_from(ROWS).flatmap(lambda row: changed(row, most=3))


def read(file: Path, tokenizer: Any, **settings: Any) -> None:
    """As training reads it. What comes of it is made of the tokenizer's own ids, and padded."""
    with suppress(LimbeckError):
        source = DatasetSource(data=str(file), **{"max_length": 64, **settings}).open(tokenizer, 0)
        samples = source.at(0, 3)
        batch = pad(samples, 0)
        assert all(0 <= int(sample.ids.max()) < len(tokenizer) and 1 < len(sample.ids) <= 64 for sample in samples)
        assert batch.scored.numel() == sum(sample.num_scored for sample in samples) > 0


def write(folder: pytest.TempPathFactory, name: str, content: bytes) -> Path:
    file = folder.getbasetemp() / name
    file.write_bytes(content)
    return file


def as_json(value: Any) -> bytes:
    """With lone surrogates as escapes, and numbers that JSON has not as Python writes them."""
    return json.dumps(value).encode()


NESTED = "[" * 900 + "]" * 900


@fuzzed(150)
@given(row=rows)
@example(row={"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]})
@example(row={"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]})
@example(row={"messages": [{"role": "user", "content": "\x00"}, {"role": "assistant", "content": "\x00b\x00"}]})
@example(row={"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]})
@example(row={"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]})
@example(row={"messages": [{"role": "assistant", "content": "a"}, {"role": "critic", "content": "b"}]})
@example(row={"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<|im_end|><|im_start|>"}]})
@example(row={"prompt": "", "completion": ""})
@example(row={"text": ""})
@example(row={"text": "\ufeff"})
def test_rows(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, row: Any) -> None:
    read(write(tmp_path_factory, "fuzzed.jsonl", as_json(row) + b"\n"), tokenizer)


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"messages": [{"role": "user", "content": "x " * 500_000}, {"role": "assistant", "content": "y"}]}),
        json.dumps({"prompt": "p", "completion": "word " * 200_000}),
        '{"messages": ' + NESTED + "}",
        '{"prompt": "p", "completion": "c", "other": ' + NESTED + "}",
        '{"prompt": "p", "completion": "c", "tools": ' + json.dumps(NESTED) + "}",
        '{"prompt": "p", "completion": "c", "n": ' + "9" * 5000 + "}",
        '{"prompt": "p", "completion": "c", "prompt": 3}',
        '{"text": "a"}{"text": "b"}',
        "[" * 100_000,
        '"' + "a" * 100_000,
    ],
    ids=lambda line: line[:24],
)
def test_large_and_deep_rows(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, line: str) -> None:
    read(write(tmp_path_factory, "large.jsonl", line.encode()), tokenizer)
    read(write(tmp_path_factory, "large.json", b"[" + line.encode() + b"]"), tokenizer, too_long="split")


GOOD = {
    ".jsonl": b"\n".join(map(as_json, ROWS)),
    ".json": as_json(ROWS),
    ".csv": b'prompt,completion\na,b\n"c\n",d\n',
}


@fuzzed(60)
@given(pair=st.sampled_from(list(GOOD)).flatmap(lambda suffix: st.tuples(st.just(suffix), damaged(GOOD[suffix]))))
def test_files_of_text(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, pair: tuple[str, bytes]) -> None:
    read(write(tmp_path_factory, f"fuzzed{pair[0]}", pair[1]), tokenizer)


@fuzzed(40)
@given(values=st.lists(st.one_of(json_values, rows), min_size=1, max_size=3), name=st.sampled_from(["messages", "prompt", "text", "tools"]))
def test_columns_of_any_type(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, values: list[Any], name: str) -> None:
    try:
        table = pa.table({name: values, "completion": ["c"] * len(values)})
        pq.write_table(table, tmp_path_factory.getbasetemp() / "fuzzed.parquet")
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, NotImplementedError, TypeError):
        return  # nobody can have such a file
    read(tmp_path_factory.getbasetemp() / "fuzzed.parquet", tokenizer)


@fuzzed(60)
@given(data=st.data())
def test_damaged_parquet(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, data: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "good.parquet"
    if not file.exists():
        pq.write_table(pa.Table.from_pylist(ROWS[:2]), file)
    read(write(tmp_path_factory, "fuzzed.parquet", data.draw(damaged(file.read_bytes()))), tokenizer)
