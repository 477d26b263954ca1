"""Logits drawn together as numbers, without a softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from limbeck.objectives.base import Needs, OutputTerm

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from limbeck.objectives.support import Dense, Gradient, Target


class MSELogits(OutputTerm):
    """mean_v ((u_v - mean u) - (z_v - mean z))^2, u the teacher's logits and z the student's (Kim et al. 2021, 2105.08919).

    Both are centred first, because softmax does not see a shift. Every token of the vocabulary counts the same, however improbable; those
    that the teacher rules out (logit -inf) are left out.
    """

    type: Literal["mse_logits"] = "mse_logits"

    def needs(self, student_layers: int, teacher_layers: int) -> Needs:
        return Needs(output=True)

    def values(self, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        difference, count = self._difference(student, teacher)
        return (difference.square().sum(-1, keepdim=True) / count).squeeze(-1)

    def closed_form(
        self, grad: Gradient, scale: float, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """The gradient is 2 / V times the difference: centring changes nothing in what is centred."""
        difference, count = self._difference(student, teacher)
        grad.add(difference, 2 * scale / count)
        return (difference.square().sum(-1, keepdim=True) / count).squeeze(-1)

    def _difference(self, student: Dense, teacher: Target | None) -> tuple[Float[Tensor, "n v"], Float[Tensor, "n 1"]]:
        """Of centred log-probabilities, which are centred logits, where the teacher has any; and of how many tokens that is."""
        from limbeck.objectives.support import LOG_ZERO

        log_p = self.taught_by(teacher).log_probs()
        is_ruled_out = log_p <= LOG_ZERO
        count = (~is_ruled_out).sum(-1, keepdim=True).float()
        difference = (student.log_probs() - log_p).masked_fill(is_ruled_out, 0.0)
        return (difference - difference.sum(-1, keepdim=True) / count).masked_fill(is_ruled_out, 0.0), count
