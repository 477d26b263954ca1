"""Reading a capture by sample id and token offset, lazily: only row groups with the samples of a batch leave the disk.

Who knows which batches come next says so (`expect`), and a thread reads and decodes them while the student computes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from limbeck.batch import Batch, Signal
from limbeck.errors import StoreError
from limbeck.objectives.base import Needs
from limbeck.objectives.head import Head
from limbeck.store.codec import from_bytes
from limbeck.store.manifest import Manifest, StoredFile, read_checked, read_manifest
from limbeck.store.offsets import unpack_spans
from limbeck.store.place import Place
from limbeck.store.shard import Indexed, ShardFile, hidden_column
from limbeck.store.writer import part_of
from limbeck.tokens.sample import Sample

OPEN_SHARDS = 64
AHEAD = 4
"""Batches that are read and decoded before they are asked for."""
_WORKERS = 16
"""Footers that are fetched at once from behind a URL."""


@dataclass(frozen=True)
class Entry:
    """Where a sample lies."""

    shard: int
    at: Indexed

    def num_scored_of(self, offsets: np.ndarray) -> int:
        return int(np.isin(offsets, self.at.offsets).sum())


@dataclass(frozen=True)
class Observed:
    """The teacher's log-probability of each target of a sample, by its offset, and where it stands in the text (None where not known)."""

    offsets: np.ndarray
    log_probs: np.ndarray
    spans: np.ndarray | None


@dataclass(frozen=True)
class _Segment:
    """Tokens of a batch that follow on one another and belong to one sample."""

    sample_id: int
    offsets: np.ndarray


