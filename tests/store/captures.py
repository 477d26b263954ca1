"""Small captures and what is compared of them; `from captures import ...` works for the tests of this folder."""

from __future__ import annotations

import numpy as np
import torch

import limbeck
from limbeck.objectives.base import Needs
from limbeck.teachers import StoreTeacher
from limbeck.tokens.datasets import read_conversations
from limbeck.tokens.pad import pad
from limbeck.tokens.render import render_all

WORDS = ["weather", "Paris", "teacher", "student", "answer", "five", "fox", "dog", "sunny", "sleeps", "lazy", "quick"]
LAYERS = (1, 3)
SHORT = 24
"""A max_length that cuts most conversations and leaves each something to learn."""
ALL = Needs(output=True, layers=frozenset(LAYERS))


def conversation(i, turns=1):
    """A chat of some turns; each a different length."""
    messages = []
    for turn in range(turns):
        messages += [
            {"role": "user", "content": " ".join(WORDS[(i + turn) % 5 : 3 + i])},
            {"role": "assistant", "content": " ".join(WORDS[i % 4 : 5 + i + turn])},
        ]
    return {"messages": messages}


ROWS = [conversation(i, turns=1 + i % 2) for i in range(7)]


def run(base, path, *overrides):
    return limbeck.capture(base, [f"capture.path={path}", *overrides])


def samples_of(data, tokenizer, max_length=64):
    return render_all(read_conversations(data), tokenizer, max_length)[0]


def signals(path, samples, tokenizer, needs=ALL, batch_size=1):
    """What the store says, by sample id: output, observed and hidden states."""
    scorer = StoreTeacher(path=str(path)).open(tokenizer, needs)
    found = {}
    for start in range(0, len(samples), batch_size):
        batch = pad(samples[start : start + batch_size], 0)
        signal = scorer.score(batch)
        ids = batch.sample_ids.flatten()
        for sample_id in ids[batch.represented].unique().tolist():
            scored, represented = ids[batch.scored] == sample_id, ids[batch.represented] == sample_id
            parts = [] if signal.output is None else [signal.output[scored]]
            parts += [signal.observed[scored], *(state[represented] for _, state in sorted(signal.hidden.items()))]
            found[sample_id] = parts
    return found


def coded_apart(codec, head, model, rows):
    """Some rows of some samples and all rows of all, decoded, after the bytes of a sample were found to depend on its rows alone.
    The first are rows 69, 5 and 78 of the others."""
    blobs = codec.encode(head, model, rows, [0, 70, 1, len(rows) - 71])
    parts = rows.split([70, 1, len(rows) - 71])
    assert blobs == [b"", *(codec.encode(head, model, part, [len(part)])[0] for part in parts)]
    some = codec.decode(head, model, blobs, [np.arange(0), np.array([69, 5]), np.arange(0), np.array([7])])
    return some, codec.decode(head, model, blobs[1:], [np.arange(len(part)) for part in parts])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for sample_id in a:
        assert len(a[sample_id]) == len(b[sample_id])
        assert all(torch.equal(x, y) for x, y in zip(a[sample_id], b[sample_id], strict=True))


def names(path):
    return sorted(file.name for file in path.iterdir())
