"""Rows with fewer than k tokens, and tails spread by a prior, against float64 references written from the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from limbeck.batch import Draws, Signal, TopK
from limbeck.objectives import head as output_head
from limbeck.objectives.base import active
from limbeck.objectives.divergences import Divergence
from limbeck.objectives.head import Head
from limbeck.objectives.logits import Logits
from limbeck.objectives.support import Dense, DenseTarget, Gradient, SampledTarget, SpreadTarget, TopKTarget

N, V, K, D = 6, 17, 5, 4
TEMPERATURES = (1.0, 2.0)


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def _top_k(teacher: Tensor, k: int, priors: bool = False) -> TopK:
    top, ids = torch.log_softmax(teacher, -1).topk(k, dim=-1)
    tails = {t: torch.log_softmax(teacher / t, -1).scatter(-1, ids, -torch.inf).logsumexp(-1).float() for t in TEMPERATURES}
    return TopK(ids, top.float(), tails, {t: _draw(V, seed=int(t)).float() for t in TEMPERATURES} if priors else None)


def _padded(top: TopK, count: int) -> TopK:
    ids = torch.cat([top.ids, top.ids[:, :1].expand(-1, count)], 1)
    log_probs = torch.cat([top.log_probs, torch.full((len(ids), count), -torch.inf)], 1)
    return TopK(ids, log_probs, top.log_tails, top.log_priors)


def _target(top: TopK) -> TopKTarget | SpreadTarget:
    target = TopKTarget(top.ids, top.log_probs, top.log_tails)
    return target if top.log_priors is None else SpreadTarget(target, top.log_priors)


def _loss(name: str, temperature: float, target: TopKTarget | SampledTarget | DenseTarget) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and gradients by autograd and by the closed form."""
    term, targets, student = Logits(divergence=name, temperature=temperature), torch.zeros(N, dtype=torch.long), _draw(N, V, seed=2).float()
    leaf = student.clone().requires_grad_()
    values = term.values(Dense(leaf), target, targets)
    (by_autograd,) = torch.autograd.grad(values.sum(), leaf)
    collected, dense = Gradient(), Dense(student)
    term.closed_form(collected, 1.0, dense, target, targets)
    return values.detach(), by_autograd, collected.make(dense)


@pytest.mark.parametrize("name", sorted(Divergence.members))
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("priors", [False, True])
def test_padding_has_no_mass_and_no_gradient(name: str, temperature: float, priors: bool) -> None:
    top = _top_k(_draw(N, V, seed=1), K, priors)
    for ours, expected in zip(_loss(name, temperature, _target(_padded(top, 3))), _loss(name, temperature, _target(top)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_spread_target_is_its_definition_and_sums_to_one(temperature: float) -> None:
    teacher = _draw(N, V, seed=1)
    top = _top_k(teacher, K, priors=True)
    assert top.log_priors is not None
    p, prior = torch.softmax(teacher / temperature, -1), top.log_priors[temperature].double().exp()
    kept = torch.zeros(N, V, dtype=torch.bool).scatter(-1, top.ids, True)
    tail, rest = (p * ~kept).sum(-1, keepdim=True), prior * ~kept
    expected = torch.where(kept, p, tail * rest / rest.sum(-1, keepdim=True))
    found = _target(top).log_probs(temperature).double().exp()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(-1), torch.ones(N, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(Divergence.members))
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_spread_target_of_the_whole_vocabulary_equals_dense(name: str, temperature: float) -> None:
    teacher = _draw(N, V, seed=1)
    ours = _loss(name, temperature, _target(_top_k(teacher, V, priors=True)))
    for found, expected in zip(ours, _loss(name, temperature, DenseTarget(teacher.float())), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("priors", [False, True])
def test_the_fused_head_equals_plain_on_a_padded_teacher(priors: bool) -> None:
    top = _padded(_top_k(_draw(N, V, seed=1), K, priors), 2)
    terms = active([Logits(), Logits(divergence="reverse_kl", temperature=2.0, weight=0.3)])
    scales, results = {key: term.weight / N for key, term in terms.items()}, []
    for path, extra in ((output_head.fused, (3,)), (output_head.plain, ())):
        head, rows = Head(_draw(V, D, seed=4).float().requires_grad_()), _draw(N, D, seed=5).float().requires_grad_()
        loss, sums = path(rows, head, torch.arange(N), Signal(sparse=top), terms, scales, *extra)
        loss.backward()
        results.append((loss.detach(), sums, rows.grad, head.weight.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert ("teacher_nll" in results[0][1]) == priors


@pytest.mark.parametrize("sureness", [1.0, 10.0, 40.0, 200.0])
def test_the_mass_outside_of_some_tokens_is_added_up(sureness: float) -> None:
    """Also where it is far below what a probability of float32 can be, and where the kept tokens are padded."""
    logits = _draw(N, V, seed=3)
    logits[:, :3] += sureness
    ids = torch.tensor([[0, 1, 2, 0]]).expand(N, -1)
    expected = torch.log_softmax(logits, -1)[:, 3:].logsumexp(-1, keepdim=True)
    made = logits.float()
    for student in (Dense(logits.float()), Dense(made, torch.empty_like(made))):
        before = student.probs().clone()
        torch.testing.assert_close(student.log_rest(ids).double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(student.probs(), before)


def test_draws_need_not_sum_to_one() -> None:
    """The value is sum p log p - sum w log q, and its gradient W q - w, with an id that pads a row and one that stands there twice."""
    student, neg_entropy = _draw(N, V, seed=2), -torch.linspace(0.5, 2, N)
    ids, weights = torch.tensor([[4, 9, 0, 4]]).expand(N, -1), torch.tensor([[0.4, 0.3, 0.0, 0.1]]).expand(N, -1)
    w = torch.zeros(N, V, dtype=torch.float64).scatter_add(1, ids, weights.double())
    log_q = torch.log_softmax(student, -1)
    expected = neg_entropy.double() - (w * log_q).sum(-1)
    values, *grads = _loss("forward_kl", 1.0, SampledTarget(Draws(ids, weights, neg_entropy)))
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    for grad in grads:
        torch.testing.assert_close(grad.double(), w.sum(-1, keepdim=True) * log_q.exp() - w, rtol=1e-5, atol=1e-6)
