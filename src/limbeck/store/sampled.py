"""Sampled: a capture that keeps tokens drawn from the teacher. What it loses is noise without bias, which averages out over a training.

Random sampling of Sparse Logit Sampling (RS-KD, 2503.16870) is `k: 0`; there some 12 different tokens of each distribution train as well as
all of them. Draws are systematic: of a token with probability p come `draws` * p of them, rounded up or down by chance, which is unbiased
and varies less than independent draws. Everything that is rounded is rounded by chance, for the same reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from limbeck.store import entropy
from limbeck.store.codec import Codec, Support
from limbeck.store.top_k import LOWEST, logit_blocks, smooth

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Signal
    from limbeck.objectives.head import Head

LARGEST_ENTROPY = 16.0
"""Of a distribution over nine million tokens, in nats."""


class SampledCodec(Codec):
    """Tokens drawn from each distribution and how often, for losses that are linear in the teacher's probabilities: forward KL at T = 1."""

    type: Literal["sampled"] = "sampled"

    tuned: ClassVar[str] = "draws"
    ladder: ClassVar[tuple[float, ...]] = tuple(round(2 ** (i / 2)) for i in range(2, 23))

    draws: int = Field(50, gt=0, lt=2**15)
    """Each draw stands for a mass of 1 / `draws`. Fewer different tokens are drawn: few where the teacher is sure."""
    k: int = Field(0, ge=0)
    """The most probable tokens that are kept as they are; draws then come from the others, and are as many as their mass says."""
    step: float = Field(1 / 16, gt=0, le=1)
    """Log-probabilities of those are rounded to multiples of it, up or down by chance, so that no probability is wrong on average."""

    @property
    def support(self) -> Support:
        return "sampled"

    @property
    def serves(self) -> tuple[float, ...]:
        return (1.0,)

    def calibrate(self, head: Head, outputs: Iterable[Tensor], others: Iterable[Tensor] = ()) -> dict[str, Tensor]:
        import torch

        vocabulary = head.weight.shape[0]
        k, levels = min(self.k, vocabulary), self._levels
        gaps, ids = torch.zeros(k, levels + 1, dtype=torch.int64), torch.zeros(2, vocabulary, dtype=torch.int64)
        found = {
            "numbers": torch.zeros(self.draws + 2, dtype=torch.int64),
            "counts": torch.zeros(self.draws + 2, dtype=torch.int64),
            "entropies": torch.zeros(int(LARGEST_ENTROPY / self.step) + 2, dtype=torch.int64),
        }
        documents = list(outputs)
        kept = self._draw(head, torch.cat([torch.zeros(0, head.weight.shape[1]), *documents]), list(map(len, documents)))
        for name, total in found.items():
            total += torch.from_numpy(np.bincount(getattr(kept, name), minlength=len(total)))
        for rank in range(k):
            gaps[rank] += torch.from_numpy(np.bincount(kept.gaps[:, rank], minlength=levels + 1))
        for total, symbols in zip(ids, (kept.top, kept.ids), strict=True):
            total += torch.from_numpy(np.bincount(symbols.ravel(), minlength=vocabulary))
        model = {name: smooth(total[None])[0] for name, total in found.items()} | {"ids": 4 * ids + 1, "gaps": smooth(gaps)}
        return {name: value.clamp(max=2**31 - 1).int() for name, value in model.items()}

    def encode(self, head: Head, model: Mapping[str, Tensor], output: Tensor, lengths: Sequence[int]) -> list[bytes]:
        tables, blobs = _Tables(model), []
        for num, kept in zip(lengths, self._draw(head, output, lengths).split(lengths), strict=True):
            if not num:
                blobs.append(b"")
                continue
            parts = [(kept.numbers, tables.numbers), (kept.ids, tables.drawn), (kept.counts, tables.counts)]
            parts += [(kept.entropies, tables.entropies), (kept.top.ravel(), tables.top)]
            parts += [(kept.gaps[:, rank], table) for rank, table in enumerate(tables.gaps)]
            blobs.append(np.array([num], "<u4").tobytes() + entropy.write(parts))
        return blobs

    def decode(self, head: Head | None, model: Mapping[str, Tensor], blobs: Sequence[bytes], rows: Sequence[np.ndarray]) -> Signal:
        import torch

        from limbeck.batch import Draws, Signal

        tables = _Tables(model)
        parts = [self._read(tables, blob, wanted) for blob, wanted in zip(blobs, rows, strict=True) if len(wanted)]
        width = max((ids.shape[1] for ids, _, _ in parts), default=0)
        ids, weights = (
            np.concatenate([np.zeros((0, width), kind), *(np.pad(part[i], ((0, 0), (0, width - part[i].shape[1]))) for part in parts)])
            for i, kind in enumerate((np.int64, np.float32))
        )
        negative = np.concatenate([np.zeros(0, np.float32), *(part[2] for part in parts)])
        return Signal(sparse=Draws(torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(negative)))

    def _read(self, tables: _Tables, blob: bytes, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        num, reader, k = int(np.frombuffer(blob[:4], "<u4")[0]), entropy.Reader(blob[4:]), len(tables.gaps)
        numbers = reader.take(tables.numbers, num)
        mask = np.arange(numbers.max()) < numbers[:, None]
        ids, weights = np.zeros(mask.shape, np.int64), np.zeros(mask.shape, np.float32)
        ids[mask] = reader.take(tables.drawn, int(numbers.sum()))
        weights[mask] = reader.take(tables.counts, int(numbers.sum())) / self.draws
        negative = -reader.take(tables.entropies, num) * self.step
        top = reader.take(tables.top, num * k).reshape(num, k)
        levels = np.stack([reader.take(table, num) - 1 for table in tables.gaps], 1).cumsum(1) if k else np.zeros((num, 0))
        ids, weights = np.concatenate([top, ids], 1), np.concatenate([np.exp(-levels * self.step), weights], 1)
        return ids[wanted], weights[wanted].astype(np.float32), negative[wanted].astype(np.float32)

    @property
    def _levels(self) -> int:
        return int(-LOWEST / self.step) + 1

    def _draw(self, head: Head, rows: Tensor, lengths: Sequence[int]) -> _Kept:
        """The chance of a sample is that of its rows' own bytes: nothing that stands beside them changes what is drawn."""
        import torch

        k, parts = min(self.k, head.weight.shape[0]), []
        chances = [_chance_of(part, 2 + k) for part in rows.split(list(lengths))]
        waiting = torch.from_numpy(np.concatenate([np.zeros((0, 2 + k)), *chances])).to(head.weight.device)
        for logits in logit_blocks(head, rows):
            luck, waiting = waiting[: len(logits)], waiting[len(logits) :]
            log_probs = torch.log_softmax(logits, -1)
            probs = log_probs.exp()
            negative = -(probs * log_probs.clamp(min=2 * LOWEST)).sum(-1)
            top, ids = log_probs.topk(k, dim=-1)
            levels = self._round(top, luck[:, 2:])
            points = (probs.scatter(-1, ids, 0.0).cumsum(-1, dtype=torch.float64) * self.draws + luck[:, :1]).floor().long()
            counts = torch.diff(points, dim=-1, prepend=torch.zeros_like(points[:, :1]))
            drawn = counts.nonzero()
            gaps = torch.diff(levels, dim=1, prepend=torch.zeros_like(levels[:, :1])) + 1
            entropies = (negative / self.step + luck[:, 1]).floor().long()
            numbers = torch.bincount(drawn[:, 0], minlength=len(logits))
            found = (numbers, drawn[:, 1], counts[drawn[:, 0], drawn[:, 1]], entropies, ids, gaps)
            parts.append([each.cpu().numpy() for each in found])
        if not parts:
            none = np.zeros(0, np.int64)
            return _Kept(none, none, none, none, np.zeros((0, k), np.int64), np.zeros((0, k), np.int64))
        return _Kept(*(np.concatenate(each) for each in zip(*parts, strict=True)))

    def _round(self, log_probs: Tensor, luck: Tensor) -> Tensor:
        """Whole steps below 0 such that the expected probability is the probability."""
        exact = (-log_probs.double().clamp(min=LOWEST, max=0.0) / self.step).clamp(max=self._levels - 1)
        above, below = exact.floor(), exact.ceil()  # of probability
        high, low, probs = ((-each * self.step).exp() for each in (above, below, exact))
        share = (high - probs) / (high - low).clamp(min=1e-300)
        return (above + (luck < share) * (below - above)).long()


@dataclass(frozen=True)
class _Kept:
    """What is kept of n rows: how many different tokens were drawn of each; of all draws one after the other, their ids and how often;
    entropies in whole steps; `[n, k]` the most probable tokens and the differences of their whole steps, plus 1."""

    numbers: np.ndarray
    ids: np.ndarray
    counts: np.ndarray
    entropies: np.ndarray
    top: np.ndarray
    gaps: np.ndarray

    def split(self, lengths: Sequence[int]) -> list[_Kept]:
        """The same of each sample."""
        rows = np.cumsum([0, *lengths])
        drawn = np.append(0, self.numbers.cumsum())[rows]
        of_rows, of_draws = ([slice(*pair) for pair in pairwise(ends)] for ends in (rows, drawn))
        return [
            _Kept(self.numbers[row], self.ids[draw], self.counts[draw], self.entropies[row], self.top[row], self.gaps[row])
            for row, draw in zip(of_rows, of_draws, strict=True)
        ]


def _chance_of(rows: Tensor, width: int) -> np.ndarray:
    seed = hashlib.blake2b(rows.detach().float().cpu().contiguous().numpy().tobytes(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(seed, "little"))).random((len(rows), width))


class _Tables:
    """The coder's tables of a capture."""

    def __init__(self, model: Mapping[str, Tensor]) -> None:
        def of(name: str) -> list[Any]:
            return entropy.tables(model[name].numpy())

        (self.numbers,), (self.counts,), (self.entropies,) = of("numbers"), of("counts"), of("entropies")
        (self.top, self.drawn), self.gaps = of("ids"), of("gaps") if len(model["gaps"]) else []
