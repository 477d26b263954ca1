"""A captured teacher: its signal comes from disk, and costs a read where the live teacher costs a forward."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from limbeck.errors import StoreError
from limbeck.objectives.base import Needs
from limbeck.store.manifest import read_manifest
from limbeck.teachers.base import Provides, Teacher
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from limbeck.batch import Batch, Signal
    from limbeck.store.reader import StoreReader


class StoreTeacher(Teacher):
    """What `limbeck capture` wrote."""

    type: Literal["store"] = "store"
    path: str
    """The capture: a folder, or a URL that fsspec reads. It must hold every token that this recipe scores."""

    def provides(self) -> Provides:
        manifest = read_manifest(self.path)
        return Provides(
            output=True,
            support=manifest.codec.support,
            temperatures=manifest.temperatures,
            k=getattr(manifest.codec, "k", None),
            layers=frozenset(manifest.layers),
            num_layers=manifest.teacher.num_layers,
            width=manifest.teacher.width,
        )

    def content(self) -> str:
        """Of which teacher it is, and how it was kept; it may hold more conversations than before."""
        manifest = read_manifest(self.path)
        known = manifest.model_dump(mode="json", include={"teacher", "codec", "head", "model", *(["hidden"] if manifest.layers else [])})
        if manifest.teacher.weights_sha256:
            del known["teacher"]["name"], known["teacher"]["revision"]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def open(self, tokenizer: Any, needs: Needs, device: str = "cpu") -> StoreScorer:
        from limbeck.store.reader import StoreReader
        from limbeck.tokens.identity import template_hash, vocabulary_hash

        reader = StoreReader(self.path, device)
        manifest = reader.manifest
        for field, found in (("vocabulary_hash", vocabulary_hash(tokenizer)), ("template_hash", template_hash(tokenizer))):
            expected = getattr(manifest, field)
            if found != expected:
                raise StoreError(
                    f"store {self.path!r}: captured with {field} {str(expected)[:12]}, the student's tokenizer has {str(found)[:12]}; "
                    f"capture {manifest.teacher.name} again with this student's tokenizer, or use the student that the capture was made for"
                )
        if lacking := sorted(needs.layers - set(manifest.layers)):
            raise StoreError(
                f"store {self.path!r}: holds the states of blocks {list(manifest.layers)}, this recipe needs {lacking} too; "
                "capture again with capture.layers, or map those"
            )
        return StoreScorer(reader, needs)


class StoreScorer:
    """Looks a batch up in a capture."""

    def __init__(self, reader: StoreReader, needs: Needs) -> None:
        teacher = reader.manifest.teacher
        self.name, self.num_layers, self.width = teacher.name, teacher.num_layers or 0, teacher.width or 0
        self.vocabulary = reader.manifest.vocabulary
        self.reader, self.needs = reader, needs
        if needs.output:
            reader.head()  # a damaged one shows here, and not at the first step

    def asking(self, needs: Needs) -> StoreScorer:
        return StoreScorer(self.reader, needs)

    def require(self, samples: Sequence[Sample]) -> None:
        lacking, total = self.reader.missing(samples, self.needs)
        if lacking:
            raise StoreError(
                f"store {str(self.reader.place)!r}: lacks {lacking} of {total} tokens that this recipe asks for ({lacking / total:.1%}): "
                "it was captured from other data, or with a smaller source.max_length. Capture again with this recipe's source"
            )

    def verify_packing(self) -> None:
        """Tokens are looked up by their sample, in whatever row they stand."""

    def score(self, batch: Batch) -> Signal:
        return self.reader.read(batch, self.needs)

    def expect(self, batches: Sequence[Batch]) -> None:
        self.reader.expect(batches, self.needs)
