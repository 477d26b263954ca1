"""A teacher that DistillKit captured: its documents are found by their token ids. `limbeck store import` makes a store of it."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from limbeck.cache import files_hash, resolve_tokenizer
from limbeck.errors import ModelError, StoreError
from limbeck.objectives.base import Needs
from limbeck.store.distillkit import MASS_ERROR, Files, Legacy, Row, Settings, read_settings
from limbeck.store.manifest import TeacherIdentity
from limbeck.store.plan import Wanted
from limbeck.teachers.told import Document, Told, ToldScorer, ToldTeacher, documents
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from limbeck.batch import Batch, Signal

SMALLEST_TAIL = 1e-7
"""1 minus the told mass is rounding noise below it."""


class DistillKitTeacher(ToldTeacher):
    """What DistillKit's `sample_logits_vllm` wrote: the k most probable tokens of each position. Import it rather than train from it: its
    rows lie in no order that training could use."""

    type: Literal["distillkit"] = "distillkit"
    path: str
    """The folder with its Parquet files."""
    tokenizer: str
    """The tokenizer of the teacher that was captured: a folder, a name in Limbeck's cache, or a hub name."""
    settings: str | None = None
    """The file with its codec's settings, or the recipe of DistillKit that has them; its `compression_config.yaml` where not set."""
    name: str = "unknown"
    """Which teacher it was, for the manifest: the capture does not say."""

    @property
    def told(self) -> int:
        return self.codec.k

    @property
    def speaks(self) -> tuple[str, str | None]:
        return self.tokenizer, None

    @cached_property
    def codec(self) -> Settings:
        return read_settings(self.path, self.settings)

    def check(self) -> None:
        resolve_tokenizer(self.tokenizer)
        Files(self.path, self.codec)

    def content(self) -> str:
        files = files_hash([str(file) for file in Files(self.path, self.codec).paths])
        return hashlib.sha256(f"{files} {self.codec!r}".encode()).hexdigest()

    def open(self, tokenizer: Any, needs: Needs, device: str = "cpu") -> DistillKitScorer:
        from limbeck.models import load_tokenizer
        from limbeck.tokens.identity import shared_vocabulary

        vocabulary = shared_vocabulary(tokenizer, load_tokenizer(self.tokenizer))
        if self.codec.vocabulary < vocabulary:
            raise ModelError(
                f"teacher.path {self.path!r}: captured for {self.codec.vocabulary} tokens, the tokenizer has {vocabulary}; expected the "
                "tokenizer of the teacher that was captured"
            )
        return DistillKitScorer(self.name, Files(self.path, self.codec), self.codec, vocabulary, device)

    def identity(self, scorer: Any) -> TeacherIdentity:
        return TeacherIdentity(name=self.name, told=self.told, unknown=("tail", "observed") if scorer.are_logits else ("observed",))


