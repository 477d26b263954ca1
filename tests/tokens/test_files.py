"""One content in every kind of file gives the same rows; and damaged files are named."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from limbeck.errors import DataError
from limbeck.tokens.files import rows_of

CALL = {"name": "f", "arguments": {"city": "Paris", "days": [1, 2]}}
ROWS: list[dict[str, Any]] = [
    {
        "messages": [{"role": "user", "content": "é🦊\u2028"}, {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]}],
        "n": 1,
    },
    {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
]
WITHOUT_NULLS = [
    {"messages": [{"role": "user", "content": "é🦊\u2028"}, {"role": "assistant", "tool_calls": [{"function": CALL}]}], "n": 1},
    ROWS[1],
]


def jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")


def json_array(path: Path) -> None:
    path.write_text("\ufeff \n" + json.dumps(ROWS, indent=2), encoding="utf-8")


def parquet(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)


def feather(path: Path) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.Table.from_pylist(ROWS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS), max_chunksize=1)


def stream(path: Path) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, pa.Table.from_pylist(ROWS).schema) as writer:
        writer.write_table(pa.Table.from_pylist(ROWS))


@pytest.mark.parametrize(
    ("suffix", "write"),
    [("jsonl", jsonl), ("JSONL", jsonl), ("json", jsonl), ("data", jsonl), ("json", json_array)],
)
def test_json(suffix: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    write(file)
    assert [row for _, row in rows_of(file)] == ROWS
    expected = f"{file}: row 2" if write is json_array else f"{file}:2"
    assert [place for place, _ in rows_of(file)][1] == expected


@pytest.mark.parametrize(("suffix", "write"), [("parquet", parquet), ("feather", feather), ("arrow", feather), ("arrow", stream)])
def test_columns_without_the_nulls_of_other_rows(suffix: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    file = tmp_path / f"rows.{suffix}"
    write(file)
    assert list(rows_of(file)) == [(f"{file}: row 1", WITHOUT_NULLS[0]), (f"{file}: row 2", WITHOUT_NULLS[1])]


def test_arguments_of_one_tool_do_not_get_the_keys_of_another(tmp_path: Path) -> None:
    """In a column, every call has all keys that any call has: rendered, a model would learn to call f with what belongs to g."""
    import pyarrow as pa
    from pyarrow import parquet

    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": [None, {"z": 2}]}}]
    parquet.write_table(pa.Table.from_pylist([{"calls": calls}]), tmp_path / "x.parquet")
    assert next(rows_of(tmp_path / "x.parquet"))[1]["calls"] == calls


def test_csv(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    rows = [{"prompt": 'a, "b"\nc', "completion": "é"}, {"prompt": "d", "completion": ""}]
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.DictWriter(opened, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    assert list(rows_of(file)) == [(f"{file}: row 1", rows[0]), (f"{file}: row 2", rows[1])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"a": 1}, {"a": ]', "not readable as JSON: Expecting value at line 1, column 18"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.json", b'\n{"a": 1}\n{"a"\n', ":3: not readable as JSON"),
        ("x.json", b"[\xff]", "found byte 0xff"),
        ("x.csv", b"a,b\n1,2\n3\n", "row 2: found another number of values"),
        ("x.csv", b"a,b\n1,2,3\n", "row 1: found another number of values"),
        ("x.csv", b"a,b\n\xff,2\n", "found byte 0xff"),
        ("x.csv", b'a,b\n"1,2\n', "not readable as CSV"),
        ("x.parquet", b"PAR1 no", "not readable as Parquet"),
        ("x.arrow", b"ARROW1 no", "not readable as Arrow"),
        ("x.feather", b"", "not readable as Feather"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(rows_of(file))
    assert str(caught.value).startswith(str(file)) and message in str(caught.value)


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    parquet(file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="not readable as Parquet"):
        list(rows_of(file))


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
def test_text_that_is_no_utf8_in_a_column(suffix: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import feather, parquet

    table = pa.table({"text": pa.array([b"fine", b"\xe1\x41"], pa.binary()).view(pa.string())})
    file = tmp_path / f"x.{suffix}"
    (parquet.write_table if suffix == "parquet" else feather.write_feather)(table, file)
    with pytest.raises(DataError, match=rf"x.{suffix}: not readable as {suffix.capitalize()}: 'utf-8' codec can't decode byte 0xe1"):
        list(rows_of(file))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.json", "x.csv"):
        with pytest.raises(DataError, match=rf"{name}: not readable: No such file"):
            list(rows_of(tmp_path / name))
