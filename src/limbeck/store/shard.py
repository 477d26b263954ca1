"""Shard: a Parquet file with one row per sample and one column of bytes per thing that is kept.

Row groups are small, so that a sample is read without its neighbours. Pages have checksums, which are compared at every read. The end of
the file (Parquet's footer, with the index of the samples in its metadata) has one in the manifest, compared when the store is opened. So
an altered byte is noticed where it is used, and opening reads no more than the ends.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.errors import StoreError
from limbeck.run import appearing
from limbeck.store.manifest import AGAIN, Shard, check_digest, check_size, describe_file
from limbeck.store.offsets import pack_offsets, unpack_offsets
from limbeck.store.place import Place

INDEX = "limbeck.index"
GROUP_BYTES = 64 * 2**10
GROUP_ROWS = 16
"""A row group ends where it has one or the other. Each costs some hundred bytes of the footer, and is read whole."""
_TRIED_BYTES = 2**20


@dataclass(frozen=True)
class Row:
    """What is kept of a sample. Hidden states are not kept of every sample."""

    sample_id: int
    offsets: np.ndarray
    num_represented: int
    output: bytes
    observed: bytes
    byte_offsets: bytes | None = None
    hidden: dict[int, bytes] = field(default_factory=dict)

    @property
    def cells(self) -> dict[str, Any]:
        return {
            "sample_id": self.sample_id,
            "offsets": pack_offsets(self.offsets),
            "output": self.output,
            "observed": self.observed,
            "byte_offsets": self.byte_offsets,
            **{hidden_column(layer): blob for layer, blob in self.hidden.items()},
        }


@dataclass(frozen=True)
class Indexed:
    """A sample of a shard, as the footer says."""

    sample_id: int
    offsets: np.ndarray
    num_represented: int
    group: int
    row: int
    """Within its group."""


def hidden_column(layer: int) -> str:
    return f"hidden_{layer}"


def write_shard(file: Path, rows: Sequence[Row], layers: Iterable[int]) -> Shard:
    """A shard that is there whole or not at all, also after a crash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ["offsets", "output", "observed", "byte_offsets", *map(hidden_column, layers)]
    schema = pa.schema([pa.field("sample_id", pa.int64()), *(pa.field(name, pa.binary()) for name in names)])
    cells = [row.cells for row in rows]
    compression = {name: "ZSTD" if _shrinks(cell.get(name) for cell in cells) else "NONE" for name in names} | {"sample_id": "NONE"}
    groups = _groups(rows)
    settings = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True, "store_schema": False}
    try:
        with appearing(file) as temporary:
            # through a stream of Python's, whose errors are OSErrors
            with open(temporary, "wb") as stream, pq.ParquetWriter(stream, schema, compression=compression, **settings) as writer:
                for start, end in groups:
                    part = cells[start:end]
                    columns = {name: [cell.get(name) for cell in part] for name in schema.names}
                    writer.write_table(pa.table(columns, schema=schema), row_group_size=GROUP_ROWS)
                writer.add_key_value_metadata({INDEX: _write_index(rows, [end - start for start, end in groups])})
            described, footer = describe_file(temporary), _footer(temporary)
    except OSError as error:
        raise StoreError(f"{file}: could not be written ({error}); what was written before it stays usable") from error
    return Shard(
        name=file.name,
        bytes=described.bytes,
        sha256=described.sha256,
        footer_bytes=len(footer),
        footer_sha256=hashlib.sha256(footer).hexdigest(),
        num_samples=len(rows),
        num_scored=sum(len(row.offsets) for row in rows),
        num_represented=sum(row.num_represented for row in rows),
    )


class ShardFile:
    """An opened shard: its footer is read and compared, nothing else."""

    def __init__(self, place: Place, shard: Shard) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._name = place.file(shard.name)
        check_size(place, shard)
        with place.open(shard.name) as stream:
            stream.seek(max(shard.bytes - shard.footer_bytes, 0))
            footer = stream.read()
        check_digest(place, shard.name, hashlib.sha256(footer).hexdigest(), shard.footer_sha256)
        try:
            metadata = pq.read_metadata(io.BytesIO(footer))
            self.index = list(_read_index(metadata.metadata[INDEX.encode()]))
            source = place.folder / shard.name if place.folder else place.open(shard.name)
            # a remote file is read column by column of what is asked for, and at once
            self._file = pq.ParquetFile(
                source, metadata=metadata, page_checksum_verification=True, pre_buffer=place.folder is None, memory_map=False
            )
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise self._damaged(error) from error

    def read(self, groups: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, list[bytes | None]]]:
        """By row group, the cells of each column; their checksums are compared."""
        import pyarrow as pa

        found: dict[int, dict[str, list[bytes | None]]] = {}
        try:
            for group in groups:
                table = self._file.read_row_group(group, columns=list(columns), use_threads=False)
                found[group] = {name: table.column(name).to_pylist() for name in columns}
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise self._damaged(error) from error
        return found

    def _damaged(self, error: Exception) -> StoreError:
        return StoreError(f"{self._name}: the file was cut or altered ({' '.join(str(error).split())[:200]}). {AGAIN}")


def _groups(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """First and last rows (exclusive) of the row groups."""
    groups, start, size = [], 0, 0
    for i, row in enumerate(rows):
        size += len(row.output) + sum(map(len, row.hidden.values()))
        if size >= GROUP_BYTES or i + 1 - start == GROUP_ROWS or i + 1 == len(rows):
            groups.append((start, i + 1))
            start, size = i + 1, 0
    return groups


def _shrinks(blobs: Iterable[bytes | None]) -> bool:
    """Whether zstd takes a tenth off a column; what a codec has coded well is only slowed down by it."""
    import pyarrow as pa

    tried = b"".join(blob for blob in blobs if blob)[:_TRIED_BYTES]
    return bool(tried) and len(pa.compress(tried, codec="zstd", asbytes=True)) < 0.9 * len(tried)


def _footer(file: Path) -> bytes:
    """The end of a Parquet file: its footer, and eight bytes with the footer's length and a magic word."""
    with open(file, "rb") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.seek(-8 - int.from_bytes(stream.read(4), "little"), os.SEEK_END)
        return stream.read()


def _write_index(rows: Sequence[Row], groups: Sequence[int]) -> str:
    ids = np.array([row.sample_id for row in rows], dtype="<i8").tobytes()
    offsets = [pack_offsets(row.offsets) for row in rows]
    return json.dumps(
        {
            "groups": groups,
            "sample_ids": base64.b64encode(ids).decode(),
            "represented": [row.num_represented for row in rows],
            "offsets": [base64.b64encode(blob).decode() for blob in offsets],
        },
        separators=(",", ":"),
    )


def _read_index(text: bytes) -> Iterable[Indexed]:
    tree = json.loads(text)
    places = [(group, row) for group, count in enumerate(tree["groups"]) for row in range(count)]
    ids = np.frombuffer(base64.b64decode(tree["sample_ids"]), dtype="<i8").tolist()
    for (group, row), sample_id, represented, offsets in zip(places, ids, tree["represented"], tree["offsets"], strict=True):
        yield Indexed(sample_id, unpack_offsets(base64.b64decode(offsets)).astype(np.int32), represented, group, row)
