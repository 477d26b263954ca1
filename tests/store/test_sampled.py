"""Draws from the teacher: unbiased, as few as can be, the same whatever stands beside them; and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captures import coded_apart, run, samples_of

from limbeck.errors import RecipeError
from limbeck.objectives.base import Needs
from limbeck.objectives.head import Head
from limbeck.recipe import parse_recipe
from limbeck.store.inspect import bars, lines, summary
from limbeck.store.manifest import read_manifest
from limbeck.store.sampled import SampledCodec
from limbeck.teachers import StoreTeacher
from limbeck.tokens.pad import pad

V, E = 83, 12
HEAD = Head(torch.randn(V, E, generator=torch.Generator().manual_seed(1)), 2 * torch.randn(V, generator=torch.Generator().manual_seed(2)))


def outputs(rows, seed):
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 1.5, rows)[:, None]


def drawn(codec, rows):
    model = codec.calibrate(HEAD, [outputs(150, seed=8), outputs(60, seed=9)])
    blobs = codec.encode(HEAD, model, rows, [len(rows)])
    return codec.decode(None, model, blobs, [np.arange(len(rows))]).sparse


def dense(draws):
    return torch.zeros(len(draws.ids), V).scatter_add(1, draws.ids, draws.weights)


@pytest.mark.parametrize("codec", [SampledCodec(draws=3), SampledCodec(draws=20), SampledCodec(draws=7, k=4, step=0.5)])
def test_the_mean_of_many_draws_is_the_teacher(codec):
    """Also where half a nat of rounding would be seen: that is done by chance too."""
    num = 6000
    for row in outputs(5, seed=3):
        probs = torch.softmax(HEAD(row[None]), -1)[0].double()
        draws = drawn(codec, row.expand(num, -1))
        share = codec.draws * probs % 1  # a count is one more with this probability; kept tokens are rounded by a step
        error = ((share * (1 - share)).sqrt() / codec.draws + codec.step / 2 * probs * (codec.k > 0)) / num**0.5
        assert ((dense(draws).double().mean(0) - probs).abs() / (error + 1 / codec.draws / num)).max() < 5
        entropies = draws.neg_entropy.double()
        assert abs(float(entropies.mean() - (probs * probs.log()).sum())) < 5 * codec.step / num**0.5


def test_a_count_is_within_one_of_what_the_probability_says():
    rows = outputs(200, seed=4)
    expected = 25 * torch.softmax(HEAD(rows), -1)
    draws = drawn(SampledCodec(draws=25), rows)
    assert (25 * dense(draws) - expected).abs().max() < 1 + 1e-4
    torch.testing.assert_close(draws.weights.sum(1), torch.ones(200))
    num = (draws.weights > 0).sum(1)
    entropy = -draws.neg_entropy
    assert num[entropy < 0.5].float().mean() < num[entropy > 2].float().mean(), "few where the teacher is sure"


def test_the_most_probable_tokens_are_all_there():
    rows = outputs(100, seed=5)
    log_probs, ids = torch.log_softmax(HEAD(rows), -1).topk(6)
    draws = drawn(SampledCodec(draws=5, k=6, step=1 / 32), rows)
    assert torch.equal(draws.ids[:, :6], ids)
    assert (draws.weights[:, :6].log() - log_probs).abs().max() < 1 / 32 + 1e-5
    others = draws.ids[:, 6:][draws.weights[:, 6:] > 0]
    assert len(others) and not (others[:, None] == ids[(draws.weights[:, 6:] > 0).nonzero()[:, 0]]).any()


@pytest.mark.parametrize("codec", [SampledCodec(draws=10), SampledCodec(draws=10, k=3)])
def test_a_samples_draws_depend_on_its_rows_alone(codec):
    rows = outputs(300, seed=6)
    model = codec.calibrate(HEAD, [outputs(150, seed=8)])
    some, everything = (each.sparse for each in coded_apart(codec, HEAD, model, rows))
    assert torch.equal(dense(some), dense(everything)[[69, 5, 78]])
    assert torch.equal(some.neg_entropy, everything.neg_entropy[[69, 5, 78]])
    assert len(codec.decode(None, model, [], []).sparse.ids) == 0
    again = codec.encode(HEAD, model, torch.cat([rows[:140], rows[:140]]), [140, 140])
    assert again[0] == again[1], "the same rows, the same draws"
    repeated = dense(drawn(codec, rows[:1].expand(50, -1)))
    assert len(repeated.unique(dim=0)) > 1, "a row that occurs twice in a sample is drawn twice"


@pytest.mark.parametrize("codec", ["{type: sampled, draws: 9}", "{type: sampled, draws: 9, k: 3}"])
def test_a_capture_keeps_them(base, data, tokenizer, tmp_path, codec):
    path = tmp_path / "store"
    manifest = run(base, path, f"capture.codec={codec}", "capture.calibrate_on=3")
    assert manifest.head is None and read_manifest(path).temperatures == (1.0,)
    assert "kl" not in manifest.certificate and manifest.certificate["l1"] > 0
    assert any("draws without bias" in text for _, text in lines(summary(path)))
    charts = bars(summary(path))
    assert all(charts.values()) and "L1, by how sure the teacher is" in charts
    batch = pad(samples_of(data, tokenizer)[:3], 0)
    draws = StoreTeacher(path=str(path)).open(tokenizer, Needs(output=True)).score(batch).sparse
    assert len(draws.ids) == len(batch.scored) and (draws.weights.sum(1) - 1).abs().max() < 0.5


def test_losses_that_need_more_are_refused_with_the_recipe(base, tmp_path):
    path = tmp_path / "store"
    run(base, path, "capture.codec={type: sampled}", "capture.calibrate_on=3")
    student = {"model": base["teacher"]["model"]}
    recipe = {"student": student, "teacher": {"type": "store", "path": str(path)}, "source": {"type": "dataset", "data": "any"}}
    parse_recipe(recipe | {"objective": [{"type": "logits"}]})
    with pytest.raises(RecipeError, match="reverse_kl is defined on dense and top_k, and the teacher gives sampled"):
        parse_recipe(recipe | {"objective": [{"type": "logits", "divergence": "reverse_kl"}]})
    with pytest.raises(RecipeError, match="found temperature 2, expected"):
        parse_recipe(recipe | {"objective": [{"type": "logits", "temperature": 2.0}]})


def test_bytes_choose_the_number_of_draws_and_a_kl_is_refused(base, tmp_path):
    few = run(base, tmp_path / "few", "capture.codec={type: sampled}", "capture.calibrate_on=3", "capture.bytes_per_token=12")
    more = run(base, tmp_path / "more", "capture.codec={type: sampled}", "capture.calibrate_on=3", "capture.bytes_per_token=24")
    assert few.certificate["bytes_per_token"] <= 12 < more.certificate["bytes_per_token"] <= 24 and few.codec.draws < more.codec.draws
    with pytest.raises(RecipeError, match="target_kl: draws have no KL"):
        run(base, tmp_path / "none", "capture.codec={type: sampled}", "capture.target_kl=0.1")
