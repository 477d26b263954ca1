"""The order of the teacher's most probable tokens, learned pair by pair."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from limbeck.objectives.base import Needs, OutputTerm

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from limbeck.objectives.support import Dense, Gradient, Target


class Ranking(OutputTerm):
    """Mean over the pairs (k, l) of the teacher's top tokens with p_k > p_l of a penalty for the student's having them the wrong way round.

    logistic: log(1 + exp(-(z_k - z_l))), z the student's logits (RankNet, Burges et al. 2005); hinge: max(0, margin - (q_k - q_l)), q its
    probabilities. It says nothing of how probable a token is, so it goes beside another term (as in 2409.12545).
    """

    type: Literal["ranking"] = "ranking"
    measure: Literal["logistic", "hinge"] = "logistic"
    """`logistic` wants logits ever further apart; `hinge` is content once probabilities are in order, by the margin."""
    top_k: int = Field(8, ge=2, le=64)
    """How many of the teacher's tokens are put in order; there are k (k - 1) / 2 pairs. A capture that kept fewer gives fewer."""
    margin: float = Field(0.0, ge=0, lt=1)
    """By how much the more probable token shall lead, as a probability (hinge only)."""

    supports: ClassVar[frozenset[str]] = frozenset({"dense", "top_k"})

    @model_validator(mode="after")
    def _margin_of_hinge(self) -> Ranking:
        if self.margin and self.measure != "hinge":
            raise ValueError(f"found margin {self.margin:g} beside measure {self.measure!r}, expected it with `measure: hinge` only")
        return self

    def refuses(self, support: str, temperatures: Collection[float] | None, k: int | None = None) -> str | None:
        if support == "top_k" and k == 1:
            return "found a capture of one token per distribution, expected 2 or more to put in order; capture again with a larger k"
        return super().refuses(support, temperatures, k)

    def needs(self, student_layers: int, teacher_layers: int) -> Needs:
        return Needs(output=True)

    def values(self, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        ids, weights = self._pairs(teacher)
        log_q = student.log_probs().gather(-1, ids)
        if self.measure == "hinge":
            penalties = (self.margin - _differences(log_q.exp())).relu()
        else:
            # log(1 + exp(-d)), with a gradient also where exp(-d) overflows
            penalties = (-_differences(log_q)).logaddexp(log_q.new_zeros(()))
        return (penalties * weights).sum((-2, -1))

    def closed_form(
        self, grad: Gradient, scale: float, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """Only the logits of the top tokens get a gradient of their own; by hinge all others share what they lose or gain."""
        ids, weights = self._pairs(teacher)
        log_q = student.log_probs().gather(-1, ids)
        if self.measure == "hinge":
            gaps = self.margin - _differences(log_q.exp())
            pushes = weights * (gaps > 0)
            slope = (pushes.sum(-2) - pushes.sum(-1)) * log_q.exp()
            grad.add_probs(slope.sum(-1, keepdim=True) * -scale)
            penalties = gaps.relu()
        else:
            gaps = -_differences(log_q)
            pushes = weights * gaps.sigmoid()
            slope = pushes.sum(-2) - pushes.sum(-1)
            penalties = gaps.logaddexp(log_q.new_zeros(()))
        grad.scatter(ids, slope * scale)
        return (penalties * weights).sum((-2, -1))

    def _pairs(self, teacher: Target | None) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k k"]]:
        """Ids of the teacher's top tokens, and for each pair 1 / (number of pairs) where the first is more probable; both have a mass."""
        from limbeck.objectives.support import LOG_ZERO, TopKTarget

        teacher = self.taught_by(teacher)
        tokens = teacher.log_probs()[:, :-1] if isinstance(teacher, TopKTarget) else teacher.log_probs()
        log_p, places = tokens.topk(min(self.top_k, tokens.shape[1]), dim=-1)
        ids = teacher.ids.gather(-1, places) if isinstance(teacher, TopKTarget) else places
        is_pair: Bool[Tensor, "n k k"] = (_differences(log_p) > 0) & (log_p > LOG_ZERO)[:, None, :]
        return ids, is_pair / is_pair.sum((-2, -1), keepdim=True).clamp(min=1)


def _differences(values: Tensor) -> Tensor:
    """[.., k, l] = value k - value l."""
    return values[:, :, None] - values[:, None, :]