class DistillKitScorer(ToldScorer):
    """Looks documents up by their ids."""

    def __init__(self, name: str, files: Files, settings: Settings, vocabulary: int, device: str) -> None:
        super().__init__(name, settings.k, vocabulary, device)
        self._files, self._settings = files, settings
        self._found: dict[bytes, Row] = {}

    @cached_property
    def are_logits(self) -> bool:
        """The legacy codec was fed log-probabilities by some programs and centred logits by others."""
        if not isinstance(self._settings, Legacy):
            return False
        _, values = self._files.read(Row(0, 0, 0))
        return bool(np.isfinite(values).any()) and float(np.exp(np.minimum(values, 50)).sum(1).max(initial=0.0)) > 1 + MASS_ERROR

    @cached_property
    def _documents(self) -> tuple[list[bytes], list[Row]]:
        """All documents' ids, in order, and where they lie."""
        found = sorted(((_bytes(ids), at) for at, ids in self._files.documents()), key=itemgetter(0))
        return [ids for ids, _ in found], [at for _, at in found]

    def require(self, samples: Sequence[Sample]) -> None:
        lacking = sum(sample.num_scored for sample in samples if self._find(_asked(sample)) is None)
        if lacking:
            total = sum(sample.num_scored for sample in samples)
            raise StoreError(
                f"teacher.path: the capture lacks {lacking} of {total} tokens that this recipe asks for ({lacking / total:.1%}): its "
                "documents have other token ids. Expected the data, template and tokenizer of the capture; several documents in a row of "
                "it cannot be told apart"
            )

    def arranged(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """As they lie on the disk: a row group is read whole, and may be as large as its file."""
        return sorted(wanted, key=lambda one: self._find(_asked(one.sample)) or Row(0, 0, 0))

    def _find(self, ids: np.ndarray) -> Row | None:
        """The document that is, or begins with, these ids: DistillKit adds a padding token, and may have cut later than we do."""
        keys, places = self._documents
        key = _bytes(ids)
        at = bisect_left(keys, key)
        return places[at] if at < len(keys) and keys[at].startswith(key) else None

    def score(self, batch: Batch) -> Signal:
        return self.signal(batch, [self._told(document) for document in documents(batch)])

    def _told(self, document: Document) -> Told:
        ids, wanted = document.ids, document.wanted
        found = self._find(ids[: int(wanted.max()) + 2])
        if found is None:
            raise StoreError("teacher.path: the capture lacks a document of this recipe")
        tokens, values = self._files.read(found)
        where = str(self._files.paths[found.file])
        if len(tokens) <= wanted.max():
            raise StoreError(f"{where}: tells of {len(tokens)} tokens of a document, expected {int(wanted.max()) + 1} or more")
        return self._clean(tokens[wanted], values[wanted], ids[wanted + 1], where)

    def _clean(self, tokens: np.ndarray, values: np.ndarray, actual: np.ndarray, where: str) -> Told:
        """Distributions of what came out of a codec: sorted, without what is no token, and with a mass of at most 1."""
        log_probs = np.where(np.isfinite(values), values, -np.inf)
        if self.are_logits:
            log_probs = log_probs - np.logaddexp.reduce(log_probs, axis=1, keepdims=True)
        mass = np.exp(np.minimum(log_probs, 50.0)).sum(1)
        if (mass > 1 + MASS_ERROR).any() or (tokens >= self._settings.vocabulary).any() or (np.diff(np.sort(tokens, 1), axis=1) == 0).any():
            raise StoreError(f"{where}: found no distributions (a mass of {mass.max():.3f}, or wrong ids); are the settings its own?")
        is_token = tokens < self.vocabulary
        outside = np.exp(np.where(is_token, -np.inf, log_probs)).sum(1)
        log_probs = np.where(is_token, log_probs, -np.inf) - np.log(np.maximum(np.maximum(mass, 1.0) - outside, SMALLEST_TAIL))[:, None]
        order = np.argsort(-log_probs, axis=1, kind="stable")
        tokens, log_probs = np.take_along_axis(tokens, order, 1), np.take_along_axis(log_probs, order, 1)
        tokens = np.where(np.isfinite(log_probs), tokens, np.where(np.isfinite(log_probs[:, :1]), tokens[:, :1], 0))
        rest = np.maximum(1.0 - np.exp(log_probs).sum(1), SMALLEST_TAIL)
        others = max(self.vocabulary - self.k, 1)
        is_there = (tokens == actual[:, None]) & np.isfinite(log_probs)
        observed = np.where(is_there.any(1), np.where(is_there, log_probs, -np.inf).max(1), np.log(rest / others))
        return Told(tokens, log_probs.astype(np.float32), np.log(rest).astype(np.float32), observed.astype(np.float32))


def _asked(sample: Sample) -> np.ndarray:
    """A sample's ids up to its last target."""
    targets = np.flatnonzero(sample.is_target[1:])
    return sample.ids[: int(targets[-1]) + 2] if len(targets) else sample.ids[:0]


def _bytes(ids: np.ndarray) -> bytes:
    """Ids as bytes that have their order."""
    return ids.astype(">u4").tobytes()
