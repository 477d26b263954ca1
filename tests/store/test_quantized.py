"""Transform-coded states: how near the teacher comes back, in how many bytes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from captures import coded_apart, run, samples_of

from limbeck.objectives.base import Needs
from limbeck.objectives.head import Head
from limbeck.store import quantized
from limbeck.store.quantized import Quantized, _costs, _halves, _symbols, fisher
from limbeck.teachers import StoreTeacher
from limbeck.tokens.pad import pad

V, E = 67, 10
HEAD = Head(torch.randn(V, E, generator=torch.Generator().manual_seed(1)), scale=0.5)
MIX = torch.randn(E, E, generator=torch.Generator().manual_seed(3))


def outputs(rows, seed):
    return torch.randn(rows, E, generator=torch.Generator().manual_seed(seed)) @ MIX * torch.linspace(0.2, 1.5, rows)[:, None] + 1


def fitted(wanted):
    codec = Quantized(bytes_per_token=wanted)
    return codec, codec.calibrate(HEAD, [outputs(700, seed=8), outputs(500, seed=9)])


def divergence(codec, model, rows):
    blobs = codec.encode(HEAD, model, rows, [len(rows)])
    kept = codec.decode(HEAD, model, blobs, [np.arange(len(rows))])
    assert kept.teacher_head is HEAD
    exact, found = (torch.log_softmax(HEAD(each), -1) for each in (rows, kept.output))
    return float((exact.exp() * (exact - found)).sum(-1).mean()), len(blobs[0]) / len(rows)


def test_bytes_are_as_wanted_and_more_of_them_are_nearer():
    found = {wanted: divergence(*fitted(wanted), outputs(400, seed=5)) for wanted in (3, 5, 8)}
    assert all(size == pytest.approx(wanted, rel=0.2) for wanted, (_, size) in found.items())
    assert found[3][0] > 2 * found[5][0] > 4 * found[8][0] > 0 and found[8][0] < 0.01


@pytest.mark.parametrize("length", [5, 60])
def test_bytes_of_other_documents_are_as_wanted_whatever_their_length(length):
    """A blob's fixed bytes count, and tables and price do not know the calibration documents by heart."""
    codec, spread = Quantized(bytes_per_token=6), torch.randperm(900, generator=torch.Generator().manual_seed(2))
    fitted, others, new = (outputs(900, seed=seed)[spread] for seed in (8, 11, 5))
    model = codec.calibrate(HEAD, fitted.split(length), others.split(length))
    sizes = [sum(map(len, codec.encode(HEAD, model, rows, [length] * (900 // length)))) / 900 for rows in (others, new)]
    assert 0.99 * 6 <= sizes[0] <= 6, "the documents that set the price"
    assert sizes[1] == pytest.approx(6, rel=0.03)


def test_few_documents_to_fit_on_are_no_more_bytes():
    """Tables of a sample that is too small fit others badly: that costs fidelity, and no bytes."""
    codec, few = Quantized(bytes_per_token=6), outputs(900, seed=8)[torch.arange(0, 900, 45)]
    model = codec.calibrate(HEAD, [few], outputs(900, seed=11).split(60))
    blobs = codec.encode(HEAD, model, outputs(900, seed=5), [60] * 15)
    assert sum(map(len, blobs)) / 900 == pytest.approx(6, rel=0.03)


@pytest.mark.parametrize("head", [HEAD, Head(HEAD.weight, scale=0.5, soft_cap=3.0), Head(HEAD.weight[:, :E], torch.linspace(-3, 3, V))])
@pytest.mark.parametrize("top", [16, 256])
def test_the_estimate_is_near_the_divergence(head, top, monkeypatch):
    """Also where few tokens are computed one by one, and for heads with a bias, a scale or a soft cap."""
    monkeypatch.setattr(quantized, "_TOP", top)
    codec, rows = Quantized(bytes_per_token=6), outputs(400, seed=5) / 3
    model = codec.calibrate(head, [outputs(900, seed=8) / 3])
    estimated, _ = _costs(head, model, rows)
    components = (rows - model["mean"]) @ model["forward"]
    logs = torch.log_softmax(head(rows), -1).double()
    for i, step in enumerate(model["steps"].tolist()):
        half = _halves(model)[i]
        kept = ((_symbols(components, step, half) - half) * step).float() @ model["back"] + model["mean"]
        exact = (logs.exp() * (logs - torch.log_softmax(head(kept), -1))).sum(-1)
        assert float(estimated[:, i].mean()) == pytest.approx(float(exact.mean()), rel=0.15), step


def test_the_metric_is_that_of_the_divergence():
    """Half of the form of a small change is its KL, in float64."""
    rows = outputs(50, seed=6)
    form = fisher(HEAD, rows)
    change = 1e-3 * torch.randn(E, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight = HEAD.weight.double() * HEAD.scale
    exact, changed = (torch.log_softmax(each @ weight.T, -1) for each in (rows.double(), rows.double() + change))
    expected = (exact.exp() * (exact - changed)).sum(-1).mean()
    torch.testing.assert_close(change @ form @ change / 2, expected, rtol=1e-2, atol=0)


def test_a_token_far_outside_of_the_calibration_comes_back_finite():
    codec, model = fitted(8)
    rows = outputs(3, seed=7) * torch.tensor([[1.0], [1e4], [0.0]])
    kept = codec.decode(HEAD, model, codec.encode(HEAD, model, rows, [3]), [np.arange(3)]).output
    assert torch.isfinite(kept).all()


def test_a_samples_bytes_depend_on_its_rows_alone():
    codec, model = fitted(5)
    some, everything = (each.output for each in coded_apart(codec, HEAD, model, outputs(130, seed=6)))
    torch.testing.assert_close(some, everything[[69, 5, 78]], rtol=1e-5, atol=1e-5)
    assert codec.decode(HEAD, model, [], []).output.shape == (0, E)


def test_the_same_states_calibrate_to_the_same():
    (_, a), (_, b) = fitted(5), fitted(5)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_capture_in_fewer_bytes_serves_any_temperature(base, captured, data, tokenizer, tmp_path):
    path = tmp_path / "store"
    manifest = run(base, path, "capture.codec={type: quantized, bytes_per_token: 24}", "capture.calibrate_on=3")
    assert manifest.head is not None and manifest.model is not None and manifest.temperatures is None
    batch = pad(samples_of(data, tokenizer)[:5], 0)
    ours, exact = (StoreTeacher(path=str(each)).open(tokenizer, Needs(output=True)).score(batch) for each in (path, captured))
    p, q = (torch.log_softmax(each.teacher_head(each.output).float() / 2, -1) for each in (exact, ours))
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < 0.05


def test_few_calibration_tokens_are_said(base, tmp_path, capfd):
    run(base, tmp_path / "store", "capture.codec={type: quantized, bytes_per_token: 20}")
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(r"\d+ calibration tokens are few for the \d+ channels .*Raise capture\.calibrate_on, or set codec 'topk'", said), said
    assert Quantized().doubt([outputs(25, seed=1), outputs(15, seed=2)]) is None, "four per channel"
    run(base, tmp_path / "other", "capture.codec.type=topk")
    assert "few for" not in capfd.readouterr().err
