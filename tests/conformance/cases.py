"""What the suite runs over: every registered loss, with its defaults and with other parameters, and every kind of target.

A loss is in it from the day it is defined. What is written down here adds parameters; nothing has to be added for a loss to be tested.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conformance import references
from conformance.references import TaughtToken
from limbeck.batch import Draws, Signal, TopK
from limbeck.objectives import Divergence, HiddenTerm, Logits, OutputTerm, Term

N, V = 4, 11
TEMPERATURES = (0.5, 1.0, 2.0)

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "symmetric_kl": [{"forward_weight": 0.2}, {"forward_weight": 0}, {"forward_weight": 1}],
    "jsd": [{"beta": 0.1}, {"beta": 0.8, "normalize": True}],
    "skew_kl": [{"alpha": 0.5}, {"alpha": 0.001}, {"alpha": 0.9}],
    "skew_reverse_kl": [{"alpha": 0.4}, {"detach_mixture": True}, {"alpha": 0.001}, {"alpha": 0.9}],
    "alpha_beta": [
        {"alpha": 1, "beta": 0},
        {"alpha": 0, "beta": 1},
        {"alpha": 0.4, "beta": 0},
        {"alpha": 0, "beta": 0.6},
        {"alpha": 0.7, "beta": 0.2},
        {"alpha": 1e-4, "beta": 1},
        {"alpha": 1, "beta": 1e-4},
        {"alpha": 0, "beta": 0.01},
        {"alpha": 0.01, "beta": 0},
    ],
    "ranking": [{"measure": "hinge"}, {"measure": "hinge", "margin": 0.2, "top_k": 3}],
    "logits": [{"trust_threshold": 0.1}, {"trust_threshold": 0.1, "temperature": 2.0, "divergence": "jsd"}],
    "hidden": [{"measure": "cosine"}, {"normalize": "none"}, {"measure": "cosine", "normalize": "none"}],
    "hidden_as_published": [{"temperature": 1.0}],
}
"""Parameters other than the defaults, by `type`."""


def _variants(family: dict[str, type[Any]]) -> list[Any]:
    return [member(**knobs) for name, member in family.items() if _is_ours(member) for knobs in ({}, *VARIANTS.get(name, []))]


def _is_ours(member: type[Any]) -> bool:
    """Not one that the tests of the docs have defined."""
    return bool(member.__module__.startswith("limbeck."))


def name_of(term: Any) -> str:
    """`logits(T=2, jsd(beta=0.1))`: what is not the default."""
    parts = []
    for key in type(term).model_fields:
        value = getattr(term, key)
        if isinstance(value, Divergence):
            parts.append(name_of(value))
        elif key != "type" and value != type(term).model_fields[key].default:
            parts.append(f"{'T' if key == 'temperature' else key}={value}")
    return term.type + (f"({', '.join(parts)})" if parts else "")


DIVERGENCES: list[Divergence] = _variants(Divergence.members)
TERMS: list[Any] = [term for term in _variants(Term.members) if not hasattr(term, "divergence") or term.model_fields_set]
OUTPUT_TERMS: dict[str, OutputTerm] = {
    name_of(term): term
    for term in [
        *(term for term in TERMS if isinstance(term, OutputTerm)),
        *(Logits(divergence=each, temperature=T) for each in DIVERGENCES for T in ((2.0,) if each.model_fields_set else TEMPERATURES)),
    ]
}
HIDDEN_TERMS: dict[str, HiddenTerm] = {name_of(term): term for term in TERMS if isinstance(term, HiddenTerm)}

TARGETS = {
    "dense": "dense",
    "spread_4": "dense",
    "top_1": "top_k",
    "top_4": "top_k",
    f"top_{V - 1}": "top_k",
    f"top_{V}": "top_k",
    "drawn": "sampled",
}
"""Kinds of target, and the support of each. What was drawn is all tokens, each as often as it is probable: that is the teacher itself."""


def is_declared(term: OutputTerm, target: str) -> bool:
    return term.refuses(TARGETS[target], None) is None


DECLARED = [(name, target) for name, term in OUTPUT_TERMS.items() for target in TARGETS if is_declared(term, target)]
UNDECLARED = [(name, target) for name, term in OUTPUT_TERMS.items() for target in TARGETS if not is_declared(term, target)]


def draw(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    """Numbers that float32 has exactly, in float64: the reference sees what the loss sees."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).double()


def signal_of(target: str, u: Tensor) -> Signal:
    """A teacher with logits `u` [N, V] on that kind of target."""
    kind, _, number = target.partition("_")
    if kind == "dense":
        return Signal(output=u.float(), teacher_head=Tensor.clone)
    if kind == "drawn":
        probs = torch.softmax(u, -1)
        ids = torch.arange(u.shape[1]).flip(0).expand(len(u), -1)
        return Signal(sparse=Draws(ids, probs.flip(-1).float(), torch.special.xlogy(probs, probs).sum(-1).float()))
    top, ids = torch.log_softmax(u, -1).topk(int(number), dim=-1)
    outside = torch.ones_like(u, dtype=torch.bool).scatter(-1, ids, False)
    tails = {t: torch.log_softmax(u / t, -1).masked_fill(~outside, -torch.inf).logsumexp(-1).float() for t in TEMPERATURES}
    priors = {t: draw(u.shape[1], seed=int(10 * t)).float() for t in TEMPERATURES} if kind == "spread" else None
    return Signal(sparse=TopK(ids, top.float(), tails, priors))


def taught(target: str, u: Tensor) -> list[TaughtToken]:
    """The same teacher for the references."""
    tokens = []
    for row in u.tolist():
        probs = {t: references.softmax(row, t) for t in TEMPERATURES}
        kind, _, number = target.partition("_")
        kept = None if kind in ("dense", "drawn") else sorted(range(len(row)), key=lambda i: -row[i])[: int(number)]
        if kind == "spread":
            assert kept is not None
            tokens.append(TaughtToken({t: _spread(probs[t], kept, draw(len(row), seed=int(10 * t)).tolist()) for t in TEMPERATURES}))
        else:
            tokens.append(TaughtToken(probs, kept))
    return tokens


def _spread(probs: list[float], kept: list[int], log_prior: list[float]) -> list[float]:
    prior = references.softmax(log_prior)
    tail = sum(prob for i, prob in enumerate(probs) if i not in kept)
    outside = sum(weight for i, weight in enumerate(prior) if i not in kept)
    return [prob if i in kept else tail * prior[i] / outside for i, prob in enumerate(probs)]


def reference(term: OutputTerm, target: str, u: Tensor, z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N] and their gradient [N, V] with respect to the student's logits, in float64."""
    if term.type not in references.OUTPUT_TERMS:
        raise AssertionError(f"the term {term.type!r} has no reference: write its definition into tests/conformance/references.py")
    if hasattr(term, "divergence") and term.divergence.type not in references.DIVERGENCES:
        raise AssertionError(f"the divergence {term.divergence.type!r} has no reference: write it into tests/conformance/references.py")
    function, values, grads = references.OUTPUT_TERMS[term.type], [], []
    for teacher, row, token in zip(taught(target, u), z.tolist(), targets.tolist(), strict=True):

        def value(at: list[float], teacher: Any = teacher, row: list[float] = row, token: int = token) -> float:
            return float(function(term, teacher, at, row, token))

        values.append(value(row))
        grads.append(references.gradient(value, row))
    return torch.tensor(values, dtype=torch.float64), torch.tensor(grads, dtype=torch.float64)
