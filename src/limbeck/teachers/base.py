"""Teacher: who scores the tokens. The spec is torch-free; `open` gives a Scorer that turns a Batch into a Signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from limbeck.objectives.base import Needs
from limbeck.spec import Family
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from limbeck.batch import Batch, Signal
    from limbeck.store.codec import Codec
    from limbeck.store.manifest import TeacherIdentity


@dataclass(frozen=True)
class Provides:
    """What a teacher can say, as far as it is known without loading it.

    `layers` are the blocks whose states it can give; None where that is not known before it is loaded. `width` is E, and `vocabulary` V
    with padded rows. Its output comes on a `support`, at `temperatures`, or at any where that is None, with at most `k` tokens of a
    distribution, or with others than top tokens where that is None.
    """

    output: bool = False
    support: str = "dense"
    temperatures: tuple[float, ...] | None = None
    k: int | None = None
    layers: frozenset[int] | None = frozenset()
    num_layers: int | None = None
    width: int | None = None
    vocabulary: int | None = None


class Scorer(Protocol):
    """An opened teacher."""

    name: str
    num_layers: int
    width: int
    vocabulary: int
    """Tokens shared with the student; the teacher's distribution is over these."""

    def asking(self, needs: Needs) -> Scorer:
        """The same teacher, asked for less. Called only of one that gives hidden states."""
        ...

    def score(self, batch: Batch) -> Signal:
        """The Signal for a batch, with the fields that were asked for when the teacher was opened."""
        ...

    def expect(self, batches: Sequence[Batch]) -> None:
        """Batches that will be scored next, in this order: one who reads from disk may begin. Nothing depends on it but time."""
        ...

    def require(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that this teacher cannot score (a capture that lacks them); says the share missing."""
        ...

    def verify_packing(self) -> None:
        """Refuse to score batches whose rows hold several documents, if this teacher cannot keep them apart."""
        ...


class Teacher(Family):
    """Base of the family of teachers."""

    type: str

    computes: ClassVar[bool] = False
    """Whether it is asked itself, and so can be captured."""

    @property
    def speaks(self) -> tuple[str, str | None] | None:
        """Name and revision of its tokenizer, where it has one of its own."""
        return None

    def provides(self) -> Provides:
        """What this teacher can say; torch-free."""
        return Provides()

    def check(self) -> None:
        """Raise on what would stop `open` and shows before anything is loaded: a missing model or package. Torch-free."""

    def reach(self) -> None:
        """Raise where it is elsewhere and does not answer now: for who asks a question, and not for a run, which waits."""

    def prepare(self) -> None:
        """Fetch what `provides` needs in order to know its layers, and nothing more; most teachers have it at hand."""

    def open(self, tokenizer: Any, needs: Needs, device: str = "cpu") -> Scorer:
        """Load it for batches made with `tokenizer` (the student's). Refuses another vocabulary."""
        raise NotImplementedError

    def open_beside(self, student: Any, tokenizer: Any, needs: Needs, device: str = "cpu") -> Scorer:
        """Open it where `student` is trained: a teacher may be made of weights that the student keeps frozen. Most are not."""
        return self.open(tokenizer, needs, device)

    def refuses_codec(self, codec: Codec, is_chosen: bool) -> str | None:
        """Why a capture of it cannot be kept so, and what can; `is_chosen` says that how much is kept will be measured. Torch-free. Asked
        only of one that computes, like the next."""
        return None

    def content(self) -> str | None:
        """SHA-256 of what lies behind its names, where that is a folder; None where they tell which teacher it is. Torch-free."""
        return None

    def identity(self, scorer: Any) -> TeacherIdentity:
        """Which teacher it is that `open` gave `scorer` for."""
        raise NotImplementedError
