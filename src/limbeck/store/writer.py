"""Writing a capture: shards appear whole or not at all, and a capture that was stopped goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from limbeck.batch import Batch, Signal
from limbeck.errors import StoreError
from limbeck.objectives.head import Head
from limbeck.run import fsync_dir
from limbeck.store.manifest import (
    HEAD,
    MANIFEST,
    Manifest,
    Shard,
    StoredFile,
    check_file,
    describe_file,
    read_manifest,
    refuse_foreign,
    write_manifest,
)


class StoreWriter:
    """Collects signals and publishes a shard as soon as `samples_per_shard` are there. What is in the store already, its caller knows."""

    def __init__(self, path: Path, identity: Manifest, samples_per_shard: int = 256) -> None:
        self.path, self.samples_per_shard = path, samples_per_shard
        self._pending: list[dict[str, Tensor]] = []
        self._taken: set[int] = set()
        self.manifest = _continue(path, identity)

    def add(self, batch: Batch, signal: Signal) -> None:
        """Take the signal of every sample of a batch, once per sample id."""
        flat_ids, flat_offsets, documents = batch.sample_ids.flatten(), batch.offsets.flatten(), batch.document_ids.flatten()
        assert signal.output is not None and signal.observed is not None
        # by document, as a sample may come twice in a batch
        for document in documents[batch.represented].unique().tolist():
            rows, states = documents[batch.scored] == document, documents[batch.represented] == document
            sample_id = int(flat_ids[batch.represented][states][0])
            if sample_id in self._taken:
                continue
            self._taken.add(sample_id)
            entry = {
                "sample_id": torch.tensor([sample_id]),
                "offset": flat_offsets[batch.scored][rows].to(torch.int32),
                "output": signal.output[rows],
                "observed": signal.observed[rows],
            }
            entry.update({f"hidden.{layer}": state[states] for layer, state in signal.hidden.items()})
            self._pending.append(_first_copy(entry))
        # only here, so that a batch is in the store whole or not at all
        if len(self._pending) >= self.samples_per_shard:
            self.flush()

    def flush(self) -> None:
        """Publish what is pending as a shard."""
        if not self._pending:
            return
        names = set(self._pending[0])
        batch = [entry for entry in self._pending if set(entry) == names]
        self._pending = [entry for entry in self._pending if set(entry) != names]
        hidden = [name for name in sorted(names) if name.startswith("hidden.")]
        tensors = {name: torch.cat([entry[name] for entry in batch]) for name in ("sample_id", "offset", "output", "observed", *hidden)}
        tensors["scored_starts"] = _starts([len(entry["offset"]) for entry in batch])
        if hidden:
            tensors["represented_starts"] = _starts([len(entry[hidden[0]]) for entry in batch])
        file = write_tensors(self.path / f"shard-{len(self.manifest.shards):05d}.safetensors", tensors)
        shard = Shard(
            **describe_file(file).model_dump(),
            num_samples=len(batch),
            num_scored=len(tensors["offset"]),
            num_represented=len(tensors[hidden[0]]) if hidden else 0,
        )
        self.manifest = self.manifest.model_copy(update={"shards": (*self.manifest.shards, shard)})
        write_manifest(self.path, self.manifest)
        self.flush()


def write_head(path: Path, head: Head) -> StoredFile:
    """The teacher's head, in bfloat16 where that loses nothing (weights that were published in it)."""
    tensors = {"weight": head.weight} if head.bias is None else {"weight": head.weight, "bias": head.bias}
    return describe_file(write_tensors(path / HEAD, {name: _smallest(value.detach()) for name, value in tensors.items()}))


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A safetensors file that is there whole or not at all, also after a crash."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors writes files that only their owner can read; captures are shared
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        fsync_dir(file.parent)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{file}: could not be written ({error}); what was written before it stays usable") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return file


def _continue(path: Path, identity: Manifest) -> Manifest:
    """The manifest to go on with: the one in `path` if it describes the same capture, else the new one."""
    refuse_foreign(path)
    if not (path / MANIFEST).is_file():
        write_manifest(path, identity)
        return identity
    found = read_manifest(path)
    ours, theirs = _comparable(identity), _comparable(found)
    for field in ours:
        if ours[field] != theirs[field]:
            raise StoreError(
                f"store {str(path)!r}: holds another capture: {field} is {theirs[field]!r}, this recipe needs {ours[field]!r}. "
                "Set capture.path to a new folder, or delete this one"
            )
    for file in (found.head, *found.shards):
        check_file(path, file)
    for leftover in path.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    return found


def _comparable(manifest: Manifest) -> dict[str, Any]:
    """What must be equal for a capture to go on. A teacher is told by its weights; its name may be another path to them."""
    fields = manifest.model_dump(exclude={"teacher", "shards", "packages", "head"})
    teacher = manifest.teacher.model_dump(exclude={"name", "revision"})
    return {**{f"teacher.{name}": value for name, value in teacher.items()}, **fields}


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _first_copy(entry: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and free of the batch's memory."""
    return {name: value.detach().cpu().clone() for name, value in entry.items()}


def _smallest(value: Tensor) -> Tensor:
    short = value.to(torch.bfloat16)
    return short if torch.equal(short.to(value.dtype), value) else value
