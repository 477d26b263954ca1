"""Verifying a capture: every byte of it against the manifest's checksums. Training compares only what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from limbeck.errors import StoreError
from limbeck.store.manifest import Manifest, check_file, read_manifest
from limbeck.store.place import Place


@dataclass(frozen=True)
class Damage:
    """A file that is not what it was."""

    name: str
    problem: str


def damages(path: str | Path) -> list[Damage]:
    """Files that are missing, cut or altered."""
    place = Place(path)
    manifest = read_manifest(place)
    found = []
    for file in (manifest.head, manifest.model, *manifest.shards):
        try:
            check_file(place, file) if file else None
        except StoreError as error:
            assert file is not None
            found.append(Damage(file.name, str(error)))
    return found


def verify(path: str | Path) -> Manifest:
    """The manifest of a store of which every file is what it was; StoreError names all that are not."""
    if found := damages(path):
        raise StoreError("\n".join(damage.problem for damage in found))
    return read_manifest(path)
