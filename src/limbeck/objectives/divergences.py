"""Divergences between two distributions: pure functions of log-probabilities `[n, S] -> [n]`, unreduced, in nats.

Each declares its properties; the Logits term looks them up by name. Names are written out, because `beta` or "KL" mean opposite
directions in different libraries. The file imports no torch, so that recipes can be checked without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from limbeck.objectives.support import Dense, DenseTarget, Gradient, SampledTarget, TopKTarget

    ClosedForm = Callable[[Gradient, float, Dense, Any, float], Tensor]


@dataclass(frozen=True)
class Divergence:
    """A divergence and what holds for it.

    `zero_at_equal`: it and its gradient vanish where student and teacher agree. `linear_in_teacher`: an unbiased estimate of the
    teacher's probabilities gives an unbiased gradient. `t_squared`: scaled by T^2, so that its gradient keeps its size as T grows
    (Hinton et al. 2015, 1503.02531). `closed_forms[support](grad, scale, student, teacher, T)` adds scale * dD/d(logits / T)
    to `grad` and returns the values, with as few temporaries of the vocabulary's size as it can; without one, autograd is used.
    """

    name: str
    values: Callable[[Tensor, Tensor], Tensor]
    supports: frozenset[str]
    zero_at_equal: bool
    linear_in_teacher: bool
    t_squared: bool
    closed_forms: Mapping[str, ClosedForm] = field(default_factory=dict)


def forward_kl(teacher_log_probs: Float[Tensor, "n s"], student_log_probs: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """KL(teacher || student) = sum_i p_i (log p_i - log q_i) (Hinton et al. 2015, 1503.02531).

    The constant sum p log p is kept, so that the value reaches 0 where the two agree.
    """
    return _kl(teacher_log_probs, student_log_probs)


def reverse_kl(teacher_log_probs: Float[Tensor, "n s"], student_log_probs: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """KL(student || teacher) = sum_i q_i (log q_i - log p_i): seeks modes (MiniLLM, 2306.08543)."""
    return _kl(student_log_probs, teacher_log_probs)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _forward_kl_dense(grad: Gradient, scale: float, student: Dense, teacher: DenseTarget, temperature: float) -> Tensor:
    """d/d(z/T) KL(p || q) = q - p."""
    probs = teacher.probs(temperature)
    grad.add_probs(scale, temperature)
    grad.add(probs, -scale)
    return (teacher.log_probs(temperature) - student.log_probs(temperature)).mul_(probs).sum(-1)


def _forward_kl_top_k(grad: Gradient, scale: float, student: Dense, teacher: TopKTarget, temperature: float) -> Tensor:
    """q_j - p_j on the k ids and q_j (1 - r/s) elsewhere; r and s are the tails of teacher and student, their ratio formed in log space."""
    log_p, log_q = teacher.log_probs(temperature), teacher.project(student, temperature)
    ratio = (log_p[:, -1:] - log_q[:, -1:]).clamp(max=_LARGEST_LOG_RATIO).exp()
    grad.add_probs(scale * (1 - ratio), temperature)
    grad.scatter(teacher.ids, scale * (log_q[:, :-1].exp() * ratio - log_p[:, :-1].exp()))
    return forward_kl(log_p, log_q)


def _forward_kl_sampled(grad: Gradient, scale: float, student: Dense, teacher: SampledTarget, temperature: float) -> Tensor:
    """W q - w, w the weights and W their sum."""
    from limbeck.objectives.support import measure

    grad.add_probs(scale * teacher.weights.sum(-1, keepdim=True), temperature)
    grad.scatter(teacher.ids, -scale * teacher.weights)
    return measure(forward_kl, student, teacher)


def _reverse_kl_dense(grad: Gradient, scale: float, student: Dense, teacher: DenseTarget, temperature: float) -> Tensor:
    """d/d(z/T) KL(q || p) = q (log(q/p) - KL)."""
    probs = student.probs(temperature)
    excess = student.log_probs(temperature) - teacher.log_probs(temperature)
    values = _dot(probs, excess)
    grad.add(excess.sub_(values[:, None]).mul_(probs), scale)
    return values


def _reverse_kl_top_k(grad: Gradient, scale: float, student: Dense, teacher: TopKTarget, temperature: float) -> Tensor:
    """q_j (a_j - KL) on the k ids and q_j (a_tail - KL) elsewhere, a = log(q/p) of a bin."""
    log_p, log_q = teacher.log_probs(temperature), teacher.project(student, temperature)
    values, excess = reverse_kl(log_p, log_q), log_q - log_p
    grad.add_probs(scale * (excess[:, -1] - values)[:, None], temperature)
    grad.scatter(teacher.ids, scale * log_q[:, :-1].exp() * (excess[:, :-1] - excess[:, -1:]))
    return values


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row. Its temporary is one of a block of rows, and lives in the cache."""
    return (a * b).sum(-1)


_LARGEST_LOG_RATIO = 60.0
"""Of the tails' ratio: finite where the student's tail underflows."""

_BOTH = frozenset({"dense", "top_k"})

DIVERGENCES: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        Divergence(
            "forward_kl",
            forward_kl,
            _BOTH | {"sampled"},
            zero_at_equal=True,
            linear_in_teacher=True,
            t_squared=True,
            closed_forms={"dense": _forward_kl_dense, "top_k": _forward_kl_top_k, "sampled": _forward_kl_sampled},
        ),
        Divergence("reverse_kl", reverse_kl, _BOTH, True, False, True, {"dense": _reverse_kl_dense, "top_k": _reverse_kl_top_k}),
    )
}
