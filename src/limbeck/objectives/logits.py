"""Logit distillation: a divergence between the output distributions of teacher and student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from limbeck.errors import nearest
from limbeck.objectives.base import Needs, OutputTerm
from limbeck.objectives.divergences import DIVERGENCES, Divergence

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from limbeck.objectives.support import Dense


class Logits(OutputTerm):
    """T^2 D(softmax(u/T), softmax(z/T)), u the teacher's logits and z the student's; T^2 only for divergences that declare it."""

    type: Literal["logits"] = "logits"
    divergence: str = "forward_kl"
    """`forward_kl`, KL(teacher || student), covers all that the teacher says; `reverse_kl`, KL(student || teacher), seeks modes."""
    temperature: float = Field(1.0, gt=0)
    """Softens both distributions. 1 is the right default for language models; above it the tail of the vocabulary counts for more."""

    @field_validator("divergence")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DIVERGENCES:
            raise ValueError(f"found {name!r}, expected one of: {', '.join(DIVERGENCES)}{nearest(name, DIVERGENCES)}")
        return name

    @property
    def _divergence(self) -> Divergence:
        return DIVERGENCES[self.divergence]

    @property
    def _factor(self) -> float:
        return self.temperature**2 if self._divergence.t_squared else 1.0

    @property
    def has_closed_form(self) -> bool:  # type: ignore[override]
        """Whether the divergence has a closed form."""
        return self._divergence.closed_form is not None

    def needs(self, student_layers: int, teacher_layers: int) -> Needs:
        return Needs(output=True)

    def values(self, student: Dense, teacher: Dense | None, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        assert teacher is not None
        return self._factor * self._divergence.values(teacher.log_probs(self.temperature), student.log_probs(self.temperature))

    def closed_form(
        self, grad: Float[Tensor, "n v"], scale: float, student: Dense, teacher: Dense | None, targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        assert teacher is not None and self._divergence.closed_form is not None
        factor = self._factor  # and d/dz = (1/T) d/d(z/T)
        return factor * self._divergence.closed_form(grad, scale * factor / self.temperature, student, teacher, self.temperature)
