"""The support on which student and teacher are compared: the whole vocabulary, or the teacher's top k tokens and one bin for the rest.

A divergence sees two tensors of log-probabilities over the same support and knows neither vocabularies nor captures. Distributions
remember their softmaxes, so that several terms share them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from limbeck.batch import Draws
from limbeck.errors import RecipeError

LOG_ZERO = -1e30
"""A finite log 0, so that 0 log 0 is 0: a teacher may rule tokens out with a logit of -inf."""
_SMALL = 1e-30
"""A mass below it is added up from logs: probabilities of float32 end at 1e-38."""


class Dense:
    """A distribution over the whole vocabulary, from logits `[n, V]`, in float32 whatever the model's dtype.

    Given memory for its probabilities, it normalises in that of the logits, which are lost; without, the softmax can be differentiated.
    """

    def __init__(self, logits: Float[Tensor, "n v"], memory: Float[Tensor, "n v"] | None = None) -> None:
        self._probs: dict[float, Tensor] = {}
        if memory is None:
            self.logits = torch.log_softmax(logits.float(), dim=-1)
        else:  # one exponential for both: they are most of the work
            largest = logits.amax(-1, keepdim=True)
            self._probs[1.0] = torch.sub(logits, largest, out=memory).exp_()
            total = memory.sum(-1, keepdim=True)
            memory.div_(total)
            self.logits = logits.sub_(largest.add_(total.log_()))
        self._log_probs: dict[float, Tensor] = {1.0: self.logits}

    def log_probs(self, temperature: float = 1.0) -> Float[Tensor, "n v"]:
        """log softmax(logits / T); a log-softmax is a shift, so it serves as logits for every temperature."""
        if temperature not in self._log_probs:
            self._log_probs[temperature] = torch.log_softmax(self.logits / temperature, dim=-1)
        return self._log_probs[temperature]

    def probs(self, temperature: float = 1.0, out: Tensor | None = None) -> Float[Tensor, "n v"]:
        """softmax(logits / T), in `out` if it is given and not made yet."""
        if temperature not in self._probs:
            self._probs[temperature] = torch.exp(self.log_probs(temperature), out=out)
        return self._probs[temperature]

    def log_rest(self, ids: Int[Tensor, "n k"], temperature: float = 1.0) -> Float[Tensor, "n 1"]:
        """Log of the mass outside of some tokens, added up over those: 1 minus the rest would be rounding noise where it is small."""
        probs = self._probs.get(temperature)
        if probs is not None and probs.device.type == "cpu" and not probs.requires_grad:  # the exponentials are there
            inside = probs.gather(-1, ids)
            rest = probs.scatter_(-1, ids, 0.0).sum(-1, keepdim=True)
            probs.scatter_(-1, ids, inside)
            if bool((rest > _SMALL).all()):  # to ask an accelerator would make it wait
                return rest.log_()
        return self.log_probs(temperature).scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)


class DenseTarget(Dense):
    """The teacher over the whole vocabulary."""

    kind = "dense"

    def __init__(self, logits: Float[Tensor, "n v"], memory: Float[Tensor, "n v"] | None = None) -> None:
        super().__init__(logits, memory)
        self.logits.clamp_(min=LOG_ZERO)

    def project(self, student: Dense, temperature: float = 1.0) -> Float[Tensor, "n v"]:
        return student.log_probs(temperature)

    def log_probs_of(self, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Of the data's tokens, at temperature 1."""
        return self.log_probs().gather(-1, targets[:, None]).squeeze(-1)


