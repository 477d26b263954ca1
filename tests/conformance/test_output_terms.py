"""Every output term on every target that it declares: its definition, and the invariants that hold for all losses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance import references
from conformance.cases import (
    DECLARED,
    DIVERGENCES,
    OUTPUT_TERMS,
    TARGETS,
    TEMPERATURES,
    UNDECLARED,
    N,
    V,
    draw,
    name_of,
    reference,
    signal_of,
)
from limbeck.batch import Signal
from limbeck.errors import RecipeError
from limbeck.objectives import CrossEntropy, Divergence, Logits, MSELogits, OutputTerm, Term
from limbeck.objectives import head as output_head
from limbeck.objectives.base import active
from limbeck.objectives.head import Head, target_of
from limbeck.objectives.support import Dense, Gradient

TARGET_IDS = torch.where(torch.arange(N) % 2 == 0, draw(N, V, seed=1).argmax(-1), draw(N, V, seed=1).argmin(-1))
"""The data's tokens: what the teacher finds most and least likely, in turns."""
SCALE = 0.7

FEWER = [(name, target) for name, target in DECLARED if "T=0.5" not in name and target not in ("top_1", f"top_{V - 1}")]
"""For what depends on the temperature only through what is tested elsewhere."""
each_of_fewer = pytest.mark.parametrize(("name", "target"), FEWER, ids=[f"{name}-{target}" for name, target in FEWER])
each_declared = pytest.mark.parametrize(("name", "target"), DECLARED, ids=[f"{name}-{target}" for name, target in DECLARED])


