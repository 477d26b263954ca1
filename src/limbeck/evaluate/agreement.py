"""Agreement: how near a model is to its teacher on held-out text, token by token.

It says how well distillation did what it optimises, and so never which method is better: for that take a task that neither arm was
trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from limbeck.errors import ModelError
from limbeck.evaluate.base import Item, Metric, Subject, ratio
from limbeck.evaluate.heldout import HeldOut, item_id
from limbeck.objectives.base import Needs
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Batch, Signal
    from limbeck.objectives.head import Head

NUM_BINS = 10
ROWS_PER_CHUNK = 128
"""Scored tokens whose logits are alive at once: never the `[N, V]` of a batch."""
TOKEN_METRICS = ("kl", "top1", "nll", "teacher_nll")


class Agreement(HeldOut):
    """Means over the scored tokens of held-out conversations, with standard errors over conversations.

    `kl`: KL(teacher || model), nats per token. `top1`: share of tokens at which both find the same token most likely. `nll` and
    `teacher_nll`: negative log-likelihood of the data. `ece`: expected calibration error of the model's most likely token against the
    data's, over 10 bins of equal width. From a capture that loses something, the teacher is what comes back; its certificate says how far
    that is from the teacher.
    """

    type: Literal["agreement"] = "agreement"

    version: ClassVar[int] = 1
    needs_teacher: ClassVar[bool] = True
    higher_is_better: ClassVar[dict[str, bool]] = {"kl": False, "top1": True, "nll": False, "teacher_nll": False, "ece": False}
    ceilings: ClassVar[dict[str, float]] = {"kl": 0.0, "top1": 1.0, "ece": 0.0}

    def samples(self, tokenizer: Any) -> list[Sample]:
        return self.rendered(tokenizer)

    def run(self, subject: Subject) -> Iterator[Item]:
        from limbeck.models import head

        assert subject.teacher is not None
        samples = self.rendered(subject.tokenizer)
        scorer = subject.teacher.open(subject.tokenizer, Needs(output=True), subject.device)
        scorer.require(samples)
        student_head = head(subject.model).cut(scorer.vocabulary)

        def grade(batch: Batch, hidden: Tensor) -> list[Item]:
            if batch.targets.numel() and int(batch.targets.max()) >= scorer.vocabulary:
                raise ModelError(f"{self.key}: token {int(batch.targets.max())} is none of the {scorer.vocabulary} that the teacher has")
            return _items(batch, _compare(hidden, student_head, scorer.score(batch), batch.targets))

        yield from self.graded(samples, subject, grade)

    def metrics(self, items: Sequence[Item]) -> dict[str, Metric]:
        means = {name: ratio(items, name, self.higher_is_better[name], ceiling=self.ceilings.get(name)) for name in TOKEN_METRICS}
        return means | {"ece": calibration_error(items)}


def _compare(hidden: Tensor, student_head: Head, signal: Signal, targets: Tensor) -> Tensor:
    """`[6, N]`: the token metrics, the model's confidence in its most likely token, and whether the data has that token.

    A top-k teacher is compared on its tokens and one bin for the rest, and draws of one give an estimate of KL; what it says of the data's
    tokens, its capture has kept.
    """
    import torch

    from limbeck.objectives.divergences import forward_kl
    from limbeck.objectives.head import target_of
    from limbeck.objectives.support import Bins, Dense, DenseTarget

    parts = [hidden.new_zeros(6, 0, dtype=torch.float32)]
    for start in range(0, targets.numel(), ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        teacher = target_of(signal, rows)
        assert teacher is not None
        log_p, student = teacher.log_probs(), Dense(student_head(hidden[rows]))
        bins, log_q, wanted = Bins(teacher, student), student.log_probs(), targets[rows, None]
        confidence, choice = log_q.max(-1)
        if isinstance(teacher, DenseTarget):
            best, teacher_nll = log_p.argmax(-1), -log_p.gather(-1, wanted).squeeze(-1)
        else:
            assert signal.observed is not None
            best = teacher.ids.gather(-1, log_p[:, : teacher.ids.shape[1]].argmax(-1, keepdim=True)).squeeze(-1)
            teacher_nll = -signal.observed[rows]
        columns = [
            forward_kl(bins.log_p, bins.log_q) + bins.constant,
            choice == best,
            -log_q.gather(-1, wanted).squeeze(-1),
            teacher_nll,
            confidence.exp(),
            choice == targets[rows],
        ]
        parts.append(torch.stack([column.float() for column in columns]))
    return torch.cat(parts, dim=1)


def _items(batch: Batch, tokens: Tensor) -> list[Item]:
    """Sums per conversation, in float64: a mean over many tokens must not depend on how they were batched."""
    import torch

    sample_ids = batch.sample_ids[:, 0].tolist()
    row = (batch.scored // batch.input_ids.shape[1]).cpu()
    values = tokens.cpu().double()
    bins = (values[4] * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    flat, size = row * NUM_BINS + bins, len(sample_ids) * NUM_BINS

    def per_bin(weights: Tensor | None) -> list[list[float]]:
        counted = torch.bincount(flat, weights, minlength=size)
        return counted.reshape(-1, NUM_BINS).tolist()  # type: ignore[no-any-return]

    counts, confidence, correct = per_bin(None), per_bin(values[4]), per_bin(values[5])
    sums = torch.zeros(len(TOKEN_METRICS), len(sample_ids), dtype=torch.float64).index_add_(1, row, values[: len(TOKEN_METRICS)])
    return [
        Item(
            id=item_id(sample_id),
            sums=dict(zip(TOKEN_METRICS, sums[:, i].tolist(), strict=True)),
            counts=dict.fromkeys(TOKEN_METRICS, float(sum(counts[i]))),
            detail={"calibration": {"tokens": counts[i], "confidence": confidence[i], "correct": correct[i]}},
        )
        for i, sample_id in enumerate(sample_ids)
    ]


def calibration_error(items: Sequence[Item]) -> Metric:
    """ECE = sum over bins of |confidence - correct| / tokens, with its jackknife standard error over items.

    Not a ratio of sums per item: within a bin, one conversation's overconfidence cancels another's doubt.
    """
    import numpy as np

    if not items:
        return Metric(None, None, 0, higher_is_better=False, ceiling=0.0)
    bins = [item.detail["calibration"] for item in items]
    gaps = np.array([np.subtract(each["confidence"], each["correct"]) for each in bins])  # [items, bins]
    counts = np.array([sum(each["tokens"]) for each in bins], dtype=np.float64)
    value = float(np.abs(gaps.sum(0)).sum() / counts.sum())
    n = len(items)
    if n < 2:
        return Metric(value, None, n, higher_is_better=False, ceiling=0.0)
    without = np.abs(gaps.sum(0) - gaps).sum(1) / (counts.sum() - counts)
    stderr = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    return Metric(value, stderr, n, higher_is_better=False, ceiling=0.0)
