"""Logit distillation: a divergence between the output distributions of teacher and student."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from limbeck.errors import RecipeError, nearest
from limbeck.objectives.base import Needs, OutputTerm
from limbeck.objectives.divergences import DIVERGENCES, Divergence

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from limbeck.objectives.support import Dense, Gradient, Target


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

    def refuses(self, support: str, temperatures: Collection[float] | None) -> str | None:
        if support not in self._divergence.supports:
            return f"{self.divergence} is defined on {' and '.join(sorted(self._divergence.supports))}, and the teacher gives {support}"
        if temperatures is not None and self.temperature not in temperatures:
            there = ", ".join(f"{known:g}" for known in sorted(temperatures))
            return (
                f"found temperature {self.temperature:g}, expected one for which the capture stored its tail: {there}; set one of those, "
                f"or capture again with {self.temperature:g} in capture.codec.temperatures"
            )
        return None

    def needs(self, student_layers: int, teacher_layers: int) -> Needs:
        return Needs(output=True)

    def values(self, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        from limbeck.objectives.support import measure

        return self._factor * measure(self._divergence.values, student, self._supported(teacher), self.temperature)

    def closed_form(
        self, grad: Gradient, scale: float, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"] | None:
        teacher = self._supported(teacher)
        form = self._divergence.closed_forms.get(teacher.kind)
        if form is None:
            return None
        factor = self._factor  # and d/dz = (1/T) d/d(z/T)
        return factor * form(grad, scale * factor / self.temperature, student, teacher, self.temperature)

    def _supported(self, teacher: Target | None) -> Target:
        if problem := self.refuses("no output" if teacher is None else teacher.kind, None):
            raise RecipeError(f"objective.logits: {problem}")
        assert teacher is not None
        return teacher
