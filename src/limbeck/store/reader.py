"""Reading a capture by sample id and token offset, lazily: only the rows of a batch leave the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from limbeck.batch import Batch, Signal
from limbeck.errors import StoreError
from limbeck.objectives.base import Needs
from limbeck.objectives.head import Head
from limbeck.store.manifest import Manifest, check_file, read_manifest
from limbeck.tokens.sample import Sample


@dataclass(frozen=True)
class _Entry:
    """Where a sample lies: shard, rows of its scored tokens, the offsets of those, and rows of its hidden states."""

    shard: int
    scored: slice
    offsets: np.ndarray
    represented: slice

    def num_scored_of(self, offsets: np.ndarray) -> int:
        return int(np.isin(offsets, self.offsets).sum())

    @property
    def num_represented(self) -> int:
        return int(self.represented.stop - self.represented.start)

    def scored_rows(self, offsets: np.ndarray) -> tuple[slice, np.ndarray] | None:
        """Rows of these scored tokens; None where one of them was not scored at capture."""
        return (self.scored, np.searchsorted(self.offsets, offsets)) if self.num_scored_of(offsets) == len(offsets) else None

    def represented_rows(self, offsets: np.ndarray) -> tuple[slice, np.ndarray] | None:
        """Rows of these tokens' hidden states; None where one of them has none."""
        return (self.represented, offsets.astype(np.int64)) if offsets.max() < self.num_represented else None


class StoreReader:
    """An opened capture. Every file's checksum is compared when it is opened.

    A sample has several entries where it was captured again, longer or with more scored tokens; any of them that holds what is asked
    for will do, as a causal teacher says the same of a token whatever comes after it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._files: list[Any] = []
        self._entries: dict[int, list[_Entry]] = {}
        for shard in self.manifest.shards:
            self._files.append(safe_open(check_file(path, shard), framework="pt"))
            self._index(len(self._files) - 1)

    def head(self, device: str = "cpu") -> Head:
        """The teacher's head in the teacher's dtype."""
        teacher = self.manifest.teacher
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[teacher.dtype]
        with safe_open(check_file(self.path, self.manifest.head), framework="pt") as file:
            tensors = {name: file.get_tensor(name).to(device, dtype) for name in file.keys()}  # noqa: SIM118
        return Head(tensors["weight"], tensors.get("bias"), teacher.head_scale, teacher.head_soft_cap)

    def missing(self, samples: Sequence[Sample], needs: Needs) -> tuple[int, int]:
        """(tokens that the capture lacks, tokens asked for) over scored tokens, and all tokens where hidden states are needed."""
        lacking = total = 0
        for sample in samples:
            wanted, entries = np.flatnonzero(sample.is_target[1:]), self._entries.get(sample.sample_id, [])
            total += len(wanted)
            lacking += len(wanted) - max((entry.num_scored_of(wanted) for entry in entries), default=0)
            if needs.layers:
                total += len(sample.ids)
                lacking += max(len(sample.ids) - max((entry.num_represented for entry in entries), default=0), 0)
        return lacking, total

    def read(self, batch: Batch, needs: Needs) -> Signal:
        """The signal of a batch; without `teacher_head`, which the caller adds."""
        device = batch.input_ids.device
        output = self._gather(batch, batch.scored, "output", _Entry.scored_rows) if needs.output else None
        observed = self._gather(batch, batch.scored, "observed", _Entry.scored_rows)
        hidden = {
            layer: self._gather(batch, batch.represented, f"hidden.{layer}", _Entry.represented_rows).to(device)
            for layer in sorted(needs.layers)
        }
        return Signal(output=None if output is None else output.to(device), hidden=hidden, observed=observed.to(device))

    def _gather(
        self, batch: Batch, positions: Tensor, name: str, rows_of: Callable[[_Entry, np.ndarray], tuple[slice, np.ndarray] | None]
    ) -> Tensor:
        ids = batch.sample_ids.flatten()[positions].cpu()
        offsets = batch.offsets.flatten()[positions].cpu()
        if not len(ids):
            return self._empty(name)
        found: Tensor | None = None
        for sample_id in dict.fromkeys(ids.tolist()):
            here = ids == sample_id
            hits = ((entry, rows_of(entry, offsets[here].numpy())) for entry in self._entries.get(sample_id, []))
            entry, hit = next(((entry, hit) for entry, hit in hits if hit), (None, None))
            if entry is None or hit is None:
                raise StoreError(f"store {str(self.path)!r}: lacks {name!r} of a token of sample {sample_id}")
            block, rows = hit
            values = self._files[entry.shard].get_slice(name)[block][torch.from_numpy(rows)]
            if found is None:
                found = values.new_empty((len(ids), *values.shape[1:]))
            found[here] = values
        assert found is not None
        return found

    def _empty(self, name: str) -> Tensor:
        if name == "observed":
            return torch.zeros(0)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.manifest.teacher.dtype]
        return torch.zeros(0, self.manifest.teacher.width, dtype=dtype)

    def _index(self, shard: int) -> None:
        file = self._files[shard]
        ids, starts, offsets = (file.get_tensor(name).numpy() for name in ("sample_id", "scored_starts", "offset"))
        has_hidden = "represented_starts" in file.keys()  # noqa: SIM118
        states = file.get_tensor("represented_starts").numpy() if has_hidden else np.zeros(len(ids) + 1, dtype=np.int64)
        for i, sample_id in enumerate(ids.tolist()):
            rows = slice(int(starts[i]), int(starts[i + 1]))
            entry = _Entry(shard, rows, offsets[rows], slice(int(states[i]), int(states[i + 1])))
            self._entries.setdefault(sample_id, []).append(entry)
