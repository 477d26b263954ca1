"""Divergences between two distributions over the same bins: values per token, unreduced, in nats.

A divergence is one class that is its own config and declares what holds for it; its maths are pure functions of the bins. The Logits term
takes one by name. Names are written out, because `beta` or "KL" mean opposite directions in different libraries. The file imports no torch,
so that recipes can be checked without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from limbeck.spec import Family

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from limbeck.objectives.support import Bins

    Slopes = list[tuple[Tensor, float | Tensor]]


class Divergence(Family):
    """Base of the family of divergences.

    `p` is the teacher's probability of a bin and `q` the student's. A divergence must be finite, with a finite gradient, where p is
    one-hot and where q underflows, and may not change what the bins hold: other terms read it too.
    """

    type: str

    supports: ClassVar[frozenset[str]] = frozenset({"dense", "top_k"})
    """Over what it is defined: the whole vocabulary, the teacher's top k tokens and one bin for the rest, or (`sampled`, for what is linear
    in the teacher) tokens drawn from it."""
    zero_at_equal: ClassVar[bool] = True
    """It and its gradient vanish where student and teacher agree."""
    linear_in_teacher: ClassVar[bool] = False
    """An unbiased estimate of the teacher's probabilities gives an unbiased gradient."""
    t_squared: ClassVar[bool] = False
    """Scaled by T^2, so that its gradient keeps its size as T grows (Hinton et al. 2015, 1503.02531)."""

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        """The divergence of each token, differentiable."""
        raise NotImplementedError

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes] | None:
        """Values, and dD/d(log q) of each bin as a sum of tensors `[n, S]` times factors (numbers, or one per row); up to a multiple of q,
        which no gradient sees. With as few temporaries as it can; without it, autograd is used."""
        return None


def forward_kl(teacher_log_probs: Float[Tensor, "n s"], student_log_probs: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """KL(teacher || student) = sum_i p_i (log p_i - log q_i) (Hinton et al. 2015, 1503.02531).

    The constant sum p log p is kept, so that the value reaches 0 where the two agree.
    """
    return (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum(-1)


def reverse_kl(teacher_log_probs: Float[Tensor, "n s"], student_log_probs: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """KL(student || teacher) = sum_i q_i (log q_i - log p_i) (MiniLLM, 2306.08543)."""
    return forward_kl(student_log_probs, teacher_log_probs)


class ForwardKL(Divergence):
    """KL(teacher || student) = sum p log(p/q): covers all that the teacher says (Hinton et al. 2015, 1503.02531)."""

    type: Literal["forward_kl"] = "forward_kl"
    supports: ClassVar[frozenset[str]] = frozenset({"dense", "top_k", "sampled"})
    linear_in_teacher: ClassVar[bool] = True
    t_squared: ClassVar[bool] = True

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        return forward_kl(bins.log_p, bins.log_q)

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes]:
        return (bins.log_p - bins.log_q).mul_(bins.p).sum(-1), [(bins.p, -1.0)]


class ReverseKL(Divergence):
    """KL(student || teacher) = sum q log(q/p): seeks modes (MiniLLM, 2306.08543)."""

    type: Literal["reverse_kl"] = "reverse_kl"
    t_squared: ClassVar[bool] = True

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        return reverse_kl(bins.log_p, bins.log_q)

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes]:
        excess = (bins.log_q - bins.log_p).mul_(bins.q)
        return excess.sum(-1), [(excess, 1.0)]


class SymmetricKL(Divergence):
    """w KL(teacher || student) + (1 - w) KL(student || teacher)."""

    type: Literal["symmetric_kl"] = "symmetric_kl"
    forward_weight: float = Field(0.5, ge=0, le=1)
    """w, the share of forward KL: 1 is `forward_kl`, 0 is `reverse_kl`."""

    t_squared: ClassVar[bool] = True

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        w = self.forward_weight
        return w * forward_kl(bins.log_p, bins.log_q) + (1 - w) * reverse_kl(bins.log_p, bins.log_q)

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes]:
        forward, reverse, excess = _both_directions(bins)
        w = self.forward_weight
        return w * forward + (1 - w) * reverse, [(bins.p, -w), (excess, 1 - w)]


class AdaptiveKL(Divergence):
    """w KL(teacher || student) + (1 - w) KL(student || teacher), w from where the two differ (Wu et al. 2024, 2404.02657).

    w = g_head / (g_head + g_tail), g the sum of |p - q| over the teacher's most probable tokens of together at most half of its mass (at
    least one token, never the bin of the rest), and over all others. w is a constant for the gradient, and 1 where p = q.
    """

    type: Literal["adaptive_kl"] = "adaptive_kl"
    t_squared: ClassVar[bool] = True

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        w = _head_share(bins).squeeze(-1)
        return w * forward_kl(bins.log_p, bins.log_q) + (1 - w) * reverse_kl(bins.log_p, bins.log_q)

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes]:
        forward, reverse, excess = _both_directions(bins)
        w = _head_share(bins)
        return (w * forward[:, None] + (1 - w) * reverse[:, None]).squeeze(-1), [(bins.p, -w), (excess, 1 - w)]