class StoreReader:
    """An opened capture. What is read of a file is compared with its checksums whenever it is read.

    A sample has several entries where it was captured again, longer or with more scored tokens; any of them that holds what is asked
    for will do, as a causal teacher says the same of a token whatever comes after it.
    """

    def __init__(self, path: str | Path, device: str = "cpu") -> None:
        self.place, self.device = Place(path), device
        self.manifest: Manifest = read_manifest(self.place)
        self._files: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = Lock()
        self._entries: dict[int, list[Entry]] = {}
        with ThreadPoolExecutor(1 if self.place.folder else _WORKERS) as pool:
            for number, index in enumerate(pool.map(self._index_of, range(len(self.manifest.shards)))):
                for at in index:
                    self._entries.setdefault(at.sample_id, []).append(Entry(number, at))
        model = self._tensors(self.manifest.model)
        self._model = part_of(model, "output")
        self._hidden_models = {layer: part_of(model, f"hidden.{layer}") for layer in self.manifest.layers}
        self._head: Head | None = None
        self._thread = ThreadPoolExecutor(1)
        self._expected: deque[tuple[Batch, Needs]] = deque()
        self._coming: dict[Any, Future[Signal]] = {}

    def head(self) -> Head | None:
        """The teacher's head in the teacher's dtype, on the device; None where the codec needs none."""
        if self._head is None and self.manifest.head is not None:
            teacher = self.manifest.teacher
            assert teacher.dtype is not None and teacher.head_scale is not None
            dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[teacher.dtype]
            tensors = {name: value.to(self.device, dtype) for name, value in self._tensors(self.manifest.head).items()}
            self._head = Head(tensors["weight"], tensors.get("bias"), teacher.head_scale, teacher.head_soft_cap)
        return self._head

    def missing(self, samples: Sequence[Sample], needs: Needs, below: int | None = None) -> tuple[int, int]:
        """(tokens that the capture lacks, tokens asked for) over scored tokens, and all tokens where hidden states are needed; of shards
        whose number is smaller than `below` alone, where it is given."""
        lacking = total = 0
        for sample in samples:
            wanted = np.flatnonzero(sample.is_target[1:])
            entries = [entry for entry in self._entries.get(sample.sample_id, []) if below is None or self._number(entry) < below]
            total += len(wanted)
            lacking += len(wanted) - max((entry.num_scored_of(wanted) for entry in entries), default=0)
            if needs.layers:
                total += len(sample.ids)
                lacking += max(len(sample.ids) - max((entry.at.num_represented for entry in entries), default=0), 0)
        return lacking, total

    def expect(self, batches: Sequence[Batch], needs: Needs) -> None:
        """Batches that will be read next, in this order."""
        self._expected.extend((batch, needs) for batch in batches)
        self._read_ahead()

    def read(self, batch: Batch, needs: Needs) -> Signal:
        """The signal of a batch, on its device."""
        future = self._coming.pop(_key(batch, needs), None)
        self._read_ahead()
        signal = self._read(batch, needs) if future is None else future.result()
        return signal if batch.input_ids.device.type == "cpu" else signal.to(batch.input_ids.device)

    def observed(self, sample_id: int) -> Observed:
        """What the teacher said of the tokens of a sample, in the entry that has most of them."""
        entries = self._entries.get(sample_id)
        if not entries:
            raise StoreError(f"store {str(self.place)!r}: lacks sample {sample_id}")
        entry = max(entries, key=lambda entry: len(entry.at.offsets))
        (cells,) = self._cells([entry], ["observed", "byte_offsets"])
        log_probs = np.frombuffer(cells["observed"] or b"", np.float16).astype(np.float32)
        spans = None if cells["byte_offsets"] is None else unpack_spans(cells["byte_offsets"], entry.at.offsets)
        return Observed(entry.at.offsets, log_probs, spans)

    def _read_ahead(self) -> None:
        while self._expected and len(self._coming) < AHEAD:
            batch, needs = self._expected.popleft()
            self._coming[_key(batch, needs)] = self._thread.submit(self._read, batch, needs)

    def _read(self, batch: Batch, needs: Needs) -> Signal:
        scored = _segments(batch, batch.scored)
        found = [self._scored(segment, "output" if needs.output else "observed") for segment in scored]
        names = ["observed", *(["output"] if needs.output else [])]
        cells = self._cells([entry for entry, _ in found], names)
        rows = [each for _, each in found]
        head = self.head() if needs.output else None
        blobs = [cell["output"] or b"" for cell in cells] if needs.output else []
        with self._as_told():
            signal = self.manifest.codec.decode(head, self._model, blobs, rows) if needs.output else Signal()
            log_probs = [from_bytes(cell["observed"] or b"", torch.float16, 1, row)[:, 0] for cell, row in zip(cells, rows, strict=True)]
        return replace(
            signal,
            observed=torch.cat([torch.zeros(0, dtype=torch.float16), *log_probs]).float(),
            hidden=self._hidden(batch, sorted(needs.layers)) if needs.layers else {},
        )

    def _hidden(self, batch: Batch, layers: Sequence[int]) -> dict[int, Tensor]:
        segments = _segments(batch, batch.represented)
        entries = [self._represented(segment, layers) for segment in segments]
        cells = self._cells(entries, [hidden_column(layer) for layer in layers])
        teacher, codec = self.manifest.teacher, self.manifest.hidden
        assert teacher.dtype is not None and teacher.width is not None
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[teacher.dtype]
        found = {}
        for layer in layers:
            with self._as_told():
                parts = [
                    codec.decode(self._hidden_models[layer], cell[hidden_column(layer)] or b"", segment.offsets, teacher.width)
                    for cell, segment in zip(cells, segments, strict=True)
                ]
            found[layer] = torch.cat([torch.zeros(0, teacher.width, dtype=dtype), *(part.to(dtype) for part in parts)])
        return found

    @contextmanager
    def _as_told(self) -> Iterator[None]:
        """What lies in shards whose checksums are right has other sizes where the manifest was altered."""
        try:
            yield
        except (ValueError, IndexError, KeyError, RuntimeError) as error:
            raise StoreError(f"store {str(self.place)!r}: its shards hold something else than its manifest says ({error})") from error

    def _scored(self, segment: _Segment, name: str) -> tuple[Entry, np.ndarray]:
        """An entry that holds all of a segment's scored tokens, and their rows in it."""
        for entry in self._entries.get(segment.sample_id, []):
            if entry.num_scored_of(segment.offsets) == len(segment.offsets):
                return entry, np.searchsorted(entry.at.offsets, segment.offsets)
        raise self._lacks(name, segment)

    def _represented(self, segment: _Segment, layers: Sequence[int]) -> Entry:
        for entry in self._entries.get(segment.sample_id, []):
            if segment.offsets.max() < entry.at.num_represented:
                return entry
        raise self._lacks(f"hidden.{layers[0]}", segment)

    def _lacks(self, name: str, segment: _Segment) -> StoreError:
        return StoreError(f"store {str(self.place)!r}: lacks {name!r} of a token of sample {segment.sample_id}")

    def _cells(self, entries: Sequence[Entry], columns: Sequence[str]) -> list[dict[str, bytes | None]]:
        """The cells of each entry. A row group that several of them share is read once."""
        groups: dict[int, set[int]] = {}
        for entry in entries:
            groups.setdefault(entry.shard, set()).add(entry.at.group)
        found: dict[int, dict[int, dict[str, list[bytes | None]]]] = {}
        with self._lock:  # of the thread that reads ahead
            for shard, its in groups.items():
                found[shard] = self._file(shard).read(sorted(its), columns)
        return [{name: found[entry.shard][entry.at.group][name][entry.at.row] for name in columns} for entry in entries]

    def _file(self, shard: int) -> ShardFile:
        """An opened shard, one of those used last."""
        if shard not in self._files:
            self._files[shard] = ShardFile(self.place, self.manifest.shards[shard])
        self._files.move_to_end(shard)
        while len(self._files) > OPEN_SHARDS:
            self._files.popitem(last=False)
        return self._files[shard]

    def _index_of(self, shard: int) -> Sequence[Indexed]:
        return ShardFile(self.place, self.manifest.shards[shard]).index

    def _number(self, entry: Entry) -> int:
        return self.manifest.shards[entry.shard].number

    def _tensors(self, stored: StoredFile | None) -> dict[str, Tensor]:
        return load(read_checked(self.place, stored)) if stored else {}


def _segments(batch: Batch, positions: Tensor) -> list[_Segment]:
    """Flat positions, cut where the document changes."""
    documents, ids, offsets = (
        values.flatten()[positions].cpu().numpy() for values in (batch.document_ids, batch.sample_ids, batch.offsets)
    )
    starts = np.flatnonzero(np.diff(documents, prepend=-2)).tolist()
    ends = [*starts[1:], len(documents)]
    return [_Segment(int(ids[start]), offsets[start:end]) for start, end in zip(starts, ends, strict=False)]


def _key(batch: Batch, needs: Needs) -> Any:
    """What a batch asks for; equal for a copy on another device."""
    return (*(getattr(batch, name).cpu().numpy().tobytes() for name in ("sample_ids", "offsets", "scored")), needs)
