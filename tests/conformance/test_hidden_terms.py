"""Every hidden term: its definition, and the invariants of losses over states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from conformance import references
from conformance.cases import HIDDEN_TERMS, draw
from limbeck.objectives import Hidden, HiddenTerm

R, D, E = 3, 6, 5

each = pytest.mark.parametrize("term", HIDDEN_TERMS.values(), ids=HIDDEN_TERMS)


def states(seed: int, width: int, pairs: int = 2) -> list[Tensor]:
    return [draw(R, width, seed=seed + i) for i in range(pairs)]


def maps_of(term: HiddenTerm, width: int = D, teacher_width: int = E) -> nn.ModuleList:
    return term.projections(2, width, teacher_width, torch.Generator().manual_seed(0))


def run(term: HiddenTerm, ours: list[Tensor], theirs: list[Tensor], maps: nn.ModuleList) -> tuple[Tensor, list[Tensor]]:
    leaves = [state.clone().requires_grad_() for state in ours]
    values = term.values(leaves, theirs, maps)
    return values.detach(), list(torch.autograd.grad(values.sum(), leaves))


def project(linear: nn.Linear | None, state: list[float]) -> list[float]:
    if linear is None:
        return state
    bias = [0.0] * linear.out_features if linear.bias is None else linear.bias.tolist()
    return [sum(w * x for w, x in zip(row, state, strict=True)) + b for row, b in zip(linear.weight.tolist(), bias, strict=True)]


def test_every_hidden_term_has_a_reference() -> None:
    lacking = {term.type for term in HIDDEN_TERMS.values()} - set(references.HIDDEN_TERMS)
    assert not lacking, f"no reference for {sorted(lacking)}: write the definition into tests/conformance/references.py"


@each
@pytest.mark.parametrize("teacher_width", [E, D])
def test_equals_its_definition_in_value_and_gradient(term: HiddenTerm, teacher_width: int) -> None:
    ours, theirs, maps = states(1, D), states(11, teacher_width), maps_of(term, D, teacher_width)
    reference = references.HIDDEN_TERMS[term.type]
    expected, grads = torch.zeros(R, dtype=torch.float64), [torch.zeros(R, D, dtype=torch.float64) for _ in ours]
    for pair, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
        linear = maps[pair] if len(maps) else None
        for row, wanted in enumerate(yours.tolist()):

            def value(at: list[float], linear: nn.Linear | None = linear, wanted: list[float] = wanted) -> float:
                return float(reference(term, project(linear, at), wanted)) / len(ours)

            expected[row] += value(mine[row].tolist())
            grads[pair][row] = torch.tensor(references.gradient(value, mine[row].tolist()))
    values, found = run(term, [state.float() for state in ours], [state.float() for state in theirs], maps)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5)
    for ours_, theirs_ in zip(found, grads, strict=True):
        torch.testing.assert_close(ours_.double(), theirs_, rtol=1e-3, atol=1e-5)


@each
def test_is_never_negative_and_zero_at_equality(term: HiddenTerm) -> None:
    ours, maps = [state.float() for state in states(1, D)], maps_of(term, D, D)
    theirs = [maps[i](state).detach() if len(maps) else state for i, state in enumerate(ours)]
    values, grads = run(term, ours, theirs, maps)
    assert values.abs().max() < 1e-6 and all(grad.abs().max() < 1e-5 for grad in grads)
    values, _ = run(term, ours, [state.float() for state in states(21, D)], maps)
    assert values.min() > 0


@each
def test_is_finite_at_the_extremes(term: HiddenTerm) -> None:
    """Nothing at all, and one feature that is larger than all others by far."""
    maps = maps_of(term)
    outlier = torch.zeros(R, E)
    outlier[:, 1] = 3e4
    for ours in (torch.zeros(R, D), torch.eye(D)[:R] * 3e4):
        for theirs in (torch.zeros(R, E), outlier):
            values, grads = run(term, [ours, ours], [theirs, theirs], maps)
            assert torch.isfinite(values).all() and all(torch.isfinite(grad).all() for grad in grads)


@each
def test_a_token_has_its_value_whatever_is_beside_it(term: HiddenTerm) -> None:
    ours, theirs, maps = ([s.float() for s in states(1, D)], [s.float() for s in states(11, E)], maps_of(term))
    together, _ = run(term, ours, theirs, maps)
    for row in range(R):
        alone, _ = run(term, [s[row : row + 1] for s in ours], [s[row : row + 1] for s in theirs], maps)
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-6)
    none, _ = run(term, [s[:0] for s in ours], [s[:0] for s in theirs], maps)
    assert none.shape == (0,)


@each
def test_half_precision_is_computed_in_float32(term: HiddenTerm) -> None:
    ours, theirs = [s.bfloat16() for s in states(1, D)], [s.bfloat16() for s in states(11, D)]
    maps = nn.ModuleList()
    half = term.values(ours, theirs, maps)
    assert half.dtype == torch.float32
    assert torch.equal(half, term.values([s.float() for s in ours], [s.float() for s in theirs], maps))


def test_only_the_published_projection_is_frozen() -> None:
    for term in HIDDEN_TERMS.values():
        assert all(parameter.requires_grad == isinstance(term, Hidden) for parameter in maps_of(term).parameters())
        again = maps_of(term)
        assert all(torch.equal(a, b) for a, b in zip(maps_of(term).parameters(), again.parameters(), strict=True))
