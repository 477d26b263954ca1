"""Certificate: what a codec loses, measured on documents that it was not fitted on, by how unsure the teacher is; and what that makes of
a student's first gradient, where there is a student."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.store.codec import Codec

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Signal
    from limbeck.objectives.head import Head
    from limbeck.objectives.support import DenseTarget, Target

BUCKETS = {"sure": 0.5, "between": 2.0, "unsure": float("inf")}
"""By the entropy of the teacher's distribution in nats, each up to this."""
MEASURES = ("kl", "l1", "top1", "mass")
OF_GRADIENTS = ("gradient_angle", "gradient_ratio", "gradient_error")
_ROWS, _AT_ONCE = 64, 1024
"""Tokens whose logits live at once, and after which documents are no longer gathered."""
_NO_GRADIENT = 1e-6
"""A student whose gradient is shorter already says what its teacher does: there is no direction to be wrong in."""


def certify(
    codec: Codec,
    head: Head,
    model: Mapping[str, Tensor],
    outputs: Iterable[Tensor],
    student: tuple[Head, Iterable[Tensor]] | None = None,
) -> dict[str, Any] | None:
    """Means over the scored tokens of `outputs`, a document each, and over those of each bucket: `kl`, KL(teacher || what comes back) in
    nats; `l1`, the sum of absolute differences; `top1`, how often the most probable token is the same; `mass`, the teacher's mass on tokens
    kept one by one. A tail without a prior counts as spread evenly; draws have no `kl`. `bytes_per_token` are those of the blobs; the head
    and what was fitted lie beside them, once.

    With a student's head and its last hidden states of the same tokens also means of what is true of d(forward KL)/d(its logits), against
    the one that the teacher itself gives: `gradient_angle` in degrees, `gradient_ratio` of the norms, `gradient_error` |difference| / |true
    one|; here a tail without a prior is one bin, as in training. None where there are no tokens."""
    import torch

    parts, size, learned = [], 0, iter(student[1]) if student else None
    for documents in _groups(outputs):
        lengths, rows = [len(part) for part in documents], torch.cat(documents)
        blobs = codec.encode(head, model, rows, lengths)
        size += sum(map(len, blobs))
        signal = codec.decode(head, model, blobs, [np.arange(length) for length in lengths])
        states = torch.cat(list(islice(learned, len(lengths)))) if learned else None
        parts.append(measure(head, rows, signal, (student[0], states) if student and states is not None else None))
    return means(parts) | {"bytes_per_token": size / sum(map(len, parts))} if sum(map(len, parts)) else None


def in_words(measured: Mapping[str, Any]) -> str:
    """The distance of what comes back from the teacher."""
    kl = f"KL {measured['kl']:.4f}" if "kl" in measured else "draws without bias"
    return f"{kl}, L1 {measured['l1']:.3f}"


def _groups(outputs: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Documents that are encoded and measured at once."""
    group: list[Tensor] = []
    for output in outputs:
        group.append(output)
        if sum(map(len, group)) >= _AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def means(parts: Sequence[Tensor]) -> dict[str, Any]:
    """The means of what `measure` gave, of all tokens and by bucket."""
    import torch

    tokens = torch.cat(list(parts))
    low, buckets = 0.0, {}
    for name, high in BUCKETS.items():
        inside = tokens[(tokens[:, 0] >= low) & (tokens[:, 0] < high)]
        buckets[name] = {"num_scored": len(inside), **(_means(inside) if len(inside) else {})}
        low = high
    return {"num_scored": len(tokens), **_means(tokens), "by_entropy": buckets}


def measure(head: Head, rows: Tensor, signal: Signal, student: tuple[Head, Tensor] | None = None) -> Tensor:
    """`[n, 5]`, or `[n, 8]` with a student: the teacher's entropy, `MEASURES` and `OF_GRADIENTS` of every token."""
    import torch

    from limbeck.objectives.head import target_of
    from limbeck.objectives.support import DenseTarget

    device, parts = head.weight.device, []
    signal = signal.to(device)
    with torch.no_grad():
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            truth = DenseTarget(head(rows[part].to(device)))
            columns = _of_outputs(truth, signal, part)
            if student:
                teacher = target_of(signal, part)
                assert teacher is not None
                columns += _of_gradients(student[0](student[1][part].to(device)), truth, teacher)
            parts.append(torch.stack([column.double().cpu() for column in columns], 1))
    return torch.cat(parts) if parts else torch.zeros(0, 1)


def _of_outputs(truth: DenseTarget, signal: Signal, part: slice) -> list[Tensor]:
    import torch

    from limbeck.batch import Draws
    from limbeck.objectives.head import target_of

    exact = truth.log_probs()
    probs, mass = exact.exp(), torch.ones(len(exact), device=exact.device)
    if isinstance(signal.sparse, Draws):
        draws = signal.sparse[part]
        mass = (probs.gather(-1, draws.ids) * (draws.weights > 0)).sum(-1)
        kept = torch.zeros_like(probs).scatter_add(-1, draws.ids, draws.weights)
        divergence = torch.full_like(mass, float("nan"))  # what was not drawn is not ruled out
    else:
        if signal.sparse is not None:
            top = signal.sparse[part]
            mass = (probs.gather(-1, top.ids) * torch.isfinite(top.log_probs)).sum(-1)
            if top.log_priors is None:
                signal = replace(signal, sparse=replace(signal.sparse, log_priors={1.0: torch.zeros_like(exact[0])}))
        teacher = target_of(signal, part)
        assert teacher is not None
        divergence, kept = (probs * (exact - teacher.log_probs())).sum(-1), teacher.log_probs().exp()
    is_same = exact.argmax(-1) == kept.argmax(-1)
    return [-(probs * exact).sum(-1).clamp(max=0.0), divergence, (probs - kept).abs().sum(-1), is_same, mass]


def _of_gradients(logits: Tensor, truth: DenseTarget, teacher: Target) -> list[Tensor]:
    """Angle in degrees, ratio of norms and relative error, not a number where the true gradient has no direction."""
    found, true = _gradient(logits, teacher), _gradient(logits, truth)
    length, true_length = found.norm(dim=-1), true.norm(dim=-1)
    length, true_length = length.clamp(min=1e-30), true_length.where(true_length > _NO_GRADIENT, float("nan"))
    a, b = found / length[:, None], true / true_length[:, None]
    # by both diagonals of the rhombus: the arc cosine of something near 1 is noise
    angle = 2 * (a - b).norm(dim=-1).atan2((a + b).norm(dim=-1))
    return [angle.rad2deg(), length / true_length, (found - true).norm(dim=-1) / true_length]


def _gradient(logits: Tensor, teacher: Target) -> Tensor:
    from limbeck.objectives.divergences import ForwardKL
    from limbeck.objectives.support import Bins, Dense, Gradient

    grad, student = Gradient(), Dense(logits)
    bins = Bins(teacher, student)
    bins.add_slopes(grad, ForwardKL().slopes(bins)[1], 1.0)
    return grad.make(student)


def _means(tokens: Tensor) -> dict[str, float]:
    """Of a column in which nothing is a number nothing is said."""
    columns = zip((*MEASURES, *OF_GRADIENTS), tokens[:, 1:].nanmean(0).tolist(), strict=False)
    return {name: value for name, value in columns if value == value}
