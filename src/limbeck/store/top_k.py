"""Top k: a capture that keeps the teacher's most probable tokens, the mass outside of them, and a prior by which that mass is spread.

Tokens stand in order of probability. Ids are coded by how often each was among the first k of the calibration documents, log-probabilities
as differences of whole steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from limbeck.objectives.base import COLDEST, HOTTEST
from limbeck.store import entropy
from limbeck.store.codec import Codec, Support

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Signal
    from limbeck.objectives.head import Head

LOWEST = -32.0
"""A log-probability below it is kept as this: 1e-14."""
_ROWS = 128
"""Rows whose logits live at once, and what their arithmetic depends on."""


class TopTokens(Codec):
    """What `topk` and `nucleus` share."""

    k: int = Field(64, gt=0)
    """Tokens that are kept of each distribution, at most."""
    step: float = Field(1 / 16, gt=0, le=1)
    """Log-probabilities are rounded to multiples of it, and all of a token then shifted so that its probabilities sum to 1: wrong by a step
    at most, down to -32."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures of losses that the capture can serve: the mass outside of the kept tokens is kept for each."""
    prior: bool = True
    """Whether that mass is spread over the other tokens as it was on average on the calibration documents. The teacher is dense then;
    without it the mass is one bin, and losses compare it with the student's."""

    @field_validator("temperatures")
    @classmethod
    def _has_one(cls, found: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in found or min(found) < COLDEST or max(found) > HOTTEST or len(set(found)) < len(found):
            raise ValueError(f"found {list(found)}, expected different temperatures from {COLDEST:g} to {HOTTEST:g}, and 1 among them")
        return found

    @property
    def support(self) -> Support:
        return "dense" if self.prior else "top_k"

    @property
    def _levels(self) -> int:
        return int(-LOWEST / self.step) + 1

    def count(self, log_probs: Tensor) -> Tensor:
        """How many of the tokens `[n, k]`, most probable first, are kept of each row."""
        raise NotImplementedError

    def calibrate(self, head: Head, outputs: Iterable[Tensor], others: Iterable[Tensor] = ()) -> dict[str, Tensor]:
        import torch

        vocabulary, levels = head.weight.shape[0], self._levels
        k = min(self.k, vocabulary)
        ids, gaps = torch.zeros(vocabulary, dtype=torch.int64), torch.zeros(k, levels, dtype=torch.int64)
        tails, counts = torch.zeros(len(self.temperatures), levels, dtype=torch.int64), torch.zeros(k + 1, dtype=torch.int64)
        outside = torch.zeros(len(self.temperatures), vocabulary, dtype=torch.float64)
        documents = list(outputs)
        for logits in logit_blocks(head, torch.cat(documents)) if documents else ():
            kept = self._kept(logits)
            mask = torch.arange(k) < kept.counts[:, None]
            ids += torch.bincount(kept.ids[mask], minlength=vocabulary)
            counts += torch.bincount(kept.counts, minlength=k + 1)
            for rank in range(k):
                gaps[rank] += torch.bincount(kept.gaps[mask[:, rank], rank], minlength=levels)
            for i, temperature in enumerate(self.temperatures):
                tails[i] += torch.bincount(kept.tails[:, i], minlength=levels)
                if self.prior:
                    probs = torch.softmax(logits / temperature, -1)
                    # a padded id is one of the row's own
                    outside[i] += probs.scatter(-1, kept.padded, 0.0).double().sum(0).cpu()
        found = {"ids": 4 * ids + 1, "gaps": smooth(gaps), "tails": smooth(tails), "counts": 16 * counts + 1}
        model = {name: value.clamp(max=2**31 - 1).int() for name, value in found.items()}
        if self.prior:
            # a hundredth goes to all tokens alike: those that never were outside of the k may be, elsewhere
            share = outside / outside.sum(1, keepdim=True).clamp(min=1e-30)
            model["log_priors"] = (0.99 * share + 0.01 / vocabulary).log().float()
        return model

    def encode(self, head: Head, model: Mapping[str, Tensor], output: Tensor, lengths: Sequence[int]) -> list[bytes]:
        import torch

        coder, blobs = _Tables(model), []
        for num, kept in zip(lengths, _join([self._kept(logits) for logits in logit_blocks(head, output)], lengths), strict=True):
            if not num:
                blobs.append(b"")
                continue
            mask = torch.arange(kept.ids.shape[1]) < kept.counts[:, None]
            parts = [(kept.counts.numpy(), coder.counts), (kept.ids[mask].numpy(), coder.ids)]
            parts += [(kept.gaps[mask[:, rank], rank].numpy(), table) for rank, table in enumerate(coder.gaps)]
            parts += [(kept.tails[:, i].numpy(), table) for i, table in enumerate(coder.tails)]
            blobs.append(np.array([num], "<u4").tobytes() + entropy.write(parts))
        return blobs

    def decode(self, head: Head | None, model: Mapping[str, Tensor], blobs: Sequence[bytes], rows: Sequence[np.ndarray]) -> Signal:
        import torch

        from limbeck.batch import Signal, TopK

        coder, width = _Tables(model), len(model["gaps"])
        parts = [self._read(coder, blob, width, wanted) for blob, wanted in zip(blobs, rows, strict=True) if len(wanted)]
        empty = (np.zeros((0, width), np.int64), np.zeros((0, width), np.float32), np.zeros((0, len(self.temperatures)), np.float32))
        ids, log_probs, log_tails = (torch.from_numpy(np.concatenate(each)) for each in zip(empty, *parts, strict=True))
        priors = dict(zip(self.temperatures, model["log_priors"], strict=True)) if self.prior else None
        longest = int(torch.isfinite(log_probs).sum(1).max()) if len(ids) else width
        tails = {temperature: log_tails[:, i].contiguous() for i, temperature in enumerate(self.temperatures)}
        return Signal(sparse=TopK(ids[:, :longest].contiguous(), log_probs[:, :longest].contiguous(), tails, priors))

    def _read(self, coder: _Tables, blob: bytes, width: int, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        num = int(np.frombuffer(blob[:4], "<u4")[0])
        reader = entropy.Reader(blob[4:])
        counts = reader.take(coder.counts, num)
        mask = np.arange(width) < counts[:, None]
        ids, gaps = np.zeros((num, width), np.int64), np.zeros((num, width), np.int64)
        ids[mask] = reader.take(coder.ids, int(mask.sum()))
        for rank, table in enumerate(coder.gaps):
            gaps[mask[:, rank], rank] = reader.take(table, int(mask[:, rank].sum()))
        tails = np.stack([reader.take(table, num) for table in coder.tails], 1)
        ids = np.where(mask, ids, ids[:, :1])
        levels = gaps.cumsum(1)
        log_probs, log_tails = np.where(mask, -levels * self.step, -np.inf), -tails * self.step
        at_one = self.temperatures.index(1.0)
        # rounding took the kept tokens and the tail past 1, or short of it
        total = np.log(np.exp(log_probs).sum(1) + np.exp(log_tails[:, at_one]))
        log_probs -= total[:, None]
        log_tails[:, at_one] -= total
        return ids[wanted], log_probs[wanted].astype(np.float32), log_tails[wanted].astype(np.float32)

    def _kept(self, logits: Tensor) -> _Kept:
        import torch

        log_probs = torch.log_softmax(logits, -1)
        top, ids = log_probs.topk(min(self.k, logits.shape[1]), dim=-1)
        counts = self.count(top)
        padded = torch.where(torch.arange(top.shape[1], device=top.device) < counts[:, None], ids, ids[:, :1])
        levels = self._whole_steps(top)
        tails = []
        for temperature in self.temperatures:
            at = log_probs if temperature == 1.0 else torch.log_softmax(logits / temperature, -1)
            tails.append(self._whole_steps(at.scatter(-1, padded, -torch.inf).logsumexp(-1)))
        gaps = torch.diff(levels, dim=1, prepend=torch.zeros_like(levels[:, :1]))
        return _Kept(ids.cpu(), padded, gaps.cpu(), counts.cpu(), torch.stack(tails, 1).cpu())

    def _whole_steps(self, log_probs: Tensor) -> Tensor:
        return (-log_probs.clamp(min=LOWEST, max=0.0) / self.step).round().long().clamp(max=self._levels - 1)


class TopKCodec(TopTokens):
    """The k most probable tokens of each distribution."""

    type: Literal["topk"] = "topk"

    tuned: ClassVar[str] = "k"
    ladder: ClassVar[tuple[float, ...]] = tuple(sorted({round(2 ** (i / 4)) for i in range(41)}))

    def count(self, log_probs: Tensor) -> Tensor:
        import torch

        return torch.full((len(log_probs),), log_probs.shape[1], device=log_probs.device)


class Nucleus(TopTokens):
    """As few of the most probable tokens as hold a mass: many where the teacher is unsure, one where it is sure."""

    type: Literal["nucleus"] = "nucleus"
    mass: float = Field(0.95, gt=0, lt=1)
    """The mass that is held, unless `k` tokens hold less."""

    tuned: ClassVar[str] = "mass"
    ladder: ClassVar[tuple[float, ...]] = tuple(round(1 - 2 ** (-i / 4), 4) for i in range(1, 49))

    def count(self, log_probs: Tensor) -> Tensor:
        before = log_probs.exp().cumsum(1) - log_probs.exp()  # mass of the more probable ones
        return (before < self.mass).sum(1)


class _Kept:
    """What is kept of a block of rows, in whole steps."""

    def __init__(self, ids: Tensor, padded: Tensor, gaps: Tensor, counts: Tensor, tails: Tensor) -> None:
        self.ids, self.padded, self.gaps, self.counts, self.tails = ids, padded, gaps, counts, tails


class _Tables:
    """The coder's tables of a capture."""

    def __init__(self, model: Mapping[str, Tensor]) -> None:
        def of(name: str) -> list[Any]:
            return entropy.tables(model[name].numpy())

        (self.ids,), (self.counts,) = of("ids"), of("counts")
        self.gaps, self.tails = of("gaps"), of("tails")


def logit_blocks(head: Head, rows: Tensor) -> Iterator[Tensor]:
    """Logits of `_ROWS` rows at a time, of any number of samples. They are made from as many rows always, the last filled up: where a row
    stands changes nothing, so a sample's bytes do not depend on its neighbours."""
    import torch

    with torch.no_grad():
        for part in rows.to(head.weight.device).split(_ROWS):
            filled = torch.nn.functional.pad(part, (0, 0, 0, _ROWS - len(part)))
            yield head(filled)[: len(part)]


def _join(parts: Sequence[_Kept], lengths: Sequence[int]) -> list[_Kept]:
    """What is kept of each sample, from what is kept of blocks of rows."""
    import torch

    names = ("ids", "padded", "gaps", "counts", "tails")
    if not parts:
        return [_Kept(*(torch.zeros(0, 0, dtype=torch.int64) for _ in names)) for _ in lengths]
    columns = [torch.cat([getattr(part, name) for part in parts]).split(list(lengths)) for name in names]
    return [_Kept(*its) for its in zip(*columns, strict=True)]


def smooth(counts: Tensor) -> Tensor:
    """Counts `[tables, symbols]` with some of the neighbours', and a hundredth for those that were never seen."""
    import torch

    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=torch.float64)[None, None]
    blurred = torch.nn.functional.conv1d(counts.double()[:, None], kernel, padding=2)[:, 0]
    mean = counts.sum(1, keepdim=True).double() / counts.shape[1]
    return (8 * counts.double() + blurred + 0.16 * mean + 1).round().long()
