"""Parquet and Arrow files, by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from limbeck.errors import DataError

ROWS_AT_ONCE = 1024


def arrow_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, or of an Arrow (Feather) file or stream."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    try:
        if path.suffix.lower() == ".parquet":
            with parquet.ParquetFile(path) as file:
                yield from _rows(file.iter_batches(ROWS_AT_ONCE))
            return
        with pa.OSFile(str(path)) as source:
            try:
                file = ipc.open_file(source)
                batches: Any = (file.get_batch(index) for index in range(file.num_record_batches))
            except pa.ArrowInvalid:  # `datasets` writes streams
                source.seek(0)
                batches = ipc.open_stream(source)
            yield from _rows(batches)
    except (pa.ArrowException, EOFError, ValueError, OverflowError) as error:  # also text that is no UTF-8, and years that Python has not
        raise DataError(f"{path}: not readable as {path.suffix[1:].capitalize()}: {' '.join(str(error).split())[:200]}") from None


def without_nulls(value: Any) -> Any:
    """A value without the keys that hold null. A column of objects has every key that any row has, so that one row's tool arguments would
    come with nulls for all others'."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _rows(batches: Any) -> Iterator[dict[str, Any]]:
    for batch in batches:
        yield from map(without_nulls, batch.to_pylist())
