"""Every loss once more, from its definition: Python's floats, one token at a time, loops over probabilities. Slow, and obvious.

Nothing here is shared with the package, and no formula is rearranged. A reference takes `z0`, the student's logits that count as constants
where a definition says so; gradients are differences of values, in which only `z` moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Floats = list[float]


@dataclass(frozen=True)
class TaughtToken:
    """What the teacher says of one token: its probabilities at each temperature, and the ids that a top-k teacher kept."""

    probs: dict[float, Floats]
    kept: list[int] | None = None

    def bins(self, probs: Floats) -> Floats:
        """The kept tokens one by one and the rest together; or all tokens, where the teacher is dense."""
        if self.kept is None:
            return probs
        return [probs[i] for i in self.kept] + [sum(prob for i, prob in enumerate(probs) if i not in self.kept)]


def softmax(logits: Sequence[float], temperature: float = 1.0) -> Floats:
    highest = max(logits)
    weights = [math.exp((logit - highest) / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def kl(a: Floats, b: Floats) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def mixture(share: float, a: Floats, b: Floats) -> Floats:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


# --- divergences: teacher's bins p, student's bins q, the student's bins as a constant q0, and whether the last bin is a tail


def adaptive_kl(p: Floats, q: Floats, q0: Floats, has_tail: bool) -> float:
    tokens = sorted(range(len(p) - has_tail), key=lambda i: -p[i])
    head = [tokens[0]]
    for i in tokens[1:]:
        if sum(p[j] for j in head) + p[i] > 0.5:
            break
        head.append(i)
    gaps = [abs(x - y) for x, y in zip(p, q0, strict=True)]
    of_head = sum(gaps[i] for i in head)
    weight = of_head / sum(gaps) if sum(gaps) else 1.0
    return weight * kl(p, q) + (1 - weight) * kl(q, p)


def alpha_beta(p: Floats, q: Floats, alpha: float, beta: float) -> float:
    a, b = alpha, beta
    total = 0.0
    for x, y in zip(p, q, strict=True):
        if x == 0 and y == 0:
            continue
        if b == 0:
            total += (x**a * math.log(x**a / y**a) - x**a + y**a) / a**2
        elif a == 0:
            total += (y**b * math.log(y**b / x**b) - y**b + x**b) / b**2
        else:
            total += -1 / (a * b) * (x**a * y**b - a / (a + b) * x ** (a + b) - b / (a + b) * y ** (a + b))
    return total


def jsd(p: Floats, q: Floats, beta: float, normalize: bool) -> float:
    m = mixture(beta, p, q)
    value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return value / (beta * (1 - beta)) if normalize else value


def skew_reverse_kl(p: Floats, q: Floats, q0: Floats, alpha: float, detach_mixture: bool) -> float:
    return kl(q, mixture(alpha, q0 if detach_mixture else q, p))


DIVERGENCES: dict[str, Callable[..., float]] = {
    "forward_kl": lambda p, q, q0, has_tail: kl(p, q),
    "reverse_kl": lambda p, q, q0, has_tail: kl(q, p),
    "symmetric_kl": lambda p, q, q0, has_tail, forward_weight: forward_weight * kl(p, q) + (1 - forward_weight) * kl(q, p),
    "adaptive_kl": adaptive_kl,
    "jsd": lambda p, q, q0, has_tail, **knobs: jsd(p, q, **knobs),
    "skew_kl": lambda p, q, q0, has_tail, alpha: kl(p, mixture(alpha, p, q)),
    "skew_reverse_kl": lambda p, q, q0, has_tail, **knobs: skew_reverse_kl(p, q, q0, **knobs),
    "tvd": lambda p, q, q0, has_tail: 0.5 * sum(abs(x - y) for x, y in zip(p, q, strict=True)),
    "alpha_beta": lambda p, q, q0, has_tail, **knobs: alpha_beta(p, q, **knobs),
}

T_SQUARED = {"forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skew_kl", "skew_reverse_kl", "adaptive_kl"}
"""The losses whose definition has the factor T^2; none else."""


# --- output terms: the term's fields, the teacher, the student's logits, the same as constants, and the data's token


def logits(term: Any, teacher: TaughtToken, z: Floats, z0: Floats, target: int) -> float:
    kept = teacher.kept
    if term.trust_threshold is not None:
        of_target = teacher.probs[1.0][target] if kept is None or target in kept else 0.0
        if of_target < term.trust_threshold:
            return 0.0
    knobs = term.divergence.model_dump(exclude={"type"})
    p, q, q0 = (teacher.bins(x) for x in (teacher.probs[term.temperature], softmax(z, term.temperature), softmax(z0, term.temperature)))
    value = DIVERGENCES[term.divergence.type](p, q, q0, kept is not None, **knobs)
    return value * term.temperature**2 if term.divergence.type in T_SQUARED else value


def mse_logits(term: Any, teacher: TaughtToken, z: Floats, z0: Floats, target: int) -> float:
    u = [math.log(prob) for prob in teacher.probs[1.0]]
    mean_u, mean_z = sum(u) / len(u), sum(z) / len(z)
    return sum(((x - mean_u) - (y - mean_z)) ** 2 for x, y in zip(u, z, strict=True)) / len(z)


def ranking(term: Any, teacher: TaughtToken, z: Floats, z0: Floats, target: int) -> float:
    p, q = teacher.probs[1.0], softmax(z)
    tokens = sorted(range(len(p)) if teacher.kept is None else teacher.kept, key=lambda i: -p[i])[: term.top_k]
    penalties = []
    for k in tokens:
        for other in tokens:
            if p[k] > p[other]:
                logistic = math.log(1 + math.exp(-(z[k] - z[other])))
                penalties.append(max(0.0, term.margin - (q[k] - q[other])) if term.measure == "hinge" else logistic)
    return sum(penalties) / len(penalties) if penalties else 0.0


OUTPUT_TERMS: dict[str, Callable[..., float]] = {
    "ce": lambda term, teacher, z, z0, target: -math.log(softmax(z)[target]),
    "logits": logits,
    "mse_logits": mse_logits,
    "ranking": ranking,
}


# --- hidden terms: one pair of states, the student's projected


def hidden(term: Any, ours: Floats, theirs: Floats) -> float:
    if term.normalize == "layer_norm":
        ours, theirs = normalized(ours), normalized(theirs)
    if term.measure == "mse":
        return sum((x - y) ** 2 for x, y in zip(ours, theirs, strict=True)) / len(ours)
    dot = sum(x * y for x, y in zip(ours, theirs, strict=True))
    return 1 - dot / math.sqrt(sum(x * x for x in ours) * sum(y * y for y in theirs))


def normalized(state: Floats) -> Floats:
    mean = sum(state) / len(state)
    variance = sum((x - mean) ** 2 for x in state) / len(state)
    return [(x - mean) / math.sqrt(variance + 1e-5) for x in state]


def hidden_as_published(term: Any, ours: Floats, theirs: Floats) -> float:
    return term.temperature**2 / len(ours) * kl(softmax(theirs, term.temperature), softmax(ours, term.temperature))


HIDDEN_TERMS: dict[str, Callable[..., float]] = {"hidden": hidden, "hidden_as_published": hidden_as_published}


def gradient(value: Callable[[Floats], float], at: Floats, step: float = 1e-5) -> Floats:
    """Central differences."""
    slopes = []
    for i in range(len(at)):
        up, down = list(at), list(at)
        up[i], down[i] = at[i] + step, at[i] - step
        slopes.append((value(up) - value(down)) / (2 * step))
    return slopes
