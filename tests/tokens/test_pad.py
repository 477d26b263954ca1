"""Padding, shift and mask, checked token by token."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from helpers import tiny_model
from limbeck.tokens.pack import pack
from limbeck.tokens.pad import collate, pad
from limbeck.tokens.sample import Sample, make_sample

PAD = 2


def sample(ids, is_target=None):
    return make_sample(ids, is_target or [True] * len(ids), 100)


@pytest.mark.parametrize("seed", range(50))
def test_every_token_by_brute_force(seed):
    random = Random(seed)
    rows = [[(random.randint(0, 5), random.random() < 0.5) for _ in range(random.randint(1, 9))] for _ in range(random.randint(1, 5))]
    samples = [sample([token for token, _ in row], [flag for _, flag in row]) for row in rows]
    batch = pad(samples, PAD)
    width = max(len(row) for row in rows)
    assert batch.input_ids.shape == (len(rows), width)
    scored, targets, represented = [], [], []
    for b, row in enumerate(rows):
        for t in range(width):
            real = t < len(row)
            assert batch.input_ids[b, t] == (row[t][0] if real else PAD)
            assert batch.position_ids[b, t] == t
            assert batch.document_ids[b, t] == (b if real else -1)
            assert batch.sample_ids[b, t] == (samples[b].sample_id if real else 0)
            assert batch.offsets[b, t] == (t if real else -1)
            if real:
                represented.append(b * width + t)
            if t + 1 < len(row) and row[t + 1][1]:  # position t predicts the token at t + 1
                scored.append(b * width + t)
                targets.append(row[t + 1][0])
    assert batch.scored.tolist() == scored
    assert batch.targets.tolist() == targets
    assert batch.represented.tolist() == represented
    assert batch.counts == {"scored": sum(s.num_scored for s in samples), "represented": sum(map(len, rows))}
    assert batch.num_tokens == sum(map(len, rows))


@pytest.mark.parametrize("seed", range(50))
def test_every_token_of_shared_rows_by_brute_force(seed):
    """What is known of a token does not depend on the row it stands in; and where it stands, its row's ids say."""
    random = Random(seed)
    samples = [
        Sample(sample_id=number, ids=np.array([random.randint(0, 5) for _ in flags]), is_target=np.array(flags))
        for number in range(random.randint(1, 6))
        if (flags := [random.random() < 0.7 for _ in range(random.randint(1, 9))])
    ]
    rows = pack(samples, 12)
    batch = collate(rows, PAD)
    scored, represented, document = [], [], -1
    width = batch.input_ids.shape[1]
    for b, row in enumerate(rows):
        tokens = [(sample, offset) for sample in row for offset in range(len(sample.ids))]
        for t in range(width):
            sample, offset = tokens[t] if t < len(tokens) else (None, -1)
            document += offset == 0
            assert batch.input_ids[b, t] == (sample.ids[offset] if sample else PAD)
            assert batch.offsets[b, t] == offset
            assert batch.document_ids[b, t] == (document if sample else -1)
            assert batch.sample_ids[b, t] == (sample.sample_id if sample else 0)
            if any(len(row) > 1 for row in rows):
                assert batch.position_ids[b, t] == max(offset, 0)
            if sample:
                represented.append(b * width + t)
                if offset + 1 < len(sample.ids) and sample.is_target[offset + 1]:
                    scored.append(b * width + t)
    assert batch.scored.tolist() == scored
    assert batch.targets.tolist() == [int(batch.input_ids.flatten()[position + 1]) for position in scored]
    assert batch.represented.tolist() == represented
    assert batch.counts == {"scored": sum(s.num_scored for s in samples), "represented": sum(len(s.ids) for s in samples)}


def test_first_token_of_the_next_row_is_nobodys_target():
    all_targets = [Sample(sample_id=row, ids=np.array(ids), is_target=np.ones(2, dtype=bool)) for row, ids in enumerate([[7, 8], [9, 10]])]
    batch = pad(all_targets, PAD)
    assert batch.scored.tolist() == [0, 2]
    assert batch.targets.tolist() == [8, 10]


def test_first_token_of_the_next_document_is_nobodys_target():
    all_targets = [Sample(sample_id=row, ids=np.array(ids), is_target=np.ones(2, dtype=bool)) for row, ids in enumerate([[7, 8], [9, 10]])]
    batch = collate([all_targets], PAD)
    assert batch.scored.tolist() == [0, 2]
    assert batch.targets.tolist() == [8, 10]


def test_padding_beside_shared_rows_stays_within_the_models_positions():
    """A row may be wider than the model has positions, where its documents are not: the padding must not count beyond them."""
    batch = collate([[sample([5, 6, 7])] * 4, [sample([8])]], PAD)
    assert batch.position_ids.tolist() == [[0, 1, 2] * 4, [0] * 12]


def test_eos_is_a_target_and_padding_with_the_same_id_is_not():
    batch = pad([sample([5, PAD]), sample([5, 6, 7, PAD])], PAD)
    assert batch.scored.tolist() == [0, 4, 5, 6]
    assert batch.targets.tolist() == [PAD, 6, 7, PAD]
    assert batch.represented.tolist() == [0, 1, 4, 5, 6, 7]


def test_the_empty_microbatch():
    batch = pad([], PAD)
    assert batch.input_ids.tolist() == [[PAD]]
    assert batch.document_ids.tolist() == batch.offsets.tolist() == [[-1]]
    assert batch.counts == {"scored": 0, "represented": 0}
    assert batch.targets.numel() == 0
    assert torch.isfinite(tiny_model()(batch.input_ids, position_ids=batch.position_ids).logits).all()


def test_types():
    for batch in (pad([], PAD), pad([sample([1, 2, 3])], PAD)):
        assert {value.dtype for value in vars(batch).values()} == {torch.int64}


def test_padding_does_not_change_what_real_tokens_see():
    model = tiny_model()
    short, long = sample([5, 6, 7, 8]), sample(list(range(10, 30)))
    alone, padded = pad([short], PAD), pad([short, long], PAD)
    with torch.no_grad():
        expected = model(alone.input_ids, position_ids=alone.position_ids).logits[0]
        found = model(padded.input_ids, position_ids=padded.position_ids).logits[0, :4]
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_sample_keeps_its_targets_when_cut():
    cut = make_sample([1, 2, 3, 4], np.array([False, True, True, True]), 3)
    assert pad([cut], PAD).targets.tolist() == [2, 3]


def test_shapes_are_checked_under_pytest():
    """The import hook of conftest.py is on: a Batch of the wrong shape cannot be made."""
    from dataclasses import replace

    batch = pad([sample([1, 2, 3])], PAD)
    with pytest.raises(TypeError):
        replace(batch, offsets=batch.offsets[:, :2])
    with pytest.raises(TypeError):
        replace(batch, targets=batch.targets.float())
    with pytest.raises(TypeError):
        pad([sample([1, 2, 3])], "2")
