"""What teachers share that tell k tokens and the mass of the others, at temperature 1: a server, and captures of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np

from limbeck.objectives.base import Needs
from limbeck.store import Codec
from limbeck.store.plan import Wanted
from limbeck.store.top_k import TopTokens
from limbeck.teachers.base import Provides, Teacher
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from limbeck.batch import Batch, Signal
    from limbeck.objectives.head import Head


class ToldTeacher(Teacher):
    """Base of their specs."""

    computes: ClassVar[bool] = True

    @property
    def told(self) -> int:
        """How many tokens it tells."""
        raise NotImplementedError

    def provides(self) -> Provides:
        return Provides(output=True, support="top_k", temperatures=(1.0,))

    def refuses_codec(self, codec: Codec, is_chosen: bool) -> str | None:
        if not isinstance(codec, TopTokens):
            return f"found {codec.type!r}, expected topk or nucleus with `prior: false`: a {self.type!r} teacher tells no more"
        if is_chosen:
            return "found a target, expected a `k`: what is lost cannot be measured against tokens that the teacher does not tell"
        if codec.k > self.told:
            return f"found k {codec.k}, expected at most {self.told}, which the teacher tells"
        if codec.prior:
            return f"found prior true, expected false: how a {self.type!r} teacher spreads its other mass is not known"
        if codec.temperatures != (1.0,):
            return f"found temperatures {list(codec.temperatures)}, expected [1]: the mass that is left untold is known there"
        return None


@dataclass(frozen=True)
class Told:
    """What it said of n tokens of a document: its k most probable tokens `ids [n, k]`, most probable first, their `log_probs`, the log of
    the mass of the others `[n]`, and the log-probability of the token that is there, `observed [n]`."""

    ids: np.ndarray
    log_probs: np.ndarray
    log_tail: np.ndarray
    observed: np.ndarray


@dataclass(frozen=True)
class Document:
    """A document of a batch, and the offsets of its scored tokens."""

    ids: np.ndarray
    wanted: np.ndarray

    @property
    def key(self) -> tuple[bytes, bytes]:
        return self.ids.tobytes(), self.wanted.tobytes()


class ToldScorer:
    """Base of what their specs open."""

    num_layers, width = 0, 0

    def __init__(self, name: str, k: int, vocabulary: int, device: str) -> None:
        self.name, self.vocabulary, self.needs = name, vocabulary, Needs(output=True)
        self.k, self._device = k, device

    @property
    def head(self) -> Head:
        """What maps the rows of `told_rows` to logits: codecs take a teacher so."""
        from limbeck.store.told import ToldHead

        return ToldHead.of(self.vocabulary, self._device)

    @property
    def note(self) -> str:
        """What a progress should show besides."""
        return ""

    def asking(self, needs: Needs) -> Self:
        """It has nothing to leave out."""
        return self

    def score(self, batch: Batch) -> Signal:
        raise NotImplementedError

    def require(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that this teacher cannot score."""

    def arranged(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """Samples in the order in which a capture had best ask for them."""
        return list(wanted)

    def verify_packing(self) -> None:
        """Documents are asked for one by one, in whatever row they stand."""

    def expect(self, batches: Sequence[Batch]) -> None:
        """Nothing to prepare."""

    def signal(self, batch: Batch, told: Iterable[Told]) -> Signal:
        """What was told of the documents of a batch, in their order."""
        import torch

        from limbeck.batch import Signal, TopK

        floats = np.zeros(0, np.float32)
        empty = (np.zeros((0, self.k), np.int64), np.zeros((0, self.k), np.float32), floats, floats)
        columns = [(one.ids, one.log_probs, one.log_tail, one.observed) for one in told]
        ids, log_probs, log_tail, observed = (torch.from_numpy(np.concatenate(each)) for each in zip(empty, *columns, strict=True))
        return Signal(sparse=TopK(ids, log_probs, {1.0: log_tail}), observed=observed).to(batch.input_ids.device)


def documents(batch: Batch) -> list[Document]:
    """Those with scored tokens, in the order of these."""
    numbers, ids, offsets = (values.flatten().cpu().numpy() for values in (batch.document_ids, batch.input_ids, batch.offsets))
    scored = batch.scored.cpu().numpy()
    of_scored = numbers[scored]
    each = of_scored[np.flatnonzero(np.diff(of_scored, prepend=-1))].tolist()
    return [Document(ids[numbers == number], offsets[scored[of_scored == number]]) for number in each]
