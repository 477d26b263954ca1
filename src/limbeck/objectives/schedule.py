"""Schedule: a number of a term that changes over the run. It depends on the step and on their number alone, so that a resume has nothing to
restore.

A recipe writes a number where nothing changes, and a mapping where something does: `weight: {type: linear, start: 1.0, end: 0.2}`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from limbeck.spec import Family, member_of


class Schedule(Family):
    """From `start` at the first step of the run to `end` at its last."""

    type: str
    start: float = Field(ge=0)
    """The value at the first step."""
    end: float = Field(ge=0)
    """The value at the last step."""

    @model_validator(mode="after")
    def _something(self) -> Schedule:
        if self.start == self.end == 0:
            raise ValueError("found start 0 and end 0, expected at least one above 0; write the number 0 for what is to be left out")
        return self

    def passed(self, share: float) -> float:
        """How much of the way from `start` to `end` is done after that share of the run: 0 at 0, 1 at 1, and never down."""
        raise NotImplementedError

    def at(self, step: int, num_steps: int) -> float:
        """The value at optimizer step `step`, counted from 0."""
        passed = self.passed(min(step / max(num_steps - 1, 1), 1.0))
        between = (1 - passed) * self.start + passed * self.end
        return min(max(between, min(self.start, self.end)), max(self.start, self.end))  # exact at both ends, and where they are equal

    def __format__(self, spec: str) -> str:
        return f"{self.type} from {self.start:{spec}} to {self.end:{spec}}"


class Linear(Schedule):
    """In equal steps."""

    type: Literal["linear"] = "linear"

    def passed(self, share: float) -> float:
        return share


class Cosine(Schedule):
    """Half a period of a cosine: slow at both ends, fast in the middle."""

    type: Literal["cosine"] = "cosine"

    def passed(self, share: float) -> float:
        return 0.5 * (1 - math.cos(math.pi * share))


def scheduled(ge: float, le: float) -> Any:
    """The annotation of a field that is a number within these bounds, or a schedule whose ends are."""
    number = Annotated[float, Field(ge=ge, le=le), Tag("number")]
    schedule = Annotated[member_of(Schedule), AfterValidator(partial(_within, ge, le)), Tag("schedule")]
    return Annotated[number | schedule, Discriminator(_kind)]


def _kind(value: Any) -> str:
    return "schedule" if isinstance(value, dict | Schedule) else "number"


def _within(ge: float, le: float, schedule: Schedule) -> Schedule:
    for name in ("start", "end"):
        value = getattr(schedule, name)
        if not ge <= value <= le:
            raise ValueError(f"found {name} {value:g}, expected {ge:g} to {le:g}")
    return schedule
