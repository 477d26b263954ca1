"""Term: one part of an objective. The class is its own config; its tensor maths needs no import of torch until it runs.

A term returns one value per token. Counting, scaling and summing are done once, by the trainer and the learner.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from limbeck.errors import RecipeError
from limbeck.objectives.schedule import Schedule, scheduled
from limbeck.spec import Family

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Generator, Tensor, nn

    from limbeck.objectives.support import Dense, Gradient, Target

States = Mapping[int, "Float[Tensor, 'r d']"]
"""Hidden states of represented tokens by block."""
COLDEST, HOTTEST = 0.01, 100.0
"""Temperatures of losses. Of colder ones all distributions are one-hot; of hotter ones float32 sees rounding where they differ."""
Count = Literal["scored", "represented"]
LayerPairs = tuple[tuple[int, int], ...]


class Calibration:
    """States of student and teacher at the same tokens, before training."""

    @property
    def student(self) -> States:
        """Of all blocks."""
        raise NotImplementedError

    @property
    def teacher(self) -> States:
        """Of the blocks that all terms together need."""
        raise NotImplementedError


@dataclass(frozen=True)
class Needs:
    """What an objective asks of the teacher: its output distribution, and the residual stream after some blocks (from 0)."""

    output: bool = False
    layers: frozenset[int] = field(default_factory=frozenset)

    @property
    def anything(self) -> bool:
        return self.output or bool(self.layers)

    def __or__(self, other: Needs) -> Needs:
        return Needs(self.output or other.output, self.layers | other.layers)


class Term(Family):
    """Base of the family of terms."""

    type: str
    weight: scheduled(ge=0, le=1e6) = 1.0  # type: ignore[valid-type]
    """Factor of this term in the loss, per token: a number, or one that changes over the run, `{type: linear, start: 1.0, end: 0.2}`. A
    term of weight 0 is dropped before anything runs."""

    count: ClassVar[Count]
    """Which tokens the term averages over."""

    def needs(self, student_layers: int, teacher_layers: int) -> Needs:
        """What this term asks of a teacher with that many blocks."""
        return Needs()

    @property
    def schedules(self) -> dict[str, Schedule]:
        """What changes over the run, by field."""
        return {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), Schedule)}

    def at(self, step: int, num_steps: int) -> Self:
        """This term as it is at a step, counted from 0: with numbers in the place of schedules."""
        numbers = {name: schedule.at(step, num_steps) for name, schedule in self.schedules.items()}
        return self.model_copy(update=numbers) if numbers else self


class OutputTerm(Term):
    """A term over the output distribution, evaluated a chunk of scored tokens at a time inside the fused head."""

    count: ClassVar[Count] = "scored"
    supports: ClassVar[frozenset[str]] = frozenset({"dense"})
    """Of a term that needs the teacher's output: over what it is defined, the whole vocabulary or the top k tokens and the rest."""

    def refuses(self, support: str, temperatures: Collection[float] | None, k: int | None = None) -> str | None:
        """Why this term cannot be had of a teacher that gives its output on this support, at these temperatures (None: any), and of
        top tokens at most `k` (None: not known)."""
        if self.needs(1, 1).output and support not in self.supports:
            return f"{self.type} is defined on {' and '.join(sorted(self.supports))}, and the teacher gives {support}"
        return None

    def taught_by(self, teacher: Target | None) -> Target:
        """The teacher, or a RecipeError that says why it does not do."""
        if problem := self.refuses("no output" if teacher is None else teacher.kind, None):
            raise RecipeError(f"objective.{self.type}: {problem}")
        assert teacher is not None
        return teacher

    @property
    def is_gated(self) -> bool:
        """Whether the term leaves tokens out, of which the log tells the share."""
        return False

    def gate(self, teacher: Target | None, targets: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """The tokens that a gated term leaves out: their values are 0, and they count like all others."""
        raise NotImplementedError

    def values(self, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The loss of each token, in nats."""
        raise NotImplementedError

    def closed_form(
        self, grad: Gradient, scale: float, student: Dense, teacher: Target | None, targets: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"] | None:
        """Add `scale` times d(sum of values)/d(student logits) to `grad` and return the values; or touch nothing and return None,
        and the head uses autograd inside the chunk."""
        return None


class HiddenTerm(Term):
    """A term over hidden states of mapped layers, at the represented tokens."""

    count: ClassVar[Count] = "represented"

    def layer_pairs(self, student_layers: int, teacher_layers: int) -> LayerPairs:
        """(student block, teacher block) pairs, counted from 0."""
        raise NotImplementedError

    @property
    def is_settled(self) -> bool:
        """Whether `layer_pairs` is known before training; else `map_layers` finds it."""
        return True

    def map_layers(self, student: States, teacher: States) -> dict[str, Any]:
        """`pairs`, from states of all blocks at the same tokens, beside whatever led to them: it is kept in the run's data.json."""
        raise NotImplementedError

    def mapped(self, pairs: LayerPairs) -> HiddenTerm:
        """This term with these pairs."""
        raise NotImplementedError

    def projections(self, num_pairs: int, student_width: int, teacher_width: int, generator: Generator) -> nn.ModuleList:
        """Trained maps from student to teacher width, one per pair; empty where none is wanted."""
        raise NotImplementedError

    def fit(self, projections: nn.ModuleList, pairs: LayerPairs, calibration: Calibration) -> None:
        """Give the projections other first values, if `calibration` is to say them; it runs the models only when it is asked."""

    def values(
        self, student: Sequence[Float[Tensor, "r d"]], teacher: Sequence[Float[Tensor, "r e"]], projections: nn.ModuleList
    ) -> Float[Tensor, " r"]:
        """The loss of each token, averaged over the pairs."""
        raise NotImplementedError


def active(objective: Sequence[Term]) -> dict[str, Term]:
    """Terms that ever have a weight by the key under which they are scaled and logged: the `type`, numbered where it repeats."""
    terms: dict[str, Term] = {}
    for term in objective:
        same = sum(other.type == term.type for other in terms.values())
        if term.weight != 0:
            terms[term.type if not same else f"{term.type}_{same + 1}"] = term
    return terms


def gates(terms: Mapping[str, Term]) -> dict[str, OutputTerm]:
    """Gated terms by the key under which the number of tokens that they leave out is summed and logged."""
    return {f"gated/{key}": term for key, term in terms.items() if isinstance(term, OutputTerm) and term.is_gated}


def needs_of(terms: Mapping[str, Term], student_layers: int, teacher_layers: int) -> Needs:
    """What all terms together ask of the teacher."""
    total = Needs()
    for term in terms.values():
        total |= term.needs(student_layers, teacher_layers)
    return total
