"""Cross-entropy on the data's own tokens: supervised fine-tuning, and the anchor of a mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from limbeck.objectives.base import OutputTerm

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from limbeck.objectives.support import Dense, Gradient, Target


class CrossEntropy(OutputTerm):
    """-log q_y at temperature 1, y the token that the data has next."""

    type: Literal["ce"] = "ce"

    def values(self, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return -student.log_probs().gather(-1, targets[:, None]).squeeze(-1)

    def closed_form(
        self, grad: Gradient, scale: float, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """The gradient is q - e_y."""
        values = self.values(student, teacher, targets)
        grad.add_probs(scale)
        grad.scatter(targets[:, None], values.new_full((targets.numel(), 1), -scale))
        return values
