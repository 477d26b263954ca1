"""Manifest: what a capture says of itself, as `manifest.json`. Torch-free, so that a recipe can be checked against it.

store/manifest.json          this file: teacher, tokenizer, codec, layers, counts, and every file with size and SHA-256
store/head.safetensors       the teacher's output head, once, where the codec needs it
store/model.safetensors      what the codecs calibrated, where they did
store/shard-00000.parquet    the signal of some samples
store/shard-00000.json       what the manifest will say of that shard, until the capture has ended: workers share no file
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator

from limbeck.errors import RecipeError, StoreError
from limbeck.run import write_json
from limbeck.spec import Spec, member_of, validate
from limbeck.store.codec import Codec
from limbeck.store.hidden import HiddenCodec
from limbeck.store.place import Place

MANIFEST = "manifest.json"
HEAD = "head.safetensors"
MODEL = "model.safetensors"
ENTRY = re.compile(r"shard-\d+\.json")
_OWN = re.compile(r"(head|model)\.safetensors|shard-\d+\.(parquet|json)|\.[^/]*\.tmp")
AGAIN = "`limbeck store repair RECIPE` captures again what is damaged"


class StoredFile(Spec):
    """A file of the store."""

    name: str
    bytes: int
    sha256: str

    @field_validator("name")
    @classmethod
    def _inside(cls, name: str) -> str:
        """A store from somebody else must not make us read another file."""
        if not _OWN.fullmatch(name):
            raise ValueError(f"found {name!r}, expected a file of a store; it may lead out of it")
        return name


class Shard(StoredFile):
    """A file with the signal of some samples."""

    footer_bytes: int
    """Its end, with the index of its samples: read and compared when the store is opened."""
    footer_sha256: str
    num_samples: int
    num_scored: int
    num_represented: int
    """Tokens whose hidden states are stored; 0 in a shard without hidden states."""

    @property
    def number(self) -> int:
        return int(self.name[len("shard-") :].partition(".")[0])


class Pass(Spec):
    """Shards that one recipe made. A recipe that asks for more adds a pass with what was missing."""

    digest: str
    """Of samples, what was asked of each, and how they were batched: a capture that goes on makes the same shards."""
    first: int
    num_shards: int


class TeacherIdentity(Spec):
    """Which teacher was captured, and how it was run. What is None of one that ran elsewhere is not known."""

    name: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    load_in: Literal["8bit", "4bit"] | None = None
    """Its weights were rounded to so many bits: another teacher than the one in full."""
    weights_sha256: str | None = None
    num_layers: int | None = None
    width: int | None = None
    head_scale: float | None = None
    head_soft_cap: float | None = None
    told: int | None = None
    """It told so many of its most probable tokens and the mass of the others, which is all that the certificate knows of it; None for one
    that told everything."""
    unknown: tuple[Literal["tail", "observed"], ...] = ()
    """`observed`: it did not tell the log-probability of targets outside of those tokens, and the mean of the others stands for it. `tail`:
    it did not tell the mass of the others, and it counts as nothing."""


class Manifest(Spec):
    """A capture."""

    format: Literal["limbeck-store"] = "limbeck-store"
    version: Literal[2] = 2
    codec: member_of(Codec)  # type: ignore[valid-type]
    """How the output at scored tokens is kept, with its parameters."""
    target: dict[str, float | None] | None = None
    """What the codec was chosen for, where it was chosen by measuring."""
    temperatures: tuple[float, ...] | None
    """Temperatures of losses that it can serve; None for all."""
    teacher: TeacherIdentity
    vocabulary: int
    """Tokens that teacher and student share; the head is cut to them."""
    vocabulary_hash: str
    template_hash: str | None
    layers: tuple[int, ...]
    hidden: member_of(HiddenCodec)  # type: ignore[valid-type]
    """How the residual stream after `layers` is kept."""
    hidden_error: dict[int, float] = {}
    """By block, the mean over tokens of |states - kept states| / |states|, on documents that calibration did not see."""
    observed: Literal["float16"] = "float16"
    """Type of the teacher's log-probability of each target."""
    byte_offsets: bool
    """Whether it is known where in the text each target stands."""
    calibrated_on: tuple[int, ...] = ()
    """Ids of the samples that the codecs were fitted on; no fidelity is measured on them."""
    certificate: dict[str, Any] | None = None
    """What the codec loses, as it was measured when the capture began."""
    head: StoredFile | None
    model: StoredFile | None
    passes: tuple[Pass, ...] = ()
    shards: tuple[Shard, ...] = ()
    packages: dict[str, str]

    @model_validator(mode="after")
    def _states_have_a_shape(self) -> Manifest:
        if self.layers and None in (self.teacher.dtype, self.teacher.width, self.teacher.num_layers):
            raise ValueError("teacher: found no dtype, width or num_layers, expected them where hidden states are kept (`layers`)")
        return self

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_scored(self) -> int:
        return sum(shard.num_scored for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Of everything but the manifest itself."""
        return sum(file.bytes for file in (*self.shards, self.head, self.model) if file)

    @property
    def num_missing(self) -> int:
        """Shards that were begun with and are not there."""
        return sum(one.num_shards for one in self.passes) - len(self.shards)


def refuse_foreign(path: str) -> None:
    """StoreError where something else than a capture lies at `path`; what a killed capture leaves before its manifest is no hindrance."""
    folder = Place(path).folder
    if folder is None:
        raise StoreError(f"store {path!r}: found a URL, expected a folder: captures are written to disk, and may be copied from there")
    if folder.is_dir():
        others = [] if (folder / MANIFEST).is_file() else [file.name for file in folder.iterdir() if not _OWN.fullmatch(file.name)]
        if not others:
            return
        found = f"a folder with {sorted(others)[0]!r} and no {MANIFEST}"
    elif folder.exists():
        found = "a file"
    else:
        return
    raise StoreError(f"store {path!r}: found {found}, expected a new folder or one written by `limbeck capture`")


def refuse_other(
    path: str, found: Manifest, wanted: Mapping[str, Any], way_out: str = "Set capture.path to a new folder, or delete this one"
) -> None:
    """Refuse to add to a capture of something else. `wanted` are fields of the manifest by dotted name, as they would have to be."""
    for field, value in wanted.items():
        there: Any = found
        for part in field.split("."):
            there = getattr(there, part)
        if there != value:
            shown, needed = (each.model_dump(mode="json") if isinstance(each, Spec) else each for each in (there, value))
            raise StoreError(f"store {path!r}: holds another capture: {field} is {shown!r}, this recipe needs {needed!r}. {way_out}")


def has_manifest(place: Place) -> bool:
    return place.size(MANIFEST) is not None


def read_manifest(path: str | Path | Place) -> Manifest:
    """The manifest of a store, with the shards of a capture that has not ended."""
    place = path if isinstance(path, Place) else Place(path)
    if not has_manifest(place):
        raise StoreError(f"store {str(place)!r}: found no {MANIFEST}, expected a folder written by `limbeck capture`")
    tree = _json(place, MANIFEST)
    if isinstance(tree, dict) and tree.get("format") == "limbeck-store" and tree.get("version") == 1:
        raise StoreError(
            f"{place.file(MANIFEST)}: found a store of format 1 (safetensors), expected format 2: this version of Limbeck reads "
            "it no more. Capture the teacher again into a new folder"
        )
    manifest: Manifest = _parse(Manifest, tree, place.file(MANIFEST))
    known = {shard.name for shard in manifest.shards}
    entries = [_parse(Shard, _json(place, name), place.file(name)) for name in place.names() if ENTRY.fullmatch(name)]
    shards = sorted([*manifest.shards, *(shard for shard in entries if shard.name not in known)], key=lambda shard: shard.number)
    return manifest.model_copy(update={"shards": tuple(shards)})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def describe_file(file: Path) -> StoredFile:
    """Name, size and SHA-256 of a written file."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return StoredFile(name=file.name, bytes=file.stat().st_size, sha256=digest)


def check_size(place: Place, stored: StoredFile) -> None:
    """Refuse a file that is not there or not whole."""
    found = place.size(stored.name)
    if found is None:
        raise StoreError(f"{place.file(stored.name)}: missing; expected {stored.bytes} bytes. {AGAIN}")
    if found != stored.bytes:
        raise StoreError(f"{place.file(stored.name)}: found {found} bytes, expected {stored.bytes}: the file was cut or altered. {AGAIN}")


def check_file(place: Place, stored: StoredFile) -> None:
    """Refuse a file that is not what it was, after reading all of it."""
    check_size(place, stored)
    with place.open(stored.name) as stream:
        digest = hashlib.sha256()
        while block := stream.read(2**20):
            digest.update(block)
    check_digest(place, stored.name, digest.hexdigest(), stored.sha256)


def read_checked(place: Place, stored: StoredFile) -> bytes:
    """All of a file, after its size and checksum were compared."""
    check_size(place, stored)
    content = place.read(stored.name)
    check_digest(place, stored.name, hashlib.sha256(content).hexdigest(), stored.sha256)
    return content


def check_digest(place: Place, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise StoreError(f"{place.file(name)}: found SHA-256 {found[:12]}, expected {expected[:12]}: the file was altered. {AGAIN}")


def _json(place: Place, name: str) -> Any:
    try:
        return json.loads(place.read(name).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{place.file(name)}: not a manifest of this version of Limbeck: {error}") from None


def _parse(cls: type[Any], tree: Any, where: str) -> Any:
    try:
        return validate(cls, tree, where)
    except RecipeError as error:
        raise StoreError(f"{where}: not a manifest of this version of Limbeck: {error}") from None
