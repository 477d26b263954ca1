"""Divergences between two distributions: pure functions of log-probabilities `[n, S] -> [n]`, unreduced, in nats.

Each declares its properties; the Logits term looks them up by name. Names are written out, because `beta` or "KL" mean opposite
directions in different libraries. The file imports no torch, so that recipes can be checked without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from limbeck.objectives.support import Dense


@dataclass(frozen=True)
class Divergence:
    """A divergence and what holds for it.

    `zero_at_equal`: it and its gradient vanish where student and teacher agree. `linear_in_teacher`: an unbiased estimate of the
    teacher's probabilities gives an unbiased gradient. `t_squared`: scaled by T^2, so that its gradient keeps its size as T grows
    (Hinton et al. 2015, 1503.02531). `closed_form(grad, scale, student, teacher, T)` does `grad += scale * dD/d(logits / T)` and
    returns the values, with as few temporaries of the vocabulary's size as it can; without one, autograd is used.
    """

    name: str
    values: Callable[[Tensor, Tensor], Tensor]
    supports: frozenset[str]
    zero_at_equal: bool
    linear_in_teacher: bool
    t_squared: bool
    closed_form: Callable[[Tensor, float, Dense, Dense, float], Tensor] | None = None


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


def _forward_kl_closed_form(grad: Tensor, scale: float, student: Dense, teacher: Dense, temperature: float) -> Tensor:
    """d/d(z/T) KL(p || q) = q - p."""
    probs = teacher.probs(temperature)
    grad.add_(student.probs(temperature), alpha=scale).sub_(probs, alpha=scale)
    return _dot(probs, teacher.log_probs(temperature)) - _dot(probs, student.log_probs(temperature))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, without a temporary of the rows' size."""
    return (a[:, None, :] @ b[:, :, None]).flatten()


DIVERGENCES: dict[str, Divergence] = {
    divergence.name: divergence
    for divergence in (
        Divergence("forward_kl", forward_kl, frozenset({"dense"}), True, True, True, _forward_kl_closed_form),
        Divergence("reverse_kl", reverse_kl, frozenset({"dense"}), True, False, True),
    )
}