def paths(term: OutputTerm, z: Tensor, signal: Signal, targets: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(path, values or their sum, gradient) by autograd, by the closed form where there is one, and by the chunked head."""
    teacher = target_of(signal, slice(None))
    leaf = z.clone().requires_grad_()
    values = term.values(Dense(leaf), teacher, targets)
    (grad,) = torch.autograd.grad(values.sum(), leaf)
    yield "autograd", values.detach(), grad
    collected, student = Gradient(), Dense(z.clone())
    closed = term.closed_form(collected, SCALE, student, target_of(signal, slice(None)), targets)
    if closed is not None:
        yield "closed form", closed, collected.make(student) / SCALE
    rows = z.float().clone().requires_grad_()
    loss, _ = output_head.fused(rows, Head(torch.eye(z.shape[1])), targets, signal, {"x": term}, {"x": SCALE}, 3)
    loss.backward()
    yield "fused head", loss.detach() / SCALE, rows.grad / SCALE


def assert_equal(found: Iterator[tuple[str, Tensor, Tensor]], values: Tensor, grad: Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for path, ours, our_grad in found:
        expected = values if ours.ndim else values.sum()
        torch.testing.assert_close(ours.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text, path=path: f"{path}: {text}")
        torch.testing.assert_close(our_grad.double(), grad.double(), rtol=rtol, atol=atol, msg=lambda text, path=path: f"{path}: {text}")


# --- nothing is left out


def test_every_loss_has_a_reference() -> None:
    lacking = {term.type for term in OUTPUT_TERMS.values()} - set(references.OUTPUT_TERMS)
    lacking |= {divergence.type for divergence in DIVERGENCES} - set(references.DIVERGENCES)
    assert not lacking, f"no reference for {sorted(lacking)}: write the definition into tests/conformance/references.py"


def test_every_support_is_tested() -> None:
    declared = frozenset().union(*(divergence.supports for divergence in DIVERGENCES), *(term.supports for term in OUTPUT_TERMS.values()))
    assert declared <= set(TARGETS.values()), f"no target on {sorted(declared - set(TARGETS.values()))}: add it to TARGETS in cases.py"


def test_a_loss_without_a_reference_fails_the_suite() -> None:
    before = dict(Term.members), dict(Divergence.members)
    try:

        class Unwritten(Divergence):
            type: Any = "unwritten"

        with pytest.raises(AssertionError, match="'unwritten' has no reference"):
            reference(Logits(divergence=Unwritten()), "dense", draw(1, V, seed=1), draw(1, V, seed=2), TARGET_IDS[:1])
    finally:
        for family, known in zip((Term, Divergence), before, strict=True):
            family.members.clear()
            family.members.update(known)


# --- the definition


@each_declared
def test_equals_its_definition_in_value_and_gradient(name: str, target: str) -> None:
    term, u, z = OUTPUT_TERMS[name], draw(N, V, seed=1), draw(N, V, seed=2)
    values, grad = reference(term, target, u, z, TARGET_IDS)
    assert grad.abs().max() > 1e-3 or (term.type, target) == ("ranking", "top_1"), "a case in which nothing is to be learned tests nothing"
    assert_equal(paths(term, z.float(), signal_of(target, u), TARGET_IDS), values, grad)


@each_declared
def test_equals_its_definition_where_the_teacher_is_sure_and_the_student_wrong(name: str, target: str) -> None:
    """Probabilities down to 1e-9, on both sides."""
    term, u, z = OUTPUT_TERMS[name], draw(N, V, seed=3, scale=1.0), draw(N, V, seed=4, scale=1.0)
    u[:, 3] += 12.0
    z[:, 5] += 12.0
    values, grad = reference(term, target, u, z, TARGET_IDS)
    temperature = getattr(term, "temperature", 1.0)
    tolerance = 1e-4 * max(1.0, values.abs().max().item()) / min(temperature, 1.0)
    assert_equal(paths(term, z.float(), signal_of(target, u), TARGET_IDS), values, grad, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize("vanishing", [1e-300, 1e-12])
@pytest.mark.parametrize("target", ["dense", "top_4"])
def test_exponents_of_almost_zero_are_the_limit(vanishing: float, target: str) -> None:
    """Where the sum of the definition is rounding noise in float64 too."""
    u, z = draw(N, V, seed=1), draw(N, V, seed=2).float()
    for almost, limit in (((vanishing, 1), (0, 1)), ((1, vanishing), (1, 0)), ((vanishing, 0.05), (0, 0.05))):
        terms = [Logits(divergence={"type": "alpha_beta", "alpha": a, "beta": b}) for a, b in (almost, limit)]
        _, values, grad = next(paths(terms[1], z, signal_of(target, u), TARGET_IDS))
        assert grad.abs().max() > 1e-3
        assert_equal(paths(terms[0], z, signal_of(target, u), TARGET_IDS), values, grad)


# --- invariants


@pytest.mark.parametrize("name", [name for name, target in DECLARED if target == f"top_{V}"])
def test_top_k_of_the_whole_vocabulary_equals_dense(name: str) -> None:
    term, u, z = OUTPUT_TERMS[name], draw(N, V, seed=1), draw(N, V, seed=2).float()
    _, values, grad = next(paths(term, z, signal_of("dense", u), TARGET_IDS))
    assert_equal(paths(term, z, signal_of(f"top_{V}", u), TARGET_IDS), values, grad)


def is_zero_at_equal(term: OutputTerm) -> bool:
    return isinstance(term, MSELogits) or (isinstance(term, Logits) and term.divergence.zero_at_equal)


@each_declared
def test_is_never_negative_and_zero_at_equality_where_declared(name: str, target: str) -> None:
    term, u, z = OUTPUT_TERMS[name], draw(N, V, seed=1), draw(N, V, seed=2).float()
    signal = signal_of(target, u)
    if target == "spread_4":  # a spread teacher is another distribution than the one it was made from
        u = target_of(signal, slice(None)).log_probs().double()  # type: ignore[union-attr]
        if getattr(term, "temperature", 1.0) != 1.0:
            pytest.skip("what a spread teacher says at another temperature is no softmax of what it says at 1")
    for student in (z, u.float(), (u + 0.01 * z).float()):
        for path, values, _ in paths(term, student, signal, TARGET_IDS):
            assert values.min() >= -1e-5, path
    for path, values, grad in paths(term, u.float() + 3.0, signal, TARGET_IDS) if isinstance(term, Logits | MSELogits) else ():
        assert values.abs().max() < 2e-5, path
        assert not is_zero_at_equal(term) or grad.abs().max() < 2e-5, path


@each_of_fewer
def test_does_not_see_a_shift_of_logits(name: str, target: str) -> None:
    term, u, z = OUTPUT_TERMS[name], draw(N, V, seed=1), draw(N, V, seed=2).float()
    shift = torch.tensor([[5.0], [-3.0], [0.5], [20.0]])
    _, values, grad = next(paths(term, z, signal_of(target, u), TARGET_IDS))
    assert_equal(paths(term, z + shift, signal_of(target, u - 2 * shift.double()), TARGET_IDS), values, grad)


@each_of_fewer
def test_chunks_order_and_company_do_not_matter(name: str, target: str) -> None:
    """A token has its value whatever else is in the batch, in whatever chunk; and the plain head says the same."""
    term, u, z = OUTPUT_TERMS[name], draw(N, V, seed=1), draw(N, V, seed=2).float()
    terms, scales = {"ce": CrossEntropy(), "x": term}, {"ce": 0.3, "x": SCALE}

    def run(order: list[int], chunks: int | None) -> tuple[Tensor, Tensor, Tensor]:
        rows, weight = z[order].clone().requires_grad_(), torch.eye(V, requires_grad=True)
        head = Head(weight, torch.linspace(-1, 1, V), 2.0, 5.0)
        extra = () if chunks is None else (chunks,)
        run_head: Any = output_head.plain if chunks is None else output_head.fused
        loss, sums = run_head(rows, head, TARGET_IDS[order], signal_of(target, u[order]), terms, scales, *extra)
        loss.backward()
        assert loss.item() == pytest.approx(0.3 * sums["ce"].item() + SCALE * sums["x"].item(), rel=1e-5, abs=1e-6)
        return loss.detach(), rows.grad, weight.grad

    loss, grad, weight_grad = run([0, 1, 2, 3], None)
    for order, chunks in (([0, 1, 2, 3], 1), ([3, 1, 0, 2], 3), ([3, 1, 0, 2], None), ([0, 1, 2, 3], 9)):
        other, other_grad, other_weight_grad = run(order, chunks)
        torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other_grad, grad[order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(other_weight_grad, weight_grad, rtol=1e-4, atol=1e-4)
    alone = sum(run([i], 2)[0] for i in range(N))
    torch.testing.assert_close(alone, loss, rtol=1e-5, atol=1e-5)


@each_of_fewer
def test_no_tokens_have_no_loss(name: str, target: str) -> None:
    signal, rows = signal_of(target, draw(0, V, seed=1)), torch.zeros(0, V, requires_grad=True)
    weight = torch.eye(V, requires_grad=True)
    loss, sums = output_head.fused(rows, Head(weight), TARGET_IDS[:0], signal, {"x": OUTPUT_TERMS[name]}, {"x": 1.0}, 2)
    loss.backward()
    assert loss == 0 and sums["x"] == 0 and weight.grad is not None and not weight.grad.any()
    values = OUTPUT_TERMS[name].values(Dense(rows.detach()), target_of(signal, slice(None)), TARGET_IDS[:0])
    assert values.shape == (0,)


def _one_hot(at: int, gap: float) -> Tensor:
    row = torch.full((1, V), -gap / 2, dtype=torch.float64)
    row[0, at] = gap / 2
    return row


@each_declared
def test_is_finite_at_the_extremes(name: str, target: str) -> None:
    """Teacher or student sure of one token, of the same or of another, or undecided: also where float32 has no number for the rest."""
    term = OUTPUT_TERMS[name]
    for gap in (40.0, 2e4):
        rows = (_one_hot(3, gap), torch.zeros(1, V, dtype=torch.float64), _one_hot(4, gap))
        u, z = (torch.cat(column) for column in zip(*itertools.product(rows, repeat=2), strict=True))
        for path, values, grad in paths(term, z.float(), signal_of(target, u), torch.full((9,), 4)):
            assert torch.isfinite(values).all() and torch.isfinite(grad).all(), (path, gap)
            assert values.min() >= -1e-5, (path, gap)


@each_declared
def test_is_finite_where_the_teacher_rules_tokens_out(name: str, target: str) -> None:
    u = draw(N, V, seed=1)
    u[:, 6:] = -torch.inf
    term = OUTPUT_TERMS[name]
    for path, values, grad in paths(term, draw(N, V, seed=2).float(), signal_of(target, u), torch.tensor([2, 0, 4, 5])):
        assert torch.isfinite(values).all() and torch.isfinite(grad).all(), path


def test_the_gradient_of_a_sure_student_is_exact() -> None:
    """A tail of 1e-12 against a teacher's of 0.5: what is added in the tail must not drown what is left on the kept tokens."""
    u, z = torch.zeros(1, V, dtype=torch.float64), _one_hot(0, 30.0)
    u[0, :3] = 2.0
    values, grad = reference(Logits(), "top_4", u, z, torch.tensor([0]))
    assert_equal(paths(Logits(), z.float(), signal_of("top_4", u), torch.tensor([0])), values, grad)


@each_of_fewer
def test_half_precision_is_computed_in_float32(name: str, target: str) -> None:
    term, u, z = OUTPUT_TERMS[name], draw(N, V, seed=1), draw(N, V, seed=2).bfloat16()
    half, full = (term.values(Dense(x), target_of(signal_of(target, u), slice(None)), TARGET_IDS) for x in (z, z.float()))
    assert half.dtype == torch.float32 and torch.equal(half, full)
    rows, weight = z.clone().requires_grad_(), torch.eye(V, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = output_head.fused(rows, Head(weight), TARGET_IDS, signal_of(target, u), {"x": term}, {"x": 1.0}, 1)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(full.sum().item(), rel=1e-5, abs=1e-5)
    assert rows.grad is not None and rows.grad.dtype == torch.bfloat16 and torch.isfinite(rows.grad).all()


# --- what a loss declares


@pytest.mark.parametrize("divergence", [each for each in DIVERGENCES if not each.model_fields_set], ids=name_of)
def test_linearity_in_the_teacher_is_as_declared(divergence: Divergence) -> None:
    """The gradient for a mixture of two teachers is the mixture of their gradients: what makes sampled targets unbiased."""
    z = draw(N, V, seed=2).float()
    logs = [torch.log_softmax(draw(N, V, seed=seed), -1) for seed in (5, 6)]
    mixed = torch.logaddexp(*logs) - torch.log(torch.tensor(2.0))
    one, other, both = (next(paths(Logits(divergence=divergence), z, signal_of("dense", u), TARGET_IDS))[2] for u in (*logs, mixed))
    assert torch.allclose((one + other) / 2, both, rtol=1e-4, atol=1e-5) == divergence.linear_in_teacher


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_only_losses_of_the_convention_have_the_factor(divergence: Divergence) -> None:
    assert divergence.t_squared == (divergence.type in references.T_SQUARED)


@pytest.mark.parametrize(("name", "target"), UNDECLARED, ids=[f"{name}-{target}" for name, target in UNDECLARED])
def test_undeclared_combinations_are_refused_by_name(name: str, target: str) -> None:
    term, signal = OUTPUT_TERMS[name], signal_of(target, draw(N, V, seed=1))
    what = getattr(term, "divergence", term).type
    with pytest.raises(
        RecipeError, match=rf"objective.{term.type}: ({what} is defined on .* gives {TARGETS[target]}|found temp.* expected 1)"
    ):
        term.values(Dense(draw(N, V, seed=2).float()), target_of(signal, slice(None)), TARGET_IDS)


@pytest.mark.parametrize("name", [name for name, term in OUTPUT_TERMS.items() if term.needs(1, 1).output])
def test_a_term_without_its_teacher_is_refused_by_name(name: str) -> None:
    with pytest.raises(RecipeError, match=f"objective.{OUTPUT_TERMS[name].type}: .* the teacher gives no output"):
        OUTPUT_TERMS[name].values(Dense(draw(N, V, seed=2).float()), None, TARGET_IDS)


@pytest.mark.parametrize("name", [name for name, term in OUTPUT_TERMS.items() if isinstance(term, Logits)])
def test_temperatures_that_a_capture_lacks_are_refused(name: str) -> None:
    term = OUTPUT_TERMS[name].model_copy(update={"temperature": 3.0})
    assert "found temperature 3" in str(term.refuses("top_k", TEMPERATURES))
    with pytest.raises(RecipeError, match=r"found temperature 3, .*: 0\.5, 1, 2;"):
        term.values(Dense(draw(N, V, seed=2).float()), target_of(signal_of("top_4", draw(N, V, seed=1)), slice(None)), TARGET_IDS)


@pytest.mark.parametrize("name", OUTPUT_TERMS)
def test_a_weight_of_zero_is_no_term(name: str) -> None:
    nothing = OUTPUT_TERMS[name].model_copy(update={"weight": 0.0})
    assert active([CrossEntropy(), nothing]) == active([CrossEntropy()])


@pytest.mark.parametrize("target", ["dense", "top_4"])
def test_the_share_that_a_gate_leaves_out_is_counted(target: str) -> None:
    u, z = draw(N, V, seed=1), draw(N, V, seed=2).float()
    term = Logits(trust_threshold=0.1)
    probs = torch.softmax(u, -1).gather(-1, TARGET_IDS[:, None]).squeeze(-1)
    assert 0 < (probs < 0.1).sum() < N
    for path, extra in ((output_head.fused, (2,)), (output_head.plain, ())):
        _, sums = path(z, Head(torch.eye(V)), TARGET_IDS, signal_of(target, u), {"logits": term}, {"logits": 1.0}, *extra)
        assert sums["gated/logits"] == (probs < 0.1).sum()
