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


@pytest.mark.parametrize("prior", [True, False])
def test_gradients_are_those_of_autograd(prior):
    """Against d(forward KL)/d(logits) in float64, from the definition; without a prior the tail is one bin."""
    codec, student = TopKCodec(k=5, step=1 / 1024, prior=prior), torch.randn(200, 8, generator=torch.Generator().manual_seed(4))
    model = codec.calibrate(HEAD, [ROWS])
    found = certify(codec, HEAD, model, [ROWS[:90], ROWS[:0], ROWS[90:]], (HEAD, [student[:90], student[:0], student[90:]]))
    p = torch.softmax(HEAD(ROWS).double(), -1)
    top, ids = p.topk(5)
    tail = 1 - top.sum(-1, keepdim=True)
    logits = HEAD(student).double().requires_grad_()
    q = torch.softmax(logits, -1)
    if prior:
        rest = model["log_priors"][0].double().exp().expand(200, -1).scatter(-1, ids, 0.0)
        kept = (rest / rest.sum(-1, keepdim=True) * tail).scatter(-1, ids, top)
        loss = (kept * (kept / q).log()).sum()
    else:
        loss = (top * (top / q.gather(-1, ids)).log()).sum() + (tail * (tail / (1 - q.gather(-1, ids).sum(-1, keepdim=True))).log()).sum()
    (ours,) = torch.autograd.grad(loss, logits)
    true = q.detach() - p
    expected = {
        "gradient_angle": torch.nn.functional.cosine_similarity(ours, true).arccos().rad2deg(),
        "gradient_ratio": ours.norm(dim=-1) / true.norm(dim=-1),
        "gradient_error": (ours - true).norm(dim=-1) / true.norm(dim=-1),
    }
    for name, values in expected.items():
        assert found[name] == pytest.approx(float(values.mean()), rel=0.02), name
    assert found["by_entropy"]["unsure"]["gradient_angle"] > 0


def test_a_student_that_is_its_teacher_has_no_gradient_to_be_wrong():
    found = certify(Exact(), HEAD, {}, [ROWS], (HEAD, [ROWS]))
    assert "kl" in found and "gradient_angle" not in found


def test_a_capture_shows_it(base, captured, tmp_path):
    path = tmp_path / "store"
    manifest = run(base, path, "capture.codec={type: quantized, bytes_per_token: 24}", "capture.calibrate_on=3")
    assert manifest.certificate is not None and 0 < manifest.certificate["kl"] < 0.2
    shown = dict(inspect.lines(inspect.summary(path)))
    assert "KL 0." in shown["fidelity"] and "MB once" in shown[""] and " 0.0 MB" not in str(shown)
    assert inspect.summary(captured)["certificate"] is None and list(inspect.bars(inspect.summary(captured))) == ["MB on the disk"]
    charts = inspect.bars(inspect.summary(path))
    assert sum(value for _, value, _ in charts["MB on the disk"]) * 2**20 == pytest.approx(inspect.summary(path)["bytes"])
    assert all(0 <= value < 0.5 for _, value, _ in charts["KL, by how sure the teacher is"])


def test_with_a_student_its_first_gradient_is_in_it(base, tmp_path, make_model_dir):
    path, student = tmp_path / "store", make_model_dir(layers=2, width=32, seed=9)
    codec = ("capture.codec={type: topk, k: 8}", "capture.calibrate_on=3")
    manifest = run(base, path, *codec, f"student={{model: {student}}}")
    other = run(base, tmp_path / "other", *codec)
    assert 0 < manifest.certificate["gradient_angle"] < 60 and 0.5 < manifest.certificate["gradient_ratio"] < 1.5
    assert {name: value for name, value in manifest.certificate.items() if name in other.certificate and name != "by_entropy"} == {
        name: value for name, value in other.certificate.items() if name != "by_entropy"
    }
    assert "degrees off the exact one" in str(inspect.lines(inspect.summary(path)))
    assert "gradient of a new student: angle in degrees" in inspect.bars(inspect.summary(path))
