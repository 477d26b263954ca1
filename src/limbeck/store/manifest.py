"""Manifest: what a capture says of itself, as `manifest.json`. Torch-free, so that a recipe can be checked against it.

store/manifest.json          this file: teacher, tokenizer, codec, layers, counts, and every file with size and SHA-256
store/head.safetensors       the teacher's output head, once
store/shard-00000.safetensors ...
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Literal

from limbeck.errors import RecipeError, StoreError
from limbeck.run import write_json
from limbeck.spec import Spec, validate

MANIFEST = "manifest.json"
HEAD = "head.safetensors"
_OWN = re.compile(r"head\.safetensors|shard-\d+\.safetensors|\..*\.tmp")


class StoredFile(Spec):
    """A file of the store."""

    name: str
    bytes: int
    sha256: str


class Shard(StoredFile):
    """A file with the signal of some samples."""

    num_samples: int
    num_scored: int
    num_represented: int
    """Tokens whose hidden states are stored; 0 in a shard without hidden states."""


class TeacherIdentity(Spec):
    """Which teacher was captured, and how it was run."""

    name: str
    revision: str | None
    dtype: Literal["float32", "bfloat16"]
    weights_sha256: str
    num_layers: int
    width: int
    head_scale: float
    head_soft_cap: float | None


class Manifest(Spec):
    """A capture. `codec` is `exact`: the teacher's last hidden state at scored tokens with its head kept once, so that every
    temperature and divergence is exact; and its residual stream after `layers` at all tokens."""

    format: Literal["limbeck-store"] = "limbeck-store"
    version: Literal[1] = 1
    codec: Literal["exact"] = "exact"
    teacher: TeacherIdentity
    vocabulary: int
    """Tokens that teacher and student share; the head is cut to them."""
    vocabulary_hash: str
    template_hash: str | None
    layers: tuple[int, ...]
    head: StoredFile
    shards: tuple[Shard, ...] = ()
    packages: dict[str, str]

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_scored(self) -> int:
        return sum(shard.num_scored for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return self.head.bytes + sum(shard.bytes for shard in self.shards)


def folder_of(path: str) -> Path:
    """The folder of a store as a recipe names it."""
    return Path(os.path.expanduser(path))


def refuse_foreign(path: Path) -> None:
    """StoreError where something else than a capture lies at `path`; what a killed capture leaves before its manifest is no hindrance."""
    if path.is_dir():
        others = [] if (path / MANIFEST).is_file() else [file.name for file in path.iterdir() if not _OWN.fullmatch(file.name)]
        if not others:
            return
        found = f"a folder with {sorted(others)[0]!r} and no {MANIFEST}"
    elif path.exists():
        found = "a file"
    else:
        return
    raise StoreError(f"store {str(path)!r}: found {found}, expected a new folder or one written by `limbeck capture`")


def read_manifest(path: Path) -> Manifest:
    """The manifest of the store at `path`."""
    file = path / MANIFEST
    if not file.is_file():
        raise StoreError(f"store {str(path)!r}: found no {MANIFEST}, expected a folder written by `limbeck capture`")
    try:
        return validate(Manifest, json.loads(file.read_text(encoding="utf-8")), str(file))
    except (ValueError, OSError, RecipeError) as error:
        raise StoreError(f"{file}: not a manifest of this version of Limbeck: {error}") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    write_json(path / MANIFEST, manifest.model_dump(mode="json"))


def describe_file(file: Path) -> StoredFile:
    """Name, size and SHA-256 of a written file."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return StoredFile(name=file.name, bytes=file.stat().st_size, sha256=digest)


def check_file(path: Path, stored: StoredFile) -> Path:
    """The path of a stored file after its size and checksum were compared; names may not lead out of the store."""
    file = path / stored.name
    if Path(stored.name).name != stored.name:
        raise StoreError(f"{path / MANIFEST}: file name {stored.name!r} leads out of the store")
    if not file.is_file():
        raise StoreError(f"{file}: missing; expected {stored.bytes} bytes. Capture again into a new folder, or restore the file")
    found = describe_file(file)
    if found != StoredFile(name=stored.name, bytes=stored.bytes, sha256=stored.sha256):
        raise StoreError(
            f"{file}: found {found.bytes} bytes with SHA-256 {found.sha256[:12]}, expected {stored.bytes} with {stored.sha256[:12]}: "
            "the file was cut or altered. Delete the store and capture again"
        )
    return file
