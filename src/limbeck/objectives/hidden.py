"""Hidden-state distillation: the residual streams of mapped blocks are drawn together, through trained projections where widths differ
or one is asked for.

Which blocks are mapped is decided here; the states themselves come from the learner (student) and the signal (teacher).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from limbeck.errors import RecipeError
from limbeck.objectives.base import Calibration, HiddenTerm, LayerPairs, Needs, States

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Generator, Tensor, nn

RIDGE = 1e-3
"""Strength of the ridge regression, as a share of the mean square of the student's features."""


class MappedHidden(HiddenTerm):
    """A hidden term over pairs of blocks: which they are, and the mean over them of a distance."""

    pairs: Literal["uniform", "cka"] | list[tuple[int, int]] = "uniform"
    """`uniform` spreads the student's blocks over the teacher's, last to last; `cka` maps each to the teacher's block that is most like it
    on the first samples of the run (linear CKA), and none to a shallower one than the block before it; or a list of
    [student block, teacher block], from 0."""
    num_pairs: int | None = Field(None, gt=0)
    """How many pairs `uniform` and `cka` make, spread over the student's depth; one for each of its blocks where it is not set."""

    @field_validator("pairs")
    @classmethod
    def _sane(cls, pairs: str | list[tuple[int, int]]) -> str | list[tuple[int, int]]:
        if isinstance(pairs, str):
            return pairs
        if not pairs or any(block < 0 for pair in pairs for block in pair):
            raise ValueError(f"found {pairs}, expected `uniform`, `cka` or at least one [student block, teacher block], counted from 0")
        if len(set(pairs)) != len(pairs):
            raise ValueError(f"found the same pair twice in {pairs}")
        return pairs

    @model_validator(mode="after")
    def _num_pairs_of_uniform(self) -> MappedHidden:
        if self.num_pairs is not None and not isinstance(self.pairs, str):
            raise ValueError("found num_pairs beside a list of pairs, expected it with `pairs: uniform` or `pairs: cka` only")
        return self

    @property
    def is_settled(self) -> bool:
        return self.pairs != "cka"

    def layer_pairs(self, student_layers: int, teacher_layers: int) -> LayerPairs:
        assert self.pairs != "cka", "a map that the data decides was asked for before"
        if self.pairs == "uniform":
            blocks = self._blocks(student_layers)
            return tuple((block, max(round((block + 1) * teacher_layers / student_layers) - 1, 0)) for block in blocks)
        for student, teacher in self.pairs:
            for who, block, layers in (("student", student, student_layers), ("teacher", teacher, teacher_layers)):
                if block >= layers:
                    raise RecipeError(f"objective.{self.type}.pairs: found {who} block {block}, expected 0 to {layers - 1}")
        return tuple(self.pairs)

    def _blocks(self, student_layers: int) -> list[int]:
        """The student's blocks that are mapped, where no list says them."""
        wanted = self.num_pairs or student_layers
        if wanted > student_layers:
            raise RecipeError(f"objective.{self.type}.num_pairs: found {wanted}, expected at most {student_layers}, the student's blocks")
        return [(i + 1) * student_layers // wanted - 1 for i in range(wanted)]

    def map_layers(self, student: States, teacher: States) -> dict[str, Any]:
        from limbeck.objectives.layer_map import linear_cka, rising_path

        ours, theirs = self._blocks(len(student)), sorted(teacher)
        similarity = linear_cka([student[block] for block in ours], [teacher[block] for block in theirs])
        pairs = [[block, theirs[column]] for block, column in zip(ours, rising_path(similarity), strict=True)]
        return {"pairs": pairs, "student_blocks": ours, "teacher_blocks": theirs, "cka": similarity.tolist()}

    def mapped(self, pairs: LayerPairs) -> MappedHidden:
        return self.model_copy(update={"pairs": list(pairs), "num_pairs": None})

    def needs(self, student_layers: int, teacher_layers: int) -> Needs:
        if not self.is_settled:
            self._blocks(student_layers)
            return Needs(layers=frozenset(range(teacher_layers)))
        return Needs(layers=frozenset(teacher for _, teacher in self.layer_pairs(student_layers, teacher_layers)))

    def values(
        self, student: Sequence[Float[Tensor, "r d"]], teacher: Sequence[Float[Tensor, "r e"]], projections: nn.ModuleList
    ) -> Float[Tensor, " r"]:
        per_pair = []
        for index, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
            projected = projections[index](ours) if len(projections) else ours
            per_pair.append(self.distance(projected.float(), theirs.float()))
        return sum(per_pair[1:], per_pair[0]) / len(per_pair)

    def distance(self, ours: Float[Tensor, "r e"], theirs: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
        """Of projected student states to teacher states of one pair, both in float32."""
        raise NotImplementedError


class Hidden(MappedHidden):
    """A distance between projected student states and teacher states, averaged over features and pairs.

    mse: mean((P h_S - h_T)^2) (TinyBERT, 1909.10351); cosine: 1 - cos(P h_S, h_T) (DistilBERT, 1910.01108).
    """

    type: Literal["hidden"] = "hidden"
    measure: Literal["mse", "cosine"] = "mse"
    """`mse` also matches sizes of features, `cosine` only directions."""
    normalize: Literal["layer_norm", "none"] = "layer_norm"
    """`layer_norm` brings each state to mean 0 and variance 1 first; without it `mse` sees little but a few outlier features."""
    projection: Literal["random", "orthogonal", "ridge"] = "random"
    """What projections begin with. `random`: independent normal numbers, and no projection where student and teacher have one width. The
    others project there too: `orthogonal` columns or rows, which keep angles, and the `ridge` regression of the teacher's states on the
    student's at the first samples of the run, which begins with a lower loss."""

    def projections(self, num_pairs: int, student_width: int, teacher_width: int, generator: Generator) -> nn.ModuleList:
        """One linear map per pair, if one is wanted, drawn from `generator` so that every rank and every run starts alike."""
        from torch import nn

        maps = nn.ModuleList()
        for _ in range(num_pairs if student_width != teacher_width or self.projection != "random" else 0):
            linear = nn.Linear(student_width, teacher_width, bias=False)
            if self.projection == "orthogonal":
                nn.init.orthogonal_(linear.weight, generator=generator)
            else:
                nn.init.normal_(linear.weight, std=student_width**-0.5, generator=generator)
            maps.append(linear)
        return maps

    def fit(self, projections: nn.ModuleList, pairs: LayerPairs, calibration: Calibration) -> None:
        if self.projection != "ridge":
            return
        from limbeck.objectives.layer_map import ridge

        for parameter, (student, teacher) in zip(projections.parameters(), pairs, strict=True):
            parameter.data.copy_(ridge(calibration.student[student], self._normal(calibration.teacher[teacher]), RIDGE))

    def distance(self, ours: Float[Tensor, "r e"], theirs: Float[Tensor, "r e"]) -> Float[Tensor, " r"]:
        from torch.nn import functional

        ours, theirs = self._normal(ours), self._normal(theirs)
        if self.measure == "cosine":
            return 1 - functional.cosine_similarity(ours, theirs, dim=-1)
        return (ours - theirs).square().mean(-1)

    def _normal(self, state: Tensor) -> Tensor:
        from torch.nn import functional

        return functional.layer_norm(state, state.shape[-1:]) if self.normalize == "layer_norm" else state
