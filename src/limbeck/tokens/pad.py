"""Rows of samples to one padded Batch. Shift and mask happen here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from limbeck.batch import Batch
from limbeck.tokens.sample import Sample


def pad(samples: Sequence[Sample], pad_id: int) -> Batch:
    """One row per sample, padded on the right. `pad([])` is the empty microbatch: one pad token, nothing scored or represented."""
    return collate([[sample] for sample in samples], pad_id)


def collate(rows: Sequence[Sequence[Sample]], pad_id: int) -> Batch:
    """Rows of one or more samples, one after the other and padded on the right.

    Padding is known by length and never by id, so a tokenizer whose pad token is its eos still learns eos. Samples that share a row are
    told apart by their positions, which start over at 0 with each; every padding token there is at 0, a document of its own. Where no row
    is shared, positions count on over the padding: it comes after every real token, so causal attention hides it, and plain 0..T-1
    positions keep transformers on the fast path without a mask.
    """
    num_rows, width = max(len(rows), 1), max([sum(len(sample.ids) for sample in row) for row in rows], default=1)
    is_shared = any(len(row) > 1 for row in rows)
    input_ids = np.full((num_rows, width), pad_id, dtype=np.int64)
    position_ids = np.tile(np.zeros(width, dtype=np.int64) if is_shared else np.arange(width), (num_rows, 1))
    document_ids = np.full((num_rows, width), -1, dtype=np.int64)
    sample_ids = np.zeros((num_rows, width), dtype=np.int64)
    offsets = np.full((num_rows, width), -1, dtype=np.int64)
    is_target = np.zeros((num_rows, width), dtype=bool)
    document = 0
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            place = (number, slice(start, start + len(sample.ids)))
            input_ids[place] = sample.ids
            position_ids[place] = offsets[place] = np.arange(len(sample.ids))
            document_ids[place] = document
            sample_ids[place] = sample.sample_id
            is_target[place] = sample.is_target
            is_target[number, start] = False  # nothing comes before a first token: in a shared row, another sample's last one does
            document, start = document + 1, start + len(sample.ids)
    # position t is scored by token t + 1 of the same row: the first column is nobody's next token
    is_scored = np.zeros_like(is_target)
    is_scored[:, :-1] = is_target[:, 1:]
    scored = np.flatnonzero(is_scored)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        sample_ids=torch.from_numpy(sample_ids),
        offsets=torch.from_numpy(offsets),
        scored=torch.from_numpy(scored),
        targets=torch.from_numpy(input_ids.reshape(-1)[scored + 1]),
        represented=torch.from_numpy(np.flatnonzero(document_ids >= 0)),
    )
