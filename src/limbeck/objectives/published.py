"""Hidden-state distillation as scripts of 2024 published it, to reproduce their numbers; `hidden` is what to use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from limbeck.objectives.base import COLDEST, HOTTEST
from limbeck.objectives.hidden import MappedHidden

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Generator, Tensor, nn


class HiddenAsPublished(MappedHidden):
    """T^2 / d KL(softmax(h_T / T) || softmax(P h_S / T)) over the d features, P a random projection that is never trained.

    Features are no alternatives of which one is drawn, so the softmax has no meaning; and the student learns to be seen through P.
    """

    type: Literal["hidden_as_published"] = "hidden_as_published"
    temperature: float = Field(2.0, ge=COLDEST, le=HOTTEST)
    """T of the softmax over features, 2 in the published configuration."""

    def projections(self, num_pairs: int, student_width: int, teacher_width: int, generator: Generator) -> nn.ModuleList:
        """A frozen linear layer with torch's own initialisation for each pair, also where the widths agree."""
        from torch import nn

        maps = nn.ModuleList()
        for _ in range(num_pairs):
            linear = nn.Linear(student_width, teacher_width)
            for parameter in linear.parameters():
                nn.init.uniform_(parameter, -(student_width**-0.5), student_width**-0.5, generator=generator)
            maps.append(linear.requires_grad_(False))
        return maps

    def distance(self, ours: Float[Tensor, "r e"], theirs: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
        log_p, log_q = (states.div(self.temperature).log_softmax(-1) for states in (theirs, ours))
        return (log_p.exp() * (log_p - log_q)).sum(-1) * self.temperature**2 / ours.shape[-1]
