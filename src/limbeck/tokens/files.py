"""Files to rows, by their suffix: JSON lines, JSON, CSV, Parquet and Arrow. What a row means is formats.py's part."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from limbeck.errors import DataError
from limbeck.tokens.messages import kind, parse_json

Rows = Iterator[tuple[str, Any]]
"""(place, value) of every row; the place opens errors about it: `file:line`, or `file: row 7`."""

EXTRA = "pip install 'limbeck[data]'"


def rows_of(path: Path) -> Rows:
    """The rows of a file, in order, read as they are asked for. A suffix that is not known is read as JSON lines."""
    read = _READERS.get(path.suffix.lower(), _json_lines)
    try:
        yield from read(path)
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror or error}") from None


def _json_lines(path: Path) -> Rows:
    """Blank lines are no rows."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{path}:{number}"
            if line := _decode(raw, where).strip():
                yield where, parse_json(line, where)


def _json(path: Path) -> Rows:
    """An array of rows; or JSON lines, which often go by this suffix too."""
    with path.open("rb") as stream:
        first = next((line for line in stream if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
    if not first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(_decode(path.read_bytes(), str(path)))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not readable as JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {str(error).partition(';')[0]}") from None
    except RecursionError:
        raise DataError(f"{path}: not readable as JSON: nested too deeply") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: found {kind(rows)}, expected an array of rows")
    yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _csv(path: Path) -> Rows:
    """Comma-separated, with a line of column names; every value is a text."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        try:
            for number, row in enumerate(csv.DictReader(stream, strict=True), 1):
                where = f"{path}: row {number}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: found another number of values than the first line has columns")
                yield where, row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: found byte 0x{error.object[error.start]:02x}, expected UTF-8 text") from None
        except csv.Error as error:
            raise DataError(f"{path}: not readable as CSV: {error}") from None


def _arrow(path: Path) -> Rows:
    from limbeck.tokens.arrow import arrow_rows

    yield from ((f"{path}: row {number}", row) for number, row in enumerate(arrow_rows(path), 1))


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: found byte 0x{raw[error.start]:02x} at column {error.start + 1}, expected UTF-8 text") from None


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json,
    ".csv": _csv,
    ".parquet": _arrow,
    ".arrow": _arrow,
    ".feather": _arrow,
}
SUFFIXES = (".jsonl", *_READERS)
