"""Logit distillation: a divergence between the output distributions of teacher and student."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from limbeck.objectives.base import COLDEST, HOTTEST, Needs, OutputTerm
from limbeck.objectives.divergences import Divergence, ForwardKL
from limbeck.objectives.schedule import Schedule, scheduled
from limbeck.spec import member_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from limbeck.objectives.support import Bins, Dense, Gradient, Target


class Logits(OutputTerm):
    """T^2 D(softmax(u/T), softmax(z/T)), u the teacher's logits and z the student's; T^2 only for divergences that declare it."""

    type: Literal["logits"] = "logits"
    divergence: member_of(Divergence, by_name=True) = ForwardKL()  # type: ignore[valid-type]
    """How the distributions are compared: a name, `reverse_kl`, or a mapping with its parameters, `{type: jsd, beta: 0.1}`. `forward_kl`,
    KL(teacher || student), covers all that the teacher says; `reverse_kl`, KL(student || teacher), seeks modes."""
    temperature: scheduled(ge=COLDEST, le=HOTTEST) = 1.0  # type: ignore[valid-type]
    """Softens both distributions. 1 is the right default for language models; above it the tail of the vocabulary counts for more. A
    number, or a schedule, `{type: cosine, start: 4.0, end: 1.0}`; a capture with a list of temperatures serves numbers only."""

    trust_threshold: float | None = Field(None, gt=0, lt=1)
    """Leave out tokens of the data to which the teacher gives less than this probability: there it contradicts the data, and other terms
    decide. The log has the share of tokens left out as `gated/logits`. A top-k teacher's other tokens have less than 1 / (k + 1)."""

    @property
    def _factor(self) -> float:
        return self.temperature**2 if self.divergence.t_squared else 1.0

    def refuses(self, support: str, temperatures: Collection[float] | None, k: int | None = None) -> str | None:
        if support not in self.divergence.supports:
            known = " and ".join(sorted(self.divergence.supports))
            return f"{self.divergence.type} is defined on {known}, and the teacher gives {support}"
        temperature = self.temperature
        if isinstance(temperature, Schedule) and temperature.start == temperature.end:
            temperature = temperature.start
        if support == "sampled" and temperature != 1.0:
            return f"found temperature {temperature:g}, expected 1, at which tokens were drawn; set 1, or capture with another codec"
        if temperatures is not None and temperature not in temperatures:
            there = " or ".join(f"{known:g}" for known in sorted(temperatures))
            other = f"capture again with {temperature:g} in capture.codec.temperatures"
            if isinstance(temperature, Schedule):
                other = "take a live teacher or a capture with the codec exact or quantized"
            return f"found temperature {temperature:g}, expected one for which the capture stored its tail: {there}; set that, or {other}"
        return None

    def needs(self, student_layers: int, teacher_layers: int) -> Needs:
        return Needs(output=True)

    def values(self, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        bins = self._bins(student, teacher)
        return self._kept(self._factor * (self.divergence.values(bins) + bins.constant), teacher, targets)

    def closed_form(
        self, grad: Gradient, scale: float, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"] | None:
        bins = self._bins(student, teacher)
        if (found := self.divergence.slopes(bins)) is None:
            return None
        values, slopes = found
        scale_of_slopes: float | Tensor = scale * self._factor / self.temperature  # d/dz = (1/T) d/d(z/T)
        if self.is_gated:
            scale_of_slopes = scale_of_slopes * (~self.gate(teacher, targets)).float()[:, None]
        bins.add_slopes(grad, slopes, scale_of_slopes)
        return self._kept(self._factor * (values + bins.constant), teacher, targets)

    @property
    def is_gated(self) -> bool:
        return self.trust_threshold is not None

    def gate(self, teacher: Target | None, targets: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        assert self.trust_threshold is not None
        return self.taught_by(teacher).log_probs_of(targets) < math.log(self.trust_threshold)

    def _kept(self, values: Tensor, teacher: Target | None, targets: Tensor) -> Tensor:
        return values.masked_fill(self.gate(teacher, targets), 0.0) if self.is_gated else values

    def _bins(self, student: Dense, teacher: Target | None) -> Bins:
        from limbeck.objectives.support import Bins

        return Bins(self.taught_by(teacher), student, self.temperature)