class JSD(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (GKD, 2306.13649).

    Its true limit at beta = 0 and 1 is 0; divided by beta it tends to forward KL at 0, and divided by 1 - beta to reverse KL at 1.
    """

    type: Literal["jsd"] = "jsd"
    beta: float = Field(0.5, ge=0.001, le=0.999)
    """The teacher's share of the mixture m. Near 0 it acts like forward KL, near 1 like reverse KL."""
    normalize: bool = False
    """Divide by beta (1 - beta), so that the size of the loss, and with it the best learning rate, does not change with beta."""

    t_squared: ClassVar[bool] = True

    @property
    def _factor(self) -> float:
        return 1 / (self.beta * (1 - self.beta)) if self.normalize else 1.0

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        log_m = _log_mixture(bins, self.beta)
        return self._factor * (self.beta * forward_kl(bins.log_p, log_m) + (1 - self.beta) * forward_kl(bins.log_q, log_m))

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes]:
        log_m = _mixture(bins, self.beta).log_()
        of_teacher = _dot(bins.p, bins.log_p) - _dot(bins.p, log_m)
        excess = log_m.neg_().add_(bins.log_q).mul_(bins.q)
        values = self.beta * of_teacher + (1 - self.beta) * excess.sum(-1)
        return self._factor * values, [(excess, self._factor * (1 - self.beta))]


class SkewKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q): forward KL that stays below -log(alpha) where q vanishes (DistiLLM, 2402.03898)."""

    type: Literal["skew_kl"] = "skew_kl"
    alpha: float = Field(0.1, ge=0.001, le=0.999)
    """The teacher's share of the mixture. Near 0 it is forward KL; more bounds what a token can cost, and weakens the gradient."""

    t_squared: ClassVar[bool] = True

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        return forward_kl(bins.log_p, _log_mixture(bins, self.alpha))

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes]:
        m = _mixture(bins, self.alpha)
        values = _dot(bins.p, bins.log_p) - _dot(bins.p, m.log())
        return values, [(m.reciprocal_().mul_(bins.q).mul_(bins.p), self.alpha - 1)]


class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q): reverse KL that stays below -log(alpha) where p vanishes (DistiLLM, 2402.03898)."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: float = Field(0.1, ge=0.001, le=0.999)
    """The student's share of the mixture. Near 0 it is reverse KL; more bounds what a token can cost, and weakens the gradient."""
    detach_mixture: bool = False
    """Treat the student inside of the mixture as a constant, as some published code does. The gradient is then not that of the value."""

    t_squared: ClassVar[bool] = True

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        log_m = _log_mixture(bins, 1 - self.alpha, detach=self.detach_mixture)
        return forward_kl(bins.log_q, log_m)

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes]:
        m = _mixture(bins, 1 - self.alpha)
        excess = m.log().neg_().add_(bins.log_q).mul_(bins.q)
        values = excess.sum(-1)
        if self.detach_mixture:
            return values, [(excess, 1.0)]
        return values, [(excess, 1.0), (m.reciprocal_().mul_(bins.q).mul_(bins.q), -self.alpha)]


class TVD(Divergence):
    """Total variation, 1/2 sum |p - q|, between 0 and 1: no token can cost more than another (2307.15190)."""

    type: Literal["tvd"] = "tvd"

    zero_at_equal: ClassVar[bool] = False  # its gradient, that of an absolute value, keeps its size until there is no difference at all

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        return 0.5 * (bins.p - bins.q).abs().sum(-1)

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes]:
        difference = bins.q - bins.p
        values = 0.5 * difference.abs().sum(-1)
        return values, [(difference.sign_().mul_(bins.q), 0.5)]


