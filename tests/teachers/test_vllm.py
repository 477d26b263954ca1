"""A real server against the same model here: `scripts/serve_teacher MODEL`, then with its URL

LIMBECK_SERVED=http://127.0.0.1:8011/v1 LIMBECK_SERVED_MODEL=MODEL python -m pytest -m vllm -s
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from limbeck.models import load_tokenizer
from limbeck.objectives.base import Needs
from limbeck.teachers import ModelTeacher, ServerTeacher
from limbeck.teachers.model import observed_log_probs
from limbeck.tokens.pad import collate
from limbeck.tokens.sample import make_sample

URL, MODEL, K = os.environ.get("LIMBECK_SERVED", ""), os.environ.get("LIMBECK_SERVED_MODEL", ""), 64
LENGTH, NUM = 128, 8


@pytest.mark.vllm
@pytest.mark.skipif(not URL or not MODEL, reason="LIMBECK_SERVED and LIMBECK_SERVED_MODEL name no server and no model")
def test_a_served_model_says_what_it_says_here(record_property):
    tokenizer, needs = load_tokenizer(MODEL), Needs(output=True)
    text = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text(encoding="utf-8")
    ids = tokenizer(text).input_ids[: LENGTH * NUM]
    samples = [make_sample(ids[i : i + LENGTH], [True] * len(ids[i : i + LENGTH]), LENGTH) for i in range(0, len(ids), LENGTH)]
    batch = collate([samples[:2], *[[sample] for sample in samples[2:]]], 0)
    told = ServerTeacher(url=URL, served_name=Path(MODEL).name, tokenizer=MODEL, k=K).open(tokenizer, needs).score(batch)
    teacher = ModelTeacher(model=MODEL).open(tokenizer, needs)
    rows = teacher.score(batch).output
    log_probs = torch.log_softmax(teacher.head(rows), -1)
    ids, tail = told.sparse.ids, told.sparse.log_tails[1.0].exp()
    differences = {
        "log-probabilities": (told.sparse.log_probs - log_probs.gather(-1, ids)).abs().max(),
        "targets": (told.observed - observed_log_probs(teacher.head, rows, batch.targets)).abs().max(),
        "mass of the others": (tail - log_probs.scatter(-1, ids, -torch.inf).exp().sum(-1)).abs().max(),
    }
    same = (ids == log_probs.topk(K).indices).float().mean()
    shown = ", ".join(f"{name} {float(value):.1e}" for name, value in differences.items())
    print(f"\nlargest differences over {len(rows)} tokens: {shown}; {float(same):.2%} of the ids at the same rank")
    record_property("differences", shown)
    assert max(map(float, differences.values())) < 1e-4 and same > 0.99
