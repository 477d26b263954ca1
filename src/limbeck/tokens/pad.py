"""Samples to one padded Batch. Shift and mask happen here, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from limbeck.batch import Batch
from limbeck.tokens.sample import Sample


def pad(samples: Sequence[Sample], pad_id: int) -> Batch:
    """One row per sample, padded on the right. `pad([])` is the empty microbatch: one pad token, nothing scored or represented.

    Padding is known by length and never by id, so a tokenizer whose pad token is its eos still learns eos. Positions count on over
    the padding: it comes after every real token, so causal attention hides it, and plain 0..T-1 positions keep transformers on the
    fast path without a mask.
    """
    num_rows, width = max(len(samples), 1), max([len(sample.ids) for sample in samples], default=1)
    input_ids = np.full((num_rows, width), pad_id, dtype=np.int64)
    document_ids = np.full((num_rows, width), -1, dtype=np.int64)
    sample_ids = np.zeros((num_rows, width), dtype=np.int64)
    offsets = np.full((num_rows, width), -1, dtype=np.int64)
    is_target = np.zeros((num_rows, width), dtype=bool)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        input_ids[row, :length] = sample.ids
        document_ids[row, :length] = row
        sample_ids[row, :length] = sample.sample_id
        offsets[row, :length] = np.arange(length)
        is_target[row, :length] = sample.is_target
    # position t is scored by token t + 1 of the same row: the first column is nobody's next token
    is_scored = np.zeros_like(is_target)
    is_scored[:, :-1] = is_target[:, 1:]
    scored = np.flatnonzero(is_scored)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(width).repeat(num_rows, 1),
        document_ids=torch.from_numpy(document_ids),
        sample_ids=torch.from_numpy(sample_ids),
        offsets=torch.from_numpy(offsets),
        scored=torch.from_numpy(scored),
        targets=torch.from_numpy(input_ids.reshape(-1)[scored + 1]),
        represented=torch.from_numpy(np.flatnonzero(document_ids >= 0)),
    )
