"""What a capture says of its own loss is what a reader finds."""

from __future__ import annotations

import pytest
import torch
from captures import run

from limbeck.objectives.head import Head
from limbeck.store import inspect
from limbeck.store.certificate import certify
from limbeck.store.codec import Exact
from limbeck.store.top_k import TopKCodec

HEAD = Head(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)))
ROWS = torch.randn(200, 8, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, 200)[:, None]


def test_nothing_is_lost_where_all_is_kept():
    found = certify(Exact(), HEAD, {}, [ROWS, ROWS[:0]])
    assert abs(found["kl"]) < 1e-6 and found["l1"] < 1e-5 and found["top1"] == found["mass"] == 1
    assert found["bytes_per_token"] == 4 * 8 and found["num_scored"] == 200
    assert sum(part["num_scored"] for part in found["by_entropy"].values()) == 200
    assert certify(Exact(), HEAD, {}, [ROWS[:0]]) is None


@pytest.mark.parametrize("prior", [True, False])
def test_the_measures_are_their_definitions(prior):
    codec = TopKCodec(k=5, step=1 / 1024, prior=prior)
    model = codec.calibrate(HEAD, [ROWS])
    found = certify(codec, HEAD, model, [ROWS])
    p = torch.softmax(HEAD(ROWS).double(), -1)
    top, ids = p.topk(5)
    rest = (model["log_priors"][0].double().exp() if prior else torch.ones(40, dtype=torch.float64)).expand(200, -1).scatter(-1, ids, 0.0)
    q = (rest / rest.sum(-1, keepdim=True) * (1 - top.sum(-1, keepdim=True))).scatter(-1, ids, top)
    expected = {"kl": (p * (p / q).log()).sum(-1), "l1": (p - q).abs().sum(-1), "mass": top.sum(-1)}
    for name, values in expected.items():
        assert found[name] == pytest.approx(float(values.mean()), rel=0.02), name
    entropy = -(p * p.log()).sum(-1)
    unsure = expected["kl"][entropy >= 2]
    assert found["by_entropy"]["unsure"]["num_scored"] == len(unsure)
    assert found["by_entropy"]["unsure"]["kl"] == pytest.approx(float(unsure.mean()), rel=0.02)


def test_a_capture_shows_it(base, captured, tmp_path):
    path = tmp_path / "store"
    manifest = run(base, path, "capture.codec={type: quantized, bytes_per_token: 24}", "capture.calibrate_on=3")
    assert manifest.certificate is not None and 0 < manifest.certificate["kl"] < 0.2
    shown = dict(inspect.lines(inspect.summary(path)))
    assert "KL 0." in shown["fidelity"] and "MB once" in shown[""]
    assert inspect.summary(captured)["certificate"] is None
