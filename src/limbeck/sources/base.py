"""Source: who writes the tokens. An opened source says which samples an optimizer step trains on; batching them is done here, once.

The order is a pure function of (seed, step): it depends neither on the number of processes, nor on the microbatch, nor on a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from limbeck.spec import Family
from limbeck.tokens.pack import lay_out
from limbeck.tokens.sample import Sample

if TYPE_CHECKING:
    from limbeck.batch import Batch


class OpenSource(Protocol):
    """A source with its data at hand."""

    samples: Sequence[Sample]
    """All samples that it may give; a capture walks them."""

    def at(self, step: int, batch_size: int) -> list[Sample]:
        """The `batch_size` samples of an optimizer step, over all processes."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps after which every sample was given once."""
        ...

    def describe(self) -> dict[str, Any]:
        """Counts and hashes, for the run's data.json."""
        ...


class Source(Family):
    """Base of the family of sources."""

    type: str

    @property
    def names(self) -> list[str]:
        """Files and named data sets that it reads: what they hold decides a run, which does not go on where they were edited."""
        return []

    @property
    def modules(self) -> list[str]:
        """Modules of the user's that make its rows; they decide a run as much."""
        return []

    def check(self) -> None:
        """Raise on what would stop `open` and shows without reading: a missing file, package or function. Torch-free."""

    def open(self, tokenizer: Any, seed: int) -> OpenSource:
        """Read and render; `seed` fixes the order."""
        raise NotImplementedError


def microbatches(
    samples: Sequence[Sample], micro_batch_size: int, rank: int, world_size: int, pad_id: int, pack_length: int | None = None
) -> list[Batch]:
    """This rank's share of an optimizer step. All ranks get equally many microbatches; where the rows do not suffice, empty ones."""
    from limbeck.tokens.pad import collate

    parts = lay_out(samples, micro_batch_size, pack_length)
    while len(parts) % world_size:
        parts.append([])
    return [collate(part, pad_id) for part in parts[rank::world_size]]
