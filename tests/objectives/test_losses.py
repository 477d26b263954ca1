"""Every term against a float64 reference written from its definition, with its gradient; and the head against plain autograd."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.batch import Signal, TopK
from limbeck.errors import RecipeError
from limbeck.objectives import CrossEntropy, Hidden, Logits
from limbeck.objectives import head as output_head
from limbeck.objectives.base import OutputTerm, active
from limbeck.objectives.divergences import DIVERGENCES
from limbeck.objectives.head import Head
from limbeck.objectives.support import Dense, DenseTarget, Gradient, TopKTarget

N, V, D, E = 7, 23, 8, 6


def _draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    """From the definition: exponentials over their sum."""
    weights = [[torch.exp(value / temperature) for value in row] for row in logits]
    return torch.stack([torch.stack(row) / sum(row) for row in weights])


def _reference(name: str, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    p, q = _softmax(teacher, temperature), _softmax(student, temperature)
    if name == "reverse_kl":
        p, q = q, p
    return temperature**2 * torch.stack([sum(p[n, v] * torch.log(p[n, v] / q[n, v]) for v in range(p.shape[1])) for n in range(len(p))])


@pytest.mark.parametrize(("name", "temperature"), [*itertools.product(sorted(DIVERGENCES), (0.5, 1.0, 2.0))])
def test_divergence_equals_its_definition_in_value_and_gradient(name: str, temperature: float) -> None:
    teacher, student = _draw(N, V, seed=1), _draw(N, V, seed=2).requires_grad_()
    expected = _reference(name, teacher, student, temperature)
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    ours = student.detach().float().requires_grad_()
    term = Logits(divergence=name, temperature=temperature)
    targets = torch.zeros(N, dtype=torch.long)
    values = term.values(Dense(ours), DenseTarget(teacher.float()), targets)
    (grad,) = torch.autograd.grad(values.sum(), ours)
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-6)
    assert_closed_form(term, ours.detach(), DenseTarget(teacher.float()), targets, expected.detach(), expected_grad)


def assert_closed_form(term: OutputTerm, student: Tensor, teacher: Any, targets: Tensor, expected: Tensor, expected_grad: Tensor) -> None:
    """Values and gradient of the closed form, if the term has one, against a reference."""
    collected, dense = Gradient(), Dense(student)
    values = term.closed_form(collected, 0.7, dense, teacher, targets)
    assert values is not None, "every loss here has a closed form"
    torch.testing.assert_close(values.double(), expected.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(collected.make(dense).double(), 0.7 * expected_grad.double(), rtol=1e-4, atol=1e-6)


def test_cross_entropy_equals_its_definition_in_value_and_gradient() -> None:
    student, targets = _draw(N, V).requires_grad_(), torch.arange(N)
    expected = -torch.log(_softmax(student, 1.0)[torch.arange(N), targets])
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    dense = Dense(student.detach().float())
    torch.testing.assert_close(CrossEntropy().values(dense, None, targets).double(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert_closed_form(CrossEntropy(), student.detach().float(), None, targets, expected.detach(), expected_grad)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_divergence_is_finite_at_the_extremes(name: str) -> None:
    one_hot = torch.full((1, V), -1e4)
    one_hot[0, 3] = 1e4
    flat, other_hot = torch.zeros(1, V), one_hot.roll(1, dims=1)
    for teacher, student in itertools.product((one_hot, flat, other_hot), repeat=2):
        leaf = student.clone().requires_grad_()
        values = Logits(divergence=name).values(Dense(leaf), DenseTarget(teacher), torch.zeros(1, dtype=torch.long))
        (grad,) = torch.autograd.grad(values.sum(), leaf)
        assert torch.isfinite(values).all() and torch.isfinite(grad).all()
        assert (values >= -1e-6).all()


def test_teacher_with_impossible_tokens_is_finite() -> None:
    teacher = torch.zeros(1, V)
    teacher[0, 5:] = -torch.inf
    leaf = _draw(1, V).float().requires_grad_()
    values = Logits().values(Dense(leaf), DenseTarget(teacher), torch.zeros(1, dtype=torch.long))
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    assert torch.isfinite(values).all() and torch.isfinite(grad).all()


def test_half_precision_logits_are_computed_in_float32() -> None:
    assert Dense(torch.zeros(2, V, dtype=torch.bfloat16)).log_probs().dtype == torch.float32


@pytest.mark.parametrize("measure", ["mse", "cosine"])
@pytest.mark.parametrize("normalize", ["layer_norm", "none"])
def test_hidden_equals_its_definition(measure: str, normalize: str) -> None:
    term = Hidden(measure=measure, normalize=normalize, pairs=[(0, 0), (1, 2)])
    maps = term.projections(2, D, E, torch.Generator().manual_seed(0))
    ours, theirs = [_draw(N, D, seed=s).float() for s in (1, 2)], [_draw(N, E, seed=s).float() for s in (3, 4)]
    found = term.values(ours, theirs, maps)
    expected = torch.zeros(N, dtype=torch.float64)
    for student, teacher, linear in zip(ours, theirs, maps, strict=True):
        a, b = student.double() @ linear.weight.double().T, teacher.double()
        if normalize == "layer_norm":
            a, b = ((x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) for x in (a, b))
        if measure == "mse":
            expected += ((a - b) ** 2).mean(-1) / 2
        else:
            expected += (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))) / 2
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_hidden_needs_no_projection_at_equal_widths() -> None:
    assert len(Hidden().projections(3, D, D, torch.Generator())) == 0


@pytest.mark.parametrize(
    ("student", "teacher", "num_pairs", "expected"),
    [
        (3, 6, None, ((0, 1), (1, 3), (2, 5))),
        (4, 4, None, ((0, 0), (1, 1), (2, 2), (3, 3))),
        (14, 30, 2, ((6, 14), (13, 29))),
        (5, 7, 1, ((4, 6),)),
        (2, 1, None, ((0, 0), (1, 0))),
    ],
)
def test_uniform_map_includes_the_last_block(student: int, teacher: int, num_pairs: int | None, expected: tuple) -> None:
    assert Hidden(num_pairs=num_pairs).layer_pairs(student, teacher) == expected


def _top_k(teacher: Tensor, k: int, temperatures: tuple[float, ...] = ()) -> TopK:
    top, ids = torch.log_softmax(teacher, -1).topk(k, dim=-1)
    tails = {}
    for temperature in {1.0, *temperatures}:
        tails[temperature] = torch.log_softmax(teacher / temperature, -1).scatter(-1, ids, -torch.inf).logsumexp(-1).float()
    return TopK(ids, top.float(), tails)


def _target_of(top: TopK) -> TopKTarget:
    return TopKTarget(top.ids, top.log_probs, top.log_tails)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("k", [1, 5, V - 1])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_top_k_with_tail_equals_its_definition(name: str, k: int, temperature: float) -> None:
    """k + 1 bins: the kept tokens, and one for all the rest, of teacher and of student."""
    teacher, student = _draw(N, V, seed=1), _draw(N, V, seed=2).requires_grad_()
    p, q = _softmax(teacher, temperature), _softmax(student, temperature)
    ids = _top_k(teacher, k).ids
    kept = torch.zeros(N, V, dtype=torch.bool).scatter(-1, ids, True)
    bins = [torch.cat([x.gather(-1, ids), (x * ~kept).sum(-1, keepdim=True)], -1) for x in (p, q)]
    if name == "reverse_kl":
        bins.reverse()
    expected = temperature**2 * (bins[0] * (bins[0] / bins[1]).log()).sum(-1)
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    term, targets = Logits(divergence=name, temperature=temperature), torch.zeros(N, dtype=torch.long)
    ours, target = student.detach().float().requires_grad_(), _target_of(_top_k(teacher, k, (temperature,)))
    values = term.values(Dense(ours), target, targets)
    (grad,) = torch.autograd.grad(values.sum(), ours)
    torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-3, atol=1e-5)
    assert_closed_form(term, ours.detach(), target, targets, values.detach(), grad)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_the_whole_vocabulary_equals_dense(name: str, temperature: float) -> None:
    teacher, student = _draw(N, V, seed=1).float(), _draw(N, V, seed=2).float().requires_grad_()
    term, targets = Logits(divergence=name, temperature=temperature), torch.zeros(N, dtype=torch.long)
    dense = term.values(Dense(student), DenseTarget(teacher), targets)
    (dense_grad,) = torch.autograd.grad(dense.sum(), student)
    target = _target_of(_top_k(teacher, V, (temperature,)))
    sparse = term.values(Dense(student), target, targets)
    (grad,) = torch.autograd.grad(sparse.sum(), student)
    torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, dense_grad, rtol=1e-4, atol=1e-5)
    assert_closed_form(term, student.detach(), target, targets, dense.detach(), dense_grad)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_student_equal_to_a_top_k_teacher_has_no_loss(name: str, temperature: float) -> None:
    """Renormalising over k instead of keeping the tail would cost -log(mass) here."""
    teacher = _draw(N, V, seed=1).float()
    dense, collected = Dense(teacher), Gradient()
    term = Logits(divergence=name, temperature=temperature)
    values = term.closed_form(collected, 1.0, dense, _target_of(_top_k(teacher, 3, (temperature,))), torch.zeros(N, dtype=torch.long))
    assert values is not None and values.abs().max() < 1e-5 and collected.make(dense).abs().max() < 1e-5


def test_temperature_that_a_top_k_teacher_did_not_store_is_refused() -> None:
    teacher = _draw(N, V, seed=1).float()
    with pytest.raises(RecipeError, match=r"found temperature 3, .*: 1, 2;"):
        Logits(temperature=3.0).values(Dense(teacher), _target_of(_top_k(teacher, 3, (2.0,))), torch.zeros(N, dtype=torch.long))


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_top_k_is_finite_where_the_student_has_no_tail(name: str) -> None:
    sure = torch.full((1, V), -1e4)
    sure[0, 3] = 1e4
    target = _target_of(_top_k(torch.zeros(1, V), 4))
    collected, dense = Gradient(), Dense(sure)
    values = Logits(divergence=name).closed_form(collected, 1.0, dense, target, torch.zeros(1, dtype=torch.long))
    assert values is not None and torch.isfinite(values).all() and torch.isfinite(collected.make(dense)).all()


OBJECTIVES = {
    "ce": [CrossEntropy()],
    "forward_kl": [Logits(weight=0.3)],
    "ce + forward_kl at T=2": [CrossEntropy(weight=0.5), Logits(weight=2.0, temperature=2.0)],
    "reverse_kl": [Logits(divergence="reverse_kl")],
    "ce + reverse_kl": [CrossEntropy(), Logits(divergence="reverse_kl")],
    "all": [CrossEntropy(weight=0.5), Logits(weight=0.7), Logits(divergence="reverse_kl", temperature=1.5, weight=0.2)],
}
HEADS = {
    "linear": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"soft_cap": 3.0},
    "capped and scaled": {"soft_cap": 3.0, "scale": 2.0, "bias": True},
}


def _head(kind: str, seed: int, width: int) -> Head:
    settings = dict(HEADS[kind])
    bias = _draw(V, seed=seed + 1).float().requires_grad_() if settings.pop("bias", False) else None
    return Head(_draw(V, width, seed=seed, scale=0.7).float().requires_grad_(), bias, **settings)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
@pytest.mark.parametrize("kind", sorted(HEADS))
@pytest.mark.parametrize("chunks", [1, 3, 20])
@pytest.mark.parametrize("support", ["dense", "top_k"])
def test_fused_head_equals_plain_autograd(objective: str, kind: str, chunks: int, support: str) -> None:
    terms = active(OBJECTIVES[objective])
    scales = {key: term.weight / N for key, term in terms.items()}
    teacher_head = _head("linear", 50, E)
    signal = (
        Signal(output=_draw(N, E, seed=7).float(), teacher_head=lambda rows: teacher_head(rows).detach()) if objective != "ce" else Signal()
    )
    targets = torch.arange(N) * 2
    results: list[Any] = []
    for path in (output_head.fused, output_head.plain):
        head, rows = _head(kind, 10, D), _draw(N, D, seed=9).float().requires_grad_()
        extra = (chunks,) if path is output_head.fused else ()
        loss, sums = path(rows, head, targets, signal, terms, scales, *extra)
        (loss * 1.7).backward()
        grads = [rows.grad, head.weight.grad, *([head.bias.grad] if head.bias is not None else [])]
        results.append((loss.detach(), sums, grads))
    (fused_loss, fused_sums, fused_grads), (plain_loss, plain_sums, plain_grads) = results
    torch.testing.assert_close(fused_loss, plain_loss, rtol=1e-5, atol=1e-6)
    assert set(fused_sums) == set(plain_sums) == {*terms, *(["teacher_nll"] if signal.output is not None else [])}
    for key in fused_sums:
        torch.testing.assert_close(fused_sums[key], plain_sums[key], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(fused_grads, plain_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_frozen_head_gets_no_gradient_and_rows_still_do() -> None:
    head, rows = Head(_draw(V, D).float()), _draw(N, D, seed=9).float().requires_grad_()
    loss, _ = output_head.fused(rows, head, torch.arange(N), Signal(), active([CrossEntropy()]), {"ce": 1.0}, 2)
    loss.backward()
    assert head.weight.grad is None and rows.grad is not None and rows.grad.abs().sum() > 0


def test_no_rows_give_zero_loss_and_zero_gradients() -> None:
    head, rows = _head("bias", 10, D), torch.zeros(0, D, requires_grad=True)
    loss, sums = output_head.fused(rows, head, torch.zeros(0, dtype=torch.long), Signal(), active([CrossEntropy()]), {"ce": 1.0}, 4)
    loss.backward()
    assert loss == 0 and sums["ce"] == 0 and head.weight.grad is not None and not head.weight.grad.any()


@pytest.mark.parametrize("rows", [1, 100, 5000])
def test_chunks_depend_on_the_recipe_only_and_stay_in_memory(rows: int) -> None:
    chunks = output_head.num_chunks(rows, vocabulary=50_000, memory_mb=64)
    assert chunks >= 1
    assert -(-rows // chunks) * 50_000 * 4 * output_head.LIVE_BUFFERS <= 64 * 2**20
