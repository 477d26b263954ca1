"""Certificate: what a codec loses, measured on documents that it was not fitted on, by how unsure the teacher is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from limbeck.store.codec import Codec

if TYPE_CHECKING:
    from torch import Tensor

    from limbeck.batch import Signal
    from limbeck.objectives.head import Head

BUCKETS = {"sure": 0.5, "between": 2.0, "unsure": float("inf")}
"""By the entropy of the teacher's distribution in nats, each up to this."""
MEASURES = ("kl", "l1", "top1", "mass")
_ROWS = 64


def certify(codec: Codec, head: Head, model: Mapping[str, Tensor], outputs: Iterable[Tensor]) -> dict[str, Any] | None:
    """Means over the scored tokens of `outputs`, and over those of each bucket: `kl`, KL(teacher || what comes back) in nats; `l1`, the sum
    of absolute differences; `top1`, how often the most probable token is the same; `mass`, the teacher's mass on tokens kept one by one.
    A tail without a prior counts as spread evenly. `bytes_per_token` are those of the blobs; the head and what was fitted lie beside them,
    once. None where there are no tokens."""
    import torch

    if codec.support == "sampled":
        return None
    parts, size = [], 0
    for output in outputs:
        (blob,) = codec.encode(head, model, output, [len(output)])
        size += len(blob)
        for rows in np.array_split(np.arange(len(output)), -(-len(output) // _ROWS) or 1):
            if len(rows):
                parts.append(_measure(head, output[torch.from_numpy(rows)], codec.decode(head, model, [blob], [rows])))
    if not parts:
        return None
    tokens = torch.cat(parts)
    found: dict[str, Any] = {"num_scored": len(tokens), "bytes_per_token": size / len(tokens), **_means(tokens)}
    low, buckets = 0.0, {}
    for name, high in BUCKETS.items():
        inside = tokens[(tokens[:, -1] >= low) & (tokens[:, -1] < high)]
        buckets[name] = {"num_scored": len(inside), **(_means(inside) if len(inside) else {})}
        low = high
    return found | {"by_entropy": buckets}


def _measure(head: Head, rows: Tensor, signal: Signal) -> Tensor:
    """`[n, 5]`: the measures, and the teacher's entropy."""
    import torch

    from limbeck.objectives.head import target_of
    from limbeck.objectives.support import Dense

    with torch.no_grad():
        signal = signal.to(head.weight.device)
        exact = Dense(head(rows.to(head.weight.device))).log_probs().clamp(min=-1e30)
        probs, mass = exact.exp(), torch.ones(len(rows), device=head.weight.device)
        if signal.sparse is not None:
            mass = (probs.gather(-1, signal.sparse.ids) * torch.isfinite(signal.sparse.log_probs)).sum(-1)
            if signal.sparse.log_priors is None:
                signal = replace(signal, sparse=replace(signal.sparse, log_priors={1.0: torch.zeros_like(exact[0])}))
        teacher = target_of(signal, slice(None))
        assert teacher is not None
        kept = teacher.log_probs()
        columns = [
            (probs * (exact - kept)).sum(-1),
            (probs - kept.exp()).abs().sum(-1),
            exact.argmax(-1) == kept.argmax(-1),
            mass,
            -(probs * exact).sum(-1).clamp(max=0.0),
        ]
        return torch.stack([column.double().cpu() for column in columns], 1)


def _means(tokens: Tensor) -> dict[str, float]:
    return dict(zip(MEASURES, tokens.mean(0).tolist(), strict=False))
