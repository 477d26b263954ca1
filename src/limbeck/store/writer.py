"""Writing a capture. A worker writes shards of its own, each whole or not at all, with an entry beside it that the manifest takes over."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from limbeck.batch import Batch, Signal
from limbeck.errors import RunError, StoreError
from limbeck.objectives.head import Head
from limbeck.run import appearing, write_json
from limbeck.store.codec import to_bytes
from limbeck.store.manifest import (
    ENTRY,
    HEAD,
    MANIFEST,
    MODEL,
    Manifest,
    StoredFile,
    describe_file,
    read_manifest,
)
from limbeck.store.offsets import pack_spans
from limbeck.store.shard import Row, write_shard

AHEAD = 2
"""Batches that may wait to be encoded while the teacher computes the next."""


class StoreWriter:
    """Encodes and writes in a thread beside the teacher. To be used as a context: it ends when everything is on the disk."""

    def __init__(self, folder: Path, manifest: Manifest, head: Head, model: Mapping[str, Tensor]) -> None:
        self.folder, self.manifest, self.head = folder, manifest, head
        self.model = part_of(model, "output")
        self.hidden_models = {layer: part_of(model, f"hidden.{layer}") for layer in manifest.layers}
        self._rows: list[Row] = []
        self._work: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            while self._work and kind is None:
                self._work.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def add(self, batch: Batch, signal: Signal, layers: Sequence[frozenset[int]], spelling: Sequence[np.ndarray | None]) -> None:
        """Take a batch of one sample per row, for the shard that is ended next; of each sample the states of its `layers`, and the bytes
        that each of its tokens is of the text, where that is known."""
        self._do(self._encode, batch, signal, layers, spelling)

    def end_shard(self, number: int) -> None:
        """Publish what was taken since the last one."""
        self._do(self._publish, number)

    def _do(self, function: Any, *arguments: Any) -> None:
        while len(self._work) >= AHEAD:
            self._work.popleft().result()
        self._work.append(self._thread.submit(function, *arguments))

    @torch.no_grad()
    def _encode(self, batch: Batch, signal: Signal, layers: Sequence[frozenset[int]], spelling: Sequence[np.ndarray | None]) -> None:
        assert signal.output is not None and signal.observed is not None
        width, num_rows = batch.input_ids.shape[1], len(layers)
        scored, represented = (
            torch.bincount((positions // width).cpu(), minlength=num_rows).tolist() for positions in (batch.scored, batch.represented)
        )
        outputs = self.manifest.codec.encode(self.head, self.model, signal.output, scored)
        observed = signal.observed.to(torch.float16).split(scored)
        states = {layer: state.split(represented) for layer, state in signal.hidden.items()}
        offsets = [part.numpy() for part in batch.offsets.flatten()[batch.scored].cpu().split(scored)]
        for i, (wanted, lengths) in enumerate(zip(layers, spelling, strict=True)):
            hidden = {layer: self.manifest.hidden.encode(self.hidden_models[layer], states[layer][i]) for layer in sorted(wanted)}
            row = Row(
                sample_id=int(batch.sample_ids[i, 0]),
                offsets=offsets[i],
                num_represented=represented[i] if wanted else 0,
                output=outputs[i],
                observed=to_bytes(observed[i]),
                byte_offsets=None if lengths is None else pack_spans(lengths, offsets[i]),
                hidden=hidden,
            )
            self._rows.append(row)

    def _publish(self, number: int) -> None:
        rows, self._rows = self._rows, []
        shard = write_shard(self.folder / f"shard-{number:05d}.parquet", rows, self.manifest.layers)
        write_entry(self.folder, f"shard-{number:05d}.json", shard.model_dump(mode="json"))


def write_entry(folder: Path, name: str, tree: Any) -> None:
    try:
        write_json(folder / name, tree)
    except RunError as error:
        raise StoreError(f"{error}; what was written before it stays usable") from error


def collect(folder: Path) -> Manifest:
    """Take the entries of all workers into the manifest, which from then on speaks for all shards."""
    manifest = read_manifest(folder)
    entries = [file for file in folder.glob("*.json") if ENTRY.fullmatch(file.name)]
    if entries:
        write_entry(folder, MANIFEST, manifest.model_dump(mode="json"))
        for file in entries:
            file.unlink()
    return manifest


def write_head(folder: Path, head: Head) -> StoredFile:
    """The teacher's head, in bfloat16 where that loses nothing (weights that were published in it)."""
    tensors = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    return write_tensors(folder / HEAD, {name: _smallest(value.detach().cpu()) for name, value in tensors.items()})


def write_model(folder: Path, model: Mapping[str, Tensor]) -> StoredFile | None:
    """What the codecs calibrated; None where that is nothing."""
    return write_tensors(folder / MODEL, model) if model else None


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> StoredFile:
    """A safetensors file that is there whole or not at all, also after a crash."""
    try:
        with appearing(file) as temporary:
            save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
            temporary.chmod(0o644)  # safetensors writes files that only their owner can read; captures are shared
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file}: could not be written ({error}); what was written before it stays usable") from error
    return describe_file(file)


def part_of(model: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of model.safetensors that belong to a codec: `output.*`, or `hidden.<block>.*`."""
    return {name[len(prefix) + 1 :]: value for name, value in model.items() if name.startswith(f"{prefix}.")}


def _smallest(value: Tensor) -> Tensor:
    short = value.to(torch.bfloat16)
    return short if torch.equal(short.to(value.dtype), value) else value
