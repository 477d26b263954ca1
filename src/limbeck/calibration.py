"""Calibration: what a capture runs its teacher on before it writes, to fit codecs on some documents and to measure on others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.batch import Batch, Signal, TopK
from limbeck.objectives.base import Needs
from limbeck.objectives.head import Head
from limbeck.store.hidden import HiddenCodec
from limbeck.store.plan import Wanted
from limbeck.store.told import told_rows
from limbeck.student import Student
from limbeck.teachers.model import ModelScorer, observed_log_probs
from limbeck.teachers.told import ToldScorer
from limbeck.tokens.pad import pad
from limbeck.tokens.sample import Sample


def score(scorer: ModelScorer | ToldScorer, part: Sequence[Wanted], device: str) -> tuple[Batch, Signal]:
    """What the teacher says of a batch: of all its samples what is wanted of any."""
    needs = Needs(output=True)
    for one in part:
        needs |= one.needs
    batch = pad([one.sample for one in part], 0).to(device)
    signal = scorer.asking(needs).score(batch)
    if isinstance(signal.sparse, TopK):
        return batch, replace(signal, output=told_rows(signal.sparse), sparse=None)
    assert signal.output is not None
    return batch, replace(signal, observed=observed_log_probs(scorer.head, signal.output, batch.targets))


def calibration_split(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """Up to `count` samples to fit codecs on, and as many others to measure them on: a choice that no order of the data changes."""
    unique = {sample.sample_id: sample for sample in samples}
    ordered = [unique[sample_id] for sample_id in sorted(unique)]  # hashes: as good as shuffled
    count = min(count, max(len(ordered) // 2, 1))
    return ordered[:count], ordered[count : 2 * count]


class Signals:
    """What the teacher says of some samples. It runs when that is first asked for; a codec that fits nothing costs nothing."""

    def __init__(self, scorer: ModelScorer | ToldScorer, samples: Sequence[Sample], batch_size: int, device: str) -> None:
        self._scorer, self.samples, self._batch_size, self._device = scorer, samples, batch_size, device

    @cached_property
    def all(self) -> list[tuple[Batch, Signal]]:
        wanted = [Wanted(sample, self._scorer.needs) for sample in self.samples]
        starts = range(0, len(wanted), self._batch_size)
        return [score(self._scorer, wanted[start : start + self._batch_size], self._device) for start in starts]

    @property
    def outputs(self) -> Iterable[Tensor]:
        """Last hidden states of the scored tokens, a document at a time."""
        return _Lazy(self, lambda batch, signal: _by_document(batch, signal.output))

    def hidden(self, layer: int) -> Iterable[Tensor]:
        return _Lazy(self, lambda batch, signal: [signal.hidden[layer].cpu()])

    def of_student(self, spec: Student) -> tuple[Head, list[Tensor]]:
        """An untrained student's head, and its last hidden states of the same tokens."""
        from limbeck.models import forward, head
        from limbeck.student import build

        model, found = build(spec, self._device), []
        with torch.no_grad():
            for batch, _ in self.all:
                rows = forward(model, batch.input_ids, batch.position_ids)[0].flatten(0, 1)[batch.scored]
                found += _by_document(batch, rows)
        return head(model).cut(self._scorer.vocabulary), found


class _Lazy:
    """A part of every signal; may be walked more than once."""

    def __init__(self, signals: Signals, parts: Callable[[Batch, Signal], Sequence[Any]]) -> None:
        self._signals, self._parts = signals, parts

    def __iter__(self) -> Iterator[Tensor]:
        for batch, signal in self._signals.all:
            yield from self._parts(batch, signal)


def _by_document(batch: Batch, rows: Any) -> list[Tensor]:
    """Rows of scored tokens, of a batch with a sample per row."""
    counts = torch.bincount(batch.scored // batch.input_ids.shape[1], minlength=len(batch.input_ids))
    return list(rows.split(counts.tolist()))


def hidden_error(codec: HiddenCodec, model: dict[str, Tensor], states: Iterable[Tensor]) -> float:
    """Mean over tokens of |states - kept states| / |states|."""
    shares = []
    for rows in states:
        kept = codec.decode(model, codec.encode(model, rows), np.arange(len(rows)), rows.shape[1])
        shares.append((rows.float() - kept.float()).norm(dim=1) / rows.float().norm(dim=1).clamp(min=1e-30))
    return float(torch.cat(shares).mean())
