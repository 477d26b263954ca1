"""Cross-entropy on the data's own tokens: supervised fine-tuning, and the anchor of a mixture."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from limbeck.objectives.base import OutputTerm

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from limbeck.objectives.support import Dense


class CrossEntropy(OutputTerm):
    """-log q_y at temperature 1, y the token that the data has next."""

    type: Literal["ce"] = "ce"
    has_closed_form: ClassVar[bool] = True

    def values(self, student: Dense, teacher: Dense | None, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        return -student.log_probs().gather(-1, targets[:, None]).squeeze(-1)

    def closed_form(
        self, grad: Float[Tensor, "n v"], scale: float, student: Dense, teacher: Dense | None, targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        """The gradient is q - e_y."""
        grad.add_(student.probs(), alpha=scale)
        grad.scatter_add_(-1, targets[:, None], grad.new_full((targets.numel(), 1), -scale))
        return self.values(student, teacher, targets)
