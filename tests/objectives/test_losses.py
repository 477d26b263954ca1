"""The head against plain autograd, on heads of every kind; and layer maps. What holds for each loss is in tests/conformance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from limbeck.batch import Signal
from limbeck.objectives import CrossEntropy, Hidden, Logits
from limbeck.objectives import head as output_head
from limbeck.objectives.base import active
from limbeck.objectives.head import Head

N, V, D, E = 7, 23, 8, 6


def _draw(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


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