class TopKTarget:
    """The teacher's k most probable tokens and its remaining mass in one bin: S = k + 1.

    `log_tails[T]` is the log of the mass outside of the k ids at temperature T, of which 1 must be there; another temperature that is
    not is refused: renormalising over k would pretend that the tail does not exist. (It says what log Z_T would, and unlike 1 minus
    the rest it is exact where the tail is small.) An id may not occur twice in a row, but for padding, whose log-probability is -inf:
    it gets no mass and no gradient.
    """

    kind = "top_k"

    def __init__(self, ids: Int[Tensor, "n k"], log_probs: Float[Tensor, "n k"], log_tails: Mapping[float, Float[Tensor, " n"]]) -> None:
        self.ids, self.top, self.log_tails = ids, log_probs.float(), log_tails
        self._padding = self.top == -torch.inf

    def log_probs(self, temperature: float = 1.0) -> Float[Tensor, "n s"]:
        if temperature not in self.log_tails:
            raise RecipeError(
                f"objective: found temperature {temperature:g}, expected one for which the top-k teacher stored its tail: "
                f"{', '.join(f'{known:g}' for known in sorted(self.log_tails))}; set one of those, or capture again with this one"
            )
        top, log_tail = self.top, self.log_tails[temperature].float()[:, None]
        if temperature != 1.0:
            top = top / temperature
            top = top - top.logsumexp(-1, keepdim=True) + torch.log1p(-log_tail.exp())
        return torch.cat([top, log_tail], dim=-1).clamp_(min=LOG_ZERO)

    def log_probs_of(self, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Of the data's tokens, at temperature 1; LOG_ZERO for those that were not kept."""
        return self.top.masked_fill(self.ids != targets[:, None], LOG_ZERO).amax(-1)

    def project(self, student: Dense, temperature: float = 1.0) -> Float[Tensor, "n s"]:
        kept = student.log_probs(temperature).gather(-1, self.ids).masked_fill(self._padding, LOG_ZERO)
        return torch.cat([kept, student.log_rest(self.ids, temperature)], dim=-1).clamp(min=LOG_ZERO)


class SpreadTarget(DenseTarget):
    """The teacher's k most probable tokens, and its tail spread over the others in proportion to a prior: dense, so that every divergence
    and every closed form of a dense teacher holds."""

    def __init__(self, top: TopKTarget, log_priors: Mapping[float, Float[Tensor, " v"]]) -> None:
        self._top, self._log_priors = top, log_priors
        self.logits = self._spread(1.0)
        self._log_probs, self._probs = {1.0: self.logits}, {}

    def log_probs(self, temperature: float = 1.0) -> Float[Tensor, "n v"]:
        if temperature not in self._log_probs:
            self._log_probs[temperature] = self._spread(temperature)
        return self._log_probs[temperature]

    def _spread(self, temperature: float) -> Float[Tensor, "n v"]:
        bins, ids = self._top.log_probs(temperature), self._top.ids
        rest = self._log_priors[temperature].float().expand(len(ids), -1).scatter(-1, ids, -torch.inf)
        rest = rest + (bins[:, -1:] - rest.logsumexp(-1, keepdim=True).clamp(min=LOG_ZERO))
        # padding repeats an id, and loses against it
        return rest.scatter_reduce(-1, ids, bins[:, :-1], "amax").clamp_(min=LOG_ZERO)


class SampledTarget:
    """Tokens drawn from the teacher with the mass that each stands for: unbiased for what is linear in the teacher's probabilities, which
    is forward KL, and at the temperature of the draws only (RS-KD, 2503.16870)."""

    kind = "sampled"

    def __init__(self, draws: Draws) -> None:
        self.ids, weights = draws.ids, draws.weights.float()
        self._log_weights = weights.log().clamp(min=LOG_ZERO)
        self.constant = draws.neg_entropy.float() - (weights * self._log_weights).sum(-1)

    def log_probs(self, temperature: float = 1.0) -> Float[Tensor, "n s"]:
        """The logs of the weights, which sum to 1 on average."""
        return self._log_weights

    def log_probs_of(self, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Of the data's tokens, as the draws estimate it; LOG_ZERO for those that were not drawn."""
        return self._log_weights.masked_fill(self.ids != targets[:, None], LOG_ZERO).amax(-1)

    def project(self, student: Dense, temperature: float = 1.0) -> Float[Tensor, "n s"]:
        return student.log_probs(temperature).gather(-1, self.ids)


Target = DenseTarget | TopKTarget | SampledTarget
"""The teacher on its support: `log_probs(T)` are its own there, `project(student, T)` the student's, both `[n, S]`."""


class Gradient:
    """d(loss)/d(student logits) of closed forms, collected as a combination before it is made: weights of softmax(z/T), dense tensors,
    and scattered entries. So a chunk's softmax is turned into its gradient in place, and no term needs a tensor of its own."""

    def __init__(self) -> None:
        self._probs: dict[float, float | Tensor] = {}
        self._outside: dict[float, tuple[Tensor, Tensor]] = {}
        self._dense: list[tuple[Tensor, float | Tensor]] = []
        self._scattered: list[tuple[Tensor, Tensor]] = []

    def add_probs(self, weight: float | Float[Tensor, "n 1"], temperature: float = 1.0) -> None:
        """Add weight * softmax(z / T), the weight per row or for all."""
        self._probs[temperature] = self._probs.get(temperature, 0.0) + weight

    def add_probs_outside(self, ids: Int[Tensor, "n k"], weight: Float[Tensor, "n 1"], temperature: float = 1.0) -> None:
        """Add weight * softmax(z / T) at all but these ids, which are the same in every call: those that a top-k teacher kept. The weight
        may be huge where all else is tiny; to add it everywhere and take it back there would leave rounding noise of its size."""
        _, before = self._outside.get(temperature, (ids, torch.zeros_like(weight)))
        self._outside[temperature] = ids, before + weight

    def add(self, tensor: Float[Tensor, "n v"], weight: float | Float[Tensor, "n 1"]) -> None:
        self._dense.append((tensor, weight))

    def scatter(self, ids: Int[Tensor, "n k"], values: Float[Tensor, "n k"]) -> None:
        self._scattered.append((ids, values))

    def make(self, student: Dense) -> Float[Tensor, "n v"]:
        """The gradient, in the memory of the student's log-probabilities, which are lost."""
        others = [self._weighted(student.probs(temperature), temperature) for temperature in self._probs if temperature != 1.0]
        if 1.0 in self._probs:
            # written there even where the softmax was made before, in memory of its own
            total = self._weighted(student.probs(1.0, out=student.logits), 1.0, out=student.logits)
        else:
            total = student.logits.zero_()
        for tensor in others:
            total.add_(tensor)
        for tensor, weight in self._dense:
            if isinstance(weight, Tensor):
                total.addcmul_(tensor, weight)
            else:
                total.add_(tensor, alpha=weight)
        for ids, values in self._scattered:
            total.scatter_add_(-1, ids, values)
        return total

    def _weighted(self, probs: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
        """softmax(z / T) by its weights, in `out` or in its own memory."""
        out, weight = probs if out is None else out, self._probs[temperature]
        if temperature not in self._outside:
            return torch.mul(probs, weight, out=out)
        ids, outside = self._outside[temperature]
        kept = probs.gather(-1, ids) * weight
        return torch.mul(probs, weight + outside, out=out).scatter_(-1, ids, kept)


class Bins:
    """Teacher and student over the same bins at one temperature: probabilities `p` and `q` `[n, S]`, and their logarithms.

    With `has_tail` the last bin is all that a top-k teacher did not keep. Other terms read the same tensors: they are not to be changed.
    """

    def __init__(self, teacher: Target, student: Dense, temperature: float = 1.0) -> None:
        self._teacher, self._student, self._temperature = teacher, student, temperature
        self.log_p, self.log_q = teacher.log_probs(temperature), teacher.project(student, temperature)
        self.has_tail = teacher.kind == "top_k"

    @property
    def constant(self) -> float | Float[Tensor, " n"]:
        """What makes a divergence of draws an estimate of the teacher's: minus the entropy of the teacher, plus that of the weights."""
        return self._teacher.constant if isinstance(self._teacher, SampledTarget) else 0.0

    @cached_property
    def p(self) -> Float[Tensor, "n s"]:
        return self._teacher.probs(self._temperature) if isinstance(self._teacher, DenseTarget) else self.log_p.exp()

    @cached_property
    def q(self) -> Float[Tensor, "n s"]:
        return self._student.probs(self._temperature) if isinstance(self._teacher, DenseTarget) else self.log_q.exp()

    def add_slopes(self, grad: Gradient, slopes: Sequence[tuple[Tensor, float | Tensor]], scale: float | Float[Tensor, "n 1"]) -> None:
        """Add scale * dD/d(z / T) to `grad`, for a divergence with g = dD/d(log q), a sum of tensors `[n, S]` times factors.

        It is g - q sum(g) in a bin of one token. The tokens of the tail, whose mass is s, share its g: (q / s) g - q sum(g).
        """
        temperature = self._temperature
        total = sum((tensor.sum(-1, keepdim=True) * factor for tensor, factor in slopes), torch.zeros_like(self.log_q[:, :1]))
        grad.add_probs(total * -scale, temperature)
        if isinstance(self._teacher, DenseTarget):
            for tensor, factor in slopes:
                grad.add(tensor, factor * scale)
            return
        g = sum((tensor * factor for tensor, factor in slopes), torch.zeros_like(self.log_q)) * scale
        if self.has_tail:
            over_tail = (-self.log_q[:, -1:]).clamp(max=_LARGEST_LOG_RATIO).exp()
            grad.add_probs_outside(self._teacher.ids, g[:, -1:] * over_tail, temperature)
            g = g[:, :-1]
        grad.scatter(self._teacher.ids, g)


_LARGEST_LOG_RATIO = 80.0
"""Of 1 to the student's tail: finite, and no token of such a tail has a probability above 0 in float32."""