class AlphaBeta(Divergence):
    """-1/(a b) sum(p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)), a = alpha, b = beta, with its limits where one is 0 (ABKD, 2505.04560).

    (1, 0) is forward KL and (0, 1) reverse KL. It is computed from differences that have these limits, not from the sum above, in which
    a small a or b would leave rounding noise only.
    """

    type: Literal["alpha_beta"] = "alpha_beta"
    alpha: float = Field(0.2, ge=0, le=10)
    """More of it puts weight on tokens where teacher and student differ by a large factor."""
    beta: float = Field(0.7, ge=0, le=10)
    """More of it puts weight on tokens of which the student is sure."""

    @model_validator(mode="after")
    def _not_both_zero(self) -> AlphaBeta:
        if self.alpha + self.beta < _SMALLEST_SUM:
            raise ValueError(
                f"found alpha {self.alpha:g} and beta {self.beta:g}, expected together at least {_SMALLEST_SUM:g}; (1, 0) is forward_kl, "
                "(0, 1) is reverse_kl"
            )
        return self

    def values(self, bins: Bins) -> Float[Tensor, " n"]:
        return self._terms(bins)[0]

    def slopes(self, bins: Bins) -> tuple[Float[Tensor, " n"], Slopes]:
        a, b = self.alpha, self.beta
        if min(a, b) < _SAFE_EXPONENT:
            values, slope = self._terms(bins)
            return values, [(slope, -1.0)]
        of_teacher, of_student = (log * (a + b) for log in (bins.log_p, bins.log_q))
        cross = (bins.log_p * a).add_(bins.log_q, alpha=b).exp_()
        student = of_student.exp_()
        values = (a * of_teacher.exp_().sum(-1) + b * student.sum(-1)) / (a * b * (a + b)) - cross.sum(-1) / (a * b)
        return values, [(cross.sub_(student), -1 / a)]

    def _terms(self, bins: Bins) -> tuple[Tensor, Tensor]:
        """Values, and (p^a q^b - q^(a+b)) / a, which is -dD/d(log q)."""
        a, b = self.alpha, self.beta
        log_ratio = bins.log_p - bins.log_q
        log_power = bins.log_q * (a + b)
        slope = _quotient(log_power, log_ratio, a)
        if a < b:
            return (_quotient(log_power, log_ratio, a + b) - slope).sum(-1) / b, slope
        log_power, log_ratio = bins.log_p * (a + b), -log_ratio
        return (_quotient(log_power, log_ratio, a + b) - _quotient(log_power, log_ratio, b)).sum(-1) / a, slope


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row. Its temporary is one of a block of rows, and lives in the cache."""
    return (a * b).sum(-1)


def _both_directions(bins: Bins) -> tuple[Tensor, Tensor, Tensor]:
    """Forward KL, reverse KL, and q log(q/p)."""
    ratio = bins.log_q - bins.log_p
    forward = -_dot(bins.p, ratio)
    excess = ratio.mul_(bins.q)
    return forward, excess.sum(-1), excess


def _log_mixture(bins: Bins, teacher_share: float, detach: bool = False) -> Tensor:
    """log(share p + (1 - share) q), in log space."""
    log_q = bins.log_q.detach() if detach else bins.log_q
    return (bins.log_p + math.log(teacher_share)).logaddexp(log_q + math.log(1 - teacher_share))


def _mixture(bins: Bins, teacher_share: float) -> Tensor:
    """share p + (1 - share) q as a new tensor. A sum of two positive numbers is as exact as they are, and its logarithm
    cheaper than that of a sum of exponentials; where both underflow, so do their weights."""
    return (bins.p * teacher_share).add_(bins.q, alpha=1 - teacher_share).clamp_(min=_TINY)


_TINY = 1e-37
"""A normal float32: the reciprocal and the logarithm are finite."""
_SAFE_EXPONENT = 0.1
"""From here on the sum in the definition of alpha_beta loses little, and is cheaper than the differences."""
_SMALLEST_SUM = 0.01
"""Of the exponents of alpha_beta; below, all tokens of the vocabulary count alike and float32 sees rounding."""
_VANISHING = 1e-9
"""An exponent that float32 cannot tell from 0."""
_HEAD_MASS = 0.5
_FIRST_TRIED = 64
"""Most heads are smaller, and a partial sort is cheaper than a full one."""


def _head_share(bins: Bins) -> Float[Tensor, "n 1"]:
    """Of sum |p - q|, what lies on the teacher's head: its most probable tokens up to half of its mass."""
    p, q = bins.p.detach(), bins.q.detach()
    tokens = p[:, :-1] if bins.has_tail else p
    size = min(_FIRST_TRIED, tokens.shape[1])
    while True:
        top = tokens.topk(size, dim=-1)
        mass = top.values.cumsum(-1)
        # a number read from an accelerator, once per block of 2^25 logits: far cheaper there than to sort them all
        if size == tokens.shape[1] or bool((mass[:, -1] > _HEAD_MASS).all()):
            break
        size = min(size * 8, tokens.shape[1])
    is_head = mass <= _HEAD_MASS
    is_head[:, 0] = True
    on_head = ((top.values - q.gather(-1, top.indices)).abs_() * is_head).sum(-1, keepdim=True)
    total = (p - q).abs_().sum(-1, keepdim=True)
    return (on_head / total).nan_to_num_(nan=1.0).clamp_(max=1.0)


def _quotient(log_power: Tensor, log_ratio: Tensor, c: float) -> Tensor:
    """power (ratio^c - 1) / c, and its limit power log(ratio) at c = 0. The larger of power and power ratio^c is factored out, so that
    nothing overflows."""
    if c < _VANISHING:
        return log_power.exp() * log_ratio
    exponent = log_ratio * c
    up, down = exponent.clamp(min=0), exponent.clamp(max=0)
    return (log_power + up).exp().mul((-up).expm1().neg()).where(exponent > 0, log_power.exp() * down.expm1()) / c
